"""What all rules share: thresholds with their reasons, verdicts, patience, hysteresis and memory."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from lightning_gradhealth.records import Finding, LayerStats, Severity, StepRecord, check_severity
from lightning_gradhealth.rules.plain import code_of, layers_of, plain, severity_of, step_of, text_of
from lightning_gradhealth.validation import check_int, check_names, check_number, check_type, shown, wrong

R = TypeVar("R", bound="Rule")


@dataclass(frozen=True)
class Thresholds:
    """Every number that a verdict depends on, with its reason.

    "Measured" means: on labelled small trainings (MLP, CNN, residual, recurrent, transformer; sick and
    healthy), the healthy and the sick values lay as given.

    Attributes:
        depth_ratio: Backward signal of the first quarter of the layers over that of the last, and the fitted
            gain to the power of the depth: below this it vanishes, above its inverse it explodes. Measured:
            healthy >= 6e-3, sick <= 5e-6.
        dead_units: Share of the units of a layer that are never active, beyond what chance gives beside those that are
            always active. Measured: healthy <= .26; in 30 plain ReLU layers of 32 .53, with as many always active.
        dead_most: The same, from which on it is a warning whatever the loss does: less than a tenth of the width is
            left, so that the layer may as well be that narrow. Measured: nets that learn well with .67 and .68.
        saturated_units: Share of the units of a layer whose derivative is on average below 5 % of its greatest.
            Measured: 1.00 against 0.00.
        depth_critical: The same, beyond hope: half of float32's 7 digits are gone.
        depth_layers: Fewer layers than this have no depth to judge.
        depth_probes: Probes in a row for signals that vanish beyond hope, one more for others, over half a
            `growth_window` or more, as these may heal in the first steps; step 0 alone proves nothing, as a head that
            starts at zero lets nothing through at first.
        explosion_probes: The same for exploding ones, or NaN at the second probe; beyond hope, one is enough.
        time_ratio: Total norm over the median of the last `time_window` finite ones: an explosion in time.
            Measured: healthy <= 4, spikes >= 3.9e3.
        time_window: Steps in that median.
        time_warmup: Finite steps that must be there before a norm is compared with them.
        growth: Factor by which a weight norm grows (or, inverted, shrinks) in a window of
            `growth_window` steps for it to count as a doubling (a halving).
        growth_window: Least number of steps between the weight norms that are compared.
        growth_windows: Windows in a row, none slower than the one before, that make it exponential.
        collapsed: A weight norm is collapsing only below this share of its greatest.
        update_at_once: `|dw|/|w|` that is oversized at once: the step replaces the weights.
        update_repeated: `|dw|/|w|` that is oversized at all probes after the first over half a `growth_window`: small
            weights grow into their size by a few large updates. Measured: a healthy first step <= .05; around 1e-3 is
            usual.
        update_share: Share of the layers that must be oversized.
        stalled_update: `|dw|/|w|` below which a layer stands still (float32 rounds at 6e-8) while ...
        moving_update: ... another layer of the same optimizer is above this.
        stalled_probes: Probes in a row for that, over a `growth_window` or more.
        overflow_steps: Steps in a row that a loss scaler skips before it is no longer its everyday business;
            halving the scale 20 times brings any usual one below 1.
        grown: Factor by which the last gradient norms, or losses, before NaN or Inf stand out of those before for it
            to be the end of a growth; else it came out of the blue. Measured: healthy <= 4.
        huge: A gradient norm that no training works at, and from which float32 is not far from its end.
        skipped_in_a_row: Steps in a row that `on_non_finite` skips before it ends the run: it would not come back.
        no_gradient_steps: Steps without any gradient before a parameter is reported.
        carried_over: Share, in norm, of what an earlier step has left in `.grad` in the gradient of a step: less than
            this does not steer it. Where nobody clears gradients it is near 1, where somebody does 0.
        same_norm: Relative spread of the norms of `growth_window` steps, the loss scale included, up to which they are
            one and the same: what clipping sets, to the rounding of float32. Gradients spread by percents at least.
        least_limit: Nobody clips gradients to a norm below this on purpose; recipes begin at 1e-2.
        even_layers: Factor within which the layers' gradients, each by its root mean square, lie where all that is
            not 0 is clipped to one value: where a tenth is not 0, the root mean square is a third of that value. In
            nets that nobody clips they lie further apart.
        largest_value: Nobody clips the elements of gradients to a value above this.
        leap: Size of a layer's output, before the first step, beside the largest of all before it, from which on
            something between them leaps, as exp() of a large number. Measured: gains inside healthy nets reach 700.
        input_rms: Root mean square of the inputs, from which on the first layer's gradient is so much larger than that
            of all others that no rate fits both; pixels from 0 to 255 are below it ...
        input_kept: ... and the share of it that the first layer passes on where nothing normalises it.
        swallowed_weights: Size of the weights of a layer beside that of its neighbours, below which it is they that
            swallow the signal; layers of other shapes differ by the square root of their widths.
        clipped_window: Steps of which adaptive clipping has to clip half before the run is said to live on it.
        spike_sigmas: Robust standard deviations above the median loss. Measured: healthy <= 6.7.
        spike_log_sigmas: The same on a logarithmic scale, on which the losses of single batches spread near
            convergence; hard batches of nets that have converged stay below it.
        spike_recurs: Spikes of a single step within 1,000 steps, after which they are the nature of this loss.
        spike_median: A spike is also more than this many times the median loss ...
        spike_fall: ... and more than this share of the fall of the loss so far.
        stalled_steps: Steps, at a rate that has stopped rising, before a loss can be stalled.
        stalled_fall: The upper 2-sigma bound of the fall of the loss, as a share of its start, below which it
            has not moved.
        learning_fall: A fall by this share of the start that is also beyond 2 sigma is learning, if slow; an output
            bias that fits the frequencies of ten balanced classes gains less.
        release: Clear verdicts in a row after which a finding is no longer active.

    Example:
        >>> Thresholds(time_ratio=100.0).time_ratio
        100.0
    """

    depth_ratio: float = 1e-3
    depth_critical: float = 1e-6
    dead_units: float = 0.5
    dead_most: float = 0.9
    saturated_units: float = 0.5
    depth_layers: int = 4
    depth_probes: int = 2
    explosion_probes: int = 2
    time_ratio: float = 1e3
    time_window: int = 100
    time_warmup: int = 5
    growth: float = 2.0
    growth_window: int = 20
    growth_windows: int = 2
    collapsed: float = 0.1
    update_at_once: float = 1.0
    update_repeated: float = 0.1
    update_share: float = 0.5
    stalled_update: float = 1e-6
    moving_update: float = 1e-4
    stalled_probes: int = 3
    overflow_steps: int = 20
    grown: float = 10.0
    huge: float = 1e12
    skipped_in_a_row: int = 25
    no_gradient_steps: int = 20
    carried_over: float = 0.01
    same_norm: float = 1e-3
    least_limit: float = 1e-3
    even_layers: float = 3.0
    largest_value: float = 10.0
    leap: float = 1e4
    input_rms: float = 1e3
    input_kept: float = 0.01
    swallowed_weights: float = 0.01
    clipped_window: int = 100
    spike_sigmas: float = 10.0
    spike_log_sigmas: float = 5.0
    spike_recurs: int = 3
    spike_median: float = 2.0
    spike_fall: float = 0.1
    stalled_steps: int = 100
    stalled_fall: float = 0.05
    learning_fall: float = 0.003
    release: int = 3

    def __post_init__(self) -> None:
        for f in fields(self):
            value, argument, remedy = getattr(self, f.name), f"Thresholds: {f.name}", f"leave it out for {f.default!r}"
            if f.type == "int":
                object.__setattr__(self, f.name, check_int(argument, value, 1, remedy))
                continue
            highest = 1.0 if f.name in _SHARES else None
            object.__setattr__(self, f.name, check_number(argument, value, remedy, at_most=highest))


_SHARES = (
    *("depth_ratio", "depth_critical", "dead_units", "dead_most", "saturated_units", "collapsed"),
    *("update_share", "spike_fall", "stalled_fall", "learning_fall"),
)


@dataclass(frozen=True)
class Verdict:
    """What a rule says of one record.

    Attributes:
        severity: "info", "warning" or "critical".
        summary: What was seen, as a clause.
        remedy: What to do.
        layers: The layers concerned; empty: the whole network.
        evidence: The numbers behind it.
        first_step: Since when, if the rule knows better than "since this record".
        code: The remedy in one line or two that run when pasted, see `Finding`.
        last_step: Until when, if it no longer holds at this record.

    Example:
        >>> Verdict("warning", "the loss is odd", "look at it").layers
        ()
    """

    severity: Severity | str
    summary: str
    remedy: str
    layers: tuple[str, ...] = ()
    evidence: dict[str, Any] = field(default_factory=dict)
    first_step: int | None = None
    code: str = ""
    last_step: int | None = None

    def __post_init__(self) -> None:
        check_severity(self.severity)
        layers = check_names("layers", self.layers, "names of layers", 'e.g. layers=("net.0",)')
        object.__setattr__(self, "layers", layers)
        if not isinstance(self.evidence, Mapping):
            raise TypeError(wrong("evidence", "a dict of numbers", self.evidence, 'e.g. evidence={"ratio": 1e-5}'))
        for name in ("summary", "remedy", "code"):
            check_type(name, getattr(self, name), str, "a text", "what a person reads")
        for name in ("first_step", "last_step"):
            if (step := getattr(self, name)) is not None:
                step = check_int(name, step, None, "leave it out for the step of the record")
                object.__setattr__(self, name, step)


class NotMeasured:
    """The answer of a rule that a record tells nothing: it neither counts nor clears."""


NOT_MEASURED = NotMeasured()


class Rule:
    """Base of all rules: looks at plain numbers, compares, and says what is wrong.

    Subclasses set `condition` and write `check`. A verdict becomes a finding after `patience` verdicts in a
    row that lie `span` steps apart or more, the first from the last (the first probes of a run follow close on each
    other), for each layer by itself where `per_layer` is set, and stays active until `release` clear ones in a
    row. Everything a rule remembers lives in `memory`, as primitives, lists and dicts, so that it survives a
    checkpoint.

    Args:
        thresholds: The numbers to compare with; None: the defaults.

    Example:
        >>> class TinyNorm(Rule):
        ...     condition = "tiny_norm"
        ...     def check(self, record):
        ...         if record.total_norm is not None and record.total_norm < 1e-8:
        ...             return Verdict("warning", f"total norm {record.total_norm:g}", "raise the loss scale")
        >>> TinyNorm().judge(StepRecord(step=5, total_norm=1e-9)).condition
        'tiny_norm'
    """

    condition: str = ""
    patience: int = 1
    span: int = 0
    per_layer: bool = False
    needs_support: bool = False  # on its own it is worth an info; a warning only beside another finding
    running: bool = False  # of its findings the latest account counts, not the first
    relents: bool = False  # what turns out not to hinder the run becomes an info again

    def __init__(self, thresholds: Thresholds | None = None) -> None:
        if thresholds is not None:
            check_type("thresholds", thresholds, Thresholds, "a Thresholds", "leave it out for the defaults")
        self.thresholds = thresholds or Thresholds()
        self.memory: dict[str, Any] = {}
        self._streaks: dict[str, tuple[int, int]] = {}  # key -> first step, verdicts in a row
        self._clear = 0
        self.active = False

    def check(self, record: StepRecord) -> Verdict | NotMeasured | None:
        """Judge one record: a verdict, None where all is well, NOT_MEASURED where it tells nothing."""
        raise NotImplementedError(f"{type(self).__name__} must define check(record)")

    def judge(self, record: StepRecord) -> Finding | None:
        """Apply patience and hysteresis to `check` and return what has been found, if anything.

        Raises:
            TypeError: `check` gave something else than a verdict, or one with something odd in it.
        """
        verdict = self.check(record)
        if isinstance(verdict, NotMeasured):
            return None
        if verdict is None:
            self._streaks.clear()
            self._clear += 1
            self.active = self.active and self._clear < self.thresholds.release
            return None
        if not isinstance(verdict, Verdict):
            raise TypeError(f"check() must return a Verdict, None or NOT_MEASURED, got {shown(verdict)}")
        layers, severity = layers_of(verdict.layers), severity_of(verdict.severity)
        since = step_of(verdict.first_step, record.step)
        if not isinstance(verdict.evidence, Mapping):
            raise TypeError(f"evidence must be a dict, got {shown(verdict.evidence)}")
        self._clear = 0
        keys = layers if self.per_layer else ("",)
        streaks = {key: self._streaks.get(key, (since, 0)) for key in keys}
        self._streaks = {key: (first, count + 1) for key, (first, count) in streaks.items()}
        lasting = {key for key in keys if record.step - self._streaks[key][0] >= self.span}
        due = [key for key in keys if self._streaks[key][1] >= self.patience and key in lasting]
        if not due:
            return None
        self.active = True
        return Finding(
            condition=str(self.condition),
            severity=severity,
            layers=tuple(due) if self.per_layer else layers,
            first_step=min(self._streaks[key][0] for key in due),
            last_step=step_of(verdict.last_step, record.step),
            summary=text_of(verdict.summary),
            evidence=plain(verdict.evidence),
            remedy=text_of(verdict.remedy),
            code=code_of(verdict.code),
        )

    def over(self, layers: Iterable[str]) -> tuple[str, ...]:
        """Those of some layers with a finding of this rule for which it no longer holds.

        Args:
            layers: Names of layers.
        """
        if not self.active:
            return tuple(layers)
        return tuple(layer for layer in layers if layer not in self._streaks) if self.per_layer else ()

    def __deepcopy__(self: R, memo: dict[int, Any]) -> R:
        """A copy with a memory of its own; what cannot be copied, as a lock or a connection, is shared."""
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        for name, value in vars(self).items():
            try:
                own = copy.deepcopy(value, memo)
            except Exception:
                own = value
            object.__setattr__(twin, name, own)
        return twin

    def state_dict(self) -> dict[str, Any]:
        """Return what the rule remembers, as primitives, lists and dicts."""
        memory = copy.deepcopy(self.memory)
        if not _is_plain(memory):
            raise TypeError(
                f"{type(self).__name__}.memory must hold numbers, strings, lists and dicts only, got {memory!r};"
                " a checkpoint takes nothing else"
            )
        return {
            "memory": memory,
            "streaks": dict(self._streaks),
            "clear": self._clear,
            "active": self.active,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` returned."""
        self.memory = copy.deepcopy(state["memory"])
        self._streaks = {key: (first, count) for key, (first, count) in state["streaks"].items()}
        self._clear = state["clear"]
        self.active = state["active"]


def _is_plain(value: Any) -> bool:
    """Whether a value survives `torch.load(weights_only=True)`."""
    if type(value) is dict:
        return all(_is_plain(part) for pair in value.items() for part in pair)
    if type(value) in (list, tuple):
        return all(_is_plain(part) for part in value)
    return value is None or type(value) in (bool, int, float, str)


def stepped_by(record: StepRecord, optimizers: Collection[int]) -> tuple[str, ...]:
    """The layers that some of several optimizers step; nothing, the whole network, where all that there are step it.

    Example:
        >>> layers = LayerStats("g", optimizer=0), LayerStats("d", optimizer=1)
        >>> stepped_by(StepRecord(0, layers=layers), {1}), stepped_by(StepRecord(0, layers=layers[:1]), {0})
        (('d',), ())
    """
    if all(layer.optimizer in optimizers for layer in record.layers if layer.optimizer is not None):
        return ()
    return tuple(layer.name for layer in record.layers if layer.optimizer in optimizers)


def keep_last(values: list[float], value: float | None, size: int) -> None:
    """Append a finite value to a bounded list; NaN, Inf and None never enter a running statistic.

    Example:
        >>> window = [1.0, 2.0]
        >>> keep_last(window, float("nan"), 2); keep_last(window, 3.0, 2); window
        [2.0, 3.0]
    """
    if value is not None and math.isfinite(value):
        values.append(value)
        del values[:-size]


def by_optimizer(record: StepRecord) -> Iterator[list[LayerStats]]:
    """The layers of each optimizer of the record, in order of first use; frozen ones left out."""
    numbers = {layer.optimizer for layer in record.layers if layer.optimizer is not None}
    for number in sorted(numbers):
        yield [layer for layer in record.layers if layer.optimizer == number and not layer.frozen]
