"""Where plain PyTorch's penalties break: compiled critics and steps, autocast, two processes, checkpointing."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import gpkernels as gpk
from critics import dcgan, first, mlp, plain_loss


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
    def __init__(self) -> None:
        super().__init__()
        self.a, self.top = nn.Linear(6, 16), mlp(16, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.top(checkpoint(lambda x: torch.relu(self.a(x)), x, use_reentrant=False))


def test_checkpointing_inside_the_critic() -> None:
    critic = Checkpointed()
    real, fake, eps = _batch(8, 6)
    exact = torch.autograd.grad(plain_loss(critic, real, fake, eps), list(critic.parameters()))
    loss = gpk.CriticLoss(critic)(real, fake, eps=eps).loss
    _assert_same(torch.autograd.grad(loss, list(critic.parameters())), exact)


def _worker(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.set_num_threads(1)
    saved = torch.load(f"{folder}/start.pt", weights_only=True)
    for name, make in CRITICS.items():
        critic = make()
        critic.load_state_dict(saved[name]["state"])
        half = slice(4 * rank, 4 * rank + 4)
        parallel = DistributedDataParallel(gpk.CriticLoss(critic))
        parallel(saved[name]["real"][half], saved[name]["fake"][half], eps=saved[name]["eps"][half]).loss.backward()
        if rank == 0:
            torch.save([p.grad for p in critic.parameters()], f"{folder}/{name}.pt")
    dist.destroy_process_group()


CRITICS = {
    "mlp": lambda: mlp(6, 16, 16, 1),
    "smooth": lambda: nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1)),
    "without_a_rule": lambda: nn.Sequential(nn.Linear(6, 16), nn.Mish(), nn.Linear(16, 1)),
}


def test_two_processes_have_the_gradients_of_one(tmp_path: Path) -> None:
    saved = {}
    for name, make in CRITICS.items():
        real, fake, eps = _batch(8, 6)
        saved[name] = {"state": make().state_dict(), "real": real, "fake": fake, "eps": eps}
    torch.save(saved, tmp_path / "start.pt")
    mp.spawn(_worker, args=(str(tmp_path),), nprocs=2)
    for name, make in CRITICS.items():
        critic = make()
        critic.load_state_dict(saved[name]["state"])
        real, fake, eps = (saved[name][key] for key in ("real", "fake", "eps"))
        exact = torch.autograd.grad(plain_loss(critic, real, fake, eps), list(critic.parameters()))
        _assert_same(torch.load(tmp_path / f"{name}.pt", weights_only=True), exact)
    assert first(critic(real)).shape == (8, 1)
