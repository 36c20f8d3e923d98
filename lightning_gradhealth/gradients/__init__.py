"""Gradients to numbers: accurate norms on the device, weights and updates at probed steps, one read a flush."""

from lightning_gradhealth.gradients.monitor import Decision, GradientMonitor
from lightning_gradhealth.gradients.norms import norms, read_once
from lightning_gradhealth.gradients.weights import WeightProbe

__all__ = ["Decision", "GradientMonitor", "WeightProbe", "norms", "read_once"]
