"""``gpkernels reproduce``: read the command line, run, write the report."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from gpkernels.arguments import Parser, UserError, check_folder, count
from gptrainer.reproduce import runner
from gptrainer.reproduce.experiment import Context, Experiment, Size
from gptrainer.reproduce.experiments import every, find
from gptrainer.stopping import Stopped

if TYPE_CHECKING:
    from gptrainer.reproduce.report import Section

PROGRAM = "gpkernels reproduce"


def main(argv: Sequence[str]) -> int:
    """Return the exit code.

    0; 1 if an experiment crashed or, with --strict, a claim failed; 2 after a user's mistake; 128 + its number after a
    signal.
    """
    try:
        options = _parser().parse_args(argv)
        size: Size = "quick" if options.quick else "full"
        chosen = _chosen(options.names)
        if options.list:
            _print_list(chosen)
            return 0
        if options.data_dir is not None and not options.data_dir.is_dir():
            raise UserError(f"--data-dir: expected a folder, got {options.data_dir}")
        check_folder("--out", options.out)
        from gptrainer.reproduce import report  # experiments are listed without its packages

        context = Context(options.data_dir)
        with _terminable():
            outcomes = runner.run(
                chosen, size, options.out, context, jobs=options.jobs, seeds=options.seeds, fresh=options.fresh
            )
        sections = report.sections(outcomes, size)
        page, data = report.write(options.out, sections, size)
    except UserError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{PROGRAM}: {error.filename or 'a file'}: {error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"{PROGRAM}: stopped; finished runs are kept, and the same command continues", file=sys.stderr)
        return 128 + (stop.args[0] if isinstance(stop, Stopped) else signal.SIGINT)
    failures = _print_results(sections)
    print(f"report  {page}\nnumbers {data}")
    return int(any(outcome.crashed for outcome in outcomes) or (options.strict and failures > 0))


def _print_results(sections: Sequence[Section]) -> int:
    """Print the tally of each experiment and the claims that did not hold; return the number of those that failed."""
    from gptrainer.reproduce.report import number

    failures = 0
    for section in sections:
        print(f"{section.experiment.name:<22} {section.tally}")
        for judged in section.claims:
            verdict, interval = judged.judgement.verdict, judged.judgement.interval
            if verdict in ("failed", "undecided"):
                failures += verdict == "failed"
                measured = number(judged.judgement.mean)
                if interval:
                    measured += f", interval {number(interval[0])} to {number(interval[1])}"
                wanted = f"{'not ' if verdict == 'failed' else 'to be '}{judged.claim.bound}"
                cause = f"; {judged.judgement.reason}" if judged.judgement.reason else ""
                print(f"  {verdict}: {judged.claim.text} ({judged.claim.what}: {measured}, {wanted}{cause})")
    return failures


@contextmanager
def _terminable() -> Iterator[None]:
    """Raise Stopped on SIGTERM, so that child processes are ended."""

    def stop(number: int, _: FrameType | None) -> None:
        raise Stopped(number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog=PROGRAM, description="Reproduce published results and report a verdict on each claim.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="names of experiments, or all (the default)")
    parser.add_argument("--list", action="store_true", help="list the experiments and exit")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="small sizes: minutes on two cores, where the full set takes hours",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/reproduce"),
        metavar="DIR",
        help="results and report (default: %(default)s)",
    )
    parser.add_argument("--seeds", type=count, metavar="N", help="number of seeds, instead of that of each experiment")
    parser.add_argument(
        "--jobs",
        type=count,
        default=min(2, os.cpu_count() or 1),
        metavar="N",
        help="parallel runs, one core each (default: %(default)s)",
    )
    parser.add_argument("--fresh", action="store_true", help="discard earlier results and run everything again")
    parser.add_argument("--strict", action="store_true", help="exit with 1 if a claim failed")
    parser.add_argument(
        "--data-dir", type=Path, metavar="DIR", help="folder of Fashion-MNIST's files, if not Debian's default"
    )
    return parser


def _chosen(names: Sequence[str]) -> list[Experiment]:
    """Look up experiments by name, in the order of the report."""
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
        needs = f"; needs {experiment.needs}" if experiment.needs else ""
        print(f"{experiment.name:<22} {experiment.title} ({claims}; {experiment.source}{needs})")
