"""One call of the critic: its batch, its outputs and autograd's graph of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from gpkernels import backends
from gpkernels.critic.graph import native, prepare_nodes, read_unfolded
from gpkernels.critic.parts import Between, called, constant_scores, points_of
from gpkernels.critic.together import Check, Record, Watch
from gpkernels.critic.uncompiled import uncompiled
from gpkernels.private import dual_level, next_sequence_number


def scores_of(output: Any, what: str = "critic") -> Tensor:
    """Return the scores in the output of ``what``: a tensor, or the first of a tuple."""
    scores = output[0] if isinstance(output, (tuple, list)) and output else output
    if not isinstance(scores, Tensor):
        raise TypeError(f"{what}: expected scores as a tensor, or first in a tuple, got {type(output).__name__}")
    return scores


def features_of(output: Any) -> Tensor | None:
    """Return the features that a critic outputs after its scores, or None."""
    found = output[1] if isinstance(output, (tuple, list)) and len(output) > 1 else None
    return found if isinstance(found, Tensor) else None


def check_scores(scores: Tensor, x: Tensor, pack: int) -> None:
    """Raise ValueError unless there is a score for each pack of samples; a pack of 0 allows any number."""
    if scores.numel() * pack < x.shape[0] and pack:
        samples = f"{x.shape[0]} samples" if pack == 1 else f"{x.shape[0] // pack} packs of {pack} samples"
        raise ValueError(
            f"critic: expected a score for each of {samples}, got shape {tuple(scores.shape)}; "
            "for scores of several samples at once there is the option pack"
        )


def has_tangent(tensors: Iterable[Tensor]) -> bool:
    """Whether a tensor has a forward-mode tangent."""
    return dual_level() >= 0 and any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)


def refuse_tangents(samples: Iterable[Tensor | Between]) -> None:
    """Raise RuntimeError where samples have a forward-mode tangent, which the passes would drop."""
    if has_tangent(u for x in samples for u in ([x] if isinstance(x, Tensor) else x)):
        raise RuntimeError(
            "the critic has a forward-mode tangent, which this penalty does not propagate; call it inside "
            "gpkernels.fast_double_backward(), where it is composed of PyTorch's own operations"
        )


def refuse_symbols(x: Tensor) -> None:
    """Raise RuntimeError where sizes are symbols, outside of the compiler: the passes depend on numbers."""
    if type(x) is not Tensor and any(isinstance(n, torch.SymInt) for n in x.shape):
        raise RuntimeError(
            "gradients of a critic or model cannot be traced with symbols for sizes here: give make_fx the "
            "tracing_mode 'real' or 'fake', or compile the step by torch.compile"
        )


class Group(NamedTuple):
    """Samples and their role: "fake", "real", "again" (the real batch once more), or the points of a penalty."""

    name: str
    x: Tensor | Between
    penalised: bool

    @property
    def batch(self) -> Tensor:
        """Tensor with the number, shape and dtype of the samples."""
        return self.x.real if isinstance(self.x, Between) else self.x


class Pass:
    """One call of the critic on one or several groups of samples, and autograd's graph of it.

    x: the batch, a leaf where its gradient is wanted. start: sequence number of the critic's first node. wants: whether
    the gradient at the batch is wanted. pack: as in ``Task``. unfolded: whether the graph had reentrant checkpoints,
    in whose place is now what they call.
    """

    def __init__(
        self,
        critic: Any,
        groups: Sequence[Group],
        wants: bool,
        x: Tensor,
        start: int,
        output: Any,
        pack: int = 1,
    ) -> None:
        self.critic = critic
        self.groups = tuple([(g.name, g.penalised) for g in groups])
        self.pack = pack
        self.each = len(x) // len(groups) // (pack or 1)
        self.x, self.start, self.wants = x, start, wants
        self.unfolded = False
        penalised = any(g.penalised for g in groups)
        scores, features = scores_of(output, called(pack)), features_of(output)
        self.outputs = [scores] if features is None else [scores, features]
        check_scores(scores, x, pack)
        refuse_tangents(self.outputs)
        if penalised and not scores.requires_grad:
            raise constant_scores(called(pack))

    def read(self) -> None:
        """Read the graph: nodes, saved tensors, leaves, the batch among them, and the key."""
        roots = [u for u in self.outputs if u.requires_grad]
        self._read(roots)
        self.native_matches = not self.unfolded  # whether the native reader finds the same graph
        if (
            self.x_leaf is None and self.start and self.x.requires_grad
        ):  # made in another thread, which has its own sequence numbers
            self.start, self.native_matches = 0, False
            self._read(roots)
        if self.x_leaf is None and any(penalised for _, penalised in self.groups):
            raise constant_scores(called(self.pack))
        metas = tuple([(u.shape, u.stride(), u.dtype, u.device, u.requires_grad) for u in self.outputs])
        self.key = self.graph_key, self.x_leaf, self.wants, self.groups, self.each, metas, self.pack

    def _read(self, roots: list[Tensor]) -> None:
        graph, unfolded = read_unfolded(roots, self.start)
        self.unfolded = self.unfolded or unfolded
        self.by_engine = prepare_nodes(graph.nodes, [self.x] if self.x.requires_grad else [])
        self.graph_key, self.nodes, self.saved = graph.key, graph.nodes, graph.saved
        found = native().leaves(roots, self.start) if any(leaf is None for leaf in graph.leaves) else graph.leaves
        self.leaves = [leaf for leaf in found if leaf is not None]
        self.x_leaf = next((i for i, leaf in enumerate(self.leaves) if leaf is self.x), None)


def call(
    critic: Any,
    groups: Sequence[Group],
    wants: bool,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    pack: int = 1,
    observer: Record | Check | None = None,
) -> Pass:
    """Call the critic once with all samples of the given groups."""
    x = _batch([points_of(g.x) for g in groups], wants or any(g.penalised for g in groups))
    start = 0 if backends.program is None else next_sequence_number()
    if isinstance(observer, Watch):
        observer.follow(x)
    with torch.enable_grad(), uncompiled(), observer or nullcontext():
        output = critic(x, *args, **(kwargs or {}))
    return Pass(critic, groups, wants, x, start, output, pack)


class Plain(NamedTuple):
    """A call whose graph is not read; fields as in ``Pass``."""

    groups: tuple[tuple[str, bool], ...]
    x: Tensor
    outputs: list[Tensor]


def call_each_group(
    critic: Any,
    groups: Sequence[Group],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    pack: int = 1,
    before: Sequence[Any] = (),
) -> list[Plain]:
    """Call the critic with one group after the other, for losses that are left to autograd. Grad mode is on.

    before: (output, batch, ...) of the first calls, if they were already made.
    """
    found = []
    for i, group in enumerate(groups):
        if i < len(before):
            output, x = before[i][:2]
        else:
            x = points_of(group.x)
            if group.penalised:
                x = x.detach().requires_grad_()
            with uncompiled():
                output = critic(x, *args, **(kwargs or {}))
        scores, features = scores_of(output, called(pack)), features_of(output)
        if scores.numel() * pack < len(x) * bool(pack) or (group.penalised and not scores.requires_grad):
            Pass(critic, [group], False, x, 0, output, pack)  # raises
        outputs = [scores] if features is None else [scores, features]
        found.append(Plain(((group.name, group.penalised),), x, outputs))
    return found


def _batch(groups: list[Tensor], moves: bool) -> Tensor:
    """Concatenate groups to the batch that the critic is called with; ``moves``: make it a leaf that requires grad."""
    if len(groups) > 1:
        return torch.cat([g.detach() for g in groups]).requires_grad_(moves)
    (x,) = groups
    return x.detach().requires_grad_() if moves or x.requires_grad else x
