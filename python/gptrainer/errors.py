"""What a user can put right."""

from __future__ import annotations


class UserError(Exception):
    """Its text is the one line a user reads; the command then ends with exit code 2."""
