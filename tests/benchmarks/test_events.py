"""One tensor event is at least 20 times as fast for the caller, and 15 times as small, as scalars of all layers."""

from __future__ import annotations

import pytest
from benchmarks.events import measure


@pytest.mark.slow
def test_one_event_beside_scalars() -> None:
    costs = measure()
    assert costs.time_ratio >= 20, costs
    assert costs.disk_ratio >= 15, costs
