"""Recurrent modules, unrolled: the states of every layer and direction, and the step that leads from one to the next.

A step is one call of torch's own cell with that layer's weights, or of the cell module itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

State = tuple[Tensor, ...]  # the hidden state first; for an LSTM (h, c)
Step = Callable[[Tensor, State], State]

ACCEPTED = (
    "nn.RNN, nn.LSTM, nn.GRU, nn.RNNCell, nn.LSTMCell, nn.GRUCell, or a cell called as cell(x_t, h) given with hx"
)
_CELLS: dict[str, Callable[..., Any]] = {
    "RNN_TANH": torch.rnn_tanh_cell,
    "RNN_RELU": torch.rnn_relu_cell,
    "GRU": torch.gru_cell,
    "LSTM": torch.lstm_cell,
}


@dataclass(frozen=True)
class Unrolled:
    """One layer in one direction.

    Attributes:
        name: As torch names its weights: "l0", "l0_reverse".
        step: Input and state of some samples -> their next state.
        inputs: What it reads, in the order of the steps: shape (T, batch, ...). Sequences of different lengths all
            end at the last step.
        states: The T + 1 states, the one before the first step included.
        alive: Shape (T, batch), whether a sequence has begun; None: all begin at the first step.
    """

    name: str
    step: Step
    inputs: Tensor
    states: tuple[State, ...]
    alive: Tensor | None = None


def unrolled(rnn: nn.Module, inputs: Any, hx: Any = None, *, samples: int | None = None) -> Iterator[Unrolled]:
    """Step a recurrent module through time, layer by layer, with no dropout and no graph.

    Args:
        rnn: nn.RNN, nn.LSTM, nn.GRU or a cell (see `temporal_flow`), in evaluation mode.
        inputs: As the module takes it; for a cell shape (T, batch, features).
        hx: As the module takes it.
        samples: The greatest number of sequences to look at; None: all.

    Raises:
        TypeError: The module is not recurrent, or the inputs are of another type.
        ValueError: Shapes, dtypes or devices do not fit the module.
    """
    if isinstance(rnn, nn.RNNBase):
        return _unrolled_stack(rnn, inputs, hx, samples)
    return _unrolled_cell(rnn, inputs, hx, samples)


def _walk(step: Step, inputs: Tensor, start: State, alive: Tensor | None) -> tuple[State, ...]:
    states = [start]
    with torch.no_grad():
        for index, x in enumerate(inputs):
            new = step(x, states[-1])
            if alive is not None:  # a sequence that has not begun keeps the state that it begins with
                begun = alive[index].unsqueeze(-1)
                new = tuple(torch.where(begun, after, before) for after, before in zip(new, states[-1], strict=True))
            states.append(new)
    return tuple(states)


# --- nn.RNN, nn.LSTM, nn.GRU ---


def _unrolled_stack(rnn: nn.RNNBase, inputs: Any, hx: Any, samples: int | None) -> Iterator[Unrolled]:
    sequence, lengths, order = _sequence(rnn, inputs)
    start = _start(rnn, hx, sequence, order)
    sequence, start = sequence[:, :samples], tuple(part[:, :samples] for part in start)
    alive = None
    if lengths is not None:
        lengths = lengths[:samples]
        alive = torch.arange(len(sequence), device=sequence.device)[:, None] >= len(sequence) - lengths
    suffixes = ["", "_reverse"] if rnn.bidirectional else [""]
    for layer in range(rnn.num_layers):
        outputs = []
        for direction, suffix in enumerate(suffixes):
            step = _layer_step(rnn, f"l{layer}{suffix}")
            taken = (sequence if direction else _turned(sequence, lengths)).flip(0)
            first = tuple(part[layer * len(suffixes) + direction] for part in start)
            states = _walk(step, taken, first, alive)
            yield Unrolled(f"l{layer}{suffix}", step, taken, states, alive)
            output = torch.stack([state[0] for state in states[1:]]).flip(0)
            outputs.append(output if direction else _turned(output, lengths))
        sequence = torch.cat(outputs, -1)


def _turned(sequence: Tensor, lengths: Tensor | None) -> Tensor:
    """Every sequence from its last step to its first; what then pads it behind these is never looked at."""
    if lengths is None:
        return sequence.flip(0)
    steps = torch.arange(len(sequence), device=sequence.device)[:, None]
    index = (lengths - 1 - steps).clamp(min=0)
    return sequence[index, torch.arange(sequence.shape[1], device=sequence.device)]


def _layer_step(rnn: nn.RNNBase, name: str) -> Step:
    def weight(kind: str) -> Tensor:
        return plain(getattr(rnn, f"{kind}_{name}"))

    cell = _CELLS[rnn.mode]
    weights = [weight("weight_ih"), weight("weight_hh")]
    biases = [weight("bias_ih"), weight("bias_hh")] if rnn.bias else [None, None]
    if not rnn.proj_size:

        def step(x: Tensor, state: State) -> State:
            new = cell(x, state if rnn.mode == "LSTM" else state[0], *weights, *biases)
            return tuple(new) if rnn.mode == "LSTM" else (new,)

        return step

    # torch's cell knows no projection: what the projected state adds to the gates goes in as a further input
    joint, projection = torch.cat(weights, 1), weight("weight_hr")
    nothing = joint.new_zeros(len(joint), rnn.hidden_size)

    def projected(x: Tensor, state: State) -> State:
        hidden, carried = state
        off = torch.zeros_like(carried)
        output, new = cell(torch.cat([x, hidden], -1), (off, carried), joint, nothing, *biases)
        return output @ projection.t(), new

    return projected


def _sequence(rnn: nn.RNNBase, inputs: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The inputs as (T, batch, features), their lengths if they differ, and the order in which hx is to be taken."""
    first = next(rnn.parameters())
    if isinstance(inputs, PackedSequence):
        _check_features(inputs.data, rnn.input_size, first, "(sum of the lengths, features)", (2,))
        # the public function would bring the order to the host
        padded, lengths = torch._VF._pad_packed_sequence(
            plain(inputs.data, first.dtype), inputs.batch_sizes, False, 0.0, len(inputs.batch_sizes)
        )
        return padded, lengths.to(padded.device, non_blocking=True), inputs.sorted_indices
    if not isinstance(inputs, Tensor):
        raise TypeError(f"inputs must be a tensor or a PackedSequence, got {type(inputs).__name__}")
    shape = "(batch, T, features)" if rnn.batch_first else "(T, batch, features)"
    _check_features(inputs, rnn.input_size, first, f"{shape} or, unbatched, (T, features)", (2, 3))
    if inputs.ndim == 2:
        inputs = inputs.unsqueeze(1)
    elif rnn.batch_first:
        inputs = inputs.transpose(0, 1)
    _check_not_empty(inputs)
    return plain(inputs, first.dtype), None, None


def _start(rnn: nn.RNNBase, hx: Any, sequence: Tensor, order: Tensor | None) -> State:
    """The states before the first step: shape (layers * directions, batch, size) each."""
    count, batch = rnn.num_layers * (2 if rnn.bidirectional else 1), sequence.shape[1]
    sizes = [rnn.proj_size or rnn.hidden_size, rnn.hidden_size][: 2 if rnn.mode == "LSTM" else 1]
    if hx is None:
        return tuple(sequence.new_zeros(count, batch, size) for size in sizes)
    parts = _parts(hx, len(sizes))
    if batch == 1:  # the unbatched form
        parts = tuple(part.unsqueeze(1) if part.ndim == 2 else part for part in parts)
    _check_shapes(parts, [(count, batch, size) for size in sizes], sequence.device)
    parts = tuple(plain(part, sequence.dtype) for part in parts)
    return parts if order is None else tuple(part.index_select(1, order) for part in parts)


# --- cells ---


def _unrolled_cell(cell: nn.Module, inputs: Any, hx: Any, samples: int | None) -> Iterator[Unrolled]:
    if hx is None and not isinstance(cell, nn.RNNCellBase):
        raise TypeError(
            f"rnn must be {ACCEPTED}; got {type(cell).__name__} without hx. If it is such a cell, give its state before"
            " the first step as hx, e.g. hx=torch.zeros(batch, hidden); of a larger model give the recurrent module"
        )
    if not isinstance(inputs, Tensor):
        raise TypeError(f"inputs of a cell must be a tensor of shape (T, batch, features), got {type(inputs).__name__}")
    first = next((parameter for parameter in cell.parameters() if parameter.is_floating_point()), None)
    if isinstance(cell, nn.RNNCellBase):
        _check_features(inputs, cell.input_size, first, "(T, batch, features) or, unbatched, (T, features)", (2, 3))
        if inputs.ndim == 2:
            inputs = inputs.unsqueeze(1)
    elif inputs.ndim < 2:
        raise ValueError(f"inputs of a cell must have shape (T, batch, ...), got {tuple(inputs.shape)}")
    _check_not_empty(inputs)
    _check_device("inputs", inputs, first)
    inputs = plain(inputs, None if first is None else first.dtype)
    start = _cell_start(cell, hx, inputs, first)
    step = _cell_step(cell, single=isinstance(cell, (nn.RNNCell, nn.GRUCell)) or isinstance(hx, Tensor))
    inputs, start = inputs[:, :samples], tuple(part[:samples] for part in start)
    _check_call(cell, inputs[0], start)
    return iter([Unrolled("l0", step, inputs, _walk(step, inputs, start, None))])


def _cell_start(cell: nn.Module, hx: Any, inputs: Tensor, first: Tensor | None) -> State:
    batch = inputs.shape[1]
    count = 2 if isinstance(cell, nn.LSTMCell) else 1
    if hx is None:
        assert isinstance(cell, nn.RNNCellBase)
        return tuple(inputs.new_zeros(batch, cell.hidden_size) for _ in range(count))
    if isinstance(cell, nn.RNNCellBase):
        parts = _parts(hx, count)
        if batch == 1:  # the unbatched form
            parts = tuple(part.unsqueeze(0) if part.ndim == 1 else part for part in parts)
        _check_shapes(parts, [(batch, cell.hidden_size)] * count, inputs.device)
    else:
        parts = _parts(hx, None)
        if any(not part.is_floating_point() or part.ndim < 2 or len(part) != batch for part in parts):
            shapes = ", ".join(f"{tuple(part.shape)} of {part.dtype}" for part in parts)
            raise ValueError(
                f"hx of a cell must hold floating tensors of shape ({batch}, ...), as inputs do; got {shapes}"
            )
        for part in parts:
            _check_device("hx", part, inputs)
    return tuple(plain(part, None if first is None else first.dtype) for part in parts)


def _cell_step(cell: nn.Module, single: bool) -> Step:
    def step(x: Tensor, state: State) -> State:
        return _state_in(cell(x, state[0] if single else state), state, cell)

    return step


def _state_in(result: Any, state: State, cell: nn.Module) -> State:
    """The new state: all that the cell returns, or the last part of (output, state)."""
    shapes = [part.shape for part in state]
    for candidate in (result, result[-1] if isinstance(result, (tuple, list)) and len(result) == 2 else None):
        parts = (candidate,) if isinstance(candidate, Tensor) else candidate
        if isinstance(parts, (tuple, list)) and [getattr(part, "shape", None) for part in parts] == shapes:
            return tuple(parts)
    expected = ", ".join(str(tuple(shape)) for shape in shapes)
    raise TypeError(
        f"{type(cell).__name__} must return its new state or (output, state), the state shaped like hx: {expected}; "
        f"it returned {type(result).__name__}. rnn must be {ACCEPTED}"
    )


def _check_call(cell: nn.Module, x: Tensor, state: State) -> None:
    try:
        signature = inspect.signature(cell.forward)
    except ValueError:  # scripted modules have none; what does not fit is then said by the call
        return
    try:
        signature.bind(x, state)
    except TypeError as error:
        raise TypeError(f"rnn must be {ACCEPTED}; {type(cell).__name__} cannot be called so: {error}") from None


# --- what both share ---


def plain(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The values without history, cast to `dtype` if they are floating, and fit to be differentiated with."""
    if dtype is not None and tensor.is_floating_point():
        tensor = tensor.to(dtype)
    tensor = tensor.detach()
    return tensor.clone() if tensor.is_inference() else tensor


def _parts(hx: Any, count: int | None) -> State:
    parts = (hx,) if isinstance(hx, Tensor) else hx
    fits = isinstance(parts, (tuple, list)) and len(parts) > 0 and all(isinstance(part, Tensor) for part in parts)
    if not fits or count not in (None, len(parts)):
        wanted = {1: "a tensor", 2: "a tuple of two tensors (h_0, c_0)"}.get(
            count or 0, "a tensor or a tuple of tensors"
        )
        raise TypeError(f"hx must be {wanted}, got {type(hx).__name__}; leave it out to start from zeros")
    return tuple(parts)


def _check_features(inputs: Tensor, features: int, weight: Tensor | None, shape: str, ranks: tuple[int, ...]) -> None:
    if inputs.ndim not in ranks or inputs.shape[-1] != features:
        raise ValueError(f"inputs must have shape {shape} with {features} features, got {tuple(inputs.shape)}")
    if not inputs.is_floating_point():
        raise ValueError(f"inputs must be floating, got {inputs.dtype}; pass inputs.float(), or embed what are indices")
    _check_device("inputs", inputs, weight)


def _check_not_empty(inputs: Tensor) -> None:
    """`inputs` as (T, batch, ...)."""
    if not len(inputs) or not inputs.shape[1]:
        raise ValueError(
            f"inputs hold no sequence: {len(inputs)} steps of {inputs.shape[1]} samples; give at least one"
        )


def _check_device(name: str, tensor: Tensor, reference: Tensor | None) -> None:
    if reference is not None and tensor.device != reference.device:
        raise ValueError(
            f"{name} must be on the module's device, {reference.device}, got {tensor.device}; "
            f'pass {name}.to("{reference.device}")'
        )


def _check_shapes(parts: State, shapes: list[tuple[int, ...]], device: torch.device) -> None:
    for part, shape in zip(parts, shapes, strict=True):
        if tuple(part.shape) != shape:
            raise ValueError(f"hx must have shape {shape}, got {tuple(part.shape)}; leave it out to start from zeros")
        if part.device != device:
            raise ValueError(f'hx must be on the device of inputs, {device}, got {part.device}; pass hx.to("{device}")')
