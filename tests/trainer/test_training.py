from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gpkernels.arguments import replacing
from gptrainer import checkpoint, plots
from gptrainer.cli import main
from gptrainer.config import TrainConfig
from gptrainer.loop import Trainer
from gptrainer.models import build_models

MakeConfig = Callable[..., TrainConfig]


def run(config: TrainConfig) -> Trainer:
    trainer = Trainer(config)
    trainer.train()
    return trainer


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{key}": value
        for name, model in (("critic", trainer.critic), ("generator", trainer.generator))
        for key, value in model.state_dict().items()
    }


def assert_same(one: Any, other: Any) -> None:
    """Equal to the last bit, whatever they are made of."""
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    else:
        assert one == other


@pytest.mark.parametrize("data", ["8gaussians", "digits"])
@pytest.mark.parametrize("algorithm", ["wgan", "wgan-gp"])
def test_a_resumed_run_is_the_straight_run_bit_for_bit(
    algorithm: str, data: str, tiny: MakeConfig, tmp_path: Path
) -> None:
    # 512 digits a batch: an epoch ends within the run
    straight = tiny(algorithm=algorithm, data=data, steps=6, batch_size=512 if data == "digits" else 16)
    whole = run(straight)
    torch.rand(7)  # whatever else happens in between
    halves = replace(straight, out=tmp_path / "halves")
    run(replace(halves, steps=3))
    torch.rand(5)
    joined = run(replace(halves, resume=True))
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(joined)[name]), name
    states = [trainer.state() for trainer in (whole, joined)]
    for state in states:
        del state["config"]
    assert_same(*states)


def test_the_same_seed_gives_the_same_run_and_another_seed_another(tiny: MakeConfig) -> None:
    one, same, other = (run(tiny(seed=seed)) for seed in (4, 4, 5))
    assert_same(weights(one), weights(same))
    assert one.critic_curve == same.critic_curve
    assert one.quality_curve == same.quality_curve
    assert one.critic_curve != other.critic_curve


def test_logging_and_measuring_do_not_change_the_run(tiny: MakeConfig) -> None:
    assert_same(weights(run(tiny())), weights(run(tiny(log_every=3, eval_every=100))))


def test_wgan_keeps_every_weight_of_the_critic_within_the_clip(tiny: MakeConfig) -> None:
    trainer = Trainer(tiny(algorithm="wgan", clip=0.02))
    assert max(p.abs().max() for p in trainer.critic.parameters()) > 0.02
    for _ in range(3):
        trainer.train_step()
        assert max(p.abs().max() for p in trainer.critic.parameters()) <= torch.tensor(0.02)
    assert max(p.abs().max() for p in trainer.generator.parameters()) > 0.02


def test_the_generator_step_leaves_no_gradient_in_the_critic(tiny: MakeConfig) -> None:
    trainer = Trainer(tiny())
    trainer.system.critic_optimiser.zero_grad()
    trainer.system.generator_step(trainer.noise(16), torch.zeros(16, 2))
    assert all(p.grad is None for p in trainer.critic.parameters())


def test_no_critic_has_batch_norm() -> None:
    for data in ("digits", "8gaussians"):
        _, critic = build_models(data, 2, 8)
        assert not any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in critic.modules())


@pytest.mark.parametrize(("algorithm", "data"), [("wgan", "8gaussians"), ("wgan-gp", "digits")])
def test_a_run_writes_pictures_numbers_and_weights_and_says_where(
    algorithm: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    quick = ("--steps", "12", "--width", "8", "--batch-size", "16", "--n-critic", "1", "--eval-every", "5")
    assert main([algorithm, "--data", data, "--out", str(out), "--seed", "3", *quick]) == 0
    printed = capsys.readouterr().out
    files = {"samples.png", "curves.png", "curves.csv", "metrics.json", "generator.safetensors"}
    assert {path.name for path in out.iterdir()} == files | {checkpoint.NAME}
    for name in files:
        assert str(out / name) in printed
    for name in ("samples.png", "curves.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics.keys() == {"config", "versions", "threads", "steps", "quality", "curves", "seconds"}
    assert metrics["curves"]["quality"]["step"] == [0, 5, 10, 12]
    on_points = {"share_within_4_sigma", "modes_covered", "wasserstein_1"}
    measures = {"frechet_distance", "inception_score"} if data == "digits" else on_points
    assert metrics["quality"]["start"].keys() == metrics["quality"]["end"].keys() == measures
    generator, _ = build_models(data, metrics["config"]["latent"], 8)
    generator.load_state_dict(load_file(out / "generator.safetensors"))


def test_the_same_seed_gives_the_same_metrics_but_for_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for plot in ("plot_points", "plot_curves"):
        monkeypatch.setattr(plots, plot, lambda *_: None)
    quick = ("--data", "8gaussians", "--steps", "3", "--width", "8", "--batch-size", "16", "--seed", "3")
    written = []
    for name in ("one", "two"):
        assert main(["wgan-gp", *quick, "--out", str(tmp_path / name)]) == 0
        metrics = json.loads((tmp_path / name / "metrics.json").read_text())
        del metrics["seconds"], metrics["config"]["out"]
        written.append(metrics)
    assert written[0] == written[1]


def test_training_improves_the_frechet_distance(tiny: MakeConfig) -> None:
    trainer = run(tiny(data="digits", steps=100, batch_size=64, width=64, lr=1e-3, eval_every=100))
    start, end = trainer.quality_curve["frechet_distance"]
    assert end < start / 2


def test_a_failed_write_leaves_the_file_before_it(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("before")

    def write_half() -> None:
        with replacing(path) as part:
            part.write_text("aft")
            raise RuntimeError("halfway")

    with pytest.raises(RuntimeError, match="halfway"):
        write_half()
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]
