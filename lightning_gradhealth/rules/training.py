"""Rules for what weights, updates and the loss tell."""

from __future__ import annotations

import math
import sys
from collections.abc import Collection
from typing import Any

from lightning_gradhealth.ratios import median
from lightning_gradhealth.records import Condition, LayerStats, Severity, StepRecord
from lightning_gradhealth.rules.base import (
    NOT_MEASURED,
    NotMeasured,
    Rule,
    Thresholds,
    Verdict,
    by_optimizer,
    follow_loss,
    followed_losses,
    keep_last,
)


def _measured_updates(layers: list[LayerStats]) -> list[tuple[LayerStats, float]]:
    return [
        (layer, layer.update_to_weight)
        for layer in layers
        if layer.update_to_weight is not None and math.isfinite(layer.update_to_weight)
    ]


def zero_born(rule: Rule, record: StepRecord) -> set[str]:
    """Layers that started at zero not long ago: their weights are a few updates, and so no measure of one.

    Args:
        rule: The rule in whose memory it is kept when a layer was at zero.
        record: The record at hand.
    """
    born = rule.memory.setdefault("zero_at", {})
    for layer in record.layers:
        if layer.weight_norm == 0.0:
            born[layer.name] = record.step
    return {name for name, step in born.items() if record.step - step < rule.thresholds.growth_window}


class OversizedUpdates(Rule):
    """Updates that are large beside the weights: one step replaces what was learned ("avalanche learning").

    Weights that start at zero, as LoRA's B or a zeroed head, are left alone at first.
    """

    condition = Condition.OVERSIZED_UPDATES

    def check(self, record: StepRecord) -> Verdict | NotMeasured | None:
        """Judge the updates of every optimizer; two probes in a row for those that are merely large."""
        young = zero_born(self, record)
        chains = [
            chain
            for layers in by_optimizer(record)
            if (chain := _measured_updates([layer for layer in layers if layer.name not in young]))
        ]
        if not chains:
            return NOT_MEASURED
        first_probe = not self.memory.get("probed", False)
        self.memory["probed"] = True
        at_once = [(chain, hit) for chain in chains if (hit := self._over(chain, self.thresholds.update_at_once))]
        shrinking = self._shrinking(record)  # what weight decay takes away makes no step too large
        limit = self.thresholds.update_repeated
        large = [(chain, hit) for chain in chains if (hit := self._over(chain, limit, but=shrinking))]
        since = self.memory.get("large_since")
        self.memory["large_since"] = None if first_probe or not large else (record.step if since is None else since)
        if not at_once and (not large or since is None):
            return None
        chain, hit = (at_once or large)[0]
        size = median(value for layer, value in chain if layer.name in hit)
        rates = (layer.learning_rate for layer, _ in chain if layer.learning_rate is not None)
        return Verdict(
            severity=Severity.CRITICAL if at_once else Severity.WARNING,
            summary=f"one step changes the weights of {len(hit)} of {len(chain)} layers by {size:.2g} of their size",
            remedy="divide the learning rate by 10 or more, and warm it up: near 1e-3 of the weights is usual",
            layers=tuple(hit),
            evidence={"update_to_weight_median": size, "learning_rate": max(rates, default=None)},
            first_step=None if at_once else since,
        )

    def _shrinking(self, record: StepRecord) -> set[str]:
        """Layers whose weights are smaller than at the probe before."""
        known = self.memory.setdefault("norms", {})
        norms = {layer.name: layer.weight_norm for layer in record.layers if layer.weight_norm is not None}
        found = {name for name, norm in norms.items() if norm < 0.9 * known.get(name, 0.0)}
        known.update(norms)
        return found

    def _over(self, chain: list[tuple[LayerStats, float]], limit: float, but: Collection[str] = ()) -> list[str]:
        """Names of the layers beyond `limit`, if they are as many as it takes of all."""
        hit = [layer.name for layer, value in chain if value > limit and layer.name not in but]
        return hit if hit and len(hit) >= self.thresholds.update_share * len(chain) else []


class StalledLayers(Rule):
    """Layers that hardly change while others of the same optimizer do, or a whole network that never has."""

    condition = Condition.STALLED_LAYERS
    per_layer = True

    def __init__(self, thresholds: Thresholds | None = None) -> None:
        super().__init__(thresholds)
        self.patience = self.thresholds.stalled_probes

    def check(self, record: StepRecord) -> Verdict | NotMeasured | None:
        """Compare the updates of the layers of each optimizer."""
        chains = [
            chain
            for layers in by_optimizer(record)
            if (chain := _measured_updates([layer for layer in layers if not layer.cancelled]))
        ]
        if not chains:
            return NOT_MEASURED
        # who grows cannot be told in the first steps
        first = self.memory.setdefault("first", record.step)
        is_early = record.step - first < self.thresholds.growth_window
        self.patience = sys.maxsize if is_early else self.thresholds.stalled_probes
        if standstill := self._standstill(chains):
            return standstill
        young, growing = zero_born(self, record), self._growing(record)
        stalled: list[LayerStats] = []
        fastest = 0.0
        slowed = True
        for chain in chains:
            # weights that have just left zero change by much of their size: no yardstick for others
            top = max((value for layer, value in chain if layer.name not in young), default=0.0)
            slow = [la for la, value in chain if value < self.thresholds.stalled_update and la.name not in growing]
            if top > self.thresholds.moving_update and slow:
                stalled += slow
                fastest = max(fastest, top)
                slowed = slowed and all(_deliberate(layer.learning_rate, _top_rate(chain)) for layer in slow)
        if not stalled:
            return None
        return Verdict(
            severity=Severity.INFO if slowed else Severity.WARNING,
            summary=(
                f"{len(stalled)} layers change by less than {self.thresholds.stalled_update:g} of their size a step,"
                f" another by {fastest:.2g}" + (": their learning rate is set much lower" if slowed else "")
            ),
            remedy=(
                "nothing, if that is what their learning rate is for"
                if slowed
                else "see what keeps the gradient from them (vanishing gradients, dead units) and whether their"
                " parameter group has a learning rate; gh.init_weights(model, ...) if they never learned"
            ),
            layers=tuple(layer.name for layer in stalled),
            evidence={"fastest_update_to_weight": fastest},
        )

    def _growing(self, record: StepRecord) -> set[str]:
        """Layers whose updates grow by half and more in some ten steps, as behind branches that start at zero."""
        tracks = self.memory.setdefault("tracks", {})
        span, found = self.thresholds.growth_window / 2, set()
        for layer, value in _measured_updates(list(record.layers)):
            track = tracks.setdefault(layer.name, [])
            before = [past for step, past in track if record.step - step >= span]
            if before and value > 1.5 * before[-1]:
                found.add(layer.name)
            if not track or record.step - track[-1][0] >= span:
                track.append([record.step, value])
                del track[:-3]
        return found

    def _standstill(self, chains: list[list[tuple[LayerStats, float]]]) -> Verdict | None:
        """No layer has ever moved, although the learning rate does not rise any more."""
        top = max(value for chain in chains for _, value in chain)
        rate = max((rate for chain in chains if (rate := _top_rate(chain)) is not None), default=0.0)
        rising = rate > self.memory.get("rate", 0.0)
        self.memory["rate"] = rate
        self.memory["moved"] = self.memory.get("moved", False) or top >= self.thresholds.stalled_update
        if self.memory["moved"] or rising:
            return None
        return Verdict(
            severity=Severity.WARNING,
            summary=f"no layer has ever changed by more than {top:.1g} of its size in a step",
            remedy="a larger learning rate: near 1e-3 of the weights a step is usual (the Tuner's lr_find finds one)",
            layers=tuple(layer.name for chain in chains for layer, _ in chain),
            evidence={"fastest_update_to_weight": top, "learning_rate": rate},
        )


def _top_rate(chain: list[tuple[LayerStats, float]]) -> float | None:
    return max((layer.learning_rate for layer, _ in chain if layer.learning_rate is not None), default=None)


def _deliberate(rate: float | None, largest: float | None) -> bool:
    """A layer's rate is far below the largest, but not zero: somebody wants it slow."""
    return rate is not None and largest is not None and 0.0 < rate <= largest / 10


class _WeightDrift(Rule):
    """Weight norms that change by a factor in every window of steps, and do not slow down.

    For each layer the memory holds the norms at the borders of the windows; a border is set at the first probe
    that is `growth_window` steps or more after the last one.
    """

    sign: int
    course: str
    remedy: str

    def check(self, record: StepRecord) -> Verdict | NotMeasured | None:
        """Advance the windows of every layer that was probed."""
        follow_loss(self, record)
        drifting: dict[str, float] = {}
        seen = False
        norms = [(la.weight_norm, la.numel or 1) for la in record.layers if la.weight_norm and not la.frozen]
        usual = median(norm / math.sqrt(numel) for norm, numel in norms)
        for layer in record.layers:
            norm = layer.weight_norm
            if layer.frozen or layer.vectors or norm is None or not math.isfinite(norm) or norm <= 0.0:
                continue
            seen = True
            track = self.memory.setdefault(layer.name, {"borders": [], "greatest": norm})
            track["greatest"] = max(track["greatest"], norm)
            borders = track["borders"]
            if self.sign > 0 and norm / math.sqrt(layer.numel or 1) < usual:
                borders.clear()  # it only grows up to the size of the others
                continue
            if not borders or record.step - borders[-1][0] >= self.thresholds.growth_window:
                borders.append([record.step, norm])
                del borders[: -(self.thresholds.growth_windows + 1)]
            far = self.sign > 0 or norm < self.thresholds.collapsed * track["greatest"]
            if far and self._drifts(borders):
                drifting[layer.name] = (borders[-1][1] / borders[0][1]) ** (1 / (borders[-1][0] - borders[0][0]))
        if not drifting:
            return None if seen else NOT_MEASURED
        factor = max(drifting.values(), key=lambda value: abs(math.log(value)))
        return Verdict(
            severity=Severity.INFO if self.sign > 0 and self._has_learned() else Severity.WARNING,
            summary=f"the weights {self.course}, by {100 * abs(factor - 1):.2g} % a step",
            remedy=self.remedy,
            layers=tuple(drifting),
            evidence={"factor_per_step": factor},
        )

    def _has_learned(self) -> bool:
        """The loss has halved, and not below zero, as it does where the wrong way is taken on purpose."""
        early, late = followed_losses(self)
        enough = len(late) >= self.thresholds.growth_window
        return enough and 0.0 <= median(late) < 0.5 * median(early)

    def _drifts(self, borders: list[list[float]]) -> bool:
        """Whether every window has the factor and none is much slower than the one before it."""
        if len(borders) <= self.thresholds.growth_windows:
            return False
        pairs = list(zip(borders, borders[1:], strict=False))
        moves = [self.sign * math.log(after[1] / before[1]) for before, after in pairs]
        rates = [move / (after[0] - before[0]) for move, (before, after) in zip(moves, pairs, strict=True)]
        fast = all(move >= math.log(self.thresholds.growth) for move in moves)
        return fast and all(late >= 0.8 * early for early, late in zip(rates, rates[1:], strict=False))


class GrowingWeights(_WeightDrift):
    """Weight norms that grow exponentially. Growth from zero up to the size of other layers is healthy."""

    condition = Condition.GROWING_WEIGHTS
    sign = 1
    course = "grow exponentially"
    remedy = "check the sign of the loss; a smaller learning rate, weight decay (AdamW), a normalisation layer"


class CollapsingWeights(_WeightDrift):
    """Weight norms that halve again and again and have lost most of their size."""

    condition = Condition.COLLAPSING_WEIGHTS
    sign = -1
    course = "shrink towards zero"
    remedy = "lower weight_decay: rate x decay is the share of every weight that is lost at each step"


class LossSpike(Rule):
    """A loss far above the recent ones, of one optimizer's steps.

    It must be so by three measures on the linear scale, and besides far out on the logarithmic one, too, since
    near convergence the losses of single batches spread over orders of magnitude, or above all that was seen
    before. Where three of five losses are high, it is a warning. Alone, it is an info: a hard batch or a wrong
    label does that; and where it happens again and again, as with a rare class, that is how this loss is.
    Several optimizers, as in a GAN, play their losses against each other: no more than an info.
    """

    condition = Condition.LOSS_SPIKE

    def check(self, record: StepRecord) -> Verdict | NotMeasured | None:
        """Judge every loss of the window, in order; the gravest and then the highest spike counts."""
        losses = [(step, step.loss) for step in record.window if step.loss is not None]
        if not losses:
            return NOT_MEASURED
        spikes: list[tuple[bool, float, int, float]] = []
        several = self.memory["several"] = self.memory.get("several", False) or any(s.optimizer for s, _ in losses)
        for step, loss in losses:
            if math.isnan(loss):
                continue
            seen = self.memory.setdefault(
                f"of{step.optimizer}", {"steps": 0, "early": [], "recent": [], "high": [], "alone": []}
            )
            seen["steps"] += 1
            if len(seen["early"]) < self.thresholds.growth_window:
                keep_last(seen["early"], loss, self.thresholds.growth_window)
            else:
                high, far = self._judge_loss(loss, seen["early"], seen["recent"])
                seen["high"] = [*seen["high"][-4:], high]
                lasting = not several and sum(seen["high"]) >= 3
                if far and (lasting or not self._recurs(seen)):
                    spikes.append((lasting, loss, step.step, median(seen["recent"])))
            keep_last(seen["recent"], loss, self.thresholds.time_window)
        if not spikes:
            return None
        lasting, loss, at, usual = max(spikes)
        return Verdict(
            severity=Severity.WARNING if lasting else Severity.INFO,
            summary=f"the loss leapt to {loss:.3g} from a usual {usual:.3g}" + ("" if lasting else " for one step"),
            remedy="look at the batch of that step; Trainer(gradient_clip_val=1.0), a smaller learning rate",
            evidence={"loss": loss, "median": usual},
            first_step=at,
        )

    def _judge_loss(self, loss: float, early: list[float], recent: list[float]) -> tuple[bool, bool]:
        """Whether a loss is high on the linear scale, and whether it is so on both or beyond all that was seen."""
        usual, sigma = _centre_and_spread(recent)
        limit = max(
            self.thresholds.spike_sigmas * sigma,
            (self.thresholds.spike_median - 1) * abs(usual),
            self.thresholds.spike_fall * (max(early) - min(recent)),
            0.0,
        )
        if loss - usual <= limit:
            return False, False
        if min(recent) <= 0.0 or loss > max(*early, *(2 * value for value in recent[:-4])):
            return True, True
        logs = [math.log(value) for value in recent]
        noise = _centre_and_spread([b - a for a, b in zip(logs, logs[1:], strict=False)])[1] / math.sqrt(2)
        above = math.log(loss) - median(logs[-self.thresholds.growth_window :])
        return True, above > self.thresholds.spike_log_sigmas * noise

    def _recurs(self, seen: dict[str, Any]) -> bool:
        """Whether such losses keep coming one by one; the one at hand is counted in."""
        horizon = seen["steps"] - 10 * self.thresholds.time_window
        before = [step for step in seen["alone"] if step > horizon]
        seen["alone"] = [*before, seen["steps"]][-self.thresholds.spike_recurs :]
        return len(before) >= self.thresholds.spike_recurs


def _centre_and_spread(values: list[float]) -> tuple[float, float]:
    """Median, and the standard deviation that the median absolute deviation stands for."""
    centre = median(values)
    return centre, 1.4826 * median(abs(value - centre) for value in values)


class StalledLoss(Rule):
    """A loss that has not come down since the start, noise allowed for, at a rate that has stopped rising.

    On its own this is an info: a model that had converged before, or a task that is mostly noise, looks the
    same. Several optimizers, as in a GAN, play their losses against each other: no verdict.
    """

    condition = Condition.STALLED_LOSS
    patience = 2
    needs_support = True

    def check(self, record: StepRecord) -> Verdict | NotMeasured | None:
        """Hold the mean of the recent losses, with its error, against that of the first ones."""
        early: list[float] = self.memory.setdefault("early", [])
        late: list[float] = self.memory.setdefault("late", [])
        for step in record.window:
            self.memory["several"] = self.memory.get("several", False) or step.optimizer != 0
            if step.loss is None:
                continue
            if step.learning_rate is not None and step.learning_rate > self.memory.get("rate", 0.0):
                self.memory["rate"] = step.learning_rate
                self.memory["steps"] = 0
            self.memory["steps"] = self.memory.get("steps", 0) + 1
            if len(early) < self.thresholds.growth_window:
                keep_last(early, step.loss, self.thresholds.growth_window)
            else:
                keep_last(late, step.loss, self.thresholds.time_window)
        enough = self.memory.get("steps", 0) >= self.thresholds.stalled_steps
        if self.memory.get("several", False) or not enough or len(late) < self.thresholds.growth_window:
            return NOT_MEASURED
        start, error_start = _mean_and_error(early)
        now, error_now = _mean_and_error(late)
        error = 2 * math.hypot(error_start, error_now)
        self.memory["best"] = max(self.memory.get("best", -math.inf), start - now + error)
        if self.memory["best"] >= self.thresholds.stalled_fall * abs(start):
            return None
        if start - now > max(error, self.thresholds.learning_fall * abs(start)):
            return None  # slowly, but beyond doubt
        return Verdict(
            severity=Severity.WARNING,
            summary=f"the loss has not come down from {start:.3g} in {self.memory['steps']} steps (now {now:.3g})",
            remedy=(
                "see the other findings first: vanishing gradients, stalled layers, oversized updates; else another"
                " learning rate (the Tuner's lr_find), and check that targets and loss belong together"
            ),
            evidence={"loss_at_start": start, "loss_now": now, "fall_upper_bound": start - now + error},
            first_step=max(0, record.step - self.memory["steps"] + 1),
        )


def _mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean and its standard error."""
    mean = math.fsum(values) / len(values)
    variance = math.fsum((value - mean) ** 2 for value in values) / max(1, len(values) - 1)
    return mean, math.sqrt(variance / len(values))
