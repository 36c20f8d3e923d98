"""Trainings whose numbers are odd by design: outputs that saturate as they should, gradients that end at zero."""

from __future__ import annotations

import math
from typing import Any

import torch
from clinic import Built, must, scenario
from nets import (
    CHAIN,
    HE,
    Attention,
    Task,
    Transformer,
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
    text,
    token_loss,
    values,
)
from torch import Tensor, nn
from torch.nn import functional


@scenario("a confident sigmoid at the end", 250, units={hidden(3): "relu"}, falls=0.8)
def confident() -> Built:
    """Well told classes: the output is where it should be, near 0 or 1."""
    data = [(x, (x[:, :1] > 0).float()) for x, _ in classes(250) if x is not None]
    for x, y in data:
        x[:, :1] += 4 * y - 2
    net = nn.Sequential(*stack(3, outputs=1), nn.Sigmoid())
    return Task(net, functional.binary_cross_entropy, adam(1e-2)), data


@scenario("pixels that are always dark", 250, units={r"net\.0": "relu"})
def dark_frame() -> Built:
    """Small digits in a wide frame: most of the output's sigmoids have to stay at zero."""
    data = []
    for x, _ in digits(250, image=True):
        framed = functional.pad((x > 0.5).float(), (6, 6, 6, 6)).flatten(1)
        data.append((framed, framed))
    net = nn.Sequential(nn.Linear(400, 48), nn.ReLU(), nn.Linear(48, 400), nn.Sigmoid())
    return Task(net, functional.binary_cross_entropy, adam(3e-3)), data


def hinge(output: Tensor, y: Tensor) -> Tensor:
    return functional.relu(1 - output.squeeze(-1) * y).mean()


@scenario("hinge loss that comes to rest at zero", 300, units={hidden(3): "relu"}, falls=0.95)
def hinge_at_rest() -> Built:
    """Once every margin is met, the gradient is exactly zero."""
    x = torch.randn(48, 16)
    x[:, 0] += 3 * x[:, 0].sign()
    return Task(stack(3, outputs=1), hinge, sgd(0.05, momentum=0.9)), [(x, x[:, 0].sign())] * 300


class Sine(nn.Module):
    """sin(30 z): the layers before it have small weights on purpose (SIREN)."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(30 * x)


@scenario("SIREN that learns an image", 150, chain=CHAIN)
def siren() -> Built:
    net = nn.Sequential(*(part for n in (2, 48, 48) for part in (nn.Linear(n, 48), Sine())), nn.Linear(48, 1))
    for number, layer in enumerate(net[::2]):
        limit = 1 / 2 if number == 0 else math.sqrt(6 / 48) / 30
        nn.init.uniform_(layer.weight, -limit, limit)
    x = torch.cartesian_prod(*2 * [torch.linspace(-1, 1, 16)])
    y = torch.sin(5 * x[:, :1]) * torch.cos(7 * x[:, 1:])
    return regressor(net, adam(3e-4)), [(x, y)] * 150


class Squeeze(nn.Module):
    """Inverted residual of a mobile net: hardswish, and a hardsigmoid that weighs the channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.wide = nn.Sequential(nn.Conv2d(width, 3 * width, 1), nn.BatchNorm2d(3 * width), nn.Hardswish())
        self.depth = nn.Conv2d(3 * width, 3 * width, 3, padding=1, groups=3 * width)
        self.squeeze, self.excite = nn.Linear(3 * width, width), nn.Linear(width, 3 * width)
        self.narrow = nn.Conv2d(3 * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        inner = functional.relu6(self.depth(self.wide(x)))
        weight = functional.hardsigmoid(self.excite(functional.silu(self.squeeze(inner.mean((2, 3))))))
        return x + self.narrow(inner * weight[..., None, None])


@scenario(
    "mobile net with squeeze and excite",
    60,
    chain=CHAIN,
    units={r".*excite": "hardsigmoid", r".*depth": "relu6"},
)
def mobile() -> Built:
    body = [nn.Conv2d(1, 12, 3, 2, 1), *(Squeeze(12) for _ in range(3))]
    net = scaled(nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 10)), HE)
    return classifier(net, adam(5e-3)), digits(60, image=True)


class Wave(nn.Module):
    """Dilated causal convolutions, gated by tanh times sigmoid, each added to what came in."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.tokens = nn.Embedding(12, width)
        self.convs = nn.ModuleList(nn.Conv1d(width, 2 * width, 2, dilation=2**n) for n in range(4))
        self.head = nn.Linear(width, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(x).transpose(1, 2)
        for conv in self.convs:
            content, gate = conv(functional.pad(x, (conv.dilation[0], 0))).chunk(2, 1)
            x = x + torch.tanh(content) * torch.sigmoid(gate)
        return self.head(x.transpose(1, 2))


@scenario("gated dilated convolutions", 80)
def wave() -> Built:
    return Task(Wave(), token_loss, adam(5e-3)), text(80)


class Tied(Transformer):
    """The embedding is the head, too."""

    def __init__(self) -> None:
        super().__init__(2)
        nn.init.normal_(self.tokens.weight, std=0.1)
        self.head.weight = self.tokens.weight


@scenario("language model with tied embeddings", 70, chain=r"net\.blocks\.\d")
def tied() -> Built:
    return Task(Tied(), token_loss, adamw(2e-3)), text(70)


class Graph(nn.Module):
    """Graph convolutions: each node takes the mean over its neighbours."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(n, 32) for n in (8, 32))
        self.head = nn.Linear(32, 2)
        links = (torch.rand(60, 60) < 0.08).float() + torch.eye(60)
        self.register_buffer("mean", links / links.sum(-1, keepdim=True))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.relu(layer(self.mean @ x))
        return self.head(x).flatten(0, 1)


@scenario("graph convolutions", 150, units={r"net\.layers\.\d": "relu"}, falls=0.05)
def graph() -> Built:
    net = Graph()
    data = []
    for x in torch.randn(150, 4, 60, 8):
        data.append((x, (net.mean @ net.mean @ x)[..., 0].gt(0).long().flatten()))
    return classifier(net, adam(3e-3)), data


class Exits(nn.Module):
    """A head after every layer; their losses are added up."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16 if n == 0 else 32, 32) for n in range(5))
        self.heads = nn.ModuleList(nn.Linear(32, 4) for _ in range(5))

    def forward(self, x: Tensor) -> list[Tensor]:
        outputs = []
        for layer, head in zip(self.layers, self.heads, strict=True):
            x = functional.elu(layer(x))
            outputs.append(head(x))
        return outputs


def sum_of_losses(outputs: list[Tensor], y: Tensor) -> Tensor:
    return torch.stack([functional.cross_entropy(output, y) for output in outputs]).sum()


@scenario("deep supervision", 120)
def exits() -> Built:
    return Task(Exits(), sum_of_losses, adam(3e-3)), classes(120)


class Denoiser(nn.Module):
    """Predicts the noise that was added, told how much of it there is."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.time = nn.Linear(2, 64), nn.Linear(16, 64)
        self.body = nn.Sequential(
            nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2)
        )
        nn.init.zeros_(self.body[-1].weight)

    def forward(self, x: Tensor) -> Tensor:
        angle = x[:, 2:] * torch.arange(1, 9) * math.pi
        return self.body(self.enter(x[:, :2]) + self.time(torch.cat([angle.sin(), angle.cos()], -1)))


@scenario("diffusion in two dimensions", 250)
def diffusion() -> Built:
    angle, share, noise = torch.rand(250, 128, 1) * 2 * math.pi, torch.rand(250, 128, 1), torch.randn(250, 128, 2)
    points = torch.cat([angle.cos(), angle.sin()], -1)
    mixed = (1 - share).sqrt() * points + share.sqrt() * noise
    x = torch.cat([mixed, share], -1)
    return regressor(Denoiser(), adam(3e-3)), list(zip(x, noise, strict=True))


@scenario("targets with heavy tails", 200, chain=CHAIN, falls=0.1)
def heavy_tails() -> Built:
    noise = torch.distributions.StudentT(3.0)
    data = [(x, y + 0.5 * noise.sample(y.shape)) for x, y in values(200)]
    return Task(stack(3), functional.smooth_l1_loss, adam(3e-3)), data


@scenario("LBFGS", 30, chain=CHAIN)
def lbfgs() -> Built:
    x, y = values(1, batch=128)[0]
    net = scaled(stack(3, nn.Tanh, width=16), 1.0)
    return regressor(net, lambda net: torch.optim.LBFGS(net.parameters(), lr=0.3, max_iter=4)), [(x, y)] * 30


@scenario("RMSprop on a wide net with strong dropout", 150, chain=CHAIN)
def wide() -> Built:
    net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Dropout(0.5), nn.Linear(256, 10))
    return classifier(net, lambda net: torch.optim.RMSprop(net.parameters(), lr=1e-3)), digits(150)


@scenario("attention that learns to look at one token", 130, chain=r"net\.blocks\.\d")
def pointer() -> Built:
    """The answer at every position is the token before it: the attention gets sharp because it should."""
    data = [(x, torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)) for x, _ in text(130)]
    return Task(Transformer(1, attention=lambda: Attention(32, 2)), token_loss, adam(5e-3)), data


# --- and some more that are sick ---------------------------------------------------------------------------


@scenario("the task changes for good", 200, must=(must("loss_spike", since=120, by=125),))
def other_task() -> Built:
    """From one step on all targets have the other sign."""
    data = [(x, y if step < 120 else -3 * y) for step, (x, y) in enumerate(values(200))]
    return regressor(stack(3, nn.Tanh), sgd(0.03, momentum=0.9)), data


class Bootstrap(Task):
    """Learns its own output times 1.4, as a value function does whose discount is above one."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        output = self.net(batch[0])
        return (output - 1.4 * output.detach()).square().mean()


@scenario(
    "bootstrapped targets that run away",
    150,
    must=(must("growing_weights", layers=r"net\.2", by=110),),
    allow=("exploding_gradients", "stalled_loss", "loss_spike"),
)
def runaway() -> Built:
    net = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 8))
    net[0].requires_grad_(False)
    return Bootstrap(net, functional.mse_loss, sgd(0.25)), values(150)


@scenario(
    "GELU 20 with weights of 0.02 and no norm",
    80,
    chain=CHAIN,
    must=(must("vanishing_activations", by=60), must("vanishing_gradients", by=60)),
    allow=("stalled_loss", "stalled_layers"),
)
def gelu_tiny() -> Built:
    net = stack(20, nn.GELU, width=64)
    for layer in net[::2]:
        nn.init.normal_(layer.weight, std=0.02)
        layer.bias = None
    return regressor(net, sgd(0.01)), values(80)


@scenario(
    "tanh 30 with torch's default, logged every 50 steps",
    200,
    chain=CHAIN,
    must=(must("vanishing_gradients", by=160),),
    allow=("stalled_loss", "stalled_layers", "vanishing_activations"),
    options={"log_every_n_steps": 50},
)
def tanh_default() -> Built:
    return classifier(stack(30, nn.Tanh, width=40), sgd(0.01)), classes(200, batch=16)


@scenario(
    "orthogonal 1.4 in bf16-mixed",
    60,
    chain=CHAIN,
    must=(must("exploding_activations", by=20), must("exploding_gradients", by=20)),
    allow=("loss_spike",),
    options={"precision": "bf16-mixed"},
)
def orthogonal_too_large() -> Built:
    net = stack(30, nn.Identity, width=32, inputs=32, outputs=32)
    for layer in net[::2]:
        nn.init.orthogonal_(layer.weight, 1.4)
    return regressor(net, adam(1e-6)), values(60, inputs=32, outputs=32)


@scenario(
    "He on dying ReLUs: the rate is too high at first",
    150,
    units={hidden(4): "relu"},
    must=(must("dead_units", "oversized_updates", by=100),),
    allow=(
        "dead_units",
        "oversized_updates",
        "vanishing_gradients",
        "stalled_layers",
        "stalled_loss",
        "exploding_gradients",
    ),
)
def burnt() -> Built:
    def burn(net: nn.Module) -> dict[str, Any]:
        optimizer = torch.optim.Adam(net.parameters(), lr=1.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step < 5 else 1e-3)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    return classifier(scaled(stack(4), HE), burn), classes(150)
