"""Triton kernels of the raw ops, one file per op stem.

They run on CUDA, ROCm and XPU tensors, and on CPU tensors in Triton's interpreter if TRITON_INTERPRET=1 was set before
import. Only this package needs triton. ``KERNELS`` maps the name of a raw op to its launcher, which has the op's
arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gpkernels.triton.affine_gradients import affine_gradients
from gpkernels.triton.consistency import consistency_backward, consistency_term, lipschitz_consistency
from gpkernels.triton.gradient_norm_penalty import gradient_norm_penalty, gradient_norm_penalty_backward
from gpkernels.triton.instance_noise import instance_noise
from gpkernels.triton.interpolate import interpolate, interpolate_backward
from gpkernels.triton.mean_pool import mean_pool, mean_pool_backward
from gpkernels.triton.normalise_curvature import normalise_curvature
from gpkernels.triton.relativistic_loss import relativistic_loss, relativistic_loss_backward
from gpkernels.triton.scaled_dot_product_attention import (
    scaled_dot_product_attention,
    scaled_dot_product_attention_backward,
    scaled_dot_product_attention_double_backward,
    scaled_dot_product_attention_jvp,
)
from gpkernels.triton.score_loss import score_loss, score_loss_backward
from gpkernels.triton.weights import clip_weights_, rmsprop_

_LAUNCHERS: tuple[Callable[..., Any], ...] = (
    interpolate,
    interpolate_backward,
    gradient_norm_penalty,
    gradient_norm_penalty_backward,
    consistency_term,
    lipschitz_consistency,
    consistency_backward,
    score_loss,
    score_loss_backward,
    relativistic_loss,
    relativistic_loss_backward,
    instance_noise,
    clip_weights_,
    rmsprop_,
    normalise_curvature,
    affine_gradients,
    mean_pool,
    mean_pool_backward,
    scaled_dot_product_attention,
    scaled_dot_product_attention_backward,
    scaled_dot_product_attention_jvp,
    scaled_dot_product_attention_double_backward,
)
KERNELS: dict[str, Callable[..., Any]] = {launcher.__name__: launcher for launcher in _LAUNCHERS}
