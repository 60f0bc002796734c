"""Sampling at a grid: PyTorch's numbers of every order, forward mode, and exact penalties behind augmentations."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import gpkernels as gpk
from comparing import assert_exactly_as, batch, recorded
from counting import counted
from critics import dcgan, plain_loss, plain_penalty
from gpkernels.critic import run
from gpkernels.ops.grid_sample import BICUBIC, MODES, PADDINGS, Around, Constants, grid_sample_reference

ALL = [
    (axes, Constants(MODES.index(mode), PADDINGS.index(padding), corners))
    for axes, mode, padding, corners in product((2, 3), MODES, PADDINGS, (False, True))
    if (axes, mode) != (3, "bicubic")
]
every = pytest.mark.parametrize(
    ("axes", "constants"), ALL, ids=[f"{n}-d {MODES[c.mode]} {PADDINGS[c.padding]} {c.align_corners}" for n, c in ALL]
)
SIZES = ((4, 5, 3), (1, 4, 2))


def named(constants: Constants) -> tuple[str, str, bool]:
    return MODES[constants.mode], PADDINGS[constants.padding], constants.align_corners


def drawn(axes: int, size: tuple[int, ...] = SIZES[0], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """An image and points inside of it, outside, and on edges and centres."""
    grid = torch.empty(2, *[3] * axes, axes, dtype=torch.float64).uniform_(-3, 3)
    grid.view(-1)[:8] = torch.tensor([1.0, -1.0, 0.0, 1.0, -1.0, 0.5, -0.25, 0.0])
    return torch.randn(2, 2, *size[:axes], dtype=torch.float64).to(dtype), grid.to(dtype)


def spread(x: Tensor) -> Tensor:
    return torch.linspace(-1, 1, x.numel(), dtype=torch.float64).to(x).reshape(x.shape)


def three_orders(function: Callable[..., Tensor], image: Tensor, grid: Tensor) -> list[Tensor]:
    """The value, its gradients, and those of functions of these."""
    leaves = image, grid = [x.detach().requires_grad_() for x in (image, grid)]
    value = function(image, grid)
    first = torch.autograd.grad(value, leaves, spread(value), create_graph=True, materialize_grads=True)
    bent = sum((g.sin() * spread(g)).sum() for g in first)
    assert isinstance(bent, Tensor)
    return [value, *first, *torch.autograd.grad(bent, leaves, materialize_grads=True)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@every
def test_the_reference_has_pytorchs_numbers_of_every_order(
    axes: int, constants: Constants, size: tuple[int, ...]
) -> None:
    image, grid = drawn(axes, size)
    ours = three_orders(lambda x, g: grid_sample_reference(x, g, *constants), image, grid)
    exact = three_orders(lambda x, g: F.grid_sample(x, g, *named(constants)), image, grid)
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("size", SIZES, ids=str)
@every
def test_tangent_and_second_derivatives_are_pytorchs(axes: int, constants: Constants, size: tuple[int, ...]) -> None:
    image, grid = drawn(axes, size)
    tangent, leaves = torch.randn_like(grid), [x.requires_grad_() for x in (image, grid)]
    value = F.grid_sample(*leaves, *named(constants))
    cotangent = torch.randn_like(value).requires_grad_()
    (to_grid,) = torch.autograd.grad(value, grid, cotangent, create_graph=True)
    wanted = (cotangent, *leaves)
    if to_grid.requires_grad:
        exact = torch.autograd.grad(to_grid, wanted, tangent, materialize_grads=True)
    else:
        exact = tuple(torch.zeros_like(x) for x in wanted)
    around = Around(image.detach(), grid.detach(), constants)
    cotangent = cotangent.detach()
    found = around.push(tangent), around.to_input(cotangent, tangent), around.to_grid(cotangent, tangent)
    for a, b in zip(found, exact, strict=True):
        torch.testing.assert_close(torch.zeros_like(b) if a is None else a, b, rtol=1e-11, atol=1e-11)


@every
def test_derivatives_of_both_modes_are_those_of_the_value(axes: int, constants: Constants) -> None:
    image = torch.randn(1, 2, *SIZES[0][:axes], dtype=torch.float64, requires_grad=True)
    grid = torch.empty(1, *[2] * axes, axes, dtype=torch.float64).uniform_(-1.4, 1.4).requires_grad_()

    def call(image: Tensor, grid: Tensor) -> Tensor:
        return gpk.grid_sample(image, grid, *named(constants))

    assert gradcheck(call, (image, grid), fast_mode=True, check_forward_ad=True)
    assert gradgradcheck(call, (image, grid), fast_mode=True)

    def slopes(image: Tensor, grid: Tensor) -> Tensor:
        first = torch.func.grad(lambda x, g: call(x, g).sin().sum(), (0, 1))(image, grid)
        return torch.cat([g.flatten() for g in first])

    tangents = torch.randn_like(image), torch.randn_like(grid)
    pushed = torch.func.jvp(slopes, (image.detach(), grid.detach()), tangents)[1]
    gradients = torch.autograd.grad(call(image, grid).sin().sum(), (image, grid), create_graph=True)
    first = torch.cat([g.flatten() for g in gradients])
    weights = spread(first)
    second = torch.autograd.grad((first * weights).sum(), (image, grid))
    exact = sum((g * t).sum() for g, t in zip(second, tangents, strict=True))
    torch.testing.assert_close((pushed * weights).sum(), exact)


def test_every_order_exists() -> None:
    image, grid = drawn(2)
    grid = torch.empty_like(grid).uniform_(-0.9, 0.9).requires_grad_()

    def second(grid: Tensor) -> Tensor:
        value = gpk.grid_sample(image, grid, "bicubic", "zeros", False)
        (first,) = torch.autograd.grad(value.square().sum(), grid, create_graph=True)
        return torch.autograd.grad(first.square().sum(), grid, create_graph=True)[0]

    assert gradcheck(second, grid, fast_mode=True)
    hessian = torch.func.hessian(lambda g: gpk.grid_sample(image, g, align_corners=True).square().sum())
    exact = torch.autograd.functional.hessian(
        lambda g: F.grid_sample(image, g, align_corners=True).square().sum(), grid
    )
    torch.testing.assert_close(hessian(grid.detach()), exact)


def test_transforms_agree_with_a_loop() -> None:
    pairs = [drawn(2) for _ in range(3)]
    images, grids = (torch.stack(xs) for xs in zip(*pairs, strict=True))

    def total(image: Tensor, grid: Tensor) -> Tensor:
        return gpk.grid_sample(image, grid, align_corners=False).square().sum()

    def along(image: Tensor, grid: Tensor) -> Tensor:
        return torch.func.jvp(total, (image, grid), (image, grid))[1]

    for call in (torch.func.grad(total, 1), along):
        mapped = torch.func.vmap(call)(images, grids)
        for i, pair in enumerate(pairs):
            torch.testing.assert_close(mapped[i], call(*pair))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@every
def test_low_precision_is_pytorchs_or_better(axes: int, constants: Constants, dtype: torch.dtype) -> None:
    image, grid = drawn(axes, dtype=dtype)
    exact = F.grid_sample(image.double(), grid.double(), *named(constants))
    ours, theirs = grid_sample_reference(image, grid, *constants), F.grid_sample(image, grid, *named(constants))
    assert ours.dtype == dtype
    errors = [float((x.double() - exact).norm() / exact.norm()) for x in (ours, theirs)]
    assert errors[0] <= 2 * errors[1] + 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("mode", MODES)
def test_points_that_are_no_numbers_or_far_away_are_where_pytorch_has_them(mode: str, padding: str) -> None:
    image, grid = drawn(2)
    grid.view(-1, 2)[:4] = torch.tensor([[torch.nan, 0.1], [0.1, torch.inf], [-1e30, 0.2], [1e12, -1e12]])
    constants = MODES.index(mode), PADDINGS.index(padding), False
    ours, exact = grid_sample_reference(image, grid, *constants), F.grid_sample(image, grid, mode, padding, False)
    torch.testing.assert_close(ours, exact, equal_nan=True)


def test_compiles_and_traces_with_the_same_numbers() -> None:
    image, grid = drawn(2)
    torch.compiler.reset()

    def call(image: Tensor, grid: Tensor) -> Tensor:
        return gpk.grid_sample(image, grid, align_corners=False)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    leaves = [x.requires_grad_() for x in (image, grid)]
    ours, exact = (torch.autograd.grad(f(*leaves).sin().sum(), leaves) for f in (compiled, call))
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a, b)
    assert call(image.to("meta"), grid.to("meta")).shape == (2, 2, 3, 3)


def test_autocast_gives_pytorchs_dtype_in_both_modes() -> None:
    image, grid = drawn(2, dtype=torch.float32)
    image = image.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        value = gpk.grid_sample(image, grid, align_corners=False)
        assert value.dtype == F.grid_sample(image, grid, align_corners=False).dtype == torch.float32
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(grid, torch.ones_like(grid))
            pushed = gpk.grid_sample(image, dual, align_corners=False)
            torch.testing.assert_close(forward_ad.unpack_dual(pushed).primal, value)


def test_same_bits_for_any_number_of_threads() -> None:
    image, grid = torch.randn(4, 3, 64, 64), torch.empty(4, 64, 64, 2).uniform_(-1.2, 1.2)
    tangent, cotangent, found = torch.randn_like(grid), torch.randn(4, 3, 64, 64), []
    before = torch.get_num_threads()
    for threads in (1, 2, 4, 1):
        torch.set_num_threads(threads)
        around = Around(image, grid, Constants(0, 0, False))
        found.append((around.push(tangent), around.to_input(cotangent, tangent), around.to_grid(cotangent, tangent)))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


IMAGE, GRID = torch.randn(2, 1, 4, 4), torch.rand(2, 3, 3, 2)
BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "an image of integers": (lambda: gpk.grid_sample(IMAGE.long(), GRID), TypeError, "input.*int64"),
    "no grid": (lambda: gpk.grid_sample(IMAGE, None), TypeError, "grid.*NoneType"),  # type: ignore[arg-type]
    "a foreign mode": (lambda: gpk.grid_sample(IMAGE, GRID, "linear"), ValueError, "mode.*'linear'"),
    "a foreign padding": (
        lambda: gpk.grid_sample(IMAGE, GRID, padding_mode="wrap"),
        ValueError,
        "padding_mode.*'wrap'",
    ),
    "an image of three axes": (lambda: gpk.grid_sample(IMAGE[0], GRID), ValueError, r"input.*\(1, 4, 4\)"),
    "an image without pixels": (lambda: gpk.grid_sample(IMAGE[..., :0], GRID), ValueError, "input.*pixels"),
    "a grid of three axes": (lambda: gpk.grid_sample(IMAGE, GRID[0]), ValueError, r"grid.*\(3, 3, 2\)"),
    "a grid of another batch": (lambda: gpk.grid_sample(IMAGE, GRID[:1]), ValueError, r"grid.*\(2, H, W, 2\).*\(1, "),
    "a grid of lines": (lambda: gpk.grid_sample(IMAGE, GRID[..., :1]), ValueError, "grid.*3, 3, 1"),
    "a grid of another dtype": (lambda: gpk.grid_sample(IMAGE, GRID.double()), ValueError, "grid.*float32.*float64"),
    "a grid of another device": (lambda: gpk.grid_sample(IMAGE, GRID.to("meta")), ValueError, "grid.*meta"),
    "cubic volumes": (
        lambda: gpk.grid_sample(IMAGE[..., None], torch.rand(2, 1, 1, 1, 3), MODES[BICUBIC]),
        ValueError,
        "mode.*volumes.*'bicubic'",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name: str) -> None:
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()


# --- critics ----------------------------------------------------------------------------------------------------------


calls: list[int] = []  # how many samples each call of a critic had


class Augmented(nn.Module):
    """Flips, an affine map, colours and a cutout in front of a small DCGAN, a fixed draw for each of n samples."""

    sample: Callable[..., Tensor] = staticmethod(F.grid_sample)
    theta: Tensor
    colours: Tensor
    seen: Tensor
    flipped: Tensor

    def __init__(self, n: int, mode: str = "bilinear", padding: str = "reflection", size: int = 16) -> None:
        super().__init__()
        self.mode, self.padding, self.n = mode, padding, n
        self.critic = dcgan(3, 4, size)
        self.register_buffer("theta", torch.eye(2, 3) + 0.2 * torch.randn(n, 2, 3))
        self.register_buffer("colours", torch.eye(3) + 0.2 * torch.randn(n, 3, 3))
        self.register_buffer("flipped", torch.arange(n).view(-1, 1, 1, 1) % 2 == 0)
        seen = torch.ones(n, 1, size, size)
        for i in range(n):
            seen[i, :, i : i + size // 2, i : i + size // 2] = 0
        self.register_buffer("seen", seen)

    def rows(self, draw: Tensor, x: Tensor) -> Tensor:
        return draw.repeat(len(x) // self.n, *[1] * (draw.dim() - 1))

    def forward(self, x: Tensor) -> Tensor:
        calls.append(len(x))
        x = torch.where(self.rows(self.flipped, x), x.flip(3), x)
        grid = F.affine_grid(self.maps(x), list(x.shape), align_corners=False)
        x = self.sample(x, grid, self.mode, self.padding, False)
        x = (self.rows(self.colours, x) @ x.flatten(2)).view(x.shape)
        return self.critic(x * self.rows(self.seen, x))

    def maps(self, x: Tensor) -> Tensor:
        return self.rows(self.theta, x)


class Transformer(Augmented):
    """The same, with an affine map that the critic finds for each sample (Jaderberg et al. 2015)."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.find = nn.Sequential(nn.Conv2d(3, 6, 5, 4), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def maps(self, x: Tensor) -> Tensor:
        return super().maps(x) + 0.3 * self.find(x).view(-1, 2, 3)


class Learned(Augmented):
    """The same, with an affine map that is trained, one for all samples."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.shared = nn.Parameter(0.1 * torch.randn(2, 3))

    def maps(self, x: Tensor) -> Tensor:
        return super().maps(x) + self.shared


def by_gathers(critic: Augmented) -> Augmented:
    """A copy that shares the weights, and samples by the plain formula, which autograd differentiates twice."""

    def sample(image: Tensor, grid: Tensor, mode: str, padding: str, align_corners: bool) -> Tensor:
        return grid_sample_reference(image, grid, MODES.index(mode), PADDINGS.index(padding), align_corners)

    twin = copy.copy(critic)
    twin.sample = sample
    return twin


N = 3
KINDS = {"augmented": Augmented, "transformer": Transformer, "learned": Learned}


@pytest.mark.parametrize("together", [True, False, None], ids=["together", "apart", "as seen"])
@pytest.mark.parametrize("penalty", ["r1", "wgan-gp"])
@pytest.mark.parametrize(
    ("kind", "mode", "padding"),
    [
        *((k, "bilinear", "reflection") for k in KINDS),
        ("transformer", "bicubic", "zeros"),
        ("augmented", "nearest", "border"),
    ],
)
def test_a_step_behind_augmentations_is_that_of_the_plain_formula(
    kind: str, mode: str, padding: str, penalty: str, together: bool | None, loop: str
) -> None:
    critic = KINDS[kind](N, mode, padding).double()
    twin, objective = by_gathers(critic), "gan" if penalty == "r1" else "wgan"
    loss = recorded(critic, objective=objective, penalty=penalty, together=together)
    for _ in range(5):  # by rules, traced, and by its program
        real, fake, eps = batch(N, 3, 16, 16)
        exact = plain_loss(twin, real, fake, eps, objective, penalty)
        calls.clear()
        ours = loss(real, fake, eps=eps).loss
        assert_exactly_as(ours, exact, critic, 1e-10)
    groups = 2 if penalty == "r1" else 3
    assert calls == ([groups * N] if together else [N] * groups)  # "as seen" leaves draws of a sample to its group


@pytest.mark.parametrize(
    ("kind", "backend"), [("transformer", "aot_eager"), ("transformer", "gpkernels"), ("learned", "gpkernels")]
)
def test_a_compiled_step_is_that_of_the_plain_formula(kind: str, backend: str) -> None:
    torch.compiler.reset()
    critic = KINDS[kind](N).double()
    loss = gpk.CriticLoss(critic)
    step = torch.compile(lambda real, fake, eps: loss(real, fake, eps=eps).loss, backend=backend, fullgraph=True)
    for _ in range(2):
        real, fake, eps = batch(N, 3, 16, 16)
        assert_exactly_as(step(real, fake, eps), plain_loss(by_gathers(critic), real, fake, eps), critic, 1e-10)


def test_augmentations_that_are_drawn_anew_are_drawn_as_in_pytorch() -> None:
    class Drawn(Augmented):
        def maps(self, x: Tensor) -> Tensor:
            return super().maps(x) + 0.1 * torch.randn(len(x), 2, 3, dtype=x.dtype)

    critic = Drawn(N).double()
    loss = gpk.CriticLoss(critic, objective="gan", penalty="r1")
    for seed in range(5):
        real, fake, eps = batch(N, 3, 16, 16)
        torch.manual_seed(seed)
        exact = plain_loss(by_gathers(critic), real, fake, eps, "gan", "r1")
        torch.manual_seed(seed)
        assert_exactly_as(loss(real, fake).loss, exact, critic, 1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_penalties_per_sample_and_input_gradients_are_those_of_the_plain_formula(kind: str) -> None:
    critic = KINDS[kind](N).double()
    twin = by_gathers(critic)
    for _ in range(3):
        real, _, _ = batch(N, 3, 16, 16)
        found = gpk.r1_penalty(critic, real, reduction="none")
        assert_exactly_as(found.mean(), plain_penalty(twin, real, 0.0), critic, 1e-10)
        leaf = real.clone().requires_grad_()
        (exact,) = torch.autograd.grad(twin(leaf).sum(), leaf, create_graph=True)
        assert_exactly_as(gpk.input_gradient(critic, real).sin().sum(), exact.sin().sum(), critic, 1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_every_call_of_an_augmented_critic_has_a_rule(kind: str) -> None:
    told = str(gpk.explain(KINDS[kind](N), torch.randn(N, 3, 16, 16)))
    assert "grid_sample" in told
    assert "generic" not in told


def test_a_penalty_behind_augmentations_takes_four_passes() -> None:
    critic = Augmented(N).eval()
    real, weights = torch.randn(N, 3, 16, 16), list(critic.parameters())
    with torch.no_grad():
        unit = counted(lambda: critic(real)).flops
    run.forget()
    count = counted(lambda: torch.autograd.grad(gpk.r1_penalty(critic, real), weights, allow_unused=True))
    assert count.flops <= 4.05 * unit
    assert not count.zeros
