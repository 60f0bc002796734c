"""``mlp_critic_step`` on GPUs: PyTorch's products, and between them the ops that fuse what lies there.

Every pass is over all groups at once. As on CPUs, the tangents take the place of the activations at the penalised rows,
so that a layer's weight gradient is one product over the rows of the loss and of the penalty.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gpkernels import ops

_mask_into = torch.ops.aten.leaky_relu_backward.grad_input


def mlp_critic_step(
    plain: Sequence[Tensor],
    points: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    slopes: Sequence[float],
    real: int,
    fake: int,
    real_kind: int,
    fake_kind: int,
    weight: float,
    target: float,
    one_sided: bool,
    gradients: bool,
) -> tuple[Tensor, list[Tensor]]:
    """As ``reference.mlp_critic_step``, whose arguments and results it has."""
    n = (plain or points)[0].shape[0]
    first = n * len(plain)  # of the penalised rows
    acts = _forward(ops.critic_batch(plain, points), weights, biases, slopes)
    scores = acts.pop()
    parts, seeds, scale = ops.score_seeds(scores, biases[-1], n, real, fake, real_kind, fake_kind, first)
    if not (gradients or points):
        return parts, []
    deltas = _pull(seeds, acts, weights, slopes)
    tangent = None
    if points:
        tangent = torch.mm(deltas[0][first:], weights[0], out=None if scale.numel() else acts[0][first:])
        ops.penalty_direction_(tangent, parts, weight, target, one_sided)
    if not gradients:
        return parts, []
    found = []
    sums = ops.column_sums(deltas, first, scale)
    for i, delta in enumerate(deltas):
        if tangent is not None:
            tangent = _push(tangent, i, acts, weights, slopes, first, scale)
        found += [torch.mm(delta.t(), acts[i]), sums[i]]
    return parts, found


def _forward(
    batch: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], slopes: Sequence[float]
) -> list[Tensor]:
    """Each layer's input, and the scores without their bias."""
    acts = [batch]
    for i, w in enumerate(weights):
        acts.append(torch.mm(acts[-1], w.t()))
        if i < len(slopes):
            ops.bias_activation_(acts[-1], biases[i], slopes[i])
    return acts


def _pull(seeds: Tensor, acts: Sequence[Tensor], weights: Sequence[Tensor], slopes: Sequence[float]) -> list[Tensor]:
    """Each layer's cotangent at its output."""
    deltas = [seeds]
    for i in reversed(range(len(slopes))):
        w, y = weights[i + 1], acts[i + 1]
        if w.shape[0] == 1:
            deltas.append(ops.masked_outer(deltas[-1], w, y, slopes[i]))
        else:
            delta = torch.mm(deltas[-1], w)
            deltas.append(_mask_into(delta, y, slopes[i], True, grad_input=delta))
    return deltas[::-1]


def _push(
    tangent: Tensor,
    i: int,
    acts: Sequence[Tensor],
    weights: Sequence[Tensor],
    slopes: Sequence[float],
    first: int,
    scale: Tensor,
) -> Tensor:
    """The tangent of layer i's input, from that of the layer before (the direction itself for the first).

    It is left at the penalised rows of the input, joined by ``scale`` times what stood there if those rows are scored.
    """
    y = acts[i][first:]
    if i > 0:
        pushed = torch.mm(tangent, weights[i - 1].t())
        tangent = _mask_into(pushed, y, slopes[i - 1], True, grad_input=pushed if scale.numel() else y)
    if scale.numel():
        torch.addcmul(tangent, y, scale[:, None], out=y)
    return tangent
