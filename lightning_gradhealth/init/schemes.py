"""Variance scaling: one engine, `std = gamma * gain / sqrt(fan)`, and the names it is known by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from lightning_gradhealth.init.fans import MODES, Fans, shape_fans
from lightning_gradhealth.init.gains import Nonlinearity, gain as gain_of
from lightning_gradhealth.sharding import is_flat, is_sharded
from lightning_gradhealth.validation import check_choice, check_number, check_type, wrong

if TYPE_CHECKING:
    from typing_extensions import Unpack

DISTRIBUTIONS = ("normal", "uniform", "truncated_normal")
TRUNCATED_STD = 0.87962566103423978  # of a standard normal that is cut at +-2


class Scheme(NamedTuple):
    """What tells one scheme from another: the fan it divides by and the activation it expects."""

    name: str
    mode: str
    nonlinearity: str


AUTO = Scheme("auto", "fan_in", "linear")  # what it knows of a parameter names one of the next three
HE = Scheme("he", "fan_in", "relu")
XAVIER = Scheme("xavier", "fan_avg", "linear")
LECUN = Scheme("lecun", "fan_in", "linear")
ORTHOGONAL = Scheme("orthogonal", "fan_in", "linear")
DELTA_ORTHOGONAL = Scheme("delta_orthogonal", "fan_in", "linear")
SCHEMES = {
    "auto": AUTO,
    "he": HE,
    "kaiming": HE,
    "xavier": XAVIER,
    "glorot": XAVIER,
    "lecun": LECUN,
    "orthogonal": ORTHOGONAL,
    "delta_orthogonal": DELTA_ORTHOGONAL,
}


def variance_scaling_(
    tensor: Tensor,
    *,
    gain: float | None = None,
    nonlinearity: Nonlinearity = None,
    gamma: float = 1.0,
    mode: str = "fan_in",
    distribution: str = "normal",
    fan_in: float | None = None,
    fan_out: float | None = None,
    in_axes: Sequence[int] | None = None,
    out_axes: Sequence[int] | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Fill a tensor in place with zero-mean random numbers whose std is `gamma * gain / sqrt(fan)`.

    The numbers are drawn in float32 (float64 for a float64 tensor), in row-major order and, with a
    generator, on its device: the same generator gives a bfloat16, a channels-last or a GPU tensor the same
    numbers, rounded. Of complex numbers `std^2` is the mean of `|w|^2`: each part has half of it.

    Args:
        tensor: The weight, of any floating or complex dtype; with fewer than two axes give the fan.
        gain: The gain; None: that of `nonlinearity`.
        nonlinearity: The activation that follows: a name, a module or an elementwise function; None: linear.
        gamma: A factor on the gain.
        mode: The fan to divide by: "fan_in", "fan_out", "fan_avg" or "fan_geo".
        distribution: "normal", "uniform" (within `sqrt(3) * std`) or "truncated_normal" (redrawn until it
            lies within two sigma, where sigma is `std / 0.8796`, so that the std after the cut is `std`).
        fan_in: Terms an output sums; None: told by the shape.
        fan_out: Terms an input's gradient sums; None: told by the shape.
        in_axes: Axes that are summed over; None: torch's convention (see `shape_fans`).
        out_axes: Axes of the outputs; give both or neither.
        generator: Where the random numbers come from; None: torch's default generator.

    Returns:
        The tensor.

    Raises:
        ValueError: An argument is out of range, the fans cannot be told, or the tensor cannot be filled
            (meta, uninitialised, sharded, neither floating nor complex).

    Example:
        >>> weight = variance_scaling_(torch.empty(256, 1024), nonlinearity="relu")
        >>> abs(float(weight.var()) * 1024 - 2) < 0.05
        True

    Paper: Glorot and Bengio 2010; He et al. 2015 (arXiv:1502.01852); LeCun et al. 1998, Efficient BackProp.
    """
    check_choice("distribution", distribution, DISTRIBUTIONS)
    check_fillable(tensor)
    check_generator(generator)
    fan = choose_fan(tensor.shape, mode, fan_in, fan_out, in_axes, out_axes)
    std = scaled_std(gain_of(nonlinearity) if gain is None else gain, gamma, fan)
    dtype = drawing_dtype(tensor)
    device = tensor.device if generator is None else generator.device
    numbers = torch.empty(tensor.shape, dtype=dtype, device=device)
    with torch.no_grad():
        return tensor.copy_(_standard_(numbers, distribution, generator).mul_(std))


def drawing_dtype(tensor: Tensor) -> torch.dtype:
    """The precision in which numbers for `tensor` are drawn: the same for float32 and all below."""
    if tensor.is_complex():
        return torch.complex128 if tensor.dtype is torch.complex128 else torch.complex64
    return torch.float64 if tensor.dtype is torch.float64 else torch.float32


def _standard_(numbers: Tensor, distribution: str, generator: torch.Generator | None) -> Tensor:
    """Fill with numbers of mean 0 and mean square 1; of complex ones each part has half of it."""
    if numbers.is_complex():
        _standard_(torch.view_as_real(numbers), distribution, generator).div_(math.sqrt(2))
        return numbers
    if distribution == "uniform":
        return numbers.uniform_(-math.sqrt(3), math.sqrt(3), generator=generator)
    numbers.normal_(generator=generator)
    if distribution == "normal":
        return numbers
    # Redrawing keeps the bounds exactly; the inverse error function in float32 yields far outliers.
    while (outside := numbers.abs() > 2).any():
        numbers[outside] = numbers[outside].normal_(generator=generator)
    return numbers.div_(TRUNCATED_STD)


def choose_fan(
    shape: Sequence[int],
    mode: str,
    fan_in: float | None = None,
    fan_out: float | None = None,
    in_axes: Sequence[int] | None = None,
    out_axes: Sequence[int] | None = None,
) -> float:
    """The fan of `mode`; the shape is asked only for what the mode needs and the caller has not given."""
    check_choice("mode", mode, MODES)
    for argument, value in (("fan_in", fan_in), ("fan_out", fan_out)):
        if value is not None:
            check_number(argument, value, "leave it out to have it told by the shape")
    needed = {"fan_in": (fan_in,), "fan_out": (fan_out,)}.get(mode, (fan_in, fan_out))
    by_shape = shape_fans(shape, in_axes, out_axes) if None in needed else Fans(1.0, 1.0)
    return Fans(fan_in or by_shape.fan_in, fan_out or by_shape.fan_out).fan(mode)


def scaled_std(gain: float, gamma: float, fan: float) -> float:
    """The standard deviation that the formula asks for; an empty tensor's fan of 0 asks for nothing."""
    gain = check_number("gain", gain, "leave it out to have it follow from nonlinearity")
    gamma = check_number("gamma", gamma, "leave it out for the scheme's own scale")
    return gamma * gain / math.sqrt(fan) if fan else 0.0


def why_no_shape(tensor: Tensor) -> str | None:
    """Why not even a tensor's shape is known, with the remedy; None where it is."""
    if is_lazy(tensor):
        return "is not initialised yet (a lazy module); run one forward pass first"
    if is_flat(tensor):
        return "is a flat shard of FSDP1, which has lost its shape; initialise the model before the strategy wraps it"
    return None


def why_not_whole(tensor: Tensor) -> str | None:
    """Why a tensor's values are not all here to be set, with the remedy; None where they are."""
    if (reason := why_no_shape(tensor)) is not None:
        return reason
    if tensor.is_meta:
        return "is on the meta device; materialise it with model.to_empty(device=...) first"
    if is_sharded(tensor):
        return "is sharded over ranks; initialise the model before the strategy shards it"
    return None


def check_generator(generator: Any) -> None:
    """Raise a TypeError unless it is a generator of random numbers or None."""
    if generator is not None:
        remedy = "e.g. torch.Generator().manual_seed(0)"
        check_type("generator", generator, torch.Generator, "a torch.Generator or None", remedy)


def check_fillable(tensor: Tensor) -> None:
    """Raise unless random numbers can be written into `tensor`."""
    if not isinstance(tensor, Tensor):
        raise TypeError(wrong("tensor", "a torch.Tensor", tensor, "pass module.weight"))
    if (reason := why_not_whole(tensor)) is not None:
        raise ValueError(f"tensor must hold its values, but it {reason}")
    if not (tensor.is_floating_point() or tensor.is_complex()):
        raise ValueError(f"tensor must be floating or complex, got {tensor.dtype}; initialise before quantising")


class Scaling(TypedDict, total=False):
    """The options of `variance_scaling_` that the named schemes pass on."""

    gain: float | None
    nonlinearity: Nonlinearity
    gamma: float
    mode: str
    generator: torch.Generator | None


def _by_scheme(tensor: Tensor, scheme: Scheme, distribution: str, options: Scaling) -> Tensor:
    own: Scaling = {"mode": scheme.mode, "nonlinearity": scheme.nonlinearity}
    own.update(options)
    return variance_scaling_(tensor, distribution=distribution, **own)


def he_normal_(tensor: Tensor, *, distribution: str = "normal", **options: Unpack[Scaling]) -> Tensor:
    """Fill a weight for a ReLU that follows: variance `2 / fan_in`.

    Args:
        tensor: The weight, shape (out, in, *kernel).
        distribution: "normal" or "truncated_normal".
        **options: `gain`, `nonlinearity` ("relu"), `gamma`, `mode` ("fan_in") and `generator` of
            `variance_scaling_`.

    Returns:
        The tensor, filled in place.

    Raises:
        ValueError: As `variance_scaling_`.

    Example:
        >>> abs(float(he_normal_(torch.empty(256, 1024)).var()) * 1024 - 2) < 0.05
        True

    Paper: He et al. 2015, Delving Deep into Rectifiers (arXiv:1502.01852).
    """
    return _by_scheme(tensor, HE, distribution, options)


def he_uniform_(tensor: Tensor, **options: Unpack[Scaling]) -> Tensor:
    """Fill a weight for a ReLU that follows, uniformly: variance `2 / fan_in`.

    Args:
        tensor: The weight, shape (out, in, *kernel).
        **options: As `he_normal_`.

    Returns:
        The tensor, filled in place.

    Raises:
        ValueError: As `variance_scaling_`.

    Example:
        >>> float(he_uniform_(torch.empty(64, 6)).abs().max()) <= 1.0  # sqrt(3) * sqrt(2 / 6)
        True

    Paper: He et al. 2015, Delving Deep into Rectifiers (arXiv:1502.01852).
    """
    return _by_scheme(tensor, HE, "uniform", options)


def xavier_normal_(tensor: Tensor, *, distribution: str = "normal", **options: Unpack[Scaling]) -> Tensor:
    """Fill a weight for forward and backward signal alike: variance `2 / (fan_in + fan_out)`.

    Args:
        tensor: The weight, shape (out, in, *kernel).
        distribution: "normal", or "truncated_normal" as Keras's GlorotNormal.
        **options: `gain`, `nonlinearity` (linear), `gamma`, `mode` ("fan_avg") and `generator` of
            `variance_scaling_`.

    Returns:
        The tensor, filled in place.

    Raises:
        ValueError: As `variance_scaling_`.

    Example:
        >>> abs(float(xavier_normal_(torch.empty(512, 1024)).var()) * 768 - 1) < 0.05
        True

    Paper: Glorot and Bengio 2010, Understanding the difficulty of training deep feedforward neural networks.
    """
    return _by_scheme(tensor, XAVIER, distribution, options)


def xavier_uniform_(tensor: Tensor, **options: Unpack[Scaling]) -> Tensor:
    """Fill a weight uniformly, for forward and backward signal alike: variance `2 / (fan_in + fan_out)`.

    Args:
        tensor: The weight, shape (out, in, *kernel).
        **options: As `xavier_normal_`.

    Returns:
        The tensor, filled in place.

    Raises:
        ValueError: As `variance_scaling_`.

    Example:
        >>> float(xavier_uniform_(torch.empty(4, 2)).abs().max()) <= 1.0  # sqrt(3) * sqrt(2 / 6)
        True

    Paper: Glorot and Bengio 2010, Understanding the difficulty of training deep feedforward neural networks.
    """
    return _by_scheme(tensor, XAVIER, "uniform", options)


def lecun_normal_(tensor: Tensor, *, distribution: str = "normal", **options: Unpack[Scaling]) -> Tensor:
    """Fill a weight for a linear or SELU layer: variance `1 / fan_in`.

    Args:
        tensor: The weight, shape (out, in, *kernel).
        distribution: "normal" or "truncated_normal".
        **options: `gain`, `nonlinearity` (linear), `gamma`, `mode` ("fan_in") and `generator` of
            `variance_scaling_`.

    Returns:
        The tensor, filled in place.

    Raises:
        ValueError: As `variance_scaling_`.

    Example:
        >>> abs(float(lecun_normal_(torch.empty(256, 1024)).var()) * 1024 - 1) < 0.05
        True

    Paper: LeCun et al. 1998, Efficient BackProp; Klambauer et al. 2017 (arXiv:1706.02515) for SELU.
    """
    return _by_scheme(tensor, LECUN, distribution, options)


def lecun_uniform_(tensor: Tensor, **options: Unpack[Scaling]) -> Tensor:
    """Fill a weight uniformly, for a linear or SELU layer: variance `1 / fan_in`.

    Args:
        tensor: The weight, shape (out, in, *kernel).
        **options: As `lecun_normal_`.

    Returns:
        The tensor, filled in place.

    Raises:
        ValueError: As `variance_scaling_`.

    Example:
        >>> float(lecun_uniform_(torch.empty(64, 3)).abs().max()) <= 1.0  # sqrt(3) * sqrt(1 / 3)
        True

    Paper: LeCun et al. 1998, Efficient BackProp.
    """
    return _by_scheme(tensor, LECUN, "uniform", options)


kaiming_normal_, kaiming_uniform_ = he_normal_, he_uniform_
glorot_normal_, glorot_uniform_ = xavier_normal_, xavier_uniform_
