"""Raw op: a schema, its fake kernel and the reference as fallback, called by name or through the dispatcher.

The schemas are defined in Python, so that the library works without a binary: the reference is registered as the
default implementation of each op, and the extension adds faster ones per device type. Raw ops have no autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.compiler import is_compiling

from gpkernels import backends
from gpkernels.private import OpOverload, tree_flatten, tree_map, tree_unflatten

LIBRARY = torch.library.Library("gpkernels", "DEF")
ALL: dict[str, Op] = {}  # by name, in order of definition
# Function, how many tensors are differentiated, op, and where its arguments come from.
Derivative = tuple[Any, int, str | None, list[tuple[int, int, int]]]
_COTANGENT, _ARGUMENT, _RESULT, _NEEDED = range(4)  # Source::Kind of csrc/differentiable.h


class Op:
    """One raw op; calling it runs the implementation that the backend selects.

    direct: fast path for dense tensors without modes or subclasses, whose arguments only the kernel checks; returns
    NotImplemented where it does not apply. ``torch.compile`` cannot trace it.
    recorded: the same for tensors that may have a graph, where ``derivative`` says how the op is differentiated.
    check: raises for invalid enumeration codes, which kernels would misread; called before every backend, but not
    before ``direct``.
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
        if check is not None:  # torch.ops calls these without __call__
            implementation, fake = _after(check, implementation), _after(check, fake)
        self.schema, self.implementation, self.fake = schema, implementation, fake
        self.direct = self.recorded = backends.declined
        self.derivative: Derivative | None = None
        self.overload = self.define_in(LIBRARY)
        LIBRARY.impl(self.name, implementation, "CompositeExplicitAutograd")
        ALL[self.name] = self

    def define_in(self, library: torch.library.Library) -> OpOverload:
        """Define this schema in a library, with its fake kernel and vmap rules, without kernels."""
        qualified = f"{library.ns}::{self.name}"
        library.define(self.schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(qualified, self.fake, lib=library)
        overload: OpOverload = getattr(getattr(torch.ops, library.ns), self.name).default
        if not overload._schema.is_mutable:
            torch.library.register_vmap(qualified, self._vmap, lib=library)
            library.impl(self.name, self.implementation, "Batched")  # autograd.grad(is_grads_batched=True) has its own
        return overload

    def differentiate(
        self, function: Any, op: Op | None, sources: Sequence[str | int | tuple[str, str]], differentiable: int
    ) -> None:
        """Set the first derivative of the first result by the first ``differentiable`` tensors.

        op: computes it from ``sources``: ``"cotangent"``, the name of one of this op's arguments, the index of a
        result, or two names: whether a gradient is wanted from the first to the last of these. Without an op, the
        cotangent is the gradient.
        function: ``Differentiable``, whose ``gradients`` have a graph.
        """
        names = [argument.name for argument in self.overload._schema.arguments]

        def place(source: str | int | tuple[str, str]) -> tuple[int, int, int]:
            if isinstance(source, int):
                return _RESULT, source, 0
            if isinstance(source, tuple):
                return _NEEDED, names.index(source[0]), names.index(source[1])
            return (_COTANGENT, 0, 0) if source == "cotangent" else (_ARGUMENT, names.index(source), 0)

        name = None if op is None else f"{LIBRARY.ns}::{op.name}"
        self.derivative = function, differentiable, name, [place(source) for source in sources]

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
        """Call the op once for each entry of the batch axis."""
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
