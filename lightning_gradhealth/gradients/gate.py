"""The gate of adaptive clipping: it tells an explosion from growth, noise and convergence by the norm alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightning_gradhealth.gradients.clipping import (
    Clipper,
    Cut,
    Gradients,
    check_clipper,
    factor,
    limited,
    usable,
)
from lightning_gradhealth.validation import check_flag, check_number


class WhenExploding(Clipper):
    """The gate: clip only while the gradient norm explodes, and leave every bit alone otherwise. `clip="adaptive"`.

    It compares the norm with a *record*: the greatest level that the run has taken in its stride. A level is what four
    norms in a row have reached: growth stays, the spikes of an explosion come back. A norm of more than

    - 2.5 times the record is a spike: this one step is clipped, to the record. After a spike that came straight back
      below the record 1.25 times is enough, for 7 steps, and for longer if there were more of them;
    - 6 times the record, or 30 times one that climbs by 3 % a step at most, is an outbreak (after the first 50 steps):
      for 500 steps all norms are clipped to 1.2 times the usual one, a running geometric mean.

    The record sinks back to the usual norm over `20 + t^2 / 20` steps, t being the steps so far, 20,000 at most: the
    wild first steps are soon forgotten, and a net that has learned its data by heart may still meet a norm that was
    usual before. Everything is a ratio, so that neither the scale of the loss nor the learning rate matters. Norms that
    are 0, NaN or Inf change nothing.

    After a lasting change of level of any size norms pass again: after four steps, or after a few hundred if it was
    an outbreak. What is large but rare is never learned: where one step in ten has 5 times the usual norm by design
    (a penalty now and then, batches of another task), or the tails are so heavy, such steps are clipped each time.

    The constants are measured on 76 healthy trainings of 32 kinds, of 2,000 steps each: none had an outbreak, and in 71
    of them 8 steps at most would have been clipped (31 in one with batches of a single sample). Of 1,430 small noisy
    trainings with batches of 1 to 64, 516 would have been clipped at one of the first 100 steps or more. See
    tests/benchmarks/clipping.py for what it does to sick ones.

    Args:
        clipper: What acts while the gate is open; None: clip to the record, or to the usual norm in an outbreak.
        latch: Once an outbreak has opened it, the gate stays open.
        dry_run: Only report what would have been clipped. What is not one factor is tried on a copy at every step.
        warmup_norm: In the first 50 steps, when there is little history to judge by, the gate opens for norms above
            this too, in the units of the gradient; None: history alone decides.

    Raises:
        TypeError: `clipper` is none, a switch is no bool, or `warmup_norm` is no number.
        ValueError: `warmup_norm` is not > 0.

    Example:
        >>> from torch import nn
        >>> clipper = WhenExploding()
        >>> for norm in [1.0] * 60 + [1e6]:
        ...     weight = nn.Parameter(torch.zeros(1)); weight.grad = torch.tensor([norm])
        ...     gradients = Gradients.of(weight)
        ...     cut = clipper.decide(gradients)
        ...     clipper.apply(gradients, cut)
        >>> cut.armed.item(), round(weight.grad.item(), 2)
        (True, 1.2)
    """

    WARMUP = 50  # steps without outbreaks: while learning sets in, norms grow by orders of magnitude
    SPIKE = math.log(2.5)  # healthy: up to 8 of 2,000 norms beyond it, most of them while learning sets in
    SUSPECT, AGAIN, RECENT = 0.9, math.log(1.25), 64.0  # healthy: norms that leap while learning sets in stay up
    OUTBREAK = math.log(6.0)  # healthy: at most 4.4
    FAR, CLIMB = math.log(30.0), math.log(1.03)  # healthy: at most 10; growth by 10 % a step is caught at 120 times
    HOLD = 500  # heavy tails: the next outbreak is some 100 steps away
    MARGIN = math.log(1.2)  # above the usual norm, so that calm steps pass in an outbreak
    MEMORY = 20_000  # of the record, some epochs: with 5,000 nets that know their data by heart have spikes
    BETA = 0.98  # of the usual norm: 50 steps
    WIDTH = math.log(2.0)  # by which one norm may pull at the usual one; grows with the spread, so that levels are left

    def __init__(
        self,
        clipper: Clipper | None = None,
        *,
        latch: bool = False,
        dry_run: bool = False,
        warmup_norm: float | None = None,
    ) -> None:
        self.clipper = None if clipper is None else check_clipper("WhenExploding: clipper", clipper)
        self.latch = check_flag("WhenExploding: latch", latch, "leave it out for False")
        self.dry_run = check_flag("WhenExploding: dry_run", dry_run, "leave it out for False")
        self.warmup_norm = warmup_norm
        if warmup_norm is not None:
            self.warmup_norm = check_number("WhenExploding: warmup_norm", warmup_norm, "leave it out for none")
        self.whole = clipper is None or clipper.whole

    def decide(self, gradients: Gradients) -> Cut:
        """Judge the norm, and open or close the gate."""
        norm = gradients.total
        armed, usual = self._judge(norm)
        outbreak = self.state["left"] > 0
        if self.warmup_norm is not None:
            early = (self.state["count"] <= self.WARMUP) & (norm > self.warmup_norm)
            armed, usual = armed | early, torch.where(early, usual.clamp(max=self.warmup_norm), usual)
        inner = None if self.clipper is None else self.clipper.cut(gradients)
        cut = (factor(gradients, limited(norm, usual)) if inner is None else inner).where(armed)
        acted = cut.clipped
        if self.dry_run:
            cut = replace(cut.where(torch.zeros_like(armed)), would=self._effect(gradients, cut))
        return replace(cut, armed=armed, acted=acted, outbreak=outbreak)

    def _effect(self, gradients: Gradients, cut: Cut) -> Tensor:
        """The coefficient of a cut; where it tells none, by trying it on a copy."""
        if cut.coefficient is not None:
            return cut.coefficient
        tried = gradients.copy()
        self._act(tried, cut)
        after = torch.linalg.vector_norm(tried.measure(tried.tensors))
        return torch.where(cut.clipped, after / gradients.total, 1.0)

    def _act(self, gradients: Gradients, cut: Cut) -> None:
        if self.clipper is None:
            super().apply(gradients, cut)
        else:
            self.clipper.apply(gradients, cut)

    def children(self) -> Sequence[Clipper]:
        """The clipper inside, if there is one."""
        return () if self.clipper is None else (self.clipper,)

    def apply(self, gradients: Gradients, cut: Cut) -> None:
        """Let the clipper inside do it."""
        if not self.dry_run:
            self._act(gradients, cut)

    def _judge(self, norm: Tensor) -> tuple[Tensor, Tensor]:
        """Whether the gate is open, and the norm to clip to while it is."""
        state = self.on(norm.device)
        taken = usable(norm)
        x = torch.where(taken, norm, 1.0).log()
        if not state:
            state.update(
                {
                    name: torch.zeros_like(x)
                    for name in ("mean", "variance", "record", "slow", "count", "left", "leapt", "fell")
                }
            )
            state["last"] = x.new_zeros(4)
        count = state["count"]
        new = count == 0
        mean, record, slow, last = (torch.where(new, x, state[name]) for name in ("mean", "record", "slow", "last"))
        sinking = (record - mean).clamp(min=0.0) / (20.0 + count.square() / 20.0).clamp(max=self.MEMORY)
        record = torch.maximum(record - sinking, last.min())
        slow = torch.minimum(record, slow + self.CLIMB)
        fell = state["fell"] * (1.0 - 1.0 / self.RECENT) + state["leapt"] * (x < record)
        spike = taken & (x - record > torch.where(fell >= self.SUSPECT, self.AGAIN, self.SPIKE))
        outbreak = taken & (count >= self.WARMUP) & ((x - record > self.OUTBREAK) | (x - slow > self.FAR))
        left = torch.where(outbreak, float(self.HOLD), (state["left"] - float(not self.latch)).clamp(min=0.0))
        level = torch.where(left > 0, mean + self.MARGIN, record)
        armed = (left > 0) | spike
        edge = torch.maximum(3.0 * state["variance"].sqrt(), torch.full_like(x, self.WIDTH))
        step = torch.minimum(torch.maximum(x - mean, -edge), edge)
        rate = (1.0 / (count + 1.0)).clamp(min=1.0 - self.BETA)
        moved = {
            "mean": mean + rate * step,
            "variance": (1.0 - rate) * (state["variance"] + rate * step.square()),
            "record": record,
            "slow": slow,
            "count": count + 1.0,
            "left": left,
            "leapt": (x - record > self.SPIKE).to(x.dtype),
            "fell": fell,
            "last": torch.cat([last.narrow(0, 1, 3), x.reshape(1)]),
        }
        state.update({name: torch.where(taken, value, state[name]) for name, value in moved.items()})
        return armed, level.exp()
