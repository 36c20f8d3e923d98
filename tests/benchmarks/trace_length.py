"""What `init_weights` and `diagnose` take on forward passes of 100, 1,000 and 10,000 recorded operations.

    python tests/benchmarks/trace_length.py [--kinds euler,scan] [--operations 100,1000,10000] [--diagnose]

Loops of the kinds that a model may be written as: each uses the same few modules again and again, or none.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import lightning_gradhealth as gh
from lightning_gradhealth.tracing import trace

WIDTH = 16


class Loop(nn.Module):
    """A net that is applied in a loop of one of several kinds."""

    def __init__(self, kind: str, steps: int) -> None:
        super().__init__()
        self.kind, self.steps = kind, steps
        self.net = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))
        self.one, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        self.cell, self.query = nn.LSTMCell(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.table = nn.Embedding(7, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(KINDS[self.kind][0](self, x))  # type: ignore[no-any-return]


def euler(model: Loop, x: Tensor) -> Tensor:
    """An ODE by hand: what a net gives is added to what it read."""
    for _ in range(model.steps):
        x = x + 0.1 * model.net(x)
    return x


def scan(model: Loop, x: Tensor) -> Tensor:
    """A linear recurrence, element by element, all of whose states are read."""
    keys, state, states = model.one(x), torch.zeros_like(x), []
    for _ in range(model.steps):
        state = torch.maximum(0.9 * state, state.exp() * 0.01 + keys)
        states.append(state)
    return torch.stack(states, 1).mean(1)


def written(model: Loop, x: Tensor) -> Tensor:
    """The same, its states written into memory of their own."""
    keys, state, states = model.one(x), torch.zeros_like(x), x.new_zeros(len(x), model.steps, WIDTH)
    for step in range(model.steps):
        state = 0.9 * state + keys.sigmoid()
        states[:, step] = state
    return states.mean(1)


def decoder(model: Loop, x: Tensor) -> Tensor:
    """A recurrent cell that looks at all of its input at every step, and at a table."""
    memory = model.net(x).unsqueeze(1).expand(-1, 5, -1) * 1.0
    hidden, cell, outputs = x.new_zeros(x.shape), x.new_zeros(x.shape), []
    token = torch.zeros(len(x), dtype=torch.long)
    for _ in range(model.steps):
        shares = torch.bmm(memory, model.query(hidden).unsqueeze(2)).softmax(1)
        context = (memory * shares).sum(1) + model.table(token)
        hidden, cell = model.cell(torch.relu(context), (hidden, cell))
        outputs.append(hidden)
    return torch.stack(outputs, 1).mean(1)


def summed(model: Loop, x: Tensor) -> Tensor:
    """Many views of one input, added up."""
    total = model.one(x)
    for step in range(model.steps):
        total = total + model.one(torch.relu(x * (1 + step)))
    return total


def deep(model: Loop, x: Tensor) -> Tensor:
    """One operation after the other, without a weight between."""
    x = model.one(x)
    for _ in range(model.steps):
        x = torch.sin(x) * 1.01
    return x


# what a step records, about
KINDS: dict[str, tuple[Callable[[Loop, Tensor], Tensor], int]] = {
    "euler": (euler, 7),
    "scan": (scan, 5),
    "written": (written, 5),
    "decoder": (decoder, 15),
    "summed": (summed, 5),
    "deep": (deep, 2),
}


def model_of(kind: str, operations: int) -> Loop:
    """A loop of about so many operations."""
    return Loop(kind, max(1, (operations - 8) // KINDS[kind][1]))


def main() -> None:
    """Print seconds of CPU for every kind and length."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--operations", default="100,1000,10000")
    parser.add_argument("--diagnose", action="store_true", help="diagnose, in place of init_weights")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    batch = torch.randn(4, WIDTH)
    gh.init_weights(Loop("euler", 1), batch)  # imports, and whatever torch does once
    gh.diagnose(Loop("euler", 1), batch)
    for kind in options.kinds.split(","):
        for operations in map(int, options.operations.split(",")):
            model = model_of(kind, operations)
            recorded = len(trace(model, batch).events)
            begun = time.process_time()
            if options.diagnose:
                gh.diagnose(model, batch)
            else:
                gh.init_weights(model, batch, seed=0, dry_run=True)
            print(f"{kind:8} {recorded:6} operations {time.process_time() - begun:8.2f} s", flush=True)


if __name__ == "__main__":
    main()
