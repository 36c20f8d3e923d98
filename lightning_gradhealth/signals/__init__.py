"""Signals inside the network: what probes see of activations, and the gradient through time."""

from lightning_gradhealth.signals.activations import SIGNALS, TEMPORAL, SignalProbe
from lightning_gradhealth.signals.reading import Reading, Signals, with_signals
from lightning_gradhealth.signals.recurrent import flow_norms, temporal_flow

__all__ = ["SIGNALS", "TEMPORAL", "Reading", "SignalProbe", "Signals", "flow_norms", "temporal_flow", "with_signals"]
