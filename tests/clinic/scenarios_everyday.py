"""What everyday trainings do besides: validation, warm-up, unfreezing, layers left out by chance, other precisions."""

from __future__ import annotations

import math
from typing import Any

import torch
from clinic import Built, must, scenario
from nets import (
    CHAIN,
    HE,
    Residual,
    Task,
    adam,
    adamw,
    classes,
    classifier,
    digits,
    hidden,
    regressor,
    scaled,
    sgd,
    stack,
    values,
)
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader


class Validated(Task):
    """Looks at other data every now and then, of another size and far from what it is trained on."""

    def val_dataloader(self) -> DataLoader:
        return DataLoader([(100 * x, y) for x, y in classes(4, batch=9)], batch_size=None)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.loss(self.net(batch[0]), batch[1])


@scenario("validation every 40 steps", 150, chain=CHAIN, units={hidden(4): "tanh"}, options={"val_check_interval": 40})
def validated() -> Built:
    return Validated(scaled(stack(4, nn.Tanh), 1.0), functional.cross_entropy, adam(3e-3)), classes(150)


@scenario("warm-up from zero over 100 steps", 200, chain=CHAIN)
def warm_up() -> Built:
    def rising(net: nn.Module) -> dict[str, Any]:
        optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 100))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    return classifier(stack(4, nn.SiLU), rising), classes(200)


class Unfreezing(Task):
    """Its body joins the optimizer, at a tenth of the rate, after 60 steps."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 60:
            self.net[0].requires_grad_(True)
            self.optimizers().optimizer.add_param_group({"params": list(self.net[0].parameters()), "lr": 3e-4})


@scenario("backbone unfrozen in the course of training", 150)
def unfreezing() -> Built:
    net = nn.Sequential(stack(3, inputs=64, outputs=32), nn.ReLU(), nn.Linear(32, 10))
    net[0].requires_grad_(False)
    head = lambda net: torch.optim.Adam(net[2].parameters(), lr=3e-3)  # noqa: E731
    return Unfreezing(net, functional.cross_entropy, head), digits(150)


class Skipping(nn.Module):
    """Stochastic depth: each block is left out in a third of the steps."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.head = nn.Linear(16, 32), nn.Linear(32, 4)
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 32), nn.ReLU()) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for block in self.blocks:
            if torch.rand(()) > 1 / 3:
                x = x + block(x)
        return self.head(x)


@scenario("stochastic depth", 150, units={r"net\.blocks\.\d\.1": "relu"})
def stochastic_depth() -> Built:
    return classifier(Skipping(), adam(2e-3)), classes(150)


class Turns(nn.Module):
    """Two tasks with a head each; batches of the second come once in eight."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = stack(3, outputs=32)
        self.heads = nn.ModuleList([nn.Linear(32, 4), nn.Linear(32, 4)])

    def forward(self, x: Tensor) -> Tensor:
        return self.heads[int(x[0, 0] > 100)](functional.relu(self.trunk(x).clamp(-50, 50)))


@scenario("a head that is used once in eight steps", 200)
def turns() -> Built:
    data = classes(200)
    for x, y in data[3::8]:
        x[0, 0] = 101.0
        y.copy_(3 - y)
    return classifier(Turns(), adam(3e-3)), data


@scenario("pure bf16", 150, chain=CHAIN, options={"precision": "bf16-true"})
def bf16_true() -> Built:
    net = scaled(stack(4, width=48), HE)
    return Task(net, lambda output, y: functional.cross_entropy(output.float(), y), sgd(0.1)), classes(150)


@scenario("float64", 120, chain=CHAIN, units={hidden(5): "relu"}, options={"precision": "64-true"})
def float64() -> Built:
    return classifier(scaled(stack(5), HE), adam(2e-3)), classes(120)


@scenario("a loss in tiny units", 150, chain=CHAIN)
def tiny_units() -> Built:
    small = lambda output, y: 1e-6 * functional.cross_entropy(output, y)  # noqa: E731
    return Task(scaled(stack(4), HE), small, adam(2e-3, eps=1e-14)), classes(150)


@scenario("a loss in huge units", 150, chain=CHAIN)
def huge_units() -> Built:
    large = lambda output, y: 1e6 * functional.mse_loss(output, y)  # noqa: E731
    return Task(scaled(stack(4), HE), large, adam(2e-3)), values(150)


@scenario("raw inputs from 0 to 255", 150, chain=CHAIN, falls=0.1)
def raw_inputs() -> Built:
    data = [((x + 2) * 50, y) for x, y in digits(150)]
    return classifier(stack(4, inputs=64, outputs=10, width=48), adam(5e-4)), data


@scenario("policy head with gain 0.01", 150, chain=CHAIN, units={hidden(5): "tanh"})
def small_head() -> Built:
    net = scaled(stack(5, nn.Tanh, width=48), HE)
    nn.init.orthogonal_(net[-1].weight, 0.01)
    return classifier(net, adam(1e-3)), classes(150)


@scenario("bottleneck of two units", 250, chain=CHAIN, falls=0.1)
def bottleneck() -> Built:
    widths = (64, 48, 24, 2, 24, 48, 64)
    parts = [part for pair in zip(widths, widths[1:]) for part in (nn.Linear(*pair), nn.ELU())]  # noqa: B905
    return regressor(nn.Sequential(*parts[:-1]), adam(3e-3)), [(x, x) for x, _ in digits(250)]


@scenario("residual MLP with LayerScale and weight decay", 150, chain=CHAIN)
def layer_scale() -> Built:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gamma = nn.Parameter(torch.full((32,), 1e-4))

        def forward(self, x: Tensor) -> Tensor:
            return self.gamma * x

    blocks = [
        Residual(nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32), Scale()))
        for _ in range(8)
    ]
    net = nn.Sequential(nn.Linear(16, 32), *blocks, nn.LayerNorm(32), nn.Linear(32, 4))
    return classifier(net, adamw(3e-3, weight_decay=0.1)), classes(150)


# --- sick --------------------------------------------------------------------------------------------------


@scenario(
    "ReLU6 beyond its upper end",
    80,
    units={hidden(4): "relu6"},
    must=(must("dead_units", layers=r"net\.[24]", named="net.2", by=60),),
    allow=("vanishing_gradients", "stalled_layers", "stalled_loss"),
)
def beyond_six() -> Built:
    net = scaled(stack(4, nn.ReLU6), HE)
    nn.init.constant_(net[2].bias, 60.0)
    return classifier(net, sgd(0.02)), classes(80)


@scenario(
    "hardsigmoid shut",
    80,
    units={hidden(3): "hardsigmoid"},
    must=(must("saturated_units", layers=r"net\.2", by=60),),
    allow=("stalled_layers", "stalled_loss", "vanishing_gradients"),
)
def hardsigmoid_shut() -> Built:
    net = stack(3, nn.Hardsigmoid, width=24)
    nn.init.constant_(net[2].bias, -12.0)
    return regressor(net, adam(1e-3)), values(80)


@scenario("NaN in a weight from the start", 30, must=(must("non_finite", by=0),))
def nan_weight() -> Built:
    net = stack(4)
    net[2].weight.data[3, 3] = math.nan
    return classifier(net, adam(1e-3)), classes(30)


class Length(nn.Module):
    """The length of every sample's features: at zero its derivative is infinite."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(16, 16, bias=False)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.inner(x)
        return self.head(inner / (1 + inner.square().sum(-1, keepdim=True).sqrt()))


@scenario("sqrt(0): the loss is finite, its gradient is not", 80, must=(must("non_finite", since=33, by=33),))
def sqrt_of_zero() -> Built:
    data = classes(80)
    data[33][0][5] = 0.0
    return classifier(Length(), sgd(0.1)), data


@scenario(
    "CNN with BatchNorm at rate 30",
    40,
    must=(must("oversized_updates", by=10),),
    allow=(
        *("exploding_gradients", "vanishing_gradients", "exploding_activations", "vanishing_activations"),
        *("dead_units", "loss_spike", "stalled_loss", "stalled_layers", "growing_weights", "non_finite"),
    ),
)
def normed_too_fast() -> Built:
    parts = [nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU()]
    net = nn.Sequential(*parts, nn.Flatten(), nn.Linear(128, 10))
    return classifier(net, adam(30.0)), digits(40, batch=32, image=True)


@scenario(
    "batch size 8: dead only after many probes",
    400,
    units={hidden(3): "relu"},
    must=(must("dead_units", layers=r"net\.2"),),
    allow=("stalled_layers", "stalled_loss"),
)
def dead_small_batches() -> Built:
    net = scaled(stack(3), HE)
    nn.init.constant_(net[2].bias, -40.0)
    return classifier(net, sgd(0.01)), classes(400, batch=8)
