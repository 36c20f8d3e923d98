"""What goes wrong in training: rates, decay, bad batches, parameters left out; and what only looks like it."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from clinic import Built, must, scenario
from nets import (
    CHAIN,
    HE,
    Reader,
    Task,
    Transformer,
    adam,
    adamw,
    classes,
    classifier,
    digits,
    hidden,
    recall,
    regressor,
    scaled,
    sgd,
    stack,
    text,
    token_loss,
    values,
)
from torch import Tensor, nn
from torch.nn import functional

RUINED = (  # the weights are what chance has left of them
    "exploding_gradients",
    "vanishing_gradients",
    "exploding_activations",
    "vanishing_activations",
    "dead_units",
    "loss_spike",
    "stalled_loss",
    "stalled_layers",
    "non_finite",
    "growing_weights",
)


# --- rates -------------------------------------------------------------------------------------------------


@scenario("rate 1e3 with Adam", 60, must=(must("oversized_updates", by=10),), allow=RUINED)
def rate_huge() -> Built:
    return classifier(stack(4), adam(1e3)), classes(60)


@scenario(
    "rate 1e3 with SGD",
    60,
    must=(must("oversized_updates", "non_finite", "exploding_gradients", by=10),),
    allow=(*RUINED, "oversized_updates"),
)
def rate_huge_plain() -> Built:
    return regressor(stack(3, nn.Tanh), sgd(1e3)), values(60)


@scenario("rate 1e-9", 120, must=(must("stalled_layers", "stalled_loss", by=110),), allow=("stalled_loss",))
def rate_tiny() -> Built:
    return classifier(stack(4), adam(1e-9)), classes(120)


@scenario(
    "rate 1e-9 with SGD, logged every 50 steps",
    250,
    must=(must("stalled_layers", "stalled_loss"),),
    allow=("stalled_loss", "stalled_layers"),
    options={"log_every_n_steps": 50},
)
def rate_tiny_plain() -> Built:
    return regressor(stack(3, nn.Tanh), sgd(1e-9)), values(250, batch=16)


@scenario("lower layers at rate 0", 100, chain=CHAIN, must=(must("stalled_layers", layers=r"net\.[02]", by=60),))
def rate_zero_below() -> Built:
    def groups(net: Any) -> torch.optim.Optimizer:
        lower, upper = [*net[:4].parameters()], [*net[4:].parameters()]
        return torch.optim.AdamW([{"params": lower, "lr": 0.0}, {"params": upper, "lr": 1e-3}])

    return classifier(stack(5), groups), classes(100)


@scenario("fine-tuning with layerwise rates", 100, chain=CHAIN, falls=0.1, noted=("stalled_layers",))
def rates_by_layer() -> Built:
    net = stack(5, inputs=64, outputs=10)

    def groups(net: Any) -> torch.optim.Optimizer:
        rates = (1e-9, 1e-8, 1e-4, 2e-3, 1e-2)
        return torch.optim.Adam([{"params": la.parameters(), "lr": r} for la, r in zip(net[::2], rates, strict=True)])

    return classifier(net, groups), digits(100)


@scenario("one-cycle schedule", 200, chain=CHAIN)
def one_cycle() -> Built:
    def cycle(net: nn.Module) -> dict[str, Any]:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, total_steps=200)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    return classifier(stack(4, norm=nn.BatchNorm1d), cycle), classes(200)


@scenario(
    "post-LN transformer at a high rate",
    40,
    must=(must("oversized_updates", by=20),),
    allow=(*RUINED, "saturated_units"),
)
def post_norm_too_fast() -> Built:
    return Task(Transformer(4, pre=False), token_loss, adam(0.5)), text(40)


# --- decay and ascent --------------------------------------------------------------------------------------


@scenario(
    "weight decay far too high",
    150,
    must=(must("collapsing_weights", by=110),),
    allow=("vanishing_gradients", "vanishing_activations", "stalled_loss", "dead_units"),
    report="BVLC/caffe#1396",
)
def decay_too_high() -> Built:
    return classifier(stack(4), sgd(0.1, weight_decay=0.5)), classes(150)


@scenario(
    "weight decay of AdamW far too high",
    150,
    must=(must("collapsing_weights", by=110),),
    allow=("vanishing_gradients", "vanishing_activations", "stalled_loss", "dead_units", "oversized_updates"),
)
def decay_too_high_decoupled() -> Built:
    return regressor(stack(3, nn.Tanh), adamw(1e-3, weight_decay=60.0)), values(150)


class Ascent(Task):
    """The sign of the loss is wrong: the larger the output, the better."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return -self.net(batch[0]).square().mean()


@scenario(
    "growing weights by ascent",
    150,
    must=(must("growing_weights", layers=r"net\.0", by=110),),
    allow=("exploding_gradients",),
)
def ascent() -> Built:
    net = nn.Sequential(nn.Linear(16, 16, bias=False), nn.LeakyReLU(0.5))
    return Ascent(net, functional.mse_loss, sgd(0.5)), values(150, outputs=16)


# --- bad batches -------------------------------------------------------------------------------------------


@scenario("one NaN batch", 80, must=(must("non_finite", since=37, by=37),))
def nan_batch() -> Built:
    data = classes(80)
    data[37][0][3, 5] = math.nan
    return classifier(stack(4), sgd(0.05)), data


@scenario("one Inf target", 80, must=(must("non_finite", since=52, by=52),))
def inf_target() -> Built:
    data = values(80)
    data[52][1][0, 0] = math.inf
    return regressor(stack(3, nn.GELU), adam(1e-3)), data


class Logarithm(nn.Module):
    """log |Wx|: nothing is wrong with it until a sample is zero."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / math.sqrt(inputs))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight).abs().log()


@scenario("log(0) inside one layer", 80, must=(must("non_finite", since=44, by=44),))
def log_of_zero() -> Built:
    data = classes(80)
    data[44][0][7] = 0.0
    net = nn.Sequential(nn.Linear(16, 24, bias=False), Logarithm(24, 24), nn.Linear(24, 4))
    return classifier(net, adam(1e-3)), data


@scenario(
    "one batch x 1000",
    150,
    must=(must("exploding_gradients", "loss_spike", since=75, by=75),),
    allow=(*RUINED, "oversized_updates"),
)
def batch_times_thousand() -> Built:
    data = values(150)
    data[75][0].mul_(1000.0)
    return regressor(scaled(stack(4), HE), sgd(0.01)), data


@scenario(
    "one batch x 1000 under Adam, logged every 50 steps",
    300,
    must=(must("exploding_gradients", "loss_spike", since=120, by=120),),
    allow=("loss_spike", "stalled_loss", "dead_units"),
    options={"log_every_n_steps": 50},
)
def batch_times_thousand_adam() -> Built:
    data = values(300, batch=32)
    data[120][0].mul_(1000.0)
    return regressor(scaled(stack(3), HE), adam(1e-3)), data


@scenario(
    "exploding RNN over long sequences",
    100,
    must=(must("exploding_gradients", "non_finite", "saturated_units", "loss_spike"),),
    allow=(*RUINED, "oversized_updates", "saturated_units"),
)
def rnn_explodes() -> Built:
    rnn = nn.RNN(4, 16, batch_first=True, nonlinearity="relu")
    rnn.weight_hh_l0.data = 1.6 * torch.eye(16)
    return classifier(Reader(rnn, 4), sgd(0.01)), recall(100, batch=16, length=40)


# --- parameters that are left out --------------------------------------------------------------------------


class Branches(nn.Module):
    """Two branches, of which the forward pass uses one."""

    def __init__(self) -> None:
        super().__init__()
        self.used = stack(3)
        self.branch = stack(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


@scenario("unused branch", 80, must=(must("no_gradient", layers=r"net\.branch\.\d", by=40),))
def unused_branch() -> Built:
    return classifier(Branches(), adam(2e-3)), classes(80)


class Detached(Branches):
    """One branch's output is detached by mistake."""

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x) + self.branch(x).detach()


@scenario("branch cut off by detach", 80, must=(must("no_gradient", layers=r"net\.branch\.\d", by=40),))
def detached_branch() -> Built:
    return classifier(Detached(), sgd(0.1)), classes(80)


@scenario("frozen backbone", 150, units={r"net\.[02]": "relu"})
def frozen_backbone() -> Built:
    net = scaled(stack(4, width=64, inputs=64, outputs=10), HE)
    for layer in net[:4]:
        layer.requires_grad_(False)
    return classifier(net, adam(3e-3)), digits(150)


@scenario("frozen backbone in evaluation mode, head alone in the optimizer", 150)
def frozen_features() -> Built:
    body = stack(4, width=48, inputs=64, outputs=48, norm=nn.BatchNorm1d).requires_grad_(False)
    net = nn.Sequential(body, nn.ReLU(), nn.Linear(48, 10))
    return classifier(net, lambda net: torch.optim.SGD(net[2].parameters(), lr=0.3)), digits(150)


# --- runs that only look sick ------------------------------------------------------------------------------


@scenario("converged run", 300, units={hidden(3): "relu"}, falls=0.9)
def converged() -> Built:
    """An easy task, learned after a quarter of the run."""
    x = torch.randn(64, 16)
    data = [(x, x[:, :4] - x[:, 4:8])] * 300
    return regressor(stack(3), adam(5e-3)), data


@scenario("converged linear regression", 300, falls=0.9)
def converged_exactly() -> Built:
    x, weight = torch.randn(48, 8), torch.randn(8, 3) / 3
    return regressor(nn.Linear(8, 3), sgd(0.05)), [(x, x @ weight)] * 300


@scenario("resumed where another run had converged", 200, chain=CHAIN, falls=None)
def resumed() -> Built:
    """Fine-tuning a net that has learned the task before: nothing is left to be gained but noise."""
    net, data = stack(4, nn.Tanh), classes(600, noise=0.1)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for x, y in data[:400]:
        optimizer.zero_grad()
        functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    return classifier(net, adam(1e-4)), data[400:]


@scenario("label noise", 200, chain=CHAIN, units={hidden(4): "relu"}, falls=0.03)
def label_noise() -> Built:
    return classifier(scaled(stack(4, width=48), HE), adam(2e-3)), classes(200, batch=128, noise=0.6)


@scenario("batch size 1", 400, chain=CHAIN, falls=0.15)
def one_by_one() -> Built:
    return classifier(scaled(stack(4), HE), sgd(0.02)), classes(400, batch=1)


@scenario("accumulation with dropout", 60, chain=CHAIN, options={"accumulate_grad_batches": 4}, falls=0.15)
def accumulation() -> Built:
    net = nn.Sequential(
        nn.Linear(16, 64), nn.ReLU(), nn.Dropout(0.3), nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.3), nn.Linear(64, 4)
    )
    return classifier(net, adam(3e-3)), classes(240, batch=32)


@scenario("bf16-mixed", 120, chain=CHAIN, units={hidden(6): "relu"}, options={"precision": "bf16-mixed"})
def half_precision() -> Built:
    return classifier(scaled(stack(6, width=64, inputs=64, outputs=10), HE), adam(1e-3)), digits(120)


@scenario("zero-initialised head", 120, chain=CHAIN)
def zero_head() -> Built:
    net = scaled(stack(5, width=48, inputs=64, outputs=10), HE)
    nn.init.zeros_(net[-1].weight)
    return classifier(net, adam(1e-3)), digits(120)


@scenario("weight norm", 150, chain=CHAIN)
def weight_norm() -> Built:
    net = scaled(stack(4, width=48), HE)
    for layer in net[::2]:
        torch.nn.utils.parametrizations.weight_norm(layer)
    return classifier(net, sgd(0.1)), classes(150)


@scenario("gradient clipping by the Trainer", 150, chain=CHAIN, options={"gradient_clip_val": 0.5})
def clipped() -> Built:
    return regressor(scaled(stack(4), HE), sgd(0.1, momentum=0.9)), values(150)


class Momentum(Task):
    """A student learns the task and to agree with a teacher, which is the moving average of it."""

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        logits, wanted = self.net(x + 0.1 * torch.randn_like(x)), self.teacher(x).softmax(-1)
        return self.loss(logits, y) + 0.5 * functional.cross_entropy(logits, wanted)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        with torch.no_grad():
            for slow, fast in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
                slow.lerp_(fast, 0.05)


@scenario("EMA teacher", 150)
def moving_average() -> Built:
    return Momentum(stack(4), functional.cross_entropy, adam(3e-3)), classes(150)
