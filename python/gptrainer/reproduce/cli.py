"""``gpkernels reproduce``: reads the command line, runs, writes the report."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from gpkernels.arguments import count
from gptrainer.errors import UserError
from gptrainer.interruption import Stopped, terminable
from gptrainer.reproduce import report, runner
from gptrainer.reproduce.experiment import Context, Experiment, Size
from gptrainer.reproduce.experiments import every, find

PROGRAM = "gpkernels reproduce"


def main(argv: Sequence[str]) -> int:
    """Returns the exit code: 0, 1 if an experiment broke, 2 for a mistake, 128 + its number after a signal."""
    try:
        options = _parser().parse_args(argv)
        size: Size = "quick" if options.quick else "full"
        chosen = _chosen(options.names)
        if options.list:
            _print_list(chosen)
            return 0
        context = Context(options.data_dir)
        with terminable():
            outcomes = runner.run(
                chosen, size, options.out, context, jobs=options.jobs, seeds=options.seeds, fresh=options.fresh
            )
        told = report.sections(outcomes, size)
        page, data = report.write(options.out, told, size)
    except UserError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{PROGRAM}: {error.filename or 'a file'}: {error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"{PROGRAM}: stopped; runs that had ended are kept, the same command goes on", file=sys.stderr)
        return 128 + (stop.signal if isinstance(stop, Stopped) else signal.SIGINT)
    for section in told:
        print(f"{section.experiment.name:<22} {section.tally}")
        for judged in section.claims:
            if judged.judgement.verdict == "failed":
                measured = report.number(judged.judgement.mean)
                print(f"  failed: {judged.claim.text} ({judged.claim.what}: {measured}, not {judged.claim.bound})")
    print(f"report  {page}\nnumbers {data}")
    return 1 if any(outcome.crashed for outcome in outcomes) else 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog=PROGRAM, description="Measure again what the papers published, and report it with verdicts.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="experiments, or all (the default)")
    parser.add_argument("--list", action="store_true", help="name the experiments, and end")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="small sizes: minutes on two cores, where the full set takes up to two hours",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/reproduce"),
        metavar="DIR",
        help="results and report (default: %(default)s)",
    )
    parser.add_argument("--seeds", type=count, metavar="N", help="seeds of each experiment, in place of its own number")
    parser.add_argument(
        "--jobs",
        type=count,
        default=min(2, os.cpu_count() or 1),
        metavar="N",
        help="runs at a time, a core each (default: %(default)s)",
    )
    parser.add_argument("--fresh", action="store_true", help="run again what has a result")
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="where image data lies, if not in its usual place")
    return parser


def _chosen(names: Sequence[str]) -> list[Experiment]:
    """In the report's order, each once."""
    experiments = every()
    if not names or "all" in names:
        return experiments
    for name in names:
        try:
            find(name)
        except KeyError:
            known = ", ".join(experiment.name for experiment in experiments)
            raise UserError(f"unknown experiment {name}; expected all or some of: {known}") from None
    return [experiment for experiment in experiments if experiment in [find(name) for name in names]]


def _print_list(experiments: Sequence[Experiment]) -> None:
    for experiment in experiments:
        claims = f"{len(experiment.claims)} claim" + "s" * (len(experiment.claims) > 1)
        print(f"{experiment.name:<22} {experiment.title} ({claims}; {experiment.source})")
