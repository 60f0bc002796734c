"""RMSprop with weight clipping in the same pass, the optimiser of WGAN (Arjovsky et al. 2017, Algorithm 1)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from gpkernels import backends
from gpkernels.ops.checks import (
    check_flag,
    check_floating,
    check_nonnegative,
    check_number,
    check_optional_flag,
    check_writable,
)
from gpkernels.ops.tensors import is_distributed, local
from gpkernels.ops.weights import rmsprop_op
from gpkernels.private import foreach_add_


class RMSprop(torch.optim.RMSprop):
    r"""RMSprop followed by weight clipping, in one pass over the weights.

    .. math::
        v &\leftarrow \alpha v + (1 - \alpha) g^2 \\
        w &\leftarrow \operatorname{clamp}\Bigl(w - \text{lr} \, \frac{g}{\sqrt{v} + \text{eps}},
            -\text{clip}, \text{clip}\Bigr)

    with weight decay, momentum and centring as in :class:`torch.optim.RMSprop`, whose state is the same: a
    ``state_dict`` of either loads into the other. float64, float32, float16 and bfloat16 parameters; low precision is
    computed in float32 and rounded once. Of a DTensor, as ``fully_shard`` makes them, each process updates its part.

    Args:
        params (iterable): parameters or parameter groups. A group may have its own value of every option.
        lr (float): learning rate. Default: 1e-2.
        alpha (float): smoothing constant, from 0 to 1. Default: 0.99.
        eps (float): term added to the denominator. Default: 1e-8.
        weight_decay (float): L2 penalty. Default: 0.
        momentum (float): momentum factor. Default: 0.
        centered (bool): normalise by an estimate of the variance of the gradient. Default: False.
        capturable (bool): only False is supported.
        foreach (bool, optional): accepted, and of no effect: all parameters of a group are updated by one call.
        maximize (bool): maximise the objective. Default: False.
        differentiable (bool): only False is supported.
        clip (float, optional): bound of the weights after the update, at least 0. Default: no clipping.

    Raises:
        TypeError: an option is of another type, ``lr`` is a tensor, or a gradient is sparse or complex.
        ValueError: an option is out of range, or ``capturable`` or ``differentiable`` is True.

    Example:
        >>> critic = torch.nn.Linear(2, 1)
        >>> optimizer = gpkernels.optim.RMSprop(critic.parameters(), lr=5e-5, clip=0.01)
        >>> critic(torch.randn(8, 2)).mean().backward()
        >>> optimizer.step()

    References:
        Arjovsky et al., "Wasserstein GAN", 2017, Algorithm 1. https://arxiv.org/abs/1701.07875
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        *,
        clip: float | None = None,
    ) -> None:
        if isinstance(lr, Tensor):
            raise TypeError("lr: expected a number, got a tensor")
        numbers = {"lr": lr, "alpha": alpha, "eps": eps, "weight_decay": weight_decay, "momentum": momentum}
        for name, value in numbers.items():
            check_number(name, value)  # torch checks the range
        if not alpha <= 1:
            raise ValueError(f"alpha: expected a number from 0 to 1, got {alpha}")
        clip = _check_clip(clip)
        super().__init__(
            params, lr, alpha, eps, weight_decay, momentum, centered, capturable, foreach, maximize, differentiable
        )
        self.defaults["clip"] = clip
        for group in self.param_groups:
            group.setdefault("clip", clip)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if isinstance(param_group, dict):  # otherwise torch says what is wrong
            options = {"clip": None, **self.defaults, **param_group}
            if isinstance(options["lr"], Tensor):
                raise TypeError("lr: expected a number, got a tensor")
            _Options.of(options)
        super().add_param_group(param_group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        clips = [group.get("clip") for group in self.__dict__.get("param_groups", ())]  # none yet when unpickled
        super().__setstate__(state)
        for i, group in enumerate(self.param_groups):  # torch's have no clip
            group.setdefault("clip", clips[i] if i < len(clips) else self.defaults.get("clip"))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform one update of every parameter that has a gradient.

        Gradients, options and state of all parameters are checked before anything is changed.

        Args:
            closure (Callable, optional): re-evaluates the model and returns the loss.

        Returns:
            The closure's loss, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        updates: list[_Update] = []
        for group in self.param_groups:
            by_device: dict[torch.device, list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_device.setdefault(p.device, []).append(p)
            if by_device:
                options = _Options.of(group)
                updates += [_Update(params, options, self.state) for params in by_device.values()]
        # The kernel checks its tensors before it writes; that is enough where there is one call.
        alone = len(updates) == 1 and not is_compiling()
        if alone and rmsprop_op.direct(*updates[0].arguments()) is not NotImplemented:
            updates[0].store(self.state)
            return loss
        for update in updates:
            update.check()
        for update in updates:
            rmsprop_op(*update.local())
            update.store(self.state)
        return loss


class _Options(NamedTuple):
    """The options of a parameter group, checked."""

    lr: float
    alpha: float
    eps: float
    weight_decay: float
    momentum: float
    maximize: bool
    clip: float | None
    centered: bool

    @classmethod
    def of(cls, group: dict[str, Any]) -> _Options:
        """Check a group's options; raise TypeError or ValueError for what is not supported."""
        for option in ("capturable", "differentiable"):
            if group[option]:
                raise ValueError(f"{option}: expected False, got {group[option]}; use torch.optim.RMSprop")
        check_optional_flag("foreach", group["foreach"])
        lr = group["lr"]
        alpha = check_nonnegative("alpha", group["alpha"])
        if alpha > 1:
            raise ValueError(f"alpha: expected a number from 0 to 1, got {alpha}")
        return cls(
            check_nonnegative("lr", lr.item() if isinstance(lr, Tensor) else lr),  # a state_dict of torch may bring one
            alpha,
            check_nonnegative("eps", group["eps"]),
            check_nonnegative("weight_decay", group["weight_decay"]),
            check_nonnegative("momentum", group["momentum"]),
            check_flag("maximize", group["maximize"]),
            _check_clip(group["clip"]),
            check_flag("centered", group["centered"]),
        )


class _Update:
    """Arguments of one call of the kernel: the parameters of a group on one device, their gradients and state.

    State that is new is kept here until ``store``; the optimiser's is unchanged until then.
    """

    def __init__(self, params: list[Tensor], options: _Options, state: Mapping[Tensor, dict[str, Any]]) -> None:
        self.params, self.options = params, options
        self.grads: list[Tensor] = []
        self.steps: list[Tensor] = []
        self.state: dict[str, list[Tensor]] = {"square_avg": [], "grad_avg": [], "momentum_buffer": []}
        self.new: dict[Tensor, dict[str, Tensor]] = {}
        kept = [("square_avg", True), ("grad_avg", options.centered), ("momentum_buffer", options.momentum > 0)]
        wanted = [(name, self.state[name]) for name, is_kept in kept if is_kept]
        for p in params:
            assert p.grad is not None
            self.grads.append(p.grad)
            own = state.get(p) or self._begin(p)
            if not isinstance(own["step"], Tensor):
                raise TypeError(f"state: expected a tensor for step, got {type(own['step']).__name__}")
            self.steps.append(own["step"])
            for name, tensors in wanted:
                tensors.append(own[name] if name in own else self._zeros(p, name))

    def _begin(self, p: Tensor) -> dict[str, Tensor]:
        check_floating("params", p)
        return self.new.setdefault(p, {"step": torch.zeros((), dtype=torch.float32)})

    def _zeros(self, p: Tensor, name: str) -> Tensor:
        own = self.new.setdefault(p, {})
        if name not in own:
            own[name] = torch.zeros_like(p, memory_format=torch.preserve_format)
        return own[name]

    def arguments(self) -> tuple[Any, ...]:
        return self.params, self.grads, *self.state.values(), *self.options[:-1]

    def local(self) -> tuple[Any, ...]:
        """Return the arguments with the parts of DTensors that this process has."""
        if not any(map(is_distributed, self.params)):
            return self.arguments()
        here = lambda tensors: [local(x, p) for x, p in zip(tensors, self.params, strict=False)]  # noqa: E731
        return here(self.params), here(self.grads), *map(here, self.state.values()), *self.options[:-1]

    def check(self) -> None:
        """Raise TypeError, ValueError or RuntimeError for tensors that the kernel does not support."""
        for i, p in enumerate(self.params):
            check_floating("params", p)
            check_floating("grad", self.grads[i])
            _check_like("grad", self.grads[i], p)
            check_writable("params", p)
            for name, tensors in self.state.items():
                if tensors:
                    _check_like(name, tensors[i], p)
                    check_writable(name, tensors[i])
        if backends.forced() is not None:
            backends.implementation(rmsprop_op, self.local())

    def store(self, state: MutableMapping[Tensor, dict[str, Any]]) -> None:
        """Count the step, store new state, and increment the versions of what was changed."""
        foreach_add_(self.steps, 1)
        for p, own in self.new.items():
            state[p].update(own)
        torch.autograd.graph.increment_version([*self.params, *(t for tensors in self.state.values() for t in tensors)])


def _check_like(name: str, x: Tensor, p: Tensor) -> None:
    """Raise ValueError unless a gradient or state matches its parameter; either can be replaced by the user."""
    for what in ("shape", "dtype", "device", "layout"):
        got, wanted = getattr(x, what), getattr(p, what)
        if got != wanted:
            cure = "" if name == "grad" else "; load_state_dict(state_dict()) brings state to its parameters"
            raise ValueError(f"{name}: expected the {what} of its parameter, {wanted}, got {got}{cure}")


def _check_clip(clip: float | None) -> float | None:
    return None if clip is None else check_nonnegative("clip", clip)
