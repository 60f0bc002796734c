"""Resources of every Triton kernel, compiled ahead of time with the arguments of its launcher."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

import gpkernels.triton
from gpkernels.ops.gradient_norm_penalty import REDUCTIONS

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx90a": GPUTarget("hip", "gfx90a", 64),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
VARIANTS = (
    "interpolate of short rows",
    "instance_noise, uniform",
    "gradient_norm_penalty of short rows",
    "gradient_norm_penalty of power 1.5",
    "score_loss of one score",
    "rmsprop_",
    "mean_pool, channels last",
    "mean_pool_backward, channels last",
)


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

    def attention(end: str, width: int) -> Callable[[], Any]:
        x, rows = torch.zeros(4, 4, 256, width, dtype=dtype), torch.zeros(4, 4, 256)
        ours = {"": [x, x, x], "_backward": [*[x] * 5, rows], "_jvp": [*[x] * 7, rows]}
        ours["_double_backward"] = [*[x] * 8, rows, x, rows]
        return lambda: kernels[f"scaled_dot_product_attention{end}"](*ours[end], None, False, 0.125)

    return {
        **{
            f"scaled_dot_product_attention{end}{heads}": attention(end, width)
            for heads, width in (("", 64), (" of wide heads", 256))
            for end in ("", "_backward", "_jvp", "_double_backward")
        },
        "interpolate": lambda: kernels["interpolate"](x, y, per_row),
        "interpolate of short rows": lambda: kernels["interpolate"](points, points, torch.zeros(256, dtype=wide)),
        "interpolate_backward": lambda: kernels["interpolate_backward"](x, per_row, True, True),
        "instance_noise, Gaussian": lambda: kernels["instance_noise"](x, 0.1, one, key, True),
        "instance_noise, uniform": lambda: kernels["instance_noise"](x, 0.1, one, key, False),
        "gradient_norm_penalty": lambda: kernels["gradient_norm_penalty"](x, 1.0, False, mean, 2.0),
        "gradient_norm_penalty of short rows": lambda: kernels["gradient_norm_penalty"](points, 1.0, True, mean, 2.0),
        "gradient_norm_penalty of long rows": lambda: kernels["gradient_norm_penalty"](long, 1.0, False, mean, 2.0),
        "gradient_norm_penalty of power 1.5": lambda: kernels["gradient_norm_penalty"](x, 1.0, False, mean, 1.5),
        "gradient_norm_penalty_backward": lambda: kernels["gradient_norm_penalty_backward"](one, x, per_row),
        "consistency_term": lambda: kernels["consistency_term"](scores, scores, x, y, 0.1, 0.1),
        "lipschitz_consistency of long rows": lambda: kernels["lipschitz_consistency"](
            scores[:4], scores[:4], long, long, 0.1
        ),
        "consistency_backward": lambda: kernels["consistency_backward"](
            one, scores, scores, x, y, per_row, per_row, True
        ),
        "score_loss of one score": lambda: kernels["score_loss"]([scores[:1]], [1], [0.0]),
        "score_loss": lambda: kernels["score_loss"]([scores, scores], [3, 2], [0.0, 0.0]),
        "score_loss_backward": lambda: kernels["score_loss_backward"](one, [scores, scores], [3, 2], [0.0, 0.0]),
        "relativistic_loss": lambda: kernels["relativistic_loss"](scores, scores),
        "relativistic_loss_backward": lambda: kernels["relativistic_loss_backward"](one, scores, scores),
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


# --- compiling without a device --------------------------------------------------------------------------------------


class _Driver:
    """Stands for a device, so that a launch compiles for it as it would there, argument by argument."""

    def __init__(self, target: str) -> None:
        self.target = TARGETS[target]
        self.index = list(TARGETS).index(target)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.index

    def get_current_stream(self, device: int) -> int:
        return 0


def compiled_for(target: str, call: Callable[[], Any]) -> list[tuple[str, Any]]:
    """(name, compiled kernel) of each kernel that a call of a launcher would launch."""
    found: list[tuple[str, Any]] = []

    def compile_only(kernel: Any, programs: int, device: torch.device, *args: Any, **options: Any) -> None:
        named = dict(zip((p.name for p in kernel.params), args, strict=False))
        options = {"enable_fp_fusion": True, **options, **named}
        found.append((kernel.__name__, kernel.warmup(grid=(programs,), **options)))

    modules = [m for name, m in sys.modules.items() if name.startswith("gpkernels.triton.") and hasattr(m, "launch")]
    kept = [m.launch for m in modules]
    triton.runtime.driver.set_active(_Driver(target))
    for m in modules:
        m.launch = compile_only
    try:
        call()
    finally:
        for m, launch in zip(modules, kept, strict=True):
            m.launch = launch
    return found


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


def resources(targets: Sequence[str] = tuple(TARGETS)) -> list[dict[str, Any]]:
    """One row for each call, kernel, dtype and target: registers, spilled bytes, shared memory, widest load.

    Every kernel for every target; the variants of a kernel and bfloat16 for one target of each vendor, or one.
    """
    rows = []
    for target in targets:
        for dtype in (torch.float32, torch.bfloat16) if target == "sm_90" else (torch.float32,):
            for name, call in calls(dtype).items():
                if target not in ("sm_90", "gfx942") and name in VARIANTS:
                    continue
                for kernel, compiled in compiled_for(target, call):
                    usage = _nvidia(compiled) if "cubin" in compiled.asm else _amd(compiled)
                    about = {"call": name, "kernel": kernel, "dtype": TYPES[dtype], "target": target}
                    rows.append({**about, **usage, "shared": compiled.metadata.shared, **_accesses(compiled)})
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
    print(json.dumps(resources(sys.argv[1:] or tuple(TARGETS))))
