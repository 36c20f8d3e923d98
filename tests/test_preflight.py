"""The preflight: truth against plain autograd, verdicts on healthy and sick nets, and no trace of it left anywhere."""

from __future__ import annotations

import copy
import logging
import math
import random
import statistics
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from conftest import Classifier, batches, mlp, trainer
from counting import host_reads
from hypothesis import given, settings
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from torchmetrics.classification import MulticlassAccuracy

import lightning_gradhealth as gh
from lightning_gradhealth import ChainPoint, FlowReport, GradHealth, LayerStats, SignalChain, diagnose
from lightning_gradhealth.reports.flow import flow_markdown, render_flow
from lightning_gradhealth.reports.rendering import plain

DEPTH = {"vanishing_gradients", "exploding_gradients", "vanishing_activations", "exploding_activations"}


def stack(depth: int, activation: type[nn.Module] = nn.ReLU, width: int = 32) -> nn.Sequential:
    parts: list[nn.Module] = []
    for _ in range(depth - 1):
        parts += [nn.Linear(width, width), activation()]
    return nn.Sequential(*parts, nn.Linear(width, 4))


def inputs(samples: int = 256, width: int = 32) -> Tensor:
    return torch.randn(samples, width, generator=torch.Generator().manual_seed(5))


def labels(samples: int = 256, classes: int = 4) -> Tensor:
    return torch.randint(classes, (samples,), generator=torch.Generator().manual_seed(6))


# --- truth -------------------------------------------------------------------------------------------------


def scaled_identities(gain: float, depth: int = 20) -> nn.Sequential:
    net = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(depth))).double()
    for layer in net:
        layer.weight.data = gain * torch.eye(8, dtype=torch.float64)
    return net


@pytest.mark.parametrize("loss_fn", [None, lambda out, y: (out * y).sum()])
@pytest.mark.parametrize("gain", [0.5, 0.9, 1.0, 1.2])
def test_gains_of_scaled_identities(gain: float, loss_fn: Any) -> None:
    net, x = scaled_identities(gain), inputs(16, 8).double()
    report = diagnose(net, x if loss_fn is None else (x, x), loss_fn)
    assert report.forward_gain == pytest.approx(gain, abs=1e-6)
    assert report.backward_gain == pytest.approx(gain, abs=1e-6)
    assert len(report.chain.points) == len(report.layers) == 20
    for layer in report.layers[1:]:
        assert (layer.forward_gain, layer.backward_gain) == pytest.approx((gain, gain), abs=1e-6)
    if gain == 1.0:
        assert report.depth_limit is None or report.depth_limit > 1e9
        return
    limit = math.ceil(abs(math.log(1e-3) / math.log(gain)))
    assert report.depth_limit == limit
    bound = "below 1e-3" if gain < 1 else "above 1e3"
    when = f"after {limit - 19} more layers" if limit > 19 else f"after {limit} of the 19 layers"
    assert report.outlook.endswith(f"is {bound} {when}")
    # the forecast is what happens
    assert gain**limit < 1e-3 or gain**limit > 1e3
    assert 1e-3 < gain ** (limit - 1) < 1e3


def test_signals_and_gradients_are_those_of_plain_autograd() -> None:
    net, x, y = stack(6, nn.Tanh), inputs(), labels()
    report = diagnose(net, (x, y), functional.cross_entropy)
    outputs, signal = [], x
    for module in net:
        signal = module(signal)
        signal.retain_grad()
        outputs.append(signal)
    loss = functional.cross_entropy(signal, y)
    loss.backward()
    assert report.loss == pytest.approx(loss.item(), rel=1e-6)
    assert [layer.name for layer in report.layers] == ["0", "2", "4", "6", "8", "10"]
    for layer in report.layers:
        output, module = outputs[int(layer.name)], net[int(layer.name)]
        assert output.grad is not None
        assert layer.forward_rms == pytest.approx(output.square().mean().sqrt().item(), rel=1e-6)
        assert layer.backward_rms == pytest.approx(output.grad.square().mean().sqrt().item(), rel=1e-6)
        norm = torch.cat([p.grad.flatten() for p in module.parameters()]).norm().item()
        assert layer.grad_norm == pytest.approx(norm, rel=1e-6)


def test_without_a_loss_the_median_over_random_directions_counts() -> None:
    net, x = stack(4, nn.Tanh), inputs()
    report = diagnose(net, x)
    seen = []
    for seed in range(3):
        hidden = net[0](x)
        hidden.retain_grad()
        output = net[1:](hidden)
        output.backward(torch.randn(output.shape, generator=torch.Generator().manual_seed(seed)))
        seen.append(hidden.grad.square().mean().sqrt().item())
    assert len(set(seen)) == 3
    assert report.layers[0].backward_rms == pytest.approx(statistics.median(seen), rel=1e-6)
    assert report.loss is None
    assert any("no loss" in note for note in report.notes)
    assert diagnose(net, x) == report  # the directions are always the same


def test_dead_and_saturated_units_are_counted() -> None:
    net = stack(5)
    with torch.no_grad():
        net[2].bias[:20] = -100.0
        net[4].bias[:] = -100.0
    report = diagnose(net, (inputs(), labels()), functional.cross_entropy)
    layers = {layer.name: layer for layer in report.layers}
    hidden = net[:2](inputs())
    assert layers["2"].dead_fraction == (net[2](hidden) <= 0).all(0).float().mean().item() >= 20 / 32
    assert (layers["4"].dead_fraction, layers["4"].activation) == (1.0, "relu")
    assert next(f for f in report.findings if f.condition == "dead_units").layers[:2] == ("2", "4")
    saturated = stack(3, nn.Sigmoid)
    nn.init.constant_(saturated[0].bias, 30.0)
    assert "saturated_units" in diagnose(saturated, inputs()).conditions


def test_recurrent_layers_are_followed_through_time() -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = nn.RNN(4, 4, batch_first=True), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(x)[0][:, -1])

    model, x = Reader(), torch.randn(4, 30, 4)
    nn.init.eye_(model.rnn.weight_hh_l0).data.mul_(0.3)
    report = diagnose(model, x)
    expected = gh.temporal_flow(model.rnn, x)
    assert report.temporal["rnn"].grad_norms == pytest.approx(expected.grad_norms)
    assert report.temporal["rnn"].gain_per_step < 0.31
    assert "through time in rnn: gain 0." in str(report)
    assert FlowReport.from_json(report.to_json()) == report


def test_units_need_samples() -> None:
    net = stack(3)
    nn.init.constant_(net[0].bias, -100.0)
    report = diagnose(net, inputs(32))
    assert "dead_units" not in report.conditions
    assert "units: not judged behind 0, 2; that takes a batch of 256 samples or more" in report.notes
    assert not any("units" in note for note in diagnose(net, inputs()).notes)


# --- verdicts ----------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """x + a f(x)."""

    def __init__(self, branch: nn.Module, after: nn.Module | None = None, factor: float | None = None) -> None:
        super().__init__()
        self.branch, self.after = branch, after or nn.Identity()
        self.factor = 1.0 if factor is None else nn.Parameter(torch.full((), factor))

    def forward(self, x: Tensor) -> Tensor:
        return self.after(x + self.factor * self.branch(x))


def conv(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs)]


def bn_resnet() -> nn.Module:
    blocks = [Residual(nn.Sequential(*conv(8, 8), nn.ReLU(), *conv(8, 8)), nn.ReLU()) for _ in range(9)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)]
    return nn.Sequential(*conv(3, 8), nn.ReLU(), *blocks, *head)


def vgg_bn() -> nn.Module:
    parts: list[nn.Module] = []
    for number in range(12):
        parts += [*conv(3 if number == 0 else 8, 8), nn.ReLU()]
        parts += [nn.MaxPool2d(2)] if number in (3, 7) else []
    return nn.Sequential(*parts, nn.Flatten(), nn.Linear(8 * 4, 4))


def rezero() -> nn.Module:
    return nn.Sequential(*(Residual(nn.Sequential(nn.Linear(32, 32), nn.ReLU()), factor=0.0) for _ in range(32)))


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(-2))


class GPT(nn.Module):
    """GPT-2 in small, with its initialisation: std .02, branches ended by .02 / sqrt(2 N)."""

    def __init__(self, blocks: int = 12, width: int = 32, tokens: int = 20) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(tokens, width), nn.Embedding(16, width)
        parts: list[nn.Module] = []
        for _ in range(blocks):
            up, down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
            parts.append(Residual(nn.Sequential(nn.LayerNorm(width), Attention(width))))
            parts.append(Residual(nn.Sequential(nn.LayerNorm(width), up, nn.GELU(), down)))
        self.blocks, self.norm = nn.Sequential(*parts), nn.LayerNorm(width)
        self.head = nn.Linear(width, tokens, bias=False)
        self.head.weight = self.tokens.weight
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                ends = name.endswith(("out.weight", "3.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * blocks) if ends else 0.02)

    def forward(self, x: Tensor) -> Tensor:
        signal = self.tokens(x) + self.places(torch.arange(x.shape[1]))
        return self.head(self.norm(self.blocks(signal)))


def images() -> tuple[Tensor, Tensor]:
    return inputs(16, 3 * 8 * 8).view(16, 3, 8, 8), labels(16)


def words() -> tuple[Tensor, Tensor]:
    tokens = torch.randint(20, (8, 17), generator=torch.Generator().manual_seed(7))
    return tokens[:, :-1], tokens[:, 1:]


def of_words(logits: Tensor, y: Tensor) -> Tensor:
    return functional.cross_entropy(logits.flatten(0, 1), y.flatten())


HEALTHY: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any], Callable[..., Tensor]]] = {
    "BN-ResNet": (bn_resnet, images, functional.cross_entropy),
    "VGG-BN": (vgg_bn, images, functional.cross_entropy),
    "GPT-2-style": (GPT, words, of_words),
    "ReZero": (rezero, lambda: (inputs(), inputs().flip(0)), functional.mse_loss),
}


@pytest.mark.parametrize("with_loss", [True, False])
@pytest.mark.parametrize("case", HEALTHY)
def test_healthy_nets_have_no_depth_verdict(case: str, with_loss: bool) -> None:
    make, data, loss_fn = HEALTHY[case]
    torch.manual_seed(1)
    x, y = data()
    report = diagnose(make(), (x, y), loss_fn) if with_loss else diagnose(make(), x)
    assert report.healthy, report
    assert not report.conditions & DEPTH
    assert len(report.chain.points) >= 9  # it was judged
    assert report.remedies == ()
    gains = [layer.backward_gain for layer in report.layers if layer.backward_gain]
    assert 0.7 < report.backward_gain < 1.3
    assert case == "ReZero" or max(gains) / min(gains) > 3  # although neighbouring gains inside it differ


def he(net: nn.Module, factor: float) -> nn.Module:
    for layer in net:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=factor * math.sqrt(2 / layer.in_features))
            nn.init.zeros_(layer.bias)
    return net


SICK: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    "deep sigmoid": (lambda: stack(10, nn.Sigmoid), {"vanishing_gradients"}),
    "ReLU at torch's default": (lambda: stack(30), {"vanishing_gradients"}),
    "He x 0.5": (lambda: he(stack(30), 0.5), {"vanishing_gradients", "vanishing_activations"}),
    "He x 1.5": (lambda: he(stack(30), 1.5), {"exploding_gradients", "exploding_activations"}),
}


@pytest.mark.parametrize("with_loss", [True, False])
@pytest.mark.parametrize("case", SICK)
def test_sick_nets_are_found_at_once(case: str, with_loss: bool) -> None:
    make, conditions = SICK[case]
    net, x, y = make(), inputs(), labels()
    report = diagnose(net, (x, y), functional.nll_loss) if with_loss else diagnose(net, x)
    assert report.conditions & DEPTH == conditions
    assert not report.healthy
    assert (report.backward_gain < 1) == ("vanishing_gradients" in conditions)
    assert report.depth_limit is not None
    assert report.depth_limit < 29
    for finding in report.findings:
        assert finding.remedy in report.remedies


# --- what init_weights would change ------------------------------------------------------------------------


def test_the_remedy_says_what_init_weights_would_draw() -> None:
    net, x = stack(30), inputs()
    before = {name: p.std().item() for name, p in net.named_parameters() if p.ndim > 1}
    remedy = diagnose(net, x).remedies[0]
    after = {e.name: e.target_std for e in gh.init_weights(net, x, dry_run=True).entries if e.distribution}
    assert remedy.startswith("gh.init_weights(model, x) would draw 30 weights anew: ")
    assert f"0.weight with std {after['0.weight']:.3g} in place of {before['0.weight']:.3g}" in remedy
    gh.init_weights(net, x, seed=0)
    assert not diagnose(net, x).conditions & DEPTH  # and it helps


def test_init_is_no_remedy_where_it_changes_nothing() -> None:
    net = stack(12, nn.Sigmoid)
    gh.init_weights(net, inputs(), seed=0)
    report = diagnose(net, inputs())
    assert "vanishing_gradients" in report.conditions  # no initialisation saves it
    assert not any("would draw" in remedy for remedy in report.remedies)


def test_init_is_advised_for_the_part_that_is_called() -> None:
    model = Classifier(stack(30))
    remedy = diagnose(model, [inputs(), labels()]).remedies[0]
    assert remedy.startswith("gh.init_weights(model, x) would draw 30 weights anew: net.0.weight")

    class Inner(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return functional.cross_entropy(self.net(batch[0]), batch[1])

    remedy = diagnose(Inner(stack(30)), [inputs(), labels()]).remedies[0]
    assert remedy.startswith("gh.init_weights(model.net, x) would draw 30 weights anew: net.0.weight")


def test_a_plan_that_fails_costs_the_advice_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("no plan")

    monkeypatch.setattr("lightning_gradhealth.preflight.remedies.plan_init", fails)
    report = diagnose(stack(30), inputs())
    assert "vanishing_gradients" in report.conditions
    assert "what gh.init_weights would change is not known (RuntimeError: no plan)" in report.notes


# --- NaN and Inf -------------------------------------------------------------------------------------------


class Log(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.relu().log()


def test_non_finite_outputs_name_the_module() -> None:
    net = nn.Sequential(nn.Linear(32, 8), Log(), nn.Linear(8, 4))
    for report in (diagnose(net, inputs()), diagnose(net, (inputs(), labels()), functional.cross_entropy)):
        finding = report.findings[0]
        assert (finding.condition, finding.severity) == ("non_finite", "critical")
        assert "the first output that is not finite is that of 1" in finding.summary
        assert FlowReport.from_json(report.to_json()).findings[0].summary == finding.summary


def test_a_bad_loss_and_bad_gradients() -> None:
    net = stack(3)
    finding = diagnose(net, (inputs(), labels()), lambda out, y: out.sum() * math.inf).findings[0]
    assert finding.summary.startswith("the loss is NaN or Inf; the loss of Sequential is not finite")
    finding = diagnose(net, (inputs(), labels()), lambda out, y: (out - out).sum().sqrt()).findings[0]
    where = "the gradients turn non-finite in the backward pass of Sequential, at Sqrt"
    assert finding.summary == f"gradients are NaN or Inf; {where}"


def test_masks_of_attention_are_no_news() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.mask = nn.Linear(32, 4), nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            scores = self.inner(x)
            return functional.softmax(self.mask(scores.masked_fill(scores > 1e9, -math.inf)), -1)

    assert diagnose(Masked(), inputs()).healthy


# --- nothing is left of it ---------------------------------------------------------------------------------


class Rich(nn.Module):
    """Has everything that a pass might disturb."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 8, max_norm=0.5)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 3))
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.frozen_norm = nn.BatchNorm1d(8).eval()
        self.spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3))
        self.accuracy = MulticlassAccuracy(3)
        self.noise = torch.Generator().manual_seed(3)
        self.calls: list[int] = []
        self.fails = ""

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(len(self.calls))
        out = self.net(self.frozen_norm(self.table(x)))
        out = out + torch.randn(out.shape, generator=self.noise) + random.random() + float(np.random.rand())  # noqa: NPY002
        self.accuracy.update(out, torch.zeros(len(out), dtype=torch.long))
        if self.fails == "forward":
            torch.set_grad_enabled(False)
            raise RuntimeError("on purpose")
        return self.spectral(self.frozen(out))


def loss_of(fails: str) -> Callable[..., Any]:
    def loss_fn(out: Tensor, y: Tensor) -> Tensor:
        if fails == "loss":
            raise RuntimeError("on purpose")
        if fails == "backward":
            out.register_hook(lambda _: 1 / 0)
        return out.sum() * torch.rand(())

    return loss_fn


def hooks_of(model: nn.Module) -> list[Any]:
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_forward_hooks_with_kwargs")
    more = ("_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called", "_backward_pre_hooks")
    return [list(getattr(module, name).items()) for module in model.modules() for name in (*names, *more)]


def flags_of(model: nn.Module) -> Any:
    grads = [None if p.grad is None else (id(p.grad), p.grad.sum().item()) for p in model.parameters()]
    training = [module.training for module in model.modules()]
    tensors = [id(t) for t in (*model.parameters(), *model.buffers())]
    autocast = (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), torch.is_autocast_cache_enabled())
    modes = (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast)
    return grads, training, tensors, [p.requires_grad for p in model.parameters()], modes, hooks_of(model)


def state_of(model: Rich) -> dict[str, Tensor]:
    metric = {f"accuracy.{name}": getattr(model.accuracy, name).clone() for name in ("tp", "fp", "tn", "fn")}
    return {**{name: value.clone() for name, value in model.state_dict().items()}, **metric}


def randomness(model: Rich) -> Any:
    numpy = np.random.get_state()[1].tolist()  # noqa: NPY002
    return torch.get_rng_state().tolist(), random.getstate(), numpy, model.noise.get_state().tolist()


@pytest.mark.parametrize("mode", ["training", "eval", "no_grad", "inference_mode", "autocast"])
@pytest.mark.parametrize("fails", ["", "forward", "loss", "backward"])
def test_everything_is_as_it_was_bit_for_bit(fails: str, mode: str) -> None:
    model = Rich()
    x = torch.arange(10).repeat(4)
    model(x).sum().backward()  # gradients, statistics and counts are there
    model.table.weight.data.mul_(3.0)  # beyond max_norm: the forward pass rescales what it looks up
    model.net[0].register_forward_hook(lambda *_: None)
    model.train(mode != "eval")
    model.fails = fails
    contexts = {
        "no_grad": torch.no_grad,
        "inference_mode": torch.inference_mode,
        "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    }
    with contexts.get(mode, nullcontext)():
        before, flags, chance, calls = state_of(model), flags_of(model), randomness(model), list(model.calls)
        expected = pytest.raises((ValueError, ZeroDivisionError)) if fails else nullcontext()
        with expected:
            report = diagnose(model, (x, x), loss_of(fails))
            assert report.layers[0].forward_rms is not None
        after = state_of(model)
        assert before.keys() == after.keys()
        assert [name for name in before if not torch.equal(before[name], after[name])] == []
        assert flags_of(model) == flags
        assert randomness(model) == chance
        assert model.calls == calls


def test_hooks_that_wait_for_gradients_are_not_called() -> None:
    net = stack(3)
    optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in net.parameters()}
    for parameter in net.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: optimizers[p].step())
    before = copy.deepcopy(net.state_dict())
    diagnose(net, (inputs(), labels()), functional.cross_entropy)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


@pytest.mark.parametrize("loss_fn", [None, functional.cross_entropy])
def test_one_host_read(loss_fn: Any) -> None:
    net, x = stack(12, nn.Tanh), inputs()
    gh.init_weights(net, x, seed=0)
    with host_reads() as reads:
        report = diagnose(net, x if loss_fn is None else (x, labels()), loss_fn)
    assert report.healthy
    assert reads.count == 1


# --- models of all kinds -----------------------------------------------------------------------------------


class Logging(Classifier):
    """Logs, counts in a metric, and needs no Trainer."""

    def __init__(self, net: nn.Module | None = None) -> None:
        super().__init__(net)
        self.accuracy = MulticlassAccuracy(3)

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        out = self(batch[0])
        self.accuracy(out, batch[1])
        self.log("accuracy", self.accuracy, prog_bar=True)
        self.log_dict({"batch": batch_idx, "epoch": self.current_epoch})
        return {"loss": functional.cross_entropy(out, batch[1]), "out": out}


def test_a_lightning_module_runs_its_training_step() -> None:
    model, batch = Logging(), next(iter(batches(size=64)))
    report = diagnose(model, batch)
    assert report.loss == pytest.approx(functional.cross_entropy(model(batch[0]), batch[1]).item())
    assert [layer.name for layer in report.layers] == ["net.0", "net.2", "net.4", "net.6"]
    assert model.accuracy.update_count == 0
    assert "log" not in vars(model)
    same = diagnose(model, tuple(batch), functional.cross_entropy)  # with a loss function it is a module like others
    assert same.layers == report.layers


def test_the_batch_is_left_as_it_was() -> None:
    x, y = next(iter(batches()))
    batch = [x.clone(), y]
    diagnose(Greedy(), batch)
    assert len(batch) == 2
    assert torch.equal(batch[0], x)
    net = nn.Sequential(nn.ReLU(inplace=True), mlp())
    once = diagnose(net, x)
    assert torch.equal(batch[0], x)
    assert diagnose(net, x) == once
    history = (x * torch.ones((), requires_grad=True)) * 1.0  # cannot be copied, and need not be
    assert diagnose(net[1], history).measured


STEPS: dict[str, Callable[..., Any]] = {
    "batch": lambda self, batch: self.loss(batch),
    "index": lambda self, batch, batch_idx: self.loss(batch) + batch_idx,
    "dataloader": lambda self, batch, batch_idx, dataloader_idx: self.loss(batch) + batch_idx + dataloader_idx,
    "own default": lambda self, batch, batch_idx, weight=1.0: self.loss(batch) * weight,
    "anything": lambda self, *args: self.loss(args[0]) + sum(args[1:]),
    "by name": lambda self, batch, *, batch_idx: self.loss(batch) + batch_idx,
}


@pytest.mark.parametrize("kind", STEPS)
def test_a_training_step_gets_what_it_takes(kind: str) -> None:
    class Stepping(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def loss(self, batch: Any) -> Tensor:
            return functional.cross_entropy(self.net(batch[0]), batch[1])

    Stepping.training_step = STEPS[kind]
    assert diagnose(Stepping(), next(iter(batches()))).loss > 0


class Gan(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.critic = mlp(4, 16, 4, 8), mlp(4, 16, 8, 1)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        raise AssertionError("it must not be called")

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_gan_is_diagnosed_by_its_networks() -> None:
    model = Gan()
    with pytest.raises(ValueError, match=r"optimize by hand.*gh\.diagnose\(model\.generator, inputs\)"):
        diagnose(model, torch.ones(2, 4))
    assert diagnose(model.generator, torch.randn(256, 4)).measured
    assert diagnose(model.critic, torch.randn(256, 8)).measured


def test_arguments_and_outputs_of_any_structure() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, a: Tensor, b: Tensor) -> dict[str, Any]:
            return {"out": (self.left(a), [self.right(b)]), "count": torch.tensor(3), "name": "pair"}

    x = torch.randn(8, 4)
    reports = [diagnose(Pair(), (x, x)), diagnose(Pair(), {"a": x, "b": x})]
    reports += [diagnose(Pair(), ((x, x), x), lambda out, y: (out["out"][0] - out["out"][1][0] - y).square().mean())]
    for report in reports:
        assert [layer.backward_rms is not None for layer in report.layers] == [True, True]


def test_a_loss_that_the_model_gives_itself_counts() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            out = self.net(x)
            return {"loss": functional.cross_entropy(out, labels), "logits": out}

    model, (x, y) = Own(), next(iter(batches()))
    report = diagnose(model, {"x": x, "labels": y})
    assert report.loss == pytest.approx(model(x, y)["loss"].item())


class Wrapped(nn.Module):
    """torch.compile leaves a Sequential by itself alone."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Backend:
    """Compiles nothing, and counts."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: Any, example_inputs: Any) -> Any:
        self.count += 1
        return graph.forward


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of torch.compile itself
def test_compiled_modules_are_looked_into_and_stay_compiled() -> None:
    torch._dynamo.reset()
    backend, net = Backend(), nn.Sequential(nn.Linear(32, 32), Wrapped(stack(4)))
    bare = diagnose(net, inputs())
    net[1].compile(backend=backend)
    net(inputs()).sum().backward()
    compilations = backend.count
    assert compilations
    assert diagnose(net, inputs()).chain == bare.chain
    net(inputs()).sum().backward()
    assert backend.count == compilations
    whole = torch.compile(stack(4), backend=backend)
    assert [layer.name for layer in diagnose(whole, inputs()).layers] == ["0", "2", "4", "6"]
    torch._dynamo.reset()


def test_scripted_modules_are_not_looked_into() -> None:
    net = nn.Sequential(nn.Linear(32, 32), torch.jit.script(stack(2)))
    report = diagnose(net, inputs())
    assert "signals: not measured inside scripted modules (1)" in report.notes
    assert report.layers[0].forward_rms is not None
    assert report.layers[1].forward_rms is None
    assert not diagnose(torch.jit.script(stack(2)), inputs()).healthy  # nothing was seen: no verdict


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_changes_nothing(reentrant: bool) -> None:
    class Saving(nn.Module):
        def __init__(self, saves: bool) -> None:
            super().__init__()
            self.first, self.last, self.saves = nn.Linear(32, 32), stack(5), saves

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return checkpoint(self.last, x, use_reentrant=reentrant) if self.saves else self.last(x)

    model = Saving(False)
    bare = diagnose(model, inputs())
    model.saves = True
    report = diagnose(model, inputs())
    assert [layer.grad_norm for layer in report.layers] == pytest.approx([layer.grad_norm for layer in bare.layers])
    assert report.layers[0].backward_rms == pytest.approx(bare.layers[0].backward_rms)
    if reentrant:
        model.first.weight.register_post_accumulate_grad_hook(lambda _: None)
        with pytest.raises(ValueError, match="use_reentrant=False"):
            diagnose(model, inputs())


def test_frozen_layers_and_unused_ones() -> None:
    net = nn.ModuleDict({"used": nn.Linear(32, 32), "frozen": nn.Linear(32, 4), "unused": nn.Linear(2, 2)})
    net["frozen"].requires_grad_(False)
    net.forward = lambda x: net["frozen"](net["used"](x))
    report = diagnose(net, inputs())
    assert "no gradient comes to unused.weight, unused.bias" in report.notes
    layers = {layer.name: layer for layer in report.layers}
    assert layers["frozen"].frozen
    assert layers["frozen"].grad_norm is None
    assert layers["used"].grad_norm > 0


def test_shared_weights_count_once() -> None:
    shared = nn.Linear(16, 16)
    report = diagnose(nn.Sequential(shared, nn.Tanh(), shared), inputs(64, 16))
    assert [layer.name for layer in report.layers] == ["0"]
    assert report.layers[0].numel == 16 * 17


# --- bad input, by message ---------------------------------------------------------------------------------


def detached() -> nn.Module:
    net = nn.Sequential(nn.Linear(32, 4))
    net.register_forward_hook(lambda module, args, output: output.detach())
    return net


BAD: dict[str, tuple[Callable[[], Any], Any, Any, type[Exception], str]] = {
    "no module": (lambda: len, inputs(), None, TypeError, r"model must be an nn\.Module, got builtin_function"),
    "loss no function": (stack, (inputs(), labels()), 3, TypeError, r"loss_fn must be a function.*got 3"),
    "no pair": (stack, inputs(), len, ValueError, r"batch must be a pair \(x, y\).*got a Tensor"),
    "triple": (stack, (1, 2, 3), len, ValueError, r"got a tuple of 3"),
    "wrong device": (
        stack,
        inputs().to("meta"),
        None,
        ValueError,
        r'batch must be on the device of the model, cpu, got meta; move it by \.to\("cpu"\)',
    ),
    "wrong shape": (stack, inputs(4, 7), None, ValueError, r"batch must go through model.forward.*shape \(4, 7\)"),
    "pair without loss": (stack, (inputs(4), labels(4)), None, ValueError, r"give loss_fn too, or pass batch\[0\]"),
    "wrong keyword": (stack, {"nonsense": inputs(4)}, None, ValueError, r"dict of keyword arguments of forward"),
    "loss does not take it": (
        stack,
        (inputs(4), labels(5)),
        functional.cross_entropy,
        ValueError,
        r"loss_fn must take the model's output and y, got Tensor of shape \(4, 4\) and Tensor of shape \(5,\)",
    ),
    "loss not one number": (
        stack,
        (inputs(4), labels(4)),
        lambda out, y: functional.cross_entropy(out, y, reduction="none"),
        ValueError,
        r"loss_fn must give one number, got shape \(4,\); reduce it",
    ),
    "loss a float": (stack, (inputs(4), 0), lambda out, y: 1.0, TypeError, r"loss as a tensor, got float; leave out"),
    "loss detached": (stack, (inputs(4), 0), lambda out, y: out.detach().sum(), ValueError, r"must need a gradient"),
    "output detached": (detached, inputs(4), None, ValueError, r"must give a floating tensor that needs a gradient"),
    "no parameters": (nn.ReLU, inputs(4), None, ValueError, r"model must have parameters, got ReLU without any"),
    "lazy": (lambda: nn.LazyLinear(3), inputs(4), None, ValueError, r"'weight' of model has no shape yet"),
    "meta": (lambda: nn.Linear(32, 3, device="meta"), inputs(4), None, ValueError, r"meta device.*materialise"),
    "step gives None": (
        type("M", (Classifier,), {"training_step": lambda self, batch: None}),
        None,
        None,
        TypeError,
        r"M\.training_step must return a loss, got None",
    ),
    "step needs its trainer": (
        type("M", (Classifier,), {"training_step": lambda self, batch: self.trainer.max_epochs}),
        None,
        None,
        ValueError,
        r"asks for its Trainer: use GradHealth\(preflight=True\)",
    ),
    "step gets another batch": (Classifier, torch.ones(()), None, ValueError, r"give what the DataLoader gives"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_by_message(case: str) -> None:
    make, batch, loss_fn, kind, message = BAD[case]
    model = make(4) if make is stack else make()
    with pytest.raises(kind, match=message) as caught:
        diagnose(model, batch, loss_fn)
    if "go through" in str(caught.value) or "must take" in str(caught.value):
        assert caught.value.__cause__ is not None


# --- the report --------------------------------------------------------------------------------------------

numbers = st.none() | st.floats()
flow_reports = st.builds(
    FlowReport,
    st.lists(st.builds(LayerStats, st.text(), forward_rms=numbers, dead_fraction=numbers), max_size=3).map(tuple),
    st.builds(
        SignalChain, st.lists(st.builds(ChainPoint, st.text(), st.text(), numbers, numbers), max_size=3).map(tuple)
    ),
    numbers,
    numbers,
    st.none() | st.integers(1, 99),
    st.text(),
    remedies=st.lists(st.text(), max_size=2).map(tuple),
    loss=numbers,
    notes=st.lists(st.text(), max_size=2).map(tuple),
)


@settings(max_examples=30)
@given(flow_reports)
def test_reports_survive_json(report: FlowReport) -> None:
    assert repr(FlowReport.from_json(report.to_json())) == repr(report)
    assert FlowReport.from_json(report.to_json()).to_json() == report.to_json()


def test_reports_can_be_read(tmp_path: Path) -> None:
    report = diagnose(stack(30), inputs())
    assert repr(report).startswith("FlowReport(")
    assert "vanishing_gradients" in repr(report)
    text = (tmp_path / "deep" / "flow.txt", tmp_path / "flow.md", tmp_path / "flow.json")
    for path in text:
        assert report.save(path) == path
    assert FlowReport.from_json(text[2].read_text()) == report
    for content in (text[0].read_text(), text[1].read_text(), str(report), plain(render_flow(report), 200)):
        for word in ("vanishing_gradients", "forward RMS", "backward RMS", "relu", "gh.init_weights(model, x) would"):
            assert word in content
    assert "step 0" not in plain(render_flow(report), 200)
    assert "| 0 | " in flow_markdown(report)
    with pytest.raises(ValueError, match=r"path must end in \.json, \.md or \.txt"):
        report.save(tmp_path / "flow.doc")


# --- in a fit ----------------------------------------------------------------------------------------------


def noisy() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.3), nn.Linear(32, 3))


class ByHand(Classifier):
    def __init__(self) -> None:
        super().__init__(noisy())
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


class Greedy(Classifier):
    """Changes its batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        y = batch.pop()
        return functional.cross_entropy(self(batch[0].mul_(2.0)), y)


def compiled() -> Classifier:
    model = Classifier(Wrapped(noisy()))
    model.net.compile(backend="aot_eager")
    return model


FITS: dict[str, tuple[Callable[[], Classifier], dict[str, Any]]] = {
    "dropout and batch norm": (lambda: Classifier(noisy(), torch.optim.AdamW, lr=1e-2), {}),
    "accumulation": (lambda: Classifier(noisy()), {"accumulate_grad_batches": 3}),
    "logging": (lambda: Logging(noisy()), {}),
    "bf16-mixed": (lambda: Classifier(noisy()), {"precision": "bf16-mixed"}),
    "fp16 with a scaler": (lambda: Classifier(noisy()), {"plugins": "scaler"}),
    "by hand": (ByHand, {}),
    "a batch that is changed": (lambda: Greedy(noisy()), {}),
    "compiled": (compiled, {}),
}


def fitted(case: str, *callbacks: pl.Callback) -> tuple[dict[str, Tensor], Tensor]:
    make, options = FITS[case]
    if options.get("plugins") == "scaler":
        options = {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))]}
    torch.manual_seed(3)
    torch._dynamo.reset()
    model = make()
    trainer(*callbacks, max_steps=12, **options).fit(model, batches(shuffle=True))
    return {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()


@pytest.mark.parametrize("case", FITS)
def test_training_is_that_without_it_bit_for_bit(case: str) -> None:
    weights, chance = fitted(case)
    health = GradHealth(preflight=True)
    seen, chance_seen = fitted(case, health)
    assert weights.keys() == seen.keys()
    assert [name for name in weights if not torch.equal(weights[name], seen[name])] == []
    assert torch.equal(chance, chance_seen)
    assert health.report().steps >= 4
    assert not health.report().aside
    if case == "by hand":
        assert health.preflight_report is None
    else:
        assert health.preflight_report.loss > 0
        assert all(layer.backward_rms > 0 for layer in health.preflight_report.layers)


def test_the_gradients_of_a_scaled_loss_are_reported_unscaled() -> None:
    model, batch = Classifier(), next(iter(batches()))
    expected = diagnose(model, batch)
    health = GradHealth(preflight=True)
    scaled = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10))
    trainer(health, max_steps=1, plugins=[scaled]).fit(model, batches())
    for layer, other in zip(health.preflight_report.layers, expected.layers, strict=True):
        assert layer.backward_rms == pytest.approx(other.backward_rms, rel=0.05)
        assert layer.grad_norm == pytest.approx(other.grad_norm, rel=0.05)


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if "preflight" in record.message]


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    with caplog.at_level(logging.WARNING, logger="lightning_gradhealth"):
        yield lambda: told(caplog)


def test_findings_are_told_before_the_first_step(lines: Callable[[], list[str]]) -> None:
    health = GradHealth(preflight=True)
    model = Classifier(mlp(30, 32))
    trainer(health, max_steps=1, max_epochs=1).fit(model, batches(256, 256))
    assert "vanishing_gradients" in health.preflight_report.conditions
    found = [line for line in lines() if "vanishing_gradients" in line]
    assert len(found) == 1
    assert found[0].startswith("gradhealth: preflight: critical: vanishing_gradients in net.0")
    assert sum("gh.init_weights(model, x) would draw 30 weights anew" in line for line in lines()) == 1
    # one probe is no finding of the run
    assert "vanishing_gradients" not in {finding.condition for finding in health.report().findings}
    assert health.preflight_report.findings
    trainer(health, max_steps=1).fit(Classifier(), batches())
    assert health.preflight_report.healthy  # of the last fit


def test_off_by_default_and_muted(lines: Callable[[], list[str]]) -> None:
    health = GradHealth()
    trainer(health, max_steps=1).fit(Classifier(mlp(30)), batches())
    assert health.preflight_report is None
    assert not lines()
    health = GradHealth(preflight=True, ignore=("vanishing_gradients", "dead_units"))
    trainer(health, max_steps=1).fit(Classifier(mlp(30, 32)), batches())
    assert not health.preflight_report.conditions
    with pytest.raises(TypeError, match="preflight must be True or False, got 'yes'"):
        GradHealth(preflight="yes")


def test_a_run_that_goes_on_has_none(tmp_path: Path) -> None:
    first = trainer(GradHealth(preflight=True), max_steps=4)
    first.fit(Classifier(), batches())
    first.save_checkpoint(tmp_path / "last.ckpt")
    for health in (GradHealth(preflight=True), GradHealth(preflight=True, layers="parameter")):  # with a state, without
        trainer(health, max_steps=6).fit(Classifier(), batches(), ckpt_path=tmp_path / "last.ckpt")
        assert health.preflight_report is None
        assert health.report().steps >= 2


def test_a_preflight_that_fails_ends_nothing(monkeypatch: pytest.MonkeyPatch, lines: Callable[[], list[str]]) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("on purpose")

    monkeypatch.setattr("lightning_gradhealth.callback.examine", fails)
    health = GradHealth(preflight=True)
    trainer(health, max_steps=3).fit(Classifier(), batches())
    assert lines() == ["gradhealth: no preflight (RuntimeError: on purpose)"]
    assert health.report().steps == 3
    assert not health.report().aside


def test_manual_optimization_is_told(lines: Callable[[], list[str]]) -> None:
    trainer(GradHealth(preflight=True), max_steps=3).fit(ByHand(), batches())
    assert lines() == ["gradhealth: no preflight (manual optimization: training_step would step the optimizers)"]


# --- where a NaN begins ------------------------------------------------------------------------------------


class _Unit(nn.Module):
    """Divides by the length of each row, whose gradient at zero is NaN."""

    def forward(self, x: Tensor) -> Tensor:
        return x / (x.square().sum(1, keepdim=True).sqrt() + 1e-9)


class _Log(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.log()


def _net(middle: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16, bias=False), middle, nn.Linear(16, 4))


@pytest.mark.parametrize(
    ("middle", "blank", "loss", "words"),
    [
        (_Log(), False, functional.cross_entropy, "the first output that is not finite is that of 1 (_Log)"),
        (_Log(), False, None, "the first output that is not finite is that of 1 (_Log)"),
        (_Unit(), True, functional.cross_entropy, "in the backward pass of 1 (_Unit), at Sqrt"),
        (nn.ReLU(), False, lambda out, y: out.mean() / 0.0, "the loss of Sequential is not finite"),
    ],
)
def test_diagnose_names_the_origin_of_a_nan(
    middle: nn.Module, blank: bool, loss: Callable[..., Tensor] | None, words: str
) -> None:
    x = inputs(32, 8)
    x[3] *= not blank
    net = _net(middle).eval()
    report = diagnose(net, x if loss is None else (x, labels(32)), loss)
    assert not net.training
    finding = next(f for f in report.findings if f.condition == "non_finite")
    assert words in finding.summary
    assert words in finding.evidence["origin"]


def test_diagnose_names_a_bad_batch_and_bad_weights() -> None:
    x = inputs(32, 8)
    x[0, 0] = math.nan
    (finding,) = (f for f in diagnose(_net(nn.ReLU()), x).findings if f.condition == "non_finite")
    assert "the batch is not finite" in finding.summary
    net = _net(nn.ReLU())
    net[2].weight.data[0, 0] = math.inf
    (finding,) = (f for f in diagnose(net, inputs(32, 8)).findings if f.condition == "non_finite")
    assert "weights or buffers of 2 (Linear) are not finite" in finding.summary
    assert finding.layers == ("2",)
