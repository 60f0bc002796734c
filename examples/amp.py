"""Adversarial motion priors: a discriminator of transitions whose gradient is penalised at normalised observations.

Formulas (Peng et al. 2021, "AMP", eq. 6 and 7; LSGAN's loss with targets of plus and minus 1):

    L(D) = E_expert (D(x) - 1)^2 + E_policy (D(x) + 1)^2 + w / 2 E_expert |grad_x D(x)|^2,  w = 10
    reward = max(0, 1 - (D(x) - 1)^2 / 4)

x is the normalised observation. Robots' features differ in scale by orders of magnitude, so a penalty at the raw
ones would bind in some of them only: observations are normalised first, and the trunk alone is the critic.

The expert is a synthetic gait. The policy is driven by a clock and trained through the reward, where AMP uses PPO.

    python examples/amp.py --out out    # about a minute; writes amp.csv and amp.png
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

import gpkernels

JOINTS, TIME_STEP = 35, 0.03
FEATURES = 3 * JOINTS  # positions, next positions, velocities


class RunningNormaliser(nn.Module):
    """Normalise by the mean and standard deviation of everything seen so far (Welford 1962)."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.mean, self.variance = nn.Buffer(torch.zeros(features)), nn.Buffer(torch.ones(features))
        self.count = nn.Buffer(torch.tensor(1e-4))

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        self.count.add_(len(x))
        share, delta = len(x) / self.count, x.mean(0) - self.mean
        self.variance.lerp_(x.var(0, unbiased=False), share).add_(share * (1 - share) * delta.square())
        self.mean.add_(share * delta)

    def forward(self, x: Tensor) -> Tensor:
        return ((x - self.mean) / (self.variance + 1e-5).sqrt()).clamp(-10, 10)


class ReplayBuffer:
    """The last observations of the policy, overwritten in a ring."""

    def __init__(self, capacity: int) -> None:
        self.rows, self.filled, self.next = torch.zeros(capacity, FEATURES), 0, 0

    def add(self, x: Tensor) -> None:
        self.rows[torch.arange(self.next, self.next + len(x)) % len(self.rows)] = x
        self.next = (self.next + len(x)) % len(self.rows)
        self.filled = min(self.filled + len(x), len(self.rows))

    def sample(self, n: int) -> Tensor:
        return self.rows[torch.randint(self.filled, (n,))]


class Gait:
    """A periodic motion: each joint swings with two harmonics of its own."""

    def __init__(self) -> None:
        self.amplitudes = torch.rand(2, JOINTS) * torch.tensor([[1.0], [0.3]])
        self.offsets = 2 * torch.pi * torch.rand(2, JOINTS)

    def __call__(self, phase: Tensor) -> Tensor:
        angles = torch.tensor([[1.0], [2.0]]) * phase[:, None, None] + self.offsets
        return (self.amplitudes * angles.sin()).sum(1)


class Policy(nn.Sequential):
    """Maps the phase of a clock to joint positions."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 128), nn.ELU(), nn.Linear(128, 128), nn.ELU(), nn.Linear(128, JOINTS))

    def forward(self, phase: Tensor) -> Tensor:
        return super().forward(torch.stack([phase.sin(), phase.cos(), (2 * phase).sin(), (2 * phase).cos()], 1))


def transitions(motion: Gait | Policy, n: int, noise: float = 0.02) -> Tensor:
    """Observe n transitions at random phases."""
    phase = 2 * torch.pi * torch.rand(n)
    now, then = motion(phase), motion(phase + 2 * torch.pi * TIME_STEP)
    return torch.cat([now, then, (then - now) / TIME_STEP], 1) + noise * torch.randn(n, FEATURES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    options.out.mkdir(parents=True, exist_ok=True)

    gait, policy, buffer, normalise = Gait(), Policy(), ReplayBuffer(20_000), RunningNormaliser(FEATURES)
    trunk = nn.Sequential(nn.Linear(FEATURES, 1024), nn.ReLU(), nn.Linear(1024, 512), nn.ReLU(), nn.Linear(512, 1))
    critic_loss = gpkernels.CriticLoss(
        trunk, objective="least-squares", real_target=1, fake_target=-1, penalty="r1", penalty_weight=10 / 2
    )
    critic_optimizer = torch.optim.Adam(trunk.parameters(), 1e-4)
    policy_optimizer = torch.optim.Adam(policy.parameters(), 2e-3)
    rows = []
    for step in range(options.steps):
        with torch.no_grad():
            buffer.add(transitions(policy, options.batch))
            expert, replayed = transitions(gait, options.batch), buffer.sample(options.batch)
        normalise.update(torch.cat([expert, replayed]))
        parts = critic_loss(normalise(expert), normalise(replayed))
        critic_optimizer.zero_grad()
        parts.loss.backward()
        critic_optimizer.step()

        scores = trunk(normalise(transitions(policy, options.batch)))
        policy_optimizer.zero_grad()
        gpkernels.least_squares_generator_loss(scores, target=1.0).backward()  # the reward without its clamp
        policy_optimizer.step()

        if step % 100 == 0 or step == options.steps - 1:
            x = normalise(expert)
            with torch.no_grad():
                real, fake = trunk(x), trunk(normalise(replayed))
                accuracy = torch.cat([real > 0, fake < 0]).float().mean().item()
                reward = (1 - (fake - 1).square() / 4).clamp(min=0).mean().item()
            norm = gpkernels.input_gradient(trunk, x).detach().norm(dim=1).mean().item()
            rows.append((step, accuracy, norm, reward))
            print(f"step {step:4}  accuracy {accuracy:.3f}  |grad D| at expert data {norm:.3f}  reward {reward:.3f}")

    with (options.out / "amp.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("step", "accuracy", "gradient_norm", "reward"), *rows])
    phase = torch.linspace(0, 2 * torch.pi, 100)
    for name, motion in (("expert", gait), ("policy", policy)):  # one joint over another: the clock's zero is free
        plt.plot(*motion(phase).detach()[:, :2].T, label=name)
    plt.legend()
    plt.savefig(options.out / "amp.png")


if __name__ == "__main__":
    main()
