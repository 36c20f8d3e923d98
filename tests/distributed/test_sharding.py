"""Norms of split tensors: each way of splitting against the same model in one process."""

from __future__ import annotations

import math
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import distributed, nn

if not (distributed.is_available() and distributed.is_gloo_available()):
    pytest.skip("needs torch.distributed with gloo", allow_module_level=True)

import cases
import ranks
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_gradhealth import sharding
from lightning_gradhealth.sharding import Sharding, is_flat, is_partial, is_sharded, local, reduced, sum_over_ranks

Answers = list[cases.Results]

SPLIT_IN_TWO = ["fsdp2", "float16", "bfloat16", "tensor_parallel", "sequence_parallel"]
FLAT_IN_TWO = ["fsdp1", "fsdp1_one_rank", "fsdp1_nested", "fsdp1_grad_op", "fsdp1_no_shard", "fsdp1_one_flat"]
SPLIT_IN_FOUR = ["hsdp", "copies", "fsdp2_tp", "fsdp2_sp"]
CASES = [(2, name) for name in [*SPLIT_IN_TWO, *FLAT_IN_TWO, "odd"]]
CASES += [(4, name) for name in [*SPLIT_IN_FOUR, "fsdp1_hybrid", "odd"]]
FLAT = [*FLAT_IN_TWO, "fsdp1_hybrid"]
# one for all norms; besides, one for each partial gradient and mesh dimension over which it is partial
COLLECTIVES = {(2, "sequence_parallel"): 3, (2, "odd"): 2, (4, "odd"): 3}


@pytest.fixture(scope="module")
def two() -> Answers:
    return ranks.run(cases.two, 2)


@pytest.fixture(scope="module")
def four() -> Answers:
    return ranks.run(cases.four, 4)


@pytest.fixture
def case(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """What each rank says of one case."""
    world, name = request.param
    return [answer[name] for answer in request.getfixturevalue({2: "two", 4: "four"}[world])]


def every(*names: tuple[int, str]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", names, indirect=True, ids=[f"{name}-{world}" for world, name in names])


@every(*CASES)
def test_norms_are_those_of_the_whole(case: list[dict[str, Any]]) -> None:
    for rank in case:
        assert rank["sharded"]
        assert rank["norms"] == pytest.approx(rank["expected"], rel=1e-6)
        assert rank["weights"] == pytest.approx(rank["expected_weights"], rel=1e-6)
        assert rank["doubled"] == pytest.approx([2 * weight for weight in rank["expected_weights"]], rel=1e-6)


@every(*CASES, (2, "nan"), (2, "nan_in_one_copy"))
def test_ranks_agree_bit_for_bit(case: list[dict[str, Any]]) -> None:
    for rank in case:
        for key in ("norms", "weights", "doubled", "present", "numel"):
            assert str(rank[key]) == str(case[0][key])
        assert str(rank["norms_again"]) == str(rank["norms"])
        assert rank["present_again"] == rank["present"]


@pytest.mark.parametrize(("world", "name"), CASES)
def test_one_collective_for_all_norms(world: int, name: str, request: pytest.FixtureRequest) -> None:
    for answer in request.getfixturevalue({2: "two", 4: "four"}[world]):
        rank = answer[name]
        assert rank["collectives"] == rank["collectives_again"] == COLLECTIVES.get((world, name), 1)
        assert rank["weight_collectives"] == 1
        assert rank["setup"] == (name in FLAT)
        assert rank["host_reads"] == 0


@every(*CASES)
def test_sizes_are_those_of_the_whole(case: list[dict[str, Any]]) -> None:
    for rank in case:
        assert rank["numel"] == rank["true_numel"]


def test_nothing_sharded_needs_nothing(two: Answers) -> None:
    for rank in two:
        assert not rank["plain"]["sharded"]
        assert rank["plain"]["setup"] == 0
        assert not any(rank["plain"]["split"])


def test_the_cases_are_what_they_claim(two: Answers, four: Answers) -> None:
    assert two[1]["fsdp2"]["empty_here"][-1]
    assert not two[0]["fsdp2"]["empty_here"][-1]
    assert {*two[0]["tensor_parallel"]["split"]} == {True, False}
    assert two[0]["sequence_parallel"]["partial"] == 2
    assert [rank["fsdp1"]["none_here"][1] for rank in two] == [False, True]
    assert [rank["fsdp1_one_rank"]["none_here"] for rank in two] == [[False], [True]]
    assert all(two[0]["fsdp1"]["flat"])
    assert not any(two[0]["fsdp2"]["flat"])
    assert any("_StridedShard" in placements for placements in four[0]["fsdp2_tp"]["placements"])
    assert two[0]["odd"]["late"] == "AsyncCollectiveTensor"
    assert two[0]["odd"]["types"] == ["Tensor"] * 5


@every((2, "fsdp2"), (2, "tensor_parallel"), (4, "hsdp"), (4, "copies"), (4, "fsdp2_tp"))
def test_a_parameter_nobody_uses_has_no_gradient(case: list[dict[str, Any]]) -> None:
    for rank in case:
        assert rank["present"] == [name != "unused" for name in rank["names"]]
        assert rank["norms"][rank["names"].index("unused")] == 0.0


@every((2, "fsdp1"), (2, "fsdp1_one_rank"), (4, "fsdp1_hybrid"))
def test_a_gradient_of_any_rank_is_there_for_all(case: list[dict[str, Any]]) -> None:
    assert any(any(rank["none_here"]) for rank in case)
    for rank in case:
        assert all(rank["present"])


@every((2, "nan"))
def test_nan_and_inf_of_one_rank_reach_all(case: list[dict[str, Any]]) -> None:
    for rank in case:
        found = dict(zip(rank["names"], rank["norms"], strict=True))
        assert math.isnan(found.pop("down.weight"))
        assert found.pop("norm.bias") == math.inf
        assert all(math.isfinite(norm) for norm in found.values())


@every((2, "nan_in_one_copy"))
def test_nan_in_one_copy_reaches_all(case: list[dict[str, Any]]) -> None:
    for rank in case:
        bad = [name for name, norm in zip(rank["names"], rank["norms"], strict=True) if not math.isfinite(norm)]
        assert bad == ["head.weight"]


@every((2, "sequence_parallel"))
def test_partial_gradients_are_measured_not_changed(case: list[dict[str, Any]]) -> None:
    for rank in case:
        assert rank["untouched"]
        assert rank["reduced"] == [name.startswith("norm") for name in rank["names"]]
        assert rank["of_sums"] == rank["of_parts"] == rank["norms"]
        assert rank["scaled"] == pytest.approx([3 * norm for norm in rank["norms"]], rel=1e-12)


@every((2, "comes_and_goes"))
def test_what_is_remembered_follows_the_gradients(case: list[dict[str, Any]]) -> None:
    for rank in case:
        (whole, _), (without, present), full, again = rank["seen"]
        assert without == [norm if slot != 3 else 0.0 for slot, norm in enumerate(whole)]
        assert present == [slot not in (0, 3) for slot in range(len(whole))]
        assert again == rank["seen"][1]
        assert full == rank["seen"][0]  # slot 0, which nobody uses, was missing anyway


@every((2, "lost_wrapper"))
def test_flat_shards_without_their_wrapper_are_refused(case: list[dict[str, Any]]) -> None:
    for rank in case:
        assert "outermost model" in rank["error"]


# --- one process ---


def test_a_plain_tensor_is_its_own_whole() -> None:
    layer = nn.Linear(3, 2)
    assert local(layer.weight) is layer.weight
    assert reduced(layer.weight) is layer.weight
    assert not any(kind(layer.weight) for kind in (is_sharded, is_partial, is_flat))
    assert Sharding.of(layer, list(layer.parameters())) is None
    assert Sharding.of(layer, []) is None


def test_no_gradient_at_all() -> None:
    layer = nn.Linear(3, 2)
    whole, present = Sharding(layer, list(layer.parameters())).reduce_gradients(torch.zeros(0), [None, None])
    assert whole.tolist() == [0.0, 0.0]
    assert present.tolist() == [False, False]


def test_without_torch_distributed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharding, "distributed", SimpleNamespace(is_available=lambda: False))
    layer = nn.Linear(3, 2)
    assert Sharding(layer, list(layer.parameters())).reduce(torch.ones(2))[0].tolist() == [1.0, 1.0]


def test_the_collective_runs_where_the_backend_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients offloaded to the CPU, and a process group that serves another device only."""
    seen: list[str] = []
    fake = SimpleNamespace(
        is_available=lambda: True,
        group=SimpleNamespace(WORLD=SimpleNamespace(_device_types=[torch.device("meta")])),
        all_reduce=lambda values: seen.append(values.device.type),
    )
    monkeypatch.setattr(sharding, "distributed", fake)
    with FakeTensorMode():
        assert sum_over_ranks(torch.ones(2)).device.type == "cpu"
    assert seen == ["meta"]


# --- the launcher ---


def fails_on_the_last() -> None:
    if distributed.get_rank() == 1:
        raise ArithmeticError("rank one cannot count")
    distributed.barrier()


def test_a_failed_rank_is_shown_and_the_others_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "GRACE", 0.5)
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"fails_on_the_last failed(.|\n)*rank 1(.|\n)*rank one cannot count"):
        ranks.run(fails_on_the_last, 2)
    assert time.monotonic() - start < 60
