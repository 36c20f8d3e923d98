"""What the clinic judges by can fail: reports held against labels, the table of them, the twin in closed form."""

from __future__ import annotations

import math

import numpy as np
import pytest
from catalogue import CATALOGUE
from clinic import Scenario, judge, must
from slopes import slope_of
from table import complaints, table
from twin import SIGNS, Twin, watched

from lightning_gradhealth import Finding, HealthReport, Severity


def report(*findings: tuple[str, str, tuple[str, ...], int]) -> HealthReport:
    return HealthReport(
        findings=tuple(Finding(name, Severity(severity), layers, at, at) for name, severity, layers, at in findings),
        steps=10,
    )


def label(**details: object) -> Scenario:
    wanted = must("dead_units", layers=r"net\.[24]", named="net.2", since=3, by=7)
    return Scenario("x", lambda: None, 10, **{"must": (wanted,), "allow": frozenset({"stalled_loss"}), **details})


def test_what_is_found_in_time_and_in_place_is_a_hit() -> None:
    outcome = judge(label(), report(("dead_units", "warning", ("net.2", "net.4"), 5)))
    assert (outcome.hits, outcome.complaints) == (("dead_units",), [])


@pytest.mark.parametrize(
    ("severity", "layers", "at", "why"),
    [
        ("info", ("net.2",), 5, "not found"),
        ("warning", ("net.4",), 5, "without layer net.2"),
        ("warning", ("net.2", "net.6"), 5, "in layers net.6"),
        ("warning", ("net.2",), 2, "before 3"),
        ("warning", ("net.2",), 8, "later than 7"),
    ],
)
def test_what_is_too_faint_elsewhere_or_at_another_time_is_a_miss(
    severity: str, layers: tuple[str, ...], at: int, why: str
) -> None:
    outcome = judge(label(), report(("dead_units", severity, layers, at)))
    assert outcome.hits == ()
    assert why in outcome.misses[0][1]


def test_any_of_several_acceptable_conditions_will_do() -> None:
    case = label(must=(must("exploding_gradients", "loss_spike", since=5, by=5),))
    found = report(("exploding_gradients", "critical", (), 6), ("loss_spike", "warning", (), 5))
    assert judge(case, found).hits == ("loss_spike",)
    assert judge(case, report(("exploding_gradients", "critical", (), 6))).misses[0][0] == "exploding_gradients"


def test_what_is_neither_demanded_nor_allowed_is_a_false_alarm() -> None:
    found = report(("stalled_loss", "warning", (), 5), ("loss_spike", "warning", (), 5), ("no_gradient", "info", (), 5))
    assert [name for name, _ in judge(label(must=()), found).alarms] == ["loss_spike"]


def test_a_run_that_nobody_watched_is_no_healthy_one() -> None:
    assert judge(label(must=()), HealthReport()).complaints
    assert judge(label(must=(), noted=("stalled_layers",)), report()).complaints == ["stalled_layers is not noted"]


def test_table_counts_hits_misses_and_alarms() -> None:
    found = report(("dead_units", "warning", ("net.2",), 5), ("loss_spike", "warning", (), 5))
    rows = [("a", 0, judge(label(), found)), ("b", 1, judge(label(), report()))]
    lines = table(rows).splitlines()[2:]
    assert [line.rpartition("|")[0].rpartition("|")[0] + "|" for line in lines] == [
        "| dead_units | 2 | 1 | 0.50 | 0 | 1.00 |",
        "| loss_spike | 0 | 0 | – | 1 | 0.00 |",
        "| all | 2 | 1 | 0.50 | 1 | 0.50 |",
    ]
    assert [line.split(":")[0] for line in complaints(rows)] == ["a, seed 0", "b, seed 1"]


def test_table_names_the_public_reports_behind_cases() -> None:
    found = report(("collapsing_weights", "warning", (), 5))
    rows = [("a", 0, judge(label(must=(must("collapsing_weights"),)), found))]
    assert "BVLC/caffe#1396" in table(rows).splitlines()[2]


@pytest.mark.parametrize(
    ("name", "gain", "hops"), [("linear 0.5*I, 20 layers", 0.5, 15), ("linear 1.2*I, 60 layers", 1.2, 45)]
)
def test_twin_sees_the_gain_of_a_linear_net(name: str, gain: float, hops: int) -> None:
    twin = watched(name)
    for forward in (True, False):
        assert twin.decades(forward)[0] == pytest.approx(hops * math.log10(gain), rel=1e-3)


def test_twin_knows_the_derivatives_by_finite_differences() -> None:
    functions = {
        "relu": lambda x: np.maximum(x, 0),
        "relu6": lambda x: np.clip(x, 0, 6),
        "sigmoid": lambda x: 4 / (1 + np.exp(-x)),
        "tanh": np.tanh,
        "hardtanh": lambda x: np.clip(x, -1, 1),
        "hardsigmoid": lambda x: 6 * np.clip(x / 6 + 0.5, 0, 1),
        "softsign": lambda x: x / (1 + np.abs(x)),
    }
    x = np.linspace(-8.03, 8.05, 400)
    for name, function in functions.items():
        difference = (function(x + 1e-6) - function(x - 1e-6)) / 2e-6
        np.testing.assert_allclose(slope_of(name, x), difference, atol=1e-5)


def test_signs_grow_with_what_they_are_signs_of() -> None:
    case = CATALOGUE["linear 0.5*I, 20 layers"]
    twin = Twin(case)
    assert all(number(twin) <= SIGNS[name][1] for name, (number, _, _) in SIGNS.items())  # nothing seen, nothing said
    twin.losses = [1.0] * 120
    twin.norms = {0: [1.0] * 60 + [5e3] + [1.0] * 60}
    signs = {name: float(number(twin)) for name, (number, _, _) in SIGNS.items()}
    assert signs["exploding_gradients"] == pytest.approx(math.log10(5e3))
    assert signs["stalled_loss"] == 1.0
    twin.losses[60:63] = [9.0] * 3
    assert SIGNS["loss_spike"][0](twin) == 3
    twin.norms[0][-20:] = [1e-5] * 20
    assert SIGNS["vanishing_gradients"][0](twin) >= 3.0
    twin.updates = {step: {"a": 0.2, "b": 1e-8} for step in (0, 1, 9)}
    twin.rates = {"a": 0.1, "b": 0.1}
    assert SIGNS["oversized_updates"][0](twin) == pytest.approx(2.0)
    assert twin.stalled() == {"b"}
