"""`gpkernels info | explain | verify | bench | train | reproduce`: large ones bring their own command lines."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from gpkernels import backends, info
from gpkernels.arguments import (
    Parser,
    UserError,
    check_file,
    count,
    critic_errors,
    load,
    load_critic,
    own_critic,
    shape_of,
    written,
)

# What the "train" extra installs, as it is imported.
EXTRA = ("sklearn", "scipy", "matplotlib", "PIL", "ot", "jinja2", "tqdm", "tyro", "safetensors")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0 on success, 2 for a user's mistake, the shell's code of SIGPIPE or SIGINT where those end it."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left is flushed at exit
        return 141
    except KeyboardInterrupt:
        print(f"gpkernels {arguments[0]}: stopped", file=sys.stderr)
        return 130
    return code


def _run(arguments: list[str]) -> int:
    if arguments[:1] in (["train"], ["reproduce"]):
        return _trainer(*arguments)
    if arguments[:1] == ["bench"]:
        from gpkernels.bench.cli import main as bench

        return bench(arguments[1:], {"train": _training_suite})
    parser = Parser(prog="gpkernels", description="Exact gradient penalties in PyTorch, fast.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    describe = commands.add_parser("info", help="print backends, versions and build facts")
    describe.add_argument("--json", action="store_true", help="print JSON")
    describe.add_argument(
        "--kernels", action="store_true", help="print the resources that each GPU kernel needs on each target"
    )
    layers = commands.add_parser("explain", help="print how each call of a critic is differentiated, and why")
    layers.add_argument("critic", metavar="module:Class", help="class of a critic, constructed without arguments")
    layers.add_argument("--input", required=True, metavar="NxCxHxW", help="shape of its batch, such as 64x3x32x32")
    layers.add_argument(
        "--approximate",
        action="store_true",
        help="measure error and cost of approximate_r1_penalty instead",
    )
    layers.add_argument("--sigmas", metavar="S,...", help="noise levels (default: 0.001,0.003,0.01,0.03,0.1)")
    layers.add_argument("--draws", type=count, metavar="N", help="number of draws of noise (default: 200)")
    layers.add_argument("--json", type=Path, metavar="FILE", help="write every result to FILE")
    layers.add_argument("--plot", type=Path, metavar="FILE", help="plot the errors to FILE")
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
    numbers.add_argument("-v", "--verbose", action="store_true", help="print every check, not only those that fail")
    numbers.add_argument("--quick", action="store_true", help="two shapes per op and a shorter training run")
    numbers.add_argument("--critic", metavar="module:Class", help="test the penalties of this critic only")
    numbers.add_argument("--input", metavar="NxCxHxW", help="shape of its batch, such as 64x3x32x32")
    numbers.add_argument(
        "--penalty",
        metavar="module:function",
        help="identify this penalty function of (critic, real, fake) and its mistakes",
    )
    commands.add_parser("bench", help="measure times against eager PyTorch and the machine's limits", add_help=False)
    commands.add_parser("train", help="train a GAN with these ops; `gpkernels train --help`", add_help=False)
    commands.add_parser("reproduce", help="reproduce published results", add_help=False)
    options = argparse.Namespace(command="")
    try:
        parser.parse_args(arguments, options)
        return {"info": _info, "explain": _explain, "verify": _verify}[options.command](options)
    except UserError as mistake:
        print(f"{f'gpkernels {options.command}'.rstrip()}: {mistake}", file=sys.stderr)
        return 2


def _info(options: argparse.Namespace) -> int:
    if options.kernels:
        print(info.kernels())
    else:
        print(json.dumps(info.facts(), indent=2) if options.json else info.render())
    return 0


def _explain(options: argparse.Namespace) -> int:
    if options.approximate:
        return _approximate(options)
    for name in ("sigmas", "draws", "json", "plot"):
        if getattr(options, name) is not None:
            raise UserError(f"--{name}: expected with --approximate")
    from gpkernels.critic.explain import explain

    critic = load_critic(options.critic)
    with critic_errors(options):
        example = torch.randn(shape_of(options.input))
    _warn(options, critic, example)
    with critic_errors(options):
        print(explain(critic, example))
    return 0


def _warn(options: argparse.Namespace, critic: Callable[..., Any], example: torch.Tensor) -> None:
    """Tell a critic's mistakes; UserError for scores that no penalty can be had of."""
    from gpkernels.verify.lint_critic import NO_GRADIENT, lint_critic

    with critic_errors(options):
        findings = lint_critic(critic, example)
    for finding in findings:
        if finding.mistake == NO_GRADIENT:
            raise UserError(f"{options.critic} on {options.input}: {finding}")
        print(f"warning: {finding}", file=sys.stderr)


def _approximate(options: argparse.Namespace) -> int:
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        raise UserError("--plot: needs matplotlib; install it with: pip install 'gpkernels[bench]'")
    check_file("--json", options.json)
    check_file("--plot", options.plot)
    from gpkernels.bench.approximate import DRAWS, SIGMAS, compare, write_json

    sigmas = SIGMAS if options.sigmas is None else tuple(_positive("--sigmas", s) for s in options.sigmas.split(","))
    torch.manual_seed(0)
    critic = load_critic(options.critic)
    if not isinstance(critic, torch.nn.Module):
        raise UserError(f"{options.critic}: expected a torch.nn.Module, got {type(critic).__name__}")
    with critic_errors(options):
        real = torch.randn(shape_of(options.input))
        found = compare(critic, real, sigmas, DRAWS if options.draws is None else options.draws)
    print(found)
    if options.json:
        with written("--json", options.json) as part:
            write_json(part, found)
    if options.plot:
        from gpkernels.bench.approximate_plot import plot

        with written("--plot", options.plot) as part:
            plot(part, found, f"{options.critic}, {options.input}")
    return 0


def _positive(option: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise UserError(f"{option}: expected numbers above 0, such as 0.01,0.1, got {text!r}")
    return value


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
    mine = own_critic(options)
    for option, given, unless in (
        ("--op", options.op, mine),
        ("--dtype", options.dtype, mine),
        ("--backend", options.backend, options.penalty),
        ("--json", options.json, options.penalty),
    ):
        if given and unless:
            raise UserError(f"{option}: expected without {'--penalty' if options.penalty else '--critic'}")
    if options.penalty:
        return _penalty(options, mine)
    check_file("--json", options.json)
    if mine:
        own = f"--critic {options.critic} --input {options.input}"
        with critic_errors(options):
            example = torch.randn(mine[1])
        _warn(options, mine[0], example)
        with critic_errors(options):
            results = list(run.check_own(*mine, options.critic, chosen))
    else:
        results = list(run.checks(chosen, names, dtypes, options.quick))
    print(run.table(results) if options.verbose else run.summary(results))
    print("\n".join([*(failed := run.failures(results, own)), run.verdict(results)]))
    if options.json:
        with written("--json", options.json) as part:
            run.write_json(part, results)
    return 1 if failed else 0


def _penalty(options: argparse.Namespace, mine: tuple[torch.nn.Module, list[int]] | None) -> int:
    """1 where a user's own penalty has mistakes."""
    from gpkernels.verify.lint_penalty import lint_penalty

    if mine is None:
        raise UserError("--penalty: expected with --critic and --input")
    function = load("penalty", options.penalty, "module:function")
    torch.manual_seed(0)
    with critic_errors(options):
        real, fake = torch.randn(mine[1]), 0.3 + 0.7 * torch.randn(mine[1])
        lint = lint_penalty(function, mine[0], real, fake)
    print(f"{options.penalty}: {lint}")
    return 1 if lint.findings else 0


def _among(option: str, given: Sequence[str] | None, known: Sequence[str], default: Sequence[str]) -> Sequence[str]:
    """What was given, or the default; UserError for what is not known."""
    for name in given or ():
        if name not in known:
            raise UserError(f"{option}: expected one of {', '.join(known)}, got {name!r}")
    return given or default


def _training_suite() -> ModuleType:
    """What `gpkernels bench` measures of the trainer."""
    try:
        return importlib.import_module("gptrainer.benchmark")
    except ImportError as error:
        raise UserError(f"train: needs {error.name}; install it with: pip install 'gpkernels[train]'") from None


def _trainer(command: str, *arguments: str) -> int:
    place = "gptrainer.cli" if command == "train" else "gptrainer.reproduce.cli"
    # Asked beforehand: some are first imported when the run is over.
    missing = [name for name in ("gptrainer", *EXTRA) if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"gpkernels {command} needs {', '.join(missing)}; install it with: pip install 'gpkernels[train]'",
            file=sys.stderr,
        )
        if not {"-h", "--help", "--list"} & set(arguments) or "gptrainer" in missing:
            return 2
        arguments = ("--list",) if command == "train" else arguments  # tyro writes its help
    code: int = importlib.import_module(place).main(arguments)
    return code
