"""Choice of the implementation: without the extension, with a broken one, by environment variable, by name."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
import sysconfig
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor

import gpkernels as gpk
from gpkernels import backends, info, ops
from gpkernels.ops.gradient_norm_penalty import gradient_norm_penalty_op
from gpkernels.version import OLDEST_TORCH
from installed import copy_package, output, run

USE = """
import torch, gpkernels as gpk
real, fake = torch.randn(4, 3), torch.randn(4, 3)
critic = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.LeakyReLU(), torch.nn.Linear(8, 1))
gpk.CriticLoss(critic)(real, fake).loss.backward()
torch.compile(gpk.gradient_norm_penalty, backend="eager")(real)
optimizer = gpk.optim.RMSprop(critic.parameters(), clip=0.01)
optimizer.step()
assert max(p.abs().max() for p in critic.parameters()) <= 0.01
"""
ROOT = Path(gpk.__file__).parent.parent
PATH = os.pathsep.join((str(ROOT), str(ROOT / "python")))
FACTS = "\nimport json; from gpkernels import info; print(json.dumps(info.facts()))"


def _facts(path: Path, **environment: str) -> dict:
    return json.loads(output(USE + FACTS, path, **environment))


def test_without_the_extension_everything_runs_on_the_reference_and_info_says_why(tmp_path: Path) -> None:
    facts = _facts(copy_package(tmp_path))
    assert set(facts["running"]) == {"cpu", "cuda", "xpu"}
    assert facts["running"]["cpu"] == "reference"
    assert facts["build"] is None
    assert facts["build_error"] == "the package was built without it"
    assert "built without it" in facts["backends"]["cpu"]


@pytest.mark.parametrize("content", [b"not a shared library" * 9, b""], ids=["garbage", "empty"])
def test_a_broken_extension_is_a_reason_and_no_error(tmp_path: Path, content: bytes) -> None:
    name = "_C" + sysconfig.get_config_var("EXT_SUFFIX")
    (copy_package(tmp_path) / "gpkernels" / name).write_bytes(content)
    facts = _facts(tmp_path)
    assert facts["running"]["cpu"] == "reference"
    assert name in facts["build_error"]
    assert f"it is for PyTorch {OLDEST_TORCH} or later, and this is {torch.__version__}" in facts["build_error"]
    assert "\n" not in facts["build_error"]
    page = run("-m", "gpkernels", "info", path=tmp_path)
    assert page.returncode == 0
    assert "not loaded" in page.stdout
    assert name in page.stdout


def test_an_extension_for_another_python_is_named_with_what_this_one_loads(tmp_path: Path) -> None:
    copy_package(tmp_path)
    (tmp_path / "gpkernels/_C.cpython-27-mars.so").touch()
    facts = _facts(tmp_path)
    assert facts["build_error"].startswith("_C.cpython-27-mars.so is for another Python or system")
    assert sysconfig.get_config_var("EXT_SUFFIX") in facts["build_error"]


def test_an_extension_that_cannot_be_used_warns_once_with_the_cure_and_none_at_all_does_not(tmp_path: Path) -> None:
    twice = "import gpkernels, importlib; importlib.import_module('gpkernels.backends')"
    assert run("-c", twice, path=copy_package(tmp_path)).stderr == ""
    (tmp_path / "gpkernels/_C.cpython-27-mars.so").touch()
    said = run("-c", twice, path=tmp_path).stderr
    assert said.count("UserWarning: the C++ kernels of gpkernels are not loaded") == 1
    assert "GPKERNELS_BUILD=cpu pip install" in said


OTHER = "import torch; torch.__version__ = '99.1.0+cpu'; "  # as another PyTorch would have it


@pytest.mark.skipif(backends.program is None, reason="the fast paths are not built")
def test_fast_paths_for_another_torch_are_a_warning_with_the_cure_and_info_has_the_reason() -> None:
    done = run("-c", OTHER + "from gpkernels import cli, backends; assert backends.program is None; cli.main(['info'])")
    assert done.returncode == 0, done.stderr
    reason = f"they are for PyTorch {backends.extension.build_info()['torch']}, and this is 99.1.0+cpu"
    assert done.stderr.count(f"the fast paths of gpkernels are not loaded: {reason}") == 1
    assert "GPKERNELS_BUILD=cpu pip install" in done.stderr
    assert f"fast paths        not loaded: {reason}" in done.stdout
    assert "cpu        available" in done.stdout


@pytest.mark.skipif(backends.extension is None, reason="the extension is not built")
def test_fast_paths_that_are_not_built_are_named(tmp_path: Path) -> None:
    copy_package(tmp_path)
    (kernels,) = (Path(gpk.__file__).parent).glob("_C" + sysconfig.get_config_var("EXT_SUFFIX"))
    shutil.copy2(kernels, tmp_path / "gpkernels")
    facts = _facts(tmp_path)
    assert facts["backends"]["cpu"] == "available"
    assert facts["fast_paths"] == "the package was built without _direct; the package was built without _program"


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("2.13.0+cpu", "2.13.0+cu130", True),
        ("2.13.0", "2.13.0+rocm7.1", True),
        ("2.13.0+cpu", "2.13.1+cpu", False),
        ("2.14.0a0+git1", "2.14.0a0+git2", False),
        ("2.14.0a0+git1", "2.14.0a0+git1", True),
        ("2.13.0", "2.13.0+git1", False),
    ],
)
def test_builds_of_one_release_share_their_fast_paths(one: str, other: str, same: bool) -> None:
    assert backends.same_release(one, other) is same


def test_a_torch_that_is_too_old_is_refused_in_one_sentence() -> None:
    done = run("-c", "import torch; torch.__version__ = '2.9.1'; import gpkernels")
    assert done.returncode != 0
    last = done.stderr.splitlines()[-1]
    assert last == (
        f"ImportError: gpkernels needs PyTorch {OLDEST_TORCH} or later, and this is 2.9.1; pip install --upgrade torch"
    )


def test_the_environment_forces_the_reference() -> None:
    code = (
        "import torch, gpkernels as gpk; from gpkernels import backends\n"
        "from gpkernels.ops.weights import clip_weights_op\n"
        "x = torch.ones(3); ran = []\n"
        "clip_weights_op.implementation = lambda *args: ran.append(args)\n"
        "gpk.clip_weights_(x, 0.1); print(backends.forced(), len(ran))"
    )
    assert output(code, GPKERNELS_BACKEND="reference").split() == ["reference", "1"]


FORCED = """
import torch, gpkernels as gpk
x = torch.ones(3)
try:
    gpk.clip_weights_(x, 0.1)
except RuntimeError as error:
    print(error)
print(x.tolist())
"""


def test_a_forced_cpu_backend_without_the_extension_raises_at_the_first_call_with_the_cure(tmp_path: Path) -> None:
    printed = output(FORCED, copy_package(tmp_path), GPKERNELS_BACKEND="cpu")
    assert "'cpu' was forced" in printed
    assert "clip_weights_" in printed
    assert "pip install --no-build-isolation" in printed
    assert "[1.0, 1.0, 1.0]" in printed


def test_a_foreign_name_in_the_environment_warns_and_import_goes_on() -> None:
    done = run("-c", FORCED, GPKERNELS_BACKEND="nonsense")
    assert done.returncode == 0
    assert "GPKERNELS_BACKEND" in done.stderr
    assert "'nonsense'" in done.stderr
    assert "0.1" in done.stdout


@pytest.mark.skipif(backends.extension is None, reason="the extension is not built")
def test_the_environment_forces_the_cpu_kernels() -> None:
    assert "0.1" in output(FORCED, GPKERNELS_BACKEND="cpu")


@pytest.mark.parametrize(("name", "cure"), [("triton", "'auto'"), ("cuda", "GPKERNELS_BUILD=cuda|'auto'")])
def test_a_forced_gpu_backend_raises_with_the_reason_and_the_cure(name: str, cure: str) -> None:
    x = torch.ones(3)
    with gpk.backend(name), pytest.raises(RuntimeError, match=rf"'{name}' was forced.*clip_weights_.*({cure})"):
        gpk.clip_weights_(x, 0.1)
    assert x.tolist() == [1.0] * 3


@pytest.mark.skipif(backends.extension is None, reason="the extension is not built")
def test_forced_cpu_kernels_refuse_tensors_of_another_device() -> None:
    with gpk.backend("cpu"), pytest.raises(RuntimeError, match=r"cpu tensors, got meta tensors"):
        gradient_norm_penalty_op(torch.ones(2, 3, device="meta"), 1.0, False, 1, 2.0)


def test_the_context_restores_what_was_chosen_before_even_after_an_error() -> None:
    before = backends.forced()
    with gpk.backend("reference"):
        assert backends.forced() == "reference"
        with gpk.backend("auto"):
            assert backends.forced() is None
        assert backends.forced() == "reference"
        with pytest.raises(KeyError), gpk.backend("cpu"):
            raise KeyError
        assert backends.forced() == "reference"
    assert backends.forced() == before


@pytest.fixture
def references(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Grows by one for each penalty that the reference computes."""
    ran: list[int] = []
    reference = gradient_norm_penalty_op.implementation

    def counted(*args: object) -> object:
        ran.append(len(ran))
        return reference(*args)

    monkeypatch.setattr(gradient_norm_penalty_op, "implementation", counted)
    yield ran
    torch._dynamo.reset()


@pytest.fixture
def other() -> Iterator[ThreadPoolExecutor]:
    """Another thread."""
    with ThreadPoolExecutor(1) as executor:
        yield executor


def _forced_penalty() -> str | None:
    gpk.gradient_norm_penalty(torch.ones(2, 3))
    return backends.forced()


def test_the_context_is_the_threads_own(references: list[int], other: ThreadPoolExecutor) -> None:
    with gpk.backend("reference"):
        assert _forced_penalty() == "reference"
        assert len(references) == 1
        assert other.submit(_forced_penalty).result() is None
        assert len(references) == 1

        def chooses() -> str | None:
            with gpk.backend("cpu"):
                return backends.forced()

        assert other.submit(chooses).result() == "cpu"
        assert _forced_penalty() == "reference"
        assert other.submit(backends.forced).result() is None
    assert _forced_penalty() is None
    assert len(references) == 2


def test_two_threads_choose_at_once_and_neither_restores_the_others_choice(other: ThreadPoolExecutor) -> None:
    theirs = gpk.backend("cpu")
    with gpk.backend("reference"):
        other.submit(theirs.__enter__).result()
    assert backends.forced() is None
    assert other.submit(backends.forced).result() == "cpu"
    other.submit(theirs.__exit__, None, None, None).result()
    assert other.submit(backends.forced).result() is None
    assert backends.forced() is None


def test_the_context_is_an_async_tasks_own() -> None:
    async def task(name: str) -> list[str | None]:
        seen: list[str | None] = []
        with gpk.backend(name):
            for _ in range(3):
                await asyncio.sleep(0)
                seen.append(backends.forced())
        await asyncio.sleep(0)
        return [*seen, backends.forced()]

    async def both() -> list[list[str | None]]:
        return list(await asyncio.gather(task("reference"), task("cpu"), task("auto")))

    assert asyncio.run(both()) == [["reference"] * 3 + [None], ["cpu"] * 3 + [None], [None] * 4]


def test_the_context_overrides_the_processs_choice_and_outlives_a_change_of_it(
    references: list[int], other: ThreadPoolExecutor
) -> None:
    try:
        gpk.set_backend("reference")
        assert other.submit(_forced_penalty).result() == "reference"
        with gpk.backend("auto"):
            assert _forced_penalty() is None
            assert len(references) == 1
            gpk.set_backend("cpu")
            assert backends.forced() is None
            assert other.submit(backends.forced).result() == "cpu"
        assert backends.forced() == "cpu"
    finally:
        gpk.set_backend("auto")


def test_the_context_writes_nothing_that_threads_share() -> None:
    def shared() -> dict[str, object]:
        return {**vars(backends), **{name: op.direct for name, op in ops.ALL.items()}}

    before = shared()
    with gpk.backend("reference"):
        within = shared()
    for name, value in before.items():
        assert within[name] is value, name


def test_a_name_that_the_context_does_not_know_changes_nothing() -> None:
    with gpk.backend("reference"):
        with pytest.raises(ValueError, match=r"backend.*'tpu'"), gpk.backend("tpu"):
            pass
        assert backends.forced() == "reference"


def test_the_context_holds_in_threads_that_pytorch_works_for_it_in() -> None:
    """As autograd's are, which run backward passes on GPUs: its state of a thread goes to them, contexts do not."""

    seen: list[tuple[bool, str | None]] = []
    here = threading.get_ident()

    def look(x: Tensor) -> Tensor:
        seen.append((threading.get_ident() == here, backends.forced()))
        return x

    def looks(x: Tensor) -> Tensor:
        return ignored(x)

    look.__annotations__ = {"x": Tensor, "return": Tensor}  # TorchScript reads no text
    ignored = torch.jit.ignore(look)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(looks)

        def forks(x: Tensor) -> Tensor:
            return torch.jit.wait(torch.jit.fork(scripted, x))

        forked = torch.jit.script(forks)
    forked(torch.ones(1))
    with gpk.backend("reference"):
        forked(torch.ones(1))
        with gpk.backend("auto"):
            forked(torch.ones(1))
        forked(torch.ones(1))
    forked(torch.ones(1))
    assert seen == [(False, name) for name in (None, "reference", None, "reference", None)]


def test_compiled_code_follows_the_choice_of_the_thread_that_calls_it(
    references: list[int], other: ThreadPoolExecutor
) -> None:
    compiled = torch.compile(lambda x: gpk.gradient_norm_penalty(x), fullgraph=True, backend="eager")
    x = torch.ones(2, 3)

    def ran() -> int:
        references.clear()
        compiled(x)
        return len(references)

    assert ran() == 0
    with gpk.backend("reference"):
        assert ran() == 1
        assert other.submit(ran).result() == 0
    assert ran() == 0


def test_a_compiled_function_may_choose_within(references: list[int], other: ThreadPoolExecutor) -> None:
    def penalty(x: Tensor) -> Tensor:
        with gpk.backend("reference"):
            first = gpk.gradient_norm_penalty(x)
        return first + gpk.gradient_norm_penalty(x)

    compiled = torch.compile(penalty, fullgraph=True, backend="eager")
    compiled(torch.ones(2, 3))
    assert len(references) == 1
    assert backends.forced() is None
    assert other.submit(compiled, torch.ones(2, 3)).result() == compiled(torch.ones(2, 3))
    plain = torch.compile(lambda x: gpk.gradient_norm_penalty(x), fullgraph=True, backend="eager")
    references.clear()
    plain(torch.ones(2, 3))
    other.submit(plain, torch.ones(2, 3)).result()
    assert not references


def test_set_backend_stays_until_it_is_set_again() -> None:
    try:
        gpk.set_backend("reference")
        assert info.facts()["backend"] == "reference"
    finally:
        gpk.set_backend("auto")
    assert info.facts()["backend"] == "auto"
    with pytest.raises(ValueError, match=r"auto, reference, cpu, triton, cuda.*'tpu'"):
        gpk.set_backend("tpu")


def test_importing_adds_nothing_but_the_package_to_torch() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import gpkernels\n"
        "print(*sorted(set(sys.modules) - before), sep='\\n')"
    )
    added = output(code).split()
    assert "gpkernels.ops" in added
    foreign = [m for m in added if m.split(".")[0] not in {"gpkernels", "torch", *_standard_library()}]
    assert foreign == []
    assert not any(m.startswith(("torch._dynamo", "torch._inductor", "torch.utils.cpp_extension")) for m in added)


def _standard_library() -> frozenset[str]:

    return sys.stdlib_module_names


def test_the_import_leaves_the_random_state_alone() -> None:
    code = "import torch; a = torch.get_rng_state(); import gpkernels; print(torch.equal(a, torch.get_rng_state()))"
    assert output(code).strip() == "True"


@pytest.mark.skipif(backends.has_triton(), reason="Triton is installed")
def test_the_cure_for_triton_that_is_missing_is_to_install_it() -> None:
    assert "pip install triton" in str(backends.unavailable("triton"))


def test_importing_imports_no_triton() -> None:
    assert output("import sys, gpkernels; print('triton' in sys.modules)").strip() == "False"


@pytest.mark.parametrize("triton", [False, True])
@pytest.mark.parametrize("native", [(), ("interpolate", "rmsprop_"), tuple(ops.ALL)], ids=["none", "some", "all"])
def test_gpus_get_triton_for_ops_without_a_cuda_kernel(
    native: tuple[str, ...], triton: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Library:
        ns = "gpkernels"
        registered: ClassVar[list[tuple[str, str]]] = []

        def impl(self, name: str, kernel: object, key: str) -> None:
            self.registered.append((name, key))

    monkeypatch.setattr(backends, "_by_triton", set())
    monkeypatch.setattr(backends, "has_triton", lambda: triton)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(backends, "xpu_is_built", lambda: False)
    monkeypatch.setattr(backends, "has_kernel", lambda name, key: name.removeprefix("gpkernels::") in native)
    monkeypatch.setattr(backends, "cuda_error", None)
    Library.registered.clear()
    backends.register_triton(Library(), ops.ALL, lambda name: None)  # type: ignore[arg-type]
    others = [name for name in ops.ALL if name not in native] if triton else []
    assert Library.registered == [(name, "CUDA") for name in others]
    for name in ops.ALL:
        expected = "triton" if name in others else "cuda" if name in native else "reference"
        assert backends.running_op(name, "cuda") == expected
