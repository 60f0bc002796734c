"""Generators and critics by the name of the network and the shape of the data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from gpkernels.arguments import UserError
from gptrainer.data import DATASETS, DataSet
from gptrainer.models import closed_form, dcgan, mlp, resnet, semi_supervised
from gptrainer.models.layers import CT_DROPOUT, Pair


@dataclass(frozen=True)
class Network:
    """latent, width: sizes in the authors' code. fits: data that it suits. build: (data, latent, width, batch_norm)."""

    description: str
    latent: int
    width: int
    fits: Callable[[DataSet], bool]
    build: Callable[[DataSet, int, int, bool], Pair]


def _sides(*sides: int) -> Callable[[DataSet], bool]:
    """Test whether the last axis of a sample has one of these lengths."""
    return lambda data: data.shape[-1] in sides


PLANAR, LINEAR, PIXELS_32, CONVOLUTIONAL = _sides(2), _sides(1), _sides(32), _sides(28, 32, 64)
ANY = _sides(*(data.shape[-1] for data in DATASETS.values()))
CT = partial(dcgan.build, dropout=CT_DROPOUT)
CT_MLP = partial(mlp.build, dropout=CT_DROPOUT)
CT_RESNET = partial(resnet.build, dropout=resnet.CT_DROPOUT)
NETWORKS = {
    "mlp": Network("three hidden layers; for points those of WGAN-GP", 2, 512, ANY, mlp.build),
    "mlp12": Network("a critic of 12 hidden layers (WGAN-GP, fig. 1b)", 2, 512, PLANAR, mlp.build_deep),
    "unrolled": Network("two hidden layers of tanh, orthogonal (unrolled GAN)", 256, 128, PLANAR, mlp.build_unrolled),
    "dcgan": Network("convolutions: WGAN-GP's at 28 and 32 pixels, WGAN's at 64", 128, 64, CONVOLUTIONAL, dcgan.build),
    "wgan-mlp": Network("WGAN's fully connected generator, DCGAN's critic", 100, 512, CONVOLUTIONAL, dcgan.build_mlp),
    "resnet": Network("WGAN-GP's residual networks", 128, 128, PIXELS_32, resnet.build),
    "ct": Network("as dcgan, else mlp, with CT-GAN's dropout in the critic", 128, 64, ANY, CT),
    "ct-mlp": Network("as mlp, with CT-GAN's dropout in the critic", 2, 512, ANY, CT_MLP),
    "ct-resnet": Network("as resnet, with CT-GAN's dropout in the critic", 128, 128, PIXELS_32, CT_RESNET),
    "semi-supervised": Network(
        "CT-GAN's classifier and generator", 100, 250, lambda data: data.classes > 0, semi_supervised.build
    ),
    "lines": Network("one parameter: the position of a line", 1, 128, PLANAR, closed_form.build_line),
    "dirac": Network("one parameter each: a point and a slope", 1, 1, LINEAR, closed_form.build_dirac),
}


def default_network(data: str) -> str:
    """Name of the default network for a data set."""
    if data in ("dirac", "lines"):
        return data
    return "dcgan" if CONVOLUTIONAL(DATASETS[data]) else "mlp"


def build_models(data: str, latent: int, width: int, *, network: str | None = None, batch_norm: bool = False) -> Pair:
    """Build (generator, critic) for a data set, initialised from torch's global generator.

    batch_norm: the convolutional networks as the papers have them under weight clipping and in plain GANs, with
    BatchNorm in the critic. Off by default, since it mixes samples and a gradient penalty is defined for each sample.
    """
    name = network or default_network(data)
    if not NETWORKS[name].fits(DATASETS[data]):
        fitting = ", ".join(other for other, known in NETWORKS.items() if known.fits(DATASETS[data]))
        raise UserError(f"--network: expected one that fits {data} ({fitting}), got {name}")
    return NETWORKS[name].build(DATASETS[data], latent, width, batch_norm)


def mixes_samples(network: nn.Module) -> bool:
    """Whether a sample's output depends on the rest of its batch."""
    return any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in network.modules())


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Put a network into evaluation mode for the duration of a block."""
    training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(training)


def sample(network: nn.Module, inputs: Tensor, chunk: int = 1024) -> Tensor:
    """Compute a network's outputs in evaluation mode, without a graph, in chunks that bound memory."""
    with evaluating(network), torch.no_grad():
        return torch.cat([network(part) for part in inputs.split(chunk)])
