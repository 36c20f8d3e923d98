"""Reports as figures: what is drawn is what the report says, names can be read, and pyplot knows nothing of it."""

from __future__ import annotations

import io
import math
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import hypothesis.strategies as st
import matplotlib.colors
import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import nn

from lightning_gradhealth import (
    ChainPoint,
    DepthPoint,
    Finding,
    FlowReport,
    HealthReport,
    HealthSession,
    InitReport,
    LayerStats,
    NormClip,
    Severity,
    SignalChain,
    diagnose,
    init_weights,
)
from lightning_gradhealth.reports.drawing import SEVERITY
from lightning_gradhealth.reports.figures import figure

EMPTY = (HealthReport(), FlowReport(), InitReport())
HOSTILE = (
    *(
        "$\\frac{1}{",
        "$x$ and $y$",
        "漢字.層",
        "a\nb",
        "\u202eabc",
        "n" * 300,
        "",
        "_private",
        "<b>&amp;</b>",
        "\x1b[31m",
    ),
    *("net.weight_{i}", "\\", "{}", "%d", "\N{SNOWMAN}", "a b  c"),
)


@pytest.fixture(autouse=True)
def _nothing_warns() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def line(axes: Axes, label: str) -> tuple[list[float], list[float]]:
    """The data of a line."""
    (found,) = [each for each in axes.lines if each.get_label() == label]
    return list(found.get_xdata()), list(found.get_ydata())  # type: ignore[arg-type]


def labels(axes: Axes) -> list[str]:
    return [str(each.get_label()) for each in axes.lines]


def drawn(report: Any) -> Figure:
    """A figure that was really drawn."""
    result = figure(report)
    result.savefig(io.BytesIO(), format="png", dpi=40)
    return result


def layer(name: str, norm: float | None = 0.5, most: float | None = 0.5, **values: Any) -> LayerStats:
    return LayerStats(name, grad_norm=norm, grad_norm_max=most, optimizer=0, **values)


def sick() -> HealthReport:
    layers = tuple(layer(f"net.{i}", 10.0 ** (i - 6), 2 * 10.0 ** (i - 6)) for i in range(6))
    finding = Finding("vanishing_gradients", Severity.CRITICAL, ("net.0", "net.1"), 2, 30)
    return HealthReport((finding,), layers, 40, 41, trend=((0.0, 3.0), (10.0, 1.0), (25.0, 0.1), (40.0, 0.5)))


def test_the_total_norm_is_that_of_the_report() -> None:
    above, _ = drawn(sick()).axes
    assert line(above, "norm") == ([0, 10, 25, 40], pytest.approx([3.0, 1.0, 0.1, 0.5]))
    assert above.get_yscale() == "log"
    assert above.get_title(loc="left") == "vanishing_gradients after 41 optimizer steps"


def test_of_a_run_that_logged_little_the_pooled_norm_is_drawn() -> None:
    net = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    session = HealthSession(net)
    for _ in range(20):
        optimizer.zero_grad()
        loss = net(torch.ones(8, 4)).square().mean()
        loss.backward()
        session.apply(session.observe(optimizer, loss))
        optimizer.step()
    session.flush()
    report = session.report()
    assert len(report.trend) > 1
    above, _ = drawn(report).axes
    assert list(zip(*line(above, "norm"), strict=True)) == [tuple(point) for point in report.trend]
    assert all(tick == int(tick) for tick in above.get_xticks())
    session.close()


def test_a_finding_is_a_bar_over_the_steps_in_which_it_held() -> None:
    above, _ = drawn(sick()).axes
    (bar,) = [each for each in above.lines if each.get_label() == "_" and each.get_linewidth() > 5]
    assert list(bar.get_xdata()) == pytest.approx([2, 30], abs=0.5)  # type: ignore[arg-type]
    assert matplotlib.colors.to_hex(bar.get_color()) == SEVERITY[Severity.CRITICAL]
    assert [text.get_text().strip() for text in above.texts] == ["vanishing gradients"]


def test_the_gradient_of_each_layer_is_that_of_the_report() -> None:
    report = sick()
    _, below = drawn(report).axes
    well, ill = line(below, "ok"), line(below, "vanishing gradients")
    assert ill[0] == [0, 1]
    assert well[0] == [2, 3, 4, 5]
    norms = [layer.grad_norm for layer in report.layers]
    assert [*ill[1], *well[1]] == norms
    (up,) = below.collections
    segments = [segment.tolist() for segment in up.get_segments()]  # type: ignore[attr-defined]
    assert segments == [[[i, stats.grad_norm], [i, stats.grad_norm_max]] for i, stats in enumerate(report.layers)]
    named = {label.get_text(): matplotlib.colors.to_hex(label.get_color()) for label in below.get_xticklabels()}
    assert list(named) == [str(i) for i in range(6)]
    assert [place for place, colour in named.items() if colour == SEVERITY[Severity.CRITICAL]] == ["0", "1"]
    assert below.get_xlabel() == "layers in order of use, of net"


def test_what_has_no_place_on_the_scale_is_marked() -> None:
    layers = (layer("a", math.nan), layer("b", math.inf), layer("c", 0.0), layer("d"), layer("e", None, None))
    report = HealthReport((), layers, 9, 10, trend=((0.0, 1.0), (4.0, math.inf), (9.0, math.nan)))
    above, below = drawn(report).axes
    assert line(below, "NaN or Inf")[0] == [0, 1]
    assert line(below, "exactly 0")[0] == [2]
    assert line(above, "NaN or Inf")[0] == [4, 9]
    frozen = HealthReport((), (layer("a", 0.0, 0.0, frozen=True), layer("b")), 9, 10)
    assert "exactly 0" not in labels(drawn(frozen).axes[1])


@pytest.mark.parametrize("norm", [5e-324, 1e-300, 1e308, math.inf, math.nan, 0.0])
def test_any_size_can_be_drawn(norm: float) -> None:
    report = HealthReport((), (layer("a", norm, norm), layer("b", 1.0)), 9, 10, trend=((0.0, norm), (9.0, norm)))
    for axes in drawn(report).axes:
        assert np.isfinite(axes.get_ylim()).all()
        assert axes.get_ylim()[0] > 0
    points = tuple(ChainPoint(str(i), str(i), norm, norm) for i in range(3))
    drawn(FlowReport(chain=SignalChain(points), forward_gain=norm, backward_gain=norm))
    drawn(InitReport(depth=tuple(DepthPoint(str(i), norm, norm, norm, norm, norm) for i in range(3))))


def test_clipping_and_skipped_steps_of_a_real_run_are_marked() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    session = HealthSession(net, clip=NormClip(0.05), on_non_finite="skip", probe_every_n_steps=1)
    x, y = torch.randn(64, 8), torch.randint(3, (64,))
    for step in range(12):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(x), y) * (math.nan if step in (5, 6) else 1.0)
        loss.backward()
        session.apply(session.observe(optimizer, loss))
        optimizer.step()
        session.flush()
    report = session.report()
    above, _ = drawn(report).axes
    steps, norms = line(above, "norm")
    assert steps == list(range(12))
    assert [math.isnan(norm) for norm in norms] == [step in (5, 6) for step in range(12)]
    assert line(above, "skipped steps")[0] == [4.5, 6.5]
    assert line(above, "clipped steps")[0] == [-0.5, 4.5]
    _, applied = line(above, "after clipping (probed steps)")
    assert max(value for value in applied if not math.isnan(value)) == pytest.approx(0.05, rel=1e-3)
    session.close()


def test_a_flow_shows_both_signals_and_their_fitted_gains() -> None:
    net = nn.Sequential(*[part for _ in range(9) for part in (nn.Linear(16, 16), nn.Sigmoid())], nn.Linear(16, 3))
    report = diagnose(net, torch.randn(256, 16))
    axes = drawn(report).axes[0]
    points = report.chain.points
    assert len(points) == 10
    forward, backward = (label for label in labels(axes) if label.startswith(("signal", "gradient")))
    assert line(axes, forward)[1] == [point.forward_rms for point in points]
    assert line(axes, backward)[1] == [point.backward_rms for point in points]
    assert forward == f"signal, gain {report.forward_gain:.3g} per layer"
    fits = [each.get_ydata() for each in axes.lines if each.get_label() == "_fit"]
    assert fits[0][1] / fits[0][0] == pytest.approx(report.forward_gain)  # type: ignore[index]
    assert fits[1][0] / fits[1][1] == pytest.approx(report.backward_gain)  # type: ignore[index]
    assert axes.get_title(loc="left").startswith("vanishing_gradients before the first step")


def test_a_flow_without_a_chain_shows_its_layers() -> None:
    layers = (LayerStats("a", forward_rms=1.0, backward_rms=0.1), LayerStats("b", forward_rms=2.0, backward_rms=0.2))
    axes = drawn(FlowReport(layers)).axes[0]
    assert line(axes, "signal") == ([0, 1], [1.0, 2.0])
    assert line(axes, "gradient") == ([0, 1], [0.1, 0.2])


def test_an_initialisation_shows_what_is_predicted_and_what_was_measured() -> None:
    net = nn.Sequential(*[part for _ in range(5) for part in (nn.Linear(16, 16), nn.Tanh())], nn.Linear(16, 3))
    report = init_weights(net, torch.randn(64, 16), seed=0, calibrate=torch.randn(64, 16))
    axes = drawn(report).axes[0]
    signal, gradient = (label for label in labels(axes) if label.startswith(("signal", "gradient")))
    for label, field in (
        (signal, "forward"),
        (gradient, "backward"),
        ("target", "target"),
        ("measured before", "before"),
        ("calibrated", "after"),
    ):
        assert line(axes, label)[1] == [getattr(point, field) for point in report.depth]


@pytest.mark.parametrize("report", EMPTY, ids=lambda report: type(report).__name__)
def test_an_empty_report_says_that_there_is_nothing(report: Any) -> None:
    for axes in drawn(report).axes:
        (text,) = axes.texts
        assert text.get_text().startswith("no ")
        assert not axes.lines


def test_names_of_any_kind_are_text() -> None:
    finding = Finding("$\\frac{", Severity.WARNING, HOSTILE[:3], 0, 9, healed=(HOSTILE[2],))
    report = HealthReport((finding,), tuple(map(layer, HOSTILE)), 9, 10, trend=((0.0, 1.0),))
    below = drawn(report).axes[1]
    names = [label.get_text() for label in below.get_xticklabels()]
    assert names[0] == "$\\frac{1}{"
    assert names[3] == "a\\nb"
    assert len(names[5]) == 36
    drawn(
        FlowReport(chain=SignalChain(tuple(ChainPoint(name, name, 1.0, 1.0) for name in HOSTILE)), outlook="$\\frac{")
    )
    drawn(InitReport(depth=tuple(DepthPoint(name, 1.0, 1.0) for name in HOSTILE)))


@pytest.mark.parametrize("count", [1, 3, 30, 100, 200, 1_000])
def test_names_of_layers_do_not_overlap_and_the_sick_ones_are_there(count: int) -> None:
    names = [f"model.encoder.layers.{i}.attention.out_proj" for i in range(count)]
    few = tuple(names[1::150])
    finding = Finding("dead_units", Severity.WARNING, few, 0, 9)
    report = HealthReport((finding,) if few else (), tuple(map(layer, names)), 9, 10, trend=((0.0, 1.0),))
    result = drawn(report)
    canvas = FigureCanvasAgg(result)
    canvas.draw()
    shown = result.axes[1].get_xticklabels()
    boxes = [label.get_window_extent(canvas.get_renderer()) for label in shown]
    assert all(right.x0 >= left.x1 - 1.0 for left, right in zip(boxes, boxes[1:], strict=False))
    assert min(count, 60) <= len(shown) <= count
    texts = {label.get_text() for label in shown}
    common = "model.encoder.layers." if count > 1 else ""
    assert {name.removeprefix(common) for name in few} <= texts


def test_pyplot_neither_keeps_nor_shows_it() -> None:
    before = pyplot.get_fignums()
    result, axes = sick().plot()
    assert isinstance(result, Figure)
    assert [type(each).__name__ for each in axes] == ["Axes", "Axes"]
    assert pyplot.get_fignums() == before
    result.savefig(io.BytesIO())
    assert pyplot.get_fignums() == before


def test_it_can_be_drawn_on_axes_of_ones_own() -> None:
    mine, both = pyplot.subplots(2)
    try:
        assert sick().plot(both) == (mine, both)
        assert all(axes.lines for axes in both)
        for report in (sick(), *EMPTY[1:]):
            single, axes = Figure(), Figure().subplots()
            drawn_on, same = report.plot(axes)
            assert same is axes
            assert drawn_on is axes.get_figure() is not single
        with pytest.raises(ValueError, match="ax must be Axes or two of them, got 3; leave it out for a new figure"):
            sick().plot([*both, both[0]])
    finally:
        pyplot.close(mine)


@pytest.mark.parametrize("report", EMPTY, ids=lambda report: type(report).__name__)
def test_without_matplotlib_it_says_what_to_install(report: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        ModuleNotFoundError, match=r"plot\(\) needs matplotlib.*pip install 'lightning-gradhealth\[plot\]'"
    ):
        report.plot()


def test_something_else_has_no_figure() -> None:
    with pytest.raises(TypeError, match=r"report must be a report, got 3; e.g. health.report\(\)"):
        figure(3)


sizes = st.none() | st.floats()
layers = st.builds(
    layer, st.text(max_size=20), sizes, sizes, frozen=st.booleans(), non_finite=st.integers(0, 2), dead_fraction=sizes
)
findings = st.builds(
    Finding,
    st.sampled_from(["dead_units", "loss_spike", "my own"]),
    st.sampled_from(Severity),
    st.lists(st.text(max_size=5), max_size=2).map(tuple),
    st.integers(-1, 99),
    st.integers(-1, 10**9),
)
trends = st.lists(st.tuples(st.integers(0, 99).map(float), sizes.filter(lambda size: size is not None)), max_size=4)


@settings(max_examples=25, phases=[Phase.explicit, Phase.generate])
@given(st.lists(findings, max_size=8), st.lists(layers, max_size=6), trends, st.integers(-1, 99))
def test_any_report_can_be_drawn(found: Any, measured: Any, trend: Any, step: int) -> None:
    report = HealthReport(tuple(found), tuple(measured), step, 10, trend=tuple(sorted(trend, key=lambda p: p[0])))
    figure(report).draw_without_rendering()
