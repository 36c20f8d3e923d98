"""The clinic: labelled trainings, each with what must be found in it, and how a report is held against the label."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
from conftest import trainer
from torch.utils.data import DataLoader

from lightning_gradhealth import Condition, GradHealth, HealthReport, Severity

Batch = Any
Built = tuple[pl.LightningModule, Sequence[Batch]]
CONDITIONS = frozenset(str(condition) for condition in Condition if condition is not Condition.ADAPTIVE_CLIPPING)


@dataclass(frozen=True)
class Must:
    """A finding, of severity warning or above, that the report must have.

    Attributes:
        conditions: The name of a condition; several where physics makes them alike and any of them will do, the chief
            one first.
        layers: Regex that every layer named must match in full, one at least being named; None: anywhere.
        named: A layer that must be among them.
        since: The earliest step at which the illness can have begun.
        by: The latest step by which it must have been seen; None: by the end.
    """

    conditions: tuple[str, ...]
    layers: str | None = None
    named: str | None = None
    since: int = 0
    by: int | None = None

    @property
    def chief(self) -> str:
        return self.conditions[0]


def must(*conditions: str, **details: Any) -> Must:
    assert set(conditions) <= CONDITIONS
    return Must(conditions, **details)


@dataclass(frozen=True)
class Scenario:
    """A training with its label. What is neither a must nor allowed must not be found.

    Attributes:
        name: What it is, in words.
        build: Makes the module and its batches, from torch's global random state.
        steps: Optimizer steps.
        must: What must be found; empty: a healthy training.
        allow: Conditions that are true as well, or follow from the illness sooner or later.
        chain: Regex of the modules, by full name, whose outputs are the main chain, for the twin; of one that is called
            many times, its calls.
        units: Regex of modules -> the activation that their outputs go into, for the twin.
        falls: Least fall of the loss, as a share of its start, that shows that a healthy training learns; None: it
            cannot fall, or is no measure of learning (GAN).
        noted: Conditions that must be noted, of severity info.
        options: Of the Trainer; a function makes what has a state of its own, anew for every fit.
        report: The public report behind it, as "owner/repository#number"; "": none.
    """

    name: str
    build: Callable[[], Built]
    steps: int
    must: tuple[Must, ...] = ()
    allow: frozenset[str] = frozenset()
    chain: str | None = None
    units: dict[str, str] = field(default_factory=dict)
    falls: float | None = 0.2
    noted: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    report: str = ""

    def make(self, seed: int) -> tuple[pl.LightningModule, DataLoader]:
        """The module and its data; the same seed gives the same again."""
        torch.manual_seed(seed)
        module, batches = self.build()
        return module, DataLoader(batches, batch_size=None)  # ty: batches are made already

    @property
    def must_not(self) -> frozenset[str]:
        return CONDITIONS - self.allow - {name for wanted in self.must for name in wanted.conditions}


CATALOGUE: dict[str, Scenario] = {}


def scenario(name: str, steps: int = 100, allow: Sequence[str] = (), **label: Any) -> Callable[[Any], Any]:
    """Enter a function that builds a training into the catalogue, with its label."""
    assert set(allow) <= CONDITIONS
    assert name not in CATALOGUE

    def enter(build: Callable[[], Built]) -> Callable[[], Built]:
        CATALOGUE[name] = Scenario(name, build, steps, allow=frozenset(allow), **label)
        return build

    return enter


def fit(case: Scenario, seed: int, watcher: pl.Callback) -> None:
    """Train under the eyes of one callback."""
    module, loader = case.make(seed)
    own = {name: value() if callable(value) else value for name, value in case.options.items()}
    options = {"log_every_n_steps": 10, "max_epochs": -1, "max_steps": case.steps, **own}
    torch.manual_seed(seed)
    trainer(watcher, **options).fit(module, loader)


def examine(case: Scenario, seed: int) -> HealthReport:
    """What GradHealth, with its default settings, says of a training."""
    health = GradHealth()
    fit(case, seed, health)
    return health.report()


@dataclass(frozen=True)
class Outcome:
    """A report held against the label.

    Attributes:
        hits: The condition that was found for each must that is met.
        misses: The chief condition, and what is missing, of each that is not.
        alarms: Conditions that were found and must not be, and what was said.
        notes: What else is wrong with the report.
    """

    hits: tuple[str, ...] = ()
    misses: tuple[tuple[str, str], ...] = ()
    alarms: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def complaints(self) -> list[str]:
        return [
            *(f"missed {name}: {why}" for name, why in self.misses),
            *(f"false alarm {name}: {why}" for name, why in self.alarms),
            *self.notes,
        ]


def judge(case: Scenario, report: HealthReport) -> Outcome:
    """Hold a report against the label."""
    found = {str(finding.condition): finding for finding in report.findings if finding.severity is not Severity.INFO}
    hits, misses = [], []
    for wanted in case.must:
        flaws = {name: list(_flaws(wanted, found.get(name))) for name in wanted.conditions}
        met = next((name for name, why in flaws.items() if not why), None)
        if met is None:
            why = next((why for why in flaws.values() if why != ["not found"]), ["not found"])
            misses.append((wanted.chief, "; ".join(why)))
        else:
            hits.append(met)
    alarms = [(name, str(finding)) for name, finding in found.items() if name in case.must_not]
    notes = [f"not watched to the end: {report.aside}"] if report.aside or not report.steps else []
    infos = {str(finding.condition) for finding in report.findings if finding.severity is Severity.INFO}
    notes += [f"{name} is not noted" for name in case.noted if name not in infos]
    return Outcome(tuple(hits), tuple(misses), tuple(alarms), tuple(notes))


def _flaws(wanted: Must, finding: Any) -> Iterator[str]:
    """What a finding lacks of what is wanted."""
    if finding is None:
        yield "not found"
        return
    if finding.first_step < wanted.since:
        yield f"said to begin at step {finding.first_step}, before {wanted.since}"
    if wanted.by is not None and finding.first_step > wanted.by:
        yield f"seen at step {finding.first_step}, later than {wanted.by}"
    if wanted.named is not None and wanted.named not in finding.layers:
        yield f"without layer {wanted.named}"
    if wanted.layers is not None:
        wrong = [layer for layer in finding.layers if not re.fullmatch(wanted.layers, layer)]
        if wrong or not finding.layers:
            yield f"in layers {', '.join(wrong) or 'without names'}, not {wanted.layers}"
