from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gpkernels
from gpkernels.arguments import UserError
from gptrainer.data import DATASETS
from gptrainer.models import NETWORKS, build_models, default_network
from gptrainer.models.closed_form import Line
from gptrainer.models.layers import FeatureCritic, SameConv2d, convolution, transposed

# One data set for each shape.
SHAPES = ("8gaussians", "dirac", "digits", "fashion-mnist", "cifar10", "folder")
PAIRS = [(name, data) for name, network in NETWORKS.items() for data in SHAPES if network.fits(DATASETS[data])]


@pytest.fixture(params=PAIRS, ids=lambda pair: f"{pair[0]} on {pair[1]}")
def pair(request: pytest.FixtureRequest) -> tuple[str, str, nn.Module, nn.Module]:
    """Every network on every shape of data it is for, small."""
    network, data = request.param
    return network, data, *build_models(data, 6, 8, network=network)


def test_generators_give_what_the_data_is_and_critics_score_it(pair: tuple[str, str, nn.Module, nn.Module]) -> None:
    network, data, generator, critic = pair
    fake = generator(torch.randn(4, 6))
    assert fake.shape == (4, *DATASETS[data].shape)
    if DATASETS[data].kind == "images" and network != "wgan-mlp":
        assert DATASETS[data].scaling.low <= fake.min() <= fake.max() <= 1
    classes = DATASETS[data].classes if network == "semi-supervised" else 1
    assert critic(fake).shape == (4, classes)
    scores = critic(fake).sum()
    assert all(
        g is not None for g in torch.autograd.grad(scores, [p for p in generator.parameters() if p.requires_grad])
    )


def test_no_layer_of_a_critic_falls_back_to_pytorchs_double_backward(
    pair: tuple[str, str, nn.Module, nn.Module],
) -> None:
    _, data, _, critic = pair
    explanation = gpkernels.explain(critic, torch.randn(4, *DATASETS[data].shape))
    assert explanation.calls
    assert [call for call in explanation.calls if not call.method.startswith("rule")] == []


def test_networks_repeat_from_the_global_seed(pair: tuple[str, str, nn.Module, nn.Module]) -> None:
    network, data, _, _ = pair
    first, second = [], []
    for weights in (first, second):
        torch.manual_seed(3)
        weights += [p for model in build_models(data, 6, 8, network=network) for p in model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("data", DATASETS)
def test_every_data_set_has_a_default_network_that_fits(data: str) -> None:
    assert NETWORKS[default_network(data)].fits(DATASETS[data])


def test_a_network_for_other_data_is_refused_with_those_that_fit() -> None:
    with pytest.raises(UserError, match=r"--network: expected one that fits cifar10 \(mlp, dcgan.*\), got unrolled"):
        build_models("cifar10", 6, 8, network="unrolled")


# --- BatchNorm -------------------------------------------------------------------------------------------------------


def norms(model: nn.Module) -> int:
    return sum(isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d) for m in model.modules())


@pytest.mark.parametrize(
    ("data", "without", "with_it"),
    [("fashion-mnist", (0, 0), (3, 2)), ("cifar10", (3, 0), (3, 2)), ("folder", (4, 0), (4, 3))],
)
def test_critics_have_batch_norm_only_in_the_form_for_clipping_and_plain_gans(
    data: str, without: tuple[int, int], with_it: tuple[int, int]
) -> None:
    for batch_norm, expected in ((False, without), (True, with_it)):
        models = build_models(data, 6, 8, network="dcgan", batch_norm=batch_norm)
        assert tuple(map(norms, models)) == expected


# --- TensorFlow's padding --------------------------------------------------------------------------------------------


def naive_same(image: np.ndarray, kernel: np.ndarray, stride: int) -> np.ndarray:
    """One channel; output pixel i looks at rows i * stride - before + 0 .. k - 1, zeros outside."""
    size, k = len(image), len(kernel)
    out = -(-size // stride)
    before = max((out - 1) * stride + k - size, 0) // 2
    result = np.zeros((out, out))
    for i, j in np.ndindex(out, out):
        for a, b in np.ndindex(k, k):
            y, x = i * stride - before + a, j * stride - before + b
            if 0 <= y < size and 0 <= x < size:
                result[i, j] += image[y, x] * kernel[a, b]
    return result


@pytest.mark.parametrize("size", [4, 7, 8, 14])
@pytest.mark.parametrize(("kernel", "stride"), [(5, 2), (3, 1), (1, 1), (4, 2)])
def test_convolutions_pad_as_tensorflows_same(size: int, kernel: int, stride: int) -> None:
    layer = SameConv2d(1, 1, kernel, stride, bias=False).double()
    image = torch.randn(1, 1, size, size, dtype=torch.float64)
    expected = naive_same(image[0, 0].numpy(), layer.weight.detach()[0, 0].numpy(), stride)
    assert np.allclose(layer(image).detach()[0, 0].numpy(), expected)


@pytest.mark.parametrize("size", [2, 4, 7])
def test_transposed_convolutions_are_the_transposes_of_those(size: int) -> None:
    up = transposed(2, 3).double()
    down = SameConv2d(3, 2, 5, 2, bias=False).double()
    down.weight.data = up.weight.data
    x = torch.randn(1, 2, size, size, dtype=torch.float64)
    y = torch.randn(1, 3, 2 * size, 2 * size, dtype=torch.float64)
    assert up.bias is not None
    linear = up(x) - up.bias.view(-1, 1, 1)
    assert (linear * y).sum().item() == pytest.approx((x * down(y)).sum().item())


# --- initialisation --------------------------------------------------------------------------------------------------


def test_points_have_hidden_layers_of_he_and_an_output_layer_of_glorot() -> None:
    _, critic = build_models("8gaussians", 2, 256)
    *hidden, output = [m for m in critic.modules() if isinstance(m, nn.Linear)]
    for layer in hidden:
        assert layer.weight.abs().max().item() == pytest.approx(
            math.sqrt(3) * math.sqrt(2 / layer.in_features), rel=0.02
        )
    assert output.weight.abs().max().item() == pytest.approx(math.sqrt(3) * math.sqrt(2 / 257), rel=0.02)
    assert all(layer.bias.abs().max() == 0 for layer in (*hidden, output))


def test_convolutions_count_the_stride_in_their_fans() -> None:
    down, up, glorot = convolution(64, 128, 5, 2), transposed(64, 32), convolution(64, 64, 3, he=False)
    for layer, spread in (
        (down, math.sqrt(4 / (64 * 25 + 128 * 25 / 4))),
        (up, math.sqrt(4 / (64 * 25 / 4 + 32 * 25))),
        (glorot, math.sqrt(2 / (2 * 64 * 9))),
    ):
        assert layer.weight.std().item() == pytest.approx(spread, rel=0.02)
        assert layer.weight.abs().max().item() == pytest.approx(math.sqrt(3) * spread, rel=0.01)
        assert layer.bias is not None
        assert layer.bias.abs().max() == 0


def test_networks_for_64_pixels_start_from_normal_weights_of_spread_two_hundredths() -> None:
    for model in build_models("folder", 100, 32, batch_norm=True):
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
                assert layer.weight.std().item() == pytest.approx(0.02, rel=0.1)
                assert layer.bias is None
            if isinstance(layer, nn.BatchNorm2d):
                assert layer.weight.mean().item() == pytest.approx(1, abs=0.02)


def test_unrolled_networks_are_orthogonal_of_gain_1_4() -> None:
    for model in build_models("ring", 256, 128, network="unrolled"):
        layers = [m for m in model if isinstance(m, nn.Linear)]
        assert len(layers) == 3
        for layer in layers:
            assert torch.linalg.svdvals(layer.weight).sub(1.4).abs().max() < 1e-4


def test_the_deep_critic_has_twelve_hidden_layers() -> None:
    _, critic = build_models("swissroll", 2, 16, network="mlp12")
    assert [type(m) for m in critic] == [nn.Linear, nn.ReLU] * 12 + [nn.Linear]


# --- sizes as published ----------------------------------------------------------------------------------------------


def shapes(model: nn.Module) -> list[tuple[int, ...]]:
    kinds = nn.Conv2d | nn.ConvTranspose2d | nn.Linear
    return [tuple(m.weight.shape) for m in model.modules() if isinstance(m, kinds)]


def test_networks_have_the_published_sizes() -> None:
    generator, critic = build_models("fashion-mnist", 128, 64)
    assert shapes(critic) == [(64, 1, 5, 5), (128, 64, 5, 5), (256, 128, 5, 5), (1, 4096)]
    assert shapes(generator) == [(4096, 128), (256, 128, 5, 5), (128, 64, 5, 5), (64, 1, 5, 5)]
    generator, critic = build_models("cifar10", 128, 32, network="resnet")
    assert shapes(critic) == [
        (32, 3, 3, 3), (32, 32, 3, 3), (32, 3, 1, 1),
        *[(32, 32, 3, 3)] * 2, (32, 32, 1, 1), *[(32, 32, 3, 3)] * 4, (1, 32),
    ]  # fmt: skip
    block = [*[(32, 32, 3, 3)] * 2, (32, 32, 1, 1)]
    assert shapes(generator) == [(512, 128), *block * 3, (3, 32, 3, 3)]
    generator, classifier = build_models("fashion-mnist", 100, 250, network="semi-supervised")
    assert shapes(classifier) == [(1000, 784), (500, 1000), (250, 500), (250, 250), (250, 250), (10, 250)]
    assert shapes(generator) == [(500, 100), (500, 500), (784, 500)]


def test_the_residual_critic_shrinks_images_to_a_mean_over_8x8_places() -> None:
    _, critic = build_models("cifar10", 8, 8, network="resnet")
    x = torch.randn(2, 3, 32, 32)
    assert [critic[: i + 1](x).shape[-1] for i in range(4)] == [16, 8, 8, 8]
    assert isinstance(critic, FeatureCritic)
    scores, features = critic.with_features(x)
    assert torch.allclose(features, F.relu(critic[:4](x)).mean(dim=(2, 3)))
    assert torch.equal(scores, critic(x))


# --- CT-GAN ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("network", "data", "kept"),
    [
        ("ct", "fashion-mnist", [0.5] * 3),
        ("ct", "cifar10", [0.5] * 3),
        ("ct", "folder", [0.5] * 4),
        ("ct", "digits", [0.5] * 2),
        ("ct", "8gaussians", [0.5] * 3),
        ("ct-mlp", "fashion-mnist", [0.5] * 2),
        ("ct-resnet", "cifar10", [0.8, 0.5, 0.5]),
    ],
)
def test_ct_gans_critics_drop_out_as_in_the_code_and_show_their_last_hidden_layer(
    network: str, data: str, kept: list[float]
) -> None:
    _, critic = build_models(data, 6, 8, network=network)
    assert [1 - m.p for m in critic.modules() if isinstance(m, nn.Dropout)] == pytest.approx(kept)
    assert isinstance(critic, FeatureCritic)
    x = torch.randn(3, *DATASETS[data].shape)
    (scores, features), (other, _) = critic.with_features(x), critic.with_features(x)
    assert not torch.equal(scores, other)
    head = critic[-1]
    assert features.shape == (3, head.in_features)
    assert torch.equal(head(features), scores)
    critic.eval()
    assert torch.equal(critic.with_features(x)[0], critic(x))


def test_ct_gans_loss_sees_the_features_in_the_fused_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(gpkernels.CriticLoss, "_composed")  # the way by autograd
    _, critic = build_models("digits", 6, 8, network="ct")
    real, fake = torch.rand(5, 1, 8, 8), torch.rand(5, 1, 8, 8)
    parts = gpkernels.CriticLoss(critic.with_features, consistency_weight=2.0)(real, fake)
    parts.loss.backward()
    assert parts.consistency > 0
    assert all(p.grad is not None for p in critic.parameters())


# --- semi-supervised -------------------------------------------------------------------------------------------------


def test_the_semi_supervised_classifier_is_noisy_in_training_and_still_in_evaluation() -> None:
    _, classifier = build_models("digits", 100, 10, network="semi-supervised")
    x = torch.rand(4, 1, 8, 8)
    assert not torch.equal(classifier(x), classifier(x))
    assert [m.sigma for m in classifier.modules() if hasattr(m, "sigma")] == [0.3, 0.5, 0.5, 0.5, 0.5, 0.5]
    classifier.eval()
    assert torch.equal(classifier(x), classifier(x))
    logits, features = classifier.with_features(x)
    assert (logits.shape, features.shape) == ((4, 10), (4, 10))
    assert torch.equal(logits, classifier(x))
    classifier.train()
    assert classifier.with_features(x)[1].min() == 0  # of a ReLU, before noise


def test_its_weights_have_norm_one_and_only_the_last_scale_is_trained() -> None:
    _, classifier = build_models("digits", 100, 10, network="semi-supervised")
    layers = [m for m in classifier if isinstance(m, nn.Linear)]
    for layer in layers:
        assert torch.allclose(layer.weight.norm(dim=1), torch.ones(len(layer.weight)), atol=1e-6)
    trained = [layer.parametrizations.weight.original0.requires_grad for layer in layers]
    assert trained == [False] * 5 + [True]


def test_initialising_it_from_data_gives_each_layer_mean_zero_and_variance_one() -> None:
    _, classifier = build_models("digits", 100, 10, network="semi-supervised")
    images = torch.rand(500, 1, 8, 8)
    classifier.eval()  # without noise
    classifier.initialise(images)
    x = images
    for layer in classifier:
        x = layer(x)
        if isinstance(layer, nn.Linear):
            assert x.mean(dim=0).abs().max() < 1e-4
            assert x.std(dim=0, correction=0).sub(1).abs().max() < 1e-3


# --- closed forms ----------------------------------------------------------------------------------------------------


def test_the_line_of_one_parameter_is_uniform_and_moves_with_theta() -> None:
    line = Line(0.25)
    x, u = line(torch.randn(4000, 1)).detach().T
    assert torch.equal(x, torch.full((4000,), 0.25))
    assert torch.allclose(u.sort().values, torch.linspace(0, 1, 4000), atol=0.04)


def test_the_dirac_gan_begins_at_one_with_slope_one() -> None:
    point, critic = build_models("dirac", 1, 1)
    assert point(torch.randn(3, 1)).tolist() == [[1.0]] * 3
    assert critic(torch.tensor([[2.5]])).item() == 2.5
    assert [p.numel() for p in (*point.parameters(), *critic.parameters())] == [1, 1]
