"""Frozen copies of what is trained stay copies of it: teachers, target networks, references."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from lightning_gradhealth.init import init_weights, plan_init


class Pair(nn.Module):
    """A student with a bias that has values, and a frozen copy of it, moved by forward or not."""

    def __init__(self, moved: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.student = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 6))
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.moved = moved

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            if self.moved:
                for slow, fast in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                    slow.mul_(0.9).add_(fast, alpha=0.1)
            aim = self.teacher(x)
        return self.student(x) - aim


def alike(model: Pair) -> bool:
    return all(map(torch.equal, model.student.parameters(), model.teacher.parameters()))


@pytest.mark.parametrize("moved", [True, False])
@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"scheme": "he"},
        {"calibrate": torch.randn(64, 6, generator=torch.Generator().manual_seed(0))},
        {"overrides": {r"student\.0\.weight": {"std": 0.3}, r"student\.3\.bias": {"value": 0.5}}},
        {"overrides": {r"student\.3\.weight": "skip"}},
    ],
    ids=lambda asked: "+".join(asked) or "plain",
)
def test_a_teacher_gets_the_numbers_of_its_student(moved, asked):
    model = Pair(moved)
    before = model.student[0].weight.detach().clone()
    report = init_weights(model, torch.randn(16, 6), seed=0, **asked)
    assert alike(model)
    assert not torch.equal(model.student[0].weight, before)
    entry = next(entry for entry in report.entries if entry.name == "teacher.0.weight")
    assert (entry.rule, entry.note) == ("copy", "a frozen copy of student.0.weight, and so still")
    assert not any(parameter.requires_grad for parameter in model.teacher.parameters())


def test_a_bound_plan_gives_the_same_to_both():
    model = Pair()
    plan_init(model, scheme="he", seed=0).bind()
    for part in (*model.student, *model.teacher):
        getattr(part, "reset_parameters", lambda: None)()
    other = Pair()
    init_weights(other, scheme="he", seed=0)
    assert torch.equal(model.teacher[0].weight, model.student[0].weight)
    assert torch.equal(model.teacher[0].weight, other.teacher[0].weight)


@pytest.mark.parametrize("kind", ["one layer is another", "one number is another", "skipped", "_no_reinit"])
def test_what_is_more_than_a_copy_stays_as_it_is(kind):
    model, asked = Pair(moved=False), {}
    if kind == "one layer is another":  # as a pretrained net, the first half of which was copied to be trained
        model.teacher[3].reset_parameters()
    elif kind == "one number is another":
        model.teacher[0].bias[2] += 1e-3
    elif kind == "skipped":
        asked = {"skip": r"teacher\..*"}
    else:
        for parameter in model.teacher.parameters():
            parameter._no_reinit = True
    before = [parameter.clone() for parameter in model.teacher.parameters()]
    report = init_weights(model, torch.randn(16, 6), seed=0, **asked)
    assert all(map(torch.equal, before, model.teacher.parameters()))
    assert not any(entry.rule == "copy" for entry in report.entries)
