"""affine_gradients: the gradients of w and b in y = x w + b."""

from __future__ import annotations

from torch import Tensor

from gpkernels.ops.op import Op
from gpkernels.ops.tensors import accumulation_dtype, new_wide


def affine_gradients_reference(cotangent: Tensor, operand: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the gradients of w and b in y = x w + b.

    Sums over R and I of cotangent * operand and of cotangent, both (R, K, I).
    """
    wide = accumulation_dtype(cotangent.dtype)
    c = cotangent.to(wide)
    return (c * operand.to(wide)).sum((0, 2)), c.sum((0, 2))


affine_gradients_op = Op(
    "affine_gradients(Tensor cotangent, Tensor operand) -> (Tensor, Tensor)",
    affine_gradients_reference,
    lambda cotangent, operand: (new_wide(cotangent, cotangent.shape[1]), new_wide(cotangent, cotangent.shape[1])),
)
