"""What every Triton kernel takes of a device: compiled ahead of time, with the arguments that its launcher passes.

Run as a program it prints the table as JSON; it needs triton and no device, and must not run under TRITON_INTERPRET.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import gpkernels.triton
from gpkernels.reference import REDUCTIONS

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx90a": GPUTarget("hip", "gfx90a", 64),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TYPES = {torch.float64: "fp64", torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
TYPES |= {torch.int64: "i64", torch.int32: "i32"}


def calls(dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    """One call for each variant of a kernel that is worth a row; sizes are those of a small image critic."""
    kernels = gpkernels.triton.KERNELS
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x, y = torch.zeros(64, 3, 32, 32, dtype=dtype), torch.zeros(64, 3, 32, 32, dtype=dtype)
    points, long = torch.zeros(256, 2, dtype=dtype), torch.zeros(4, 65536, dtype=dtype)
    per_row, one, key = torch.zeros(64, dtype=wide), torch.zeros((), dtype=wide), torch.zeros(1, dtype=torch.int64)
    scores, group = torch.zeros(64, 1, dtype=dtype), torch.zeros(64, 8, 1024, dtype=dtype)
    groups = torch.zeros(1, 8, 65536, dtype=dtype)
    last = torch.zeros(16, 64, 8, 8, dtype=dtype).contiguous(memory_format=torch.channels_last)
    mean = REDUCTIONS["mean"]

    def rmsprop(centred: bool, momentum: float) -> None:
        lists = [[torch.zeros(64, 64, dtype=dtype)] for _ in range(5)]
        state = (lists[3] if centred else [], lists[4] if momentum else [])
        kernels["rmsprop_"](*lists[:3], *state, 1e-3, 0.99, 1e-8, 0.1, momentum, False, 0.01)

    return {
        "interpolate": lambda: kernels["interpolate"](x, y, per_row),
        "interpolate of short rows": lambda: kernels["interpolate"](points, points, torch.zeros(256, dtype=wide)),
        "interpolate_random": lambda: kernels["interpolate_random"](x, y, key),
        "interpolate_random of short rows": lambda: kernels["interpolate_random"](points, points, key),
        "interpolate_backward": lambda: kernels["interpolate_backward"](x, per_row, True, True),
        "instance_noise, Gaussian": lambda: kernels["instance_noise"](x, 0.1, one, key, True),
        "instance_noise, uniform": lambda: kernels["instance_noise"](x, 0.1, one, key, False),
        "gradient_norm_penalty": lambda: kernels["gradient_norm_penalty"](x, 1.0, False, mean),
        "gradient_norm_penalty of short rows": lambda: kernels["gradient_norm_penalty"](points, 1.0, True, mean),
        "gradient_norm_penalty of long rows": lambda: kernels["gradient_norm_penalty"](long, 1.0, False, mean),
        "gradient_norm_penalty_backward": lambda: kernels["gradient_norm_penalty_backward"](one, x, per_row),
        "consistency_term": lambda: kernels["consistency_term"](scores, scores, x, y, 0.1, 0.1),
        "lipschitz_consistency of long rows": lambda: kernels["lipschitz_consistency"](
            scores[:4], scores[:4], long, long, 0.1
        ),
        "consistency_backward": lambda: kernels["consistency_backward"](
            one, scores, scores, x, y, per_row, per_row, True
        ),
        "score_loss": lambda: kernels["score_loss"]([scores, scores], [3, 2]),
        "score_loss_backward": lambda: kernels["score_loss_backward"](one, [scores, scores], [3, 2]),
        "clip_weights_": lambda: kernels["clip_weights_"]([torch.zeros(64, 64, dtype=dtype)], 0.01),
        "rmsprop_": lambda: rmsprop(False, 0.0),
        "rmsprop_, centred, with momentum": lambda: rmsprop(True, 0.9),
        "normalise_curvature": lambda: kernels["normalise_curvature"](
            group, torch.zeros(64, 8, 1, dtype=wide), group, group, True
        ),
        "normalise_curvature of long groups": lambda: kernels["normalise_curvature"](
            groups, torch.zeros(1, 8, 1, dtype=wide), groups, groups, True
        ),
        "affine_gradients of planes": lambda: kernels["affine_gradients"](group, group),
        "affine_gradients of columns": lambda: kernels["affine_gradients"](
            *(torch.zeros(4096, 512, 1, dtype=dtype) for _ in range(2))
        ),
        "mean_pool": lambda: kernels["mean_pool"](x, 2, 2),
        "mean_pool, channels last": lambda: kernels["mean_pool"](last, 2, 2),
        "mean_pool_backward": lambda: kernels["mean_pool_backward"](x, 2, 2),
        "mean_pool_backward, channels last": lambda: kernels["mean_pool_backward"](last, 2, 2),
    }


# --- from a call to a source ------------------------------------------------------------------------------------------


def launches(call: Callable[[], Any]) -> list[tuple[Any, dict[str, Any], dict[str, Any]]]:
    """(kernel, arguments by name, compiler options) of what a launcher would launch."""
    found: list[tuple[Any, dict[str, Any], dict[str, Any]]] = []

    def record(kernel: Any, programs: int, device: torch.device, *args: Any, **options: Any) -> None:
        names = [p.name for p in kernel.params]
        arguments = dict(zip(names, args, strict=False)) | {k: v for k, v in options.items() if k in names}
        others = {"enable_fp_fusion": True} | {k: v for k, v in options.items() if k not in names}
        found.append((kernel, arguments, others))

    modules = [m for name, m in sys.modules.items() if name.startswith("gpkernels.triton.") and hasattr(m, "launch")]
    kept = [m.launch for m in modules]
    for m in modules:
        m.launch = record
    try:
        call()
    finally:
        for m, launch in zip(modules, kept, strict=True):
            m.launch = launch
    return found


def _type(value: Any, annotated: str) -> Any:
    if isinstance(value, tuple):
        return tuple(_type(v, annotated) for v in value)
    if isinstance(value, Tensor):
        return f"*{TYPES[value.dtype]}"
    return annotated or "i32"


def _tensors(value: Any, path: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    if isinstance(value, Tensor):
        yield path
    elif isinstance(value, tuple):
        for i, v in enumerate(value):
            yield from _tensors(v, (*path, i))


def source(kernel: Any, arguments: dict[str, Any], vectors: bool = True) -> ASTSource:
    """As the launcher would have it compiled: tensors begin where vector accesses may."""
    signature, constants, aligned = {}, {}, {}
    for i, p in enumerate(kernel.params):
        value = arguments[p.name]
        if p.is_constexpr:
            signature[p.name], constants[p.name] = "constexpr", value
        else:
            signature[p.name] = _type(value, p.annotation_type)
            if vectors:
                aligned |= {path: [["tt.divisibility", 16]] for path in _tensors(value, (i,))}
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)


# --- what the compilers say -------------------------------------------------------------------------------------------


def _nvidia(compiled: Any) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
    usage = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return {"registers": usage["REG"], "spills": usage["STACK"] + usage["LOCAL"]}


def _amd(compiled: Any) -> dict[str, int]:
    usage = {name: int(number) for name, number in re.findall(r"\.(\w+):\s+(\d+)\n", compiled.asm["amdgcn"])}
    spills = usage["vgpr_spill_count"] + usage["sgpr_spill_count"] + usage["private_segment_fixed_size"]
    return {"registers": usage["vgpr_count"], "spills": spills}


def resources(targets: tuple[str, ...] = tuple(TARGETS), dtypes: tuple[str, ...] = ("fp32", "bf16")) -> list[dict]:
    """One row for each kernel, dtype and target: registers, spilled bytes, shared memory, widest load, its source."""
    rows = []
    for dtype, kind in TYPES.items():
        if kind not in dtypes:
            continue
        for name, call in calls(dtype).items():
            for kernel, arguments, options in launches(call):
                for target in targets:
                    compiled = triton.compile(source(kernel, arguments), target=TARGETS[target], options=options)
                    usage = _nvidia(compiled) if "cubin" in compiled.asm else _amd(compiled)
                    rows.append(
                        {"call": name, "kernel": kernel.__name__, "dtype": kind, "target": target, **usage}
                        | {"shared": compiled.metadata.shared, **_accesses(compiled)}
                    )
    return rows


def _accesses(compiled: Any) -> dict[str, Any]:
    """The widest global load in bytes, and whether the kernel asks for anything that one vendor alone has."""
    if "ptx" in compiled.asm:
        loads = re.findall(r"ld\.global\S*?(?:\.v(\d))?\.b(\d+)", compiled.asm["ptx"])
        widest = max(int(count or 1) * int(bits) // 8 for count, bits in loads)
    else:
        names = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "ushort": 2, "ubyte": 1}
        loads = re.findall(r"(?:global|buffer|flat)_load_(dwordx?\d?|ushort|ubyte)\b", compiled.asm["amdgcn"])
        widest = max(names[load] for load in loads)
    foreign = re.findall(r"nvvm\.\w+|nvgpu\.\w+|elementwise_inline_asm|extern_elementwise", compiled.asm["ttir"])
    return {"widest_load": widest, "foreign": sorted(set(foreign))}


if __name__ == "__main__":
    print(json.dumps(resources(*(tuple(a.split(",")) for a in sys.argv[1:]))))
