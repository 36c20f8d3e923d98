"""The arguments that GradHealth and HealthSession have in common, and what is wrong with bad ones."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from lightning_gradhealth.gradients import Clip, check_clip
from lightning_gradhealth.layers import LayersSpec, check_layers
from lightning_gradhealth.records import Condition
from lightning_gradhealth.response import OnNonFinite, check_on_non_finite
from lightning_gradhealth.rules import Rule, Thresholds
from lightning_gradhealth.validation import (
    check_int,
    check_regex,
    check_several,
    check_type,
    likely_meant,
    shown,
    wrong,
)

Ignore = Mapping[str, str] | Iterable[str] | str | None
StopOn = Sequence[str] | str


def check_arguments(
    clip: Clip,
    on_non_finite: OnNonFinite,
    probe_every_n_steps: int | None,
    layers: LayersSpec,
    rules: Sequence[Rule],
    ignore: Ignore,
    thresholds: Thresholds,
) -> dict[str, str]:
    """Check what GradHealth and HealthSession have in common, and return `ignore` as condition -> regex.

    Raises:
        ValueError: A value is out of range, with its name and the remedy.
        TypeError: A value is of the wrong type.

    Example:
        >>> check_arguments(None, "warn", None, "module", (), "loss_spike", Thresholds())
        {'loss_spike': '.*'}
    """
    check_clip(clip)
    check_on_non_finite(on_non_finite)
    if probe_every_n_steps is not None:
        remedy = "leave it out to follow the Trainer's logging, or for 50 without one"
        check_int("probe_every_n_steps", probe_every_n_steps, 1, remedy, "None or an int")
    check_layers(layers)
    check_type("thresholds", thresholds, Thresholds, "a Thresholds", "e.g. Thresholds(time_ratio=100.0)")
    if not isinstance(rules, Sequence) or isinstance(rules, (str, bytes)):
        raise TypeError(wrong("rules", "a sequence of Rule instances", rules, "e.g. rules=[MyRule()]"))
    for rule in rules:
        if not isinstance(rule, Rule) or not isinstance(rule.condition, str) or not rule.condition:
            must = "instances of subclasses of Rule with a condition"
            raise TypeError(wrong("rules", must, rule, "e.g. rules=[MyRule()]"))
    return _check_ignore(ignore, rules)


def _check_ignore(ignore: Ignore, rules: Sequence[Rule]) -> dict[str, str]:
    if ignore is None:
        return {}
    if isinstance(ignore, str):
        ignore = {ignore: ".*"}
    elif not isinstance(ignore, Mapping):
        must = "a condition, several, or condition -> regex"
        ignore = _as_keys(check_several("ignore", ignore, must, 'e.g. ignore={"stalled_layers": "head.*"}'))
    for condition, pattern in ignore.items():
        _check_condition("ignore", condition, rules)
        check_regex("ignore", pattern, "it is matched against layer names; '.*' mutes the condition everywhere")
    return {str(condition): pattern for condition, pattern in ignore.items()}


def _as_keys(conditions: Iterable[Any]) -> dict[str, str]:
    muted = {}
    for condition in conditions:
        check_type("ignore", condition, str, "names of conditions", 'e.g. ignore=["loss_spike"]')
        muted[condition] = ".*"
    return muted


def _check_condition(argument: str, condition: Any, rules: Sequence[Rule]) -> None:
    known = {condition.value for condition in Condition} | {str(rule.condition) for rule in rules}
    if not isinstance(condition, str):
        raise TypeError(wrong(argument, f"one of {', '.join(sorted(known))}", condition, "give a condition's name"))
    if str(condition) not in known:
        meant = likely_meant(str(condition), sorted(known))
        hint = f"; did you mean {meant!r}?" if meant else ""
        raise ValueError(
            f"{argument}: {shown(str(condition))} is no condition; the conditions are {', '.join(sorted(known))}{hint}"
        )


def unmatched_mutes(ignore: Mapping[str, str], layers: Collection[str]) -> list[str]:
    """What to say of the patterns of `ignore` that match no layer of the model.

    Args:
        ignore: Condition -> regex of layer names.
        layers: The names of the layers.

    Example:
        >>> unmatched_mutes({"loss_spike": ".*", "dead_units": "haed.*"}, ["net.0", "head"])
        ["ignore: 'haed.*' (for dead_units) matches no layer, so that it mutes nothing; the layers are net.0, head"]
    """
    names = list(layers)
    few = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return [
        f"ignore: {shown(pattern)} (for {condition}) matches no layer, so that it mutes nothing; the layers are {few}"
        for condition, pattern in ignore.items()
        if not any(re.fullmatch(pattern, name) for name in ("", *names))
    ]


def check_stop_on(stop_on: StopOn, rules: Sequence[Rule]) -> frozenset[str]:
    """Return the conditions that end a fit.

    Raises:
        TypeError: `stop_on` is neither a condition nor a sequence of them.
        ValueError: One of them is no condition.

    Example:
        >>> sorted(check_stop_on("exploding_gradients", ()))
        ['exploding_gradients']
    """
    remedy = 'e.g. stop_on="exploding_gradients"'
    several = not isinstance(stop_on, str)
    conditions = check_several("stop_on", stop_on, "a condition or several", remedy) if several else [stop_on]
    for condition in conditions:
        _check_condition("stop_on", condition, rules)
    return frozenset(map(str, conditions))
