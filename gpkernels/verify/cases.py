"""Cases of the public differentiable ops: call, specification in plain PyTorch, and kinds of inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import gpkernels as gpk
from gpkernels.ops.consistency import consistency_term_reference, lipschitz_consistency_reference
from gpkernels.ops.gradient_norm_penalty import REDUCTIONS, gradient_norm_penalty_reference
from gpkernels.ops.interpolate import interpolate_reference
from gpkernels.ops.relativistic_loss import relativistic_loss_reference
from gpkernels.ops.score_loss import ScoreLoss, score_loss_reference
from gpkernels.ops.tensors import accumulation_dtype


@dataclass(frozen=True)
class Case:
    """``function(*tensors)`` must equal ``specification(*tensors)``; ``kinds`` describes the tensors."""

    function: Callable[..., Tensor]
    specification: Callable[..., Tensor]
    kinds: str  # one letter per tensor: r rows (N, *), s scores (N, 1), e eps (N,), not differentiated

    def inputs(self, shape: tuple[int, ...], dtype: torch.dtype, scale: float = 1.0) -> list[Tensor]:
        made = []
        for kind in self.kinds:
            if kind == "e":
                made.append(torch.rand(shape[0], dtype=torch.float64).to(accumulation_dtype(dtype)))
            else:
                size = shape if kind == "r" else (shape[0], 1)
                made.append((scale * torch.randn(size, dtype=torch.float64)).to(dtype))
        return made

    def differentiable(self, inputs: list[Tensor]) -> list[Tensor]:
        return [x.requires_grad_() for x, kind in zip(inputs, self.kinds, strict=True) if kind != "e"]


def _first(function: Callable[..., Any], *args: Any) -> Callable[..., Tensor]:
    return lambda *tensors: function(*tensors, *args)[0]


def _score(*kinds: ScoreLoss, targets: tuple[float, ...] = (0.0, 0.0)) -> Callable[..., Tensor]:
    return lambda *tensors: score_loss_reference(tensors, kinds, targets[: len(kinds)])


def _penalty(target: float, one_sided: bool, reduction: str, power: float = 2.0) -> Case:
    return Case(
        partial(gpk.gradient_norm_penalty, target=target, one_sided=one_sided, reduction=reduction, power=power),
        _first(gradient_norm_penalty_reference, target, one_sided, REDUCTIONS[reduction], power),
        "r",
    )


CASES: dict[str, Case] = {
    "interpolate": Case(gpk.interpolate, interpolate_reference, "rre"),
    "penalty_two_sided": _penalty(1.0, False, "mean"),
    "penalty_one_sided": _penalty(1.5, True, "mean"),
    "penalty_zero_centred": _penalty(0.0, False, "mean"),
    "penalty_summed": _penalty(1.0, False, "sum"),
    "penalty_per_sample": _penalty(1.0, True, "none"),
    "penalty_of_power_1": _penalty(1.0, False, "mean", 1.0),
    "penalty_of_power_1.5": _penalty(0.5, True, "sum", 1.5),
    "penalty_of_power_3": _penalty(1.0, False, "none", 3.0),
    "penalty_zero_centred_of_power_1": _penalty(0.0, False, "mean", 1.0),
    "penalty_zero_centred_of_power_2.5": _penalty(0.0, False, "mean", 2.5),
    "penalty_over_last_axis": Case(
        partial(gpk.gradient_norm_penalty, dim=-1),
        lambda g: gradient_norm_penalty_reference(g.reshape(-1, g.shape[-1]), 1.0, False, REDUCTIONS["mean"], 2.0)[0],
        "r",
    ),
    "consistency_of_scores": Case(
        partial(gpk.consistency_term, margin=0.1),
        lambda s, t: consistency_term_reference(s, t, s.new_empty(len(s), 0), s.new_empty(len(s), 0), 0.1, 0.1)[0],
        "ss",
    ),
    "consistency_with_features": Case(
        partial(gpk.consistency_term, margin=0.2, feature_weight=0.3),
        _first(consistency_term_reference, 0.2, 0.3),
        "ssrr",
    ),
    "lipschitz_consistency": Case(
        partial(gpk.lipschitz_consistency, margin=0.01), _first(lipschitz_consistency_reference, 0.01), "ssrr"
    ),
    "wgan_critic_loss": Case(gpk.wgan_critic_loss, _score(ScoreLoss.NEGATIVE, ScoreLoss.IDENTITY), "sr"),
    "wgan_generator_loss": Case(gpk.wgan_generator_loss, _score(ScoreLoss.NEGATIVE), "r"),
    "hinge_critic_loss": Case(gpk.hinge_critic_loss, _score(ScoreLoss.HINGE_NEGATIVE, ScoreLoss.HINGE), "sr"),
    "gan_discriminator_loss": Case(
        gpk.gan_discriminator_loss, _score(ScoreLoss.SOFTPLUS_NEGATIVE, ScoreLoss.SOFTPLUS), "rs"
    ),
    "saturating_generator_loss": Case(gpk.saturating_generator_loss, _score(ScoreLoss.NEGATIVE_SOFTPLUS), "r"),
    "nonsaturating_generator_loss": Case(gpk.nonsaturating_generator_loss, _score(ScoreLoss.SOFTPLUS_NEGATIVE), "r"),
    "least_squares_critic_loss": Case(
        partial(gpk.least_squares_critic_loss, real_target=0.9, fake_target=-1.0),
        _score(ScoreLoss.LEAST_SQUARES, ScoreLoss.LEAST_SQUARES, targets=(0.9, -1.0)),
        "sr",
    ),
    "least_squares_generator_loss": Case(
        gpk.least_squares_generator_loss, _score(ScoreLoss.LEAST_SQUARES, targets=(1.0,)), "r"
    ),
    "relativistic_critic_loss": Case(gpk.relativistic_critic_loss, relativistic_loss_reference, "rr"),
    "relativistic_generator_loss": Case(
        gpk.relativistic_generator_loss, lambda real, fake: relativistic_loss_reference(fake, real), "ss"
    ),
}

DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SHAPES = {"one": (1, 1), "odd": (3, 7), "rows": (257, 2), "image": (4, 3, 5, 9), "long": (2, 70001)}
LAYOUTS = ("contiguous", "channels_last", "transposed", "strided", "expanded")
PLACES = [(shape, "contiguous") for shape in SHAPES] + [("image", layout) for layout in LAYOUTS[1:]]


def laid_out(x: Tensor, layout: str) -> Tensor:
    """Copy the values to another memory layout."""
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "strided":
        return torch.stack([x, x], dim=-1)[..., 0]
    if layout == "expanded":
        return x[:1].expand_as(x)
    return x
