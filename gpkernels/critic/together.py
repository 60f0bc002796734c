"""Detection of whether several groups of samples can be processed as one batch, by observing calls of the critic.

The critic's modules are not inspected. Of two calls with separate groups, the graph of the first shows whether samples
are independent; the second runs under a function mode, for what a graph does not show: values that leave it, constants
with a row per sample, numbers that depend on the batch size. If nothing is found, later calls use one batch, and each
function that the critic calls is compared with the recorded ones before it runs; at the first difference the batch is
abandoned, and groups stay separate from then on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode

from gpkernels import backends
from gpkernels.critic.plan import Plan
from gpkernels.critic.rules.base import Layout

_T = torch.Tensor
# Calls that read a tensor's metadata, not its values.
_DESCRIBE: set[Any] = {
    *(_T.size, _T.dim, _T.ndimension, _T.numel, _T.nelement, _T.stride, _T.__len__, _T.is_floating_point),
    *(torch.is_floating_point, _T.is_contiguous, _T.get_device, torch.is_tensor, _T.data_ptr, _T.element_size),
    *(
        getattr(_T, name).__get__
        for name in (
            *("shape", "dtype", "device", "ndim", "is_cuda", "layout", "requires_grad", "is_leaf", "itemsize"),
            *("grad_fn", "is_sparse", "is_quantized", "is_nested"),
        )
    ),
}
# Calls that create a tensor without reading values, equal in every row or random.
_FRESH: set[Any] = {
    *(torch.zeros_like, torch.ones_like, torch.full_like, torch.empty_like, torch.rand_like, torch.randn_like),
    *(_T.new_zeros, _T.new_ones, _T.new_empty, _T.new_full, torch.zeros, torch.ones, torch.full, torch.empty),
    *(torch.rand, torch.randn),
}
_COMPARE: set[Any] = {
    *(_T.__gt__, _T.__lt__, _T.__ge__, _T.__le__, _T.gt, _T.lt, _T.ge, _T.le, torch.gt, torch.lt, torch.ge, torch.le),
}
_SELECT: set[Any] = {torch.where, _T.where, torch.masked_fill, _T.masked_fill}
# Calls whose integers are sizes or axes, which may scale with the batch; those of other calls are values.
_SHAPES: set[Any] = {
    *(_T.view, _T.reshape, torch.reshape, _T.expand, torch.broadcast_to, _T.broadcast_to, _T.repeat, torch.tile),
    *(_T.new_zeros, _T.new_ones, _T.new_empty, _T.new_full, torch.zeros, torch.ones, torch.full, torch.empty),
    *(torch.rand, torch.randn),
}
# Those of them whose integers are sizes only within a sequence: their own are values.
_FILLED: set[Any] = {torch.full, _T.new_full}
_SIZES = ("size", "shape", "repeats", "dims")  # names of their arguments that are sizes
# Calls that draw numbers, beside those whose names begin with rand or contain dropout.
_DRAWN = {
    *("normal", "log_normal", "uniform", "bernoulli", "binomial", "multinomial", "poisson", "exponential", "geometric"),
    *("cauchy", "gumbel_softmax", "rrelu"),
}
# Calls whose results are equal in every row, or independent, where those of their arguments are.
_BY_ROW = {
    *("add", "sub", "rsub", "mul", "div", "truediv", "rtruediv", "radd", "rmul", "neg", "pow", "rpow", "exp", "log"),
    *("sqrt", "rsqrt", "sin", "cos", "tanh", "sigmoid", "relu", "abs", "square", "clamp", "round", "floor", "where"),
    *("lt", "gt", "le", "ge", "eq", "ne", "to", "type", "type_as", "float", "double", "half", "bfloat16", "long"),
    *("int", "bool", "cuda", "cpu", "contiguous", "clone", "detach", "requires_grad_", "view", "reshape", "expand"),
    *("expand_as", "unsqueeze", "squeeze", "flatten", "getitem"),
}
_OTHERS = torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Generator, type(...), type
_VALUES = int, float, complex, str, type(None)
_NOWHERE = -2  # index of the batch size among sizes of which none may scale
_UNSIZED = -1  # stands for a call that made a tensor as large as another


def _tensors(args: Any) -> Iterator[Tensor]:
    for arg in args:
        if isinstance(arg, Tensor):
            yield arg
        elif isinstance(arg, (tuple, list)):
            yield from (x for x in arg if isinstance(x, Tensor))


class Call(NamedTuple):
    """A call's arguments but its tensors: values, which must not depend on the batch, and sizes, which may.

    sizes: None for a function that has none. filled: whether only integers within a sequence are sizes.
    """

    function: Any
    values: tuple[Any, ...]
    sizes: tuple[int, ...] | None
    filled: bool

    @staticmethod
    def of(func: Any, args: Any, kwargs: Any) -> Call:
        values: list[Any] = []
        sizes: list[int] | None = [] if func in _SHAPES else None
        filled = func in _FILLED
        for x in args:
            _describe(x, values, None if filled else sizes, sizes)
        for name, x in (kwargs or {}).items():
            values.append(name)
            own = sizes if name in _SIZES else None
            _describe(x, values, own, own)
        return Call(func, tuple(values), None if sizes is None else tuple(sizes), filled)


def _describe(x: Any, values: list[Any], sizes: list[int] | None, within: list[int] | None) -> None:
    """Add an argument to values, or to sizes; within: the sizes for integers within a sequence."""
    if isinstance(x, int) and not isinstance(x, bool) and sizes is not None:
        sizes.append(x)
    elif isinstance(x, _VALUES):
        values.append(x)
    elif isinstance(x, (tuple, list)):
        for item in x:
            _describe(item, values, within, within)
    elif isinstance(x, slice):
        for end in (x.start, x.stop, x.step):
            _describe(end, values, None, None)


def _is_described(x: Any) -> bool:
    """Whether an argument is a tensor, or of the kinds that can be compared."""
    if isinstance(x, (tuple, list)):
        return all(map(_is_described, x))
    if isinstance(x, slice):
        return all(isinstance(end, _VALUES) for end in (x.start, x.stop, x.step))
    return isinstance(x, (Tensor, *_VALUES, *_OTHERS))


class Record(TorchFunctionMode):
    """Function mode that records the calls of a critic.

    reason: why the groups have to stay separate, or None.
    """

    def __init__(self, critic: Any = None) -> None:
        super().__init__()
        self.reason: str | None = None
        self.log: list[Call] = []
        self._critic, self._numbers = critic, ()

    def __enter__(self) -> Any:
        self._numbers = _numbers_of(self._critic)
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        if _numbers_of(self._critic) != self._numbers:
            self._stop("a number that the critic keeps is changed by its forward pass")

    def _stop(self, reason: str) -> None:
        self.reason = self.reason or reason

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.log.append(Call.of(func, args, kwargs))
        return func(*args, **(kwargs or {}))


def _numbers_of(critic: Any) -> tuple[Any, ...]:
    """Return the numbers among the attributes of a critic's modules, such as a counter of its calls."""
    modules = critic.modules() if isinstance(critic, nn.Module) else ()
    return tuple([x for module in modules for x in vars(module).values() if type(x) in (int, float)])


class Watch(Record):
    """Function mode that observes a critic for dependences between samples that its graph does not show."""

    def __init__(self, critic: Any = None) -> None:
        super().__init__(critic)
        self.rows = 0
        self.reshaped: dict[int, Any] = {}  # node of a reshape's result, by index in the log
        self._kinds: dict[int, str] = {}  # of tensors that depend on the batch, by id: "graph" or "mask"
        self._masks: dict[int, Any] = {}  # node that a mask was computed from, by id
        self.pairs: list[tuple[Any, Any]] = []  # nodes that must agree on the sample axis
        self._alive: list[Any] = []
        self.fixed: set[int] = set()  # calls whose sizes must not scale with the batch, by index in the log
        self._fresh: dict[int, set[int]] = {}  # calls that made what a tensor without samples depends on, by its id

    def follow(self, x: Tensor) -> None:
        """Register the batch that the critic is about to be called with."""
        self.rows = x.shape[0]
        self.log.clear()
        self._alive.append(x)
        self._kinds[id(x)] = "graph"
        self._masks[id(x)] = get_gradient_edge(x).node

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = list(_tensors((*args, *kwargs.values())))
        versions = [x._version for x in given]
        out = super().__torch_function__(func, types, args, kwargs)
        self._alive += [given, out]
        if func in _DESCRIBE:
            return out
        name = getattr(func, "__name__", str(func))
        if not _is_described((*args, *kwargs.values())):
            self._stop(f"{name} takes an argument that cannot be compared")
        tracked = [x for x in given if id(x) in self._kinds]
        results = list(_tensors((out,) if isinstance(out, Tensor) else out if isinstance(out, (tuple, list)) else ()))
        if not tracked or func in _FRESH:
            self._look_without_samples(name, func, given, results)
        if func in _FRESH:
            return out
        if any(x._version != v and not x.requires_grad for x, v in zip(given, versions, strict=True)):
            self._stop(f"{name} changes a tensor in place that is not an activation")
        if not tracked:
            return out
        self._look(name, func, given, tracked, results)
        return out

    def _look_without_samples(self, name: str, func: Any, given: list[Tensor], results: list[Tensor]) -> None:
        """Look at a call that reads no samples: its result may depend on their number, or be drawn for all of them."""
        by_row = all(self.rows in x.shape for x in results)
        if _draws(name) and not (func in _FRESH and by_row):
            self._stop(f"{name} draws numbers that samples share")
        made = {i for x in given for i in self._fresh.get(id(x), ())}
        if func in _FRESH and self.log[-1].sizes is not None:
            made = {len(self.log) - 1}
        elif func in _FRESH and not made:
            made = {_UNSIZED}
        elif made and (name.strip("_") not in _BY_ROW or not results or ("getitem" in name and not by_row)):
            sizes = [None if i == _UNSIZED else self.log[i].sizes for i in made]
            if any(n is None or self.rows in n for n in sizes):
                self._stop(f"{name} may compute a function of the number of samples")
            self.fixed |= made
        if made:
            self._fresh.update((id(x), made) for x in results)

    def _look(self, name: str, func: Any, given: list[Tensor], tracked: list[Tensor], results: list[Tensor]) -> None:
        for x in given:
            own = isinstance(x, nn.Parameter) or x.requires_grad or id(x) in self._kinds or id(x) in self._fresh
            if (
                not own
                and x.dim()
                and self.rows > 1
                and self.rows in (x.shape[0], x.shape[-1])
                and not _is_product(name)
            ):
                self._stop(f"{name} reads a constant with a row for each sample")
        if not results:
            self._stop(f"{name} reads a value out of the graph")
        masks = [x for x in tracked if self._kinds[id(x)] == "mask"]
        for y in results:
            if y.grad_fn is not None or y is self._alive[0]:
                self._kinds[id(y)] = "graph"
                self._masks[id(y)] = get_gradient_edge(y).node
                if func in _SHAPES:
                    self.reshaped[len(self.log) - 1] = self._masks[id(y)]
                if masks and func not in _SELECT:
                    self._stop(f"{name} reads a value that is not in the graph")
                for m in masks:
                    if m.shape != y.shape:
                        self._stop(f"{name} broadcasts a mask")
                    self.pairs.append((self._masks[id(m)], self._masks[id(y)]))
            elif func in _COMPARE and len(tracked) == 1 and all(x.numel() == 1 for x in given if x is not tracked[0]):
                self._kinds[id(y)] = "mask"
                self._masks[id(y)] = self._masks[id(tracked[0])]
            elif y.is_floating_point() or len(results) == 1:
                self._stop(f"{name} computes a function of the samples that is not in the graph")
            else:  # such as argmax: its uses are observed
                self._kinds[id(y)] = "mask"
                self._masks[id(y)] = None


def _draws(name: str) -> bool:
    plain = name.strip("_")
    return plain in _DRAWN or plain.startswith("rand") or "dropout" in plain


def _is_product(name: str) -> bool:
    """Whether a function's constants may have any sizes: the graph shows its effect on samples."""
    return name in ("linear", "matmul", "mm", "bmm", "addmm", "einsum", "bilinear") or "conv" in name or "norm" in name


class Differs(BaseException):
    """Raised where the critic's calls differ from the recorded ones. Not an Exception, which a critic might catch."""


class Log:
    """Recorded calls, each with the index of the size that is the batch's, if known; ``_NOWHERE`` if none is."""

    def __init__(self, calls: list[tuple[Call, int | None]]) -> None:
        self.calls = calls
        self._native: Any = None

    def native(self) -> Any:
        """Return the native copy."""
        if self._native is None:
            self._native = backends.program.Log(self.calls, Differs)
        return self._native


class Check(TorchFunctionMode):
    """Function mode that compares each call with the recorded one before it runs. then, now: rows of the batch."""

    def __init__(self, log: Log, then: int, now: int) -> None:
        super().__init__()
        self._log, self._at, self._then, self._now = log.calls, 0, then, now

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        at = self._at
        if at >= len(self._log):
            raise Differs
        known, place = self._log[at]
        called, sizes = Call.of(func, args, kwargs), known.sizes
        if called[:2] != known[:2] or (sizes is not None and not self._fits(called.sizes, sizes, place)):
            raise Differs
        self._at = at + 1
        return func(*args, **kwargs) if kwargs else func(*args)

    def _fits(self, sizes: Any, known: tuple[int, ...], place: int | None) -> bool:
        """Whether sizes scale with the batch exactly where they have to."""
        if len(sizes) != len(known):
            return False
        for i, (a, b) in enumerate(zip(sizes, known, strict=True)):
            scaled = b > 0 and a * self._then == b * self._now
            if place is None and not (scaled if b == self._then else a == b or scaled):
                return False
            if place is not None and not ((scaled or a == b == -1) if i == place else a == b):
                return False
        return True

    def finish(self) -> None:
        """Raise unless every recorded call was made."""
        if self._at != len(self._log):
            raise Differs


def autocasts(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


class Seen:
    """Observations of a critic, kept by its caller.

    traced: result of the compiler's last trace. untraced: a critic that the compiler could not trace as one graph.
    last: the last step that was made in C++, if it may be repeated.
    """

    traced: Any = None
    untraced: Any = None
    last: Any = None

    def __init__(self) -> None:
        self._of: dict[Any, Any] = {}  # by mode: "looked", a Log, or None: separate
        self.outlives_traces = True

    def __reduce__(self) -> tuple[type[Seen], tuple[()]]:
        """Copy and pickle as new: the copy of a critic is another critic, and has yet to be observed."""
        return Seen, ()

    @staticmethod
    def mode(critic: Any, x: Tensor) -> Any:
        """Return the conditions under which an observation is valid."""
        device = x.device.type
        return getattr(critic, "training", None), x.dtype, device, autocasts(device)

    def get(self, mode: Any) -> Any:
        """Return "new", "looked", a log to compare with, or None where the groups stay separate."""
        return self._of.get(mode, "new")

    def set(self, mode: Any, what: Any) -> None:
        if len(self._of) >= 16:
            self._of.clear()
        self._of[mode] = what
        self.last = None


def keeps_apart(plan: Plan, place: int) -> str | None:
    """Return why samples interact in a graph, or None; ``place`` is that of the scores."""
    if plan.layouts is None:
        return plan.mixes
    return None if plan.layouts[place] == Layout(0, 1) else "the first axis of the scores is not the samples'"


def settled(watch: Watch, plan: Plan, nodes: Sequence[Any]) -> Log | None:
    """Return the log to compare later calls with; None where samples interact."""
    places = {node: i for i, (node, _) in enumerate(nodes)}
    layouts = plan.layouts
    if watch.reason is not None or layouts is None:
        return None
    for a, b in watch.pairs:
        if a is None or a not in places or b not in places or layouts[places[a]] != layouts[places[b]]:
            return None
    expected: list[tuple[Call, int | None]] = []
    for i, call in enumerate(watch.log):
        node = watch.reshaped.get(i)
        layout = layouts[places[node]] if node in places else None
        if node is not None and layout is None:
            return None
        place = _NOWHERE if i in watch.fixed else None if layout is None else layout.axis
        expected.append((call, place))
    return Log(expected)
