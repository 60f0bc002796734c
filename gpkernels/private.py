"""PyTorch's private names that the library depends on, each with its reason; no other module uses one.

``tests/test_private.py`` checks each name's behaviour, and that the rest of the library imports them from here. They
are bound without a Python wrapper: most are called in every call of an op or of a critic.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache, partial
from importlib import import_module
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, overrides
from torch._C import _autograd, _functorch
from torch._dispatch.python import enable_python_dispatcher as enable_python_dispatcher  # decomposes as in traces
from torch._ops import HigherOrderOperator as HigherOrderOperator  # an operator on graphs, in compiled code
from torch._ops import OpOverload as OpOverload
from torch.autograd import forward_ad
from torch.utils import _python_dispatch
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode  # sees every call of ATen
from torch.utils._pytree import tree_flatten as tree_flatten  # nested arguments, flattened as PyTorch does
from torch.utils._pytree import tree_leaves as tree_leaves
from torch.utils._pytree import tree_map as tree_map
from torch.utils._pytree import tree_unflatten as tree_unflatten
from torch.utils.checkpoint import CheckpointFunction, set_device_states

from gpkernels.version import OLDEST_TORCH


def release_of(version: str) -> tuple[int, ...]:
    """Parse the first two numbers of a version."""
    return tuple(map(int, version.split(".")[:2]))


if release_of(torch.__version__) < release_of(OLDEST_TORCH):
    raise ImportError(
        f"gpkernels needs PyTorch {OLDEST_TORCH} or later, and this is {torch.__version__}; pip install --upgrade torch"
    )

# --- on the hot path --------------------------------------------------------------------------------------------------

# Whether any argument requires a gradient, and whether a torch.func transform is active: no public query is as cheap.
any_requires_grad: Callable[..., bool] = torch._C._any_requires_grad
transforms_active: Callable[[], bool] = torch._C._are_functorch_transforms_active
# The level of forward-mode differentiation, -1 outside: a module variable, so it is read from the module.
LEVEL = forward_ad.__name__, "_current_level"
dual_level: Callable[[], int] = partial(getattr, forward_ad, LEVEL[1])
# The sequence number of this thread's next autograd node: nodes of the critic's call have this number or a later one.
next_sequence_number: Callable[[], int] = _autograd._get_sequence_nr
# The active modes, which have to see every call; the count is available without building a list.
function_mode_count: Callable[[], int] = torch._C._len_torch_function_stack
function_modes: Callable[[], list[Any]] = overrides._get_current_function_mode_stack
dispatch_mode: Callable[[], Any] = _python_dispatch._get_current_dispatch_mode

# --- elsewhere --------------------------------------------------------------------------------------------------------


# State that PyTorch propagates to autograd's worker threads, which ContextVars do not reach.
carry: Callable[[str, object], None] = torch._C._stash_obj_in_tls
is_carried: Callable[[str], bool] = torch._C._is_key_in_tls
carried: Callable[[str], Any] = torch._C._get_obj_in_tls
# Whether an op has a kernel of its own for a dispatch key.
has_kernel: Callable[[str, str], bool] = torch._C._dispatch_has_kernel_for_dispatch_key
# Whether PyTorch was built for Intel GPUs, without querying a device.
xpu_is_built: Callable[[], bool] = torch.xpu._is_compiled
# Inspecting tensors in a mode without triggering it, and tracing below all modes.
without_function_modes: Callable[[], Any] = torch._C.DisableTorchFunction
without_dispatch_modes: Callable[[], Any] = _python_dispatch._disable_current_modes
# Of the running backward pass: whether retain_graph was given; whether its cotangents are batched by either kind of
# vmap, for which the foreach operations have no batching rule.
graph_is_kept: Callable[[], bool] = _autograd._get_current_graph_task_keep_graph
is_batched: Callable[[Tensor], bool] = _functorch.is_batchedtensor
is_legacy_batched: Callable[[Tensor], bool] = _functorch.is_legacy_batchedtensor
# One launch for lists of tensors; documented, though their names begin with an underscore.
foreach_add, foreach_add_ = torch._foreach_add, torch._foreach_add_
foreach_mul, foreach_mul_ = torch._foreach_mul, torch._foreach_mul_
# Convolutions on a CPU by PyTorch's own loop, which a public call leaves to oneDNN.
small_convolution = torch.ops.aten._slow_conv2d_forward.default
small_convolution_backward = torch.ops.aten._slow_conv2d_backward.output_mask
# The call in a compiler's graph where the author's code switches grad mode, as in no_grad.
set_grad_mode: Callable[[bool], None] = torch._C._set_grad_enabled
# The innermost hooks on saved tensors, (pack, unpack) or None: a checkpointed region installs its own.
saved_tensors_hooks: Callable[[bool], Any] = _autograd._top_saved_tensors_default_hooks
# Base class of every BatchNorm, lazy and synchronised ones included.
BatchNorm: type[torch.nn.Module] = torch.nn.modules.batchnorm._BatchNorm

# A checkpointed region in a compiler's graph: the operator's name, and where its graph has the author's context_fn.
CHECKPOINT, CONTEXTS = "tag_activation_checkpoint", "_checkpoint_context_fn"

# Private attributes of PyTorch's objects, which are read where the objects are used.
ATTRIBUTES = {
    "_base": "of a view: its base tensor",
    "_buffers": "of a module: restores a buffer that the module has replaced",
    "_cdata": "of a storage: identity, which tensors that share memory have in common",
    "_input_metadata": "of autograd's nodes: shapes, dtypes and devices of their outputs",
    "_modules": "of a module: its submodules, without the search that an attribute takes",
    "_overloadpacket": "of an overload: its op",
    "_reshard_after_forward": "of FSDP's groups of parameters: whether they are freed after the forward pass",
    "_schema": "of an overload: which results are views, which arguments are mutated",
    "_sequence_nr": "of autograd's nodes: their order of creation",
    "_version": "of a tensor: counts in-place changes",
    "_view_func": "of a view: makes the same view of another tensor",
}
# critic/graph.py reads ``_saved_NAME`` of autograd's nodes, by the names that rules declare.


def forward_class(node: Any) -> Any:
    """Return the class of a custom function from its node; None for PyTorch's own nodes."""
    return getattr(type(node), "_forward_cls", None)


# --- tensors that processes share -------------------------------------------------------------------------------------

FROM_LOCAL = "_FromTorchTensorBackward"  # the node of DTensor.from_local


def local_placements(node: Any) -> tuple[Any, ...]:
    """Return the placements that ``DTensor.from_local`` was called with, from its node."""
    return tuple(node.forward_input_placements)


def local_gradient(node: Any) -> Callable[..., Any]:
    """Make a hook of a node of ``DTensor.from_local`` that computes its gradient with a graph, which PyTorch drops."""
    mesh, placements = node.forward_input_device_mesh, node.grad_placements
    if placements is None:  # as from_local documents it: the gradient of a part of a sum is the sum's
        replicated = sys.modules["torch.distributed.tensor"].Replicate()
        placements = tuple(replicated if place.is_partial() else place for place in local_placements(node))

    def hook(gradients: tuple[Tensor | None, ...], cotangents: tuple[Any, ...]) -> tuple[Tensor | None, ...] | None:
        if cotangents[0] is None or not torch.is_grad_enabled():
            return None
        return cotangents[0].redistribute(mesh, placements).to_local(), *gradients[1:]

    return hook


# --- reentrant checkpoints --------------------------------------------------------------------------------------------

REENTRANT = "CheckpointFunctionBackward"  # the node of torch.utils.checkpoint with use_reentrant=True


def is_reentrant_checkpoint(node: Any) -> bool:
    """Whether a node of that name is of PyTorch's own checkpoint."""
    return forward_class(node) is CheckpointFunction


def call_again(node: Any) -> tuple[Any, ...]:
    """Call the function of a reentrant checkpoint once more, as in its backward, with a graph from its inputs on."""
    inputs = list(node.inputs)
    for i, x in zip(node.tensor_indices, node.saved_tensors, strict=True):
        inputs[i] = x
    of_device = node.preserve_rng_state and node.had_device_in_fwd
    forked = torch.random.fork_rng(
        devices=node.fwd_devices if of_device else [], enabled=node.preserve_rng_state, device_type=node.device_type
    )
    with ExitStack() as stack:
        stack.enter_context(forked)
        if node.preserve_rng_state:
            torch.set_rng_state(node.fwd_cpu_state)
        if of_device:
            set_device_states(node.fwd_devices, node.fwd_device_states, device_type=node.device_type)
        if torch.amp.is_autocast_available(node.device_type):
            stack.enter_context(torch.amp.autocast(node.device_type, **node.device_autocast_kwargs))
        stack.enter_context(torch.amp.autocast("cpu", **node.cpu_autocast_kwargs))
        stack.enter_context(torch.enable_grad())
        found = node.run_function(*inputs)
    return tuple(found) if isinstance(found, (tuple, list)) else (found,)


# --- parameters that ``fully_shard`` distributes ----------------------------------------------------------------------

# FSDP gathers and frees the parameters of a module in groups, whose attributes critic/gathered.py reads: its public
# options can be set, but not read, and it has no call for gradients that were computed outside a module's backward.


def fsdp_state(module: torch.nn.Module) -> Any:
    """Return FSDP's state of a module that ``fully_shard`` was called on, or None."""
    found = sys.modules["torch.distributed.fsdp"]
    return module._get_fsdp_state() if isinstance(module, found.FSDPModule) else None


def fsdp_groups(state: Any) -> list[Any]:
    """Return the groups of parameters of a module and of all modules that its root is known to have."""
    return [group for one in dict.fromkeys((state, *state._state_ctx.all_states)) for group in one._fsdp_param_groups]


def fsdp_gather(state: Any) -> None:
    """Gather the parameters of a module."""
    for group in state._fsdp_param_groups:
        group.unshard()
        group.wait_for_unshard()


def fsdp_reduces(state: Any) -> None:
    """Make FSDP reduce the gradients of gathered parameters at the end of the running backward pass."""
    for group in fsdp_groups(state):
        if group._training_state.name == "POST_BACKWARD":  # FSDP would skip a group that it has finished before
            group._training_state = type(group._training_state).IDLE
    state._register_root_post_backward_final_callback()


# --- while the compiler traces: imported only there, as importing the compiler takes seconds

# What it has to have for that. Another version of PyTorch may lack some of it: then nothing here is asked for.
OF_THE_COMPILER = {
    "torch._dynamo.comptime": (
        "comptime",
        *("ComptimeContext.graph", "ComptimeContext.get_local"),
        *("ComptimeVar.as_fake", "ComptimeVar.as_proxy"),
    ),
    "torch._dynamo.exc": ("UnspecializeRestartAnalysis",),
}


def compiler_lacks() -> list[str]:
    """What this version of the compiler does not have."""
    found = []
    for module, names in OF_THE_COMPILER.items():
        for name in names:
            try:
                attrgetter(name)(import_module(module))
            except (ImportError, AttributeError):
                found.append(f"{module}.{name}")
    return found


def restart_of_trace() -> BaseException:
    """Return the exception that makes Dynamo restart its trace."""
    from torch._dynamo.exc import UnspecializeRestartAnalysis  # a restart after which tracing may take another branch

    return UnspecializeRestartAnalysis(restart_reason="all samples are one batch of the critic's, or are not")


def inductor() -> Any:
    """The module that compiles a graph as it is, ``compile``, and that has ``list_options``."""
    import torch._inductor

    return torch._inductor


def __getattr__(name: str) -> Any:
    if name != "comptime":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from torch._dynamo.comptime import comptime  # calls a function at trace time
    except ImportError:
        return None
    return comptime


# --- the compiler's stance --------------------------------------------------------------------------------------------


# Dynamo's module with the compiler's stance, and in it what csrc/surroundings.h uses as the functions below do.
OF_STANCE = "torch._dynamo.eval_frame", "set_eval_frame", "DynamoStance", "_stance"
# That module; None if it is not imported, which would take seconds.
compiler: Callable[[], Any] = partial(sys.modules.get, OF_STANCE[0])


def compile_nothing() -> Any:
    """Make compiled functions run eagerly; return the previous stance, for ``set_stance``.

    ``torch.compiler.set_stance`` does the same at many times the cost.
    """
    frames = compiler()
    if not hasattr(frames, "DynamoStance"):
        torch.compiler.set_stance("force_eager")
        return "default"
    before = frames._stance
    frames._stance = _nothing(frames)
    return before


@cache
def _nothing(frames: Any) -> Any:
    return frames.DynamoStance("force_eager")


def look_at_no_frames() -> Any:
    """Disable the compiler's frame evaluation in this thread, within which no stance can be set.

    Returns the callback for ``look_at_frames``, None if frame evaluation was disabled already.
    """
    frames = compiler()
    return frames.set_eval_frame(None) if hasattr(frames, "set_eval_frame") else None


def look_at_frames(callback: Any) -> None:
    """Restore the compiler's frame evaluation in this thread."""
    compiler().set_eval_frame(callback)


def set_stance(stance: Any) -> None:
    """Set the compiler's stance, for all threads."""
    if isinstance(stance, str):
        torch.compiler.set_stance(stance)
    else:
        compiler()._stance = stance
