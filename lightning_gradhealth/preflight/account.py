"""From what the passes have measured to the report: one read of the device, then plain numbers."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from torch import nn

from lightning_gradhealth.flows import Matrix, SignalChain
from lightning_gradhealth.judgement import Judgement
from lightning_gradhealth.layers import Layout
from lightning_gradhealth.messages import reason_of
from lightning_gradhealth.naming import name_of
from lightning_gradhealth.norms import read_once
from lightning_gradhealth.origin import Origin
from lightning_gradhealth.preflight.passes import Pass
from lightning_gradhealth.preflight.remedies import of_init
from lightning_gradhealth.ratios import norm_ratios
from lightning_gradhealth.records import (
    Condition,
    FlowReport,
    LayerStats,
    Severity,
    SquashedLogits,
    StepRecord,
)
from lightning_gradhealth.rules import Rule, Thresholds, Verdict, default_rules
from lightning_gradhealth.rules.depth import depth_limit
from lightning_gradhealth.rules.first_pass import HugeOnce, LeapOnce
from lightning_gradhealth.rules.inputs import LargeInputs
from lightning_gradhealth.signals import Signals, with_signals
from lightning_gradhealth.signals.units import SAMPLES
from lightning_gradhealth.tracing.progress import OutOfTimeError, Work

SHOWN = 3
_JUDGED = {  # what a single pass can tell; all else takes steps
    *(Condition.VANISHING_GRADIENTS, Condition.EXPLODING_GRADIENTS),
    *(Condition.VANISHING_ACTIVATIONS, Condition.EXPLODING_ACTIVATIONS),
    *(Condition.DEAD_UNITS, Condition.SATURATED_UNITS, Condition.SQUASHED_LOGITS),
}


class NonFiniteOnce(Rule):
    """NaN or Inf in the output, the loss or the gradients of one pass.

    Args:
        what: What is not finite, as "the loss is"; "" where all is.
        layer: The layer where it began; "" where that is none, or not known.
        origin: Where it began, in words.
    """

    condition = Condition.NON_FINITE

    def __init__(self, what: str, layer: str, origin: str) -> None:
        super().__init__()
        self.what, self.layer, self.origin = what, layer, origin

    def check(self, record: StepRecord) -> Verdict | None:
        """Say what is not finite, and where that began."""
        if not self.what:
            return None
        return Verdict(
            severity=Severity.CRITICAL,
            summary=f"{self.what} NaN or Inf; {self.origin}",
            remedy=(
                "look for log(0), division by 0 and bad values in the batch; torch.autograd.detect_anomaly() names the"
                " operation of a backward pass"
            ),
            layers=(self.layer,) if self.layer else (),
            evidence={"origin": self.origin},
        )


class Account:
    """What the passes have shown, on the host.

    Args:
        model: The model.
        layout: Its layers.
        passes: One pass, or several with other random directions.
        thresholds: The numbers that verdicts depend on.
        find_origin: Runs the batch once more and says where a NaN or Inf begins.
        work: The work that this is the end of, which may have a budget.
    """

    def __init__(
        self,
        model: nn.Module,
        layout: Layout,
        passes: Sequence[Pass],
        thresholds: Thresholds,
        find_origin: Callable[[], Origin],
        work: Work,
    ) -> None:
        self._work = work
        self.model, self.layout, self.thresholds = model, layout, thresholds
        self._find_origin = find_origin
        self.first = passes[0]
        readings = [done.reading for done in passes if done.reading is not None]
        vectors = [vector for reading in readings for vector in reading.vectors()]
        values = iter(read_once([*(done.numbers for done in passes), *vectors]))
        numbers = [next(values) for _ in passes]
        self.signals = _medians([reading.read(*(next(values) for _ in reading.vectors())) for reading in readings])
        *both, self.bad, loss = [_median(column) or 0.0 for column in zip(*numbers, strict=True)]
        self.loss = loss if self.first.has_loss else None
        norms, self.sizes = both[: len(both) // 2], both[len(both) // 2 :]
        self.norms = [norm if came else None for norm, came in zip(norms, self.first.reached, strict=True)]
        if self.signals is not None:
            root = name_of(model)
            layout.record_use(["" if site.owner == root else site.owner for site in self.signals.spec.sites])

    def report(self, ignore: Mapping[str, str]) -> FlowReport:
        """Judge it.

        Args:
            ignore: Conditions to mute, as condition -> regex of layer names.
        """
        squashed = self.first.squashed
        record = StepRecord(
            step=0,
            layers=self._layers(),
            probed=True,
            kinds=self.layout.kinds,
            squashed=SquashedLogits(**{**squashed, "layer": self.layout.layer_of(squashed["layer"])})
            if squashed
            else None,
        )
        record = with_signals(record, [] if self.signals is None else [self.signals], self.layout.layer_of)
        judgement = Judgement(self._rules(record), dict(ignore))
        judgement.add(record)
        findings = judgement.report(()).findings
        chain = next(iter(record.chains), SignalChain())
        limit, outlook = self._outlook(chain)
        report = FlowReport(
            layers=record.layers,
            chain=chain,
            forward_gain=chain.forward_gain,
            backward_gain=chain.backward_gain,
            depth_limit=limit,
            outlook=outlook,
            findings=findings,
            remedies=tuple(dict.fromkeys(finding.remedy for finding in findings)),
            loss=self.loss,
            temporal=record.temporal,
            notes=tuple(self._notes(record, chain)),
        )
        return self._with_init(report)

    # --- layers and rules ---

    def _layers(self) -> tuple[LayerStats, ...]:
        """The layers in order of first use, with what the gradients tell of them."""
        found = []
        slot_norms = {id(p): norm for p, norm in zip(self.model.parameters(), self.norms, strict=True)}
        sizes = {id(p): size for p, size in zip(self.model.parameters(), self.sizes, strict=True) if p.ndim > 1}
        for index in self.layout.order():
            slots = [self.layout.slots[member] for member in self.layout.members[index]]
            norms = [norm for slot in slots if (norm := slot_norms[id(slot.parameter)]) is not None]
            frozen = not any(slot.parameter.requires_grad for slot in slots)
            matrices = [slot.parameter for slot in slots if id(slot.parameter) in sizes]
            numel = sum(matrix.numel() for matrix in matrices)
            silent = [s for s in slots if s.parameter.requires_grad and slot_norms[id(s.parameter)] is None]
            stats = LayerStats(
                self.layout.names[index],
                numel=sum(slot.parameter.numel() for slot in slots),
                grad_norm=math.hypot(*norms) if norms else None,
                matrix_rms=math.hypot(*(sizes[id(p)] for p in matrices)) / math.sqrt(numel) if numel else None,
                matrices=tuple(
                    Matrix(slot.name, sizes[id(slot.parameter)] / math.sqrt(slot.parameter.numel()))
                    for member, slot in zip(self.layout.members[index], slots, strict=True)
                    if member in self.layout.by_hand and slot.parameter.numel()
                ),
                frozen=frozen,
                without_grad=tuple(slot.name for slot in silent),
                optimizer=None if frozen else 0,
                kind=self.layout.kind(index),
            )
            found.append(stats)
        rms = [None if la.grad_norm is None else la.grad_norm / math.sqrt(max(1, la.numel)) for la in found]
        return tuple(replace(la, norm_ratio=ratio) for la, ratio in zip(found, norm_ratios(rms), strict=True))

    def _rules(self, record: StepRecord) -> list[Rule]:
        """The rules that one pass can satisfy; there is no second one to wait for."""
        once = dataclasses.replace(self.thresholds, depth_probes=1, explosion_probes=1)  # patience is for a run
        rules = [rule for rule in default_rules(once) if rule.condition in _JUDGED]
        for rule in rules:
            rule.patience = 1
        what = ""
        if self.loss is not None and not math.isfinite(self.loss):
            what = "the loss is"
        elif self.bad:
            what = "the output has"
        elif any(norm is not None and not math.isfinite(norm) for norm in self.norms):
            what = "gradients are"
        origin = Origin("", "", "", ())
        if what and self._work.is_over:
            self._work.leave("where the NaN or Inf begins")
        elif what:
            self._work.tick("finding where the NaN or Inf begins")
            origin = self._find_origin()
        module = origin.module or record.first_non_finite
        return [
            LargeInputs(once),
            LeapOnce(once),
            *rules,
            HugeOnce(once),
            NonFiniteOnce(what, self.layout.layer_of(module), str(origin)),
        ]

    # --- words ---

    def _outlook(self, chain: SignalChain) -> tuple[int | None, str]:
        """After how many layers the signal that is worse off leaves its range."""
        ratio, hops = self.thresholds.depth_ratio, len(chain.points) - 1
        if len(chain.points) < self.thresholds.depth_layers:
            return None, ""
        limits = [
            (limit, noun, gain)
            for noun, gain in (("gradient", chain.backward_gain), ("signal", chain.forward_gain))
            if gain is not None and (limit := depth_limit(gain, ratio)) is not None
        ]
        if not limits:
            return None, ""
        limit, noun, gain = min(limits, key=lambda found: found[0])
        bound = f"below {_power(ratio)}" if gain < 1.0 else f"above {_power(1.0 / ratio)}"
        when = f"after {limit - hops} more layers" if limit > hops else f"after {limit} of the {hops} layers"
        return limit, f"the {noun} is {bound} {when}"

    def _notes(self, record: StepRecord, chain: SignalChain) -> list[str]:
        notes = list(self.first.notes)
        if self.signals is None:
            said = any(note.startswith("signals") for note in notes)
            return notes if said else [*notes, "signals: not measured (no call of a module was seen)"]
        if not self.first.has_loss:
            notes.append("no loss: the gradient is that of random directions at the output")
        if len(chain.points) < self.thresholds.depth_layers:
            least = self.thresholds.depth_layers
            notes.append(f"depth: not judged, the main chain has {len(chain.points)} layers; it takes {least}")
        elif sum(bool(point.backward_rms) for point in chain.points) < 2:
            where = chain.points[-1].name
            notes.append(f"depth: the gradient is not judged, it is 0 before {where}; weights there that are 0 do that")
        pairs = zip(self.signals.spec.activations, self.signals.bad_units, strict=True)
        unjudged = list(dict.fromkeys(self.layout.layer_of(unit.owner) for unit, share in pairs if share is None))
        if unjudged:
            notes.append(f"units: not judged behind {_some(unjudged)}; that takes a batch of {SAMPLES} samples or more")
        if silent := [name for layer in record.layers for name in layer.without_grad]:
            notes.append(f"no gradient comes to {_some(silent)}")
        return notes

    def _with_init(self, report: FlowReport) -> FlowReport:
        """With what `init_weights` would change, where something is wrong."""
        if not report.conditions:
            return self._with_budget(report)
        change = ""
        try:
            with self._work.interruptible():
                self._work.tick("what init_weights would change")
                change = of_init(self.model, self.first.call)
        except OutOfTimeError:
            self._work.leave("what gh.init_weights would change")
        except Exception as error:  # the diagnosis stands without this advice
            note = f"what gh.init_weights would change is not known ({reason_of(error)})"
            return self._with_budget(replace(report, notes=(*report.notes, note)))
        return self._with_budget(replace(report, remedies=(*([change] if change else []), *report.remedies)))

    def _with_budget(self, report: FlowReport) -> FlowReport:
        return replace(report, notes=(*report.notes, *self._work.notes))


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:SHOWN])
    return f"{shown} and {len(names) - SHOWN} more" if len(names) > SHOWN else shown


def _power(value: float) -> str:
    """As 1e-3."""
    return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")


def _median(values: Sequence[float | None]) -> float | None:
    """The median of what is known; NaN where one is NaN."""
    known = [value for value in values if value is not None]
    if any(math.isnan(value) for value in known):
        return math.nan
    return statistics.median(known) if known else None


def _medians(readings: Sequence[Signals]) -> Signals | None:
    """The first reading, with the medians of what depends on the random directions."""
    if not readings:
        return None
    first = readings[0]
    if all(reading.spec.sites == first.spec.sites for reading in readings):
        columns = zip(*(reading.backward_rms for reading in readings), strict=True)
        first.backward_rms = [_median(column) for column in columns]
    return first
