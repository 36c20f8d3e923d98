"""A rule for losses that take probabilities for logits."""

from __future__ import annotations

from lightning_gradhealth.records import Condition, Severity, StepRecord
from lightning_gradhealth.rules.base import NOT_MEASURED, NotMeasured, Rule, Verdict


class SquashedOnce(Rule):
    """A softmax or a sigmoid stands before a loss that takes logits and squashes them itself.

    The logits are bounded by 0 and 1 then, so that the loss cannot fall below ln(e + C - 1) - 1 for C classes, and the
    gradient goes through two slopes that are flat where the network is sure.
    """

    condition = Condition.SQUASHED_LOGITS

    def check(self, record: StepRecord) -> Verdict | NotMeasured | None:
        """Say what was seen in the graph of the loss."""
        found = record.squashed
        if found is None:
            return None if record.probed else NOT_MEASURED
        given = "probabilities" if found.activation == "softmax" or found.classes == 1 else "numbers between 0 and 1"
        behind = f" (behind {found.layer})" if found.layer else ""
        if found.classes > 1:
            loss, other = "nn.CrossEntropyLoss", "nn.NLLLoss of their logarithm"
        else:
            loss, other = "nn.BCEWithLogitsLoss", "nn.BCELoss"
        return Verdict(
            severity=Severity.WARNING,
            summary=(
                f"the {found.loss} is given {given} for logits: a {found.activation}{behind} stands before a loss that"
                f" applies its own, so that the loss cannot fall below {found.floor:.3g}"
                + (f" with {found.classes} classes" if found.classes > 1 else "")
            ),
            remedy=f"leave the {found.activation} out: {loss} takes logits (or keep it and use {other})",
            layers=(found.layer,) if found.layer else (),
            evidence={"activation": found.activation, "classes": found.classes, "least_loss": found.floor},
        )
