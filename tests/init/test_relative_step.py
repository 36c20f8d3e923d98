"""What the report of an initialisation says of the first step of an Adam-like optimizer."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from lightning_gradhealth import InitReport, init_weights, plan_init
from lightning_gradhealth.reports.rendering import plain


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 64), nn.LayerNorm(64), nn.ReLU(), nn.Linear(64, 4))


def steps(report: InitReport) -> dict[str, float | None]:
    return {entry.name: entry.relative_step for entry in report.entries}


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.AdamW])
def test_it_is_what_a_first_step_moves(optimizer: type[torch.optim.Optimizer]) -> None:
    torch.manual_seed(0)
    model = net()
    found = steps(init_weights(model, torch.randn(8, 16), lr=1e-3, seed=0))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    stepper = optimizer(model.parameters(), lr=1e-3, eps=1e-16, weight_decay=0.0)
    model(torch.randn(64, 16)).square().mean().backward()
    stepper.step()
    for name, p in model.named_parameters():
        moved = (p.detach() - before[name]).square().mean().sqrt()
        if before[name].any():
            assert found[name] == pytest.approx(float(moved / before[name].square().mean().sqrt()), rel=0.02)
        else:
            assert found[name] is None, "a share of 0"


def test_a_plan_knows_it_of_what_it_draws() -> None:
    plan = plan_init(net(), torch.randn(8, 16), lr=0.01, seed=0)
    planned, applied = steps(plan.report), steps(plan.apply())
    for name in ("0.weight", "3.weight"):
        assert planned[name] == pytest.approx(applied[name], rel=0.1)
    assert planned["0.weight"] == pytest.approx(0.01 / next(e.target_std for e in plan.report.entries if e.target_std))
    with torch.device("meta"):
        meta = net()
    assert steps(plan_init(meta, lr=0.01, seed=0).report)["3.weight"] == planned["3.weight"]


def test_what_stays_is_measured_and_what_is_frozen_does_not_move() -> None:
    model = net()
    model[3].weight.requires_grad_(False)
    with torch.no_grad():
        model[0].weight.fill_(0.5)
    found = steps(init_weights(model, torch.randn(8, 16), lr=0.01, seed=0, skip=r"0\..*"))
    assert found["0.weight"] == pytest.approx(0.02)
    assert found["3.weight"] is None


def test_each_gate_has_its_own_and_a_computed_weight_none() -> None:
    model = nn.ModuleDict({"rnn": nn.LSTM(4, 8), "lin": parametrizations.weight_norm(nn.Linear(4, 4))})
    found = steps(init_weights(model, lr=0.01, seed=0))
    assert found["rnn.weight_hh_l0[forget]"] == pytest.approx(0.01 * 8**0.5, rel=1e-3), "orthogonal"
    assert found["lin.parametrizations.weight.original1"] is None


def test_after_a_calibration_it_is_that_of_the_weights_as_they_are() -> None:
    model, batch = net(), 5 * torch.randn(256, 16)
    report = init_weights(model, batch, calibrate=batch, lr=0.01, seed=0)
    rms = float(model[0].weight.detach().square().mean().sqrt())
    assert rms < 0.1, "the calibration has made it small"
    assert steps(report)["0.weight"] == pytest.approx(0.01 / rms, rel=1e-4)


def test_notes_say_where_the_rate_is_too_large_or_suits_only_some() -> None:
    assert not any("step" in note for note in init_weights(net(), torch.randn(8, 16), lr=1e-3, seed=0).notes)
    plan = plan_init(net(), torch.randn(8, 16), lr=0.05, seed=0)
    assert sum("moves 2 of 2 weights by more than 10%" in note for note in plan.report.notes) == 1
    assert sum("moves 2 of 2 weights by more than 10%" in note for note in plan.apply().notes) == 1, "told once"
    apart = init_weights(net(), torch.randn(8, 16), lr=1e-3, seed=0, overrides={r"3\.weight": {"std": 1e-3}})
    assert any("3.weight" in note and "parameter groups" in note for note in apart.notes)


def test_it_is_shown_only_where_it_is_asked_for() -> None:
    report = init_weights(net(), torch.randn(8, 16), lr=1e-3, seed=0)
    shown, silent = plain(report), plain(init_weights(net(), torch.randn(8, 16), seed=0))
    assert "0.7%" in shown
    assert "%" not in silent
    assert set(steps(init_weights(net(), seed=0)).values()) == {None}


def test_json_keeps_it_and_older_reports_are_read() -> None:
    report = init_weights(net(), lr=1e-3, seed=0)
    assert InitReport.from_json(report.to_json()) == report
    data = report.to_dict()
    for entry in data["entries"]:
        del entry["relative_step"]
    assert set(steps(InitReport.from_dict(data)).values()) == {None}


@pytest.mark.parametrize(
    ("lr", "error"), [(0.0, ValueError), (-1e-3, ValueError), (float("nan"), ValueError), ("1e-3", TypeError)]
)
@pytest.mark.parametrize("function", [init_weights, plan_init])
def test_a_wrong_rate_is_told_before_anything_changes(function, lr, error) -> None:
    model = nn.Linear(2, 2)
    before = model.weight.detach().clone()
    with pytest.raises(error, match=r"^lr must be a finite number > 0, got .*leave it out"):
        function(model, lr=lr)
    assert torch.equal(model.weight, before)
