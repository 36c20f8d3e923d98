"""Units that are dead or saturated, and their healthy neighbours: leaky, sparse, gated."""

from __future__ import annotations

import functools

import torch
from clinic import Built, must, scenario
from nets import (
    CHAIN,
    HE,
    Attention,
    FlashAttention,
    Reader,
    Task,
    Transformer,
    adam,
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

CUT_OFF = ("vanishing_gradients", "vanishing_activations", "stalled_layers", "stalled_loss")


@scenario(
    "tanh with std 3",
    80,
    units={hidden(6): "tanh"},
    must=(must("saturated_units", layers=hidden(6), by=40),),
    allow=("exploding_gradients", "oversized_updates", "stalled_loss"),
)
def tanh_std_3() -> Built:
    net = stack(6, nn.Tanh, width=128, inputs=64, outputs=10)
    for layer in net[::2]:
        nn.init.normal_(layer.weight, std=3.0)
    return classifier(net, adam(1e-3)), digits(80, batch=128)


@scenario(
    "biases at -10",
    100,
    chain=CHAIN,
    units={hidden(6): "relu"},
    must=(must("dead_units", layers=hidden(6), by=60),),
    allow=CUT_OFF,
)
def biases_at_minus_ten() -> Built:
    net = scaled(stack(6, width=48), HE, bias=-10.0)
    return classifier(net, adam(1e-3)), classes(100)


@scenario(
    "one dead layer in the middle",
    120,
    units={hidden(5): "relu"},
    must=(must("dead_units", layers=r"net\.[46]", named="net.4", by=60),),  # behind it nothing but biases is left
    allow=CUT_OFF,
)
def dead_in_the_middle() -> Built:
    net = scaled(stack(5, width=40), HE)
    nn.init.constant_(net[4].bias, -60.0)
    return regressor(net, sgd(0.05)), values(120)


class Slump(Task):
    """What one huge step leaves behind: a layer whose biases are far below zero."""

    def on_train_batch_end(self, outputs: object, batch: object, batch_idx: int) -> None:
        if batch_idx == 40:
            with torch.no_grad():
                self.net[2].bias -= 100.0


@scenario(
    "a layer dies in the course of training",
    160,
    units={hidden(4): "relu"},
    must=(must("dead_units", layers=r"net\.[24]", named="net.2", since=40, by=110),),
    allow=(*CUT_OFF, "loss_spike"),
)
def dies_on_the_way() -> Built:
    net = scaled(stack(4, width=32), HE)
    return Slump(net, functional.cross_entropy, adam(1e-3)), classes(160)


class Functional(nn.Module):
    """Two convolutions, a linear layer and functional ReLUs; the first convolution's biases shut most channels."""

    def __init__(self, bias: float) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 16, 3, padding=1)
        self.second = nn.Conv2d(16, 16, 3, stride=2, padding=1)
        self.head = nn.Linear(16 * 16, 10)
        with torch.no_grad():
            self.first.bias[:12] = bias

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.first(x))
        x = torch.relu_(self.second(x))
        return self.head(x.flatten(1))


@scenario(
    "dead channels behind functional ReLUs",
    80,
    units={r"net\.(first|second)": "relu"},
    must=(must("dead_units", layers=r"net\.first", by=40),),
)
def dead_channels() -> Built:
    return classifier(Functional(-20.0), adam(1e-3)), digits(80, image=True)


@scenario("living channels behind functional ReLUs", 120, units={r"net\.(first|second)": "relu"})
def living_channels() -> Built:
    return classifier(Functional(0.0), adam(2e-3)), digits(120, image=True)


@scenario(
    "dead behind BatchNorm",
    80,
    units={r"net\.[14]": "relu"},
    must=(must("dead_units", layers=r"net\.4", by=60),),
    allow=CUT_OFF,
)
def dead_behind_norm() -> Built:
    net = stack(3, width=32, norm=nn.BatchNorm1d)
    nn.init.constant_(net[4].bias, -8.0)
    return classifier(net, sgd(0.02)), classes(80, batch=128)


@scenario("LeakyReLU with negative biases", 150, chain=CHAIN)
def leaky() -> Built:
    net = scaled(stack(4, functools.partial(nn.LeakyReLU, 0.2), width=48), HE, bias=-4.0)
    return classifier(net, adam(3e-3)), classes(150)


class Sparse(nn.Module):
    """An autoencoder whose hidden units each answer to few of the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(24, 128)
        self.decoder = nn.Linear(128, 24)
        nn.init.normal_(self.encoder.weight, std=24**-0.5)
        nn.init.constant_(self.encoder.bias, -1.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(torch.relu(self.encoder(x)))


@scenario("sparse but alive ReLUs", 200, units={r"net\.encoder": "relu"})
def sparse() -> Built:
    data = [(x, x) for x, _ in classes(200, batch=128, inputs=24)]
    return regressor(Sparse(), adam(2e-3)), data


@scenario(
    "sigmoid gates shut by their biases",
    80,
    units={r"net\.[024]": "sigmoid"},
    must=(must("saturated_units", layers=r"net\.2", by=60),),
    allow=CUT_OFF,
)
def sigmoid_shut() -> Built:
    net = stack(4, nn.Sigmoid, width=24)
    nn.init.constant_(net[2].bias, 9.0)
    return classifier(net, adam(1e-3)), classes(80)


@scenario(
    "hardtanh beyond its limits",
    80,
    units={hidden(4): "hardtanh"},
    must=(must("saturated_units", layers=hidden(4), by=60),),
    allow=CUT_OFF,
)
def hardtanh_beyond() -> Built:
    net = scaled(stack(4, nn.Hardtanh, width=48), 60.0)
    return classifier(net, sgd(0.01)), classes(80, batch=128)


@scenario("hardtanh within its limits", 120, units={hidden(4): "hardtanh"})
def hardtanh_within() -> Built:
    return classifier(scaled(stack(4, nn.Hardtanh, width=48), 1.0), sgd(0.1, momentum=0.9)), classes(120)


@scenario(
    "RNN with large W",
    80,
    units={r"net\.rnn": "tanh output"},
    must=(must("saturated_units", "exploding_gradients", by=60),),
    allow=("exploding_gradients", "stalled_loss", "oversized_updates"),
)
def rnn_large() -> Built:
    rnn = nn.RNN(4, 64, batch_first=True)
    for weight in (rnn.weight_ih_l0, rnn.weight_hh_l0):
        nn.init.normal_(weight, std=6.0)
    return classifier(Reader(rnn, 4), adam(1e-3)), recall(80, batch=32, length=10)


@scenario("RNN with orthogonal W", 150, units={r"net\.rnn": "tanh output"})
def rnn_orthogonal() -> Built:
    rnn = nn.RNN(4, 48, batch_first=True)
    nn.init.orthogonal_(rnn.weight_hh_l0)
    return classifier(Reader(rnn, 4), adam(2e-3)), recall(150, batch=32, length=8)


def attending(attention: type[Attention], scale: float) -> nn.Module:
    """A transformer whose queries are `scale` times as long as usual, over tokens no two of which are alike."""
    net = Transformer(2, attention=lambda: attention(32, 2))
    nn.init.normal_(net.places)
    for block in net.blocks:
        block.attention.query.weight.data *= scale
        block.attention.query.bias.data *= scale
    return net


@scenario(
    "attention collapsed: logits x 300",
    50,
    chain=r"net\.blocks\.\d",
    units={r"net\.blocks\.\d\.attention": "softmax"},
    must=(must("saturated_units", layers=r"net\.blocks\.\d\.attention.*", by=60),),
    allow=("stalled_layers", "oversized_updates"),
)
def attention_collapse() -> Built:
    return Task(attending(Attention, 300.0), token_loss, adam(1e-3)), text(50)


@scenario(
    "attention collapsed inside the fused kernel",
    50,
    units={r"net\.blocks\.\d\.attention": "softmax"},
    must=(must("saturated_units", layers=r"net\.blocks\.\d\.attention.*", by=60),),
    allow=("stalled_layers", "oversized_updates"),
)
def fused_collapse() -> Built:
    return Task(attending(FlashAttention, 1000.0), token_loss, adam(1e-3)), text(50)


@scenario(
    "attention over many tokens, nearly uniform",
    60,
    chain=r"net\.blocks\.\d",
    units={r"net\.blocks\.\d\.attention": "softmax"},
    falls=0.1,
)
def attention_uniform() -> Built:
    net = Transformer(2, length=64, attention=lambda: Attention(32, 2, causal=False))
    return Task(net, token_loss, adam(2e-3)), text(60, batch=8, length=64)


class Conditioned(nn.Module):
    """Tokens that look at one vector of context: with a single key the softmax is 1, whatever the scores."""

    def __init__(self) -> None:
        super().__init__()
        self.context = nn.Linear(4, 32)
        self.tokens = nn.Parameter(torch.randn(6, 32))
        self.cross = nn.MultiheadAttention(32, 2, batch_first=True)
        self.head = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 1))

    def forward(self, x: Tensor) -> Tensor:
        queries = self.tokens.expand(len(x), -1, -1)
        key = self.context(x).unsqueeze(1)
        return self.head(queries + self.cross(queries, key, key, need_weights=False)[0]).squeeze(-1)


@scenario("attention over a single key", 150)
def single_key() -> Built:
    return regressor(Conditioned(), adam(3e-3)), values(150, inputs=4, outputs=6)


class Mixture(nn.Module):
    """Four experts of which a gate picks the best two for each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(16, 4)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 4)) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        weight, chosen = self.gate(x).softmax(-1).topk(2)
        outputs = torch.stack([expert(x) for expert in self.experts], 1)
        picked = outputs.gather(1, chosen[..., None].expand(-1, -1, outputs.shape[-1]))
        return (weight[..., None] * picked).sum(1)


@scenario("mixture of four experts, two of them for each sample", 120, units={r"net\.experts\.\d\.0": "relu"})
def mixture() -> Built:
    return classifier(Mixture(), adam(3e-3)), classes(120)
