"""Weights whose outputs are multiplied with other signals and summed: made weights, dot products."""

from __future__ import annotations

import math

import pytest
import torch
from calls import Calls
from torch import nn
from torch.nn import functional as F

from lightning_gradhealth.init import init_weights

SIZE, WIDTH = 16, 32


def net(outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, outputs))


def linear(self, x, task):
    return torch.bmm(x, self.a(task).view(-1, SIZE, WIDTH))


def two_layers(self, x, task):
    first, second = self.a(task).chunk(2, 1)
    return torch.bmm(torch.bmm(x, first.view(-1, SIZE, WIDTH)).relu(), second.view(-1, WIDTH, SIZE))


def summed_by_hand(self, x, task):
    return (x[..., None] * self.a(task).view(-1, 1, SIZE, WIDTH)).sum(2)


def filters(self, x, task):
    images = x.view(1, -1, 4, 4)  # a group for each sample
    return F.conv2d(images, self.a(task).view(-1, 4, 3, 3), groups=len(x))


def towers(self, x, task):
    return self.a(task) @ self.b(x).mT


def pairs(self, x, task):
    return (self.a(task)[:, None] * self.b(x)).sum(-1)


MADE = {
    linear: (SIZE * WIDTH, SIZE**-0.5),
    two_layers: (2 * SIZE * WIDTH, (2 / SIZE / WIDTH) ** 0.25),
    summed_by_hand: (SIZE * WIDTH, SIZE**-0.5),
    filters: (8 * 4 * 9, 1 / 6),
    pairs: (WIDTH, WIDTH**-0.25),
}


@pytest.mark.parametrize("forward", MADE, ids=lambda forward: forward.__name__)
def test_what_is_made_has_the_variance_that_its_own_fan_gives(forward):
    outputs, std = MADE[forward]
    torch.manual_seed(0)
    model = Calls(forward, a=net(outputs), b=nn.Linear(SIZE, WIDTH))
    if forward is not pairs:
        del model.b
    x, task = torch.randn(64, 4, SIZE), torch.randn(64, 6)
    report = init_weights(model, (x, task), seed=0)
    with torch.no_grad():
        made, output = model.a(task), model(x, task)
    assert float(made.std()) == pytest.approx(std, rel=0.2)
    assert 0.6 < float(output.std()) < 1.6
    entry = next(entry for entry in report.entries if entry.name == "a.2.weight")
    assert "factors of products" in entry.note


@pytest.mark.parametrize("behind", [False, True], ids=["at the end", "before another layer"])
def test_the_signal_behind_a_made_layer_is_as_behind_any_other(behind):
    torch.manual_seed(0)
    model = Calls(
        lambda self, x, task: self.b(linear(self, x, task).relu()) if behind else linear(self, x, task),
        a=net(SIZE * WIDTH),
        b=nn.Linear(WIDTH, 8),
    )
    init_weights(model, (torch.randn(64, 4, SIZE), torch.randn(64, 6)), seed=0, on_uncovered="ignore")
    with torch.no_grad():
        hidden = linear(model, torch.randn(256, 4, SIZE), torch.randn(256, 6))
    assert 0.6 < float(hidden.std()) < 2


def attention(self, x, task):
    scores = self.a(x) @ self.b(x).mT / math.sqrt(WIDTH)
    return scores.softmax(-1) @ self.c(x)


def gate(self, x, task):
    return self.a(x) * self.b(x)


def graph(self, x, task):
    return torch.bmm(task[:, :4, None] * task[:, None, :4], self.a(x))


@pytest.mark.parametrize("forward", [attention, gate, graph], ids=lambda forward: forward.__name__)
def test_what_mixes_positions_or_sums_nothing_is_as_before(forward):
    model = Calls(forward, a=nn.Linear(SIZE, WIDTH), b=nn.Linear(SIZE, WIDTH), c=nn.Linear(SIZE, WIDTH))
    report = init_weights(model, (torch.randn(8, 4, SIZE), torch.randn(8, 6)), seed=0, on_uncovered="ignore")
    assert not any("factors of products" in entry.note for entry in report.entries)
    assert float(model.a.weight.detach().std()) == pytest.approx(SIZE**-0.5, rel=0.1)
