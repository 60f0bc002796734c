"""The state of a run in a file that is whole or known not to be, with the one before it kept beside it."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import torch

from gptrainer.errors import UserError
from gptrainer.files import replacing

FORMAT = 2
NAME, PREVIOUS = "checkpoint.pt", "checkpoint-previous.pt"
MAGIC = b"gpkernels checkpoint\n"
DIGEST = 32  # bytes of SHA-256


class Damaged(Exception):
    """A file that is not what was written."""


class Checkpoints:
    """The last checkpoint of a run folder and the one before it."""

    def __init__(self, folder: Path) -> None:
        self.path, self.previous = folder / NAME, folder / PREVIOUS
        self._good = False  # whether what stands at ``path`` is of this run and whole
        self._fell_back = False

    def save(self, state: dict[str, Any]) -> None:
        """Write a state. At every moment a whole checkpoint stands under one of the two names, once there was one."""
        payload = io.BytesIO()
        torch.save({"format": FORMAT, **state}, payload)
        content = payload.getbuffer()
        with replacing(self.path) as part:
            with part.open("wb") as file:
                for piece in (MAGIC, hashlib.sha256(content).digest(), content):
                    file.write(piece)
            if self._good:
                self.path.replace(self.previous)
        if not (self._good or self._fell_back):  # a run that starts anew
            self.previous.unlink(missing_ok=True)
        self._good = True

    def load(self) -> tuple[dict[str, Any], str | None]:
        """The last state that is whole, and a line to tell if it is not the last that was written.

        Nothing in a file is executed. UserError if there is none.
        """
        files = [path for path in (self.path, self.previous) if path.is_file()]
        if not files:
            raise UserError(f"--resume: there is no checkpoint {self.path}")
        told = []
        for path in files:
            try:
                state = read(path)
            except Damaged as damage:
                told.append(f"{path} {damage}")
                continue
            self._good = path == self.path
            self._fell_back = not self._good
            if self._fell_back and not told:
                told.append(f"{self.path} is missing")
            return state, f"{told[0]}; going on from {path}, step {state.get('step')}" if told else None
        raise UserError(f"--resume: {'; '.join(told)}; left as it is")


def read(path: Path) -> dict[str, Any]:
    """The state in a file. Damaged if it is not as it was written, UserError if it was written by something else."""
    try:
        content = path.read_bytes()
    except PermissionError as error:
        raise UserError(f"--resume: {path} cannot be read: {error.strerror}") from error
    head = len(MAGIC) + DIGEST
    if not content.startswith(MAGIC):
        raise Damaged("is damaged or not a checkpoint")
    payload = memoryview(content)[head:]
    if hashlib.sha256(payload).digest() != content[len(MAGIC) : head]:
        raise Damaged("is damaged: its checksum is not that of its content")
    try:
        state = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except Exception as error:  # the many ways in which a pickle can be wrong, or try to run code
        raise Damaged("is damaged or not a checkpoint") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UserError(f"--resume: {path} is not a checkpoint of this version (format {FORMAT})")
    return state
