"""Clippers at work: one copy for each optimizer, and what becomes of one that fails."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from torch import distributed

from lightning_gradhealth.errors import GradHealthError
from lightning_gradhealth.gradients.clipping import Clipper, Cut
from lightning_gradhealth.gradients.decision import Decision
from lightning_gradhealth.messages import reason_of, say
from lightning_gradhealth.saving import Saver


class Clippers:
    """The clipper of each optimizer, with a state of its own. One that fails is left out, and that is told once.

    Where several ranks train together it is an error instead: the others may go on clipping.

    Args:
        clip: What is copied for each optimizer; None: nothing clips.
        saver: Keeps states that a checkpoint can take.

    Attributes:
        clip: The same; None once it has failed.
        lost: The clipper that has failed, the step, and why; None as long as none has.
        tell: Takes what is to be said; None: the logger.

    Example:
        >>> Clippers(None, Saver()).of(0) is None
        True
    """

    def __init__(self, clip: Clipper | None, saver: Saver) -> None:
        self.clip = clip
        self.lost: tuple[str, int, str] | None = None
        self.tell: Callable[[str], None] | None = None
        self._saver = saver
        self._mine: dict[int, Clipper] = {}

    def of(self, number: int) -> Clipper | None:
        """The clipper of an optimizer, by its number."""
        if self.clip is not None and number not in self._mine:
            self._mine[number] = copy.deepcopy(self.clip)
        return self._mine.get(number)

    def asking(self, number: int) -> list[Clipper]:
        """What of an optimizer's clipper wants sums over the ranks along with the norms."""
        clipper = self.of(number)
        return [] if clipper is None else clipper.asking()

    def decide(self, decision: Decision) -> Cut | None:
        """What is to be done about a step; None where nothing clips, or the clipper fails."""
        if self.clip is None or not decision.gradients.slots:
            return None
        try:
            clipper = self.of(decision.row.optimizer)
            return None if clipper is None else clipper.cut(decision.gradients)
        except GradHealthError:  # raised on purpose
            raise
        except Exception as error:
            self._leave_out(decision.row.step, error, "")
            return None

    def apply(self, decision: Decision) -> None:
        """Carry it out; where that fails half-way, the gradients become None, which skips the step."""
        clipper = self._mine.get(decision.row.optimizer)
        if decision.cut is None or clipper is None:
            return
        try:
            clipper.apply(decision.gradients, decision.cut)
        except GradHealthError:  # raised on purpose
            raise
        except Exception as error:
            for slot in decision.gradients.slots:
                slot.parameter.grad = None
            self._leave_out(decision.row.step, error, "; this step, whose gradients may be half clipped, is skipped")

    def _leave_out(self, step: int, error: Exception, more: str) -> None:
        name = type(self.clip).__name__
        together = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
        if together:
            text = f"the clipper {name} failed ({reason_of(error)}), and other ranks may go on clipping; mend it"
            raise GradHealthError(text) from error
        self.lost = name, step, reason_of(error)
        self.clip = None
        self._mine.clear()
        say(
            f"gradhealth: the clipper {name} failed at step {step} ({reason_of(error)}) and is left out: training goes"
            f" on WITHOUT clipping{more}",
            through=self.tell,
            error=error,
        )

    # --- state ---

    def state_dict(self) -> dict[int, Any]:
        """Return the states by the number of the optimizer; one that no checkpoint can take is left out."""
        states: dict[int, Any] = {}
        for number, clipper in self._mine.items():
            self._saver.put(states, number, f"the state of the clipper {type(clipper).__name__}", clipper.state_dict)
        return states

    def load_state_dict(self, states: Mapping[int, Any]) -> None:
        """Take up what `state_dict` returned; a clipper of the user's that cannot take up its own starts afresh."""
        for number, saved in states.items():
            clipper = self.of(number)
            if clipper is None:
                return
            if type(clipper).__module__.partition(".")[0] == __name__.partition(".")[0]:
                clipper.load_state_dict(saved)
            elif not self._saver.take(f"the state of {type(clipper).__name__}", _loading(clipper, saved)):
                del self._mine[number]


def _loading(clipper: Clipper, saved: Any) -> Callable[[], None]:
    return lambda: clipper.load_state_dict(saved)
