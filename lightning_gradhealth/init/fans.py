"""How many terms a unit sums: forward (fan_in) and, of its gradient, backward (fan_out)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import singledispatch
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_gradhealth.layers import check_model
from lightning_gradhealth.validation import check_choice, check_ints, check_type, shown

MODES = ("fan_in", "fan_out", "fan_avg", "fan_geo")


class Fans(NamedTuple):
    """The two fans of a weight; fractions occur, since a stride spreads the sums over several positions.

    Attributes:
        fan_in: Terms that an output sums, on average.
        fan_out: Terms that the gradient of an input sums, on average.

    Example:
        >>> Fans(fan_in=4, fan_out=16).fan("fan_geo")
        8.0
    """

    fan_in: float
    fan_out: float

    def fan(self, mode: str) -> float:
        """Return the one fan that `mode` stands for.

        Args:
            mode: "fan_in", "fan_out", "fan_avg" (their mean) or "fan_geo" (their geometric mean).

        Returns:
            The number of terms.

        Raises:
            ValueError: The mode is none of these.

        Example:
            >>> Fans(fan_in=4, fan_out=16).fan("fan_avg")
            10.0
        """
        check_choice("mode", mode, MODES)
        return {
            "fan_in": self.fan_in,
            "fan_out": self.fan_out,
            "fan_avg": (self.fan_in + self.fan_out) / 2,
            "fan_geo": math.sqrt(self.fan_in * self.fan_out),
        }[mode]


def shape_fans(
    shape: Sequence[int], in_axes: Sequence[int] | None = None, out_axes: Sequence[int] | None = None
) -> Fans:
    """Return the fans of a weight by its shape alone.

    Args:
        shape: The weight's shape.
        in_axes: Axes that are summed over; with `out_axes`, the axes in neither are a receptive field that
            multiplies both fans. None: torch's convention for linear and convolution weights, in 1, out 0.
        out_axes: Axes of the outputs; give both or neither.

    Returns:
        The two fans.

    Raises:
        ValueError: The shape has fewer than two axes, only one kind of axes is given, or an axis is out of
            range or given twice.

    Example:
        >>> shape_fans((64, 32, 3, 3))
        Fans(fan_in=288.0, fan_out=576.0)
        >>> shape_fans((512, 8, 64), in_axes=[0], out_axes=[1, 2])
        Fans(fan_in=512.0, fan_out=512.0)
    """
    shape = tuple(shape)
    if (in_axes is None) != (out_axes is None):
        raise ValueError(
            f"in_axes and out_axes must be given together, got {shown(in_axes)} and {shown(out_axes)};"
            " name both or neither"
        )
    if in_axes is None or out_axes is None:
        if len(shape) < 2:
            raise ValueError(
                f"tensor must have 2 axes or more to tell its fans, got the shape {shape}; give fan_in and fan_out"
            )
        in_axes, out_axes = (1,), (0,)
    for argument, given in (("in_axes", in_axes), ("out_axes", out_axes)):
        check_ints(argument, given, f"a list of axes, such as {argument}=[0]")
    axes = [axis + len(shape) if axis < 0 else axis for axis in (*in_axes, *out_axes)]
    if len(set(axes)) < len(axes) or not set(axes) <= set(range(len(shape))):
        raise ValueError(
            f"in_axes and out_axes must be different axes of the shape {shape}, got {list(in_axes)} and"
            f" {list(out_axes)}; name each axis once, from 0 to {len(shape) - 1}"
        )
    field = math.prod(size for axis, size in enumerate(shape) if axis not in axes)
    return Fans(
        float(field * math.prod(shape[axis] for axis in in_axes)),
        float(field * math.prod(shape[axis] for axis in out_axes)),
    )


@singledispatch
def fans(module: nn.Module, name: str = "weight") -> Fans:
    """Return the fans of one of a module's parameters, as the module uses it.

    A convolution's groups and stride count: behind a stride of 2 in two dimensions only a quarter of the
    outputs send a gradient to an input. Of packed weights (the gates of a recurrent layer, the projections
    of attention) the fans are those of one block. Subclasses match; `fans.register` teaches other modules.

    Args:
        module: The module that owns the parameter (positional only).
        name: The parameter's name in the module.

    Returns:
        The two fans.

    Raises:
        ValueError: There is no such parameter, or it has no fans (fewer than two axes, uninitialised).
        TypeError: How the module uses the parameter is not known.

    Example:
        >>> fans(nn.Conv2d(32, 64, 3, stride=2, groups=4))
        Fans(fan_in=72.0, fan_out=36.0)
        >>> fans(nn.ConvTranspose2d(32, 16, 4, stride=2))
        Fans(fan_in=128.0, fan_out=256.0)
        >>> fans(nn.LSTM(10, 20), "weight_ih_l0")
        Fans(fan_in=10.0, fan_out=20.0)
    """
    kind = type(check_model("module", module)).__name__
    raise TypeError(
        f"module must be of a known kind to tell the fans of {name!r}, got {kind} with the shape"
        f" {tuple(_shape(module, name))}; use variance_scaling_ with fan_in and fan_out, or with in_axes"
        f" and out_axes"
    )


def _shape(module: nn.Module, name: str) -> Sequence[int]:
    """The shape of a parameter that can have fans."""
    check_type("name", name, str, "the name of a parameter", "see module.named_parameters()")
    kind, parameter = type(module).__name__, getattr(module, name, None)
    if not isinstance(parameter, Tensor):
        raise ValueError(f"name must be a parameter of {kind}, got {name!r}; see module.named_parameters()")
    if is_lazy(parameter):
        raise ValueError(f"name must be an initialised parameter of {kind}, got {name!r}; run one forward pass")
    if parameter.dim() < 2:
        raise ValueError(
            f"name must be a weight of {kind} with 2 axes or more, got {name!r} with the shape"
            f" {tuple(parameter.shape)}; biases and scales have no fans"
        )
    return parameter.shape


def _linear(module: nn.Linear, name: str = "weight") -> Fans:
    return shape_fans(_shape(module, name))


def _conv(module: nn.Conv1d | nn.Conv2d | nn.Conv3d, name: str = "weight") -> Fans:
    fan_in, fan_out = shape_fans(_shape(module, name))  # the axis of the inputs is one group's already
    return Fans(fan_in, fan_out / module.groups / math.prod(module.stride))


def _conv_transpose(module: nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d, name: str = "weight") -> Fans:
    fan_in, fan_out = shape_fans(_shape(module, name), in_axes=(0,), out_axes=(1,))
    return Fans(fan_in / module.groups / math.prod(module.stride), fan_out)


def _bilinear(module: nn.Bilinear, name: str = "weight") -> Fans:
    # What flows back to one input is summed over the outputs and the other input; take their mean size.
    out, in1, in2 = _shape(module, name)
    return Fans(float(in1 * in2), out * (in1 + in2) / 2)


def _embedding(module: nn.Embedding | nn.EmbeddingBag, name: str = "weight") -> Fans:
    _shape(module, name)
    return Fans(1.0, 1.0)  # one row is read, and nothing flows back into an index


def _recurrent(module: nn.RNNBase | nn.RNNCellBase, name: str = "weight_ih_l0") -> Fans:
    rows, columns = _shape(module, name)
    return Fans(float(columns), float(rows if name.startswith("weight_hr") else module.hidden_size))


def _attention(module: nn.MultiheadAttention, name: str = "in_proj_weight") -> Fans:
    fan_in = _shape(module, name)[-1]  # also of bias_k and bias_v, (1, 1, embed_dim)
    return Fans(float(fan_in), float(module.embed_dim))


def _teach(function: Callable[..., Fans], *kinds: type[nn.Module]) -> None:
    for kind in kinds:
        fans.register(kind, function)


_teach(_linear, nn.Linear)
_teach(_conv, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_teach(_conv_transpose, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_teach(_bilinear, nn.Bilinear)
_teach(_embedding, nn.Embedding, nn.EmbeddingBag)
_teach(_recurrent, nn.RNNBase, nn.RNNCellBase)
_teach(_attention, nn.MultiheadAttention)
