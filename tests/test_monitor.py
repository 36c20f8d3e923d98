"""GradientMonitor: optimizers, groups, missing gradients, scalers, windows, state."""

from __future__ import annotations

import io
import math

import pytest
import reference
import torch
from conftest import mlp
from torch import nn
from torch.amp import GradScaler

from lightning_gradhealth import GradientMonitor, HealthSession, NormClip


def backward(model: nn.Module, scale: float = 1.0) -> None:
    (model(torch.randn(4, 8)).square().sum() * scale).backward()


def test_each_optimizer_sees_only_its_own_parameters() -> None:
    model = nn.ModuleDict({"g": mlp(), "d": mlp()})
    first = torch.optim.SGD(model["g"].parameters(), lr=0.1)
    second = torch.optim.SGD(
        [{"params": model["d"][0].parameters(), "lr": 0.5}, {"params": model["d"][2:].parameters()}], lr=0.2
    )
    monitor = GradientMonitor(model)
    for part in model.values():
        backward(part)
    a, b = monitor.observe(first), monitor.observe(second)
    record = monitor.flush()
    norms = reference.layer_norms(model)
    assert a.total_norm.item() == pytest.approx(math.hypot(*(v for k, v in norms.items() if k.startswith("g"))))
    assert b.total_norm.item() == pytest.approx(math.hypot(*(v for k, v in norms.items() if k.startswith("d"))))
    assert {layer.name: layer.optimizer for layer in record.layers} == {
        name: int(name.startswith("d")) for name in norms
    }
    assert [layer.learning_rate for layer in record.layers if layer.name.startswith("d")] == [0.5, 0.2, 0.2, 0.2]
    assert [(step.optimizer, step.step) for step in record.window] == [(0, 0), (1, 0)]
    assert record.total_norm == max(step.total_norm for step in record.window) == record.total_norm_max


def test_norm_ratios_are_within_one_optimizer() -> None:
    model = nn.ModuleDict({"g": mlp(), "d": mlp()})
    optimizers = [torch.optim.SGD(part.parameters(), lr=0.1) for part in model.values()]
    monitor = GradientMonitor(model)
    backward(model["g"], 1e6)
    backward(model["d"])
    for optimizer in optimizers:
        monitor.observe(optimizer)
    layers = monitor.flush().layers
    for prefix in "gd":
        ratios = [layer.norm_ratio for layer in layers if layer.name.startswith(prefix)]
        assert len(ratios) == 4
        assert math.prod(ratios) == pytest.approx(1.0, rel=1e-6)


def test_spikes_between_two_flushes_are_kept() -> None:
    model = mlp()
    optimizer, monitor = torch.optim.SGD(model.parameters(), lr=0.0), GradientMonitor(model)
    norms = []
    for scale in (1.0, 1000.0, 1.0):
        optimizer.zero_grad()
        backward(model, scale)
        norms.append(reference.layer_norms(model))
        monitor.observe(optimizer)
    record = monitor.flush()
    assert [layer.grad_norm_max for layer in record.layers] == pytest.approx(list(norms[1].values()))
    assert [layer.grad_norm for layer in record.layers] == pytest.approx(list(norms[2].values()))
    assert record.total_norm_max == pytest.approx(math.hypot(*norms[1].values()))
    assert monitor.flush().step == -1


def test_a_layer_without_gradient_in_the_last_step_keeps_its_spike() -> None:
    model = nn.ModuleDict({"a": nn.Linear(8, 2), "b": nn.Linear(8, 2)})
    optimizer, monitor = torch.optim.SGD(model.parameters(), lr=0.0), GradientMonitor(model)
    for name in ("a", "b", "a"):
        optimizer.zero_grad()
        model[name](torch.randn(4, 8)).sum().backward()
        monitor.observe(optimizer)
    layers = {layer.name: layer for layer in monitor.flush().layers}
    assert layers["b"].grad_norm is None
    assert layers["b"].grad_norm_max is not None


def test_two_optimizers_that_share_layers_make_one_chain() -> None:
    model = mlp(24)
    weights = [p for n, p in model.named_parameters() if n.endswith("weight")]
    biases = [p for n, p in model.named_parameters() if n.endswith("bias")]
    optimizers = [torch.optim.SGD(biases, lr=0.01), torch.optim.SGD(weights, lr=0.02)]
    session = HealthSession(model)
    for _ in range(4):
        for optimizer in optimizers:
            optimizer.zero_grad()
        backward(model)
        for optimizer in optimizers:
            session.observe(optimizer)
    record = session.flush()
    assert {layer.name: layer.grad_norm for layer in record.layers} == pytest.approx(reference.layer_norms(model))
    assert {layer.optimizer for layer in record.layers} == {0}
    assert all(layer.learning_rate == 0.02 and layer.bias_grad_rms for layer in record.layers)
    assert "vanishing_gradients" in session.report().conditions


def test_an_odd_embedding_is_measured_like_any_layer() -> None:
    class Scaled(nn.Embedding):
        def __init__(self) -> None:
            super().__init__(5, 3)
            self.scale = nn.Parameter(torch.ones(3))

    model = Scaled()
    optimizer, session = torch.optim.SGD(model.parameters(), lr=0.1), HealthSession(model)
    (model(torch.tensor([1])) * model.scale).sum().backward()
    session.observe(optimizer)
    optimizer.step()
    assert session.flush().layers[0].update_to_weight is not None


def test_frozen_unfrozen_and_added_parameters() -> None:
    model = mlp()
    for parameter in model[0].parameters():
        parameter.requires_grad_(False)
    optimizer = torch.optim.SGD(model[2:].parameters(), lr=0.1)
    monitor = GradientMonitor(model)
    backward(model)
    monitor.observe(optimizer)
    layers = {layer.name: layer for layer in monitor.flush().layers}
    assert layers["0"].frozen
    assert layers["0"].optimizer is None
    for parameter in model[0].parameters():  # what BackboneFinetuning does
        parameter.requires_grad_(True)
    optimizer.add_param_group({"params": list(model[0].parameters()), "lr": 0.01})
    model.append(nn.Linear(3, 3))
    optimizer.add_param_group({"params": list(model[-1].parameters())})
    optimizer.zero_grad()
    backward(model)
    monitor.observe(optimizer)
    layers = {layer.name: layer for layer in monitor.flush().layers}
    assert not layers["0"].frozen
    assert layers["0"].learning_rate == 0.01
    assert {name: layer.grad_norm for name, layer in layers.items()} == pytest.approx(reference.layer_norms(model))


def test_a_parameter_that_only_the_optimizer_knows() -> None:
    model, foreign = mlp(depth=2), nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([*model.parameters(), foreign], lr=0.1)
    backward(model)
    foreign.grad = torch.tensor([3.0, 4.0])
    monitor = GradientMonitor(model)
    monitor.observe(optimizer)
    assert monitor.flush().layers[-1].grad_norm == 5.0


def test_none_is_counted_and_zero_is_a_gradient() -> None:
    model = nn.ModuleDict({"used": nn.Linear(8, 2), "unused": nn.Linear(8, 2)})
    optimizer, monitor = torch.optim.SGD(model.parameters(), lr=0.1), GradientMonitor(model)
    for _ in range(3):
        optimizer.zero_grad()
        (model["used"](torch.randn(4, 8)) * 0).sum().backward()
        monitor.observe(optimizer)
    used, unused = monitor.flush().layers
    assert (used.grad_norm, used.without_grad) == (0.0, ())
    assert (unused.grad_norm, unused.steps_without_grad) == (None, 3)
    assert unused.without_grad == ("unused.weight", "unused.bias")
    model["unused"](torch.randn(4, 8)).sum().backward()
    monitor.observe(optimizer)
    assert monitor.flush().layers[1].without_grad == ()


def test_no_gradient_at_all() -> None:
    model = mlp()
    monitor = GradientMonitor(model)
    decision = monitor.observe(torch.optim.SGD(model.parameters(), lr=0.1))
    assert decision.total_norm.item() == 0.0
    record = monitor.flush()
    assert record.total_norm is None
    assert record.backward_gain is None


@pytest.mark.parametrize("unscaled_before", [False, True])
def test_scaled_gradients_are_measured_unscaled(unscaled_before: bool) -> None:
    model = mlp()
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.1), GradScaler("cpu", init_scale=2.0**12)
    loss = model(torch.randn(4, 8)).square().mean()
    true = math.hypot(
        *(g.norm().item() for g in torch.autograd.grad(loss, list(model.parameters()), retain_graph=True))
    )
    scaler.scale(loss).backward()
    if unscaled_before:
        scaler.unscale_(optimizer)
    monitor = GradientMonitor(model)
    monitor.observe(optimizer, grad_scaler=scaler)
    assert monitor.flush().total_norm == pytest.approx(true, rel=1e-6)


def test_overflow_under_a_scaler_is_no_finding() -> None:
    model = mlp()
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.1), GradScaler("cpu", init_scale=2.0**4)
    session = HealthSession(model)
    for bad in (False, True, False):
        optimizer.zero_grad()
        loss = model(torch.randn(4, 8)).square().mean()
        scaler.scale(loss).backward()
        if bad:
            model[0].weight.grad.fill_(math.inf)
        session.observe(optimizer, loss=loss, grad_scaler=scaler)
        scaler.step(optimizer)
        scaler.update()
    record = session.flush()
    assert record.non_finite_steps == 0
    assert record.total_norm is not None
    assert math.isfinite(record.total_norm)
    assert session.report().healthy


def test_a_decision_scales_on_the_device() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    backward(model)
    before = reference.layer_norms(model)
    total = math.hypot(*before.values())
    for clip, action in ((None, "ok"), (NormClip(2 * total), "ok"), (NormClip(total / 2), "clip")):
        monitor = GradientMonitor(model, clip=clip)
        decision = monitor.observe(optimizer)
        assert reference.layer_norms(model) == before  # nothing happens until it is applied
        monitor.apply(decision)
        assert decision.action == action
        assert decision.norms.square().sum().sqrt().item() == pytest.approx(total)
        factor = {"ok": 1.0, "clip": 0.5}[action]
        assert reference.layer_norms(model) == pytest.approx({k: v * factor for k, v in before.items()}, rel=1e-6)
        step = monitor.flush().window[0]
        assert (step.clipped, step.clip_coefficient) == (
            (None, None) if clip is None else (action == "clip", pytest.approx(factor))
        )


@pytest.mark.parametrize("scale", [1e25, 1e-25])
def test_squares_that_leave_the_range_of_float32_are_neither_inf_nor_zero(scale: float) -> None:
    model = nn.Linear(400, 401, bias=False)
    optimizer, monitor = torch.optim.SGD(model.parameters(), lr=0.1), GradientMonitor(model)
    model.weight.grad = torch.ones(401, 400) * scale
    monitor.observe(optimizer, exact=False)
    record = monitor.flush()
    assert record.non_finite_steps == 0
    assert record.total_norm is not None
    assert scale <= record.total_norm <= scale * 401
    for place in ((0, 0), (200, 7), (400, 399)):
        model.weight.grad = torch.ones(401, 400)
        model.weight.grad[place] = math.inf
        monitor.observe(optimizer, exact=False)
        assert monitor.flush().non_finite_steps == 1


def test_a_true_inf_in_the_middle_of_a_window_is_dated() -> None:
    model = mlp()
    optimizer, session = torch.optim.SGD(model.parameters(), lr=0.0), HealthSession(model)
    for step in range(12):
        optimizer.zero_grad()
        backward(model)
        if step == 7:
            model[2].bias.grad[0] = math.inf
        session.observe(optimizer)
    session.flush()
    (finding,) = session.report().findings
    assert (finding.condition, finding.first_step, finding.layers) == ("non_finite", 7, ("2",))


def test_state_makes_the_round_trip() -> None:
    model = mlp()
    optimizer, monitor = torch.optim.SGD(model.parameters(), lr=0.1), GradientMonitor(model)
    for _ in range(3):
        backward(model)
        monitor.observe(optimizer)
    buffer = io.BytesIO()
    torch.save(monitor.state_dict(), buffer)
    buffer.seek(0)
    other = GradientMonitor(model)
    other.index_of(optimizer)  # what it is, a record says of those that are known
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert other.flush() == monitor.flush()
    assert other.steps_of(optimizer) == 3


def test_a_state_of_another_model_is_forgotten_not_fatal() -> None:
    model, other = mlp(), mlp(depth=2)
    monitor = GradientMonitor(model)
    backward(model)
    monitor.observe(torch.optim.SGD(model.parameters(), lr=0.1))
    small = GradientMonitor(other)
    small.load_state_dict(monitor.state_dict())
    assert small.flush().step == -1
