"""The GPU kernels on a GPU: `make test-gpu`. Skipped without one; GPK_TEST_DEVICE=cpu tries what needs no GPU."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map

import gpkernels as gpk
from cases import raw_arguments
from critics import ResidualCritic, mlp
from gpkernels import backends, ops
from gpkernels.bench.small import SMALL
from gpkernels.compiler import as_program
from gpkernels.ops import scaled_dot_product_attention as attention_op
from gpkernels.ops.gradient_norm_penalty import gradient_norm_penalty_op
from gpkernels.ops.interpolate import interpolate_op
from gpkernels.verify.cases import CASES
from gpkernels.zoo import VisionTransformer, plain_loss
from test_grid_sample import ALL as SAMPLINGS
from test_grid_sample import drawn, named, three_orders
from test_scaled_dot_product_attention import FORMS, orders, plain

DEVICE = torch.device(os.environ.get("GPK_TEST_DEVICE", "cuda"))
if DEVICE.type == "cuda" and not torch.cuda.is_available():
    pytest.skip("there is no GPU", allow_module_level=True)
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
        if "attention" in name:  # products of rounded scores: small elements of a result have the errors of large ones
            for x, y in zip(tree_leaves(ours), tree_leaves(exact), strict=True):
                assert _error(x, y.double()) <= tolerance(given)["rtol"]
        else:
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


@pytest.fixture
def by_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small calls do as large ones."""
    for name in ("MOST_KEPT_ON_GPU", "MOST_KEPT_OF_16_BITS_ON_GPU"):
        monkeypatch.setattr(attention_op, name, 0)


def _error(x: Tensor, exact: Tensor) -> float:
    return float((x.detach().double().cpu() - exact.detach()).norm() / exact.detach().norm().clamp_min(1e-12))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.usefixtures("by_tiles")
@pytest.mark.parametrize("name", [name for name in FORMS if name != "one row"])
def test_attention_is_as_exact_as_the_plain_form(name: str, dtype: torch.dtype) -> None:
    form = FORMS[name]
    _attention_is_exact(form.tensors(dtype), form.arguments(), dtype)


@pytest.mark.usefixtures("by_tiles")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("is_causal", [False, True], ids=["all keys", "causal"])
@pytest.mark.parametrize(
    ("length", "width", "values"),
    [
        *(
            (length, width, width)
            for length, width in ((77, 16), (256, 32), (500, 64), (130, 80), (96, 128), (40, 300))
        ),
        *((70, 200, 200), (65, 256, 256), (300, 136, 192), (129, 24, 256), (80, 255, 129)),
    ],
)
def test_attention_of_several_tiles(length: int, width: int, values: int, is_causal: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(2, 2, length, w).to(dtype).requires_grad_() for w in (width, width, values)]
    _attention_is_exact(tensors, {"is_causal": is_causal}, dtype)


def _attention_is_exact(tensors: list[Tensor], others: Any, dtype: torch.dtype) -> None:
    """Errors are at most twice those of PyTorch's plain form on the device, and two calls give the same bits."""
    mask = others.get("attn_mask")
    added = mask is not None and mask.is_floating_point()
    exact = orders(plain, [x.detach().double().requires_grad_() for x in tensors], others)
    given = {**others, "attn_mask": mask.to(dtype)} if added else others
    on_device, given = [x.detach().to(DEVICE).requires_grad_() for x in tensors], moved(given, DEVICE)
    calls = gpk.scaled_dot_product_attention, plain, gpk.scaled_dot_product_attention
    found = [orders(call, on_device, given) for call in calls]
    for ours, theirs, again, right in zip(*found, exact, strict=True):
        assert ours.dtype == dtype
        assert _error(ours, right) <= 2 * _error(theirs, right) + 4 * torch.finfo(dtype).eps
        assert torch.equal(ours, again)


@pytest.mark.usefixtures("by_tiles")
def test_attention_needs_no_memory_for_scores() -> None:
    """Twice the length takes twice the memory."""
    peaks = []
    for length in (2048, 4096):
        x = torch.randn(1, 4, length, 64, device=DEVICE, requires_grad=True)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        (first,) = torch.autograd.grad(gpk.scaled_dot_product_attention(x, x, x).square().sum(), x, create_graph=True)
        torch.autograd.grad(first.square().sum(), x)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] <= 2.2 * peaks[0]


@pytest.mark.parametrize(("axes", "constants"), SAMPLINGS, ids=str)
def test_sampling_at_a_grid_is_that_of_the_cpu(axes: int, constants: Any) -> None:
    image, grid = drawn(axes)

    def sample(image: Tensor, grid: Tensor) -> Tensor:
        return gpk.grid_sample(image, grid, *named(constants))

    wanted = three_orders(sample, image, grid)
    found = three_orders(sample, image.to(DEVICE), grid.to(DEVICE))
    for ours, exact in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours.cpu(), exact, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", SMALL)
def test_small_critics_are_those_of_the_cpu_in_float64(name: str) -> None:
    """Loss and gradients in four calls, the last two by a program."""
    torch.manual_seed(0)
    case = SMALL[name]
    critic = case.make().double()
    on_device = case.make().double()
    on_device.load_state_dict(critic.state_dict())
    on_device.to(DEVICE)
    losses = gpk.CriticLoss(critic, together=False), gpk.CriticLoss(on_device, together=False)
    if any(isinstance(m, nn.Dropout) for m in critic.modules()):
        for m in (*critic.modules(), *on_device.modules()):
            m.train(not isinstance(m, nn.Dropout))  # devices draw other masks
    for _ in range(4):
        real, fake = torch.randn(2, *case.shape, dtype=torch.float64)
        eps = torch.rand(case.shape[0], dtype=torch.float64)
        found = []
        for loss, device in zip(losses, (torch.device("cpu"), DEVICE), strict=True):
            value = loss(real.to(device), fake.to(device), eps=eps.to(device)).loss
            weights = [p for p in loss.critic.parameters() if p.requires_grad]
            found.append([value, *torch.autograd.grad(value, weights, allow_unused=True)])
        scale = max(float(x.norm()) for x in found[0] if x is not None)
        for exact, ours in zip(*found, strict=True):
            assert (exact is None) == (ours is None)
            assert exact is None or float((ours.cpu() - exact).norm()) <= 1e-9 * scale


def exact_gradients(critic: nn.Module, *groups: Tensor) -> tuple[Tensor, ...]:
    """Gradients of plain PyTorch's loss, which has no second derivative of fused attention."""
    with sdpa_kernel(SDPBackend.MATH):
        return torch.autograd.grad(plain_loss(critic, *groups), list(critic.parameters()))


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
    "transformer": (lambda: VisionTransformer(16, 4, 32, 2), (4, 3, 16, 16)),
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


PENALTIES: dict[str, Callable[..., Tensor]] = {
    "between": lambda critic, real, fake, eps: gpk.gradient_penalty(critic, real, fake, eps=eps),
    "r1": lambda critic, real, fake, eps: gpk.r1_penalty(critic, real),
    "r2": lambda critic, real, fake, eps: gpk.r2_penalty(critic, fake),
    "dragan": lambda critic, real, fake, eps: gpk.dragan_penalty(critic, real, scale=0.0),  # devices draw other noise
    "eikonal": lambda critic, real, fake, eps: gpk.eikonal_loss(critic, fake),
}


@pytest.mark.filterwarnings("ignore:the critic has BatchNorm")
@pytest.mark.parametrize("kind", CRITICS)
@pytest.mark.parametrize("penalty", PENALTIES)
def test_a_penalty_is_that_of_the_cpu(penalty: str, kind: str) -> None:
    """In every call, the settled ones included, which do not wait for the device."""
    make, shape = CRITICS[kind]
    torch.manual_seed(0)
    critic, twin = make(), make().double()
    twin.load_state_dict(critic.state_dict())
    critic = critic.to(DEVICE)
    call = PENALTIES[penalty]
    for turn in range(6):
        real, fake, eps = torch.randn(shape), torch.randn(shape), torch.rand(shape[0])
        with gpk.backend("reference"):
            exact = call(twin, *(x.double() for x in (real, fake, eps)))
            wanted = torch.autograd.grad(exact, list(twin.parameters()), allow_unused=True)
        on_device = [x.to(DEVICE) for x in (real, fake, eps)]
        torch.cuda.set_sync_debug_mode("error" if turn > 3 else "default")
        try:
            value = call(critic, *on_device)
            ours = torch.autograd.grad(value, list(critic.parameters()), allow_unused=True)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.testing.assert_close(value.cpu().double(), exact, rtol=1e-4, atol=1e-6)
        scale = max(float(g.norm()) for g in wanted if g is not None)
        for a, b in zip(ours, wanted, strict=True):
            assert (a is None) == (b is None)
            assert a is None or b is None or float((a.cpu().double() - b).norm()) <= 1e-3 * scale


@pytest.mark.parametrize("kind", CRITICS)
def test_a_step_under_autocast_errs_as_plain_pytorchs(kind: str) -> None:
    """In bfloat16, against float64: at most 1.5 times plain PyTorch's error."""
    make, shape = CRITICS[kind]
    torch.manual_seed(0)
    critic, twin = make(), make().double()
    twin.load_state_dict(critic.state_dict())
    critic = critic.to(DEVICE)
    loss = gpk.CriticLoss(critic)
    weights = list(critic.parameters())
    for _ in range(5):
        real, fake, eps = torch.randn(shape), torch.randn(shape), torch.rand(shape[0])
        exact = exact_gradients(twin, *(x.double() for x in (real, fake, eps)))
        on_device = [x.to(DEVICE) for x in (real, fake, eps)]
        with torch.autocast(DEVICE.type, torch.bfloat16):
            value = loss(*on_device[:2], eps=on_device[2]).loss
            plainly = plain_loss(critic, *on_device) if kind != "transformer" else None
        ours = torch.autograd.grad(value, weights)
        errors = [_distance(ours, exact)]
        if plainly is not None:
            errors.append(_distance(torch.autograd.grad(plainly, weights), exact))
        assert errors[0] <= 1.5 * errors[1] + 4e-3 if len(errors) == 2 else errors[0] <= 5e-2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_step_by_pytorchs_flash_kernel_has_the_gradients(dtype: torch.dtype) -> None:
    """Heads of 8 entries and 17 tokens, so that no tensor of one shape passes for another."""
    torch.manual_seed(0)
    critic = VisionTransformer(16, 4, 16, 2, 2)
    exact = copy.deepcopy(critic).double()
    critic = critic.to(DEVICE, dtype)
    groups = *(torch.randn(4, 3, 16, 16) for _ in range(2)), torch.rand(4)
    wanted = exact_gradients(exact, *(x.double() for x in groups))
    real, fake, eps = (x.to(DEVICE, dtype) for x in groups)
    loss = gpk.CriticLoss(critic)
    for _ in range(3):
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            value = loss(real, fake, eps=eps).loss
        found = torch.autograd.grad(value, list(critic.parameters()))
        assert _distance(found, wanted) < 5e-2


def _distance(found: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> float:
    """Return the relative error over all gradients."""
    apart = sum(float((a.cpu().double() - b).square().sum()) for a, b in zip(found, exact, strict=True))
    return (apart / sum(float(b.square().sum()) for b in exact)) ** 0.5


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
        exact = exact_gradients(critic, real, fake, eps)
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
        exact = exact_gradients(critic, real, fake, eps)
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
        exact = exact_gradients(critic, real, fake, eps)
        torch.testing.assert_close(captured, exact, rtol=1e-3, atol=1e-4)
