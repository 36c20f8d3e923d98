"""What ranks that have seen different things can add up."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lightning_gradhealth.norms import wide
from lightning_gradhealth.signals.reading import BINS, COLUMNS, UNITS, Site, Spec


def united(specs: Iterable[Spec]) -> Spec:
    """The sites and activations of all ranks, those of the first rank first that has a chain; the chain is that one's.

    Example:
        >>> [site.name for site in united([Spec((Site("a", "a"),)), Spec((Site("b", "b"),))]).sites]
        ['a', 'b']
    """
    specs = sorted((spec for spec in specs if spec.sites), key=lambda spec: not spec.chain)
    if not specs:
        return Spec()
    sites = {site.name: site for spec in reversed(specs) for site in spec.sites}
    units = {unit.name: unit for spec in reversed(specs) for unit in spec.activations}
    first = specs[0]
    more = [site for name, site in sites.items() if name not in {own.name for own in first.sites}]
    others = [unit for name, unit in units.items() if name not in {own.name for own in first.activations}]
    loose = [Site(site.name, site.owner, site.size) for site in more]  # their numbers are those of another rank
    modules = tuple(dict.fromkeys(name for spec in specs for name in spec.modules))
    histogram = all(spec.histogram for spec in specs)
    chains = first.chain, modules, histogram, first.crossed, first.matrices
    return Spec((*first.sites, *loose), (*first.activations, *others), *chains)


def _placed(rows: Tensor, names: Sequence[str], wanted: Sequence[str]) -> Tensor:
    """The rows of `names` in the order of the `wanted` ones; zeros for those that are not there."""
    number = {name: place for place, name in enumerate(names)}
    padded = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
    places = torch.tensor([number.get(name, len(names)) for name in wanted], dtype=torch.int64)
    return padded[places.to(rows.device)]


def nothing(device: torch.device) -> list[Tensor]:
    """The parts of a reading in which nothing was measured."""
    dtype = wide(device)
    shapes = ((0, COLUMNS), (2,), (0, UNITS), (0, 1), (0, BINS))
    return [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]


def in_order(parts: Sequence[Tensor], spec: Spec, agreed: Spec) -> list[Tensor]:
    """The parts of a reading as all ranks have agreed on, zeros where this one has seen nothing.

    Args:
        parts: The sums of the sites, of the network's input, of the activations, the flags, and the histograms.
        spec: What they are.
        agreed: What they are to be.

    Example:
        >>> [tuple(part.shape) for part in in_order(nothing(torch.device("cpu")), Spec(), Spec((Site("a", "a"),)))]
        [(1, 5), (2,), (0, 3), (0, 1)]
    """
    matrix, entry, units, flags, *tail = parts
    sites, others = [site.name for site in spec.sites], [site.name for site in agreed.sites]
    placed = [
        _placed(matrix, sites, others),
        entry,
        _placed(units, [unit.name for unit in spec.activations], [unit.name for unit in agreed.activations]),
        _placed(flags, spec.modules, agreed.modules),
    ]
    if agreed.histogram:
        placed.append(_placed(tail[0] if tail else matrix.new_zeros(len(sites), BINS), sites, others))
    return placed
