"""Run emulated kernels on many arguments and compare with the reference: `python check.py JOBS`.

Jobs are a list in JSON, each with "library", "ops" (all of them if it is empty) and "environment". Each has a process
of its own, for sanitizers and kernels with bugs: a fork, as importing takes longer than most checks. The last line of
its output says what was found: "ok", "wrong value" or the emulation's complaint; a sanitizer ends the process itself.
Prints a list of exit codes, outputs and errors in JSON.
"""

from __future__ import annotations

import copy
import json
import os
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import emulated
from cases import raw_arguments
from gpkernels import ops


def rows(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype)


def penalty_arguments() -> list[tuple[Any, ...]]:
    """Rows of every length and alignment that the kernels tell apart."""
    offset = rows(3 * 16 + 1)[1:].view(3, 16)  # contiguous, but not on 16 bytes
    half = rows(5 * 24 + 1, dtype=torch.float16)[1:].view(5, 24)
    shapes = ((1, 1), (3, 7), (5, 8), (40, 4), (300, 2), (2, 1001), (2, 20000), (1, 70001))
    return [(x, 1.0, False, 1, 2.0) for x in (offset, half, *(rows(*shape) for shape in shapes))]


def score_arguments() -> list[list[Tensor]]:
    """Scores of one warp, of one block and of several, with and without a tail, aligned and not."""
    long, half = rows(20003), rows(5003, dtype=torch.bfloat16)
    return [[long, long[1:701]], [long[1:], long[:20000]], [half, half[4:]], [long[:130]], [long[:16], long[1:17]]]


def arguments(name: str) -> list[tuple[Any, ...]]:
    found = raw_arguments()[name]
    one = torch.tensor(0.7)
    if name in ("score_loss", "score_loss_backward"):
        more = [(x, [2, 7][: len(x)], [0.0, 0.5][: len(x)]) for x in score_arguments()]
        found = [*found, *(more if name == "score_loss" else [(one, *given) for given in more])]
    if name in ("relativistic_loss", "relativistic_loss_backward"):
        pairs = [(x[0][: len(x[-1])], x[-1]) for x in score_arguments()]
        found = [*found, *(pairs if name == "relativistic_loss" else [(one, *pair) for pair in pairs])]
    if name == "gradient_norm_penalty":
        found = [*found, *penalty_arguments()]
    if name == "gradient_norm_penalty_backward":
        found = [*found, *((one, a[0], torch.rand(len(a[0]))) for a in penalty_arguments())]
    return found


def check(name: str, kernel: Any) -> None:
    for given in arguments(name):
        op = ops.ALL[name]
        if op.overload._schema.is_mutable:
            other = copy.deepcopy(given)
            kernel(*given)
            op.implementation(*other)
            torch.testing.assert_close(given, other)
        else:
            exact = op.implementation(*given)
            torch.testing.assert_close(kernel(*given), exact, rtol=2e-3 if _is_half(given) else 2e-5, atol=1e-5)


def _is_half(given: tuple[Any, ...]) -> bool:
    return any(isinstance(x, Tensor) and x.dtype in (torch.float16, torch.bfloat16) for x in tree_leaves(list(given)))


def run(job: dict[str, Any]) -> None:
    os.environ.update(job["environment"])
    torch.manual_seed(0)
    kernels = emulated.kernels(Path(job["library"]))
    try:
        for name in job["ops"] or kernels:
            check(name, kernels[name])
    except AssertionError:
        print("wrong value")
    except RuntimeError as error:
        print(str(error).splitlines()[0])
    else:
        print("ok")


def in_a_fork(job: dict[str, Any]) -> tuple[int, str, str]:
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        child = os.fork()
        if child == 0:
            os.dup2(out.fileno(), 1)
            os.dup2(errors.fileno(), 2)
            code = 1
            try:
                run(job)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        out.seek(0)
        errors.seek(0)
        return code, out.read(), errors.read()


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps([in_a_fork(job) for job in json.loads(sys.argv[1])]))
