"""The rule on adaptive clipping: its single spikes, its outbreaks, and whether the run lives on it."""

from __future__ import annotations

from lightning_gradhealth.records import Condition, Severity, StepRecord, StepStats
from lightning_gradhealth.rules.base import Rule, Verdict
from lightning_gradhealth.rules.course import follow_schedules, is_scheduled
from lightning_gradhealth.rules.remedies import at_rate


class AdaptiveClipping(Rule):
    """Adaptive clipping has met spikes or an outbreak: an info, but a warning where half of the steps need it."""

    condition = Condition.ADAPTIVE_CLIPPING
    running = True

    def check(self, record: StepRecord) -> Verdict | None:
        """Keep account; speak of new spikes, while a gate is open, and once more when it closes."""
        memory = self.memory
        follow_schedules(self, record)
        gated = [step for step in record.window if step.armed is not None]
        if not gated:  # no gate in this run; a checkpoint may come from one that had it
            memory["open"] = []
            return None
        for step in gated:
            self._take(step)
        told = [memory.get("openings", 0), memory.get("spikes", 0)]
        if not any(told) or (not memory["open"] and memory.get("told") == told):
            return None
        if not memory["open"]:
            memory["told"] = told
        recent = memory["recent"]
        lives_on_it = len(recent) == self.thresholds.clipped_window and 2 * sum(recent) >= len(recent)
        return Verdict(
            severity=Severity.WARNING if lives_on_it else Severity.INFO,
            summary=self._account(),
            code=at_rate("*", 0.1, scheduled=is_scheduled(self)) if lives_on_it else "",
            remedy=(
                "a smaller learning rate (a tenth) or a warm-up of it, a normalisation layer or"
                " gh.init_weights(model, batch): the run lives on being clipped"
                if lives_on_it
                else "none while it is rare; if it recurs, a smaller learning rate or a warm-up of it, unless such"
                " steps are meant to be large"
            ),
            evidence={
                "spikes": memory.get("spikes", 0),
                "openings": memory.get("openings", 0),
                "open": bool(memory["open"]),
                "closed_at": memory.get("closed_at"),
                "norm": memory["norm"],
                "clipped_steps": memory["clipped"],
                "smallest_coefficient": memory["smallest"],
            },
            first_step=memory["first"],
        )

    def _take(self, step: StepStats) -> None:
        """One step of an optimizer that has a gate."""
        memory, key = self.memory, str(step.optimizer)
        opened = memory.setdefault("open", [])
        recent = memory.setdefault("recent", [])
        recent.append(int(bool(step.acted)))
        del recent[: -self.thresholds.clipped_window]
        spike = bool(step.armed and not step.outbreak and key not in opened)
        if spike or (step.outbreak and key not in opened):
            memory.setdefault("first", step.step)
            memory.setdefault("clipped", 0)
            memory.setdefault("smallest", None)
            memory["latest"], memory["norm"] = step.step, step.total_norm
        if spike:
            memory["spikes"] = memory.get("spikes", 0) + 1
        elif step.outbreak and key not in opened:
            opened.append(key)
            memory["openings"] = memory.get("openings", 0) + 1
            memory.setdefault("outbreak", step.step)
            memory["opened"], memory["opened_norm"] = step.step, step.total_norm
        elif not step.outbreak and key in opened:
            opened.remove(key)
            memory["closed_at"] = step.step
        if step.acted:
            memory["dry"] = step.would_clip is not None
            memory["clipped"] = memory.get("clipped", 0) + 1
            factor = step.clip_coefficient if step.would_clip is None else step.would_clip
            if factor is not None:
                memory["smallest"] = min(factor, 1.0 if memory.get("smallest") is None else memory["smallest"])

    def _account(self) -> str:
        memory = self.memory
        spikes, openings = memory.get("spikes", 0), memory.get("openings", 0)
        parts = []
        if openings:
            text = f"an outbreak opened the gate at step {memory['opened']}{_norm(memory['opened_norm'])}"
            if openings > 1:
                text += f" ({openings} times since step {memory['outbreak']})"
            parts.append(text)
        if spikes:
            text = f"{spikes} single spike{'' if spikes == 1 else 's'}"
            if openings:
                parts.append(f"{text} besides")
            elif spikes == 1:
                parts.append(f"{text} at step {memory['latest']}{_norm(memory['norm'])}")
            else:
                latest = f"the latest at step {memory['latest']}{_norm(memory['norm'])}"
                parts.append(f"{text} since step {memory['first']}, {latest}")
        clipped = memory["clipped"]
        done = "would have been clipped" if memory.get("dry") else ("was clipped" if clipped == 1 else "were clipped")
        text = f"{clipped} step{'' if clipped == 1 else 's'} {done}"
        if memory["smallest"] is not None:
            text += f", the most by a factor of {memory['smallest']:.2g}"
        parts.append(text)
        if openings:
            parts.append("it is open" if memory["open"] else f"it closed at step {memory['closed_at']}")
        return "; ".join(parts)


def _norm(norm: float | None) -> str:
    return "" if norm is None else f", at a gradient norm of {norm:.2g}"
