"""Penalties, losses and the optimiser in other people's loops: Lightning, Accelerate, averages, scalers, workers."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset

import gpkernels as gpk
from critics import mlp, plain_loss
from gpkernels.optim import RMSprop

Made = Callable[[nn.Module], Callable[..., Any]]
LOSSES: dict[str, Made] = {  # of a critic: (real, fake, eps) -> loss
    "ours": lambda critic: lambda real, fake, eps: gpk.CriticLoss(critic)(real, fake, eps=eps).loss,
    "plain": lambda critic: lambda real, fake, eps: plain_loss(critic, real, fake, eps),
}


class Batches(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """Samples with a fake one and an eps each."""

    def __init__(self, count: int = 24) -> None:
        self.real, self.fake, self.eps = torch.randn(count, 6), 0.7 * torch.randn(count, 6), torch.rand(count)

    def __len__(self) -> int:
        return len(self.real)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor, Tensor]:
        return self.real[i], self.fake[i], self.eps[i]


class Gan(nn.Module):
    """A critic and its loss in one module, as in the documentation of CriticLoss."""

    def __init__(self) -> None:
        super().__init__()
        self.critic = mlp(6, 16, 1)
        self.critic_loss = gpk.CriticLoss(self.critic)


def _trained_by_hand(critic: nn.Module, data: Batches, steps: int, lr: float = 0.05) -> nn.Module:
    """Plain PyTorch's steps on batches of eight, in order."""
    twin = copy.deepcopy(critic)
    sgd = torch.optim.SGD(twin.parameters(), lr)
    for i in range(steps):
        rows = slice(8 * (i % 3), 8 * (i % 3) + 8)
        sgd.zero_grad()
        plain_loss(twin, data.real[rows], data.fake[rows], data.eps[rows]).backward()
        sgd.step()
    return twin


def _assert_same(ours: nn.Module, exact: nn.Module, tolerance: float = 1e-5) -> None:
    for a, b in zip(ours.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_lightning_trains_by_manual_optimisation_and_keeps_the_weights_once(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.critic = mlp(6, 16, 1)
            self.critic_loss = gpk.CriticLoss(self.critic)

        def training_step(self, batch: list[Tensor]) -> None:
            real, fake, eps = batch
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.critic_loss(real, fake, eps=eps).loss)
            optimizer.step()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.critic.parameters(), 0.05)

    module, data = Module(), Batches()
    exact = _trained_by_hand(module.critic, data, 6)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = lightning.Trainer(accelerator="cpu", devices=1, max_epochs=2, default_root_dir=tmp_path, **quiet)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice on workers
        trainer.fit(module, DataLoader(data, batch_size=8))
    _assert_same(module.critic, exact)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert sorted(saved) == sorted(f"critic.{name}" for name in module.critic.state_dict())
    _assert_same(Module.load_from_checkpoint(tmp_path / "last.ckpt").critic, exact)


class LossFirst(nn.Module):
    """The loss comes before the critic, or instead of it."""

    def __init__(self, both: bool) -> None:
        super().__init__()
        critic = mlp(6, 16, 1)
        self.critic_loss = gpk.CriticLoss(critic)
        if both:
            self.critic = critic


def _is_restored(module: nn.Module, state: dict[str, Any], **options: Any) -> bool:
    found, exact = (list(m.parameters()) for m in (module, copy.deepcopy(module)))
    with torch.no_grad():
        for x in found:
            x.zero_()
    module.load_state_dict(copy.deepcopy(state), **options)
    return all(torch.equal(a, b) for a, b in zip(module.parameters(), exact, strict=True))


@pytest.mark.parametrize("assign", [False, True])
def test_a_module_that_holds_critic_and_loss_saves_the_weights_once(assign: bool) -> None:
    gan = Gan()
    state = copy.deepcopy(gan.state_dict())
    assert list(state) == [f"critic.{name}" for name in gan.critic.state_dict()]
    assert list(gan.critic_loss.state_dict()) == list(state)
    assert _is_restored(gan, state, assign=assign)
    assert _is_restored(gan, dict(state), assign=assign)  # without metadata, as from safetensors
    twice = {**state, **{f"critic_loss.{name}": x for name, x in state.items()}}
    assert _is_restored(gan, twice, assign=assign)  # as plain modules save it
    with pytest.raises(RuntimeError, match=r'Missing key.*"critic\.0\.weight"'):
        gan.load_state_dict({name: x for name, x in state.items() if name != "critic.0.weight"})


@pytest.mark.parametrize("both", [False, True])
def test_a_loss_that_comes_first_saves_its_critic(both: bool) -> None:
    module = LossFirst(both)
    state = copy.deepcopy(module.state_dict())
    names = list(module.critic_loss.critic.state_dict())
    assert [name for name in state if name.startswith("critic_loss.")] == [f"critic_loss.critic.{n}" for n in names]
    assert _is_restored(module, state)
    for name in names:
        del state[f"critic_loss.critic.{name}"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"critic_loss\.critic\.0\.weight"'):
        module.load_state_dict(state)


def test_critics_that_are_equal_but_not_one_are_both_saved() -> None:
    gan = Gan()
    gan.critic_loss = gpk.CriticLoss(copy.deepcopy(gan.critic))
    assert len(gan.state_dict()) == 2 * len(gan.critic.state_dict())
    with torch.device("meta"):
        gan = Gan()
    assert len(gan.state_dict()) == 2 * len(gan.critic.state_dict())  # nothing tells them apart there


def test_a_checkpoint_of_several_processes_restores_critic_and_loss() -> None:
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    gan = Gan()
    state = copy.deepcopy(get_model_state_dict(gan))
    exact = [x.clone() for x in gan.parameters()]
    with torch.no_grad():
        for x in gan.parameters():
            x.zero_()
    set_model_state_dict(gan, state)
    assert all(torch.equal(a, b) for a, b in zip(gan.parameters(), exact, strict=True))


@pytest.fixture
def accelerated() -> Iterator[Callable[..., Any]]:
    accelerate = pytest.importorskip("accelerate")
    yield lambda **options: accelerate.Accelerator(cpu=True, **options)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def test_accelerate_accumulates_gradients(accelerated: Callable[..., Any]) -> None:
    accelerator = accelerated(gradient_accumulation_steps=3)
    critic, data = mlp(6, 16, 1), Batches()
    twin = copy.deepcopy(critic)
    critic, optimizer, loader = accelerator.prepare(
        critic, RMSprop(critic.parameters(), lr=1e-2, clip=0.5), DataLoader(data, batch_size=8)
    )
    critic_loss = gpk.CriticLoss(critic)
    for real, fake, eps in loader:
        with accelerator.accumulate(critic):
            accelerator.backward(critic_loss(real, fake, eps=eps).loss)
            optimizer.step()
            optimizer.zero_grad()
    for rows in (slice(0, 8), slice(8, 16), slice(16, 24)):
        (plain_loss(twin, data.real[rows], data.fake[rows], data.eps[rows]) / 3).backward()
    torch.optim.RMSprop(twin.parameters(), lr=1e-2).step()
    gpk.clip_weights_(twin.parameters(), 0.5)
    _assert_same(critic, twin, 1e-4)


def test_accelerates_bfloat16_is_no_worse_than_in_plain_pytorch(accelerated: Callable[..., Any]) -> None:
    critic, data = mlp(6, 32, 32, 1), Batches(64)
    given = data.real, data.fake, data.eps
    twin = copy.deepcopy(critic).double()
    exact = torch.autograd.grad(plain_loss(twin, *(x.double() for x in given)), list(twin.parameters()))
    accelerator = accelerated(mixed_precision="bf16")
    critic = accelerator.prepare(critic)
    errors = {}
    for name, made in LOSSES.items():
        critic.zero_grad()
        with accelerator.autocast():
            loss = made(critic)(*given)
        assert loss.dtype == torch.float32
        accelerator.backward(loss)
        gaps = [(p.grad - g).norm() for p, g in zip(critic.parameters(), exact, strict=True)]
        errors[name] = float(torch.stack(gaps).norm())
    assert errors["ours"] <= 2 * errors["plain"]
    assert errors["ours"] > 1e-6  # it was bfloat16


def test_a_module_that_holds_critic_and_loss_compiles_as_one_graph() -> None:
    gan, data = Gan(), Batches(8)
    exact = _trained_by_hand(gan.critic, data, 1, lr=1.0)

    def loss(real: Tensor, fake: Tensor, eps: Tensor) -> Tensor:
        return gan.critic_loss(real, fake, eps=eps).loss

    torch.compile(loss, fullgraph=True, backend="aot_eager")(data.real, data.fake, data.eps).backward()
    with torch.no_grad():
        for p in gan.parameters():
            p -= p.grad
    _assert_same(gan, exact)


@pytest.mark.parametrize("held", ["by its forward", "as a submodule"])
def test_an_average_of_the_weights_is_a_critic_of_its_own(held: str) -> None:
    gan, data = Gan(), Batches(8)
    if held == "as a submodule":
        gan.critic_loss = gpk.CriticLoss(gan.critic)
    given = data.real, data.fake
    for _ in range(4):  # what was learnt of the critic stays behind
        gan.critic_loss(*given, eps=data.eps).loss.backward()
    average = AveragedModel(gan, multi_avg_fn=get_ema_multi_avg_fn(0.75))
    optimizer = RMSprop(gan.critic.parameters(), lr=1e-2)
    optimizer.step()
    average.update_parameters(gan)  # copies, the first time
    optimizer.step()
    means = [p.detach().clone() for p in average.module.critic.parameters()]
    average.update_parameters(gan)
    for mean, p, found in zip(means, gan.critic.parameters(), average.module.critic.parameters(), strict=True):
        torch.testing.assert_close(found, 0.75 * mean + 0.25 * p)
    loss = average.module.critic_loss(*given, eps=data.eps).loss
    torch.testing.assert_close(loss, plain_loss(average.module.critic, *given, data.eps))


def test_a_grad_scaler_skips_a_step_of_infinite_gradients_and_takes_the_next() -> None:
    critic, data = mlp(6, 16, 1), Batches(8)
    twin = copy.deepcopy(critic)
    optimizer, scaler = RMSprop(critic.parameters(), lr=1e-2, clip=0.5), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    critic_loss = gpk.CriticLoss(critic)
    for real in (data.real * float("inf"), data.real):
        optimizer.zero_grad()
        scaler.scale(critic_loss(real, data.fake, eps=data.eps).loss).backward()
        scaler.step(optimizer)
        scaler.update()
        if real is not data.real:
            _assert_same(critic, twin, 0.0)
            assert not optimizer.state
            assert scaler.get_scale() == 2.0**9
    plain_loss(twin, data.real, data.fake, data.eps).backward()
    torch.optim.RMSprop(twin.parameters(), lr=1e-2).step()
    gpk.clip_weights_(twin.parameters(), 0.5)
    _assert_same(critic, twin, 1e-4)


class Penalised(Dataset[list[float]]):
    """What a worker computes: noise, a penalty, and a critic step with its gradients.

    Numbers instead of tensors, which workers send by shared memory, of which a container may have none.
    """

    def __init__(self, critic: nn.Module, rows: Tensor) -> None:
        self.critic_loss, self.rows = gpk.CriticLoss(critic), rows

    def __len__(self) -> int:
        return 3

    def __getitem__(self, i: int) -> list[float]:
        rows, critic = self.rows + i, self.critic_loss.critic
        eps = torch.full((len(rows),), 0.25)
        noisy = gpk.add_instance_noise(rows, 0.1, generator=torch.Generator().manual_seed(i))
        loss = self.critic_loss(rows, noisy, eps=eps).loss + gpk.r1_penalty(critic, rows)
        gradients = torch.autograd.grad(loss, list(critic.parameters()))
        return torch.cat([loss.detach()[None], *(g.flatten() for g in gradients)]).tolist()


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_of_a_data_loader_compute_what_their_parent_does(context: str) -> None:
    torch.set_num_threads(2)  # a pool of threads is at work before the fork
    data = Penalised(mlp(6, 16, 1), torch.randn(512, 6))
    here = [data[i] for i in range(3)]
    gpk.gradient_norm_penalty(torch.randn(4096, 256))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads
        loader = DataLoader(data, batch_size=None, num_workers=2, multiprocessing_context=context, timeout=120)
        there = list(loader)
    for a, b in zip(there, here, strict=True):
        torch.testing.assert_close(torch.tensor(a), torch.tensor(b))


def _saved(x: Any) -> Any:
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "torch.save": _saved,
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("uses", [0, 1, 4])
def test_a_copy_of_a_used_loss_is_one_of_its_own_critic(uses: int, how: str) -> None:
    data = Batches(8)
    given = data.real, data.fake
    loss = gpk.CriticLoss(mlp(6, 16, 1), penalty={"wgan-gp": 3.0, "r1": 0.5}, objective="gan")
    for _ in range(uses):
        loss(*given, eps=data.eps).loss.backward()
    loss.calls = uses
    copied = COPIES[how](loss)
    assert copied.calls == uses
    before = loss(*given, eps=data.eps).loss
    for _ in range(4):
        torch.testing.assert_close(copied(*given, eps=data.eps).loss, before)
    with torch.no_grad():
        for p in copied.critic.parameters():
            p.zero_()
    torch.testing.assert_close(loss(*given, eps=data.eps).loss, before)
    assert copied(*given, eps=data.eps).loss != before


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_of_the_optimiser_continues_with_the_same_numbers(how: str) -> None:
    critic = mlp(6, 16, 1)
    optimizer = RMSprop(critic.parameters(), lr=1e-2, momentum=0.9, centered=True, clip=0.3)
    for _ in range(3):
        for p in critic.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
    both = COPIES[how]((critic, optimizer))
    for _ in range(3):
        for p, q in zip(critic.parameters(), both[0].parameters(), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        optimizer.step()
        both[1].step()
    assert all(torch.equal(p, q) for p, q in zip(critic.parameters(), both[0].parameters(), strict=True))


SCHEDULES: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "steps": lambda o: torch.optim.lr_scheduler.StepLR(o, 2),
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 5),
    "one cycle, with momentum": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.05, 10),
    "plateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "warm-up, then decay": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o, [torch.optim.lr_scheduler.LinearLR(o), torch.optim.lr_scheduler.ExponentialLR(o, 0.5)], [3]
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_moves_the_learning_rate_as_torchs(name: str) -> None:
    ours = mlp(6, 16, 1)
    theirs = copy.deepcopy(ours)
    optimizers = [
        made(m.parameters(), 0.01, momentum=0.5) for made, m in ((RMSprop, ours), (torch.optim.RMSprop, theirs))
    ]
    schedules = [SCHEDULES[name](optimizer) for optimizer in optimizers]
    rates = set()
    for _ in range(8):
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step(*([1.0] if name == "plateau" else []))
        rates.add(optimizers[0].param_groups[0]["lr"])
        assert optimizers[0].param_groups[0]["lr"] == optimizers[1].param_groups[0]["lr"]
    assert len(rates) > 1
    _assert_same(ours, theirs, 1e-4)


@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
def test_weights_that_are_loaded_between_steps_are_the_next_steps(assign: bool) -> None:
    critic, data = mlp(6, 16, 1), Batches(8)
    critic_loss = gpk.CriticLoss(critic)
    for _ in range(5):
        twin = mlp(6, 16, 1)
        critic.load_state_dict(copy.deepcopy(twin.state_dict()), assign=assign)
        for loss, module in (
            (critic_loss(data.real, data.fake, eps=data.eps).loss, critic),
            (plain_loss(twin, data.real, data.fake, data.eps), twin),
        ):
            module.zero_grad()
            loss.backward()
        for p, q in zip(critic.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)
