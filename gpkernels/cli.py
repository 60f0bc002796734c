"""`gpkernels info | train`: the first is here, the trainer brings its own command line."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Sequence

from gpkernels import info

EXTRA = ("sklearn", "scipy", "matplotlib", "tqdm", "tyro", "safetensors")  # what the "train" extra installs


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0 on success, 2 for a user's mistake."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["train"]:
        return _train(arguments[1:])
    parser = argparse.ArgumentParser(prog="gpkernels", description="Exact gradient penalties in PyTorch, fast.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    describe = commands.add_parser("info", help="which backend runs, why, and how it was built")
    describe.add_argument("--json", action="store_true", help="print the facts as JSON")
    commands.add_parser("train", help="train a GAN with these ops; `gpkernels train --help`", add_help=False)
    options = parser.parse_args(arguments)
    print(json.dumps(info.facts(), indent=2) if options.json else info.render())
    return 0


def _train(arguments: Sequence[str]) -> int:
    # Asked beforehand: some are first imported when the run is over.
    missing = [name for name in ("gptrainer", *EXTRA) if importlib.util.find_spec(name) is None]
    if missing:
        lack = ", ".join(missing)
        print(f"gpkernels train needs {lack}; install it with: pip install 'gpkernels[train]'", file=sys.stderr)
        return 2
    from gptrainer.cli import main as train

    return train(arguments)


if __name__ == "__main__":
    sys.exit(main())
