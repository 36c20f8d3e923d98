"""Gradients to numbers: norms on the device, clipping, weights and updates at probed steps, one read a flush."""

from lightning_gradhealth.gradients.adaptive import LayerwiseClip, PercentileClip, ZScoreClip
from lightning_gradhealth.gradients.clippers import Chain, NormClip, SignClip, UnitwiseClip, ValueClip
from lightning_gradhealth.gradients.clipping import Clipper, Cut, Gradients
from lightning_gradhealth.gradients.decision import Clip, Decision, check_clip
from lightning_gradhealth.gradients.gate import WhenExploding
from lightning_gradhealth.gradients.monitor import GradientMonitor
from lightning_gradhealth.gradients.weights import WeightProbe
from lightning_gradhealth.norms import norms, read_once

__all__ = [
    "Chain",
    "Clip",
    "Clipper",
    "Cut",
    "Decision",
    "GradientMonitor",
    "Gradients",
    "LayerwiseClip",
    "NormClip",
    "PercentileClip",
    "SignClip",
    "UnitwiseClip",
    "ValueClip",
    "WeightProbe",
    "WhenExploding",
    "ZScoreClip",
    "check_clip",
    "norms",
    "read_once",
]
