"""Rules for what signals do over depth: activations on their way to the loss, gradients on their way back."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from lightning_gradhealth.flows import ChainPoint, SignalChain
from lightning_gradhealth.ratios import fitted_gain, median
from lightning_gradhealth.records import Condition, Severity, StepRecord
from lightning_gradhealth.rules.base import (
    NOT_MEASURED,
    NotMeasured,
    Rule,
    Thresholds,
    Verdict,
    by_optimizer,
)
from lightning_gradhealth.rules.course import (
    follow_loss,
    follow_updates,
    follow_weights,
    followed_updates,
    has_learned,
    shrunken,
)
from lightning_gradhealth.rules.remedies import Makeup, Remedy, for_dead, for_decay, for_depth, for_depth_in_training

BACK, FORTH = "on the way to the first layers", "on the way to the last layers"


@dataclass(frozen=True)
class DepthVerdict:
    """A signal that vanishes or explodes over depth.

    Attributes:
        ratio: The far quarter over the near one, as the signal travels.
        gain: The fitted gain per layer; None where zeros leave none.
        hit: Which points are concerned.
        critical: It is beyond hope.
    """

    ratio: float
    gain: float | None
    hit: tuple[int, ...]
    critical: bool


def judge_depth(rms: Sequence[float], *, vanishing: bool, thresholds: Thresholds, eased: bool) -> DepthVerdict | None:
    """Judge a signal that travels from the last entry of `rms` to the first.

    The median of the far quarter is held against that of the near one, the fitted gain to the power of the depth must
    agree, and it must not be the work of a single step: towers side by side, a weak auxiliary loss, one blocked layer
    are no matter of depth.

    Args:
        rms: Root mean squares along the way, at least `depth_layers` of them, finite.
        vanishing: True looks for vanishing, False for exploding signals.
        thresholds: The numbers to compare with.
        eased: It is found already: ten times as good a signal is needed to be clear again.

    Example:
        >>> rms = [0.1**depth for depth in range(9, 0, -1)]
        >>> verdict = judge_depth(rms, vanishing=True, thresholds=Thresholds(), eased=False)
        >>> round(verdict.gain, 6), verdict.critical, verdict.hit
        (0.1, True, (0, 1, 2, 3, 4, 5, 6))
    """
    quarter = max(1, len(rms) // 4)
    far, near = median(rms[:quarter]), median(rms[-quarter:])
    if near == 0.0 and vanishing:
        near = max(rms[-quarter:])  # dead already inside the near quarter
    if near == 0.0:
        return None  # nothing anywhere, or a loss to which the last layer makes no difference
    ratio, gain = far / near, fitted_gain(rms)
    if gain is None:
        return None
    whole = gain ** (len(rms) - 1) if far > 0.0 else ratio  # zeros have no logarithm, and so no part in the gain
    hops = [math.log(b / a) for a, b in zip(rms, rms[1:], strict=False) if a > 0.0 and b > 0.0]
    sign = 1 if vanishing else -1
    limit = math.log(thresholds.depth_ratio * (10 if eased else 1))
    fall, fitted = (sign * (math.log(v) if v > 0.0 else -math.inf) for v in (ratio, whole))
    if fall >= limit or fitted >= limit:
        return None
    steepest = max(hops, key=lambda hop: sign * hop)
    if far == 0.0:  # underflow at the end of a fall, or one blocked layer with zeros behind it
        fall = math.log(min(value for value in rms if value > 0.0) / near)
        without = fall + sign * steepest
    else:
        without = sign * math.log(_ratio_without(rms, steepest, quarter))
    if without >= 0.75 * limit:
        return None
    bound = near * math.exp(sign * limit / 2)
    hit = tuple(place for place, value in enumerate(rms) if (value < bound if vanishing else value > bound))
    return DepthVerdict(ratio, gain, hit, far == 0.0 or fall < math.log(thresholds.depth_critical))


def _ratio_without(rms: Sequence[float], hop: float, quarter: int) -> float:
    """The far quarter over the near one, had the signal not made one of its steps; `hop` is that step's logarithm.

    A step inside of a quarter that the median has left out takes nothing away: an encoder before a net that is applied
    twice lies behind as many layers again as the chain shows.
    """
    pairs = enumerate(zip(rms, rms[1:], strict=False))
    place = next(k for k, (a, b) in pairs if a > 0.0 and b > 0.0 and math.log(b / a) == hop)
    evened = [value * math.exp(hop) for value in rms[: place + 1]] + list(rms[place + 1 :])
    return median(evened[:quarter]) / (median(evened[-quarter:]) or max(evened[-quarter:]))


def depth_limit(gain: float | None, ratio: float) -> int | None:
    """Number of layers after which a signal with this gain per layer has changed by the factor `ratio`.

    Example:
        >>> depth_limit(0.5, 1e-3)
        10
    """
    if gain is None or gain in (0.0, 1.0, math.inf):
        return None
    return math.ceil(abs(math.log(ratio) / math.log(gain)))


class _Depth(Rule):
    """A signal that vanishes or explodes over the main chain.

    Args:
        vanishing: True looks for vanishing, False for exploding signals.
        thresholds: See `Thresholds`.
    """

    vanishing_condition: Condition
    exploding_condition: Condition
    noun: str

    def __init__(self, vanishing: bool, thresholds: Thresholds | None = None) -> None:
        super().__init__(thresholds)
        self.vanishing = vanishing
        self.condition = self.vanishing_condition if vanishing else self.exploding_condition
        self.patience = self.thresholds.depth_probes if vanishing else self.thresholds.explosion_probes

    def check(self, record: StepRecord) -> Verdict | NotMeasured | None:
        """Judge every chain that is long enough; the worst one counts."""
        follow_loss(self, record)
        follow_updates(self, record)
        follow_weights(self, record)
        answers = [self._judge(chain, record) for chain in self._chains(record)]
        verdicts = [answer for answer in answers if answer is not None]
        worst = max(verdicts, key=lambda verdict: Severity(verdict.severity).rank, default=None)
        if self.vanishing:
            # what is not beyond hope may heal in the first steps
            certain = worst is not None and worst.severity == Severity.CRITICAL
            probes = self.thresholds.depth_probes
            at_once = certain or probes == 1
            self.patience, self.span = (probes, 0) if at_once else (probes + 1, self.thresholds.growth_window // 2)
            return worst if answers else NOT_MEASURED
        if worst is None and self.memory.get("last") and record.non_finite_steps:
            worst = Verdict(**self.memory["last"])  # what came of it
        self.memory["last"] = None if worst is None else {**vars(worst), "severity": str(worst.severity)}
        beyond_hope = worst is not None and worst.severity == Severity.CRITICAL
        self.patience = 1 if beyond_hope else self.thresholds.explosion_probes
        return worst if answers or worst else NOT_MEASURED

    def _chains(self, record: StepRecord) -> list[SignalChain]:
        raise NotImplementedError

    def _judge(self, chain: SignalChain, record: StepRecord) -> Verdict | None:
        raise NotImplementedError

    def _depth(self, rms: Sequence[float]) -> DepthVerdict | None:
        return judge_depth(rms, vanishing=self.vanishing, thresholds=self.thresholds, eased=self.active)

    def _start(self, rms: Sequence[float]) -> None:
        """Keep the ratio of the first probe at which a signal came through; `rms` as for `judge_depth`."""
        if self.memory.get("at_start") is None and rms and rms[0] > 0.0 and rms[-1] > 0.0:
            quarter = max(1, len(rms) // 4)
            far, near = median(rms[:quarter]), median(rms[-quarter:])
            self.memory["at_start"] = far / near if near > 0.0 else None
            self.memory["first_to_last_at_start"] = rms[0] / rms[-1]

    def _remedy(self, record: StepRecord, layers: Collection[str]) -> Remedy:
        """By whether it was there from the start, or came with training."""
        start, limit, updates = self.memory.get("at_start"), self.thresholds.depth_ratio, followed_updates(self)
        shrunk = shrunken(self, record, layers)
        decay = for_decay(record, layers, updates, shrunk=shrunk) if self.vanishing else None
        good = start is not None and (start if self.vanishing else 1.0 / start) > math.sqrt(limit)
        weak = start is not None and not good and (start if self.vanishing else 1.0 / start) > limit
        if good or (weak and updates is not None and updates.fast):
            return for_depth_in_training(updates, decay, start, weak=weak)
        return decay or for_depth(self.vanishing, Makeup.of(record, layers))

    def _verdict(self, found: DepthVerdict, points: Sequence[ChainPoint], record: StepRecord, way: str) -> Verdict:
        """In words. `points` are in the order of `found`: the signal travels from the last to the first."""
        first, last = points[0], points[-1]
        ends = [(point.backward_rms if way == BACK else point.forward_rms) or 0.0 for point in (first, last)]
        ratio = ends[0] / ends[1] if ends[1] else found.ratio
        share = f"the signal at {first.name} is " + (f"{ratio:.1e} of that at {last.name}" if ratio else "exactly 0")
        reach = f", gain {found.gain:.2g} per layer" if found.gain is not None else ""
        verb = "vanish" if self.vanishing else "explode"
        layers = _in_order(points[place].layer for place in (found.hit if way == BACK else found.hit[::-1]))
        remedy = self._remedy(record, layers)
        grave = Severity.CRITICAL if found.critical else Severity.WARNING
        return Verdict(
            severity=Severity.INFO if self.vanishing and has_learned(self) else grave,
            summary=f"{self.noun} {verb} {way}: over {len(points)} layers {share}{reach}",
            remedy=remedy.words,
            code=remedy.code,
            layers=layers,
            evidence={
                "first_to_last": ratio,
                "at_start": self.memory.get("first_to_last_at_start"),
                "fitted_gain": found.gain,
                "layers_measured": len(points),
                "depth_limit": depth_limit(found.gain, self.thresholds.depth_ratio),
            },
        )


class DepthRule(_Depth):
    """Vanishing or exploding gradients over depth, by the signals on the main chain.

    Where signals are not measured, the gradients of biases stand in for them, each a batch sum of dL/d(output); once
    signals have been seen, these say nothing any more.
    """

    vanishing_condition = Condition.VANISHING_GRADIENTS
    exploding_condition = Condition.EXPLODING_GRADIENTS
    noun = "gradients"

    def _chains(self, record: StepRecord) -> list[SignalChain]:
        measured = [_measured(chain, "backward_rms") for chain in record.chains]
        if any(len(chain.points) > 1 for chain in measured):
            self.memory["signals"] = True
        if self.memory.get("signals", False):
            return [chain for chain in measured if len(chain.points) >= self.thresholds.depth_layers]
        return [chain for chain in _stand_ins(record) if len(chain.points) >= self.thresholds.depth_layers]

    def _judge(self, chain: SignalChain, record: StepRecord) -> Verdict | None:
        rms = [point.backward_rms or 0.0 for point in chain.points]
        self._start(rms)
        if self.vanishing and (blocked := self._blocked(chain, record)):
            return blocked
        found = self._depth(rms)
        # He's initialisation keeps the norm of a gradient, not its RMS, where widths change: both have to agree
        norms = [value * math.sqrt(point.size) for value, point in zip(rms, chain.points, strict=True)]
        if found is None or self._depth(norms) is None:
            return None
        return self._verdict(found, chain.points, record, BACK)

    def _blocked(self, chain: SignalChain, record: StepRecord) -> Verdict | None:
        """Nothing at all comes through somewhere, and has not for long: no head that starts at zero."""
        dead = self.memory.setdefault("dead", {})  # layers have their samples together at steps of their own
        dead.update({la.name: la.dead_fraction for la in record.layers if la.dead_fraction is not None})
        rms = [point.backward_rms or 0.0 for point in chain.points]
        passed = [place for place, value in enumerate(rms) if value > 0.0]
        cut = passed[0] if passed else 0
        key = f"blocked{chain.optimizer}"
        if not cut or has_learned(self):  # where there is nothing left to learn, gradients end in zeros
            self.memory.pop(key, None)
            return None
        since = self.memory.setdefault(key, record.step)
        if record.step - since < self.thresholds.growth_window:
            return None
        found = DepthVerdict(0.0, None, tuple(range(cut)), critical=True)
        return self._by_dead_units(self._verdict(found, chain.points, record, BACK), record)

    def _by_dead_units(self, verdict: Verdict, record: StepRecord) -> Verdict:
        """A layer whose units are dead lets nothing through: then that is the cause, and what cures it the remedy."""
        shares: dict[str, float] = self.memory["dead"]
        dead = [la for la in record.layers if la.name in verdict.layers]
        dead = [la for la in dead if shares.get(la.name, 0.0) >= self.thresholds.dead_most]
        if not dead:
            return verdict
        names, updates = [layer.name for layer in dead], followed_updates(self)
        decay = for_decay(record, names, updates, shrunk=shrunken(self, record, names))
        remedy = for_dead(dead, Makeup.of(record, names), updates, decay, died=self.memory.get("at_start") is not None)
        worst = max(names, key=lambda name: shares[name])
        share = f"{100 * shares[worst]:.0f} % of the units of {worst} are never active"
        return replace(verdict, summary=f"{verdict.summary}: {share}", remedy=remedy.words, code=remedy.code)


class ActivationDepth(_Depth):
    """Vanishing or exploding activations over depth; an explosion is one beside the network's input, too."""

    vanishing_condition = Condition.VANISHING_ACTIVATIONS
    exploding_condition = Condition.EXPLODING_ACTIVATIONS
    noun = "activations"

    def _chains(self, record: StepRecord) -> list[SignalChain]:
        measured = [_measured(chain, "forward_rms") for chain in record.chains]
        return [chain for chain in measured if len(chain.points) >= self.thresholds.depth_layers]

    def _judge(self, chain: SignalChain, record: StepRecord) -> Verdict | None:
        points = chain.points[::-1]
        rms = [point.forward_rms or 0.0 for point in points]
        self._start(rms)
        found = self._depth(rms)
        if found is None:
            return None
        if not self.vanishing and max(rms) * self.thresholds.depth_ratio < (chain.input_rms or 0.0):
            return None
        return self._verdict(found, points, record, FORTH)


def _in_order(layers: Iterable[str]) -> tuple[str, ...]:
    """Each layer once; points that belong to none are left out."""
    return tuple(dict.fromkeys(layer for layer in layers if layer))


def _measured(chain: SignalChain, name: str) -> SignalChain:
    """The points of a chain where a signal was measured and is finite."""
    values = [(point, getattr(point, name)) for point in chain.points]
    points = tuple(point for point, value in values if value is not None and math.isfinite(value))
    return SignalChain(points, chain.optimizer, chain.input_rms)


def _stand_ins(record: StepRecord) -> Iterator[SignalChain]:
    """The gradients of the biases, in order of first use, one chain an optimizer."""
    for layers in by_optimizer(record):
        known = [(layer, layer.bias_grad_rms) for layer in layers if layer.bias_grad_rms is not None]
        if all(math.isfinite(rms) for _, rms in known):
            yield SignalChain(tuple(ChainPoint(la.name, la.name, None, rms) for la, rms in known))
