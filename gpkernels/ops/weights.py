"""clip_weights_ and rmsprop_: in-place updates of all weights in one call."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.compiler import is_compiling

from gpkernels.ops.checks import check_floating, check_nonnegative, check_writable
from gpkernels.ops.op import Op
from gpkernels.ops.tensors import accumulation_dtype, local


def clip_weights_reference(params: Sequence[Tensor], c: float) -> None:
    """Clamp every weight to [-c, c] in place (Arjovsky et al. 2017, Algorithm 1); NaN stays NaN."""
    for p in params:
        p.clamp_(-c, c)


def rmsprop_reference(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    square_avgs: Sequence[Tensor],
    grad_avgs: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    lr: float,
    alpha: float,
    eps: float,
    weight_decay: float,
    momentum: float,
    maximize: bool,
    clip: float | None,
) -> None:
    """Apply the update of torch.optim.RMSprop, then a clamp to [-clip, clip]; state is rounded once, when stored.

    Centred if ``grad_avgs`` is not empty, with momentum if ``momentum_buffers`` is not empty.
    """
    for i, param in enumerate(params):
        wide = accumulation_dtype(param.dtype)
        p, g, square = param.to(wide), grads[i].to(wide), square_avgs[i].to(wide)
        g = -g if maximize else g
        if weight_decay != 0:
            g = g.add(p, alpha=weight_decay)
        square = square.mul(alpha).addcmul(g, g, value=1 - alpha)
        square_avgs[i].copy_(square)
        variance = square
        if grad_avgs:
            average = grad_avgs[i].to(wide).lerp(g, 1 - alpha)
            grad_avgs[i].copy_(average)
            variance = square.addcmul(average, average, value=-1)
        step = variance.sqrt().add(eps)
        if momentum_buffers:
            buffer = momentum_buffers[i].to(wide).mul(momentum).addcdiv(g, step)
            momentum_buffers[i].copy_(buffer)
            p = p.add(buffer, alpha=-lr)
        else:
            p = p.addcdiv(g, step, value=-lr)
        param.copy_(p if clip is None else p.clamp(-clip, clip))


clip_weights_op = Op(
    "clip_weights_(Tensor(a!)[] params, float c) -> ()", clip_weights_reference, lambda params, c: None
)


rmsprop_op = Op(
    "rmsprop_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] square_avgs, Tensor(c!)[] grad_avgs,"
    " Tensor(d!)[] momentum_buffers, float lr, float alpha, float eps, float weight_decay, float momentum,"
    " bool maximize, float? clip) -> ()",
    rmsprop_reference,
    lambda *args: None,
)


def clip_weights_(params: Tensor | Iterable[Tensor], c: float) -> None:
    r"""Clamp every weight to [-c, c] in place, all tensors in one call.

    .. math::
        w \leftarrow \min(\max(w, -c), c)

    NaN stays NaN. Not differentiable; graphs that saved a clipped weight raise in backward, as after any in-place
    change.

    Args:
        params (Tensor or iterable of Tensor): the weights, such as ``critic.parameters()``; dtypes and devices may
            differ. Of a DTensor each process clips the part that it has.
        c (float): bound, finite and at least 0.

    Raises:
        TypeError: ``params`` or a weight is not a dense floating-point tensor, or ``c`` is not a number.
        ValueError: ``c`` is negative or not finite.
        RuntimeError: a weight overlaps itself in memory. All errors are raised before any weight is changed.

    Example:
        >>> critic = torch.nn.Linear(2, 1)
        >>> gpkernels.clip_weights_(critic.parameters(), 0.01)
        >>> all(p.abs().max() <= 0.01 for p in critic.parameters())
        True

    References:
        Arjovsky et al., "Wasserstein GAN", 2017, Algorithm 1. https://arxiv.org/abs/1701.07875
    """
    c = check_nonnegative("c", c)
    if not isinstance(params, Iterable):
        raise TypeError(f"params: expected a tensor or an iterable of tensors, got {type(params).__name__}")
    tensors = [params] if isinstance(params, Tensor) else list(params)
    if not is_compiling() and clip_weights_op.direct(tensors, c) is not NotImplemented:
        return
    by_device: dict[torch.device, list[Tensor]] = {}
    for i, p in enumerate(tensors):
        check_floating(f"params[{i}]", p)
        check_writable(f"params[{i}]", p)
        by_device.setdefault(p.device, []).append(p)
    for group in by_device.values():
        with torch.no_grad():
            clip_weights_op([local(p, p) for p in group], c)
        torch.autograd.graph.increment_version(group)
