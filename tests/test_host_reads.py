"""No host read off the logging cadence, one on it, whatever the number of layers."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from conftest import Classifier, batches, mlp, trainer
from counting import host_reads
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from lightning_gradhealth import GradHealth, GradientMonitor, HealthSession

EVERY = 4


class CountReads(pl.Callback):
    """Counts the host reads of each batch, from its start to after the other callbacks' `on_train_batch_end`."""

    def __init__(self) -> None:
        self.per_step: list[int] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self._context = host_reads()
        self._reads = self._context.__enter__()

    def on_train_batch_end(self, *_: Any) -> None:
        self._context.__exit__(None, None, None)
        self.per_step.append(self._reads.count)


def reads_per_step(depth: int, optimizer: type[torch.optim.Optimizer], *callbacks: pl.Callback) -> list[int]:
    torch.manual_seed(0)
    counter = CountReads()
    model = Classifier(mlp(depth), optimizer, lr=0.01)
    trainer(*callbacks, counter, max_steps=12, log_every_n_steps=EVERY).fit(model, batches())
    return counter.per_step


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("depth", [2, 40])
def test_none_off_the_cadence_and_one_on_it(depth: int, optimizer: type[torch.optim.Optimizer]) -> None:
    bare = reads_per_step(depth, optimizer)
    watched = reads_per_step(depth, optimizer, GradHealth())
    extra = [with_ - without for with_, without in zip(watched, bare, strict=True)]
    assert extra == [1 if (step + 1) % EVERY == 0 else 0 for step in range(12)]


def test_the_counter_counts() -> None:
    with host_reads() as reads:
        x = torch.ones(3)
        x.sum().item()
        bool(x[0] > 0)
        x.tolist()
    assert reads.count == 3


def fake_model(mode: FakeTensorMode) -> nn.Module:
    """Embedding, large and small layers, in memory that does not exist."""
    model = nn.Sequential(nn.Embedding(500, 64), nn.Linear(64, 2000), nn.LayerNorm(2000), nn.Linear(2000, 3))
    with mode:
        for module in model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                fake = nn.Parameter(torch.empty(parameter.shape, device="cuda"))
                fake.grad = torch.empty(parameter.shape, device="cuda")
                setattr(module, name, fake)
    return model


def test_observe_and_apply_on_fake_cuda_tensors_read_nothing() -> None:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    model = fake_model(mode)
    with mode:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        monitor, session = GradientMonitor(model, clip="adaptive"), HealthSession(model, probe_every_n_steps=2)
        for _ in range(4):
            for watcher in (session, monitor):
                decision = watcher.observe(optimizer)
                watcher.apply(decision)
                assert decision.norms.device.type == "cuda"
            session.add_loss(torch.ones((), device="cuda"))
            with pytest.raises(DataDependentOutputException):
                decision.total_norm.item()  # a read does raise here
        with pytest.raises(DataDependentOutputException):
            decision.action  # noqa: B018
    assert all(isinstance(vector, Tensor) and vector.device.type == "cuda" for vector in session.monitor.pending())


def test_updates_on_fake_cuda_tensors_read_nothing() -> None:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    model = fake_model(mode)
    with mode:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        session = HealthSession(model)
        session.observe(optimizer)
        session.monitor.updates._after_step(0, False, optimizer)
        assert len(session.monitor.rows[0].vectors()) == 5  # norms before and after clipping, weights, samples, updates


def test_the_device_vector_is_one_and_short() -> None:
    model = mlp(30)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(2, 8)).sum().backward()
    monitor = GradientMonitor(model)
    monitor.observe(optimizer)
    (vector,) = monitor.pending()
    assert vector.shape == (60,)
