"""Weight norms and sampled updates against the exact ones."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lightning_gradhealth import Condition, HealthSession, LayerStats
from lightning_gradhealth.gradients.weights import SAMPLE, sample_indices


def stats(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: torch.Tensor) -> dict[str, LayerStats]:
    """One step of `model`, probed."""
    session = HealthSession(model, probe_every_n_steps=1)
    optimizer.zero_grad()
    model(inputs).square().mean().backward()
    session.apply(session.observe(optimizer))
    optimizer.step()
    return {layer.name: layer for layer in session.flush().layers}


def test_sample_is_fixed_unique_and_spread() -> None:
    state = torch.get_rng_state()
    indices = sample_indices(1_000_003)
    assert torch.equal(indices, sample_indices(1_000_003))
    assert torch.equal(state, torch.get_rng_state())
    assert len(set(indices.tolist())) == SAMPLE
    assert indices.min() < 1_000
    assert 999_000 < indices.max() < 1_000_003
    assert len(set((indices % 1000).tolist())) > 500  # not one column of a matrix over and over


def test_small_layers_are_exact() -> None:
    model = nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 2))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    got = stats(model, torch.optim.SGD(model.parameters(), lr=0.3), torch.randn(5, 7))
    after = list(model.parameters())
    for name, pair in (("0", (0, 1)), ("2", (2, 3))):
        weight = math.hypot(*(before[i].double().norm() for i in pair))
        update = math.hypot(*((after[i].detach() - before[i]).double().norm() for i in pair))
        gradient = math.hypot(*(after[i].grad.double().norm() for i in pair))  # type: ignore[union-attr]
        assert got[name].weight_norm == pytest.approx(weight, rel=1e-6)
        assert got[name].update_to_weight == pytest.approx(update / weight, rel=1e-5)
        assert got[name].grad_to_weight == pytest.approx(gradient / weight, rel=1e-6)


def test_large_layers_are_estimated_from_the_sample() -> None:
    model = nn.Linear(600, 500)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    got = stats(model, torch.optim.Adam(model.parameters(), lr=0.01), torch.randn(5, 600))["Linear"]
    update = math.hypot(*((new.detach() - old).norm() for new, old in zip(model.parameters(), before, strict=True)))
    weight = math.hypot(*(old.norm() for old in before))
    assert got.update_to_weight == pytest.approx(update / weight, rel=0.1)
    assert got.weight_norm == pytest.approx(weight, rel=1e-6)


@pytest.mark.parametrize("sparse", [False, True])
def test_only_touched_rows_of_an_embedding_count(sparse: bool) -> None:
    model = nn.Embedding(5_000, 16, sparse=sparse)
    rows = torch.tensor([3, 3, 4_000])
    before = model.weight.detach().clone()
    got = stats(model, torch.optim.SGD(model.parameters(), lr=100.0), rows)["Embedding"]
    touched = before[[3, 4_000]]
    moved = model.weight.detach()[[3, 4_000]] - touched
    assert got.update_to_weight == pytest.approx((moved.norm() / touched.norm()).item(), rel=1e-5)


def test_zero_weights_have_no_ratio() -> None:
    model = nn.Linear(3, 2, bias=False)
    nn.init.zeros_(model.weight)
    got = stats(model, torch.optim.SGD(model.parameters(), lr=0.1), torch.randn(4, 3))["Linear"]
    assert got.weight_norm == 0.0
    assert got.update_to_weight is None
    assert got.grad_to_weight is None


def test_a_step_that_never_comes_leaves_the_update_open() -> None:
    model = nn.Linear(3, 2)
    session = HealthSession(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(4, 3)).sum().backward()
    session.observe(optimizer)
    assert session.flush().layers[0].update_to_weight is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.complex64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    weight = nn.Parameter(torch.randn(40, 50, dtype=dtype))
    model = nn.Module()
    model.register_parameter("weight", weight)
    session, optimizer = HealthSession(model), torch.optim.SGD([weight], lr=0.5)
    weight.grad = torch.ones_like(weight)
    before = weight.detach().clone()
    session.observe(optimizer)
    optimizer.step()
    got = session.flush().layers[0]
    assert got.grad_norm == pytest.approx(math.sqrt(2000), rel=1e-6)
    exact = (weight.detach() - before).norm().item() / before.norm().item()
    assert got.update_to_weight == pytest.approx(exact, rel=0.1)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("seed", range(9))
def test_a_single_linear_layer_at_a_good_rate_takes_no_oversized_steps(
    kind: type[torch.optim.Optimizer], seed: int
) -> None:
    """With one layer, half of the layers is that one."""
    torch.manual_seed(seed)
    net = torch.nn.Linear(16, 4)
    optimizer = kind(net.parameters(), lr=0.1 if kind is torch.optim.SGD else 0.01)
    session = HealthSession(net, probe_every_n_steps=10, announce=lambda line: None)
    teacher = torch.randn(16, 4) / 4
    losses = []
    for _ in range(150):
        x = torch.randn(32, 16)
        loss = (net(x) - x @ teacher).square().mean()
        optimizer.zero_grad()
        loss.backward()
        session.apply(session.observe(optimizer, loss))
        optimizer.step()
        losses.append(loss.item())
    session.flush()
    assert losses[-1] < 0.2 * losses[0]
    assert Condition.OVERSIZED_UPDATES not in session.report().conditions
