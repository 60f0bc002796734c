"""`gpkernels info | explain | verify | bench | train | reproduce`; the last three have command lines of their own."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import torch

from gpkernels import backends, info
from gpkernels.arguments import UserError, critic_errors, load_critic, own_critic, shape_of

# Import names of the packages of the "train" extra.
EXTRA = ("sklearn", "scipy", "matplotlib", "PIL", "ot", "jinja2", "tqdm", "tyro", "safetensors")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return 0 on success, 2 for a usage error."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] in (["train"], ["reproduce"]):
        return _trainer(*arguments)
    if arguments[:1] == ["bench"]:
        from gpkernels.bench.cli import main as bench

        return bench(arguments[1:], {"train": _training_suite})
    parser = argparse.ArgumentParser(prog="gpkernels", description="Exact gradient penalties in PyTorch, fast.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    describe = commands.add_parser("info", help="print backends, versions and build facts")
    describe.add_argument("--json", action="store_true", help="print as JSON")
    describe.add_argument(
        "--kernels", action="store_true", help="print the resources that each GPU kernel needs on each target"
    )
    layers = commands.add_parser("explain", help="print how each call of a critic is differentiated, and why")
    layers.add_argument("critic", metavar="module:Class", help="class of a critic, constructed without arguments")
    layers.add_argument("--input", required=True, metavar="NxCxHxW", help="shape of a batch, such as 64x3x32x32")
    numbers = commands.add_parser(
        "verify", help="compare every op, penalty and a training run with plain PyTorch in float64"
    )
    numbers.add_argument(
        "--backend", action="append", metavar="NAME", help="backend to test (default: every one that can run)"
    )
    numbers.add_argument("--op", action="append", metavar="NAME", help="op, penalties or training (default: all)")
    numbers.add_argument(
        "--dtype", action="append", metavar="NAME", help="float64, float32, float16 or bfloat16 (default: all)"
    )
    numbers.add_argument("--json", type=Path, metavar="FILE", help="write every result to FILE")
    numbers.add_argument("--quick", action="store_true", help="two shapes per op and a shorter training run")
    numbers.add_argument("--critic", metavar="module:Class", help="test the penalties of this critic only")
    numbers.add_argument("--input", metavar="NxCxHxW", help="shape of its batch, such as 64x3x32x32")
    commands.add_parser("bench", help="measure times against eager PyTorch and the machine's limits", add_help=False)
    commands.add_parser("train", help="train a GAN with these ops; `gpkernels train --help`", add_help=False)
    commands.add_parser("reproduce", help="reproduce published results", add_help=False)
    options = parser.parse_args(arguments)
    try:
        return {"info": _info, "explain": _explain, "verify": _verify}[options.command](options)
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
    with critic_errors(options):
        print(explain(critic, example))
    return 0


def _verify(options: argparse.Namespace) -> int:
    from gpkernels.verify import run
    from gpkernels.verify.cases import DTYPES

    chosen = _among("--backend", options.backend, backends.NAMES[1:], run.runnable())
    for name in chosen:
        if name not in run.runnable():
            raise UserError(f"--backend {name}: {backends.unavailable(name) or 'it needs a GPU'}")
    names = _among("--op", options.op, run.NAMES, run.NAMES)
    dtypes = _among("--dtype", options.dtype, tuple(DTYPES), tuple(DTYPES))
    own = ""
    if mine := own_critic(options):
        own = f"--critic {options.critic} --input {options.input}"
        with critic_errors(options):
            results = list(run.check_own(*mine, options.critic, chosen))
    else:
        results = list(run.checks(chosen, names, dtypes, options.quick))
    print(run.table(results))
    failed = run.failures(results, own)
    print("\n".join(failed) if failed else f"{len(results)} cases, none failed")
    if options.json:
        try:
            run.write_json(options.json, results)
        except OSError as error:
            raise UserError(f"--json {options.json}: {error.strerror or error}") from None
    return 1 if failed else 0


def _among(option: str, given: Sequence[str] | None, known: Sequence[str], default: Sequence[str]) -> Sequence[str]:
    """Return the given names or the default; UserError for an unknown name."""
    for name in given or ():
        if name not in known:
            raise UserError(f"{option}: expected one of {', '.join(known)}, got {name!r}")
    return given or default


def _training_suite() -> ModuleType:
    """Import the trainer's suite of `gpkernels bench`."""
    try:
        return importlib.import_module("gptrainer.benchmark")
    except ImportError as error:
        raise UserError(f"train: needs {error.name}; install it with: pip install 'gpkernels[train]'") from None


def _trainer(command: str, *arguments: str) -> int:
    # Checked beforehand: some are imported only at the end of a run.
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
