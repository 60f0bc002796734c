"""The experiments, in the order of the report. A new one needs a file and its name here."""

from __future__ import annotations

from functools import cache
from importlib import import_module

from gptrainer.reproduce.experiment import Experiment

NAMES = (
    "parallel_lines",
    "dirac_gan",
    "perfect_discrimination",
    "cauchy_gradients",
    "instance_noise",
    "meaningful_loss",
    "value_surfaces",
    "layer_gradients",
    "mixtures",
    "overfitting",
    "unrolled",
    "neural_net_distance",
    "semi_supervised",
    "all_systems",
)


@cache
def find(name: str) -> Experiment:
    """Find an experiment by its name or by that of its file; KeyError if there is none."""
    stem = name.replace("-", "_")
    if stem not in NAMES:
        raise KeyError(name)
    found: Experiment = import_module(f"{__name__}.{stem}").EXPERIMENT
    return found


def every() -> list[Experiment]:
    """List all experiments."""
    return [find(name) for name in NAMES]
