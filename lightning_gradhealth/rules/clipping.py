"""The rule on adaptive clipping: when its gate opened and closed, and whether the run lives on it."""

from __future__ import annotations

from lightning_gradhealth.records import Condition, Severity, StepRecord, StepStats
from lightning_gradhealth.rules.base import Rule, Verdict
from lightning_gradhealth.rules.remedies import in_groups


class AdaptiveClipping(Rule):
    """The gate of adaptive clipping has opened: an info, but a warning where half of the steps need it."""

    condition = Condition.ADAPTIVE_CLIPPING
    running = True

    def check(self, record: StepRecord) -> Verdict | None:
        """Keep account of every opening; speak while a gate is open, and once more when it closes."""
        memory = self.memory
        gated = [step for step in record.window if step.armed is not None]
        if not gated:  # no gate in this run; a checkpoint may come from one that had it
            memory["open"] = []
            return None
        for step in gated:
            self._take(step)
        if not memory.get("openings") or (not memory["open"] and memory.get("told") == memory["openings"]):
            return None
        if not memory["open"]:
            memory["told"] = memory["openings"]
        recent = memory["recent"]
        lives_on_it = len(recent) == self.thresholds.clipped_window and 2 * sum(recent) >= len(recent)
        return Verdict(
            severity=Severity.WARNING if lives_on_it else Severity.INFO,
            summary=self._account(),
            code=in_groups('group["lr"] *= 0.1') if lives_on_it else "",
            remedy=(
                "a smaller learning rate (a tenth) or a warm-up of it, a normalisation layer or"
                " gh.init_weights(model, batch): the run lives on being clipped"
                if lives_on_it
                else "none while it is rare; if it recurs, a smaller learning rate or a warm-up of it, unless such"
                " steps are meant to be large"
            ),
            evidence={
                "openings": memory["openings"],
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
        if step.armed and key not in opened:
            opened.append(key)
            memory["openings"] = memory.get("openings", 0) + 1
            memory.setdefault("first", step.step)
            memory["latest"], memory["norm"] = step.step, step.total_norm
            memory.setdefault("clipped", 0)
            memory.setdefault("smallest", None)
        elif not step.armed and key in opened:
            opened.remove(key)
            memory["closed_at"] = step.step
        if step.acted:
            memory["dry"] = step.would_clip is not None
            memory["clipped"] += 1
            factor = step.clip_coefficient if step.would_clip is None else step.would_clip
            if factor is not None:
                memory["smallest"] = min(factor, 1.0 if memory["smallest"] is None else memory["smallest"])

    def _account(self) -> str:
        memory = self.memory
        norm = "" if memory["norm"] is None else f", at a gradient norm of {memory['norm']:.2g}"
        text = f"the gate opened at step {memory['latest']}{norm}"
        if memory["openings"] > 1:
            text += f" ({memory['openings']} times since step {memory['first']})"
        steps = f"{memory['clipped']} step{'' if memory['clipped'] == 1 else 's'}"
        done = (
            "would have been clipped"
            if memory.get("dry")
            else ("was clipped" if memory["clipped"] == 1 else "were clipped")
        )
        text += f"; {steps} {done}"
        if memory["smallest"] is not None:
            text += f", the most by a factor of {memory['smallest']:.2g}"
        return f"{text}; it is open" if memory["open"] else f"{text}; it closed at step {memory['closed_at']}"
