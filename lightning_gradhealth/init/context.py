"""What an initializer is given, and what becomes of what it says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from lightning_gradhealth.init.advice import Advice
from lightning_gradhealth.init.blocks import Block, Draw
from lightning_gradhealth.init.drawing import (
    Drawing,
    Geometry,
    by_rows,
    by_scheme,
    by_singular_values,
    by_std,
    constant,
)
from lightning_gradhealth.init.owned import Owned
from lightning_gradhealth.init.schemes import AUTO
from lightning_gradhealth.init.settings import Settings, joined, recipe
from lightning_gradhealth.records import InitEntry


class InitContext:
    """What an initializer is given: the settings of the call, and the ways to say what is to be done.

    Nothing is written before every module has had its say, so that a wrong argument leaves the model as it was.
    What is frozen, skipped or already decided by an enclosing module's initializer is passed over in silence; so
    is None, as the bias of a layer without one. Methods that take `block`, `rows` and `axis` may set a parameter by
    parts, each of its rows (or of the indices of another axis) once.

    Attributes:
        scheme: "auto", "he", "xavier", "lecun", "orthogonal" or "delta_orthogonal".
        distribution: "normal", "uniform" or "truncated_normal".
        mode: The fan to divide by; None: the scheme's own.
        gain: The gain of the activation that the call expects behind its layers; with "auto" only of those of which
            the recorded forward pass says nothing.
        gamma: The factor on every gain.
        blocks: What is to be done: for each parameter's name, its blocks ("": the whole).

    Example:
        >>> import torch
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
        settings: Settings,
        owned: Sequence[Owned],
        advice: Mapping[int, Advice],
        overrides: Mapping[str, Settings],
        meant: Mapping[int, str] | None = None,
    ) -> None:
        self.scheme, self.distribution, self.mode = settings.scheme.name, settings.distribution, settings.mode
        self.gain, self.gamma = settings.gain, settings.gamma
        self.blocks: dict[str, dict[str, Block]] = {}
        self._settings, self._overrides, self._meant = settings, overrides, meant or {}
        self._owned = {id(each.parameter): each for each in owned}
        self._advice = {
            each.name: known
            for each in owned
            if (known := next((advice[id(p)] for p in each.originals.values() if id(p) in advice), None)) is not None
        }
        self._computed: dict[int, list[Owned]] = {}
        for each in owned:
            if each.computed is not None:
                self._computed.setdefault(id(each.module), []).append(each)
        self._decided_by: dict[str, object] = {}
        self._visitor: object = None
        self._rule = ""

    def enter(self, rule: str) -> None:
        """From now on another initializer speaks, and the report calls it `rule`."""
        self._visitor, self._rule = object(), rule

    def leave(self, owned: Owned, rule: str, note: str = "") -> None:
        """Leave a parameter alone for a reason that no initializer overrules."""
        self.enter(rule)
        self._put(owned.parameter, Drawing(None, "kept"), note)

    def keep_meant(self, module: nn.Module) -> None:
        """Leave alone what was set on purpose in a module, as far as no override and no initializer has spoken of it.

        Args:
            module: One of the model's modules, with those inside.
        """
        for parameter in module.parameters():
            if id(parameter) in self._meant and self.is_open(parameter):
                owned = self._owned[id(parameter)]
                if owned.name not in self._overrides:
                    self.leave(owned, "state", self._meant[id(parameter)])

    def set_constant(self, owned: Owned, rule: str, value: float, note: str) -> None:
        """Set a parameter to one value, which no initializer overrules."""
        self.enter(rule)
        self._put(owned.parameter, constant(value), note)

    def own(self, module: nn.Module) -> list[tuple[str, Tensor]]:
        """The weights of a module itself of which nobody has decided yet, by their names in it.

        Those that it computes (under weight_norm and the like) are among them; what they are computed from is not.

        Args:
            module: One of the model's modules.
        """
        computed = [
            (each.computed.attribute, each.parameter) for each in self._computed.get(id(module), ()) if each.computed
        ]
        weights: list[tuple[str, Tensor]] = [*module.named_parameters(recurse=False), *computed]
        return [(name, weight) for name, weight in weights if self.is_open(weight)]

    def advice(self, parameter: Tensor) -> Advice | None:
        """What the recorded forward pass, or the order of the modules, says about a parameter; None: nothing.

        Args:
            parameter: One of the model's parameters.
        """
        owned = self._owned.get(id(parameter))
        return None if owned is None else self._advice.get(owned.name)

    def knows_gain(self, parameter: Tensor) -> bool:
        """Whether scheme "auto" knows a gain for this very parameter.

        Args:
            parameter: One of the model's parameters.
        """
        known = self.advice(parameter)
        return self._settings_of(parameter).scheme is AUTO and known is not None and known.gain is not None

    def owners(self, parameter: Tensor) -> list[nn.Module]:
        """All modules that own a parameter: more than one where it is tied.

        Args:
            parameter: One of the model's parameters.
        """
        return self._of(parameter).owners

    def weight_(
        self,
        parameter: Tensor | None,
        *,
        fan_in: float | None = None,
        fan_out: float | None = None,
        gain: float | None = None,
        in_axes: Sequence[int] | None = None,
        out_axes: Sequence[int] | None = None,
        groups: int = 1,
        block: str = "",
        rows: slice | None = None,
        axis: int = 0,
        note: str = "",
    ) -> None:
        """Draw a weight by the scheme: `std = gamma * gain / sqrt(fan)`, or orthogonal.

        Args:
            parameter: One of the model's parameters.
            fan_in: Terms an output sums; None: told by the shape (see `shape_fans`).
            fan_out: Terms an input's gradient sums; None: told by the shape.
            gain: The gain; None: the one that the forward pass asks for (scheme "auto"), or the call's. Give 1.0
                where no activation follows.
            in_axes: Axes that are summed over; None: torch's convention, in 1 and out 0.
            out_axes: Axes of the outputs; give both or neither.
            groups: Groups along the first axis that know nothing of each other; only orthogonal schemes ask.
            block: Name of the block, where `rows` is only a part.
            rows: The rows to draw.
            axis: The axis that `rows` counts along.
            note: Why, where it is not obvious.

        Raises:
            ValueError: The fans cannot be told, a number is not positive, or `parameter` is not the model's.
        """
        if parameter is None:
            return
        settings = self._settings_of(parameter)
        if settings.std is None:
            how = recipe(settings, self.advice(parameter), gain)
            use = Geometry(fan_in, fan_out, _tuple(in_axes), _tuple(out_axes), groups)
            drawing = by_scheme(how, _shape(parameter, rows, axis), use)
        else:
            drawing = by_std(settings.std, settings.distribution, settings.note)
        self._put(parameter, drawing, note, block, rows, axis)

    def lookup_(self, parameter: Tensor | None, *, note: str = "") -> None:
        """Draw a table whose rows are read by index: every row of variance `(gamma * gain)^2`, whatever the scheme.

        Args:
            parameter: One of the model's parameters, shape (entries, width).
            note: Why, where it is not obvious.

        Raises:
            ValueError: `parameter` is none of the model's.
        """
        if parameter is None:
            return
        settings = self._settings_of(parameter)
        if settings.std is None:
            known = self.knows_gain(parameter)
            drawing = by_rows(recipe(settings, self.advice(parameter), None if known else 1.0))
        else:
            drawing = by_std(settings.std, settings.distribution, settings.note)
        self._put(parameter, drawing, note)

    def orthogonal_(
        self,
        parameter: Tensor | None,
        *,
        gain: float = 1.0,
        block: str = "",
        rows: slice | None = None,
        axis: int = 0,
        note: str = "",
    ) -> None:
        """Draw a matrix whose singular values are all `gain`; the call's gain and gamma do not scale it.

        An override that names a scheme, a gain or a std for the parameter has its way.

        Args:
            parameter: One of the model's parameters, a matrix.
            gain: The singular values.
            block: Name of the block, where `rows` is only a part.
            rows: The rows that form the matrix.
            axis: The axis that `rows` counts along.
            note: Why, where it is not obvious.

        Raises:
            ValueError: `parameter` is none of the model's, or no matrix.
        """
        if parameter is None:
            return
        shape = _shape(parameter, rows, axis)
        if len(shape) != 2:
            raise ValueError(f"parameter must be a matrix, got the shape {shape}; use weight_ or fill_ for it")
        override = self._overrides.get(self._of(parameter).name)
        if override is not None and (override.std is not None or override.names_scheme):
            self.weight_(parameter, gain=gain, block=block, rows=rows, axis=axis, note=note)
            return
        if override is not None:
            gain = (override.fixed_gain or gain) * override.gamma / self.gamma
            note = joined(note, override.note)
        self._put(parameter, by_singular_values(gain, shape), note, block, rows, axis)

    def constant_(
        self,
        parameter: Tensor | None,
        value: float,
        *,
        block: str = "",
        rows: slice | None = None,
        axis: int = 0,
        note: str = "",
    ) -> None:
        """Set every element to one value.

        Args:
            parameter: One of the model's parameters.
            value: The value.
            block: Name of the block, where `rows` is only a part.
            rows: The rows to set.
            axis: The axis that `rows` counts along.
            note: Why, where it is not obvious.

        Raises:
            ValueError: `parameter` is none of the model's.
        """
        if parameter is not None and self._of(parameter).name not in self._overrides:
            self._put(parameter, constant(value, note), "", block, rows, axis)

    def keep(self, parameter: Tensor | None, note: str = "") -> None:
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
        parameter: Tensor | None,
        draw: Draw | None,
        *,
        scheme: str = "custom",
        distribution: str = "",
        fan: float | None = None,
        gain: float | None = None,
        target_std: float | None = None,
        found: str = "",
        follows: str = "",
        block: str = "",
        rows: slice | None = None,
        axis: int = 0,
        note: str = "",
    ) -> None:
        """Fill a parameter by a function of your own.

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
            found: For the report: how the gain was found.
            follows: For the report: what the signal passes on its way to the next weight.
            block: Name of the block, where `rows` is only a part.
            rows: The rows to fill.
            axis: The axis that `rows` counts along.
            note: Why, where it is not obvious.

        Raises:
            ValueError: `parameter` is none of the model's.
        """
        if parameter is None or self._of(parameter).name in self._overrides:
            return
        how = Drawing(draw, scheme, distribution, fan, gain, target_std, found, follows, note)
        self._put(parameter, how, "", block, rows, axis)

    def is_open(self, parameter: Tensor) -> bool:
        """Whether it is still to be decided what becomes of a parameter.

        Args:
            parameter: One of the model's parameters.
        """
        owned = self._owned.get(id(parameter))
        return owned is not None and owned.name not in self._decided_by

    def _of(self, parameter: Tensor) -> Owned:
        if (owned := self._owned.get(id(parameter))) is None:
            raise ValueError(
                f"parameter must be one of the model's own, got a tensor with the shape"
                f" {tuple(parameter.shape)} from the initializer {self._rule}; tensors that are computed from"
                f" parameters cannot be set"
            )
        return owned

    def _put(
        self, parameter: Tensor, how: Drawing, note: str, block: str = "", rows: slice | None = None, axis: int = 0
    ) -> None:
        """Have a parameter, or a block of it, filled as a drawing says; all ways end here."""
        owned = self._of(parameter)
        if self._decided_by.setdefault(owned.name, self._visitor) is not self._visitor:
            return
        note = joined(note, how.note)
        padding = owned.padding if rows is None and how.draw is not None else None
        if padding is not None:
            note = joined(note, f"row {padding}, the padding, is kept")
        entry = InitEntry(
            name=f"{owned.name}[{block}]" if block else owned.name,
            module=type(owned.module).__name__,
            shape=_shape(parameter, rows, axis),
            rule=self._rule,
            scheme=how.scheme,
            distribution=how.distribution,
            fan=how.fan,
            gain=how.gain,
            target_std=how.target_std,
            note=note,
            found=how.found,
            follows=how.follows,
        )
        blocks = self.blocks.setdefault(owned.name, {})
        if not block:
            blocks.clear()
        blocks[block] = Block(entry, how.draw, axis, rows)

    def _settings_of(self, parameter: Tensor) -> Settings:
        return self._overrides.get(self._of(parameter).name, self._settings)


def _shape(parameter: Tensor, rows: slice | None, axis: int) -> tuple[int, ...]:
    shape = list(parameter.shape)
    if rows is not None:
        shape[axis] = len(range(shape[axis])[rows])
    return tuple(shape)


def _tuple(axes: Sequence[int] | None) -> tuple[int, ...] | None:
    return None if axes is None else tuple(axes)
