"""RMSprop that clips in the same pass: WGAN's optimiser (Arjovsky et al. 2017, Algorithm 1)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from gpkernels import ops
from gpkernels.ops import check_nonnegative


class RMSprop(torch.optim.RMSprop):
    """``torch.optim.RMSprop``, then a clamp of every weight to [-clip, clip], in one pass over the weights.

    The update and the state are torch's, so a state_dict of either loads into the other. clip: None, or >= 0; a
    parameter group may have its own. float64, float32, float16 and bfloat16 parameters; low precision is computed in
    float32 and rounded once. Sparse or complex gradients, capturable and differentiable raise ValueError or TypeError.
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
        *,
        maximize: bool = False,
        clip: float | None = None,
    ) -> None:
        if isinstance(lr, Tensor):
            raise TypeError("lr: expected a number, got a tensor")
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha: expected a number from 0 to 1, got {alpha}")
        super().__init__(params, lr, alpha, eps, weight_decay, momentum, centered, maximize=maximize)
        self.defaults["clip"] = clip
        for group in self.param_groups:
            group["clip"] = _check_clip(group.get("clip", clip))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        if "clip" in self.defaults:
            param_group["clip"] = _check_clip(param_group.get("clip"))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("clip", self.defaults.get("clip"))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient; the closure's loss, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        updates: list[tuple[list[Tensor], dict[str, Any]]] = []
        for group in self.param_groups:
            by_device: dict[torch.device, list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    self._check(p, group)
                    by_device.setdefault(p.device, []).append(p)
            updates += [(params, group) for params in by_device.values()]
        for params, group in updates:  # only now that every group has been checked
            self._update(params, group)
        return loss

    def _check(self, p: Tensor, group: dict[str, Any]) -> None:
        ops.check_floating("params", p)
        ops.check_floating("grad", p.grad)
        for option in ("capturable", "differentiable"):
            if group[option]:
                raise ValueError(f"{option}: expected False, got True; use torch.optim.RMSprop")

    def _update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        grads: list[Tensor] = []
        state: dict[str, list[Tensor]] = {"square_avg": [], "grad_avg": [], "momentum_buffer": []}
        wanted = {"square_avg": True, "grad_avg": group["centered"], "momentum_buffer": group["momentum"] > 0}
        for p in params:
            assert p.grad is not None
            grads.append(p.grad)
            own = self.state[p]
            if not own:
                own["step"] = torch.zeros((), dtype=torch.float32)
            own["step"] += 1
            for name, tensors in state.items():
                if wanted[name]:
                    if name not in own:
                        own[name] = torch.zeros_like(p, memory_format=torch.preserve_format)
                    tensors.append(own[name])
        ops.rmsprop_(
            params,
            grads,
            *state.values(),
            float(group["lr"]),
            group["alpha"],
            group["eps"],
            group["weight_decay"],
            group["momentum"],
            group["maximize"],
            group["clip"],
        )
        torch.autograd.graph.increment_version([*params, *(t for tensors in state.values() for t in tensors)])


def _check_clip(clip: float | None) -> float | None:
    return None if clip is None else check_nonnegative("clip", clip)
