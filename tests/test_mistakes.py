"""Bad arguments of ops are refused by name, with what was expected and given, before anything is changed."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import gpkernels as gpk
from gpkernels.ops.gradient_norm_penalty import gradient_norm_penalty_backward_op, gradient_norm_penalty_op
from gpkernels.ops.interpolate import interpolate_op
from gpkernels.ops.relativistic_loss import relativistic_loss_op
from gpkernels.ops.score_loss import (
    ScoreLoss,
    score_loss_backward_op,
    score_loss_backward_reference,
    score_loss_op,
    score_loss_reference,
)
from gpkernels.ops.weights import rmsprop_op

INT, FLAT = torch.ones(3, 2, dtype=torch.int64), torch.randn(3, 2)
NOBODY, SCORE = torch.empty(0, 2), torch.randn(3)
BAD = {
    "interpolate of integers": (lambda: gpk.interpolate(INT, INT), TypeError, "real.*int64"),
    "interpolate of no tensor": (lambda: gpk.interpolate(FLAT, 3.0), TypeError, "fake.*float"),
    "interpolate of two shapes": (lambda: gpk.interpolate(FLAT, FLAT[:2]), ValueError, "fake.*3, 2.*2, 2"),
    "interpolate of an empty batch": (lambda: gpk.interpolate(NOBODY, NOBODY), ValueError, "real.*0, 2"),
    "interpolate with one eps": (lambda: gpk.interpolate(FLAT, FLAT, torch.rand(1)), ValueError, "eps.*per sample"),
    "interpolate with eps per pixel": (lambda: gpk.interpolate(FLAT, FLAT, torch.rand(3, 2)), ValueError, "eps"),
    "interpolate across devices": (lambda: gpk.interpolate(FLAT, FLAT.to("meta")), ValueError, "fake.*meta"),
    "a generator of the wrong type": (lambda: gpk.interpolate(FLAT, FLAT, generator=3), TypeError, "generator.*int"),
    "noise of negative sigma": (lambda: gpk.add_instance_noise(FLAT, -1.0), ValueError, "sigma.*-1"),
    "noise of NaN sigma": (lambda: gpk.add_instance_noise(FLAT, float("nan")), ValueError, "sigma.*nan"),
    "noise of a text sigma": (lambda: gpk.add_instance_noise(FLAT, "1"), TypeError, "sigma.*str"),
    "penalty of a scalar": (lambda: gpk.gradient_norm_penalty(torch.tensor(1.0)), ValueError, "grad"),
    "penalty of integers": (lambda: gpk.gradient_norm_penalty(INT), TypeError, "grad.*int64"),
    "penalty of a sparse tensor": (lambda: gpk.gradient_norm_penalty(FLAT.to_sparse()), TypeError, "grad.*sparse"),
    "penalty with a negative target": (lambda: gpk.gradient_norm_penalty(FLAT, -1.0), ValueError, "target.*-1"),
    "penalty with an infinite target": (lambda: gpk.gradient_norm_penalty(FLAT, float("inf")), ValueError, "target"),
    "penalty with a foreign reduction": (
        lambda: gpk.gradient_norm_penalty(FLAT, reduction="max"),
        ValueError,
        "reduction.*'max'",
    ),
    "penalty with a list of reductions": (
        lambda: gpk.gradient_norm_penalty(FLAT, reduction=["mean"]),
        ValueError,
        r"reduction.*\['mean'\]",
    ),
    "penalty on a side of text": (
        lambda: gpk.gradient_norm_penalty(FLAT, one_sided="no"),
        TypeError,
        "one_sided.*'no'",
    ),
    "penalty on a side of NaN": (
        lambda: gpk.gradient_norm_penalty(FLAT, one_sided=float("nan")),
        TypeError,
        "one_sided.*nan",
    ),
    "penalty on a side for each sample": (
        lambda: gpk.gradient_norm_penalty(FLAT, one_sided=INT),
        TypeError,
        "one_sided.*tensor",
    ),
    "penalty of a power below 1": (lambda: gpk.gradient_norm_penalty(FLAT, power=0.5), ValueError, "power.*0.5"),
    "penalty of an infinite power": (
        lambda: gpk.gradient_norm_penalty(FLAT, power=float("inf")),
        ValueError,
        "power.*inf",
    ),
    "penalty of a NaN power": (lambda: gpk.gradient_norm_penalty(FLAT, power=float("nan")), ValueError, "power.*nan"),
    "penalty of a text power": (lambda: gpk.gradient_norm_penalty(FLAT, power="2"), TypeError, "power.*str"),
    "penalty over a foreign axis": (lambda: gpk.gradient_norm_penalty(FLAT, dim=2), ValueError, "dim.*2 axes.*got 2"),
    "penalty over one axis twice": (
        lambda: gpk.gradient_norm_penalty(FLAT[None], dim=(2, -1)),
        ValueError,
        r"dim.*each once.*\(2, -1\)",
    ),
    "penalty over all axes": (lambda: gpk.gradient_norm_penalty(FLAT, dim=(0, 1)), ValueError, r"dim.*\(0, 1\)"),
    "penalty over no axes": (lambda: gpk.gradient_norm_penalty(FLAT, dim=()), ValueError, r"dim.*\(\)"),
    "penalty over half an axis": (lambda: gpk.gradient_norm_penalty(FLAT, dim=0.5), TypeError, "dim.*float"),
    "penalty over axes of text": (lambda: gpk.gradient_norm_penalty(FLAT, dim=("1",)), TypeError, "dim.*str"),
    "penalty of no rows": (lambda: gpk.gradient_norm_penalty(NOBODY, dim=1), ValueError, "grad.*0, 2"),
    "penalty over an axis of integers": (lambda: gpk.gradient_norm_penalty(INT, dim=1), TypeError, "grad.*int64"),
    "penalty of packs of nothing": (lambda: gpk.gradient_norm_penalty(FLAT, pack=0), ValueError, "pack.*1.*0"),
    "penalty of true packs": (lambda: gpk.gradient_norm_penalty(FLAT, pack=True), TypeError, "pack.*bool"),
    "penalty of half packs": (lambda: gpk.gradient_norm_penalty(FLAT, pack=1.5), TypeError, "pack.*float"),
    "penalty of a part of a pack": (lambda: gpk.gradient_norm_penalty(FLAT, pack=2), ValueError, "pack.*3, got 2"),
    "penalty of packs over an axis": (
        lambda: gpk.gradient_norm_penalty(FLAT, dim=1, pack=3),
        ValueError,
        "pack.*dim.*3",
    ),
    "penalty of packs of integers": (lambda: gpk.gradient_norm_penalty(INT, pack=3), TypeError, "grad.*int64"),
    "consistency of two batches": (lambda: gpk.consistency_term(SCORE, SCORE[:2]), ValueError, "score2"),
    "consistency of one feature": (lambda: gpk.consistency_term(SCORE, SCORE, FLAT), ValueError, "features2.*None"),
    "consistency of foreign features": (
        lambda: gpk.consistency_term(SCORE, SCORE, FLAT[:2], FLAT[:2]),
        ValueError,
        "features1.*batch",
    ),
    "consistency of negative margin": (
        lambda: gpk.consistency_term(SCORE, SCORE, margin=-0.1),
        ValueError,
        "margin.*-0.1",
    ),
    "consistency of negative weight": (
        lambda: gpk.consistency_term(SCORE, SCORE, feature_weight=-1),
        ValueError,
        "feature_weight",
    ),
    "lipschitz of negative margin": (
        lambda: gpk.lipschitz_consistency(SCORE, SCORE, FLAT, FLAT, margin=-1),
        ValueError,
        "margin",
    ),
    "a loss of integers": (lambda: gpk.wgan_critic_loss(INT, INT), TypeError, "real_scores"),
    "a hinge loss of integers": (lambda: gpk.hinge_critic_loss(SCORE, INT), TypeError, "fake_scores.*int64"),
    "a loss of an infinite real target": (
        lambda: gpk.least_squares_critic_loss(SCORE, SCORE, real_target=float("inf")),
        ValueError,
        "real_target.*inf",
    ),
    "a loss of a NaN fake target": (
        lambda: gpk.least_squares_critic_loss(SCORE, SCORE, fake_target=float("nan")),
        ValueError,
        "fake_target.*nan",
    ),
    "a loss of a text target": (
        lambda: gpk.least_squares_generator_loss(SCORE, target="1"),
        TypeError,
        "target.*str",
    ),
    "a loss of unpaired scores": (
        lambda: gpk.relativistic_critic_loss(SCORE, SCORE[:2]),
        ValueError,
        r"fake_scores: .*real_scores, \(3,\).*\(2,\)",
    ),
    "a generator's loss of unpaired scores": (
        lambda: gpk.relativistic_generator_loss(SCORE, SCORE[:, None]),
        ValueError,
        r"real_scores: .*fake_scores, \(3, 1\).*\(3,\)",
    ),
    "a loss of pairs of nothing": (
        lambda: gpk.relativistic_critic_loss(NOBODY, NOBODY),
        ValueError,
        "real_scores.*0, 2",
    ),
    "a loss of pairs across devices": (
        lambda: gpk.relativistic_critic_loss(SCORE, SCORE.to("meta")),
        ValueError,
        "fake_scores.*meta",
    ),
    "a loss of nothing": (lambda: gpk.wgan_generator_loss(torch.empty(0)), ValueError, "fake_scores"),
    "clipping by a negative number": (lambda: gpk.clip_weights_([FLAT.clone()], -0.1), ValueError, "c: .*-0.1"),
    "clipping integers": (lambda: gpk.clip_weights_([FLAT.clone(), INT], 0.1), TypeError, r"params\[1\]"),
    "clipping nothing": (lambda: gpk.clip_weights_(None, 0.1), TypeError, "params.*NoneType"),
    "several backends": (lambda: gpk.set_backend(["cpu"]), ValueError, r"backend.*\['cpu'\]"),
    "a foreign backend": (lambda: gpk.set_backend("tpu"), ValueError, "backend.*tpu"),
}


ONE = torch.ones(())
AFTER = len(ScoreLoss)
KINDS = rf"expected 0 \(identity\), 1 \(negative\), .*{AFTER - 1} \({ScoreLoss(AFTER - 1).name.lower()}\), got "
BAD_CODES = {
    "a loss of a kind above all": (lambda: score_loss_op([SCORE], [70], [0.0]), rf"kinds: {KINDS}70"),
    "a loss of the kind after the last": (lambda: score_loss_op([SCORE], [AFTER], [0.0]), rf"kinds: {KINDS}{AFTER}"),
    "a loss of a negative kind": (lambda: score_loss_op([SCORE], [-1], [0.0]), rf"kinds: {KINDS}-1"),
    "a loss of a bad second kind": (lambda: score_loss_op([SCORE, SCORE], [0, 9], [0.0, 0.0]), rf"kinds: {KINDS}9"),
    "a loss of too few kinds": (lambda: score_loss_op([SCORE, SCORE], [0], [0.0, 0.0]), "kinds: .* 2 scores, got 1"),
    "a loss of too few targets": (lambda: score_loss_op([SCORE], [AFTER - 1], []), "targets: .* 1 scores, got 0"),
    "a loss of no scores": (lambda: score_loss_op([], [], []), "scores: .* none"),
    "a slope of a kind above all": (
        lambda: score_loss_backward_op(ONE, [SCORE], [AFTER], [0.0]),
        rf"kinds: {KINDS}{AFTER}",
    ),
    "a slope of a negative kind": (lambda: score_loss_backward_op(ONE, [SCORE], [-1], [0.0]), rf"kinds: {KINDS}-1"),
    "a slope of no scores": (lambda: score_loss_backward_op(ONE, [], [], []), "scores: .* none"),
    "a mapped loss": (
        lambda: torch.func.vmap(lambda s: score_loss_op([s], [AFTER], [0.0]))(FLAT),
        rf"kinds: {KINDS}{AFTER}",
    ),
    "a penalty of a foreign reduction": (
        lambda: gradient_norm_penalty_op(FLAT, 1.0, False, 7, 2.0),
        r"reduction: expected 0 \(none\), 1 \(mean\), 2 \(sum\), got 7",
    ),
}


@pytest.mark.parametrize("name", BAD_CODES)
def test_a_code_that_names_nothing_is_refused(name: str, backend: str) -> None:
    call, message = BAD_CODES[name]
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("kind", [-1, AFTER])
def test_a_code_that_names_nothing_is_refused_by_the_registered_kernel(kind: int) -> None:
    with pytest.raises((ValueError, RuntimeError), match=f"kinds: expected .*, got {kind}"):
        torch.ops.gpkernels.score_loss([SCORE, SCORE], [0, kind], [0.0, 0.0])
    with pytest.raises((ValueError, RuntimeError), match=f"kinds: expected .*, got {kind}"):
        torch.ops.gpkernels.score_loss_backward(ONE, [SCORE], [kind], [0.0])
    with pytest.raises((ValueError, RuntimeError), match=f"reduction: expected .*, got {kind}"):
        torch.ops.gpkernels.gradient_norm_penalty(FLAT, 1.0, False, kind, 2.0)


def test_a_code_that_names_nothing_is_refused_while_tracing_and_by_the_specification() -> None:
    for call in (score_loss_op.overload, score_loss_reference):
        with FakeTensorMode() as mode, pytest.raises(ValueError, match=f"kinds: {KINDS}{AFTER}"):
            call([mode.from_tensor(SCORE)], [AFTER], [0.0])
    with pytest.raises(ValueError, match=f"kinds: {KINDS}{AFTER}"):
        score_loss_backward_reference(ONE, [SCORE], [AFTER], [0.0])


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name: str, backend: str) -> None:
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()


def test_nothing_is_clipped_when_a_later_tensor_is_bad(backend: str) -> None:
    first = torch.full((3,), 5.0)
    with pytest.raises(TypeError):
        gpk.clip_weights_([first, INT], 0.1)
    with pytest.raises(RuntimeError, match=r"params\[1\]: .*overlap.*\(4,\), strides \(0,\)"):
        gpk.clip_weights_([first, torch.ones(1).expand(4)], 0.1)
    assert (first == 5.0).all()


@pytest.mark.parametrize("number", [np.float32(0.5), np.float16(0.5), np.float64(0.5), Fraction(1, 2)], ids=repr)
def test_a_number_may_be_of_any_real_type(number: Any) -> None:
    weight = torch.ones(3)
    gpk.clip_weights_(weight, number)
    assert weight.tolist() == [0.5] * 3


def test_raw_ops_refuse_shapes_that_would_read_out_of_bounds() -> None:
    x = torch.randn(3, 4)
    with pytest.raises(RuntimeError, match=r"expected shape \(.*, got \("):
        interpolate_op.overload(x, torch.randn(3, 3), torch.rand(3))
    with pytest.raises(RuntimeError, match="one number per row"):
        interpolate_op.overload(x, x, torch.rand(2))
    with pytest.raises(RuntimeError, match="one number per row"):
        gradient_norm_penalty_backward_op.overload(torch.tensor(1.0), x, torch.rand(2))
    with pytest.raises(RuntimeError, match=r"expected shape \(.*, got \("):
        rmsprop_op.overload([x], [x[:2]], [x], [], [], 0.1, 0.9, 1e-8, 0.0, 0.0, False, None)


def test_scores_are_paired_and_not_broadcast(backend: str) -> None:
    for real, fake in ((SCORE, SCORE[:, None]), (FLAT, FLAT[:1]), (FLAT, torch.tensor(1.0))):
        for call in (gpk.relativistic_critic_loss, gpk.relativistic_generator_loss, relativistic_loss_op):
            with pytest.raises(ValueError, match="_scores: expected"):
                call(real, fake)
    with pytest.raises((ValueError, RuntimeError), match="fake_scores: "):
        torch.ops.gpkernels.relativistic_loss_backward(ONE, SCORE, SCORE[:, None])
