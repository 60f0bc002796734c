"""Critics that are called from several threads restore the compiler's stance."""

from __future__ import annotations

from threading import Barrier, Thread

import torch
import torch._dynamo  # the compiler is there, as in a process that has compiled something
from torch import Tensor

import gpkernels as gpk


def test_threads_that_overlap_leave_the_compiler_at_work() -> None:
    first, second = Barrier(2), Barrier(2)

    def critic(x: Tensor) -> Tensor:
        first.wait(10)  # both are inside
        return x.square().sum(1)

    def late(x: Tensor) -> Tensor:
        first.wait(10)
        second.wait(10)  # until the other one has left
        return x.square().sum(1)

    x = torch.randn(3, 2)
    threads = [Thread(target=gpk.r1_penalty, args=(one, x)) for one in (critic, late)]
    for thread in threads:
        thread.start()
    threads[0].join(20)
    second.wait(10)
    threads[1].join(20)
    ran = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> object:
        ran.append(graph)
        return graph

    torch.compile(lambda y: y.sin(), backend=backend)(x)
    assert ran, "the compiler was left switched off"
