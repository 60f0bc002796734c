"""The documents are correct: examples run, links resolve, and every op is listed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import gpkernels

ROOT = Path(__file__).resolve().parent.parent
PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "docs/architecture.md",
    "docs/approximate.md",
    "examples/README.md",
)


EXAMPLES = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)


def test_a_compiled_step_of_the_readme_runs() -> None:
    critic = nn.Sequential(nn.Linear(6, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1))
    real = fake = torch.full((8, 6), 1.0)
    exact = gpkernels.CriticLoss(critic)(real, fake.clone()).loss
    names = {"torch": torch, "loss": gpkernels.CriticLoss(critic)}
    _, by_program, _ = EXAMPLES[2].splitlines()  # Inductor is slow
    exec(by_program, names)
    torch.testing.assert_close(names["step"](real, fake.clone()), exact)
    exec(EXAMPLES[2], names)


def test_both_examples_of_the_readme_run_and_give_the_same_gradients() -> None:
    before, after, _ = EXAMPLES
    critic = nn.Sequential(nn.Linear(6, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1))
    # All points are one, so the eps that each example draws does not matter.
    names = {"torch": torch, "critic": critic, "real": torch.full((8, 6), 1.0), "fake": torch.full((8, 6), 1.0)}
    gradients = []
    for example in (before, after):
        critic.zero_grad()
        exec(example, names)
        gradients.append([p.grad.clone() for p in critic.parameters() if p.grad is not None])
    assert any(g.any() for g in gradients[0])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("page", PAGES)
def test_every_link_to_a_file_leads_to_one(page: str) -> None:
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if "://" not in target:
            assert ((ROOT / page).parent / target).exists(), target


def test_the_readme_lists_every_public_function() -> None:
    text = (ROOT / "README.md").read_text()
    for name in gpkernels.__all__:
        if name not in ("__version__", "CriticLossParts", "fast_double_backward"):
            assert name in text, name


def test_files_that_the_documents_name_exist() -> None:
    for page in PAGES:
        for name in re.findall(r"`((?:gpkernels|csrc|tests|docs|python)/[\w./]*)`", (ROOT / page).read_text()):
            assert (ROOT / name).exists(), (page, name)
