"""Every scenario of the clinic: the label holds by the twin's numbers, and GradHealth finds it by its own.

One training each; CLINIC_SEEDS=3 makes it three.
"""

from __future__ import annotations

import os

import pytest
from catalogue import ALL
from clinic import CONDITIONS, Scenario, examine, judge
from twin import SIGNS, doubts, watched

SEEDS = range(int(os.environ.get("CLINIC_SEEDS", "1")))
each = pytest.mark.parametrize("case", ALL, ids=lambda case: case.name)


@pytest.mark.parametrize("seed", SEEDS)
@each
def test_label_is_borne_out_by_the_twin(case: Scenario, seed: int) -> None:
    assert doubts(case, watched(case.name, seed)) == []


@pytest.mark.parametrize("seed", SEEDS)
@each
def test_report_agrees_with_the_label(case: Scenario, seed: int) -> None:
    report = examine(case, seed)
    assert judge(case, report).complaints == []
    assert case.must or report.healthy


def test_every_condition_has_a_twin_and_a_scenario() -> None:
    assert set(SIGNS) == CONDITIONS
    assert {name for case in ALL for wanted in case.must for name in wanted.conditions} == CONDITIONS
