"""The defaults never change training: weights, losses and random state are bit for bit those without the callback."""

from __future__ import annotations

import functools
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from conftest import Classifier, batches, trainer
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn

from lightning_gradhealth import GradHealth

STEPS = 50


class Recorded(Classifier):
    """Keeps every loss."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.losses: list[Tensor] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.losses.append(loss.detach().clone())
        return loss


class TwoOptimizers(Recorded):
    """Manual optimization of two halves in turn."""

    def __init__(self) -> None:
        super().__init__(noisy_net())
        self.automatic_optimization = False
        self.critic = nn.Linear(3, 1)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        first, second = self.optimizers()
        loss = Recorded.training_step(self, batch, batch_idx)
        first.zero_grad()
        self.manual_backward(loss)
        first.step()
        second.zero_grad()
        score = self.critic(self.net(batch[0]).detach()).square().mean()
        self.manual_backward(score)
        second.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.Adam(self.net.parameters()), torch.optim.SGD(self.critic.parameters(), lr=0.1)]


def noisy_net() -> nn.Module:
    return nn.Sequential(
        nn.Linear(8, 300),
        nn.BatchNorm1d(300),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Linear(300, 300),
        nn.Tanh(),
        nn.Linear(300, 3),
    )


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "dropout and batch norm": (lambda: Recorded(noisy_net(), torch.optim.AdamW, lr=1e-3), {}),
    "momentum": (lambda: Recorded(noisy_net(), lr=0.002, momentum=0.9), {}),
    "accumulation": (lambda: Recorded(noisy_net()), {"accumulate_grad_batches": 3}),
    "two optimizers": (TwoOptimizers, {}),
    "bf16-mixed": (lambda: Recorded(noisy_net()), {"precision": "bf16-mixed"}),
    "bf16-true": (lambda: Recorded(noisy_net()), {"precision": "bf16-true"}),
    "fused": (lambda: Recorded(noisy_net(), torch.optim.AdamW, lr=1e-3, fused=True), {}),
    "fused momentum": (lambda: Recorded(noisy_net(), lr=0.002, momentum=0.9, fused=True), {}),
    "fused in bf16-mixed": (
        lambda: Recorded(noisy_net(), torch.optim.Adam, lr=1e-3, fused=True),
        {"precision": "bf16-mixed"},
    ),
    "64-true": (lambda: Recorded(noisy_net()), {"precision": "64-true"}),
    "fp16 with a scaler": (lambda: Recorded(noisy_net()), {"plugins": "scaler"}),
    "fused under a scaler": (
        lambda: Recorded(noisy_net(), torch.optim.AdamW, lr=1e-3, fused=True),
        {"plugins": "scaler"},
    ),
    "Trainer clips": (lambda: Recorded(noisy_net()), {"gradient_clip_val": 0.1}),
    "LBFGS": (lambda: Recorded(noisy_net(), torch.optim.LBFGS, lr=0.1, max_iter=3), {}),
    "every step probed and logged": (lambda: Recorded(noisy_net()), {"log_every_n_steps": 1}),
}


def run(case: str, *callbacks: pl.Callback) -> tuple[dict[str, Tensor], list[Tensor], Tensor]:
    make, options = CASES[case]
    if options.get("plugins") == "scaler":
        options = {**options, "plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))]}
    torch.manual_seed(3)
    model = make()
    steps = STEPS * (2 if case == "two optimizers" else 1)
    trainer(*callbacks, max_steps=steps, **options).fit(model, batches(shuffle=True))
    return {k: v.clone() for k, v in model.state_dict().items()}, model.losses, torch.get_rng_state()


@functools.cache
def bare(case: str) -> tuple[dict[str, Tensor], list[Tensor], Tensor]:
    return run(case)


RESPONSES: dict[str, dict[str, Any]] = {
    "watched": {},
    "ready to skip": {"on_non_finite": "skip"},
    "ready to raise": {"on_non_finite": "raise"},
    "ready to clip": {"clip": "adaptive"},
    "ready for all": {"clip": "adaptive", "on_non_finite": "stop", "stop_on": "exploding_gradients"},
}


@pytest.mark.parametrize("response", RESPONSES)
@pytest.mark.parametrize("case", CASES)
def test_bit_for_bit(case: str, response: str) -> None:
    if (case, response) == ("LBFGS", "ready to skip"):
        pytest.skip("refused, see test_non_finite.py")
    health = GradHealth(**RESPONSES[response])
    weights, losses, random_state = bare(case)
    weights_seen, losses_seen, random_state_seen = run(case, health)
    report = health.report()
    assert report.steps >= STEPS
    assert not report.aside
    assert report.clipped_steps == report.skipped_steps == 0
    assert "adaptive_clipping" not in {finding.condition for finding in report.findings}
    assert len(losses) == len(losses_seen) >= STEPS
    assert all(torch.equal(a, b) for a, b in zip(losses, losses_seen, strict=True))
    assert weights.keys() == weights_seen.keys()
    assert all(torch.equal(weights[name], weights_seen[name]) for name in weights)
    assert torch.equal(random_state, random_state_seen)
