"""Rules for a single pass before training: sizes that no training starts from."""

from __future__ import annotations

import math

from lightning_gradhealth.records import Condition, Severity, StepRecord
from lightning_gradhealth.rules.base import NOT_MEASURED, NotMeasured, Rule, Verdict
from lightning_gradhealth.rules.remedies import BOUND


class LeapOnce(Rule):
    """The output of a layer is many orders larger than all that was computed before it, as behind an exp().

    Layers of any sound initialisation keep the size of their inputs within a few powers of ten; that it is large
    by itself, too, leaves out layers that read a table of tiny embeddings.
    """

    condition = Condition.EXPLODING_ACTIVATIONS

    def check(self, record: StepRecord) -> Verdict | NotMeasured | None:
        """Hold each output against the largest before it, the network's input included."""
        sized = [(la, la.forward_rms) for la in record.layers if la.forward_rms is not None]
        if not sized:
            return NOT_MEASURED
        greatest = max((chain.input_rms or 0.0 for chain in record.chains), default=0.0)
        before = ""
        for layer, size in sized:
            if before and size > self.thresholds.leap * greatest and size > self.thresholds.input_rms:
                return Verdict(
                    severity=Severity.CRITICAL if size > self.thresholds.huge else Severity.WARNING,
                    summary=(
                        f"the output of {layer.name} is of size {size:.2g} (root mean square), while all before it, up"
                        f" to {before}, is of {greatest:.2g} at most: something between them, as exp() of a large"
                        " number, leaps by orders of magnitude"
                    ),
                    remedy=BOUND,
                    layers=(layer.name,),
                    evidence={"forward_rms": size, "largest_before": greatest},
                )
            greatest, before = max(greatest, size), layer.name
        return None


class HugeOnce(Rule):
    """A gradient at the first pass that no training works at."""

    condition = Condition.EXPLODING_GRADIENTS

    def check(self, record: StepRecord) -> Verdict | NotMeasured | None:
        """Judge the norm of the whole gradient."""
        norms = [(la.grad_norm, la.name) for la in record.layers if la.grad_norm is not None]
        total = math.hypot(*(norm for norm, _ in norms))
        if not norms or not math.isfinite(total):
            return NOT_MEASURED  # what is not finite has a rule of its own
        if total <= self.thresholds.huge:
            return None
        norm, name = max(norms)
        return Verdict(
            severity=Severity.WARNING,  # what says where and why it explodes stands before it
            summary=f"the gradient norm is {total:.2g} before the first step, that of {name} alone {norm:.2g}",
            remedy=f"{BOUND}; a loss that is a mean, not a sum",
            layers=(name,),
            evidence={"total_norm": total, "largest": norm},
        )
