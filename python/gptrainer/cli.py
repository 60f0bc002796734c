"""``gpkernels train``: reads the command line, trains, reports."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stderr

import torch
import tyro

from gptrainer import checkpoint
from gptrainer.config import TrainConfig, filled
from gptrainer.errors import UserError
from gptrainer.loop import Stopped, Trainer

PROGRAM = "gpkernels train"


def main(argv: Sequence[str]) -> int:
    """Returns the exit code: 0, 2 for what the user can put right (one line on stderr), 130 after Ctrl-C."""
    trainer: Trainer | None = None
    try:
        config = parse(argv)
        if config is None:
            return 0
        _prepare(config)
        begun = time.perf_counter()
        trainer = Trainer(config)
        trainer.train()
        seconds = time.perf_counter() - begun
        from gptrainer.report import write_report  # matplotlib only where pictures are drawn

        for line in write_report(trainer, seconds):
            print(line)
        return 0
    except UserError as error:
        return _fail(str(error))
    except OSError as error:
        return _fail(f"{error.filename or 'a file'}: {error.strerror or error}")
    except KeyboardInterrupt as stop:
        kept = isinstance(stop, Stopped) or (trainer is not None and trainer.checkpoint_path.is_file())
        where = f"; {trainer.checkpoint_path} holds it, --resume goes on" if kept and trainer is not None else ""
        at = f" at step {trainer.step}" if trainer is not None else ""
        print(f"{PROGRAM}: stopped{at}{where}", file=sys.stderr)
        return 130


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


def _prepare(config: TrainConfig) -> None:
    """Threads and device, before anything is built."""
    torch.set_num_threads(config.threads)
    try:
        torch.empty(0, device=config.device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch has no one type for this
        reason = str(error).splitlines()[0]
        raise UserError(
            f"--device: expected a device that torch can use here, got {config.device} ({reason})"
        ) from None
    if not config.resume and (filled(config.out) / checkpoint.NAME).is_file():
        print(f"starting anew in {config.out}; --resume would go on from its checkpoint", file=sys.stderr)


def _fail(text: str) -> int:
    print(f"{PROGRAM}: {text}", file=sys.stderr)
    return 2
