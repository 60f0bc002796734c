"""``gpkernels train``: reads the command line, trains, reports."""

from __future__ import annotations

import io
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stderr

import torch
import tyro

from gptrainer.checkpoint import NAME
from gptrainer.config import TrainConfig, filled
from gptrainer.data import DATASETS
from gptrainer.defaults import SYSTEMS
from gptrainer.errors import UserError
from gptrainer.interruption import Stopped
from gptrainer.loop import Trainer
from gptrainer.models import NETWORKS
from gptrainer.processes import Processes, local_device

PROGRAM = "gpkernels train"


def main(argv: Sequence[str]) -> int:
    """Returns the exit code: 0, 2 for what the user can put right (one line on stderr), 130 after Ctrl-C."""
    if "--list" in argv:
        print(listing())
        return 0
    trainer: Trainer | None = None
    processes = Processes()
    try:
        config = parse(argv)
        if config is None:
            return 0
        processes = _prepare(config)
        begun = time.perf_counter()
        trainer = Trainer(config, processes)
        trainer.train()
        seconds = time.perf_counter() - begun
        if processes.writes:
            from gptrainer.report import write_report  # matplotlib only where pictures are drawn

            for line in write_report(trainer, seconds):
                print(line)
        return 0
    except UserError as error:
        return _fail(str(error), processes)
    except OSError as error:
        return _fail(f"{error.filename or 'a file'}: {error.strerror or error}", processes)
    except KeyboardInterrupt as stop:
        if processes.writes:
            print(f"{PROGRAM}: stopped{_whereabouts(trainer, stop)}", file=sys.stderr)
        return 128 + (stop.signal if isinstance(stop, Stopped) else signal.SIGINT)
    finally:
        processes.leave()


def listing() -> str:
    """A line for each system, each data set and each pair of networks."""
    width = max(map(len, (*SYSTEMS, *DATASETS, *NETWORKS)))
    systems = [f"  {name:<{width}}  {system.summary}" for name, system in SYSTEMS.items()]
    data = [f"  {name:<{width}}  {data.description}" for name, data in DATASETS.items()]
    networks = [f"  {name:<{width}}  {network.description}" for name, network in NETWORKS.items()]
    title = f"{PROGRAM} NAME --data DATA --network NETWORK"
    return "\n".join([title, "", "NAME", *systems, "", "DATA", *data, "", "NETWORK", *networks])


def _whereabouts(trainer: Trainer | None, stop: KeyboardInterrupt) -> str:
    if trainer is None:
        return ""
    path = trainer.checkpoints.path
    kept = isinstance(stop, Stopped) or path.is_file()
    return f" at step {trainer.step}" + (f"; {path} holds it, --resume goes on" if kept else "")


def parse(argv: Sequence[str]) -> TrainConfig | None:
    """The complete config, or None after --help; UserError with one line for what cannot be read."""
    complaint = io.StringIO()
    try:
        with redirect_stderr(complaint):
            config = tyro.cli(TrainConfig, prog=PROGRAM, args=argv, config=(tyro.conf.FlagCreatePairsOff,))
    except SystemExit as end:
        if not end.code:
            return None
        raise UserError(_one_line(complaint.getvalue())) from None
    return config.complete()


def _one_line(message: str) -> str:
    """What tyro says, without its title, its frame (of lines, or of dashes in plain terminals) and its advice."""
    paragraphs: list[list[str]] = [[]]
    for line in message.splitlines():
        text = line.strip("\u2502 ")
        if not text.strip("-\u2500") or text[0] in "\u256d\u2570":
            paragraphs.append([])
        else:
            paragraphs[-1].append(text)
    told = [" ".join(paragraph) for paragraph in paragraphs if paragraph]
    framed = "\u256d" in message  # then the title stands in the frame
    return next(iter(told[0 if framed else 1 :]), "the command line could not be read")


def _prepare(config: TrainConfig) -> Processes:
    """Threads, device and the other processes, before anything is built."""
    torch.set_num_threads(config.threads)
    try:
        device = local_device(config.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch has no one type for this
        reason = str(error).splitlines()[0]
        raise UserError(
            f"--device: expected a device that torch can use here, got {config.device} ({reason})"
        ) from None
    processes = Processes.join(device)
    if processes.writes and not config.resume and (filled(config.out) / NAME).is_file():
        print(f"starting anew in {config.out}; --resume would go on from its checkpoint", file=sys.stderr)
    return processes


def _fail(text: str, processes: Processes) -> int:
    if processes.writes:
        print(f"{PROGRAM}: {text}", file=sys.stderr)
    return 2
