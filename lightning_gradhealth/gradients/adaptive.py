"""Clippers that learn from the run what a usual gradient norm is. Each keeps its statistics on the device.

Steps whose norm is 0, NaN or Inf enter none of them: a run of zeros would make 0 the usual norm, for good.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lightning_gradhealth.gradients.clipping import (
    Clipper,
    Cut,
    Gradients,
    factor,
    limited,
    usable,
)
from lightning_gradhealth.validation import check_int, check_number


class PercentileClip(Clipper):
    """AutoClip (Seetharaman et al., 2020): clip to a percentile of the gradient norms seen so far.

    With the usual tenth percentile nine steps of ten are clipped: the step length is nearly constant, as in
    normalised gradient descent. After a lasting change of level the old one counts until it has left the window.

    Args:
        percentile: Which one, 0 < percentile <= 100; the paper recommends 10.
        window: How many of the latest norms count, the present one among them; the paper keeps all.

    Raises:
        ValueError: An argument is out of range.
        TypeError: An argument is no number.

    Example:
        >>> from torch import nn
        >>> clipper = PercentileClip(50)
        >>> for norm in (1.0, 2.0, 6.0):
        ...     weight = nn.Parameter(torch.zeros(1)); weight.grad = torch.tensor([norm])
        ...     gradients = Gradients.of(weight)
        ...     clipper.apply(gradients, clipper.decide(gradients))
        >>> weight.grad.item()
        2.0
    """

    def __init__(self, percentile: float = 10.0, window: int = 1_000) -> None:
        self.percentile = check_number("PercentileClip: percentile", percentile, "10 is the paper's", at_most=100.0)
        self.window = check_int("PercentileClip: window", window, 1, "leave it out for 1,000")

    def decide(self, gradients: Gradients) -> Cut:
        """One factor for all."""
        total = gradients.total
        known = self.on(total.device).get("norms")
        if known is None or len(known) != self.window:  # a checkpoint may have kept more or fewer
            blank = torch.full((self.window,), math.nan, dtype=total.dtype, device=total.device)
            known = blank if known is None else torch.cat([blank, known])[-self.window :]
        later = torch.cat([known.narrow(0, 1, self.window - 1), total.reshape(1)])
        self.state["norms"] = torch.where(usable(total), later, known)
        limit = torch.nanquantile(self.state["norms"], self.percentile / 100)
        return factor(gradients, limited(total, limit))


class ZScoreClip(Clipper):
    """ZClip (Kumar et al., 2025): clip norms that stand out from their running mean, by how far they do.

    With the z-score `z = (n - mu) / sigma` of the norm `n`, a norm of `z > z_threshold` is brought down to
    `clip_factor * (mu + z_threshold^2 * sigma / z)`. Unlike in the paper's code, what enters the statistics is cut off
    at `mu + z_threshold * sigma`, not at the clipped value, so that a lasting change of level is followed and cannot
    lock the clipper in; norms in the warm-up may not exceed `warmup_cap` times the mean; and there is no fixed cap on
    top (`Chain([ZScoreClip(), NormClip(1.0)])` has one).

    Args:
        z_threshold: Standard deviations beyond which a norm is clipped; the paper's is 2.5.
        alpha: Decay of the running mean and variance, 0 < alpha < 1; the paper's is .97.
        warmup: Finite norms from which mean and variance are taken first; the paper's is 25.
        clip_factor: See above; the paper's is 1.
        warmup_cap: Multiple of the mean so far that a norm of the warm-up may reach.

    Raises:
        ValueError: An argument is out of range.
        TypeError: An argument is no number.

    Example:
        >>> from torch import nn
        >>> clipper = ZScoreClip(warmup=4)
        >>> for norm in (1.0, 1.2, 0.8, 1.0, 100.0):
        ...     weight = nn.Parameter(torch.zeros(1)); weight.grad = torch.tensor([norm])
        ...     gradients = Gradients.of(weight)
        ...     clipper.apply(gradients, clipper.decide(gradients))
        >>> 1.0 < weight.grad.item() < 1.2
        True
    """

    def __init__(
        self,
        z_threshold: float = 2.5,
        alpha: float = 0.97,
        warmup: int = 25,
        clip_factor: float = 1.0,
        warmup_cap: float = 10.0,
    ) -> None:
        self.z_threshold = check_number("ZScoreClip: z_threshold", z_threshold, "2.5 is the paper's")
        self.alpha = check_number("ZScoreClip: alpha", alpha, ".97 is the paper's", below=1.0)
        self.warmup = check_int("ZScoreClip: warmup", warmup, 1, "25 is the paper's")
        self.clip_factor = check_number("ZScoreClip: clip_factor", clip_factor, "1.0 is the paper's")
        self.warmup_cap = check_number("ZScoreClip: warmup_cap", warmup_cap, "leave it out for 10")

    def decide(self, gradients: Gradients) -> Cut:
        """One factor for all."""
        norm = gradients.total
        state = self.on(norm.device)
        if not state:
            state.update({name: torch.zeros_like(norm) for name in ("mean", "variance", "count")})
        mean, variance, count = state["mean"], state["variance"], state["count"]
        warm, known = count >= self.warmup, count > 0
        # without any spread a level could never be left: a millionth of it is as good as none
        sigma = torch.maximum(variance.sqrt(), 1e-6 * mean)
        z = (norm - mean) / sigma  # NaN before the first norm: no limit
        late = torch.where(z > self.z_threshold, self.clip_factor * (mean + self.z_threshold**2 * sigma / z), math.inf)
        limit = torch.where(warm, late, torch.where(known, self.warmup_cap * mean, math.inf))
        edge = torch.where(warm, mean + self.z_threshold * sigma, limit)
        taken = torch.minimum(norm, edge)
        rate = torch.where(warm, 1.0 - self.alpha, 1.0 / (count + 1.0))
        step = taken - mean
        moved = {
            "mean": mean + rate * step,
            "variance": (1.0 - rate) * (variance + rate * step.square()),
            "count": count + 1.0,
        }
        state.update({name: torch.where(usable(norm), new, state[name]) for name, new in moved.items()})
        return factor(gradients, limited(norm, limit))


class LayerwiseClip(Clipper):
    """AdaGC (Wang et al., 2025): clip each parameter's gradient at a running mean of its own norm.

    After the warm-up a gradient of norm `n_i` is scaled by `min(1, relative * gamma_i / n_i)`, and `gamma_i` follows
    the clipped norm with decay `beta`. In the warm-up all gradients together are clipped to `warmup_norm`, and
    `gamma_i` is the mean of the norms so far: the paper takes the least, by which a tensor whose first gradient
    happens to be tiny (LoRA's A) would stay frozen. By the paper's rule `gamma_i` grows by at most
    `(1 - beta) * (relative - 1)` a step, .1 % with the defaults: a level that rises tenfold is clipped for 2,300 steps.

    Args:
        relative: How far a norm may exceed its running mean; the paper's is 1.05.
        beta: Decay of the running mean, 0 < beta < 1; the paper's is .98.
        warmup: Steps in the warm-up, counted for each parameter; the paper's is 100.
        warmup_norm: The greatest total norm in the warm-up, in the units of the gradient; the paper's is 1.0.

    Raises:
        ValueError: An argument is out of range.
        TypeError: An argument is no number.

    Example:
        >>> from torch import nn
        >>> clipper = LayerwiseClip(warmup=2)
        >>> for norm in (0.5, 0.5, 8.0):
        ...     weight = nn.Parameter(torch.zeros(1)); weight.grad = torch.tensor([norm])
        ...     gradients = Gradients.of(weight)
        ...     clipper.apply(gradients, clipper.decide(gradients))
        >>> weight.grad
        tensor([0.5250])
    """

    def __init__(self, relative: float = 1.05, beta: float = 0.98, warmup: int = 100, warmup_norm: float = 1.0) -> None:
        self.relative = check_number("LayerwiseClip: relative", relative, "1.05 is the paper's")
        self.beta = check_number("LayerwiseClip: beta", beta, ".98 is the paper's", below=1.0)
        self.warmup = check_int("LayerwiseClip: warmup", warmup, 1, "100 is the paper's")
        self.warmup_norm = check_number("LayerwiseClip: warmup_norm", warmup_norm, "1.0 is the paper's")
        self._names: list[str] = []
        self._seen: tuple[str, ...] = ()

    def decide(self, gradients: Gradients) -> Cut:
        """A factor for each gradient."""
        norms, total = gradients.norms, gradients.total
        rows = self._rows(gradients)
        gamma, count = (self.state[name].index_select(0, rows) for name in ("gamma", "count"))
        taken = usable(norms) & gradients.finite
        warm = count >= self.warmup
        factors = torch.where(warm, limited(norms, self.relative * gamma), limited(total, self.warmup_norm))
        factors = torch.where(taken, factors, 1.0)
        rate = torch.where(warm, 1.0 - self.beta, 1.0 / (count + 1.0))
        moved = gamma + rate * (norms * factors - gamma)
        self.state["gamma"] = self.state["gamma"].index_copy(0, rows, torch.where(taken, moved, gamma))
        self.state["count"] = self.state["count"].index_copy(0, rows, count + taken)
        after = torch.linalg.vector_norm(norms * factors)
        return Cut([factors], (factors < 1).any(), torch.where(usable(total), after / total, 1.0))

    def _rows(self, gradients: Gradients) -> Tensor:
        """Where the parameters stand in the state, which grows when one turns up for the first time."""
        names = tuple(slot.name for slot in gradients.slots)
        device, dtype = gradients.norms.device, gradients.norms.dtype
        state = self.on(device)
        if names != self._seen or "rows" not in state:
            known = set(self._names)
            self._names += [name for name in names if name not in known]
            place = {name: row for row, name in enumerate(self._names)}
            for key in ("gamma", "count"):
                old = state.get(key, torch.zeros(0, dtype=dtype, device=device))
                state[key] = torch.nn.functional.pad(old, (0, len(self._names) - len(old)))
            state["rows"] = torch.tensor([place[name] for name in names], dtype=torch.int64).to(device)
            self._seen = names
        return state["rows"]

    def state_dict(self) -> dict[str, Any]:
        """Return the running means with the names of the parameters."""
        return {**super().state_dict(), "names": list(self._names)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` returned."""
        super().load_state_dict(state)
        self._names, self._seen = list(state.get("names", ())), ()
