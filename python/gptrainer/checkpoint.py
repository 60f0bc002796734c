"""The state of a run in one file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from gptrainer.errors import UserError
from gptrainer.files import replacing

FORMAT = 1
NAME = "checkpoint.pt"


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a run's state; what stood there before stays until the new one is whole."""
    with replacing(path) as part:
        torch.save({"format": FORMAT, **state}, part)


def load(path: Path) -> dict[str, Any]:
    """A run's state, read without executing anything in the file; UserError if it is missing or damaged."""
    if not path.is_file():
        raise UserError(f"--resume: there is no checkpoint {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError as error:
        raise UserError(f"--resume: {path} cannot be read: {error.strerror}") from error
    except Exception as error:  # the many ways in which a zip archive and a pickle can be damaged
        raise UserError(f"--resume: {path} is damaged or not a checkpoint; it was left as it is") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UserError(f"--resume: {path} is not a checkpoint of this version (format {FORMAT})")
    return state
