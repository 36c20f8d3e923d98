"""Orthogonal weights: matrices that keep the length of a signal, and convolutions that do."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_gradhealth.init.gains import Nonlinearity, gain as gain_of
from lightning_gradhealth.init.schemes import check_fillable, check_generator, drawing_dtype
from lightning_gradhealth.validation import check_number


def orthogonal_(tensor: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """Fill a matrix in place with a random one whose singular values are all 1.

    Args:
        tensor: Shape (rows, columns), of any floating or complex dtype.
        generator: Where the random numbers come from; None: torch's default generator.

    Returns:
        The tensor; uniform over the orthogonal matrices (Haar).

    Raises:
        ValueError: The tensor is no matrix or cannot be filled.

    Example:
        >>> weight = orthogonal_(torch.empty(3, 5))
        >>> torch.allclose(weight @ weight.T, torch.eye(3), atol=1e-6)
        True

    Paper: Saxe et al. 2014 (arXiv:1312.6120); Mezzadri 2007 (arXiv:math-ph/0609050) for the signs.
    """
    check_fillable(tensor)
    if tensor.dim() != 2:
        raise ValueError(f"tensor must have 2 axes, got the shape {tuple(tensor.shape)}; reshape it to a matrix")
    long, short = max(tensor.shape), min(tensor.shape)
    device = tensor.device if generator is None else generator.device
    numbers = torch.empty((long, short), dtype=drawing_dtype(tensor), device=device)
    with torch.no_grad():
        q, r = torch.linalg.qr(numbers.normal_(generator=generator))
        q *= r.diagonal().sgn()  # of complex numbers: unitary
        return tensor.copy_(q if tensor.shape == q.shape else q.T)


def delta_orthogonal_(
    tensor: Tensor,
    *,
    gain: float | None = None,
    nonlinearity: Nonlinearity = None,
    gamma: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Fill a convolution's weight in place so that it keeps the length of its input: one orthogonal tap, else zeros.

    The centre of the kernel is a random matrix with orthonormal columns, times `gamma * gain`. With padding that
    keeps the size, or a circular one, the layer multiplies the norm of any input by exactly that factor: a plain
    tanh network of thousands of layers can be trained so.

    Args:
        tensor: The weight, shape (out, in, *kernel), with at least one kernel axis, odd kernel sizes and
            out >= in; of a grouped convolution, one group's.
        gain: The gain; None: that of `nonlinearity`.
        nonlinearity: The activation that follows: a name, a module or an elementwise function; None: linear.
        gamma: A factor on the gain.
        generator: Where the random numbers come from; None: torch's default generator.

    Returns:
        The tensor.

    Raises:
        ValueError: The shape is none of these, a number is not positive, or the tensor cannot be filled.

    Example:
        >>> conv = torch.nn.Conv2d(8, 16, 3, padding=1, padding_mode="circular", bias=False)
        >>> _ = delta_orthogonal_(conv.weight)
        >>> x = torch.randn(2, 8, 5, 5)
        >>> round(float(conv(x).detach().norm() / x.norm()), 4)
        1.0

    Paper: Xiao et al. 2018, Dynamical Isometry and a Mean Field Theory of CNNs (arXiv:1806.05393).
    """
    check_fillable(tensor)
    if (reason := why_no_delta(tuple(tensor.shape))) is not None:
        raise ValueError(f"tensor must be a convolution's weight (out, in, *kernel), but {reason}")
    check_generator(generator)
    factor = gain_of(nonlinearity) if gain is None else gain
    check_number("gain", factor, "leave it out to have it follow from nonlinearity")
    check_number("gamma", gamma, "leave it out for the scheme's own scale")
    device = tensor.device if generator is None else generator.device
    tap = torch.empty(tensor.shape[:2], dtype=drawing_dtype(tensor), device=device)
    with torch.no_grad():
        orthogonal_(tap, generator=generator)
        tensor.zero_()
        centre = tensor
        for size in tensor.shape[2:]:
            centre = centre.select(2, size // 2)
        centre.copy_(tap.mul_(gamma * factor))
    return tensor


def why_no_delta(shape: tuple[int, ...]) -> str | None:
    """Why a weight of this shape has no delta-orthogonal draw, with the remedy; None where it has one."""
    if len(shape) < 3:
        return f"the shape {shape} has no kernel; use scheme orthogonal for it"
    if shape[0] < shape[1]:
        return f"the shape {shape} has fewer outputs than inputs; use scheme orthogonal for it"
    if any(size % 2 == 0 for size in shape[2:]):
        return f"the shape {shape} has a kernel without a centre; use odd kernel sizes or scheme orthogonal"
    return None


def draw_orthogonal(numbers: Tensor, generator: torch.Generator, *, groups: int, out_axes: tuple[int, ...]) -> None:
    """Fill a weight, for each group by itself, with a matrix (outputs, all else) of singular values 1."""
    for part in numbers.chunk(groups):
        matrix = torch.empty(matrix_shape(part.shape, out_axes), dtype=numbers.dtype, device=numbers.device)
        orthogonal_(matrix, generator=generator)
        rest = [axis for axis in range(part.dim()) if axis not in out_axes]
        ordered = [part.shape[axis] for axis in (*out_axes, *rest)]
        part.permute(*out_axes, *rest).copy_(matrix.view(ordered))


def draw_delta_orthogonal(numbers: Tensor, generator: torch.Generator, *, groups: int, out_axis: int) -> None:
    """Fill a convolution's weight, (out, in, ...) or transposed (in, out, ...), for each group by itself."""
    for part in numbers.chunk(groups):
        delta_orthogonal_(part if out_axis == 0 else part.transpose(0, 1), generator=generator)


def matrix_shape(shape: tuple[int, ...], out_axes: tuple[int, ...]) -> tuple[int, int]:
    """The shape of a weight as a matrix: outputs, and all else."""
    outputs = math.prod(shape[axis] for axis in out_axes)
    return outputs, (math.prod(shape) // outputs if outputs else 0)
