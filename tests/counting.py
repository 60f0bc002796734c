"""Counters of what a call dispatches: FLOPs of products and convolutions, and operands that are all zeros."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from gpkernels.ops.scaled_dot_product_attention import register_flops

register_flops()


class Count(TorchDispatchMode):
    """FLOPs by PyTorch's own registry, and the products that were given a zero operand."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        self.calls = 0
        self.zeros: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls += 1
        packet = func._overloadpacket
        if packet in flop_registry:
            self.flops += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
            operands = args[1:3] if packet in (torch.ops.aten.addmm, torch.ops.aten.addmm_) else args[:2]
            if packet == torch.ops.aten.convolution_backward:  # of its three tensors a mask says which are read
                operands = [args[0], *([args[2]] if args[-1][0] else []), *([args[1]] if args[-1][1] else [])]
            self.zeros += [str(func) for x in operands if isinstance(x, Tensor) and not x.any()]
        return out


def counted(call: Callable[[], Any]) -> Count:
    with Count() as count:
        call()
    return count
