"""Nets that read sequences: recurrent ones and transformers, fine-tuning among them."""

from __future__ import annotations

import math

import torch
from clinic import Built, must, scenario
from nets import (
    Attention,
    FlashAttention,
    Reader,
    Task,
    Transformer,
    adam,
    adamw,
    classifier,
    recall,
    regressor,
    text,
    token_loss,
)
from torch import Tensor, nn
from torch.nn import functional

BLOCKS = r"net\.blocks\.\d+"


@scenario("pre-LN transformer", 60, chain=BLOCKS)
def pre_norm() -> Built:
    return Task(Transformer(6, attention=lambda: FlashAttention(32, 4)), token_loss, adamw(1e-3)), text(60)


@scenario("pre-LN transformer of 12 blocks with dropout", 40, chain=BLOCKS)
def pre_norm_deep() -> Built:
    return Task(Transformer(12, dropout=0.1), token_loss, adamw(1e-3)), text(40, batch=16)


@scenario("post-LN transformer at a low rate", 60, chain=BLOCKS)
def post_norm() -> Built:
    return Task(Transformer(4, pre=False), token_loss, adam(1e-3)), text(60)


class Encoder(nn.Module):
    """torch's own encoder over tokens."""

    def __init__(self, norm_first: bool = True) -> None:
        super().__init__()
        self.tokens = nn.Embedding(12, 32)
        layer = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.head = nn.Linear(32, 12)

    def forward(self, x: Tensor) -> Tensor:
        future = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return self.head(self.encoder(self.tokens(x), mask=future, is_causal=True))


@scenario("torch's TransformerEncoder", 60, chain=r"net\.encoder\.layers\.\d", units={r".*linear1": "relu"})
def torch_encoder() -> Built:
    return Task(Encoder(), token_loss, adam(1e-3)), text(60)


@scenario(
    "RNN with small W",
    150,
    must=(must("vanishing_gradients", "stalled_loss"),),
    allow=("stalled_loss", "stalled_layers"),
)
def rnn_small() -> Built:
    """What the task needs to remember is gone after three steps: the loss cannot come down."""
    rnn = nn.RNN(4, 32, batch_first=True)
    rnn.weight_hh_l0.data = 0.02 * torch.eye(32)
    return classifier(Reader(rnn, 4), adam(1e-4)), recall(150, batch=64, length=25)


@scenario("LSTM language model", 80)
def lstm() -> Built:
    net = nn.Sequential(nn.Embedding(12, 24), Reader(nn.LSTM(24, 48, num_layers=2, batch_first=True), 12, every=True))
    return Task(net, token_loss, adam(5e-3)), text(80)


@scenario("GRU that copies", 100)
def gru() -> Built:
    data = []
    for _ in range(100):
        x = torch.randint(6, (32, 9))
        data.append((x, torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)))
    net = nn.Sequential(nn.Embedding(6, 16), Reader(nn.GRU(16, 48, batch_first=True), 6, every=True))
    return Task(net, token_loss, adam(5e-3)), data


class CellLoop(nn.Module):
    """A GRU cell, called once a step by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(4, 32)
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), 32)
        for step in x.unbind(1):
            h = self.cell(step, h)
        return self.head(h)


@scenario("GRU cell in a loop", 150)
def cell_loop() -> Built:
    return classifier(CellLoop(), adam(1e-2)), recall(150, batch=32, length=5)


class OwnCell(nn.Module):
    """A recurrent cell of one's own, of two layers, called once a step.

    Args:
        gain: Of its recurrent weights, which are orthogonal.
    """

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.read, self.back, self.head = nn.Linear(4, 32), nn.Linear(32, 32, bias=False), nn.Linear(32, 4)
        nn.init.orthogonal_(self.back.weight, gain)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), 32)
        for step in x.unbind(1):
            h = functional.leaky_relu(self.read(step) + self.back(h), 0.9)
        return self.head(h)


def lately(steps: int) -> list[tuple[Tensor, Tensor]]:
    """What the last three of thirty steps come to."""
    x = torch.randn(steps, 32, 30, 4)
    return list(zip(x, x[:, :, -3:].sum(2), strict=True))


@scenario("cell of one's own", 100, chain=r"net\.read")
def own_cell() -> Built:
    return regressor(OwnCell(1.05), adam(3e-3)), lately(100)


@scenario(
    "cell of one's own with large recurrent weights",
    60,
    must=(must("exploding_gradients", named="net.back", by=40),),
    allow=("exploding_activations", "loss_spike", "oversized_updates", "stalled_loss", "stalled_layers"),
    chain=r"net\.read",
)
def own_cell_large() -> Built:
    return regressor(OwnCell(1.7), adam(1e-4)), lately(60)


class Bag(nn.Module):
    """The mean of the embeddings of a few tokens."""

    def __init__(self, tokens: int, sparse: bool) -> None:
        super().__init__()
        self.tokens = nn.Embedding(tokens, 16, sparse=sparse)
        self.body = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.tokens(x).mean(1))


def words(steps: int, tokens: int) -> list[tuple[Tensor, Tensor]]:
    """Bags of words whose frequencies fall as 1 / rank; the class is whether even or odd ones prevail."""
    frequency = 1 / torch.arange(1, tokens + 1)
    x = torch.multinomial(frequency.expand(steps * 64, -1), 7, replacement=True).view(steps, 64, 7)
    return list(zip(x, (x % 2).sum(-1).gt(3).long(), strict=True))


@scenario("embeddings with rare tokens", 150)
def rare_tokens() -> Built:
    return classifier(Bag(2000, sparse=False), adam(1e-2)), words(150, 2000)


@scenario("sparse embeddings with rare tokens", 150, falls=0.1)
def rare_tokens_sparse() -> Built:
    return classifier(Bag(1000, sparse=True), lambda net: torch.optim.SGD(net.parameters(), lr=1.0)), words(150, 1000)


class LoRA(nn.Module):
    """A frozen linear layer and a trainable update of low rank, which starts at zero."""

    def __init__(self, base: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, base.in_features) / math.sqrt(base.in_features))
        self.up = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + functional.linear(functional.linear(x, self.down), self.up)


@scenario("LoRA", 80, chain=BLOCKS, falls=0.05)
def lora() -> Built:
    net = Transformer(3).requires_grad_(False)
    for block in net.blocks:
        block.attention.query, block.attention.value = LoRA(block.attention.query), LoRA(block.attention.value)
        block.mlp[0] = LoRA(block.mlp[0])

    def trainable(net: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=5e-3)

    return Task(net, token_loss, trainable), text(80)


class Classify(nn.Module):
    """Vision transformer style: patches in, one learned token is read."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.patches = nn.Linear(4, width)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.inner = Transformer(3, width, attention=lambda: Attention(width, 2, causal=False))
        del self.inner.tokens, self.inner.places, self.inner.head
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(x), -1, -1), self.patches(x)], 1)
        for block in self.inner.blocks:
            x = block(x)
        return self.head(self.inner.norm(x[:, 0]))


@scenario("transformer that reads one token", 100, chain=r"net\.inner\.blocks\.\d")
def one_token() -> Built:
    data = recall(100, batch=32, length=8)
    counts = [(x, x.sum(1).argmax(-1)) for x, _ in data]
    return classifier(Classify(), adam(2e-3)), counts
