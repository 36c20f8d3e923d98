"""What is said: the vocabulary of findings, statistics and reports.

Plain data only. Nothing here imports torch, so a report can be read where torch is not installed.
Every record turns into JSON and back (see `serial`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_gradhealth.flows import Matrix, SignalChain, TemporalFlow
from lightning_gradhealth.messages import printable
from lightning_gradhealth.ratios import fitted_gain, median
from lightning_gradhealth.serial import Record
from lightning_gradhealth.validation import check_choice, check_path, wrong

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.console import RenderableType


class Condition(str, Enum):
    """What can be wrong with a training run, and that its clipping has set in.

    Example:
        >>> Condition("non_finite") is Condition.NON_FINITE
        True
    """

    VANISHING_GRADIENTS = "vanishing_gradients"
    EXPLODING_GRADIENTS = "exploding_gradients"
    NON_FINITE = "non_finite"
    GROWING_WEIGHTS = "growing_weights"
    COLLAPSING_WEIGHTS = "collapsing_weights"
    OVERSIZED_UPDATES = "oversized_updates"
    STALLED_LAYERS = "stalled_layers"
    LOSS_SPIKE = "loss_spike"
    STALLED_LOSS = "stalled_loss"
    NO_GRADIENT = "no_gradient"
    NOT_IN_OPTIMIZER = "not_in_optimizer"
    SQUASHED_LOGITS = "squashed_logits"
    VANISHING_ACTIVATIONS = "vanishing_activations"
    EXPLODING_ACTIVATIONS = "exploding_activations"
    DEAD_UNITS = "dead_units"
    SATURATED_UNITS = "saturated_units"
    ADAPTIVE_CLIPPING = "adaptive_clipping"

    def __str__(self) -> str:
        return self.value


class Severity(str, Enum):
    """How bad a finding is: `info` is worth knowing, `warning` costs accuracy, `critical` ends the run.

    Example:
        >>> Severity.CRITICAL.rank > Severity.INFO.rank
        True
    """

    INFO = "info"
    WARNING = "warning"
    CRITICAL = "critical"

    def __str__(self) -> str:
        return self.value

    @property
    def rank(self) -> int:
        """0, 1 or 2, for comparisons."""
        return list(Severity).index(self)


_NAME = 200  # characters of a name that is shown
_SAVED = 'e.g. "health.md"; the suffix decides the format'


def check_severity(severity: Severity | str) -> Severity:
    """Return a severity, or the one that a word names.

    Raises:
        ValueError: It is another word.
        TypeError: It is no word.

    Example:
        >>> check_severity("warning") is Severity.WARNING
        True
    """
    return Severity(check_choice("severity", severity, tuple(each.value for each in Severity)))


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


# --- statistics --------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class LayerStats(Record):
    """What was measured of one layer; None means not measured or undefined, 0 that 0 was measured.

    Attributes:
        name: The layer's name, without the prefixes that wrappers add.
        numel: Number of elements of its parameters that had a gradient (of all, where none had).
        grad_norm: L2 norm of its gradient at the last optimizer step of the window, before any clipping.
        grad_norm_max: The largest finite one since the previous record.
        applied_norm: L2 norm of the gradient that the optimizer was given, after all clipping (probed steps).
        norm_ratio: RMS gradient over the geometric mean of the layers with a finite, positive one.
        non_finite: Steps since the previous record at which its gradient had a NaN or Inf.
        bias_grad_rms: RMS gradient of its biases: stands in for the backward signal at its output.
        weight_norm: L2 norm of its parameters (probed steps).
        matrix_rms: Root mean square of those with two dimensions or more, its weights without biases (probed steps).
        matrices: Those of them that the layer applies by hand, where it has several (probed steps).
        grad_to_weight: `|g| / |w|` (probed steps).
        update_to_weight: `|dw| / |w|` of one optimizer step (probed steps, from a fixed sample).
        learning_rate: The largest rate of its parameter groups.
        weight_decay: The largest decay of its parameter groups (None: their optimizer has none to set).
        frozen: No parameter of the layer requires a gradient.
        without_grad: Trainable parameters of the layer, in the optimizer, that have never had a gradient.
        no_gradient_since: The loggers' x value since when that has been so.
        steps_without_grad: Optimizer steps for which that has been so.
        cancelled: A bias that a normalisation subtracts again: its gradient is nothing but rounding.
        vectors: It holds vectors only: scales, shifts, slopes. Any size of these may be right.
        forward_rms: Root mean square of its output (signals: probed steps).
        forward_mean: Mean of its output.
        backward_rms: Root mean square of dL/d(output).
        forward_gain: `forward_rms` over that of the point before it through which all of its signal comes.
        backward_gain: `backward_rms` of that point over its own: what the gradient is multiplied by on its way back.
        activation: What its output goes into, where that can die or saturate: "relu", "tanh", "attention", ... or "".
        units: Number of the units of that activation.
        dead_fraction: Share of the units of that activation that were active in none of at least 256 samples.
        full_fraction: Share of its units that all of these samples made active.
        saturated_fraction: Share of its units whose derivative is on average below 5 % of its greatest.
        forward_histogram: Elements of its output by magnitude, at most 512 of them: 32 bins, each a factor of 4,
            from 2^-32 on; what is smaller or larger is in the first or last. Empty: not measured.
        optimizer: Index of the optimizer that steps it, the first of several (None: none does).
        kind: What it is: "linear", "conv1d" to "conv3d", "recurrent", "embedding", "attention", "norm", or "".

    Example:
        >>> LayerStats("net.0", grad_norm=0.5, norm_ratio=1.0)
        LayerStats(net.0: grad_norm=0.5, norm_ratio=1)
        >>> LayerStats("net.2", grad_norm=0.0, dead_fraction=0.0)  # 0 was measured; what was not is left out
        LayerStats(net.2: grad_norm=0, dead_fraction=0)
    """

    name: str
    numel: int = 0
    grad_norm: float | None = None
    grad_norm_max: float | None = None
    applied_norm: float | None = None
    norm_ratio: float | None = None
    non_finite: int = 0
    bias_grad_rms: float | None = None
    weight_norm: float | None = None
    matrix_rms: float | None = None
    matrices: tuple[Matrix, ...] = ()
    grad_to_weight: float | None = None
    update_to_weight: float | None = None
    learning_rate: float | None = None
    weight_decay: float | None = None
    frozen: bool = False
    without_grad: tuple[str, ...] = ()
    no_gradient_since: int | None = None
    steps_without_grad: int = 0
    cancelled: bool = False
    optimizer: int | None = None
    vectors: bool = False
    forward_rms: float | None = None
    forward_mean: float | None = None
    backward_rms: float | None = None
    forward_gain: float | None = None
    backward_gain: float | None = None
    activation: str = ""
    units: int | None = None
    dead_fraction: float | None = None
    full_fraction: float | None = None
    saturated_fraction: float | None = None
    forward_histogram: tuple[int, ...] = ()
    kind: str = ""

    def __repr__(self) -> str:
        shown = ", ".join(
            f"{f.name}={_number(value) if isinstance(value, float) else value}"
            for f in fields(self)
            if f.name not in ("name", "numel") and (value := getattr(self, f.name)) != f.default
        )
        return f"LayerStats({printable(self.name)}: {shown})"


@dataclass(frozen=True)
class Unstepped(Record):
    """A parameter that gets a gradient and that no optimizer steps, or one that an optimizer steps in vain.

    Attributes:
        name: The parameter, or what is known of a tensor that has no name.
        layer: Its layer.
        kind: "held": the model has had it from the start; "thawed": and it was frozen then; "gained": it came to the
            model later; "listed": the model keeps it in a list, a dict or an object, where it is no parameter of the
            model; "outside": a leaf of the graph of which nothing else is known, or of a module in evaluation mode;
            "replaced": an optimizer steps it, but the model does not have it, and it has never had a gradient.
        norm: L2 norm of its elements: somebody steps it, if that changes.
        fix: Code that makes it a parameter of the model; "": none is known.

    Example:
        >>> Unstepped("head.weight", "head", "held", 1.5).kind
        'held'
    """

    name: str
    layer: str
    kind: str
    norm: float = 0.0
    fix: str = ""


@dataclass(frozen=True)
class SquashedLogits(Record):
    """A loss that takes for logits what a softmax or a sigmoid gives.

    Attributes:
        activation: "softmax" or "sigmoid".
        loss: "cross entropy" or "binary cross entropy with logits".
        layer: The layer before the activation; "": not known.
        classes: Number of classes; 1: each output stands for itself.
        floor: The loss cannot fall below this.

    Example:
        >>> SquashedLogits("softmax", "cross entropy", "head", 10, 1.46).classes
        10
    """

    activation: str
    loss: str
    layer: str
    classes: int
    floor: float


@dataclass(frozen=True)
class StepStats(Record):
    """One optimizer step inside a record's window: all that rules over time need.

    Attributes:
        step: The loggers' x value of the step.
        optimizer: Index of the optimizer that stepped.
        total_norm: L2 norm of all its gradients together, before any clipping; Inf or NaN where they were.
        loss: The training loss of the step, or None where it is not known.
        non_finite: A gradient had a NaN or Inf.
        overflow: The loss scaler met one and skips the step, as it does now and then.
        scaled: A loss scaler is at work: it skips every step with a NaN or Inf, whatever that came from.
        skipped: The step was skipped, by `on_non_finite`; None where nothing skips.
        origin: Where a NaN or Inf came from, where that was looked into.
        origin_unknown: Why that was not found out.
        clip_coefficient: Total norm after the session's clipping over that before; None where nothing clips, or it
            is not one factor.
        clipped: The session's clipping changed the gradients; None where nothing clips.
        armed: The clipping's gate is open, if only for this one step; None where there is no gate.
        outbreak: It stands open for an outbreak, for hundreds of steps; False at a single spike.
        acted: What the gate let through changed, or in a dry run would have changed, the gradients.
        would_clip: The coefficient of a dry run: what would have been done.
        refused: A factor of the clipping was NaN, Inf or negative, and was not applied.
        applied_norm: L2 norm of what the optimizer was given, after all clipping, the Trainer's too (probed steps).
        loss_scale: The factor by which the loss scaler has multiplied the loss (None: there is none). The norms are
            without it.
        unscaled: Whether the scaler had taken it out of the gradients when they were observed (None: no scaler).
        carried: Share, in norm, of what was left in `.grad` before the backward passes of the step in what the
            optimizer was given; 0 where it was cleared (None: not measured).
        learning_rate: The largest rate of the optimizer's groups (None where it lives on the device).

    Example:
        >>> StepStats(step=3, optimizer=0, total_norm=1.5).total_norm
        1.5
    """

    step: int
    optimizer: int = 0
    total_norm: float | None = None
    loss: float | None = None
    non_finite: bool = False
    overflow: bool = False
    learning_rate: float | None = None
    skipped: bool | None = None
    origin: str = ""
    origin_unknown: str = ""
    clip_coefficient: float | None = None
    clipped: bool | None = None
    armed: bool | None = None
    acted: bool | None = None
    outbreak: bool | None = None
    would_clip: float | None = None
    applied_norm: float | None = None
    scaled: bool = False
    loss_scale: float | None = None
    unscaled: bool | None = None
    carried: float | None = None
    refused: bool = False


@dataclass(frozen=True)
class OptimizerStats(Record):
    """What an optimizer is, as of a logged step.

    Attributes:
        optimizer: Its index.
        name: Its class.
        momentum: The largest momentum of its groups, of SGD and its like (None: it has none to set).
        scheduled: A schedule sets its learning rate.

    Example:
        >>> OptimizerStats(0, "SGD", momentum=0.9).name
        'SGD'
    """

    optimizer: int
    name: str = ""
    momentum: float | None = None
    scheduled: bool = False


@dataclass(frozen=True)
class StepCounts(Record):
    """Counts over steps whose own entries are no longer kept.

    Attributes:
        steps: How many optimizer steps.
        non_finite: Of them those at which a gradient was NaN or Inf.
        clipped: Those whose gradients were clipped.
        skipped: Those that were skipped.
        would_clip: The smallest coefficient of a dry run; None where there was none.

    Example:
        >>> StepCounts(steps=2).clipped
        0
    """

    steps: int = 0
    non_finite: int = 0
    clipped: int = 0
    skipped: int = 0
    would_clip: float | None = None


@dataclass(frozen=True, repr=False)
class StepRecord(Record):
    """What was measured up to one logged step, in all steps since the previous one.

    The total norm of a step is the L2 norm of all gradients that one optimizer is about to apply, before any clipping.

    Attributes:
        step: The loggers' x value of the last optimizer step of the window.
        total_norm: The total norm of the last step; of several optimizers, the largest of their last ones.
        total_norm_max: The largest finite total norm of any step of the window, whichever optimizer's it was: never
            below a finite `total_norm`, and a spike between two logs is never lost.
        applied_norm: As total_norm, of what the optimizers were given after all clipping, at their last probed steps.
        clip_coefficient: The smallest factor that clipping applied in the window; None where nothing clips.
        layers: One entry a layer, in order of first use in the forward pass.
        window: One entry an optimizer step since the previous record, at most the last 1,024.
        probed: Weight norms and updates were measured in this window.
        backward_gain: Fitted gain per layer of the backward signal over the main chain, or by the biases' gradients
            where signals are not measured (None: neither is).
        forward_gain: The same of the forward signal (None: not measured).
        chains: The main chain of each forward pass that was probed, one an optimizer.
        temporal: Gradient through time of recurrent layers, by name (`temporal=True`).
        first_non_finite: The module whose output was the first with a NaN or Inf, at the probed step.
        before: Counts over the steps of a longer window that come before those in `window`.
        unstepped: Parameters that get a gradient and that no optimizer steps, at the probed step.
        squashed: What is wrong with the logits of the loss, where a softmax or a sigmoid stands before it.
        carried: Least share, in norm, of what was left in `.grad` before the backward passes of the probed step in what
            the optimizer was given; 0 where it was cleared (None: not measured).
        optimizers: What the optimizers are.
        kinds: What the network is made of: the kinds of its modules, as in `LayerStats.kind`.

    Example:
        >>> StepRecord(step=9, total_norm=2.0)
        StepRecord(step=9, total_norm=2, layers=0)
    """

    step: int
    total_norm: float | None = None
    total_norm_max: float | None = None
    applied_norm: float | None = None
    clip_coefficient: float | None = None
    layers: tuple[LayerStats, ...] = ()
    window: tuple[StepStats, ...] = ()
    probed: bool = False
    backward_gain: float | None = None
    forward_gain: float | None = None
    chains: tuple[SignalChain, ...] = ()
    temporal: dict[str, TemporalFlow] = field(default_factory=dict)
    first_non_finite: str = ""
    before: StepCounts = field(default_factory=StepCounts)
    unstepped: tuple[Unstepped, ...] = ()
    squashed: SquashedLogits | None = None
    carried: float | None = None
    optimizers: tuple[OptimizerStats, ...] = ()
    kinds: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"StepRecord(step={self.step}, total_norm={_number(self.total_norm)}, layers={len(self.layers)})"

    @property
    def steps(self) -> int:
        """Optimizer steps that the record covers."""
        return self.before.steps + len(self.window)

    @property
    def non_finite_steps(self) -> int:
        """Steps of the window at which a gradient was NaN or Inf."""
        return self.before.non_finite + sum(step.non_finite for step in self.window)

    @property
    def clipped_steps(self) -> int:
        """Steps of the window whose gradients were clipped."""
        return self.before.clipped + sum(bool(step.clipped) for step in self.window)

    @property
    def would_clip(self) -> float | None:
        """The smallest coefficient of a dry run in the window; None where there was none."""
        known = [self.before.would_clip, *(step.would_clip for step in self.window)]
        return min((value for value in known if value is not None), default=None)

    @property
    def clips(self) -> bool:
        """Whether the session clips at all."""
        return any(step.clipped is not None for step in self.window)

    @property
    def skipped_steps(self) -> int:
        """Steps of the window that were skipped."""
        return self.before.skipped + sum(bool(step.skipped) for step in self.window)

    @property
    def skips(self) -> bool:
        """Whether `on_non_finite` may skip a step at all."""
        return any(step.skipped is not None for step in self.window)

    @property
    def armed(self) -> bool | None:
        """Whether a gate was open at the end of the window; None where there is none."""
        last = {step.optimizer: step.armed for step in self.window if step.armed is not None}
        return any(last.values()) if last else None

    @property
    def norm_ratios(self) -> list[float]:
        """The finite norm ratios, in layer order."""
        return [
            layer.norm_ratio
            for layer in self.layers
            if layer.norm_ratio is not None and math.isfinite(layer.norm_ratio)
        ]

    @property
    def update_to_weight_median(self) -> float | None:
        """Median over the layers of `|dw| / |w|`, or None where it was not measured."""
        value = median(s.update_to_weight for s in self.layers if s.update_to_weight is not None)
        return None if math.isnan(value) else value


@dataclass(frozen=True)
class Finding(Record):
    """One thing that is, or was, wrong: what, where, since when, how one knows, and what to do.

    Attributes:
        condition: What is wrong. A rule of your own may use a string of its own.
        severity: How bad.
        layers: The layers concerned, in order of first use; empty: the whole network.
        first_step: The loggers' x value at which it was first seen.
        last_step: The one at which it was last seen.
        summary: What was seen, as a clause.
        evidence: The numbers behind it.
        remedy: What to do, in words.
        code: The same in a line or two, and the imports they need, that run when pasted, where that can be done; of the
            names `model`, `optimizer` (of several the one that the remedy names; before a schedule is made of its
            rate), `trainer_arguments` (a dict of the Trainer's), `health_arguments` (GradHealth's) and `batch`.
        healed: Those of `layers` in which it no longer holds.

    Example:
        >>> finding = Finding("loss_spike", Severity.WARNING, (), 7, 7, "loss 40 after 2", {"loss": 40.0},
        ...                   "lower the rate")
        >>> print(finding)
        warning: loss_spike at step 7: loss 40 after 2. Remedy: lower the rate
    """

    condition: str
    severity: Severity
    layers: tuple[str, ...]
    first_step: int
    last_step: int
    summary: str = ""
    evidence: dict[str, Any] = field(default_factory=dict)
    remedy: str = ""
    code: str = ""
    healed: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "severity", check_severity(self.severity))
        super().__post_init__()
        if not self.condition:
            raise ValueError(wrong("condition", "the name of a condition", self.condition, "it may not be empty"))
        if self.condition in Condition._value2member_map_:
            object.__setattr__(self, "condition", Condition(self.condition))

    def __str__(self) -> str:
        since = f"at step {self.first_step}"
        if self.last_step > self.first_step:
            since = f"since step {self.first_step}"
        where = f" in {self.where}" if self.layers else ""
        text = f"{self.severity}: {self.condition}{where} {since}: {self.summary}. Remedy: {self.remedy}"
        return printable(text)

    @property
    def id(self) -> str:
        """What it is called from run to run: its condition, of which a report has one finding."""
        return str(self.condition)

    @property
    def where(self) -> str:
        """The layers in a few words, fit for a terminal: control characters are escaped, long names cut."""
        if not self.layers:
            return "the whole network"
        shown = [printable(name, _NAME) for name in self.layers]
        return ", ".join(shown) if len(shown) <= 3 else f"{shown[0]} … {shown[-1]} ({len(shown)} layers)"


@dataclass(frozen=True, repr=False)
class HealthReport(Record):
    """The verdict on a run so far.

    Attributes:
        findings: Every finding: the gravest first, then the earliest, then causes before their symptoms.
        layers: The last statistics of every layer, in order of first use.
        step: The loggers' x value of the last optimizer step that was seen (-1: none).
        steps: Optimizer steps seen.
        non_finite_steps: Steps with a NaN or Inf gradient.
        clipped_steps: Steps whose gradients the session's clipping changed.
        skipped_steps: Steps that were skipped, since a gradient was NaN or Inf.
        trend: Pairs of step and largest total norm, pooled over the run.
        notes: What could not be measured, and why.
        aside: Why nothing, or not the whole run, was watched; empty where all is well.
        unwatched: What was no longer watched from some step on, why and since when; such a run is not called healthy.

    Example:
        >>> report = HealthReport(steps=100)
        >>> report.healthy, sorted(report.conditions)
        (True, [])
        >>> HealthReport().healthy  # nothing was watched
        False
    """

    findings: tuple[Finding, ...] = ()
    layers: tuple[LayerStats, ...] = ()
    step: int = -1
    steps: int = 0
    non_finite_steps: int = 0
    clipped_steps: int = 0
    skipped_steps: int = 0
    trend: tuple[tuple[float, ...], ...] = ()
    notes: tuple[str, ...] = ()
    aside: str = ""
    unwatched: tuple[str, ...] = ()

    @property
    def conditions(self) -> frozenset[str]:
        """The conditions found with severity warning or critical."""
        return frozenset(f.condition for f in self.findings if f.severity is not Severity.INFO)

    @property
    def healthy(self) -> bool:
        """True where the run was watched to its end, in all that can be, and nothing above info was found."""
        return self.steps > 0 and not self.aside and not self.unwatched and not self.conditions

    @property
    def verdict(self) -> str:
        """The conditions, the gravest first; "healthy"; or that the run was not watched."""
        found = ", ".join(dict.fromkeys(str(f.condition) for f in self.findings if f.severity is not Severity.INFO))
        if self.healthy:
            return "healthy"
        return found or ("not watched to the end" if self.steps else "nothing was watched")

    def to_dict(self) -> dict[str, Any]:
        """As `Record.to_dict`, and for machines `healthy`, `verdict` and each finding's `id`, which is stable."""
        data = super().to_dict()
        findings = [{"id": finding.id, **kept} for finding, kept in zip(self.findings, data["findings"], strict=True)]
        return {"healthy": self.healthy, "verdict": self.verdict, **data, "findings": findings}

    def __repr__(self) -> str:
        return f"HealthReport({printable(self.verdict)}; {len(self.layers)} layers, {self.steps} steps)"

    def __rich__(self) -> RenderableType:
        from lightning_gradhealth.reports.health import render_health

        return render_health(self)

    def _repr_html_(self) -> str:
        """The page of the run, in a frame: what a notebook shows."""
        from lightning_gradhealth.pages import health_frame

        return health_frame(self)

    def __getstate__(self) -> dict[str, Any]:
        """What was recorded for the page stays in this process; the fields go along."""
        return {key: value for key, value in self.__dict__.items() if key != "_recorded"}

    def save(self, path: str | Path) -> Path:
        """Write the report; the suffix decides how: .html (the page in one file), .json, .md or .txt.

        Args:
            path: The file to write; missing folders are made.

        Returns:
            The path written.

        Raises:
            ValueError: The suffix is none of these.
            TypeError: `path` is no path.

        Example:
            >>> import tempfile
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     HealthReport().save(Path(folder) / "health.json").name
            'health.json'
        """
        from lightning_gradhealth.reports.health import save_health

        return save_health(self, Path(check_path("path", path, _SAVED)))

    def plot(self, ax: Axes | Sequence[Axes] | None = None) -> tuple[Figure, Any]:
        """Draw the report: the total gradient norm over the steps, and the gradient norm of each layer.

        The figure stands alone: pyplot neither keeps nor shows it. `fig.savefig("report.png")` writes it.

        Args:
            ax: Axes for the gradient norm of each layer, or two, for the total norm and for it; None: a new figure.

        Returns:
            The figure, and the axes: an array of two, or what was given.

        Raises:
            ModuleNotFoundError: Matplotlib is missing; `pip install 'lightning-gradhealth[plot]'` installs it.

        Example:
            >>> fig, ax = HealthReport().plot()
            >>> type(fig).__name__
            'Figure'
        """
        from lightning_gradhealth.reports.figures import plot_health

        return plot_health(self, ax)


@dataclass(frozen=True, repr=False)
class FlowReport(Record):
    """What `diagnose` saw of the signal on its way through a model, before anything was trained.

    Attributes:
        layers: Every layer, in order of first use: `forward_rms`, `forward_gain`, `backward_rms`, `backward_gain`,
            `activation`, `dead_fraction`, `saturated_fraction`, `grad_norm`, `matrix_rms`.
        chain: The main chain: the points that all of the signal goes through.
        forward_gain: What one layer of the main chain multiplies the signal by, fitted over all; None: not measured.
        backward_gain: The same of the gradient on its way back.
        depth_limit: Number of layers over which the signal, at the gain that is farther from 1, falls below 1e-3 of
            what it was, or grows beyond 1e3; None: it does not, or it was not measured.
        outlook: The same in words, as "the gradient is below 1e-3 after 14 more layers".
        findings: What is wrong: the gravest first, and causes before their symptoms.
        remedies: What to do; where something is wrong, also what `init_weights` would change.
        loss: The loss, where there is one.
        notes: What could not be measured, and why.
        temporal: Gradient through time of recurrent layers, by name.

    Example:
        >>> report = FlowReport(forward_gain=0.5, backward_gain=0.5, outlook="the signal is below 1e-3 after 7 layers")
        >>> report
        FlowReport(nothing was measured; 0 layers, gain 0.5 forward, 0.5 back)
        >>> report.healthy
        False
    """

    layers: tuple[LayerStats, ...] = ()
    chain: SignalChain = field(default_factory=SignalChain)
    forward_gain: float | None = None
    backward_gain: float | None = None
    depth_limit: int | None = None
    outlook: str = ""
    findings: tuple[Finding, ...] = ()
    remedies: tuple[str, ...] = ()
    loss: float | None = None
    notes: tuple[str, ...] = ()
    temporal: dict[str, TemporalFlow] = field(default_factory=dict)

    @property
    def conditions(self) -> frozenset[str]:
        """The conditions found with severity warning or critical."""
        return frozenset(f.condition for f in self.findings if f.severity is not Severity.INFO)

    @property
    def measured(self) -> bool:
        """Whether the signal of any layer was measured, be it only between matrices that are applied by hand."""
        between = any(matrix.backward_gain is not None for layer in self.layers for matrix in layer.matrices)
        return between or any(layer.forward_rms is not None for layer in self.layers)

    @property
    def healthy(self) -> bool:
        """True where signals were measured and nothing above info was found."""
        return self.measured and not self.conditions

    @property
    def verdict(self) -> str:
        """The conditions, the gravest first; "healthy"; or that nothing was measured."""
        found = ", ".join(dict.fromkeys(str(f.condition) for f in self.findings if f.severity is not Severity.INFO))
        return found or ("healthy" if self.measured else "nothing was measured")

    def __repr__(self) -> str:
        gains = f"gain {_number(self.forward_gain)} forward, {_number(self.backward_gain)} back"
        return f"FlowReport({self.verdict}; {len(self.layers)} layers, {gains})"

    def __str__(self) -> str:
        from lightning_gradhealth.reports.flow import render_flow
        from lightning_gradhealth.reports.rendering import plain

        return plain(render_flow(self), width=160)

    def __rich__(self) -> RenderableType:
        from lightning_gradhealth.reports.flow import render_flow

        return render_flow(self)

    def save(self, path: str | Path) -> Path:
        """Write the report; the suffix decides how: .json, .md or .txt.

        Args:
            path: The file to write; missing folders are made.

        Returns:
            The path written.

        Raises:
            ValueError: The suffix is none of these.
            TypeError: `path` is no path.

        Example:
            >>> import tempfile
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     FlowReport().save(Path(folder) / "flow.json").name
            'flow.json'
        """
        from lightning_gradhealth.reports.flow import save_flow

        return save_flow(self, Path(check_path("path", path, _SAVED)))

    def plot(self, ax: Axes | None = None) -> tuple[Figure, Axes]:
        """Draw the report: the signal and the gradient over depth, with the gains that were fitted.

        The figure stands alone: pyplot neither keeps nor shows it. `fig.savefig("report.png")` writes it.

        Args:
            ax: Axes to draw on; None: a new figure.

        Returns:
            The figure, and the axes.

        Raises:
            ModuleNotFoundError: Matplotlib is missing; `pip install 'lightning-gradhealth[plot]'` installs it.

        Example:
            >>> fig, ax = FlowReport().plot()
            >>> type(fig).__name__
            'Figure'
        """
        from lightning_gradhealth.reports.figures import plot_flow

        return plot_flow(self, ax)


@dataclass(frozen=True)
class InitEntry(Record):
    """What `init_weights` did to one parameter, or to one block of it (a gate, a projection), and why.

    Attributes:
        name: The parameter's name; a block's in brackets behind it, as in `rnn.weight_ih_l0[forget]`.
        module: Class of the module that owns it.
        shape: Shape of the parameter or block.
        rule: The handler that decided: "Linear", "LSTM", a registered initializer's name; "copy" (frozen, of a trained
            parameter), "frozen", "skipped", "integer" or "uncovered" where none did.
        scheme: "he", "xavier", "lecun", "orthogonal", "constant", "custom" (a function of one's own) or "kept".
        distribution: "normal", "uniform", "truncated_normal", or "" where nothing was drawn.
        fan: The fan that std was computed from (None where there is none).
        gain: The gain, without gamma (None where there is none).
        target_std: What the standard deviation should be (None: left alone).
        measured_std: What it is now (None where there are fewer than two elements).
        note: Why, where it is not obvious.
        found: How the gain was found: "closed form", "quadrature", "replayed", "module order", "output", "override"
            ("": it is the scheme's, or an initializer's).
        follows: What the signal passes on its way to the next weight, with its gain, as "gelu 1.534".
        relative_step: What the first step of an Adam-like optimizer at `lr=` moves it by, in units of its root mean
            square: such a step moves every element by `lr`. None: no rate was given, it is frozen or 0, or it makes up
            another weight (weight_norm and the like).

    Example:
        >>> InitEntry("0.weight", "Linear", (8, 4), "Linear", "he", "normal", 4.0, 1.41, 0.707, 0.7).fan
        4.0
    """

    name: str
    module: str
    shape: tuple[int, ...]
    rule: str
    scheme: str
    distribution: str = ""
    fan: float | None = None
    gain: float | None = None
    target_std: float | None = None
    measured_std: float | None = None
    note: str = ""
    found: str = ""
    follows: str = ""
    relative_step: float | None = None


@dataclass(frozen=True)
class DepthPoint(Record):
    """The signal at one weight, as the plan predicts it and as `calibrate=` measured it.

    Attributes:
        name: The weight's name.
        forward: Predicted root mean square of what it gives (None: not known).
        backward: Predicted RMS of the gradient at its output, relative to that at the last weight.
        target: The standard deviation that its output should have: as predicted, or what `calibrate=` aims at.
        before: The one that `calibrate=` measured as it came to the weight, those before it rescaled already (None:
            not measured).
        after: The one that it measured afterwards.

    Example:
        >>> DepthPoint("0.weight", forward=1.41, backward=1.0, target=1.41).after is None
        True
    """

    name: str
    forward: float | None = None
    backward: float | None = None
    target: float | None = None
    before: float | None = None
    after: float | None = None


@dataclass(frozen=True, repr=False)
class InitReport(Record):
    """What `init_weights` did: every parameter of the model is accounted for.

    Attributes:
        entries: One for each parameter or block of one, in registration order.
        seed: The seed the draws came from; the same seed gives the same weights again.
        source: How the model was read: "trace (fake tensors)", "trace (real batch)", "trace (meta)", "trace (guessed
            4×784)" where there was no sample, or "module order".
        residual: What was done to residual branches: "none", "depth", "zero_last" or "fixup".
        depth: The predicted signal at every weight, in order of use; empty without a trace.
        notes: What else to know about the model as a whole.
        applied: False where this is a plan that has not been carried out.

    Example:
        >>> InitReport(entries=(), seed=0).uncovered
        ()
    """

    entries: tuple[InitEntry, ...] = ()
    seed: int = 0
    source: str = ""
    residual: str = "none"
    depth: tuple[DepthPoint, ...] = ()
    notes: tuple[str, ...] = ()
    applied: bool = True

    @property
    def uncovered(self) -> tuple[str, ...]:
        """Names of the parameters that no rule knew, so that they kept their values."""
        return tuple(entry.name for entry in self.entries if entry.rule == "uncovered")

    @property
    def forward_gain(self) -> float | None:
        """What the predicted signal is multiplied by from one weight to the next, fitted over all; None: not known."""
        return fitted_gain([point.forward or 0.0 for point in reversed(self.depth)])

    @property
    def backward_gain(self) -> float | None:
        """The same of the predicted gradient on its way back."""
        return fitted_gain([point.backward or 0.0 for point in self.depth])

    def __repr__(self) -> str:
        kept = sum(entry.scheme == "kept" for entry in self.entries)
        return f"InitReport({len(self.entries)} entries, {kept} kept, {len(self.uncovered)} uncovered)"

    def __rich__(self) -> RenderableType:
        from lightning_gradhealth.reports.initialization import render_init

        return render_init(self)

    def plot(self, ax: Axes | None = None) -> tuple[Figure, Axes]:
        """Draw the report: the signal and the gradient that are predicted over depth, and what `calibrate=` measured.

        The figure stands alone: pyplot neither keeps nor shows it. `fig.savefig("report.png")` writes it.

        Args:
            ax: Axes to draw on; None: a new figure.

        Returns:
            The figure, and the axes.

        Raises:
            ModuleNotFoundError: Matplotlib is missing; `pip install 'lightning-gradhealth[plot]'` installs it.

        Example:
            >>> fig, ax = InitReport().plot()
            >>> type(fig).__name__
            'Figure'
        """
        from lightning_gradhealth.reports.figures import plot_init

        return plot_init(self, ax)
