"""Architectures of other libraries, at their smallest: initialised, diagnosed and trained beside their own init."""
