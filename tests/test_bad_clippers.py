"""Clippers that go wrong: what they decide never destroys weights, and one that fails is left out and said so."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch
from conftest import Classifier, batches, mlp, trainer
from torch import Tensor, nn

from lightning_gradhealth import (
    Chain,
    Clipper,
    Cut,
    GradHealth,
    Gradients,
    HealthSession,
    LayerwiseClip,
    NormClip,
    PercentileClip,
    WhenExploding,
    ZScoreClip,
)
from lightning_gradhealth.gradients.clipping import factor


class Gives(Clipper):
    """Gives a factor, whatever it is."""

    def __init__(self, value: float, each: bool = False) -> None:
        self.value, self.each = value, each

    def decide(self, gradients: Gradients) -> Cut:
        shape = (len(gradients.slots),) if self.each else ()
        part = torch.full(shape, self.value, dtype=torch.float64)
        return Cut([part], torch.tensor(True), torch.tensor(self.value))


class Breaks(Clipper):
    """Decides well, and breaks down after the first gradient."""

    def decide(self, gradients: Gradients) -> Cut:
        return factor(gradients, torch.full_like(gradients.total, 0.5))

    def apply(self, gradients: Gradients, cut: Cut) -> None:
        gradients.writable()[0].mul_(cut.parts[0])  # type: ignore[union-attr]
        raise RuntimeError("out of luck")


class Returns(Clipper):
    """Returns something, or raises it."""

    def __init__(self, result: Any) -> None:
        self.result = result

    def decide(self, gradients: Gradients) -> Any:
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


def one_step(clip: Any) -> tuple[HealthSession, list[Tensor | None], list[Tensor]]:
    """A session after a step; the gradients that the optimizer was given, and those of before."""
    torch.manual_seed(0)
    model = mlp()
    optimizer, session = torch.optim.SGD(model.parameters(), lr=0.1), HealthSession(model, clip=clip)
    model(torch.randn(4, 8)).square().sum().backward()
    before = [parameter.grad.clone() for parameter in model.parameters()]
    session.apply(session.observe(optimizer))
    given = [parameter.grad for parameter in model.parameters()]
    optimizer.step()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    return session, given, before


BAD = [math.nan, math.inf, -math.inf, -1.0, -1e-30]


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("wrap", [lambda c: c, lambda c: Chain([c]), lambda c: Chain([c, NormClip(1e9)])])
def test_a_factor_that_would_destroy_weights_is_not_applied(
    value: float, each: bool, wrap: Any, caplog: pytest.LogCaptureFixture
) -> None:
    session, given, before = one_step(wrap(Gives(value, each)))
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))
    note = "clip: the clipper gave a factor that is NaN, Inf or negative at 1 step; it was taken for 1"
    assert note in session.report().notes
    with caplog.at_level(logging.WARNING, logger="lightning_gradhealth"):
        step = session.flush().window[0]
    assert (step.refused, step.clipped) == (True, False)
    assert caplog.text.count(note) == 1
    assert session.report().clipped_steps == 0


@pytest.mark.parametrize("value", [0.5, 0.0, 1.0, 2.0])
def test_other_factors_are_applied_as_they_are(value: float) -> None:
    session, given, before = one_step(Gives(value))
    assert all(torch.equal(a, value * b) for a, b in zip(given, before, strict=True))
    assert not session.flush().window[0].refused


def test_bad_factors_do_not_touch_the_good_ones() -> None:
    class Mixed(Clipper):
        def decide(self, gradients: Gradients) -> Cut:
            part = torch.full_like(gradients.norms, 0.5)
            part[1] = math.nan
            return Cut([part], torch.tensor(True))

    _, given, before = one_step(Mixed())
    for index, (a, b) in enumerate(zip(given, before, strict=True)):
        assert torch.equal(a, b if index == 1 else 0.5 * b)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize(
    "make", [lambda: PercentileClip(50), lambda: ZScoreClip(warmup=2), lambda: LayerwiseClip(warmup=2), WhenExploding]
)
def test_a_state_gone_bad_harms_nothing(make: Any, bad: float) -> None:
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    clipper = make()
    for step in range(70):
        if step == 60:
            clipper.state = {
                k: torch.full_like(v, bad) if v.is_floating_point() else v for k, v in clipper.state.items()
            }
        for weight in weights:
            weight.grad = torch.randn(3)
        gradients = Gradients.of(*weights)
        before = [weight.grad.clone() for weight in weights]
        clipper.apply(gradients, clipper.cut(gradients))
        for weight, old in zip(weights, before, strict=True):
            assert weight.grad.isfinite().all()
            assert (weight.grad * old >= 0).all()  # no sign is turned
            assert (weight.grad.abs() <= old.abs()).all()


@pytest.mark.parametrize(
    "clipper",
    [
        Returns(ValueError("no idea")),
        Returns(None),
        Returns(0.5),
        Returns(Cut([0.5], torch.tensor(True))),  # type: ignore[list-item]
        Returns(Cut([torch.tensor(0.5)], True)),  # type: ignore[arg-type]
        Returns(Cut([], torch.tensor(True))),
        Returns(Cut([torch.ones(3)], torch.tensor(True))),
        Returns(Cut([torch.ones(2, 2)], torch.tensor(True))),
        Chain([NormClip(1e-3), Returns(KeyError("x"))]),
    ],
)
def test_a_clipper_that_fails_is_left_out(clipper: Clipper, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="lightning_gradhealth"):
        session, given, before = one_step(clipper)
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))
    said = [r.getMessage() for r in caplog.records if "training goes on WITHOUT clipping" in r.getMessage()]
    assert len(said) == 1
    report = session.report()
    assert report.steps == 1
    assert not report.healthy
    assert [line for line in report.unwatched if line.startswith(f"clipping by {type(clipper).__name__}, since step 0")]


def test_gradients_are_never_left_half_scaled(caplog: pytest.LogCaptureFixture) -> None:
    session, given, _ = one_step(Breaks())
    assert given == [None] * len(given)
    assert "this step, whose gradients may be half clipped, is skipped" in caplog.text
    assert not session.report().healthy


def test_a_fit_goes_on_without_it() -> None:
    class Late(NormClip):
        calls = 0

        def decide(self, gradients: Gradients) -> Cut:
            self.calls += 1
            if self.calls > 5:
                raise RuntimeError("enough")
            return super().decide(gradients)

    health = GradHealth(clip=Late(1e-3))
    trainer(health, max_steps=12).fit(Classifier(), batches())
    report = health.report()
    assert (report.steps, report.clipped_steps, report.aside) == (12, 5, "")
    assert report.unwatched == ("clipping by Late, since step 5 (it failed: RuntimeError: enough)",)
