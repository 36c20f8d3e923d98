"""Random trainings for `test_random_models`: graphs of layers that nobody would write, and some that everybody does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import hypothesis.strategies as st
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

ACTIVATIONS: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
    "ReLU": nn.ReLU,
    "ReLU in place": lambda: nn.ReLU(inplace=True),
    "PReLU": nn.PReLU,
    "Sigmoid": nn.Sigmoid,
    "ELU": nn.ELU,
    "functional.tanh": lambda: torch.tanh,
    "functional.relu": lambda: torch.relu,
    "functional.gelu": lambda: functional.gelu,
    "functional.silu": lambda: functional.silu,
    "method": lambda: lambda x: x.clamp(min=0.0),
    "where": lambda: lambda x: torch.where(x > 0, x, 0.1 * x),
    "softmax": lambda: lambda x: x.softmax(-1),
    "exp": lambda: lambda x: (-x.abs()).exp(),
}

# what can stand anywhere, and what takes a sequence (batch, steps, width) or an image (batch, width, height, width)
ANYWHERE = (
    *("layer", "norm", "act", "act", "residual", "residual in place", "cat", "gate", "shared", "dropout", "raw"),
    *("frozen", "detached", "checkpoint", "parametrized", "no_grad", "unused", "tuple", "twice", "zeros", "scale"),
)
OPERATIONS = {
    "vector": ANYWHERE,
    "tokens": (*ANYWHERE, "rnn", "attention", "encoder"),
    "sequence": (*ANYWHERE, "rnn", "cell", "attention", "encoder"),
    "image": (*ANYWHERE, "depthwise", "transposed", "pool"),
}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05),
    "SGD with momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "Adam, foreach": lambda p: torch.optim.Adam(p, lr=1e-2, foreach=True, amsgrad=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-3),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
}
LOSSES = ("square", "cross entropy", "sum", "logsumexp")


@dataclass(frozen=True)
class Case:
    """One training; everything that it needs is drawn from `seed`.

    Attributes:
        domain: What goes in: a key of OPERATIONS.
        batch: Samples.
        width: Width of the first layer.
        operations: What happens to the signal, as pairs of an operation and a number that it may use.
        dtype: Of the model.
        optimizers: One, or two that share the parameters.
        loss: A key of LOSSES.
        steps: Optimizer steps.
        micro: Backward passes a step.
        cadence: Steps between two probes.
        flush: Steps between two flushes.
        to_none: What zero_grad leaves.
        skips: A step whose loss is not propagated, as where `training_step` returns None.
        seed: Of weights and data.
    """

    domain: str
    batch: int
    width: int
    operations: tuple[tuple[str, int], ...]
    dtype: torch.dtype
    optimizers: tuple[str, ...]
    loss: str
    steps: int
    micro: int
    cadence: int
    flush: int
    to_none: bool
    skips: int
    seed: int


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any training."""
    domain = draw(st.sampled_from(sorted(OPERATIONS)))
    operation = st.tuples(st.sampled_from(OPERATIONS[domain]), st.integers(0, 99))
    return Case(
        domain=domain,
        batch=draw(st.integers(1, 5)),
        width=draw(st.integers(1, 7)),
        operations=tuple(draw(st.lists(operation, max_size=9))),
        dtype=draw(st.sampled_from([torch.float32, torch.float32, torch.float64, torch.bfloat16])),
        optimizers=tuple(draw(st.lists(st.sampled_from(sorted(OPTIMIZERS)), min_size=1, max_size=2))),
        loss=draw(st.sampled_from(LOSSES)),
        steps=draw(st.integers(1, 6)),
        micro=draw(st.integers(1, 2)),
        cadence=draw(st.integers(1, 4)),
        flush=draw(st.integers(1, 5)),
        to_none=draw(st.booleans()),
        skips=draw(st.integers(-3, 5)),
        seed=draw(st.integers(0, 2**16)),
    )


class Net(nn.Module):
    """The network of a case."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.image = case.domain == "image"
        self.operations: list[tuple[str, int, list[Any]]] = []
        self.parts = nn.ModuleList()
        width = case.width
        self.table = (
            nn.Embedding(11, width, max_norm=2.0 if case.seed % 5 == 0 else None) if self._reads(case) else None
        )
        for name, number in case.operations:
            made, width = self._make(name, number, width)
            self.operations.append((name, number, made))
        self.head = nn.Linear(width, 3)

    @staticmethod
    def _reads(case: Case) -> bool:
        return case.domain == "tokens"

    def _keep(self, *made: Any) -> list[Any]:
        self.parts.extend(part for part in made if isinstance(part, nn.Module))
        return list(made)

    def _layer(self, width: int, to: int) -> nn.Module:
        return nn.Conv2d(width, to, 3, padding=1) if self.image else nn.Linear(width, to)

    def _make(self, name: str, number: int, width: int) -> tuple[list[Any], int]:
        """The modules of an operation, and the width behind it."""
        to = 1 + number % 7
        if name == "layer":
            return self._keep(self._layer(width, to)), to
        if name == "norm":
            norm = nn.GroupNorm(1, width) if self.image else nn.LayerNorm(width)
            return self._keep(nn.BatchNorm2d(width) if self.image and number % 2 else norm), width
        if name == "act":
            kind = list(ACTIVATIONS)[number % len(ACTIVATIONS)]
            behind = self.operations[-1][0] if self.operations else ""
            if kind == "ReLU in place" and behind != "layer":  # it may overwrite what another backward pass needs
                kind = "ReLU"
            return self._keep(ACTIVATIONS[kind]()), width
        if name == "cat":
            return self._keep(self._layer(width, to)), width + to
        if name == "raw":
            weight = nn.Parameter(torch.randn(width, width) / width**0.5)
            self.register_parameter(f"raw{len(self.operations)}", weight)
            return [weight], width
        if name == "scale":
            weight = nn.Parameter(torch.full((), float(number % 3)))
            self.register_parameter(f"raw{len(self.operations)}", weight)
            return [weight], width
        if name == "dropout":
            return self._keep(nn.Dropout(0.3)), width
        if name == "rnn":
            kind = (nn.RNN, nn.LSTM, nn.GRU)[number % 3]
            both = number % 2 == 0
            made = kind(width, to, num_layers=1 + number % 2, batch_first=True, bidirectional=both)
            return self._keep(made), to * (1 + both)
        if name == "cell":
            return self._keep(nn.GRUCell(width, to)), to
        if name == "attention":
            return self._keep(nn.MultiheadAttention(width, 1, dropout=0.1, batch_first=True)), width
        if name == "encoder":
            return self._keep(nn.TransformerEncoderLayer(width, 1, 5, 0.1, batch_first=True)), width
        if name == "depthwise":
            return self._keep(nn.Conv2d(width, width, 3, padding=1, groups=width)), width
        if name == "transposed":
            return self._keep(nn.ConvTranspose2d(width, to, 2)), to
        if name == "pool":
            return self._keep(nn.AdaptiveMaxPool2d(3)), width
        layer = self._layer(width, width)
        if name == "frozen":
            layer.requires_grad_(False)
        if name == "zeros":
            for parameter in layer.parameters():
                nn.init.zeros_(parameter)
        if name == "parametrized":
            layer = nn.utils.parametrizations.weight_norm(layer)
        return self._keep(layer), width

    def forward(self, x: Tensor) -> Any:
        signal = x if self.table is None else self.table(x)
        for name, number, made in self.operations:
            signal = self._apply_to(signal, name, number, made)
        pooled = signal.mean((2, 3)) if self.image else signal.mean(1) if signal.ndim == 3 else signal
        return self.head(pooled)

    def _apply_to(self, x: Tensor, name: str, number: int, made: list[Any]) -> Tensor:
        (part,) = made
        axis = 1 if self.image else -1
        if name == "residual":
            return x + torch.relu(part(x))
        if name == "residual in place":
            x = x * 1.0
            x += part(x.clone())
            return x
        if name == "cat":
            return torch.cat([x, part(x)], axis)
        if name == "gate":
            return x * torch.sigmoid(part(x))
        if name == "shared":
            for _ in range(1 + number % 4):
                x = torch.tanh(part(x))
            return x
        if name == "twice":
            return part(x) - part(-x)
        if name == "raw":
            return torch.einsum("bchw,cd->bdhw", x, part) if self.image else x @ part
        if name == "scale":
            return x * part
        if name == "detached":
            return x + part(x.detach())
        if name == "no_grad":
            with torch.no_grad():
                offset = part(x)
            return x + offset
        if name == "checkpoint":
            done: Tensor = checkpoint(part, x, use_reentrant=False)
            return done
        if name == "unused":
            return x
        if name == "tuple":
            return {"first": (x, part(x))}["first"][number % 2]
        if name == "rnn":
            return part(x)[0]
        if name == "cell":
            state, states = None, []
            for step in x.unbind(1):
                state = part(step, state)
                states.append(state)
            return torch.stack(states, 1)
        if name == "attention":
            return x + part(x, x, x, need_weights=number % 2 == 0)[0]
        out: Tensor = part(x)
        return out


def batch_of(case: Case, step: int) -> tuple[Tensor, Tensor]:
    """Inputs and labels of a backward pass."""
    generator = torch.Generator().manual_seed(case.seed + 7 * step)
    labels = torch.randint(3, (case.batch,), generator=generator)
    if case.domain == "tokens":
        return torch.randint(11, (case.batch, 4), generator=generator), labels
    shape = {"vector": (), "sequence": (4,), "image": (5, 5)}[case.domain]
    size = (case.batch, case.width, *shape) if case.domain == "image" else (case.batch, *shape, case.width)
    return torch.randn(size, generator=generator).to(case.dtype), labels


def loss_of(case: Case, output: Tensor, labels: Tensor) -> Tensor:
    """The loss of a case."""
    if case.loss == "cross entropy":
        return functional.cross_entropy(output, labels)
    if case.loss == "logsumexp":
        return output.logsumexp(-1).mean()
    return output.square().mean() if case.loss == "square" else output.sum()


def made(case: Case) -> tuple[Net, list[torch.optim.Optimizer]]:
    """Network and optimizers of a case."""
    torch.manual_seed(case.seed)
    net = Net(case).to(case.dtype)
    parameters = list(net.parameters())
    count = len(case.optimizers)
    shares = [parameters[number::count] for number in range(count)]
    return net, [OPTIMIZERS[name](share) for name, share in zip(case.optimizers, shares, strict=True) if share]


def trained(case: Case, watch: Callable[[Net], Any] | None = None) -> tuple[dict[str, Tensor], Tensor, Any]:
    """Train a case, watched or not: the weights, the random state at the end, and the session."""
    net, optimizers = made(case)
    session = None if watch is None else watch(net)
    torch.manual_seed(case.seed + 1)
    for step in range(case.steps):
        for micro in range(case.micro):
            x, labels = batch_of(case, step * case.micro + micro)
            loss = loss_of(case, net(x), labels)
            if step != case.skips and loss.requires_grad:
                loss.backward()
        for optimizer in optimizers:
            if session is not None:
                session.apply(session.observe(optimizer, loss=loss))
            optimizer.step()
            optimizer.zero_grad(set_to_none=case.to_none)
        if session is not None and step % case.flush == 0:
            session.flush()
    if session is not None:
        session.flush()
    return {name: value.clone() for name, value in net.state_dict().items()}, torch.get_rng_state(), session
