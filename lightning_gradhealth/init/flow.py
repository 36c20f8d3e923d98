"""Mean squares at every station of a recorded forward pass."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Flow:
    """Mean squares at every station, in the limit of wide layers.

    Attributes:
        moments: Of the signal that it gives, its mean included.
        means: Mean of the signal that it gives: not 0 where what a rectifier has left is added up.
        alike: Correlation of the signal at one position with that at another, for inputs without any.
        gradients: Mean square of the gradient with respect to what it gives, in units of that at the outputs.
        balance: The same but for pooling and the like, which share a gradient out among many positions.
        sensitivity: What a small relative deviation of the first variance is multiplied by.
        steepest: The activation with the largest chi_q on the way, with it.
    """

    moments: dict[int, float] = field(default_factory=dict)
    means: dict[int, float] = field(default_factory=dict)
    alike: dict[int, float] = field(default_factory=dict)
    gradients: dict[int, float] = field(default_factory=dict)
    balance: dict[int, float] = field(default_factory=dict)
    sensitivity: dict[int, float] = field(default_factory=dict)
    steepest: tuple[float, str] = (1.0, "")
