"""From a recipe and a shape to the numbers of a weight, and to what the report says of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_gradhealth.init.blocks import Draw
from lightning_gradhealth.init.orthogonal import (
    draw_delta_orthogonal,
    draw_orthogonal,
    matrix_shape,
    orthogonal_,
    why_no_delta,
)
from lightning_gradhealth.init.schemes import (
    DELTA_ORTHOGONAL,
    LECUN,
    ORTHOGONAL,
    choose_fan,
    scaled_std,
    variance_scaling_,
)
from lightning_gradhealth.init.settings import OVERRIDE, Recipe, joined


@dataclass(frozen=True)
class Geometry:
    """How a weight is used: what the formula and the orthogonal schemes need to know beside its shape.

    Attributes:
        fan_in: Terms an output sums; None: told by the shape.
        fan_out: Terms an input's gradient sums; None: told by the shape.
        in_axes: Axes that are summed over; None: 1, as torch has it.
        out_axes: Axes of the outputs; None: 0.
        groups: Groups along the first axis that know nothing of each other.
    """

    fan_in: float | None = None
    fan_out: float | None = None
    in_axes: tuple[int, ...] | None = None
    out_axes: tuple[int, ...] | None = None
    groups: int = 1


@dataclass(frozen=True)
class Drawing:
    """How numbers are drawn, and what the report says of it: the arguments of `InitContext.fill_`."""

    draw: Draw | None
    scheme: str
    distribution: str = ""
    fan: float | None = None
    gain: float | None = None
    target_std: float | None = None
    found: str = ""
    follows: str = ""
    note: str = ""


def by_scheme(how: Recipe, shape: Sequence[int], use: Geometry) -> Drawing:
    """How a weight is drawn by a scheme: scaled, orthogonal, or set to 0 where it ends a silent branch."""
    if how.factor == 0:
        return constant(0.0, joined(how.note, "= 0: the residual branch starts silent"))
    outs = (0,) if use.out_axes is None else tuple(axis % len(shape) for axis in use.out_axes)
    if how.scheme is ORTHOGONAL and len(shape) > 1:
        return _orthogonal(how, shape, outs, use.groups)
    if how.scheme is DELTA_ORTHOGONAL and len(shape) > 1:
        return _delta_orthogonal(how, shape, outs, use.groups)
    return _scaled(how, choose_fan(shape, how.mode, use.fan_in, use.fan_out, use.in_axes, use.out_axes))


def by_rows(how: Recipe) -> Drawing:
    """How a table is drawn whose rows are read by index: of fan 1, and no scheme makes it a matrix."""
    return _scaled(how, 1.0)


def by_std(std: float, distribution: str, note: str) -> Drawing:
    """How numbers of a given standard deviation are drawn."""

    def draw(numbers: Tensor, generator: torch.Generator) -> None:
        _variance_scaling(numbers, std, distribution, 1.0, generator)

    return Drawing(draw, "std", distribution, target_std=std, found=OVERRIDE, note=note)


def by_singular_values(gain: float, shape: Sequence[int]) -> Drawing:
    """How a matrix is drawn whose singular values are all `gain`."""

    def draw(numbers: Tensor, generator: torch.Generator) -> None:
        orthogonal_(numbers, generator=generator).mul_(gain)

    return Drawing(draw, ORTHOGONAL.name, gain=gain, target_std=gain * max(1, *shape) ** -0.5)


def constant(value: float, note: str = "") -> Drawing:
    """How every element gets one value."""
    return Drawing(lambda numbers, _: numbers.fill_(value), "constant", target_std=0.0, note=note or f"= {value:g}")


def _described(how: Recipe, draw: Draw, scheme: str, distribution: str, fan: float) -> Drawing:
    std = scaled_std(how.gain, how.gamma, fan) * how.factor
    return Drawing(draw, scheme, distribution, fan, how.gain, std, how.found, how.follows, how.note)


def _scaled(how: Recipe, fan: float) -> Drawing:
    def draw(numbers: Tensor, generator: torch.Generator) -> None:
        _variance_scaling(numbers, how.gain * how.gamma * how.factor, how.distribution, fan, generator)

    name = LECUN.name if how.scheme in (ORTHOGONAL, DELTA_ORTHOGONAL) else how.scheme.name
    return _described(how, draw, name, how.distribution, fan)


def _variance_scaling(numbers: Tensor, scale: float, distribution: str, fan: float, generator: torch.Generator) -> None:
    if numbers.numel():
        variance_scaling_(numbers, gain=scale, distribution=distribution, fan_in=fan, generator=generator)


def _orthogonal(how: Recipe, shape: Sequence[int], outs: tuple[int, ...], groups: int) -> Drawing:
    def draw(numbers: Tensor, generator: torch.Generator) -> None:
        draw_orthogonal(numbers, generator, groups=groups, out_axes=outs)
        numbers.mul_(how.gain * how.gamma * how.factor)

    one = (shape[0] // groups, *shape[1:])
    return _described(how, draw, ORTHOGONAL.name, "", float(max(1, *matrix_shape(one, outs))))


def _delta_orthogonal(how: Recipe, shape: Sequence[int], outs: tuple[int, ...], groups: int) -> Drawing:
    one = (shape[0] // groups, *shape[1:])
    (out_axis, *more), in_axis = outs, 1 - outs[0]
    reason = (
        why_no_delta((one[out_axis], one[in_axis], *one[2:])) if not more and in_axis in (0, 1) else "it is no kernel"
    )
    if reason is not None:
        plain = len(shape) < 3  # nobody expects a centre of a matrix
        return _orthogonal(how if plain else replace(how, note=joined(how.note, reason)), shape, outs, groups)

    def draw(numbers: Tensor, generator: torch.Generator) -> None:
        draw_delta_orthogonal(numbers, generator, groups=groups, out_axis=out_axis)
        numbers.mul_(how.gain * how.gamma * how.factor)

    return _described(how, draw, DELTA_ORTHOGONAL.name, "", float(one[out_axis] * math.prod(shape[2:])))
