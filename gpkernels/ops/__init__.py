"""Ops, one per file: reference in plain PyTorch, backward, schema, checks, autograd, public function.

References are the specification of kernels, tests and benchmarks: differentiable to any order and free of NaN at zero
norms. A ``*_backward_reference`` is the first derivative in closed form, which backends implement; tests compare it
with the derivative of the forward reference. Reductions and random numbers use at least float32, so penalties of
float16 and bfloat16 tensors are float32. The first axis is the batch; all others are flattened.

Public functions accept float64, float32, float16 or bfloat16 tensors on one device, in any memory layout; mixed dtypes
promote as in PyTorch. TypeError is raised for anything but a floating-point tensor or a number, ValueError for shapes,
devices, empty batches and constants out of range; both name the argument, before anything is changed.

``ALL`` maps names to raw ops.
"""

from __future__ import annotations

from gpkernels.ops import (  # importing a module defines its ops
    affine_gradients,
    consistency,
    gradient_norm_penalty,
    grid_sample,
    instance_noise,
    interpolate,
    mean_pool,
    normalise_curvature,
    relativistic_loss,
    scaled_dot_product_attention,
    score_loss,
    weights,
)
from gpkernels.ops.op import ALL

__all__ = [
    "ALL",
    "affine_gradients",
    "consistency",
    "gradient_norm_penalty",
    "grid_sample",
    "instance_noise",
    "interpolate",
    "mean_pool",
    "normalise_curvature",
    "relativistic_loss",
    "scaled_dot_product_attention",
    "score_loss",
    "weights",
]
