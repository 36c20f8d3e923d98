"""Dead and saturated units: sums over samples, kept on the device until there are enough of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_gradhealth.norms import wide
from lightning_gradhealth.signals.kinds import Kind

SAMPLES = 256  # fewer cannot tell a dead unit from a rare one


def unit_sums(kind: Kind, output: Tensor, axis: int) -> Tensor:
    """For each unit how often it was active (rectifiers), or the sum of its relative slopes (saturating ones).

    Args:
        kind: The activation.
        output: What it gave, any shape.
        axis: The axis of the units: channels or features; every other one counts as samples.

    Returns:
        Shape (units,), float64 (float32 on devices without it).

    Example:
        >>> from lightning_gradhealth.signals.kinds import KINDS
        >>> unit_sums(KINDS["relu"], torch.tensor([[0.0, 1.0], [0.0, 2.0]]), axis=1).tolist()
        [0.0, 2.0]
    """
    measure = kind.active or kind.slope
    assert measure is not None
    values = measure(output if output.itemsize > 2 or kind.is_rectifier else output.float())
    others = [other for other in range(output.ndim) if other != axis % output.ndim]
    if values.dtype is torch.bool:
        return (values.sum(others) if others else values).to(wide(output.device))
    return values.sum(others, dtype=wide(output.device)) if others else values.to(wide(output.device))


class UnitWindow:
    """Sums up what `unit_sums` gives over successive probes, until there are `SAMPLES` samples or more.

    Args:
        kind: The activation.

    Attributes:
        samples: Samples so far.
        judged: There have been enough of them once.

    Example:
        >>> from lightning_gradhealth.signals.kinds import KINDS
        >>> window = UnitWindow(KINDS["relu"])
        >>> window.add(torch.tensor([[0.0, 1.0]]).expand(256, 2), axis=1)
        >>> window.take().tolist()
        [0.5, 0.5]
    """

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        self.samples = 0
        self.judged = False
        self._sums: Tensor | None = None

    def add(self, output: Tensor, axis: int) -> None:
        """Take in the outputs of one pass; a window of units of another number begins anew."""
        if output.ndim == 0 or not output.numel():
            return
        sums = unit_sums(self.kind, output, axis)
        if self._sums is None or self._sums.shape != sums.shape or self._sums.device != sums.device:
            self._sums, self.samples = sums, 0
        else:
            self._sums = self._sums + sums
        self.samples += output.numel() // sums.numel()

    def take(self) -> Tensor | None:
        """The shares of dead or saturated units, and of those that are always active; then the window begins anew.

        Returns:
            Shape (2,), the second 0 for kinds that saturate; None while there are too few samples.
        """
        if self._sums is None or self.samples < SAMPLES:
            return None
        if self.kind.is_rectifier:
            groups = torch.stack([self._sums == 0, self._sums == self.samples])
        else:
            bad = self._sums < self.kind.flat * self.samples
            groups = torch.stack([bad, torch.zeros_like(bad)])
        self._sums, self.samples, self.judged = None, 0, True
        return groups.to(wide(groups.device)).mean(1)

    def state_dict(self) -> dict[str, Any]:
        """Return the sums so far."""
        return {"sums": self._sums, "samples": self.samples, "judged": self.judged}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` returned."""
        self._sums, self.samples, self.judged = state["sums"], state["samples"], state["judged"]
