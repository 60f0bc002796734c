"""Arguments for every raw op."""

from __future__ import annotations

from typing import Any

import torch

from gpkernels import ops
from gpkernels.ops.score_loss import ScoreLoss


def raw_arguments() -> dict[str, list[tuple[Any, ...]]]:
    """Arguments for every raw op, several layouts each."""
    cl = torch.channels_last
    x, y = torch.randn(3, 5), torch.randn(3, 5)
    image, other = torch.randn(2, 3, 4, 4).contiguous(memory_format=cl), torch.randn(2, 3, 4, 4)
    key = torch.tensor([12345678901234567])
    c3, c2, one, none = torch.rand(3), torch.rand(2), torch.tensor(0.7), torch.empty(3, 0)
    weights = [torch.randn(4, 3), torch.randn(7), torch.randn(5001), torch.randn(300)[1:]]
    like = [torch.rand_like(w) for w in weights]
    hyper = (1e-2, 0.9, 1e-8, 0.1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.nn.functional.layer_norm(torch.randn(shape), shape[-1:], eps=0.0)

    return {
        **_attention(),
        "interpolate": [(x, y, c3), (image, image.clone(), c2), (image, other, c2)],
        "interpolate_backward": [(x, c3, True, True), (image, c2, True, False), (x.t(), torch.rand(5), False, True)],
        "instance_noise": [(x, 0.5, None, key, True), (image, 0.5, torch.rand(1), key, False)],
        "gradient_norm_penalty": [
            (x, 1.0, False, 1, 2.0),
            (image, 0.0, True, 2, 2.0),
            (x.half(), 1.0, False, 0, 2.0),
            (x, 1.0, True, 0, 1.0),
            (image, 0.0, False, 1, 1.5),
            (x, 2.5, False, 2, 3.0),
        ],
        "gradient_norm_penalty_backward": [(one, x, c3), (torch.rand(2), image, c2)],
        "consistency_term": [(x, y, none, none, 0.1, 0.1), (x, y, y, x, 0.1, 0.1)],
        "lipschitz_consistency": [(c3, c3 + 1, x, y, 0.1)],
        "consistency_backward": [(one, x, y, none, none, c3, c3, False), (one, c2, c2, image, other, c2, c2, True)],
        "score_loss": [
            ([x, c3], [1, 0], [0.0, 0.0]),
            ([x, c3], [7, 7], [1.0, -1.0]),
            *(([image], [kind], [0.3]) for kind in ScoreLoss),
        ],
        "score_loss_backward": [
            (one, [x, c3], [1, 3], [0.0, 0.0]),
            (one, [x, c3], [7, 7], [1.0, -1.0]),
            *((one, [image], [kind], [0.3]) for kind in ScoreLoss),
        ],
        "relativistic_loss": [(x, y), (image, other), (image, image.clone())],
        "relativistic_loss_backward": [(one, x, y), (one, image, other), (one, image, image.clone())],
        "normalise_curvature": [
            (normal(2, 3, 5), torch.rand(2, 3, 1), torch.randn(2, 3, 5), torch.randn(2, 3, 5), True),
            (normal(2, 3, 16), torch.rand(2, 3, 1), other.flatten(2), other.flatten(2), False),
        ],
        "affine_gradients": [
            (torch.randn(70, 300, 1), torch.randn(70, 300, 1)),
            (torch.randn(2, 3, 5).half(), torch.randn(2, 3, 5).half()),
        ],
        "mean_pool": [
            (torch.randn(2, 3, 6, 8), 2, 2),
            (image, 1, 2),
            (torch.randn(5, 6, 9), 3, 1),
            (torch.randn(1, 4, 9).half(), 1, 3),
        ],
        "mean_pool_backward": [(torch.randn(2, 3, 3, 4), 2, 2), (torch.randn(5, 2, 3).bfloat16(), 3, 1)],
        "clip_weights_": [(weights, 0.1)],
        "rmsprop_": [
            (weights, like, [w.clone() for w in like], [], [], *hyper, 0.0, False, None),
            (weights, like, *([w.clone() for w in like] for _ in range(3)), *hyper, 0.9, True, 0.05),
        ],
    }


def _attention() -> dict[str, list[tuple[Any, ...]]]:
    """Arguments of attention: fused by PyTorch, of another width, with each kind of mask."""
    found: dict[str, list[tuple[Any, ...]]] = {}
    some_keys = torch.rand(2, 1, 1, 5) > 0.4
    for width, length, mask, is_causal, dtype in (
        (8, 6, None, False, torch.float32),
        (8, 5, some_keys, False, torch.float32),
        (3, 6, None, True, torch.float32),
        (3, 4, torch.randn(4, 5), False, torch.float32),
        (8, 7, None, True, torch.bfloat16),
    ):
        query, tq = (torch.randn(2, length, 3, 8, dtype=dtype).transpose(1, 2) for _ in range(2))
        query = query.contiguous() if length == 7 else query
        key, tk = (torch.randn(2, 3, 5, 8, dtype=dtype) for _ in range(2))
        value, tv = (torch.randn(2, 3, 5, width, dtype=dtype) for _ in range(2))
        constants, tangents = (mask, is_causal, 0.4), (tq, tk, tv)
        name = "scaled_dot_product_attention"
        call = (query, key, value)
        kept = (*call, *ops.ALL[name].implementation(*call, *constants))
        cotangent = torch.randn_like(kept[3])
        known = ops.ALL[f"{name}_jvp"].implementation(*tangents, *kept, *constants)
        for end, given in {
            "": [(*call, *constants)],
            "_backward": [(cotangent, *kept, *constants)],
            "_jvp": [(*tangents, *kept, *constants)],
            "_double_backward": [
                (*tangents, cotangent, *kept, None, None, *constants),
                (*tangents, cotangent, *kept, *known, *constants),
            ],
        }.items():
            found.setdefault(name + end, []).extend(given)
    return found
