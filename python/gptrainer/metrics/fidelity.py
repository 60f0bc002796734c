"""Published scores: torch-fidelity's, with Inception's weights, where the user has both."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"


def inception_network_metrics(generated: Tensor, real: Tensor) -> dict[str, float] | None:
    """Inception score and Fréchet distance as the literature has them, or None without torch-fidelity or its weights.

    generated, real: (N, 3, H, W) in bytes. The weights are those that torch-fidelity keeps in torch's hub folder;
    nothing is downloaded.
    """
    weights = Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS
    if find_spec("torch_fidelity") is None or not weights.is_file():
        return None
    from torch_fidelity import calculate_metrics

    measured = calculate_metrics(
        input1=_Images(generated),
        input2=_Images(real),
        isc=True,
        fid=True,
        feature_extractor_weights_path=str(weights),
        cuda=torch.cuda.is_available(),
        verbose=False,
    )
    return {
        "inception_score": measured["inception_score_mean"],
        "frechet_distance": measured["frechet_inception_distance"],
    }


class _Images(TensorDataset):
    """A data set whose items are images, not tuples of one."""

    def __getitem__(self, index: int) -> Tensor:  # type: ignore[override]
        return self.tensors[0][index]
