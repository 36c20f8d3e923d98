"""Rules for what weights, updates and the loss tell."""

from __future__ import annotations

import math
import sys
from collections.abc import Collection

from lightning_gradhealth.ratios import median
from lightning_gradhealth.records import Condition, LayerStats, Severity, StepRecord
from lightning_gradhealth.rules.base import NOT_MEASURED, NotMeasured, Rule, Thresholds, Verdict, by_optimizer
from lightning_gradhealth.rules.course import (
    USUAL_UPDATE,
    follow_loss,
    follow_schedules,
    follow_updates,
    follow_weights,
    followed_losses,
    followed_updates,
    has_learned,
    is_scheduled,
    rounded,
    shrunken,
)
from lightning_gradhealth.rules.remedies import Remedy, at_rate, for_decay, for_rate, in_groups


def _measured_updates(layers: list[LayerStats]) -> list[tuple[LayerStats, float]]:
    return [
        (layer, layer.update_to_weight)
        for layer in layers
        if layer.update_to_weight is not None and math.isfinite(layer.update_to_weight)
    ]


def zero_born(rule: Rule, record: StepRecord) -> set[str]:
    """Layers that started at zero not long ago: their weights are a few updates, and so no measure of one.

    Args:
        rule: The rule in whose memory it is kept when a layer was at zero.
        record: The record at hand.
    """
    born = rule.memory.setdefault("zero_at", {})
    for layer in record.layers:
        if layer.weight_norm == 0.0:
            born[layer.name] = record.step
    return {name for name, step in born.items() if record.step - step < rule.thresholds.growth_window}


class OversizedUpdates(Rule):
    """Updates that are large beside the weights: one step replaces what was learned ("avalanche learning").

    Weights that start at zero, as LoRA's B or a zeroed head, are left alone at first. Where the loss falls to a fifth
    of what it was before all the same, it was no hindrance: an info.
    """

    condition = Condition.OVERSIZED_UPDATES
    relents = True

    def check(self, record: StepRecord) -> Verdict | NotMeasured | None:
        """Judge the updates of every optimizer; those that are merely large have to stay so for some steps."""
        follow_updates(self, record)
        follow_weights(self, record)
        follow_loss(self, record)
        young = zero_born(self, record)
        chains = [
            chain
            for layers in by_optimizer(record)
            if (chain := _measured_updates([layer for layer in layers if layer.name not in young]))
        ]
        if not chains:
            return NOT_MEASURED
        first_probe = not self.memory.get("probed", False)
        self.memory["probed"] = True
        at_once = [(chain, hit) for chain in chains if (hit := self._over(chain, self.thresholds.update_at_once))]
        shrinking = self._shrinking(record)  # what weight decay takes away makes no step too large
        limit = self.thresholds.update_repeated
        large = [(chain, hit) for chain in chains if (hit := self._over(chain, limit, but=shrinking))]
        since = self.memory.get("large_since")
        self.memory["large_since"] = None if first_probe or not large else (record.step if since is None else since)
        brief = since is None or record.step - since < self.thresholds.growth_window / 2
        if not at_once and (not large or brief):
            return self._relent()
        chain, hit = (at_once or large)[0]
        size = median(value for layer, value in chain if layer.name in hit)
        rates = (layer.learning_rate for layer, _ in chain if layer.learning_rate is not None)
        shrunk = shrunken(self, record, hit) and for_decay(record, hit, shrunk=True)  # small weights: large steps
        remedy = shrunk or for_rate(followed_updates(self))
        harmless = self._was_no_hindrance()
        verdict = Verdict(
            severity=Severity.INFO if harmless else Severity.CRITICAL if at_once else Severity.WARNING,
            summary=f"one step changes the weights of {len(hit)} of {len(chain)} layers by {size:.2g} of their size",
            remedy=remedy.words,
            code=remedy.code,
            layers=tuple(hit),
            evidence={"update_to_weight_median": size, "learning_rate": max(rates, default=None)},
            first_step=None if at_once else since,
        )
        if not harmless:
            since = self.memory.get("told", {}).get("first_step")
            first = record.step if verdict.first_step is None else verdict.first_step
            first = first if since is None else min(first, since)
            self.memory["told"] = {**vars(verdict), "severity": "info", "first_step": first, "last_step": record.step}
        return verdict

    def _relent(self) -> Verdict | None:
        """What was told before, as an info, once the run has learned well; told once."""
        if not self.memory.get("told") or not self._was_no_hindrance():
            return None
        told = self.memory.pop("told")
        return Verdict(**{**told, "summary": f"{told['summary']}; the loss has come down to a fifth all the same"})

    def _was_no_hindrance(self) -> bool:
        early, late = followed_losses(self)
        return has_learned(self, 0.2) and median(late) < early[0] - 0.8 * abs(early[0])

    def _shrinking(self, record: StepRecord) -> set[str]:
        """Layers whose weights are smaller than at the probe before."""
        known = self.memory.setdefault("norms", {})
        norms = {layer.name: layer.weight_norm for layer in record.layers if layer.weight_norm is not None}
        found = {name for name, norm in norms.items() if norm < 0.9 * known.get(name, 0.0)}
        known.update(norms)
        return found

    def _over(self, chain: list[tuple[LayerStats, float]], limit: float, but: Collection[str] = ()) -> list[str]:
        """Names of the layers beyond `limit`, if they are as many as it takes of all."""
        hit = [layer.name for layer, value in chain if value > limit and layer.name not in but]
        return hit if hit and len(hit) >= self.thresholds.update_share * len(chain) else []


class StalledLayers(Rule):
    """Layers that hardly change while others of the same optimizer do, or a whole network that never has."""

    condition = Condition.STALLED_LAYERS
    per_layer = True

    def __init__(self, thresholds: Thresholds | None = None) -> None:
        super().__init__(thresholds)
        self.patience = self.thresholds.stalled_probes

    def check(self, record: StepRecord) -> Verdict | NotMeasured | None:
        """Compare the updates of the layers of each optimizer."""
        follow_schedules(self, record)
        chains = [
            chain
            for layers in by_optimizer(record)
            if (chain := _measured_updates([layer for layer in layers if not layer.cancelled]))
        ]
        if not chains:
            return NOT_MEASURED
        # who grows cannot be told in the first steps
        first = self.memory.setdefault("first", record.step)
        is_early = record.step - first < self.thresholds.growth_window
        self.patience = sys.maxsize if is_early else self.thresholds.stalled_probes
        self.span = 0 if self.patience == 1 else self.thresholds.growth_window
        follow_loss(self, record)
        if standstill := self._standstill(chains):
            return standstill
        young, growing = zero_born(self, record), self._growing(record)
        stalled: list[LayerStats] = []
        fastest = 0.0
        slowed = True
        for chain in chains:
            # weights that have just left zero change by much of their size: no yardstick for others
            top = max((value for layer, value in chain if layer.name not in young), default=0.0)
            slow = [la for la, value in chain if value < self.thresholds.stalled_update and la.name not in growing]
            if top > self.thresholds.moving_update and slow:
                stalled += slow
                fastest = max(fastest, top)
                slowed = slowed and all(_deliberate(layer.learning_rate, _top_rate(chain)) for layer in slow)
        if not stalled:
            return None
        untouched = {la.name for la in stalled if la.grad_norm == 0.0 and la.learning_rate != 0.0}
        if untouched:
            # an unused branch or a constant input is no stall; and it is told by itself, or not at all
            stalled = [layer for layer in stalled if layer.name not in untouched] or stalled
        if untouched >= {layer.name for layer in stalled}:
            return self._untouched(stalled, record.step)
        remedy = self._for_stalled(stalled, chains, slowed=slowed)
        return Verdict(
            severity=Severity.INFO if slowed or has_learned(self) else Severity.WARNING,
            summary=(
                f"{len(stalled)} layers change by less than {self.thresholds.stalled_update:g} of their size a step,"
                f" another by {fastest:.2g}" + (": their learning rate is set much lower" if slowed else "")
            ),
            remedy=remedy.words,
            code=remedy.code,
            layers=tuple(layer.name for layer in stalled),
            evidence={"fastest_update_to_weight": fastest},
        )

    def _untouched(self, layers: list[LayerStats], step: int) -> Verdict:
        """Layers whose gradient is exactly 0, while others learn."""
        since = self.memory.setdefault("untouched", {})
        first = min(since.setdefault(layer.name, step) for layer in layers)
        return Verdict(
            severity=Severity.INFO,
            summary=f"the gradient of {len(layers)} layers is exactly 0 since step {first}: the loss does not depend on"
            " them",
            remedy=(
                "nothing, if that branch is not in use, or its input constant (zeros); else see what multiplies it by 0"
                " (a mask, a gate, dead units behind it)"
            ),
            layers=tuple(layer.name for layer in layers),
            evidence={"gradient": 0.0},
        )

    def _for_stalled(
        self, stalled: list[LayerStats], chains: list[list[tuple[LayerStats, float]]], *, slowed: bool
    ) -> Remedy:
        """What to do about layers that hardly move: a rate of 0 is no riddle."""
        if slowed:
            return Remedy("nothing, if that is what their learning rate is for")
        if all(layer.learning_rate == 0.0 for layer in stalled):
            rate = max((top for chain in chains if (top := _top_rate(chain))), default=USUAL_UPDATE)
            return Remedy(
                f"their parameter group has a learning rate of 0: give it one, as the {rate:g} of the others; or leave"
                " it at that, with requires_grad_(False), if they are to stay as they are",
                at_rate("or", rate, scheduled=is_scheduled(self)),
            )
        return Remedy(
            "see what keeps the gradient from them (vanishing gradients, dead units);"
            " gh.init_weights(model, batch) if they never learned"
        )

    def _growing(self, record: StepRecord) -> set[str]:
        """Layers whose updates grow by half and more in some ten steps, as behind branches that start at zero."""
        tracks = self.memory.setdefault("tracks", {})
        span, found = self.thresholds.growth_window / 2, set()
        for layer, value in _measured_updates(list(record.layers)):
            track = tracks.setdefault(layer.name, [])
            before = [past for step, past in track if record.step - step >= span]
            if before and value > 1.5 * before[-1]:
                found.add(layer.name)
            if not track or record.step - track[-1][0] >= span:
                track.append([record.step, value])
                del track[:-3]
        return found

    def _standstill(self, chains: list[list[tuple[LayerStats, float]]]) -> Verdict | None:
        """No layer has ever moved, although the learning rate does not rise any more."""
        top = max(value for chain in chains for _, value in chain)
        rate = max((rate for chain in chains if (rate := _top_rate(chain)) is not None), default=0.0)
        rising = rate > self.memory.get("rate", 0.0)
        self.memory["rate"] = rate
        self.memory["moved"] = self.memory.get("moved", False) or top >= self.thresholds.stalled_update
        if self.memory["moved"] or rising:
            return None
        layers = tuple(layer.name for chain in chains for layer, _ in chain)
        evidence = {"fastest_update_to_weight": top, "learning_rate": rate}
        if all(layer.grad_norm == 0.0 for chain in chains for layer, _ in chain):
            return Verdict(
                severity=Severity.WARNING,
                summary="every gradient is exactly 0: the loss does not depend on the weights",
                remedy=(
                    "no learning rate helps: look behind the last layer for what lets nothing through: sign(), round()"
                    " or argmax() (take the loss of the logits), clamp() beyond its limits, a ReLU on the output or"
                    " dead and saturated units (set the last bias to 0), a mask or weight of 0 in the loss"
                ),
                layers=layers,
                evidence=evidence,
            )
        factor = rounded(USUAL_UPDATE / top) if top > 0.0 else 0.0
        return Verdict(
            severity=Severity.WARNING,
            summary=f"no layer has ever changed by more than {top:.1g} of its size in a step",
            remedy=(
                f"a larger learning rate (x {factor:g}): near 1e-3 of the weights a step is usual (the Tuner's lr_find"
                " finds one)"
                if rate and top > 0.0
                else "the gradients are too small to change any weight: see what makes them so (vanishing signals)"
                if rate
                else "a learning rate above 0: it is 0 in every parameter group"
            ),
            code=at_rate("*", factor, scheduled=is_scheduled(self)) if factor and rate else "",
            layers=layers,
            evidence=evidence,
        )


def _top_rate(chain: list[tuple[LayerStats, float]]) -> float | None:
    return max((layer.learning_rate for layer, _ in chain if layer.learning_rate is not None), default=None)


def _deliberate(rate: float | None, largest: float | None) -> bool:
    """A layer's rate is far below the largest, but not zero: somebody wants it slow."""
    return rate is not None and largest is not None and 0.0 < rate <= largest / 10


class _WeightDrift(Rule):
    """Weight norms that change by a factor in every window of steps, and do not slow down.

    For each layer the memory holds the norms at the borders of the windows; a border is set at the first probe
    that is `growth_window` steps or more after the last one.
    """

    sign: int
    course: str

    def check(self, record: StepRecord) -> Verdict | NotMeasured | None:
        """Advance the windows of every layer that was probed."""
        follow_loss(self, record)
        follow_updates(self, record)
        drifting: dict[str, float] = {}
        seen = False
        norms = [(la.weight_norm, la.numel or 1) for la in record.layers if la.weight_norm and not la.frozen]
        usual = median(norm / math.sqrt(numel) for norm, numel in norms)
        for layer in record.layers:
            norm = layer.weight_norm
            if layer.frozen or layer.vectors or norm is None or not math.isfinite(norm) or norm <= 0.0:
                continue
            seen = True
            track = self.memory.setdefault(layer.name, {"borders": [], "greatest": norm})
            track["greatest"] = max(track["greatest"], norm)
            borders = track["borders"]
            if self.sign > 0 and norm / math.sqrt(layer.numel or 1) < usual:
                borders.clear()  # it only grows up to the size of the others
                continue
            if not borders or record.step - borders[-1][0] >= self.thresholds.growth_window:
                borders.append([record.step, norm])
                del borders[: -(self.thresholds.growth_windows + 1)]
            far = self.sign > 0 or norm < self.thresholds.collapsed * track["greatest"]
            if far and self._drifts(borders):
                drifting[layer.name] = (borders[-1][1] / borders[0][1]) ** (1 / (borders[-1][0] - borders[0][0]))
        if not drifting:
            return None if seen else NOT_MEASURED
        factor = max(drifting.values(), key=lambda value: abs(math.log(value)))
        remedy = self._remedy(record, drifting)
        return Verdict(
            severity=Severity.INFO if self.sign > 0 and self._has_learned() else Severity.WARNING,
            summary=f"the weights {self.course}, by {100 * abs(factor - 1):.2g} % a step",
            remedy=remedy.words,
            code=remedy.code,
            layers=tuple(drifting),
            evidence={"factor_per_step": factor},
        )

    def _has_learned(self) -> bool:
        """The loss has halved, and not below zero, as it does where the wrong way is taken on purpose."""
        early, late = followed_losses(self)
        enough = len(late) >= self.thresholds.growth_window
        return enough and 0.0 <= median(late) < 0.5 * median(early)

    def _remedy(self, record: StepRecord, layers: Collection[str]) -> Remedy:
        raise NotImplementedError

    def _drifts(self, borders: list[list[float]]) -> bool:
        """Whether every window has the factor and none is much slower than the one before it."""
        if len(borders) <= self.thresholds.growth_windows:
            return False
        pairs = list(zip(borders, borders[1:], strict=False))
        moves = [self.sign * math.log(after[1] / before[1]) for before, after in pairs]
        rates = [move / (after[0] - before[0]) for move, (before, after) in zip(moves, pairs, strict=True)]
        fast = all(move >= math.log(self.thresholds.growth) for move in moves)
        return fast and all(late >= 0.8 * early for early, late in zip(rates, rates[1:], strict=False))


class GrowingWeights(_WeightDrift):
    """Weight norms that grow exponentially. Growth from zero up to the size of other layers is healthy."""

    condition = Condition.GROWING_WEIGHTS
    sign = 1
    course = "grow exponentially"

    def _remedy(self, record: StepRecord, layers: Collection[str]) -> Remedy:
        """By what the loss does meanwhile."""
        early, late = followed_losses(self)
        before, now = median(early), median(late or early)
        decay = in_groups('group["weight_decay"] = 0.01')
        norm = "" if "norm" in record.kinds else ", a normalisation layer"
        if math.isnan(before):
            return Remedy(f"weight decay (AdamW){norm}, a smaller learning rate; check the sign of the loss", decay)
        if now < 0.0 and now < before - abs(before):
            return Remedy(
                f"the loss falls without end ({before:.3g}, then {now:.3g}): it has no minimum; check its sign, or"
                " bound what it rewards"
            )
        if now > before + self.thresholds.stalled_fall * abs(before):
            return for_rate(
                followed_updates(self),
                f"; the loss rises with them ({before:.3g}, then {now:.3g}); in a loop of your own look for a forgotten"
                " optimizer.zero_grad()",
            )
        return Remedy(f"weight decay (AdamW){norm}, a smaller learning rate: nothing in the loss holds them", decay)


class CollapsingWeights(_WeightDrift):
    """Weight norms that halve again and again and have lost most of their size."""

    condition = Condition.COLLAPSING_WEIGHTS
    sign = -1
    course = "shrink towards zero"

    def _remedy(self, record: StepRecord, layers: Collection[str]) -> Remedy:
        """By what takes the weights away: their decay, or else the gradients."""
        if (decay := for_decay(record, layers)) is not None:
            return decay
        decays = [layer.weight_decay for layer in record.layers if layer.name in layers]
        if any(decays):
            return Remedy(
                f"lower weight_decay (it is {max(decay or 0.0 for decay in decays):g}), or the rate that multiplies it;"
                " a penalty on the weights in the loss does the same"
            )
        without = "it is not weight_decay, which is 0: the gradients take them away" if None not in decays else ""
        return Remedy(
            f"{without or 'a lower weight_decay, if there is one'}; look for a penalty on the weights in the loss, or"
            " an output that is best at 0"
        )
