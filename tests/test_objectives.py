"""CriticLoss with every objective, several penalties, packs, lazy penalties and further inputs: PyTorch's numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gpkernels as gpk
from counting import counted

N, D = 12, 6


def mlp(act: nn.Module, out: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Linear(D, 16), act, nn.Linear(16, 16), act, nn.Linear(16, out)).double()


class Conditional(nn.Module):
    """A projection of label embeddings, as in conditional critics."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.labels = mlp(nn.SiLU(), 4), nn.Linear(4, 1).double(), nn.Embedding(3, 4).double()

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        h = self.body(x)
        return self.head(h) + (h * self.labels(labels)).sum(1, keepdim=True)


class Packed(nn.Module):
    def __init__(self, pack: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(D * pack, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1)).double()
        self.width = D * pack

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.view(-1, self.width))


CRITICS = {"relu": lambda: mlp(nn.ReLU()), "tanh": lambda: mlp(nn.Tanh()), "map": lambda: mlp(nn.LeakyReLU(0.2), 3)}


def adversarial(objective: str, real: Tensor, fake: Tensor, a: float = 1.0, b: float = 0.0) -> Tensor:
    if objective == "wgan":
        return fake.mean() - real.mean()
    if objective == "gan":
        return F.softplus(-real).mean() + F.softplus(fake).mean()
    if objective == "hinge":
        return F.relu(1 - real).mean() + F.relu(1 + fake).mean()
    if objective == "least-squares":
        return (real - a).square().mean() + (fake - b).square().mean()
    return F.softplus(fake - real).mean()


def penalty(critic: Any, name: str, real: Tensor, fake: Tensor, eps: Tensor, pack: int = 1) -> Tensor:
    points = {"r1": real, "r2": fake, "wgan-gp": eps[:, None] * real + (1 - eps[:, None]) * fake}[name]
    x = points.detach().requires_grad_()
    (g,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    norm = g.reshape(len(x) // pack, -1).norm(dim=1)
    return ((norm - 1) ** 2).mean() if name == "wgan-gp" else (norm**2).mean()


def samples() -> tuple[Tensor, Tensor, Tensor]:
    return (*torch.randn(2, N, D, dtype=torch.float64), torch.rand(N, dtype=torch.float64))


def assert_same(ours: Tensor, exact: Tensor, critic: nn.Module) -> None:
    torch.testing.assert_close(ours, exact)
    weights = list(critic.parameters())
    pairs = (torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True) for loss in (ours, exact))
    for a, b in zip(*pairs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


PENALTIES: list[Mapping[str, float]] = [
    {},
    {"r1": 0.7},
    {"r2": 0.3},
    {"r1": 0.7, "r2": 0.3},
    {"wgan-gp": 10.0, "r1": 0.5},
    {"r2": 0.5, "wgan-gp": 10.0, "r1": 0.1},
]


@pytest.mark.parametrize("together", [None, False, True])
@pytest.mark.parametrize("penalties", PENALTIES, ids=lambda p: " and ".join(p) or "none")
@pytest.mark.parametrize("critic", CRITICS)
@pytest.mark.parametrize("objective", ["wgan", "gan", "hinge", "least-squares", "relativistic"])
def test_objectives_and_penalties(
    objective: str, critic: str, penalties: Mapping[str, float], together: bool | None
) -> None:
    torch.manual_seed(0)
    net = CRITICS[critic]()
    loss = gpk.CriticLoss(
        net, objective=objective, penalty=penalties, real_target=0.9, fake_target=-1.0, together=together
    )
    for _ in range(5):  # apart, watched, as one batch, by programs
        real, fake, eps = samples()
        parts = loss(real, fake, eps=eps)
        own = adversarial(objective, net(real), net(fake), 0.9, -1.0)
        exact = {name: penalty(net, name, real, fake, eps) for name in penalties}
        torch.testing.assert_close(parts.adversarial, own.detach())
        assert list(parts.penalty) == list(penalties)
        for name, value in exact.items():
            torch.testing.assert_close(parts.penalty[name], value.detach())
        assert_same(parts.loss, own + sum(w * exact[name] for name, w in penalties.items()), net)


@pytest.mark.parametrize("objective", ["relativistic", "hinge"])
def test_r1_and_r2_share_the_passes_of_the_scores(objective: str) -> None:
    net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 1))
    real, fake = torch.randn(2, 32, 64)
    forward = counted(lambda: net(real)).flops

    def eagerly() -> None:
        loss = adversarial(objective, net(real), net(fake))
        for x in (real, fake):
            loss = loss + penalty(net, "r1", x, x, torch.ones(32))
        loss.backward()

    loss = gpk.CriticLoss(net, objective=objective, penalty={"r1": 0.5, "r2": 0.5})
    for _ in range(5):
        assert counted(lambda: loss(real, fake).loss.backward()).flops <= 8.1 * forward
    assert counted(eagerly).flops > 11.5 * forward


@pytest.mark.parametrize("pack", [2, 4])
@pytest.mark.parametrize("objective", ["wgan", "relativistic"])
def test_packs_have_one_score_one_eps_and_one_norm(objective: str, pack: int) -> None:
    torch.manual_seed(0)
    net = Packed(pack)
    loss = gpk.CriticLoss(net, objective=objective, penalty={"wgan-gp": 10.0, "r1": 1.0}, pack=pack)
    for _ in range(5):
        real, fake, _ = samples()
        eps = torch.rand(N // pack, dtype=torch.float64)
        each = eps.repeat_interleave(pack)
        parts = loss(real, fake, eps=eps)
        exact = {name: penalty(net, name, real, fake, each, pack) for name in ("wgan-gp", "r1")}
        own = adversarial(objective, net(real), net(fake))
        assert_same(parts.loss, own + 10 * exact["wgan-gp"] + exact["r1"], net)
        assert_same(gpk.gradient_penalty(net, real, fake, eps=eps, pack=pack), exact["wgan-gp"], net)
        assert_same(gpk.r1_penalty(net, real, pack=pack), exact["r1"], net)
    torch.manual_seed(3)
    drawn = gpk.gradient_penalty(net, real, fake, pack=pack)
    torch.manual_seed(3)
    eps = torch.rand(N // pack, 1, dtype=torch.float64)[:, 0]
    torch.testing.assert_close(drawn, gpk.gradient_penalty(net, real, fake, eps=eps, pack=pack))


def test_a_pack_of_one_batch_is_seen_to_be_possible() -> None:
    net = Packed(4)
    loss = gpk.CriticLoss(net, pack=4, together=True)
    calls = []
    net.register_forward_pre_hook(lambda *_: calls.append(1))
    loss(*samples()[:2])
    assert len(calls) == 1


def test_further_inputs_are_passed_on() -> None:
    torch.manual_seed(0)
    net, labels = Conditional(), torch.randint(3, (N,))
    loss = gpk.CriticLoss(net, objective="hinge", penalty="wgan-gp")
    bound = lambda x: net(x, labels)  # noqa: E731
    for _ in range(4):
        real, fake, eps = samples()
        exact = adversarial("hinge", bound(real), bound(fake)) + 10 * penalty(bound, "wgan-gp", real, fake, eps)
        assert_same(loss(real, fake, eps=eps, critic_args=(labels,)).loss, exact, net)
        assert_same(loss(real, fake, eps=eps, critic_kwargs={"labels": labels}).loss, exact, net)
        assert_same(gpk.r2_penalty(net, fake, critic_args=(labels,)), penalty(bound, "r2", real, fake, eps), net)
    with pytest.raises(ValueError, match="together: expected None or False with further inputs, got True"):
        gpk.CriticLoss(net, together=True)(real, fake, critic_args=(labels,))


def test_batches_may_differ_in_size_where_nothing_pairs_them() -> None:
    torch.manual_seed(0)
    net = mlp(nn.Tanh())
    loss = gpk.CriticLoss(net, objective="gan", penalty={"r1": 0.5, "r2": 0.25})
    for _ in range(4):
        real, fake, eps = samples()
        fake = fake[:5]
        exact = adversarial("gan", net(real), net(fake)) + 0.5 * penalty(net, "r1", real, real, eps)
        assert_same(loss(real, fake).loss, exact + 0.25 * penalty(net, "r2", fake, fake, eps[:5]), net)
    for options in ({"penalty": "wgan-gp"}, {"penalty": "r1", "objective": "relativistic"}):
        with pytest.raises(ValueError, match="fake: expected the shape of real"):
            gpk.CriticLoss(net, **options)(real, fake)


def test_lazy_penalties_come_in_every_so_many_calls_with_so_many_times_the_weight() -> None:
    torch.manual_seed(0)
    net = mlp(nn.Tanh())
    loss = gpk.CriticLoss(net, objective="gan", penalty="r1", penalty_weight=0.5, penalty_every=3)
    for call in range(7):
        real, fake, eps = samples()
        exact = adversarial("gan", net(real), net(fake))
        if call % 3 == 0:
            exact = exact + 1.5 * penalty(net, "r1", real, real, eps)
        parts = loss(real, fake)
        assert_same(parts.loss, exact, net)
        assert (parts.penalty > 0) == (call % 3 == 0)
        with torch.no_grad():  # an evaluation does not count, and has the penalty as it is
            whole = adversarial("gan", net(real), net(fake))
            torch.testing.assert_close(loss(real, fake).adversarial, whole)
            assert loss(real, fake).penalty > 0
    assert loss.calls == 7
    assert_same(loss(real, fake, with_penalty=False).loss, adversarial("gan", net(real), net(fake)), net)


def test_options_may_change_between_calls() -> None:
    torch.manual_seed(0)
    net = mlp(nn.Tanh())
    loss = gpk.CriticLoss(net, objective="relativistic", penalty={"r1": 1.0, "r2": 1.0})
    for k in range(6):
        loss.penalty["r1"] = 1.0 / (k + 1)  # type: ignore[index]
        real, fake, eps = samples()
        exact = adversarial("relativistic", net(real), net(fake)) + penalty(net, "r2", real, fake, eps)
        assert_same(loss(real, fake).loss, exact + penalty(net, "r1", real, fake, eps) / (k + 1), net)


@pytest.mark.parametrize("name", ["r1", "r2", "gradient", "dragan", "eikonal"])
def test_reductions(name: str) -> None:
    torch.manual_seed(0)
    net = mlp(nn.Tanh())
    real, fake, eps = samples()

    def ours(reduction: str) -> Tensor:
        if name == "gradient":
            return gpk.gradient_penalty(net, real, fake, eps=eps, power=1.5, reduction=reduction)
        if name == "dragan":
            return gpk.dragan_penalty(net, real, generator=torch.Generator().manual_seed(0), reduction=reduction)
        if name == "eikonal":
            return gpk.eikonal_loss(net, real, power=1, reduction=reduction)
        return {"r1": gpk.r1_penalty, "r2": gpk.r2_penalty}[name](net, real, reduction=reduction)

    for _ in range(3):
        each = ours("none")
        assert each.shape == (N,)
        assert_same(ours("mean"), each.mean(), net)
        each = ours("none")
        assert_same(ours("sum"), each.sum(), net)
    weights = torch.rand(N, dtype=torch.float64)
    x = real.detach().requires_grad_()
    (g,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    assert_same((weights * gpk.r1_penalty(net, real, reduction="none")).sum(), (weights * g.square().sum(1)).sum(), net)


@pytest.mark.parametrize("backend", ["aot_eager", "gpkernels"])
def test_compiled(backend: str) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    net = mlp(nn.Tanh())
    loss = gpk.CriticLoss(net, objective="relativistic", penalty={"r1": 0.5, "r2": 0.25})
    step = torch.compile(lambda real, fake: loss(real, fake).loss, backend=backend, fullgraph=True)
    for _ in range(3):
        real, fake, eps = samples()
        exact = adversarial("relativistic", net(real), net(fake)) + 0.5 * penalty(net, "r1", real, fake, eps)
        assert_same(step(real, fake), exact + 0.25 * penalty(net, "r2", real, fake, eps), net)
    lazy = gpk.CriticLoss(net, penalty="r1", penalty_every=4)
    compiled = torch.compile(lambda r, f, p: lazy(r, f, with_penalty=p).loss, backend=backend, fullgraph=True)
    own = adversarial("wgan", net(real), net(fake))
    assert_same(compiled(real, fake, True), own + 40 * penalty(net, "r1", real, fake, eps), net)
    assert_same(compiled(real, fake, False), adversarial("wgan", net(real), net(fake)), net)
    with pytest.raises(Exception, match="with_penalty"):
        torch.compile(lambda r, f: lazy(r, f).loss, backend=backend, fullgraph=True)(real, fake)


def test_to_any_order_in_fast_double_backward() -> None:
    torch.manual_seed(0)
    net, (real, fake, eps) = mlp(nn.Tanh()), samples()
    loss = gpk.CriticLoss(net, objective="least-squares", penalty={"wgan-gp": 1.0, "r2": 2.0}, fake_target=-1.0)
    with gpk.fast_double_backward():
        ours = loss(real, fake, eps=eps).loss
    exact = adversarial("least-squares", net(real), net(fake), 1.0, -1.0) + penalty(net, "wgan-gp", real, fake, eps)
    exact = exact + 2 * penalty(net, "r2", real, fake, eps)
    assert_same(ours, exact, net)


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"objective": "lsgan"}, ValueError, "objective: expected one of wgan, gan, hinge, least-squares, relativistic"),
    ({"penalty": "gp"}, ValueError, "penalty: expected one of none, wgan-gp, r1, r2, dragan, or a dict"),
    ({"penalty": 3}, TypeError, "penalty: expected one of none, .* got int"),
    ({"penalty": {"gp": 1.0}}, ValueError, "penalty: expected .* got 'gp'"),
    ({"penalty": {"r1": -1.0}}, ValueError, r"penalty\['r1'\]: expected a finite number of at least 0"),
    ({"penalty": {"r1": 1.0}, "penalty_weight": 1.0}, ValueError, "penalty_weight: expected None"),
    ({"penalty_every": 0}, ValueError, "penalty_every: expected at least 1, got 0"),
    ({"penalty_every": 1.5}, TypeError, "penalty_every: expected"),
    ({"pack": 0}, ValueError, "pack: expected at least 1, got 0"),
    ({"power": 0.5}, ValueError, "power: expected a number of at least 1"),
    ({"objective": ["wgan"]}, ValueError, "objective: expected one of wgan"),
    ({"one_sided": "no"}, TypeError, "one_sided: expected True or False, got 'no'"),
    ({"together": "yes"}, TypeError, "together: expected None, True or False, got 'yes'"),
    ({"together": torch.ones(2)}, TypeError, "together: expected None, True or False, got a tensor"),
    ({"penalty_weight": "10"}, TypeError, "penalty_weight: expected a number, got str"),
    ({"target": -1.0}, ValueError, "target: expected .* got -1"),
    ({"dragan_scale": -1.0}, ValueError, "dragan_scale: expected .* got -1"),
    ({"consistency_weight": -1.0}, ValueError, "consistency_weight: expected .* got -1"),
    ({"consistency_margin": -1.0}, ValueError, "consistency_margin: expected .* got -1"),
    ({"feature_weight": float("inf")}, ValueError, "feature_weight: expected .* got inf"),
    ({"real_target": float("nan")}, ValueError, "real_target: expected a finite number"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD)
def test_bad_options_name_the_argument(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        gpk.CriticLoss(mlp(nn.ReLU()), **options)


def test_bad_calls_name_the_argument() -> None:
    net, (real, fake, eps) = mlp(nn.ReLU()), samples()
    with pytest.raises(
        ValueError, match="pack: expected at least 1, and a divisor of the batch size of real, 12, got 5"
    ):
        gpk.CriticLoss(net, pack=5)(real, fake)
    with pytest.raises(
        ValueError, match="pack: expected at least 1, and a divisor of the batch size of real, 12, got 5"
    ):
        gpk.gradient_penalty(net, real, fake, pack=5)
    with pytest.raises(ValueError, match="eps: expected one number per sample"):
        gpk.CriticLoss(net, pack=2, penalty="wgan-gp")(real, fake, eps=eps)
    with pytest.raises(ValueError, match="critic: expected a score for each of 12 samples"):
        gpk.CriticLoss(Packed(2))(real, fake)
    with pytest.raises(ValueError, match="critic: expected a score for each of 6 packs of 2 samples"):
        gpk.r1_penalty(Packed(4), real, pack=2)
    with pytest.raises(ValueError, match="reduction: expected one of none, mean, sum"):
        gpk.r1_penalty(net, real, reduction="max")
    with pytest.raises(TypeError, match="with_penalty: expected None, True or False, got 'no'"):
        gpk.CriticLoss(net)(real, fake, with_penalty="no")
    with pytest.raises(TypeError, match="pack: expected a whole number, got bool"):
        gpk.gradient_penalty(net, real, fake, pack=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"critic_args": torch.ones(N)}, r"critic_args: expected a tuple or list, such as \(labels,\), got Tensor"),
        ({"critic_args": None}, "critic_args: expected .* got NoneType"),
        ({"critic_kwargs": ["labels"]}, "critic_kwargs: expected a mapping of names to values, got list"),
    ],
    ids=["a tensor", "None", "a list of names"],
)
def test_further_inputs_of_another_type_are_refused_before_the_critic_is_called(options: Any, message: str) -> None:
    def critic(*inputs: Any) -> Tensor:
        raise AssertionError("called")

    real, fake, eps = samples()
    for call in (
        lambda: gpk.gradient_penalty(critic, real, fake, **options),
        lambda: gpk.gradient_penalty(critic, real, fake, eps=eps, **options),
        lambda: gpk.r1_penalty(critic, real, **options),
        lambda: gpk.dragan_penalty(critic, real, reduction="none", **options),
        lambda: gpk.eikonal_loss(critic, real, **options),
        lambda: gpk.approximate_r1_penalty(critic, real, **options),
        lambda: gpk.value_and_input_gradient(critic, real, **options),
        lambda: gpk.CriticLoss(critic)(real, fake, **options),
    ):
        with pytest.raises(TypeError, match=message):
            call()
