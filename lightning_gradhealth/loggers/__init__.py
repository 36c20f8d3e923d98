"""Where records go: what each logger can show."""

from __future__ import annotations

from lightning_gradhealth.loggers.scalars import LogLayers as LogLayers, prefix_of as prefix_of
from lightning_gradhealth.loggers.sink import LoggerSink as LoggerSink, check_loggers as check_loggers
