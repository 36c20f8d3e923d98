"""Architectures of other libraries, at their smallest: initialised, diagnosed and trained beside their own init."""

import companions  # noqa: F401  (before lightning)
