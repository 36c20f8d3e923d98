"""The rule on NaN and Inf: the exact step, where it began, and whether it came out of the blue or after a growth."""

from __future__ import annotations

import math
from typing import Any

from lightning_gradhealth.ratios import median
from lightning_gradhealth.records import Condition, Severity, StepRecord, StepStats
from lightning_gradhealth.rules.base import NotMeasured, Rule, Verdict, keep_last
from lightning_gradhealth.rules.course import follow_updates, followed_updates, is_scheduled, rounded
from lightning_gradhealth.rules.remedies import Remedy, at_rate, for_rate

KEPT = 20  # norms and losses before the first NaN: enough to tell a growth from noise
LOOK = "log(0), 0/0, sqrt(0), exp() of large values, or bad rows in the batch of step"


class NonFinite(Rule):
    """NaN or Inf in a gradient, or in the loss: the exact step; the layers where it was not everywhere."""

    condition = Condition.NON_FINITE
    running = True  # the origin may be found at a later step

    def check(self, record: StepRecord) -> Verdict | NotMeasured | None:
        """Name the first step of the window with a NaN or Inf."""
        follow_updates(self, record)
        bad = []
        for step in record.window:
            row = self._skipped_in_a_row(step)
            loss_is_bad = step.loss is not None and not math.isfinite(step.loss)
            if step.non_finite or loss_is_bad or row >= self.thresholds.overflow_steps:
                bad.append(step)
            else:
                self._follow(step)
        if not bad:
            return None
        account = self.memory.get("account")
        first = next((step for step in bad if step.non_finite or step.overflow), bad[0])
        if not account or (not account["gradients"] and (first.non_finite or first.overflow)):
            account = self.memory["account"] = self._first_account(record, bad, first)
        account["steps"] += len(bad)
        account["skipped"] += sum(bool(step.skipped) for step in bad)
        account["scaled"] += sum((step.scaled and step.non_finite) or step.overflow for step in bad)
        for known in ("origin", "origin_unknown"):
            account[known] = account[known] or next((why for step in bad if (why := getattr(step, known))), "")
        return self._verdict(account)

    def _verdict(self, account: dict[str, Any]) -> Verdict:
        origin, skipped = account["origin"] or account["seen"], account["skipped"]
        where = account["where"]
        if account["gradients"]:
            why = f" ({account['origin_unknown']})" if account["origin_unknown"] else ""
            unknown = f", origin unknown{why}" if why or not account["layers"] else ""
            where += f"; {origin}" if origin else unknown
        if skipped:
            where += f"; {skipped} of {account['steps']} such steps skipped"
        remedy = self._remedy(account, origin)
        forever = self._streak()[1] >= self.thresholds.overflow_steps
        # a warning while no weight was touched
        untouched = skipped == account["steps"] or not account["gradients"] or account["scaled"] == account["steps"]
        return Verdict(
            severity=Severity.WARNING if untouched and not forever else Severity.CRITICAL,
            summary=f"{self._what(account)} NaN or Inf{where}",
            remedy=remedy.words,
            code=remedy.code,
            layers=tuple(account["layers"]),
            evidence={
                "steps": account["steps"],
                "skipped": skipped,
                "layers_hit": account["layers_hit"],
                "loss": account["loss"],
                "origin": origin,
                "norm_before": account["norm"],
                "norm_usual": account["usual"],
            },
            first_step=account["first"],
        )

    # --- what comes before ---

    def _streak(self) -> list[int]:
        """First step and number of the steps in a row that the loss scaler has skipped."""
        streak: list[int] = self.memory.setdefault("streak", [0, 0])
        return streak

    def _skipped_in_a_row(self, step: StepStats) -> int:
        streak = self._streak()
        if not (step.overflow or (step.scaled and step.non_finite)):
            streak[:] = [0, 0]
            return 0
        streak[:] = [streak[0] if streak[1] else step.step, streak[1] + 1]
        return streak[1]

    def _follow(self, step: StepStats) -> None:
        for name, value in (("norms", step.total_norm), ("losses", step.loss)):
            keep_last(self.memory.setdefault(f"{name}{step.optimizer}", []), value, KEPT)

    def _course(self, optimizer: int) -> str:
        """How the steps before went: "first" (there were none), "calm", "grown" or "huge"."""
        norms, losses = (self.memory.get(f"{name}{optimizer}", []) for name in ("norms", "losses"))
        updates = followed_updates(self)
        if _grew(norms, self.thresholds.grown) or _grew(losses, self.thresholds.grown):
            return "grown"
        if updates is not None and updates.largest > self.thresholds.update_at_once:
            return "grown"
        if max(norms[-3:], default=0.0) > self.thresholds.huge:
            return "huge"
        return "calm" if norms else "first"

    # --- what is said ---

    def _first_account(self, record: StepRecord, bad: list[StepStats], first: StepStats) -> dict[str, Any]:
        """What the first such steps show; the origin may be found later, and how many were skipped is counted on."""
        steps = sum(step.non_finite for step in bad if step.optimizer == first.optimizer)
        watched = [layer for layer in record.layers if layer.optimizer == first.optimizer]
        # NaN stays and spreads: the layers hit at the first step are those hit at every one
        hit = [layer.name for layer in watched if layer.non_finite and layer.non_finite >= steps]
        everywhere = len(hit) in (0, len(watched))
        where = ""
        if first.non_finite:
            where = " in every layer" if everywhere else f" in {len(hit)} of {len(watched)} layers"
        elif not first.overflow:
            where = " while the gradients are finite: the weights are sound"
        seen = record.first_non_finite if first.step == record.step else ""  # one step later NaN is everywhere
        norms = self.memory.get(f"norms{first.optimizer}", [])
        return {
            "where": where,
            "gradients": first.non_finite or first.overflow,
            "layers": [] if everywhere else hit,
            "layers_hit": len(hit),
            "loss": first.loss,
            "first": self._streak()[0] if first.overflow else first.step,
            "at": first.step,
            "course": self._course(first.optimizer),
            "norm": norms[-1] if norms else None,
            "usual": median(norms) if norms else None,
            "steps": 0,
            "skipped": 0,
            "scaled": 0,
            "origin": "",
            "origin_unknown": "",
            "seen": _seen(seen),
        }

    def _what(self, account: dict[str, Any]) -> str:
        if not account["gradients"]:
            return "the loss is"
        row = self._streak()[1]
        if row < self.thresholds.overflow_steps:
            return "gradients are"
        loss = account["loss"]
        of_loss = "" if loss is None else f", at a loss of {loss:.3g}"
        return f"the loss scaler has skipped {row} steps in a row{of_loss}, so that nothing is learned: gradients are"

    def _remedy(self, account: dict[str, Any], origin: str) -> Remedy:
        loss, step = account["loss"], account["at"]
        loss_is_bad = loss is not None and not math.isfinite(loss)
        if not account["gradients"]:
            return Remedy(
                "a mean over nothing is 0/0, as where all labels of a batch are ignored: in the loss, reduction="
                '"sum" divided by max(count, 1); or skip such a batch (return None from training_step). Else look for'
                f" {LOOK} {step}"
            )
        if self._streak()[1] >= self.thresholds.overflow_steps:
            if loss_is_bad:
                return Remedy(
                    f"the loss itself is {loss}, so that no scale helps: look in the loss and the forward pass for"
                    f" {LOOK} {step}; divide by max(count, 1)"
                )
            return Remedy(
                "no scale helps, as the loss is finite and its gradient is not: look in the backward pass for sqrt(0),"
                " log(0), 0/0 and norms of zeros (torch.autograd.set_detect_anomaly(True) names the operation), and add"
                f" an epsilon, sqrt(x + eps); or for bad rows in the batch of step {step}; in float16, for 1e10 and the"
                ' like, as in masks, which precision="bf16-mixed" can hold'
            )
        if account["course"] in ("grown", "huge"):
            return self._after_growth(account)
        return self._out_of_the_blue(account, origin)

    def _after_growth(self, account: dict[str, Any]) -> Remedy:
        norm, usual = account["norm"], account["usual"]
        limit = rounded(usual) if usual and usual < 1e3 else 1.0  # one that large is itself a part of the explosion
        if account["course"] == "huge":
            clip = "scale inputs and targets to mean 0 and variance 1, and bound what goes into exp() (clamp)"
            return Remedy(
                f"the gradient norm was {norm:.2g} before it, beyond any that trains: {clip}; a smaller learning rate"
                f" with a warm-up; Trainer(gradient_clip_val={limit:g})",
                at_rate("*", 0.1, scheduled=is_scheduled(self))
                + f'\ntrainer_arguments["gradient_clip_val"] = {limit:g}',
            )
        updates = followed_updates(self)
        rate = for_rate(updates)
        before = f"the gradients had grown before it (norm {norm:.2g}): " if norm is not None else ""
        if updates is not None and updates.clipped:  # and that was not enough
            return Remedy(before + rate.words, rate.code)
        return Remedy(
            f"{before}{rate.words}; Trainer(gradient_clip_val={limit:g}) clips by norm",
            f'{rate.code}\ntrainer_arguments["gradient_clip_val"] = {limit:g}',
        )

    def _out_of_the_blue(self, account: dict[str, Any], origin: str) -> Remedy:
        step, first = account["at"], account["course"] == "first"
        calm = "" if first else f"; the norms before it were calm (last {account['norm']:.2g}, usual"
        calm += "" if first else f" {account['usual']:.2g}), so that neither learning rate nor clipping is to blame"
        if account["skipped"]:
            return Remedy(
                f"look for {LOOK} {step} (Trainer(detect_anomaly=True) names the operation), and keep it from 0 with an"
                f" epsilon: log(x + eps), x / (y + eps), sqrt(x + eps){calm}"
            )
        name = "" if origin else " and names the module where it began"
        return Remedy(
            f'GradHealth(on_non_finite="skip") leaves such steps out, keeps the weights{name}; look for {LOOK} {step}'
            + (" (Trainer(detect_anomaly=True) names the operation)" if origin else "")
            + calm,
            # where the very first step has it, all the others most likely do: that takes an edit
            "" if first else 'health_arguments["on_non_finite"] = "skip"',
        )


def _grew(values: list[float], factor: float) -> bool:
    """Whether the last three values stand out of all before them: one by the factor, or all, and by it of the usual.

    Where norms are heavy-tailed, single ones stand out of the usual, but not of all.
    """
    sizes = [abs(value) for value in values]
    place = len(sizes) - 3 if len(sizes) > 5 else (len(sizes) + 1) // 2
    before, last = sizes[:place], sizes[place:]
    if not last or not max(before) > 0.0:
        return False
    lasting = median(last) > max(before) and median(last) > factor * median(before)
    return lasting or max(last) > factor * max(before)


def _seen(module: str) -> str:
    """What a probe has seen first that is not finite, in words."""
    if not module or " " not in module:
        return f"the first output that is not finite is that of {module}" if module else ""
    return f"{module} is not finite already"
