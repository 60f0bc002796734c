"""The critic's whole loss as a module."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from gpkernels.critic.call import scores_of
from gpkernels.critic.double_backward import depth, transformed
from gpkernels.critic.gathered import with_gathered
from gpkernels.critic.parts import Adversarial, Between, Consistency, CriticLossParts, Norm, Task
from gpkernels.critic.step import Batches, Begun, critic_step, groups_of, named, step_again, step_at_once
from gpkernels.critic.together import Seen
from gpkernels.ops.checks import (
    check_batch,
    check_callable,
    check_eps,
    check_finite,
    check_flag,
    check_further,
    check_nonnegative,
    check_optional_flag,
    check_pack,
    check_pair,
    check_same_device,
    check_whole,
)
from gpkernels.ops.consistency import consistency_term
from gpkernels.ops.gradient_norm_penalty import check_power
from gpkernels.ops.relativistic_loss import relativistic_critic_loss
from gpkernels.ops.score_loss import (
    ScoreLoss,
    gan_discriminator_loss,
    hinge_critic_loss,
    least_squares_critic_loss,
    wgan_critic_loss,
)
from gpkernels.penalties import (
    dragan_penalty,
    dragan_points,
    eps_of,
    gradient_penalty,
    r1_penalty,
    r2_penalty,
    warn_of_batch_norm,
)

OBJECTIVES: dict[str, tuple[Adversarial, Callable[..., Tensor]]] = {  # of real and fake scores
    "wgan": (Adversarial(ScoreLoss.NEGATIVE, ScoreLoss.IDENTITY, linear=True), wgan_critic_loss),
    "gan": (Adversarial(ScoreLoss.SOFTPLUS_NEGATIVE, ScoreLoss.SOFTPLUS), gan_discriminator_loss),
    "hinge": (Adversarial(ScoreLoss.HINGE_NEGATIVE, ScoreLoss.HINGE), hinge_critic_loss),
    "least-squares": (Adversarial(ScoreLoss.LEAST_SQUARES, ScoreLoss.LEAST_SQUARES), least_squares_critic_loss),
    "relativistic": (Adversarial(ScoreLoss.SOFTPLUS, ScoreLoss.SOFTPLUS, paired=True), relativistic_critic_loss),
}
PENALTIES = ("wgan-gp", "r1", "r2", "dragan")
PAIRED = "wgan-gp", "relativistic"  # which need as many real samples as fake ones
_options = attrgetter(
    *("objective", "penalty", "penalty_weight", "penalty_every", "target", "one_sided", "power", "real_target"),
    *("fake_target", "dragan_scale", "pack", "together", "consistency_weight", "consistency_margin", "feature_weight"),
)


@lru_cache(64)
def _task_of(
    objective: str,
    targets: tuple[float, float],
    penalties: tuple[str, ...],
    several: bool,
    target: float,
    one_sided: bool,
    power: float,
    consistency: tuple[float, float, float],
    wanted: bool,
    pack: int,
) -> Task:
    adversarial = OBJECTIVES[objective][0]
    if objective == "least-squares":
        adversarial = adversarial._replace(real_target=targets[0], fake_target=targets[1])
    norms = {
        "wgan-gp": Norm(target, one_sided, power),
        "dragan": Norm(target),
        "r1": Norm(0.0),
        "r2": Norm(0.0),
    }
    term = Consistency(*consistency) if consistency[0] > 0 else None
    return Task(adversarial, tuple([(n, norms[n]) for n in penalties]), term, wanted, pack, several)


_ELSEWHERE = "elsewhere"  # in the metadata of a saved loss: that the critic is saved with another module


def _place(x: Any) -> object:
    """Return what saved tensors have in common if they are one; anything else is equal to itself alone."""
    if type(x) not in (Tensor, nn.Parameter) or x.data_ptr() == 0:
        return object()
    return x.data_ptr(), x.shape, x.stride(), x.dtype


class CriticLoss(nn.Module):
    r"""Whole loss of a critic, whose parts share forward and backward passes.

    .. math::
        L = L_{\text{adversarial}} + \sum_k w_k P_k + w_c C

    :math:`P_k` are one or several gradient penalties with weights :math:`w_k`, and :math:`C` is CT-GAN's consistency
    term. The gradients are computed in the forward call and scaled in backward: the loss is differentiable once, and to
    any order inside :func:`fast_double_backward`. Results are in at least float32.

    Args:
        critic (nn.Module or Callable): maps a batch to scores, or to a tuple of scores and the features that the
            consistency term uses.
        objective (str): ``"wgan"``, ``"gan"``, ``"hinge"``, ``"least-squares"`` or ``"relativistic"``, which pairs real
            and fake samples. Default: ``"wgan"``.
        penalty (str or Mapping): ``"wgan-gp"`` (uses ``target``, ``one_sided`` and ``power``), ``"r1"``, ``"r2"``,
            ``"dragan"`` (uses ``target`` and ``dragan_scale``) or ``"none"``; or several of them with their weights,
            such as ``{"r1": 0.5, "r2": 0.5}``. Default: ``"wgan-gp"``.
        penalty_weight (float, optional): weight of the penalty, finite and at least 0; None where ``penalty`` is a
            mapping. Default: 10.
        target (float): norm that is not penalised, finite and at least 0. Default: 1.
        one_sided (bool): penalise only norms above ``target``. Default: False.
        power (float): exponent of WGAN-GP's penalty, finite and at least 1. Default: 2.
        real_target (float): target of real scores, for the least-squares objective. Default: 1.
        fake_target (float): target of fake scores, for the least-squares objective. Default: 0.
        penalty_every (int): number of calls per penalty. With a value of k, every k-th call with gradients, from the
            first on, includes the penalty with k times its weight (lazy regularization). The attribute ``calls`` is the
            count; set it to resume a run. Calls without gradients include the penalty as it is. Default: 1.
        dragan_scale (float): distance of DRAGAN's points from the samples, in standard deviations. Default: 0.5.
        consistency_weight (float): weight of CT-GAN's term between two passes over the real batch, of which the first
            gives the adversarial scores; 0 leaves the term out. Default: 0.
        consistency_margin (float): distance that the consistency term does not penalise. Default: 0.
        feature_weight (float): weight of the features in the consistency term. Default: 0.1.
        pack (int): consecutive samples with one score and one norm (PacGAN), a divisor of :math:`N`. Default: 1.
        together (bool, optional): whether real, fake and penalised samples are processed as one batch. As one batch,
            dropout draws one mask for all samples, buffers are updated once, and rounding may differ in the last bit;
            separately, the critic is called as in plain PyTorch, in the order fake, real, penalised; R1 and R2 share
            the calls that score their samples. Groups are separate without a penalty, with further inputs and for
            batches of different sizes. Default: one batch from the third call on, if the samples were independent in
            the first two.

    Shape:
        - real, fake: :math:`(N, *)`, of one shape; batch sizes may differ unless the objective is relativistic or a
          penalty is WGAN-GP's
        - eps: as in :func:`gradient_penalty`
        - Output: scalars

    Returns:
        CriticLossParts: the loss, which has the graph, and its detached, unweighted parts: adversarial, penalty (by
        name where ``penalty`` is a mapping), consistency.

    Raises:
        TypeError: an argument is of another type, or the critic returns no tensor.
        ValueError: an option is out of its range, batches are empty or do not match, the scores do not depend on the
            samples or are fewer than them, or ``together`` is True where samples interact.
        RuntimeError: inside ``torch.compile``, ``penalty_every`` is not 1 and ``with_penalty`` is not given.

    Note:
        The critic is a submodule, so that ``state_dict`` and ``DistributedDataParallel(CriticLoss(critic))`` contain
        it. In a module that has the critic before, such as a ``LightningModule`` with ``self.critic`` and
        ``self.critic_loss = CriticLoss(self.critic)``, the module's ``state_dict`` has the critic's weights once, as
        ``critic``'s. Copied and pickled losses keep options and ``calls``.

    Example:
        Made once, and called in each critic step:

        >>> critic = torch.nn.Sequential(torch.nn.Linear(2, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1))
        >>> generator = torch.nn.Linear(8, 2)
        >>> optimizer = torch.optim.Adam(critic.parameters(), lr=1e-4, betas=(0.0, 0.9))
        >>> critic_loss = gpkernels.CriticLoss(critic, objective="relativistic", penalty={"r1": 0.5, "r2": 0.5})
        >>> for real in torch.randn(5, 256, 2):
        ...     fake = generator(torch.randn(256, 8)).detach()
        ...     parts = critic_loss(real, fake)
        ...     optimizer.zero_grad()
        ...     parts.loss.backward()
        ...     optimizer.step()
        >>> parts.loss.shape, sorted(parts.penalty)
        (torch.Size([]), ['r1', 'r2'])

    References:
        Gulrajani et al., "Improved Training of Wasserstein GANs", 2017, eq. 3. https://arxiv.org/abs/1704.00028

        Wei et al., "Improving the Improved Training of Wasserstein GANs", 2018. https://arxiv.org/abs/1803.01541

        Karras et al., "Analyzing and Improving the Image Quality of StyleGAN", 2020. https://arxiv.org/abs/1912.04958

        Huang et al., "The GAN is dead; long live the GAN! A Modern GAN Baseline", 2024. https://arxiv.org/abs/2501.05441
    """

    __call__: Callable[..., CriticLossParts]

    def __init__(
        self,
        critic: Callable[..., Any],
        *,
        objective: str = "wgan",
        penalty: str | Mapping[str, float] = "wgan-gp",
        penalty_weight: float | None = None,
        target: float = 1.0,
        one_sided: bool = False,
        power: float = 2.0,
        real_target: float = 1.0,
        fake_target: float = 0.0,
        penalty_every: int = 1,
        dragan_scale: float = 0.5,
        consistency_weight: float = 0.0,
        consistency_margin: float = 0.0,
        feature_weight: float = 0.1,
        pack: int = 1,
        together: bool | None = None,
    ) -> None:
        super().__init__()
        check_callable("critic", critic)
        if not isinstance(objective, str) or objective not in OBJECTIVES:
            raise ValueError(f"objective: expected one of {', '.join(OBJECTIVES)}, got {objective!r}")
        self.critic = critic
        self.objective = objective
        self.penalty = _checked_penalty(penalty, penalty_weight)
        weight = 10.0 if penalty_weight is None else penalty_weight
        self.penalty_weight = check_nonnegative("penalty_weight", weight)
        self.target = check_nonnegative("target", target)
        self.one_sided = check_flag("one_sided", one_sided)
        self.power = check_power(power)
        self.real_target = check_finite("real_target", real_target)
        self.fake_target = check_finite("fake_target", fake_target)
        self.penalty_every = check_whole("penalty_every", penalty_every)
        self.calls = 0
        self.dragan_scale = check_nonnegative("dragan_scale", dragan_scale)
        self.consistency_weight = check_nonnegative("consistency_weight", consistency_weight)
        self.consistency_margin = check_nonnegative("consistency_margin", consistency_margin)
        self.feature_weight = check_nonnegative("feature_weight", feature_weight)
        self.pack = check_whole("pack", pack)
        for name, value in (("penalty_every", self.penalty_every), ("pack", self.pack)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        self.together = check_optional_flag("together", together)
        self._seen = Seen()

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """Return the critic's state, without what a surrounding module has of it already."""
        saved = {_place(x) for x in destination.values()} if destination else set()
        state = super().state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)
        own = [name for name in state if name.startswith(f"{prefix}critic.")]
        if own and all(_place(state[name]) in saved for name in own):
            for name in own:
                del state[name]
            getattr(state, "_metadata", {}).get(prefix[:-1], {})[_ELSEWHERE] = True
        return state

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Mapping[str, Any], *others: Any
    ) -> None:
        own = f"{prefix}critic."
        # Formats such as safetensors keep no metadata of modules, which begins with a version.
        elsewhere = local_metadata.get(_ELSEWHERE, "version" not in local_metadata)
        critic, absent = self.critic, prefix and not any(name.startswith(own) for name in state_dict)
        if absent and elsewhere and isinstance(critic, nn.Module):
            state_dict.update(critic.state_dict(prefix=own, keep_vars=True))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *others)

    def forward(
        self,
        real: Tensor,
        fake: Tensor,
        *,
        eps: Tensor | None = None,
        critic_args: Sequence[Any] = (),
        critic_kwargs: Mapping[str, Any] | None = None,
        with_penalty: bool | None = None,
    ) -> CriticLossParts:
        """Compute the loss and its parts.

        Args:
            real (Tensor): real samples.
            fake (Tensor): generated samples, on the same device.
            eps (Tensor, optional): weights of WGAN-GP's interpolates, one per sample or per pack. Default: drawn.
            critic_args (Sequence): further positional arguments of every call of the critic, such as labels. The
                penalty does not include gradients with respect to them. Default: none.
            critic_kwargs (Mapping, optional): further keyword arguments, in the same way. Default: none.
            with_penalty (bool, optional): whether this call includes the penalty. Inside ``torch.compile``, which
                cannot count calls, it is required where ``penalty_every`` is not 1. Default: as ``penalty_every`` says.

        Returns:
            CriticLossParts: the loss and its parts.
        """
        check_further(critic_args, critic_kwargs)
        if is_compiling() and self._seen.untraced is self.critic:
            from gpkernels.critic.traced import outside

            more = {"critic_args": critic_args, "critic_kwargs": critic_kwargs, "with_penalty": with_penalty}
            parts: CriticLossParts = outside(self.forward, real, fake, eps=eps, **more)
            return parts
        if not is_compiling() and with_penalty is None and self._seen.last is not None:
            module = self._modules.get("critic")  # the attribute costs more
            critic = self.critic if module is None else module
            done = step_again(self._seen, critic, _options(self), real, fake, eps, critic_args, critic_kwargs)
            if done is not None:
                return done if isinstance(done, CriticLossParts) else self._finish(*done)
        composed = transformed() or (depth() and not is_compiling())
        usual = isinstance(real, Tensor) and isinstance(fake, Tensor) and not (real.is_nested or fake.is_nested)
        if composed or is_compiling() or not usual:
            real, fake = self._checked(real, fake, eps)
        weights = self._weights(with_penalty)
        task = self._task(tuple(weights), torch.is_grad_enabled())
        given = self._given(real, fake, eps, task, tuple(critic_args), dict(critic_kwargs or {}))
        if composed:
            return self._composed(given, task, weights)
        if is_compiling():
            return self._in_graph(given, task, tuple(weights.values()))
        if weights:
            warn_of_batch_norm(self.critic, stacklevel=5)
        return self._eagerly(given, task, tuple(weights.values()), with_penalty is None and self.penalty_every == 1)

    def _eagerly(
        self, given: Batches, task: Task, weights: tuple[float, ...], as_usual: bool = False
    ) -> CriticLossParts:
        return with_gathered(lambda: self._step(given, task, weights, as_usual))

    def _step(self, given: Batches, task: Task, weights: tuple[float, ...], as_usual: bool) -> CriticLossParts:
        """Make a step; as_usual: whether the options alone decide on it."""
        options = _options(self) if as_usual else None
        make = partial(dragan_points, scale=self.dragan_scale)
        begun = step_at_once(self.critic, given, task, weights, self.together, self._seen, options, make)
        return begun if isinstance(begun, CriticLossParts) else self._finish(given, task, weights, begun)

    def _finish(self, given: Batches, task: Task, weights: tuple[float, ...], begun: Begun | None) -> CriticLossParts:
        """Do what is left of a step, with everything checked."""
        mixed = given.points.get("wgan-gp")
        real, fake = self._checked(given.real, given.fake, mixed.eps if isinstance(mixed, Between) else None)
        points = dict(given.points)
        if isinstance(mixed, Between):
            points["wgan-gp"] = mixed._replace(real=real, fake=fake)
        given = given._replace(real=real, fake=fake, points=points)
        return critic_step(self.critic, given, task, weights, self.together, self._seen, begun)

    def _checked(self, real: Tensor, fake: Tensor, eps: Tensor | None) -> tuple[Tensor, Tensor]:
        """Check both batches and return them in one dtype."""
        if self.objective in PAIRED or "wgan-gp" in self._names():
            check_pair("real", real, "fake", fake)
        else:
            check_batch("real", real)
            check_batch("fake", fake)
            check_same_device("real", real, "fake", fake)
        for name, x in (("real", real), ("fake", fake)):
            check_pack(name, x, self.pack)
        if eps is not None and self.pack == 1:
            check_eps(eps, real)
        if real.dtype != fake.dtype:
            dtype = torch.promote_types(real.dtype, fake.dtype)
            real, fake = real.to(dtype), fake.to(dtype)
        return real, fake

    def _names(self) -> tuple[str, ...]:
        if isinstance(self.penalty, str):
            return () if self.penalty == "none" else (self.penalty,)
        return tuple(self.penalty)

    def _weights(self, with_penalty: bool | None) -> dict[str, float]:
        """Return the penalties of this call with their weights; options may have changed since the last call."""
        weights = self.penalty if isinstance(self.penalty, dict) else dict.fromkeys(self._names(), self.penalty_weight)
        with_penalty = check_optional_flag("with_penalty", with_penalty)
        if self.penalty_every == 1 and with_penalty is None:
            return weights
        if with_penalty is None:
            if is_compiling():
                raise RuntimeError("penalty_every: torch.compile cannot count calls; tell it by with_penalty")
            with_penalty = not torch.is_grad_enabled() or self.calls % self.penalty_every == 0
        if not torch.is_grad_enabled():
            return weights if with_penalty else {}
        if not is_compiling():
            self.calls += 1
        return {name: weight * self.penalty_every for name, weight in weights.items()} if with_penalty else {}

    def _task(self, penalties: tuple[str, ...], wanted: bool) -> Task:
        task_of = _task_of.__wrapped__ if is_compiling() else _task_of
        return task_of(
            self.objective,
            (self.real_target, self.fake_target),
            penalties,
            isinstance(self.penalty, dict),
            self.target,
            self.one_sided,
            self.power,
            (self.consistency_weight, self.consistency_margin, self.feature_weight),
            wanted,
            self.pack,
        )

    def _given(
        self, real: Tensor, fake: Tensor, eps: Tensor | None, task: Task, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Batches:
        points: dict[str, Tensor | Between] = {}
        for name, _ in task.penalties:
            if name == "wgan-gp":
                known = eps is not None and self.pack == 1  # checked where it is used
                points[name] = Between(real, fake, eps if known else eps_of(real, eps, None, self.pack))  # type: ignore[arg-type]
            elif name == "dragan":
                points[name] = dragan_points(real, self.dragan_scale)
        return Batches(real, fake, points, args, kwargs)

    def _in_graph(self, given: Batches, task: Task, weights: tuple[float, ...]) -> CriticLossParts:
        """Compute the parts for the compiler to trace."""
        from gpkernels.critic.traced import step_in_graph  # it imports the compiler, which is at work here

        wants = task.gradients and (given.real.requires_grad or given.fake.requires_grad)
        groups = sorted(groups_of(given, task, wants), key=lambda group: group.penalised)
        joined = bool(task.penalties) and given.joinable
        if self.together:
            given.check_one_batch(task)
        calls = [groups] if self.together and joined else [[group] for group in groups]
        found = step_in_graph(
            self.critic,
            calls,
            task,
            weights,
            lambda: self._eagerly(given, task, weights),
            wants=wants,
            seen=self._seen if self.together is None and joined else None,
            args=given.args,
            kwargs=given.kwargs,
        )
        if isinstance(found, CriticLossParts):
            return found
        loss, adversarial, consistency, *penalties = found
        return CriticLossParts(loss, adversarial, named(penalties, task, adversarial), consistency)

    def _composed(self, given: Batches, task: Task, weights: Mapping[str, float]) -> CriticLossParts:
        """Compute the parts separately, by autograd."""
        called = lambda x: self.critic(x, *given.args, **given.kwargs)  # noqa: E731
        first = called(given.real)
        options = {}
        if self.objective == "least-squares":
            options = {"real_target": self.real_target, "fake_target": self.fake_target}
        adversarial = OBJECTIVES[self.objective][1](scores_of(first), scores_of(called(given.fake)), **options)
        penalties = [self._penalty(name, given) for name, _ in task.penalties]
        loss = adversarial
        for penalty, weight in zip(penalties, weights.values(), strict=True):
            loss = loss + weight * penalty
        consistency = torch.zeros_like(adversarial)
        if self.consistency_weight > 0:
            consistency = self._consistency(first, called(given.real))
            loss = loss + self.consistency_weight * consistency
        found = named([penalty.detach() for penalty in penalties], task, adversarial.detach())
        return CriticLossParts(loss, adversarial.detach(), found, consistency.detach())

    def _penalty(self, name: str, given: Batches) -> Tensor:
        options = {"pack": self.pack, "critic_args": given.args, "critic_kwargs": given.kwargs}
        if name == "wgan-gp":
            real, fake, eps = given.points[name]
            options |= {"target": self.target, "one_sided": self.one_sided, "power": self.power}
            return gradient_penalty(self.critic, real, fake, eps=eps[:: self.pack], **options)  # type: ignore[arg-type]
        if name == "dragan":
            options |= {"target": self.target, "scale": self.dragan_scale}
            return dragan_penalty(self.critic, given.real, **options)  # type: ignore[arg-type]
        if name == "r1":
            return r1_penalty(self.critic, given.real, **options)  # type: ignore[arg-type]
        return r2_penalty(self.critic, given.fake, **options)  # type: ignore[arg-type]

    def _consistency(self, first: Any, second: Any) -> Tensor:
        features = [out[1] if isinstance(out, (tuple, list)) and len(out) > 1 else None for out in (first, second)]
        return consistency_term(
            scores_of(first),
            scores_of(second),
            *features,
            margin=self.consistency_margin,
            feature_weight=self.feature_weight,
        )

    def extra_repr(self) -> str:
        weight = "" if isinstance(self.penalty, dict) else f", penalty_weight={self.penalty_weight}"
        return f"objective={self.objective}, penalty={self.penalty}{weight}"


def _checked_penalty(penalty: object, weight: float | None) -> str | dict[str, float]:
    wanted = f"one of none, {', '.join(PENALTIES)}, or a dict of some of them with their weights"
    if isinstance(penalty, str):
        if penalty != "none" and penalty not in PENALTIES:
            raise ValueError(f"penalty: expected {wanted}, got {penalty!r}")
        return penalty
    if not isinstance(penalty, Mapping):
        raise TypeError(f"penalty: expected {wanted}, got {type(penalty).__name__}")
    unknown = [name for name in penalty if name not in PENALTIES]
    if unknown:
        raise ValueError(f"penalty: expected {wanted}, got {unknown[0]!r}")
    if weight is not None:
        raise ValueError(f"penalty_weight: expected None, as the penalties have weights of their own, got {weight}")
    return {name: check_nonnegative(f"penalty[{name!r}]", value) for name, value in penalty.items()}
