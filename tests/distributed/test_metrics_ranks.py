"""Metrics over two ranks give what one process gives that has all samples, and the whole gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import distributed, nn

if not (distributed.is_available() and distributed.is_gloo_available()):
    pytest.skip("needs torch.distributed with gloo", allow_module_level=True)

import metric_cases
import ranks

from lightning_gradhealth.metrics import DeadUnitFraction

Answers = list[metric_cases.Answer]


@pytest.fixture(scope="module")
def two() -> Answers:
    return ranks.run(metric_cases.two, 2)


def in_one_process(*of_ranks: int, more: bool = False) -> dict[str, float]:
    metrics = metric_cases.metrics()
    for rank in of_ranks:
        for part in [*metric_cases.parts(rank), *(metric_cases.parts(rank)[:1] if more else [])]:
            metric_cases.give(metrics, part)
    return metric_cases.results(metrics)


def test_uneven_numbers_of_samples(two: Answers) -> None:
    for rank, answer in enumerate(two):
        assert answer["uneven"]["first"] == pytest.approx(in_one_process(0, 1), rel=1e-12)
        assert answer["uneven"]["again"] == answer["uneven"]["first"]
        assert answer["uneven"]["more"] == pytest.approx(in_one_process(0, 1, more=True), rel=1e-12)
        assert answer["uneven"]["local"] == pytest.approx(in_one_process(rank), rel=1e-12)


def test_a_unit_is_dead_only_if_it_is_so_on_all_ranks(two: Answers) -> None:
    assert [answer["uneven"]["local"]["dead"] for answer in two] == [4 / 12, 2 / 12]
    assert [answer["uneven"]["first"]["dead"] for answer in two] == [2 / 12, 2 / 12]


def test_a_rank_that_has_seen_nothing(two: Answers) -> None:
    for answer in two:
        assert answer["one_rank"] == pytest.approx(in_one_process(1), rel=1e-12)
        assert all(math.isnan(value) for value in answer["nowhere"].values())


def test_synchronised_at_every_call(two: Answers) -> None:
    expected = []
    for update in (0, 1):
        metric = DeadUnitFraction()
        for rank in (0, 1):
            metric.update(metric_cases.parts(rank)[update].relu())
        expected.append(metric.compute().item())
    for answer in two:
        assert answer["calls"] == {"steps": expected, "all": in_one_process(0, 1)["dead"]}


def test_other_layers_on_other_ranks_are_refused(two: Answers) -> None:
    for answer in two:
        assert "layers of different sizes (states of [4, 5] elements); give it the same layer" in answer["mismatch"]


@pytest.mark.parametrize("way", ["ddp", "fsdp2", "fsdp1", "sequence_parallel"])
def test_gradients_are_those_of_the_whole(two: Answers, way: str) -> None:
    expected = metric_cases.expected_gradients()
    for answer in two:
        found: dict[str, Any] = answer[way]
        assert found["names"] == expected["names"]
        for name in ("mean", "greatest", "ratios", "smallest"):
            assert found[name] == pytest.approx(expected[name], rel=1e-6), name
        if way == "fsdp1":  # flat shards do not know which wrapper they belong to
            assert "give the outermost model" in found["of_parameters"]
        else:
            assert found["of_parameters"] == pytest.approx(expected["of_parameters"], rel=1e-6)


def test_gradients_that_are_not_reduced_yet(two: Answers) -> None:
    assert [answer["apart"] for answer in two] == [7.5, 7.5]


def test_logged_in_a_fit(two: Answers) -> None:
    x = metric_cases.samples()
    layer = nn.Linear(metric_cases.UNITS, metric_cases.UNITS).double()
    with torch.no_grad():
        layer.weight.copy_(torch.eye(metric_cases.UNITS))
        layer.bias.zero_()
    layer(x).relu().square().mean().backward()
    norm = math.hypot(layer.weight.grad.norm().item(), layer.bias.grad.norm().item())
    for answer in two:
        assert answer["fit"] == pytest.approx({"dead": 2 / 12, "norm": norm}, rel=1e-6)
