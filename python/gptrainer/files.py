"""States whose damage is detected by a checksum."""

from __future__ import annotations

import hashlib
import io
from typing import Any

import torch

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
