"""Arrays to pictures, and records to what is shown of them: against slow, obvious twins."""

from __future__ import annotations

import dataclasses
import gzip
import json
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from numpy.typing import NDArray
from tab import finding, record, unpacked

from lightning_gradhealth.records import Finding, LayerStats, StepRecord, StepStats
from lightning_gradhealth.saving import savable
from lightning_gradhealth.view import answers
from lightning_gradhealth.view.data import Matrix, RunView, rising, with_spans
from lightning_gradhealth.view.payload import payload
from lightning_gradhealth.view.pooling import FAR, INF, NAN, NOT_MEASURED, TOP, ZERO, coded, edges, pool
from lightning_gradhealth.view.quantities import COLUMNS, MISSING, QUANTITIES, layer_value, missing
from lightning_gradhealth.view.recording import Recording
from lightning_gradhealth.view.rows import BINS, Layer, Row, few, joined, spans

NUMBERS = st.one_of(st.floats(-40, 40, width=16), st.sampled_from([math.nan, math.inf, -math.inf, float(MISSING)]))


def twin(cells: list[float], far: float | None) -> tuple[float, int]:
    """What one cell of a picture is, by the book."""
    measured = [value for value in cells if value != MISSING]
    finite = [value for value in measured if math.isfinite(value)]
    if any(math.isnan(value) for value in measured):
        return 0.0, NAN
    if math.inf in measured:
        return 0.0, INF
    if not finite:
        return 0.0, ZERO if -math.inf in measured else NOT_MEASURED
    if far is None:
        return max(finite), 0
    extreme = max(finite) if max(finite) >= -min(finite) else min(finite)
    return (extreme if abs(extreme) > far else sum(finite) / len(finite)), 0


@given(st.data(), st.integers(1, 7), st.integers(1, 6), st.integers(1, 5), st.sampled_from([None, FAR]))
def test_pooling_is_what_the_slow_twin_says(data: Any, steps: int, layers: int, width: int, far: float | None) -> None:
    table = data.draw(st.lists(st.lists(NUMBERS, min_size=layers, max_size=layers), min_size=steps, max_size=steps))
    part = st.tuples(st.integers(0, layers - 1), st.integers(0, layers - 1)).map(lambda pair: tuple(sorted(pair)))
    rows = data.draw(st.one_of(st.none(), st.lists(part, min_size=1, max_size=5)))
    values, columns = np.array(table, dtype=np.float16), edges(steps, width)
    cells, codes = pool(values, columns, rows, 2_000, far)
    ranges = [(i, i) for i in range(layers)] if rows is None else rows
    ends = [*columns[1:], steps]
    assert cells.shape == (len(ranges), len(columns))
    for r, (first, last) in enumerate(ranges):
        for c, (start, end) in enumerate(zip(columns, ends, strict=True)):
            value, code = twin([float(v) for v in values[start:end, first : last + 1].ravel()], far)
            assert codes[r, c] == code
            if code == 0:
                assert cells[r, c] == pytest.approx(value, abs=1e-4)


def test_no_spike_and_no_nan_is_lost_however_small_the_picture() -> None:
    values = np.full((4_000, 300), -3.0, dtype=np.float16)
    values[1_234, 56] = 20.0
    values[3_000, 200] = np.nan
    for width, height in ((800, 300), (10, 10), (1, 1)):
        cells, codes = pool(values, edges(4_000, width), None, height)
        assert (codes == NAN).sum() == 1
        assert cells[codes == 0].max(initial=20.0) == 20.0
    cells, _ = pool(values, edges(4_000, 10), None, 10, FAR)
    assert (cells == 20.0).sum() == 1


def test_a_mean_is_not_tinted_by_pooling() -> None:
    generator = np.random.default_rng(0)
    values = np.log2(0.8 * np.exp(0.3 * generator.standard_normal((2_000, 40)))).astype(np.float16)
    cells, _ = pool(values, edges(2_000, 20), None, 10, FAR)
    assert np.abs(2.0**cells - 0.8).max() < 0.05


@given(st.lists(st.floats(1e-30, 1e30), min_size=1, max_size=20))
def test_values_come_back_within_a_half_precision(values: list[float]) -> None:
    for name in ("grad_norm", "dead_fraction"):
        quantity = QUANTITIES[name]
        shares = values if name == "grad_norm" else [value / 1e30 for value in values]
        back = quantity.decode(quantity.encode(shares))
        if name == "grad_norm":  # half of the last digit of log2, which is below 128
            assert np.abs(np.log2(back) - np.log2(shares)).max() <= 2**-5
        else:
            assert np.abs(back - shares).max() <= 2**-11


def test_not_measured_zero_nan_and_inf_are_told_apart() -> None:
    coded_values = QUANTITIES["grad_norm"].encode([None, 0.0, math.nan, math.inf, 1e-45, 5e300])
    assert missing(coded_values).tolist() == [True, False, False, False, False, False]
    assert coded_values.tolist()[1] == -math.inf
    _, codes = pool(coded_values[None], np.array([0]))
    assert codes[:, 0].tolist() == [NOT_MEASURED, ZERO, NAN, INF, 0, 0]


def test_the_codes_decode_to_what_they_stand_for() -> None:
    cells = np.linspace(-5, 5, 101, dtype=np.float32)[None]
    codes = coded(cells, np.zeros(cells.shape, np.uint8), -5.0, 5.0)
    assert np.abs(-5 + codes / TOP * 10 - cells).max() <= 10 / TOP / 2 + 1e-6
    assert codes.max() == TOP


@pytest.mark.parametrize(
    ("layer", "value"),
    [
        (LayerStats("a", grad_norm=1.0, grad_norm_max=9.0), 9.0),
        (LayerStats("a", grad_norm=1.0, grad_norm_max=9.0, non_finite=1), math.nan),
        (LayerStats("a", grad_norm=math.inf, grad_norm_max=9.0, non_finite=1), math.inf),
        (LayerStats("a", grad_norm=0.0), 0.0),
        (LayerStats("a"), None),
    ],
)
def test_the_gradient_norm_is_the_largest_of_the_window(layer: LayerStats, value: float | None) -> None:
    assert layer_value("grad_norm", layer) == pytest.approx(value, nan_ok=True)


def test_columns_of_a_step() -> None:
    window = (
        StepStats(4, total_norm=2.0, loss=1.0, clipped=True, clip_coefficient=0.5, armed=True, learning_rate=0.1),
        StepStats(5, total_norm=math.inf, loss=3.0, clipped=False, skipped=True, armed=False, non_finite=True),
    )
    row = Row.of(StepRecord(5, 2.0, 2.0, 1.0, 0.5, window=window, backward_gain=0.9))
    shown = dict(zip(COLUMNS, row.totals.tolist(), strict=True))
    expected = {"total_norm": 2.0, "applied_norm": 1.0, "loss": 2.0, "loss_max": 3.0, "clip_coefficient": 0.5}
    expected |= {"clipped_fraction": 0.5, "armed": 0.0, "non_finite_steps": 1.0, "skipped_steps": 1.0}
    for name, value in {**expected, "learning_rate": 0.1, "backward_gain": 0.9}.items():
        assert shown[name] == pytest.approx(value, rel=1e-6), name
    assert shown["loss_scale"] == shown["forward_gain"] == np.finfo(np.float32).min  # not measured
    found = {"armed": [(4, 4)], "clipped": [(4, 4)], "skipped": [(5, 5)], "non_finite": [(5, 5)]}
    assert row.spans == found


@pytest.mark.parametrize(
    ("window", "norm", "applied"),
    [
        ([StepStats(0, total_norm=5.0), StepStats(1, total_norm=2.0, applied_norm=2.0)], 5.0, None),
        ([StepStats(0, total_norm=5.0), StepStats(1, total_norm=2.0, applied_norm=1.0)], 5.0, 1.0),
        (
            [
                StepStats(0, total_norm=50.0, clip_coefficient=0.02, clipped=True),
                StepStats(1, total_norm=2.0, clip_coefficient=1.0, clipped=False, applied_norm=2.0),
            ],
            50.0,
            2.0,
        ),
        ([StepStats(0, total_norm=9.0), StepStats(1, total_norm=math.nan, non_finite=True)], 9.0, None),
        ([StepStats(1, total_norm=math.nan, non_finite=True)], math.nan, None),
        ([StepStats(1, total_norm=math.inf, non_finite=True)], math.inf, None),
    ],
    ids=["calm", "clipped by the Trainer", "clipped", "into NaN", "NaN", "Inf"],
)
def test_norms_before_and_after_are_the_largest_of_the_window(
    window: list[StepStats], norm: float, applied: float | None
) -> None:
    finite = [step.total_norm for step in window if step.total_norm is not None and math.isfinite(step.total_norm)]
    record = StepRecord(
        1, window[-1].total_norm, max(finite, default=None), window[-1].applied_norm, window=tuple(window)
    )
    shown = {name: column.of(record) for name, column in COLUMNS.items()}
    assert shown["total_norm"] == pytest.approx(norm, nan_ok=True)
    assert shown["applied_norm"] == applied


STEPS = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 3)), max_size=12).map(
    lambda pairs: [(first, first + more) for first, more in pairs]
)


@given(STEPS)
def test_joined_ranges_hold_the_same_steps(ranges: list[tuple[int, int]]) -> None:
    both = joined(ranges)
    inside = {step for first, last in ranges for step in range(first, last + 1)}
    assert {step for first, last in both for step in range(first, last + 1)} == inside
    assert all(one[1] + 1 < two[0] for one, two in zip(both, both[1:], strict=False))


@given(STEPS, st.integers(1, 5))
def test_few_ranges_lose_no_step(ranges: list[tuple[int, int]], most: int) -> None:
    both = joined(ranges)
    less = few(both, most)
    assert len(less) <= most
    assert all(any(first <= a and b <= last for first, last in less) for a, b in both)


@given(st.lists(st.booleans(), max_size=40))
def test_spans_are_the_steps_at_which_it_was_so(flags: list[bool]) -> None:
    window = [StepStats(2 * step, skipped=flag) for step, flag in enumerate(flags)]
    found = spans(window).get("skipped", [])
    assert [any(a <= step.step <= b for a, b in found) for step in window] == flags


@given(st.lists(st.integers(0, 20), max_size=30))
def test_what_a_later_row_overtakes_is_void(steps: list[int]) -> None:
    kept = rising(steps)
    assert kept.tolist() == [i for i, step in enumerate(steps) if all(step < later for later in steps[i + 1 :])]


def test_findings_hold_in_spans() -> None:
    def told(active: bool, last: int) -> dict[str, Any]:
        return {"id": "a", "active": active, "first_step": 3, "last_step": last, "severity": "warning"}

    history = [(4, [told(True, 4)]), (10, [told(False, 9)]), (20, [told(True, 20)])]
    (shown,) = with_spans(history, 30)
    assert shown["spans"] == [[3, 9], [20, 30]]
    assert shown["last_step"] == 30
    (over,) = with_spans(history[:2], 30)
    assert (over["spans"], over["last_step"]) == ([[3, 9]], 9)


# --- a recording ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 15, 16, 17, 200, 1_000])
def test_a_recording_stays_bounded_and_loses_no_spike(steps: int) -> None:
    recording = Recording(limit=16)
    for step in range(steps):
        norm = 1e6 if step == steps // 3 else 1.0
        window = (StepStats(step, total_norm=norm, loss=1.0),)
        recording.append(record(step, [norm, 1.0], total_norm_max=norm, window=window), [], ())
    view = recording.view("run")
    matrix = view.load("grad_norm")
    assert matrix is not None
    assert len(matrix.steps) <= 16
    assert matrix.steps[-1] == view.last_step == steps - 1
    assert 2.0 ** float(matrix.values[:, 0].max()) == pytest.approx(1e6, rel=0.01)
    assert float(matrix.values[:, 1].max()) == 0.0
    assert view.totals.column("total_norm")[1].max() == pytest.approx(1e6)


def test_a_recording_takes_layers_that_come_later() -> None:
    recording = Recording(limit=4)
    for step in range(9):
        recording.append(record(step, [1.0] * (1 + step // 5)), [], ())
    matrix = recording.view("run").load("grad_norm")
    assert matrix is not None
    assert matrix.values.shape[1] == 2
    assert missing(matrix.values[0]).tolist() == [False, True]
    assert not missing(matrix.values[-1]).any()


def test_a_window_that_is_judged_twice_is_kept_once() -> None:
    recording = Recording()
    for step in (3, 7, 7, 5):
        recording.append(record(step, [1.0]), [finding()], {"exploding_gradients"})
    view = recording.view("run")
    assert view.totals.steps.tolist() == [3, 7]
    assert [f["spans"] for f in view.findings] == [[[3, 7]]]


@pytest.mark.parametrize("at", [1, 3, 9, 40])
def test_a_recording_goes_on_from_a_checkpoint(at: int, tmp_path: Path) -> None:
    """As if it had never been broken off; NaN, layers that come later, findings and histograms too."""

    def records() -> list[StepRecord]:
        made = []
        for step in range(60):
            norms = [1.0 + step, math.nan if step == 7 else 0.0, *([2.0] if step > 5 else [])]
            one = record(step, norms, window=(StepStats(step, total_norm=9.0, loss=0.5, skipped=step == 4),))
            layers = tuple(layer.changed(forward_histogram=tuple(range(BINS))) for layer in one.layers)
            made.append(one.changed(layers=layers) if step % 2 else one)
        return made

    def told(step: int) -> list[Finding]:
        return [finding(evidence={"loss": math.nan, "layers": {"a": 1.0}})] if step > 3 else []

    whole, first, second = Recording(limit=16), Recording(limit=16), Recording(limit=16)
    for one in records():
        whole.append(one, told(one.step), {"exploding_gradients"})
    for one in records()[:at]:
        first.append(one, told(one.step), {"exploding_gradients"})
    torch.save(savable(first.state_dict()), tmp_path / "state.pt")
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for one in records()[at:]:
        second.append(one, told(one.step), {"exploding_gradients"})
    assert second.state_dict() == whole.state_dict()
    ours, theirs = second.view("run"), whole.view("run")
    assert payload([dataclasses.replace(ours, stamp=0.0)]) == payload([dataclasses.replace(theirs, stamp=0.0)])


@pytest.mark.parametrize(
    "change",
    [
        {"about": "{"},
        {"about": 5},
        {"about": "[]"},
        {"arrays": b"nothing"},
        {"arrays": zlib.compress(b"nothing")},
        {"about": json.dumps({"columns": ["a"]})},
    ],
)
def test_a_recording_that_cannot_be_read_is_refused_and_nothing_changes(change: dict[str, Any]) -> None:
    recording = Recording()
    recording.append(record(3, [1.0]), [], ())
    before = recording.state_dict()
    with pytest.raises(ValueError, match=r"state must be what Recording\.state_dict\(\) returned"):
        recording.load_state_dict({**before, **change})
    assert recording.state_dict() == before


def test_a_large_run_takes_little_of_a_checkpoint() -> None:
    recording = Recording()
    random = np.random.default_rng(0)
    for step in range(600):
        recording.append(record(step, np.exp(random.standard_normal(300)).tolist()), [], ())
    assert len(recording.state_dict()["arrays"]) < 3_000 * 300


# --- answers ------------------------------------------------------------------------------------------------


def view_of(table: list[list[float]], names: str = "abc", name: str = "run") -> RunView:
    quantity = QUANTITIES["norm_ratio"]
    values = np.array(table, dtype=np.float16)
    matrix = Matrix(quantity, np.arange(len(table), dtype=np.int64) * 2, values)
    layers = [Layer(letter) for letter in names[: values.shape[1]]]
    load = {"norm_ratio": matrix}.get
    return RunView(name=name, layers=layers, quantities=[quantity], load=load, last_step=2 * len(table) - 2)


def values_of(head: dict[str, Any], body: bytes) -> NDArray[np.float64]:
    codes = np.frombuffer(body, np.uint8).reshape(head["shape"]).astype(np.float64)
    plain = head["lo"] + codes / TOP * (head["hi"] - head["lo"])
    return np.where(codes > TOP, -codes, plain)


def test_two_runs_as_their_ratio_by_name_and_step() -> None:
    mine = view_of([[1, 2, 3], [4, 5, math.nan], [-math.inf, 1, 1]])
    other = view_of([[1, 1], [2, 0]], names="bz", name="other")
    head, body = answers.picture(mine, "norm_ratio", versus=other)
    shown = values_of(head, body)
    assert head["versus"] == "other"
    assert head["palette"] == "diverging"
    assert shown[1].tolist() == pytest.approx([1, 3, -1], abs=0.05)  # b: 2-1, 5-2, 1-2
    assert (shown[[0, 2]] == -NOT_MEASURED).all()  # a and c are in one of them only


@given(st.integers(0, 40), st.integers(0, 40))
def test_a_cut_shows_the_steps_asked_for(x0: int, x1: int) -> None:
    view = view_of([[float(step), 0.0] for step in range(15)])
    head, _ = answers.picture(view, "norm_ratio", x0=min(x0, x1), x1=max(x0, x1))
    low, high = min(x0, x1), max(x0, x1)
    wanted = [step for step in range(0, 29, 2) if low <= step <= high]
    assert set(wanted) <= set(head["columns"])
    assert len(head["columns"]) <= len(wanted) + 1  # and the one that holds at the left edge


def test_a_payload_holds_all_and_shrinks_to_its_limit() -> None:
    generator = np.random.default_rng(0)
    view = view_of(generator.normal(0, 9, (500, 3)).tolist())
    head, _ = unpacked_payload(payload([view]))
    (picture,) = head["pictures"]
    assert picture["shape"] == [3, 400]
    assert [entry["run"] for entry in head["layouts"]] == ["run"]
    small = payload([view], limit=1_200)
    assert len(small) <= 1_200
    head, body = unpacked_payload(small)
    assert len(body) == head["pictures"][0]["size"] < 1_200


def unpacked_payload(data: bytes) -> tuple[dict[str, Any], bytes]:
    import json

    raw = gzip.decompress(data)
    length = int.from_bytes(raw[:4], "little")
    return json.loads(raw[4 : 4 + length]), raw[4 + length :]


def test_a_picture_packs_and_unpacks() -> None:
    head, body = answers.picture(view_of([[0.0, 3.5]]), "norm_ratio")
    back, codes = unpacked(answers.packed(head, body))
    assert back["columns"] == [0]
    assert codes == [[125], [250]]


@pytest.mark.parametrize("call", [answers.value, answers.layer])
def test_a_layer_that_is_not_there(call: Any) -> None:
    arguments = ("norm_ratio", 7, 0) if call is answers.value else (7,)
    with pytest.raises(LookupError, match="no such layer"):
        call(view_of([[1.0]]), *arguments)
