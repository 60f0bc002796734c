"""`gpkernels info | explain | train | reproduce`: the first two are here, the trainer brings its own command lines."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from gpkernels import info

# What the "train" extra installs, as it is imported.
EXTRA = ("sklearn", "scipy", "matplotlib", "PIL", "ot", "jinja2", "tqdm", "tyro", "safetensors")


class UserError(Exception):
    """A mistake on the command line: one line, exit code 2."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0 on success, 2 for a user's mistake."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] in (["train"], ["reproduce"]):
        return _trainer(*arguments)
    parser = argparse.ArgumentParser(prog="gpkernels", description="Exact gradient penalties in PyTorch, fast.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    describe = commands.add_parser("info", help="which backend runs, why, and how it was built")
    describe.add_argument("--json", action="store_true", help="print the facts as JSON")
    describe.add_argument("--kernels", action="store_true", help="print what each GPU kernel needs of each target")
    layers = commands.add_parser("explain", help="which way each layer of a critic takes, and why")
    layers.add_argument("critic", metavar="module:Class", help="a critic that can be made without arguments")
    layers.add_argument("--input", required=True, metavar="NxCxHxW", help="the shape of a batch, such as 64x3x32x32")
    commands.add_parser("train", help="train a GAN with these ops; `gpkernels train --help`", add_help=False)
    commands.add_parser("reproduce", help="measure again what the papers published", add_help=False)
    options = parser.parse_args(arguments)
    try:
        return _info(options) if options.command == "info" else _explain(options)
    except UserError as mistake:
        print(f"gpkernels {options.command}: {mistake}", file=sys.stderr)
        return 2


def _info(options: argparse.Namespace) -> int:
    if options.kernels:
        print(info.kernels())
    else:
        print(json.dumps(info.facts(), indent=2) if options.json else info.render())
    return 0


def _explain(options: argparse.Namespace) -> int:
    from gpkernels.critic.explain import explain

    critic, example = load_critic(options.critic), torch.randn(shape_of(options.input))
    try:
        print(explain(critic, example))
    except Exception as error:  # whatever the user's own critic raises
        reason = str(error).partition("\n")[0]
        raise UserError(f"{options.critic} on {options.input}: {type(error).__name__}: {reason}") from error
    return 0


def load_critic(name: str) -> Callable[..., Any]:
    """The critic that ``module:Class`` names, made without arguments; UserError where that cannot be done."""
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise UserError(f"critic: expected module:Class, got {name!r}")
    sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), attribute)
        made = found() if isinstance(found, type) else found
    except Exception as error:  # whatever the user's own module raises
        raise UserError(f"{name}: {type(error).__name__}: {str(error).partition(chr(10))[0]}") from error
    finally:
        sys.path.pop(0)
    if not callable(made):
        raise UserError(f"{name}: expected a critic that can be called, got {type(made).__name__}")
    return made


def shape_of(text: str) -> list[int]:
    """64x3x32x32 as numbers; UserError for anything else."""
    parts = text.lower().split("x")
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UserError(f"--input: expected a shape such as 64x3x32x32, got {text!r}")
    return [int(part) for part in parts]


def _trainer(command: str, *arguments: str) -> int:
    # Asked beforehand: some are first imported when the run is over.
    missing = [name for name in ("gptrainer", *EXTRA) if importlib.util.find_spec(name) is None]
    if missing:
        lack = ", ".join(missing)
        print(f"gpkernels {command} needs {lack}; install it with: pip install 'gpkernels[train]'", file=sys.stderr)
        return 2
    place = "gptrainer.cli" if command == "train" else "gptrainer.reproduce.cli"
    code: int = importlib.import_module(place).main(arguments)
    return code


if __name__ == "__main__":
    sys.exit(main())
