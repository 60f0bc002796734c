"""Every rule, and calls without one: value and gradients are plain PyTorch's, in every execution mode."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gpkernels as gpk
from comparing import assert_exactly_as, assert_same, batch, gradients
from critics import plain_loss, plain_penalty, plain_points
from gpkernels import backends
from gpkernels.critic import run
from gpkernels.critic.graph import Graph
from gpkernels.critic.rules import RULES
from gpkernels.critic.rules.base import Meta, Saved
from gpkernels.critic.rules.normalisation import BatchNorm, RMSNorm

aten = torch.ops.aten
cases: dict[str, Case] = {}
N = 4
SINGLE = 1e-5


class Case(NamedTuple):
    """function: of an activation and of weights. shape: of a sample. weights: their shapes. n: samples in a batch.

    tolerance: that of float64, but where a part of the critic is in single precision.
    """

    function: Callable[..., Tensor]
    shape: tuple[int, ...] = (6,)
    weights: tuple[tuple[int, ...], ...] = ()
    n: int = N
    tolerance: float = 1e-9


class Critic(nn.Module):
    """A trained layer, the function, and scores that bend; one weight is frozen and one has no use."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        first, *image = case.shape
        layer = {0: nn.Linear, 1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[len(image)]
        self.first = layer(first, 8, *([3] if image else []), **({"padding": 1} if image else {}))
        self.function = case.function
        self.own = nn.ParameterList([nn.Parameter(torch.randn(shape)) for shape in case.weights])
        self.middle, self.top = nn.LazyLinear(3), nn.Linear(3, 1)
        self.idle = nn.Parameter(torch.randn(2))
        self.top.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.function(self.first(x), *self.own)
        return self.top(torch.tanh(self.middle(h.reshape(len(x), -1))))


def rotary(h: Tensor) -> Tensor:
    """Attention whose queries and keys are turned by their positions (RoPE, Su et al. 2021, eq. 34)."""
    tokens = h.mT
    angle = torch.arange(8.0, dtype=h.dtype)[:, None] / 10 ** torch.arange(4.0, dtype=h.dtype)
    cos, sin = angle.cos(), angle.sin()

    def turned(x: Tensor) -> Tensor:
        even, odd = x[..., ::2], x[..., 1::2]
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)

    return F.scaled_dot_product_attention(turned(tokens), turned(tokens.sin()), tokens)


def rotary_halves(h: Tensor) -> Tensor:
    """The same by halves, as Llama's code has it."""
    tokens = h.mT
    angle = (torch.arange(8.0, dtype=h.dtype)[:, None] / 10 ** torch.arange(4.0, dtype=h.dtype)).repeat(1, 2)

    def turned(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * angle.cos() + torch.cat([-second, first], -1) * angle.sin()

    return torch.softmax(turned(tokens) @ turned(tokens.sin()).mT / 3, -1) @ tokens


def rotary_complex(h: Tensor) -> Tensor:
    """The same as a product of complex numbers."""
    tokens = h.mT.contiguous()
    angle = torch.arange(8.0, dtype=h.dtype)[:, None] / 10 ** torch.arange(4.0, dtype=h.dtype)
    turn = torch.polar(torch.ones_like(angle), angle)

    def turned(x: Tensor) -> Tensor:
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (4, 2))) * turn).flatten(-2)

    return torch.softmax(turned(tokens) @ turned(tokens.sin()).mT / 3, -1) @ tokens


VECTOR, LINE, IMAGE, VOLUME = (6,), (3, 8), (3, 6, 6), (2, 4, 4, 4)


def case(name: str, *args: Any, **options: Any) -> None:
    assert name not in cases
    cases[name] = Case(*args, **options)


def _seen() -> dict[str, Callable[[Tensor], Tensor]]:
    """Functions of one activation, element by element."""
    inside, above = (lambda h: torch.tanh(h) * 0.9), (lambda h: h * h + 0.5)
    return {
        **{name: getattr(torch, name) for name in ("relu", "tanh", "sigmoid", "exp", "expm1", "sin", "cos", "atan")},
        **{name: getattr(torch, name) for name in ("erf", "sign", "sgn", "round", "floor", "ceil", "trunc", "abs")},
        **{name: getattr(F, name) for name in ("silu", "mish", "gelu", "elu", "celu", "softplus", "hardswish")},
        **{name: getattr(F, name) for name in ("logsigmoid", "leaky_relu", "hardtanh", "relu6", "selu")},
        **{name: getattr(F, name) for name in ("tanhshrink", "softsign")},
        "relu in place": lambda h: F.relu(h, True),
        "leaky relu in place": lambda h: F.leaky_relu(h, 0.2, True),
        "elu in place": lambda h: F.elu(h, 0.7, True),
        "hardtanh in place": lambda h: F.hardtanh(h, -0.3, 0.4, True),
        "threshold": lambda h: F.threshold(h, 0.1, 0.2),
        "threshold in place": lambda h: F.threshold(h, 0.1, 0.2, True),
        "gelu by tanh": lambda h: F.gelu(h, approximate="tanh"),
        "softplus beta": lambda h: F.softplus(h, beta=7, threshold=2),
        "celu alpha": lambda h: F.celu(h, 0.3),
        "elu alpha": lambda h: F.elu(h, 0.3),
        "log": lambda h: torch.log(above(h)),
        "log1p": lambda h: torch.log1p(above(h)),
        "sqrt": lambda h: torch.sqrt(above(h)),
        "rsqrt": lambda h: torch.rsqrt(above(h)),
        "reciprocal": lambda h: torch.reciprocal(above(h)),
        **{f"power {p}": partial(lambda h, p: above(h) ** p, p=p) for p in (0, 1, 2, 3, -1, 0.5, 2.5)},
        "a power of what may be negative": lambda h: h**3,
        "clamp": lambda h: h.clamp(-0.3, 0.4),
        "clamp from below": lambda h: h.clamp(min=-0.3),
        "clamp from above": lambda h: h.clamp(max=0.3),
        "clamp_min": lambda h: torch.clamp_min(h, 0.1),
        "clamp_max": lambda h: torch.clamp_max(h, 0.1),
        "clamp in place": lambda h: h.clamp_(-0.3, 0.4),
        "a clamp at its bound": lambda h: h.relu().clamp(min=0),
        "abs at zero": lambda h: h.relu().abs(),
        "negative": lambda h: -inside(h),
        "clone": lambda h: inside(h).clone(),
        "alias": lambda h: aten.alias(inside(h)),
        "plus a number": lambda h: inside(h) + 2,
        "a number's sum": lambda h: aten.add.Scalar(inside(h), 2),
        "a number's difference": lambda h: aten.sub.Scalar(inside(h), 2),
        "from a number": lambda h: 1 - inside(h),
        "from a number, scaled": lambda h: torch.rsub(inside(h), 1, alpha=3),
        "times a number": lambda h: inside(h) * -2,
        "a number's product": lambda h: aten.mul.Scalar(inside(h), 3),
        "by a number": lambda h: inside(h) / -2,
        "a number's quotient": lambda h: aten.div.Scalar(inside(h), 3),
        "number over": lambda h: 2 / above(h),
        "in-place arithmetic": lambda h: inside(h).mul_(2).add_(1).div_(3).sub_(0.2),
        "dropout as one operation, of nothing": lambda h: torch.native_dropout(inside(h), 0.0, True)[0],
        "masked fill": lambda h: inside(h).masked_fill(h > 0, -1.0),
        "masked fill in place": lambda h: inside(h).masked_fill_(h > 0, -1.0),
        "a mask": lambda h: inside(h) * (h > 0),
        "where": lambda h: torch.where(h > 0, h.exp(), h.sin()),
        "where with a number": lambda h: torch.where(h > 0, h.exp(), -1.0),
        "detached": lambda h: h.detach().sin() * h.cos(),
        "power of a tensor": lambda h: above(h) ** torch.tanh(h),
        "atan2": lambda h: torch.atan2(h, above(h)),
        "log of a sum of exponentials of two": lambda h: torch.logaddexp(h, 2 * h),
        "sinh": torch.sinh,
        "tan": lambda h: torch.tan(inside(h)),
        "digamma": lambda h: torch.digamma(above(h)),
    }


for key, one in _seen().items():
    case(key, one)
case("another dtype", lambda h: h.tanh().float().double(), tolerance=SINGLE)


def _two(h: Tensor) -> tuple[Tensor, Tensor]:
    return h.sin(), h.roll(1, 1).cos() + 1.5


case("a sum", lambda h: torch.add(*_two(h), alpha=2))
case("a difference", lambda h: torch.sub(*_two(h), alpha=3))
case("a difference the other way", lambda h: torch.rsub(*_two(h), alpha=3))
case("a product", lambda h: torch.mul(*_two(h)))
case("a square by a product", lambda h: h * h)
case("a quotient", lambda h: torch.div(*_two(h)))
case("a quotient by a moving number a sample", lambda h: h / (1 + h.square().sum(1, keepdim=True)))
case("maximum", lambda h: torch.maximum(*_two(h)))
case("minimum", lambda h: torch.minimum(*_two(h)))
case("maximum of equals", lambda h: torch.maximum(h.relu(), h.roll(1, 1).relu()))
case("minimum of equals", lambda h: torch.minimum(h.relu(), h.roll(1, 1).relu()))
case("lerp", lambda h: torch.lerp(*_two(h), 0.3))
case("lerp by a tensor", lambda h, w: torch.lerp(*_two(h), torch.sigmoid(w)), weights=((8,),))
case("addcmul", lambda h: torch.addcmul(h, *_two(h), value=0.7))
case("addcmul with weights", lambda h, w, v: torch.addcmul(w, h.tanh(), v, value=2), weights=((8,), (1,)))
case("addcmul of weights", lambda h, w, v: torch.addcmul(h, w, v.exp()), weights=((8,), (8,)))
case("addcdiv", lambda h: torch.addcdiv(h, *_two(h)))
case("prelu", lambda h, w: F.prelu(h, w), weights=((8,),))
case("prelu of one slope", lambda h, w: F.prelu(h, w), weights=((1,),))
case("prelu with a moving slope", lambda h: torch.ops.aten._prelu_kernel(h, h.roll(1, 1).sin()))
for operator, function in (
    ("sum", torch.add),
    ("difference", torch.sub),
    ("product", torch.mul),
    ("quotient", lambda a, b: a / (b * b + 1)),
    ("maximum", torch.maximum),
    ("minimum", torch.minimum),
    ("choice", lambda a, b: torch.where(a.detach() > 0, a, b)),
):
    case(f"a {operator} with a weight", lambda h, w, f=function: f(h.tanh(), w), weights=((8,),))
    case(f"a {operator} with a weight without axes", lambda h, w, f=function: f(h.tanh(), w), weights=((),))
    case(f"a {operator} of a weight and the activation", lambda h, w, f=function: f(w, h.tanh()), weights=((1, 8),))
    case(f"a {operator} with a computed weight", lambda h, w, f=function: f(h, (w * w).exp()), weights=((8,),))
    case(f"a {operator} that spreads", lambda h, w, f=function: f(h.sin()[:, :, None], w), weights=((8, 3),))
    case(f"a {operator} with a constant", lambda h, f=function: f(h.tanh(), torch.linspace(-1, 1, 8).double()))
    case(f"a {operator} of features spread", lambda h, f=function: f(h.sin()[:, :, None], h.cos()[:, None]))
    case(
        f"a {operator} in another dtype",
        lambda h, w, f=function: f(h.tanh(), w.float()),
        weights=((8,),),
        tolerance=SINGLE,
    )

# --- norms and softmaxes

case("layer norm", lambda h: F.layer_norm(h, (8,)))
case("layer norm with weights", lambda h, w, b: F.layer_norm(h, (8,), w, b), weights=((8,), (8,)))
case("layer norm without a bias", lambda h, w: F.layer_norm(h, (8,), w), weights=((8,),))
case("layer norm of images", lambda h, w, b: F.layer_norm(h, (8, 6, 6), w, b), IMAGE, ((8, 6, 6), (8, 6, 6)))
case("layer norm of tokens", lambda h, w, b: F.layer_norm(h.mT, (8,), w, b), LINE, ((8,), (8,)))
case("layer norm with a computed weight", lambda h, w: F.layer_norm(h, (8,), w.exp()), weights=((8,),))
case("rms norm", lambda h, w: F.rms_norm(h, (8,), w), weights=((8,),))
case("group norm", lambda h, w, b: F.group_norm(h, 2, w, b), IMAGE, ((8,), (8,)))
case("group norm of vectors", lambda h: F.group_norm(h, 4))
case("group norm of one group", lambda h, w, b: F.group_norm(h, 1, w, b), IMAGE, ((8,), (8,)))
case("instance norm", lambda h, w, b: F.instance_norm(h, weight=w, bias=b), IMAGE, ((8,), (8,)))
case("instance norm without weights", lambda h: F.instance_norm(h), LINE)
case("batch norm of vectors", lambda h, w, b: F.batch_norm(h, None, None, w, b, True), weights=((8,), (8,)))
case("batch norm of images", lambda h, w, b: F.batch_norm(h, None, None, w, b, True), IMAGE, ((8,), (8,)))
case(
    "batch norm by running statistics",
    lambda h, w, b: F.batch_norm(h, torch.linspace(-1, 1, 8).double(), torch.linspace(1, 2, 8).double(), w, b),
    IMAGE,
    ((8,), (8,)),
)
case("local response norm", lambda h: F.local_response_norm(h, 3), IMAGE)
case("softmax", lambda h: torch.softmax(h, 1))
case("softmax over channels", lambda h: torch.softmax(h, -2), LINE)
case("softmin", lambda h: F.softmin(h, 1))
case("safe softmax", lambda h: torch._safe_softmax(h, -1))
case("log softmax", lambda h: torch.log_softmax(h, -1))
case("log of a sum of exponentials", lambda h: torch.logsumexp(h, 2), LINE)
case("log of a sum of exponentials, kept", lambda h: h - torch.logsumexp(h, (1, 2), keepdim=True), LINE)
case("glu", lambda h: F.glu(h, 1))
case("glu of images", lambda h: F.glu(h, -3), IMAGE)
case("variance", lambda h: h.var(1))
case("variance, kept", lambda h: h - h.var((1, 2), correction=0, keepdim=True), LINE)
case("variance and mean", lambda h: torch.cat(torch.var_mean(h, 2), 1), LINE)
case("variance beside a mean of no use", lambda h: torch.var_mean(h, 2)[0], LINE)
case("a mean beside a variance of no use", lambda h: h * torch.var_mean(h, 2, keepdim=True)[1], LINE)
case("standard deviation", lambda h: h / h.std(1, keepdim=True))
case("standard deviation of images", lambda h: h.std((2, 3)), IMAGE)
case("standard deviation and mean", lambda h: torch.stack(torch.std_mean(h, 2), 1), LINE)
case("norm", lambda h: h.norm(dim=1))
case("norm, kept", lambda h: h / torch.linalg.vector_norm(h, dim=(1, 2), keepdim=True), LINE)
case("normalised", lambda h: F.normalize(h, dim=1))
case("norm 1", lambda h: h / h.norm(p=1, dim=1, keepdim=True))
case("norm 3", lambda h: h / torch.linalg.vector_norm(h, 3, dim=1, keepdim=True))
case("the largest norm", lambda h: h / torch.linalg.vector_norm(h, math.inf, dim=1, keepdim=True))
case("cosine", lambda h, w: F.cosine_similarity(h[:, :, None], w, dim=1), weights=((8, 4),))
case("weight norm", lambda h, v, g: F.linear(h, torch._weight_norm(v, g, 0)), weights=((5, 8), (5, 1)))
case("weight norm by hand", lambda h, v, g: h @ (g * v / v.norm(dim=0)), weights=((8, 5), (5,)))

# --- products

case("linear", lambda h, w, b: F.linear(h, w, b), weights=((5, 8), (5,)))
case("linear without a bias", lambda h, w: F.linear(h, w), weights=((5, 8),))
case("linear of tokens", lambda h, w, b: F.linear(h.mT, w, b), LINE, ((5, 8), (5,)))
case("linear of tokens without a bias", lambda h, w: F.linear(h.mT.contiguous(), w), LINE, ((5, 8),))
case("a product of matrices", lambda h, w: h @ w, weights=((8, 5),))
case("a product of tokens", lambda h, w: h.mT @ w, LINE, ((8, 5),))
case("a product with a product of weights", lambda h, w, v: h @ torch.mm(w, v), weights=((8, 3), (3, 5)))
case("a product with a weight twice", lambda h, w: (h @ w).tanh() @ w.t() @ w, weights=((8, 5),))
case("a product that a weight begins", lambda h, w: (w @ h.t()).t(), weights=((5, 8),))
case("a product of samples", lambda h: h @ h.t())
case("addmm", lambda h, b, w: torch.addmm(b, h, w, alpha=0.5, beta=2), weights=((5,), (8, 5)))
case("addmm onto an activation", lambda h, w: torch.addmm(h, h.tanh(), w, beta=3), weights=((8, 8),))
case("addmm, moving on the right", lambda h, b, w: torch.addmm(b, w, h.t()).t(), weights=((5, 1), (5, 8)))
case("bmm", lambda h: torch.bmm(h.tanh(), h.mT), LINE)
case("bmm with one matrix for all", lambda h, w: torch.bmm(h.mT, w.expand(len(h), -1, -1)), LINE, ((8, 5),))
case("bmm of features", lambda h, w: torch.bmm(h.t()[:, :, None], w[:, None]).permute(1, 0, 2), weights=((8, 5),))
case("baddbmm", lambda h, b: torch.baddbmm(b, h.tanh(), h.mT, alpha=0.3, beta=2), LINE, ((8, 8),))
case("baddbmm onto an activation", lambda h: torch.baddbmm(h.exp(), h.tanh(), h, alpha=0.3), (3, 8))
case("a matrix and a vector", lambda h, w: h @ w, weights=((8,),))
case("a weight matrix and vector", lambda h, w, v: h * torch.mv(w, v), weights=((8, 3), (3,)))
case("a moving vector", lambda h, w: torch.stack([torch.mv(w, row) for row in h]), weights=((5, 8),))
case("dot of weights", lambda h, w, v: h * torch.dot(w, v), weights=((3,), (3,)))
case("vdot of weights", lambda h, w, v: h * torch.vdot(w, v), weights=((3,), (3,)))
case("dot of a sample and a weight", lambda h, w: torch.stack([torch.dot(row, w) for row in h]), weights=((8,),))
case("dot of samples", lambda h: h * torch.dot(h[0], h[1]))
case("vdot of a sample with itself", lambda h: torch.stack([torch.vdot(row, row) for row in h]))
case("outer product", lambda h: torch.einsum("ni,nj->nij", h.sin(), h))
case("bilinear", lambda h, w, b: F.bilinear(h.sin(), h, w, b), weights=((3, 8, 8), (3,)))
case("einsum", lambda h, w: torch.einsum("nct,cd->ntd", h, w), LINE, ((8, 5),))
case("attention", lambda h: F.scaled_dot_product_attention(h.sin(), h.cos(), h), LINE)
case("attention by hand", lambda h: torch.softmax(h.mT @ h / 3, -1) @ h.mT, LINE)
case(
    "attention by cosines",
    lambda h: torch.softmax(7 * F.normalize(h, dim=1).mT @ F.normalize(h.sin(), dim=1), -1) @ h.mT,
    LINE,
)
case("attention with rotary positions", rotary, LINE)
case("attention with rotary positions by halves", rotary_halves, LINE)
case("attention with rotary positions by complex numbers", rotary_complex, LINE)
case(
    "attention with a sink",  # a trained score that takes its share and has no value
    lambda h, w: torch.softmax(torch.cat([h.mT @ h / 3, w.expand(len(h), 8, 1)], -1), -1)[..., :-1] @ h.mT,
    LINE,
    ((8, 1),),
)
case("conv1d", lambda h, w, b: F.conv1d(h, w, b, 2, 1), LINE, ((4, 8, 3), (4,)))
case("conv2d", lambda h, w, b: F.conv2d(h, w, b, 2, 1), IMAGE, ((4, 8, 3, 3), (4,)))
case("conv2d without a bias", lambda h, w: F.conv2d(h, w), IMAGE, ((4, 8, 3, 3),))
case("conv2d in groups, dilated", lambda h, w, b: F.conv2d(h, w, b, 1, 2, 2, 4), IMAGE, ((4, 2, 3, 3), (4,)))
case("conv2d by a computed weight", lambda h, w: F.conv2d(h, w * w), IMAGE, ((4, 8, 1, 1),))
case("conv2d by a weight a sample", lambda h: F.conv2d(h, h[:, :, :3, :3].sin()), IMAGE)
case("conv3d", lambda h, w, b: F.conv3d(h, w, b, 2, 1), VOLUME, ((3, 8, 3, 3, 3), (3,)))
case("conv2d, transposed", lambda h, w, b: F.conv_transpose2d(h, w, b, 2, 1, 1), IMAGE, ((8, 3, 3, 3), (3,)))
case("conv1d, transposed", lambda h, w: F.conv_transpose1d(h, w, stride=2), LINE, ((8, 3, 3),))
case("conv2d, padding same", lambda h, w: F.conv2d(h, w, padding="same"), IMAGE, ((4, 8, 4, 4),))
case("conv2d, circular", lambda h, w: F.conv2d(F.pad(h, (1, 1, 1, 1), "circular"), w), IMAGE, ((4, 8, 3, 3),))
case("conv2d, channels last", lambda h, w: F.conv2d(h.to(memory_format=torch.channels_last), w), IMAGE, ((4, 8, 3, 3),))

# --- shapes

case("view", lambda h: h.tanh().view(len(h), 2, 4).sin())
case("view and back", lambda h: (h.view(-1, 4).tanh() * torch.arange(4)).view(len(h), 8))
case("reshape of a transpose", lambda h: h.mT.reshape(len(h), -1), LINE)
case("a batch folded with tokens", lambda h, w: (h.mT.reshape(-1, 8) @ w).reshape(len(h), -1), LINE, ((8, 3),))
case("reshape alias", lambda h: aten._reshape_alias(h.sin(), [len(h), 2, 4], [8, 4, 1]))
case("flatten", lambda h: h.sin().flatten(1), LINE)
case("unflatten", lambda h: h.sin().unflatten(1, (2, 4)))
case("unsqueezed and squeezed", lambda h: h.sin().unsqueeze(1).squeeze(1))
case("squeezed anywhere", lambda h: h.sin()[:, None, :, None].squeeze())
case("squeezed at two", lambda h: h.sin()[:, None, :, None].squeeze((1, 3)))
case("squeezed in place", lambda h: h.sin()[:, None].squeeze_(1))
case("t", lambda h: h.sin().t().cos().t())
case("transpose", lambda h: h.transpose(1, 2).sin(), LINE)
case("transpose in place", lambda h: h.sin().transpose_(1, 2), LINE)
case("batch and features exchanged", lambda h: h.transpose(0, 1).tanh().transpose(0, 1))
case("permute", lambda h: h.permute(0, 2, 3, 1).sin(), IMAGE)
case("samples last", lambda h: h.permute(1, 2, 3, 0).sin().permute(3, 0, 1, 2), IMAGE)
case("expand", lambda h: h.sin()[:, :, None].expand(-1, -1, 3))
case("a weight expanded", lambda h, w: h.sin() * w.expand(len(h), -1), weights=((8,),))
case("slice", lambda h: h.sin()[:, 1:7:2])
case("slice from the end", lambda h: h.sin()[:, -3:])
case("a slice of a weight", lambda h, w: h.sin() * w[2:], weights=((10,),))
case("a slice of the batch that is all of it", lambda h: h.sin()[0:])
case("select", lambda h: h.sin()[:, 3], LINE)
case("select from the end", lambda h: h.sin()[..., -2], LINE)
case("flip", lambda h: h.sin().flip(1))
case("flip of the batch", lambda h: h.sin().flip(0) * h)
case("roll", lambda h: h.sin().roll(2, 1))
case("roll of everything", lambda h: h.sin().roll(3) * h)
case("tril", lambda h: h.sin().tril(1), LINE)
case("triu", lambda h: h.sin().triu(-1), LINE)
case("cumsum", lambda h: h.sin().cumsum(1))
case("cumprod", lambda h: (h.sin() + 2).cumprod(1))
case("repeat", lambda h: h.sin().repeat(1, 3))
case("repeat with a new axis", lambda h: h.sin().repeat(2, 1, 2).permute(1, 0, 2))
case("repeat_interleave", lambda h: h.sin().repeat_interleave(2, 1))
case("split", lambda h: torch.cat(h.sin().split(3, 1)[::-1], 1))
case("split, of which one is used", lambda h: h.sin().split(3, 1)[1])
case("split by sizes", lambda h: h.sin().split([1, 4, 3], 1)[1] * h[:, :4])
case("split unsafely", lambda h: (lambda a, b, _: a * b.sin())(*torch.unsafe_split(h.sin(), 3, 1)))
case("split unsafely by sizes", lambda h: torch.unsafe_split_with_sizes(h.sin(), [1, 4, 3], 1)[1] * h[:, :4])
case("chunk", lambda h: (lambda a, b: a.sin() * b)(*h.chunk(2, 1)))
case("unbind", lambda h: (lambda a, *b: a * b[1] + b[4])(*h.sin().unbind(1)))
case("unbind of images", lambda h: h.sin().unbind(2)[1], LINE)
case("cat", lambda h: torch.cat([h.sin(), h, h.cos()], 1))
case("cat with a weight", lambda h, w: torch.cat([h, w.expand(len(h), -1)], 1), weights=((3,),))
case("cat with a constant", lambda h: torch.cat([h.sin(), torch.ones(len(h), 2).double(), h], 1))
case(
    "cat with two constants",
    lambda h: torch.cat([torch.ones(len(h), 2).double(), h, torch.ones(len(h), 1).double()], 1),
)
case("cat of samples", lambda h: torch.cat([h.sin(), h.cos()]).view(2, len(h), -1).transpose(0, 1))
case("stack", lambda h: torch.stack([h.sin(), h.cos()], 1))
case("stack in front", lambda h: torch.stack([h.sin(), h.cos()]).transpose(0, 1))
case("stack with a weight", lambda h, w: torch.stack([h, w.expand(len(h), -1)], -1), weights=((8,),))
case("index", lambda h: h.sin()[:, [0, 3, 3, 7]])
case("index by two", lambda h: h.sin()[:, [0, 3], [1, 1]], LINE)
case("index by row", lambda h: h.sin()[torch.arange(len(h)), torch.arange(len(h)) % 3] * h[:, 0])
case("index by row of images", lambda h: h.sin()[torch.arange(len(h)), :, torch.arange(len(h)) % 3], IMAGE)
case("index by row, broadcast", lambda h: h.sin()[torch.arange(len(h)), torch.tensor([[1], [0]])].sum(0))
case("index by other rows", lambda h: h.sin()[torch.arange(len(h)).flip(0), torch.arange(len(h)) % 3] * h[:, 0])
case("index by a mask", lambda h: h.sin()[:, torch.arange(8) % 2 == 0])
case("an index of a weight", lambda h, w: h * w[torch.tensor([0, 1, 1, 2, 0, 0, 2, 1])], weights=((3,),))
case("gather", lambda h: h.sin().gather(1, h.argsort(1)[:, :3]))
case("take_along_dim", lambda h: torch.take_along_dim(h.sin(), h.argmax(1, keepdim=True), 1))
case("index_select", lambda h: h.sin().index_select(1, torch.tensor([5, 0, 0])))
case("index_select of a weight", lambda h, w: h * w.index_select(0, torch.tensor([0, 1, 0])[1]), weights=((2, 8),))
case("embedding", lambda h, w: h * F.embedding(torch.arange(len(h)) % 3, w), weights=((3, 8),))
case("embedding with padding", lambda h, w: h * F.embedding(torch.arange(len(h)) % 3, w, 1), weights=((3, 8),))
case("scatter", lambda h: torch.zeros(len(h), 9).double().scatter(1, h.argsort(1), h.sin()))
case(
    "index_add", lambda h: torch.zeros(len(h), 3).double().index_add(1, torch.tensor([0, 1, 2, 0, 1, 2, 0, 0]), h.sin())
)
EDGES = torch.tensor([[0, 1, 2, 3, 3, 1, 0, 2], [1, 1, 0, 0, 1, 0, 1, 1]])  # from and to


case("index_add to what moves", lambda h: h.tanh().index_add(1, EDGES[1], h.sin(), alpha=-2))
case("index_add of some channels", lambda h: h.tanh().index_add(1, torch.tensor([2, 2]), h[:, :2]), IMAGE)
case("index_add in place", lambda h: h.new_zeros(len(h), 2, 8).index_add_(1, EDGES[1], h.sin()), LINE)
case("index_add of a weight", lambda h, w: h.sin().index_add(1, EDGES[0], w.expand(len(h), 8)), weights=((8,),))
case("index_add to a weight", lambda h, w: w.expand(len(h), 8).index_add(1, EDGES[0], h), weights=((8,),))
case("index_add of a constant", lambda h: h.sin().index_add(1, EDGES[0], torch.ones_like(h)))
case("messages along edges", lambda h: h.index_add(0, EDGES[1, :4], h[EDGES[0, :4]].sin()))
case("scatter_add", lambda h: torch.zeros_like(h).scatter_add(1, EDGES[:1].expand_as(h), h.sin()))
case("scatter_add to what moves", lambda h: h.tanh().scatter_add(1, h.argsort(1), h.sin()))
case("scatter_add of some", lambda h: h.tanh().scatter_add(1, h.argsort(1)[:, :3], h[:, :3]))
case("scatter_add in place", lambda h: h.sin().scatter_add_(1, EDGES[1:].expand_as(h), h.cos()))
case("scatter_add of a weight", lambda h, w: h.sin().scatter_add(1, h.argsort(1), w.expand_as(h)), weights=((8,),))
case("scatter_add of a constant", lambda h: h.sin().scatter_add(1, EDGES[:1].expand_as(h), torch.ones_like(h)))
case("scatter_add along edges", lambda h: h.scatter_add(0, EDGES[1, :4, None].expand_as(h), h[EDGES[0, :4]].sin()))
case("as strided", lambda h: h.sin().as_strided((len(h), 3, 4), (8, 2, 1)))
case("unfold", lambda h: h.sin().unfold(1, 3, 2))
case("diagonal", lambda h: h.sin().diagonal(0, 1, 2), LINE)
case("a copy into a constant", lambda h: _written(h))
case("a part written in place", lambda h: _part_written(h))
case("a view in place", lambda h: h.sin().view(-1, 4).relu_().view(-1, 8))
case("a view in place, its base used", lambda h: (lambda y: (y.view(-1, 4).tanh_(), y)[1])(h.sin()))
case("an instance norm in place", lambda h, w: F.relu_(F.instance_norm(h, weight=w)), IMAGE, ((8,),))
case("samples one by one", lambda h: torch.stack([torch.tanh(h[i]) * (i + 1) for i in range(len(h))]))
case("an activation in three uses", lambda h: h.sin() * h + h.tanh() - h.mean(1, keepdim=True))


def _written(h: Tensor) -> Tensor:
    out = torch.zeros(len(h), 10, dtype=h.dtype)
    out[:, 1:9] = h.sin()
    return out


def _part_written(h: Tensor) -> Tensor:
    out = h.sin()
    out[:, :3].mul_(h[:, 3:6])
    out[:, 5] = 2.0
    return out


# --- sums, means, the largest

for reduction in ("sum", "mean"):
    of = partial(lambda h, name, *a, **k: getattr(h.sin(), name)(*a, **k), name=reduction)
    case(reduction, lambda h, of=of: of(h, dim=1))
    case(f"{reduction}, kept", lambda h, of=of: h * of(h, dim=(1, 2), keepdim=True), LINE)
    case(f"{reduction} in the middle", lambda h, of=of: of(h, dim=2), IMAGE)
    case(f"{reduction} over the batch", lambda h, of=of: h - of(h, dim=0))
    case(f"{reduction} of everything", lambda h, of=of: h * of(h))
    case(f"{reduction} of a weight", lambda h, w, of=of: h * of(w), weights=((3, 2),))
    wide = partial(lambda h, name: getattr(h.sin().float(), name)(1, dtype=torch.float64), name=reduction)
    case(f"{reduction} in another dtype", wide, tolerance=SINGLE)
for largest in ("amax", "amin"):
    case(largest, lambda h, f=largest: getattr(h, f)(1))
    case(f"{largest}, kept", lambda h, f=largest: h - getattr(h, f)((1, 2), keepdim=True), LINE)
    case(f"{largest} of equals", lambda h, f=largest: getattr(h.relu(), f)(2) + getattr(-h.relu(), f)(2), LINE)
for largest in ("max", "min"):
    case(f"{largest} along an axis", lambda h, f=largest: getattr(h, f)(2).values, LINE)
    case(f"{largest} along the first", lambda h, f=largest: getattr(h, f)(1).values, LINE)
    case(f"{largest} along an axis, kept", lambda h, f=largest: h - getattr(h, f)(1, keepdim=True)[0])
    case(f"{largest} of everything", lambda h, f=largest: h - getattr(h.sin(), f)())
    case(f"{largest} of a weight", lambda h, w, f=largest: h * getattr(w, f)(), weights=((3, 2),))
case("median", lambda h: h - h.median(1, keepdim=True).values)
case("the largest three", lambda h: h.topk(3, 1).values)
case("sorted", lambda h: h.sort(1).values * torch.arange(8))
case("the smallest of lines", lambda h: h.sin().topk(2, largest=False, sorted=False).values, LINE)
case("groups in order", lambda h: h.sin().view(len(h), 4, 2).sort(-1, descending=True)[0].flatten(1))
case("sorted stably", lambda h: h.relu().sort(dim=1, stable=True).values.sin())
case("samples in order", lambda h: h.sin().sort(0).values)
case("product of entries", lambda h: h.prod(1))

# --- images

case("padding", lambda h: F.pad(h.sin(), (1, 2, 0, 1), value=3.0), IMAGE)
case("padding by less than nothing", lambda h: F.pad(h.sin(), (-1, 2, -2, 1)), IMAGE)
case("reflection", lambda h: F.pad(h.sin(), (1, 2, 3, 1), "reflect"), IMAGE)
case("reflection of lines", lambda h: F.pad(h.sin(), (1, 2), "reflect"), LINE)
case("reflection of volumes", lambda h: F.pad(h.sin(), (1, 2, 1, 1, 0, 1), "reflect"), VOLUME)
case("replication", lambda h: F.pad(h.sin(), (1, 2, 3, 1), "replicate"), IMAGE)
case("replication of lines", lambda h: F.pad(h.sin(), (1, 2), "replicate"), LINE)
case("replication of volumes", lambda h: F.pad(h.sin(), (1, 2, 1, 1, 0, 1), "replicate"), VOLUME)
case("pixel shuffle", lambda h: F.pixel_shuffle(h.sin(), 2).cos(), IMAGE)
case("pixel unshuffle", lambda h: F.pixel_unshuffle(h.sin(), 2).cos(), IMAGE)
case("windows", lambda h: F.unfold(h.sin(), 3, 1, 1, 2), IMAGE)
case("fold", lambda h: F.fold(F.unfold(h.sin(), 3), (6, 6), 3), IMAGE)
case("mean pooling", lambda h: F.avg_pool2d(h.sin(), 2), IMAGE)
case("mean pooling with padding", lambda h: F.avg_pool2d(h.sin(), 3, 2, 1, count_include_pad=False), IMAGE)
case("mean pooling, ceiling", lambda h: F.avg_pool2d(h.sin(), 4, 4, ceil_mode=True), IMAGE)
case("mean pooling, divided", lambda h: F.avg_pool2d(h.sin(), 2, divisor_override=3), IMAGE)
case("mean pooling of lines", lambda h: F.avg_pool1d(h.sin(), 2), LINE)
case("mean pooling of volumes", lambda h: F.avg_pool3d(h.sin(), 2), VOLUME)
case("mean pooling to a size", lambda h: F.adaptive_avg_pool2d(h.sin(), 3), IMAGE)
case("mean pooling to an odd size", lambda h: F.adaptive_avg_pool2d(h.sin(), (4, 5)), IMAGE)
case("mean pooling to a point", lambda h: F.adaptive_avg_pool2d(h.sin(), 1), IMAGE)
case("mean pooling of volumes to a size", lambda h: F.adaptive_avg_pool3d(h.sin(), 2), VOLUME)
case("max pooling", lambda h: F.max_pool2d(h.sin(), 2), IMAGE)
case("max pooling, overlapping", lambda h: F.max_pool2d(h.sin(), 3, 1, 1, 1, True), IMAGE)
case("max pooling of lines", lambda h: F.max_pool1d(h.sin(), 2), LINE)
case("max pooling of volumes", lambda h: F.max_pool3d(h.sin(), 3, 1, 1), VOLUME)
case("max pooling to a size", lambda h: F.adaptive_max_pool2d(h.sin(), 4), IMAGE)
case("max pooling of volumes to a size", lambda h: F.adaptive_max_pool3d(h.sin(), 3), VOLUME)
case("power pooling", lambda h: F.lp_pool2d(h.relu() + 0.1, 2, 2), IMAGE)
case("resampling", lambda h: F.interpolate(h.sin(), scale_factor=2), IMAGE)
case("resampling to a size", lambda h: F.interpolate(h.sin(), (4, 9)), IMAGE)
case("resampling bilinearly", lambda h: F.interpolate(h.sin(), (4, 9), mode="bilinear"), IMAGE)
case("resampling with corners", lambda h: F.interpolate(h.sin(), (4, 9), mode="bilinear", align_corners=True), IMAGE)
case("resampling cubically", lambda h: F.interpolate(h.sin(), scale_factor=2, mode="bicubic"), IMAGE)
case("resampling of lines", lambda h: F.interpolate(h.sin(), scale_factor=2, mode="linear"), LINE)


def _sampled(h: Tensor, grid: Tensor, mode: str = "bilinear", padding: str = "zeros", corners: bool = False) -> Tensor:
    return F.grid_sample(h.sin(), grid, mode, padding, corners)


def _points(h: Tensor, *weights: Tensor, axes: int = 2, of_samples: bool = True, corners: bool = False) -> Tensor:
    """Affine maps of pixels: of all samples, or of each one, and trained where there are weights."""
    turned = torch.tensor([[0.9, 0.2, 0.1, 0.1], [-0.3, 1.1, 0.2, -0.1], [0.1, 0.3, 0.8, 0.2]], dtype=h.dtype)
    theta = (turned[:axes, [*range(axes), 3]] + sum(w.tanh() for w in weights)).expand(len(h), axes, axes + 1)
    if of_samples:
        theta = theta + 0.3 * h.flatten(2).mean(2)[:, :axes, None].tanh()
    return F.affine_grid(theta, [len(h), 1, *h.shape[2:]], corners)


case("a grid", lambda h: F.grid_sample(h, h[:, :2].permute(0, 2, 3, 1).tanh(), align_corners=False), IMAGE)
case("a fixed grid", lambda h: _sampled(h, _points(h, of_samples=False)), IMAGE)
case("a trained grid", lambda h, w: _sampled(h, _points(h, w, of_samples=False)), IMAGE, ((2, 3),))
case("a grid per sample", lambda h, w: _sampled(h, _points(h, w)), IMAGE, ((2, 3),))
case("a grid over a trained image", lambda h, w: _sampled(w.expand(len(h), 2, 5, 5), _points(h)), IMAGE, ((2, 5, 5),))
case("a grid to borders", lambda h: _sampled(h, 1.5 * _points(h), padding="border"), IMAGE)
case("a grid in mirrors", lambda h: _sampled(h, 2.5 * _points(h), padding="reflection"), IMAGE)
case("a grid with corners", lambda h: _sampled(h, _points(h, corners=True), corners=True), IMAGE)
case("a grid in mirrors at corners", lambda h: _sampled(h, 2.5 * _points(h), "bilinear", "reflection", True), IMAGE)
case("a grid, nearest", lambda h, w: _sampled(h, _points(h, w), "nearest"), IMAGE, ((2, 3),))
case("a fixed grid, nearest", lambda h: _sampled(h, _points(h, of_samples=False), "nearest"), IMAGE)
case("a grid, cubic", lambda h, w: _sampled(h, _points(h, w), "bicubic"), IMAGE, ((2, 3),))
case("a grid, cubic to borders", lambda h: _sampled(h, 1.5 * _points(h), "bicubic", "border"), IMAGE)
case("a grid of volumes", lambda h, w: _sampled(h, _points(h, w, axes=3)), VOLUME, ((3, 4),))
case("a trained grid of volumes", lambda h, w: _sampled(h, _points(h, w, axes=3, of_samples=False)), VOLUME, ((3, 4),))
case("a grid of volumes, nearest", lambda h: _sampled(h, _points(h, axes=3), "nearest", "border"), VOLUME)
case("fourier", lambda h: torch.fft.rfft2(h).abs(), IMAGE)

# --- one sample, and none of a kind

case("one sample", lambda h, w: F.layer_norm(h, (8,), w).tanh(), weights=((8,),), n=1)
case("one sample's mean", lambda h: h - h.mean(0), n=1)
case("one image", lambda h, w: F.instance_norm(h, weight=w), IMAGE, ((8,),), n=1)
case("two samples", lambda h: (h.sin() @ h.t()) @ h, n=2)


class Doubled(torch.autograd.Function):
    """Its backward is not its forward's derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return torch.relu(x) * w

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return 2 * cotangent * w * x.sigmoid(), cotangent * x


class Linked(torch.autograd.Function):
    """Two outputs, one of which saves what it gave, and an argument that is no tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, power: int) -> tuple[Tensor, Tensor]:
        y = x.exp()
        ctx.save_for_backward(x, y)
        ctx.power = power
        return y, x**power

    @staticmethod
    def backward(ctx: Any, first: Tensor, second: Tensor) -> tuple[Tensor, None]:
        x, y = ctx.saved_tensors
        return first * y + second * ctx.power * x ** (ctx.power - 1), None


case("a custom function", lambda h, w: Doubled.apply(h.sin(), w.expand_as(h)).tanh(), weights=((8,),))
case("a custom function of two outputs", lambda h: (lambda a, b: a * b)(*Linked.apply(h, 3)))
case("a custom function, one output used", lambda h: Linked.apply(h.tanh(), 3)[1])
case("a custom function first and last", lambda h: Linked.apply(F.layer_norm(Linked.apply(h, 2)[1], (8,)), 2)[0])
case("checkpointed", lambda h: torch.utils.checkpoint.checkpoint(lambda h: h.sin() * h, h, use_reentrant=False))


@torch.jit.script
def _scripted(h: Tensor) -> Tensor:
    return torch.tanh(h) * h + torch.sigmoid(h)


case("scripted", lambda h: _scripted(h))


# --- the tests --------------------------------------------------------------------------------------------------------


def made(name: str) -> nn.Module:
    critic = Critic(cases[name]).double()
    with torch.no_grad():
        critic(drawn(name)[0])
    return critic


def drawn(name: str) -> tuple[Tensor, Tensor, Tensor]:
    return batch(cases[name].n, *cases[name].shape)


needs_cpp = pytest.mark.skipif(backends.program is None, reason="the loop in C++ is not built")


@pytest.mark.parametrize("name", cases)
def test_a_penalty_has_pytorchs_value_and_gradients(name: str) -> None:
    critic, tolerance = made(name), cases[name].tolerance
    for _ in range(4):  # as it comes, traced, by the program
        real, fake, eps = drawn(name)
        exact = plain_penalty(critic, plain_points(real, fake, eps, "wgan-gp"), 0.5)
        assert_exactly_as(gpk.gradient_penalty(critic, real, fake, eps=eps, target=0.5), exact, critic, tolerance)


# Objective, penalty, whether all samples are one batch, how often, and what runs the programs.
WAYS = {
    "apart, then one batch": ("wgan", "wgan-gp", None, 6, "C++"),
    "R1": ("gan", "r1", None, 6, "C++"),
    "apart": ("gan", "wgan-gp", False, 3, "C++"),
    "in Python": ("gan", "wgan-gp", None, 6, "Python"),
}


@pytest.mark.parametrize("way", [pytest.param(w, marks=needs_cpp if "C++" in WAYS[w] else ()) for w in WAYS])
@pytest.mark.parametrize("name", cases)
def test_a_whole_loss_has_pytorchs_value_and_gradients(name: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    objective, penalty, together, calls, loop = WAYS[way]
    if loop == "Python":
        monkeypatch.setattr(backends, "program", None)
    critic, tolerance = made(name), cases[name].tolerance
    loss = gpk.CriticLoss(critic, objective=objective, penalty=penalty, together=together)
    for _ in range(calls):  # in each mode: untraced, traced, by the program
        real, fake, eps = drawn(name)
        exact = plain_loss(critic, real, fake, eps, objective, penalty)
        assert_exactly_as(loss(real, fake, eps=eps).loss, exact, critic, tolerance)


# Maps without curvature, some of whose backward kernels have a second derivative by their input, which is zero.
FLAT: dict[str, Callable[[Tensor], Tensor]] = {
    "average pooling": lambda h: F.avg_pool2d(h, 2),
    "average pooling of overlapping windows": lambda h: F.avg_pool2d(h, 3, 2, 1),
    "average pooling of lines": lambda h: F.avg_pool1d(h.flatten(2), 2),
    "average pooling of volumes": lambda h: F.avg_pool3d(h[:, None], 2),
    "average pooling to a size": lambda h: F.adaptive_avg_pool2d(h, 2),
    "average pooling to one pixel": lambda h: F.adaptive_avg_pool2d(h, 1),
    "average pooling of volumes to a size": lambda h: F.adaptive_avg_pool3d(h[:, None], 2),
    "resampling by area": lambda h: F.interpolate(h, size=(3, 3), mode="area"),
    "max pooling": lambda h: F.max_pool2d(h, 2),
    "max pooling to a size": lambda h: F.adaptive_max_pool2d(h, 2),
    "reflection": lambda h: F.pad(h, (1, 2, 1, 1), "reflect"),
    "reflection of lines": lambda h: F.pad(h.flatten(2), (1, 2), "reflect"),
    "replication": lambda h: F.pad(h, (1, 2, 1, 1), "replicate"),
    "replication of lines": lambda h: F.pad(h.flatten(2), (1, 2), "replicate"),
    "replication of volumes": lambda h: F.pad(h[:, None], (1,) * 6, "replicate"),
    "reflection of volumes": lambda h: F.pad(h[:, None], (1,) * 6, "reflect"),
    "the largest": lambda h: h.topk(2).values,
    "added at indices": lambda h: h.index_add(1, torch.tensor([0, 0, 1, 3]), h),
    "scattered": lambda h: h.scatter_add(-1, h.argsort(-1), h),
    "padding": lambda h: F.pad(h, (1, 2, 1, 1)),
    "nearest pixels": lambda h: F.interpolate(h, scale_factor=2),
    "bilinear resampling": lambda h: F.interpolate(h, scale_factor=2, mode="bilinear"),
    "bicubic resampling": lambda h: F.interpolate(h, scale_factor=2, mode="bicubic"),
    "shuffled pixels": lambda h: F.pixel_shuffle(h, 2),
    "unfolded": lambda h: F.unfold(h, 2),
    "relu": torch.relu,
    "leaky relu": lambda h: F.leaky_relu(h, 0.2),
    "clamp": lambda h: h.clamp(-0.3, 0.4),
    "sorted": lambda h: h.sort(-1).values,
    "largest": lambda h: h.amax(1),
    "a median": lambda h: h.median(-1).values,
    "sums": lambda h: h.cumsum(-1),
    "masked": lambda h: h.masked_fill(h > 0, 0),
    "a mean": lambda h: h.mean((-1, -2)),
}


class Summed(nn.Module):
    """Two layers, a function, and its weighted sum."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.function = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 1), function

    def forward(self, x: Tensor) -> Tensor:
        h = self.function(self.second(self.first(x))).flatten(1)
        return h @ torch.linspace(-1, 1, h.shape[1], dtype=h.dtype)


@pytest.mark.parametrize("name", FLAT)
def test_a_penalty_has_zeros_where_pytorch_has_and_nothing_where_it_has_none(name: str) -> None:
    critic = Summed(FLAT[name]).double()
    for _ in range(4):
        real, _, _ = batch(N, 3, 6, 6)
        assert_exactly_as(gpk.r1_penalty(critic, real), plain_penalty(critic, real, 0.0), critic)


class MeanAndSpread(nn.Module):
    """A mean with curvature on its path to the scores and a variance without, from one call."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.own = nn.Linear(6, 8), nn.Parameter(torch.randn(2))

    def forward(self, x: Tensor) -> Tensor:
        spread, mean = torch.var_mean(self.first(x), 1, keepdim=True)
        return mean.tanh().tanh() * self.own[0] + spread * self.own[1]


@pytest.mark.parametrize("together", [True, False, None])
def test_a_call_whose_results_bend_in_part_has_pytorchs_numbers(together: bool | None) -> None:
    critic = MeanAndSpread().double()
    loss = gpk.CriticLoss(critic, together=together)
    for _ in range(5):
        real, fake, eps = batch(N, 6)
        assert_exactly_as(loss(real, fake, eps=eps).loss, plain_loss(critic, real, fake, eps), critic)


def test_hardsigmoid_which_pytorch_cannot_differentiate_twice() -> None:
    critic, twin = (Critic(Case(f)) for f in (F.hardsigmoid, lambda h: (h / 6 + 0.5).clamp(0, 1)))
    critic.middle, twin.middle = nn.Linear(8, 3), nn.Linear(8, 3)
    twin.load_state_dict(critic.state_dict())
    critic, twin = critic.double(), twin.double()
    for _ in range(4):
        real, fake, eps = batch(N, 6)
        ours = gpk.gradient_penalty(critic, real, fake, eps=eps)
        exact = plain_penalty(twin, plain_points(real, fake, eps, "wgan-gp"))
        torch.testing.assert_close(ours, exact)
        assert_same(gradients(ours, critic), gradients(exact, twin), SINGLE)  # PyTorch's 1 / 6 is in single precision


@pytest.mark.parametrize("shape", [(4, 7), (3, 2, 7)])
def test_rms_norm_as_one_operation(shape: tuple[int, ...]) -> None:
    """Only GPUs have it as one operation; the rule's formulas are compared with those of its decomposition."""
    x, t, c = (torch.randn(shape, dtype=torch.float64) for _ in range(3))
    weight, of_weight = (torch.randn(7, dtype=torch.float64) for _ in range(2))

    def inverse(x: Tensor) -> Tensor:
        return (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt()

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x * inverse(x) * weight

    metas = [Meta(tuple(u.shape), u.dtype, u.device) for u in (x, weight)]
    rule, saved = RMSNorm(((7,),), metas, metas[:1]), Saved([x, weight, inverse(x)])
    ours = rule.pull(saved, (c,), (True, True))
    assert_same(list(ours), list(torch.func.vjp(norm, x, weight)[1](c)))
    given = (t, of_weight)
    (pushed,) = rule.push(saved, given)
    torch.testing.assert_close(pushed, torch.func.jvp(norm, (x, weight), given)[1])
    bent = rule.bend(saved, given, (c,), (True, True))
    exact = torch.func.grad(lambda x, w: (torch.func.jvp(norm, (x, w), given)[1] * c).sum(), (0, 1))(x, weight)
    assert_same(list(bent), list(exact))


class Drops(nn.Module):
    """Dropout as GPUs have it."""

    trains = True

    def forward(self, x: Tensor) -> Tensor:
        return torch.native_dropout(x, 0.4, self.trains)[0]


def test_dropout_as_one_operation_scales_as_it_was_called() -> None:
    drops = Drops()
    critic = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), drops, nn.Linear(8, 1)).double()
    for trains in (True,) * 4 + (False,) * 4 + (True,) * 2:
        drops.trains = trains
        points, _, _ = batch(N, 6)
        torch.manual_seed(7)
        ours = gpk.r1_penalty(critic, points)
        torch.manual_seed(7)
        assert_exactly_as(ours, plain_penalty(critic, points, 0.0), critic)


def test_what_a_kernel_gives_unasked_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch norm's backward on a GPU returns uninitialised weight gradients that were not requested."""
    given = BatchNorm.pull

    def pull(self: BatchNorm, s: Saved, c: Any, wanted: Any) -> list[Tensor]:
        found = given(self, s, c, wanted)
        return [
            u if w else torch.full((8,), torch.nan, dtype=x.dtype) for u, w, x in zip(found, wanted, s, strict=False)
        ]

    monkeypatch.setattr(BatchNorm, "pull", pull)
    critic = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1)).double()
    real, fake, eps = batch(N, 6)
    run.forget()
    assert_exactly_as(gpk.CriticLoss(critic)(real, fake, eps=eps).loss, plain_loss(critic, real, fake, eps), critic)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_alone_of_a_group_norm_on_channels_last(dtype: torch.dtype) -> None:
    """PyTorch's own backward pass writes to no memory there, and the process ends."""
    critic = nn.Sequential(nn.GroupNorm(2, 4), nn.Conv2d(4, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 1)).to(dtype)
    real, fake, eps = batch(N, 4, 4, 4, dtype=dtype)
    exact = plain_loss(critic, real.requires_grad_(), fake.requires_grad_(), eps)
    given = [x.detach().contiguous(memory_format=torch.channels_last) for x in (real, fake)]
    ours = gpk.CriticLoss(critic)(*given, eps=eps).loss
    assert_exactly_as(ours, exact, critic, 1e-9 if dtype == torch.float64 else 1e-4)


UNMET = {
    "HardsigmoidBackward0": "PyTorch cannot differentiate it twice: it has a test of its own",
    "FusedRmsNormBackward0": "on GPUs alone: it has a test of its own, and one in test_gpu.py",
    "NativeBatchNormLegitBackward0": "in traces alone: test_compiled_steps.py has batch norm",
    "NativeBatchNormLegitNoTrainingBackward0": "in traces alone: test_compiled_odd.py has it in eval mode",
    "NativeBatchNormLegitBackward1": "in traces alone: test_compiled_steps.py has instance norm",
    "MkldnnRnnLayerBackward0": "in float32 alone: test_critic_recurrent.py has it",
    "ScaledDotProductFlashAttentionForCpuBackward0": "PyTorch cannot differentiate it twice: it has tests of its own",
    "ScaledDotProductFlashAttentionBackward0": "on GPUs alone: the formulas of the CPU's",
    "ScaledDotProductEfficientAttentionBackward0": "on GPUs alone: the formulas of the CPU's",
    "ScaledDotProductCudnnAttentionBackward0": "on GPUs alone: the formulas of the CPU's",
    "CudnnGridSamplerBackward0": "on GPUs alone: GridSample's formulas",
    "CudnnBatchNormBackward0": "on GPUs alone: BatchNorm's formulas, with a test in test_gpu.py",
}


def test_every_rule_is_met() -> None:
    met: set[str] = set()
    for name in cases:
        real, _, _ = drawn(name)
        met.update(node.name() for node, _ in Graph([made(name)(real.requires_grad_())]).nodes)
    assert set(RULES) - met == set(UNMET)
