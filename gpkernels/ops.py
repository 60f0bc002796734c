"""Every op's schema beside its fake kernel, its checks and its last-resort implementation.

The schemas live here, so the library works with no binary: the reference registers as the default implementation of
each op, and the extension adds faster ones for its device types. An ``Op`` called under "auto" goes through PyTorch's
dispatcher; a forced backend is looked up in ``backends``. Ops here carry no autograd: ``functional`` adds it.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from gpkernels import backends, reference
from gpkernels.reference import REDUCTIONS, accumulation_dtype, check_kinds

_LIBRARY = torch.library.Library("gpkernels", "DEF")
_FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_REDUCTION_CODES = frozenset(REDUCTIONS.values())
_LAYOUTS = {4: torch.channels_last, 5: torch.channels_last_3d}


class Op:
    """One schema: callable, and the place where the implementation that runs is chosen.

    direct: gives what the op gives for dense CPU tensors that nothing watches, checked by the kernel alone, and
    NotImplemented where the op has to be called in another way. ``torch.compile`` cannot trace it.
    check: raises for codes that name nothing, and says what they are called; it is asked before any backend, but not
    before ``direct``, where the kernel raises.
    """

    def __init__(
        self,
        schema: str,
        implementation: Callable[..., Any],
        fake: Callable[..., Any],
        check: Callable[..., None] | None = None,
    ) -> None:
        self.name = schema.partition("(")[0]
        self.check = check
        if check is not None:  # torch.ops leads to these past __call__
            implementation, fake = _after(check, implementation), _after(check, fake)
        self.schema, self.implementation, self.fake = schema, implementation, fake
        self.direct = backends.declined
        self.overload = self.define_in(_LIBRARY)
        _LIBRARY.impl(self.name, implementation, "CompositeExplicitAutograd")

    def define_in(self, library: torch.library.Library) -> torch._ops.OpOverload:
        """Give a library this schema, with what tracing and vmap need; kernels are left to others."""
        qualified = f"{library.ns}::{self.name}"
        library.define(self.schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(qualified, self.fake, lib=library)
        overload: torch._ops.OpOverload = getattr(getattr(torch.ops, library.ns), self.name).default
        if not overload._schema.is_mutable:
            torch.library.register_vmap(qualified, self._vmap, lib=library)
        return overload

    def __call__(self, *args: Any) -> Any:
        if self.check is not None:
            self.check(*args)
        if not is_compiling():
            given = self.direct(*args)
            if given is not NotImplemented:
                return given
        if backends.forced() is None:
            return self.overload(*args)
        return backends.implementation(self, args)(*args)

    def _vmap(self, info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        """One call of the op for each entry of the batch axis."""
        flat_args, spec = tree_flatten(args)
        flat_dims = tree_flatten(in_dims, is_leaf=lambda dim: dim is None)[0]

        def entry(i: int) -> Any:
            pairs = zip(flat_args, flat_dims, strict=True)
            return self(*tree_unflatten([a if dim is None else a.select(dim, i) for a, dim in pairs], spec))

        outputs = tree_map(lambda *entries: torch.stack(entries), *(entry(i) for i in range(info.batch_size)))
        return outputs, tree_map(lambda _: 0, outputs)


def _after(check: Callable[..., None], function: Callable[..., Any]) -> Callable[..., Any]:
    def checked(*args: Any) -> Any:
        check(*args)
        return function(*args)

    return checked


# --- layouts ----------------------------------------------------------------------------------------------------------


def memory_format(*tensors: Tensor) -> torch.memory_format:
    """channels_last where every tensor is so, otherwise contiguous: the layout that kernels read and write."""
    if all(t.is_contiguous() for t in tensors):
        return torch.contiguous_format
    layout = _LAYOUTS.get(tensors[0].dim(), torch.contiguous_format)
    same = all(t.dim() == tensors[0].dim() and t.is_contiguous(memory_format=layout) for t in tensors)
    return layout if same else torch.contiguous_format


def _laid_out(*tensors: Tensor) -> list[Tensor]:
    layout = memory_format(*tensors)
    return [t.contiguous(memory_format=layout) for t in tensors]


def _like(x: Tensor, *others: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=memory_format(x, *others))


def _wide(x: Tensor, *shape: int) -> Tensor:
    return x.new_empty(shape, dtype=accumulation_dtype(x.dtype))


# --- checks -----------------------------------------------------------------------------------------------------------


def check_floating(name: str, x: object) -> None:
    """TypeError unless ``x`` is a dense floating-point tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.dtype not in _FLOATING or x.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense floating-point tensor, got {x.dtype}, {x.layout}")


def check_batch(name: str, x: object) -> None:
    """``check_floating``, and ValueError unless the first axis, the batch, has at least one sample."""
    check_floating(name, x)
    assert isinstance(x, Tensor)
    if x.dim() == 0 or x.shape[0] == 0:
        raise ValueError(f"{name}: expected a batch of at least one sample, got shape {tuple(x.shape)}")


def overlaps(x: Tensor) -> bool:
    """Whether elements share a place, as in what was expanded."""
    return x.numel() > 0 and any(size > 1 and stride == 0 for size, stride in zip(x.shape, x.stride(), strict=True))


def check_writable(name: str, x: Tensor) -> None:
    """RuntimeError, as PyTorch's own, where elements share a place: what is written there last would stay."""
    if overlaps(x):
        raise RuntimeError(
            f"{name}: expected a tensor that does not overlap itself, got shape {tuple(x.shape)}, strides {x.stride()}"
        )


def check_pair(name1: str, x1: Tensor, name2: str, x2: Tensor) -> None:
    """Two batches of one shape on one device."""
    check_batch(name1, x1)
    check_batch(name2, x2)
    if x1.shape != x2.shape:
        raise ValueError(f"{name2}: expected the shape of {name1}, {tuple(x1.shape)}, got {tuple(x2.shape)}")
    check_same_device(name1, x1, name2, x2)


def check_same_device(name1: str, x1: Tensor, name2: str, x2: Tensor) -> None:
    if x1.device != x2.device:
        raise ValueError(f"{name2}: expected the device of {name1}, {x1.device}, got {x2.device}")


def check_number(name: str, value: object) -> float:
    """The value as a float; TypeError unless it is a real number, which may be numpy's."""
    if isinstance(value, bool) or not isinstance(value, (int, float, numbers.Real)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    return float(value)


def check_nonnegative(name: str, value: object) -> float:
    """The value as a float; TypeError or ValueError unless it is a finite number of at least 0."""
    value = check_number(name, value)
    if not 0 <= value < math.inf:
        raise ValueError(f"{name}: expected a finite number of at least 0, got {value}")
    return value


def check_reduction(reduction: str) -> int:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    return REDUCTIONS[reduction]


def _check_reduction_code(grad: Tensor, target: float, one_sided: bool, reduction: int) -> None:
    if reduction not in _REDUCTION_CODES:
        wanted = ", ".join(f"{code} ({called})" for called, code in REDUCTIONS.items())
        raise ValueError(f"reduction: expected {wanted}, got {reduction!r}")


def check_eps(eps: Tensor, like: Tensor) -> None:
    """One eps per sample: shape (N,) or (N, 1, ..., 1)."""
    check_floating("eps", eps)
    n = like.shape[0]
    if eps.shape != (n,) and eps.shape != (n, *[1] * (like.dim() - 1)):
        raise ValueError(f"eps: expected one number per sample, shape ({n},) or ({n}, 1, ...), got {tuple(eps.shape)}")
    check_same_device("real", like, "eps", eps)


# --- interpolate ------------------------------------------------------------------------------------------------------


def _interpolate(real: Tensor, fake: Tensor, eps: Tensor) -> Tensor:
    layout, (real, fake) = memory_format(real, fake), _laid_out(real, fake)
    return reference.interpolate(real, fake, eps).contiguous(memory_format=layout)


def _interpolate_random(real: Tensor, fake: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    layout, (real, fake) = memory_format(real, fake), _laid_out(real, fake)
    mixed, eps = reference.interpolate_random(real, fake, key)
    return mixed.contiguous(memory_format=layout), eps


def _interpolate_backward(cotangent: Tensor, eps: Tensor, to_real: bool, to_fake: bool) -> tuple[Tensor, Tensor]:
    layout, (cotangent,) = memory_format(cotangent), _laid_out(cotangent)
    to = reference.interpolate_backward(cotangent, eps, to_real, to_fake)
    wanted = (to_real, to_fake)
    first, second = (g.contiguous(memory_format=layout) if w else g for g, w in zip(to, wanted, strict=True))
    return first, second


interpolate = Op(
    "interpolate(Tensor real, Tensor fake, Tensor eps) -> Tensor",
    _interpolate,
    lambda real, fake, eps: _like(real, fake),
)
interpolate_random = Op(
    "interpolate_random(Tensor real, Tensor fake, Tensor key) -> (Tensor, Tensor)",
    _interpolate_random,
    lambda real, fake, key: (_like(real, fake), _wide(real, real.shape[0])),
)
interpolate_backward = Op(
    "interpolate_backward(Tensor cotangent, Tensor eps, bool to_real, bool to_fake) -> (Tensor, Tensor)",
    _interpolate_backward,
    lambda cotangent, eps, to_real, to_fake: (
        _like(cotangent) if to_real else cotangent.new_empty(0),
        _like(cotangent) if to_fake else cotangent.new_empty(0),
    ),
)

# --- instance noise ---------------------------------------------------------------------------------------------------


def _instance_noise(x: Tensor, sigma: float, scale: Tensor | None, key: Tensor, gaussian: bool) -> Tensor:
    return reference.instance_noise(_laid_out(x)[0], sigma, scale, key, gaussian)


instance_noise = Op(
    "instance_noise(Tensor x, float sigma, Tensor? scale, Tensor key, bool gaussian) -> Tensor",
    _instance_noise,
    lambda x, sigma, scale, key, gaussian: _like(x),
)

# --- gradient norm penalty --------------------------------------------------------------------------------------------


def _gradient_norm_penalty_backward(cotangent: Tensor, grad: Tensor, coefficient: Tensor) -> Tensor:
    scaled = reference.gradient_norm_penalty_backward(cotangent, _laid_out(grad)[0], coefficient)
    return scaled.contiguous(memory_format=memory_format(grad))


gradient_norm_penalty = Op(
    "gradient_norm_penalty(Tensor grad, float target, bool one_sided, int reduction) -> (Tensor, Tensor)",
    reference.gradient_norm_penalty,
    lambda grad, target, one_sided, reduction: (
        _wide(grad, *([grad.shape[0]] if reduction == REDUCTIONS["none"] else [])),
        _wide(grad, grad.shape[0]),
    ),
    _check_reduction_code,
)
gradient_norm_penalty_backward = Op(
    "gradient_norm_penalty_backward(Tensor cotangent, Tensor grad, Tensor coefficient) -> Tensor",
    _gradient_norm_penalty_backward,
    lambda cotangent, grad, coefficient: _like(grad),
)

# --- consistency ------------------------------------------------------------------------------------------------------


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
    (a1, a2), (b1, b2) = _laid_out(a1, a2), _laid_out(b1, b2)
    grads = reference.consistency_backward(cotangent, a1, a2, b1, b2, a_coefficient, b_coefficient, to_b)
    if not to_b:  # the empty pair must not share memory
        grads = *grads[:3], b1.new_empty(0)
    layouts = (a_layout, a_layout, b_layout, b_layout)
    return tuple(
        g.contiguous(memory_format=layout) if g.dim() > 1 else g for g, layout in zip(grads, layouts, strict=True)
    )


def _consistency_fake(score1: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _wide(score1), _wide(score1, score1.shape[0]), _wide(score1, score1.shape[0])


consistency_term = Op(
    "consistency_term(Tensor score1, Tensor score2, Tensor features1, Tensor features2, float margin,"
    " float feature_weight) -> (Tensor, Tensor, Tensor)",
    reference.consistency_term,
    _consistency_fake,
)
lipschitz_consistency = Op(
    "lipschitz_consistency(Tensor score1, Tensor score2, Tensor x1, Tensor x2, float margin)"
    " -> (Tensor, Tensor, Tensor)",
    reference.lipschitz_consistency,
    _consistency_fake,
)
consistency_backward = Op(
    "consistency_backward(Tensor cotangent, Tensor a1, Tensor a2, Tensor b1, Tensor b2, Tensor a_coefficient,"
    " Tensor b_coefficient, bool to_b) -> (Tensor, Tensor, Tensor, Tensor)",
    _consistency_backward,
    lambda cotangent, a1, a2, b1, b2, a_coefficient, b_coefficient, to_b: (
        _like(a1, a2),
        _like(a1, a2),
        _like(b1, b2) if to_b else b1.new_empty(0),
        _like(b1, b2) if to_b else b1.new_empty(0),
    ),
)

# --- score losses -----------------------------------------------------------------------------------------------------


def _score_loss_backward(cotangent: Tensor, scores: Sequence[Tensor], kinds: Sequence[int]) -> list[Tensor]:
    contiguous = [s.contiguous() for s in scores]
    return reference.score_loss_backward(cotangent, contiguous, kinds)


score_loss = Op(
    "score_loss(Tensor[] scores, int[] kinds) -> Tensor",
    reference.score_loss,
    lambda scores, kinds: _wide(scores[0]),
    check_kinds,
)
score_loss_backward = Op(
    "score_loss_backward(Tensor cotangent, Tensor[] scores, int[] kinds) -> Tensor[]",
    _score_loss_backward,
    lambda cotangent, scores, kinds: [s.new_empty(s.shape) for s in scores],
    lambda cotangent, scores, kinds: check_kinds(scores, kinds),
)

# --- weights ----------------------------------------------------------------------------------------------------------

clip_weights_ = Op("clip_weights_(Tensor(a!)[] params, float c) -> ()", reference.clip_weights_, lambda params, c: None)
rmsprop_ = Op(
    "rmsprop_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] square_avgs, Tensor(c!)[] grad_avgs,"
    " Tensor(d!)[] momentum_buffers, float lr, float alpha, float eps, float weight_decay, float momentum,"
    " bool maximize, float? clip) -> ()",
    reference.rmsprop_,
    lambda *args: None,
)

# --- normalisation ----------------------------------------------------------------------------------------------------

normalise_curvature = Op(
    "normalise_curvature(Tensor normal, Tensor inverse, Tensor tangent, Tensor cotangent, bool centred) -> Tensor",
    lambda normal, *others: reference.normalise_curvature(normal, *others).contiguous(),
    lambda normal, inverse, tangent, cotangent, centred: normal.new_empty(normal.shape),
)

affine_gradients = Op(
    "affine_gradients(Tensor cotangent, Tensor operand) -> (Tensor, Tensor)",
    reference.affine_gradients,
    lambda cotangent, operand: (_wide(cotangent, cotangent.shape[1]), _wide(cotangent, cotangent.shape[1])),
)

# --- pooling ----------------------------------------------------------------------------------------------------------


def _resized(x: Tensor, rows: int, cols: int) -> Tensor:
    layout = memory_format(x) if x.dim() == 4 else torch.contiguous_format
    return torch.empty((*x.shape[:-2], rows, cols), dtype=x.dtype, device=x.device, memory_format=layout)


mean_pool = Op(
    "mean_pool(Tensor x, int h, int w) -> Tensor",
    lambda x, h, w: reference.mean_pool(x, h, w).contiguous(memory_format=memory_format(x)),
    lambda x, h, w: _resized(x, x.shape[-2] // h, x.shape[-1] // w),
)
mean_pool_backward = Op(
    "mean_pool_backward(Tensor cotangent, int h, int w) -> Tensor",
    lambda c, h, w: reference.mean_pool_backward(c, h, w).contiguous(memory_format=memory_format(c)),
    lambda cotangent, h, w: _resized(cotangent, cotangent.shape[-2] * h, cotangent.shape[-1] * w),
)

ALL: dict[str, Op] = {op.name: op for op in list(globals().values()) if isinstance(op, Op)}
backends.register_device_kernels(_LIBRARY, ALL)
backends.bind_directly(ALL)
