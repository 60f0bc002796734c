"""The parts that a run is put together from, as its config asks for them."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from gptrainer.config import TrainConfig, filled
from gptrainer.data import Batches, load_batches
from gptrainer.errors import UserError
from gptrainer.metrics import Quality, build_quality
from gptrainer.models import build_models
from gptrainer.processes import Processes


def networks(config: TrainConfig, processes: Processes, device: torch.device) -> tuple[nn.Module, nn.Module]:
    """(generator, critic), initialised from torch's global generator.

    With more processes than one BatchNorm is over the rows of all of them, which PyTorch has on GPUs only.
    """
    latent, width, batch_norm = filled(config.latent), filled(config.width), config.critic_norm == "batch"
    built = build_models(config.data, latent, width, network=config.network, batch_norm=batch_norm)
    if processes.size > 1 and device.type == "cuda":
        built = tuple(nn.SyncBatchNorm.convert_sync_batchnorm(network) for network in built)
    elif processes.size > 1 and any(map(mixes_samples, built)):
        processes.say("BatchNorm sees each process's rows by themselves on a CPU: losses differ from one process's")
    generator, critic = built
    return generator.to(device), critic.to(device)


def averages(config: TrainConfig, networks: dict[str, nn.Module]) -> dict[str, AveragedModel]:
    """Moving averages of the networks' weights, if the run wants any."""
    decay = filled(config.ema)
    if not decay:
        return {}
    average = get_ema_multi_avg_fn(decay)
    return {name: AveragedModel(network, multi_avg_fn=average) for name, network in networks.items()}


def batches(config: TrainConfig, processes: Processes, device: torch.device) -> Batches:
    """This process's rows of the batches of real samples; UserError if a batch cannot be shared out."""
    for name in ("batch_size", "generator_batch_size"):
        if getattr(config, name) % processes.size:
            flag = f"--{name.replace('_', '-')}"
            expected = f"a multiple of the {processes.size} processes"
            raise UserError(f"{flag}: expected {expected}, got {getattr(config, name)}")
    size, shard = filled(config.batch_size), (processes.rank, processes.size)
    return load_batches(
        config.data, size, config.seed, device, data_dir=config.data_dir, limit=config.limit, shard=shard
    )


def quality(config: TrainConfig, device: torch.device) -> Quality:
    """What samples are measured by."""
    return build_quality(config.data, filled(config.latent), config.seed, device, data_dir=config.data_dir)


def mixes_samples(network: nn.Module) -> bool:
    """Whether what it makes of a sample depends on the others of its batch."""
    return any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in network.modules())
