"""One recorded forward pass: weights in order of use, what lies between them, and where branches merge."""

from lightning_gradhealth.tracing.graph import INPUT, Graph, Station
from lightning_gradhealth.tracing.operators import VIEWS
from lightning_gradhealth.tracing.record import UNITS, Event, Ref, Trace, TraceError, follow, trace

__all__ = [
    "INPUT",
    "UNITS",
    "VIEWS",
    "Event",
    "Graph",
    "Ref",
    "Station",
    "Trace",
    "TraceError",
    "follow",
    "trace",
]
