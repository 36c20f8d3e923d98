"""Sums over the elements of signals, collected on the device and put together at the end of the step."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_gradhealth.norms import dense, flat, norms, wide
from lightning_gradhealth.signals.reading import BINS, COLUMNS

SMALL = 65_536  # elements that one kernel sums in float64
SAMPLE = 512  # elements of an output that its histogram is made of
OCTAVES = 2  # a bin is a factor of 4
LOWEST = -32  # the first bin begins at 2^-32


def norm_of(values: Tensor) -> Tensor:
    """L2 norm, shape (), float64 where the device knows it; of complex numbers, too."""
    if values.is_complex():
        values = dense(values)
    if values.device.type == "cpu" and values.numel() > SMALL:
        return norms([values], exact=False)[0]
    norm: Tensor = torch.linalg.vector_norm(values, dtype=wide(values.device))
    return norm


def sum_of(values: Tensor) -> Tensor:
    """Sum of the elements, shape ()."""
    small = values.numel() <= SMALL
    return values.sum(dtype=wide(values.device) if small or values.dtype is torch.float64 else torch.float32)


class Sums:
    """Sums of forward and backward signals by site, over any number of passes.

    Example:
        >>> sums = Sums()
        >>> _ = sums.forward(0, torch.tensor([3.0, 4.0]))
        >>> _ = sums.backward(0, torch.tensor([1.0, 0.0]))
        >>> sums.matrix(sites=1).tolist()
        [[25.0, 7.0, 2.0, 1.0, 2.0]]
    """

    def __init__(self) -> None:
        self.input: tuple[Tensor, int] | None = None
        self.returned: set[int] = set()  # sites that a gradient has come back to
        self._norms: list[Tensor] = []
        self._norm_places: list[int] = []
        self._totals: list[Tensor] = []
        self._total_places: list[int] = []
        self._counts: dict[int, int] = {}
        self._samples: dict[int, Tensor] = {}
        self._flags: dict[str, Tensor] = {}

    def flag(self, module: str, total: Tensor) -> None:
        """Remember of a module's output what is finite where all its elements are: a sum or a norm."""
        known = self._flags.get(module)
        self._flags[module] = total if known is None else known + total

    @property
    def flagged(self) -> tuple[str, ...]:
        """The modules that have a flag, in the order in which their first calls ended."""
        return tuple(self._flags)

    def flags(self) -> Tensor:
        """1 for each flagged module that gave a NaN or Inf, shape (len(flagged),)."""
        device = self.device
        totals = [total.to(device, wide(device)) for total in self._flags.values()]
        return (~torch.stack(totals).isfinite()).to(wide(device)) if totals else torch.zeros(0, device=device)

    def forward(self, site: int, values: Tensor) -> Tensor:
        """Add an output, and return its norm."""
        norm = norm_of(values)
        self._norms.append(norm)
        self._norm_places.append(site * COLUMNS)
        self._totals.append(sum_of(values))
        self._total_places.append(site * COLUMNS + 1)
        self._count(site * COLUMNS + 2, values.numel())
        return norm

    def backward(self, site: int, values: Tensor) -> Tensor:
        """Add the gradient of an output, and return its norm."""
        self.returned.add(site)
        norm = norm_of(values)
        self._norms.append(norm)
        self._norm_places.append(site * COLUMNS + 3)
        self._count(site * COLUMNS + 4, values.numel())
        return norm

    def _count(self, place: int, number: int) -> None:
        self._counts[place] = self._counts.get(place, 0) + number

    def sample(self, site: int, values: Tensor) -> None:
        """Keep a few elements of an output for its histogram."""
        step = -(-values.numel() // SAMPLE)
        self._samples[site] = flat(values)[::step].to(torch.float32, copy=True)

    @property
    def device(self) -> torch.device:
        """Where the sums are."""
        return self._norms[0].device if self._norms else torch.device("cpu")

    def matrix(self, sites: int, scale: Tensor | None = None) -> Tensor:
        """All sums, shape (sites, COLUMNS).

        Args:
            sites: Number of sites.
            scale: The factor by which the gradients were scaled, shape ().
        """
        device, size = self.device, sites * COLUMNS
        dtype = wide(device)
        counts = [0.0] * size
        for place, count in self._counts.items():
            counts[place] = float(count)
        table = torch.tensor(counts, dtype=dtype).to(device, non_blocking=True)
        for places, values, power in (
            (self._norm_places, self._norms, 2),
            (self._total_places, self._totals, 1),
        ):
            if values:
                stacked = torch.stack([value.to(device, dtype) for value in values])
                where = torch.tensor(places).to(device, non_blocking=True)
                table.index_add_(0, where, stacked.square() if power > 1 else stacked)
        matrix = table.view(sites, COLUMNS)
        if scale is not None:
            matrix[:, 3] /= scale.to(device, dtype).square()
        return matrix

    def histograms(self, sites: int) -> Tensor:
        """Number of sampled elements by magnitude, shape (sites, BINS): a bin is a factor of 4, from 2^-32 on."""
        device = self.device
        numbers = [site for site in self._samples if site < sites]
        table = torch.zeros(sites * BINS, dtype=wide(device), device=device)
        if not numbers:
            return table.view(sites, BINS)
        samples = [self._samples[site].to(device) for site in numbers]
        exponents = ((torch.cat(samples).view(torch.int32) >> 23) & 0xFF) - 127  # NaN and Inf have the largest
        bins = ((exponents - LOWEST) // OCTAVES).clamp_(0, BINS - 1)
        first = torch.tensor([number * BINS for number in numbers], dtype=bins.dtype).to(device, non_blocking=True)
        lengths = torch.tensor([sample.numel() for sample in samples]).to(device, non_blocking=True)
        places = bins + torch.repeat_interleave(first, lengths, output_size=len(bins))
        table.index_add_(0, places, torch.ones_like(places, dtype=table.dtype))
        return table.view(sites, BINS)
