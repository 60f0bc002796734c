"""Checkpoints of a run, the last one and the one before it; states whose damage is detected by a checksum."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import torch

from gpkernels.arguments import UserError, replacing

FORMAT = 3
NAME, PREVIOUS = "checkpoint.pt", "checkpoint-previous.pt"
OLD_MAGIC = b"gpkernels checkpoint\n"  # of formats 1 and 2
MAGIC = b"gpkernels state\n"
HEAD = len(MAGIC) + 32  # of SHA-256


class Damaged(Exception):
    """Raised for content that is not what was written."""


def pack(state: dict[str, Any]) -> bytes:
    """Serialise a state, with its checksum in front."""
    payload = io.BytesIO()
    torch.save(state, payload)
    content = payload.getvalue()
    return MAGIC + hashlib.sha256(content).digest() + content


def unpack(content: bytes) -> dict[str, Any]:
    """Restore what ``pack`` made, without running code from it; Damaged for anything else."""
    payload = memoryview(content)[HEAD:]
    if not content.startswith(MAGIC):
        raise Damaged("is damaged or of another kind")
    if hashlib.sha256(payload).digest() != content[len(MAGIC) : HEAD]:
        raise Damaged("is damaged: its checksum does not match")
    try:
        state: dict[str, Any] = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling fails in many ways
        raise Damaged("is damaged or of another kind") from error
    return state


class Checkpoints:
    """The last checkpoint in a run folder and the one before it."""

    def __init__(self, folder: Path) -> None:
        self.path, self.previous = folder / NAME, folder / PREVIOUS
        self._intact = False  # whether the file at ``path`` is intact and of this run
        self._fell_back = False

    def save(self, state: dict[str, Any]) -> None:
        """Write a state. Once there was a checkpoint, an intact one exists at every moment, under one of two names."""
        with replacing(self.path) as part:
            part.write_bytes(pack({"format": FORMAT, **state}))
            if self._intact:
                self.path.replace(self.previous)
        if not (self._intact or self._fell_back):  # a new run
            self.previous.unlink(missing_ok=True)
        self._intact = True

    def load(self) -> tuple[dict[str, Any], str | None]:
        """Read the last intact state; return a note with it if it is not the last that was written.

        UserError if there is none.
        """
        if not (self.path.is_file() or self.previous.is_file()):
            raise UserError(f"--resume: there is no checkpoint {self.path}")
        notes = []
        for path in (self.path, self.previous):
            try:
                state = read(path)
            except FileNotFoundError:
                notes.append(f"{path} is missing")
            except Damaged as damage:
                notes.append(f"{path} {damage}")
            else:
                self._intact, self._fell_back = not notes, bool(notes)
                return state, f"{notes[0]}; resuming from {path}, step {state.get('step')}" if notes else None
        raise UserError(f"--resume: {'; '.join(notes)}; left unchanged")


def read(path: Path) -> dict[str, Any]:
    """Read a checkpoint; Damaged if it is not as it was written, UserError if another version wrote it."""
    content = path.read_bytes()
    state = {} if content.startswith(OLD_MAGIC) else unpack(content)
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UserError(f"--resume: {path} was written by another version; expected format {FORMAT}")
    return state
