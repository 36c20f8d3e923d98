"""What the trainings of the clinic are made of: a task around any network, data made on the spot, blocks of nets."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional

Pairs = list[tuple[Tensor, Tensor]]
MakeOptimizer = Callable[[nn.Module], Any]


# --- the task ----------------------------------------------------------------------------------------------


class Task(pl.LightningModule):
    """A network, what it is to minimise, and the optimizer.

    Args:
        net: The network.
        loss: Of the network's output and the target.
        optimizer: Makes the optimizer, or whatever else configure_optimizers may give.
    """

    def __init__(self, net: nn.Module, loss: Callable[..., Tensor], optimizer: MakeOptimizer) -> None:
        super().__init__()
        self.net = net
        self.loss = loss
        self.make_optimizer = optimizer

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.net)


def sgd(lr: float, **options: Any) -> MakeOptimizer:
    return lambda net: torch.optim.SGD(net.parameters(), lr=lr, **options)


def adam(lr: float = 1e-3, **options: Any) -> MakeOptimizer:
    return lambda net: torch.optim.Adam(net.parameters(), lr=lr, **options)


def adamw(lr: float = 1e-3, **options: Any) -> MakeOptimizer:
    return lambda net: torch.optim.AdamW(net.parameters(), lr=lr, **options)


def classifier(net: nn.Module, optimizer: MakeOptimizer) -> Task:
    return Task(net, functional.cross_entropy, optimizer)


def regressor(net: nn.Module, optimizer: MakeOptimizer) -> Task:
    return Task(net, functional.mse_loss, optimizer)


def token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Cross entropy of every position: logits (batch, time, classes), tokens (batch, time)."""
    return functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())


# --- the data ----------------------------------------------------------------------------------------------


def classes(steps: int, batch: int = 64, inputs: int = 16, outputs: int = 4, noise: float = 0.0) -> Pairs:
    """A random linear teacher's classes of fresh normal inputs, a share of them drawn anew at random."""
    x, weight = torch.randn(steps, batch, inputs), torch.randn(inputs, outputs)
    y = (x @ weight).argmax(-1)
    y = torch.where(torch.rand(y.shape) < noise, torch.randint(outputs, y.shape), y)
    return list(zip(x, y, strict=True))


def values(steps: int, batch: int = 64, inputs: int = 16, outputs: int = 4) -> Pairs:
    """What a small random tanh teacher gives for fresh normal inputs, of unit variance."""
    x = torch.randn(steps, batch, inputs)
    hidden = torch.tanh(x @ torch.randn(inputs, 8) / math.sqrt(inputs))
    y = hidden @ torch.randn(8, outputs)
    return list(zip(x, y / y.std(), strict=True))


@functools.cache
def _digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    data = load_digits()
    x = torch.as_tensor(data.data, dtype=torch.float32)
    return (x - x.mean()) / x.std(), torch.as_tensor(data.target)


def digits(steps: int, batch: int = 64, image: bool = False) -> Pairs:
    """Random batches of scikit-learn's handwritten digits: 64 features, or images (1, 8, 8)."""
    x, y = _digits()
    x = x.view(-1, 1, 8, 8) if image else x
    return [(x[rows], y[rows]) for rows in torch.randint(len(x), (steps, batch))]


def text(steps: int, batch: int = 32, length: int = 16, tokens: int = 12) -> Pairs:
    """Sequences of a random Markov chain, and the token that follows at every position."""
    follow = torch.distributions.Categorical(logits=2 * torch.randn(tokens, tokens))
    current = torch.randint(tokens, (steps, batch))
    rows = [current]
    for _ in range(length):
        drawn = torch.multinomial(follow.probs[rows[-1].flatten()], 1)
        rows.append(drawn.view(steps, batch))
    sequence = torch.stack(rows, -1)
    return list(zip(sequence[..., :-1], sequence[..., 1:], strict=True))


def recall(steps: int, batch: int, length: int, tokens: int = 4) -> Pairs:
    """Sequences of one-hot tokens; the target is the first of them."""
    sequence = torch.randint(tokens, (steps, batch, length))
    return list(zip(functional.one_hot(sequence, tokens).float(), sequence[..., 0], strict=True))


# --- the nets ----------------------------------------------------------------------------------------------


def linears(net: nn.Module) -> Iterator[nn.Module]:
    """Everything in a net that is linear, in order."""
    yield from (module for module in net.modules() if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)))


def stack(
    depth: int,
    activation: Callable[[], nn.Module] = nn.ReLU,
    width: int = 32,
    inputs: int = 16,
    outputs: int = 4,
    norm: Callable[[int], nn.Module] | None = None,
) -> nn.Sequential:
    """`depth` linear layers in all with activations between them: net.0, net.2, ... (a norm before each of them)."""
    parts: list[nn.Module] = []
    for number in range(depth - 1):
        parts.append(nn.Linear(inputs if number == 0 else width, width))
        parts += [norm(width)] if norm else []
        parts.append(activation())
    return nn.Sequential(*parts, nn.Linear(width if depth > 1 else inputs, outputs))


CHAIN = r"net\.\d+"  # of a sequential net: everything


def hidden(depth: int, first: int = 0, each: int = 2) -> str:
    """Regex of the layers of a `stack` that an activation follows."""
    return rf"net\.({'|'.join(str(first + each * number) for number in range(depth - 1))})"


def scaled(net: nn.Module, gain: float, bias: float = 0.0) -> nn.Module:
    """Normal weights with std = gain / sqrt(fan_in) everywhere (He: sqrt(2)), and one value for every bias."""
    for layer in linears(net):
        nn.init.normal_(layer.weight, std=gain / math.sqrt(layer.weight[0].numel()))
        if layer.bias is not None:
            nn.init.constant_(layer.bias, bias)
    return net


HE = math.sqrt(2)


class Residual(nn.Module):
    """x + f(x)."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class Attention(nn.Module):
    """Multi-head self-attention by hand: (batch, time, width), the softmax a function."""

    def __init__(self, width: int, heads: int, causal: bool = True, scale: float = 1.0) -> None:
        super().__init__()
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.heads, self.causal, self.scale = heads, causal, scale

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        logits = self.scale * q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        if self.causal:
            future = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
            logits = logits.masked_fill(future, -math.inf)
        mixed = functional.softmax(logits, -1) @ v
        return self.out(mixed.transpose(1, 2).flatten(-2))


class FlashAttention(Attention):
    """The same by torch's fused kernel, which never shows its weights."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(mixed.transpose(1, 2).flatten(-2))


class Block(nn.Module):
    """A transformer block: the norm before the branches (pre-LN) or behind the merges (post-LN)."""

    def __init__(self, attention: nn.Module, width: int, pre: bool = True, dropout: float = 0.0) -> None:
        super().__init__()
        self.attention = attention
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.drop = nn.Dropout(dropout)
        self.pre = pre

    def forward(self, x: Tensor) -> Tensor:
        if self.pre:
            x = x + self.drop(self.attention(self.norm1(x)))
            return x + self.drop(self.mlp(self.norm2(x)))
        x = self.norm1(x + self.drop(self.attention(x)))
        return self.norm2(x + self.drop(self.mlp(x)))


class Transformer(nn.Module):
    """A small language model: (batch, time) tokens -> (batch, time, tokens) logits."""

    def __init__(
        self,
        blocks: int,
        width: int = 32,
        tokens: int = 12,
        length: int = 16,
        pre: bool = True,
        attention: Callable[[], nn.Module] | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        make = attention or (lambda: Attention(width, 2))
        self.tokens = nn.Embedding(tokens, width)
        self.places = nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.ModuleList(Block(make(), width, pre, dropout) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, tokens)

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(x) + self.places[: x.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Reader(nn.Module):
    """A recurrent module and a head that reads its last output."""

    def __init__(self, recurrent: nn.RNNBase, outputs: int, every: bool = False) -> None:
        super().__init__()
        self.rnn = recurrent
        self.head = nn.Linear(recurrent.hidden_size, outputs)
        self.every = every

    def forward(self, x: Tensor) -> Tensor:
        outputs, _ = self.rnn(x)
        return self.head(outputs if self.every else outputs[:, -1])
