from __future__ import annotations

import copy
import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gpkernels
from gpkernels.arguments import UserError
from gptrainer.algorithms.ssl_ct_gan import SemiSupervisedLoss
from gptrainer.algorithms.variants import WithFeatures, critic_loss, look_ahead
from gptrainer.config import TrainConfig
from gptrainer.data import DATASETS
from gptrainer.loop import Trainer
from gptrainer.models.layers import FeatureCritic
from gptrainer.processes import Processes
from gptrainer.systems import SYSTEMS

MakeConfig = Callable[..., TrainConfig]
pytestmark = pytest.mark.usefixtures("no_quality")


def weights(trainer: Trainer) -> dict[str, list[Tensor]]:
    return {
        name: [p.detach().clone() for p in net.parameters() if p.requires_grad]
        for name, net in trainer.networks.items()
    }


def mlp(*sizes: int) -> FeatureCritic:
    layers: list[nn.Module] = []
    for n, m in pairwise(sizes[:-1]):
        layers += [nn.Linear(n, m), nn.Tanh()]
    return FeatureCritic(*layers, nn.Linear(*sizes[-2:]))


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_system_trains_both_networks_and_stays_finite(name: str, tiny: MakeConfig) -> None:
    data = "digits" if name == "ssl-ct-gan" else "8gaussians"
    trainer = Trainer(tiny(algorithm=name, data=data, steps=20, n_critic=None, eval_every=20))
    before = weights(trainer)
    trainer.train()
    for network, tensors in weights(trainer).items():
        moved = [not torch.equal(a, b) for a, b in zip(before[network], tensors, strict=True)]
        assert sum(moved) >= len(moved) - 1, network  # the bias of a score is no concern of a Wasserstein critic
        assert all(tensor.isfinite().all() for tensor in tensors)
    assert trainer.critic_curve["step"] == [*range(1, 21)]
    assert {
        trainer.system.estimate.name,
        "critic_loss",
        "generator_loss",
        "gradient_norm",
    } <= trainer.critic_curve.keys()
    assert all(math.isfinite(x) for values in trainer.critic_curve.values() for x in values)


@pytest.mark.parametrize("data", [name for name, known in DATASETS.items() if known.kind == "points"])
@pytest.mark.parametrize("name", ["gan-noise", "wgan-gp", "r1", "unrolled"])
def test_systems_train_on_every_set_of_points(name: str, data: str, tiny: MakeConfig) -> None:
    trainer = Trainer(tiny(algorithm=name, data=data, steps=3, latent=None))
    trainer.train()
    assert all(math.isfinite(x) for values in trainer.critic_curve.values() for x in values)


@pytest.mark.parametrize("name", ["gan", "nsgan", "r1", "dragan", "wgan-gp", "hinge", "lsgan", "r3gan"])
def test_the_generator_minimises_its_published_loss(name: str, tiny: MakeConfig) -> None:
    trainer = Trainer(tiny(algorithm=name))
    latent, real = trainer.noise(16), torch.randn(16, 2)
    scores = trainer.critic(trainer.generator(latent))
    published = {
        "gan": F.logsigmoid(-scores).mean(),
        "wgan-gp": -scores.mean(),
        "hinge": -scores.mean(),
        "lsgan": F.mse_loss(scores, torch.ones_like(scores)),
        "r3gan": F.softplus(trainer.critic(real) - scores).mean(),
    }.get(name, -F.logsigmoid(scores).mean())
    loss = trainer.system.generator_step(latent, real)["generator_loss"]
    assert loss.item() == pytest.approx(published.item(), rel=1e-5)


def test_the_js_estimate_of_scores_that_tell_nothing_is_zero_and_of_perfect_ones_log_2(tiny: MakeConfig) -> None:
    system = Trainer(tiny(algorithm="gan")).system
    nothing = gpkernels.gan_discriminator_loss(torch.zeros(8), torch.zeros(8))
    perfect = gpkernels.gan_discriminator_loss(torch.full((8,), 50.0), torch.full((8,), -50.0))
    assert system.estimate.of(nothing).item() == pytest.approx(0, abs=1e-6)
    assert system.estimate.of(perfect).item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("name", ["hinge", "lsgan"])
def test_the_critic_minimises_its_published_loss_of_scores(name: str, tiny: MakeConfig) -> None:
    trainer = Trainer(tiny(algorithm=name))
    real, fake = torch.randn(16, 2), 3 * torch.randn(16, 2)
    on_real, on_fake = trainer.critic(real), trainer.critic(fake)
    published = {
        "hinge": F.hinge_embedding_loss(on_real, -torch.ones(16, 1))
        + F.hinge_embedding_loss(-on_fake, -torch.ones(16, 1)),
        "lsgan": F.mse_loss(on_real, torch.ones(16, 1)) + F.mse_loss(on_fake, torch.zeros(16, 1)),
    }[name]
    assert trainer.system.critic_parts(real, fake)["loss"].item() == pytest.approx(published.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("name", "equal", "disjoint", "most"),
    [
        ("hinge", (0.0, 0.0), (1.0, -1.0), 1.0),
        ("lsgan", (0.5, 0.5), (1.0, 0.0), 1.0),
        ("r3gan", (0.0, 0.0), (25.0, -25.0), math.log(2)),
    ],
)
def test_estimates_are_0_for_equal_and_greatest_for_disjoint_distributions(
    name: str, equal: tuple[float, float], disjoint: tuple[float, float], most: float, tiny: MakeConfig
) -> None:
    system = Trainer(tiny(algorithm=name)).system
    real, fake = torch.ones(8, 2), torch.zeros(8, 2)
    for (on_real, on_fake), expected in ((equal, 0.0), (disjoint, most)):  # scores of the best critic
        best = Between(on_real, on_fake)
        system.critic_loss.critic = best
        assert system.estimate.of(system.critic_parts(real, fake)["adversarial"]).item() == pytest.approx(
            expected, abs=1e-6
        )


class Between(nn.Module):
    """A linear critic with given scores of ones and zeros."""

    def __init__(self, at_one: float, at_zero: float) -> None:
        super().__init__()
        self.slope, self.offset = (nn.Parameter(torch.tensor(x)) for x in (at_one - at_zero, at_zero))

    def forward(self, x: Tensor) -> Tensor:
        return self.slope * x.mean(1) + self.offset


# --- instance noise ---------------------------------------------------------------------------------------------------


def test_instance_noise_falls_linearly_to_nothing(tiny: MakeConfig) -> None:
    system = Trainer(tiny(algorithm="gan-noise", noise=2.0, noise_steps=10)).system
    x = torch.zeros(4000, 2)
    spreads = []
    for step in (0, 5, 10, 20):
        system.begin_step(step)
        spreads.append(system.critic_input(x).std().item())
    assert spreads == pytest.approx([2.0, 1.0, 0.0, 0.0], rel=0.05)


def test_the_critic_sees_noise_on_real_and_on_generated_samples(
    tiny: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(tiny(algorithm="gan-noise", noise=1.0))
    seen: list[Tensor] = []
    handle = trainer.critic.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    real, fake = torch.zeros(16, 2), torch.zeros(16, 2)
    trainer.system.critic_step(real, fake)
    handle.remove()
    assert len(seen) >= 2
    assert all(0.5 < x.std() < 1.6 for x in seen)


# --- zero-centred penalties -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["r1", "r2", "r3gan"])
def test_the_loss_of_a_zero_centred_system_is_its_plain_spelling(name: str, tiny: MakeConfig) -> None:
    trainer = Trainer(tiny(algorithm=name, gamma=10.0))
    critic, real, fake = trainer.critic, torch.randn(16, 2), torch.randn(16, 2) + 1
    parts = trainer.system.critic_parts(real, fake)
    penalty = torch.zeros(())
    for x in {"r1": [real], "r2": [fake], "r3gan": [real, fake]}[name]:
        points = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(critic(points).sum(), points, create_graph=True)
        penalty = penalty + grad.square().sum(1).mean()
    if name == "r3gan":
        adversarial = F.softplus(critic(fake) - critic(real)).mean()
    else:
        adversarial = F.softplus(-critic(real)).mean() + F.softplus(critic(fake)).mean()
    plain = adversarial + 10 / 2 * penalty
    assert parts["loss"].item() == pytest.approx(plain.item(), rel=1e-5)
    assert parts["penalty"].item() == pytest.approx(penalty.item(), rel=1e-5)
    own = [p for p in critic.parameters() if p.requires_grad]
    ours, theirs = (torch.autograd.grad(loss, own, materialize_grads=True) for loss in (parts["loss"], plain))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


def test_the_curve_of_a_lazy_penalty_keeps_its_last_value(tiny: MakeConfig) -> None:
    trainer = Trainer(tiny(algorithm="r3gan", lazy=2, n_critic=1))
    real, fake = torch.randn(2, 16, 2).unbind()
    due, between = (trainer.system.critic_parts(real, fake) for _ in range(2))
    assert due["penalty"] > 0
    assert between["penalty"] == due["penalty"]
    assert between["loss"].item() == pytest.approx(between["adversarial"].item())


def test_a_generated_sample_without_a_real_one_is_refused(tiny: MakeConfig) -> None:
    with pytest.raises(UserError, match=r"--generator-batch-size: .*, got 8, with 16 real"):
        tiny(algorithm="r3gan", generator_batch_size=8)


def test_a_lazy_penalty_weighs_over_an_interval_what_a_steady_one_does(tiny: MakeConfig) -> None:
    batches = torch.randn(2, 4, 16, 2).unbind(1)

    def total(lazy: int) -> list[Tensor]:
        trainer = Trainer(tiny(algorithm="r1", lazy=lazy, gamma=8.0, lr=1e-30, n_critic=1))  # weights stand still
        grads = []
        for step, (_, fake) in enumerate(batches):
            trainer.system.begin_step(step)
            trainer.system.critic_step(batches[0][0], fake)  # one real batch: its penalty is the same in each step
            grads.append([p.grad.clone() for p in trainer.critic.parameters() if p.grad is not None])
        return [torch.stack(of_one).sum(0) for of_one in zip(*grads, strict=True)]

    for steady, lazy in zip(total(1), total(4), strict=True):
        assert torch.allclose(steady, lazy, rtol=1e-4, atol=1e-5)


def test_a_lazy_penalty_corrects_adam_as_stylegan_does(tiny: MakeConfig) -> None:
    system = Trainer(tiny(algorithm="r2", lazy=16, lr=0.001, betas=(0.5, 0.99))).system
    (critic,), (generator,) = system.critic_optimiser.param_groups, system.generator_optimiser.param_groups
    assert critic["lr"] == pytest.approx(0.001 * 16 / 17)
    assert critic["betas"] == pytest.approx((0.5 ** (16 / 17), 0.99 ** (16 / 17)))
    assert (generator["lr"], generator["betas"]) == (0.001, (0.5, 0.99))


# --- consistency ------------------------------------------------------------------------------------------------------


def test_the_loss_of_ct_gan_is_its_plain_spelling(tiny: MakeConfig) -> None:
    torch.manual_seed(2)
    trainer = Trainer(tiny(algorithm="ct-gan", data="8gaussians", penalty_weight=10.0, consistency_margin=0.05))
    critic = mlp(2, 16, 8, 1)
    real, fake, eps = torch.randn(12, 2), torch.randn(12, 2), torch.rand(12)

    class TwoFaced(nn.Module):
        """The second pass over the real batch gives something else, as under dropout, but known."""

        def __init__(self) -> None:
            super().__init__()
            self.critic = critic

        def with_features(self, x: Tensor) -> tuple[Tensor, Tensor]:
            n = len(real)
            scores, features = self.critic.with_features(x)
            again = torch.zeros(len(x), 1)
            if len(x) == 2 * n:  # both passes as one batch
                again[n:] = 1
            return scores + 0.3 * again * scores.sin(), features * (1 - 0.5 * again)

    loss = gpkernels.CriticLoss(
        WithFeatures(TwoFaced()),
        penalty_weight=10.0,
        consistency_weight=2.0,
        consistency_margin=0.05 / 2.0,
    )
    assert loss.extra_repr() == trainer.system.critic_loss.extra_repr()
    assert trainer.system.critic_loss.consistency_margin == loss.consistency_margin
    parts = loss(real, fake, eps=eps)
    first, features = critic.with_features(real)
    second, features2 = first + 0.3 * first.sin(), 0.5 * features
    ct = 2 * (first - second).square().squeeze(1) + 0.1 * 2 * (features - features2).square().mean(1)
    points = (eps[:, None] * real + (1 - eps[:, None]) * fake).requires_grad_()
    (grad,) = torch.autograd.grad(critic(points).sum(), points, create_graph=True)
    penalty = (grad.norm(dim=1) - 1).square().mean()
    plain = critic(fake).mean() - first.mean() + 10 * penalty + (ct - 0.05).clamp(min=0).mean()
    assert parts.loss.item() == pytest.approx(plain.item(), rel=1e-5)
    ours = torch.autograd.grad(parts.loss, list(critic.parameters()))
    theirs = torch.autograd.grad(plain, list(critic.parameters()))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


def test_the_critic_of_ct_gan_drops_units_in_every_pass_of_training(tiny: MakeConfig) -> None:
    trainer = Trainer(tiny(algorithm="ct-gan"))
    x = torch.randn(16, 2)
    assert not torch.equal(trainer.critic(x), trainer.critic(x))
    metrics = trainer.system.metrics(trainer.system.critic_step(x, torch.randn(16, 2)))
    assert metrics["consistency"] > 0


def test_the_semi_supervised_loss_is_its_plain_spelling() -> None:
    torch.manual_seed(0)
    classifier = mlp(4, 8, 5).double()
    images, unlabelled, fake = (torch.randn(n, 4).double() for n in (5, 7, 6))
    labels = torch.tensor([0, 1, 2, 3, 4])
    losses = SemiSupervisedLoss(classifier, 0.1)(images, labels, unlabelled, fake)
    real, generated = classifier(unlabelled).logsumexp(1), classifier(fake).logsumexp(1)
    unsupervised = 0.5 * (-real.mean() + F.softplus(real).mean() + F.softplus(generated).mean())
    plain = F.cross_entropy(classifier(images), labels) + unsupervised  # without noise both passes are one: CT is 0
    assert losses["loss"].item() == pytest.approx(plain.item())
    assert losses["consistency"].item() == 0


def test_the_semi_supervised_consistency_is_the_mean_squared_difference_of_probabilities() -> None:
    torch.manual_seed(0)
    classifier = nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5)).double()
    x = torch.randn(6, 4).double()
    torch.manual_seed(1)
    losses = SemiSupervisedLoss(classifier, 0.1)(x, torch.zeros(6, dtype=torch.int64), x, x)
    torch.manual_seed(1)
    classifier(x)
    first, second = (classifier(x).softmax(1) for _ in range(2))
    assert losses["consistency"].item() == pytest.approx((first - second).square().mean(1).mean().item())


def test_the_semi_supervised_classifier_learns_from_its_few_labels(tiny: MakeConfig) -> None:
    trainer = Trainer(
        tiny(
            algorithm="ssl-ct-gan",
            data="digits",
            steps=80,
            width=32,
            batch_size=100,
            n_critic=1,
            eval_every=80,
            ema=0.9,
        )
    )
    trainer.train()
    start, end = trainer.quality_curve["held_out_error"]
    assert start > 0.7
    assert end < 0.4


def test_the_semi_supervised_system_refuses_networks_that_do_not_classify(tiny: MakeConfig) -> None:
    with pytest.raises(UserError, match="--network: expected semi-supervised for ssl-ct-gan, got mlp"):
        Trainer(tiny(algorithm="ssl-ct-gan", data="digits", network="mlp"))


def test_the_consistency_term_refuses_critics_without_features(tiny: MakeConfig) -> None:
    with pytest.raises(UserError, match="--network: expected one with features for ct-gan, got dirac"):
        Trainer(tiny(algorithm="ct-gan", data="dirac", network="dirac"))


@pytest.mark.parametrize("network", ["mlp", "mlp12", "unrolled"])
def test_ct_gan_trains_any_fully_connected_critic(network: str, tiny: MakeConfig) -> None:
    trainer = Trainer(tiny(algorithm="ct-gan", network=network))
    assert trainer.train_step()["consistency"] == 0  # without dropout both passes are one


# --- unrolling --------------------------------------------------------------------------------------------------------


def doubled() -> tuple[nn.Sequential, nn.Sequential, torch.optim.Adam, Tensor, Tensor]:
    """A critic and a generator in float64, the critic's Adam after some steps, real samples and noise."""
    torch.manual_seed(0)
    critic, generator = mlp(2, 8, 1).double(), mlp(3, 8, 2).double()
    adam = torch.optim.Adam(critic.parameters(), lr=0.05, betas=(0.5, 0.99))
    real, latent = torch.randn(16, 2).double(), torch.randn(16, 3).double()
    for _ in range(3):
        adam.zero_grad()
        F.binary_cross_entropy_with_logits(critic(real), torch.ones(16, 1).double()).backward()
        adam.step()
    return critic, generator, adam, real, latent


@pytest.mark.parametrize("fresh", [True, False])
def test_looking_ahead_goes_where_adam_would_go_and_changes_nothing(fresh: bool) -> None:
    critic, generator, adam, real, latent = doubled()
    if fresh:
        adam = torch.optim.Adam(critic.parameters(), lr=0.05, betas=(0.5, 0.99))
    fake = generator(latent).detach()
    before = copy.deepcopy((critic.state_dict(), adam.state_dict()))
    ahead = look_ahead(critic, adam, real, fake, 4, Processes())
    for old, now in zip(before, (critic.state_dict(), adam.state_dict()), strict=True):
        assert str(old) == str(now)
    for _ in range(4):
        adam.zero_grad()
        (F.softplus(-critic(real)).mean() + F.softplus(critic(fake)).mean()).backward()
        adam.step()
    for name, p in critic.named_parameters():
        assert torch.allclose(ahead[name], p, rtol=1e-9, atol=1e-12), name


def test_the_gradient_through_the_steps_ahead_is_the_numerical_derivative() -> None:
    critic, generator, adam, real, latent = doubled()
    weight = generator[0].weight

    def objective() -> Tensor:
        fake = generator(latent)
        return -critic_loss(critic, look_ahead(critic, adam, real, fake, 3, Processes()), real, fake)

    (exact,) = torch.autograd.grad(objective(), weight)
    now = critic_loss(critic, dict(critic.named_parameters()), real, generator(latent))
    (without,) = torch.autograd.grad(-now, weight)
    assert (exact - without).norm() > 0.1 * exact.norm()  # the steps ahead matter
    for i, j in ((0, 0), (3, 1), (7, 2)):
        sides = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                weight[i, j] += step
                value = objective_value(objective)
                weight[i, j] -= step
            sides.append(value)
        assert exact[i, j].item() == pytest.approx((sides[0] - sides[1]) / 2e-6, rel=1e-4, abs=1e-9)


def objective_value(objective: Callable[[], Tensor]) -> float:
    with torch.enable_grad():
        return objective().item()


def test_a_dead_unit_does_not_spoil_the_gradient_through_the_steps_ahead() -> None:
    critic = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1))
    with torch.no_grad():
        critic[0].bias[0] = -100.0
    adam = torch.optim.Adam(critic.parameters(), lr=0.01)
    fake, real = torch.randn(8, 2, requires_grad=True), torch.randn(8, 2)
    loss = critic_loss(critic, look_ahead(critic, adam, real, fake, 2, Processes()), real, fake)
    (grad,) = torch.autograd.grad(loss, fake)
    assert grad.isfinite().all()


# --- what all share ---------------------------------------------------------------------------------------------------


def test_learning_rates_fall_linearly_to_nothing(tiny: MakeConfig) -> None:
    system = Trainer(tiny(decay_steps=4, lr=0.2, generator_lr=0.1)).system
    rates = []
    for step in (0, 1, 4, 9):
        system.begin_step(step)
        rates.append([o.param_groups[0]["lr"] for o in (system.critic_optimiser, system.generator_optimiser)])
    assert rates == [pytest.approx(pair) for pair in ([0.2, 0.1], [0.15, 0.075], [0.0, 0.0], [0.0, 0.0])]


def test_the_moving_average_is_what_is_measured_and_its_weights_are_the_average(tiny: MakeConfig) -> None:
    trainer = Trainer(tiny(ema=0.5))
    kept = []
    for _ in range(3):
        trainer.train_step()
        kept.append([p.detach().clone() for p in trainer.generator.parameters()])
    for i, average in enumerate(trainer.evaluated("generator").parameters()):
        first, second, third = (weights[i] for weights in kept)
        assert torch.allclose(average, 0.5 * (0.5 * first + 0.5 * second) + 0.5 * third)
    assert trainer.evaluated("generator") is not trainer.generator
    assert Trainer(tiny()).evaluated("generator").state_dict().keys() == trainer.generator.state_dict().keys()


def test_a_boosted_critic_takes_a_hundred_steps_at_first(tiny: MakeConfig) -> None:
    trainer = Trainer(tiny(algorithm="wgan", critic_boost=True, n_critic=2))
    assert trainer._critic_steps() == 100
    trainer.step = 25
    assert trainer._critic_steps() == 2
    trainer.step = 500
    assert trainer._critic_steps() == 100


@pytest.mark.parametrize(
    ("data", "passes"), [("8gaussians", 2), ("digits", 6)], ids=["samples on their own", "BatchNorm, which mixes them"]
)
def test_one_pass_of_the_generator_serves_all_critic_steps_unless_it_mixes_samples(
    data: str, passes: int, tiny: MakeConfig
) -> None:
    trainer = Trainer(tiny(algorithm="wgan-gp", data=data, n_critic=5))
    sizes: list[int] = []
    trainer.generator.register_forward_hook(lambda module, args, out: sizes.append(len(out)))
    trainer.train_step()
    assert len(sizes) == passes
    assert sum(sizes[:-1]) == 5 * trainer.config.batch_size
    assert sizes[-1] == trainer.config.resolved("generator_batch_size")


def test_the_critic_sees_no_sample_of_a_pass_twice(tiny: MakeConfig) -> None:
    trainer = Trainer(tiny(algorithm="wgan-gp", data="8gaussians", n_critic=3))
    batches = [fake for _, fake in trainer.next_batches(7)]
    assert len(batches) == 7
    assert len(torch.cat(batches).unique(dim=0)) == 7 * trainer.config.batch_size
