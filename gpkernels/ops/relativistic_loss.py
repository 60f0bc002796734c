"""relativistic_loss: mean softplus(fake_n - real_n) over pairs of scores (Jolicoeur-Martineau 2019, paired)."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.compiler import is_compiling
from torch.nn.functional import logsigmoid

from gpkernels.ops.checks import check_same_device, check_scores
from gpkernels.ops.differentiable import Differentiable, apply, second_order
from gpkernels.ops.op import Op
from gpkernels.ops.tensors import accumulation_dtype, laid_out, memory_format, new_like, new_wide, promote


def relativistic_loss_reference(real_scores: Tensor, fake_scores: Tensor) -> Tensor:
    """Compute the mean of softplus(fake_n - real_n)."""
    return -logsigmoid(_lead(real_scores, fake_scores)).mean()


def relativistic_loss_backward_reference(
    cotangent: Tensor, real_scores: Tensor, fake_scores: Tensor
) -> tuple[Tensor, Tensor]:
    """-s_n and s_n = cotangent * sigmoid(fake_n - real_n) / numel."""
    lead = _lead(real_scores, fake_scores)
    to_fake = cotangent * (-lead).sigmoid() / lead.numel()
    return (-to_fake).to(real_scores.dtype), to_fake.to(fake_scores.dtype)


def _lead(real_scores: Tensor, fake_scores: Tensor) -> Tensor:
    wide = accumulation_dtype(real_scores.dtype)
    return real_scores.to(wide) - fake_scores.to(wide)


def _check_pairs(real_scores: Tensor, fake_scores: Tensor) -> None:
    if real_scores.shape != fake_scores.shape:  # a reference would broadcast them
        got = f"{tuple(real_scores.shape)} and {tuple(fake_scores.shape)}"
        raise ValueError(f"real_scores and fake_scores: expected pairs, of one shape, got {got}")


def _relativistic_loss_backward(cotangent: Tensor, real_scores: Tensor, fake_scores: Tensor) -> tuple[Tensor, Tensor]:
    grads = relativistic_loss_backward_reference(cotangent, *laid_out(real_scores, fake_scores))
    layout = memory_format(real_scores, fake_scores)
    return grads[0].contiguous(memory_format=layout), grads[1].contiguous(memory_format=layout)


relativistic_loss_op = Op(
    "relativistic_loss(Tensor real_scores, Tensor fake_scores) -> Tensor",
    relativistic_loss_reference,
    lambda real_scores, fake_scores: new_wide(real_scores),
    _check_pairs,
)


relativistic_loss_backward_op = Op(
    "relativistic_loss_backward(Tensor cotangent, Tensor real_scores, Tensor fake_scores) -> (Tensor, Tensor)",
    _relativistic_loss_backward,
    lambda cotangent, real_scores, fake_scores: (
        new_like(real_scores, fake_scores),
        new_like(fake_scores, real_scores),
    ),
    lambda cotangent, real_scores, fake_scores: _check_pairs(real_scores, fake_scores),
)


class _RelativisticLoss(Differentiable):
    @staticmethod
    def forward(real_scores: Tensor, fake_scores: Tensor) -> Any:
        return relativistic_loss_op(real_scores, fake_scores)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        return apply(_RelativisticLossBackward, cotangent, *ctx.saved_tensors)


class _RelativisticLossBackward(Differentiable):
    @staticmethod
    def forward(cotangent: Tensor, real_scores: Tensor, fake_scores: Tensor) -> Any:
        return relativistic_loss_backward_op(cotangent, real_scores, fake_scores)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *tangents: Tensor) -> Any:
        cotangent, *scores = ctx.saved_tensors
        return second_order(relativistic_loss_reference, scores, cotangent, tangents)


relativistic_loss_op.differentiate(
    _RelativisticLoss, relativistic_loss_backward_op, ("cotangent", "real_scores", "fake_scores"), differentiable=2
)


def _relativistic_loss(real_name: str, real_scores: Tensor, fake_name: str, fake_scores: Tensor) -> Tensor:
    plain = NotImplemented if is_compiling() else relativistic_loss_op.recorded(real_scores, fake_scores)
    if plain is not NotImplemented:
        return plain
    check_scores(real_name, real_scores)
    check_scores(fake_name, fake_scores)
    if real_scores.shape != fake_scores.shape:
        wanted = f"the shape of {real_name}, {tuple(real_scores.shape)}, as scores are paired"
        raise ValueError(f"{fake_name}: expected {wanted}, got {tuple(fake_scores.shape)}")
    check_same_device(real_name, real_scores, fake_name, fake_scores)
    loss: Tensor = apply(_RelativisticLoss, *promote(real_scores, fake_scores))
    return loss


def relativistic_critic_loss(real_scores: Tensor, fake_scores: Tensor) -> Tensor:
    r"""Compute the relativistic loss of a critic over pairs of real and generated samples, whose scores are logits.

    .. math::
        \frac{1}{N} \sum_n \operatorname{softplus}(\text{fake}_n - \text{real}_n)

    Differentiable to any order in both tensors; results and sums are in at least float32.

    Args:
        real_scores (Tensor): logits of real samples.
        fake_scores (Tensor): logits of generated samples, paired with the real ones in order.

    Shape:
        - real_scores, fake_scores: :math:`(N, *)`, of one shape
        - Output: scalar

    Returns:
        Tensor: the loss, in at least float32.

    Raises:
        TypeError: an argument is not a dense floating-point tensor.
        ValueError: the tensors are empty, or the shapes or devices differ.

    Example:
        >>> critic = torch.nn.Linear(2, 1)
        >>> gpkernels.relativistic_critic_loss(critic(torch.randn(64, 2)), critic(torch.randn(64, 2))).backward()

    References:
        Jolicoeur-Martineau, "The relativistic discriminator: a key element missing from standard GAN", 2019.
        https://arxiv.org/abs/1807.00734

        Huang et al., "The GAN is dead; long live the GAN! A Modern GAN Baseline", 2024, eq. 2.
        https://arxiv.org/abs/2501.05441
    """
    return _relativistic_loss("real_scores", real_scores, "fake_scores", fake_scores)


def relativistic_generator_loss(real_scores: Tensor, fake_scores: Tensor) -> Tensor:
    r"""Compute the relativistic loss of a generator over pairs of real and generated samples, whose scores are logits.

    .. math::
        \frac{1}{N} \sum_n \operatorname{softplus}(\text{real}_n - \text{fake}_n)

    Differentiable to any order in both tensors; results and sums are in at least float32.

    Args:
        real_scores (Tensor): logits of real samples.
        fake_scores (Tensor): logits of generated samples, paired with the real ones in order.

    Shape:
        - real_scores, fake_scores: :math:`(N, *)`, of one shape
        - Output: scalar

    Returns:
        Tensor: the loss, in at least float32.

    Raises:
        TypeError: an argument is not a dense floating-point tensor.
        ValueError: the tensors are empty, or the shapes or devices differ.

    Example:
        >>> generator, critic = torch.nn.Linear(8, 2), torch.nn.Linear(2, 1)
        >>> real, fake = torch.randn(64, 2), generator(torch.randn(64, 8))
        >>> gpkernels.relativistic_generator_loss(critic(real), critic(fake)).backward()

    References:
        Jolicoeur-Martineau, "The relativistic discriminator: a key element missing from standard GAN", 2019.
        https://arxiv.org/abs/1807.00734

        Huang et al., "The GAN is dead; long live the GAN! A Modern GAN Baseline", 2024, eq. 2.
        https://arxiv.org/abs/2501.05441
    """
    return _relativistic_loss("fake_scores", fake_scores, "real_scores", real_scores)
