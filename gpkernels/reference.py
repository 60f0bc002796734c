"""Every op in plain PyTorch: the specification that kernels, tests and benchmarks are held to.

Forward functions are differentiable to any order and free of NaN at zero norms. Functions named ``*_backward`` give the
first derivative in closed form; they are what a backend implements, and the derivative of the forward function is their
test. Reductions and random numbers use at least float32, so penalties of float16 and bfloat16 tensors are float32.
Rows are samples: the first axis is the batch, all others are flattened.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, logsigmoid

REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}
SCORE_LOSSES = {"identity": 0, "negative": 1, "softplus": 2, "softplus_negative": 3, "negative_softplus": 4}
_KINDS = frozenset(SCORE_LOSSES.values())

_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_MASK32 = 0xFFFFFFFF


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, otherwise float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _per_row(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (like.dim() - 1))


def _rows(x: Tensor) -> Tensor:
    return x.to(accumulation_dtype(x.dtype)).reshape(x.shape[0], -1)


def _reduce(values: Tensor, reduction: int) -> Tensor:
    if reduction == REDUCTIONS["mean"]:
        return values.mean()
    return values.sum() if reduction == REDUCTIONS["sum"] else values


# --- random numbers ---------------------------------------------------------------------------------------------------


def philox(key: Tensor, counter: Tensor) -> list[Tensor]:
    """Philox-4x32-10 (Salmon et al. 2011): four 32-bit words, held in int64, for each counter.

    ``key`` is one int64, split into two words; ``counter`` (n,) fills the two low words of the 128-bit counter.
    """
    words = [counter & _MASK32, (counter >> 32) & _MASK32, torch.zeros_like(counter), torch.zeros_like(counter)]
    round_key = [key & _MASK32, (key >> 32) & _MASK32]
    for _ in range(10):
        # 64-bit products wrap, but their bits are those of the unsigned product.
        first, second = words[0] * _PHILOX_MULTIPLIERS[0], words[2] * _PHILOX_MULTIPLIERS[1]
        words = [
            ((second >> 32) & _MASK32) ^ words[1] ^ round_key[0],
            second & _MASK32,
            ((first >> 32) & _MASK32) ^ words[3] ^ round_key[1],
            first & _MASK32,
        ]
        round_key = [(k + inc) & _MASK32 for k, inc in zip(round_key, _PHILOX_INCREMENTS, strict=True)]
    return words


def _unit_interval(word: Tensor, dtype: torch.dtype) -> Tensor:
    """24 random bits as a number in [0, 1)."""
    return (word >> 8).to(dtype) * 2.0**-24


def _random_elements(key: Tensor, x: Tensor, gaussian: bool) -> Tensor:
    """One random number per element, laid along memory, four to a Philox call."""
    dtype = accumulation_dtype(x.dtype)
    words = philox(key, torch.arange((x.numel() + 3) // 4, dtype=torch.int64, device=x.device))
    if gaussian:  # Box-Muller; 1 - u lies in (0, 1], so the logarithm is finite
        numbers = []
        for radius_word, angle_word in ((words[0], words[1]), (words[2], words[3])):
            radius = (-2.0 * (1.0 - _unit_interval(radius_word, dtype)).log()).sqrt()
            angle = (2.0 * torch.pi) * _unit_interval(angle_word, dtype)
            numbers += [radius * angle.cos(), radius * angle.sin()]
    else:
        numbers = [_unit_interval(word, dtype) for word in words]
    flat = torch.stack(numbers, dim=1).reshape(-1)[: x.numel()]
    return flat.as_strided(x.shape, torch.empty_like(x).stride())


# --- interpolate ------------------------------------------------------------------------------------------------------


def interpolate(real: Tensor, fake: Tensor, eps: Tensor) -> Tensor:
    """eps * real + (1 - eps) * fake, eps one per sample (Gulrajani et al. 2017, Algorithm 1)."""
    weight = _per_row(eps, real).to(accumulation_dtype(real.dtype))
    return (weight * real + (1 - weight) * fake).to(real.dtype)


def interpolate_random(real: Tensor, fake: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """The same with eps drawn from U[0, 1): the first Philox word of counter n for sample n."""
    counter = torch.arange(real.shape[0], dtype=torch.int64, device=real.device)
    eps = _unit_interval(philox(key, counter)[0], accumulation_dtype(real.dtype))
    return interpolate(real, fake, eps), eps


def interpolate_backward(cotangent: Tensor, eps: Tensor, to_real: bool, to_fake: bool) -> tuple[Tensor, Tensor]:
    """(eps * cotangent, (1 - eps) * cotangent); an empty tensor for a side that is not wanted."""
    weight = _per_row(eps, cotangent).to(accumulation_dtype(cotangent.dtype))
    nothing = cotangent.new_empty(0)
    return (
        (weight * cotangent).to(cotangent.dtype) if to_real else nothing,
        ((1 - weight) * cotangent).to(cotangent.dtype) if to_fake else nothing,
    )


# --- instance noise ---------------------------------------------------------------------------------------------------


def instance_noise(x: Tensor, sigma: float, scale: Tensor | None, key: Tensor, gaussian: bool) -> Tensor:
    """x + sigma * scale * xi, xi from N(0, 1) or U[0, 1) per element, scale one number (1 if None)."""
    noise = _random_elements(key, x, gaussian) * sigma
    if scale is not None:
        noise = noise * scale.to(noise.dtype)
    return (x + noise).to(x.dtype)


# --- gradient norm penalty --------------------------------------------------------------------------------------------


def gradient_norm_penalty(grad: Tensor, target: float, one_sided: bool, reduction: int) -> tuple[Tensor, Tensor]:
    """((|g_n| - target)^2 reduced over n, coefficient): the coefficient c_n gives the derivative w_n c_n g_n.

    One-sided: max(0, |g_n| - target)^2. Where |g_n| = 0 the subgradient 0 is taken; target = 0 is the smooth |g_n|^2.
    """
    rows = _rows(grad)
    squared = (rows * rows).sum(1)
    if target == 0:
        coefficient = torch.full_like(squared, 2.0)
        values = squared
    else:
        zero = squared == 0
        norm = torch.where(zero, 0.0, torch.where(zero, 1.0, squared).sqrt())
        excess = norm - target
        if one_sided:
            excess = torch.where(excess <= 0, 0.0, excess)
        coefficient = torch.where(zero, 0.0, 2.0 * excess / torch.where(zero, 1.0, norm))
        values = excess * excess
    if reduction == REDUCTIONS["mean"]:
        coefficient = coefficient / grad.shape[0]
    return _reduce(values, reduction), coefficient.detach()


def gradient_norm_penalty_backward(cotangent: Tensor, grad: Tensor, coefficient: Tensor) -> Tensor:
    """cotangent * coefficient_n * g_n: a scaled copy. The cotangent is one number, or one per row."""
    return (_per_row(cotangent * coefficient, grad) * grad).to(grad.dtype)


# --- consistency ------------------------------------------------------------------------------------------------------


def _squared_distance(a: Tensor, b: Tensor) -> Tensor:
    difference = _rows(a) - _rows(b)
    return (difference * difference).sum(1)


def consistency_term(
    score1: Tensor, score2: Tensor, features1: Tensor, features2: Tensor, margin: float, feature_weight: float
) -> tuple[Tensor, Tensor, Tensor]:
    """mean max(0, |s1 - s2|^2 + feature_weight * mean_j (f1_j - f2_j)^2 - margin), as CT-GAN trains (Wei et al. 2018).

    Also the per-row coefficients of s1 - s2 and f1 - f2 in the derivative.
    """
    share = feature_weight / max(1, features1[0].numel())
    excess = _squared_distance(score1, score2) + share * _squared_distance(features1, features2) - margin
    active = torch.full_like(excess, 2.0 / score1.shape[0]).masked_fill(excess <= 0, 0.0).detach()
    return torch.where(excess <= 0, 0.0, excess).mean(), active, active * share


def lipschitz_consistency(
    score1: Tensor, score2: Tensor, x1: Tensor, x2: Tensor, margin: float
) -> tuple[Tensor, Tensor, Tensor]:
    """mean max(0, |s1 - s2| / |x1 - x2| - margin) (Wei et al. 2018, eq. 4); a pair with x1 = x2 contributes 0.

    Also the per-row coefficients of s1 - s2 and x1 - x2 in the derivative.
    """
    scores, inputs = _squared_distance(score1, score2), _squared_distance(x1, x2)
    idle = (scores == 0) | (inputs == 0)
    ratio = (torch.where(idle, 1.0, scores) / torch.where(idle, 1.0, inputs)).sqrt()
    excess = torch.where(idle, 0.0, ratio) - margin
    idle = idle | (excess <= 0)
    slope = torch.where(idle, 0.0, ratio / score1.shape[0])
    values = torch.where(excess <= 0, 0.0, excess).mean()
    by_scores = (slope / torch.where(idle, 1.0, scores)).detach()
    return values, by_scores, (-slope / torch.where(idle, 1.0, inputs)).detach()


def consistency_backward(
    cotangent: Tensor,
    a1: Tensor,
    a2: Tensor,
    b1: Tensor,
    b2: Tensor,
    a_coefficient: Tensor,
    b_coefficient: Tensor,
    to_b: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(ga, -ga, gb, -gb) with ga = cotangent * a_coefficient_n * (a1 - a2), and gb likewise, empty if not wanted."""

    def one(x1: Tensor, x2: Tensor, coefficient: Tensor) -> Tensor:
        wide = x1.to(coefficient.dtype) - x2.to(coefficient.dtype)
        return (_per_row(cotangent * coefficient, x1) * wide).to(x1.dtype)

    ga = one(a1, a2, a_coefficient)
    gb = one(b1, b2, b_coefficient) if to_b else b1.new_empty(0)
    return ga, -ga, gb, -gb


# --- score losses -----------------------------------------------------------------------------------------------------


def check_kinds(scores: Sequence[Tensor], kinds: Sequence[int]) -> None:
    """ValueError unless there are scores, and one of SCORE_LOSSES for each of them."""
    if not scores:
        raise ValueError("scores: expected at least one tensor, got none")
    if len(kinds) != len(scores):
        raise ValueError(f"kinds: expected one for each of {len(scores)} scores, got {len(kinds)}")
    if not _KINDS.issuperset(kinds):  # one call for all of them: this is in the way of small ops
        wrong = next(kind for kind in kinds if kind not in _KINDS)
        wanted = ", ".join(f"{code} ({called})" for called, code in SCORE_LOSSES.items())
        raise ValueError(f"kinds: expected {wanted}, got {wrong!r}")


def score_loss(scores: Sequence[Tensor], kinds: Sequence[int]) -> Tensor:
    """The sum over tensors of mean phi(scores): phi is s, -s, softplus(s), softplus(-s) or -softplus(s), by kind."""
    check_kinds(scores, kinds)
    total: Tensor | None = None
    for s, kind in zip(scores, kinds, strict=True):
        wide = s.to(accumulation_dtype(s.dtype))
        if kind == SCORE_LOSSES["identity"]:
            value = wide
        elif kind == SCORE_LOSSES["negative"]:
            value = -wide
        elif kind == SCORE_LOSSES["softplus"]:
            value = -logsigmoid(-wide)
        elif kind == SCORE_LOSSES["softplus_negative"]:
            value = -logsigmoid(wide)
        else:
            value = logsigmoid(-wide)
        total = value.mean() if total is None else total + value.mean()
    assert total is not None
    return total


def score_loss_backward(cotangent: Tensor, scores: Sequence[Tensor], kinds: Sequence[int]) -> list[Tensor]:
    """cotangent * phi'(s) / numel for each tensor."""
    check_kinds(scores, kinds)
    grads = []
    for s, kind in zip(scores, kinds, strict=True):
        wide = s.to(accumulation_dtype(s.dtype))
        if kind == SCORE_LOSSES["identity"]:
            slope = torch.ones_like(wide)
        elif kind == SCORE_LOSSES["negative"]:
            slope = -torch.ones_like(wide)
        elif kind == SCORE_LOSSES["softplus"]:
            slope = wide.sigmoid()
        elif kind == SCORE_LOSSES["softplus_negative"]:
            slope = -(-wide).sigmoid()
        else:
            slope = -wide.sigmoid()
        grads.append((cotangent * slope / s.numel()).to(s.dtype))
    return grads


# --- weights ----------------------------------------------------------------------------------------------------------


def clip_weights_(params: Sequence[Tensor], c: float) -> None:
    """Clamp every weight to [-c, c] in place (Arjovsky et al. 2017, Algorithm 1); NaN stays NaN."""
    for p in params:
        p.clamp_(-c, c)


def rmsprop_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    square_avgs: Sequence[Tensor],
    grad_avgs: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    lr: float,
    alpha: float,
    eps: float,
    weight_decay: float,
    momentum: float,
    maximize: bool,
    clip: float | None,
) -> None:
    """torch.optim.RMSprop's update, then a clamp to [-clip, clip]; state is rounded once, when it is stored.

    Centred where ``grad_avgs`` is not empty, with momentum where ``momentum_buffers`` is not empty.
    """
    for i, param in enumerate(params):
        wide = accumulation_dtype(param.dtype)
        p, g, square = param.to(wide), grads[i].to(wide), square_avgs[i].to(wide)
        g = -g if maximize else g
        if weight_decay != 0:
            g = g.add(p, alpha=weight_decay)
        square = square.mul(alpha).addcmul(g, g, value=1 - alpha)
        square_avgs[i].copy_(square)
        variance = square
        if grad_avgs:
            average = grad_avgs[i].to(wide).lerp(g, 1 - alpha)
            grad_avgs[i].copy_(average)
            variance = square.addcmul(average, average, value=-1)
        step = variance.sqrt().add(eps)
        if momentum_buffers:
            buffer = momentum_buffers[i].to(wide).mul(momentum).addcdiv(g, step)
            momentum_buffers[i].copy_(buffer)
            p = p.add(buffer, alpha=-lr)
        else:
            p = p.addcdiv(g, step, value=-lr)
        param.copy_(p if clip is None else p.clamp(-clip, clip))


# --- normalisation ----------------------------------------------------------------------------------------------------


def normalise_curvature(normal: Tensor, inverse: Tensor, tangent: Tensor, cotangent: Tensor, centred: bool) -> Tensor:
    """The derivative of <cotangent, J tangent> with respect to x, J being the derivative of a normalisation at x.

    n = (x - mean) r over each group of M elements, r = 1 / sqrt(variance + eps); r is (N, groups, 1), all others are
    (N, groups, M). With c_u = mean(n u), J t = r (t - mean(t) - n c_t) is symmetric, and <d, J t> = r M (a - c_t c_d)
    where a = mean(d t) - mean(d) mean(t); so its derivative is
    r^2 ((3 c_t c_d - a) n - c_d (t - mean(t)) - c_t (d - mean(d))). Not centred, as in RMSNorm, the means drop out.
    """
    wide = accumulation_dtype(normal.dtype)
    n, r, t, d = (x.to(wide) for x in (normal, inverse, tangent, cotangent))

    def mean(u: Tensor) -> Tensor:
        return u.mean(-1, keepdim=True)

    if centred:
        t, d = t - mean(t), d - mean(d)
    c_t, c_d = mean(n * t), mean(n * d)
    bent = (3 * c_t * c_d - mean(d * t)) * n - c_d * t - c_t * d
    return (r * r * bent).to(normal.dtype)


def affine_gradients(cotangent: Tensor, operand: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of w and b in y = x w + b: sums over R and I of cotangent * operand and of cotangent, (R, K, I)."""
    wide = accumulation_dtype(cotangent.dtype)
    c = cotangent.to(wide)
    return (c * operand.to(wide)).sum((0, 2)), c.sum((0, 2))


# --- pooling ----------------------------------------------------------------------------------------------------------


def mean_pool(x: Tensor, h: int, w: int) -> Tensor:
    """Means over h x w windows that tile the last two axes."""
    planes = x.reshape(-1, 1, *x.shape[-2:])
    return avg_pool2d(planes, (h, w)).reshape(*x.shape[:-2], x.shape[-2] // h, x.shape[-1] // w)


def mean_pool_backward(cotangent: Tensor, h: int, w: int) -> Tensor:
    """Each window's cotangent, divided by h w, at all of its places."""
    return (cotangent / (h * w)).repeat_interleave(h, -2).repeat_interleave(w, -1)
