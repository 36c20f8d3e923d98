"""The errors that are raised on purpose; anything else that fails in the callback makes it step aside."""

from __future__ import annotations


class GradHealthError(RuntimeError):
    """What was asked for cannot be done, or was asked to end the training: the callback lets it through.

    Example:
        >>> issubclass(NonFiniteGradientError, GradHealthError)
        True
    """


class NonFiniteGradientError(GradHealthError):
    """A gradient is NaN or Inf, and `on_non_finite` says that this ends the run.

    Example:
        >>> try:
        ...     raise NonFiniteGradientError("gradients are NaN or Inf at step 7")
        ... except GradHealthError as error:
        ...     print(error)
        gradients are NaN or Inf at step 7
    """
