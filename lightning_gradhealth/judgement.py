"""Judgement: everything that is concluded from records. It holds no tensor and no model."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lightning_gradhealth.ceilings import Ceiling
from lightning_gradhealth.history import History
from lightning_gradhealth.merging import latest
from lightning_gradhealth.messages import printable, reason_of, say
from lightning_gradhealth.records import Finding, HealthReport, LayerStats, Severity, StepRecord
from lightning_gradhealth.rules import Rule
from lightning_gradhealth.saving import Saver


class Judgement:
    """Everything that is concluded from records: rules with their memories, findings, history.

    A copy can judge a window that is not over yet, and leave the original as it is.

    Args:
        rules: The rules, causes before their symptoms.
        ignore: Condition -> regex of the layers for which it is muted.

    Example:
        >>> judgement = Judgement([], {})
        >>> judgement.add(StepRecord(step=0)), judgement.report(()).step
        ([], 0)
    """

    def __init__(self, rules: Sequence[Rule], ignore: Mapping[str, str]) -> None:
        self.rules = list(rules)
        self.ignore = dict(ignore)
        self.findings: dict[str, Finding] = {}
        self.history = History()
        self.layers: dict[str, LayerStats] = {}
        self.step = -1
        self.steps = 0
        self.non_finite_steps = 0
        self.clipped_steps = 0
        self.skipped_steps = 0
        self.refused_steps = 0  # whose clipping had a factor that could not be applied
        self.loss_seen = False
        self.depth_seen = False
        self.signals_seen = False
        self.ceilings: dict[int, Ceiling] = {}  # by the number of the optimizer
        self._saver = Saver()
        self._told = _Shared()
        self.unwatched: dict[str, str] = {}  # what was no longer watched -> since when and why

    def lose(self, what: str, why: str, step: int) -> bool:
        """Note that something is no longer watched, so that the run is not called healthy; True the first time.

        Args:
            what: What is no longer watched, as "signals".
            why: The reason, in plain words.
            step: The loggers' x value since when.
        """
        known = what in self.unwatched
        self.unwatched.setdefault(what, f"since step {max(step, 0)} ({why})")
        return not known

    def regain(self, what: str) -> None:
        """Note that something is watched again, or is watched still.

        Args:
            what: What it was called in `lose`.
        """
        self.unwatched.pop(what, None)

    def add(self, record: StepRecord) -> list[Finding]:
        """Judge one record and return the findings that are new or graver than before."""
        self.history.append(record)
        self.step = record.step
        self.steps += record.steps
        self.non_finite_steps += record.non_finite_steps
        self.clipped_steps += record.clipped_steps
        self.skipped_steps += record.skipped_steps
        self.refused_steps += sum(step.refused for step in record.window)
        self.loss_seen = self.loss_seen or any(step.loss is not None for step in record.window)
        for step in record.window:
            self.ceilings.setdefault(step.optimizer, Ceiling()).add(step.total_norm)
        deep = any(len(chain.points) > 1 for chain in record.chains)
        self.depth_seen = self.depth_seen or deep or record.backward_gain is not None
        self.signals_seen = self.signals_seen or any(
            layer.forward_rms is not None or any(matrix.backward_gain is not None for matrix in layer.matrices)
            for layer in record.layers
        )
        self.layers = {layer.name: latest(layer, self.layers.get(layer.name)) for layer in record.layers}
        news = []
        for rule in list(self.rules):
            try:
                finding = rule.judge(record if _is_ours(rule) else _own_copy(record))
            except Exception as error:
                self._leave_out(rule, error)
                continue
            if finding and rule.needs_support and not self._supported(finding):
                finding = _with(finding, severity=Severity.INFO)
            if finding and (finding := self._unmuted(finding)) and self._take(finding):
                news.append(self.findings[finding.condition])
        return news

    def _leave_out(self, rule: Rule, error: Exception) -> None:
        """Judge without a rule that has failed, from now on."""
        self.rules.remove(rule)
        name = printable(type(rule).__name__)
        lost = f"{printable(rule.condition, 100)} by the rule {name}"
        if self.lose(lost, f"it failed: {reason_of(error)}", self.step) and lost not in self._told:
            self._told.add(lost)
            say(f"gradhealth: the rule {name} failed and is left out from now on; training goes on", error=error)

    def _supported(self, finding: Finding) -> bool:
        """Whether another rule holds something against the run now."""
        active = self.holding - {finding.condition}
        return any(f.severity is not Severity.INFO for name, f in self.findings.items() if name in active)

    def _unmuted(self, finding: Finding) -> Finding | None:
        pattern = self.ignore.get(str(finding.condition))
        if pattern is None:
            return finding
        if not finding.layers:
            return None if re.fullmatch(pattern, "") else finding
        left = tuple(layer for layer in finding.layers if not re.fullmatch(pattern, layer))
        return _with(finding, layers=left) if left else None

    def _take(self, finding: Finding) -> bool:
        """Merge a finding into what is known; True where it is new or graver."""
        known = self.findings.get(finding.condition)
        if known is None:
            self.findings[finding.condition] = finding
            return True
        hit = {*known.layers, *finding.layers}
        merged = {
            "first_step": min(known.first_step, finding.first_step),
            "last_step": finding.last_step,
            "layers": tuple(
                dict.fromkeys([*(name for name in self.layers if name in hit), *known.layers, *finding.layers])
            ),
        }
        graver = finding.severity.rank > known.severity.rank
        same = finding.severity is known.severity
        newer = same and (len(finding.layers) > len(known.layers) or finding.condition in self._running)
        relents = any(rule.relents for rule in self.rules if str(rule.condition) == finding.condition)
        newer = newer or (relents and finding.severity.rank < known.severity.rank)
        self.findings[finding.condition] = _with(finding if graver or newer else known, **merged)
        return graver

    @property
    def _running(self) -> set[str]:
        """Conditions of which the latest account counts, not the first."""
        return {str(rule.condition) for rule in self.rules if rule.running}

    @property
    def holding(self) -> frozenset[str]:
        """The conditions that hold now, in the eyes of their rules."""
        return frozenset(str(rule.condition) for rule in self.rules if rule.active)

    @property
    def active(self) -> int:
        """Number of conditions above info that hold now."""
        holding = self.holding
        return sum(f.severity is not Severity.INFO and str(f.condition) in holding for f in self.findings.values())

    def report(self, notes: Sequence[str]) -> HealthReport:
        """The verdict so far: the gravest finding first, then the earliest, then the cause before its symptoms."""
        rank = {str(rule.condition): position for position, rule in reversed(list(enumerate(self.rules)))}
        findings = sorted(
            self.findings.values(),
            key=lambda f: (-f.severity.rank, f.first_step, rank.get(str(f.condition), len(rank))),
        )
        return HealthReport(
            findings=tuple(_with(f, healed=self._healed(f)) for f in _causes_first(findings)),
            layers=tuple(self.layers.values()),
            step=self.step,
            steps=self.steps,
            non_finite_steps=self.non_finite_steps,
            clipped_steps=self.clipped_steps,
            skipped_steps=self.skipped_steps,
            trend=self.history.trend(),
            notes=tuple(notes),
            unwatched=tuple(f"{what}, {since}" for what, since in self.unwatched.items()),
        )

    def _healed(self, finding: Finding) -> tuple[str, ...]:
        """The layers of a finding of which none of its rules says so any more; of a rule that is gone, none."""
        rules = [rule for rule in self.rules if str(rule.condition) == str(finding.condition)]
        over = [set(rule.over(finding.layers)) for rule in rules]
        healed = set.intersection(*over) if over else set()
        return tuple(layer for layer in finding.layers if layer in healed)

    def _rule_keys(self) -> list[tuple[str, Rule]]:
        """A key for each rule that is the same in the next run: its class, its condition, its number."""
        keys: list[tuple[str, Rule]] = []
        for rule in self.rules:
            base = f"{type(rule).__name__}:{rule.condition}"
            keys.append((f"{base}:{sum(key.startswith(base) for key, _ in keys)}", rule))
        return keys

    def _rule_states(self) -> dict[str, Any]:
        states: dict[str, Any] = {}
        for key, rule in self._rule_keys():
            self._saver.put(states, key, f"the state of the rule {type(rule).__name__}", rule.state_dict)
        return states

    def _restore_rules(self, states: dict[str, Any]) -> None:
        """Give the rules their states; one of the user's that cannot take up its own starts afresh."""
        for key, rule in self._rule_keys():
            if key not in states:
                continue
            if _is_ours(rule):
                rule.load_state_dict(states[key])
                continue
            fresh, place = copy.deepcopy(rule), self.rules.index(rule)
            what = f"the state of the rule {type(rule).__name__}"
            if not self._saver.take(what, functools.partial(rule.load_state_dict, states[key])):
                self.rules[place] = fresh

    def state_dict(self) -> dict[str, Any]:
        """Return everything as primitives, and the history's values as a tensor."""
        history = self.history.state_dict()
        return {
            "rules": self._rule_states(),
            "findings": [finding.to_dict() for finding in self.findings.values()],
            "history": {**history, "values": torch.from_numpy(history["values"])},
            "layers": [layer.to_dict() for layer in self.layers.values()],
            "step": self.step,
            "steps": self.steps,
            "non_finite_steps": self.non_finite_steps,
            "clipped_steps": self.clipped_steps,
            "skipped_steps": self.skipped_steps,
            "refused_steps": self.refused_steps,
            "loss_seen": self.loss_seen,
            "depth_seen": self.depth_seen,
            "signals_seen": self.signals_seen,
            "ceilings": {number: ceiling.state() for number, ceiling in self.ceilings.items()},
            "unwatched": dict(self.unwatched),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` returned; rules that it does not know start afresh."""
        self._restore_rules(state["rules"])
        self.findings = {f.condition: f for f in map(Finding.from_dict, state["findings"])}
        self.history.load_state_dict({**state["history"], "values": state["history"]["values"].numpy()})
        self.layers = {layer.name: layer for layer in map(LayerStats.from_dict, state["layers"])}
        self.refused_steps = state.get("refused_steps", 0)
        for name in ("step", "steps", "non_finite_steps", "clipped_steps", "skipped_steps"):
            setattr(self, name, int(state[name]))
        self.loss_seen = state["loss_seen"]
        self.depth_seen = state["depth_seen"]
        self.signals_seen = state["signals_seen"]
        self.ceilings = {number: Ceiling(*saved) for number, saved in state.get("ceilings", {}).items()}
        self.unwatched = dict(state.get("unwatched", {}))


# what may be the cause of what; a symptom never stands before its cause
_CAUSES: dict[str, tuple[str, ...]] = {
    "oversized_updates": ("collapsing_weights",),
    "vanishing_activations": ("collapsing_weights",),
    "vanishing_gradients": ("collapsing_weights", "dead_units", "saturated_units"),
    "exploding_gradients": ("exploding_activations",),
    "stalled_layers": ("dead_units", "saturated_units", "vanishing_activations", "vanishing_gradients"),
    "non_finite": ("exploding_activations", "exploding_gradients", "growing_weights"),
    "loss_spike": ("exploding_gradients",),
    "stalled_loss": (
        *("oversized_updates", "dead_units", "saturated_units", "vanishing_activations", "exploding_activations"),
        *("vanishing_gradients", "exploding_gradients", "stalled_layers", "no_gradient", "collapsing_weights"),
    ),
}


def _causes_first(findings: Sequence[Finding]) -> list[Finding]:
    """The findings in order, but for causes above info that are moved in front of their first symptom."""
    ordered: list[Finding] = []
    for finding in findings:
        for cause in findings:
            is_cause = cause.condition in _CAUSES.get(str(finding.condition), ()) and _is_grave(cause)
            if is_cause and cause not in ordered:
                ordered.append(cause)
        if finding not in ordered:
            ordered.append(finding)
    return ordered


def _is_grave(finding: Finding) -> bool:
    """Whether a finding can be the cause of others; of dead units only those of a layer that lets nothing through."""
    least = Severity.CRITICAL if finding.condition == "dead_units" else Severity.WARNING
    return finding.severity.rank >= least.rank


class _Shared(set[str]):
    """A set whose copies are itself: what a copy of its owner has told is told."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Shared:
        return self


def _is_ours(rule: Rule) -> bool:
    return type(rule).__module__.partition(".")[0] == __name__.partition(".")[0]


def _own_copy(record: StepRecord) -> StepRecord:
    """A record that a rule of the user's may change without harm to others."""
    return record.changed(
        layers=tuple(layer.changed() for layer in record.layers),
        window=tuple(step.changed() for step in record.window),
        chains=tuple(chain.changed() for chain in record.chains),
        temporal={name: flow.changed() for name, flow in record.temporal.items()},
    )


def _with(finding: Finding, **changes: Any) -> Finding:
    return Finding(**{**vars(finding), **changes})
