"""Shared parts of the command lines: usage errors, files that are written, and the critic that an option names."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, NoReturn

import torch


class UserError(Exception):
    """A usage error: its text is printed as one line, and the command exits with code 2."""


class Parser(argparse.ArgumentParser):
    """Parser whose errors are UserError, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Raise UserError."""
        raise UserError(message)


def check_folder(option: str, path: Path) -> None:
    """Raise UserError unless files can be written to a folder, which need not exist yet; leaves nothing behind."""
    _check_files_in(path, option, path)


def _check_files_in(folder: Path, option: str, path: Path) -> None:
    new = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    try:
        if new:
            folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{option} {path}: {error.strerror or error}") from None
    finally:
        for parent in new:
            with suppress(OSError):
                parent.rmdir()


def check_file(option: str, path: Path | None) -> None:
    """Raise UserError unless a file can be written, in a folder that need not exist yet; None is no file."""
    if path is None:
        return
    if path.exists():
        try:
            with path.open("ab"):
                pass
        except OSError as error:
            raise UserError(f"{option} {path}: {error.strerror or error}") from None
    else:
        _check_files_in(path.parent, option, path)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a name to write to in the same folder; the file replaces ``path`` once it is complete and on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.stem}.part{path.suffix}")
    try:
        yield part
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    if os.name == "posix":  # other systems cannot open a folder
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def written(option: str, path: Path) -> Iterator[Path]:
    """Context manager that yields a name to write to, which replaces the file once it is complete.

    The file's folder is made. Devices, links, folders and files in a folder that is read-only are written in place.
    UserError where the file cannot be written; ValueError is matplotlib's, for a format that it does not know.
    """
    in_place = path.exists() and (path.is_symlink() or not path.is_file() or not os.access(path.parent, os.W_OK))
    try:
        with nullcontext(path) if in_place else replacing(path) as part:
            yield part
    except (OSError, ValueError) as error:
        raise UserError(f"{option} {path}: {getattr(error, 'strerror', None) or error}") from None


@contextmanager
def critic_errors(options: argparse.Namespace) -> Iterator[None]:
    """Context manager that turns errors of the user's critic into UserError."""
    try:
        yield
    except UserError:
        raise
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


def duration(text: str) -> float:
    """Parse a number of seconds, as an argparse type."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
    return value
