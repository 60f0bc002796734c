"""MLPs inside user modules that transform their input and output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor, nn

import gpkernels as gpk
from comparing import assert_same, batch, gradients
from critics import mlp, plain_loss


class Named(nn.Module):
    def __init__(self, net: nn.Module | None = None) -> None:
        super().__init__()
        self.net = net or mlp(6, 8, 8, 1)

    def forward(self, observations: Tensor) -> Tensor:
        return self.net(observations)


class ByVariable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.main = mlp(6, 8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        """A score a row."""
        scores = self.main(x)
        return scores


class OwnSequential(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 8), nn.LeakyReLU(0.2), nn.Linear(8, 1))


class Inner(Named):
    pass


WRAPPED: dict[str, Callable[[], nn.Module]] = {
    "a module that calls another": Named,
    "one that names the result": ByVariable,
    "a subclass of Sequential": OwnSequential,
    "a subclass of a module that calls another": Inner,
    "a module in a module": lambda: Named(Named(OwnSequential())),
    "a module with weights that it does not use": lambda: _with_idle_weights(),
}


def _with_idle_weights() -> nn.Module:
    critic = Named()
    critic.idle = nn.Linear(3, 3)
    return critic


class Doubling(Named):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x + x)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.other = mlp(6, 8, 6), mlp(6, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.net(x))


class ByProperty(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp(6, 8, 1)

    @property
    def net(self) -> Any:
        return lambda x: 3 * self.inner(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class ByGetattr(Named):
    def __getattr__(self, name: str) -> Any:
        found = super().__getattr__(name)
        return (lambda x: 3 * found(x)) if name == "net" else found


class ByGetattribute(Named):
    def __getattribute__(self, name: str) -> Any:
        return super().__getattribute__(name)


class OwnCall(Named):
    def __call__(self, x: Tensor) -> Tensor:
        return 3 * super().__call__(x)


class Default(Named):
    def forward(self, x: Tensor, scale: float = 3.0) -> Tensor:
        return self.net(x) * scale


def _shadowed() -> nn.Module:
    critic = Named()
    inner = critic.net
    critic.__dict__["net"] = lambda x: 3 * inner(x)
    return critic


def _hooked() -> nn.Module:
    critic = Named()
    critic.register_forward_hook(lambda module, args, out: 3 * out)
    return critic


def _own_forward() -> nn.Module:
    critic = Named()
    critic.forward = lambda x: 3 * critic.net(x)
    return critic


MORE: dict[str, Callable[[], nn.Module]] = {
    "a forward that does more": Doubling,
    "two networks": Twice,
    "a property in the network's place": ByProperty,
    "an attribute lookup of its own": ByGetattr,
    "any attribute lookup of its own": ByGetattribute,
    "a call of its own": OwnCall,
    "an option with a default": Default,
    "an attribute that hides the network": _shadowed,
    "a hook": _hooked,
    "a forward on the instance": _own_forward,
}


def both(critic: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Loss and gradients, ours and plain PyTorch's."""
    real, fake, eps = batch(5, 6)
    ours, plain = gpk.CriticLoss(critic)(real, fake, eps=eps).loss, plain_loss(critic, real, fake, eps)
    return [ours, *gradients(ours, critic)], [plain, *gradients(plain, critic)]


@pytest.mark.parametrize("name", [*WRAPPED, *MORE])
def test_a_wrapped_mlp_has_pytorchs_numbers(name: str) -> None:
    critic = {**WRAPPED, **MORE}[name]().double()
    for _ in range(4):
        assert_same(*both(critic))


def test_a_forward_that_is_replaced_later_is_seen() -> None:
    class Changing(Named):
        pass

    critic = Changing().double()
    assert_same(*both(critic))

    def forward(self: Changing, x: Tensor) -> Tensor:
        return self.net(x) * 3

    Changing.forward = forward  # type: ignore[method-assign]
    assert_same(*both(critic))


def test_a_network_that_is_replaced_later_is_seen() -> None:
    critic = Named().double()
    assert_same(*both(critic))
    critic.net = mlp(6, 4, 1, activation=nn.Tanh).double()
    assert_same(*both(critic))
    critic.net = mlp(6, 16, 16, 1).double()
    assert_same(*both(critic))
