"""Reports in a terminal: whole names and no line too long at any width, sick layers first, remedies said once."""

from __future__ import annotations

import contextlib
import importlib
import io
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import example, given, settings
from rich.cells import cell_len, set_cell_size
from rich.console import Console, Group, RenderableType

from lightning_gradhealth import (
    Condition,
    DepthPoint,
    Finding,
    FlowReport,
    HealthReport,
    InitEntry,
    InitReport,
    LayerStats,
    Severity,
)
from lightning_gradhealth.messages import printable
from lightning_gradhealth.reports.flow import render_flow
from lightning_gradhealth.reports.health import render_health
from lightning_gradhealth.reports.initialization import render_init
from lightning_gradhealth.reports.tables import Column, FittedTable, _widths

WIDTHS = (40, 60, 80, 120, 200)


def shown(report: object, width: int) -> list[str]:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(report)
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


def layer(name: str, norm: float = 0.5, **values: float) -> LayerStats:
    return LayerStats(name, grad_norm=norm, norm_ratio=1.0, grad_to_weight=2e-3, optimizer=0, **values)


def finding(condition: Condition, severity: Severity, *names: str, remedy: str = "wait", code: str = "") -> Finding:
    return Finding(condition, severity, names, 3, 9, "it is so", {"fitted_gain": 0.41}, remedy, code)


def tables_of(report: RenderableType) -> list[FittedTable]:
    assert isinstance(report, Group)
    return [part for part in report.renderables if isinstance(part, FittedTable)]


def first_column(table: FittedTable, width: int) -> str:
    """All that stands in the column of names, line after line, without spaces."""
    names, _ = table._shortened(width)
    full = max(map(cell_len, ["layer", *names]))
    room = _widths(full, table._chosen(full, width), width)[0]
    lines = [line.plain for line in table.lines(width)]
    start = next(i for i, line in enumerate(lines) if line.startswith("layer"))
    return "".join(set_cell_size(line, room) for line in lines[start + 1 :]).replace(" ", "")


@pytest.mark.parametrize("width", WIDTHS)
def test_state_and_gradient_norm_are_shown_at_every_width(width: int) -> None:
    names = [f"net.{i}" for i in range(5)]
    layers = tuple(layer(name, 9.05e-9, update_to_weight=3.1e-9, forward_rms=0.5, backward_rms=1e-9) for name in names)
    report = HealthReport((finding(Condition.VANISHING_GRADIENTS, Severity.CRITICAL, *names),), layers, 9, 10)
    lines = shown(report, width)
    rows = [line for line in lines[: next(i for i, line in enumerate(lines) if "critical" in line)] if "net." in line]
    assert [row.split()[0] for row in rows] == names
    assert all("9.05e-09" in row and row.rstrip().endswith("vanishing gradients") for row in rows)
    titles = "grad norm", "norm ratio", "grad/weight", "update/weight", "output RMS", "gradient RMS"
    left_out = " ".join(lines[lines.index(rows[-1]) + 1 :]).partition("critical:")[0]
    if width >= 120:
        assert all(title in lines[2] for title in titles)
        assert "no room" not in left_out
    else:
        figures = {"norm ratio": "1", "grad/weight": "0.002", "update/weight": "3.10e-09", "output RMS": "0.5"}
        for title, figure in figures.items():
            assert (title in left_out) == (figure not in rows[0].split())
        assert "state" not in left_out.split("no room")[-1]


names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=300) | st.integers(1, 300).map("n".__mul__)


@settings(max_examples=60, deadline=None)
@given(
    names=st.lists(names, min_size=1, max_size=30, unique_by=printable),
    sick=st.integers(0, 30),
    prefix=st.sampled_from(["", "model.encoder.blocks."]),
    width=st.sampled_from(WIDTHS),
    condition=st.sampled_from(["dead_units", "x" * 60, "a condition of one's own, in words"]),
)
@example([f"layers.{i}" for i in range(1000)], 1000, "", 80, "dead_units")
@example([f"layers.{i}" for i in range(1000)], 1, "model.", 40, "dead_units")
def test_no_sick_layer_is_missing_no_name_is_cut_and_no_line_is_too_long(
    names: list[str], sick: int, prefix: str, width: int, condition: str
) -> None:
    names = [f"{prefix}{name}" for name in names]
    hit = tuple(names[::-1][:sick])
    what = Finding(condition, Severity.WARNING, hit, 1, 2, "seen", {"worst": 0.5, "layers": dict.fromkeys(hit, 0.5)})
    report = HealthReport((what,) if hit else (), tuple(map(layer, names)), 2, 3)
    lines = shown(report, width)
    assert max(map(cell_len, lines)) <= width
    healthy = [name for name in names if name not in hit]
    wanted = [name for name in names if name in hit] + (healthy if len(healthy) <= 12 else [])
    tables = tables_of(render_health(report))
    assert [name for table in tables for name in table._names] == list(map(printable, wanted))
    if len(healthy) > 12:
        noun = "more" if hit else "layers"
        assert f"{len(healthy)} {noun}, ok: grad norm 0.5, norm ratio 1, grad/weight" in " ".join(
            map(str.rstrip, lines)
        )


@settings(max_examples=150, deadline=None)
@given(
    names=st.lists(names, min_size=1, max_size=12),
    prefix=st.sampled_from(["", "model.encoder.blocks."]),
    words=st.lists(st.text(max_size=60), max_size=3),
    width=st.sampled_from([20, 30, *WIDTHS]),
)
def test_a_fitted_table_keeps_names_whole(names: list[str], prefix: str, words: list[str], width: int) -> None:
    names = [printable(prefix + name) for name in names]
    columns = [Column("grad norm", ["1.00e-09"] * len(names), 1)]
    columns += [Column(f"note {i}", [printable(word)] * len(names), i + 2, words=True) for i, word in enumerate(words)]
    table = FittedTable("layer", names, columns, [""] * len(names))
    lines = [line.plain for line in table.lines(width)]
    assert max(map(cell_len, lines)) <= width
    rest, beginning = table._shortened(width)
    assert [beginning + name for name in rest] == names
    column = first_column(table, width)
    assert column.startswith("".join(rest).replace(" ", ""))
    told = "".join(lines[: next(i for i, line in enumerate(lines) if line.startswith("layer"))])
    assert beginning.replace(" ", "") in told.replace(" ", "")
    if width >= 30:
        assert sum("1.00e-09" in line for line in lines) == len(names)


def test_the_worst_come_first_and_those_in_order_are_one_line() -> None:
    layers = tuple(layer(f"net.{i}", 0.1 * (i + 1)) for i in range(40))
    dead = finding(Condition.DEAD_UNITS, Severity.WARNING, "net.3", "net.30", remedy="a smaller rate")
    gone = finding(Condition.NON_FINITE, Severity.CRITICAL, "net.20", "net.39", remedy="a smaller rate")
    lines = shown(HealthReport((gone, dead), layers, 9, 10), 80)
    rows = [line.split()[0] for line in lines if line.startswith("net.")]
    assert rows == ["net.20", "net.39", "net.3", "net.30"]
    assert "36 more, ok: grad norm 0.1 to 3.9, norm ratio 1, grad/weight 0.002" in lines


def test_few_layers_are_all_shown() -> None:
    frozen = LayerStats("embedding", frozen=True)
    lines = shown(HealthReport((), (frozen, *(layer(f"net.{i}") for i in range(11))), 9, 10), 80)
    assert [line.split()[0] for line in lines if line.startswith(("net.", "emb"))] == [
        "embedding",
        *(f"net.{i}" for i in range(11)),
    ]
    assert not any("more" in line for line in lines)


def test_states_of_those_that_are_folded_are_counted() -> None:
    layers = tuple(LayerStats(f"net.{i}", frozen=i < 5, grad_norm=1.0, optimizer=0) for i in range(20))
    healed = Finding("dead_units", Severity.WARNING, ("net.19",), 1, 2, healed=("net.19",))
    text = "\n".join(shown(HealthReport((healed,), layers, 9, 10), 80))
    assert "20 layers, 5 frozen, 14 ok, 1 recovered: grad norm 1" in text


def test_a_remedy_and_its_code_are_said_once() -> None:
    code = "for group in optimizer.param_groups: group['lr'] *= 0.1"
    lower = finding(Condition.OVERSIZED_UPDATES, Severity.CRITICAL, "a", remedy="a smaller rate", code=code)
    same = finding(Condition.LOSS_SPIKE, Severity.WARNING, "a", remedy="a smaller rate", code=code)
    near = finding(Condition.GROWING_WEIGHTS, Severity.WARNING, "a", remedy="decay, or a smaller rate", code=code)
    report = HealthReport((lower, same, near), (layer("a"),), 9, 10)
    lines = shown(report, 120)
    assert lines.count("  remedy: a smaller rate") == 1
    assert "  remedy: as for oversized_updates" in lines
    assert sum(code in line for line in lines) == 1
    assert "    the code above" in lines


def test_evidence_is_read_as_words() -> None:
    evidence = {"fitted_gain": 0.41234567, "layers": {"a": 0.5, "b": 0.25, "c": 1.0, "d": 1.0}, "none": None, "n": 3}
    report = HealthReport((Finding("my_rule", Severity.WARNING, (), 1, 1, evidence=evidence),), (), 9, 10)
    assert "  evidence: fitted gain 0.4123, layers a: 0.5, b: 0.25, c: 1, … (4), n 3" in shown(report, 80)


def test_what_a_finding_is_about_is_shown_before_other_numbers() -> None:
    layers = tuple(
        layer(f"net.{i}", update_to_weight=1e-3, forward_rms=0.5, backward_rms=1e-9, saturated_fraction=0.9)
        for i in range(3)
    )
    for condition, title in ((Condition.SATURATED_UNITS, "saturated"), (Condition.EXPLODING_ACTIVATIONS, "RMS")):
        report = HealthReport((finding(condition, Severity.WARNING, "net.1"),), layers, 9, 10)
        header = " ".join(line for line in shown(report, 60) if not line.startswith("no room"))
        assert title in header


def test_what_can_be_copied_stands_alone() -> None:
    """No frame around code: what is marked in a terminal runs."""
    code = "import torch\nmodel.float()"
    report = HealthReport((finding(Condition.LOSS_SPIKE, Severity.WARNING, code=code),), (), 9, 10)
    assert [line.strip() for line in shown(report, 80)][-2:] == code.splitlines()


@pytest.mark.parametrize("width", WIDTHS)
def test_flow_reports_fit(width: int) -> None:
    names = [f"model.encoder.blocks.{i}.attention.out_proj" for i in range(20)]
    values = {"forward_rms": 0.5, "forward_gain": 1.02, "backward_gain": 0.4, "activation": "leaky_relu"}
    layers = tuple(LayerStats(name, backward_rms=1.5e-9, **values) for name in names)
    report = FlowReport(layers, findings=(finding(Condition.VANISHING_GRADIENTS, Severity.CRITICAL, *names[:7]),))
    lines = shown(report, width)
    assert max(map(cell_len, lines)) <= width
    assert sum("1.50e-09" in line for line in lines) == 8  # 7 sick ones, and the range of the others
    (table,) = tables_of(render_flow(report))
    assert table._names == names[:7]
    assert any(line.startswith("13 more, ok: forward RMS 0.5") for line in lines)


@pytest.mark.parametrize("width", WIDTHS)
def test_init_reports_fit(width: int) -> None:
    names = [f"model.encoder.blocks.{i}.attention.out_proj.weight" for i in range(20)]
    entries = tuple(
        InitEntry(name, "Linear", (1024, 1024), "Linear", "he", "normal", 1024.0, 1.4142, 0.04419, 0.0441, "kept small")
        for name in names
    )
    depth = tuple(DepthPoint(name, 1.5, 0.25, 1.0, 2.0, 1.0) for name in names)
    lines = shown(InitReport(entries, depth=depth), width)
    assert max(map(cell_len, lines)) <= width
    tables = tables_of(render_init(InitReport(entries, depth=depth)))
    assert tables[0]._names == [f"{name} 1024×1024" for name in names]
    assert tables[1]._names == names[::2] + names[-1:]
    assert sum("0.04419" in line for line in lines) == 20
    assert sum("0.25" in line.split() for line in lines) == 11  # of 20 depths, the last included
    assert sum("kept small" in line for line in lines) == 20  # below the row where it has no room in it
    assert sum(line.startswith("  kept small") for line in lines) == (20 if width < 120 else 0)


def test_the_quickstarts_table_shows_everything_at_eighty_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples"))
    monkeypatch.setenv("COLUMNS", "80")
    quickstart = importlib.import_module("quickstart")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        results = quickstart.main(["--epochs", "1", "--no-progress", "--logdir", str(tmp_path)])
    lines = printed.getvalue().splitlines()
    assert max(map(cell_len, lines)) <= max(80, len(str(tmp_path)) + 80)
    last = next(i for i, line in enumerate(lines) if "GradHealth says" in line)
    table = "".join("".join(line.split("│")[-2:]).replace(" ", "") for line in lines[last:] if "│" in line)
    for name, (_, report) in results.items():
        assert any(line.startswith(f"│ {name} ") for line in lines[last:])
        for found in report.findings:
            assert str(found.condition) in table
        for stats in report.layers:
            if any(stats.name in f.layers and stats.name not in f.healed for f in report.findings):
                assert any(line.split()[:1] == [stats.name] for line in lines)
    assert "…" not in "".join(line for line in lines if line.startswith("net."))
