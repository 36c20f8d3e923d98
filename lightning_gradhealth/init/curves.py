"""What becomes of means and correlations behind an activation that is known by its curve at `normal_nodes()`."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import torch
from torch import Tensor

from lightning_gradhealth.init.gains import normal_nodes
from lightning_gradhealth.init.replay import Passage

ORDERS = 12  # of the Hermite series by which a correlation passes an activation


def shifted(passage: Passage, curve: Tensor, mean: float, rms: float) -> Passage:
    """The passage of an elementwise f for a signal of a mean, where `passage` is the one for the same RMS and mean 0.

    Args:
        passage: On one source.
        curve: Its curve.
        mean: The mean of what the source gives.
        rms: The root of its mean square.
    """
    z, weight = normal_nodes()
    share = min(max(mean / rms, -1.0), 1.0)
    values, steepness = _interpolated(curve, share + math.sqrt(1 - share * share) * z)
    _, centred = _interpolated(curve, z)
    before, after = (float((slope.square() * weight).sum()) for slope in (centred, steepness))
    ratio = after / before if before > 0 else 1.0  # a ratio, since autograd has its own slopes where f jumps
    return replace(
        passage,
        curve=values,
        moment=float((values.square() * weight).sum()) * scale(passage, curve),
        slopes={source: slope * ratio for source, slope in passage.slopes.items()},
    )


def scale(passage: Passage, curve: Tensor) -> float:
    """Mean square of what a passage gives in units of its curve's, which is kept at unit scale where it has none."""
    _, weight = normal_nodes()
    of_curve = float((curve.square() * weight).sum())
    return passage.moment / of_curve if of_curve > 0 else 1.0


def _interpolated(curve: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    """Values and slopes, at any numbers, of a function that is known at `normal_nodes()`: straight lines between."""
    z, _ = normal_nodes()
    above = torch.searchsorted(z, at).clamp(1, len(z) - 1)
    slope = (curve[above] - curve[above - 1]) / (z[above] - z[above - 1])
    return curve[above - 1] + slope * (at - z[above - 1]), slope


@functools.cache
def _hermite() -> Tensor:
    """Hermite polynomials, normalised, with the weights of an integral, shape (orders, nodes)."""
    z, weight = normal_nodes()
    rows, before, now = [], torch.zeros_like(z), torch.ones_like(z)
    for order in range(ORDERS):
        rows.append(now * weight)
        before, now = now, (z * now - math.sqrt(order) * before) / math.sqrt(order + 1)
    return torch.stack(rows)


def correlated(curve: Tensor, correlation: float) -> float:
    """The correlation (about 0) of f(a) with f(b) for standard normal a and b that are correlated.

    Source: Mehler's formula, by which E[f(a) f(b)] is the sum of c_n^2 correlation^n over f's Hermite coefficients.
    """
    squares = (_hermite() @ curve).square()
    powers = torch.tensor(correlation, dtype=squares.dtype) ** torch.arange(ORDERS)
    covered, total = float((squares * powers).sum()), float(squares.sum())
    return covered / total if total > 0 else correlation


def sensitivity(curve: Tensor) -> float:
    """chi_q, by how many percent E[f(s z)^2] grows where s^2 grows by one: (E[z^2 f^2] / E[f^2] - 1) / 2 (Stein).

    Args:
        curve: f(s z) at `normal_nodes()`.

    Example:
        >>> z, _ = normal_nodes()
        >>> round(sensitivity(z.relu()), 6), round(sensitivity(z.tanh()), 3)
        (1.0, 0.461)
    """
    z, weight = normal_nodes()
    density = curve.square() * weight
    total = float(density.sum())
    return (float((z.square() * density).sum()) / total - 1) / 2 if total > 0 else 1.0
