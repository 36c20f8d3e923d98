"""The size of what recurrent layers give, which the layers behind them read."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lightning_gradhealth.tracing import Graph

UNITS, LONGEST = 512, 64


def simulate(module: nn.Module, steps: int, drive: Tensor | None = None) -> list[Tensor]:
    """What every layer of a recurrent module gives, freshly initialised, in the limit of many units.

    Every gate gets a normal number of variance 1 from the input (white noise, or a mixture of the sequences that drive
    it) and, since its recurrent matrix is orthogonal, one of the mean square of the hidden state from there; the
    forget gate has a bias of 1.

    Args:
        module: An nn.RNN, LSTM, GRU or one of their cells.
        steps: Length of the sequences.
        drive: What the layer below gives, shape (steps, units); None: white noise.

    Returns:
        For every layer the outputs of `UNITS` units, shape (min(steps, 64), UNITS).

    Example:
        >>> first, second = simulate(nn.LSTM(8, 8, num_layers=2), 20)
        >>> 0.04 < float(first.square().mean()) < float(second.square().mean()) < 0.1
        True
    """
    generator = torch.Generator().manual_seed(0)
    found: list[Tensor] = []
    for _ in range(getattr(module, "num_layers", 1)):
        drive = _layer(module, max(1, min(steps, LONGEST)), drive, generator)
        found.append(drive)
    return found


def _layer(module: nn.Module, steps: int, drive: Tensor | None, generator: torch.Generator) -> Tensor:
    gates = 4 if isinstance(module, (nn.LSTM, nn.LSTMCell)) else 3 if isinstance(module, (nn.GRU, nn.GRUCell)) else 1
    inputs = [_mixed(drive, steps, generator) for _ in range(gates)]
    hidden = cell = torch.zeros(UNITS)
    outputs = []
    for step in range(steps):
        carried = math.sqrt(float(hidden.square().mean()))
        sums = [given[step] + carried * torch.randn(UNITS, generator=generator) for given in inputs]
        if gates == 4:
            entry, forget, fresh, output = sums
            cell = (forget + 1).sigmoid() * cell + entry.sigmoid() * fresh.tanh()
            hidden = output.sigmoid() * cell.tanh()
        elif gates == 3:
            reset, update = sums[0].sigmoid(), sums[1].sigmoid()
            kept = math.sqrt(float((reset * hidden).square().mean()))
            fresh = inputs[2][step] + kept * torch.randn(UNITS, generator=generator)
            hidden = (1 - update) * fresh.tanh() + update * hidden
        else:
            hidden = sums[0].relu() if getattr(module, "nonlinearity", "tanh") == "relu" else sums[0].tanh()
        outputs.append(hidden)
    return torch.stack(outputs)


def _mixed(drive: Tensor | None, steps: int, generator: torch.Generator) -> Tensor:
    """What an input weight makes of the sequences below, at variance 1, shape (steps, UNITS)."""
    if drive is None or not bool(drive.any()):
        return torch.randn(steps, UNITS, generator=generator)
    mixture = torch.randn(drive.shape[1], UNITS, generator=generator)
    rows = drive @ mixture / math.sqrt(drive.shape[1] * float(drive.square().mean()))
    return rows[torch.arange(steps).clamp_max(len(rows) - 1)]


def input_layer(graph: Graph, index: int, parameter: int) -> int | None:
    """Which layer of a recurrent station a parameter is the input weight of; None: it is none.

    Args:
        graph: The recording.
        index: The station.
        parameter: The parameter, by value.
    """
    module = graph.trace.modules[graph.trace.events[index].module]
    wanted = graph.trace.parameters[parameter]
    name = next((name for name, p in module.named_parameters() if p is wanted), "")
    if not name.startswith("weight_ih"):
        return None
    layer = name.removeprefix("weight_ih").removesuffix("_reverse").removeprefix("_l")
    return int(layer) if layer else 0
