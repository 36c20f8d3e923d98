"""torchvision and torchaudio beside a torch that they were not compiled for, as where only torch comes for the CPU.

Their compiled parts do not load there, and torchvision does not even import, nor then does lightning, which looks
whether it is there.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path

import torch
from torch import Tensor

_DEFINED: list[torch.library.Library] = []  # operators live as long as their library


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Non-maximum suppression: of boxes that overlap by more than `iou_threshold` the one of the best score stays.

    Example:
        >>> boxes = torch.tensor([[0.0, 0, 2, 2], [0, 0, 2, 1.9], [3, 3, 4, 4]])
        >>> nms(boxes, torch.tensor([0.5, 0.9, 0.1]), 0.5).tolist()
        [1, 2]
    """
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    left, kept = scores.argsort(descending=True, stable=True), []
    while left.numel():
        best, left = left[0], left[1:]
        kept.append(int(best))
        low, high = torch.maximum(boxes[best, :2], boxes[left, :2]), torch.minimum(boxes[best, 2:], boxes[left, 2:])
        common = (high - low).clamp(min=0).prod(1)
        left = left[common <= iou_threshold * (areas[best] + areas[left] - common)]
    return torch.tensor(kept, dtype=torch.long, device=boxes.device)


def _prepare_torchvision() -> None:
    """Define the operators that torchvision registers more for at import, where its own do not load."""
    found = importlib.util.find_spec("torchvision")
    if found is None or found.origin is None or hasattr(torch.ops.torchvision, "nms"):
        return
    try:
        torch.ops.load_library(Path(found.origin).parent / "_C.so")
    except OSError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            library.impl(name, nms, "CPU")
        _DEFINED.append(library)


def _prepare_torchaudio() -> None:
    """Let torchaudio do without its compiled part, as it does where it was built without: the rest is Python."""
    found = importlib.util.find_spec("torchaudio")
    if found is None or found.origin is None:
        return
    try:
        for compiled in (Path(found.origin).parent / "lib").glob("_torchaudio*.so"):
            torch.ops.load_library(compiled)
    except OSError:
        stand_in = types.ModuleType("torchaudio._extension")
        stand_in._IS_TORCHAUDIO_EXT_AVAILABLE = stand_in._IS_ALIGN_AVAILABLE = False  # type: ignore[attr-defined]
        stand_in.fail_if_no_align = lambda function: function  # type: ignore[attr-defined]
        sys.modules[stand_in.__name__] = stand_in


_prepare_torchvision()
_prepare_torchaudio()
