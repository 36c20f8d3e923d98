"""Long work: a bar on a terminal from the third second on, a budget of seconds, and nothing disturbed by either."""

from __future__ import annotations

import functools
import io
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import mlp
from rich.console import Console
from test_no_trace import Writer, state_of
from torch import Tensor, nn

import lightning_gradhealth as gh
from lightning_gradhealth.tracing import progress
from lightning_gradhealth.tracing.progress import OutOfTimeError, Work, tick, working

X = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))


class Terminal(io.StringIO):
    """What a terminal shows."""

    def isatty(self) -> bool:
        return True


class Clock:
    """Moves on by a step whenever it is asked."""

    def __init__(self, step: float) -> None:
        self.step, self.now = step, 0.0

    def __call__(self) -> float:
        self.now += self.step
        return self.now


@pytest.fixture(autouse=True)
def at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where somebody sits before the terminal."""
    for name in ("CI", "RANK", "LOCAL_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


def console_on(file: Any, **options: Any) -> Console:
    return Console(file=file, force_terminal=True, width=100, **options)


def test_a_bar_from_the_third_second_on() -> None:
    screen, clock = Terminal(), Clock(0.0)
    threads, out, err = threading.active_count(), sys.stdout, sys.stderr
    work = Work("init_weights", console=console_on(screen), clock=clock)
    clock.now = 2.9
    work.tick("finding gains", 3, 10)
    assert screen.getvalue() == ""
    clock.now = 3.2
    work.tick("finding gains", 4, 10)
    assert "init_weights" in screen.getvalue()
    assert "4/10" in screen.getvalue()
    assert "finding gains" in screen.getvalue()
    drawn = screen.getvalue()
    work.tick("finding gains", 5, 10)  # no time has passed
    assert screen.getvalue() == drawn
    clock.now = 3.4
    work.tick()
    assert "5/10" in screen.getvalue()
    assert (threading.active_count(), sys.stdout, sys.stderr) == (threads, out, err)
    work.close()
    assert screen.getvalue().rstrip().endswith("\x1b[2K")  # the line is wiped
    assert screen.getvalue().rindex("\x1b[?25h") > screen.getvalue().rindex("\x1b[?25l")  # and the cursor is back
    after = screen.getvalue()
    clock.now = 99.0
    work.tick()
    assert screen.getvalue() == after


@pytest.mark.parametrize("where", ["pipe", "notebook", "CI", "another rank", "dumb terminal"])
def test_no_bar_where_nobody_looks(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO() if where == "pipe" else Terminal()
    for name, value in {"CI": ("CI", "true"), "another rank": ("RANK", "1"), "dumb terminal": ("TERM", "dumb")}.items():
        if where == name:
            monkeypatch.setenv(*value)
    console = console_on(screen, force_jupyter=where == "notebook")
    work = Work("diagnose", console=console, clock=Clock(5.0))
    for done in range(5):
        work.tick("forward and back", done, 5)
    work.close()
    assert screen.getvalue() == ""


def test_a_terminal_that_has_gone_stops_nothing() -> None:
    class Gone(Terminal):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    work = Work("diagnose", console=console_on(Gone()), clock=Clock(5.0))
    for _ in range(5):
        work.tick("forward and back")
    work.close()


@pytest.mark.parametrize("fails", [False, True])
def test_the_bar_is_gone_when_the_work_is_done(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    screen, threads = Terminal(), threading.active_count()
    shown = functools.partial(Work, console=console_on(screen), clock=Clock(0.5))
    monkeypatch.setattr(progress, "Work", shown)
    torch.manual_seed(0)
    net, other = mlp(), mlp()
    other.load_state_dict(net.state_dict())
    if fails:
        with pytest.raises(ValueError, match="example_inputs"):
            gh.init_weights(net, torch.randn(2, 5))
        assert threading.active_count() == threads
        return
    report = gh.init_weights(net, X, seed=0)
    assert "init_weights" in screen.getvalue()
    assert screen.getvalue().rstrip().endswith("\x1b[2K")
    monkeypatch.undo()
    assert report.to_dict() == gh.init_weights(other, X, seed=0).to_dict()
    assert all(map(torch.equal, net.state_dict().values(), other.state_dict().values()))


def nested() -> None:
    with working("diagnose", budget=5.0) as outer, working("plan_init") as inner:
        assert inner is outer
        raise KeyError


def test_one_piece_of_work_in_another_is_a_part_of_it() -> None:
    with pytest.raises(KeyError):
        nested()
    tick("nobody waits")
    with working("diagnose") as again:
        assert not again.is_over


def sick() -> nn.Module:
    net = mlp(depth=16)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(0.1)
    return net


def test_what_the_budget_leaves_out_is_said() -> None:
    net = sick()
    full, short = gh.diagnose(net, X, budget=None), gh.diagnose(net, X, budget=1e-9)
    assert full.conditions == short.conditions != frozenset()
    assert any("would draw" in remedy for remedy in full.remedies)
    assert not any("would draw" in remedy for remedy in short.remedies)
    assert not any("budget" in note for note in full.notes)
    (note,) = (note for note in short.notes if "budget" in note)
    assert note == (
        "not looked at, as the budget of 1e-09 s is spent: 2 of 3 random directions; what gh.init_weights would change"
    )


def test_where_nan_begins_is_left_out_too() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).log()  # type: ignore[no-any-return]

    report = gh.diagnose(Broken(), (X, torch.zeros(64, 3)), nn.functional.mse_loss, budget=1e-9)
    assert gh.Condition.NON_FINITE in report.conditions
    assert any("where the NaN or Inf begins" in note for note in report.notes)


@pytest.mark.parametrize("at", range(1, 60, 7))
def test_wherever_time_runs_out_nothing_is_left(at: int) -> None:
    net = Writer("data assigned", needs_values=True)
    before, random = state_of(net), torch.get_rng_state()
    asked = iter(range(10_000))

    def clock() -> float:
        return 10.0 if next(asked) >= at else 0.0

    work = Work("diagnose", budget=1.0, clock=clock)
    token = progress._CURRENT.set(work)
    try:
        with work.interruptible(), pytest.raises(OutOfTimeError):
            gh.plan_init(net, X, seed=0)
    finally:
        progress._CURRENT.reset(token)
    assert state_of(net) == before
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize(
    ("budget", "error"),
    [(0, ValueError), (-1.0, ValueError), (float("nan"), ValueError), ("30", TypeError), (True, TypeError)],
)
def test_a_wrong_budget_names_the_remedy(budget: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"budget must be a finite number > 0, got .*seconds, or None for no limit"):
        gh.diagnose(mlp(), X, budget=budget)


def test_the_command_line_has_a_budget(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_gradhealth.cli import diagnose as command

    made: dict[str, Callable[[], Any]] = {"net": sick, "x": lambda: X}
    monkeypatch.setattr(sys.modules[__name__], "made_net", made["net"], raising=False)
    monkeypatch.setattr(sys.modules[__name__], "made_x", made["x"], raising=False)
    assert command.run(f"{__name__}:made_net", f"{__name__}:made_x", budget=1e-9) == 1
    assert "the budget of 1e-09 s is spent" in " ".join(capsys.readouterr().out.split())
