from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from gptrainer.benchmark import compare
from gptrainer.config import TrainConfig
from gptrainer.data import load_digits
from gptrainer.models import build_models


@pytest.mark.parametrize("algorithm", ["wgan", "wgan-gp"])
def test_our_critic_step_has_the_gradients_of_plain_pytorch(algorithm: str, tiny: Callable[..., TrainConfig]) -> None:
    torch.manual_seed(0)
    generator, critic = build_models("digits", 16, 32)
    real = load_digits().images[:32]
    fake = generator(torch.randn(32, 16)).detach()
    weights = [p.clone() for p in critic.parameters()]
    threads = torch.get_num_threads()
    comparison = compare(tiny(algorithm=algorithm, data="digits"), critic, real, fake)
    assert comparison.gradient_difference < 1e-5
    assert comparison.ours_ms > 0
    assert comparison.plain_ms > 0
    assert comparison.speedup == comparison.plain_ms / comparison.ours_ms
    assert torch.get_num_threads() == threads
    assert all(torch.equal(p, before) for p, before in zip(critic.parameters(), weights, strict=True))
