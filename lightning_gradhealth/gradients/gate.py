"""The gate of adaptive clipping: it tells an explosion from growth, noise and convergence by norms and directions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

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
from lightning_gradhealth.gradients.sampling import sample
from lightning_gradhealth.norms import wide
from lightning_gradhealth.validation import check_flag, check_number


class WhenExploding(Clipper):
    """The gate: clip only while the gradient norm explodes, and leave every bit alone otherwise. `clip="adaptive"`.

    It compares the norm with a *record*: the greatest level that the run has taken in its stride. A level is what four
    norms in a row have reached: growth stays, the spikes of an explosion come back. A norm is

    - a spike if it is more than 2.5 times the record and stands out of what the run has shown: more than 1.3 times the
      greatest norm so far (5 times, of the first 8), as it was applied, and more than `6.5 (1 + 8 / n)` standard
      deviations above the usual log norm, a running mean, n being the norms so far. The deviation is that of the falls
      from one norm to the next, which growth does not widen, and a spike little. This one step is clipped, to the
      record. After two spikes that came straight back below the record, within some 40 steps, 1.25 times and 3
      deviations are enough. Of the first 8 norms those of 20 times the greatest are spikes in any case, and of the
      first 3 only the third can be one;
    - an outbreak if it is a spike of 6 times the record and not the first spike, or if the record is 30 times one that
      climbs by 3 % a step at most (after the first 50 steps), or if the gradients of the first 100 steps *swing*: of 16
      in a row each points back on the one before (mean cosine below -.15), and they are larger each time. For 500
      steps all norms are clipped to 1.2 times the usual one.

    Record and greatest norm sink back to the usual one over `20 + t^2 / 20` steps, t being the steps so far, 20,000 at
    most: the wild first steps are soon forgotten, and a net that has learned its data by heart may still meet a norm
    that was usual before. Everything is a ratio, so that neither the scale of the loss nor the learning rate matters.
    Norms that are 0, NaN or Inf change nothing.

    After a lasting change of level of any size norms pass again: after four steps, or after a few hundred if it was
    an outbreak. What is large but rare is never learned: where one step in ten has 5 times the usual norm by design
    (a penalty now and then, batches of another task), such steps are clipped each time, unless all norms vary as much.

    The constants are measured on 8,593 small noisy trainings that learn (ten tasks, SGD with and without momentum and
    Adam, five rates, batches of 1 to 64, 8 seeds): 74 of them were clipped in the first 100 steps, and 66 in more than
    2 steps and .5 % of them, most of these with batches of a single sample or targets with heavy tails. See
    tests/benchmarks/clipping.py for what it does to sick ones. Such runs are chaotic: one step decides how some end.

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
        >>> for norm in [1.0] * 60 + [1e6, 1e6]:
        ...     weight = nn.Parameter(torch.zeros(1)); weight.grad = torch.tensor([norm])
        ...     gradients = Gradients.of(weight)
        ...     cut = clipper.decide(gradients)
        ...     clipper.apply(gradients, cut)
        >>> cut.armed.item(), round(weight.grad.item(), 1)
        (True, 1.2)
    """

    WARMUP = 50  # steps without outbreaks: while learning sets in, norms grow by orders of magnitude
    SPIKE = math.log(2.5)  # healthy: up to 8 of 2,000 norms beyond it, most of them while learning sets in
    SIGMAS = 6.5  # above the usual log norm; with 5, 3 % of small noisy runs are touched, and with 8 sick ones get away
    FEW = 8.0  # the deviation of n normal numbers is uncertain: about what Student's t asks for at that probability
    FEWEST = 3  # norms to compare with: the very first may be small by chance
    UNKNOWN, FIRST = 8, math.log(5.0)  # of fewer norms than that little is known,
    CATASTROPHE = math.log(20.0)  # but a catastrophe is one all the same
    BOUND, LEAST = 2.0, math.log(1.5)  # deviations, or what a fall may count at least: a spike widens little
    LEAP = math.log(1.3)  # over the greatest norm, as it was applied: what has been that large before is nothing new
    LESS = 3.0  # deviations that are enough for a spike after a spike
    SUSPECT, AGAIN, RECENT = 1.3, math.log(1.25), 64.0  # healthy: norms that leap while learning sets in stay up
    OUTBREAK = math.log(6.0)  # healthy: at most 4.4
    FAR, CLIMB = math.log(30.0), math.log(1.03)  # healthy: at most 10; growth by 10 % a step is caught at 120 times
    LOOKS = 200  # steps whose directions are compared: 100 more than count, for those that a scaler or a NaN makes void
    EARLY, WINDOW = 100, 16  # steps in which swings count, and how many make one: an RNN is beyond rescue after some 35
    TURN, RISEN, PEAK, NEW = -0.15, 0.5, 1.5, 0.5  # see `_swings`; healthy: 16 of 8,593 noisy runs meet all four
    HOLD = 500  # heavy tails: the next outbreak is some 100 steps away
    MARGIN = math.log(1.2)  # above the usual norm, so that calm steps pass in an outbreak
    MEMORY = 20_000  # of the record, some epochs: with 5,000 nets that know their data by heart have spikes
    BETA = 0.98  # of the usual norm: 50 steps
    WIDTH = math.log(2.0)  # by which one norm may pull at the usual one; grows with the spread, so that levels are left
    REMEMBERED = (
        *("mean", "variance", "spread", "record", "slow", "count"),
        *("spikes", "left", "leapt", "fell", "last", "applied", "greatest", "turns", "floor", "peak"),
    )

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
        self._steps = 0
        self._now: Tensor | None = None
        self._parts: dict[str, Tensor] = {}  # where each rank holds a part of the sample: no state to be saved

    def decide(self, gradients: Gradients) -> Cut:
        """Judge the norm, and open or close the gate."""
        norm = gradients.total
        armed, usual = self._judge(norm, self._turn(gradients))
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

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` returned, and go on comparing directions from the step reached there."""
        super().load_state_dict(state)
        self._steps = int(self.state["count"].max()) if "count" in self.state else 0

    def asking(self) -> list[Clipper]:
        """Itself in the first steps, whose directions it compares: later there is a history to judge by."""
        return [*([self] if self._steps < self.LOOKS else ()), *super().asking()]

    def sums(self, tensors: Sequence[Tensor | None], shares: Tensor | None = None) -> Tensor:
        """Of a sample of the elements: the product with that of the step before, and with itself; shape (2,)."""
        self._now, counted = sample(tensors, shares)
        now = self._now.to(wide(self._now.device))
        before = self._parts.get("sample", self.on(now.device).get("sample"))
        if before is None or before.shape != now.shape:
            before = torch.zeros_like(now)
        both = torch.stack([now * before, now.square()])
        return (both if counted is None else both * counted).sum(1)

    def _turn(self, gradients: Gradients) -> Tensor | None:
        """Cosine between this gradient and the one of the step before, shape (); 0 where it is not known, then None."""
        if self._steps >= self.LOOKS:
            self._now = None
            for kept, name in ((self._parts, "sample"), (self.state, "sample"), (self.state, "length")):
                kept.pop(name, None)
            return None
        self._steps += 1
        norm = gradients.total
        sums = gradients.sums.get(self)
        dot, square = (self.sums(gradients.writable()) if sums is None else sums).to(norm.device).unbind()
        assert self._now is not None
        taken, now = usable(norm), self._now
        known, length = self.on(norm.device).get("length", torch.zeros_like(square)), square.sqrt()
        kept = self.on(now.device) if sums is None else self._parts
        before = kept.get("sample", now)
        kept["sample"] = torch.where(taken.to(now.device), now, before) if before.shape == now.shape else now
        self.state["length"] = torch.where(taken, length, known)
        cosine = dot / (known * length)
        return torch.where(cosine.isfinite(), cosine, 0.0)

    def _swings(self, x: Tensor, last: Tensor, turn: Tensor, taken: Tensor) -> Tensor:
        """Whether the gradients turn back on themselves, and higher each time, shape of `x`, the log norm.

        A step that is too large lands on the other slope of the valley, and the next gradient points back. Each must
        be told from noise, and from one bad batch: the mean cosine of 16 steps lies below -.15 and 2 standard errors
        below 0; the mean log norm of all but the greatest of them .5 above the least such mean so far, the second
        greatest 1.5 above that; and the greatest .5 above all before.
        """
        state, count = self.state, self.state["count"]
        top, second = last.topk(2, dim=0).values.unbind()
        new, level = count < self.WINDOW, (last.sum(0) - top) / (self.WINDOW - 1)  # the greatest may be one bad batch
        turns = _shifted(state["turns"], turn.to(x.dtype).expand_as(x))
        moved = {
            "turns": turns,
            "floor": torch.where(new, level, torch.minimum(state["floor"], level)),
            "peak": torch.where(new, x, torch.maximum(state["peak"], state["last"].select(0, 0))),
        }
        state.update({name: torch.where(taken, value, state[name]) for name, value in moved.items()})
        floor, peak = state["floor"], state["peak"]
        grown = (level - floor > self.RISEN) & (second - floor > self.PEAK) & (top - peak > self.NEW)
        error = turns.std(0) / math.sqrt(self.WINDOW)
        back = turns.mean(0) < (-2.0 * error).clamp(max=self.TURN)
        return grown & back & (count >= self.WINDOW) & (count < self.EARLY)

    def _judge(self, norm: Tensor, turn: Tensor | None) -> tuple[Tensor, Tensor]:
        """Whether the gate is open, and the norm to clip to while it is; of many runs at once if `norm` has a shape."""
        state = self.on(norm.device)
        taken = usable(norm)
        x = torch.where(taken, norm, 1.0).log()
        if not all(name in state for name in self.REMEMBERED):
            state.update({name: torch.zeros_like(x) for name in self.REMEMBERED})
            state.update({name: x.new_zeros(self.WINDOW, *x.shape) for name in ("last", "turns")})
        count = state["count"]
        known = ("mean", "record", "slow", "applied", "greatest")
        mean, record, slow, before, greatest = (torch.where(count == 0, x, state[name]) for name in known)
        last = torch.where(count == 0, x, state["last"])
        memory = (20.0 + count.square() / 20.0).clamp(max=self.MEMORY)
        record = torch.maximum(
            record - (record - mean).clamp(min=0.0) / memory, last.narrow(0, self.WINDOW - 4, 4).amin(0)
        )
        greatest = torch.maximum(greatest - (greatest - mean).clamp(min=0.0) / memory, before)
        slow = torch.where(count < self.WINDOW, record, torch.minimum(record, slow + self.CLIMB))
        fell = state["fell"] * (1.0 - 1.0 / self.RECENT) + state["leapt"] * (x < record)
        suspect = fell >= self.SUSPECT
        deviation = (1.0 + self.FEW / count.clamp(min=1.0)) * state["spread"].sqrt()
        usual = mean + torch.where(suspect, self.LESS, self.SIGMAS) * deviation
        above = torch.maximum(record + torch.where(suspect, self.AGAIN, self.SPIKE), usual)
        unknown = count < self.UNKNOWN
        leap = torch.where(unknown, self.FIRST, self.LEAP)
        spike = x > torch.where(suspect, above, torch.maximum(above, greatest + leap))
        catastrophe = unknown & (count > 1) & (x > greatest + self.CATASTROPHE)
        spike = taken & (catastrophe | (spike & (count >= self.FEWEST)))
        again = state["spikes"] > 0
        outbreak = (
            taken
            & (count >= self.WARMUP)
            & ((spike & again & (x - record > self.OUTBREAK)) | (record - slow > self.FAR))
        )
        last = _shifted(last, x)
        if turn is not None:
            outbreak = outbreak | (taken & self._swings(x, last, turn, taken))
        left = torch.where(outbreak, float(self.HOLD), (state["left"] - float(not self.latch)).clamp(min=0.0))
        limit = torch.where(left > 0, mean + self.MARGIN, record)
        armed = (left > 0) | spike
        applied = torch.where(armed, torch.minimum(x, limit), x)
        edge = torch.maximum(3.0 * state["variance"].sqrt(), torch.full_like(x, self.WIDTH))
        step = torch.minimum(torch.maximum(x - mean, -edge), edge)
        rate = (1.0 / (count + 1.0)).clamp(min=1.0 - self.BETA)
        bound = torch.where(count > 1, (self.BOUND * state["spread"].sqrt()).clamp(min=self.LEAST), math.inf)
        fall = torch.minimum((before - applied).clamp(min=0.0), bound)
        falls = (1.0 / count.clamp(min=1.0)).clamp(min=1.0 - self.BETA) * (count > 0)
        moved = {
            "mean": mean + rate * step,
            "variance": (1.0 - rate) * (state["variance"] + rate * step.square()),
            "spread": state["spread"] + falls * (fall.square() - state["spread"]),
            "record": record,
            "slow": slow,
            "count": count + 1.0,
            "left": left,
            "leapt": (spike & (x - record > self.SPIKE)).to(x.dtype),
            "fell": fell,
            "spikes": state["spikes"] + spike,
            "last": last,
            "applied": applied,
            "greatest": greatest,
        }
        state.update({name: torch.where(taken, value, state[name]) for name, value in moved.items()})
        return armed, limit.exp()


def _shifted(window: Tensor, value: Tensor) -> Tensor:
    """A window of values without its first one, and with another at its end."""
    return torch.cat([window.narrow(0, 1, len(window) - 1), value.unsqueeze(0)])
