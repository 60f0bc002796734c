"""`explain` reports how each call of any critic is differentiated, and restores the critic."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import gpkernels as gpk
from critics import ResidualCritic, mlp
from gpkernels import cli
from gpkernels.critic.explanation import Explanation

ONE_BATCH = "can be processed as one batch"
APART = "are processed one group after the other"


@pytest.fixture(autouse=True)
def _compiler_anew() -> None:
    """Forget what other tests compiled: PyTorch stops compiling a function that it has compiled too often."""
    torch.compiler.reset()


def functions(told: Explanation) -> list[str]:
    return [call.function for call in told.calls]


def layers(told: Explanation) -> list[str]:
    return [call.layer for call in told.calls]


def generic(told: Explanation) -> dict[str, str]:
    """The method of the calls that are left to autograd, by layer."""
    return {call.layer: call.method for call in told.calls if call.method.startswith("generic")}


def test_an_mlp_has_rules_and_saves_a_third() -> None:
    told = gpk.explain(mlp(2, 64, 64, 1), torch.randn(8, 2))
    assert functions(told) == ["linear", "relu", "linear", "relu", "linear"]
    assert layers(told) == ["0", "1", "2", "3", "4"]
    assert {call.method for call in told.calls} == {"rule"}
    assert told.method == "every call has a rule"
    assert ONE_BATCH in told.samples
    forward = sum(call.flops for call in told.calls)
    assert told.forward_flops == forward
    assert told.eager_flops > 5.8 * forward
    assert told.flops <= 4.05 * forward
    assert "5.9" in str(told)


def test_a_residual_critic_is_told_layer_by_layer() -> None:
    told = gpk.explain(ResidualCritic(8, 16, "group_norm"), torch.randn(2, 3, 16, 16))
    assert told.method.startswith("every call has a rule")
    assert set(layers(told)) >= {"blocks.0.conv1", "blocks.3.conv2", "top"}
    assert {call.method for call in told.calls if call.function == "group_norm"} == {"rule, curved"}


class Straight(torch.autograd.Function):
    """A product with a backward of its own."""

    @staticmethod
    def forward(ctx: object, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx: object, cotangent: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return cotangent @ w.t(), x.t() @ cotangent


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(32, 32))

    def forward(self, x: Tensor) -> Tensor:
        return Straight.apply(x, self.weight)


def test_a_custom_function_is_named_with_its_layer_and_reason_and_costs_no_more_than_eager() -> None:
    critic = nn.Sequential(nn.Linear(6, 32), Custom(), nn.ReLU(True), nn.Linear(32, 1))
    told = gpk.explain(critic, torch.randn(8, 6))
    assert functions(told) == ["linear", "Straight", "relu", "linear"]
    assert list(generic(told)) == ["1"]
    assert "custom function" in generic(told)["1"]
    assert told.method.startswith("1 of 4 calls is left to autograd")
    assert "Straight of layer 1" in told.samples
    assert APART in told.samples
    assert told.calls[1].flops == 2 * 8 * 32 * 32
    assert told.flops <= told.eager_flops


def test_a_call_of_which_no_one_wrote_a_rule_is_named() -> None:
    told = gpk.explain(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 1)), torch.randn(8, 6))
    assert not generic(told)
    told = gpk.explain(lambda x: torch.logcumsumexp(x, 1).sum(1), torch.randn(8, 6))
    assert "no rule for LogcumsumexpBackward0" in generic(told)[""]


class Attention(nn.Module):
    """A transformer's layer, with the batch's axis in front or behind."""

    def __init__(self, p: float, first: bool) -> None:
        super().__init__()
        self.block = nn.TransformerEncoderLayer(8, 2, 16, p, batch_first=first)
        self.top, self.first = nn.Linear(8, 1), first

    def forward(self, x: Tensor) -> Tensor:
        return self.top(self.block(x).mean(1) if self.first else self.block(x.transpose(0, 1)).mean(0))


@pytest.mark.parametrize("first", [True, False])
def test_fused_attention_has_a_rule_where_eager_pytorch_refuses(first: bool) -> None:
    critic = Attention(0.0, first)
    told = gpk.explain(critic, torch.randn(3, 6, 8))
    assert not generic(told)
    assert told.eager_flops is None
    assert told.flops is not None
    assert "is not implemented" in told.eager_refusal
    assert "in eager PyTorch: not possible: derivative for" in str(told)
    with sdpa_kernel(SDPBackend.MATH):
        told = gpk.explain(critic, torch.randn(3, 6, 8))
    assert not generic(told)
    assert told.flops <= told.eager_flops


def test_attention_with_dropout_has_rules() -> None:
    told = gpk.explain(Attention(0.1, True), torch.randn(3, 6, 8))
    assert not generic(told)
    assert {"block.self_attn", "block.dropout1", "block.norm2", "top"} <= set(layers(told))
    assert all(call.flops is not None for call in told.calls)


def test_multihead_attention_is_one_call() -> None:
    class Critic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.top = nn.MultiheadAttention(8, 2), nn.Linear(8, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = x.transpose(0, 1)
            return self.top(self.attention(x, x, x)[0].mean(0))

    told = gpk.explain(Critic(), torch.randn(3, 6, 8))
    assert functions(told) == ["transpose", "multi_head_attention_forward", "mean", "linear"]
    assert layers(told) == ["", "attention", "", "top"]
    assert told.calls[1].method == "rule, curved"


def test_a_batch_axis_that_is_not_the_first_keeps_samples_apart() -> None:
    weight = torch.randn(6, 8, requires_grad=True)
    told = gpk.explain(lambda x: torch.tanh(weight.t() @ x.t()).sum(0), torch.randn(5, 6))
    assert not generic(told)
    told = gpk.explain(lambda x: torch.tanh(x.t()).mul(2).sum(0), torch.randn(5, 6))
    assert ONE_BATCH in told.samples


def test_fewer_scores_than_samples_are_a_pack() -> None:
    net = mlp(12, 16, 1)
    told = gpk.explain(lambda x: net(x.reshape(-1, 12)), torch.randn(8, 6))
    assert layers(told) == ["", "net.0", "net.1", "net.2"]
    assert told.samples.startswith("a score belongs to several samples")
    assert told.flops < told.eager_flops


def test_samples_that_meet_are_told_with_the_call_in_which_they_do() -> None:
    class Deviation(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x, x.std(0).mean().expand(len(x), 1)], 1)

    told = gpk.explain(nn.Sequential(nn.Linear(6, 8), Deviation(), nn.Linear(9, 1)), torch.randn(5, 6))
    assert not generic(told)
    assert "samples interact in std of layer 1" in told.samples
    assert APART in told.samples


def test_what_autograds_graph_does_not_show_keeps_samples_apart_too() -> None:
    told = gpk.explain(lambda x: (x * x.detach().mean().item()).sum(1), torch.randn(5, 6))
    assert told.method == "every call has a rule"
    assert "not in the graph" in told.samples
    assert APART in told.samples


def test_calls_in_place_are_told_where_they_are_made() -> None:
    class Writes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = x.clone().add_(1).mul_(2)
            x[:, :2] = 0
            return x

    told = gpk.explain(nn.Sequential(nn.Linear(6, 8), nn.ReLU(True), Writes(), nn.Linear(8, 1)), torch.randn(5, 6))
    assert functions(told) == ["linear", "relu", "clone", "add", "mul", "setitem", "linear"]
    assert layers(told) == ["0", "1", "2", "2", "2", "2", "3"]


class Scripted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.inner(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_parts_are_told_by_their_layer() -> None:
    told = gpk.explain(nn.Sequential(torch.jit.script(Scripted()), nn.Linear(8, 1)), torch.randn(5, 6))
    assert layers(told) == ["0", "1"]
    assert "it is scripted" in generic(told)["0"]
    assert told.flops is not None


def test_compiled_parts_are_told_and_stay_compiled() -> None:
    calls = []

    def backend(module: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        def run(*args: Tensor) -> object:
            calls.append(1)
            return module(*args)

        return run

    part = torch.compile(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), backend=backend)
    critic = nn.Sequential(nn.Linear(6, 8), part, nn.Linear(8, 1))
    told = gpk.explain(critic, torch.randn(5, 6))
    assert not generic(told)
    assert told.flops < told.eager_flops
    calls.clear()
    critic(torch.randn(5, 6, requires_grad=True))
    assert calls


def test_what_pytorch_compiles_without_a_double_backward_is_told() -> None:
    part = torch.compile(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), backend="aot_eager")
    told = gpk.explain(nn.Sequential(nn.Linear(6, 8), part, nn.Linear(8, 1)), torch.randn(5, 6))
    assert layers(told) == ["0", "1", "2"]
    assert "it is compiled" in generic(told)["1"]
    assert "double backward" in told.eager_refusal
    assert told.calls[0].flops is None
    assert "?" in str(told)


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_recurrent_layers_are_one_call(kind: type[nn.RNNBase]) -> None:
    class Critic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.top = kind(4, 8, batch_first=True), nn.Linear(8, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.top(self.cell(x)[0][:, -1])

    told = gpk.explain(Critic(), torch.randn(3, 6, 4))
    assert layers(told) == ["cell", "", "top"]
    assert told.flops is not None
    assert told.calls[0].method == "rule, curved"
    assert ("rnn_layer" in told.uncounted) == (kind is nn.LSTM and torch.backends.mkldnn.is_available())
    assert " L\n" not in str(told) or not told.uncounted


def test_modules_may_pass_dicts_and_tuples() -> None:
    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 6))

        def forward(self, x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
            return {"h": (Straight.apply(x, self.weight), x)}

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.top = nn.Linear(6, 1)

        def forward(self, given: dict[str, tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
            h, x = given["h"]
            return self.top(h + x), h

    told = gpk.explain(nn.Sequential(Body(), Head()), torch.randn(5, 6))
    assert functions(told) == ["Straight", "add", "linear"]
    assert layers(told) == ["0", "1", "1.top"]


class Scorer:
    """A callable that is no module."""

    def __init__(self, net: nn.Module) -> None:
        self.net = net

    def __call__(self, x: Tensor) -> Tensor:
        return self.net(x)

    def score(self, x: Tensor, net: nn.Module) -> Tensor:
        return net(x)


@pytest.mark.parametrize("kind", ["a closure", "an object", "a method of a module", "a partial function"])
def test_callables_that_hold_modules_are_told_by_their_layers(kind: str) -> None:
    net = mlp(6, 8, 1)
    critic, prefix = {
        "a closure": (lambda x: net(x), "net."),
        "an object": (Scorer(net), "net."),
        "a method of a module": (net.forward, ""),
        "a partial function": (functools.partial(Scorer(net).score, net=net), "net."),
    }[kind]
    told = gpk.explain(critic, torch.randn(5, 6))
    assert layers(told) == [f"{prefix}{i}" for i in range(3)]
    assert told.flops < told.eager_flops


def test_weights_of_a_closure_count() -> None:
    weight = torch.randn(6, 8, requires_grad=True)
    frozen = torch.randn(6, 8)
    example = torch.randn(5, 6)
    with_gradient = gpk.explain(lambda x: torch.relu(x @ weight).sum(1), example)
    without = gpk.explain(lambda x: torch.relu(x @ frozen).sum(1), example)
    assert functions(with_gradient) == ["matmul", "relu", "sum"]
    assert without.eager_flops < with_gradient.eager_flops
    assert without.flops < with_gradient.flops <= with_gradient.eager_flops


def test_products_of_weights_alone_are_no_calls() -> None:
    spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 8))
    told = gpk.explain(nn.Sequential(spectral, nn.Linear(8, 1)), torch.randn(5, 6))
    assert functions(told) == ["linear", "linear"]
    assert told.calls[0].flops == 2 * 5 * 6 * 8


@pytest.mark.parametrize("wrapped", [False, True], ids=["a module", "a closure"])
@pytest.mark.filterwarnings("ignore:the critic has BatchNorm")
def test_the_critic_and_the_random_numbers_stay_as_they_were(wrapped: bool) -> None:
    critic = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1))
    before = {name: value.clone() for name, value in critic.state_dict().items()}
    buffers = list(critic.buffers())
    example = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    state = torch.get_rng_state()
    gpk.explain((lambda x: critic(x)) if wrapped else critic, example)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in critic.state_dict().items())
    assert all(a is b for a, b in zip(critic.buffers(), buffers, strict=True))
    assert all(p.grad is None for p in critic.parameters())
    assert not example.requires_grad
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in critic.modules())


def test_it_can_be_asked_without_grad_mode() -> None:
    critic, example = mlp(6, 8, 1), torch.randn(5, 6)
    with torch.no_grad():
        told = gpk.explain(critic, example)
    assert told == gpk.explain(critic, example)


def test_the_shell_prints_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    (tmp_path / "mycritic.py").write_text(
        "from torch import nn\n\n\nclass Critic(nn.Sequential):\n"
        "    def __init__(self):\n        super().__init__(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))\n"
    )
    monkeypatch.chdir(tmp_path)
    assert cli.main(["explain", "mycritic:Critic", "--input", "4x6"]) == 0
    page = capsys.readouterr().out
    assert "tanh" in page
    assert "rule, curved" in page
    for arguments in (
        ["mycritic:Nothing", "--input", "4x6"],
        ["nowhere:Critic", "--input", "4x6"],
        ["mycritic", "--input", "4x6"],
        ["mycritic:Critic", "--input", "4xx6"],
        ["mycritic:Critic", "--input", "4x7"],
        ["mycritic:Critic", "--input", f"{10**12}x{10**12}"],
    ):
        assert cli.main(["explain", *arguments]) == 2
        told = capsys.readouterr()
        assert told.out == ""
        assert len(told.err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("critic", "example", "error"),
    [
        (3, torch.randn(2, 2), TypeError),
        (nn.Linear(2, 1), torch.ones(2, 2, dtype=torch.int64), TypeError),
        (nn.Linear(2, 1), [[1.0, 2.0]], TypeError),
        (nn.Linear(2, 1), torch.tensor(1.0), ValueError),
        (lambda x: "scores", torch.randn(2, 2), TypeError),
        (lambda x: x.detach().sum(1), torch.randn(2, 2), ValueError),
        (lambda x: torch.ones(2, requires_grad=True) * 2, torch.randn(2, 2), ValueError),
    ],
    ids=[
        *("a number as critic", "integers as example", "a list as example", "a number as example"),
        *("a string as scores", "scores without a graph", "scores of weights alone"),
    ],
)
def test_bad_input_is_named(critic: object, example: torch.Tensor, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"critic|example"):
        gpk.explain(critic, example)
