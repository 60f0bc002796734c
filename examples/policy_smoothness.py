"""Lipschitz-constrained policies: a penalty on the gradient of log pi(a | obs) makes a policy's actions smooth.

Formula (Chen et al. 2024, "Learning smooth humanoid locomotion through Lipschitz-constrained policies", eq. 6):

    loss = -E log pi(a | obs) + w E |grad_obs log pi(a | obs)|^2

Here the first term is behaviour cloning of a noisy teacher that balances an inverted pendulum; with reinforcement
learning it is PPO's loss instead. `value_and_input_gradient` gives log pi and its gradient from one call of the policy.

    python examples/policy_smoothness.py --out out    # about half a minute; writes policy_smoothness.csv and .png
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn
from torch.distributions import Normal

import gpkernels

TIME_STEP, SENSOR_NOISE, TEACHER_NOISE = 0.02, 0.03, 1.0


class GaussianPolicy(nn.Module):
    """Gaussian of actions with a learnt standard deviation; called, it gives log pi(action | obs)."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.mean = nn.Sequential(nn.Linear(3, width), nn.ELU(), nn.Linear(width, width), nn.ELU(), nn.Linear(width, 1))
        self.log_std = nn.Parameter(torch.zeros(1))

    def forward(self, observation: Tensor, action: Tensor) -> Tensor:
        return Normal(self.mean(observation), self.log_std.exp()).log_prob(action).sum(-1)


def observe(state: Tensor) -> Tensor:
    """Sine and cosine of the angle and the angular velocity, with the sensors' noise."""
    angle, velocity = state.unbind(-1)
    clean = torch.stack([angle.sin(), angle.cos(), velocity], -1)
    return clean + SENSOR_NOISE * torch.randn_like(clean)


def advance(state: Tensor, action: Tensor) -> Tensor:
    """An inverted pendulum of unit mass and length, torque-driven (semi-implicit Euler)."""
    angle, velocity = state.unbind(-1)
    velocity = velocity + TIME_STEP * (9.81 * angle.sin() + action.squeeze(-1).clamp(-20, 20))
    return torch.stack([angle + TIME_STEP * velocity, velocity], -1)


def teacher(state: Tensor) -> Tensor:
    angle, velocity = state.unbind(-1)
    return (-30 * angle - 8 * velocity).clamp(-20, 20).unsqueeze(-1)


def demonstrations(episodes: int, length: int) -> tuple[Tensor, Tensor]:
    """Record the teacher's noisy actions and what a student would observe."""
    state, observations, actions = torch.randn(episodes, 2) * 0.3, [], []
    for _ in range(length):
        action = teacher(state) + TEACHER_NOISE * torch.randn(episodes, 1)
        observations.append(observe(state))
        actions.append(action)
        state = advance(state, action)
    return torch.cat(observations), torch.cat(actions)


def trained(observations: Tensor, actions: Tensor, weight: float, steps: int) -> GaussianPolicy:
    policy = GaussianPolicy()
    optimizer = torch.optim.Adam(policy.parameters(), 1e-3)
    for _ in range(steps):
        batch = torch.randint(len(observations), (256,))
        log_prob, gradient = gpkernels.value_and_input_gradient(
            policy, observations[batch], critic_args=(actions[batch],)
        )
        loss = -log_prob.mean() + weight * gradient.square().sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return policy


@torch.no_grad()
def rolled_out(policy: GaussianPolicy, length: int) -> tuple[Tensor, Tensor]:
    """Run the mean action from 64 states; return the angles and the actions, (length, 64) each."""
    state, angles, actions = torch.randn(64, 2) * 0.3, [], []
    for _ in range(length):
        action = policy.mean(observe(state))
        state = advance(state, action)
        angles.append(state[:, 0])
        actions.append(action[:, 0])
    return torch.stack(angles), torch.stack(actions)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--weight", type=float, default=0.0005, help="of the penalty")
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    options.out.mkdir(parents=True, exist_ok=True)

    observations, actions = demonstrations(episodes=8, length=200)
    rows = []
    for weight in (0.0, options.weight):
        torch.manual_seed(options.seed)
        policy = trained(observations, actions, weight, options.steps)
        torch.manual_seed(options.seed + 1)
        angles, taken = rolled_out(policy, 300)
        change = taken.diff(dim=0).abs().mean().item()
        jerk = taken.diff(n=2, dim=0).abs().mean().item()
        angle = angles[100:].abs().mean().item()
        rows.append((weight, change, jerk, angle))
        print(
            f"weight {weight:<7}  |change of action| {change:.3f}  |second difference| {jerk:.3f}  |angle| {angle:.3f}"
        )
        plt.plot(TIME_STEP * torch.arange(100), taken[:100, 0], label=f"weight {weight}")
    plt.xlabel("seconds")
    plt.ylabel("torque")
    plt.legend()
    plt.savefig(options.out / "policy_smoothness.png")
    with (options.out / "policy_smoothness.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("weight", "change", "second_difference", "angle"), *rows])


if __name__ == "__main__":
    main()
