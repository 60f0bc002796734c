"""Command line of `gpkernels bench`."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType

import torch

from gpkernels.arguments import (
    Parser,
    UserError,
    check_file,
    check_folder,
    count,
    critic_errors,
    duration,
    own_critic,
    written,
)
from gpkernels.bench import attention, gradients, machine, ops, results, steps
from gpkernels.bench.trial import EAGER, OURS, PEERS, Trial, measure

PROGRAM = "gpkernels bench"
Suites = Mapping[str, Callable[[], ModuleType]]
SUITES: Suites = {
    "ops": lambda: ops,
    "attention": lambda: attention,
    "gradients": lambda: gradients,
    "steps": lambda: steps,
}
SECONDS, QUICK_SECONDS = 2.0, 0.2


def main(argv: Sequence[str], others: Suites) -> int:
    """Measure and print; return 0, 1 where a comparison finds a regression, 2 for a usage error.

    others: further suites, imported on demand.
    """
    suites = {**SUITES, **others}
    try:
        options = _parser(suites).parse_args(argv)
        return _compare(*options.compare) if options.compare else _bench(options, suites)
    except (UserError, results.Unreadable) as mistake:
        print(f"{PROGRAM}: {mistake}", file=sys.stderr)
        return 2


def _parser(suites: Suites) -> argparse.ArgumentParser:
    parser = Parser(
        prog=PROGRAM,
        description="Measure ops, critic steps and training iterations against eager PyTorch and others, in one run. "
        "Times are the minimum CPU time of the process over many rounds; on a GPU, the time between events.",
    )
    parser.add_argument("suites", nargs="*", metavar="suite", help=f"{', '.join(suites)} (default: all)")
    parser.add_argument("--critic", metavar="module:Class", help="measure the penalty and step of this critic only")
    parser.add_argument("--input", metavar="NxCxHxW", help="shape of its batch, such as 64x3x32x32")
    parser.add_argument(
        "--peers", default=EAGER, metavar="NAMES", help=f"comma-separated, of {', '.join(PEERS)} (default: {EAGER})"
    )
    parser.add_argument(
        "--case", action="append", default=[], metavar="PART", help="measure cases with PART in their name"
    )
    parser.add_argument("--growth", action="store_true", help="measure over batch, width, depth and image size instead")
    parser.add_argument("--quick", action="store_true", help="few, small cases")
    parser.add_argument(
        "--seconds", type=duration, metavar="S", help=f"seconds per call of a case (default: {SECONDS:g})"
    )
    parser.add_argument("--threads", type=count, default=1, metavar="N", help="threads of PyTorch (default: 1)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="device to measure (default: cpu)")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the rows to FILE")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write rows, machine and warnings to FILE")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with plots to FILE")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="write the plots to DIR, as SVG")
    parser.add_argument(
        "--compare",
        nargs=2,
        type=Path,
        metavar=("OLD", "NEW"),
        help="compare two files of results; exit with 1 if NEW is worse",
    )
    return parser


def _bench(options: argparse.Namespace, suites: Suites) -> int:
    peers = _peers(options.peers)
    chosen = _trials(options, suites)  # rejects bad options before anything is measured
    pages = _pages() if options.html or options.plots else None
    for option, path in (("--csv", options.csv), ("--json", options.json), ("--html", options.html)):
        check_file(option, path)
    if options.plots:
        check_folder("--plots", options.plots)
    device = _device(options.device)
    torch.set_num_threads(options.threads)
    machine.keep_freed_memory()
    wanted = _wanted(lambda: chosen(device), options.case)
    about = machine.facts(device)
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    print(results.heading(), flush=True)
    rows: list[results.Row] = []
    seconds = options.seconds or (QUICK_SECONDS if options.quick else SECONDS)
    for trial in wanted:
        measured = measure(trial, peers, device, seconds)
        rows += measured.rows
        for row in measured.rows:
            print(results.line(row))
        for peer, reason in measured.absent.items():
            print(f"{trial.case:<46} {peer:<10} {reason}")
        sys.stdout.flush()
    doubts = machine.warnings(about["load"], _stolen(rows, options))
    for doubt in doubts:
        print(f"warning: {doubt}", file=sys.stderr)
    _write(options, about, rows, doubts, pages)
    return 0


def _wanted(trials: Callable[[], Iterator[Trial]], parts: Sequence[str]) -> Iterator[Trial]:
    """Select trials by parts of their names; UserError if a part is in none, before any is measured."""
    unknown = list(parts)
    for trial in trials():
        unknown = [part for part in unknown if part.lower() not in trial.case.lower()]
        if not unknown:
            break
    if unknown:
        raise UserError(f"--case: expected part of a case's name, got {' and '.join(unknown)}")
    return (x for x in trials() if not parts or any(part.lower() in x.case.lower() for part in parts))


def _trials(options: argparse.Namespace, suites: Suites) -> Callable[[torch.device], Iterator[Trial]]:
    """Validate the options and return a generator of the requested trials."""
    if (options.critic or options.input) and options.suites not in ([], ["steps"]):
        raise UserError(f"--critic: expected steps as the suite, got {' '.join(options.suites)}")
    if mine := own_critic(options):
        if options.growth:
            raise UserError("--growth: expected without --critic")
        critic, shape = mine[0], tuple(mine[1])
        with critic_errors(options):
            critic(torch.randn(shape))
        return lambda device: steps.own_trials(critic, shape, options.critic, device)
    for name in options.suites:
        if name not in suites:
            raise UserError(f"suite: expected one of {', '.join(suites)}, got {name!r}")
    modules = [suites[name]() for name in options.suites or suites]

    def made(device: torch.device) -> Iterator[Trial]:
        for module in modules:
            yield from module.growth(device) if options.growth else module.trials(device, options.quick)

    return made


def _pages() -> ModuleType:
    for name in ("matplotlib", "jinja2"):
        if importlib.util.find_spec(name) is None:
            raise UserError(f"--html and --plots: need {name}; install it with: pip install 'gpkernels[bench]'")
    return importlib.import_module("gpkernels.bench.page")


def _peers(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in PEERS:
            raise UserError(f"--peers: expected some of {', '.join(PEERS)}, got {name!r}")
    return [EAGER, *(name for name in names if name != EAGER)]  # the baseline


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device: expected an available device, got cuda")
    return torch.device(name)


def _stolen(rows: Sequence[results.Row], options: argparse.Namespace) -> float:
    """Median ratio of wall to CPU time of our own calls."""
    if options.device != "cpu" or options.threads != 1:
        return 1.0
    shares = [row.wall_median_us / row.cpu_median_us for row in rows if row.peer == OURS]
    return sorted(shares)[len(shares) // 2]


def _write(
    options: argparse.Namespace,
    about: dict[str, object],
    rows: Sequence[results.Row],
    doubts: Sequence[str],
    pages: ModuleType | None,
) -> None:
    for option, path, write in (
        ("--csv", options.csv, lambda path: results.write_csv(path, about, rows)),
        ("--json", options.json, lambda path: results.write_json(path, about, rows, doubts)),
        ("--html", options.html, lambda path: pages and pages.write(path, about, rows, doubts)),
    ):
        if path is not None:
            with written(option, path) as part:
                write(part)
    if options.plots is not None and pages is not None:
        for picture in pages.pictures(rows):
            with written("--plots", options.plots / f"{picture.name}.svg") as part:
                part.write_text(picture.svg, encoding="utf-8")


def _compare(old: Path, new: Path) -> int:
    before, after = results.read(old), results.read(new)
    found = results.changes(before, after, OURS, EAGER)
    for change in found:
        print(f"{'WORSE ' if change.worse else '      '}{change.text}")
    ours = sum(row.peer == OURS for row in before)
    worse = sum(change.worse for change in found)
    print(f"{ours} cases, {len(found)} changes, {worse} for the worse")
    return 1 if worse else 0
