"""StepRecord to loggers: a handful of well-named scalars for any of them, charts and text for TensorBoard."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from lightning_gradhealth import custom_scalars
from lightning_gradhealth.messages import as_markdown, printable, reason_of, say
from lightning_gradhealth.records import Finding, LayerStats, StepRecord
from lightning_gradhealth.validation import check_int, wrong

PREFIX = "gradhealth"
WORST = 10
LONGEST = 160  # characters of a layer's tag: MLflow takes 250 for a whole name, a logger's prefix among them
LAYER_METRICS = ("grad_norm", "update_to_weight")

LogLayers = Literal["auto"] | bool | int


def check_log_layers(log_layers: LogLayers) -> int | None:
    """Return how many layers to log; None for all.

    Raises:
        ValueError: It is another word, or a number < 0.
        TypeError: It is neither a word, a bool nor a whole number.

    Example:
        >>> check_log_layers("auto"), check_log_layers(True), check_log_layers(False), check_log_layers(3)
        (10, None, 0, 3)
    """
    must = f'"auto" (the worst {WORST}), True, False or a number of layers'
    remedy = 'leave it out for "auto"'
    if isinstance(log_layers, str):
        if log_layers != "auto":
            raise ValueError(wrong("log_layers", must, log_layers, remedy))
        return WORST
    if isinstance(log_layers, bool):
        return None if log_layers else 0
    return check_int("log_layers", log_layers, 0, remedy, must)


def scalars(record: StepRecord, active_findings: int, prefix: str = PREFIX) -> dict[str, float]:
    """The scalars of a record under their names; values that were not measured or are not finite are left out.

    Args:
        record: The record.
        active_findings: Number of findings that hold now.
        prefix: What all names begin with.

    Example:
        >>> for name, value in scalars(StepRecord(step=1, total_norm=2.0), 0).items():
        ...     print(name, value)
        gradhealth/total_norm 2.0
        gradhealth/non_finite_steps 0.0
        gradhealth/findings 0.0

    What clipping did comes with it where something clips: `applied_norm` (the norm that the optimizer was given),
    `clip_coefficient`, `clipped_fraction` (share of the window's steps), `armed` (the gate of adaptive clipping) and
    `would_clip` (what a dry run would have done).
    """
    ratios = record.norm_ratios
    values: dict[str, float | None] = {
        "total_norm": record.total_norm,
        "total_norm_max": record.total_norm_max,
        "applied_norm": record.applied_norm,
        "norm_ratio_min": min(ratios, default=None),
        "norm_ratio_max": max(ratios, default=None),
        "gain_per_layer": record.backward_gain,
        "forward_gain_per_layer": record.forward_gain,
        "dead_fraction_max": _largest(layer.dead_fraction for layer in record.layers),
        "saturated_fraction_max": _largest(layer.saturated_fraction for layer in record.layers),
        "update_to_weight": record.update_to_weight_median,
        "non_finite_steps": float(record.non_finite_steps),
        "skipped_steps": float(record.skipped_steps) if record.skips else None,
        "findings": float(active_findings),
    }
    values |= _clipping(record)
    last = {step.optimizer: step.total_norm for step in record.window}
    if len(last) > 1:
        # not under total_norm/: where a metric is a file, as in MLflow's file store, it cannot be a folder too
        values |= {f"optimizer{number}/total_norm": norm for number, norm in last.items()}
    return _finite({f"{prefix}/{name}": value for name, value in values.items()})


def _largest(values: Iterable[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def _clipping(record: StepRecord) -> dict[str, float | None]:
    """What the session's clipping did in the window; nothing where there is none."""
    if not record.clips:
        return {}
    return {
        "clip_coefficient": record.clip_coefficient,
        "clipped_fraction": record.clipped_steps / record.steps,
        "armed": None if record.armed is None else float(record.armed),
        "would_clip": record.would_clip,
    }


def _finite(values: dict[str, float | None]) -> dict[str, float]:
    return {name: value for name, value in values.items() if value is not None and math.isfinite(value)}


def worst_layers(layers: Iterable[LayerStats], count: int) -> list[str]:
    """Names of the `count` layers whose gradients are farthest from the typical one, in layer order.

    Example:
        >>> worst_layers([LayerStats("a", norm_ratio=1.0), LayerStats("b", norm_ratio=1e-6)], 1)
        ['b']
    """

    def distance(layer: LayerStats) -> float:
        ratio = layer.norm_ratio
        if ratio is None:
            return -1.0
        return abs(math.log(ratio)) if 0.0 < ratio < math.inf else math.inf

    known = list(layers)
    chosen = sorted(known, key=distance, reverse=True)[:count]
    return [layer.name for layer in known if layer in chosen]


def tags(names: Sequence[str]) -> dict[str, str]:
    """Names of layers as every logger takes them: of ASCII letters, digits, `_`, `.` and `-`, short, no two alike.

    Example:
        >>> tags(["net.0", "net/ü", "net/ö"])
        {'net.0': 'net.0', 'net/ü': 'net__', 'net/ö': 'net__-2'}
    """
    taken: dict[str, str] = {}
    for name in names:
        plain = re.sub(r"[^\w.-]", "_", name, flags=re.ASCII) or "_"
        plain = "_" + plain[1:] if plain.startswith(".") else plain  # no way up in a file system
        if len(plain) > LONGEST:
            plain = f"{plain[: LONGEST // 2 - 1]}__{plain[len(plain) - LONGEST // 2 + 1 :]}"
        tag, number = plain, 1
        while tag in taken:
            number += 1
            tag = f"{plain}-{number}"
        taken[tag] = name
    return {name: tag for tag, name in taken.items()}


def prefix_of(number: int) -> str:
    """What the names of a Trainer's n-th GradHealth begin with, so that no two write the same.

    Example:
        >>> prefix_of(0), prefix_of(1)
        ('gradhealth', 'gradhealth-2')
    """
    return PREFIX if number == 0 else f"{PREFIX}-{number + 1}"


def layout(layers: bool = True, clipping: bool = True, prefix: str = PREFIX) -> dict[str, dict[str, list[Any]]]:
    """The charts of TensorBoard's Custom Scalars panel, the verdict first.

    Args:
        layers: Whether there are scalars of single layers to show.
        clipping: Whether the session clips.
        prefix: What the names of the scalars begin with.

    Example:
        >>> list(layout()), list(layout(layers=False, clipping=False))
        (['Grad Health', 'Grad Health: clipping', 'Grad Health: layers'], ['Grad Health'])
    """

    def chart(*patterns: str) -> list[Any]:
        # regexes, matched from the start of a tag, where a logger's own prefix may stand
        return ["Multiline", [f"(.*-)?{prefix}/{pattern}$" for pattern in patterns]]

    title = "Grad Health" + prefix.removeprefix(PREFIX).replace("-", " ")
    charts = {
        title: {
            "Active findings": chart("findings"),
            "Gain per layer, backwards and forwards (1: ideal)": chart("gain_per_layer", "forward_gain_per_layer"),
            "Largest gradient norm (log scale)": chart("total_norm_max"),
            "Update / weight (log scale, 1e-3: usual)": chart("update_to_weight"),
            "Norm ratio, min and max layer (log scale)": chart("norm_ratio_min", "norm_ratio_max"),
            "Steps with NaN or Inf": chart("non_finite_steps"),
        },
    }
    if clipping:
        charts[f"{title}: clipping"] = {
            "Norm before and after clipping (log scale)": chart("total_norm", "applied_norm"),
            "Share of clipped steps, gate open": chart("clipped_fraction", "armed"),
            "Smallest factor (log scale)": chart("(clip_coefficient|would_clip)"),
        }
    if layers:
        charts[f"{title}: layers"] = {
            "Gradient norm, a line a layer (log scale)": chart("layers/grad_norm/.*"),
            "Update / weight, a line a layer (log scale)": chart("layers/update_to_weight/.*"),
        }
    return charts


def findings_text(findings: Sequence[Finding]) -> str:
    """Findings as a Markdown table for the Text panel.

    Example:
        >>> findings_text([]).splitlines()[0]
        '| condition | severity | where | since step | what | remedy |'
    """
    rows = ["| condition | severity | where | since step | what | remedy |", "|---|---|---|---|---|---|"]
    for f in findings:
        cells = (f.condition, f.severity, f.where, f.first_step, f.summary, f.remedy)
        rows.append(f"| {' | '.join(as_markdown(cell) for cell in cells)} |")
    return "\n".join(rows)


class LoggerSink:
    """Writes records to every logger of a Trainer; a logger that fails is left alone from then on.

    Args:
        log_layers: How many layers' own scalars to write: "auto" the worst ten, chosen at the first record and
            kept, so that their lines go on; a number; True for all; False for none.
        prefix: What all names begin with.

    Attributes:
        layers: The layers that were chosen; None before the first record.

    Example:
        >>> class Printer:
        ...     def log_metrics(self, metrics, step):
        ...         print(step, sorted(metrics)[-1])
        >>> LoggerSink(False).write([Printer()], StepRecord(step=3, total_norm=1.0), [], 0)
        3 gradhealth/total_norm
    """

    def __init__(self, log_layers: LogLayers = "auto", prefix: str = PREFIX) -> None:
        self._prefix = prefix
        self._count = check_log_layers(log_layers)
        self.layers: list[str] | None = None
        self._failed: set[int] = set()
        self._without_layers: set[int] = set()
        self._told: dict[int, set[tuple[str, str]]] = {}

    def take_up(self, layers: Any) -> None:
        """Go on with the layers that a checkpoint names.

        Raises:
            TypeError: They are no names.
        """
        if layers is not None and not (isinstance(layers, list) and all(isinstance(name, str) for name in layers)):
            raise TypeError(f"logged_layers must be a list of names, got {type(layers).__name__}")
        self.layers = layers

    def write(self, loggers: Iterable[Any], record: StepRecord, findings: Sequence[Finding], active: int) -> None:
        """Write one record by a single `log_metrics` call a logger.

        Args:
            loggers: The Trainer's loggers.
            record: What to write.
            findings: All findings so far; TensorBoard shows them as text when there are new ones.
            active: Number of findings that hold now.
        """
        totals, layers = scalars(record, active, self._prefix), self._layer_scalars(record)
        for logger in loggers:
            if id(logger) in self._failed:
                continue
            try:
                self._write_scalars(logger, record.step, totals, layers)
                if _is_tensorboard(logger):
                    self._write_panels(logger, record, findings)
            except Exception as error:
                self._failed.add(id(logger))
                say(
                    f"gradhealth: {printable(type(logger).__name__)} could not write ({reason_of(error)}); it gets"
                    " nothing more from GradHealth, training goes on"
                )

    def _write_scalars(self, logger: Any, step: int, totals: dict[str, float], layers: dict[str, float]) -> None:
        """Write all scalars in a dict of the logger's own; where it refuses them, once more without those of layers."""
        if not layers or id(logger) in self._without_layers:
            logger.log_metrics(dict(totals), step=step)
            return
        try:
            logger.log_metrics(totals | layers, step=step)
        except Exception as error:
            logger.log_metrics(dict(totals), step=step)
            self._without_layers.add(id(logger))
            say(
                f"gradhealth: {printable(type(logger).__name__)} refused the scalars of layers ({reason_of(error)}); it"
                " gets the others only"
            )

    def _layer_scalars(self, record: StepRecord) -> dict[str, float]:
        if self._count == 0:
            return {}
        if self.layers is None:
            count = len(record.layers) if self._count is None else self._count
            self.layers = worst_layers(record.layers, count)
        tag_of = tags(self.layers)
        return _finite(
            {
                f"{self._prefix}/layers/{metric}/{tag_of[layer.name]}": getattr(layer, metric)
                for metric in LAYER_METRICS
                for layer in record.layers
                if layer.name in tag_of
            }
        )

    def _write_panels(self, logger: Any, record: StepRecord, findings: Sequence[Finding]) -> None:
        """The layout once a writer, the findings whenever there is a new one."""
        writer = logger.experiment
        if id(logger) not in self._told:
            self._told[id(logger)] = set()
            custom_scalars.show(writer, layout(self._count != 0, record.clips, self._prefix))
        known = self._told[id(logger)]
        if new := {(f.condition, f.severity) for f in findings} - known:
            known |= new
            writer.add_text(f"{self._prefix}/findings", findings_text(findings), record.step)


def _is_tensorboard(logger: Any) -> bool:
    """Of either package, `lightning` or `pytorch_lightning`."""
    return any(base.__name__ == "TensorBoardLogger" for base in type(logger).__mro__)
