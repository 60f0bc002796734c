"""PyTorch's private names: each behaves as expected, and only one module uses them."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from threading import get_ident

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from gpkernels import private

PACKAGE = Path(private.__file__).parent
aten = torch.ops.aten


class Seen(private.TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[object] = []

    def __torch_dispatch__(self, func: object, types: object, args: object = (), kwargs: object = None) -> object:
        self.calls.append(func)
        return func(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    calls = 0

    def __torch_function__(self, func: object, types: object, args: object = (), kwargs: object = None) -> object:
        self.calls += 1
        return func(*args, **(kwargs or {}))


def leaf() -> Tensor:
    return torch.ones(2, requires_grad=True)


def without_function_modes() -> None:
    with Functions() as mode:
        with private.without_function_modes():
            torch.ones(2).shape  # noqa: B018
        assert mode.calls == 0
        torch.ones(2).dtype  # noqa: B018
        assert mode.calls > 0


def any_requires_grad() -> None:
    assert private.any_requires_grad(1.0, torch.ones(2), leaf())
    assert not private.any_requires_grad(leaf().detach(), None)


def transforms_active() -> None:
    assert not private.transforms_active()
    assert torch.func.vmap(lambda x: x + private.transforms_active())(torch.zeros(2)).tolist() == [1, 1]


def has_kernel() -> None:
    assert private.has_kernel("aten::mul.Tensor", "Meta")
    assert not private.has_kernel("aten::relu6", "CPU")


def carried() -> None:
    """From thread to thread is tests/test_backends.py's."""
    key = "gpkernels.test"
    assert not private.is_carried(key)
    private.carry(key, get_ident())
    assert private.is_carried(key)
    assert private.carried(key) == get_ident()


def function_modes() -> None:
    assert private.function_mode_count() == len(private.function_modes()) == 0
    with Functions() as mode:
        assert private.function_mode_count() == 1
        assert private.function_modes() == [mode]


def graph_is_kept() -> None:
    told: list[bool] = []
    x = leaf()
    y = x * 2
    y.register_hook(lambda g: told.append(private.graph_is_kept()))
    y.sum().backward(retain_graph=True)
    y.sum().backward()
    assert told == [True, False]


def sequence_number() -> None:
    before = leaf() * 2
    start = private.next_sequence_number()
    after = before * 2
    assert before.grad_fn._sequence_nr() < start <= after.grad_fn._sequence_nr()


def batched() -> None:
    def doubled(x: Tensor) -> Tensor:
        assert private.is_batched(x)
        return 2 * x

    torch.func.vmap(doubled)(torch.ones(3))
    assert not private.is_batched(torch.ones(3))
    told: list[bool] = []
    x = leaf()
    y = x * x
    y.register_hook(lambda g: told.append(private.is_legacy_batched(g)))
    torch.autograd.grad(y, x, torch.eye(2), is_grads_batched=True)
    assert not private.is_legacy_batched(torch.ones(3))
    assert told == [True]


def overloads() -> None:
    add = aten.add.Tensor
    assert isinstance(add, private.OpOverload)
    assert add._overloadpacket is aten.add
    assert not add._schema.is_mutable
    assert aten.add_.Tensor._schema.is_mutable
    assert aten.view.default._schema.returns[0].alias_info is not None


def batch_norm() -> None:
    for kind in (nn.BatchNorm1d, nn.LazyBatchNorm2d, nn.SyncBatchNorm):
        assert issubclass(kind, private.BatchNorm)
    assert not issubclass(nn.InstanceNorm2d, private.BatchNorm)


def dispatch_modes() -> None:
    assert private.dispatch_mode() is None
    with Seen() as mode:
        assert private.dispatch_mode() is mode
        torch.ones(2)
        count = len(mode.calls)
        with private.without_dispatch_modes():
            assert private.dispatch_mode() is None
            torch.ones(2)
    assert count == len(mode.calls) > 0


def trees() -> None:
    tree = {"a": [1, (2, None)]}
    leaves, spec = private.tree_flatten(tree)
    assert leaves == private.tree_leaves(tree) == [1, 2, None]
    assert private.tree_unflatten(leaves, spec) == tree
    assert private.tree_map(lambda x: x and 2 * x, tree) == {"a": [2, (4, None)]}


def lists_of_tensors() -> None:
    x = [torch.ones(2), torch.zeros(1)]
    assert [t.tolist() for t in private.foreach_add(x, x)] == [[2, 2], [0]]
    assert [t.tolist() for t in private.foreach_mul(x, torch.tensor(3.0))] == [[3, 3], [0]]
    private.foreach_add_(x, 1)
    private.foreach_mul_(x, torch.tensor(2.0))
    assert [t.tolist() for t in x] == [[4, 4], [2]]


def small_convolutions() -> None:
    x, w, c = torch.randn(2, 3, 5, 5), torch.randn(4, 3, 2, 2), torch.randn(2, 4, 2, 2)
    sides = [2, 2], [0, 0]
    geometry = *sides, [1, 1], False, [0, 0], 1
    torch.testing.assert_close(
        private.small_convolution(x, w, [2, 2], None, *sides), aten.convolution(x, w, None, *geometry)
    )
    mask = [True, True, True]
    torch.testing.assert_close(
        private.small_convolution_backward(c, x, w, [2, 2], *sides, mask),
        aten.convolution_backward(c, x, w, [4], *geometry, mask),
    )


def xpu() -> None:
    assert private.xpu_is_built() == hasattr(torch._C, "_XpuDeviceProperties")


def dual_level() -> None:
    assert private.dual_level() == -1
    module, name = private.LEVEL
    with forward_ad.dual_level():
        assert private.dual_level() == getattr(sys.modules[module], name) == 0
    assert private.dual_level() == -1


def stance() -> None:
    ran: list[object] = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> object:
        ran.append(graph)
        return graph

    compiled = torch.compile(lambda x: x.sin(), backend=backend)
    module, *names = private.OF_STANCE
    assert private.compiler() is sys.modules[module]
    assert all(hasattr(private.compiler(), name) for name in names)
    before = private.compile_nothing()
    compiled(torch.ones(2))
    assert not ran
    assert private.compile_nothing().stance == "force_eager"
    private.set_stance(before)
    compiled(torch.ones(2))
    assert ran


def python_dispatcher() -> None:
    x, weight = torch.ones(2, 3), torch.ones(3, requires_grad=True)
    with private.enable_python_dispatcher():
        y = F.batch_norm(x, torch.zeros(3), torch.ones(3), weight)
    assert type(y.grad_fn).__name__ == "NativeBatchNormLegitNoTrainingBackward0"


def of_the_compiler() -> None:
    assert private.compiler_lacks() == []
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(private.OF_THE_COMPILER, "torch._dynamo.comptime", ("no_such_name",))
        patch.setitem(private.OF_THE_COMPILER, "torch._no_such_module", ("comptime",))
        names = ["torch._dynamo.comptime.no_such_name", "torch._no_such_module.comptime"]
        assert private.compiler_lacks() == names


def frames() -> None:
    ran: list[object] = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> object:
        ran.append(graph)
        return graph

    def inner(x: Tensor) -> Tensor:
        return x.sin()

    def outer(x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        before = private.look_at_no_frames()
        try:
            private.set_stance(private.compile_nothing())  # raises where the compiler looks at frames
            x = inner(x)
        finally:
            private.look_at_frames(before)
        return x

    torch.compile(torch._dynamo.disable(outer, recursive=False), backend=backend)(torch.ones(2))
    assert not ran


def custom_functions() -> None:
    class Own(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: object, cotangent: Tensor) -> Tensor:
            return cotangent * 2

    assert private.forward_class(Own.apply(leaf()).grad_fn) is Own
    assert private.forward_class(leaf().exp().grad_fn) is None


_traces = 0


def _again(ctx: object) -> None:
    """Restart a trace once, which then takes another branch."""
    global _traces
    _traces += 1
    if _traces == 1:
        raise private.restart_of_trace()


@torch.compiler.assume_constant_result
def _is_second() -> bool:
    return _traces > 0


def while_it_traces() -> None:
    global _traces
    _traces = 0
    comptime = private.comptime
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> object:
        graphs.append(graph)
        return graph

    def outer(x: Tensor) -> Tensor:
        if _is_second():
            x = x.cos()
        comptime(_again)
        return x.sin()

    found = torch.compile(outer, backend=backend, fullgraph=True)(torch.ones(2))
    torch.testing.assert_close(found, torch.ones(2).cos().sin())
    assert (_traces, len(graphs)) == (2, 1)


def inductor() -> None:
    assert {"size_asserts", "cpp_wrapper", "cpp.cxx"} <= set(private.inductor().list_options())
    graph = torch.fx.symbolic_trace(lambda x: (x.sin() + 1,))
    run = private.inductor().compile(graph, [torch.ones(2)], options={"cpp_wrapper": True})
    torch.testing.assert_close(run(torch.zeros(2))[0], torch.ones(2))


def grad_mode() -> None:
    found: list[object] = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> object:
        found.extend(node.target for node in graph.graph.nodes)
        return graph

    def silent(x: Tensor) -> Tensor:
        with torch.no_grad():
            return x.sin()

    torch.compile(silent, backend=backend)(leaf())
    assert private.set_grad_mode in found


def of_tensors_and_nodes() -> None:
    x = torch.ones(4)
    view, version = x[:2], x._version
    assert view._base is x
    assert x._base is None
    view.add_(1)
    assert x._version == version + 1
    assert x.untyped_storage()._cdata == view.untyped_storage()._cdata != torch.ones(4).untyped_storage()._cdata
    (meta,) = (leaf().double() * 2).grad_fn._input_metadata
    assert (tuple(meta.shape), meta.dtype, meta.device) == ((2,), torch.float64, torch.device("cpu"))
    assert leaf().exp().grad_fn._saved_result.requires_grad
    norm = nn.BatchNorm1d(2)
    norm._buffers["running_mean"] = x
    assert norm.running_mean is x


def sharded_parameters() -> None:
    """FSDP keeps the parameters of a module while its group's ``reshard`` is replaced, and reduces when it is asked."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        from torch.distributed.fsdp import fully_shard

        critic = nn.Sequential(fully_shard(nn.Linear(2, 3), reshard_after_forward=True), nn.Linear(3, 1))
        assert private.fsdp_state(critic) is None
        state = private.fsdp_state(fully_shard(critic)[0])
        critic(torch.ones(1, 2))
        outer, inner = private.fsdp_groups(private.fsdp_state(critic))
        assert (inner._reshard_after_forward, outer._reshard_after_forward) == (True, False)
        assert inner in private.fsdp_groups(state)
        sharded = critic[0].weight
        private.fsdp_gather(state)
        gathered = critic[0].weight
        assert gathered is not sharded
        calls: list[str] = []
        inner.reshard = inner.post_backward = lambda *_: calls.append("reshard")
        critic(torch.ones(1, 2)).sum().backward()
        assert len(calls) > 1
        assert critic[0].weight is gathered
        del inner.reshard, inner.post_backward
        sharded.grad, gathered.grad = None, None
        inner.post_backward()  # as if it were finished
        private.fsdp_gather(state)
        loss = gathered.sum()
        loss.register_hook(lambda _: private.fsdp_reduces(state))
        loss.backward()
        assert critic[0].weight is sharded
        assert torch.equal(sharded.grad.full_tensor(), torch.ones(3, 2))
    finally:
        dist.destroy_process_group()


def tensors_of_processes() -> None:
    """PyTorch drops the graph where the gradient of a local tensor is placed in another way; the hook keeps it."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import DTensor, Replicate, Shard

        mesh = init_device_mesh("cpu", (1,))
        columns = DTensor.from_local(torch.eye(2), mesh, [Shard(1)], run_check=False)
        x = torch.ones(1, 2, requires_grad=True)
        made = DTensor.from_local(x, mesh, [Replicate()], run_check=False)
        node, value = made.grad_fn, (made @ columns).pow(3).sum().full_tensor()
        assert node.name() == private.FROM_LOCAL
        assert private.local_placements(node) == (Replicate(),)
        (dropped,) = torch.autograd.grad(value, x, create_graph=True)
        assert not dropped.requires_grad
        node.register_hook(private.local_gradient(node))
        (kept,) = torch.autograd.grad(value, x, create_graph=True)
        assert torch.equal(kept, dropped)
        assert torch.autograd.grad(kept.sum(), x)[0].tolist() == [[6, 6]]
    finally:
        dist.destroy_process_group()


def hooks_on_saved_tensors() -> None:
    assert private.saved_tensors_hooks(False) is None
    seen: list[object] = []

    def block(x: Tensor) -> Tensor:
        seen.append(private.saved_tensors_hooks(False))
        return x.exp()

    checkpoint(block, leaf(), use_reentrant=False)
    assert seen[0][0].__module__ == "torch.utils.checkpoint"


def reentrant_checkpoints() -> None:
    w, x = leaf(), leaf()

    def block(factor: int, x: Tensor) -> Tensor:
        return factor * x * w + torch.rand(())

    torch.manual_seed(0)
    y = checkpoint(block, 2, x, use_reentrant=True)
    node, drawn = y.grad_fn, torch.rand(())
    assert node.name() == private.REENTRANT
    assert private.is_reentrant_checkpoint(node)
    assert issubclass(private.CheckpointFunction, torch.autograd.Function)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    (again,) = private.call_again(node)
    assert torch.equal(again, y)
    assert torch.equal(torch.get_rng_state(), state)
    assert {edge.node for edge in map(get_gradient_edge, (x, w))} <= set(_nodes_behind(again))
    private.set_device_states([], [], device_type="cpu")
    torch.manual_seed(0)
    torch.rand(())
    assert torch.equal(torch.rand(()), drawn)


def _nodes_behind(x: Tensor) -> list[object]:
    left, found = [x.grad_fn], []
    while left:
        found.append(left.pop())
        left += [node for node, _ in found[-1].next_functions if node is not None]
    return found


def checkpoints_in_graphs() -> None:
    found: list[tuple[str, bool]] = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> torch.fx.GraphModule:
        (call,) = [n for n in graph.graph.nodes if isinstance(n.target, private.HigherOrderOperator)]
        region = graph.get_submodule(call.args[0].target)
        found.append((call.target.name(), private.CONTEXTS in region.meta))
        return graph

    for contexts in ({}, {"context_fn": partial(create_selective_checkpoint_contexts, [])}):
        step = lambda x, own=contexts: checkpoint(torch.exp, x, use_reentrant=False, **own)  # noqa: E731
        torch.compile(step, backend=backend)(leaf())
    assert found == [(private.CHECKPOINT, False), (private.CHECKPOINT, True)]


def views() -> None:
    y = leaf()[1:]
    z = leaf() * 3
    assert y._view_func(z)._base is z
    assert y._view_func(z).tolist() == [3]


EXPECTED: dict[Callable[[], None], tuple[str, ...]] = {
    without_function_modes: ("without_function_modes",),
    any_requires_grad: ("any_requires_grad",),
    transforms_active: ("transforms_active",),
    has_kernel: ("has_kernel",),
    carried: ("carry", "carried", "is_carried"),
    function_modes: ("function_mode_count", "function_modes"),
    graph_is_kept: ("graph_is_kept",),
    sequence_number: ("next_sequence_number", "_sequence_nr"),
    batched: ("is_batched", "is_legacy_batched"),
    overloads: ("HigherOrderOperator", "OpOverload", "_overloadpacket", "_schema"),
    batch_norm: ("BatchNorm",),
    python_dispatcher: ("enable_python_dispatcher",),
    dispatch_modes: ("TorchDispatchMode", "dispatch_mode", "without_dispatch_modes"),
    trees: ("tree_flatten", "tree_leaves", "tree_map", "tree_unflatten"),
    lists_of_tensors: ("foreach_add", "foreach_add_", "foreach_mul", "foreach_mul_"),
    small_convolutions: ("small_convolution", "small_convolution_backward"),
    xpu: ("xpu_is_built",),
    dual_level: ("LEVEL", "dual_level"),
    stance: ("OF_STANCE", "compiler", "compile_nothing", "set_stance"),
    of_the_compiler: ("OF_THE_COMPILER", "compiler_lacks"),
    frames: ("look_at_no_frames", "look_at_frames"),
    custom_functions: ("forward_class",),
    inductor: ("inductor",),
    grad_mode: ("set_grad_mode",),
    while_it_traces: ("restart_of_trace",),
    sharded_parameters: ("fsdp_gather", "fsdp_groups", "fsdp_reduces", "fsdp_state", "_reshard_after_forward"),
    tensors_of_processes: ("FROM_LOCAL", "local_gradient", "local_placements"),
    hooks_on_saved_tensors: ("saved_tensors_hooks",),
    reentrant_checkpoints: (
        *("CheckpointFunction", "REENTRANT", "call_again", "is_reentrant_checkpoint", "set_device_states"),
    ),
    checkpoints_in_graphs: ("CHECKPOINT", "CONTEXTS"),
    views: ("_view_func",),
    of_tensors_and_nodes: ("_base", "_buffers", "_cdata", "_input_metadata", "_modules", "_version"),
}


@pytest.mark.parametrize("check", EXPECTED, ids=lambda check: check.__name__)
def test_it_is_as_expected(check: Callable[[], None]) -> None:
    check()


def test_the_stance_is_set_in_public_where_there_is_no_other_way(monkeypatch: pytest.MonkeyPatch) -> None:
    stances: list[str] = []
    monkeypatch.setattr(private, "compiler", lambda: object())
    monkeypatch.setattr(torch.compiler, "set_stance", stances.append)
    assert private.look_at_no_frames() is None
    private.set_stance(private.compile_nothing())
    assert stances == ["force_eager", "default"]


def test_nothing_is_left_out() -> None:
    own = {
        "Any",
        "Callable",
        "ExitStack",
        "Tensor",
        "annotations",
        "attrgetter",
        "cache",
        "forward_ad",
        "import_module",
        "overrides",
        "partial",
        "sys",
        "torch",
        "ATTRIBUTES",
        "OLDEST_TORCH",
        "release_of",
    }
    names = {name for name in vars(private) if not name.startswith("_")} - own
    assert sorted((*names, *private.ATTRIBUTES)) == sorted(name for names in EXPECTED.values() for name in names)


def private_names(tree: ast.AST) -> Iterator[str]:
    """List PyTorch's private names and attributes that a file uses."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] == "torch":
            yield from (f"{node.module}.{a.name}" for a in node.names if "._" in f"{node.module}.{a.name}")
        elif isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.startswith("torch") and "._" in a.name)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from re.findall(r"\btorch(?:\.\w+)*\._\w+|^_saved_", node.value)
        elif isinstance(node, ast.Attribute) and re.match("_[^_]", node.attr) and not is_aten(node.value):
            yield node.attr


def is_aten(node: ast.expr) -> bool:
    """Whether an attribute of this is an operator of ATen, as ``aten._softmax``."""
    return isinstance(node, ast.Name) and node.id == "aten"


def own_names(tree: ast.AST) -> Iterator[str]:
    """List the attributes that a file defines on its own modules, classes and objects."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr


def test_no_other_module_uses_one() -> None:
    trees = {path: ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py") if path.name != "private.py"}
    own = {name for tree in trees.values() for name in own_names(tree)} | {"_replace"}  # of named tuples
    known = own | set(private.ATTRIBUTES)
    found = {(path.name, name) for path, tree in trees.items() for name in private_names(tree) if name not in known}
    assert found == {("graph.py", "_saved_")}


@pytest.mark.parametrize(
    "code",
    [
        "import torch._dynamo",
        "from torch._C import _autograd",
        "from torch.overrides import _get_overloaded_args",
        "torch._foreach_sub(a, b)",
        "sys.modules['torch._dynamo.config']",
        "x._is_view()",
    ],
)
def test_a_use_would_be_found(code: str) -> None:
    assert list(private_names(ast.parse(code)))
