"""Argument checks: TypeError or ValueError with the argument's name, what was expected and what it got."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping

import torch
from torch import Tensor

from gpkernels.ops.tensors import is_distributed, overlaps

_FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def check_floating(name: str, x: object) -> None:
    """Raise TypeError unless ``x`` is a dense floating-point tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.dtype not in _FLOATING or x.layout != torch.strided or x.is_nested:
        kind = "nested" if x.is_nested else x.layout
        raise TypeError(f"{name}: expected a dense floating-point tensor, got {x.dtype}, {kind}")


def check_batch(name: str, x: object) -> None:
    """Raise TypeError or ValueError unless ``x`` is a floating-point batch of at least one sample."""
    check_floating(name, x)
    assert isinstance(x, Tensor)
    check_own(name, x)
    if x.dim() == 0 or x.shape[0] == 0:
        raise ValueError(f"{name}: expected a batch of at least one sample, got shape {tuple(x.shape)}")


def check_callable(name: str, critic: object) -> None:
    """Raise TypeError unless ``critic`` can be called; a class is taken for one that was not constructed."""
    if not callable(critic):
        raise TypeError(f"{name}: expected a module or a callable, got {type(critic).__name__}")
    if isinstance(critic, type):
        raise TypeError(f"{name}: expected a module or a callable, got the class {critic.__name__}; construct it")


def check_further(args: object, kwargs: object) -> None:
    """Raise TypeError unless these are further arguments; a tensor is taken for one that stands alone."""
    if not isinstance(args, (tuple, list)):
        raise TypeError(f"critic_args: expected a tuple or list, such as (labels,), got {type(args).__name__}")
    if not (kwargs is None or isinstance(kwargs, Mapping)):
        raise TypeError(f"critic_kwargs: expected a mapping of names to values, got {type(kwargs).__name__}")


def check_own(name: str, x: Tensor) -> None:
    """Raise TypeError for samples that are distributed over processes."""
    if is_distributed(x):
        raise TypeError(f"{name}: expected the samples of this process, got a DTensor; use its to_local()")


def check_scores(name: str, x: object) -> None:
    """``check_floating``, and ValueError unless there is at least one score."""
    check_floating(name, x)
    assert isinstance(x, Tensor)
    if x.numel() == 0:
        raise ValueError(f"{name}: expected at least one score, got shape {tuple(x.shape)}")


def check_writable(name: str, x: Tensor) -> None:
    """Raise RuntimeError, as PyTorch does, where elements overlap in memory."""
    if overlaps(x):
        raise RuntimeError(
            f"{name}: expected a tensor that does not overlap itself, got shape {tuple(x.shape)}, strides {x.stride()}"
        )


def check_pair(name1: str, x1: Tensor, name2: str, x2: Tensor) -> None:
    """Raise TypeError or ValueError unless both are batches of one shape on one device."""
    check_batch(name1, x1)
    check_batch(name2, x2)
    if x1.shape != x2.shape:
        raise ValueError(f"{name2}: expected the shape of {name1}, {tuple(x1.shape)}, got {tuple(x2.shape)}")
    check_same_device(name1, x1, name2, x2)


def check_same_device(name1: str, x1: Tensor, name2: str, x2: Tensor) -> None:
    """Raise ValueError unless both tensors are on one device."""
    if x1.device != x2.device:
        raise ValueError(f"{name2}: expected the device of {name1}, {x1.device}, got {x2.device}")


def check_flag(name: str, value: object, wanted: str = "True or False") -> bool:
    """The value as a bool; TypeError unless it is True or False, which may be NumPy's, 1 or 0."""
    if isinstance(value, Tensor) or value not in (True, False):
        raise TypeError(f"{name}: expected {wanted}, got {'a tensor' if isinstance(value, Tensor) else repr(value)}")
    return bool(value)


def check_optional_flag(name: str, value: object) -> bool | None:
    """None, or the value as a bool; TypeError for anything else."""
    return None if value is None else check_flag(name, value, "None, True or False")


def check_whole(name: str, value: object) -> int:
    """The value as an int; TypeError unless it is a whole number, which may be numpy's."""
    if isinstance(value, bool) or not isinstance(value, (int, numbers.Integral)):
        raise TypeError(f"{name}: expected a whole number, got {type(value).__name__}")
    return int(value)


def check_number(name: str, value: object) -> float:
    """Return the value as a float; raise TypeError unless it is a real number, NumPy's included."""
    if type(value) is float:
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float, numbers.Real)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    return float(value)


def check_finite(name: str, value: object) -> float:
    """The value as a float; TypeError or ValueError unless it is a finite number."""
    value = check_number(name, value)
    if not -math.inf < value < math.inf:  # nor NaN; also traceable where it is symbolic
        raise ValueError(f"{name}: expected a finite number, got {value}")
    return value


def check_nonnegative(name: str, value: object) -> float:
    """Return the value as a float; raise TypeError or ValueError unless it is finite and at least 0."""
    value = check_number(name, value)
    if not 0 <= value < math.inf:  # rejects NaN
        raise ValueError(f"{name}: expected a finite number of at least 0, got {value}")
    return value


def check_eps(eps: Tensor, like: Tensor) -> None:
    """Raise TypeError or ValueError unless there is one eps per sample: shape (N,) or (N, 1, ..., 1)."""
    check_floating("eps", eps)
    n = like.shape[0]
    if eps.shape != (n,) and eps.shape != (n, *[1] * (like.dim() - 1)):
        raise ValueError(f"eps: expected one number per sample, shape ({n},) or ({n}, 1, ...), got {tuple(eps.shape)}")
    check_same_device("real", like, "eps", eps)


def check_generator(generator: object, device: torch.device) -> None:
    """Raise TypeError or ValueError unless ``generator`` is a generator for such a device."""
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: expected a torch.Generator, got {type(generator).__name__}")
    if generator.device.type != device.type:
        raise ValueError(f"generator: expected one on {device}, got one on {generator.device}")


def check_pack(name: str, x: Tensor, pack: object) -> int:
    """A number of samples that divides the batch."""
    found = check_whole("pack", pack)
    if found < 1 or x.shape[0] % found:
        raise ValueError(
            f"pack: expected at least 1, and a divisor of the batch size of {name}, {x.shape[0]}, got {pack}"
        )
    return found
