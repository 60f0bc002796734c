"""PyTorch's private names that the library leans on, each with its reason: nothing else in it uses one.

``tests/test_private.py`` holds every name to what is expected of it, and the rest of the library to this module. They
are bound as they are, without a layer of Python: most are asked in every call of an op or of a critic.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, overrides
from torch._C import _autograd, _functorch
from torch._ops import HigherOrderOperator as HigherOrderOperator  # a call that takes graphs, in the compiler's own
from torch._ops import OpOverload as OpOverload
from torch.autograd import forward_ad
from torch.utils import _python_dispatch
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode  # sees every call of ATen
from torch.utils._pytree import tree_flatten as tree_flatten  # nested arguments, as PyTorch sees them
from torch.utils._pytree import tree_leaves as tree_leaves
from torch.utils._pytree import tree_map as tree_map
from torch.utils._pytree import tree_unflatten as tree_unflatten

# --- asked in every call ----------------------------------------------------------------------------------------------

# Whether any argument requires a gradient, and whether torch.func is at work: no public question is as cheap.
any_requires_grad: Callable[..., bool] = torch._C._any_requires_grad
transforms_active: Callable[[], bool] = torch._C._are_functorch_transforms_active
# The level of forward-mode differentiation, -1 outside: a variable of a module, so it is read there.
dual_level: Callable[[], int] = partial(getattr, forward_ad, "_current_level")
# The number of the next node of this thread's graph: nodes of the critic's own call have it or a later one.
next_sequence_number: Callable[[], int] = _autograd._get_sequence_nr
# Whether modes look on, which have to see every call; the number is there before any list is made.
function_mode_count: Callable[[], int] = torch._C._len_torch_function_stack
function_modes: Callable[[], list[Any]] = overrides._get_current_function_mode_stack
dispatch_mode: Callable[[], Any] = _python_dispatch._get_current_dispatch_mode

# --- elsewhere --------------------------------------------------------------------------------------------------------

# State that PyTorch takes along to the threads that autograd works in, where no ContextVar goes.
carry: Callable[[str, object], None] = torch._C._stash_obj_in_tls
is_carried: Callable[[str], bool] = torch._C._is_key_in_tls
carried: Callable[[str], Any] = torch._C._get_obj_in_tls
# Whether an op has a kernel of its own for a dispatch key.
has_kernel: Callable[[str, str], bool] = torch._C._dispatch_has_kernel_for_dispatch_key
# Whether PyTorch was built for Intel's GPUs, without asking for a device.
xpu_is_built: Callable[[], bool] = torch.xpu._is_compiled
# Looking at tensors in a mode without being seen, and tracing below all modes.
without_function_modes: Callable[[], Any] = torch._C.DisableTorchFunction
without_dispatch_modes: Callable[[], Any] = _python_dispatch._disable_current_modes
# Of the backward pass at work: whether retain_graph was given; whether its cotangents are vmap's, of the new or the old
# kind, for which lists of tensors have no rule.
graph_is_kept: Callable[[], bool] = _autograd._get_current_graph_task_keep_graph
is_batched: Callable[[Tensor], bool] = _functorch.is_batchedtensor
is_legacy_batched: Callable[[Tensor], bool] = _functorch.is_legacy_batchedtensor
# One launch for lists of tensors; documented, though their names begin with an underscore.
foreach_add, foreach_add_ = torch._foreach_add, torch._foreach_add_
foreach_mul, foreach_mul_ = torch._foreach_mul, torch._foreach_mul_
# What the compiler has in its graphs where a function of the author's is called in no_grad mode, say.
set_grad_mode: Callable[[bool], None] = torch._C._set_grad_enabled
# What every BatchNorm is, lazy and synchronised ones too.
BatchNorm: type[torch.nn.Module] = torch.nn.modules.batchnorm._BatchNorm

# Attributes of PyTorch's objects, which are read where the objects are.
ATTRIBUTES = {
    "_base": "of a view, the tensor that it looks into",
    "_buffers": "of a module, to put a buffer back that the module has replaced",
    "_cdata": "of a storage: two tensors with the same one share memory",
    "_input_metadata": "of autograd's nodes: shapes, dtypes and devices of what they give",
    "_overloadpacket": "of an overload: the op, whichever of its overloads it is",
    "_schema": "of an overload: which results are views, what is written to",
    "_sequence_nr": "of autograd's nodes: which of two is older",
    "_version": "of a tensor: whether a call has written to it",
}
# critic/graph.py reads ``_saved_NAME`` of autograd's nodes by names that rules give: what an operation saved.


def forward_class(node: Any) -> Any:
    """The class of a custom function, of its node in a graph; None for PyTorch's own nodes."""
    return getattr(type(node), "_forward_cls", None)


# --- while the compiler traces: names that are asked for only where it is at work, as importing it takes seconds

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
    """What begins a trace anew when it is raised."""
    from torch._dynamo.exc import UnspecializeRestartAnalysis  # the kind after which a trace may go another way

    return UnspecializeRestartAnalysis(restart_reason="all samples are one batch of the critic's, or are not")


def inductor() -> Any:
    """The module that compiles a graph as it is, ``compile``, and that has ``list_options``."""
    import torch._inductor

    return torch._inductor


def __getattr__(name: str) -> Any:
    if name != "comptime":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from torch._dynamo.comptime import comptime  # calls a function while it traces
    except ImportError:
        return None
    return comptime


# --- the compiler's stance --------------------------------------------------------------------------------------------


def compiler() -> Any:
    """Dynamo's module with the compiler's stance; None where nothing has imported it, which would take seconds."""
    return sys.modules.get("torch._dynamo.eval_frame")


def compile_nothing() -> Any:
    """Run compiled functions as they were written; gives what ``set_stance`` puts back, None if there is no compiler.

    ``torch.compiler.set_stance`` does the same, and takes many times as long.
    """
    frames = compiler()
    if frames is None:
        return None
    if not hasattr(frames, "_set_stance"):
        torch.compiler.set_stance("force_eager")
        return "default"
    return frames._set_stance(frames.DynamoStance("force_eager"))


def look_at_no_frames() -> Any:
    """Have the compiler leave this thread's frames alone, in which no stance can be set where it looks at them; gives
    what ``look_at_frames`` puts back, None if it did not."""
    frames = compiler()
    return frames.set_eval_frame(None) if hasattr(frames, "set_eval_frame") else None


def look_at_frames(callback: Any) -> None:
    """Have the compiler look at this thread's frames as it did before."""
    compiler().set_eval_frame(callback)


def set_stance(stance: Any) -> None:
    """Set the compiler's stance, for all threads."""
    frames = compiler()
    frames._set_stance(stance) if hasattr(frames, "_set_stance") else torch.compiler.set_stance(stance)
