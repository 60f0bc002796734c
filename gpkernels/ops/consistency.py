"""consistency_term and lipschitz_consistency: CT-GAN's terms on pairs of rows (Wei et al. 2018)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from gpkernels.ops.checks import check_nonnegative, check_pair, check_same_device
from gpkernels.ops.differentiable import Differentiable, apply, second_order
from gpkernels.ops.op import Op
from gpkernels.ops.tensors import laid_out, memory_format, new_like, new_wide, per_row, promote, rows_of


def _squared_distance(a: Tensor, b: Tensor) -> Tensor:
    difference = rows_of(a) - rows_of(b)
    return (difference * difference).sum(1)


def consistency_term_reference(
    score1: Tensor, score2: Tensor, features1: Tensor, features2: Tensor, margin: float, feature_weight: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute mean max(0, |s1 - s2|^2 + feature_weight * mean_j (f1_j - f2_j)^2 - margin) (Wei et al. 2018).

    Also returns the per-row coefficients of s1 - s2 and f1 - f2 in the derivative.
    """
    share = feature_weight / max(1, features1[0].numel())
    excess = _squared_distance(score1, score2) + share * _squared_distance(features1, features2) - margin
    active = torch.full_like(excess, 2.0 / score1.shape[0]).masked_fill(excess <= 0, 0.0).detach()
    return torch.where(excess <= 0, 0.0, excess).mean(), active, active * share


def lipschitz_consistency_reference(
    score1: Tensor, score2: Tensor, x1: Tensor, x2: Tensor, margin: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute mean max(0, |s1 - s2| / |x1 - x2| - margin) (Wei et al. 2018, eq. 4); 0 where x1 = x2.

    Also returns the per-row coefficients of s1 - s2 and x1 - x2 in the derivative.
    """
    scores, inputs = _squared_distance(score1, score2), _squared_distance(x1, x2)
    idle = (scores == 0) | (inputs == 0)
    ratio = (torch.where(idle, 1.0, scores) / torch.where(idle, 1.0, inputs)).sqrt()
    excess = torch.where(idle, 0.0, ratio) - margin
    idle = idle | (excess <= 0)
    slope = torch.where(idle, 0.0, ratio / score1.shape[0])
    values = torch.where(excess <= 0, 0.0, excess).mean()
    by_scores = (slope / torch.where(idle, 1.0, scores)).detach()
    return values, by_scores, (-slope / torch.where(idle, 1.0, inputs)).detach()


def consistency_backward_reference(
    cotangent: Tensor,
    a1: Tensor,
    a2: Tensor,
    b1: Tensor,
    b2: Tensor,
    a_coefficient: Tensor,
    b_coefficient: Tensor,
    to_b: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute (ga, -ga, gb, -gb), ga = cotangent * a_coefficient_n * (a1 - a2), gb likewise or empty."""

    def one(x1: Tensor, x2: Tensor, coefficient: Tensor) -> Tensor:
        wide = x1.to(coefficient.dtype) - x2.to(coefficient.dtype)
        return (per_row(cotangent * coefficient, x1) * wide).to(x1.dtype)

    ga = one(a1, a2, a_coefficient)
    gb = one(b1, b2, b_coefficient) if to_b else b1.new_empty(0)
    return ga, -ga, gb, -gb


def _consistency_backward(
    cotangent: Tensor,
    a1: Tensor,
    a2: Tensor,
    b1: Tensor,
    b2: Tensor,
    a_coefficient: Tensor,
    b_coefficient: Tensor,
    to_b: bool,
) -> tuple[Tensor, ...]:
    a_layout, b_layout = memory_format(a1, a2), memory_format(b1, b2)
    (a1, a2), (b1, b2) = laid_out(a1, a2), laid_out(b1, b2)
    grads = consistency_backward_reference(cotangent, a1, a2, b1, b2, a_coefficient, b_coefficient, to_b)
    if not to_b:  # the empty tensors must not share memory
        grads = *grads[:3], b1.new_empty(0)
    layouts = (a_layout, a_layout, b_layout, b_layout)
    return tuple(
        g.contiguous(memory_format=layout) if g.dim() > 1 else g for g, layout in zip(grads, layouts, strict=True)
    )


def _consistency_fake(score1: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return new_wide(score1), new_wide(score1, score1.shape[0]), new_wide(score1, score1.shape[0])


consistency_term_op = Op(
    "consistency_term(Tensor score1, Tensor score2, Tensor features1, Tensor features2, float margin,"
    " float feature_weight) -> (Tensor, Tensor, Tensor)",
    consistency_term_reference,
    _consistency_fake,
)


lipschitz_consistency_op = Op(
    "lipschitz_consistency(Tensor score1, Tensor score2, Tensor x1, Tensor x2, float margin)"
    " -> (Tensor, Tensor, Tensor)",
    lipschitz_consistency_reference,
    _consistency_fake,
)


consistency_backward_op = Op(
    "consistency_backward(Tensor cotangent, Tensor a1, Tensor a2, Tensor b1, Tensor b2, Tensor a_coefficient,"
    " Tensor b_coefficient, bool to_b) -> (Tensor, Tensor, Tensor, Tensor)",
    _consistency_backward,
    lambda cotangent, a1, a2, b1, b2, a_coefficient, b_coefficient, to_b: (
        new_like(a1, a2),
        new_like(a1, a2),
        new_like(b1, b2) if to_b else b1.new_empty(0),
        new_like(b1, b2) if to_b else b1.new_empty(0),
    ),
)


def _save_consistency(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*inputs[:4], *output[1:])
    ctx.constants = inputs[4:]


def _to_pairs(ctx: Any, cotangent: Tensor) -> tuple[Any, ...]:
    to_b = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
    grads = apply(_ConsistencyBackward, cotangent, *ctx.saved_tensors, to_b, ctx.constants)
    kept = tuple(g if needed else None for g, needed in zip(grads, ctx.needs_input_grad[:4], strict=True))
    return *kept, *[None] * len(ctx.constants)


class _ConsistencyTerm(Differentiable):
    setup_context = staticmethod(_save_consistency)

    @staticmethod
    def forward(s1: Tensor, s2: Tensor, f1: Tensor, f2: Tensor, margin: float, feature_weight: float) -> Any:
        return consistency_term_op(s1, s2, f1, f2, margin, feature_weight)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor, *_: Tensor) -> Any:
        return _to_pairs(ctx, cotangent)


class _LipschitzConsistency(Differentiable):
    setup_context = staticmethod(_save_consistency)

    @staticmethod
    def forward(s1: Tensor, s2: Tensor, x1: Tensor, x2: Tensor, margin: float) -> Any:
        return lipschitz_consistency_op(s1, s2, x1, x2, margin)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor, *_: Tensor) -> Any:
        return _to_pairs(ctx, cotangent)


class _ConsistencyBackward(Differentiable):
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
        return consistency_backward_op(cotangent, a1, a2, b1, b2, a_coefficient, b_coefficient, to_b)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs[:5])
        ctx.to_b, ctx.constants = inputs[7:]

    @staticmethod
    def backward(ctx: Any, *tangents: Tensor) -> Any:
        cotangent, *pairs = ctx.saved_tensors
        term = consistency_term_reference if len(ctx.constants) == 2 else lipschitz_consistency_reference
        wanted = tangents if ctx.to_b else (*tangents[:2], *(torch.zeros_like(b) for b in pairs[2:]))
        constants = ctx.constants
        grads = second_order(lambda *xs: term(*xs, *constants)[0], pairs, cotangent, wanted)
        return *grads, None, None, None, None


consistency_term_op.differentiate(
    _ConsistencyTerm,
    consistency_backward_op,
    ("cotangent", "score1", "score2", "features1", "features2", 1, 2, ("features1", "features2")),
    differentiable=4,
)
lipschitz_consistency_op.differentiate(
    _LipschitzConsistency,
    consistency_backward_op,
    ("cotangent", "score1", "score2", "x1", "x2", 1, 2, ("x1", "x2")),
    differentiable=4,
)


def consistency_term(
    score1: Tensor,
    score2: Tensor,
    features1: Tensor | None = None,
    features2: Tensor | None = None,
    *,
    margin: float = 0.0,
    feature_weight: float = 0.1,
) -> Tensor:
    r"""Compute CT-GAN's consistency term between two dropout passes over one batch.

    .. math::
        \frac{1}{N} \sum_n \max\Bigl(0,\; \lVert s_{1,n} - s_{2,n} \rVert^2
        + \frac{w}{J} \sum_{j=1}^{J} (f_{1,nj} - f_{2,nj})^2 - \text{margin}\Bigr)

    This is the term as its authors train with it. At the kink its subgradient is 0. Differentiable to any order in
    every tensor; results and sums are in at least float32.

    Args:
        score1 (Tensor): scores of the first pass.
        score2 (Tensor): scores of the second pass.
        features1 (Tensor, optional): last feature layer of the first pass. Default: no features.
        features2 (Tensor, optional): last feature layer of the second pass; both or neither are given.
        margin (float): distance that is not penalised. Default: 0.
        feature_weight (float): :math:`w`, the weight of the features. Default: 0.1.

    Shape:
        - score1, score2: :math:`(N)`, :math:`(N, 1)` or :math:`(N, *)`
        - features1, features2: :math:`(N, *)`, each row of :math:`J` elements
        - Output: scalar

    Returns:
        Tensor: the term, in at least float32.

    Raises:
        TypeError: a tensor is not a dense floating-point tensor, or a constant not a number.
        ValueError: shapes, batches or devices differ, one of ``features1`` and ``features2`` is None, or a constant is
            negative or not finite.

    Example:
        >>> critic = torch.nn.Sequential(torch.nn.Linear(2, 64), torch.nn.Dropout(), torch.nn.Linear(64, 1))
        >>> real = torch.randn(64, 2)
        >>> gpkernels.consistency_term(critic(real), critic(real)).backward()

    References:
        Wei et al., "Improving the Improved Training of Wasserstein GANs", 2018. https://arxiv.org/abs/1803.01541
    """
    constants = check_nonnegative("margin", margin), check_nonnegative("feature_weight", feature_weight)
    plain = (
        NotImplemented
        if is_compiling()
        else consistency_term_op.recorded(score1, score2, features1, features2, *constants)
    )
    if plain is not NotImplemented:
        return plain[0]
    check_pair("score1", score1, "score2", score2)
    if (features1 is None) != (features2 is None):
        missing = "features1" if features1 is None else "features2"
        raise ValueError(f"{missing}: expected a tensor like the other features, got None")
    if features1 is None or features2 is None:
        features1, features2 = (score1.new_empty((score1.shape[0], 0)) for _ in range(2))
    _check_second_pair("features", features1, features2, score1)
    term: Tensor = apply(_ConsistencyTerm, *promote(score1, score2, features1, features2), *constants)[0]
    return term


def lipschitz_consistency(score1: Tensor, score2: Tensor, x1: Tensor, x2: Tensor, *, margin: float = 0.0) -> Tensor:
    r"""Compute the mean excess of a critic's difference quotients over a margin.

    .. math::
        \frac{1}{N} \sum_n \max\Bigl(0,\;
        \frac{\lVert s_{1,n} - s_{2,n} \rVert}{\lVert x_{1,n} - x_{2,n} \rVert} - \text{margin}\Bigr)

    A pair with :math:`x_1 = x_2` contributes 0. Differentiable to any order in every tensor; results and sums are in at
    least float32.

    Args:
        score1 (Tensor): scores of ``x1``.
        score2 (Tensor): scores of ``x2``.
        x1 (Tensor): first sample of each pair.
        x2 (Tensor): second sample of each pair.
        margin (float): quotient that is not penalised, the Lipschitz constant wanted. Default: 0.

    Shape:
        - score1, score2: :math:`(N)`, :math:`(N, 1)` or :math:`(N, *)`
        - x1, x2: :math:`(N, *)`
        - Output: scalar

    Returns:
        Tensor: the term, in at least float32.

    Raises:
        TypeError: a tensor is not a dense floating-point tensor, or ``margin`` not a number.
        ValueError: shapes, batches or devices differ, or ``margin`` is negative or not finite.

    Example:
        >>> critic = torch.nn.Linear(2, 1)
        >>> x1, x2 = torch.randn(64, 2), torch.randn(64, 2)
        >>> gpkernels.lipschitz_consistency(critic(x1), critic(x2), x1, x2, margin=1.0).backward()

    References:
        Wei et al., "Improving the Improved Training of Wasserstein GANs", 2018, eq. 4. https://arxiv.org/abs/1803.01541
    """
    margin = check_nonnegative("margin", margin)
    plain = NotImplemented if is_compiling() else lipschitz_consistency_op.recorded(score1, score2, x1, x2, margin)
    if plain is not NotImplemented:
        return plain[0]
    check_pair("score1", score1, "score2", score2)
    _check_second_pair("x", x1, x2, score1)
    term: Tensor = apply(_LipschitzConsistency, *promote(score1, score2, x1, x2), margin)[0]
    return term


def _check_second_pair(name: str, first: Tensor, second: Tensor, score: Tensor) -> None:
    check_pair(f"{name}1", first, f"{name}2", second)
    if first.shape[0] != score.shape[0]:
        raise ValueError(f"{name}1: expected the batch of score1, {score.shape[0]}, got {first.shape[0]}")
    check_same_device("score1", score, f"{name}1", first)
