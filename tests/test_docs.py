"""The documents are correct: examples run, links resolve, and every op is listed."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import pytest
import torch
from torch import nn

import gpkernels
from gpkernels.bench.small import SMALL
from gpkernels.losses import OBJECTIVES, PENALTIES

ROOT = Path(__file__).resolve().parent.parent
PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "docs/architecture.md",
    "docs/approximate.md",
    "docs/migration.md",
    "docs/distributed.md",
    "examples/README.md",
)


EXAMPLES = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)


def example(text: str) -> str:
    """The README's example that has some text."""
    (found,) = [one for one in EXAMPLES if text in one]
    return found


def test_a_compiled_step_of_the_readme_runs() -> None:
    critic = nn.Sequential(nn.Linear(6, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1))
    real = fake = torch.full((8, 6), 1.0)
    exact = gpkernels.CriticLoss(critic)(real, fake.clone()).loss
    names = {"torch": torch, "loss": gpkernels.CriticLoss(critic)}
    _, by_program, _ = example("torch.compile").splitlines()  # Inductor is slow
    exec(by_program, names)
    torch.testing.assert_close(names["step"](real, fake.clone()), exact)
    exec(example("torch.compile"), names)


def test_an_eager_step_with_compiled_passes_of_the_readme_runs() -> None:
    critic = nn.Sequential(nn.Linear(6, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1))
    real, fake = torch.ones(8, 6), torch.ones(8, 6)
    names = {"gpkernels": gpkernels, "loss": gpkernels.CriticLoss(critic), "real": real, "fake": fake}
    try:
        exec(example("set_compile_passes"), names)
    finally:
        gpkernels.set_compile_passes(False)
    torch.testing.assert_close(names["parts"].loss, gpkernels.CriticLoss(critic)(real, fake).loss)


def test_both_examples_of_the_readme_run_and_give_the_same_gradients() -> None:
    before, after = example("calc_gradient_penalty"), example("import gpkernels")
    critic = nn.Sequential(nn.Linear(6, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1))
    # All points are one, so the eps that each example draws does not matter.
    names = {"torch": torch, "critic": critic, "real": torch.full((8, 6), 1.0), "fake": torch.full((8, 6), 1.0)}
    gradients = []
    for code in (before, after):
        critic.zero_grad()
        exec(code, names)
        gradients.append([p.grad.clone() for p in critic.parameters() if p.grad is not None])
    assert any(g.any() for g in gradients[0])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_the_loop_of_the_readme_trains_the_critic() -> None:
    critic, generator = nn.Linear(6, 1), nn.Linear(8, 6)
    before = [p.clone() for p in critic.parameters()]
    names = {"torch": torch, "gpkernels": gpkernels, "critic": critic, "generator": generator}
    names |= {"batches": torch.randn(3, 8, 6), "optimizer": torch.optim.SGD(critic.parameters(), lr=0.1)}
    exec(example("for real in batches"), names)
    assert not torch.equal(before[0], critic.weight)
    assert generator.weight.grad is None
    parts = names["parts"]
    torch.testing.assert_close(parts.loss.detach(), parts.adversarial + 10 * parts.penalty + parts.consistency)


def test_the_critic_loss_of_the_readme_is_the_sum_of_its_parts() -> None:
    critic = nn.Sequential(nn.Linear(6, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1))
    real, fake = torch.randn(8, 6), torch.randn(8, 6)
    names = {"gpkernels": gpkernels, "critic": critic, "real": real, "fake": fake}
    exec(example("penalty_every"), names)
    parts, every = names["parts"], names["loss"].penalty_every
    penalties = gpkernels.r1_penalty(critic, real), gpkernels.r2_penalty(critic, fake)
    torch.testing.assert_close(tuple(parts.penalty.values()), penalties)
    exact = gpkernels.relativistic_critic_loss(critic(real), critic(fake)) + every * 5.0 * sum(penalties)
    torch.testing.assert_close(parts.loss, exact)
    for p, g in zip(critic.parameters(), torch.autograd.grad(exact, [*critic.parameters()]), strict=True):
        torch.testing.assert_close(p.grad, g)


def test_the_gradient_example_of_the_readme_gives_autograds_gradients() -> None:
    field = nn.Sequential(nn.Linear(3, 16), nn.Softplus(100), nn.Linear(16, 1))
    points, normals = torch.randn(8, 3), torch.randn(8, 3)
    names = {"torch": torch, "gpkernels": gpkernels, "field": field, "points": points, "normals": normals}
    exec(example("orientation"), names)
    x = points.clone().requires_grad_()
    distance = field(x)
    (gradient,) = torch.autograd.grad(distance.sum(), x, create_graph=True)
    eikonal = (gradient.norm(dim=-1) - 1).abs().mean()
    orientation = (1 - nn.functional.cosine_similarity(gradient, normals, dim=-1)).mean()
    loss = distance.abs().mean() + 0.1 * eikonal + orientation
    torch.testing.assert_close(names["loss"], loss)
    weights = [p for p in field.parameters() if p.grad is not None]
    assert len(weights) == 4
    for p, g in zip(weights, torch.autograd.grad(loss, weights), strict=True):
        torch.testing.assert_close(p.grad, g)


@pytest.mark.parametrize("page", PAGES)
def test_every_link_to_a_file_leads_to_one(page: str) -> None:
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if "://" not in target:
            assert ((ROOT / page).parent / target).exists(), target


def test_the_readme_lists_every_public_function() -> None:
    text = (ROOT / "README.md").read_text()
    for name in gpkernels.__all__:
        if name not in ("__version__", "CriticLossParts"):
            assert f"`{name}" in text or f"gpkernels.{name}" in text, name


def test_the_readme_lists_every_option_of_penalties_and_the_critic_loss() -> None:
    text = (ROOT / "README.md").read_text()
    options = re.search(r"\| option \| of \| meaning \|\n(.*?)\n\n", text, re.S)
    assert options is not None
    for name in ("reduction", "power", "pack", "critic_args", "critic_kwargs", "objective", "penalty", "penalty_every"):
        assert f"`{name}`" in options[1], name
    for name in (*OBJECTIVES, *PENALTIES):
        assert f'`"{name}"`' in options[1], name


def test_the_gains_of_the_readme_are_the_measured_ones() -> None:
    measured = [
        {row["program"]: f"{float(row['eager_over_gpkernels']):.{digits}f}" for row in rows}
        for rows, digits in ((_measured("xeon-avx512-1-thread-programs"), 2), (_reported("programs"), 1))
    ]
    table = re.search(r"\| you have today \|.*?\n\n", (ROOT / "README.md").read_text(), re.S)
    assert table is not None
    programs = ["WGAN-GP toy, N 256", "language, N 64", "CTGAN critic, N 500", "GAN_stability R1, N 16"]
    programs += ["StyleGAN2 R1 + R2, N 16", "R3GAN critic, N 16", "R3GAN critic, N 64", "AMP, N 4096", "AMP, N 512"]
    programs += ["IGR, N 2048", "IGR, N 16384", "SIREN, N 2048", "force field, N 64", "force field, N 4"]
    for found, digits in zip(measured, (2, 1), strict=True):
        gains = re.findall(rf"(?<![\d.])\d+\.\d{{{digits}}}(?!\d)", re.sub("`.*?`", "", table[0]))
        assert gains == [found[program] for program in programs]
        assert set(programs) == set(found)


def _table(head: str) -> list[list[str]]:
    """The cells of a table of the README, without its head."""
    found = re.search(rf"^\| {re.escape(head)}.*?\n\n", (ROOT / "README.md").read_text(), re.S | re.M)
    assert found is not None
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in found[0].splitlines()[2:-1]]


def _measured(name: str) -> list[dict[str, Any]]:
    with (ROOT / f"bench/results/{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def _reported(part: str) -> list[dict[str, Any]]:
    report = json.loads((ROOT / "bench/results/nvidia-h200-report.json").read_text(encoding="utf-8"))
    results = report["parts"][part]["results"]
    return results if isinstance(results, list) else results["rows"]


def _ours(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {row["case"]: row for row in rows if row["peer"] == "gpkernels"}


def _assert_rounded(cells: Iterable[str], measured: Iterable[float]) -> None:
    """Each cell is what was measured, to as many digits as it has."""
    cells = list(cells)
    assert cells == [f"{x:.{len(cell.partition('.')[2])}f}" for cell, x in zip(cells, measured, strict=True)]


def _case(label: str) -> str:
    """The name of a critic in the benchmark."""
    words = " critic( of 8 channels| with)?| of 8 channels|-like( with minibatch deviation)?|^a "
    return re.sub(f"{words}|(?<=Norm|tanh) MLP [-x0-9]+", "", label)


def test_the_speeds_of_compiled_steps_in_the_readme_are_the_measured_ones() -> None:
    peers = "gpkernels", "gpkernels, Inductor", "gpkernels, backend", "compile"
    rows = {(row["case"], row["peer"]): row for row in _measured("xeon-avx512-1-thread-compiled")}
    table = _table("critic | gpkernels | compiled by Inductor")
    assert len(table) == len({case for case, _ in rows})
    for label, *cells in table:
        _assert_rounded(cells, [float(rows[f"{_case(label)}, step", peer]["speedup"]) for peer in peers])


@pytest.mark.parametrize("device", ["Xeon", "H200"])
def test_the_speeds_of_critics_in_the_readme_are_the_measured_ones(device: str) -> None:
    on_xeon = device == "Xeon"
    rows = _ours(_measured("xeon-avx512-1-thread-steps") if on_xeon else _reported("bench steps"))
    last = "share of the limit" if on_xeon else "launches of the step, eager's"
    small = [[float(rows[f"{critic}, {what}"]["speedup"]) for critic in SMALL] for what in ("penalty", "step")]
    (_, *means, _), (_, *least, _), *table = _table(f"critic | penalty | WGAN-GP step | {last}")
    _assert_rounded(means, map(geometric_mean, small))
    _assert_rounded(least, map(min, small))
    for label, penalty, step, share in table:
        critic, _, more = _case(label).partition("; its R1 step ")
        cases = [f"{critic}, {what}" for what in ("penalty", "step")] if step else [critic]
        cases += [f"{critic}, R1 step"] if more else []
        _assert_rounded(filter(None, (penalty, step, more)), [float(rows[case]["speedup"]) for case in cases])
        if on_xeon:
            _assert_rounded(share.split("; "), [float(rows[case]["limit_share"]) for case in cases[:2]])


def test_the_speeds_of_ops_in_the_readme_are_the_measured_ones() -> None:
    measured = _ours(_measured("xeon-avx512-1-thread")), _ours(_reported("bench ops"))
    for label, *cells in _table("case | eager over ours | share of the limit | on the H200"):
        names = re.findall("`(.*?)`", label.partition(", over")[0])
        size = "small" if len(names) > 1 else "large"
        starts = [f"{name}, {size}" if name[:5] != "optim" else name for name in names]
        starts += [f"{names[0]}, backward, large"] if "its backward" in label else []
        for rows, pair in zip(measured, (cells[:2], cells[2:]), strict=True):
            cases = [next(case for case in rows if case.startswith(start)) for start in starts]
            for column, cell in zip(("speedup", "limit_share"), pair, strict=True):
                _assert_rounded(filter(None, re.split("[;,] ", cell)), [float(rows[c][column]) for c in cases if cell])


def test_files_that_the_documents_name_exist() -> None:
    for page in PAGES:
        for name in re.findall(r"`((?:gpkernels|csrc|tests|docs|python)/[\w./]*)`", (ROOT / page).read_text()):
            assert (ROOT / name).exists(), (page, name)
