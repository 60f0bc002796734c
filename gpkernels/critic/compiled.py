"""Compilation of programs by Inductor: the setting, and the conversion of a list of calls to one function.

The critic's forward is not compiled. The passes over its graph are a list of ATen calls of known shapes, which needs
neither a trace nor guards.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from gpkernels import private

_compiling = Lock()  # neither tracing nor the code cache is thread-safe


class Options:
    """Options of Inductor, compared by value."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = dict(values)
        self._key = repr(sorted(self.values.items()))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Options) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


_everywhere: Options | None = None  # set by set_compile_passes
_chosen: ContextVar[Options | None] = ContextVar("gpkernels.compile_passes")  # set by compile_passes


def set_compile_passes(options: bool | Mapping[str, Any] = True) -> None:
    """Set whether Inductor compiles the passes of penalties and :class:`CriticLoss`, for the whole process.

    It is off by default. :func:`compile_passes`, which says what is compiled, takes precedence in its thread.

    Args:
        options (bool or Mapping): True, or options as ``torch.compile(options=...)`` takes them; False: off.

    Raises:
        TypeError: ``options`` is neither.
        ValueError: an option is unknown to Inductor.

    Example:
        >>> gpkernels.set_compile_passes(False)
    """
    global _everywhere
    _everywhere = _checked(options)


@contextmanager
def compile_passes(options: bool | Mapping[str, Any] = True) -> Iterator[None]:
    """Context manager in which Inductor compiles the passes of penalties and :class:`CriticLoss`.

    The critic is called as it is; the computation of the penalty and of the gradients from its graph is compiled in the
    third call with one signature (shapes, dtypes, structure of the graph). Results equal the uncompiled ones up to
    rounding. Errors of the compiler are raised. The setting applies to the current thread or async task;
    :func:`set_compile_passes` applies to the process. It has no effect inside ``torch.compile``, whose graph contains
    the passes.

    Args:
        options (bool or Mapping): True, or options as ``torch.compile(options=...)`` takes them; False: off.

    Returns:
        Iterator: for the ``with`` statement.

    Raises:
        TypeError: ``options`` is neither.
        ValueError: an option is unknown to Inductor.

    Example:
        >>> critic = torch.nn.Sequential(torch.nn.Linear(2, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1))
        >>> critic_loss = gpkernels.CriticLoss(critic)
        >>> with gpkernels.compile_passes():
        ...     critic_loss(torch.randn(8, 2), torch.randn(8, 2)).loss.backward()
    """
    if is_compiling():
        yield
        return
    token = _chosen.set(_checked(options))
    try:
        yield
    finally:
        _chosen.reset(token)


def chosen() -> Options | None:
    """Return the options that apply in this thread; None where programs are not compiled."""
    return _chosen.get(_everywhere)


def choice() -> tuple[ContextVar[Options | None], dict[str, Any]]:
    """Return what ``chosen`` reads, for C++: the thread's variable and this module's."""
    return _chosen, globals()


def _checked(options: Any) -> Options | None:
    if isinstance(options, bool):
        return Options({}) if options else None
    if not isinstance(options, Mapping):
        raise TypeError(f"options: expected True, False or a mapping, got {type(options).__name__}")
    known = _known_options()
    values = {str(name).replace("-", "_"): value for name, value in options.items()}
    for name in values:
        if name not in known:
            raise ValueError(f"options: expected names of Inductor's options, got {name!r}")
    return Options(values)


@cache
def _known_options() -> frozenset[str]:
    return frozenset(private.inductor().list_options())


Call = tuple[Any, list[Any], dict[str, Any], Any]  # an overload, arguments with slots, and the slots of what it gives


def compiled(
    calls: Sequence[Call],
    inputs: Sequence[Any],
    outputs: Sequence[Any],
    given: Sequence[Tensor | None],
    slot_type: type,
    options: Options,
) -> Callable[[list[Any]], list[Any]]:
    """A function that gives what calls give for the outputs' slots, of a list for the inputs', None for None.

    given: inputs such as it will be called with. The list is emptied.
    """
    graph = _graph_of(calls, inputs, outputs, slot_type)
    places = [i for i, slot in enumerate(inputs) if slot is not None]
    examples = [x.detach() for i in places if (x := given[i]) is not None]
    with _compiling, torch.no_grad():
        on_cpu = all(x.device.type == "cpu" for x in examples)
        own = {"size_asserts": False, "cpp_wrapper": on_cpu}  # the signature tells sizes; Python between kernels costs
        function = private.inductor().compile(graph, examples, options={**own, **options.values})
    gives = [slot is not None for slot in outputs]

    def run(given: list[Any]) -> list[Any]:
        tensors = [given[i] for i in places]
        given.clear()
        with torch.no_grad():
            results = iter(function(*tensors))
        return [next(results) if some else None for some in gives]

    return run


def _graph_of(
    calls: Sequence[Call], inputs: Sequence[Any], outputs: Sequence[Any], slot_type: type
) -> torch.fx.GraphModule:
    graph = torch.fx.Graph()
    nodes: dict[Any, torch.fx.Node] = {}

    def filled(x: Any) -> Any:
        if isinstance(x, (list, tuple)):
            return [filled(y) for y in x]
        return nodes[x] if isinstance(x, slot_type) else x

    def store(slots: Any, node: torch.fx.Node) -> None:
        if isinstance(slots, list):
            for i, slot in enumerate(slots):
                if slot is not None:
                    store(slot, graph.call_function(operator.getitem, (node, i)))
        elif slots is not None:
            nodes[slots] = node

    for slot in inputs:
        if slot is not None:
            nodes[slot] = graph.placeholder(f"given{slot}")
    for func, args, kwargs, out in calls:
        store(out, graph.call_function(func, tuple(filled(args)), {name: filled(x) for name, x in kwargs.items()}))
    graph.output(tuple([nodes[slot] for slot in outputs if slot is not None]))
    return torch.fx.GraphModule({}, graph)
