"""Rules for what gradients tell over time, of NaN and Inf, and of gradients that never come."""

from __future__ import annotations

import math
import re

from lightning_gradhealth.ratios import median
from lightning_gradhealth.records import Condition, Severity, StepRecord, StepStats
from lightning_gradhealth.rules.base import (
    NOT_MEASURED,
    NotMeasured,
    Rule,
    Verdict,
    keep_last,
    stepped_by,
)
from lightning_gradhealth.rules.course import Updates, follow_updates, followed_updates, mean_and_error
from lightning_gradhealth.rules.remedies import BOUND, Remedy, for_rate


class ExplodingInTime(Rule):
    """The total gradient norm of an optimizer leaps by orders of magnitude.

    It is held against the median of the last finite norms, and against the run's first ones too: at the end
    of a run that has converged the median is tiny, and one hard batch is no explosion. What clipping has brought
    down counts as it was applied.
    """

    condition = Condition.EXPLODING_GRADIENTS

    def check(self, record: StepRecord) -> Verdict | NotMeasured | None:
        """Judge every step of the window, in order."""
        follow_updates(self, record)
        leaps: list[tuple[float, StepStats]] = []
        for step in record.window:
            recent = self.memory.setdefault(f"recent{step.optimizer}", [])
            early = self.memory.setdefault(f"early{step.optimizer}", [])
            norm = _norm_in_effect(step)
            if norm is None or not math.isfinite(norm):
                continue
            if len(recent) >= self.thresholds.time_warmup:
                several = self.memory["several"] = self.memory.get("several", False) or step.optimizer > 0
                # one of several that play against each other, as in a GAN, may rest for long, and begin anew
                usual = max(median(recent), _level(early) / (10 if several else 100))
                factor = norm / usual if usual > 0 else 0.0
                if factor > self.thresholds.time_ratio:
                    leaps.append((factor, step))
            keep_last(recent, norm, self.thresholds.time_window)
            if len(early) < self.thresholds.growth_window:
                keep_last(early, norm, self.thresholds.growth_window)
        if not leaps:
            return None
        factor, step = max(leaps, key=lambda leap: leap[0])
        updates = followed_updates(self)
        remedy = Remedy(
            'GradHealth(clip="adaptive"), a smaller learning rate or a warm-up of it; look at the batch of that step'
            f" (step {leaps[0][1].step}) if it happened once",
            'health_arguments["clip"] = "adaptive"',
        )
        if updates is not None and self._steps_do_it(updates, leaps[0][1].step, lasting=len(leaps) >= 3):
            remedy = for_rate(updates, '; GradHealth(clip="adaptive")')
        if (usual := (step.total_norm or 0.0) / factor) > self.thresholds.huge:
            remedy = Remedy(
                f"a norm of {usual:.1e} was usual before, beyond any that trains: {BOUND}; then {remedy.words}"
            )
        return Verdict(
            severity=Severity.CRITICAL,
            summary=f"the gradient norm leapt to {step.total_norm:.2g}, {factor:.1e} times its usual size",
            remedy=remedy.words,
            code=remedy.code,
            evidence={"total_norm": step.total_norm, "factor": factor},
            first_step=leaps[0][1].step,
        )

    def _steps_do_it(self, updates: Updates, since: int, *, lasting: bool) -> bool:
        """Whether the steps are too large, and no bad batch is to blame: they were so before, or they stay so."""
        before = updates.largest > self.thresholds.update_repeated and updates.at < since
        return updates.largest > self.thresholds.update_at_once or before or (lasting and updates.fast)


def _level(early: list[float]) -> float:
    """The third largest of the first norms: they may die in the first steps already, and one or two may stand out."""
    return sorted(early)[-min(3, len(early))]


def _norm_in_effect(step: StepStats) -> float | None:
    """The norm that the session's clipping left; None where it was clipped by no single factor."""
    if not step.clipped or step.total_norm is None:
        return step.total_norm
    return None if step.clip_coefficient is None else step.total_norm * step.clip_coefficient


class VanishingInTime(Rule):
    """The gradients die away in every layer although the loss has not come down.

    Shrinking gradients alone are what convergence looks like; without a loss there is no verdict.
    """

    condition = Condition.VANISHING_GRADIENTS
    patience = 2

    def check(self, record: StepRecord) -> Verdict | NotMeasured | None:
        """Hold the recent norms and losses against the run's first ones."""
        follow_updates(self, record)
        size = self.thresholds.growth_window
        for step in record.window:
            for name, value in (("norm", step.total_norm), ("loss", step.loss)):
                early = self.memory.setdefault(f"early_{name}{step.optimizer}", [])
                if len(early) < size:
                    keep_last(early, value, size)
                else:
                    keep_last(self.memory.setdefault(f"late_{name}{step.optimizer}", []), value, size)
        numbers = {step.optimizer for step in record.window}
        answers = [self._judge_optimizer(record, number) for number in sorted(numbers)]
        verdicts = [answer for answer in answers if isinstance(answer, Verdict)]
        if verdicts:
            return verdicts[0]
        return None if None in answers else NOT_MEASURED

    def _judge_optimizer(self, record: StepRecord, number: int) -> Verdict | NotMeasured | None:
        early_norm, late_norm, early_loss, late_loss = (
            self.memory.get(f"{when}_{what}{number}", []) for what in ("norm", "loss") for when in ("early", "late")
        )
        if min(len(late_norm), len(late_loss)) < self.thresholds.growth_window:
            return NOT_MEASURED
        now, start, loss = median(late_norm), median(early_loss), median(late_loss)
        at_first = median(early_loss[:3])
        # it may all be over after the first step; where the loss fell at once, too, that was for the good
        fell_at_once = loss <= at_first - self.thresholds.stalled_fall * abs(at_first)
        before = _level(early_norm) if fell_at_once else max(early_norm)
        if now >= before / self.thresholds.time_ratio or self._has_fallen(early_loss, late_loss):
            return None
        remedy = for_rate(
            followed_updates(self), "; units may have died or saturated: LeakyReLU or ELU where ReLU units died"
        )
        return Verdict(
            severity=Severity.WARNING,
            summary=f"the gradient norm has fallen from {before:.2g} to {now:.2g}, but the loss is still {loss:.3g}",
            remedy=remedy.words,
            code=remedy.code,
            layers=stepped_by(record, {number}),
            evidence={"norm_before": before, "norm_now": now, "loss_before": start, "loss_now": loss},
        )

    def _has_fallen(self, early: list[float], late: list[float]) -> bool:
        """Whether the loss has come down, by much or, if little, beyond doubt: to where it converges."""
        if median(late) <= median(early) - self.thresholds.stalled_fall * abs(median(early)):
            return True
        (start, error_start), (now, error_now) = mean_and_error(early), mean_and_error(late)
        least = self.thresholds.learning_fall * abs(start)
        return start - now > max(2 * math.hypot(error_start, error_now), least)


class NoGradient(Rule):
    """Trainable parameters in the optimizer that have never had a gradient. Zero is a gradient, None is none."""

    condition = Condition.NO_GRADIENT

    def check(self, record: StepRecord) -> Verdict | NotMeasured | None:
        """Collect the parameters that have been without for long enough."""
        silent = [
            layer
            for layer in record.layers
            if layer.without_grad and layer.steps_without_grad >= self.thresholds.no_gradient_steps
        ]
        if not silent:
            return None
        names = [name for layer in silent for name in layer.without_grad]
        steps = max(layer.steps_without_grad for layer in silent)
        remedy = self._for_strangers(names) or Remedy(
            "use them in the forward pass, or leave them out: parameter.requires_grad_(False); a detach() or"
            " no_grad() on the way cuts them off too"
        )
        return Verdict(
            severity=Severity.WARNING,
            summary=f"{len(names)} trainable parameters have had no gradient in {steps} steps ({', '.join(names[:3])})",
            remedy=remedy.words,
            code=remedy.code,
            layers=tuple(layer.name for layer in silent),
            evidence={"parameters": names, "steps": steps},
            first_step=min(since for la in silent if (since := la.no_gradient_since) is not None),
        )

    def _for_strangers(self, names: list[str]) -> Remedy | None:
        """Parameters that an optimizer holds, but the model does not: they were replaced after it was made."""
        if not all(re.fullmatch(r"optimizer\d+\.\d+", name) for name in names):
            return None
        return Remedy(
            "the optimizer holds parameters that the model no longer has: make it after the last layer is in its"
            " place, optimizer = ...(model.parameters()), or give it the new ones",
            'optimizer.param_groups[0]["params"] = [p for p in model.parameters() if p.requires_grad]',
        )
