"""Rules for units that do nothing: dead rectifiers, saturated sigmoids, attention that looks at one place only."""

from __future__ import annotations

import math

from lightning_gradhealth.flows import SignalChain, TemporalFlow
from lightning_gradhealth.ratios import median
from lightning_gradhealth.records import Condition, LayerStats, Severity, StepRecord
from lightning_gradhealth.rules.base import NOT_MEASURED, NotMeasured, Rule, Verdict
from lightning_gradhealth.rules.course import (
    follow_loss,
    follow_updates,
    follow_weights,
    followed_losses,
    followed_updates,
    has_learned,
    is_learning,
    shrunken,
)
from lightning_gradhealth.rules.remedies import (
    LARGE_INPUT,
    Makeup,
    Remedy,
    for_dead,
    for_decay,
    for_large_inputs,
    for_saturated,
    for_time,
)


class _Units(Rule):
    """Layers of which so large a share of the units is bad.

    Where the network learns all the same, it is worth an info; after a warning, once the loss has fallen to a fifth.
    """

    per_layer = True
    relents = True
    fraction: str
    what: str

    def check(self, record: StepRecord) -> Verdict | NotMeasured | None:
        """Judge the layers whose units were measured."""
        follow_loss(self, record)
        follow_updates(self, record)
        follow_weights(self, record)
        known = [(layer, getattr(layer, self.fraction)) for layer in record.layers]
        measured = [(layer, share) for layer, share in known if share is not None]
        if not measured:
            return NOT_MEASURED
        bad = {layer.name: share for layer, share in measured if self._is_bad(layer, share)}
        before = self.memory.setdefault("bad", {})
        sound = self.memory.setdefault("sound", [])
        for layer, _ in measured:  # layers take turns: each has its samples together at steps of its own
            before.pop(layer.name, None)
            if layer.name not in bad and layer.name not in sound:
                sound.append(layer.name)
        before.update(bad)
        if not before:
            return None
        worst, share = max(before.items(), key=lambda item: item[1])
        layer = next((layer for layer in record.layers if layer.name == worst), record.layers[0])
        hit = sorted((la for la in record.layers if la.name in before), key=lambda la: -before[la.name])
        updates = followed_updates(self)
        replaced = updates is not None and updates.largest > self.thresholds.update_at_once
        remedy = self._remedy(hit, record, came=replaced or worst in sound)
        severity = self._severity(share)
        self.memory["warned"] = self.memory.get("warned", False) or severity is not Severity.INFO
        return Verdict(
            severity=severity,
            summary=(
                f"{100 * share:.0f} % of {self._those(layer)}"
                + (f" (and of others, in {len(before)} layers)" if len(before) > 1 else "")
            ),
            remedy=remedy.words,
            code=remedy.code,
            layers=tuple(layer.name for layer in record.layers if layer.name in before),
            evidence={"worst": share, "layers": dict(before), "activation": layer.activation},
        )

    def _is_bad(self, layer: LayerStats, share: float) -> bool:
        return share >= float(getattr(self.thresholds, self.condition))

    def _those(self, layer: LayerStats) -> str:
        return f"the units of {layer.name} {self.what}"

    def _severity(self, share: float) -> Severity:
        learns = has_learned(self, 0.2) if self.memory.get("warned", False) else self._learns()
        return Severity.INFO if learns else Severity.WARNING

    def _learns(self) -> bool:
        """Whether the run has learned enough for what is seen for the first time to be no hindrance."""
        return has_learned(self)

    def _remedy(self, layers: list[LayerStats], record: StepRecord, *, came: bool) -> Remedy:
        raise NotImplementedError


class DeadUnits(_Units):
    """Rectifiers of which more than half of the units were active in none of at least 256 samples.

    Deep in a plain ReLU network all samples point the same way, so that every unit is either active for all of them or
    for none, by the toss of a coin. So the dead ones have to outnumber those that are always active, by more than three
    standard deviations of as many tosses.
    A layer whose units are all dead lets no gradient through at all.
    """

    condition = Condition.DEAD_UNITS
    fraction = "dead_fraction"
    what = "were never active"

    def _is_bad(self, layer: LayerStats, share: float) -> bool:
        if share == 1.0 or not layer.units or layer.full_fraction is None:
            return super()._is_bad(layer, share)
        constant = (share + layer.full_fraction) * layer.units
        beyond_chance = (share - layer.full_fraction) * layer.units > 3 * math.sqrt(constant)
        return super()._is_bad(layer, share) and beyond_chance

    def _severity(self, share: float) -> Severity:
        if share >= self.thresholds.dead_most:
            return Severity.CRITICAL if share == 1.0 else Severity.WARNING
        return super()._severity(share)

    def _learns(self) -> bool:
        return is_learning(self)  # a unit that is dead takes no part; the others may do

    def _remedy(self, layers: list[LayerStats], record: StepRecord, *, came: bool) -> Remedy:
        makeup = Makeup.of(record, [layer.name for layer in layers])
        updates = followed_updates(self)
        names = [layer.name for layer in layers]
        decay = for_decay(record, names, updates, shrunk=shrunken(self, record, names))
        return for_dead(layers, makeup, updates, decay, died=came)


class SaturatedUnits(_Units):
    """Units of saturating activations that are flat on average, and heads of attention that are one-hot."""

    condition = Condition.SATURATED_UNITS
    fraction = "saturated_fraction"
    what = "are stuck where the derivative is tiny"

    def _those(self, layer: LayerStats) -> str:
        if layer.activation == "attention":
            return f"the heads of the attention that leads to {layer.name} look at one place only"
        return super()._those(layer)

    def _remedy(self, layers: list[LayerStats], record: StepRecord, *, came: bool) -> Remedy:
        makeup = Makeup.of(record, [layer.name for layer in layers])
        read = max((chain.input_rms or 0.0 for chain in record.chains), default=0.0)
        first = next((layer for layer in record.layers if layer.forward_rms is not None), None)
        if first in layers and first.activation != "attention" and math.isfinite(read) and read > LARGE_INPUT:
            return for_large_inputs(first.name, read)
        return for_saturated(layers, makeup, followed_updates(self), came=came)


class _Temporal(Rule):
    """Gradients that vanish or explode on their way back through time, where that is measured (`temporal=True`).

    A memory that fades is what most recurrent networks have, and need: it is a warning only where the loss does not
    come down, else an info.
    """

    per_layer = True
    vanishing: bool

    def check(self, record: StepRecord) -> Verdict | NotMeasured | None:
        """Judge every recurrent layer."""
        follow_loss(self, record)
        known = sum(step.loss is not None for step in record.window)
        self.memory["losses"] = self.memory.get("losses", 0) + known
        if not record.temporal:
            return NOT_MEASURED
        reach = max((_entering(chain) for chain in record.chains), default=0.0)
        hit = {name: flow for name, flow in record.temporal.items() if self._is_hit(flow, reach)}
        if not hit:
            return None
        name, flow = max(hit.items(), key=lambda item: abs(math.log(item[1].gain_per_step or 1e-30)))
        steps = len(flow.grad_norms)
        change = flow.grad_norms[0] / flow.grad_norms[-1]
        memory = f"; it remembers {flow.memory} steps" if self.vanishing and flow.memory is not None else ""
        return Verdict(
            severity=Severity.INFO if self.vanishing and not self._is_stalled() else Severity.WARNING,
            summary=(
                f"gradients {'vanish' if self.vanishing else 'explode'} on their way back through time in {name}: over"
                f" {steps} steps to {change:.1e} of what they were, gain {flow.gain_per_step:.2g} per step{memory}"
            ),
            remedy=for_time(self.vanishing).words,
            code=for_time(self.vanishing).code,
            layers=tuple(hit),
            evidence={"gain_per_step": flow.gain_per_step, "memory": flow.memory, "steps": steps},
        )

    def _is_hit(self, flow: TemporalFlow, reach: float) -> bool:
        """Whether it vanishes or explodes; `reach` is the norm of the gradient that enters the network."""
        limit = self.thresholds.depth_ratio
        first, last = flow.grad_norms[0], flow.grad_norms[-1]
        if flow.gain_per_step is None or not (math.isfinite(first) and last > 0.0):
            return False
        whole = flow.gain_per_step ** (len(flow.grad_norms) - 1)
        if self.vanishing:
            return max(first / last, whole) < limit
        # of a module that a net calls again and again the last calls may hardly be read, so that the gradient comes in
        # at the earlier ones: what stays below all that has entered has not exploded
        if "calls" in (flow.by_layer or {}) and first <= reach:
            return False
        return min(first / last, whole) > 1 / limit

    def _is_stalled(self) -> bool:
        early, late = followed_losses(self)
        enough = self.memory.get("losses", 0) >= self.thresholds.stalled_steps
        return enough and bool(late) and median(late) > (1 - self.thresholds.stalled_fall) * median(early)


def _entering(chain: SignalChain) -> float:
    """Norm of the gradient at the last point of a main chain; 0 where it is not known."""
    last = chain.points[-1] if chain.points else None
    return 0.0 if last is None or last.backward_rms is None else last.backward_rms * math.sqrt(last.size)


class VanishingThroughTime(_Temporal):
    """Gradients that vanish through time."""

    condition = Condition.VANISHING_GRADIENTS
    vanishing = True


class ExplodingThroughTime(_Temporal):
    """Gradients that explode through time."""

    condition = Condition.EXPLODING_GRADIENTS
    vanishing = False
