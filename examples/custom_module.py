"""One call for a model of one's own making: raw parameters, a fused QKV, SwiGLU, a gate, an initializer of its own.

A small transformer on handwritten digits (scikit-learn's, no download) owns hardly a module of torch. What
`init_weights(model, x)` needs to know of it, it sees in one recorded forward pass: which parameters are multiplied
with activations, over which axes, and what follows them. Only three things are said by hand:

- `gradhealth_axes`: that `qkv` and `into` are several weights side by side
- `@gh.register_initializer`: how the table of positions starts
- nothing for `scale` (LayerScale), which is no weight and stays as its owner has set it

It prints the report, the variances that a batch really has behind every weight, and some epochs of training.

    python examples/custom_module.py
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import lightning_gradhealth as gh


class Patches(nn.Module):
    """Squares of 2 x 2 pixels as tokens: a raw parameter, its fan told by the einsum."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, 2, width))

    def forward(self, images: Tensor) -> Tensor:
        squares = images.unfold(1, 2, 2).unfold(2, 2, 2)
        return torch.einsum("bhwij,ijc->bhwc", squares, self.weight).flatten(1, 2)


class Positions(nn.Module):
    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(tokens, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table


@gh.register_initializer(Positions)
def init_positions(module: Positions, context: gh.InitContext) -> None:
    context.weight_(module.table, fan_in=1, gain=0.5, note="half as loud as the patches")


class Attention(nn.Module):
    gradhealth_axes = {"qkv": gh.Axes(in_axes=0, out_axes=1, split=(1, 3))}  # noqa: RUF012

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Parameter(torch.zeros(width, 3 * width))
        self.out = nn.Parameter(torch.zeros(heads, width // heads, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = torch.einsum("btc,cd->btd", x, self.qkv).unflatten(-1, (3 * self.heads, -1)).chunk(3, dim=2)
        mixed = nn.functional.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return torch.einsum("bhtd,hdc->btc", mixed, self.out)


class SwiGLU(nn.Module):
    gradhealth_axes = {"into": gh.Axes(in_axes=0, out_axes=1, split=(1, 2))}  # noqa: RUF012

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.into = nn.Parameter(torch.zeros(width, 2 * hidden))
        self.back = nn.Parameter(torch.zeros(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        gate, value = (x @ self.into).chunk(2, dim=-1)
        return (nn.functional.silu(gate) * value) @ self.back


class Scaled(nn.Module):
    """A residual branch behind a norm, with LayerScale: the scale starts as its owner wants it."""

    def __init__(self, width: int, branch: nn.Module) -> None:
        super().__init__()
        self.norm, self.branch = nn.RMSNorm(width), branch
        self.scale = nn.Parameter(torch.full((width,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.branch(self.norm(x))


class TinyTransformer(nn.Module):
    def __init__(self, width: int = 48, depth: int = 2) -> None:
        super().__init__()
        self.patches, self.positions = Patches(width), Positions(16, width)
        branches = (branch for _ in range(depth) for branch in (Attention(width, 4), SwiGLU(width, 2 * width)))
        self.layers = nn.Sequential(*(Scaled(width, branch) for branch in branches))
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.positions(self.patches(images))
        return self.head(self.norm(self.layers(x)).mean(1))


class Variances(TorchFunctionMode):
    """Measures what every product of activations with a parameter really gives, independently of the library."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.names = {id(p): name for name, p in model.named_parameters() if p.ndim > 1}
        self.found: dict[str, float] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.einsum, torch.matmul, Tensor.matmul, Tensor.__matmul__, nn.functional.linear):
            for name in (self.names[id(each)] for each in args if id(each) in self.names):
                self.found.setdefault(name, result.var().item())
        return result


def measure(model: nn.Module, images: Tensor) -> dict[str, float]:
    with torch.no_grad(), Variances(model) as variances:
        model(images)
    return variances.found


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int) -> float:
    """Accuracy on the fifth of the images that it was not trained on."""
    held = torch.arange(len(images)) % 5 == 0
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        for batch in (~held).nonzero().flatten()[torch.randperm(int((~held).sum()))].split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    with torch.no_grad():
        return (model(images[held]).argmax(1) == labels[held]).float().mean().item()


def main(arguments: list[str] | None = None) -> tuple[gh.InitReport, dict[str, dict[str, float]], float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=5)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    pixels, digits = load_digits(return_X_y=True)
    images, labels = torch.tensor(pixels).float().view(-1, 8, 8), torch.tensor(digits)
    images = (images - images.mean()) / images.std()
    model = TinyTransformer()
    console = Console()

    report = gh.init_weights(model, images[:64], seed=0)
    console.print(report)

    variances = {"as drawn": measure(model, images)}
    gh.init_weights(model, images[:64], seed=0, calibrate=images)  # the same draw, then corrected by what it gives
    variances["calibrated"] = measure(model, images)
    table = Table(title="Variance of what a weight gives, on all images", title_justify="left")
    for title in ("weight", *variances):
        table.add_column(title, justify="left" if title == "weight" else "right")
    for name in variances["as drawn"]:
        table.add_row(name, *(f"{found[name]:.3f}" for found in variances.values()))
    console.print(table)

    accuracy = train(model, images, labels, options.epochs)
    console.print(f"Accuracy on held-out digits after {options.epochs} epochs: {accuracy:.1%}")
    return report, variances, accuracy


if __name__ == "__main__":
    main(sys.argv[1:])
