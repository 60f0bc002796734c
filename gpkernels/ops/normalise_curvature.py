"""normalise_curvature: derivative of the JVP of a normalisation by its input."""

from __future__ import annotations

from torch import Tensor

from gpkernels.ops.op import Op
from gpkernels.ops.tensors import accumulation_dtype


def normalise_curvature_reference(
    normal: Tensor, inverse: Tensor, tangent: Tensor, cotangent: Tensor, centred: bool
) -> Tensor:
    """Compute the derivative of <cotangent, J tangent> by x, J being the Jacobian of a normalisation at x.

    n = (x - mean) r over each group of M elements, r = 1 / sqrt(variance + eps); r is (N, groups, 1), all others are
    (N, groups, M). With c_u = mean(n u), J t = r (t - mean(t) - n c_t) is symmetric, and <d, J t> = r M (a - c_t c_d)
    where a = mean(d t) - mean(d) mean(t); so its derivative is
    r^2 ((3 c_t c_d - a) n - c_d (t - mean(t)) - c_t (d - mean(d))). Without centring, as in RMSNorm, the means vanish.
    """
    wide = accumulation_dtype(normal.dtype)
    n, r, t, d = (x.to(wide) for x in (normal, inverse, tangent, cotangent))

    def mean(u: Tensor) -> Tensor:
        return u.mean(-1, keepdim=True)

    if centred:
        t, d = t - mean(t), d - mean(d)
    c_t, c_d = mean(n * t), mean(n * d)
    bent = (3 * c_t * c_d - mean(d * t)) * n - c_d * t - c_t * d
    return (r * r * bent).to(normal.dtype)


normalise_curvature_op = Op(
    "normalise_curvature(Tensor normal, Tensor inverse, Tensor tangent, Tensor cotangent, bool centred) -> Tensor",
    lambda normal, *others: normalise_curvature_reference(normal, *others).contiguous(),
    lambda normal, inverse, tangent, cotangent, centred: normal.new_empty(normal.shape),
)
