"""The rule on adaptive clipping: when its gate opened and closed, and whether the run lives on it."""

from __future__ import annotations

from lightning_gradhealth.records import Condition, Severity, StepRecord, StepStats
from lightning_gradhealth.rules.base import Rule, Verdict


class AdaptiveClipping(Rule):
    """The gate of adaptive clipping has opened: an info, but a warning where half of the steps need it."""

    condition = Condition.ADAPTIVE_CLIPPING
    running = True

    def check(self, record: StepRecord) -> Verdict | None:
        """Keep account of every opening; speak while a gate is open, and once more when it closes."""
        memory = self.memory
        before = bool(memory.get("open"))
        for step in record.window:
            if step.armed is not None:
                self._take(step)
        now = bool(memory.get("open"))
        if not now and not before and memory.get("told") == memory.get("openings"):
            return None
        if not memory.get("openings"):
            return None
        memory["told"] = memory["openings"]
        window = [step for step in record.window if step.armed is not None]
        cut = sum(bool(step.clipped) for step in window)
        heavy = cut * 2 >= len(window) > 0
        memory["heavy"] = memory.get("heavy", 0) + 1 if heavy else 0
        lives_on_it = memory["heavy"] >= self.thresholds.clipped_records
        return Verdict(
            severity=Severity.WARNING if lives_on_it else Severity.INFO,
            summary=self._account(now),
            remedy=(
                "a smaller learning rate or a warm-up of it, a normalisation layer or gh.init_weights(model): the run"
                " lives on being clipped"
                if lives_on_it
                else "none is needed while it is rare; if it recurs, a smaller learning rate or a warm-up of it"
            ),
            evidence={
                "openings": memory["openings"],
                "open": now,
                "closed_at": memory.get("closed_at"),
                "norm": memory["norm"],
                "clipped_steps": memory["clipped"],
                "smallest_coefficient": memory["smallest"],
            },
            first_step=memory["first"],
        )

    def _take(self, step: StepStats) -> None:
        """One step of an optimizer that has a gate."""
        memory = self.memory
        key = str(step.optimizer)
        opened = memory.setdefault("open", [])
        if step.armed and key not in opened:
            opened.append(key)
            memory["openings"] = memory.get("openings", 0) + 1
            memory.setdefault("first", step.step)
            memory["latest"], memory["norm"] = step.step, step.total_norm
            memory.setdefault("clipped", 0)
            memory.setdefault("smallest", 1.0)
        elif not step.armed and key in opened:
            opened.remove(key)
            memory["closed_at"] = step.step
        if step.armed:
            coefficient = step.clip_coefficient if step.would_clip is None else step.would_clip
            memory["dry"] = step.would_clip is not None
            memory["clipped"] += bool(step.clipped) or (step.would_clip is not None and step.would_clip < 1)
            if coefficient is not None:
                memory["smallest"] = min(memory["smallest"], coefficient)

    def _account(self, now: bool) -> str:
        memory = self.memory
        norm = "" if memory["norm"] is None else f" at a gradient norm of {memory['norm']:.2g}"
        text = f"an explosion was detected at step {memory['latest']}{norm}"
        if memory["openings"] > 1:
            text += f", the {memory['openings']}th since step {memory['first']}"
        clipped = f"{memory['clipped']} steps {'would have been' if memory['dry'] else 'were'} clipped"
        text += f"; {clipped}, by {memory['smallest']:.2g} at most"
        return f"{text}; the gate is open" if now else f"{text}; the gate closed at step {memory['closed_at']}"
