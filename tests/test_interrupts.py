"""Ctrl-C at chosen moments of every command: one line, exit code 130, and every file whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import nn

from gptrainer.checkpoint import read

# Run a command, with a SIGINT where a function of this name is called for the so manieth time.
CODE = """
import signal, sys
from gpkernels.cli import main

def watch(frame, event, _):
    global left
    if event == "call" and frame.f_code.co_name == name:
        left -= 1
        if left == 0:
            sys.setprofile(None)
            signal.raise_signal(signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background of a shell ignores it
name, left = sys.argv[1], int(sys.argv[2])
sys.setprofile(watch)
sys.exit(main(sys.argv[3:]))
"""
CRITIC = "test_interrupts:Critic --input 4x2"
TRAINING = "--data 8gaussians --width 8 --batch-size 16 --steps 3 --checkpoint-every 1"
COMMANDS: dict[str, tuple[str, dict[str, int]]] = {  # arguments, and moments; JSON is encoded by _iterencode_dict
    "info": ("info", {"facts": 1}),
    "explain": (f"explain {CRITIC}", {"explain": 1}),
    "approximate": (
        f"explain {CRITIC} --approximate --draws 2 --json old.json --plot old.svg",
        {"compare": 1, "_iterencode_dict": 3, "plot": 1},
    ),
    "verify": (
        "verify --quick --op penalty_two_sided --dtype float32 --json old.json",
        {"check_op": 1, "_iterencode_dict": 3},
    ),
    "bench": (
        "bench ops --quick --seconds 0.001 --case penalty --csv old.csv --json old.json --html old.html",
        {"measure": 2, "_iterencode_dict": 3, "pictures": 1},
    ),
    "train": (f"train wgan-gp {TRAINING} --out run", {"parse": 1, "load_batches": 1, "pack": 1, "write_report": 1}),
    "reproduce": ("reproduce cauchy-gradients --quick --jobs 1 --out run", {"_reason": 1, "sections": 1}),
}
CASES = [(command, moment) for command, (_, moments) in COMMANDS.items() for moment in moments]
WHOLE: dict[str, Callable[[str], object]] = {
    ".csv": lambda text: text.endswith("\n") and "penalty" in text,
    ".html": lambda text: text.rstrip().endswith("</html>"),
    ".json": json.loads,
    ".svg": lambda text: text.rstrip().endswith("</svg>"),
}


class Critic(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(2, 1))


@pytest.mark.parametrize(("command", "moment"), CASES)
def test_ctrl_c_is_one_line_and_130_and_leaves_files_whole(command: str, moment: str, tmp_path: Path) -> None:
    line, moments = COMMANDS[command]
    arguments = line.split()
    old = [tmp_path / name for name in arguments if name.startswith("old.")]
    for path in old:
        path.write_text("before")
    given = [sys.executable, "-c", CODE, moment, str(moments[moment]), *arguments]
    search = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(given, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": search})
    assert done.returncode == 130, done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"gpkernels {arguments[0]}: stopped")
    assert "Traceback" not in done.stderr
    assert "ignored" not in done.stderr
    assert not [path for path in tmp_path.rglob("*") if ".part" in path.name]
    for path in old:
        assert (text := path.read_text()) == "before" or WHOLE[path.suffix](text)
    for path in (tmp_path / "run").rglob("*.json"):
        json.loads(path.read_text())
    for path in (tmp_path / "run").rglob("checkpoint*.pt"):
        read(path)
