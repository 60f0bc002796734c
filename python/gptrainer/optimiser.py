"""``torch.optim.Adam`` with less overhead per step, for small networks.

With torch's own class whole training iterations take 5 to 10 % more CPU time (one thread, MLPs of width 128 on
points and of width 256 on digits).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd import profiler
from torch.optim import Optimizer, optimizer

Step = Callable[..., Any]


def _where_wanted(update: Step) -> Step:
    """Make an update an optimiser's step.

    Torch's hooks and profiler record take as long as the update of a toy network, so they are added only where there
    are hooks or the profiler runs.
    """
    whole = Optimizer.profile_hook_step(update)

    @wraps(update)
    def step(self: Optimizer, *args: Any, **options: Any) -> Any:
        wanted = (
            profiler._is_profiler_enabled
            or self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or optimizer._global_optimizer_pre_hooks
            or optimizer._global_optimizer_post_hooks
        )
        return (whole if wanted else update)(self, *args, **options)

    vars(step)["hooked"] = True  # torch then does not wrap it again
    return step


class Adam(torch.optim.Adam):
    """``torch.optim.Adam(fused=True)`` that collects its tensors once instead of in every step.

    params: on one device, of one dtype. Update, state and hooks are torch's.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, betas: tuple[float, float]) -> None:
        super().__init__(params, lr=lr, betas=betas, fused=True)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        self._found: dict[int, tuple[list[Tensor], ...]] = {}

    def __setstate__(self, state: dict[str, Any]) -> None:  # the end of load_state_dict, too
        super().__setstate__(state)
        self._found = {}

    def zero_grad(self, set_to_none: bool = True) -> None:
        if not set_to_none:
            return super().zero_grad(set_to_none)
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None

    @_where_wanted
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; return the closure's loss, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for index, group in enumerate(self.param_groups):
            grads = [p.grad for p in group["params"] if p.grad is not None]
            if not grads:
                continue
            params, means, squares, steps = self._tensors(index, group, len(grads))
            torch._foreach_add_(steps, 1)
            torch._fused_adam_(
                params,
                grads,
                means,
                squares,
                [],
                steps,
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=group["maximize"],
            )
        return loss

    def _tensors(self, index: int, group: dict[str, Any], count: int) -> tuple[list[Tensor], ...]:
        """Collect parameters with a gradient and their state, which torch creates where it is missing."""
        if count == len(group["params"]) and index in self._found:
            return self._found[index]
        lists: list[list[Tensor]] = [[] for _ in range(5)]
        params, grads, means, squares, steps = lists
        self._init_group(group, params, grads, means, squares, [], steps)
        if count == len(group["params"]):
            self._found[index] = params, means, squares, steps
        return params, means, squares, steps
