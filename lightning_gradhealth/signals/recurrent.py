"""The gradient through time: how d(last output)/d(h_t) fares on its way back over the steps of a recurrent module.

For a layer with states s_1..s_T and given inputs, the last output depends on h_t through the product of the Jacobians
of the steps after t. Its norm is taken exactly, from all unit vectors as cotangents, where the layer is small; in a
wider one, from a few random directions at right angles to each other. The product is built from the end, one step at a
time, so that memory does not grow with the length, and rescaled at every step, so that no length makes it underflow.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lightning_gradhealth.flows import TemporalFlow
from lightning_gradhealth.isolation import undisturbed
from lightning_gradhealth.norms import read_once, wide
from lightning_gradhealth.sharding import is_sharded
from lightning_gradhealth.signals.unrolling import ACCEPTED, State, Step, Unrolled, unrolled
from lightning_gradhealth.trees import tensors

COTANGENTS = 64
_SEED = 0x5EED  # the same directions at every call: differences between calls are of the module


def temporal_flow(rnn: nn.Module, inputs: Tensor | PackedSequence, hx: Any = None) -> TemporalFlow:
    """Measure how the gradient of a recurrent module's last output fares on its way back through time.

    `grad_norms[t]` is the norm of d h_T/d s_t with s_t = h_t, and for an LSTM s_t = (h_t, c_t) together: what it
    remembers is carried by c_t, whose gradient h_t alone does not show. It is the Frobenius norm over the square root
    of the size of h_T: the root mean square, over all outputs of length 1, of the length of the gradient; over the
    samples the root mean square too. It is exact up to 64 units, and estimated from 64 random directions beyond.

    Every layer and direction is measured by itself, along its own recurrence, with its inputs given. Dropout does not
    count: the flow is that of the module in evaluation mode. The module runs in its own dtype, without autocast, and
    module, random state, buffers and `.grad` are left as they were, bit for bit. Reads the result from the device once.

    Args:
        rnn: nn.RNN, nn.LSTM, nn.GRU (any number of layers, batch_first, proj_size, bidirectional), nn.RNNCell,
            nn.LSTMCell, nn.GRUCell, or any module that is called as cell(x_t, h) and returns its new state or
            (output, state), with samples in the first dimension.
        inputs: What the module takes: shape (T, batch, features), (batch, T, features) with batch_first, (T, features)
            unbatched, or a PackedSequence (steps are then counted back from the end of each sequence). For a cell:
            shape (T, batch, features).
        hx: The state before the first step, as the module takes it; None: zeros. Modules of other classes need it. Of
            a tuple, the first is what the module puts out.

    Raises:
        TypeError: The module is not recurrent, or `inputs` or `hx` is of another type.
        ValueError: Shapes, dtypes or devices do not fit the module, there are fewer than two steps, or NaN or Inf is
            in the inputs, the state or the parameters.

    Example:
        >>> rnn = nn.RNN(3, 4)
        >>> _ = nn.init.zeros_(rnn.weight_ih_l0), nn.init.zeros_(rnn.bias_ih_l0), nn.init.zeros_(rnn.bias_hh_l0)
        >>> _ = rnn.weight_hh_l0.data.copy_(0.5 * torch.eye(4))
        >>> flow = temporal_flow(rnn, torch.randn(20, 8, 3))
        >>> len(flow.grad_norms), round(flow.gain_per_step, 6), flow.memory
        (20, 0.5, 7)

    After Pascanu, Mikolov and Bengio, "On the difficulty of training recurrent neural networks" (2013).
    """
    found = flow_norms(rnn, inputs, hx)
    if next(iter(found.values())).numel() < 2:
        raise ValueError("inputs must have at least 2 steps, got 1: there is no way back through time; give a sequence")
    flow = TemporalFlow.of(dict(zip(found, read_once(list(found.values())), strict=True)))
    if any(math.isnan(norm) for norms in (flow.by_layer or {}).values() for norm in norms):
        _find_nan(rnn, inputs, hx)
    return flow


def _find_nan(rnn: nn.Module, inputs: Any, hx: Any) -> None:
    """Say where NaN or Inf came in; silent where it did not: a gradient that outgrows its dtype ends as NaN, too."""
    given = [("inputs", inputs), ("hx", hx)]
    given += [(f"the parameter {name!r} of rnn", parameter) for name, parameter in rnn.named_parameters()]
    for name, value in given:
        if any(not bool(tensor.detach().isfinite().all()) for tensor in tensors(value)):
            raise ValueError(f"{name} must be finite, got NaN or Inf; without them: torch.nan_to_num(...)")


def flow_norms(
    rnn: nn.Module,
    inputs: Tensor | PackedSequence,
    hx: Any = None,
    *,
    cotangents: int = COTANGENTS,
    samples: int | None = None,
    steps: int | None = None,
) -> dict[str, Tensor]:
    """The norms of `temporal_flow` on the device, of a sample if asked; nothing is read from the device.

    Args:
        rnn: See `temporal_flow`.
        inputs: See `temporal_flow`.
        hx: See `temporal_flow`.
        cotangents: Number of output directions; the result is exact where the layer has no more units.
        samples: The greatest number of sequences to look at, the first ones (of a PackedSequence the longest); None:
            all.
        steps: The greatest number of last steps to look back over; None: all. Forward, all steps are gone through.

    Returns:
        For each layer and direction, "l0", "l0_reverse", ("l0" for a cell) the norms in the order of the steps: shape
        (T,), or (steps,) where that is less; float64 (float32 on devices without it). One step gives [1].

    Raises:
        TypeError: See `temporal_flow`.
        ValueError: See `temporal_flow`, or a number is below 1.

    Example:
        >>> norms = flow_norms(nn.LSTM(3, 4, num_layers=2), torch.randn(20, 8, 3), samples=2, steps=5)
        >>> {name: tuple(norm.shape) for name, norm in norms.items()}
        {'l0': (5,), 'l1': (5,)}
    """
    for name, value in (("cotangents", cotangents), ("samples", samples), ("steps", steps)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}; leave it out for the default")
    if not isinstance(rnn, nn.Module):
        raise TypeError(f"rnn must be {ACCEPTED}, got {type(rnn).__name__}")
    rnn = getattr(rnn, "_orig_mod", rnn)  # what torch.compile wraps: a step is to be called, not the compiled sequence
    kind = inputs.data.device.type if isinstance(inputs, (Tensor, PackedSequence)) else "cpu"
    off = torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()
    with torch.inference_mode(False), undisturbed(rnn), off:
        rnn.eval()
        layers = unrolled(rnn, inputs, hx, samples=samples)
        return {layer.name: _norms_back(layer, cotangents, steps) for layer in layers}


def outer_flow(rnn: nn.RNN, output: Tensor, *, cotangents: int, samples: int, steps: int) -> dict[str, Tensor]:
    """The norms of `flow_norms` for the last layer of an nn.RNN, by what it has put out: no step is run again.

    Of a plain network h_t alone says what a step does to the gradient: it goes through diag(f'(a_t)) W, and f' is
    1 - h_t^2 for tanh, or whether h_t is positive for ReLU.

    Args:
        rnn: The module.
        output: The states of its last layer, as it puts them out; of both directions the forward one is taken.
        cotangents: See `flow_norms`.
        samples: See `flow_norms`.
        steps: See `flow_norms`.

    Returns:
        The norms of one layer, shape (steps,) or less; nothing where its weights are not at hand.

    Example:
        >>> rnn = nn.RNN(3, 4)
        >>> x = torch.randn(20, 8, 3)
        >>> quick = outer_flow(rnn, rnn(x)[0], cotangents=4, samples=8, steps=20)["l0"]
        >>> torch.allclose(quick, flow_norms(rnn, x)["l0"], rtol=1e-4)
        True
    """
    name = f"l{rnn.num_layers - 1}"
    weight = getattr(rnn, f"weight_hh_{name}")
    if is_sharded(weight) or output.ndim < 2:
        return {}
    states = output.detach().transpose(0, 1) if rnn.batch_first and output.ndim == 3 else output.detach()
    states = (states if states.ndim == 3 else states.unsqueeze(1))[-steps:, :samples, : rnn.hidden_size]
    states, weight = states.to(wide(states.device)), weight.detach().to(wide(states.device))
    slopes = 1 - states.square() if rnn.nonlinearity == "tanh" else (states > 0).to(states.dtype)
    gradient = _directions(rnn.hidden_size, cotangents).to(states).unsqueeze(1).expand(-1, states.shape[1], -1)
    norms = [gradient.square().sum(-1).mean().sqrt()]
    for slope in slopes[1:].flip(0):
        gradient = (gradient * slope) @ weight
        norms.append(gradient.square().sum(-1).mean().sqrt())
    return {name: torch.stack(norms[::-1])}


def _norms_back(layer: Unrolled, cotangents: int, steps: int | None) -> Tensor:
    """The norms over the last `steps` steps, in the order of the steps."""
    length, last = len(layer.inputs), layer.states[-1]
    batch = len(last[0])
    directions = _directions(last[0][0].numel(), cotangents).to(last[0], non_blocking=True)
    count = len(directions)
    output = directions.unsqueeze(1).expand(-1, batch, -1).reshape(count * batch, *last[0].shape[1:])
    gradients = (output, *(_repeated(torch.zeros_like(part), count) for part in last[1:]))
    scale = torch.ones((), dtype=wide(output.device), device=output.device)
    norms: list[Tensor] = []
    for step in reversed(range(length - min(steps or length, length), length)):
        if norms:  # from what step + 1 leads to, back to what it starts from
            state = tuple(_repeated(part, count) for part in layer.states[step + 1])
            gradients = _pulled_back(layer.step, _repeated(layer.inputs[step + 1], count), state, gradients)
        norm = _norm(gradients, batch, None if layer.alive is None else layer.alive[step])
        norms.append(norm * scale)
        unit = torch.exp2(norm.log2().floor())  # a power of two: rescaling rounds nothing
        unit = torch.where(unit.isfinite() & (unit > 0), unit, torch.ones_like(unit))
        gradients = tuple(part / unit.to(part.dtype) for part in gradients)
        scale = scale * unit
    return torch.stack(norms[::-1])


def _directions(size: int, count: int) -> Tensor:
    """Unit vectors at right angles to each other, shape (at most `count`, size): all there are, or random ones."""
    if count >= size:
        return torch.eye(size)
    own = torch.Generator().manual_seed(_SEED)  # the global generator belongs to the training
    drawn = torch.randn(size, count, generator=own, dtype=torch.float64)
    basis: Tensor = torch.linalg.qr(drawn)[0]
    return basis.t()


def _repeated(part: Tensor, count: int) -> Tensor:
    """The samples once for every direction: shape (count * batch, ...)."""
    return part.unsqueeze(0).expand(count, *part.shape).flatten(0, 1)


def _pulled_back(step: Step, x: Tensor, state: State, gradients: State) -> State:
    """Gradients with respect to the state after a step -> with respect to the state before it."""
    leaves = tuple(part.detach().requires_grad_() for part in state)
    with torch.enable_grad():
        reached = [
            (part, gradient) for part, gradient in zip(step(x, leaves), gradients, strict=True) if part.requires_grad
        ]
    if not reached:  # the cell cuts the graph
        return tuple(torch.zeros_like(part) for part in gradients)
    outputs, given = zip(*reached, strict=True)
    return torch.autograd.grad(outputs, leaves, given, allow_unused=True, materialize_grads=True)


def _norm(gradients: State, batch: int, alive: Tensor | None) -> Tensor:
    """L2 norm over the parts of the state, root mean square over directions and samples: shape ()."""
    parts = [part.to(wide(part.device)).reshape(-1, batch, part[0].numel()) for part in gradients]
    squares = torch.stack([part.square().sum(-1).mean(0) for part in parts]).sum(0)
    if alive is None:
        return squares.mean().sqrt()
    return (torch.where(alive, squares, torch.zeros_like(squares)).sum() / alive.sum()).sqrt()
