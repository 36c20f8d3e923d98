"""StepRecord to scalars under the names that every logger takes; what wants a log axis is a log10, and says so."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import Literal

from lightning_gradhealth.records import LayerStats, StepRecord
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
        >>> for name, value in scalars(StepRecord(step=1, total_norm=0.01, total_norm_max=100.0), 0).items():
        ...     print(name, value)
        gradhealth/total_norm 0.01
        gradhealth/total_norm_max 100.0
        gradhealth/log10_total_norm 2.0
        gradhealth/non_finite_steps 0.0
        gradhealth/findings 0.0

    What has orders of magnitude is logged as its log10, since charts are linear. `log10_total_norm` is that of
    `total_norm_max`, the largest finite norm since the last point, so that no spike is lost; `total_norm` is the last.

    What clipping did comes with it where something clips: `log10_applied_norm` (the norm that the optimizer was given),
    `log10_clip_coefficient`, `clipped_fraction` (share of the window's steps), `clipping_active` (the gate of adaptive
    clipping is open) and `log10_would_clip` (what a dry run would have done).
    """
    ratios = record.norm_ratios
    values: dict[str, float | None] = {
        "total_norm": record.total_norm,
        "total_norm_max": record.total_norm_max,
        "log10_total_norm": log10(record.total_norm_max),
        "log10_norm_ratio_min": log10(min(ratios, default=None)),
        "log10_norm_ratio_max": log10(max(ratios, default=None)),
        "log10_update_to_weight": log10(record.update_to_weight_median),
        "gain_per_layer": record.backward_gain,
        "forward_gain_per_layer": record.forward_gain,
        "dead_fraction_max": _largest(layer.dead_fraction for layer in record.layers),
        "saturated_fraction_max": _largest(layer.saturated_fraction for layer in record.layers),
        "non_finite_steps": float(record.non_finite_steps),
        "skipped_steps": float(record.skipped_steps) if record.skips else None,
        "findings": float(active_findings),
    }
    values |= _clipping(record)
    last = {step.optimizer: step.total_norm for step in record.window}
    if len(last) > 1:
        values |= {f"optimizer{number}/total_norm": norm for number, norm in last.items()}
    return finite({f"{prefix}/{name}": value for name, value in values.items()})


def log10(value: float | None) -> float | None:
    """The decimal logarithm; None where the value is not known, and of 0, which a chart cannot show.

    Example:
        >>> log10(1e-3), log10(0.0), log10(None)
        (-3.0, None, None)
    """
    return math.log10(value) if value is not None and value > 0.0 else None


def _largest(values: Iterable[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def _clipping(record: StepRecord) -> dict[str, float | None]:
    """What the session's clipping did in the window; nothing where there is none."""
    if not record.clips:
        return {}
    return {
        "log10_applied_norm": log10(record.applied_norm),
        "log10_clip_coefficient": log10(record.clip_coefficient),
        "clipped_fraction": record.clipped_steps / record.steps,
        "clipping_active": None if record.armed is None else float(record.armed),
        "log10_would_clip": log10(record.would_clip),
    }


def finite(values: dict[str, float | None]) -> dict[str, float]:
    """The values that are known and finite.

    Example:
        >>> finite({"a": 1.0, "b": None, "c": math.inf})
        {'a': 1.0}
    """
    return {name: value for name, value in values.items() if value is not None and math.isfinite(value)}


def layer_scalars(layers: Iterable[LayerStats], chosen: Sequence[str], prefix: str = PREFIX) -> dict[str, float]:
    """The scalars of single layers.

    Args:
        layers: The layers of a record.
        chosen: Names of those that are wanted.
        prefix: What all names begin with.

    Example:
        >>> layer_scalars([LayerStats("net.0", grad_norm=10.0)], ["net.0"])
        {'gradhealth/layers/log10_grad_norm/net.0': 1.0}
    """
    tag_of, known = tags(chosen), list(layers)
    return finite(
        {
            f"{prefix}/layers/log10_{metric}/{tag_of[layer.name]}": log10(getattr(layer, metric))
            for metric in LAYER_METRICS
            for layer in known
            if layer.name in tag_of
        }
    )


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
