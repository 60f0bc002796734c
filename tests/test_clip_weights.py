"""clip_weights_ against clamp_."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import gpkernels as gpk

NUMBERS = st.one_of(st.floats(-2, 2, width=16), st.sampled_from([0.0, -0.0, float("inf"), float("-inf"), float("nan")]))
SHAPES = st.lists(st.integers(0, 5), max_size=4)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Any shape, dtype and layout, with special values."""
    shape = draw(SHAPES)
    size = int(np.prod(shape, dtype=int))
    values = draw(st.lists(NUMBERS, min_size=size, max_size=size))
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]))
    x = torch.tensor(values, dtype=dtype).reshape(shape)
    layout = draw(st.sampled_from(["contiguous", "transposed", "gaps", "channels_last"]))
    if layout == "transposed" and x.dim() > 1:
        x = x.transpose(0, -1)
    elif layout == "gaps":
        x = torch.stack([x, x], dim=-1)[..., 0]
    elif layout == "channels_last" and x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    return x


@given(weights=st.lists(tensors(), max_size=5), c=st.sampled_from([0.0, 0.01, 0.5, 1.0, 3.0]))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_clip_weights_is_clamp_for_any_tensors(weights: list[Tensor], c: float, backend: str) -> None:
    expected = [w.clone().clamp_(-c, c) for w in weights]
    pointers = [(w.data_ptr(), w.stride()) for w in weights]
    gpk.clip_weights_(weights, c)
    for w, e in zip(weights, expected, strict=True):
        torch.testing.assert_close(w, e, rtol=0, atol=0, equal_nan=True)
    assert [(w.data_ptr(), w.stride()) for w in weights] == pointers


def test_clip_weights_leaves_the_gaps_between_elements_alone(backend: str) -> None:
    whole = torch.full((4, 6), 5.0)
    gpk.clip_weights_(whole[:, ::2], 1.0)
    assert (whole[:, ::2] == 1).all()
    assert (whole[:, 1::2] == 5).all()


def test_clip_weights_takes_modules_parameters_and_long_tensors(backend: str) -> None:
    critic = nn.Sequential(nn.Linear(300, 400), nn.Linear(400, 3))
    with torch.no_grad():
        for p in critic.parameters():
            p.normal_()
    expected = [p.detach().clamp(-0.01, 0.01) for p in critic.parameters()]
    gpk.clip_weights_(critic.parameters(), 0.01)
    assert all(torch.equal(p, e) for p, e in zip(critic.parameters(), expected, strict=True))
