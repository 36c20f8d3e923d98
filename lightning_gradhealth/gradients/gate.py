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

    It compares the norm with a *record*: the greatest level that the run has reached. A level is what four
    norms in a row have reached: growth stays, the spikes of an explosion come back. A norm is

    - a spike if it is more than 2.5 times the record and stands out of what the run has shown: more than 1.3 times the
      greatest norm so far (5 times, of the first 8), as it was applied, and more than `6.5 (1 + 8 / n)` standard
      deviations above the usual log norm, a running mean, n being the norms so far. The deviation is that of the falls
      from one norm to the next, which growth does not widen, and a spike little. Of the first 8 norms those of 20
      times the greatest are spikes in any case, and of the first 3 only the third can be one. Its step is clipped, to
      the record, as long as 2 spikes or .5 % of the steps so far are not exceeded: what comes more often belongs to
      this run. Clipped all the same are a spike that follows on another and rises, and those of a *wild* run;
    - an outbreak if it is a spike of 6 times the record in a wild run, or of 30 times right after another, and not the
      first, nor one in more than 400 steps, or if the record is 30 times one that climbs by 3 % a step at most (all
      that after the first 50 steps), or if the gradients of the first 150 steps *swing*: of 16 in a row each points
      back on the one before (mean cosine below -.15), and they are larger each time. For 500 steps all norms are
      clipped to 1.2 times the usual one.

    A run is wild if even the norms below the usual one scatter, the root mean square of their distance from it being
    beyond .6 in the log (or the gate is open), and spikes are rare, at most 3 % of the steps. That tells noise with
    tails so heavy that it wrecks a net from the usual noise with a rare class or a few large samples in it.

    Record and greatest norm sink back to the usual one over `20 + t^2 / 20` steps, t being the steps so far, 20,000 at
    most: the wild first steps are soon forgotten, and a net that has learned its data by heart may still meet a norm
    that was usual before. Everything is a ratio, so that neither the scale of the loss nor the learning rate matters.
    Norms that are 0, NaN or Inf change nothing.

    After a lasting change of level of any size norms pass again: after four steps, or after a few hundred if it was
    an outbreak. An explosion within the first five steps is none that a history could tell: `warmup_norm` can.

    The constants are measured on 7,111 small noisy trainings that learn (16 tasks, SGD with and without momentum and
    Adam, eight settings of the rate, batches of 1 to 64, 8 seeds, shuffled or not). Of 5,719 with 13 everyday tasks
    71 were clipped in the first 100 steps, and 26 in more than 2 steps and .5 % of 100 to 2,000; of 1,392 with a rare
    class (5 %, or 3 % that weigh 30 times as much) or a variance that is learned too, 504 and 167, most with batches
    of 1 or 4. See tests/benchmarks/clipping.py for what it does to sick ones. Such runs are chaotic: one step decides
    how some end.

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
    SPARE, SHARE = 2.0, 0.005  # spikes that are clipped in any case, and of all steps: what is frequent is no spike
    OFTEN = (
        1 / 400
    )  # spikes that make an outbreak, of all steps: sick MLPs have one in 40 steps, calm nets a few in 1,000
    WILD, RARE = 0.6, 0.03  # sick MLPs: .65 to 1.4 in 12 of 13 and spikes in 2.5 % of the steps; rare classes: in more
    OUTBREAK = math.log(6.0)  # healthy: at most 4.4
    FAR, CLIMB = math.log(30.0), math.log(1.03)  # healthy: at most 10; growth by 10 % a step is caught at 120 times
    LOOKS = 200  # steps whose directions are compared: 100 more than count, for those that a scaler or a NaN makes void
    EARLY, WINDOW = 150, 16  # steps in which swings count, and how many make one: an RNN is beyond rescue after some 35
    TURN, RISEN, PEAK, NEW = -0.15, 0.5, 1.5, 1.0  # see `_swings`; healthy: about 1 in 500 noisy runs meets all four
    HOLD = 500  # heavy tails: the next outbreak is some 100 steps away
    MARGIN = math.log(1.2)  # above the usual norm, so that calm steps pass in an outbreak
    MEMORY = 20_000  # of the record, some epochs: with 5,000 nets that know their data by heart have spikes
    BETA = 0.98  # of the usual norm: 50 steps
    WIDTH = math.log(2.0)  # by which one norm may pull at the usual one; grows with the spread, so that levels are left
    REMEMBERED = (
        *("mean", "variance", "spread", "below", "record", "slow", "count"),
        *("spikes", "clipped", "left", "leapt", "last", "applied", "greatest", "turns", "floor", "peak"),
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
        greatest 1.5 above that; and the greatest 1 above all before.
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
        deviation = (1.0 + self.FEW / count.clamp(min=1.0)) * state["spread"].sqrt()
        unknown = count < self.UNKNOWN
        level = torch.maximum(record + self.SPIKE, mean + self.SIGMAS * deviation)
        spike = x > torch.maximum(level, greatest + torch.where(unknown, self.FIRST, self.LEAP))
        catastrophe = unknown & (count > 1) & (x > greatest + self.CATASTROPHE)
        spike = taken & (catastrophe | (spike & (count >= self.FEWEST)))
        spikes, steps = state["spikes"] + spike, count + 1.0
        wild = ((state["below"].sqrt() > self.WILD) | (state["left"] > 0)) & (spikes <= self.RARE * steps)
        row, size = state["leapt"] > 0, x - record
        often = spikes >= (self.OFTEN * steps).clamp(min=2.0)
        burst = spike & often & ((wild & (size > self.OUTBREAK)) | (row & (size > self.FAR)))
        outbreak = taken & (count >= self.WARMUP) & (burst | (record - slow > self.FAR))
        rising = row & (x > last.select(0, self.WINDOW - 1))
        due = state["clipped"] + 1.0 <= (self.SHARE * steps).clamp(min=self.SPARE)
        clip = spike & (due | wild | rising)
        last = _shifted(last, x)
        if turn is not None:
            outbreak = outbreak | (taken & self._swings(x, last, turn, taken))
        left = torch.where(outbreak, float(self.HOLD), (state["left"] - float(not self.latch)).clamp(min=0.0))
        limit = torch.where(left > 0, mean + self.MARGIN, record)
        armed = (left > 0) | clip
        applied = torch.where(armed, torch.minimum(x, limit), x)
        edge = (3.0 * state["variance"].sqrt()).clamp(min=self.WIDTH)
        step = (x - mean).clamp(-edge, edge)
        whole = 1.0 / steps  # of all steps alike
        rate = whole.clamp(min=1.0 - self.BETA)
        bound = torch.where(count > 1, (self.BOUND * state["spread"].sqrt()).clamp(min=self.LEAST), math.inf)
        fall = torch.minimum((before - applied).clamp(min=0.0), bound)
        falls = (1.0 / count.clamp(min=1.0)).clamp(min=1.0 - self.BETA) * (count > 0)
        moved = {
            "mean": mean + rate * step,
            "below": state["below"].lerp((mean - x).clamp(min=0.0).square(), whole),
            "variance": (1.0 - rate) * (state["variance"] + rate * step.square()),
            "spread": state["spread"] + falls * (fall.square() - state["spread"]),
            "record": record,
            "slow": slow,
            "count": steps,
            "left": left,
            "leapt": spike.to(x.dtype),
            "spikes": spikes,
            "clipped": state["clipped"] + clip,
            "applied": applied,
            "greatest": greatest,
        }
        both = (torch.stack(list(moved.values())), torch.stack([state[name] for name in moved]))
        state.update(zip(moved, torch.where(taken, *both).unbind(), strict=True))
        state["last"] = torch.where(taken, last, state["last"])
        return armed, limit.exp()


def _shifted(window: Tensor, value: Tensor) -> Tensor:
    """A window of values without its first one, and with another at its end."""
    return torch.cat([window.narrow(0, 1, len(window) - 1), value.unsqueeze(0)])
