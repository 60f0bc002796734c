"""Fixtures: every test of an op runs once per backend; a backend that cannot run is skipped with its reason."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial

import pytest
import torch

import emulated
import gpkernels
from gpkernels import backends
from gpkernels.critic import plan
from scored import Scored

# Tensors of tests are small, and several processes run them: more threads of each would wait for the others'.
torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", "1")))

BACKENDS = ("reference", "cpu", "cuda-emulated")


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _call_by_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small critics with calls that have no rule go by their graph, too, which does not pay but is to be tested."""
    monkeypatch.setattr(plan, "PRODUCTS", {True: 0, False: 0})


@pytest.fixture
def compiler_anew() -> Iterator[None]:
    """Forget what other tests compiled: PyTorch stops compiling a function that it has compiled too often."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "cuda-emulated":
        if emulated.compiler() is None:
            pytest.skip("there is no C++ compiler to build the emulated kernels with")
        backends.add_kernels(request.param, partial(emulated.kernels, emulated.build()))
    reason = backends.unavailable(request.param)
    if reason is not None:
        pytest.skip(reason)
    with gpkernels.backend(request.param):
        yield request.param


@pytest.fixture(params=["by rules", "by autograd"])
def rules_or_autograd(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``Scored`` go by rules, or be left to autograd for a call without one."""
    if request.param == "by autograd":
        monkeypatch.setattr(plan, "PRODUCTS", {True: 1 << 28, False: 1 << 34})
        monkeypatch.setattr(Scored, "cubes", True)


@pytest.fixture(params=["C++", "Python"])
def loop(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run critics' programs and checks in C++ or in Python."""
    if request.param == "Python":
        monkeypatch.setattr(backends, "program", None)
    elif backends.program is None:
        pytest.skip("the loop in C++ is not built")
    return request.param
