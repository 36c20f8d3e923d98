"""Rules for what gradients tell over time, of NaN and Inf, and of gradients that never come."""

from __future__ import annotations

import math
from typing import Any

from lightning_gradhealth.ratios import median
from lightning_gradhealth.records import Condition, Severity, StepRecord, StepStats
from lightning_gradhealth.rules.base import (
    NOT_MEASURED,
    NotMeasured,
    Rule,
    Verdict,
    keep_last,
)


class ExplodingInTime(Rule):
    """The total gradient norm of an optimizer leaps by orders of magnitude.

    It is held against the median of the last finite norms, and against the run's first ones too: at the end
    of a run that has converged the median is tiny, and one hard batch is no explosion. What clipping has brought
    down counts as it was applied.
    """

    condition = Condition.EXPLODING_GRADIENTS

    def check(self, record: StepRecord) -> Verdict | NotMeasured | None:
        """Judge every step of the window, in order."""
        leaps: list[tuple[float, StepStats]] = []
        for step in record.window:
            recent = self.memory.setdefault(f"recent{step.optimizer}", [])
            early = self.memory.setdefault(f"early{step.optimizer}", [])
            norm = _norm_in_effect(step)
            if norm is None or not math.isfinite(norm):
                continue
            if len(recent) >= self.thresholds.time_warmup:
                usual = max(median(recent), median(early) / 100)
                factor = norm / usual if usual > 0 else 0.0
                if factor > self.thresholds.time_ratio:
                    leaps.append((factor, step))
            keep_last(recent, norm, self.thresholds.time_window)
            if len(early) < self.thresholds.growth_window:
                keep_last(early, norm, self.thresholds.growth_window)
        if not leaps:
            return None
        factor, step = max(leaps, key=lambda leap: leap[0])
        return Verdict(
            severity=Severity.CRITICAL,
            summary=f"the gradient norm leapt to {step.total_norm:.2g}, {factor:.1e} times its usual size",
            remedy=(
                'GradHealth(clip="adaptive"), a smaller learning rate or a warm-up of it; look at the batch of that'
                " step if it happened once"
            ),
            evidence={"total_norm": step.total_norm, "factor": factor},
            first_step=leaps[0][1].step,
        )


def _seen(module: str) -> str:
    """What a probe has seen first that is not finite, in words."""
    if not module or " " not in module:
        return f"the first output that is not finite is that of {module}" if module else ""
    return f"{module} is not finite already"


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
        before, now = median(early_norm), median(late_norm)
        start, loss = median(early_loss), median(late_loss)
        if now >= before / self.thresholds.time_ratio or loss <= start - self.thresholds.stalled_fall * abs(start):
            return None
        return Verdict(
            severity=Severity.WARNING,
            summary=f"the gradient norm has fallen from {before:.2g} to {now:.2g}, but the loss is still {loss:.3g}",
            remedy=(
                "a smaller learning rate and gh.init_weights(model, ...): units may be dead or saturated; LeakyReLU or"
                " ELU where ReLU units died"
            ),
            evidence={"norm_before": before, "norm_now": now, "loss_before": start, "loss_now": loss},
        )


class NonFinite(Rule):
    """NaN or Inf in a gradient, or in the loss: the exact step; the layers where it was not everywhere."""

    condition = Condition.NON_FINITE
    running = True  # the origin may be found at a later step

    def check(self, record: StepRecord) -> Verdict | NotMeasured | None:
        """Name the first step of the window with a NaN or Inf."""
        bad = []
        for step in record.window:
            skipped = self.memory.get("skipped", []) if step.overflow else []
            self.memory["skipped"] = [*skipped, step.step][: self.thresholds.overflow_steps] if step.overflow else []
            loss_is_bad = step.loss is not None and not math.isfinite(step.loss)
            if step.non_finite or loss_is_bad or len(self.memory["skipped"]) >= self.thresholds.overflow_steps:
                bad.append(step)
        if not bad:
            return None
        account = self.memory.get("account") or self._first_account(record, bad)
        self.memory["account"] = account
        account["steps"] += len(bad)
        account["skipped"] += sum(bool(step.skipped) for step in bad)
        for known in ("origin", "origin_unknown"):
            account[known] = account.get(known) or next((why for step in bad if (why := getattr(step, known))), "")
        origin, skipped = account["origin"] or account["seen"], account["skipped"]
        where = account["where"]
        if account["gradients"]:
            why = f" ({account['origin_unknown']})" if account["origin_unknown"] else ""
            unknown = f", origin unknown{why}" if why or not account["layers"] else ""
            where += f"; {origin}" if origin else unknown
        if skipped:
            where += f"; {skipped} of {account['steps']} such steps skipped"
        return Verdict(
            # a warning while no weight was touched
            severity=Severity.WARNING if skipped == account["steps"] else Severity.CRITICAL,
            summary=f"{account['what']} NaN or Inf{where}",
            remedy=(
                "a smaller learning rate or a warm-up, Trainer(gradient_clip_val=1.0); look for log(0), division by 0"
                " and bad values in the batch of that step: "
                + (
                    "Trainer(detect_anomaly=True) names the operation"
                    if origin or skipped
                    else 'GradHealth(on_non_finite="skip") keeps the weights and names the module'
                )
            ),
            layers=tuple(account["layers"]),
            evidence={
                "steps": account["steps"],
                "skipped": skipped,
                "layers_hit": account["layers_hit"],
                "loss": account["loss"],
                "origin": origin,
            },
            first_step=account["first"],
        )

    def _first_account(self, record: StepRecord, bad: list[StepStats]) -> dict[str, Any]:
        """What the first such steps show; the origin may be found later, and how many were skipped is counted on."""
        first = bad[0]
        steps = sum(step.non_finite for step in bad if step.optimizer == first.optimizer)
        watched = [layer for layer in record.layers if layer.optimizer == first.optimizer]
        # NaN stays and spreads: the layers hit at the first step are those hit at every one
        hit = [layer.name for layer in watched if layer.non_finite and layer.non_finite >= steps]
        everywhere = len(hit) in (0, len(watched))
        what, where = "the loss is", ""
        if first.non_finite:
            what = "gradients are"
            where = " in every layer" if everywhere else f" in {len(hit)} of {len(watched)} layers"
        elif first.overflow:
            what = f"the loss scaler has skipped {self.thresholds.overflow_steps} steps in a row: gradients are"
        seen = record.first_non_finite if first.step == record.step else ""  # one step later NaN is everywhere
        return {
            "what": what,
            "where": where,
            "gradients": first.non_finite,
            "layers": [] if everywhere else hit,
            "layers_hit": len(hit),
            "loss": first.loss,
            "first": self.memory["skipped"][0] if first.overflow else first.step,
            "steps": 0,
            "skipped": 0,
            "origin": "",
            "seen": _seen(seen),
        }


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
        return Verdict(
            severity=Severity.WARNING,
            summary=f"{len(names)} trainable parameters have had no gradient in {steps} steps ({', '.join(names[:3])})",
            remedy=(
                "use them in the forward pass, or leave them out: parameter.requires_grad_(False); a detach() or"
                " no_grad() on the way cuts them off too"
            ),
            layers=tuple(layer.name for layer in silent),
            evidence={"parameters": names, "steps": steps},
            first_step=min(since for la in silent if (since := la.no_gradient_since) is not None),
        )
