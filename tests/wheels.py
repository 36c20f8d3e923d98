"""Lets torchvision and torchaudio import where their compiled parts do not fit the torch that is installed."""

from __future__ import annotations

import contextlib
import importlib
import pathlib
from unittest import mock

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("torchvision", "FRAGMENT")


def _suppressed(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Non-maximum suppression: the boxes to keep, the best first."""
    order, kept = scores.argsort(descending=True), []
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    while len(order):
        best, rest = order[0], order[1:]
        kept.append(best)
        corner, other = torch.max(boxes[best, :2], boxes[rest, :2]), torch.min(boxes[best, 2:], boxes[rest, 2:])
        shared = (other - corner).clamp(min=0).prod(1)
        order = rest[shared / (areas[best] + areas[rest] - shared) <= iou_threshold]
    return torch.stack(kept) if kept else order


def define_operators() -> None:
    """Define what torchvision's Python part needs to import, and let it run on a CPU."""
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            _LIBRARY.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"torchvision::{name}", "CPU"):
            _LIBRARY.impl(name, _suppressed, "CPU")


def import_all() -> None:
    """Import torchvision and torchaudio, where they are installed; a second call does nothing."""
    with contextlib.suppress(ModuleNotFoundError):
        try:
            importlib.import_module("torchvision")
        except RuntimeError:  # its operators are not there
            define_operators()
            importlib.import_module("torchvision")
        define_operators()
    # its nets need nothing of what is compiled, which it leaves out where it finds no file
    with contextlib.suppress(ModuleNotFoundError), mock.patch.object(pathlib.Path, "glob", return_value=[]):
        importlib.import_module("torchaudio")
