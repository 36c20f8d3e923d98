"""Every scenario of the clinic, by name."""

from __future__ import annotations

import scenarios_depth  # noqa: F401  (each enters its scenarios)
import scenarios_everyday  # noqa: F401
import scenarios_healthy  # noqa: F401
import scenarios_images  # noqa: F401
import scenarios_mistakes  # noqa: F401
import scenarios_reports  # noqa: F401
import scenarios_sequences  # noqa: F401
import scenarios_training  # noqa: F401
import scenarios_units  # noqa: F401
import scenarios_unusual  # noqa: F401
from clinic import CATALOGUE, Scenario

ALL: tuple[Scenario, ...] = tuple(CATALOGUE.values())
