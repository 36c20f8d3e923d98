"""What a rule remembers of the course of a run: its losses, and how far its steps have moved the weights."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from lightning_gradhealth.ratios import median
from lightning_gradhealth.records import StepRecord, StepStats
from lightning_gradhealth.rules.base import Rule, keep_last

USUAL_UPDATE = 1e-3  # |dw| / |w| of a step at a rate that trains: what most recipes come to
LEAST_CUT = 0.1  # a rate that breaks a run is cut to a tenth at least


# --- the loss ----------------------------------------------------------------------------------------------


def follow_loss(rule: Rule, record: StepRecord) -> None:
    """Keep the run's first losses and its latest ones, `growth_window` of each, in the memory of a rule.

    Args:
        rule: The rule.
        record: The record at hand.
    """
    size = rule.thresholds.growth_window
    early, late = followed_losses(rule)
    for step in record.window:
        keep_last(early if len(early) < size else late, step.loss, size)


def followed_losses(rule: Rule) -> tuple[list[float], list[float]]:
    """The first losses and the latest ones that `follow_loss` has kept.

    Args:
        rule: The rule.

    Example:
        >>> followed_losses(Rule())
        ([], [])
    """
    # no layer is called like that: rules keep what they know of layers by name
    kept = rule.memory.setdefault("the loss", {"early": [], "late": []})
    return kept["early"], kept["late"]


def has_learned(rule: Rule, left: float = 0.5) -> bool:
    """Whether the loss has come down to a share of what it was at the start, beyond doubt.

    Args:
        rule: The rule, which follows the loss.
        left: The share that is left, or less.
    """
    early, late = followed_losses(rule)
    if len(late) < rule.thresholds.growth_window:
        return False
    before, now = median(early), median(late)
    return now < before - (1.0 - left) * abs(before)


def is_learning(rule: Rule) -> bool:
    """Whether the loss has come down by more than noise explains, and by more than a loss that is stalled does.

    Args:
        rule: The rule, which follows the loss.
    """
    early, late = followed_losses(rule)
    if len(late) < rule.thresholds.growth_window:
        return False
    (start, error_start), (now, error_now) = mean_and_error(early), mean_and_error(late)
    return start - now > max(2 * math.hypot(error_start, error_now), rule.thresholds.stalled_fall * abs(start))


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error.

    Example:
        >>> mean_and_error([1.0, 3.0])
        (2.0, 1.0)
    """
    mean = math.fsum(values) / len(values)
    variance = math.fsum((value - mean) ** 2 for value in values) / max(1, len(values) - 1)
    return mean, math.sqrt(variance / len(values))


# --- the updates -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Updates:
    """How far the steps of a run have moved the weights; of each probed step the median over the layers.

    Attributes:
        first: The first one that was not 0.
        first_rate: The learning rate of that step (None: not known).
        largest: The largest one.
        at: The loggers' x value of that step.
        rate: The largest learning rate so far (None: not known).
        optimizer: Number of the optimizer that takes these steps, where there are several.
        clipped: Something clips the gradients already, be it the Trainer or the session.
        scheduled: A schedule sets the learning rate.
    """

    first: float
    first_rate: float | None
    largest: float
    at: int
    rate: float | None
    optimizer: int | None = None
    clipped: bool = False
    scheduled: bool = False

    @property
    def share(self) -> float:
        """The share of the weights by which a step moves them while they are sound, at the largest rate so far.

        By the first step, as the gradients of later ones may have exploded already.

        Example:
            >>> Updates(0.01, 1e-4, 0.1, 40, 1e-3).share
            0.1
        """
        return self.first * self.rate / self.first_rate if self.first_rate and self.rate else self.first

    @property
    def fast(self) -> bool:
        """Whether the rate is beyond what is usual, so that it may be the cause of what happens.

        Example:
            >>> Updates(0.5, 0.1, 8.5e4, 3, 0.1).fast, Updates(0.002, 0.1, 0.003, 3, 0.1).fast
            (True, False)
        """
        return self.share > 5 * USUAL_UPDATE or self.largest > 1.0

    @property
    def unscaled(self) -> bool:
        """Whether steps replace the weights though the rate is small: the loss must be large, as of raw targets.

        Example:
            >>> Updates(160.0, 0.01, 160.0, 0, 0.01).unscaled, Updates(8.2, 1.0, 8.2, 0, 1.0).unscaled
            (True, False)
        """
        return self.first > 1.0 and self.first_rate is not None and self.first_rate <= 0.1

    @property
    def factor(self) -> float:
        """What the learning rate should be multiplied by so that a step moves the weights by the usual share.

        Example:
            >>> Updates(0.5, 0.1, 8.5e4, 3, 0.1).factor
            0.002
        """
        return rounded(min(LEAST_CUT, USUAL_UPDATE / self.share))


def follow_updates(rule: Rule, record: StepRecord) -> None:
    """Keep how far each optimizer has moved its weights in the memory of a rule, and whether something clips.

    Args:
        rule: The rule.
        record: The record at hand.
    """
    rule.memory["clipped"] = rule.memory.get("clipped", False) or any(_is_clipped(step) for step in record.window)
    follow_schedules(rule, record)
    moved = [layer for layer in record.layers if not layer.frozen]
    for number in sorted({layer.optimizer or 0 for layer in moved}):
        layers = [layer for layer in moved if (layer.optimizer or 0) == number]
        values = [value for la in layers if (value := la.update_to_weight) is not None and math.isfinite(value)]
        size = median(values)
        if not size > 0.0:
            continue
        rate = max((layer.learning_rate for layer in layers if layer.learning_rate is not None), default=None)
        kept = rule.memory.setdefault("the updates", {}).setdefault(str(number), [size, rate, size, record.step, rate])
        if size > kept[2]:
            kept[2:4] = [size, record.step]
        if rate is not None:
            kept[4] = max(rate, kept[4] or 0.0)


def follow_schedules(rule: Rule, record: StepRecord) -> None:
    """Keep which optimizers have their rate set by a schedule in the memory of a rule.

    Args:
        rule: The rule.
        record: The record at hand.
    """
    if found := sorted(each.optimizer for each in record.optimizers if each.scheduled):
        rule.memory["scheduled"] = found


def is_scheduled(rule: Rule) -> bool:
    """Whether a schedule sets a learning rate.

    Args:
        rule: The rule, which follows the schedules or the updates.

    Example:
        >>> is_scheduled(Rule())
        False
    """
    return bool(rule.memory.get("scheduled"))


def _is_clipped(step: StepStats) -> bool:
    """Whether the optimizer was given less than there was."""
    norm, applied = step.total_norm, step.applied_norm
    return bool(step.clipped) or (norm is not None and applied is not None and applied < 0.99 * norm)


def followed_updates(rule: Rule) -> Updates | None:
    """What `follow_updates` has kept of the optimizer that moves its weights the most; None where none was measured.

    Args:
        rule: The rule.
    """
    kept = rule.memory.get("the updates", {})
    several, clipped = len(kept) > 1, bool(rule.memory.get("clipped", False))
    scheduled = rule.memory.get("scheduled", [])
    known = [
        Updates(
            first, first_rate, largest, at, rate, int(number) if several else None, clipped, int(number) in scheduled
        )
        for number, (first, first_rate, largest, at, rate) in kept.items()
    ]
    return max(known, key=lambda updates: max(updates.share, updates.largest), default=None)


def follow_weights(rule: Rule, record: StepRecord) -> None:
    """Keep the size that the weights of each layer had when they were first seen in the memory of a rule.

    Args:
        rule: The rule.
        record: The record at hand.
    """
    known = rule.memory.setdefault("the first weights", {})
    for layer in record.layers:
        if layer.matrix_rms is not None and layer.matrix_rms > 0.0:
            known.setdefault(layer.name, layer.matrix_rms)


def shrunken(rule: Rule, record: StepRecord, layers: Collection[str]) -> bool:
    """Whether the weights of most of some layers have come down to less than half of what they were at first.

    Args:
        rule: The rule, which follows the weights.
        record: The record at hand.
        layers: The layers.
    """
    known = rule.memory.get("the first weights", {})
    shares = [
        layer.matrix_rms / known[layer.name]
        for layer in record.layers
        if layer.name in layers and layer.name in known and layer.matrix_rms is not None
    ]
    return median(shares) < 0.5


def rounded(value: float) -> float:
    """A number with one digit, that of a positive one which is not larger.

    Example:
        >>> rounded(0.00279), rounded(20.0)
        (0.002, 20.0)
    """
    power = math.floor(math.log10(value) + 1e-9)
    return float(f"{math.floor(value / 10.0**power + 1e-9)}e{power}")
