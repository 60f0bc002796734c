"""``gpkernels train``: read the command line, train, report."""

from __future__ import annotations

import argparse
import io
import re
import signal
import time
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import fields
from functools import partial
from typing import Any, cast

import torch

from gpkernels.arguments import UserError, check_folder
from gptrainer.checkpoint import NAME
from gptrainer.config import TrainConfig, flag
from gptrainer.data import DATASETS
from gptrainer.loop import Trainer
from gptrainer.models import NETWORKS
from gptrainer.processes import ALONE, Processes, local_device
from gptrainer.stopping import Stopped
from gptrainer.systems import SYSTEMS, configure

PROGRAM = "gpkernels train"
DESCRIPTION = f"Train a GAN; write samples, curves, metrics and weights. `{PROGRAM} --list` describes what there is."


def main(argv: Sequence[str]) -> int:
    """Return the exit code: 0, 2 after a user's mistake (one line on stderr), 128 + its number after a signal."""
    if "--list" in argv:
        print(listing())
        return 0
    trainer: Trainer | None = None
    processes = ALONE
    try:
        config = parse(argv)
        if config is None:
            return 0
        processes = _prepare(config)
        start = time.perf_counter()
        trainer = Trainer(config, processes)
        if trainer.step >= config.steps:
            processes.say(f"the run in {config.out} is finished, at step {trainer.step}; a larger --steps continues it")
        trainer.train()
        seconds = time.perf_counter() - start
        if processes.writes:
            from gptrainer.report import write_report  # matplotlib is imported only where pictures are drawn

            print("\n".join(write_report(trainer, seconds)))
        return 0
    except UserError as error:
        processes.say(f"{PROGRAM}: {error}")
        return 2
    except OSError as error:
        processes.say(f"{PROGRAM}: {error.filename or 'a file'}: {error.strerror or error}")
        return 2
    except KeyboardInterrupt as stop:
        note = "stopped" if trainer is None else f"stopped at step {trainer.step}"
        if trainer is not None and trainer.checkpoints.path.is_file():
            note += f"; use --resume to continue from {trainer.checkpoints.path}"
        processes.say(f"{PROGRAM}: {note}")
        return 128 + (stop.args[0] if isinstance(stop, Stopped) else signal.SIGINT)
    finally:
        processes.leave()


def listing() -> str:
    """Describe each system, data set and network on a line of its own."""
    tables = {
        "SYSTEM": {name: str(system.__doc__) for name, system in SYSTEMS.items()},
        "DATA": {name: data.description for name, data in DATASETS.items()},
        "NETWORK": {name: network.description for name, network in NETWORKS.items()},
    }
    lines = [f"{PROGRAM} SYSTEM --data DATA --network NETWORK"]
    for heading, texts in tables.items():
        lines += ["", heading, *(f"  {name:<16} {text}" for name, text in texts.items())]
    return "\n".join(lines)


def parse(argv: Sequence[str]) -> TrainConfig | None:
    """Read a command line; None after --help, UserError with one line for what cannot be read."""
    if argv and not argv[0].startswith("-") and argv[0] not in SYSTEMS:
        raise UserError(f"SYSTEM: expected one of {', '.join(SYSTEMS)}, got {argv[0]}")
    import tyro  # the list of systems can do without

    complaint = io.StringIO()
    read = partial(tyro.cli, prog=PROGRAM, description=DESCRIPTION, config=(tyro.conf.FlagCreatePairsOff,))
    try:
        with redirect_stderr(complaint):
            config, unknown = read(_systems(argv), args=argv, return_unknown_args=True)
    except SystemExit as end:
        if not end.code:
            return None
        # tyro's complaint is between the first two rules of its message.
        said = re.split(r"^.*[-\u2500]{3}.*$", complaint.getvalue().replace("\u2502", ""), flags=re.MULTILINE)[1]
        raise UserError(" ".join(said.split())) from None
    if unknown:
        option = unknown[0].partition("=")[0]
        others = [name for name, system in SYSTEMS.items() if option in {flag(field.name) for field in fields(system)}]
        if config.algorithm in others:
            raise UserError(f"{option}: expected after the name of the system, {config.algorithm}")
        takers = f"; it belongs to {', '.join(others)}" if others else ""
        raise UserError(f"{option}: not an option of {config.algorithm}{takers}")
    return cast(TrainConfig, config)


def _systems(argv: Sequence[str]) -> Any:
    """Make the union of all systems' options, with defaults for the data and the network on the command line."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    early.add_argument("--data", nargs="?", default="digits")
    early.add_argument("--network", nargs="?")
    named = early.parse_known_args(argv)[0]
    data = named.data if named.data in DATASETS else "digits"  # an unknown name is refused with the other options
    network = named.network if named.network in NETWORKS else None
    from tyro.extras import subcommand_type_from_defaults

    return subcommand_type_from_defaults({name: configure(name, data, network=network) for name in SYSTEMS})


def _prepare(config: TrainConfig) -> Processes:
    """Set the threads, check the device and join the other processes."""
    torch.set_num_threads(config.threads)
    try:
        device = local_device(config.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch has no one type for this
        reason = str(error).splitlines()[0]
        raise UserError(f"--device: expected a device available to torch, got {config.device} ({reason})") from None
    processes = Processes.join(device)
    if processes.writes:
        check_folder("--out", config.out)
    if not config.resume and (config.out / NAME).is_file():
        processes.say(f"starting over in {config.out}; use --resume to continue from its checkpoint")
    return processes
