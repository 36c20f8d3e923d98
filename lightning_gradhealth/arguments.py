"""The arguments that GradHealth and HealthSession have in common, and what is wrong with bad ones."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lightning_gradhealth.gradients import Clip, check_clip
from lightning_gradhealth.layers import LayersSpec, check_layers
from lightning_gradhealth.records import Condition
from lightning_gradhealth.response import OnNonFinite, check_on_non_finite
from lightning_gradhealth.rules import Rule, Thresholds

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
        if isinstance(probe_every_n_steps, bool) or not isinstance(probe_every_n_steps, int):
            raise TypeError(
                f"probe_every_n_steps must be an int or None, got {probe_every_n_steps!r};"
                " leave it out to follow the Trainer"
            )
        if probe_every_n_steps < 1:
            raise ValueError(
                f"probe_every_n_steps must be >= 1, got {probe_every_n_steps}; leave it out to follow the Trainer"
            )
    check_layers(layers)
    if not isinstance(thresholds, Thresholds):
        raise TypeError(f"thresholds must be a Thresholds, got {thresholds!r}; e.g. Thresholds(time_ratio=100.0)")
    if not isinstance(rules, Sequence):
        raise TypeError(f"rules must be a sequence of Rule instances, got {rules!r}; e.g. rules=[MyRule()]")
    for rule in rules:
        if not isinstance(rule, Rule) or not rule.condition:
            raise TypeError(
                f"rules must be instances of subclasses of Rule with a condition, got {rule!r}; e.g. rules=[MyRule()]"
            )
    return _check_ignore(ignore, rules)


def check_flag(name: str, value: bool) -> bool:
    """Return a value that must be True or False.

    Raises:
        TypeError: It is neither.

    Example:
        >>> check_flag("probe_compiled", True)
        True
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


def _check_ignore(ignore: Ignore, rules: Sequence[Rule]) -> dict[str, str]:
    if ignore is None:
        ignore = {}
    elif isinstance(ignore, str):
        ignore = {ignore: ".*"}
    elif not isinstance(ignore, Iterable):
        raise TypeError(
            f"ignore must be a condition, several, or condition -> regex, got {ignore!r};"
            ' e.g. ignore={"stalled_layers": "head.*"}'
        )
    elif not isinstance(ignore, Mapping):
        ignore = dict.fromkeys(ignore, ".*")
    for condition, pattern in ignore.items():
        _check_condition("ignore", condition, rules)
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise ValueError(
                f"ignore: {pattern!r} is not a valid regular expression ({error}); it is matched against layer names"
            ) from error
    return {str(condition): pattern for condition, pattern in ignore.items()}


def _check_condition(argument: str, condition: Any, rules: Sequence[Rule]) -> None:
    known = {condition.value for condition in Condition} | {str(rule.condition) for rule in rules}
    if not isinstance(condition, str) or str(condition) not in known:
        raise ValueError(
            f"{argument}: {str(condition)!r} is no condition; the conditions are {', '.join(sorted(known))}"
        )


def check_stop_on(stop_on: StopOn, rules: Sequence[Rule]) -> frozenset[str]:
    """Return the conditions that end a fit.

    Raises:
        TypeError: `stop_on` is neither a condition nor a sequence of them.
        ValueError: One of them is no condition.

    Example:
        >>> sorted(check_stop_on("exploding_gradients", ()))
        ['exploding_gradients']
    """
    if not isinstance(stop_on, (str, Iterable)):
        raise TypeError(f'stop_on must be a condition or several, got {stop_on!r}; e.g. stop_on="exploding_gradients"')
    conditions = [stop_on] if isinstance(stop_on, str) else list(stop_on)
    for condition in conditions:
        _check_condition("stop_on", condition, rules)
    return frozenset(map(str, conditions))
