"""What an initializer is given, and what becomes of what it says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_gradhealth.init.schemes import (
    Scheme,
    choose_fan,
    drawing_dtype,
    orthogonal_,
    scaled_std,
    variance_scaling_,
)
from lightning_gradhealth.records import InitEntry

Draw = Callable[[Tensor, torch.Generator], object]


class Owned(NamedTuple):
    """A parameter, the module that owns it, and all its names: the first is its own, the others are ties.

    `padding` is the row that an embedding, its owner or tied to it, never looks up for training.
    """

    parameter: nn.Parameter
    module: nn.Module
    names: tuple[str, ...]
    padding: int | None


@dataclass(frozen=True)
class Task:
    """What is to be done to a parameter or to some rows of it; without `draw` it is left alone."""

    entry: InitEntry
    target: Tensor
    draw: Draw | None
    rows: slice | None = None
    padding: int | None = None

    def run(self, generator: torch.Generator) -> None:
        """Fill the rows: drawn whole, in row-major order and on the CPU, then copied to where they live.

        Raises:
            ValueError: Not every element was filled with a number that the parameter can hold.
        """
        if self.draw is None:
            return
        numbers = torch.full(self.target.shape, torch.nan, dtype=drawing_dtype(self.target), device="cpu")
        self.draw(numbers, generator)
        if self.padding is not None:
            numbers[self.padding] = self.target[self.padding].to(numbers)
        if not numbers.to(self.target.dtype).isfinite().all():
            raise ValueError(
                f"the initializer {self.entry.rule} leaves NaN or Inf in {self.entry.name!r} ({self.target.dtype}): it"
                " must fill every element in place, by numbers that the dtype can hold"
            )
        self.target.copy_(numbers)


class InitContext:
    """What an initializer is given: the settings of the call, and the ways to say what is to be done.

    Nothing is written before every module has had its say, so that a wrong argument leaves the model as it was.
    What is frozen, skipped or already decided by an enclosing module's initializer is passed over in silence; so
    is None, as the bias of a layer without one. Methods that take `block` and `rows` may set a parameter by
    parts, each of its rows once.

    Attributes:
        scheme: "he", "xavier" or "lecun".
        distribution: "normal", "uniform" or "truncated_normal".
        mode: The fan to divide by.
        gain: The gain of the activation that the call expects behind its layers.
        gamma: The factor on every gain.
        tasks: What is to be done: for each parameter's name, its blocks ("": the whole).

    Example:
        >>> from lightning_gradhealth.init import init_weights, register_initializer
        >>> class Shift(nn.Module):
        ...     def __init__(self, size):
        ...         super().__init__()
        ...         self.shift = nn.Parameter(torch.ones(size))
        >>> @register_initializer(Shift)
        ... def shift(module, context):
        ...     context.constant_(module.shift, 0.5, note="starts half way")
        >>> init_weights(Shift(3), scheme="he").entries[0].note
        'starts half way'
    """

    def __init__(
        self,
        *,
        scheme: Scheme,
        distribution: str,
        mode: str,
        gain: float,
        gamma: float,
        owned: dict[int, Owned],
    ) -> None:
        self.scheme, self.distribution, self.mode = scheme.name, distribution, mode
        self.gain, self.gamma = gain, gamma
        self.tasks: dict[str, dict[str, Task]] = {}
        self._owned = owned
        self._decided_by: dict[str, object] = {}
        self._visitor: object = None
        self._rule = ""

    def enter(self, rule: str) -> None:
        """From now on another initializer speaks, and the report calls it `rule`."""
        self._visitor, self._rule = object(), rule

    def leave(self, owned: Owned, rule: str, note: str = "") -> None:
        """Leave a parameter alone for a reason that no initializer overrules."""
        self.enter(rule)
        self.keep(owned.parameter, note)

    def weight_(
        self,
        parameter: nn.Parameter | None,
        *,
        fan_in: float | None = None,
        fan_out: float | None = None,
        gain: float | None = None,
        block: str = "",
        rows: slice | None = None,
        note: str = "",
    ) -> None:
        """Draw a weight by the scheme: `std = gamma * gain / sqrt(fan)`.

        Args:
            parameter: One of the model's parameters.
            fan_in: Terms an output sums; None: told by the shape (see `shape_fans`).
            fan_out: Terms an input's gradient sums; None: told by the shape.
            gain: The gain; None: the call's. Give 1.0 where no activation follows.
            block: Name of the block, where `rows` is only a part.
            rows: The rows to draw.
            note: Why, where it is not obvious.

        Raises:
            ValueError: The fans cannot be told, a number is not positive, or `parameter` is not the model's.
        """
        if parameter is None:
            return
        gain = self.gain if gain is None else gain
        fan = choose_fan(_part(parameter, rows).shape, self.mode, fan_in, fan_out)
        std = scaled_std(gain, self.gamma, fan)

        def draw(numbers: Tensor, generator: torch.Generator) -> None:
            if numbers.numel():
                variance_scaling_(
                    numbers,
                    gain=gain,
                    gamma=self.gamma,
                    distribution=self.distribution,
                    fan_in=fan,
                    generator=generator,
                )

        self.fill_(
            parameter,
            draw,
            scheme=self.scheme,
            distribution=self.distribution,
            fan=fan,
            gain=gain,
            target_std=std,
            block=block,
            rows=rows,
            note=note,
        )

    def orthogonal_(
        self,
        parameter: nn.Parameter | None,
        *,
        gain: float = 1.0,
        block: str = "",
        rows: slice | None = None,
        note: str = "",
    ) -> None:
        """Draw a matrix whose singular values are all `gain`; the call's gain and gamma do not scale it.

        Args:
            parameter: One of the model's parameters, a matrix.
            gain: The singular values.
            block: Name of the block, where `rows` is only a part.
            rows: The rows that form the matrix.
            note: Why, where it is not obvious.

        Raises:
            ValueError: `parameter` is none of the model's, or no matrix.
        """
        if parameter is None:
            return
        shape = _part(parameter, rows).shape
        if len(shape) != 2:
            raise ValueError(f"parameter must be a matrix, got the shape {tuple(shape)}; use weight_ or fill_ for it")
        self.fill_(
            parameter,
            lambda numbers, generator: orthogonal_(numbers, generator=generator).mul_(gain),
            scheme="orthogonal",
            gain=gain,
            target_std=gain * max(1, *shape) ** -0.5,
            block=block,
            rows=rows,
            note=note,
        )

    def constant_(
        self,
        parameter: nn.Parameter | None,
        value: float,
        *,
        block: str = "",
        rows: slice | None = None,
        note: str = "",
    ) -> None:
        """Set every element to one value.

        Args:
            parameter: One of the model's parameters.
            value: The value.
            block: Name of the block, where `rows` is only a part.
            rows: The rows to set.
            note: Why, where it is not obvious.

        Raises:
            ValueError: `parameter` is none of the model's.
        """
        self.fill_(
            parameter,
            lambda numbers, _: numbers.fill_(value),
            scheme="constant",
            target_std=0.0,
            block=block,
            rows=rows,
            note=note or f"= {value:g}",
        )

    def keep(self, parameter: nn.Parameter | None, note: str = "") -> None:
        """Leave a parameter as it is, and count it as covered.

        Args:
            parameter: One of the model's parameters.
            note: Why.

        Raises:
            ValueError: `parameter` is none of the model's.
        """
        self.fill_(parameter, None, scheme="kept", note=note)

    def fill_(
        self,
        parameter: nn.Parameter | None,
        draw: Draw | None,
        *,
        scheme: str = "custom",
        distribution: str = "",
        fan: float | None = None,
        gain: float | None = None,
        target_std: float | None = None,
        block: str = "",
        rows: slice | None = None,
        note: str = "",
    ) -> None:
        """Fill a parameter by a function of your own; all other ways end here.

        Args:
            parameter: One of the model's parameters.
            draw: Called as `draw(numbers, generator)`: it fills `numbers` in place, a CPU tensor of the
                rows' shape in float32 (float64 for a float64 parameter), with random numbers from
                `generator` only, so that a seed gives the same weights again. None: left alone.
            scheme: What the report calls it.
            distribution: The same.
            fan: For the report: the fan behind the std.
            gain: For the report: the gain behind the std.
            target_std: For the report: what the std should be.
            block: Name of the block, where `rows` is only a part.
            rows: The rows to fill.
            note: Why, where it is not obvious.

        Raises:
            ValueError: `parameter` is none of the model's.
        """
        if parameter is None:
            return
        if (owned := self._owned.get(id(parameter))) is None:
            raise ValueError(
                f"parameter must be one of the model's own, got a tensor with the shape"
                f" {tuple(parameter.shape)} from the initializer {self._rule}; tensors that are computed from"
                f" parameters (parametrized, normalised) cannot be set"
            )
        name = owned.names[0]
        if self._decided_by.setdefault(name, self._visitor) is not self._visitor:
            return
        target = _part(parameter, rows)
        padding = owned.padding if rows is None and draw is not None else None
        if padding is not None:
            note = "; ".join(filter(None, (note, f"row {padding}, the padding, is kept")))
        entry = InitEntry(
            name=f"{name}[{block}]" if block else name,
            module=type(owned.module).__name__,
            shape=tuple(target.shape),
            rule=self._rule,
            scheme=scheme,
            distribution=distribution,
            fan=fan,
            gain=gain,
            target_std=target_std,
            note=note,
        )
        blocks = self.tasks.setdefault(name, {})
        if not block:
            blocks.clear()
        blocks[block] = Task(entry, target, draw, rows, padding)

    def is_open(self, parameter: nn.Parameter) -> bool:
        """Whether it is still to be decided what becomes of a parameter.

        Args:
            parameter: One of the model's parameters.
        """
        owned = self._owned.get(id(parameter))
        return owned is not None and owned.names[0] not in self._decided_by


def _part(parameter: Tensor, rows: slice | None) -> Tensor:
    return parameter.detach() if rows is None else parameter.detach()[rows]
