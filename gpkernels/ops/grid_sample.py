"""grid_sample: pixels of images and volumes at the points of a grid, with tangents.

A sample is a sum over the corners of its cell, of pixels times weights that are products over the axes, so tangents and
second derivatives are the same sums with other weights. PyTorch has kernels for the value and the first derivative, and
gradients of gradients made of gathers, but no forward mode; the passes of a critic need the tangents and the second
derivatives apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gpkernels.ops.checks import check_floating, check_same_device
from gpkernels.ops.tensors import accumulation_dtype
from gpkernels.private import dual_level

aten = torch.ops.aten

MODES = ("bilinear", "nearest", "bicubic")  # their places are PyTorch's codes
PADDINGS = ("zeros", "border", "reflection")
BILINEAR, NEAREST, BICUBIC = range(3)
ZEROS, BORDER, REFLECTION = range(3)
_SHARPNESS = -0.75  # PyTorch's free coefficient of cubic convolution


class Constants(NamedTuple):
    """Mode and padding by PyTorch's codes, and whether -1 and 1 are centres of pixels or edges of the image."""

    mode: int
    padding: int
    align_corners: bool


def grid_sample_reference(input: Tensor, grid: Tensor, *constants: Any) -> Tensor:
    """Gather the pixels around each point and sum them with their weights; differentiable to any order.

    Where weights are not differentiable, at the borders of cells, padding and image, the derivative is PyTorch's.
    """
    given = Constants(*constants)
    index, axes = _corners(input, grid, given)
    pixels = _gathered(input, index)
    return (pixels * _product([axis[0] for axis in axes])[:, None]).sum(2).to(input.dtype).reshape(_shape(input, grid))


def _shape(input: Tensor, grid: Tensor) -> tuple[int, ...]:
    return (*input.shape[:2], *grid.shape[1:-1])


# --- corners and weights ----------------------------------------------------------------------------------------------

Weights = tuple[Tensor, Tensor | None, Tensor | None]  # (N, corners, points): values, first and second derivative


def _corners(input: Tensor, grid: Tensor, constants: Constants) -> tuple[Tensor, list[Weights]]:
    """Return the places (N, corners, points) of pixels in a flat image, and the weights of each axis.

    The axes are the image's, of which the grid has the last one first.
    """
    index: Tensor | None = None
    axes = []
    for size, position in zip(input.shape[2:], reversed(grid.flatten(1, -2).unbind(-1)), strict=True):
        places, weights = _axis(position.to(accumulation_dtype(input.dtype)), size, constants)
        index = places if index is None else (index[:, :, None] * size + places[:, None]).flatten(1, 2)
        axes.append(weights)
    assert index is not None
    return index, axes


def _axis(position: Tensor, size: int, constants: Constants) -> tuple[Tensor, Weights]:
    """Return the places of the corners along one axis, and their weights."""
    mode, padding, align_corners = constants
    scale = (size - 1) / 2 if align_corners else size / 2
    at: Tensor = (position + 1) * scale - (0 if align_corners else 0.5)
    slope = torch.full_like(at, scale)
    if mode != BICUBIC:  # which pads its corners instead
        padded, sign = _padded(at.detach(), size, constants)
        at, slope = torch.where(sign == 0, padded, padded + sign * (at - at.detach())), slope * sign
    first = (torch.round(at) if mode == NEAREST else torch.floor(at)).detach()
    places = torch.stack([first + k for k in {BILINEAR: (0, 1), NEAREST: (0,), BICUBIC: (-1, 0, 1, 2)}[mode]], 1)
    if mode == BICUBIC:
        places, _ = _padded(places, size, constants)
    values, slopes, bends = _of_fraction(at - first, slope.detach(), mode)
    if padding == ZEROS:
        inside = (places >= 0) & (places < size)
        values = values * inside
        slopes, bends = (w if w is None else w * inside for w in (slopes, bends))
    return places.nan_to_num().clamp(0, size - 1).long(), (values, slopes, bends)


def _padded(at: Tensor, size: int, constants: Constants) -> tuple[Tensor, Tensor]:
    """Return the positions that padding gives instead, and their derivative, which is 0 where PyTorch's is."""
    sign = torch.ones_like(at)
    if constants.padding == ZEROS:
        return at, sign
    if constants.padding == REFLECTION:
        low, span = (0.0, size - 1.0) if constants.align_corners else (-0.5, float(size))
        if span == 0:
            return torch.zeros_like(at), torch.zeros_like(at)
        away = (at - low).abs()
        back = torch.floor(away / span).remainder(2) == 1
        rest = away.fmod(span)
        sign = torch.where((at < low) != back, -sign, sign)
        at = torch.where(back, span - rest, rest) + low
    return at.nan_to_num(0.0).clamp(0, size - 1), sign * ((at > 0) & (at < size - 1))


def _of_fraction(t: Tensor, slope: Tensor, mode: int) -> Weights:
    """Return the weights of the corners around a point that is t further than the pixel before it."""
    if mode == NEAREST:
        return torch.ones_like(t)[:, None], None, None
    if mode == BILINEAR:
        return torch.stack([1 - t, t], 1), torch.stack([-slope, slope], 1), None
    four = _far(t + 1, 1), _near(t, 1), _near(1 - t, -1), _far(2 - t, -1)
    values, first, second = (torch.stack(found, 1) for found in zip(*four, strict=True))
    return values, first * slope[:, None], second * (slope * slope)[:, None]


def _near(x: Tensor, sign: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weight of a pixel x < 1 away by cubic convolution (Keys 1981), and its derivatives; sign: that of x's."""
    a = _SHARPNESS
    first = (3 * (a + 2) * x - 2 * (a + 3)) * x
    return ((a + 2) * x - (a + 3)) * x * x + 1, sign * first, 6 * (a + 2) * x - 2 * (a + 3)


def _far(x: Tensor, sign: int) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the same for 1 <= x < 2."""
    a = _SHARPNESS
    first = (3 * a * x - 10 * a) * x + 8 * a
    return ((a * x - 5 * a) * x + 8 * a) * x - 4 * a, sign * first, 6 * a * x - 10 * a


def _product(axes: Sequence[Tensor]) -> Tensor:
    """Multiply weights of all axes, for each combination of corners."""
    return reduce(lambda a, b: (a[:, :, None] * b[:, None]).flatten(1, 2), axes)


def _along(axes: Sequence[Weights], tangent: Tensor) -> Tensor | None:
    """Compute the derivative of the weights along a tangent of the grid, (N, points, axes)."""
    found: Tensor | None = None
    for i, (_, slope, _) in enumerate(axes):
        if slope is None:
            continue
        moved = slope * tangent[:, None, :, len(axes) - 1 - i]
        share = _product([moved if j == i else axis[0] for j, axis in enumerate(axes)])
        found = share if found is None else found + share
    return found


def _gathered(input: Tensor, index: Tensor) -> Tensor:
    """Gather (N, C, corners, points)."""
    pixels = input.flatten(2).to(accumulation_dtype(input.dtype))
    return pixels.gather(2, index.flatten(1)[:, None].expand(-1, input.shape[1], -1)).unflatten(2, index.shape[1:])


# --- derivatives by the grid ------------------------------------------------------------------------------------------


class Around:
    """The pixels around the points of a grid, and the derivatives by the grid that are sums of them."""

    def __init__(self, input: Tensor, grid: Tensor, constants: Constants) -> None:
        self.input, self.grid = input, grid
        self.index, self.axes = _corners(input, grid, constants)
        self.pixels: Tensor | None = None

    def push(self, tangent: Tensor) -> Tensor | None:
        """Compute the tangent of the value for one of the grid; None if it is zero."""
        weights = self._along(tangent)
        if weights is None:
            return None
        if self.pixels is None:
            self.pixels = _gathered(self.input, self.index)
        pushed = (self.pixels * weights[:, None]).sum(2)
        return pushed.to(self.input.dtype).reshape(_shape(self.input, self.grid))

    def to_input(self, cotangent: Tensor, tangent: Tensor) -> Tensor | None:
        """Compute the derivative of <cotangent, push(tangent)> by the input; None if it is zero."""
        weights = self._along(tangent)
        if weights is None:
            return None
        shares = (cotangent.flatten(2)[:, :, None] * weights[:, None]).flatten(2)
        zeros = shares.new_zeros((*self.input.shape[:2], self.input[0, 0].numel()))
        places = self.index.flatten(1)[:, None].expand_as(shares)
        return zeros.scatter_add(2, places, shares).to(self.input.dtype).reshape(self.input.shape)

    def to_grid(self, cotangent: Tensor, tangent: Tensor) -> Tensor | None:
        """Compute the derivative of <cotangent, push(tangent)> by the grid; None if it is zero."""
        if self._along(tangent) is None:
            return None
        if self.pixels is None:
            self.pixels = _gathered(self.input, self.index)
        products = (self.pixels * cotangent.flatten(2)[:, :, None]).sum(1)
        found = []
        for i, (_, slope, bend) in enumerate(self.axes):
            assert slope is not None
            steep = [(slope, bend, None) if j == i else axis for j, axis in enumerate(self.axes)]
            weights = _along(steep, self._flat(tangent))
            found.append(slope.new_zeros(slope.shape[::2]) if weights is None else (products * weights).sum(1))
        return torch.stack(found[::-1], -1).to(self.grid.dtype).reshape(self.grid.shape)

    def _flat(self, tangent: Tensor) -> Tensor:
        return tangent.flatten(1, -2).to(self.axes[0][0].dtype)

    def _along(self, tangent: Tensor) -> Tensor | None:
        return _along(self.axes, self._flat(tangent))


# --- public -----------------------------------------------------------------------------------------------------------


def grid_sample(
    input: Tensor,
    grid: Tensor,
    mode: str = "bilinear",
    padding_mode: str = "zeros",
    align_corners: bool | None = None,
) -> Tensor:
    """Compute :func:`torch.nn.functional.grid_sample`, with forward mode as well.

    Values and gradients are PyTorch's, of any order. Under ``torch.func.jvp``, ``jacfwd``, ``hessian`` and in forward
    mode, which PyTorch's function refuses, pixels are gathered and weighted by PyTorch's own operations: derivatives of
    any order and both modes. Critics of this library's penalties may call either function.

    Args:
        input (Tensor): images or volumes.
        grid (Tensor): points in them, of which -1 and 1 are the edges; x first.
        mode (str): ``"bilinear"`` (trilinear in volumes), ``"nearest"`` or, of images, ``"bicubic"``.
            Default: ``"bilinear"``
        padding_mode (str): what is outside: ``"zeros"``, ``"border"`` or ``"reflection"``. Default: ``"zeros"``
        align_corners (bool, optional): whether -1 and 1 are the centres of the outermost pixels instead of their
            outer edges. Default: False, with PyTorch's warning.

    Shape:
        - input: :math:`(N, C, H, W)` or :math:`(N, C, D, H, W)`
        - grid: :math:`(N, H_{out}, W_{out}, 2)` or :math:`(N, D_{out}, H_{out}, W_{out}, 3)`
        - Output: :math:`(N, C, H_{out}, W_{out})` or :math:`(N, C, D_{out}, H_{out}, W_{out})`

    Returns:
        Tensor: the samples, in the dtype of the arguments; under autocast in autocast's.

    Raises:
        TypeError: an argument is not a dense floating-point tensor.
        ValueError: shapes, dtypes or devices do not fit, or a mode is unknown.

    Example:
        >>> image = torch.rand(1, 3, 8, 8)
        >>> theta = torch.tensor([[[1.0, 0.2, 0.0], [-0.2, 1.0, 0.1]]])
        >>> grid = torch.nn.functional.affine_grid(theta, image.shape, align_corners=False)
        >>> moved, tangent = torch.func.jvp(
        ...     lambda grid: gpkernels.grid_sample(image, grid, align_corners=False), (grid,), (torch.ones_like(grid),)
        ... )

    References:
        Jaderberg et al., "Spatial Transformer Networks", 2015, eq. 5. https://arxiv.org/abs/1506.02025
    """
    _check(input, grid, mode, padding_mode)
    if dual_level() < 0:
        return F.grid_sample(input, grid, mode, padding_mode, align_corners)
    if torch.is_autocast_enabled(input.device.type):
        dtype = accumulation_dtype(torch.promote_types(input.dtype, grid.dtype))
        input, grid = input.to(dtype), grid.to(dtype)
    return grid_sample_reference(input, grid, MODES.index(mode), PADDINGS.index(padding_mode), bool(align_corners))


def _check(input: Tensor, grid: Tensor, mode: str, padding_mode: str) -> None:
    for name, value, known in (("mode", mode, MODES), ("padding_mode", padding_mode, PADDINGS)):
        if value not in known:
            raise ValueError(f"{name}: expected one of {', '.join(map(repr, known))}, got {value!r}")
    check_floating("input", input)
    check_floating("grid", grid)
    check_same_device("input", input, "grid", grid)
    if input.dim() not in (4, 5) or 0 in input.shape[2:]:
        raise ValueError(f"input: expected (N, C, H, W) or (N, C, D, H, W) with pixels, got {tuple(input.shape)}")
    axes = input.dim() - 2
    if grid.dim() != input.dim() or grid.shape[0] != input.shape[0] or grid.shape[-1] != axes:
        wanted = f"({input.shape[0]}, {'D, ' if axes == 3 else ''}H, W, {axes})"
        raise ValueError(f"grid: expected {wanted} for the input's {tuple(input.shape)}, got {tuple(grid.shape)}")
    if axes == 3 and mode == MODES[BICUBIC]:
        raise ValueError(f"mode: expected 'bilinear' or 'nearest' for volumes, got {mode!r}")
    if grid.dtype != input.dtype and not torch.is_autocast_enabled(input.device.type):
        raise ValueError(f"grid: expected the dtype of input, {input.dtype}, got {grid.dtype}")
