"""Weight norms and updates of probed steps: `|w|` in full, `|dw| / |w|` from a fixed sample.

A sample of at most 1,024 elements a parameter is taken before the optimizer steps and again after it, so that
no copy of the model is kept. The sample is stratified and the same at every probe. Of an embedding only the
rows with the largest gradients are sampled, since untouched rows do not move.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lightning_gradhealth.layers import Slot
from lightning_gradhealth.norms import dense, norms, wide
from lightning_gradhealth.sharding import local

SAMPLE = 1_024


def sample_indices(numel: int, size: int = SAMPLE) -> Tensor:
    """Return `size` flat indices into a tensor of `numel` elements: one at random in each of `size` strata.

    The draw depends on nothing but the arguments and leaves the global random state alone.

    Example:
        >>> sample_indices(8, 4).tolist()
        [1, 3, 4, 6]
    """
    generator = torch.Generator().manual_seed(numel)
    offsets = torch.rand(size, generator=generator, dtype=torch.float64)
    strata = (torch.arange(size, dtype=torch.float64) + offsets) * (numel / size)
    return strata.long().clamp_(max=numel - 1)


def _top_rows(gradient: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Indices of the `rows` rows with the largest gradient, and whether each has any."""
    if gradient.layout is torch.sparse_coo:
        gradient = gradient.coalesce()
        peaks = _row_norms(gradient.values())
        top = torch.topk(peaks, min(rows, peaks.numel()))
        return gradient.indices().select(0, 0).index_select(0, top.indices), top.values > 0
    top = torch.topk(_row_norms(gradient), min(rows, gradient.shape[0]))
    return top.indices, top.values > 0


def _row_norms(matrix: Tensor) -> Tensor:
    rows = dense(matrix)  # real: a complex row of two numbers each
    least = torch.float32 if rows.itemsize < 4 else None  # float64 stays what it is
    norm: Tensor = torch.linalg.vector_norm(rows.flatten(1), dim=1, dtype=least)
    return norm


class Sampler:
    """Takes the same elements of one parameter (of this rank's part of it) before and after a step.

    Args:
        slot: The parameter; its gradient is looked at now, if it is an embedding.
        indices: Cache of `sample_indices` by parameter size and device.

    Attributes:
        scale: Its elements over those of the sample (1 for embeddings).
    """

    def __init__(self, slot: Slot, indices: dict[tuple[int, torch.device], Tensor]) -> None:
        self._rows: tuple[Tensor, Tensor] | None = None
        self._indices: Tensor | None = None
        self.scale = 1.0
        parameter, gradient = local(slot.parameter.detach()), slot.parameter.grad
        if slot.is_embedding and gradient is not None:
            self._rows = _top_rows(local(gradient), max(1, SAMPLE // parameter.shape[1]))
        elif parameter.numel() > SAMPLE:
            self.scale = parameter.numel() / SAMPLE
            key = (parameter.numel(), parameter.device)
            if key not in indices:
                indices[key] = sample_indices(parameter.numel()).to(parameter.device)
            self._indices = indices[key]

    def take(self, parameter: Tensor) -> Tensor:
        """The sampled elements of the parameter as it is now, flat and real; they may share its memory."""
        parameter = local(parameter.detach())
        if self._rows is not None:
            rows, touched = self._rows
            picked = parameter.index_select(0, rows) * touched.to(parameter.dtype).unsqueeze(1)
        else:
            picked = parameter if self._indices is None else torch.take(parameter, self._indices)
        return dense(picked).reshape(-1)


class _Joint:
    """The samples of many parameters in one float64 vector (float32 on MPS) a device."""

    def __init__(self, picked: Sequence[Tensor]) -> None:
        groups: dict[torch.device, list[int]] = {}
        for number, tensor in enumerate(picked):
            groups.setdefault(tensor.device, []).append(number)
        self._sizes = [tensor.numel() for tensor in picked]
        self._groups = groups
        self._values = {
            device: torch.cat([picked[number] for number in numbers]).to(wide(device), copy=True)
            for device, numbers in groups.items()
        }

    def minus(self, other: _Joint) -> _Joint:
        """The differences to other samples of the same parameters; this one is used up."""
        for device in self._groups:
            self._values[device].sub_(other._values[device])
        return self

    def norms(self, segments: dict[tuple[torch.device, tuple[int, ...]], Tensor]) -> Tensor:
        """L2 norm of each sample, on the device of the first.

        Args:
            segments: Cache of the number of the sample that each element belongs to.
        """
        home = next(iter(self._groups), torch.device("cpu"))
        result = torch.zeros(len(self._sizes), dtype=wide(home), device=home)
        for device, numbers in self._groups.items():
            sizes = tuple(self._sizes[number] for number in numbers)
            key = (device, sizes)
            if key not in segments:
                segments[key] = torch.from_numpy(np.repeat(np.arange(len(sizes)), sizes)).to(device)
            values = self._values[device]
            sums = values.new_zeros(len(sizes)).index_add_(0, segments[key], values.square())
            if len(self._groups) == 1:
                return sums.sqrt()
            result[torch.tensor(numbers).to(home)] = sums.sqrt().to(home, result.dtype)
        return result


@dataclass
class WeightProbe:
    """What one probed step of one optimizer measured, still on the device.

    Attributes:
        scale: For each parameter with a gradient, its elements over those of its sample (1 for embeddings, and
            where the sums over ranks stand for the whole already).
        weights: Norms of the whole parameters before the step, shape (len(scale),).
        sampled: Norms of their samples before the step, same shape.
        updates: Norms of what the step added to the samples; None until it is done.
    """

    scale: tuple[float, ...]
    weights: Tensor
    sampled: Tensor
    updates: Tensor | None = None

    def vectors(self) -> list[Tensor]:
        """The device vectors to read."""
        return [self.weights, self.sampled, *([] if self.updates is None else [self.updates])]

    def parts(self) -> list[Tensor]:
        """The same with samples that stand for all that this rank holds, so that ranks can be added up."""
        roots = torch.tensor(self.scale, dtype=torch.float64).sqrt().to(self.weights.device)
        whole, *samples = self.vectors()
        return [whole, *(sample * roots for sample in samples)]


class WeightWatch:
    """Watches the weights of one optimizer over one step: made before the step, closed after it.

    Args:
        parameters: The slots of the parameters that are about to be stepped.
        indices: Cache of `sample_indices` by parameter size and device.
        segments: Cache of which element belongs to which sample, by device and sizes.

    Attributes:
        parameters: The parameters, as they were before the step.
        probe: What was measured.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(2, 1))
        >>> watch = WeightWatch([Slot("weight", weight, 0, "", is_bias=False, is_embedding=False)], {}, {})
        >>> _ = weight.data.mul_(1.5)
        >>> watch.close()
        >>> round((watch.probe.updates / watch.probe.sampled).item(), 6)
        0.5
    """

    @torch.no_grad()
    def __init__(
        self,
        parameters: Sequence[Slot],
        indices: dict[tuple[int, torch.device], Tensor],
        segments: dict[tuple[torch.device, tuple[int, ...]], Tensor],
    ) -> None:
        self.parameters: list[Tensor] = [slot.parameter for slot in parameters]
        self._samplers = [Sampler(slot, indices) for slot in parameters]
        self._segments = segments
        self._before = self._take(self.parameters)
        self.probe = WeightProbe(
            scale=tuple(sampler.scale for sampler in self._samplers),
            weights=norms([local(slot.parameter.detach()) for slot in parameters], exact=False),
            sampled=self._before.norms(segments),
        )

    def _take(self, parameters: Sequence[Tensor]) -> _Joint:
        return _Joint([sampler.take(p) for sampler, p in zip(self._samplers, parameters, strict=True)])

    @torch.no_grad()
    def close(self, parameters: Sequence[Tensor] | None = None) -> None:
        """Measure what the step changed.

        Args:
            parameters: The same parameters where the step has replaced them; None: those of before, which may have
                been given other memory.
        """
        after = self._take(self.parameters if parameters is None else parameters)
        self.probe.updates = after.minus(self._before).norms(self._segments)
