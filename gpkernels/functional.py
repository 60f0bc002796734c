"""The differentiable ops: pairs of autograd Functions over the raw ops of ``gpkernels.ops``.

The first derivative is a kernel. Derivatives beyond it are taken of the reference, through ``torch.func.vjp``, so every
order exists and is exact. The pairs work under ``torch.func`` and ``torch.compile(fullgraph=True)``.
Inputs: float64, float32, float16 or bfloat16 tensors on one device, in any memory layout; mixed dtypes promote as in
PyTorch. Losses and penalties of float16 and bfloat16 tensors are float32.
Errors: TypeError for what is not a floating-point tensor or a number, ValueError for shapes, devices, empty batches and
constants out of range; both name the argument, before anything is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad
from torch.compiler import is_compiling

from gpkernels import ops, reference
from gpkernels.ops import check_batch, check_eps, check_nonnegative, check_pair, check_same_device
from gpkernels.reference import SCORE_LOSSES


def promote(*tensors: Tensor) -> list[Tensor]:
    """The tensors in the dtype that PyTorch would compute them in."""
    for tensor in tensors:
        if tensor.dtype != tensors[0].dtype:
            break
    else:
        return list(tensors)
    dtype = reduce(torch.promote_types, (t.dtype for t in tensors))
    return [t.to(dtype) for t in tensors]


def _second_order(
    value: Callable[..., Tensor], primals: Sequence[Tensor], cotangent: Tensor, tangents: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Derivative of (cotangent, *primals) -> vjp of ``value``, applied to ``tangents``, in that order."""

    def first_order(cotangent: Tensor, *primals: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.func.vjp(value, *primals)[1](cotangent))

    return tuple(torch.func.vjp(first_order, cotangent, *primals)[1](tuple(tangents)))


# --- random numbers ---------------------------------------------------------------------------------------------------


def draw_key(device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """A Philox key: one int64 on ``device``, from torch's own generator there."""
    if generator is not None:
        if not isinstance(generator, torch.Generator):
            raise TypeError(f"generator: expected a torch.Generator, got {type(generator).__name__}")
        if generator.device.type != device.type:
            raise ValueError(f"generator: expected one on {device}, got one on {generator.device}")
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device, generator=generator)


class _Differentiable(Function):
    generate_vmap_rule = True


def _apply(function: type[_Differentiable], *args: Any) -> Any:
    """``function.apply`` without what costs more than a small op: a graph that nobody wants, and binding arguments."""
    if is_compiling() or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return function.apply(*args)
    if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)):
        return function.forward(*args)
    return super(Function, function).apply(*args)  # type: ignore[misc]


# --- interpolate ------------------------------------------------------------------------------------------------------


class _Interpolate(_Differentiable):
    @staticmethod
    def forward(real: Tensor, fake: Tensor, eps: Tensor) -> Any:
        return ops.interpolate(real, fake, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        return *_interpolate_backward(ctx, cotangent, ctx.saved_tensors[0]), None


class _InterpolateRandom(_Differentiable):
    @staticmethod
    def forward(real: Tensor, fake: Tensor, key: Tensor) -> Any:
        return ops.interpolate_random(real, fake, key)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor, _: Tensor) -> Any:
        return *_interpolate_backward(ctx, cotangent, ctx.saved_tensors[0]), None


def _interpolate_backward(ctx: Any, cotangent: Tensor, eps: Tensor) -> tuple[Tensor | None, Tensor | None]:
    to_real, to_fake = ctx.needs_input_grad[:2]
    real, fake = _apply(_InterpolateBackward, cotangent, eps, to_real, to_fake)
    return real if to_real else None, fake if to_fake else None


class _InterpolateBackward(_Differentiable):
    @staticmethod
    def forward(cotangent: Tensor, eps: Tensor, to_real: bool, to_fake: bool) -> Any:
        return ops.interpolate_backward(cotangent, eps, to_real, to_fake)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.sides = inputs[2], inputs[3]

    @staticmethod
    def backward(ctx: Any, real: Tensor, fake: Tensor) -> Any:
        (eps,) = ctx.saved_tensors
        if all(ctx.sides):
            return _apply(_Interpolate, real, fake, eps), None, None, None
        side = 0 if ctx.sides[0] else 1
        return _apply(_InterpolateBackward, (real, fake)[side], eps, *ctx.sides)[side], None, None, None


def interpolate(
    real: Tensor, fake: Tensor, eps: Tensor | None = None, *, generator: torch.Generator | None = None
) -> Tensor:
    """eps * real + (1 - eps) * fake, the points where WGAN-GP penalises (Gulrajani et al. 2017, Algorithm 1).

    real, fake: (N, *), one shape. eps: (N,) or (N, 1, ..., 1), one per sample; drawn from U[0, 1) if None, from
    ``generator`` if given. Returns (N, *) in the promoted dtype of real and fake. Differentiable to any order in every
    tensor. Raises TypeError or ValueError for bad input.
    """
    if eps is not None and not is_compiling():
        mixed = ops.interpolate.direct(real, fake, eps)
        if mixed is not NotImplemented:
            return mixed
    check_pair("real", real, "fake", fake)
    if eps is not None:
        check_eps(eps, real)
    real, fake = promote(real, fake)
    if eps is None:
        mixed = _apply(_InterpolateRandom, real, fake, draw_key(real.device, generator))[0]
        return mixed
    if torch.is_grad_enabled() and eps.requires_grad:  # rare enough to leave to PyTorch
        return reference.interpolate(real, fake, eps)
    mixed = _apply(_Interpolate, real, fake, eps)
    return mixed


# --- instance noise ---------------------------------------------------------------------------------------------------


class _InstanceNoise(_Differentiable):
    @staticmethod
    def forward(x: Tensor, sigma: float, key: Tensor) -> Any:
        return ops.instance_noise(x, sigma, None, key, True)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None: ...

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        return cotangent, None, None


def add_instance_noise(x: Tensor, sigma: float, *, generator: torch.Generator | None = None) -> Tensor:
    """x + sigma * N(0, 1), drawn per element (Sønderby et al. 2017).

    x: (N, *); sigma >= 0. Returns x's shape and dtype; a seed gives the same noise on every backend up to rounding.
    Differentiable to any order in x. Raises TypeError or ValueError for bad input.
    """
    check_batch("x", x)
    sigma = check_nonnegative("sigma", sigma)
    key = draw_key(x.device, generator)
    noisy: Tensor = NotImplemented if is_compiling() else ops.instance_noise.direct(x, sigma, None, key, True)
    return _apply(_InstanceNoise, x, sigma, key) if noisy is NotImplemented else noisy


# --- gradient norm penalty --------------------------------------------------------------------------------------------


class _GradientNormPenalty(_Differentiable):
    @staticmethod
    def forward(grad: Tensor, target: float, one_sided: bool, reduction: int) -> Any:
        return ops.gradient_norm_penalty(grad, target, one_sided, reduction)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(inputs[0], output[1])
        ctx.options = inputs[1:]

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor, _: Tensor) -> Any:
        return _apply(_GradientNormPenaltyBackward, cotangent, *ctx.saved_tensors, *ctx.options), None, None, None


class _GradientNormPenaltyBackward(_Differentiable):
    @staticmethod
    def forward(
        cotangent: Tensor, grad: Tensor, coefficient: Tensor, target: float, one_sided: bool, reduction: int
    ) -> Any:
        return ops.gradient_norm_penalty_backward(cotangent, grad, coefficient)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[0], inputs[1])
        ctx.options = inputs[3:]

    @staticmethod
    def backward(ctx: Any, tangent: Tensor) -> Any:
        cotangent, grad = ctx.saved_tensors
        options = ctx.options
        to_cotangent, to_grad = _second_order(
            lambda g: reference.gradient_norm_penalty(g, *options)[0], (grad,), cotangent, (tangent,)
        )
        return to_cotangent, to_grad, None, None, None, None


def gradient_norm_penalty(
    grad: Tensor, target: float = 1.0, *, one_sided: bool = False, reduction: str = "mean"
) -> Tensor:
    """Mean (|g_n| - target)^2 over an input gradient (Gulrajani et al. 2017, eq. 3).

    grad: (N, *), |.| over all but the first axis. one_sided: max(0, |g_n| - target)^2 instead. reduction: "mean", "sum"
    or "none", which gives (N,). target = 0 is the zero-centred penalty |g_n|^2. Where |g_n| = 0 the subgradient is 0.
    Differentiable to any order in grad. Raises TypeError or ValueError for bad input.
    """
    options = check_nonnegative("target", target), bool(one_sided), ops.check_reduction(reduction)
    plain = NotImplemented if is_compiling() else ops.gradient_norm_penalty.direct(grad, *options)
    if plain is not NotImplemented:
        return plain[0]
    check_batch("grad", grad)
    penalty: Tensor = _apply(_GradientNormPenalty, grad, *options)[0]
    return penalty


# --- consistency ------------------------------------------------------------------------------------------------------


def _save_consistency(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*inputs[:4], *output[1:])
    ctx.constants = inputs[4:]


def _consistency_backward(ctx: Any, cotangent: Tensor) -> tuple[Any, ...]:
    to_b = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
    grads = _apply(_ConsistencyBackward, cotangent, *ctx.saved_tensors, to_b, ctx.constants)
    kept = tuple(g if needed else None for g, needed in zip(grads, ctx.needs_input_grad[:4], strict=True))
    return *kept, *[None] * len(ctx.constants)


class _ConsistencyTerm(_Differentiable):
    setup_context = staticmethod(_save_consistency)

    @staticmethod
    def forward(s1: Tensor, s2: Tensor, f1: Tensor, f2: Tensor, margin: float, feature_weight: float) -> Any:
        return ops.consistency_term(s1, s2, f1, f2, margin, feature_weight)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor, *_: Tensor) -> Any:
        return _consistency_backward(ctx, cotangent)


class _LipschitzConsistency(_Differentiable):
    setup_context = staticmethod(_save_consistency)

    @staticmethod
    def forward(s1: Tensor, s2: Tensor, x1: Tensor, x2: Tensor, margin: float) -> Any:
        return ops.lipschitz_consistency(s1, s2, x1, x2, margin)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor, *_: Tensor) -> Any:
        return _consistency_backward(ctx, cotangent)


class _ConsistencyBackward(_Differentiable):
    @staticmethod
    def forward(
        cotangent: Tensor,
        a1: Tensor,
        a2: Tensor,
        b1: Tensor,
        b2: Tensor,
        a_coefficient: Tensor,
        b_coefficient: Tensor,
        to_b: bool,
        constants: tuple[float, ...],
    ) -> Any:
        return ops.consistency_backward(cotangent, a1, a2, b1, b2, a_coefficient, b_coefficient, to_b)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs[:5])
        ctx.to_b, ctx.constants = inputs[7:]

    @staticmethod
    def backward(ctx: Any, *tangents: Tensor) -> Any:
        cotangent, *pairs = ctx.saved_tensors
        term = reference.consistency_term if len(ctx.constants) == 2 else reference.lipschitz_consistency
        wanted = tangents if ctx.to_b else (*tangents[:2], *(torch.zeros_like(b) for b in pairs[2:]))
        constants = ctx.constants
        grads = _second_order(lambda *xs: term(*xs, *constants)[0], pairs, cotangent, wanted)
        return *grads, None, None, None, None


def consistency_term(
    score1: Tensor,
    score2: Tensor,
    features1: Tensor | None = None,
    features2: Tensor | None = None,
    *,
    margin: float = 0.0,
    feature_weight: float = 0.1,
) -> Tensor:
    """mean max(0, (s1 - s2)^2 + feature_weight * mean_j (f1_j - f2_j)^2 - margin), as CT-GAN trains (Wei et al. 2018).

    score1, score2: scores of two dropout passes over one batch, (N,), (N, 1) or (N, *), squares summed over a row.
    features1, features2: the last feature layer of each pass, (N, *), both or neither. Differentiable to any order in
    every tensor. Raises TypeError or ValueError for bad input.
    """
    constants = check_nonnegative("margin", margin), check_nonnegative("feature_weight", feature_weight)
    plain = (
        NotImplemented
        if is_compiling()
        else ops.consistency_term.direct(score1, score2, features1, features2, *constants)
    )
    if plain is not NotImplemented:
        return plain[0]
    check_pair("score1", score1, "score2", score2)
    if (features1 is None) != (features2 is None):
        missing = "features1" if features1 is None else "features2"
        raise ValueError(f"{missing}: expected a tensor, as for the other pass, got None")
    if features1 is None or features2 is None:
        features1, features2 = (score1.new_empty((score1.shape[0], 0)) for _ in range(2))
    _check_second_pair("features", features1, features2, score1)
    term: Tensor = _apply(_ConsistencyTerm, *promote(score1, score2, features1, features2), *constants)[0]
    return term


def lipschitz_consistency(score1: Tensor, score2: Tensor, x1: Tensor, x2: Tensor, *, margin: float = 0.0) -> Tensor:
    """mean max(0, |s1 - s2| / |x1 - x2| - margin) (Wei et al. 2018, eq. 4).

    score1, score2: (N,), (N, 1) or (N, *); x1, x2: (N, *), the inputs they belong to. A pair with x1 = x2 contributes
    0. Differentiable to any order in every tensor. Raises TypeError or ValueError for bad input.
    """
    margin = check_nonnegative("margin", margin)
    plain = NotImplemented if is_compiling() else ops.lipschitz_consistency.direct(score1, score2, x1, x2, margin)
    if plain is not NotImplemented:
        return plain[0]
    check_pair("score1", score1, "score2", score2)
    _check_second_pair("x", x1, x2, score1)
    term: Tensor = _apply(_LipschitzConsistency, *promote(score1, score2, x1, x2), margin)[0]
    return term


def _check_second_pair(name: str, first: Tensor, second: Tensor, score: Tensor) -> None:
    check_pair(f"{name}1", first, f"{name}2", second)
    if first.shape[0] != score.shape[0]:
        raise ValueError(f"{name}1: expected the batch of score1, {score.shape[0]}, got {first.shape[0]}")
    check_same_device("score1", score, f"{name}1", first)


# --- score losses -----------------------------------------------------------------------------------------------------


class _ScoreLoss(_Differentiable):
    @staticmethod
    def forward(first: Tensor, second: Tensor | None, kinds: tuple[int, ...]) -> Any:
        return ops.score_loss(_present(first, second), list(kinds))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.kinds = inputs[2]
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        first, second = ctx.saved_tensors
        grads = _apply(_ScoreLossBackward, cotangent, first, second, ctx.kinds)
        return grads[0], None if second is None else grads[1], None


class _ScoreLossBackward(_Differentiable):
    @staticmethod
    def forward(cotangent: Tensor, first: Tensor, second: Tensor | None, kinds: tuple[int, ...]) -> Any:
        return tuple(ops.score_loss_backward(cotangent, _present(first, second), list(kinds)))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.kinds = inputs[3]
        ctx.save_for_backward(*inputs[:3])

    @staticmethod
    def backward(ctx: Any, *tangents: Tensor) -> Any:
        cotangent, first, second = ctx.saved_tensors
        kinds = ctx.kinds
        grads = _second_order(lambda *s: reference.score_loss(s, kinds), _present(first, second), cotangent, tangents)
        return *grads, *[None] * (4 - len(grads))


def _present(first: Tensor, second: Tensor | None) -> list[Tensor]:
    return [first] if second is None else [first, second]


def _score_loss(**scores: tuple[Tensor, str]) -> Tensor:
    """The sum of mean phi(s) over one or two named score tensors, each with its kind of phi."""
    tensors = [tensor for tensor, _ in scores.values()]
    kinds = tuple(SCORE_LOSSES[kind] for _, kind in scores.values())
    plain = NotImplemented if is_compiling() else ops.score_loss.direct(tensors, kinds)
    if plain is not NotImplemented:
        return plain
    for name, tensor in zip(scores, tensors, strict=True):
        ops.check_floating(name, tensor)
        if tensor.numel() == 0:
            raise ValueError(f"{name}: expected at least one score, got shape {tuple(tensor.shape)}")
        check_same_device(next(iter(scores)), tensors[0], name, tensor)
    first, *rest = promote(*tensors)
    loss: Tensor = _apply(_ScoreLoss, first, rest[0] if rest else None, kinds)
    return loss


def wgan_critic_loss(real_scores: Tensor, fake_scores: Tensor) -> Tensor:
    """mean fake - mean real (Arjovsky et al. 2017, eq. 3, negated to be minimised).

    Scores: (N, *), batches may differ. Differentiable to any order. Raises TypeError or ValueError for bad input.
    """
    return _score_loss(real_scores=(real_scores, "negative"), fake_scores=(fake_scores, "identity"))


def wgan_generator_loss(fake_scores: Tensor) -> Tensor:
    """-mean fake. Scores: (N, *). Differentiable to any order. Raises TypeError or ValueError for bad input."""
    return _score_loss(fake_scores=(fake_scores, "negative"))


def gan_discriminator_loss(real_scores: Tensor, fake_scores: Tensor) -> Tensor:
    """mean softplus(-real) + mean softplus(fake), scores being logits (Goodfellow et al. 2014, eq. 1).

    Scores: (N, *), batches may differ. Differentiable to any order. Raises TypeError or ValueError for bad input.
    """
    return _score_loss(real_scores=(real_scores, "softplus_negative"), fake_scores=(fake_scores, "softplus"))


def saturating_generator_loss(fake_scores: Tensor) -> Tensor:
    """-mean softplus(fake), that is E log(1 - D), scores being logits (Goodfellow et al. 2014, eq. 1).

    Scores: (N, *). Differentiable to any order. Raises TypeError or ValueError for bad input.
    """
    return _score_loss(fake_scores=(fake_scores, "negative_softplus"))


def nonsaturating_generator_loss(fake_scores: Tensor) -> Tensor:
    """mean softplus(-fake), that is -E log D, scores being logits (Goodfellow et al. 2014, section 3).

    Scores: (N, *). Differentiable to any order. Raises TypeError or ValueError for bad input.
    """
    return _score_loss(fake_scores=(fake_scores, "softplus_negative"))


# --- weights ----------------------------------------------------------------------------------------------------------


def clip_weights_(params: Tensor | Sequence[Tensor], c: float) -> None:
    """Clamp every weight to [-c, c] in place, all tensors in one call (Arjovsky et al. 2017, Algorithm 1).

    params: a tensor or an iterable of them, such as ``critic.parameters()``; c >= 0. NaN stays NaN. Not
    differentiable. Raises TypeError or ValueError for bad input, RuntimeError for a tensor that overlaps itself, before
    any weight is changed.
    """
    c = check_nonnegative("c", c)
    tensors = [params] if isinstance(params, Tensor) else list(params)
    if not is_compiling() and ops.clip_weights_.direct(tensors, c) is not NotImplemented:
        return
    by_device: dict[torch.device, list[Tensor]] = {}
    for i, p in enumerate(tensors):
        ops.check_floating(f"params[{i}]", p)
        ops.check_writable(f"params[{i}]", p)
        by_device.setdefault(p.device, []).append(p)
    for group in by_device.values():
        with torch.no_grad():
            ops.clip_weights_(group, c)
        torch.autograd.graph.increment_version(group)
