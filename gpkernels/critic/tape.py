"""The tape: one forward pass of a critic, kept as a list of layer calls that can be gone through by hand.

A tape is recorded anew in every call, by watching the functions that the critic calls, so it cannot be stale: whatever
the critic is now is what is recorded. A call that has no rule, or would mix samples, ends the recording with
``NoRule``; the caller then leaves the work to PyTorch's autograd.

For a sample x the passes need, with a the activations, J the Jacobian of the scores and v a direction at x:

- pull:       delta = J^T seed, layer by layer from the scores; at x it is the gradient of the score
- push:       t = the directional derivative of every activation along v, layer by layer from x
- curvature:  gamma, the adjoint of the activations themselves in <delta, t>: nothing for piecewise-linear layers

and the weights' gradients are sums of delta x a (a loss), or delta x t + gamma x a (a penalty on |J^T 1|).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name

ALL_ROWS = slice(None)


class NoRule(Exception):
    """The recorded way cannot take this critic; the message says what stopped it."""


class Node:
    """One layer call on the tape: what it keeps of the forward pass, and the rule for going back and forth through it.

    ``rows`` arguments say to which rows of the batch the cotangents and tangents belong.
    """

    x: Tensor  # what a trainable layer multiplies its weight with
    parents: tuple[Node | None, ...] = ()
    index = 0
    last_use = 0  # index of the last call that reads the output
    dtype = torch.float32  # of the output
    curved = False  # whether ``curvature`` gives anything
    trainable = False  # has weights that want a gradient
    free = True  # no trainable weight and no wanted input before it: only the penalised rows are pulled through it
    delta: Tensor | None = None  # cotangent of the output at the penalised rows
    tangents: Sequence[Tensor | None] = ()  # of the parents, at the penalised rows

    def pull(self, cotangent: Tensor, rows: slice) -> tuple[Tensor | None, ...]:
        """Cotangent of the output -> cotangents of the parents."""
        raise NotImplementedError

    def push(self, tangents: Sequence[Tensor | None], rows: slice) -> Tensor | None:
        """Tangents of the parents -> tangent of the output; None is zero."""
        raise NotImplementedError

    def curvature(self, tangents: Sequence[Tensor | None], cotangent: Tensor, rows: slice) -> tuple[Tensor | None, ...]:
        """Derivative of <cotangent, push(tangents)> with respect to the parents' values."""
        raise NotImplementedError

    def add_weight_gradient(self, tape: Tape, cotangent: Tensor, operand: Tensor, rows: slice) -> None:
        """Add cotangent x operand to the weight's gradient."""

    def add_bias_gradient(self, tape: Tape, cotangent: Tensor) -> None:
        """Add the cotangent to the bias's gradient."""

    def add_gradients(self, tape: Tape, cotangent: Tensor, rows: slice) -> None:
        """Add the cotangent's share to both, with the input itself as the operand."""
        self.add_weight_gradient(tape, cotangent, self.x[rows], rows)
        self.add_bias_gradient(tape, cotangent)


class Input(Node):
    """The batch that the critic is called with."""


class Gradients:
    """The weights that want gradients, and what has been added to those so far."""

    def __init__(self, wanted: bool) -> None:
        self.wanted = wanted  # otherwise values alone are
        self.weights: dict[int, Tensor] = {}
        self.sums: dict[int, Tensor] = {}

    def add(self, weight: Tensor, gradient: Tensor) -> None:
        gradient = gradient if gradient.dtype == weight.dtype else gradient.to(weight.dtype)
        known = self.sums.get(id(weight))
        self.sums[id(weight)] = gradient if known is None else known.add_(gradient)

    def all(self) -> list[tuple[Tensor, Tensor]]:
        """Each weight with its gradient; zeros where nothing was added, as for biases of a penalty."""
        known = ((w, self.sums.get(key)) for key, w in self.weights.items())
        return [(w, torch.zeros_like(w) if g is None else g) for w, g in known]


class Tape(TorchFunctionMode):
    """Records the calls on one batch. ``nodes`` are in order of execution."""

    def __init__(
        self,
        rules: Mapping[Any, Callable[..., Tensor]],
        x: Tensor,
        wants_input: bool = False,
        gradients: Gradients | None = None,
    ) -> None:
        super().__init__()
        self.rules = rules
        self.rows = x.shape[0]
        self.gradients = Gradients(torch.is_grad_enabled()) if gradients is None else gradients
        self.curved = False
        self.nodes: list[Node] = []
        self._kept: list[tuple[Tensor, int]] = []
        self._marks: dict[int, tuple[Any, Node, int]] = {}
        self.input = Input()
        self.input.free = not wants_input
        self.x = x
        self._mark(self.input, (), x)

    # --- recording ----------------------------------------------------------------------------------------------------

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        rule = self.rules.get(func)
        if (rule is None and func in HARMLESS) or not self._involved(args, kwargs):
            return func(*args, **kwargs)
        if rule is None:
            raise NoRule(f"{name_of(func)} has no rule")
        if not torch.is_grad_enabled():
            raise NoRule(f"{name_of(func)} runs without gradients, inside a custom function or no_grad")
        with torch.no_grad():
            try:
                return rule(self, *args, **kwargs)
            except TypeError as error:  # an argument that the rule does not know, such as alpha
                raise NoRule(f"{name_of(func)}: {error}") from error

    def node_of(self, x: Any) -> Node | None:
        """The node that made this tensor, or None for a constant."""
        mark = self._mark_of(x)
        if mark is None:
            return None
        if mark[2] != x._version:
            raise NoRule("a recorded activation was changed in place round the tape")
        return mark[1]

    def _mark_of(self, x: Any) -> tuple[Any, Node, int] | None:
        mark = self._marks.get(id(x))
        return mark if mark is not None and mark[0]() is x else None

    def is_active(self, x: Any) -> bool:
        return self.node_of(x) is not None

    def _involved(self, args: Any, kwargs: Mapping[str, Any]) -> bool:
        """Whether arguments hold a recorded tensor; NoRule for one that was computed from such, round the tape."""
        found = False
        for arg in (*args, *kwargs.values()) if kwargs else args:
            for x in arg if isinstance(arg, (tuple, list)) else (arg,):
                if not isinstance(x, Tensor) or type(x) is nn.Parameter:
                    continue
                if self.is_active(x):
                    found = True
                elif x.grad_fn is not None and self._reaches(x.grad_fn):
                    raise NoRule("an activation was computed round the tape")
        return found

    def _reaches(self, function: Any) -> bool:
        """Whether an autograd graph leads to a recorded tensor."""
        seen, stack = set(), [function]
        while stack:
            at = stack.pop()
            if at is None or at in seen:
                continue
            seen.add(at)
            if self._mark_of(getattr(at, "variable", None)) is not None:
                return True
            stack += [following for following, _ in at.next_functions]
        return False

    def constant(self, x: Any, what: str) -> Any:
        """An argument that must not depend on the batch or want a gradient."""
        if isinstance(x, Tensor) and (self.is_active(x) or x.requires_grad):
            raise NoRule(f"{what} is not a constant")
        return x

    def weight(self, x: Tensor | None, what: str) -> Tensor | None:
        """A weight, remembered if it wants a gradient."""
        if x is None:
            return None
        if self.is_active(x):
            raise NoRule(f"{what} depends on the batch")
        if type(x) not in (Tensor, nn.Parameter):
            raise NoRule(f"{what} is a {type(x).__name__}")
        if x.requires_grad and self.gradients.wanted:
            self.gradients.weights[id(x)] = x
        return x

    def keep(self, x: Tensor) -> Tensor:
        """A tensor that a rule will read again: it must not be written in place meanwhile."""
        self._kept.append((x, x._version))
        return x

    def writable(self, x: Tensor) -> Tensor:
        """A tensor to write in place: not the caller's own batch."""
        if x.untyped_storage().data_ptr() == self.x.untyped_storage().data_ptr():
            raise NoRule("the critic changes its input in place")
        return x

    def add(self, node: Node, parents: Sequence[Tensor | None], output: Tensor, *weights: Tensor | None) -> Tensor:
        """Append a call; its output becomes a recorded tensor."""
        node.trainable = self.gradients.wanted and any(w is not None and w.requires_grad for w in weights)
        # Not node_of: a call in place has changed its parent, rightly.
        marks = (self._mark_of(p) for p in parents)
        self._mark(node, tuple(None if m is None else m[1] for m in marks), output)
        self.curved |= node.curved
        return output

    def _mark(self, node: Node, parents: tuple[Node | None, ...], output: Tensor) -> None:
        if output.dim() == 0 or output.shape[0] != self.rows:
            raise NoRule(f"a call gives shape {tuple(output.shape)}, which is not one row for each of {self.rows}")
        node.parents = parents
        node.index = node.last_use = len(self.nodes)
        node.dtype = output.dtype
        for parent in parents:
            if parent is not None:
                parent.last_use = node.index
        if parents:
            node.free = all(p is None or (p.free and not p.trainable) for p in parents)
        self.nodes.append(node)
        # A recorded tensor requires grad, as in eager PyTorch: what depends on it round the tape can be told.
        if not output.requires_grad:
            output.requires_grad_()
        # Weakly, by identity: a reference from the tensor would tie the whole tape into a cycle of garbage.
        self._marks[id(output)] = weakref.ref(output), node, output._version

    def restart(self, x: Tensor) -> None:
        """Go on from a tensor whose making was not recorded, for those who only want to look."""
        self._mark(Input(), (), x)

    def finish(self) -> None:
        """After the forward pass: NoRule if a kept tensor was written in place."""
        for x, version in self._kept:
            if x._version != version:
                raise NoRule("an activation that is needed again was changed in place")


def cast(x: Tensor, like: Tensor) -> Tensor:
    """x in the dtype of another tensor; they differ only under autocast."""
    return x if x.dtype == like.dtype else x.to(like.dtype)


def name_of(func: Any) -> str:
    """A function's public name."""
    return resolve_name(func) or getattr(func, "__name__", str(func))


def unwrapped(critic: Any) -> Any:
    """The module inside what ``torch.compile`` returned: its layers are what a tape can see."""
    while isinstance(critic, nn.Module) and "_orig_mod" in critic._modules:
        critic = critic._orig_mod
    return critic


# Calls that read a recorded tensor's description, not its values.
HARMLESS = {
    torch.Tensor.size,
    torch.Tensor.dim,
    torch.Tensor.ndimension,
    torch.Tensor.numel,
    torch.Tensor.nelement,
    torch.Tensor.stride,
    torch.Tensor.__len__,
    torch.Tensor.is_floating_point,
    torch.is_floating_point,
    torch.Tensor.is_contiguous,
    torch.Tensor.get_device,
    torch.is_tensor,
    torch.zeros_like,
    torch.ones_like,
    torch.full_like,
    torch.empty_like,
    torch.rand_like,
    torch.randn_like,
    torch.Tensor.new_zeros,
    torch.Tensor.new_ones,
    torch.Tensor.new_empty,
    torch.Tensor.new_full,
    *(
        getattr(torch.Tensor, name).__get__
        for name in ("shape", "dtype", "device", "ndim", "is_cuda", "layout", "requires_grad", "is_leaf", "itemsize")
    ),
}
