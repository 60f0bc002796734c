"""Errors that a user can correct."""

from __future__ import annotations


class UserError(Exception):
    """A mistake of the user: its text is printed as one line, and the exit code is 2."""
