"""Records: JSON round trips, readable forms, the pure functions, the bounded history."""

from __future__ import annotations

import json
import math
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from lightning_gradhealth import (
    Condition,
    Finding,
    HealthReport,
    InitEntry,
    InitReport,
    LayerStats,
    Severity,
    StepRecord,
    StepStats,
)
from lightning_gradhealth.history import History, sparkline
from lightning_gradhealth.ratios import fitted_gain, median, norm_ratios
from lightning_gradhealth.reports.health import markdown, render_health
from lightning_gradhealth.reports.initialization import render_init
from lightning_gradhealth.reports.rendering import plain

numbers = st.none() | st.floats()
layers = st.builds(
    LayerStats,
    st.text(),
    grad_norm=numbers,
    norm_ratio=numbers,
    update_to_weight=numbers,
    frozen=st.booleans(),
    non_finite=st.integers(0, 9),
    without_grad=st.lists(st.text(), max_size=2).map(tuple),
)
window = st.builds(StepStats, st.integers(0, 99), total_norm=numbers, loss=numbers, non_finite=st.booleans())
findings = st.builds(
    Finding,
    st.sampled_from([*map(str, Condition), "my_condition"]),
    st.sampled_from(Severity),
    st.lists(st.text(), max_size=3).map(tuple),
    st.integers(0, 99),
    st.integers(0, 99),
    st.text(),
    st.dictionaries(st.text(), st.floats() | st.integers() | st.none()),
    st.text(),
)
records = st.builds(
    StepRecord,
    st.integers(0, 99),
    total_norm=numbers,
    layers=st.lists(layers, max_size=3).map(tuple),
    window=st.lists(window, max_size=3).map(tuple),
)
reports = st.builds(
    HealthReport,
    st.lists(findings, max_size=3).map(tuple),
    st.lists(layers, max_size=3).map(tuple),
    trend=st.lists(st.tuples(st.floats(0, 9), st.floats()), max_size=3).map(tuple),
    notes=st.lists(st.text(), max_size=2).map(tuple),
)


@settings(max_examples=100)
@given(record=records | reports)
def test_json_round_trip(record: StepRecord | HealthReport) -> None:
    text = record.to_json()
    json.loads(text, parse_constant=pytest.fail)  # NaN and Infinity are no JSON
    again = type(record).from_json(text)
    assert repr(again) == repr(record)
    assert again.to_json() == text


@settings(max_examples=50)
@given(report=reports)
def test_any_report_renders(report: HealthReport) -> None:
    assert "GradHealth" in plain(render_health(report))
    assert markdown(report).startswith("# Health: ")


def test_a_newer_versions_keys_are_ignored() -> None:
    data = {**StepRecord(step=3).to_dict(), "from_the_future": 1}
    assert StepRecord.from_dict(data) == StepRecord(step=3)


def sick() -> HealthReport:
    return HealthReport(
        findings=(
            Finding(
                Condition.VANISHING_GRADIENTS,
                Severity.CRITICAL,
                ("net.0", "net.2"),
                3,
                9,
                "gradients vanish",
                {"fitted_gain": 0.41, "nothing": None},
                "call gh.init_weights",
            ),
        ),
        layers=(
            LayerStats(
                "net.0", grad_norm=1e-9, norm_ratio=1e-6, grad_to_weight=1e-9, update_to_weight=1e-10, optimizer=0
            ),
            LayerStats("net.2", frozen=True),
            LayerStats("net.4", grad_norm=math.nan, optimizer=0),
            LayerStats("net.6", grad_norm=1.5, norm_ratio=1.0, optimizer=0),
        ),
        steps=10,
        trend=((0.0, 1.0), (1.0, math.inf)),
        notes=("loss: unavailable",),
    )


def test_a_report_shows_what_where_since_when_and_what_to_do() -> None:
    text = plain(render_health(sick()))
    for words in (
        "vanishing_gradients after 10 optimizer steps",
        "critical: vanishing_gradients in net.0, net.2, steps 3 to 9",
        "evidence: fitted gain 0.41",
        "remedy: call gh.init_weights",
        "note: loss: unavailable",
        "total norm, log scale: ▁!",
    ):
        assert words in text
    rows = {line.split()[0]: line for line in text.splitlines() if line.startswith("net.")}
    assert "1.00e-09" in rows["net.0"]
    assert "vanishing gradients" in rows["net.0"]
    assert "frozen" in rows["net.2"]
    assert "not finite" in rows["net.4"]
    assert rows["net.6"].split()[-1] == "ok"
    assert repr(sick()) == "HealthReport(vanishing_gradients; 4 layers, 10 steps)"
    assert not sick().healthy


@pytest.mark.parametrize("suffix", ["json", "md", "txt"])
def test_saving(tmp_path: Path, suffix: str) -> None:
    path = sick().save(tmp_path / "new" / f"health.{suffix}")
    text = path.read_text(encoding="utf-8")
    assert "vanishing_gradients" in text
    if suffix == "json":
        assert HealthReport.from_json(text).to_json() == sick().to_json()


def test_tables_keep_figures_and_names_at_eighty_columns() -> None:
    name = "net.encoder.transformer_blocks.{}.attention.out_proj.weight"
    layers = tuple(
        LayerStats(
            name.format(i),
            grad_norm=9.05e-9,
            norm_ratio=7.5e-4,
            grad_to_weight=4.2e-8,
            update_to_weight=3.1e-9,
            optimizer=0,
        )
        for i in range(3)
    )
    text = plain(render_health(HealthReport(layers=layers, steps=1)), width=80)
    for figure in ("9.05e-09", "7.50e-04", "4.20e-08", "3.10e-09"):
        assert text.count(figure) == 3
    assert "…" not in text
    figures = (1024.0, 1.0, 0.03125, 0.0312)
    entry = InitEntry(name.format(0), "Linear", (1024, 1024), "MultiheadAttention", "xavier", "normal", *figures)
    text = plain(render_init(InitReport((entry,))), width=80)
    assert "0.03125" in text
    assert "0.0312" in text
    assert "…" not in text


def test_saving_as_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"path must end in .html, .json, .md or .txt, got .*health.doc'; the suffix decides"
    ):
        sick().save(tmp_path / "health.doc")


def test_an_init_report_renders() -> None:
    entries = (
        InitEntry("0.weight", "Linear", (8, 4), "Linear", "he", "normal", 4.0, 1.4142, 0.707, 0.69),
        InitEntry("odd", "Odd", (3,), "uncovered", "kept", note="no rule knows it"),
    )
    text = plain(render_init(InitReport(entries, seed=5)), width=160)
    assert "8×4" in text
    assert "he normal" in text
    assert "seed 5" in text
    assert InitReport(entries).uncovered == ("odd",)
    assert InitReport.from_json(InitReport(entries, 5).to_json()) == InitReport(entries, 5)


# --- pure functions ---


@given(st.lists(st.floats(1e-30, 1e30), min_size=1, max_size=20), st.floats(1e-3, 1e3))
def test_norm_ratios_are_scale_free_with_geometric_mean_one(rms: list[float], scale: float) -> None:
    ratios = [ratio for ratio in norm_ratios(rms) if ratio is not None]
    assert math.fsum(math.log(ratio) for ratio in ratios) == pytest.approx(0.0, abs=1e-6)
    assert norm_ratios([value * scale for value in rms]) == pytest.approx(ratios, rel=1e-6)


def test_norm_ratios_of_odd_values() -> None:
    assert norm_ratios([0.0, 2.0, None]) == [0.0, 1.0, None]
    assert norm_ratios([0.0, 0.0]) == [None, None]
    assert norm_ratios([math.inf, 1.0])[0] == math.inf
    assert math.isnan(norm_ratios([math.nan, 1.0])[0] or 0.0)


@pytest.mark.parametrize("gain", [0.01, 0.5, 0.9, 1.0, 1.2, 30.0])
def test_fitted_gain_is_exact_for_a_constant_gain(gain: float) -> None:
    rms = [gain ** (19 - layer) for layer in range(20)]
    assert fitted_gain(rms) == pytest.approx(gain)
    assert fitted_gain([*rms[:5], 0.0, math.nan, *rms[7:]]) == pytest.approx(gain)
    twin = np.polyfit(range(20), np.log(rms), 1)[0]
    assert fitted_gain(rms) == pytest.approx(math.exp(-twin))
    assert fitted_gain([1.0]) is None


@given(st.lists(st.floats(-1e9, 1e9), min_size=1))
def test_median_equals_numpys(values: list[float]) -> None:
    assert median([*values, math.nan]) == pytest.approx(float(np.median(values)))


def test_median_of_nothing() -> None:
    assert math.isnan(median([math.nan]))


# --- history ---


@settings(max_examples=40)
@given(count=st.integers(0, 300), limit=st.integers(1, 8).map(lambda half: 2 * half), seed=st.integers(0, 3))
def test_history_is_bounded_even_and_loses_no_peak(count: int, limit: int, seed: int) -> None:
    values = np.random.default_rng(seed).lognormal(size=max(count, 1))[:count]
    history = History(limit)
    for step, value in enumerate(values):
        history.append(
            StepRecord(step=step, total_norm_max=float(value), layers=(LayerStats("a", grad_norm_max=float(value)),))
        )
    assert len(history.steps) <= limit
    assert history.matrix("grad_norm_max").shape == (len(history.steps), len(history.names))
    if count:
        assert history.steps[-1] == count - 1
        assert max(history.totals) == max(values)
        assert history.matrix("grad_norm_max").max() == np.float32(max(values))
        borders = [-1, *history.steps]
        for left, right, total in zip(borders, borders[1:], history.totals, strict=False):
            assert total == max(values[left + 1 : right + 1])
        assert len({right - left for left, right in zip(borders[:-1], borders[1:-1], strict=False)}) <= 1


def test_history_takes_layers_that_come_later() -> None:
    history = History(4)
    for step in range(9):
        names = ["a"] if step < 3 else ["a", "b"]
        history.append(StepRecord(step=step, layers=tuple(LayerStats(n, norm_ratio=float(step)) for n in names)))
    again = History(4)
    again.load_state_dict(history.state_dict())
    for one in (history, again):
        assert one.names == ["a", "b"]
        matrix = one.matrix("norm_ratio")
        assert np.nanmax(matrix[:, 1]) == 8.0
        assert not np.isnan(matrix[:, 0]).any()


def test_history_refuses_odd_limits() -> None:
    with pytest.raises(ValueError, match="limit must be even and >= 2, got 3; leave it out for 256"):
        History(3)


def test_sparkline() -> None:
    assert sparkline([]) == ""
    assert sparkline([1.0] * 1000, width=40) == "▁" * 40
    assert "!" in sparkline([*[1.0] * 99, math.nan])
