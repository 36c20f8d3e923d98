"""A rule for inputs that nobody has scaled."""

from __future__ import annotations

import math

from lightning_gradhealth.records import Condition, Severity, StepRecord
from lightning_gradhealth.rules.base import NOT_MEASURED, NotMeasured, Rule, Verdict
from lightning_gradhealth.rules.remedies import for_large_inputs


class LargeInputs(Rule):
    """Inputs that are so large that the first layer's gradient is, too, and that no normalisation brings down.

    The gradient of a layer's weights is the product of what it reads and of what comes back. Indices are no signal, and
    a norm that the input goes through first makes any size of it right.
    """

    condition = Condition.EXPLODING_ACTIVATIONS

    def check(self, record: StepRecord) -> Verdict | NotMeasured | None:
        """Judge what the network reads, and whether its first layer passes that size on."""
        for chain in record.chains:
            size = chain.input_rms
            first = next((point for point in chain.points if point.forward_rms is not None), None)
            if size is None or first is None or not math.isfinite(size) or size < self.thresholds.input_rms:
                continue
            if (first.forward_rms or 0.0) < self.thresholds.input_kept * size:
                continue  # it is normalised right away
            remedy = for_large_inputs(first.layer, size)
            return Verdict(
                severity=Severity.WARNING,
                summary=(
                    f"the network reads inputs of size {size:.3g} (root mean square) and passes them on: the output of"
                    f" {first.name} is {first.forward_rms:.3g}, and the gradient of its weights grows as much"
                ),
                remedy=remedy.words,
                code=remedy.code,
                layers=(first.layer,) if first.layer else (),
                evidence={"input_rms": size, "first_output_rms": first.forward_rms},
            )
        return None if any(chain.input_rms is not None for chain in record.chains) else NOT_MEASURED
