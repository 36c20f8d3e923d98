"""Axes and splits that a class declares for its parameters, so that fused and raw weights get fans of their own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lightning_gradhealth.init.context import InitContext
from lightning_gradhealth.validation import check_int, wrong

ATTRIBUTE = "gradhealth_axes"


@dataclass(frozen=True)
class Axes:
    """Which axes of a parameter are summed over, which are outputs, and where it is really several weights.

    A class says it in the attribute `gradhealth_axes`, by the names of its parameters; the name of an
    `nn.ParameterList` or `nn.ParameterDict` stands for all its entries. A parameter that is None is passed over.

    Args:
        in_axes: The axis, or axes, that a product with the activations sums over.
        out_axes: The axis, or axes, of the outputs. What is in neither is a receptive field, as a kernel.
        split: Axis, and either the number of equal blocks or their sizes: each is drawn by itself, with fans of
            its own (the projections of a fused QKV, the halves of SwiGLU, experts side by side).

    Raises:
        TypeError: An axis or a size is no integer.
        ValueError: An axis is in and out at once, or there is no block or an empty one.

    Example:
        >>> import torch
        >>> from lightning_gradhealth.init import init_weights
        >>> class Attention(nn.Module):
        ...     gradhealth_axes = {"qkv": Axes(in_axes=0, out_axes=1, split=(1, 3))}
        ...     def __init__(self, width):
        ...         super().__init__()
        ...         self.qkv = nn.Parameter(torch.zeros(width, 3 * width))
        >>> report = init_weights(Attention(64), scheme="xavier")
        >>> [(entry.name, entry.shape, entry.fan) for entry in report.entries][0]
        ('qkv[0]', (64, 64), 64.0)
    """

    in_axes: int | Sequence[int]
    out_axes: int | Sequence[int]
    split: tuple[int, int | Sequence[int]] | None = None

    def __post_init__(self) -> None:
        ins, outs = _axes("in_axes", self.in_axes), _axes("out_axes", self.out_axes)
        for argument, axes in (("in_axes", ins), ("out_axes", outs)):
            if not axes or len(set(axes)) < len(axes):
                remedy = f"name at least one axis, and each once: {argument}=0"
                raise ValueError(wrong(argument, "different axes", getattr(self, argument), remedy))
        if set(ins) & set(outs):
            raise ValueError(f"in_axes and out_axes must be different axes, got {ins} and {outs}; name each axis once")
        if self.split is None:
            return
        if not isinstance(self.split, Sequence) or isinstance(self.split, (str, bytes)) or len(self.split) != 2:
            raise TypeError(wrong("split", "an axis and a count or sizes", self.split, "write split=(0, 3)"))
        _axes("split", self.split[0])
        sizes = _axes("split", self.split[1])
        if not sizes or min(sizes) < 1:
            raise ValueError(f"split must have blocks of a size >= 1, got {self.split!r}; write split=(axis, count)")

    def blocks(self, name: str, shape: Sequence[int]) -> Iterator[tuple[str, int, slice | None]]:
        """The blocks of a parameter of a shape: their names, the axis, and where they lie on it.

        Raises:
            ValueError: The axes or the sizes do not fit the shape.
        """
        named = [*_axes("", self.in_axes), *_axes("", self.out_axes)]
        dims = len(shape)
        places = [*named, *([] if self.split is None else [self.split[0]])]
        if any(not -dims <= axis < dims for axis in places) or len({a % dims for a in named}) < len(named):
            raise ValueError(f"{ATTRIBUTE}[{name!r}] must name different axes of the shape {tuple(shape)}, got {self}")
        if self.split is None:
            yield "", 0, None
            return
        axis, parts = self.split[0] % dims, self.split[1]
        sizes = list(parts) if isinstance(parts, Sequence) else [shape[axis] // parts] * parts
        if sum(sizes) != shape[axis]:
            raise ValueError(
                f"{ATTRIBUTE}[{name!r}] must split the {shape[axis]} of axis {axis} without a rest, got"
                f" split={self.split}; give sizes that add up to {shape[axis]}"
            )
        start = 0
        for index, size in enumerate(sizes):
            yield str(index), axis, slice(start, start + size)
            start += size


def _axes(argument: str, value: int | Sequence[int]) -> tuple[int, ...]:
    values = value if isinstance(value, Sequence) and not isinstance(value, (str, bytes)) else (value,)
    return tuple(check_int(argument, axis, None, f"write {argument}=0", "an integer or several") for axis in values)


def draw_declared(module: nn.Module, declared: Mapping[str, Axes], context: InitContext) -> None:
    """Draw the parameters of a module by the axes that its class declares.

    Raises:
        TypeError: What is declared is no mapping of names to Axes.
        ValueError: A name is none of the module's parameters, or the axes do not fit it.
    """
    if not isinstance(declared, Mapping) or not all(isinstance(axes, Axes) for axes in declared.values()):
        raise TypeError(
            f"{ATTRIBUTE} of {type(module).__name__} must be a dict of names to Axes, got {declared!r}; write"
            f' {ATTRIBUTE} = {{"weight": Axes(in_axes=1, out_axes=0)}}'
        )
    for name, axes in declared.items():
        for weight in _weights(module, name, context):
            for block, axis, rows in axes.blocks(name, weight.shape):
                context.weight_(
                    weight,
                    in_axes=_axes("in_axes", axes.in_axes),
                    out_axes=_axes("out_axes", axes.out_axes),
                    block=block,
                    rows=rows,
                    axis=axis,
                )


def _weights(module: nn.Module, name: str, context: InitContext) -> list[Tensor]:
    """The parameters that a declared name stands for."""
    value: Any = getattr(module, name, _MISSING)
    if value is None:
        return []
    if isinstance(value, (nn.ParameterList, nn.ParameterDict)):
        return [weight for _, weight in context.own(value)]
    if not isinstance(value, Tensor):
        raise ValueError(
            f"{ATTRIBUTE} of {type(module).__name__} must name its parameters, got {name!r}; see"
            " module.named_parameters(recurse=False)"
        )
    return [value]


_MISSING = object()
