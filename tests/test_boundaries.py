"""Where others' code meets ours: what it gives is checked, what we say cannot raise, what we save can be loaded."""

from __future__ import annotations

import decimal
import fractions
import io
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from conftest import Classifier, batches, mlp, trainer
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar, TQDMProgressBar
from rich.console import Console
from rich.logging import RichHandler
from rich.text import Text
from torch import Tensor, nn

from lightning_gradhealth import (
    Clipper,
    Cut,
    GradHealth,
    GradHealthError,
    HealthReport,
    HealthSession,
    Rule,
    StepRecord,
    Verdict,
)
from lightning_gradhealth.judgement import Judgement
from lightning_gradhealth.records import LayerStats
from lightning_gradhealth.saving import savable


def rule_that(check: Callable[[StepRecord], Any], **attributes: Any) -> Rule:
    """A rule of the user's whose check is a function."""
    return type("Mine", (Rule,), {"condition": "mine", "check": lambda _, record: check(record), **attributes})()


def said(caplog: pytest.LogCaptureFixture, words: str) -> list[str]:
    return [entry.getMessage() for entry in caplog.records if words in entry.getMessage()]


class Mute(Exception):
    """Its text cannot be had."""

    def __str__(self) -> str:
        raise RuntimeError("no text")

    __repr__ = __str__


RECORD = StepRecord(step=5, layers=(LayerStats("a", optimizer=0, grad_norm=1.0), LayerStats("b", optimizer=0)))

GARBAGE = {
    "True": lambda _: True,
    "a string": lambda _: "warning: it is odd",
    "a dict": lambda _: {"severity": "warning"},
    "a list": lambda _: [],
    "0": lambda _: 0,
    "a tensor": lambda _: torch.ones(3),
    "an array": lambda _: np.ones(3),
    "the class": lambda _: Verdict,
    "severity": lambda _: Verdict("bad", "s", "r"),
    "severity None": lambda _: Verdict(None, "s", "r"),  # type: ignore[arg-type]
    "layers of numbers": lambda _: Verdict("info", "s", "r", layers=(1, 2)),  # type: ignore[arg-type]
    "layers that are modules": lambda _: Verdict("info", "s", "r", layers=[nn.ReLU()]),  # type: ignore[arg-type]
    "layers that are a number": lambda _: Verdict("info", "s", "r", layers=3),  # type: ignore[arg-type]
    "first_step a string": lambda _: Verdict("info", "s", "r", first_step="5"),  # type: ignore[arg-type]
    "first_step NaN": lambda _: Verdict("info", "s", "r", first_step=float("nan")),  # type: ignore[arg-type]
    "first_step a list": lambda _: Verdict("info", "s", "r", first_step=[1]),  # type: ignore[arg-type]
    "evidence a list": lambda _: Verdict("info", "s", "r", evidence=[1]),  # type: ignore[arg-type]
    "an exception": lambda _: 1 / 0,
    "a mute exception": lambda _: (_ for _ in ()).throw(Mute()),
}


@pytest.mark.parametrize("check", GARBAGE.values(), ids=GARBAGE)
def test_a_rule_that_gives_garbage_is_left_out_and_told_once(check: Any, caplog: pytest.LogCaptureFixture) -> None:
    judgement = Judgement([rule_that(check)], {})
    for _ in range(3):
        assert judgement.add(RECORD) == []
    assert len(said(caplog, "the rule Mine failed and is left out")) == 1
    report = judgement.report(())
    assert not report.healthy
    assert report.unwatched[0].startswith("mine by the rule Mine, since step 5 (it failed: ")


EVIDENCE = {
    "a function": (len, str),
    "a lock": (threading.Lock(), str),
    "a tensor": (torch.tensor(1.5), 1.5),
    "a vector": (torch.tensor([1.0, 2.0]), [1.0, 2.0]),
    "an array": (np.array([[1, 2]]), [1, 2]),
    "a number of NumPy's": (np.float32(0.5), 0.5),
    "an int of NumPy's": (np.int64(3), 3),
    "a fraction": (fractions.Fraction(1, 2), 0.5),
    "a decimal": (decimal.Decimal("1.5"), str),
    "a huge int": (10**400, str),
    "a module": (nn.Linear(2, 2), str),
    "bytes": (b"ab", str),
    "a complex": (1j, str),
    "a mute exception": (Mute(), str),
    "a set": ({1}, [1]),
    "nested": ({"a": {"b": {"c": {"d": {"e": {}}}}}}, dict),
    "a class": (nn.ReLU, str),
}


@pytest.mark.parametrize(("value", "expected"), EVIDENCE.values(), ids=EVIDENCE)
def test_evidence_becomes_plain_data(value: Any, expected: Any, tmp_path: Path) -> None:
    judgement = Judgement([rule_that(lambda _: Verdict("warning", "s", "r", evidence={"it": value, 3: 4}))], {})
    (finding,) = judgement.add(RECORD)
    found = finding.evidence["it"]
    assert isinstance(found, expected) if isinstance(expected, type) else found == expected
    assert finding.evidence["3"] == 4
    torch.save(judgement.state_dict(), tmp_path / "state")
    torch.load(tmp_path / "state", weights_only=True)
    report = judgement.report(())
    assert HealthReport.from_json(report.to_json()).findings[0].condition == "mine"
    for suffix in ("md", "txt", "json"):
        report.save(tmp_path / f"report.{suffix}")


def test_evidence_is_bounded() -> None:
    cyclic: dict[str, Any] = {}
    cyclic["self"] = cyclic
    evidence = {"text": "x" * 10**6, "list": list(range(10**5)), "cyclic": cyclic}
    judgement = Judgement([rule_that(lambda _: Verdict("info", "y\n" * 10**5, "r" * 10**6, evidence=evidence))], {})
    judgement.add(RECORD)
    assert len(judgement.report(()).to_json()) < 20_000


@pytest.mark.parametrize("first", [np.int64(3), np.int32(3), 3])
def test_a_first_step_of_any_whole_number(first: Any) -> None:
    (finding,) = Judgement([rule_that(lambda _: Verdict("info", "s", "r", ("a",), first_step=first))], {}).add(RECORD)
    assert (type(finding.first_step), finding.first_step) == (int, 3)


def mutates(record: StepRecord) -> None:
    for layer in record.layers:
        vars(layer)["grad_norm"] = -1.0
    object.__setattr__(record, "layers", ())
    record.temporal["x"] = None  # type: ignore[assignment]


def test_a_rule_cannot_change_what_others_see() -> None:
    seen: list[StepRecord] = []
    judgement = Judgement([rule_that(mutates), rule_that(seen.append, condition="other")], {})
    judgement.add(RECORD)
    assert seen[0] == RECORD
    assert RECORD.layers[0].grad_norm == 1.0
    assert not RECORD.temporal


def with_state(state: Any) -> Rule:
    rule = rule_that(lambda _: None)
    type(rule).state_dict = lambda _: state() if callable(state) else state  # type: ignore[method-assign]
    type(rule).load_state_dict = lambda _, __: None  # type: ignore[method-assign]
    return rule


def raises() -> None:
    raise Mute


@pytest.mark.parametrize(
    "state",
    [{"lock": threading.Lock()}, {"f": len}, {"model": nn.Linear(1, 1)}, [object()], raises, {"a": {1: print}}],
    ids=["lock", "function", "module", "object", "raises", "nested"],
)
def test_a_rule_that_cannot_be_saved_is_told_once_in_six_checkpoints(
    state: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saves = ModelCheckpoint(tmp_path, every_n_train_steps=4, save_top_k=-1)
    health = GradHealth(rules=[with_state(state)])
    trainer(health, saves, max_steps=24, enable_checkpointing=True).fit(Classifier(), batches())
    assert len(said(caplog, "the state of the rule Mine is not saved")) == 1
    paths = sorted(tmp_path.glob("*.ckpt"))
    assert len(paths) == 6
    for path in paths:
        torch.load(path, weights_only=True)
    assert not health.report().aside


def test_what_can_be_made_plain_is_saved() -> None:
    state = {"np": np.float32(1.5), "array": np.ones(2), "p": nn.Parameter(torch.ones(1)), "t": (1, {2})}
    made = savable(state)
    assert (made["np"], type(made["np"]), made["t"]) == (1.5, float, (1, {2}))
    assert type(made["array"]) is type(made["p"]) is Tensor


class Odd(Clipper):
    """Changes nothing; its state is a matter of its own."""

    def decide(self, gradients: Any) -> Cut:
        one = torch.ones_like(gradients.total)
        return Cut([one], torch.zeros_like(one, dtype=torch.bool), one)

    def state_dict(self) -> dict[str, Any]:
        raise OSError("no")


class Locked(Odd):
    """Keeps a lock."""

    def state_dict(self) -> dict[str, Any]:
        return {"lock": threading.Lock()}


class Forgetful(Odd):
    """Cannot be loaded."""

    def state_dict(self) -> dict[str, Any]:
        return {"a": 1}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise Mute


@pytest.mark.parametrize("clip", [Odd(), Locked(), Forgetful()], ids=lambda clip: type(clip).__name__)
def test_clipping_goes_on_where_its_state_cannot_be_kept(
    clip: Clipper, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saves = ModelCheckpoint(tmp_path, every_n_train_steps=4, save_top_k=-1)
    trainer(GradHealth(clip=clip), saves, max_steps=12, enable_checkpointing=True).fit(Classifier(), batches())
    if type(clip) is not Forgetful:
        assert len(said(caplog, "is not saved in checkpoints")) == 1
    health = GradHealth(clip=clip)
    last = sorted(tmp_path.glob("*step=12.ckpt"))[0]
    trainer(health, max_steps=20).fit(Classifier(), batches(), ckpt_path=last)
    assert (health.report().aside, health.report().steps) == ("", 20)
    if type(clip) is Forgetful:
        assert len(said(caplog, "the state of Forgetful cannot be taken up and starts afresh")) == 1


# --- what we say ---


def naming(name: str) -> Rule:
    """A rule that finds something in a layer of that name."""
    return rule_that(lambda _: Verdict("warning", f"it is in {name}", "r", layers=(f"net.{name}",)))


class Exploding(Classifier):
    """Its loss is NaN from the third batch on."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * (float("nan") if self.global_step >= 3 else 1.0)


class Fails(logging.Handler):
    """A webhook that is down."""

    def emit(self, record: logging.LogRecord) -> None:
        raise ConnectionError("down")


def refuses(record: logging.LogRecord) -> bool:
    raise ValueError("a filter with a mistake")


@pytest.mark.parametrize("what", ["handler", "filter", "rich", "mute"])
def test_no_handler_and_no_filter_ends_a_training(what: str) -> None:
    logger = logging.getLogger("lightning_gradhealth")
    out = io.StringIO()
    handler: logging.Handler = Fails()
    if what in ("rich", "mute"):
        handler = RichHandler(markup=True, rich_tracebacks=True, console=Console(file=out, width=10_000))
    if what == "filter":
        logger.addFilter(refuses)
    else:
        logger.addHandler(handler)
    try:
        clip = type("Bad", (Odd,), {"decide": lambda *_: raises()})() if what == "mute" else None
        health = GradHealth(clip=clip, rules=[naming("[/x]")])
        run = trainer(health, max_steps=12)
        run.fit(Exploding(), batches())
    finally:
        logger.removeFilter(refuses)
        logger.removeHandler(handler)
    assert run.global_step == 12
    if what == "rich":
        assert "net.[/x]" in out.getvalue()
    if what == "mute":
        assert any("Mute: its text cannot be had: RuntimeError" in line for line in health.report().unwatched)


@pytest.mark.parametrize("name", ["[/x]", "[bold red]x", "[link=http://e]l[/link]", "\x1b[31mred", "a\nCRITICAL:b"])
@pytest.mark.parametrize("base", [RichProgressBar, TQDMProgressBar])
def test_progress_bars_show_any_name_as_it_is(base: Any, name: str) -> None:
    out = io.StringIO()

    class Bar(base):  # type: ignore[misc]
        def print(self, *args: Any, **kwargs: Any) -> None:
            if base is RichProgressBar:
                Console(file=out, width=10_000).print(*args, **kwargs)
            else:
                out.write(" ".join(map(str, args)) + "\n")

    run = trainer(GradHealth(rules=[naming(name)]), Bar(), max_steps=10, enable_progress_bar=True)
    run.fit(Exploding(), batches())
    text = out.getvalue()
    assert run.global_step == 10
    assert "\x1b" not in text
    assert all(line.startswith("gradhealth: ") for line in text.splitlines() if line.strip())
    assert name.replace("\x1b", "\\x1b").replace("\n", "\\n") in text


def test_a_bar_that_fails_leaves_the_line_to_the_logger(caplog: pytest.LogCaptureFixture) -> None:
    class Bar(TQDMProgressBar):
        def print(self, *args: Any, **kwargs: Any) -> None:
            raise BrokenPipeError("gone")

    run = trainer(GradHealth(), Bar(), max_steps=10, enable_progress_bar=True)
    run.fit(Exploding(), batches())
    assert run.global_step == 10
    assert said(caplog, "non_finite")
    assert str(Text("[/x]")) == "[/x]"


# --- a session of one's own ---


def loop(session: HealthSession, model: nn.Module, steps: int = 12, bad: int = 6) -> list[Any]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    got: list[Any] = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = model(torch.randn(8, 8)).square().mean() * (float("nan") if step == bad else 1.0)
        loss.backward()
        decision = session.observe(optimizer, loss)
        session.apply(decision)
        optimizer.step()
        got += [decision.action, session.flush(), session.report(), session.state_dict()]
    return got


def down(line: str) -> None:
    raise ConnectionError("down")


@pytest.mark.parametrize("announce", [down, lambda line: 1 / 0, Mute])
def test_a_broken_announce_disturbs_nothing(announce: Any, caplog: pytest.LogCaptureFixture) -> None:
    session = HealthSession(mlp(), announce=announce)
    loop(session, session.monitor._model)
    assert session.report().steps == 12
    assert not session.report().aside
    if announce is not Mute:
        assert said(caplog, "non_finite")


PARTS = [
    ("monitor", "observe"),
    ("response", "carry_out"),
    ("signals", "close"),
    ("monitor", "records"),
    ("judgement", "add"),
    ("judgement", "report"),
    ("response", "review"),
    ("monitor", "apply"),
]


@pytest.mark.parametrize(
    "error", [RuntimeError("ours"), Mute(), MemoryError("none left")], ids=lambda e: type(e).__name__
)
@pytest.mark.parametrize(("part", "method"), PARTS, ids=map(str, PARTS))
def test_a_failure_of_the_sessions_own_is_told_once(
    part: str, method: str, error: Exception, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = mlp()
    session = HealthSession(model, clip="adaptive", on_non_finite="skip")

    def fails(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(getattr(session, part), method, fails)
    got = loop(session, model)
    assert set(got[::4]) <= {"ok", "skip"}
    assert len(said(caplog, "steps aside for the rest of this run")) == 1
    assert "WITHOUT clipping and on_non_finite" in said(caplog, "steps aside")[0]
    report = session.report()
    assert type(error).__name__ in report.aside
    assert not report.healthy
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    session.load_state_dict(session.state_dict())
    session.close()


def test_an_error_on_purpose_and_a_wrong_argument_still_raise() -> None:
    model = mlp()
    with pytest.raises(GradHealthError, match="NaN or Inf"):
        loop(HealthSession(model, on_non_finite="raise"), model)
    session = HealthSession(model)
    with pytest.raises(TypeError, match="loss must be"):
        session.observe(torch.optim.SGD(model.parameters(), lr=0.1), "0.5")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="optimizer must be"):
        session.observe("sgd")  # type: ignore[arg-type]
    assert not session.report().aside


# --- what comes back from a checkpoint ---


def checkpoint(tmp_path: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """A checkpoint whose state of GradHealth has been changed."""
    path = tmp_path / "run.ckpt"
    run = trainer(GradHealth(), max_steps=6)
    run.fit(Classifier(), batches())
    run.save_checkpoint(path)
    saved = torch.load(path, weights_only=True)
    (key,) = [key for key in saved["callbacks"] if key.startswith("GradHealth")]
    saved["callbacks"][key] = change(saved["callbacks"][key])
    torch.save(saved, path)
    return path


def without(*keys: str) -> Callable[[dict[str, Any]], Any]:
    def change(state: dict[str, Any]) -> dict[str, Any]:
        inner = state
        for key in keys[:-1]:
            inner = inner[key]
        del inner[keys[-1]]
        return state

    return change


def short_history(state: dict[str, Any]) -> dict[str, Any]:
    history = state["judgement"]["history"]
    history["values"] = history["values"][:, :1]
    return state


def no_norms(state: dict[str, Any]) -> dict[str, Any]:
    for row in state["monitor"]["rows"]:
        row["norms"] = row["norms"][:1]
    return state


def row_with(name: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    def change(state: dict[str, Any]) -> dict[str, Any]:
        state["monitor"]["rows"][0][name] = value
        return state

    return change


def history_with(value: Any) -> Callable[[dict[str, Any]], Any]:
    def change(state: dict[str, Any]) -> dict[str, Any]:
        state["judgement"]["history"]["totals"][0] = value
        return state

    return change


STATES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a tensor": lambda _: torch.ones(3),
    "one number": lambda _: torch.ones(()),
    "a list": lambda _: [1, 2],
    "a string": lambda _: "state",
    "a number": lambda _: 5,
    "of another version": lambda _: {"format": 7, "norms": torch.ones(3)},
    "no judgement": without("judgement"),
    "no rules": without("judgement", "rules"),
    "no step": without("judgement", "step"),
    "the judgement a list": lambda state: {**state, "judgement": []},
    "the findings truncated": lambda state: {**state, "judgement": {**state["judgement"], "findings": [{}]}},
    "a history of another width": short_history,
    "a count that is None": lambda state: {**state, "judgement": {**state["judgement"], "steps": None}},
    "norms truncated": no_norms,
    "an origin that is no text": row_with("origin_unknown", None),
    "a loss scale that is no number": row_with("scale", "x"),
    "a history with a word in it": history_with("x"),
    "layers that are no names": lambda state: {**state, "logged_layers": 5},
}


@pytest.mark.parametrize("change", STATES.values(), ids=STATES)
def test_a_state_that_is_none_of_ours_is_told_once_and_left(
    change: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = checkpoint(tmp_path, change)
    health = GradHealth()
    run = trainer(health, max_steps=12)
    run.fit(Classifier(), batches(), ckpt_path=path)
    assert run.global_step == 12
    assert len(said(caplog, "the checkpoint's state does not fit")) == 1
    report = health.report()
    assert (report.aside, report.steps) == ("", 6)  # it has watched what came after


@pytest.mark.parametrize("empty", [None, {}, []])
def test_no_state_is_no_state(empty: Any, tmp_path: Path) -> None:
    health = GradHealth()
    trainer(health, max_steps=12).fit(Classifier(), batches(), ckpt_path=checkpoint(tmp_path, lambda _: empty))
    assert (health.report().aside, health.report().steps) == ("", 6)


def test_a_rule_that_holds_a_lock_can_be_given() -> None:
    rule = rule_that(lambda _: None)
    rule.lock = threading.Lock()  # type: ignore[attr-defined]
    health = GradHealth(rules=[rule])
    run = trainer(health, max_steps=6)
    run.fit(Classifier(), batches())
    assert (health.report().aside, health.report().steps) == ("", 6)
    assert isinstance(run, pl.Trainer)
