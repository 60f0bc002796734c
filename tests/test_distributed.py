"""Two processes, by DDP or by fully_shard, have the losses and gradients of one process with the whole batch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import gpkernels as gpk
from critics import plain_penalty, plain_points

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this PyTorch has no torch.distributed")
STEPS = 2


class Batch(NamedTuple):
    real: Tensor
    fake: Tensor
    eps: Tensor

    def rows(self, start: int, stop: int) -> Batch:
        return Batch(*[x[start:stop] for x in self])


Loss = Callable[[Any, Batch], Tensor]


def whole_batch() -> Batch:
    torch.manual_seed(1)
    real, fake = torch.randn(2, 8, 6, dtype=torch.float64)
    return Batch(real, 0.7 * fake, torch.rand(8, dtype=torch.float64))


def make(activation: Callable[[], nn.Module] = nn.Tanh) -> nn.Sequential:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(6, 16), activation()), nn.Sequential(nn.Linear(16, 16), nn.LeakyReLU(0.2))]
    return nn.Sequential(*blocks, nn.Linear(16, 1)).double()


# --- losses, ours and in plain PyTorch


def scores(critic: nn.Module, batch: Batch) -> Tensor:
    return critic(batch.fake).mean() - critic(batch.real).mean()


def penalty(critic: nn.Module, batch: Batch, **options: Any) -> Tensor:
    return gpk.gradient_penalty(critic, batch.real, batch.fake, eps=batch.eps, **options)


def composed(critic: nn.Module, batch: Batch) -> Tensor:
    with gpk.fast_double_backward():
        return penalty(critic, batch)


def of_gradients(critic: nn.Module, batch: Batch) -> Tensor:
    points = plain_points(*batch, "wgan-gp").detach()
    return (gpk.input_gradient(critic, points).norm(dim=1) - 1).square().mean()


def paired(critic: nn.Module, batch: Batch) -> Tensor:
    loss = F.softplus(critic(batch.fake) - critic(batch.real)).mean()
    return loss + 0.5 * plain_penalty(critic, batch.real, 0) + 0.2 * plain_penalty(critic, batch.fake, 0)


def plain(critic: nn.Module, batch: Batch) -> Tensor:
    return scores(critic, batch) + 10 * plain_penalty(critic, plain_points(*batch, "wgan-gp"))


def wgan(critic: nn.Module, batch: Batch) -> Tensor:
    return gpk.CriticLoss(critic)(batch.real, batch.fake, eps=batch.eps).loss


def relativistic(critic: nn.Module, batch: Batch) -> Tensor:
    loss = gpk.CriticLoss(critic, objective="relativistic", penalty={"r1": 0.5, "r2": 0.2})
    return loss(batch.real, batch.fake).loss


LOSSES: dict[str, tuple[Loss, Loss]] = {
    "WGAN-GP's loss": (wgan, plain),
    "a relativistic loss with R1 and R2": (relativistic, paired),
    "scores, then a penalty": (lambda c, b: scores(c, b) + 10 * penalty(c, b), plain),
    "a penalty, then scores": (lambda c, b: 10 * penalty(c, b) + scores(c, b), plain),
    "a penalty per sample, then scores": (
        lambda c, b: 10 * penalty(c, b, reduction="none").mean() + scores(c, b),
        plain,
    ),
    "a composed penalty, then scores": (lambda c, b: 10 * composed(c, b) + scores(c, b), plain),
    "a loss of input gradients, then scores": (lambda c, b: 10 * of_gradients(c, b) + scores(c, b), plain),
}


# --- ways to distribute a critic


def sharded(critic: nn.Sequential, **options: Any) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for block in critic:
        fully_shard(block, **options)
    return fully_shard(critic, **options)


def checkpointed(critic: nn.Sequential) -> nn.Module:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    for i in (0, 1):
        critic[i] = checkpoint_wrapper(critic[i])
    return sharded(critic, reshard_after_forward=True)


class Reentrant(nn.Module):
    """A block whose activations PyTorch makes again in backward alone."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.block, x, use_reentrant=True)


def reentrant(critic: nn.Sequential) -> nn.Module:
    critic[1] = Reentrant(critic[1])
    return DistributedDataParallel(critic)


WAYS: dict[str, Callable[[nn.Sequential], nn.Module]] = {
    "DDP": DistributedDataParallel,
    "fully_shard that frees after forward": lambda critic: sharded(critic, reshard_after_forward=True),
    "fully_shard that frees after backward": lambda critic: sharded(critic, reshard_after_forward=False),
}


def tensor_parallel(critic: nn.Sequential, last: bool = True) -> nn.Module:
    """A matrix in two parts by columns, one by rows; last: also the one after them."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    plan = {"0.0": ColwiseParallel(), "1.0": RowwiseParallel()}
    more = {"2": RowwiseParallel(input_layouts=Replicate())} if last else {}
    return parallelize_module(critic, init_device_mesh("cpu", (2,)), {**plan, **more})


def full(x: Tensor) -> Tensor:
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def errors(found: Any, exact: Any) -> float:
    """The largest difference of two lists of tensors, of which each has something to differ in."""
    pairs = [(full(a.detach()), b.detach()) for a, b in zip(found, exact, strict=True)]
    assert max(float(b.abs().max()) for _, b in pairs) > 1e-3
    return max(float((a - b).abs().max()) for a, b in pairs)


def trained(mine: nn.Module, ours: Loss, exact: Loss, twin: nn.Module, rank: int, whole: bool = False) -> float:
    """Compare losses and weights over some steps of training; whole: whether each process has the whole batch."""
    batch = whole_batch()
    rows = batch if whole else batch.rows(4 * rank, 4 * rank + 4)
    optimisers = [torch.optim.SGD(module.parameters(), 0.05, momentum=0.9) for module in (mine, twin)]
    worst = 0.0
    for _ in range(STEPS):
        losses = ours(mine, rows), exact(twin, batch)
        for optimiser, loss in zip(optimisers, losses, strict=True):
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        mean = losses[0].detach().clone()
        dist.all_reduce(mean)
        worst = max(worst, errors([mean / 2], [losses[1]]), errors(mine.parameters(), twin.parameters()))
    return worst


Check = Callable[[int], float]


def check(
    way: Callable[[nn.Sequential], nn.Module], ours: Loss, exact: Loss, whole: bool = False, **options: Any
) -> Check:
    return lambda rank: trained(way(make(**options)), ours, exact, make(**options), rank, whole)


# --- checks of more than one critic's steps; each returns an error


def ddp_around_the_loss(rank: int) -> float:
    loss = DistributedDataParallel(gpk.CriticLoss(make()))
    return trained(loss, lambda _, b: loss(b.real, b.fake, eps=b.eps).loss, plain, make(), rank)


def fully_shard_around_the_loss(rank: int) -> float:
    from torch.distributed.fsdp import fully_shard

    critic = make()
    for block in critic[:2]:  # the last layer's weights are the loss's own
        fully_shard(block, reshard_after_forward=True)
    loss = fully_shard(gpk.CriticLoss(critic))
    return trained(loss, lambda _, b: loss(b.real, b.fake, eps=b.eps).loss, plain, make(), rank)


def accumulated(critic: nn.Module, quiet: Callable[[bool], Any], loss: Loss, rank: int) -> float:
    twin, batch = make(), whole_batch()
    for i in (0, 2):
        with quiet(i == 0):
            loss(critic, batch.rows(4 * rank + i, 4 * rank + i + 2)).backward()
    for i in range(0, 8, 2):
        (plain(twin, batch.rows(i, i + 2)) / 2).backward()
    return errors([p.grad for p in critic.parameters()], [p.grad for p in twin.parameters()])


def accumulation_by_ddp(rank: int) -> float:
    critic = DistributedDataParallel(make())
    return accumulated(critic, lambda yes: critic.no_sync() if yes else nullcontext(), wgan, rank)


def accumulation_by_fsdp(rank: int) -> float:
    critic = sharded(make(), reshard_after_forward=True)

    def quiet(yes: bool) -> Any:
        critic.set_requires_gradient_sync(not yes)
        return nullcontext()

    return accumulated(critic, quiet, wgan, rank)


def uneven_batches(rank: int) -> float:
    """The first process has one more batch, whose gradients count half."""
    loss, twin = DistributedDataParallel(gpk.CriticLoss(make())), make()
    mine = whole_batch().rows(4 * rank, 4 * rank + 4)
    with loss.join():
        for _ in range(2 - rank):
            loss.zero_grad()
            loss(mine.real, mine.fake, eps=mine.eps).loss.backward()
    if rank:
        return 0.0
    (plain(twin, mine) / 2).backward()
    return errors([p.grad for p in loss.parameters()], [p.grad for p in twin.parameters()])


def mixed_precision(rank: int) -> float:
    """The error of bfloat16, by that of the same critic in plain PyTorch and bfloat16, less 2."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    low = lambda x: Batch(*[t.bfloat16() for t in x])  # noqa: E731
    batch, twin, half = whole_batch(), make(), make().bfloat16()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    critic = sharded(make().float(), mp_policy=policy)
    wgan(critic, Batch(*[t.float() for t in batch.rows(4 * rank, 4 * rank + 4)])).backward()
    exact = torch.autograd.grad(plain(twin, batch), list(twin.parameters()))
    parts = [torch.autograd.grad(plain(half, low(batch.rows(i, i + 4))), list(half.parameters())) for i in (0, 4)]
    eager = [(a.double() + b.double()) / 2 for a, b in zip(*parts, strict=True)]
    flat = lambda tensors: torch.cat([full(t).double().flatten() for t in tensors])  # noqa: E731
    error = [(flat(g) - flat(exact)).norm() for g in ([p.grad for p in critic.parameters()], eager)]
    return max(0.0, float(error[0] / error[1]) - 2)


def parameters_are_freed(rank: int) -> float:
    """Parameters and state dictionaries are sharded after a step, whether it has gradients or not."""
    critic, batch = sharded(make(), reshard_after_forward=True), whole_batch()
    with torch.no_grad():
        wgan(critic, batch)
    found = []
    for loss in (wgan, of_gradients):
        value = loss(critic, batch)
        found += [hasattr(p, "full_tensor") for p in critic[:2].parameters()]
        value.backward()
        found += [hasattr(p, "full_tensor") for p in critic.parameters()]
    return 0.0 if all(found) else 1.0


def rmsprop(rank: int, **options: Any) -> float:
    critic, twin, batch = sharded(make()), make(), whole_batch()
    optimisers = [gpk.optim.RMSprop(m.parameters(), 0.01, clip=0.1, **options) for m in (critic, twin)]
    for _ in range(STEPS):
        for module, part in ((critic, batch.rows(4 * rank, 4 * rank + 4)), (twin, batch)):
            module.zero_grad()
            module(part.real).square().mean().backward()
        for optimiser in optimisers:
            optimiser.step()
    state = [
        optimiser.state[p]["square_avg"].sqrt() for optimiser in optimisers for p in optimiser.param_groups[0]["params"]
    ]
    half = len(state) // 2
    return max(errors(critic.parameters(), twin.parameters()), errors(state[:half], state[half:]))


def clipping(rank: int) -> float:
    critic, twin = sharded(make()), make()
    versions = [p._version for p in critic.parameters()]
    for module in (critic, twin):
        gpk.clip_weights_(module.parameters(), 0.05)
    assert all(p._version > before for p, before in zip(critic.parameters(), versions, strict=True))
    return errors(critic.parameters(), twin.parameters())


def sequence_parallel(rank: int) -> float:
    """Tokens in parts where they are normalised, as in a transformer; each process has all samples."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.up, self.down, self.norm = nn.Linear(3, 8), nn.Linear(8, 4), nn.LayerNorm(4)
            self.wide, self.last = nn.Linear(4, 8), nn.Linear(8, 1)

        def forward(self, x: Tensor) -> Tensor:
            h = self.norm(self.down(self.up(x.unflatten(1, (2, 3))).tanh()))
            return self.last(F.silu(self.wide(h))).sum((1, 2))

    twin, critic = Tokens().double(), Tokens().double()
    plan = {
        "up": ColwiseParallel(),
        "down": RowwiseParallel(output_layouts=Shard(1)),
        "norm": SequenceParallel(),
        "wide": ColwiseParallel(input_layouts=Shard(1)),
        "last": RowwiseParallel(),
    }
    parallelize_module(critic, init_device_mesh("cpu", (2,)), plan)
    return trained(critic, wgan, plain, twin, rank, whole=True)


FREES = WAYS["fully_shard that frees after forward"]
CHECKS: dict[str, Check] = {
    f"{what}, by {way}": check(WAYS[way], *pair) for what, pair in LOSSES.items() for way in WAYS
} | {
    "a call without a rule, by DDP": check(WAYS["DDP"], wgan, plain, activation=nn.Mish),
    "a call without a rule, by fully_shard": check(FREES, wgan, plain, activation=nn.Mish),
    "checkpointed blocks, by fully_shard": check(checkpointed, wgan, plain),
    "a reentrant checkpoint, by DDP": check(reentrant, wgan, plain),
    "a critic that is a function, by fully_shard": check(FREES, lambda c, b: wgan(lambda x: c(x), b), plain),
    "a compiled step, by fully_shard": check(FREES, torch.compile(wgan, backend="aot_eager"), plain),
    **{f"{what}, by tensor parallelism": check(tensor_parallel, *pair, whole=True) for what, pair in LOSSES.items()},
    "parallel and plain layers": check(partial(tensor_parallel, last=False), wgan, plain, whole=True),
    "a call without a rule, by tensor parallelism": check(tensor_parallel, wgan, plain, whole=True, activation=nn.Mish),
    "tokens in parts": sequence_parallel,
    "DDP around the whole loss": ddp_around_the_loss,
    "fully_shard around the whole loss": fully_shard_around_the_loss,
    "accumulated gradients, by DDP": accumulation_by_ddp,
    "accumulated gradients, by fully_shard": accumulation_by_fsdp,
    "one process with more batches": uneven_batches,
    "mixed precision": mixed_precision,
    "parameters are freed": parameters_are_freed,
    "RMSprop": rmsprop,
    "RMSprop with momentum": lambda rank: rmsprop(rank, momentum=0.9, centered=True, weight_decay=0.1),
    "clipped weights": clipping,
}


# --- what is refused


def parts_of_samples(loss: Loss) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module

    critic = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 1)).double()
    plan = {"0": RowwiseParallel(input_layouts=Shard(-1))}
    return loss(parallelize_module(critic, init_device_mesh("cpu", (2,)), plan), whole_batch())


def distributed_samples(function: Callable[..., Any]) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    return function(make(), distribute_tensor(whole_batch().real, init_device_mesh("cpu", (2,)), [Replicate()]))


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    f"samples in parts, {name}": (lambda loss=loss: parts_of_samples(loss), "expected whole samples on each process")
    for name, loss in {"whole loss": wgan, "penalty": penalty, "composed": composed, "gradient": of_gradients}.items()
} | {
    "distributed samples of a penalty": (lambda: distributed_samples(gpk.r1_penalty), "real: expected the samples of"),
    "distributed samples of a gradient": (
        lambda: distributed_samples(gpk.input_gradient),
        "x: expected the samples of",
    ),
}


def message_of(call: Callable[[], Any]) -> str:
    try:
        call()
    except (RuntimeError, TypeError) as error:
        return str(error)
    return "nothing was raised"


def _worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found: dict[str, float | str] = {}
    for name, function in CHECKS.items():
        try:
            found[name] = function(rank)
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    found |= {name: message_of(call) for name, (call, _) in REFUSED.items()}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes has found."""
    folder: Path = tmp_path_factory.mktemp("processes")
    mp.spawn(_worker, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", CHECKS)
def test_two_processes_are_one(name: str, found: list[dict[str, Any]]) -> None:
    for one in found:
        assert isinstance(one[name], float), one[name]
        assert one[name] <= 1e-12


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused(name: str, found: list[dict[str, Any]]) -> None:
    for one in found:
        with pytest.raises(RuntimeError, match=REFUSED[name][1]):
            raise RuntimeError(one[name])


def test_one_process_has_other_gradients_than_the_whole_batch() -> None:
    """Half a batch is not enough: the comparison can fail."""
    critic, batch = make(), whole_batch()
    pairs = [torch.autograd.grad(plain(critic, b), list(critic.parameters())) for b in (batch, batch.rows(0, 4))]
    assert errors(*pairs) > 1e-3
