"""What the commands share: a user's mistake, and the critic that a command line names."""

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
    """What a user can put right: its text is the one line that is printed, and the command ends with exit code 2."""


@contextmanager
def blamed(options: argparse.Namespace) -> Iterator[None]:
    """A UserError for whatever the user's own critic raises."""
    try:
        yield
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{options.critic} on {options.input}: {type(error).__name__}: {reason}") from error


def own_critic(options: argparse.Namespace) -> tuple[torch.nn.Module, list[int]] | None:
    """The critic and the shape of its batch that --critic and --input name; UserError for one without the other."""
    if not (options.critic or options.input):
        return None
    if not (options.critic and options.input):
        raise UserError("--critic: expected with --input, and --input with --critic")
    critic = load_critic(options.critic)
    if not isinstance(critic, torch.nn.Module):
        raise UserError(f"--critic: expected a torch.nn.Module, got {type(critic).__name__}")
    return critic, shape_of(options.input)


def load_critic(name: str) -> Callable[..., Any]:
    """The critic that ``module:Class`` names, made without arguments; UserError where that cannot be done."""
    return load("critic", name, "module:Class")


def load(what: str, name: str, form: str) -> Callable[..., Any]:
    """What ``module:attribute`` names, made without arguments if it is a class; form: how a user is to write it."""
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
        raise UserError(f"{name}: expected a {what} that can be called, got {type(made).__name__}")
    return made


def shape_of(text: str) -> list[int]:
    """64x3x32x32 as numbers; UserError for anything else."""
    parts = text.lower().split("x")
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UserError(f"--input: expected a shape such as 64x3x32x32, got {text!r}")
    return [int(part) for part in parts]


def count(text: str) -> int:
    """A whole number above 0, as an option's type."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text}")
    return int(text)
