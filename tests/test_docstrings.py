"""Public docstrings have the sections of PyTorch's own, and their examples run."""

from __future__ import annotations

import doctest
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch

import gpkernels

PUBLIC: dict[str, Callable[..., Any]] = {
    name: getattr(gpkernels, name) for name in gpkernels.__all__ if callable(getattr(gpkernels, name))
} | {"optim.RMSprop": gpkernels.optim.RMSprop}


def missing_sections(public: Callable[..., Any]) -> list[str]:
    """Sections that the signature asks for and the docstring does not have."""
    signature = inspect.signature(public)
    wanted = ["Example"]
    if set(signature.parameters) - {"args", "kwargs"}:
        wanted.append("Args")
    if not inspect.isclass(public) and signature.return_annotation not in (None, "None"):
        wanted.append("Returns")
    lines = inspect.cleandoc(public.__doc__ or "").splitlines()
    return [section for section in wanted if f"{section}:" not in lines]


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_docstring_has_its_sections(name: str) -> None:
    missing = missing_sections(PUBLIC[name])
    assert not missing, f"{name} lacks {', '.join(missing)}"


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_docstring_names_every_parameter(name: str) -> None:
    for parameter in set(inspect.signature(PUBLIC[name]).parameters) - {"args", "kwargs"}:
        assert f"\n    {parameter} (" in inspect.cleandoc(PUBLIC[name].__doc__ or ""), parameter


@pytest.mark.parametrize("name", PUBLIC)
def test_the_examples_of_a_public_docstring_run(name: str) -> None:
    found = doctest.DocTestFinder(recurse=False).find(
        PUBLIC[name], name, globs={"torch": torch, "gpkernels": gpkernels}
    )
    results = [doctest.DocTestRunner().run(test) for test in found]
    assert not sum(result.failed for result in results)
    assert sum(result.attempted for result in results)
