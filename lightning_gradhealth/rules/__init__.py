"""Rules: plain numbers in, verdicts out. They only compare; patience and hysteresis are their base's."""

from __future__ import annotations

from lightning_gradhealth.rules.base import NOT_MEASURED, NotMeasured, Rule, Thresholds, Verdict
from lightning_gradhealth.rules.clipping import AdaptiveClipping
from lightning_gradhealth.rules.depth import ActivationDepth, DepthRule
from lightning_gradhealth.rules.gradients import (
    ExplodingInTime,
    NoGradient,
    VanishingInTime,
)
from lightning_gradhealth.rules.logits import SquashedOnce
from lightning_gradhealth.rules.loss import LossSpike, StalledLoss
from lightning_gradhealth.rules.non_finite import NonFinite
from lightning_gradhealth.rules.optimizer import CarriedOver, ClippedScaled, NotInOptimizer
from lightning_gradhealth.rules.signals import DeadUnits, ExplodingThroughTime, SaturatedUnits, VanishingThroughTime
from lightning_gradhealth.rules.swallowed import SwallowedSignal
from lightning_gradhealth.rules.training import (
    CollapsingWeights,
    GrowingWeights,
    OversizedUpdates,
    StalledLayers,
)


def default_rules(thresholds: Thresholds) -> list[Rule]:
    """The rules that judge every run; causes stand before their symptoms.

    Args:
        thresholds: The numbers that they compare with.

    Example:
        >>> len({rule.condition for rule in default_rules(Thresholds())})
        17
    """
    return [
        SquashedOnce(thresholds),
        CarriedOver(thresholds),
        ClippedScaled(thresholds),
        OversizedUpdates(thresholds),
        DeadUnits(thresholds),
        SaturatedUnits(thresholds),
        ActivationDepth(True, thresholds),
        ActivationDepth(False, thresholds),
        DepthRule(True, thresholds),
        DepthRule(False, thresholds),
        SwallowedSignal(thresholds),
        VanishingThroughTime(thresholds),
        ExplodingThroughTime(thresholds),
        ExplodingInTime(thresholds),
        VanishingInTime(thresholds),
        NotInOptimizer(thresholds),
        NoGradient(thresholds),
        GrowingWeights(thresholds),
        CollapsingWeights(thresholds),
        StalledLayers(thresholds),
        NonFinite(thresholds),
        AdaptiveClipping(thresholds),
        LossSpike(thresholds),
        StalledLoss(thresholds),
    ]


__all__ = ["NOT_MEASURED", "NotMeasured", "Rule", "Thresholds", "Verdict", "default_rules"]
