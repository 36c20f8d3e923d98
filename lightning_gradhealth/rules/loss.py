"""Rules for what the loss tells by itself: spikes, and that it does not come down."""

from __future__ import annotations

import math
from typing import Any

from lightning_gradhealth.ratios import median
from lightning_gradhealth.records import Condition, Severity, StepRecord
from lightning_gradhealth.rules.base import NOT_MEASURED, NotMeasured, Rule, Verdict, keep_last
from lightning_gradhealth.rules.course import follow_updates, followed_updates, mean_and_error, rounded
from lightning_gradhealth.rules.remedies import for_rate


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
        follow_updates(self, record)
        for step in record.window:
            keep_last(self.memory.setdefault("norms", []), step.total_norm, self.thresholds.time_window)
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
        norm = median(self.memory.get("norms", []))
        limit = rounded(norm) if 0.0 < norm <= self.thresholds.huge else 1.0
        clip, code = (
            f"Trainer(gradient_clip_val={limit:g}) keeps such a batch from doing harm",
            f'trainer_arguments["gradient_clip_val"] = {limit:g}',
        )
        updates = followed_updates(self)
        rate = for_rate(updates, f"; {clip}") if lasting and (updates is None or updates.fast) else None
        what = "see whether the data or the task changed at" if lasting else "look at the batch of"
        return Verdict(
            severity=Severity.WARNING if lasting else Severity.INFO,
            summary=f"the loss leapt to {loss:.3g} from a usual {usual:.3g}" + ("" if lasting else " for one step"),
            remedy=rate.words if rate else f"{what} that step (step {at}); {clip}",
            code=rate.code if rate else ("" if lasting else code),
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
        start, error_start = mean_and_error(early)
        now, error_now = mean_and_error(late)
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
