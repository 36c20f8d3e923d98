"""What every architecture has to pass: its init, its diagnosis, no trace left, and training beside its own init."""

from __future__ import annotations

import dataclasses
import logging
import math
import random
import re
import signal
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from conftest import trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_gradhealth import GradHealth, InitReport, diagnose, init_weights
from zoo.architecture import Architecture
from zoo.reachable import Snapshot, alike
from zoo.registry import architectures

STEPS = 30
RATE = 1e-3
FITTED = 0.01  # of the loss at the start: below it a batch is learned, and how far below says nothing
WITHIN = 1.5  # of the library's own final loss, in nearly all
NEVER = 3.0
SECONDS = 30.0  # of CPU that `init_weights` and `diagnose` may take
LIMIT = 100.0  # of CPU, after which a check is given up; training has thrice as many


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: "init", "outputs", "healthy", "no trace", "touched", "callback", "training", "seconds".
        passed: Whether it is as it should be.
        reason: What was seen.
    """

    name: str
    passed: bool
    reason: str = ""


@dataclass
class Result:
    """What became of one architecture.

    Attributes:
        ratio: The final loss from our init over that from the library's own, means over the seeds (None: not trained).
        seconds: CPU seconds by what took them.
        skipped: Why it was not run.
    """

    name: str
    family: str
    checks: list[Check] = field(default_factory=list)
    ratio: float | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    skipped: str = ""

    @property
    def failures(self) -> list[Check]:
        """The checks that did not pass."""
        return [check for check in self.checks if not check.passed]


class _Overtime(BaseException):
    """No `except Exception` of a model stops it."""


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise _Overtime(f"not finished after {seconds:.0f} s of CPU")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def examine(architecture: Architecture, seeds: int = 3) -> Result:
    """Run all checks; what raises or does not finish fails with the reason."""
    result = Result(architecture.name, architecture.family)
    try:
        _build(architecture, 0)
    except ModuleNotFoundError as error:
        result.skipped = f"{error.name} is not installed"
        return result
    except Exception as error:
        result.checks.append(_failed("built", error))
        return result
    parts: dict[str, Callable[[], Iterator[Check]]] = {
        "diagnose": lambda: _diagnosed(architecture, result),
        "init": lambda: _initialised(architecture, result),
        "callback": lambda: _watched(architecture),
        "training": lambda: _trained(architecture, result, seeds),
    }
    for part, run in parts.items():
        start = time.process_time()
        try:
            with _limited(LIMIT * (3 if part == "training" else 1)), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                for check in run():
                    result.checks.append(check)
        except (Exception, _Overtime) as error:
            result.checks.append(_failed(part, error))
        result.seconds[f"all of {part}"] = time.process_time() - start
    for name in ("init_weights", "diagnose"):
        if name in result.seconds:
            seconds = result.seconds[name]
            result.checks.append(Check(f"seconds of {name}", seconds < SECONDS, f"{seconds:.1f} s"))
    return result


def examine_named(name: str, seeds: int) -> Result:
    """The same by name, on one thread."""
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    return examine(architectures()[name], seeds)


# --- the parts ---


def _diagnosed(architecture: Architecture, result: Result) -> Iterator[Check]:
    model, inputs, target = _build(architecture, 0)
    before, state = Snapshot(model), _random_state()
    with _timed(result, "diagnose"):
        report = diagnose(model, (inputs, target), architecture.loss)
    yield _quiet("no trace of diagnose", before.changes(), state)
    if architecture.sick:
        yield Check("healthy", True, f"sick: {architecture.sick}; found: {report.verdict}")
    else:
        worst = next((str(finding) for finding in report.findings), "")
        yield Check("healthy", report.healthy, report.verdict if report.healthy else f"{report.verdict}: {worst}")


def _initialised(architecture: Architecture, result: Result) -> Iterator[Check]:
    model, inputs, _ = _build(architecture, 0)
    before, state = Snapshot(model), _random_state()
    init_weights(model, inputs, seed=0, on_uncovered="ignore", dry_run=True)
    yield _quiet("no trace of dry_run", before.changes(), state)

    own = _rms(architecture, model, inputs)
    model, inputs, _ = _build(architecture, 0)
    before, state = Snapshot(model), _random_state()
    with _timed(result, "init_weights"):
        report = init_weights(model, inputs, seed=0, on_uncovered="ignore")
    named = dict(model.named_parameters())
    drawn = frozenset(id(named[_whole(entry.name)]) for entry in report.entries if entry.scheme != "kept")
    yield _quiet("touched", before.changes(drawn), state)
    yield _accounted(architecture, model, report)
    ours = _rms(architecture, model, inputs)
    alike_ones = 0.05 <= ours <= 20 or own / 10 <= ours <= 10 * own
    fine = not math.isfinite(own) or (math.isfinite(ours) and alike_ones)
    yield Check("outputs", fine, f"RMS {ours:.3g}, the library's own {own:.3g}")


def _accounted(architecture: Architecture, model: nn.Module, report: InitReport) -> Check:
    names, whole = [entry.name for entry in report.entries], {_whole(entry.name) for entry in report.entries}
    wrong = [f"{name}: no entry" for name, _ in model.named_parameters() if name not in whole]
    wrong += [f"{name}: listed twice" for name in {name for name in names if names.count(name) > 1}]
    wrong += [
        f"{entry.name} {entry.shape} uncovered ({entry.note})"
        for entry in report.entries
        if entry.rule == "uncovered" and not re.fullmatch(architecture.uncovered, entry.name)
    ]
    return Check("accounted", not wrong, _some(wrong) or f"{len(whole)} parameters")


def _watched(architecture: Architecture) -> Iterator[Check]:
    ends = []
    for callbacks in ([], [GradHealth(preflight=True)]):
        model, inputs, target = _build(architecture, 0)
        fit = _Fit(model, inputs, target, architecture.loss)
        data = DataLoader([0, 1, 2])
        trainer(*callbacks, max_epochs=1).fit(fit, data)
        ends.append({name: value.clone() for name, value in model.state_dict().items() if isinstance(value, Tensor)})
    other = [name for name, value in ends[0].items() if not alike(value, ends[1][name])]
    yield Check("callback", not other, _some(other) or "bit for bit the same")


def _trained(architecture: Architecture, result: Result, seeds: int) -> Iterator[Check]:
    first, theirs, ours = ([] for _ in range(3))
    for seed in range(seeds):
        model, inputs, target = _build(architecture, seed)
        start, end = _train(model, inputs, target, architecture)
        first.append(start)
        theirs.append(end)
        model, inputs, target = _build(architecture, seed)
        init_weights(model, inputs, seed=seed, on_uncovered="ignore")
        ours.append(_train(model, inputs, target, architecture)[1])
    at_first, own, new = (math.fsum(each) / seeds for each in (first, theirs, ours))
    result.ratio = loss_ratio(at_first, own, new)
    reason = f"{new:.4g}, the library's own {own:.4g} from {at_first:.4g}: {result.ratio:.2f} times"
    yield Check("training", result.ratio <= WITHIN, reason)


def loss_ratio(at_first: float, own: float, ours: float) -> float:
    """How much worse our final loss is than the library's own: ours / own, each at least a hundredth of the first.

    Where losses can be negative: 1 + what ours lacks, as a share of what the library's own has gained.
    """
    if not math.isfinite(ours):
        return math.inf if math.isfinite(own) else 1.0
    if not math.isfinite(own):
        return 0.0
    if min(own, ours) > 0:
        least = FITTED * at_first
        return max(ours, least) / max(own, least)
    return max(0.0, 1 + (ours - own) / max(abs(at_first - own), 1e-12))


# --- what they share ---


def _failed(name: str, error: BaseException) -> Check:
    where = traceback.extract_tb(error.__traceback__)[-1]
    return Check(name, False, f"{type(error).__name__}: {error} ({where.filename.rpartition('/')[2]}:{where.lineno})")


def _build(architecture: Architecture, seed: int) -> tuple[nn.Module, Any, Any]:
    _seed(1)
    inputs, target = architecture.batch()
    _seed(seed)
    return architecture.model().train(), inputs, target


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002


def _random_state() -> tuple[Any, ...]:
    numbers = np.random.get_state()  # noqa: NPY002
    return torch.get_rng_state(), random.getstate(), (numbers[0], numbers[1].tolist(), *numbers[2:])  # type: ignore[index,union-attr]


def _quiet(name: str, changes: list[str], state: tuple[Any, ...]) -> Check:
    now = _random_state()
    if not torch.equal(now[0], state[0]) or now[1:] != state[1:]:
        changes = ["the random state", *changes]
    return Check(name, not changes, _some(changes))


def _some(lines: list[str]) -> str:
    more = f", and {len(lines) - 4} more" if len(lines) > 4 else ""
    return ", ".join(lines[:4]) + more


def _whole(name: str) -> str:
    return name.partition("[")[0]


def _call(model: nn.Module, inputs: Any) -> Any:
    return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


def _rms(architecture: Architecture, model: nn.Module, inputs: Any) -> float:
    """Root mean square over all that the model puts out; its buffers may move."""
    _seed(0)
    with torch.no_grad():
        outputs = _call(model, inputs)
    found = [leaf.abs().double().flatten() for leaf in _leaves(outputs)]
    return float(torch.cat(found).square().mean().sqrt())


def _leaves(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point() or value.is_complex():
            yield value
    elif isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _leaves(item)
    elif dataclasses.is_dataclass(value) or hasattr(value, "__dict__"):
        for item in vars(value).values():
            yield from _leaves(item)


def _train(model: nn.Module, inputs: Any, target: Any, architecture: Architecture) -> tuple[float, float]:
    """The loss before the first step and after the last."""
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=RATE), []
    for step in range(STEPS + 1):
        _seed(step)
        loss = architecture.loss(_call(model, inputs), target)
        losses.append(float(loss))
        optimizer.zero_grad()
        if step < STEPS:
            loss.backward()
            optimizer.step()
    return losses[0], losses[-1]


@contextmanager
def _timed(result: Result, name: str) -> Iterator[None]:
    start = time.process_time()
    try:
        yield
    finally:
        result.seconds[name] = time.process_time() - start


class _Fit(pl.LightningModule):
    """Trains on the same batch again and again."""

    def __init__(self, net: nn.Module, inputs: Any, target: Any, loss: Callable[[Any, Any], Tensor]) -> None:
        super().__init__()
        self.net, self.loss, self.given = net, loss, (inputs, target)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        _seed(batch_idx)
        return self.loss(_call(self.net, self.given[0]), self.given[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=RATE)
