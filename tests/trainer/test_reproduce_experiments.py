"""Experiments whose answers are known in closed form, in their quick size."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from gptrainer.loop import Trainer
from gptrainer.reproduce.experiment import Context, Findings, NotRun
from gptrainer.reproduce.experiments import (
    NAMES,
    cauchy_gradients,
    dirac_gan,
    find,
    instance_noise,
    meaningful_loss,
    neural_net_distance,
    parallel_lines,
    perfect_discrimination,
    unrolled,
)
from gptrainer.reproduce.training import start


def failed(name: str, findings: Findings) -> list[str]:
    return [claim.measure for claim in find(name).claims if claim.judge([findings], "quick").verdict == "failed"]


def test_the_lines_have_their_published_distances() -> None:
    settings = {"trained_at": [1.0], "steps": 80, "width": 16, "batch": 64, "lr": 1e-2}
    findings = parallel_lines.measure(settings, 0, Context())
    assert set(failed("parallel-lines", findings)) <= {"critic_gradient_error"}  # that needs more steps than these
    assert len(parallel_lines.exhibit([findings]).pictures["distances"].panels) == 3


def test_the_eigenvalues_of_every_system_are_those_of_the_formulas() -> None:
    for system in dirac_gan.systems():
        found = dirac_gan.jacobian_eigenvalues(lambda state, s=system: dirac_gan.field(s, state), system.at)
        assert dirac_gan.distance(found, system.field_eigenvalues()) < 1e-6, system.name
        for alternating in (False, True):
            step = dirac_gan.jacobian_eigenvalues(
                lambda state, s=system, a=alternating: dirac_gan.move(s, state, a), system.at
            )
            assert dirac_gan.distance(step, system.map_eigenvalues(alternating)) < 1e-6, system.name


def test_a_wrong_penalty_would_be_seen_in_the_eigenvalues() -> None:
    right = dirac_gan.systems()[5]
    wrong = dirac_gan.System(right.name, right.critic_loss, right.generator_loss, 0.5, 0.6, True)
    found = dirac_gan.jacobian_eigenvalues(lambda state: dirac_gan.field(right, state), right.at)
    assert dirac_gan.distance(found, wrong.field_eigenvalues()) > 1e-2


@pytest.mark.parametrize(
    ("radii", "said"),
    [
        pytest.param(np.geomspace(1, 1e-3, 501), "converges", id="a spiral inwards"),
        pytest.param(np.geomspace(1, 50, 501), "diverges", id="a spiral outwards"),
        pytest.param(np.ones(501), "circles", id="a circle"),
    ],
)
def test_the_behaviour_of_a_trajectory_is_computed(radii: np.ndarray, said: str) -> None:
    angle = np.linspace(0, 40, 501)
    path = torch.from_numpy(radii[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1))
    assert dirac_gan.behaviour(path) == said


def test_gradients_under_a_noisy_discriminator_are_cauchy_and_not_normal() -> None:
    torch.manual_seed(0)
    settings = {"draws": 800, "batch": 8, "width": 8, "coordinates": 8, "resamples": 200}
    assert failed("cauchy-gradients", cauchy_gradients.measure(settings, 0, Context())) == []


def test_the_cauchy_test_rejects_a_normal_sample_and_accepts_a_cauchy_one() -> None:
    random = np.random.default_rng(0)
    samples = np.stack([random.normal(size=1000), random.standard_cauchy(1000)], axis=1)
    normal, cauchy = cauchy_gradients._p_values(cauchy_gradients._distances(samples), 1000, 500, 0)
    assert normal < 0.01
    assert cauchy > 0.05


def test_collisions_tell_a_set_from_its_half_with_many_samples_and_not_with_few() -> None:
    random = np.random.default_rng(0)
    assert neural_net_distance.power(1024, 400, 200, random) > 0.95
    assert neural_net_distance.power(1024, 3, 2000, random) < 0.53


def test_the_best_discriminator_of_noised_lines_is_that_of_the_formulas() -> None:
    assert instance_noise.best_accuracy(0.5) == pytest.approx(0.8413447)
    # Against a histogram of the noised line, for the same integral.
    e = torch.randn(400_000, generator=torch.Generator().manual_seed(0)).double()
    sampled = ((torch.sigmoid((-0.5 - 0.5 * e) / 0.25)) / 0.25).mean().item()
    assert instance_noise.best_gradient(0.5) == pytest.approx(sampled, rel=0.01)


def test_the_curve_closes_and_spans_as_many_dimensions_as_its_harmonics_allow() -> None:
    points = instance_noise.curve(400, torch.Generator().manual_seed(0))
    assert points.shape == (400, instance_noise.SPACE)
    assert torch.linalg.matrix_rank(points - points.mean(dim=0), rtol=1e-4) == 6
    torch.testing.assert_close(points.mean(dim=0), torch.zeros(instance_noise.SPACE), atol=0.1, rtol=0)


def test_the_estimate_at_the_optimum_leaves_the_run_as_it_was_and_lies_above_it() -> None:
    trainer = start("nsgan", "8gaussians", 20, 0, Context(), width=16, batch_size=32, lr=1e-2)
    for _ in range(20):
        trainer.train_step()
    system = trainer.system
    before = copy.deepcopy((trainer.critic.state_dict(), system.critic_optimiser.state_dict()))
    far = [p.detach().clone() for p in trainer.generator.parameters()]
    optimal = meaningful_loss.estimate_at_optimum(trainer, 300)
    torch.testing.assert_close((trainer.critic.state_dict(), system.critic_optimiser.state_dict()), before)
    torch.testing.assert_close(list(trainer.generator.parameters()), far)
    present = system.metrics(system.critic_parts(trainer.real, trainer.fake))[system.estimate.name].item()
    assert present < optimal <= math.log(2)


def test_networks_of_the_ring_are_orthogonal_and_see_it_at_order_one() -> None:
    layers = unrolled.orthogonal([2, 16, 1], torch.nn.ReLU(), unrolled.GAIN)
    first = layers[0]
    assert isinstance(first, torch.nn.Linear)
    torch.testing.assert_close(first.weight.T @ first.weight, 0.64 * torch.eye(2))
    assert [type(layer).__name__ for layer in layers] == ["Linear", "ReLU", "Linear"]
    assert unrolled.Quarter()(unrolled.RING.centres).norm(dim=1).max() == pytest.approx(0.5)


def test_the_largest_singular_value_of_a_generators_jacobian_is_found() -> None:
    generator = torch.nn.Linear(3, 2)
    z = torch.randn(1, 3)
    # dG/d(weight, bias) of one output is (z, 1), so both singular values are |(z, 1)|.
    expected = math.sqrt(z.square().sum().item() + 1)
    assert perfect_discrimination.jacobian_norm(generator, z) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", [name for name in NAMES if "Fashion-MNIST" in find(name).needs])
def test_data_that_is_absent_is_known_before_anything_is_trained(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(trainer: object) -> None:
        raise AssertionError("trained")

    monkeypatch.setattr(Trainer, "train_step", train)
    with pytest.raises(NotRun, match="fashion-mnist needs"):
        find(name).measure(find(name).settings["full"], 0, Context(tmp_path))
