"""A pytest plugin that has a GradHealth watch every fit of a foreign test suite: `pytest -p lightning_suite ...`.

A test fails where a fit leaves a hook of ours behind, where the callback stepped aside or failed, or where something
was no longer watched. What was run is told at the end.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import Checkpoint
from torch import nn

from lightning_gradhealth import GradHealth
from lightning_gradhealth.loggers import LoggerSink

OURS = "lightning_gradhealth"
HOOKS = (
    *("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"),
    *("_state_dict_hooks", "_load_state_dict_pre_hooks"),
)
OPTIMIZER_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")


class Watch(logging.Handler):
    """Counts fits and steps, and keeps what was wrong with them."""

    def __init__(self) -> None:
        super().__init__()
        self.fits = self.seen = self.steps = 0
        self.wrong: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep what tells of a failure of ours."""
        if record.exc_info or "steps aside" in record.getMessage():
            self.wrong.append(f"logged: {record.getMessage()}")

    def look(self, trainer: pl.Trainer, health: GradHealth) -> None:
        """Look at what a fit has left behind."""
        self.fits += 1
        report = health.report()
        self.seen += report.steps > 0
        self.steps += report.steps
        self.wrong += [f"stepped aside: {report.aside}"] if report.aside else []
        self.wrong += [f"not watched: {line}" for line in report.unwatched]
        model = trainer.strategy._lightning_module
        self.wrong += [f"left behind: {name}" for name in left_behind(model, trainer.strategy.optimizers)]


def left_behind(model: nn.Module | None, optimizers: Any) -> list[str]:
    """The hooks of ours on a model and optimizers."""
    modules = [] if model is None else list(model.named_modules())
    found = [f"{kind} of {name!r}" for name, module in modules for kind in HOOKS if ours(getattr(module, kind, None))]
    for optimizer in optimizers:
        found += [f"{kind} of the optimizer" for kind in OPTIMIZER_HOOKS if ours(getattr(optimizer, kind, None))]
    return found


def ours(hooks: Any) -> bool:
    """Whether any of the hooks comes from the package."""
    if not isinstance(hooks, dict):
        return False
    return any(OURS in f"{getattr(hook, '__module__', '')}{type(hook).__module__}" for hook in hooks.values())


WATCH = Watch()
FIT = pl.Trainer.fit


@functools.wraps(FIT)
def watched_fit(trainer: pl.Trainer, *args: Any, **options: Any) -> Any:
    """Fit with a GradHealth, before callbacks that save checkpoints, as the Trainer has it."""
    health = next((callback for callback in trainer.callbacks if isinstance(callback, GradHealth)), None)
    mine = health is None
    if health is None:
        health = vars(trainer).setdefault("gradhealth_of_the_suite", GradHealth())
        savers = [place for place, callback in enumerate(trainer.callbacks) if isinstance(callback, Checkpoint)]
        trainer.callbacks.insert(savers[0] if savers else len(trainer.callbacks), health)
    try:
        return FIT(trainer, *args, **options)
    finally:
        WATCH.look(trainer, health)
        if mine and health in trainer.callbacks:  # the tests compare the list with their own
            trainer.callbacks.remove(health)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let the loggers be, for tests that compare all that a logger was given."""
    parser.addoption("--gradhealth-quiet", action="store_true", help="write nothing to the loggers")


def pytest_configure(config: pytest.Config) -> None:
    """Begin to watch."""
    if config.getoption("--gradhealth-quiet"):
        LoggerSink.write = lambda *_args, **_options: None  # type: ignore[method-assign]
    for name in ("flaky", "cloud"):
        config.addinivalue_line("markers", f"{name}: of the suite's own plugins")
    pl.Trainer.fit = watched_fit
    logging.getLogger(OURS).addHandler(WATCH)


@pytest.fixture(autouse=True)
def nothing_wrong() -> Iterator[None]:
    """Fail a test with what was wrong with its fits."""
    WATCH.wrong.clear()
    yield
    assert not WATCH.wrong, WATCH.wrong


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Tell how much was watched."""
    line = f"gradhealth: {WATCH.fits} fits, {WATCH.seen} of them with steps, {WATCH.steps} steps watched"
    terminalreporter.write_line(line)
