"""Signals over depth: weights too large or too small for what stands between them, and nets that hold the balance."""

from __future__ import annotations

import math

import torch
from clinic import Built, must, scenario
from nets import (
    CHAIN,
    HE,
    Residual,
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

LOST = ("stalled_loss", "stalled_layers")  # nothing can be learned without a signal


def diagonal(c: float, depth: int, width: int = 16, bias: bool = True) -> nn.Sequential:
    """Linear layers of weights c * I."""
    net = nn.Sequential(*(nn.Linear(width, width, bias=bias) for _ in range(depth)))
    for layer in net:
        layer.weight.data = c * torch.eye(width)
        if bias:
            nn.init.zeros_(layer.bias)
    return net


@scenario(
    "linear 1.2*I, 60 layers",
    30,
    chain=CHAIN,
    must=(must("exploding_gradients", by=20), must("exploding_activations", by=20)),
)
def linear_grows() -> Built:
    return regressor(diagonal(1.2, 60), adam(1e-5)), values(30, outputs=16)


@scenario(
    "linear 0.5*I, 20 layers",
    60,
    chain=CHAIN,
    must=(must("vanishing_gradients", by=40), must("vanishing_activations", by=40)),
    allow=LOST,
)
def linear_shrinks() -> Built:
    return regressor(diagonal(0.5, 20, bias=False), sgd(0.1)), values(60, outputs=16)


@scenario("linear 0.9*I, 20 layers", 100, chain=CHAIN, falls=0.1)
def linear_nearly_keeps() -> Built:
    return regressor(diagonal(0.9, 20), adam(3e-4)), values(100, outputs=16)


@scenario(
    "sigmoid MLP of 10 layers",
    100,
    chain=CHAIN,
    units={hidden(10): "sigmoid"},
    must=(must("vanishing_gradients", layers=hidden(10), by=60),),
    allow=LOST,
)
def sigmoid_ten() -> Built:
    return classifier(stack(10, nn.Sigmoid, width=32), adam(1e-3)), classes(100)


@scenario(
    "ReLU 30 with He",
    110,
    chain=CHAIN,
    units={hidden(30): "relu"},
    falls=0.1,
)
def relu_he() -> Built:
    return classifier(scaled(stack(30, width=96, inputs=64, outputs=10), HE), adam(2e-4)), digits(110)


@scenario(
    "ReLU 30 with torch's default",
    100,
    chain=CHAIN,
    must=(must("vanishing_gradients", by=60),),
    allow=(*LOST, "dead_units"),  # what comes in is lost: a unit's own bias decides whether it is ever active
)
def relu_default() -> Built:
    return classifier(stack(30, width=48), adam(1e-3)), classes(100)


@scenario(
    "ReLU 30 with He x 1.5",
    60,
    chain=CHAIN,
    must=(must("exploding_gradients", by=20), must("exploding_activations", by=20)),
    allow=("dead_units", "loss_spike", "oversized_updates"),
)
def relu_too_large() -> Built:
    return regressor(scaled(stack(30, width=48), 1.5 * HE), adam(1e-4)), values(60)


@scenario(
    "ReLU 30 with He x 0.5",
    100,
    chain=CHAIN,
    must=(must("vanishing_gradients", by=60),),
    allow=(
        *LOST,
        "dead_units",
        "vanishing_activations",
    ),  # the biases, once they have learned, give a signal of their own
)
def relu_too_small() -> Built:
    return classifier(scaled(stack(30, width=64), 0.5 * HE), sgd(0.05)), classes(100, batch=32)


@scenario(
    "tanh 50 with gain 0.5",
    80,
    chain=CHAIN,
    must=(must("vanishing_gradients", by=60),),
    allow=(*LOST, "vanishing_activations"),  # the biases, once they have learned, give a signal of their own
)
def tanh_fades() -> Built:
    return regressor(scaled(stack(50, nn.Tanh, width=24), 0.5), adamw(1e-3)), values(80)


@scenario("tanh 12 with Xavier", 100, chain=CHAIN, units={hidden(12): "tanh"})
def tanh_xavier() -> Built:
    return classifier(scaled(stack(12, nn.Tanh, width=64, inputs=64, outputs=10), 1.0), adam(5e-4)), digits(100)


@scenario("SELU 24 with LeCun", 100, chain=CHAIN)
def selu() -> Built:
    return classifier(scaled(stack(24, nn.SELU, width=64, inputs=64, outputs=10), 1.0), adam(3e-4)), digits(100)


@scenario(
    "Mish 40 without norm, torch's default",
    80,
    chain=CHAIN,
    must=(must("vanishing_gradients", by=60),),
    allow=LOST,
)
def mish_deep() -> Built:
    return classifier(stack(40, nn.Mish, width=32), adam(5e-4)), classes(80)


@scenario("Mish 5 without norm", 150, chain=CHAIN)
def mish_shallow() -> Built:
    return classifier(stack(5, nn.Mish, width=48), adam(2e-3)), classes(150)


@scenario("PReLU 8", 150, chain=CHAIN)
def prelu() -> Built:
    return classifier(scaled(stack(8, nn.PReLU, width=48), 1.37), sgd(0.05, momentum=0.9)), classes(150)


@scenario("GELU 12 with He", 100, chain=CHAIN)
def gelu() -> Built:
    return classifier(scaled(stack(12, nn.GELU, width=64, inputs=64, outputs=10), HE), adamw(5e-4)), digits(100)


# --- residual ----------------------------------------------------------------------------------------------


def branch(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))


def residual_net(blocks: int, width: int = 32, inputs: int = 16, outputs: int = 4) -> nn.Sequential:
    """net.0 reads, net.1 ... are the blocks, the last one is the head."""
    body = [Residual(branch(width)) for _ in range(blocks)]
    return nn.Sequential(nn.Linear(inputs, width), *body, nn.Linear(width, outputs))


@scenario(
    "64 residual blocks without norm, with He",
    30,
    chain=CHAIN,
    must=(must("exploding_gradients", by=20), must("exploding_activations", by=20)),
    allow=("loss_spike", "oversized_updates", "dead_units"),
)
def residual_he() -> Built:
    return classifier(scaled(residual_net(64), HE), adam(1e-4)), classes(30)


@scenario("64 residual blocks without norm, with Fixup", 80, chain=CHAIN)
def residual_fixup() -> Built:
    """Fixup: the last weight of every branch and the head start at zero, the others at He / sqrt(blocks)."""
    net = scaled(residual_net(64), HE)
    for block in net[1:-1]:
        block.branch[0].weight.data /= math.sqrt(64)
        nn.init.zeros_(block.branch[2].weight)
    nn.init.zeros_(net[-1].weight)
    return classifier(net, sgd(0.05, momentum=0.9)), classes(80)


class Amplifier(nn.Module):
    """A residual block by hand whose sum is multiplied by 1.5."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)
        self.outer = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return 1.5 * (x + 0.1 * self.outer(torch.relu(self.inner(x))))


@scenario(
    "residual stack x 1.5 by hand, 32 blocks",
    30,
    chain=CHAIN,
    must=(must("exploding_gradients", by=20), must("exploding_activations", by=20)),
    allow=("loss_spike",),
)
def residual_amplified() -> Built:
    body = [Amplifier(24) for _ in range(32)]
    return regressor(nn.Sequential(nn.Linear(16, 24), *body, nn.Linear(24, 4)), adam(1e-5)), values(30, batch=32)


class ReZero(nn.Module):
    """x + alpha * f(x), alpha from zero on."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch = branch(width)
        self.alpha = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.alpha * self.branch(x)


@scenario("ReZero, 32 blocks", 80, chain=CHAIN)
def rezero() -> Built:
    body = [ReZero(32) for _ in range(32)]
    return classifier(nn.Sequential(nn.Linear(16, 32), *body, nn.Linear(32, 4)), adam(2e-3)), classes(80)


@scenario("sigmoid MLP of 3 layers", 150, units={hidden(3): "sigmoid"}, options={"log_every_n_steps": 50})
def sigmoid_three() -> Built:
    return classifier(stack(3, nn.Sigmoid, width=32), adam(1e-2)), classes(150)


@scenario(
    "ReLU MLP of 10 layers with BatchNorm",
    120,
    chain=CHAIN,
    units={hidden(10, first=1, each=3): "relu"},
)
def relu_normed() -> Built:
    return classifier(stack(10, width=32, norm=nn.BatchNorm1d), sgd(0.1, momentum=0.9)), classes(120)
