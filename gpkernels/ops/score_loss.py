"""score_loss: adversarial losses, sums of mean phi(scores) with a kind of phi for each tensor of scores."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn.functional import logsigmoid

from gpkernels.ops.checks import check_finite, check_same_device, check_scores
from gpkernels.ops.differentiable import Differentiable, apply, second_order
from gpkernels.ops.op import Op
from gpkernels.ops.tensors import accumulation_dtype, new_wide, promote


class ScoreLoss(IntEnum):
    """Kinds of phi: csrc/formulas.h has the same."""

    IDENTITY = 0  # s
    NEGATIVE = 1  # -s
    SOFTPLUS = 2  # softplus(s)
    SOFTPLUS_NEGATIVE = 3  # softplus(-s)
    NEGATIVE_SOFTPLUS = 4  # -softplus(s)
    HINGE = 5  # max(0, 1 + s)
    HINGE_NEGATIVE = 6  # max(0, 1 - s)
    LEAST_SQUARES = 7  # (s - target)^2

    __hash__ = int.__hash__  # in C: kinds are keys of what a critic step looks up


_KINDS = frozenset(ScoreLoss)


def score_loss_reference(scores: Sequence[Tensor], kinds: Sequence[int], targets: Sequence[float]) -> Tensor:
    """Sum the mean of phi(scores) over tensors, each with the phi of its kind. Only LEAST_SQUARES has a target."""
    check_kinds(scores, kinds, targets)
    total: Tensor | None = None
    for s, kind, target in zip(scores, kinds, targets, strict=True):
        wide = s.to(accumulation_dtype(s.dtype))
        if kind == ScoreLoss.IDENTITY:
            value = wide
        elif kind == ScoreLoss.NEGATIVE:
            value = -wide
        elif kind == ScoreLoss.SOFTPLUS:
            value = -logsigmoid(-wide)
        elif kind == ScoreLoss.SOFTPLUS_NEGATIVE:
            value = -logsigmoid(wide)
        elif kind == ScoreLoss.NEGATIVE_SOFTPLUS:
            value = logsigmoid(-wide)
        elif kind == ScoreLoss.HINGE:
            value = (1 + wide).relu()
        elif kind == ScoreLoss.HINGE_NEGATIVE:
            value = (1 - wide).relu()
        else:
            value = (wide - target) * (wide - target)
        total = value.mean() if total is None else total + value.mean()
    assert total is not None
    return total


def score_loss_backward_reference(
    cotangent: Tensor, scores: Sequence[Tensor], kinds: Sequence[int], targets: Sequence[float]
) -> list[Tensor]:
    """cotangent * phi'(s) / numel for each tensor."""
    check_kinds(scores, kinds, targets)
    grads = []
    for s, kind, target in zip(scores, kinds, targets, strict=True):
        wide = s.to(accumulation_dtype(s.dtype))
        if kind == ScoreLoss.IDENTITY:
            slope = torch.ones_like(wide)
        elif kind == ScoreLoss.NEGATIVE:
            slope = -torch.ones_like(wide)
        elif kind == ScoreLoss.SOFTPLUS:
            slope = wide.sigmoid()
        elif kind == ScoreLoss.SOFTPLUS_NEGATIVE:
            slope = -(-wide).sigmoid()
        elif kind == ScoreLoss.NEGATIVE_SOFTPLUS:
            slope = -wide.sigmoid()
        elif kind == ScoreLoss.HINGE:
            slope = torch.where(1 + wide <= 0, 0.0, torch.ones_like(wide))
        elif kind == ScoreLoss.HINGE_NEGATIVE:
            slope = torch.where(1 - wide <= 0, 0.0, -torch.ones_like(wide))
        else:
            slope = 2 * (wide - target)
        grads.append((cotangent * slope / s.numel()).to(s.dtype))
    return grads


def _score_loss_backward(
    cotangent: Tensor, scores: Sequence[Tensor], kinds: Sequence[int], targets: Sequence[float]
) -> list[Tensor]:
    contiguous = [s.contiguous() for s in scores]
    return score_loss_backward_reference(cotangent, contiguous, kinds, targets)


def check_kinds(scores: Sequence[Tensor], kinds: Sequence[int], targets: Sequence[float]) -> None:
    """Raise ValueError unless there are scores, and a ``ScoreLoss`` and a target for each of them."""
    if not scores:
        raise ValueError("scores: expected at least one tensor, got none")
    for name, given in (("kinds", kinds), ("targets", targets)):
        if len(given) != len(scores):
            raise ValueError(f"{name}: expected one for each of {len(scores)} scores, got {len(given)}")
    if not _KINDS.issuperset(kinds):  # one call for all of them, since small ops pay for each
        wrong = next(kind for kind in kinds if kind not in _KINDS)
        wanted = ", ".join(f"{kind.value} ({kind.name.lower()})" for kind in ScoreLoss)
        raise ValueError(f"kinds: expected {wanted}, got {wrong!r}")


score_loss_op = Op(
    "score_loss(Tensor[] scores, int[] kinds, float[] targets) -> Tensor",
    score_loss_reference,
    lambda scores, kinds, targets: new_wide(scores[0]),
    check_kinds,
)


score_loss_backward_op = Op(
    "score_loss_backward(Tensor cotangent, Tensor[] scores, int[] kinds, float[] targets) -> Tensor[]",
    _score_loss_backward,
    lambda cotangent, scores, kinds, targets: [s.new_empty(s.shape) for s in scores],
    lambda cotangent, scores, kinds, targets: check_kinds(scores, kinds, targets),
)


class _ScoreLoss(Differentiable):
    @staticmethod
    def arguments(scores: Sequence[Tensor], *options: Any) -> tuple[Any, ...]:
        return scores[0], scores[1] if len(scores) > 1 else None, *options

    @staticmethod
    def forward(first: Tensor, second: Tensor | None, kinds: tuple[int, ...], targets: tuple[float, ...]) -> Any:
        return score_loss_op(_present(first, second), list(kinds), list(targets))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.options = inputs[2:]
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        first, second = ctx.saved_tensors
        grads = apply(_ScoreLossBackward, cotangent, first, second, *ctx.options)
        return grads[0], None if second is None else grads[1], None, None


class _ScoreLossBackward(Differentiable):
    @staticmethod
    def forward(
        cotangent: Tensor, first: Tensor, second: Tensor | None, kinds: tuple[int, ...], targets: tuple[float, ...]
    ) -> Any:
        return tuple(score_loss_backward_op(cotangent, _present(first, second), list(kinds), list(targets)))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.options = inputs[3:]
        ctx.save_for_backward(*inputs[:3])

    @staticmethod
    def backward(ctx: Any, *tangents: Tensor) -> Any:
        cotangent, first, second = ctx.saved_tensors
        options = ctx.options
        grads = second_order(lambda *s: score_loss_reference(s, *options), _present(first, second), cotangent, tangents)
        return *grads, *[None] * (5 - len(grads))


score_loss_op.differentiate(
    _ScoreLoss, score_loss_backward_op, ("cotangent", "scores", "kinds", "targets"), differentiable=2
)


def _present(first: Tensor, second: Tensor | None) -> list[Tensor]:
    return [first] if second is None else [first, second]


def _score_loss(kinds: tuple[ScoreLoss, ...], targets: tuple[float, ...], **scores: Tensor) -> Tensor:
    """Sum the mean of phi(scores) over one or two named tensors, each with its kind of phi and its target."""
    tensors = list(scores.values())
    plain = NotImplemented if is_compiling() else score_loss_op.recorded(tensors, kinds, targets)
    if plain is not NotImplemented:
        return plain
    for name, tensor in scores.items():
        check_scores(name, tensor)
        check_same_device(next(iter(scores)), tensors[0], name, tensor)
    first, *rest = promote(*tensors)
    loss: Tensor = apply(_ScoreLoss, first, rest[0] if rest else None, kinds, targets)
    return loss


def wgan_critic_loss(real_scores: Tensor, fake_scores: Tensor) -> Tensor:
    r"""Compute the Wasserstein loss of a critic.

    .. math::
        \frac{1}{M} \sum_m \text{fake}_m - \frac{1}{N} \sum_n \text{real}_n

    This is the paper's estimate, negated to be minimised. Differentiable to any order in both tensors; results and sums
    are in at least float32.

    Args:
        real_scores (Tensor): scores of real samples.
        fake_scores (Tensor): scores of generated samples; the two batches may have different sizes.

    Shape:
        - real_scores: :math:`(N, *)`
        - fake_scores: :math:`(M, *)`
        - Output: scalar

    Returns:
        Tensor: the loss, in at least float32.

    Raises:
        TypeError: an argument is not a dense floating-point tensor.
        ValueError: a tensor is empty, or the devices differ.

    Example:
        >>> critic = torch.nn.Linear(2, 1)
        >>> gpkernels.wgan_critic_loss(critic(torch.randn(64, 2)), critic(torch.randn(64, 2))).backward()

    References:
        Arjovsky et al., "Wasserstein GAN", 2017, eq. 3. https://arxiv.org/abs/1701.07875
    """
    return _score_loss(
        (ScoreLoss.NEGATIVE, ScoreLoss.IDENTITY), (0.0, 0.0), real_scores=real_scores, fake_scores=fake_scores
    )


def wgan_generator_loss(fake_scores: Tensor) -> Tensor:
    r"""Compute the Wasserstein loss of a generator.

    .. math::
        -\frac{1}{N} \sum_n \text{fake}_n

    It is the generator's loss for hinge critics, too. Differentiable to any order; results and sums are in at least
    float32.

    Args:
        fake_scores (Tensor): scores of generated samples.

    Shape:
        - fake_scores: :math:`(N, *)`
        - Output: scalar

    Returns:
        Tensor: the loss, in at least float32.

    Raises:
        TypeError: ``fake_scores`` is not a dense floating-point tensor.
        ValueError: ``fake_scores`` is empty.

    Example:
        >>> generator, critic = torch.nn.Linear(8, 2), torch.nn.Linear(2, 1)
        >>> gpkernels.wgan_generator_loss(critic(generator(torch.randn(64, 8)))).backward()

    References:
        Arjovsky et al., "Wasserstein GAN", 2017, Algorithm 1. https://arxiv.org/abs/1701.07875
    """
    return _score_loss((ScoreLoss.NEGATIVE,), (0.0,), fake_scores=fake_scores)


def hinge_critic_loss(real_scores: Tensor, fake_scores: Tensor) -> Tensor:
    r"""Compute the hinge loss of a critic.

    .. math::
        \frac{1}{N} \sum_n \max(0, 1 - \text{real}_n) + \frac{1}{M} \sum_m \max(0, 1 + \text{fake}_m)

    The derivative is 0 at a kink. Differentiable to any order in both tensors; results and sums are in at least
    float32. The generator's loss is :func:`wgan_generator_loss`.

    Args:
        real_scores (Tensor): scores of real samples.
        fake_scores (Tensor): scores of generated samples; the two batches may have different sizes.

    Shape:
        - real_scores: :math:`(N, *)`
        - fake_scores: :math:`(M, *)`
        - Output: scalar

    Returns:
        Tensor: the loss, in at least float32.

    Raises:
        TypeError: an argument is not a dense floating-point tensor.
        ValueError: a tensor is empty, or the devices differ.

    Example:
        >>> critic = torch.nn.Linear(2, 1)
        >>> gpkernels.hinge_critic_loss(critic(torch.randn(64, 2)), critic(torch.randn(64, 2))).backward()

    References:
        Lim and Ye, "Geometric GAN", 2017. https://arxiv.org/abs/1705.02894

        Miyato et al., "Spectral Normalization for Generative Adversarial Networks", 2018, eq. 16.
        https://arxiv.org/abs/1802.05957
    """
    return _score_loss(
        (ScoreLoss.HINGE_NEGATIVE, ScoreLoss.HINGE), (0.0, 0.0), real_scores=real_scores, fake_scores=fake_scores
    )


def gan_discriminator_loss(real_scores: Tensor, fake_scores: Tensor) -> Tensor:
    r"""Compute the original GAN's loss of a discriminator, whose scores are logits.

    .. math::
        \frac{1}{N} \sum_n \operatorname{softplus}(-\text{real}_n)
        + \frac{1}{M} \sum_m \operatorname{softplus}(\text{fake}_m)

    This is the binary cross-entropy, summed over real and generated samples. Differentiable to any order in both
    tensors; results and sums are in at least float32.

    Args:
        real_scores (Tensor): logits of real samples.
        fake_scores (Tensor): logits of generated samples; the two batches may have different sizes.

    Shape:
        - real_scores: :math:`(N, *)`
        - fake_scores: :math:`(M, *)`
        - Output: scalar

    Returns:
        Tensor: the loss, in at least float32.

    Raises:
        TypeError: an argument is not a dense floating-point tensor.
        ValueError: a tensor is empty, or the devices differ.

    Example:
        >>> discriminator = torch.nn.Linear(2, 1)
        >>> real, fake = torch.randn(64, 2), torch.randn(64, 2)
        >>> gpkernels.gan_discriminator_loss(discriminator(real), discriminator(fake)).backward()

    References:
        Goodfellow et al., "Generative Adversarial Networks", 2014, eq. 1. https://arxiv.org/abs/1406.2661
    """
    return _score_loss(
        (ScoreLoss.SOFTPLUS_NEGATIVE, ScoreLoss.SOFTPLUS), (0.0, 0.0), real_scores=real_scores, fake_scores=fake_scores
    )


def saturating_generator_loss(fake_scores: Tensor) -> Tensor:
    r"""Compute the original GAN's minimax loss of a generator, for a discriminator whose scores are logits.

    .. math::
        -\frac{1}{N} \sum_n \operatorname{softplus}(\text{fake}_n)

    This is :math:`\mathbb{E} \log(1 - D)`, which saturates where the discriminator rejects the samples with confidence.
    Differentiable to any order; results and sums are in at least float32.

    Args:
        fake_scores (Tensor): logits of generated samples.

    Shape:
        - fake_scores: :math:`(N, *)`
        - Output: scalar

    Returns:
        Tensor: the loss, in at least float32.

    Raises:
        TypeError: ``fake_scores`` is not a dense floating-point tensor.
        ValueError: ``fake_scores`` is empty.

    Example:
        >>> generator, discriminator = torch.nn.Linear(8, 2), torch.nn.Linear(2, 1)
        >>> gpkernels.saturating_generator_loss(discriminator(generator(torch.randn(64, 8)))).backward()

    References:
        Goodfellow et al., "Generative Adversarial Networks", 2014, eq. 1. https://arxiv.org/abs/1406.2661
    """
    return _score_loss((ScoreLoss.NEGATIVE_SOFTPLUS,), (0.0,), fake_scores=fake_scores)


def nonsaturating_generator_loss(fake_scores: Tensor) -> Tensor:
    r"""Compute the original GAN's non-saturating loss of a generator, for a discriminator whose scores are logits.

    .. math::
        \frac{1}{N} \sum_n \operatorname{softplus}(-\text{fake}_n)

    This is :math:`-\mathbb{E} \log D`. Differentiable to any order; results and sums are in at least float32.

    Args:
        fake_scores (Tensor): logits of generated samples.

    Shape:
        - fake_scores: :math:`(N, *)`
        - Output: scalar

    Returns:
        Tensor: the loss, in at least float32.

    Raises:
        TypeError: ``fake_scores`` is not a dense floating-point tensor.
        ValueError: ``fake_scores`` is empty.

    Example:
        >>> generator, discriminator = torch.nn.Linear(8, 2), torch.nn.Linear(2, 1)
        >>> gpkernels.nonsaturating_generator_loss(discriminator(generator(torch.randn(64, 8)))).backward()

    References:
        Goodfellow et al., "Generative Adversarial Networks", 2014, section 3. https://arxiv.org/abs/1406.2661
    """
    return _score_loss((ScoreLoss.SOFTPLUS_NEGATIVE,), (0.0,), fake_scores=fake_scores)


def least_squares_critic_loss(
    real_scores: Tensor, fake_scores: Tensor, *, real_target: float = 1.0, fake_target: float = 0.0
) -> Tensor:
    r"""Compute the least-squares loss of a critic.

    .. math::
        \frac{1}{N} \sum_n (\text{real}_n - a)^2 + \frac{1}{M} \sum_m (\text{fake}_m - b)^2

    This is the paper's loss without its factors of one half. Differentiable to any order in both tensors; results and
    sums are in at least float32.

    Args:
        real_scores (Tensor): scores of real samples.
        fake_scores (Tensor): scores of generated samples; the two batches may have different sizes.
        real_target (float): :math:`a`, any finite number. Default: 1.
        fake_target (float): :math:`b`, any finite number; adversarial motion priors use -1. Default: 0.

    Shape:
        - real_scores: :math:`(N, *)`
        - fake_scores: :math:`(M, *)`
        - Output: scalar

    Returns:
        Tensor: the loss, in at least float32.

    Raises:
        TypeError: a tensor is not a dense floating-point tensor, or a target not a number.
        ValueError: a tensor is empty, the devices differ, or a target is not finite.

    Example:
        >>> critic = torch.nn.Linear(2, 1)
        >>> real, fake = torch.randn(64, 2), torch.randn(64, 2)
        >>> gpkernels.least_squares_critic_loss(critic(real), critic(fake), fake_target=-1.0).backward()

    References:
        Mao et al., "Least Squares Generative Adversarial Networks", 2017, eq. 2. https://arxiv.org/abs/1611.04076

        Peng et al., "AMP: Adversarial Motion Priors for Stylized Physics-Based Character Control", 2021.
        https://arxiv.org/abs/2104.02180
    """
    targets = check_finite("real_target", real_target), check_finite("fake_target", fake_target)
    kinds = ScoreLoss.LEAST_SQUARES, ScoreLoss.LEAST_SQUARES
    return _score_loss(kinds, targets, real_scores=real_scores, fake_scores=fake_scores)


def least_squares_generator_loss(fake_scores: Tensor, *, target: float = 1.0) -> Tensor:
    r"""Compute the least-squares loss of a generator.

    .. math::
        \frac{1}{N} \sum_n (\text{fake}_n - \text{target})^2

    This is the paper's loss without its factor of one half. Differentiable to any order in the scores; results and sums
    are in at least float32.

    Args:
        fake_scores (Tensor): scores of generated samples.
        target (float): the score that the generator aims at, any finite number. Default: 1.

    Shape:
        - fake_scores: :math:`(N, *)`
        - Output: scalar

    Returns:
        Tensor: the loss, in at least float32.

    Raises:
        TypeError: ``fake_scores`` is not a dense floating-point tensor, or ``target`` not a number.
        ValueError: ``fake_scores`` is empty, or ``target`` is not finite.

    Example:
        >>> generator, critic = torch.nn.Linear(8, 2), torch.nn.Linear(2, 1)
        >>> gpkernels.least_squares_generator_loss(critic(generator(torch.randn(64, 8)))).backward()

    References:
        Mao et al., "Least Squares Generative Adversarial Networks", 2017, eq. 2. https://arxiv.org/abs/1611.04076
    """
    return _score_loss((ScoreLoss.LEAST_SQUARES,), (check_finite("target", target),), fake_scores=fake_scores)
