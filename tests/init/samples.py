"""Small models of many kinds, each with sample inputs. They know nothing of what is tested on them.

`MATRIX` asks how well a forward pass is understood: each model does one thing that tracers stumble over. The
deeper models of samples_deep ask whether the signal keeps its size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class Sample:
    """A model and the arguments of its forward: a tensor, a tuple of positional or a dict of named ones."""

    make: Callable[[], nn.Module]
    inputs: Callable[[], Any]


def normal(*shape: int) -> Callable[[], Tensor]:
    """A maker of the same standard normal numbers, again and again."""
    return lambda: torch.randn(*shape, generator=torch.Generator().manual_seed(7))


class Probed(nn.Module):
    """A module that tells what its raw parameters give, if it is asked to."""

    def __init__(self) -> None:
        super().__init__()
        self.probed: dict[str, Tensor] | None = None

    def probe(self, name: str, z: Tensor) -> Tensor:
        if self.probed is not None:
            self.probed[name] = z
        return z


WIDTH = 16


class Chain(nn.Module):
    """Linear layers with one function behind each but the last; `widen`: what the function divides the width by."""

    def __init__(self, function: Callable[[Tensor], Tensor], widen: int = 1, layers: int = 3) -> None:
        super().__init__()
        self.function = function
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH * widen) for _ in range(layers - 1))
        self.layers.append(nn.Linear(WIDTH, 4))

    def forward(self, x: Tensor) -> Tensor:
        *hidden, last = self.layers
        for layer in hidden:
            x = self.function(layer(x))
        return last(x)


class HandWritten(torch.autograd.Function):
    """SiLU with a backward of its own."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return z * torch.sigmoid(z)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (z,) = ctx.saved_tensors
        s = torch.sigmoid(z)
        return gradient * s * (1 + z * (1 - s))


def modules() -> nn.Module:
    activations = (nn.ReLU(), nn.GELU(), nn.SiLU(), nn.Mish())
    pairs = [module for f in activations for module in (nn.Linear(WIDTH, WIDTH), f)]
    return nn.Sequential(*pairs, nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 4))


class Functional(nn.Module):
    """One functional activation after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.a(x))
        x = torch.tanh(self.b(x))
        x = F.leaky_relu(self.c(x), 0.2)
        return self.head(F.elu(self.d(x)))


class InPlace(nn.Module):
    """A rectifier and a merge that overwrite what they are given."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.up, self.down = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu_(self.stem(x))
        x = self.down(F.relu_(self.up(x))).add_(x)
        return self.head(x)


class Views(nn.Module):
    """The signal changes its shape on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(4 * WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).view(-1, WIDTH, 4).permute(0, 2, 1).relu()
        x = self.b(x).transpose(1, 2).reshape(-1, 4 * WIDTH).contiguous()
        return self.head(x[:, None].relu().squeeze(1))


class Mixing(Probed):
    """Raw parameters in einsum, matmul and bmm."""

    def __init__(self, tokens: int = 8, channels: int = WIDTH) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.randn(tokens, 2 * tokens))
        self.back = nn.Parameter(torch.randn(2 * tokens, tokens))
        self.channel = nn.Parameter(torch.randn(channels, 3, channels))
        self.heads = nn.Parameter(torch.randn(3, channels, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.probe("mix", torch.einsum("btc,th->bhc", x, self.mix)))
        x = F.relu(self.probe("back", torch.matmul(x.transpose(1, 2), self.back)))
        x = F.relu(self.probe("channel", torch.einsum("bct,cgd->bgtd", x, self.channel)))
        return self.probe("heads", torch.bmm(x.transpose(0, 1).flatten(1, 2), self.heads))


class Tied(nn.Module):
    """Two layers with one weight, and one layer used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.shared = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.b.weight = self.a.weight
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.a, self.b, self.shared, self.shared):
            x = F.relu(layer(x))
        return self.head(x)


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.stem, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4)
        self.body = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.stem(x))
        return self.head(checkpoint(self.body, x, use_reentrant=self.reentrant).relu())


class Wrapped(nn.Module):
    """A submodule that was compiled, scripted or otherwise changed by `wrap`."""

    def __init__(self, wrap: Callable[[nn.Module], Any]) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4)
        self.body = wrap(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(F.gelu(self.stem(x))).relu())


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4)
        self.rnn = kind(WIDTH, WIDTH, num_layers=2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(self.stem(x).relu())[0][:, -1])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4)
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.cross = nn.MultiheadAttention(WIDTH, 4, kdim=8, vdim=8, batch_first=True)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.attention(x, x, x)[0]
        x = x + self.cross(x, memory, memory, need_weights=False)[0]
        return self.head(x)


class EncoderLayer(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4)
        self.layer = nn.TransformerEncoderLayer(WIDTH, 4, 32, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.stem(x)))


class Dynamic(nn.Module):
    """The way through it depends on the values; the sample inputs never take `right`."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        way = self.left if x.square().sum().item() > 0 else self.right
        return self.head(F.silu(way(x)))


class Dictionaries(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image, self.text, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(8, WIDTH), nn.Linear(WIDTH, 4)

    def forward(self, batch: dict[str, Any], scale: float = 1.0) -> dict[str, Tensor]:
        hidden = self.image(batch["image"]).relu() + self.text(batch["more"]["text"]).relu()
        return {"logits": self.head(hidden) * scale}


class Branches(nn.Module):
    """Three branches side by side, concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.join, self.head = nn.Linear(4 * WIDTH, WIDTH), nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([F.relu(self.a(x)), torch.tanh(self.b(x)), x], dim=-1)
        return self.head(F.silu(self.join(x)))


class Positions(nn.Module):
    """A residual branch whose shortcut is no input, but a table that is read at places the model makes itself."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(6, WIDTH)
        self.branch, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        places = self.table(torch.arange(6))
        return self.head(places + self.branch(x + places))


class Supervised(nn.Module):
    """It computes its own loss."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(self.body(x).relu())
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def frozen() -> nn.Module:
    model = Chain(F.silu)
    model.layers[0].requires_grad_(False)
    return model


def normalised() -> nn.Module:
    def block() -> list[nn.Module]:
        return [nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.GELU(), nn.Dropout(0.5)]

    return nn.Sequential(*block(), *block(), nn.Linear(WIDTH, 4))


ROWS, STEPS = normal(32, WIDTH), normal(4, 6, WIDTH)

MATRIX: dict[str, Sample] = {
    "modules": Sample(modules, ROWS),
    "functional": Sample(Functional, ROWS),
    "in_place": Sample(InPlace, ROWS),
    "silu_by_hand": Sample(lambda: Chain(lambda z: z * torch.sigmoid(z)), ROWS),
    "autograd_function": Sample(lambda: Chain(HandWritten.apply), ROWS),
    "glu": Sample(lambda: Chain(F.glu, widen=2), ROWS),
    "where": Sample(lambda: Chain(lambda z: torch.where(z > 0, z, torch.zeros_like(z))), ROWS),
    "views": Sample(Views, ROWS),
    "raw_parameters": Sample(Mixing, normal(4, 8, WIDTH)),
    "tied_and_shared": Sample(Tied, ROWS),
    "checkpoint": Sample(lambda: Checkpointed(reentrant=False), ROWS),
    "checkpoint_reentrant": Sample(lambda: Checkpointed(reentrant=True), ROWS),
    "compiled": Sample(lambda: Wrapped(lambda body: torch.compile(body, backend="eager")), ROWS),
    "scripted": Sample(lambda: Wrapped(torch.jit.script), ROWS),
    "lstm": Sample(lambda: Recurrent(nn.LSTM), STEPS),
    "gru": Sample(lambda: Recurrent(nn.GRU), STEPS),
    "attention": Sample(Attention, lambda: (STEPS(), normal(4, 5, 8)())),
    "encoder_layer": Sample(EncoderLayer, STEPS),
    "encoder_layer_batch_first": Sample(lambda: EncoderLayer(batch_first=True, activation="gelu").eval(), STEPS),
    "dynamic_if": Sample(Dynamic, ROWS),
    "dictionaries": Sample(
        Dictionaries, lambda: {"batch": {"image": ROWS(), "more": {"text": normal(32, 8)()}}, "scale": 1.0}
    ),
    "branches": Sample(Branches, ROWS),
    "positions": Sample(Positions, STEPS),
    "supervised": Sample(Supervised, lambda: {"x": ROWS(), "labels": torch.arange(32) % 4}),
    "frozen": Sample(frozen, ROWS),
    "dropout_and_norm": Sample(normalised, ROWS),
    "prelu": Sample(lambda: Chain(nn.PReLU()), ROWS),
}
