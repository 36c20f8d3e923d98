"""Signals on several ranks: those of one process on the joined batch, for one collective a probed step."""

from __future__ import annotations

from typing import Any

import pytest
from torch import distributed

if not (distributed.is_available() and distributed.is_gloo_available()):
    pytest.skip("needs torch.distributed with gloo", allow_module_level=True)

import ranks
import signal_cases

Answers = list[dict[str, Any]]

PROBED = [*range(20)]  # the first ones all are, until units have been judged for the first time
# of data-parallel ranks each has a mean loss of its own, of which only the mean over the ranks is the loss
LOCAL = {"ddp": 2.0, "fsdp2": 2.0, "fsdp1": 2.0, "tp": 1.0, "sp": 1.0}


@pytest.fixture(scope="module")
def two() -> Answers:
    return ranks.run(signal_cases.everything, 2, timeout=240.0)


@pytest.fixture(scope="module")
def one() -> dict[str, Any]:
    return {
        "equal": signal_cases.loop(20),
        "adversaries": signal_cases.adversaries("auto"),
        "fit": signal_cases.fit("one"),
    }


def measured(record: dict[str, Any], *names: str) -> dict[str, Any]:
    return {layer["name"]: [layer[name] for name in names] for layer in record["layers"] if layer[names[0]] is not None}


def close(left: dict[str, list[float]], right: dict[str, list[float]], tolerance: float) -> bool:
    assert left.keys() == right.keys()
    pairs = [pair for name in left for pair in zip(left[name], right[name], strict=True)]
    return all(a is b if b is None else a == pytest.approx(b, rel=tolerance, abs=tolerance) for a, b in pairs)


def points(record: dict[str, Any]) -> list[tuple[int, list[str]]]:
    return [(chain["optimizer"], [point["name"] for point in chain["points"]]) for chain in record["chains"]]


@pytest.mark.parametrize("how", ["equal", "uneven", "side", "late"])
def test_ranks_agree_and_talk_once_a_probed_step(two: Answers, how: str) -> None:
    first, second = (answer[how] for answer in two)
    assert first["records"] == second["records"]
    assert first["failure"] == second["failure"] == ""
    for answer in (first, second):
        assert answer["collectives"][0] >= 2  # once and for all: what there is
        assert [step for step, count in enumerate(answer["collectives"]) if count] == PROBED
        assert all(count <= 1 for count in answer["collectives"][1:])


def test_sums_are_those_of_the_joined_batch(two: Answers, one: dict[str, Any]) -> None:
    names = ("forward_rms", "forward_mean", "backward_rms", "forward_gain", "backward_gain")
    seen = 0
    for whole, split in zip(one["equal"]["records"], two[0]["equal"]["records"], strict=True):
        if measured(whole, "forward_rms"):
            assert close(measured(split, *names), measured(whole, *names), 1e-9)
            assert points(split) == points(whole)
            seen += 1
    assert seen >= 3
    first = two[0]["equal"]["records"][0]
    histograms = measured(first, "forward_histogram")
    assert {sum(histogram) for (histogram,) in histograms.values() if histogram} == {64 * 8, 64 * 2}


def test_a_branch_of_one_rank_is_measured_too(two: Answers) -> None:
    for record in two[0]["side"]["records"]:
        if record["step"] in PROBED:
            assert set(measured(record, "forward_rms")) == {"stem", "norm", "side", "head"}


def test_each_optimizer_has_its_chain(two: Answers, one: dict[str, Any]) -> None:
    for answer in two:
        records = answer["adversaries"]["records"]
        assert not answer["adversaries"]["aside"]
        for split, whole in zip(records, one["adversaries"]["records"], strict=True):
            assert points(split) == points(whole)
            assert dict(points(split)).keys() == {0, 1}
            names = ("forward_rms", "backward_rms", "activation")
            assert measured(split, "activation") == measured(whole, "activation")
            assert close(measured(split, *names[:2]), measured(whole, *names[:2]), 1e-5)


@pytest.mark.parametrize("kind", LOCAL)
def test_in_a_fit_of_every_strategy(two: Answers, one: dict[str, Any], kind: str) -> None:
    for answer in two:
        assert not answer[f"fit {kind}"]["aside"]
        for split, whole in zip(answer[f"fit {kind}"]["records"], one["fit"]["records"], strict=True):
            assert close(
                measured(split, "forward_rms", "forward_mean"), measured(whole, "forward_rms", "forward_mean"), 1e-5
            )
            expected = {name: [LOCAL[kind] * value] for name, (value,) in measured(whole, "backward_rms").items()}
            assert close(measured(split, "backward_rms"), expected, 1e-5)
            if kind != "sp":  # DTensors that are redistributed hide a merge
                assert points(split) == points(whole)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_a_rank_that_steps_aside_keeps_no_other_waiting(two: Answers, kind: str) -> None:
    first, second = (answer[f"alone {kind}"] for answer in two)
    assert "no space left" in first["aside"]
    assert second["aside"] == ""
    assert first["steps"] == second["steps"] == second["seen"] == 6
    assert first["seen"] < 6
