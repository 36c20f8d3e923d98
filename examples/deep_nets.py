"""Where initialisation decides everything: deep networks without normalisation, each started in several ways.

Five parts, each a table of what this run measures beside what to expect (the figures in grey, measured by the authors
with torch 2.13 on a CPU; of others hold the order of magnitude and the order of the rows, not the digits):

- linear: with the weights c*I the signal behind layer l of 20 is c^l, its gradient c^(20-l), and the weight gradients
  are all c^19: they alone cannot show what is wrong
- signal: 30 ReLU layers of 512; what is left of the signal in the last one, and of its gradient in the first one
- mlp: ReLU networks of 22 and 30 layers on handwritten digits, trained by SGD at the best of several rates
- cnn: a plain tanh network of 100 convolutions, which delta-orthogonal weights make trainable
- residual: 64 residual blocks without normalisation

    python examples/deep_nets.py                    # about a minute on one core: one seed, shorter trainings
    python examples/deep_nets.py --full             # all seeds and steps, about ten minutes
    python examples/deep_nets.py --only mlp,cnn

The data are scikit-learn's digits (no download). Losses and accuracies are those on the training images: the question
is whether such a network learns at all.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from statistics import geometric_mean, mean
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn

import lightning_gradhealth as gh

Rows = dict[str, tuple[float, ...]]  # what was measured, by the name of the start
Start = dict[str, Any] | None  # arguments of init_weights; None: torch's default, left as it is


class Part(NamedTuple):
    """One table: how it is measured, and what to expect."""

    title: str
    columns: tuple[str, ...]
    expected: dict[str, tuple[str, ...]]
    measure: Callable[[bool], Rows]


def start(model: nn.Module, sample: Tensor, how: Start, seed: int) -> nn.Module:
    if how is not None:
        gh.init_weights(model, sample, seed=seed, **how)
    return model


def digits() -> tuple[Tensor, Tensor]:
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images / 16).float(), torch.tensor(labels)


def batches(count: int, size: int, steps: int, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        for batch in torch.randperm(count, generator=generator)[: count - count % size].split(size):
            if steps == 0:
                return
            steps -= 1
            yield batch


def train(
    model: nn.Module, x: Tensor, y: Tensor, optimizer: torch.optim.Optimizer, steps: int, size: int, seed: int
) -> tuple[float, float]:
    """Loss and accuracy after some steps."""
    for batch in batches(len(x), size, steps, seed):
        loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
        if not loss.isfinite():
            break  # no step leads back from there
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        scores = torch.cat([model(part) for part in x.split(64)])
    accuracy = (scores.argmax(1) == y).float().mean() if scores.isfinite().all() else torch.tensor(math.nan)
    return nn.functional.cross_entropy(scores, y).item(), accuracy.item()


# --- linear -------------------------------------------------------------------------------------------------


def linear(full: bool) -> Rows:
    depth, width = 20, 64
    rows = {}
    for c in (1.2, 0.5):
        torch.manual_seed(0)
        layers = [nn.Linear(width, width, bias=False, dtype=torch.float64) for _ in range(depth)]
        signals = [torch.randn(128, width, dtype=torch.float64)]
        for layer in layers:
            nn.init.eye_(layer.weight).data.mul_(c)
            signals.append(layer(signals[-1]))
        outputs, direction = signals[1:], torch.randn_like(signals[0])
        gradients = torch.autograd.grad(outputs[-1], [*outputs, *(layer.weight for layer in layers)], direction)
        single = direction.T @ signals[0]  # the weight gradient of a network of one layer
        rows[f"{c:g} I"] = (
            deviation(outputs, signals[0], [c**layer for layer in range(1, depth + 1)]),
            deviation(gradients[:depth], direction, [c ** (depth - layer) for layer in range(1, depth + 1)]),
            deviation(gradients[depth:], single, [c ** (depth - 1)] * depth),
        )
    return rows


def deviation(found: Sequence[Tensor], unit: Tensor, factors: Sequence[float]) -> float:
    """The greatest relative deviation of norms from those of `factor * unit`."""
    norms = [float(each.detach().norm() / unit.norm()) for each in found]
    return max(abs(norm / factor - 1) for norm, factor in zip(norms, factors, strict=True))


# --- signal -------------------------------------------------------------------------------------------------

SCHEMES: dict[str, Start] = {
    "torch's default": None,
    "Xavier": {"scheme": "xavier"},
    "He": {"scheme": "he"},
    "auto": {},
}


def signal(full: bool) -> Rows:
    depth, width = 30, 512
    rows = {}
    for name, how in SCHEMES.items():
        found = []
        for seed in range(10 if full else 1):
            torch.manual_seed(seed)
            net = nn.Sequential(*(m for _ in range(depth) for m in (nn.Linear(width, width, bias=False), nn.ReLU())))
            x = torch.randn(256, width)
            start(net, x, how, seed)
            first = net[0](x)
            last = net[1:-1](first)
            gradients = torch.autograd.grad(net[-1](last), [first, last], torch.randn_like(last))
            found.append(
                (float((last.norm() / first.norm()).detach()) ** 2, float(gradients[0].norm() / gradients[1].norm()))
            )
        rows[name] = tuple(geometric_mean(column) for column in zip(*found, strict=True))
    return rows


# --- mlp ----------------------------------------------------------------------------------------------------


def relu_net(depth: int) -> nn.Sequential:
    widths = [64] + [100] * (depth - 1)
    hidden = [m for pair in zip(widths, widths[1:], strict=False) for m in (nn.Linear(*pair), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(widths[-1], 10))


def mlp(full: bool) -> Rows:
    x, y = digits()
    rates, epochs = ((0.003, 0.01, 0.03), 15) if full else ((0.003, 0.01), 10)
    return {
        name: tuple(
            mean(
                min(after_sgd(depth, how, rate, epochs, seed, x, y) for rate in rates)  # the best of the rates
                for seed in range(3 if full else 1)
            )
            for depth in (22, 30)
        )
        for name, how in SCHEMES.items()
    }


def after_sgd(depth: int, how: Start, rate: float, epochs: int, seed: int, x: Tensor, y: Tensor) -> float:
    torch.manual_seed(seed)
    net = start(relu_net(depth), x[:64], how, seed)
    optimizer = torch.optim.SGD(net.parameters(), lr=rate, momentum=0.9)
    loss, _ = train(net, x, y, optimizer, epochs * (len(x) // 64), 64, seed)
    return loss if math.isfinite(loss) else math.inf


# --- cnn ----------------------------------------------------------------------------------------------------

CRITICAL, BIAS_STD = math.sqrt(1.0306), math.sqrt(4.65e-6)  # tanh: signals neither die out nor all become alike


class TanhConv(nn.Conv2d):
    """A convolution whose biases start at random, as the theory of such networks asks for."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).tanh()


def draw_bias(numbers: Tensor, generator: torch.Generator) -> None:
    numbers.normal_(0, BIAS_STD, generator=generator)


@gh.register_initializer(TanhConv)
def critical_bias(module: TanhConv, context: gh.InitContext) -> None:
    context.fill_(
        module.bias, draw_bias, distribution="normal", target_std=BIAS_STD
    )  # the weight is nn.Conv2d's affair


def tanh_net(depth: int, channels: int) -> nn.Sequential:
    sizes = [1] + [channels] * depth
    convolutions = [
        TanhConv(*pair, 3, padding=1, padding_mode="circular") for pair in zip(sizes, sizes[1:], strict=False)
    ]
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(channels * 64, 10))


CNN: dict[str, Start] = {
    "torch's default": None,
    "Xavier x 5/3": {"scheme": "xavier", "gamma": 5 / 3},
    "Gaussian": {"scheme": "lecun", "gamma": CRITICAL},
    "orthogonal": {"scheme": "orthogonal", "gamma": CRITICAL},
    "delta-orthogonal": {"scheme": "delta_orthogonal", "gamma": CRITICAL},
    "auto": {},  # sees a deep tanh chain: delta-orthogonal at the edge of chaos, the head 1 / fan_in
}
QUICK = ("torch's default", "orthogonal", "delta-orthogonal", "auto")


def cnn(full: bool) -> Rows:
    x, y = digits()
    images = ((x - x.mean()) / x.std()).view(-1, 1, 8, 8)
    count, steps, size = (len(x), 100, 64) if full else (640, 40, 32)
    rows: Rows = {}
    for name, how in CNN.items():
        if not (full or name in QUICK):
            continue
        found = []
        for seed in range(3 if full else 1):
            torch.manual_seed(seed)
            net = start(tanh_net(100, 16), images[:4], how, seed)
            optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
            found.append(train(net, images[:count], y[:count], optimizer, steps, size, seed)[1])
        rows[name] = (mean(found),)
    return rows


# --- residual -----------------------------------------------------------------------------------------------

BLOCKS = 64


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(self.inner(x).relu())


def residual_net(width: int = 64) -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, width), *(Block(width) for _ in range(BLOCKS)), nn.Linear(width, 10))


RESIDUAL: dict[str, Start] = {
    "torch's default": None,
    "He, no care": {"scheme": "he", "residual": "none"},
    "GPT-2": {"overrides": [(r".*outer\.weight", {"std": 0.02 / math.sqrt(BLOCKS)}), (r".*\.weight", {"std": 0.02})]},
    'residual="fixup"': {"residual": "fixup"},
    'residual="zero_last"': {"residual": "zero_last"},  # every block starts as the identity, as with ReZero
    "auto": {},  # finds the branches, no norm in them, and takes residual="depth"
}


def residual(full: bool) -> Rows:
    x, y = digits()
    rows: Rows = {}
    for name, how in RESIDUAL.items():
        found = []
        for seed in range(3 if full else 1):
            torch.manual_seed(seed)
            net = start(residual_net(), x[:64], how, seed)
            with torch.no_grad():
                first = nn.functional.cross_entropy(net(x), y).item()
            optimizer = torch.optim.SGD(net.parameters(), lr=0.005, momentum=0.9)
            found.append((first, train(net, x, y, optimizer, 4 * (len(x) // 64), 64, seed)[1]))
        firsts, accuracies = zip(*found, strict=True)
        rows[name] = (geometric_mean(firsts), mean(accuracies))
    return rows


# --- all ----------------------------------------------------------------------------------------------------

PARTS = {
    "linear": Part(
        "20 linear layers with the weights c*I: greatest relative deviation",
        ("signal", "gradient", "weight gradients"),
        {"1.2 I": ("4e-16", "4e-16", ""), "0.5 I": ("0", "0", "")},
        linear,
    ),
    "signal": Part(
        "30 ReLU layers of 512, at their outputs before the activation",
        ("mean square, last / first", "gradient, first / last"),
        {
            "torch's default": ("3e-23", "5e-12"),
            "Xavier": ("2e-9", "4e-5"),
            "He": ("1.13", "1.01"),
        },
        signal,
    ),
    "mlp": Part(
        "ReLU networks on digits, SGD with momentum at the best of the rates: training loss",
        ("22 layers", "30 layers"),
        {"torch's default": ("2.303", "2.303"), "Xavier": ("1.687", "2.303"), "He": (".253", ".803")},
        mlp,
    ),
    "cnn": Part(
        "100 tanh convolutions, Adam: accuracy",
        ("accuracy",),
        {
            **dict.fromkeys(("torch's default", "Xavier x 5/3", "Gaussian", "orthogonal"), (".10 to .16",)),
            "delta-orthogonal": (".884",),
        },
        cnn,
    ),
    "residual": Part(
        "64 residual blocks without normalisation, 4 epochs of SGD with momentum",
        ("loss at the start", "accuracy"),
        {
            "torch's default": ("", ".915"),
            "He, no care": ("4.7e15", "nan"),
            "GPT-2": ("", ".64"),
            'residual="fixup"': ("", ".957"),
            'residual="zero_last"': ("", ".944"),
        },
        residual,
    ),
}


def table(part: Part, rows: Rows) -> Table:
    shown = Table(title=part.title, title_justify="left")
    shown.add_column("start")
    for column in part.columns:
        shown.add_column(column, justify="right")
        shown.add_column("expect", justify="right", style="bright_black")
    for name, figures in rows.items():
        expected = part.expected.get(name, ("",) * len(figures))
        shown.add_row(
            name, *(cell for pair in zip(figures, expected, strict=True) for cell in (f"{pair[0]:.3g}", pair[1]))
        )
    return shown


def main(arguments: list[str] | None = None) -> dict[str, Rows]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="all seeds, rates and steps")
    parser.add_argument("--only", default=",".join(PARTS), help=f"some of {','.join(PARTS)}")
    options = parser.parse_args(arguments)
    chosen = options.only.split(",")
    if unknown := [name for name in chosen if name not in PARTS]:
        parser.error(f"--only must name some of {','.join(PARTS)}, got {','.join(unknown)}")
    torch.set_num_threads(1)  # the layers are small: more threads only get in each other's way
    console, results = Console(), {}
    for name in chosen:
        results[name] = PARTS[name].measure(options.full)
        console.print(table(PARTS[name], results[name]))
    return results


if __name__ == "__main__":
    main(sys.argv[1:])
