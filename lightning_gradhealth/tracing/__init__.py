"""One recorded forward pass: weights in order of use, what lies between them, and where branches merge."""

from lightning_gradhealth.tracing.graph import Graph, LongPathError
from lightning_gradhealth.tracing.operators import VIEWS
from lightning_gradhealth.tracing.record import UNITS, Event, Ref, Trace, TraceError, follow, trace
from lightning_gradhealth.tracing.stations import INPUT, Station

__all__ = [
    "INPUT",
    "UNITS",
    "VIEWS",
    "Event",
    "Graph",
    "LongPathError",
    "Ref",
    "Station",
    "Trace",
    "TraceError",
    "follow",
    "trace",
]
