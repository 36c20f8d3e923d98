"""Every remedy that comes as code is carried out on the training it was given for, and that is better for it.

The code is taken from the finding and run on a fresh copy, before the first step.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from catalogue import CATALOGUE
from clinic import Scenario
from conftest import trainer

from lightning_gradhealth import Finding, GradHealth, HealthReport, Severity

# the training, the finding whose code is carried out, and a word that the code must have: which of the cures it is
CASES = [
    ("linear 0.5*I, 20 layers", "vanishing_gradients", "init_weights"),
    ("linear 0.5*I, 20 layers", "vanishing_activations", "init_weights"),
    ("linear 1.2*I, 60 layers", "exploding_gradients", "init_weights"),
    ("linear 1.2*I, 60 layers", "exploding_activations", "init_weights"),
    ("sigmoid MLP of 10 layers", "vanishing_gradients", "nn.ReLU()"),
    ("rate 1e3 with Adam", "oversized_updates", '"lr"'),
    ("post-LN transformer at a high rate", "oversized_updates", '"lr"'),
    ("CNN with BatchNorm at rate 30", "dead_units", '"lr"'),
    ("rate 1e-9", "stalled_layers", '"lr"'),
    ("lower layers at rate 0", "stalled_layers", '"lr"'),
    ("weight decay far too high", "collapsing_weights", '"weight_decay"'),
    ("weight decay of AdamW far too high", "collapsing_weights", '"weight_decay"'),
    ("weight decay far too high", "vanishing_gradients", '"weight_decay"'),
    ("one NaN batch", "non_finite", "on_non_finite"),
    ("one Inf target", "non_finite", "on_non_finite"),
    ("log(0) inside one layer", "non_finite", "on_non_finite"),
    ("one batch x 1000", "exploding_gradients", "adaptive"),
    ("dead behind BatchNorm", "dead_units", "bias"),
    ("a layer dies in the course of training", "dead_units", "LeakyReLU"),
    ("sigmoid gates shut by their biases", "saturated_units", "bias"),
    ("hardtanh beyond its limits", "saturated_units", "init_weights"),
    ("attention collapsed: logits x 300", "saturated_units", "init_weights"),
    ("detector at eight times the rate", "oversized_updates", '"lr"'),
    ("detector at eight times the rate", "dead_units", '"lr"'),
    ("detector at eight times the rate", "vanishing_gradients", '"lr"'),
    ("one-cycle schedule up to a rate of 30", "oversized_updates", "step_pre_hook"),
    ("one-cycle schedule up to a rate of 30", "exploding_gradients", "step_pre_hook"),
    ("warm-up to a rate of 10 with Adam", "oversized_updates", "step_pre_hook"),
    ("warm-up to a rate of 10 with Adam", "dead_units", "step_pre_hook"),
    ("decay of SGD kills units", "dead_units", '"weight_decay"'),
    ("decay of SGD kills units", "vanishing_gradients", '"weight_decay"'),
    ("decay inside Adam kills units", "dead_units", '"weight_decay"'),
    ("bootstrapped targets that run away", "growing_weights", '"lr"'),
    ("bootstrapped targets that run away", "loss_spike", '"lr"'),
]


@dataclass
class Run:
    """What became of a training."""

    report: HealthReport
    losses: list[float]

    @property
    def end(self) -> float:
        """The mean of the last losses; infinite where one of them is not finite."""
        tail = self.losses[-20:]
        return sum(tail) / len(tail) if all(map(math.isfinite, tail)) else math.inf

    def finding(self, condition: str) -> Finding:
        (found,) = [finding for finding in self.report.findings if finding.condition == condition]
        return found


class Losses(pl.Callback):
    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, *args: Any) -> None:
        outputs = args[2]
        self.values.append(float(outputs["loss"] if isinstance(outputs, dict) else outputs))


def train(case: Scenario, code: str = "") -> Run:
    """A training of the clinic, on which code was run before the first step."""
    module, loader = case.make(0)
    options = {"log_every_n_steps": 10, "max_epochs": -1, "max_steps": case.steps, **case.options}
    configured, health_arguments = module.configure_optimizers(), {}
    optimizer = configured["optimizer"] if isinstance(configured, dict) else configured  # and its schedule is made
    names = {"model": module, "optimizer": optimizer, "batch": next(iter(loader))}  # what else it needs, it imports
    torch.manual_seed(0)
    exec(code, {**names, "trainer_arguments": options, "health_arguments": health_arguments})
    module.configure_optimizers = lambda: configured
    health, losses = GradHealth(**health_arguments), Losses()
    torch.manual_seed(0)
    trainer(health, losses, **options).fit(module, loader)
    return Run(health.report(), losses.values)


@functools.cache
def sick(name: str) -> Run:
    return train(CATALOGUE[name])


@pytest.mark.parametrize(("name", "condition", "word"), CASES, ids=[f"{name}: {what}" for name, what, _ in CASES])
def test_code_heals(name: str, condition: str, word: str) -> None:
    before = sick(name)
    finding = before.finding(condition)
    assert word in finding.code
    assert len(finding.code.splitlines()) <= 3
    after = train(CATALOGUE[name], finding.code)
    left = {str(f.condition) for f in after.report.findings if f.severity is not Severity.INFO}
    assert left <= set(map(str, before.report.conditions))  # nothing new
    if condition == "non_finite":  # the bad batch is still there; it does no harm any more
        assert math.isinf(before.end)
        assert math.isfinite(after.end)
        assert after.finding(condition).severity is Severity.WARNING
    else:
        assert condition not in left or after.end < 0.5 * before.end
        assert math.isfinite(after.end)


def test_code_is_of_many_kinds() -> None:
    assert len({condition for _, condition, _ in CASES}) >= 12
