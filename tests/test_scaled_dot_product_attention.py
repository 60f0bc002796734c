"""Attention with a second derivative in linear memory: its forms, its memory, and critics that call PyTorch's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.nn.attention import SDPBackend, sdpa_kernel

import gpkernels as gpk
from counting import counted
from gpkernels.bench.counts import peak
from gpkernels.critic.graph import Graph
from gpkernels.critic.plan import Plan
from gpkernels.critic.rules import RULES
from gpkernels.critic.rules.attention import FlashOnGPU, OnGPU
from gpkernels.critic.rules.base import Layout, Meta, Rule, Saved
from gpkernels.ops import attention_blocks
from gpkernels.ops import scaled_dot_product_attention as op
from gpkernels.private import TorchDispatchMode, tree_leaves

attention = gpk.scaled_dot_product_attention


MOST_SCORES_KEPT = op.MOST_SCORES_KEPT


@pytest.fixture(autouse=True)
def by_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small calls do as large ones."""
    monkeypatch.setattr(op, "MOST_SCORES_KEPT", 0)


@pytest.fixture(params=["one block", "many blocks", "scores kept"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, by_blocks: None) -> str:
    if request.param == "scores kept":
        monkeypatch.setattr(op, "MOST_SCORES_KEPT", MOST_SCORES_KEPT)
    if request.param == "many blocks":
        monkeypatch.setattr(attention_blocks, "CPU_BYTES", 96)
        monkeypatch.setattr(attention_blocks, "FEWEST_ROWS", 2)
    return request.param


def plain(*args: Any, **kwargs: Any) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(*args, **kwargs)


def some_keys(*shape: int) -> Tensor:
    """A bool mask, of which one row is all False."""
    mask = torch.rand(shape) > 0.4
    mask[..., -1, :] = False
    return mask


class Form:
    """Shapes of query, key and value, and the other arguments."""

    def __init__(self, query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...], **others: Any) -> None:
        self.shapes, self.others = (query, key, value), others

    def tensors(self, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        return [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in self.shapes]

    def arguments(self) -> dict[str, Any]:
        torch.manual_seed(1)
        return {name: x() if callable(x) else x for name, x in self.others.items()}


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


EACH = (2, 3, 7, 4), (2, 3, 5, 4), (2, 3, 5, 4)
FORMS = {
    "plain": Form(*EACH),
    "as many keys": Form((2, 3, 6, 4), (2, 3, 6, 4), (2, 3, 6, 4)),
    "with a scale": Form(*EACH, scale=0.3),
    "of another width": Form(*EACH[:2], (2, 3, 5, 2)),
    "causal": Form((2, 3, 6, 4), (2, 3, 6, 4), (2, 3, 6, 4), is_causal=True),
    "causal, fewer keys": Form(*EACH, is_causal=True),
    "causal, more keys, another width": Form((2, 3, 3, 4), (2, 3, 8, 4), (2, 3, 8, 1), is_causal=True),
    "bool mask": Form(*EACH, attn_mask=partial(some_keys, 7, 5)),
    "bool mask of heads, another width": Form(*EACH[:2], (2, 3, 5, 2), attn_mask=partial(some_keys, 3, 7, 5)),
    "bool mask of keys": Form(*EACH, attn_mask=lambda: torch.rand(2, 1, 1, 5) > 0.3),
    "added mask": Form(*EACH, attn_mask=partial(numbers, 7, 5)),
    "added mask of all, another width": Form(*EACH[:2], (2, 3, 5, 2), attn_mask=partial(numbers, 2, 3, 7, 5)),
    "added mask with -inf": Form(
        *EACH[:2],
        (2, 3, 5, 2),
        attn_mask=lambda: torch.zeros(7, 5, dtype=torch.float64).masked_fill(~some_keys(7, 5), -torch.inf),
    ),
    "groups of heads": Form((2, 6, 7, 4), (2, 2, 5, 4), (2, 2, 5, 4), enable_gqa=True),
    "groups of heads, masked": Form(
        *((2, 4, 7, 4), (2, 1, 5, 4), (2, 2, 5, 3)), enable_gqa=True, attn_mask=partial(some_keys, 7, 5)
    ),
    "no batch": Form((7, 4), (5, 4), (5, 2)),
    "one batch axis": Form((3, 7, 4), (3, 5, 4), (3, 5, 4), attn_mask=partial(numbers, 3, 1, 5)),
    "three batch axes": Form(
        (2, 1, 2, 7, 4), (1, 3, 1, 5, 4), (5, 4), attn_mask=lambda: torch.rand(2, 1, 1, 1, 5) > 0.3
    ),
    "a broadcast key": Form((2, 3, 7, 4), (1, 1, 5, 4), (2, 1, 5, 4)),
    "wide heads in groups, masked": Form(
        *((2, 4, 7, 136), (2, 2, 5, 136), (2, 2, 5, 200)), enable_gqa=True, attn_mask=partial(some_keys, 7, 5)
    ),
    "wide heads, causal, a narrow value": Form((1, 2, 35, 256), (1, 2, 35, 256), (1, 2, 35, 24), is_causal=True),
    "one row": Form((2, 1, 1, 4), (2, 1, 1, 4), (2, 1, 1, 4)),
}


def orders(function: Callable[..., Tensor], tensors: list[Tensor], others: dict[str, Any]) -> list[Tensor]:
    """Value, first and second derivatives."""
    torch.manual_seed(2)
    value = function(*tensors, **others)
    cotangent = torch.randn(value.shape, dtype=torch.float64).to(value).requires_grad_()
    first = torch.autograd.grad(value, tensors, cotangent, create_graph=True)
    tangents = [torch.randn(x.shape, dtype=torch.float64).to(x) for x in tensors]
    return [value, *first, *torch.autograd.grad(first, [cotangent, *tensors], tangents)]


@pytest.mark.parametrize("name", FORMS)
def test_value_and_both_derivatives_are_those_of_the_plain_form(name: str, blocks: str) -> None:
    form = FORMS[name]
    tensors, others = form.tensors(), form.arguments()
    for ours, exact in zip(orders(attention, tensors, others), orders(plain, tensors, others), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", FORMS)
def test_derivatives_are_those_of_the_value(name: str, blocks: str) -> None:
    form = FORMS[name]
    function = partial(attention, **form.arguments())
    tensors = form.tensors()
    assert gradcheck(function, tensors, fast_mode=True)
    assert gradgradcheck(function, tensors, fast_mode=True)


@pytest.mark.parametrize("wanted", range(3))
def test_one_argument_alone_is_differentiated(wanted: int) -> None:
    tensors = [x.detach() for x in FORMS["plain"].tensors()]
    tensors[wanted].requires_grad_()
    assert gradcheck(attention, tensors)
    assert gradgradcheck(attention, tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["plain", "causal", "of another width", "bool mask", "added mask"])
def test_low_precision_is_no_worse_than_twice_the_plain_forms(name: str, dtype: torch.dtype, blocks: str) -> None:
    form = FORMS[name]
    tensors = form.tensors(dtype)
    others = {k: v.to(dtype) if k == "attn_mask" and v.is_floating_point() else v for k, v in form.arguments().items()}
    wide = {k: v.double() if k == "attn_mask" and v.is_floating_point() else v for k, v in others.items()}
    exact = orders(plain, [x.detach().double().requires_grad_() for x in tensors], wide)
    found, ordinary = orders(attention, tensors, others), orders(plain, tensors, others)
    for ours, theirs, right in zip(found, ordinary, exact, strict=True):
        assert ours.dtype == dtype

        def error(x: Tensor, right: Tensor = right) -> float:
            return float(((x.double() - right).norm() / right.norm()).detach())

        assert error(ours) <= 2 * error(theirs) + 4 * torch.finfo(dtype).eps


def test_a_row_that_sees_no_key_is_zero_and_has_no_gradient() -> None:
    for width in (4, 2):  # PyTorch's fused kernel, and blocks
        form = Form(*EACH[:2], (2, 3, 5, width), attn_mask=partial(some_keys, 7, 5))
        tensors = form.tensors()
        for x in orders(attention, tensors, form.arguments())[:3:1]:
            assert x.isfinite().all()
        value = attention(*tensors, **form.arguments())
        assert (value[..., -1, :] == 0).all()
        assert (torch.autograd.grad(value.sum(), tensors[0])[0][..., -1, :] == 0).all()


def test_no_rows_and_no_keys() -> None:
    for shapes in (((2, 3, 0, 4), (2, 3, 5, 4), (2, 3, 5, 4)), ((2, 3, 7, 4), (2, 3, 0, 4), (2, 3, 0, 4))):
        tensors = Form(*shapes).tensors()
        value = attention(*tensors)
        assert torch.equal(value, plain(*tensors))
        assert all((g == 0).all() for g in torch.autograd.grad(value.sum(), tensors))
    nobody = Form((0, 3, 7, 4), (0, 3, 5, 4), (0, 3, 5, 4)).tensors()
    assert [x.shape[0] for x in orders(attention, nobody, {})] == [0] * 8


def test_special_values_come_out_as_in_the_plain_form() -> None:
    for special in (float("nan"), float("inf"), -float("inf")):
        for place in range(3):
            tensors = [x.detach() for x in FORMS["plain"].tensors()]
            tensors[place][0, 0, 0, 0] = special
            for width in (4, 2):
                found = []
                for function in (attention, plain):
                    query, key, value = (x.clone().requires_grad_() for x in (*tensors[:2], tensors[2][..., :width]))
                    output = function(query, key, value)
                    found.append([output, *torch.autograd.grad(output.sum(), (query, key, value))])
                for ours, exact in zip(*found, strict=True):
                    torch.testing.assert_close(ours, exact, equal_nan=True)


def test_a_second_derivative_makes_no_product_with_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each derivative is one op; the first is not computed again for a cotangent of zeros."""
    monkeypatch.setattr(op, "MOST_SCORES_KEPT", 0)
    query, key, value, cotangent = (torch.randn(2, 3, 5, 4, requires_grad=True) for _ in range(4))
    with Named() as named:
        output = attention(query, key, value)
        first = torch.autograd.grad(output, (query, key), cotangent, create_graph=True)
        torch.autograd.grad(first, (cotangent, query, key), [torch.randn_like(x) for x in first])
    name = "scaled_dot_product_attention"
    assert [found for found in named.found if name in found] == [name, f"{name}_backward", f"{name}_double_backward"]


class Named(TorchDispatchMode):
    """Lists the ops that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, called: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found.append(called.name().split("::")[1].partition(".")[0])
        return called(*args, **(kwargs or {}))


def test_a_third_derivative_is_refused() -> None:
    x = torch.randn(2, 3, 6, 4, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(attention(x, x, x).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"has no third derivative; use .*SDPBackend\.MATH"):
        second.sum().backward()


def test_few_scores_are_kept_on_a_cpu_and_differentiated_to_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "MOST_SCORES_KEPT", 2 * 3 * 6 * 6)
    x = torch.randn(2, 3, 6, 4, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(attention(x, x, x).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x, create_graph=True)
    assert torch.autograd.grad(second.sum(), x)[0].isfinite().all()
    assert not keeps_no_scores(x, x, x)
    longer = torch.cat([x.detach(), x.detach()[..., :1, :]], -2).requires_grad_()
    assert keeps_no_scores(longer, x, x)
    with torch.no_grad():  # no derivative is wanted: the fused kernel
        assert keeps_no_scores(x, x, x)


@pytest.mark.parametrize(("dtype", "length"), [(torch.float32, 2048), (torch.float64, 2048), (torch.bfloat16, 1024)])
def test_few_scores_are_kept_on_a_gpu(dtype: torch.dtype, length: int) -> None:
    for more in (0, 1):
        x = torch.empty(2, 2, length + more, 64, dtype=dtype, device="meta", requires_grad=True)
        assert keeps_no_scores(x, x, x) == bool(more)


def test_dropout_and_a_learned_mask_take_the_plain_form() -> None:
    tensors = FORMS["plain"].tensors()
    for others in ({"dropout_p": 0.5}, {"attn_mask": torch.randn(7, 5, dtype=torch.float64, requires_grad=True)}):
        for ours, exact in zip(orders(attention, tensors, others), orders(plain, tensors, others), strict=True):
            torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-12)
    mask = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    assert gradgradcheck(lambda m: attention(*tensors, attn_mask=m), mask, fast_mode=True)


def test_forward_mode_and_transforms() -> None:
    query, key, value = (x.detach() for x in FORMS["causal"].tensors())
    tangent = torch.randn_like(query)
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(attention(forward_ad.make_dual(query, tangent), key, value)).tangent
    exact = torch.func.jvp(lambda q: plain(q, key, value), (query,), (tangent,))
    torch.testing.assert_close(found, exact[1])
    mapped = torch.func.vmap(torch.func.grad(lambda q, k, v: attention(q, k, v).square().sum()))(query, key, value)
    leaf = query.requires_grad_()
    torch.testing.assert_close(mapped, torch.autograd.grad(attention(leaf, key, value).square().sum(), leaf)[0])
    hessian = torch.autograd.functional.hessian(lambda q: attention(q, key, value).square().sum(), query)
    other = torch.func.hessian(lambda q: attention(q, key, value).square().sum())(query.detach())
    torch.testing.assert_close(hessian, other)


def test_batched_cotangents() -> None:
    tensors = FORMS["plain"].tensors()
    value = attention(*tensors)
    cotangents = torch.randn(3, *value.shape, dtype=value.dtype)
    first = torch.autograd.grad(value, tensors, cotangents, is_grads_batched=True, retain_graph=True)
    for i, c in enumerate(cotangents):
        for ours, exact in zip(first, torch.autograd.grad(value, tensors, c, retain_graph=True), strict=True):
            torch.testing.assert_close(ours[i], exact)


@pytest.mark.parametrize("name", ["plain", "causal", "bool mask", "groups of heads", "of another width"])
def test_compiles_as_one_graph_with_the_same_numbers(name: str) -> None:
    torch.compiler.reset()
    form = FORMS[name]
    tensors, others = form.tensors(torch.float32), form.arguments()
    compiled = torch.compile(partial(attention, **others), fullgraph=True, backend="aot_eager", dynamic=False)
    found = []
    for function in (partial(attention, **others), compiled):
        value = function(*tensors)
        found.append([value, *torch.autograd.grad(value.square().sum(), tensors)])
    for ours, exact in zip(*found, strict=True):
        torch.testing.assert_close(ours, exact)


def test_autocast_gives_what_it_gives_of_pytorchs() -> None:
    tensors = [x.detach() for x in FORMS["plain"].tensors(torch.float32)]
    with torch.autocast("cpu", torch.bfloat16):
        ours, exact = attention(*tensors), F.scaled_dot_product_attention(*tensors)
    assert ours.dtype == exact.dtype == torch.bfloat16
    torch.testing.assert_close(ours, exact)


def test_the_same_bits_again() -> None:
    tensors = FORMS["causal"].tensors(torch.float32)
    first, second = (orders(attention, tensors, {"is_causal": True}) for _ in range(2))
    assert all(map(torch.equal, first, second))


Q, K = torch.randn(2, 3, 7, 4), torch.randn(2, 3, 5, 4)
BAD = {
    "integers": (lambda: attention(Q.int(), K, K), TypeError, "query.*int32"),
    "no tensor": (lambda: attention(Q, K, 3.0), TypeError, "value.*float"),
    "a vector": (lambda: attention(Q[0, 0, 0], K, K), ValueError, r"query.*2 axes.*\(4,\)"),
    "another dtype": (lambda: attention(Q, K.double(), K), ValueError, "key.*float32.*float64"),
    "another device": (lambda: attention(Q, K, K.to("meta")), ValueError, "value.*meta"),
    "another width": (lambda: attention(Q, K[..., :3], K), ValueError, "key.*4, got 3"),
    "another length": (lambda: attention(Q, K, K[:, :, :3]), ValueError, "value.*5, got 3"),
    "another batch": (lambda: attention(Q, K[:, :2], K[:, :2]), ValueError, r"key, value.*\(2, 3\).*\(2, 2\)"),
    "a mask of integers": (lambda: attention(Q, K, K, torch.ones(7, 5).int()), TypeError, "attn_mask.*int32"),
    "a mask of another dtype": (lambda: attention(Q, K, K, torch.ones(7, 5).half()), ValueError, "attn_mask.*float16"),
    "a mask of another shape": (lambda: attention(Q, K, K, torch.ones(7, 4)), ValueError, r"attn_mask.*7, 5.*\(7, 4\)"),
    "a mask of another batch": (lambda: attention(Q, K, K, torch.ones(4, 3, 7, 5)), ValueError, "attn_mask"),
    "two masks": (lambda: attention(Q, K, K, torch.ones(7, 5), is_causal=True), ValueError, "attn_mask.*is_causal"),
    "no probability": (lambda: attention(Q, K, K, dropout_p=1.5), ValueError, "dropout_p.*1.5"),
    "a text": (lambda: attention(Q, K, K, scale="1"), TypeError, "scale.*str"),
    "an infinite scale": (lambda: attention(Q, K, K, scale=float("inf")), ValueError, "scale.*inf"),
    "heads that do not divide": (lambda: attention(Q, K[:, :2], K, enable_gqa=True), ValueError, "key.*heads.*2, 2"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name: str) -> None:
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()


# --- memory -----------------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The elements of the largest tensor that a call makes, and the ops that it dispatches."""

    def __init__(self) -> None:
        super().__init__()
        self.elements, self.ops = 0, set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.ops.add(func._overloadpacket)
        made = [x.untyped_storage().nbytes() // x.element_size() for x in tree_leaves(out) if isinstance(x, Tensor)]
        self.elements = max([self.elements, *made])
        return out


def keeps_no_scores(*tensors: Tensor) -> bool:
    with Largest() as seen:
        attention(*tensors)
    return torch.ops.gpkernels.scaled_dot_product_attention in seen.ops


@pytest.mark.parametrize("is_causal", [False, True])
def test_no_tensor_has_as_many_elements_as_there_are_scores(is_causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_blocks, "CPU_BYTES", 1 << 14)
    length = 512
    query, key, value, cotangent, *tangents = (torch.randn(2, length, 8) for _ in range(7))
    a = attention_blocks.Attention(query, key, value, None, 2, is_causal, 0.3)
    with Largest() as largest:
        output, logsumexp = attention_blocks.attention(a)
        along = (cotangent * output).sum(-1)
        attention_blocks.vjp(a, logsumexp, cotangent, along)
        tangent, mean = attention_blocks.jvp(a, logsumexp, tuple(tangents))
        for known in (None, (mean, (cotangent * tangent).sum(-1))):
            attention_blocks.double_backward(a, logsumexp, cotangent, along, tuple(tangents), known)
    assert query.numel() <= largest.elements < length * length / 8


def test_memory_grows_with_the_length_and_not_with_its_square(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_blocks, "CPU_BYTES", 1 << 14)

    def held(function: Callable[..., Tensor], length: int) -> int:
        tensors = [torch.randn(1, 2, length, 8, requires_grad=True) for _ in range(3)]
        return peak(lambda: orders(function, tensors, {}), torch.device("cpu"))

    short, long = held(attention, 1024), held(attention, 4096)
    assert long < 4.2 * short
    assert short < 0.1 * held(plain, 1024)


# --- critics ----------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, width: int, heads: int, call: Callable[..., Tensor]) -> None:
        super().__init__()
        self.heads, self.call = heads, call
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        qkv = self.qkv(self.norms[0](x)).view(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        x = x + self.out(self.call(*qkv).transpose(1, 2).reshape(n, length, width))
        return x + self.mlp(self.norms[1](x))


class ViT(nn.Module):
    """A small vision transformer: patches, a class token, two blocks and a head."""

    def __init__(self, call: Callable[..., Tensor] = F.scaled_dot_product_attention) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.first, self.places = nn.Parameter(torch.randn(1, 1, 16)), nn.Parameter(torch.randn(1, 10, 16))
        self.blocks = nn.Sequential(*(Block(16, 2, call) for _ in range(2)))
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.first.expand(len(x), -1, -1), x], 1) + self.places
        return self.head(self.norm(self.blocks(x))[:, 0])


class Encoder(nn.Module):
    """PyTorch's own layer, which calls its attention."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.first = first
        self.patches, self.head = nn.Conv2d(3, 16, 4, 4), nn.Linear(16, 1)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=first, norm_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2)
        x = self.layer(x.transpose(1, 2) if self.first else x.permute(2, 0, 1))
        return self.head(x.mean(1 if self.first else 0))


class Grouped(nn.Module):
    """Groups of heads, a mask, a mask from the samples, causal attention, and attention to constants."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.head = nn.Conv2d(3, 16, 4, 4), nn.Linear(16, 1)
        self.known = nn.Parameter(torch.randn(1, 4, 5, 4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.patches(x).flatten(2).transpose(1, 2).unflatten(2, (4, 4)).transpose(1, 2)
        mask = torch.ones(9, 9, dtype=torch.bool, device=x.device).tril(2)
        call = F.scaled_dot_product_attention
        h = call(h, h[:, :2].sin(), h[:, 1:3].cos(), attn_mask=mask, enable_gqa=True)
        h = h + call(h, h.sin(), h, attn_mask=(x.detach().flatten(1)[:, :9] > -1)[:, None, None])
        known = self.known.expand(len(x), -1, -1, -1)
        h = h + call(h, known, known.sin()) + call(h, h, h.detach(), is_causal=True, scale=0.7)
        return self.head(h.transpose(1, 2).flatten(2).mean(1))


CRITICS: dict[str, Callable[[], nn.Module]] = {
    "ViT": ViT,
    "ViT of ours": partial(ViT, attention),
    "encoder layer, batch first": partial(Encoder, True),
    "encoder layer": partial(Encoder, False),
    "groups, masks, constants": Grouped,
}


def step_of(penalty: str) -> tuple[Any, Callable[[Tensor], Tensor]]:
    """The penalty as CriticLoss has it, and written by hand."""
    if penalty == "wgan-gp":
        return "wgan-gp", lambda g: 10 * (g.norm(2, 1) - 1).square().mean()
    return {"r1": 5.0}, lambda g: 5 * g.square().sum(1).mean()


def eager(critic: nn.Module, real: Tensor, fake: Tensor, eps: Tensor, penalty: str) -> Tensor:
    """The critic's loss in plain PyTorch, by the plain form of attention."""
    x = (eps * real + (1 - eps) * fake if penalty == "wgan-gp" else real).detach().requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):
        own = critic(fake).mean() - critic(real).mean()
        (gradient,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    return own + step_of(penalty)[1](gradient.flatten(1))


def groups(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    return (*(torch.randn(4, 3, 12, 12, dtype=dtype) for _ in range(2)), torch.rand(4, 1, 1, 1, dtype=dtype))


# Only ViT can be asked for one batch: samples of the others meet, or their call is a function of its own.
STEPS = [*((name, together) for name in CRITICS for together in (False, None)), ("ViT", True)]


@pytest.mark.parametrize(("name", "together"), STEPS)
@pytest.mark.parametrize("penalty", ["wgan-gp", "r1"])
def test_a_critics_step_is_that_of_the_plain_form(name: str, penalty: str, together: bool | None, loop: str) -> None:
    critic = CRITICS[name]().double()
    other = copy.deepcopy(critic)
    for module in other.modules():
        if isinstance(module, Block):
            module.call = F.scaled_dot_product_attention
    step = gpk.CriticLoss(critic, penalty=step_of(penalty)[0], together=together)
    for _ in range(4):  # by rules, traced, and by its program
        real, fake, eps = groups()
        critic.zero_grad()
        other.zero_grad()
        given = {"eps": eps} if penalty == "wgan-gp" else {}
        loss, exact = step(real, fake, **given).loss, eager(other, real, fake, eps, penalty)
        loss.backward()
        exact.backward()
        torch.testing.assert_close(loss, exact, rtol=1e-10, atol=1e-10)
        for ours, theirs in zip(critic.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", ["aot_eager", "gpkernels"])
@pytest.mark.parametrize("name", ["ViT", "ViT of ours", "encoder layer, batch first"])
def test_a_compiled_step_is_that_of_the_plain_form(name: str, backend: str) -> None:
    torch.compiler.reset()
    critic = CRITICS[name]().double()
    other = copy.deepcopy(critic)
    for module in other.modules():
        if isinstance(module, Block):
            module.call = F.scaled_dot_product_attention
    step = gpk.CriticLoss(critic)
    compiled = torch.compile(lambda *groups: step(*groups[:2], eps=groups[2]).loss, backend=backend, fullgraph=True)
    for _ in range(2):
        real, fake, eps = groups()
        critic.zero_grad()
        other.zero_grad()
        loss, exact = compiled(real, fake, eps), eager(other, real, fake, eps, "wgan-gp")
        loss.backward()
        exact.backward()
        torch.testing.assert_close(loss, exact, rtol=1e-10, atol=1e-10)
        for ours, theirs in zip(critic.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-10)


def test_input_gradients_are_those_of_the_plain_form() -> None:
    critic, (x, _, _) = ViT().double(), groups()
    leaf = x.clone().requires_grad_()
    ours = gpk.input_gradient(critic, leaf)
    with sdpa_kernel(SDPBackend.MATH):
        (exact,) = torch.autograd.grad(critic(leaf).sum(), leaf, create_graph=True)
    torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-10)
    ends = [leaf, *critic.parameters()]
    pairs = [torch.autograd.grad(g.square().sum(), ends, allow_unused=True) for g in (ours, exact)]
    for a, b in zip(*pairs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_the_samples_of_a_vision_transformer_are_rows() -> None:
    critic, (x, _, _) = ViT(), groups(torch.float32)
    assert gpk.explain(critic, x).samples.startswith("samples are independent: ")
    leaf = x.requires_grad_()
    graph = Graph([critic(leaf)])
    plan = Plan(graph.key, {next(i for i, y in enumerate(graph.leaves) if y is leaf): False}, 4, 0)
    assert plan.layouts is not None
    found = [layout for call, layout in zip(plan.calls, plan.layouts, strict=True) if "Attention" in call.name]
    assert found == [Layout(0, 1)] * 2


@pytest.mark.parametrize("penalty", ["wgan-gp", "r1"])
def test_scores_made_again_cost_less_than_the_rules_save_or_little_more(penalty: str) -> None:
    critic, (real, fake, eps) = ViT(), groups(torch.float32)
    step = gpk.CriticLoss(critic, penalty=step_of(penalty)[0])
    given = {"eps": eps} if penalty == "wgan-gp" else {}
    for _ in range(3):
        step(real, fake, **given).loss.backward()
    ours = counted(lambda: step(real, fake, **given).loss.backward())
    exact = counted(lambda: eager(critic, real, fake, eps, penalty).backward())
    assert 0 < ours.flops < {"wgan-gp": 1.05, "r1": 1.0}[penalty] * exact.flops


def test_dropout_within_a_fused_kernel_has_no_rule_and_the_plain_form_has() -> None:
    class Dropped(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            h = x.flatten(2).transpose(1, 2)[:, None]
            torch.manual_seed(3)
            return F.scaled_dot_product_attention(h.sin(), h, h, dropout_p=0.5).mean((1, 2, 3))

    x = groups()[0]
    ours = gpk.r1_penalty(Dropped(), x)
    leaf = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(Dropped()(leaf).sum(), leaf)
    torch.testing.assert_close(ours, g.square().sum((1, 2, 3)).mean())


@pytest.mark.parametrize(
    ("kernel", "others"),
    [
        (torch.ops.aten._scaled_dot_product_efficient_attention, (None, True)),
        (torch.ops.aten._scaled_dot_product_flash_attention, ()),
        (torch.ops.aten._scaled_dot_product_cudnn_attention, (None, True)),
    ],
    ids=["efficient", "flash", "cudnn"],
)
def test_nodes_of_kernels_for_gpus_have_what_the_rules_read(kernel: Any, others: tuple[Any, ...]) -> None:
    tensors = [torch.randn(2, 3, 8, 16, device="meta", requires_grad=True) for _ in range(3)]
    graph = Graph([kernel(*tensors, *others)[0]])
    plan = Plan(graph.key, {0: True}, 2, 0)
    call = plan.calls[-1]
    rule = RULES[call.name](call.constants, plan.metas(call), call.outputs)
    assert rule.saved[:3] == ("query", "key", "value")
    assert call.shapes[:3] == [(2, 3, 8, 16)] * 3
    assert call.constants == (0.0, False, None)


@pytest.mark.parametrize("rule", [OnGPU, FlashOnGPU])
def test_rules_of_kernels_for_gpus_compute_the_derivatives(rule: type[Rule]) -> None:
    """The formulas need no GPU, but only there are such nodes made."""
    *tensors, cotangent = (numbers(2, 3, *shape).requires_grad_() for shape in ((5, 4), (7, 4), (7, 4), (5, 4)))
    tangents = [torch.randn_like(x) for x in tensors]
    metas = [Meta(x.shape, x.dtype, x.device) for x in (*tensors, cotangent)]
    own = rule((0.0, False, None), metas[:3], metas[3:])
    named = dict(zip(("query", "key", "value"), (x.detach() for x in tensors), strict=True))
    saved = Saved([named.get(name) for name in rule.saved])
    pulled = torch.autograd.grad(plain(*tensors), tensors, cotangent, create_graph=True)
    pushed, *bent = torch.autograd.grad(pulled, [cotangent, *tensors], tangents)
    given = [cotangent.detach()]
    torch.testing.assert_close(own.pull(saved, given, [True] * 3)[:3], list(pulled))
    torch.testing.assert_close(own.push(saved, tangents)[0], pushed)
    torch.testing.assert_close(own.bend(saved, tangents, given, [True] * 3)[:3], bent)
