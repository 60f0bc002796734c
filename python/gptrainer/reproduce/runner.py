"""Run the experiments that have no result yet, one task for each seed, in parallel processes."""

from __future__ import annotations

import multiprocessing
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

import torch

from gptrainer.reproduce import store
from gptrainer.reproduce.experiment import Context, Experiment, Findings, NotRun, Size
from gptrainer.reproduce.experiments import find


@dataclass
class Outcome:
    """Findings of an experiment over the seeds, their duration, and the reason if there are none."""

    experiment: Experiment
    findings: list[Findings] = field(default_factory=list)
    seconds: float = 0.0
    reason: str = ""
    crashed: bool = False


@dataclass(frozen=True)
class Task:
    """One seed of an experiment. The experiment is named, so that a task can be pickled."""

    name: str
    seed: int
    size: Size
    out: Path
    context: Context


def run(
    experiments: Sequence[Experiment],
    size: Size,
    out: Path,
    context: Context,
    *,
    jobs: int,
    seeds: int | None,
    fresh: bool,
) -> list[Outcome]:
    """Run experiments and return their outcomes in order. seeds: their number, by default the experiment's own."""
    tasks = [
        Task(experiment.name, seed, size, out, context)
        for experiment in experiments
        for seed in range(seeds or experiment.seeds[size])
    ]
    if fresh:
        for task in tasks:
            store.path_of(out, find(task.name), size, task.seed).unlink(missing_ok=True)
    due = [task for task in tasks if _stored(task) is None]
    failures = _run_all(due, len(tasks), jobs)
    return [
        _gather(experiment, [task for task in tasks if task.name == experiment.name], failures)
        for experiment in experiments
    ]


def run_task(task: Task) -> str:
    """Measure and store. Return the reason of a failure, a traceback if it is unexpected; empty after success."""
    experiment = find(task.name)
    torch.set_num_threads(1)  # seeds share the cores, and the same count gives the same bits
    torch.manual_seed(task.seed)
    begun = time.perf_counter()
    try:
        findings = experiment.measure(experiment.settings[task.size], task.seed, task.context)
    except NotRun as reason:
        return str(reason)
    except Exception:  # an experiment that crashes must not end the others
        return traceback.format_exc()
    path = store.path_of(task.out, experiment, task.size, task.seed)
    store.save(path, experiment, task.size, task.seed, findings, time.perf_counter() - begun)
    return ""


def _run_all(due: Sequence[Task], total: int, jobs: int) -> dict[tuple[str, int], str]:
    """Run tasks; return the reasons of those that failed, by name and seed."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    failures: dict[tuple[str, int], str] = {}
    if not due:
        return failures
    pace = 0.1 if sys.stderr.isatty() else 10.0  # a log file wants few lines
    processes = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(jobs, processes)
    with tqdm(total=total, initial=total - len(due), desc="reproduce", unit="run", mininterval=pace) as bar:
        try:
            left = _submitted(pool, due)
            while left:
                bar.set_postfix_str(
                    ", ".join(_label(task) for future, task in left.items() if future.running()),
                    refresh=sys.stderr.isatty(),
                )
                done, _ = wait(left, timeout=2.0, return_when=FIRST_COMPLETED)
                for future in done:
                    task = left.pop(future)
                    reason = _reason(future)
                    if reason:
                        failures[task.name, task.seed] = reason
                    bar.update()
        except BaseException:
            for process in list((pool._processes or {}).values()):
                process.terminate()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        pool.shutdown()
    return failures


def _submitted(pool: ProcessPoolExecutor, due: Sequence[Task]) -> dict[Future[str], Task]:
    """Start the processes, which leave SIGINT to this one: they inherit that it is ignored, from their imports on."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        return {pool.submit(run_task, task): task for task in due}
    finally:
        signal.signal(signal.SIGINT, before)


def _reason(future: Future[str]) -> str:
    try:
        return future.result()
    except BrokenExecutor:
        return "its process or another one was killed; the same command continues"


def _gather(experiment: Experiment, tasks: Sequence[Task], failures: dict[tuple[str, int], str]) -> Outcome:
    outcome = Outcome(experiment)
    for task in tasks:
        stored = _stored(task)
        if stored is not None:
            outcome.findings.append(stored[0])
            outcome.seconds += stored[1]
        elif not outcome.reason:
            text = failures[task.name, task.seed].rstrip()
            outcome.crashed = text.startswith("Traceback")
            outcome.reason = text.splitlines()[-1] if outcome.crashed else text
            if outcome.crashed:
                print(f"gpkernels reproduce: {_label(task)}:\n{text}", file=sys.stderr)
    return outcome


def _stored(task: Task) -> tuple[Findings, float] | None:
    experiment = find(task.name)
    return store.load(store.path_of(task.out, experiment, task.size, task.seed), experiment, task.size, task.seed)


def _label(task: Task) -> str:
    return f"{task.name} #{task.seed}"
