"""The CUDA kernels compile for every architecture, without spills, within a tracked budget, and register their ops."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

import compiled
from emulated import TORCH

pytestmark = pytest.mark.skipif(compiled.nvcc() is None, reason="there is no nvcc")


@pytest.mark.parametrize("part", compiled.PARTS, ids=str)
def test_no_kernel_spills_registers(part: compiled.Part) -> None:
    rows = part.resources()
    assert {row["target"] for row in rows} == {f"sm_{a}" for a in part.architectures}
    assert not [row for row in rows if row["spilled_bytes"]]


def test_every_kernel_is_in_the_table_for_every_architecture() -> None:
    found = {(row["kernel"], row["target"]) for row in compiled.resources()}
    assert found == set(compiled.tracked())
    assert {target for _, target in found} == {f"sm_{a}" for a in compiled.ARCHITECTURES}


@pytest.mark.skipif(compiled.nvcc() is not None and compiled.release() != "13.0", reason="the table is nvcc 13.0's")
def test_the_table_says_what_kernels_need() -> None:
    now = {(row["kernel"], row["target"]): {c: row[c] for c in compiled.COLUMNS[2:]} for row in compiled.resources()}
    assert now == compiled.tracked()


def _cuobjdump() -> Path | None:
    found = importlib.util.find_spec("triton")
    path = Path(str(found.origin)).parent / "backends/nvidia/bin/cuobjdump" if found else None
    return path if path and path.exists() else None


# Kernels, and what marks the wide variants among theirs; clipping has both widths in one.
WIDE = [("interpolate", "interpolate_kernel", "Li(2|4|8)E"), ("interpolate", "split_kernel", "Li(2|4|8)E")]


@pytest.mark.parametrize(("stem", "kernel", "mark"), [*WIDE, ("weights", "clip_kernel", "")])
def test_wide_variants_load_and_store_sixteen_bytes(stem: str, kernel: str, mark: str) -> None:
    tool = _cuobjdump()
    if tool is None:
        pytest.skip("Triton, which brings cuobjdump, is not installed")
    (part,) = [p for p in compiled.PARTS if 90 in p.architectures and stem in [source.stem for source in p.sources]]
    part.resources()
    command = [str(tool), "-sass", "-arch", "sm_90", str(part.object)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    wide = [
        body
        for name, body in re.findall(r"Function : (\S+)\n(.*?)(?=Function :|\Z)", text, re.DOTALL)
        if kernel in name and re.search(mark, name)
    ]
    assert len(wide) == 4  # double, float, half, bfloat16
    assert all(re.search(r"LDG\.E\.128", body) and re.search(r"STG\.E\.128", body) for body in wide)


# Loads the kernels where there is no CUDA: a library with the one name that they want of PyTorch's CUDA half.
STUB = 'extern "C" int aoti_torch_get_current_cuda_stream(int, void**) { return 1; }'
SCRIPT = """
import ctypes, sys
ctypes.CDLL(sys.argv[1], ctypes.RTLD_GLOBAL)
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
import gpkernels as gpk
from gpkernels import ops
torch.ops.load_library(sys.argv[2])
has = torch._C._dispatch_has_kernel_for_dispatch_key
print({name.partition("_attention")[0] for name in ops.ALL if not has("gpkernels::" + name, "CUDA")})
with FakeTensorMode():
    real, fake = (torch.empty(4, 3, 8, 8, device="cuda") for _ in range(2))
    print(gpk.interpolate(real, fake).device.type, gpk.gradient_norm_penalty(real).device.type)
"""


def test_the_kernels_register_for_cuda_tensors(tmp_path: Path) -> None:
    stub, library = tmp_path / "stub.so", tmp_path / "kernels.so"
    subprocess.run(["g++", "-shared", "-fPIC", "-x", "c++", "-", "-o", str(stub)], input=STUB, text=True, check=True)
    objects = compiled.objects(90)
    link = [
        str(compiled.nvcc()),
        "-shared",
        "-o",
        str(library),
        *map(str, objects),
        f"-L{TORCH / 'lib'}",
        "-ltorch_cpu",
    ]
    subprocess.run(link, check=True, capture_output=True)
    command = [sys.executable, "-c", SCRIPT, str(stub), str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["{'scaled_dot_product'}", "cuda cuda"]
