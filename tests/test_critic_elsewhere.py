"""Where plain PyTorch's penalties break: compiled critics and steps, autocast, checkpointing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import checkpoint

import gpkernels as gpk
from comparing import assert_same, batch, gradients
from critics import dcgan, mlp, plain_loss, plain_penalty, plain_points
from gpkernels.critic.by_autograd import left_to_autograd


def _batch(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(shape), 0.7 * torch.randn(shape), torch.rand(shape[0])


def _assert_same(ours: list[Tensor], exact: list[Tensor], tolerance: float = 1e-5) -> None:
    scale = max(float(g.detach().abs().max()) for g in exact)
    assert all(float((a - b).detach().abs().max()) <= tolerance * scale for a, b in zip(ours, exact, strict=True))


def test_a_compiled_critic_gives_the_same_gradients() -> None:
    critic = mlp(6, 16, 16, 1)
    real, fake, eps = _batch(8, 6)
    exact = torch.autograd.grad(plain_loss(critic, real, fake, eps), list(critic.parameters()))
    loss = gpk.CriticLoss(torch.compile(critic, backend="aot_eager"))(real, fake, eps=eps).loss
    _assert_same(torch.autograd.grad(loss, list(critic.parameters())), exact)
    compiled = torch.compile(critic, backend="aot_eager")
    penalty = gpk.gradient_penalty(compiled, real, fake, eps=eps)
    assert torch.autograd.grad(penalty, critic[0].weight)[0].abs().sum() > 0


@pytest.mark.parametrize("penalty", ["wgan-gp", "r1"])
def test_a_step_compiles_as_one_graph(penalty: str) -> None:
    critic = mlp(6, 16, 16, 1)
    real, fake, eps = _batch(8, 6)
    exact = torch.autograd.grad(plain_loss(critic, real, fake, eps, penalty=penalty), list(critic.parameters()))
    module = gpk.CriticLoss(critic, penalty=penalty)
    step = torch.compile(lambda r, f, e: module(r, f, eps=e).loss, fullgraph=True, backend="aot_eager")
    _assert_same(torch.autograd.grad(step(real, fake, eps), list(critic.parameters())), exact)


def test_a_whole_training_step_compiles_as_one_graph() -> None:
    critic = mlp(6, 16, 1)
    real, fake, eps = _batch(8, 6)
    twin = copy.deepcopy(critic)
    module, sgd = gpk.CriticLoss(critic), torch.optim.SGD(twin.parameters(), 0.1)
    plain_loss(twin, real, fake, eps).backward()
    sgd.step()

    def step(r: Tensor, f: Tensor, e: Tensor) -> None:
        grads = torch.autograd.grad(module(r, f, eps=e).loss, list(critic.parameters()))
        with torch.no_grad():
            for p, g in zip(critic.parameters(), grads, strict=True):
                p.sub_(0.1 * g)

    with torch._dynamo.config.patch(trace_autograd_ops=True):
        torch.compile(step, fullgraph=True, backend="aot_eager")(real, fake, eps)
    _assert_same(list(critic.parameters()), list(twin.parameters()))


@pytest.mark.parametrize("kind", ["mlp", "dcgan"])
def test_autocast_is_no_worse_than_eager(kind: str) -> None:
    critic, shape = (mlp(6, 32, 32, 1), (16, 6)) if kind == "mlp" else (dcgan(3, 4, 16), (4, 3, 16, 16))
    real, fake, eps = _batch(*shape)
    weights = list(critic.parameters())
    exact = torch.autograd.grad(plain_loss(critic, real, fake, eps), weights)
    errors = []
    for call in (lambda: plain_loss(critic, real, fake, eps), lambda: gpk.CriticLoss(critic)(real, fake, eps=eps).loss):
        with torch.autocast("cpu", torch.bfloat16):
            loss = call()
        assert loss.dtype == torch.float32
        got = torch.autograd.grad(loss, weights)
        errors.append(torch.stack([(a - b).norm() for a, b in zip(got, exact, strict=True)]).norm())
        assert all(g.dtype == torch.float32 for g in got)
    assert errors[1] <= 2 * errors[0]


def test_a_grad_scaler_scales_the_gradients() -> None:
    critic = mlp(6, 16, 1)
    real, fake, eps = _batch(8, 6)
    exact = torch.autograd.grad(plain_loss(critic, real, fake, eps), list(critic.parameters()))
    scaler, sgd = torch.amp.GradScaler("cpu", init_scale=1024.0), torch.optim.SGD(critic.parameters(), 0.0)
    scaler.scale(gpk.CriticLoss(critic)(real, fake, eps=eps).loss).backward()
    _assert_same([p.grad / 1024 for p in critic.parameters()], exact)
    scaler.step(sgd)
    _assert_same([p.grad for p in critic.parameters()], exact)


class Checkpointed(nn.Module):
    """Blocks with dropout: kept by "none", made again in backward by any other kind."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.Sequential(
            nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(0.3)),
            nn.Sequential(nn.Linear(16, 16), nn.LeakyReLU(0.2), nn.Dropout(0.3)),
        )
        self.top, self.kind = nn.Linear(16, 1), kind
        if kind == "wrapper":
            self.blocks = nn.Sequential(*map(checkpoint_wrapper, self.blocks))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            again = self.kind in ("reentrant", "not reentrant")
            x = checkpoint(block, x, use_reentrant=self.kind == "reentrant") if again else block(x)
        return self.top(x)


def _composed(critic: nn.Module, real: Tensor, fake: Tensor, eps: Tensor) -> Tensor:
    with gpk.fast_double_backward():
        return gpk.gradient_penalty(critic, real, fake, eps=eps)


def _of_gradient(critic: nn.Module, real: Tensor, fake: Tensor, eps: Tensor) -> Tensor:
    points = plain_points(real, fake, eps, "wgan-gp").detach()
    return (gpk.input_gradient(critic, points).norm(dim=1) - 1).square().mean()


def _plain_penalty(critic: nn.Module, real: Tensor, fake: Tensor, eps: Tensor) -> Tensor:
    return plain_penalty(critic, plain_points(real, fake, eps, "wgan-gp"))


LOSSES = {
    "whole loss": (lambda c, r, f, e: gpk.CriticLoss(c, together=False)(r, f, eps=e).loss, plain_loss),
    "penalty": (lambda c, r, f, e: gpk.gradient_penalty(c, r, f, eps=e), _plain_penalty),
    "composed": (_composed, _plain_penalty),
    "gradient": (_of_gradient, _plain_penalty),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("kind", ["not reentrant", "wrapper"])
def test_checkpointed_blocks_draw_the_same_numbers_and_give_the_same_gradients(kind: str, loss: str) -> None:
    critic, whole = Checkpointed(kind).double(), Checkpointed("none").double()
    given = batch(8, 6)
    ours, plain = LOSSES[loss]
    for seed in range(3):
        found = []
        for function, module in ((ours, critic), (plain, whole)):
            torch.manual_seed(seed)
            value = function(module, *given)
            found.append([value, *gradients(value, module), torch.rand(2)])
        assert_same(*found)


@pytest.mark.parametrize("loss", ["whole loss", "penalty"])
def test_reentrant_checkpoints_draw_the_same_numbers_and_give_the_same_gradients(loss: str) -> None:
    """In every call; PyTorch itself has no second derivative of these."""
    critic, whole = Checkpointed("reentrant").double(), Checkpointed("none").double()
    ours, plain = LOSSES[loss]
    for seed in range(6):
        real, fake, eps = batch(8, 6)
        real.requires_grad_(loss == "whole loss")
        fake.requires_grad_(loss == "whole loss")
        found = []
        for function, module in ((ours, critic), (plain, whole)):
            torch.manual_seed(seed)
            value = function(module, real, fake, eps)
            found.append([value, *gradients(value, module), torch.rand(2)])
        assert_same(*found)
    assert all(p.grad is None for p in critic.parameters())


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_a_reentrant_checkpoint_without_gradients_at_its_input_has_none_as_in_pytorch() -> None:
    critic, whole = Checkpointed("reentrant").double().eval(), Checkpointed("none").double().eval()
    loss = gpk.CriticLoss(critic)
    for _ in range(6):
        real, fake, eps = batch(8, 6)
        (critic(fake).mean() - critic(real).mean()).backward()
        scored = [torch.zeros_like(p) if p.grad is None else p.grad for p in critic.parameters()]
        assert not any(g.any() for g in scored[:-2])  # PyTorch warns of it
        assert scored[-2].any()
        critic.zero_grad()
        penalised = gradients(10 * _plain_penalty(whole, real, fake, eps), whole)
        wanted = [a if b is None else a + b for a, b in zip(scored, penalised, strict=True)]
        assert_same(gradients(loss(real, fake, eps=eps).loss, critic), wanted)


class Odd(nn.Module):
    """Checkpoints of every kind of function: nested, of several arguments and results, and as the last call."""

    def __init__(self, again: bool, activation: Callable[[Tensor], Tensor] = torch.tanh) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))
        self.top, self.again, self.activation = nn.Linear(6, 1), again, activation

    def called(self, function: Callable[..., Any], *args: Any) -> Any:
        return checkpoint(function, *args, use_reentrant=True) if self.again else function(*args)

    def within(self, x: Tensor) -> Tensor:
        return self.called(lambda x: torch.tanh(self.layers[1](x)), self.activation(self.layers[0](x))) * x

    def pair(self, factor: float, x: Tensor, skipped: None, y: Tensor) -> tuple[Tensor, Tensor]:
        return factor * self.layers[2](x) * y, torch.sin(self.layers[3](y))

    def forward(self, x: Tensor) -> Tensor:
        h = self.called(self.within, x)
        a, b = self.called(self.pair, 0.7, h, None, x)
        return self.called(self.top, a + b * h)


def test_reentrant_checkpoints_of_any_function() -> None:
    critic, whole = Odd(True).double(), Odd(False).double()
    for kind in (gpk.r1_penalty, gpk.eikonal_loss):
        for _ in range(5):
            x = batch(8, 6)[0]
            assert_same(gradients(kind(critic, x), critic), gradients(kind(whole, x), whole))


def _hooked(critic: Checkpointed) -> nn.Module:
    critic.top.register_full_backward_hook(lambda *given: None)
    return critic


REFUSED: dict[str, tuple[Callable[[], nn.Module], Callable[..., Tensor]]] = {
    "inside fast_double_backward": (lambda: Checkpointed("reentrant"), _composed),
    "of an input gradient": (lambda: Checkpointed("reentrant"), _of_gradient),
    "with a call without a rule": (lambda: Odd(True, lambda h: torch.cumprod(h, 1)), LOSSES["penalty"][0]),
    "with a hook on a module": (lambda: _hooked(Checkpointed("reentrant")), LOSSES["penalty"][0]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_reentrant_checkpoint_is_refused(name: str) -> None:
    make, loss = REFUSED[name]
    critic = make().double()
    for _ in range(3):
        with pytest.raises(RuntimeError, match="use use_reentrant=False"):
            loss(critic, *batch(8, 6))
    assert all(p.grad is None for p in critic.parameters())


def test_an_explanation_shows_what_reentrant_checkpoints_call() -> None:
    found = gpk.explain(Checkpointed("reentrant"), batch(8, 6)[0].float())
    assert [call.function for call in found.calls].count("linear") == 3
    text = str(found)
    assert "every call has a rule" in text
    assert "in eager PyTorch: not possible: When use_reentrant=True" in text


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_reentrant_checkpoints_are_not_forced_to_one_batch() -> None:
    with pytest.raises(ValueError, match="use_reentrant=True"):
        gpk.CriticLoss(Checkpointed("reentrant").double(), together=True)(*batch(8, 6)[:2])


@pytest.mark.parametrize("left", [False, True], ids=["by rules", "left to autograd"])
def test_a_gradient_through_a_reentrant_checkpoint_is_refused(left: bool) -> None:
    critic, (real, *_) = Checkpointed("reentrant").double(), batch(8, 6)
    if left:
        left_to_autograd.add(critic, real.numel())
    for _ in range(3):
        with pytest.raises(RuntimeError, match="use use_reentrant=False"):
            gpk.input_gradient(critic, real)
