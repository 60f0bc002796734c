"""Layering: no module of the library imports one above it, and there are no import cycles."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From the bottom up: a layer imports those in the lines above its own, and itself.
LAYERS = (
    ("version", "zoo"),
    ("private",),
    ("backends",),
    ("ops",),
    ("triton", "optim"),
    ("registration",),
    ("critic",),
    ("gradients",),
    ("penalties", "approximate"),
    ("losses", "compiler"),
    ("gpkernels",),
    ("info", "arguments"),
    ("verify", "bench"),
    ("cli",),
    ("__main__",),
)
LEVELS = {layer: level for level, layers in enumerate(LAYERS) for layer in layers}
SOURCES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "gpkernels").rglob("*.py"))
}


def layer(module: str) -> str:
    """The file or folder of the package that a module is in; the package's own is ``gpkernels``."""
    return module.split(".")[1] if "." in module else module


def named(path: Path) -> Iterator[str]:
    """List the modules that a file imports, in functions too, or names in full, as for ``import_module``."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            modules = [f"{node.module}.{alias.name}" for alias in node.names]
            # Anything but a module is a name in one; the package itself does not count where its modules do.
            yield from (name if name in SOURCES else str(node.module) for name in modules)
        elif isinstance(node, ast.Constant) and node.value in SOURCES and node.value != "gpkernels":
            yield node.value


IMPORTS = {module: sorted({name for name in named(path) if name in SOURCES}) for module, path in SOURCES.items()}


def test_every_module_has_a_room() -> None:
    assert {layer(module) for module in SOURCES} == set(LEVELS)


def test_there_is_no_circle() -> None:
    graph = {module: [name for name in names if name != module] for module, names in IMPORTS.items()}
    assert len(list(TopologicalSorter(graph).static_order())) == len(SOURCES)


@pytest.mark.parametrize("module", SOURCES)
def test_nothing_is_imported_from_above(module: str) -> None:
    own = layer(module)
    upward = [name for name in IMPORTS[module] if layer(name) != own and LEVELS[layer(name)] >= LEVELS[own]]
    assert not upward


def test_backends_know_nothing_of_the_library() -> None:
    assert set(IMPORTS["gpkernels.backends"]) <= {"gpkernels.private", "gpkernels.version"}


def test_the_command_line_alone_knows_of_the_trainer() -> None:
    found = {module for module, path in SOURCES.items() if "gptrainer" in path.read_text()}
    assert found == {"gpkernels.cli"}


def test_a_circle_and_an_upward_import_would_be_seen(tmp_path: Path) -> None:
    file = tmp_path / "file.py"
    file.write_text("def f():\n    from gpkernels.critic import plan\n    import_module('gpkernels.cli')\n")
    assert sorted(named(file)) == ["gpkernels.cli", "gpkernels.critic.plan"]
