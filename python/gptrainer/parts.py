"""Parts of a run, built from its config."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from gpkernels.arguments import UserError
from gptrainer.config import TrainConfig, flag
from gptrainer.data import Batches, load_batches
from gptrainer.metrics import Quality, build_quality
from gptrainer.models import build_models
from gptrainer.processes import Processes


def networks(config: TrainConfig, processes: Processes, device: torch.device) -> tuple[nn.Module, nn.Module]:
    """(generator, critic), initialised from torch's global generator.

    With several processes BatchNorm is over the rows of all of them, which PyTorch supports on GPUs only.
    """
    batch_norm = config.critic_norm == "batch"
    built = build_models(config.data, config.latent, config.width, network=config.network, batch_norm=batch_norm)
    if processes.size > 1 and device.type == "cuda":
        built = tuple(nn.SyncBatchNorm.convert_sync_batchnorm(network) for network in built)
    elif processes.size > 1 and any(map(mixes_samples, built)):
        processes.say("on a CPU, BatchNorm uses the rows of each process alone: losses differ from one process's")
    generator, critic = built
    return generator.to(device), critic.to(device)


def averages(config: TrainConfig, networks: dict[str, nn.Module]) -> dict[str, AveragedModel]:
    """Moving averages of the networks' weights; empty without ``ema``."""
    if not config.ema:
        return {}
    average = get_ema_multi_avg_fn(config.ema)
    return {name: AveragedModel(network, multi_avg_fn=average) for name, network in networks.items()}


def batches(config: TrainConfig, processes: Processes, device: torch.device) -> Batches:
    """This process's rows of the batches of real samples; UserError if a batch cannot be divided evenly."""
    for name in ("batch_size", "generator_batch_size"):
        if config.resolved(name) % processes.size:
            expected = f"a multiple of the {processes.size} processes"
            raise UserError(f"{flag(name)}: expected {expected}, got {config.resolved(name)}")
    shard = (processes.rank, processes.size)
    return load_batches(
        config.data, config.batch_size, config.seed, device, data_dir=config.data_dir, limit=config.limit, shard=shard
    )


def quality(config: TrainConfig, device: torch.device) -> Quality:
    """The measure of sample quality."""
    return build_quality(config.data, config.latent, config.seed, device, data_dir=config.data_dir)


def mixes_samples(network: nn.Module) -> bool:
    """Whether a sample's output depends on the rest of its batch."""
    return any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in network.modules())
