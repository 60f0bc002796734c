"""Shared parts of the command lines: usage errors, and loading the critic that an option names."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


class UserError(Exception):
    """A usage error: its text is printed as one line, and the command exits with code 2."""


@contextmanager
def critic_errors(options: argparse.Namespace) -> Iterator[None]:
    """Context manager that turns errors of the user's critic into UserError."""
    try:
        yield
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{options.critic} on {options.input}: {type(error).__name__}: {reason}") from error


def own_critic(options: argparse.Namespace) -> tuple[torch.nn.Module, list[int]] | None:
    """Load the critic and batch shape of --critic and --input; UserError for one without the other."""
    if not (options.critic or options.input):
        return None
    if not (options.critic and options.input):
        raise UserError("--critic and --input: expected both or neither")
    critic = load_critic(options.critic)
    if not isinstance(critic, torch.nn.Module):
        raise UserError(f"--critic: expected a torch.nn.Module, got {type(critic).__name__}")
    return critic, shape_of(options.input)


def load_critic(name: str) -> Callable[..., Any]:
    """Construct the critic that ``module:Class`` names, without arguments; UserError where that fails."""
    return load("critic", name, "module:Class")


def load(what: str, name: str, form: str) -> Callable[..., Any]:
    """Load what ``module:attribute`` names, constructed without arguments if it is a class.

    what, form: for error messages: the argument, and how it is written.
    """
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise UserError(f"{what}: expected {form}, got {name!r}")
    sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), attribute)
        made = found() if isinstance(found, type) else found
    except Exception as error:  # whatever the user's own module raises
        raise UserError(f"{name}: {type(error).__name__}: {str(error).partition(chr(10))[0]}") from error
    finally:
        sys.path.pop(0)
    if not callable(made):
        raise UserError(f"{name}: expected a callable {what}, got {type(made).__name__}")
    return made


def shape_of(text: str) -> list[int]:
    """Parse a shape such as 64x3x32x32; UserError for anything else."""
    parts = text.lower().split("x")
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UserError(f"--input: expected a shape such as 64x3x32x32, got {text!r}")
    return [int(part) for part in parts]


def count(text: str) -> int:
    """Parse a positive integer, as an argparse type."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text}")
    return int(text)
