"""The GPU kernels on a GPU: `make test-gpu`. Skipped without one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import gpkernels as gpk
from cases import raw_arguments
from critics import ResidualCritic, mlp
from gpkernels import backends, ops
from gpkernels.compiler import as_program
from gpkernels.ops.gradient_norm_penalty import gradient_norm_penalty_op
from gpkernels.ops.interpolate import interpolate_op
from gpkernels.verify.cases import CASES
from gpkernels.zoo import plain_loss

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

DEVICE = torch.device("cuda")
torch.backends.cudnn.allow_tf32 = False


@pytest.fixture(params=["cuda", "triton"])
def gpu_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    reason = backends.unavailable(request.param)
    if reason is not None:
        pytest.skip(reason)
    with gpk.backend(request.param):
        yield request.param


def moved(value: object, device: torch.device) -> object:
    """Tensors on a device, in their own strides; everything else as it is."""
    return tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, value)


def tolerance(value: object) -> dict[str, float]:
    found: list[Tensor] = []
    tree_map(lambda x: found.append(x) if isinstance(x, Tensor) else None, value)
    half = any(x.dtype in (torch.float16, torch.bfloat16) for x in found)
    return {"rtol": 2e-2, "atol": 2e-3} if half else {"rtol": 1e-4, "atol": 1e-5}


@pytest.mark.parametrize("name", ops.ALL)
def test_raw_op_gives_the_references_numbers(name: str, gpu_backend: str) -> None:
    op = ops.ALL[name]
    for given in raw_arguments()[name]:
        on_device = moved(given, DEVICE)
        ours, exact = op(*on_device), op.implementation(*given)
        if op.overload._schema.is_mutable:
            ours, exact = on_device, given
        torch.testing.assert_close(moved(ours, torch.device("cpu")), exact, **tolerance(given))


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (257, 2), (64, 3072), (4096, 105), (3, 1_000_003)])
@pytest.mark.parametrize("name", CASES)
def test_value_and_gradients_agree_with_float64(name: str, shape: tuple[int, ...], gpu_backend: str) -> None:
    case = CASES[name]
    exact_inputs = case.inputs(shape, torch.float64)
    inputs = [x.float().to(DEVICE) for x in exact_inputs]
    results = []
    for function, some in ((case.function, inputs), (case.specification, exact_inputs)):
        leaves = case.differentiable(some)
        value = function(*some)
        results.append([value, *torch.autograd.grad(value.sum(), leaves, allow_unused=True)])
    for ours, exact in zip(*results, strict=True):
        scale = float(exact.detach().norm().clamp_min(1.0))
        assert float((ours.detach().double().cpu() - exact.detach()).norm()) <= 2e-5 * scale


def test_a_graph_can_be_captured_and_replayed(gpu_backend: str) -> None:
    real, fake, eps = (
        torch.randn(64, 3072, device=DEVICE),
        torch.randn(64, 3072, device=DEVICE),
        torch.rand(64).to(DEVICE),
    )

    def penalty() -> Tensor:
        mixed = interpolate_op(real, fake, eps)
        value: Tensor = gradient_norm_penalty_op(mixed, 1.0, False, 1, 2.0)[0]
        return value

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        penalty()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = penalty()
    for _ in range(3):
        real.normal_()
        graph.replay()
        torch.testing.assert_close(captured, penalty())


def test_two_streams_do_not_disturb_each_other(gpu_backend: str) -> None:
    inputs = [torch.randn(256, 4099, device=DEVICE) for _ in range(2)]
    expected = [gradient_norm_penalty_op(x, 1.0, False, 1, 2.0)[0] for x in inputs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in inputs]
    found: list[list[Tensor]] = [[], []]
    for _ in range(50):
        for stream, x, values in zip(streams, inputs, found, strict=True):
            with torch.cuda.stream(stream):
                values.append(gradient_norm_penalty_op(x, 1.0, False, 1, 2.0)[0])
    torch.cuda.synchronize()
    for values, value in zip(found, expected, strict=True):
        assert all(torch.equal(v, value) for v in values)


def _norm(make: Callable[[int], nn.Module]) -> nn.Sequential:
    return nn.Sequential(
        *(nn.Linear(6, 16), make(16), nn.LeakyReLU(0.2)),
        *(nn.Linear(16, 16), make(16), nn.LeakyReLU(0.2), nn.Linear(16, 1)),
    )


CRITICS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: mlp(6, 32, 32, 1), (64, 6)),
    "residual": (lambda: ResidualCritic(8, 16, "layer_norm"), (4, 3, 16, 16)),
    "instance norm": (lambda: ResidualCritic(8, 16, "instance_norm"), (4, 3, 16, 16)),
    "batch norm": (lambda: _norm(nn.BatchNorm1d), (8, 6)),
    "rms norm": (lambda: _norm(nn.RMSNorm), (8, 6)),
    "tanh": (
        lambda: nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1)),
        (8, 6),
    ),
}


@pytest.mark.parametrize("kind", CRITICS)
@pytest.mark.parametrize("objective", ["hinge", "least-squares", "relativistic"])
def test_objectives_with_several_penalties_are_those_of_the_cpu(objective: str, kind: str) -> None:
    make, shape = CRITICS[kind]
    torch.manual_seed(0)
    critic = make()
    on_device = make().to(DEVICE)
    on_device.load_state_dict(critic.state_dict())
    options = {"objective": objective, "penalty": {"r1": 0.5, "r2": 0.25}}
    losses = gpk.CriticLoss(critic, **options), gpk.CriticLoss(on_device, **options)
    for _ in range(5):
        real, fake = torch.randn(2, *shape)
        found = []
        for loss, device in zip(losses, (torch.device("cpu"), DEVICE), strict=True):
            value = loss(real.to(device), fake.to(device)).loss
            weights = list(loss.critic.parameters())
            found.append([value, *torch.autograd.grad(value, weights, allow_unused=True)])
        for exact, ours in zip(*found, strict=True):
            assert (exact is None) == (ours is None)
            if exact is not None:
                torch.testing.assert_close(ours.cpu(), exact, rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize("kind", CRITICS)
def test_the_gradient_as_a_value_is_that_of_the_cpu(kind: str) -> None:
    make, shape = CRITICS[kind]
    torch.manual_seed(0)
    critic = make()
    on_device = make().to(DEVICE)
    on_device.load_state_dict(critic.state_dict())
    for _ in range(4):
        x = torch.randn(shape)
        found = []
        for model, device in ((critic, torch.device("cpu")), (on_device, DEVICE)):
            given = x.to(device).requires_grad_()
            value, gradient = gpk.value_and_input_gradient(model, given)
            loss = (gradient.flatten(1).norm(dim=1) - 1).abs().mean() + value.square().mean()
            found.append([gradient, *torch.autograd.grad(loss, [given, *model.parameters()], allow_unused=True)])
        for exact, ours in zip(*found, strict=True):
            assert (exact is None) == (ours is None)
            if exact is not None:
                torch.testing.assert_close(ours.detach().cpu(), exact.detach(), rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize("kind", CRITICS)
def test_a_critic_step_is_that_of_the_cpu(kind: str) -> None:
    """In every call: looked at, watched, traced and by a program. Nothing waits for the device after that."""
    make, shape = CRITICS[kind]
    critic, twin = make(), make().double()
    twin.load_state_dict(critic.state_dict())
    critic = critic.to(DEVICE)
    loss, exact = gpk.CriticLoss(critic), gpk.CriticLoss(twin)
    for call in range(6):
        real, fake, eps = torch.randn(shape), torch.randn(shape), torch.rand(shape[0])
        with gpk.backend("reference"):
            wanted = torch.autograd.grad(
                exact(*(x.double() for x in (real, fake)), eps=eps.double()).loss, list(twin.parameters())
            )
        on_device = [x.to(DEVICE) for x in (real, fake, eps)]
        torch.cuda.set_sync_debug_mode("error" if call > 3 else "default")
        try:
            ours = torch.autograd.grad(loss(*on_device[:2], eps=on_device[2]).loss, list(critic.parameters()))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        scale = max(float(g.norm()) for g in wanted)
        for a, b in zip(ours, wanted, strict=True):
            assert float((a.cpu().double() - b).norm()) <= 1e-3 * scale


@pytest.mark.parametrize("kind", CRITICS)
def test_a_whole_step_can_be_captured_and_replayed(kind: str) -> None:
    make, shape = CRITICS[kind]
    critic = make().to(DEVICE)
    loss, weights = gpk.CriticLoss(critic, together=kind != "batch norm"), list(critic.parameters())
    real, fake, eps = (torch.randn(s, device=DEVICE) for s in (shape, shape, shape[:1]))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(4):
            torch.autograd.grad(loss(real, fake, eps=eps).loss, weights)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = torch.autograd.grad(loss(real, fake, eps=eps).loss, weights)
    for _ in range(2):
        real.normal_()
        graph.replay()
        exact = torch.autograd.grad(plain_loss(critic, real, fake, eps), weights)
        torch.testing.assert_close(captured, exact, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", CRITICS)
@pytest.mark.parametrize("backend", ["gpkernels", "inductor", "cudagraphs"])
def test_a_compiled_step_is_that_of_plain_pytorch(kind: str, backend: str) -> None:
    """Nothing waits for the device once it is compiled; "cudagraphs" is Inductor's graphs of the whole step."""
    torch.compiler.reset()
    make, shape = CRITICS[kind]
    critic = make().to(DEVICE)
    loss, weights = gpk.CriticLoss(critic), list(critic.parameters())
    known = {"cudagraphs": {"mode": "reduce-overhead"}, "gpkernels": {"backend": as_program}}
    options: dict[str, Any] = known.get(backend, {})
    step = torch.compile(lambda r, f, e: loss(r, f, eps=e).loss, fullgraph=True, **options)
    for call in range(5):
        real, fake, eps = (torch.randn(s, device=DEVICE) for s in (shape, shape, shape[:1]))
        torch.cuda.set_sync_debug_mode("error" if call > 3 and backend != "cudagraphs" else "default")
        try:
            ours = [g.clone() for g in torch.autograd.grad(step(real, fake, eps), weights)]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        exact = torch.autograd.grad(plain_loss(critic, real, fake, eps), weights)
        scale = max(float(g.norm()) for g in exact)
        for a, b in zip(ours, exact, strict=True):
            assert float((a - b).norm()) <= 2e-3 * scale


@pytest.mark.parametrize("kind", CRITICS)
def test_a_compiled_step_can_be_captured(kind: str) -> None:
    torch.compiler.reset()
    make, shape = CRITICS[kind]
    critic = make().to(DEVICE)
    loss, weights = gpk.CriticLoss(critic), list(critic.parameters())
    real, fake, eps = (torch.randn(s, device=DEVICE) for s in (shape, shape, shape[:1]))
    step = torch.compile(lambda: loss(real, fake, eps=eps).loss, fullgraph=True, backend=as_program)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            torch.autograd.grad(step(), weights)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = torch.autograd.grad(step(), weights)
    for _ in range(2):
        real.normal_()
        graph.replay()
        exact = torch.autograd.grad(plain_loss(critic, real, fake, eps), weights)
        torch.testing.assert_close(captured, exact, rtol=1e-3, atol=1e-4)
