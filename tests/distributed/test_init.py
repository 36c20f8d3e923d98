"""Initial weights of split models: the same as in one process, bit for bit, and never a checkpoint's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import distributed

if not (distributed.is_available() and distributed.is_gloo_available()):
    pytest.skip("needs torch.distributed with gloo", allow_module_level=True)

import init_cases
import ranks

Answers = list[dict[str, Any]]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Answers:
    return ranks.run(init_cases.two, 2, str(tmp_path_factory.mktemp("resumed")))


@pytest.fixture(scope="module")
def four() -> Answers:
    return ranks.run(init_cases.four, 4)


@pytest.mark.parametrize("world", ["two", "four"])
def test_each_rank_cuts_out_its_part(world: str, request: pytest.FixtureRequest) -> None:
    for rank in request.getfixturevalue(world):
        assert len(rank["filled"]) == 13
        for case, found in rank["filled"].items():
            assert found == {"right": True, "whole": True, "silent": True}, case


def test_parts_of_parts(four: Answers) -> None:
    for rank in four:
        for shape, found in rank["strided"].items():
            assert found["wrong"] == [], shape
            assert found["strided"]
    assert any(found["empty"] for rank in four for found in rank["strided"].values())


def test_what_cannot_be_filled_is_refused(two: Answers) -> None:
    for rank in two:
        messages = rank["refused"]
        assert "holds a summand" in messages["partial"]
        assert "redistribute it to Replicate" in messages["partial"]
        assert "before the model is wrapped" in messages["flat"]
        assert "the shape of the whole target, (4, 2), got (2, 2)" in messages["shape"]
        assert "this rank holds (3, 2), not (2, 2)" in messages["odd"]
        assert rank["outside"]


@pytest.mark.parametrize("case", ["fsdp2", "tp", "fabric", "late"])
def test_from_meta_as_in_one_process(two: Answers, case: str) -> None:
    for rank in two:
        assert rank[case]["wrong"] == []


def test_from_meta_by_two_ways_at_once(four: Answers) -> None:
    for rank in four:
        assert rank["fsdp2_tp"]["wrong"] == []


def test_the_cases_are_what_they_claim(two: Answers, four: Answers) -> None:
    for rank in two:
        assert rank["fsdp2"]["kinds"] == {"split"}
        assert rank["tp"]["kinds"] == {"split", "whole"}
        assert rank["fabric"]["was_meta"]
    assert [len(rank["fsdp2"]["mine"]["convolution.weight"]) for rank in two] == [3, 2]
    assert [len(rank["tp"]["mine"]["up.weight"]) for rank in two] == [4, 4]
    assert [len(rank["fsdp2_tp"]["mine"]["up.weight"]) for rank in four] == [2, 2, 2, 2]


@pytest.mark.parametrize("case", ["fsdp2", "tp"])
def test_what_the_plan_leaves_alone_is_the_same_on_all_ranks(two: Answers, case: str) -> None:
    """The class gives it, by random numbers; the random states of the ranks differ."""
    first, second = (rank[case]["frozen"] for rank in two)
    assert all(map(torch.equal, first, second))
    for values in first:
        assert 0 < values.abs().max() <= 3**-0.5


def test_traced_gains_reach_every_rank(two: Answers) -> None:
    for rank in two:
        found = rank["traced"]
        assert len({round(gain, 3) for gain in found["gains"]}) >= 3
        assert found["bound"] == []
        assert found["applied"] == []
        assert "example_inputs cannot go through a model that is sharded" in found["refused"]
        assert "plan.apply()" in found["refused"]


@pytest.mark.parametrize("case", ["real_fsdp2", "real_tp"])
def test_split_already(two: Answers, case: str) -> None:
    for rank in two:
        assert rank[case] == {"wrong": [], "frozen": [], "collectives": 0}


def test_a_checkpoint_is_not_overwritten(two: Answers) -> None:
    for rank in two:
        assert rank["checkpoints"] == {"before": [], "after": []}


def test_what_holds_its_values_before_the_rest_does(two: Answers) -> None:
    for rank in two:
        assert rank["partly"] == {"wrong": [*init_cases.LOADED], "loaded": [], "kept": True, "assigned": True}


def test_a_fit_that_is_resumed(two: Answers) -> None:
    for rank in two:
        found = rank["resumed"]
        assert {"up.weight", "down.weight", "head.bias"} <= {*found.pop("moved")}
        assert found == {"validated": [], "resumed": [], "reset": [], "hooks": []}
