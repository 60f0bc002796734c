"""The ops, one in each file: the reference in plain PyTorch, its backward, schema, checks, autograd, public function.

References are the specification that kernels, tests and benchmarks are held to: differentiable to any order and free of
NaN at zero norms. Those named ``*_backward_reference`` give the first derivative in closed form; they are what a
backend implements, and the derivative of the other one is their test. Reductions and random numbers use at least
float32, so penalties of float16 and bfloat16 tensors are float32. Rows are samples: the first axis is the batch, all
others are flattened.

Public functions take float64, float32, float16 or bfloat16 tensors on one device, in any memory layout; mixed dtypes
promote as in PyTorch. Errors: TypeError for what is not a floating-point tensor or a number, ValueError for shapes,
devices, empty batches and constants out of range; both name the argument, before anything is changed.

``ALL`` has every raw op by its name.
"""

from __future__ import annotations

from gpkernels.ops import (  # each defines its ops as it is imported
    affine_gradients,
    consistency,
    gradient_norm_penalty,
    instance_noise,
    interpolate,
    mean_pool,
    normalise_curvature,
    relativistic_loss,
    score_loss,
    weights,
)
from gpkernels.ops.op import ALL

__all__ = [
    "ALL",
    "affine_gradients",
    "consistency",
    "gradient_norm_penalty",
    "instance_noise",
    "interpolate",
    "mean_pool",
    "normalise_curvature",
    "relativistic_loss",
    "score_loss",
    "weights",
]
