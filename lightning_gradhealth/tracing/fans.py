"""The fans of a weight, as an operator has used it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lightning_gradhealth.tracing.record import Event

_CONVOLUTIONS = {"convolution", "_convolution", "convolution_overrideable"}


def contraction_fans(event: Event, shapes: Sequence[tuple[int, ...]], data: int, weight: int) -> tuple[float, float]:
    """Terms that an output sums, and terms that the gradient of an input sums.

    Args:
        event: The operation.
        shapes: Shape of every value.
        data: The operand that carries the signal.
        weight: The operand that is the weight.
    """
    shape = shapes[weight]
    if event.name in _CONVOLUTIONS:
        stride, transposed, groups = event.args[3], bool(event.args[6]), int(event.args[8])
        return _convolution(shape, stride, groups, transposed)
    if event.name in ("mkldnn_convolution", "_conv_depthwise2d", "_slow_conv2d_forward"):
        groups = int(event.args[6]) if event.name == "mkldnn_convolution" else 1
        stride = event.args[4 if event.name == "mkldnn_convolution" else 5]
        return _convolution(shape, stride, groups, transposed=False)
    if event.name in ("linear", "mkldnn_linear"):
        return float(shape[-1]), float(shape[0]) if len(shape) > 1 else 1.0
    if event.name == "_trilinear":
        return float(math.prod(shape[1:])), float(shape[0] if len(shape) < 3 else shape[-1])
    # products of matrices: the axis that is summed is the last of the first factor and the last but one of the second
    first = min(
        position for position, argument in enumerate(event.args) if getattr(argument, "value", None) in (data, weight)
    )
    is_first = event.args[first].value == weight
    if len(shape) == 1:
        return float(shape[0]), 1.0
    summed, kept = (shape[-1], shape[-2]) if is_first else (shape[-2], shape[-1])
    return float(summed), float(kept)


def _convolution(shape: tuple[int, ...], stride: Sequence[int], groups: int, transposed: bool) -> tuple[float, float]:
    field, steps = math.prod(shape[2:]), math.prod(stride)
    if transposed:  # shape (in, out / groups, *kernel)
        return shape[0] * field / groups / steps, float(shape[1] * field)
    return float(shape[1] * field), shape[0] * field / groups / steps
