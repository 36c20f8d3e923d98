"""What a flush needs to know of a cut: one short vector a step."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_gradhealth.gradients.clipping import Cut
from lightning_gradhealth.norms import wide

FLAGS = ("coefficient", "clipped", "armed", "would", "acted", "refused", "outbreak")


def flags_of(cut: Cut) -> Tensor:
    """The flags of a cut, shape (len(FLAGS),), float64 (float32 on MPS); NaN for what there is not.

    Example:
        >>> flags_of(Cut([], clipped=torch.tensor(True), coefficient=torch.tensor(0.5))).tolist()
        [0.5, 1.0, nan, nan, nan, nan, nan]
    """
    dtype = wide(cut.clipped.device)
    none = torch.full((), math.nan, dtype=dtype, device=cut.clipped.device)
    values = [getattr(cut, name) for name in FLAGS]
    return torch.stack([none if value is None else value.to(dtype) for value in values])


def without_effect(flags: Tensor, skipped: Tensor) -> Tensor:
    """The flags of a cut, but those of none where the step is skipped: nothing was clipped.

    Example:
        >>> without_effect(torch.tensor([0.5, 1.0, 1.0, math.nan, 1.0, 0.0, 0.0]), torch.tensor(True))
        tensor([nan, 0., nan, nan, 0., 0., nan])
    """
    none, zero = flags.new_full((), math.nan), flags.new_zeros(())
    return torch.where(skipped, torch.stack([none, zero, none, none, zero, zero, none]), flags)
