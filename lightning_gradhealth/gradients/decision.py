"""Decision: what is to be done with the gradients of one step, on the device."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.optim import Optimizer

from lightning_gradhealth.gradients.clipping import Clipper, Cut, Gradients
from lightning_gradhealth.gradients.gate import WhenExploding
from lightning_gradhealth.gradients.rows import Row
from lightning_gradhealth.validation import wrong

Clip = str | Clipper | None


def check_clip(clip: Clip) -> Clipper | None:
    """Return the clipper that `clip` stands for.

    Raises:
        ValueError: It is another word than "adaptive".
        TypeError: It is neither None, a word nor a Clipper.

    Example:
        >>> check_clip("adaptive"), check_clip(None)
        (WhenExploding(...), None)
    """
    if isinstance(clip, str) and clip == "adaptive":
        return WhenExploding()
    if clip is None or isinstance(clip, Clipper):
        return clip
    text = wrong("clip", '"adaptive", a Clipper or None', clip, "e.g. clip=NormClip(1.0)")
    raise ValueError(text) if isinstance(clip, str) else TypeError(text)


@dataclass
class Decision:
    """What is to be done with the gradients of one step; everything in it stays on the device.

    Attributes:
        optimizer: The optimizer that is about to step.
        gradients: Its gradients and their norms over all ranks.
        row: What was measured, for the next flush.
        cut: What the clipper decided; None where nothing clips.
        skip: Whether the step is to be skipped, shape (); None where nothing skips.

    Example:
        >>> import torch
        >>> from lightning_gradhealth.gradients import GradientMonitor
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> _ = layer(torch.tensor([[3.0, 4.0]])).backward()
        >>> decision = GradientMonitor(layer).observe(torch.optim.SGD(layer.parameters(), lr=0.1))
        >>> decision.total_norm.item(), decision.action
        (5.0, 'ok')
    """

    optimizer: Optimizer
    gradients: Gradients
    row: Row
    cut: Cut | None = None
    skip: Tensor | None = None

    @property
    def norms(self) -> Tensor:
        """L2 norms of the gradients before any clipping, one a parameter that has one, shape (n,), float64."""
        return self.gradients.norms

    @property
    def total_norm(self) -> Tensor:
        """L2 norm of all gradients together, shape (), float64, on the device."""
        return self.gradients.total

    @property
    def coefficient(self) -> Tensor | None:
        """Total norm after clipping over that before, shape (); None where nothing clips or it is not one factor."""
        return None if self.cut is None else self.cut.coefficient

    @property
    def action(self) -> str:
        """One of "ok", "clip" and "skip"; reading it waits for the device."""
        if self.skip is not None and bool(self.skip):
            return "skip"
        return "clip" if self.cut is not None and bool(self.cut.clipped) else "ok"
