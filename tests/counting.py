"""Counts host reads: every way in which a tensor's contents can reach Python."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class _Scalars(TorchDispatchMode):
    """Counts `_local_scalar_dense`, behind `item`, `float`, `bool` and `int`, and other waits for data."""

    WAITING = ("_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::is_nonzero", "aten::masked_select")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += any(name in func.name() for name in self.WAITING)
        return func(*args, **(kwargs or {}))


class Reads:
    """The reads counted so far."""

    def __init__(self, scalars: _Scalars) -> None:
        self._scalars = scalars
        self.copies = 0

    @property
    def count(self) -> int:
        return self._scalars.count + self.copies


@contextmanager
def host_reads() -> Iterator[Reads]:
    """Count the host reads of a block; `tolist`, `numpy` and `cpu` do not show up among the operators."""
    scalars = _Scalars()
    reads = Reads(scalars)

    def counted(original: Any) -> Any:
        def method(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            reads.copies += 1
            return original(self, *args, **kwargs)

        return method

    names = ("tolist", "numpy", "cpu", "__array__")
    patches = [mock.patch.object(torch.Tensor, name, counted(getattr(torch.Tensor, name))) for name in names]
    with scalars:
        for patch in patches:
            patch.start()
        try:
            yield reads
        finally:
            for patch in patches:
                patch.stop()
