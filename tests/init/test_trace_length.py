"""The work of `init_weights` grows no faster than the recording: counted, not timed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from benchmarks.trace_length import KINDS, WIDTH, model_of
from torch import nn

import lightning_gradhealth as gh
from lightning_gradhealth.init import auto, paths, replay, residual
from lightning_gradhealth.tracing import Graph, LongPathError, trace

X = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(0))


def work(monkeypatch: pytest.MonkeyPatch, kind: str, operations: int) -> tuple[int, int, int, gh.InitReport]:
    """Operations recorded, events visited, operations executed, and the report."""
    made: list[Any] = []

    class Counting(replay.Replayer):
        def __init__(self, graph: Graph) -> None:
            super().__init__(graph)
            made.append((graph, self))

    monkeypatch.setattr(auto, "Replayer", Counting)
    report = gh.init_weights(model_of(kind, operations), X, seed=0)
    ((graph, replayer),) = made
    return len(graph.trace.events), graph.visits, replayer.executed, report


@pytest.mark.parametrize("kind", KINDS)
def test_work_is_linear_in_the_length_of_the_recording(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "ALLOWED", 1 << 11)
    for module in (paths, residual):
        monkeypatch.setattr(module, "LONGEST", 1 << 7)
    shorter, longer = (work(monkeypatch, kind, operations) for operations in (900, 2700))
    times = longer[0] / shorter[0]
    assert 2.5 < times < 3.5
    for recorded, visited, executed, _ in (shorter, longer):
        assert visited < 40 * recorded
        # two parts of the work, and what the last path of each has more
        assert executed < 2 * ((1 << 11) + replay.ALLOWED_EACH * recorded + 12 * (1 << 7) * 2)
    assert longer[1] < 1.25 * times * shorter[1]


def test_what_a_bound_leaves_out_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for bound in ("ALLOWED", "ALLOWED_EACH"):
        monkeypatch.setattr(replay, bound, 0)
    *_, report = work(monkeypatch, "scan", 400)
    assert any("not predicted: the forward pass is too long" in note for note in report.notes)
    assert report.depth == ()
    monkeypatch.setattr(paths, "LONGEST", 4)
    *_, report = work(monkeypatch, "deep", 100)
    assert any("some gains are assumed" in note and "too long" in note for note in report.notes)


def test_long_paths_are_refused() -> None:
    graph = Graph(trace(nn.Sequential(*(nn.Tanh() for _ in range(9))), X))
    end, value = len(graph.trace.events), graph.trace.outputs[0]
    assert len(graph.between(value, end, 9)[0]) == 9
    with pytest.raises(LongPathError, match="more than 8 operations"):
        graph.between(value, end, 8)


def test_weights_do_not_depend_on_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    reports = []
    for moment in (0.0, 1e9):
        torch.manual_seed(0)
        monkeypatch.setattr("time.monotonic", lambda moment=moment: moment)
        reports.append(gh.init_weights(model_of("decoder", 300), X, seed=0))
    assert [entry.measured_std for entry in reports[0].entries] == [entry.measured_std for entry in reports[1].entries]


def test_memory_that_a_loop_fills_is_replayed_for_all_draws_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Scan(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            keys, filled = self.first(x), torch.zeros(len(x), 6, WIDTH)
            for step in range(6):
                filled[:, step] = keys * (step + 1) ** -0.5
            return self.last(filled.mean(1))  # type: ignore[no-any-return]

    runs: list[int] = []
    result = paths.Run.result

    def counted(self: paths.Run, known: Any = None) -> torch.Tensor:
        runs.append(len(self._path.events))
        return result(self, known)

    monkeypatch.setattr(paths.Run, "result", counted)
    report = gh.init_weights(Scan(), X, seed=0)
    moment = (sum((step + 1) ** -0.5 for step in range(6)) / 6) ** 2
    (last,) = (entry for entry in report.entries if entry.name == "last.weight")
    assert last.found == "output"
    assert last.gain == pytest.approx(moment**-0.5, rel=0.02)
    assert len(runs) < 40


def test_rwkv_with_two_layers_and_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.RwkvConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32, intermediate_size=64
    )
    executed: list[int] = []
    result = paths.Run.result

    def counted(self: paths.Run, known: Any = None) -> torch.Tensor:
        executed.append(len(self._path.events))
        return result(self, known)

    monkeypatch.setattr(paths.Run, "result", counted)
    ids = torch.randint(3, 99, (4, 2), generator=torch.Generator().manual_seed(0))
    report = gh.init_weights(transformers.RwkvForCausalLM(config), {"input_ids": ids}, seed=0, dry_run=True)
    assert len(report.entries) == 42
    assert sum(executed) < 15_000  # 260,000 where every draw has a run of its own
