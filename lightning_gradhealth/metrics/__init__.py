"""The same measures as torchmetrics, for any loop: plain torch, Fabric, or `self.log` in a LightningModule.

Every metric keeps sums and divides in `compute`, so that batches of unequal size, several updates and several ranks
give what one large batch would have given. The sums are float64 (float32 on MPS, which has no other) whatever
precision the model is cast to, and so are the results; `update` reads nothing on the host.
"""

from lightning_gradhealth.metrics.gradients import GradientNorm, GradientNormRatio
from lightning_gradhealth.metrics.signals import DeadUnitFraction, SaturatedUnitFraction, SignalGain

__all__ = ["DeadUnitFraction", "GradientNorm", "GradientNormRatio", "SaturatedUnitFraction", "SignalGain"]
