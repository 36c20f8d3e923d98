"""HealthSession: the same findings in a plain loop as in Lightning, and what a loop of one's own needs."""

from __future__ import annotations

import logging

import pytest
import torch
from conftest import Classifier, batches, mlp, trainer
from torch import nn

from lightning_gradhealth import Condition, GradHealth, HealthSession, Severity, StepRecord


def plain_loop(
    model: nn.Module, optimizer: torch.optim.Optimizer, session: HealthSession, steps: int, every: int
) -> None:
    data = [batch for _ in range(steps) for batch in batches()][:steps]
    for step, (x, y) in enumerate(data):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        session.apply(session.observe(optimizer, loss))
        optimizer.step()
        if (step + 1) % every == 0:
            session.flush()


@pytest.mark.parametrize(("depth", "rate"), [(4, 0.05), (24, 0.05), (6, 1e4)])
def test_a_plain_loop_finds_what_lightning_finds(depth: int, rate: float) -> None:
    torch.manual_seed(1)
    module = Classifier(mlp(depth), lr=rate)
    health = GradHealth(probe_every_n_steps=10)
    trainer(health, max_steps=57, log_every_n_steps=10).fit(module, batches())

    torch.manual_seed(1)
    twin = Classifier(mlp(depth), lr=rate)
    session = HealthSession(twin, probe_every_n_steps=10)
    plain_loop(twin, torch.optim.SGD(twin.parameters(), lr=rate), session, 57, every=10)
    assert session.report() == health.report() or depth == 6  # NaN is not equal to NaN
    assert session.report().to_json() == health.report().to_json()
    assert health.report().healthy == (depth == 4)


def test_findings_are_said_once_as_one_line(caplog: pytest.LogCaptureFixture) -> None:
    model = mlp(24)
    lines: list[str] = []
    session = HealthSession(model, announce=lines.append)
    plain_loop(model, torch.optim.SGD(model.parameters(), lr=0.01), session, 40, every=5)
    vanishing = [line for line in lines if "vanishing_gradients" in line]
    assert len(vanishing) == 1
    assert vanishing[0].startswith("gradhealth: critical: vanishing_gradients in 0 … ")
    assert "since step 0: gradients vanish" in vanishing[0]
    assert "Remedy: gh.init_weights(model" in vanishing[0]
    assert "\n" not in vanishing[0]
    with caplog.at_level(logging.WARNING, logger="lightning_gradhealth"):
        other = HealthSession(model)
        plain_loop(model, torch.optim.SGD(model.parameters(), lr=0.01), other, 10, every=5)
    assert [record.name for record in caplog.records] == ["lightning_gradhealth"]


def test_escalation_is_said_again() -> None:
    model = mlp(14)
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.orthogonal_(layer.weight, gain=0.6)
    lines: list[str] = []
    session = HealthSession(model, announce=lines.append, probe_every_n_steps=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for shrink in (*[1.0] * 11, 0.3, 1.0, 1.0):
        with torch.no_grad():
            for layer in model[::2]:
                layer.weight.mul_(shrink)
        optimizer.zero_grad()
        model(torch.randn(64, 8)).square().mean().backward()
        session.observe(optimizer)
        session.flush()
    assert [line.split(":")[1].strip() for line in lines if "vanishing" in line] == ["warning", "critical"]
    (finding,) = [f for f in session.report().findings if f.condition == Condition.VANISHING_GRADIENTS]
    assert (finding.severity, finding.first_step) == (Severity.CRITICAL, 0)


def test_report_includes_the_window_that_is_not_over() -> None:
    model = mlp(24)
    session = HealthSession(model)
    plain_loop(model, torch.optim.SGD(model.parameters(), lr=0.01), session, 7, every=50)
    report = session.report()
    assert (report.step, report.steps) == (6, 7)
    assert Condition.VANISHING_GRADIENTS in report.conditions
    assert not session.judgement.findings  # judged on a copy
    assert session.flush().step == 6
    assert session.report().findings == report.findings


def test_a_loop_that_never_flushes_stays_bounded() -> None:
    model = nn.Linear(2, 1)
    optimizer, session = torch.optim.SGD(model.parameters(), lr=0.1), HealthSession(model)
    model(torch.ones(1, 2)).sum().backward()
    for _ in range(2_100):
        session.observe(optimizer, loss=0.5)
    assert len(session.monitor.rows) <= 1_024
    assert session.report().steps == 2_100


def test_powers_of_two_are_probed_and_then_the_cadence() -> None:
    model = mlp()
    optimizer, session = torch.optim.SGD(model.parameters(), lr=0.1), HealthSession(model, probe_every_n_steps=5)
    plain_loop(model, optimizer, session, 12, every=100)
    assert [row.step for row in session.monitor.rows if row.probe] == [0, 1, 2, 4, 8, 9]


def test_gan_like_loops_keep_their_optimizers_apart() -> None:
    """The discriminator's gradients that the generator's loss leaves behind are none of the generator's."""
    model = nn.ModuleDict({"g": mlp(5, inputs=4, outputs=8), "d": mlp(5, inputs=8, outputs=1)})
    optimizers = {name: torch.optim.Adam(part.parameters(), lr=1e-3) for name, part in model.items()}
    session = HealthSession(model, probe_every_n_steps=5)
    for step in range(40):
        real, fake = torch.randn(32, 8), model["g"](torch.randn(32, 4))
        optimizers["d"].zero_grad()
        loss = (
            nn.functional.softplus(-model["d"](real)).mean() + nn.functional.softplus(model["d"](fake.detach())).mean()
        )
        loss.backward()
        session.apply(session.observe(optimizers["d"], loss))
        optimizers["d"].step()
        if step % 3 == 0:
            optimizers["g"].zero_grad()
            loss = nn.functional.softplus(-model["d"](fake)).mean()
            loss.backward()
            session.apply(session.observe(optimizers["g"], loss))
            optimizers["g"].step()
    assert session.report().healthy
    assert {layer.optimizer for layer in session.report().layers} == {0, 1}


def test_closing_removes_every_hook() -> None:
    model = mlp()
    optimizer, session = torch.optim.SGD(model.parameters(), lr=0.1), HealthSession(model)
    assert any(module._forward_pre_hooks for module in model.modules())
    plain_loop(model, optimizer, session, 3, every=2)
    assert optimizer._optimizer_step_post_hooks
    session.close()
    session.close()
    assert not optimizer._optimizer_step_post_hooks
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert session.report().steps == 3


def test_notes_say_what_could_not_be_measured() -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 1, bias=False))
    optimizer, session = torch.optim.SGD(model.parameters(), lr=0.1), HealthSession(model)
    model[1](model[0](torch.randn(4, 8))).sum().backward()  # the model itself is not called
    session.observe(optimizer)
    notes = session.report().notes
    assert any(note.startswith("depth: not measured") for note in notes)
    assert any(note.startswith("signals: not measured") for note in notes)
    assert "loss: unavailable" in notes
    assert session.flush().backward_gain is None


def test_the_report_keeps_what_the_last_probe_measured() -> None:
    model = mlp()
    optimizer, session = torch.optim.SGD(model.parameters(), lr=0.1), HealthSession(model, probe_every_n_steps=5)
    plain_loop(model, optimizer, session, 13, every=6)
    for layer in session.report().layers:
        assert None not in (layer.grad_norm, layer.weight_norm, layer.grad_to_weight, layer.update_to_weight)


def test_nothing_observed() -> None:
    session = HealthSession(mlp())
    assert session.flush() == StepRecord(step=-1)
    assert not session.report().healthy
    assert session.report().verdict == "nothing was watched"
