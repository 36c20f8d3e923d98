"""Clippers without a memory: by the norm, by elements, by signs, by units; and several in a row."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gradhealth.errors import GradHealthError
from lightning_gradhealth.gradients.clipping import (
    Clipper,
    Cut,
    Gradients,
    check_clipper,
    factor,
    limited,
    multiply,
)
from lightning_gradhealth.layers import Slot
from lightning_gradhealth.norms import wide
from lightning_gradhealth.sharding import is_flat, local, on_whole, reduced
from lightning_gradhealth.validation import check_number, check_regex, wrong

# classes first: a command line tries them in order, and every class path is a regex too
Exclude = Sequence[type[nn.Module] | str] | type[nn.Module] | str


class NormClip(Clipper):
    """Scale all gradients together so that their L2 norm is at most `max_norm`: `g * min(1, max_norm / |g|)`.

    The usual clipping (Pascanu et al., 2013). The right `max_norm` depends on model, loss scale and batch size.

    Args:
        max_norm: The greatest norm, in the units of the gradient.

    Raises:
        ValueError: It is not a finite number > 0.
        TypeError: It is no number.

    Example:
        >>> weight = nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> clipper, gradients = NormClip(1.0), Gradients.of(weight)
        >>> clipper.apply(gradients, clipper.decide(gradients)); weight.grad
        tensor([0.6000, 0.8000])
    """

    def __init__(self, max_norm: float) -> None:
        self.max_norm = check_number("NormClip: max_norm", max_norm, "1.0 is usual")

    def decide(self, gradients: Gradients) -> Cut:
        """One factor for all."""
        return factor(gradients, limited(gradients.total, self.max_norm))


class ValueClip(Clipper):
    """Bound every element: `g.clamp(-limit, limit)`; it changes the direction of the gradient (Mikolov, 2012).

    Real and imaginary parts are elements of their own. The limit is rounded to the gradient's dtype.

    Args:
        limit: The greatest absolute value, in the units of the gradient.

    Raises:
        ValueError: It is not a finite number > 0.
        TypeError: It is no number.

    Example:
        >>> weight = nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([3.0, -0.4])
        >>> clipper, gradients = ValueClip(0.5), Gradients.of(weight)
        >>> clipper.apply(gradients, clipper.decide(gradients)); weight.grad
        tensor([ 0.5000, -0.4000])
    """

    whole = False

    def __init__(self, limit: float) -> None:
        self.limit = check_number("ValueClip: limit", limit, "0.5 is usual")

    def decide(self, gradients: Gradients) -> Cut:
        """The limit, and whether an element is beyond it."""
        limit = torch.full_like(gradients.total, self.limit).where(gradients.finite, math.inf)
        home, flags = limit.device, []
        for tensor in gradients.writable():
            if tensor is not None and tensor.numel():
                low, high = torch.aminmax(_real(tensor))
                own = limit.to(low.device, low.dtype)
                flags.append(((low < -own) | (high > own)).to(home))
        beyond = torch.stack(flags).any() if flags else torch.zeros((), dtype=torch.bool, device=home)
        return Cut([limit], gradients.anywhere(beyond), neutral=math.inf)

    def apply(self, gradients: Gradients, cut: Cut) -> None:
        """Clamp in place."""
        for tensor in gradients.writable():
            if tensor is not None:
                view = _real(tensor)
                limit = cut.parts[0].to(view.device, view.dtype)
                torch.clamp(view, -limit, limit, out=view)


def _real(tensor: Tensor) -> Tensor:
    """Real and imaginary parts of a complex tensor as elements of their own; the same memory."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


class SignClip(Clipper):
    """Keep only the signs: every element becomes `scale`, `-scale` or 0 (signSGD, Bernstein et al., 2018).

    The size of the gradient is lost: choose the learning rate for steps of one size. A complex `z` becomes
    `scale * z / |z|`.

    Args:
        scale: The size of every element.

    Raises:
        ValueError: It is not a finite number > 0.
        TypeError: It is no number.

    Example:
        >>> weight = nn.Parameter(torch.zeros(3))
        >>> weight.grad = torch.tensor([3.0, -0.4, 0.0])
        >>> clipper, gradients = SignClip(), Gradients.of(weight)
        >>> clipper.apply(gradients, clipper.decide(gradients)); weight.grad
        tensor([ 1., -1.,  0.])
    """

    whole = False

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = check_number("SignClip: scale", scale, "leave it out for 1.0")

    def decide(self, gradients: Gradients) -> Cut:
        """To act, wherever there is a gradient at all."""
        active = gradients.finite & (gradients.total > 0)
        return Cut([torch.full_like(gradients.total, self.scale) * active], active, neutral=0.0)

    def apply(self, gradients: Gradients, cut: Cut) -> None:
        """Replace by the sign, in place."""
        for tensor in gradients.writable():
            if tensor is not None:
                scale = cut.parts[0].to(tensor.device)
                signs = (tensor.sgn() * scale).to(tensor.dtype)
                torch.where(scale > 0, signs, tensor, out=tensor)


class UnitwiseClip(Clipper):
    """Adaptive gradient clipping (AGC; Brock et al., 2021): bound each unit's gradient by its weights' norm.

    A unit is an output feature or channel: a row of the first dimension, or of the second for transposed convolutions
    (in each of their groups), or of what `gradhealth_axes` declares; of an embedding the vector of one index. A vector
    or scalar is one unit. Its gradient is scaled by `min(1, clipping * max(|w|, eps) / |g|)`; `eps` lets weights that
    start at zero move.
    The paper leaves out the last linear layer: name it in `exclude`.

    Args:
        clipping: lambda, the greatest ratio of gradient to weight norm; the paper uses .01 to .08.
        eps: Least weight norm, in the units of the weights.
        exclude: Parameters to leave alone: regexes that match their whole names ("head.*"), or classes of the
            modules that own them; one or several.

    Raises:
        ValueError: A number is not finite and > 0, or a regex is not valid.
        TypeError: An argument has the wrong type.

    Example:
        >>> weight = nn.Parameter(torch.tensor([[3.0, 4.0]]))
        >>> weight.grad = torch.tensor([[7.0, 24.0]])
        >>> clipper, gradients = UnitwiseClip(0.5), Gradients.of(weight)
        >>> clipper.apply(gradients, clipper.decide(gradients)); weight.grad
        tensor([[0.7000, 2.4000]])
    """

    whole = False

    def __init__(self, clipping: float = 0.01, eps: float = 1e-3, exclude: Exclude = ()) -> None:
        self.clipping = check_number("UnitwiseClip: clipping", clipping, "0.01 is the paper's")
        self.eps = check_number("UnitwiseClip: eps", eps, "1e-3 is the paper's")
        parts: Any = (
            [exclude] if isinstance(exclude, (str, bytes, type)) or not isinstance(exclude, Sequence) else exclude
        )
        self.exclude = [_check_exclude(part) for part in parts]

    def _excluded(self, slot: Slot) -> bool:
        return any(
            issubclass(slot.kind, part) if isinstance(part, type) else re.fullmatch(part, slot.name)
            for part in self.exclude
        )

    def decide(self, gradients: Gradients) -> Cut:
        """A factor for each unit of each gradient."""
        one = torch.ones_like(gradients.total)
        parts = [
            one if self._excluded(slot) else self._factors(slot, gradient, gradients.finite)
            for slot, gradient in zip(gradients.slots, gradients.tensors, strict=True)
        ]
        flags = [(part < 1).any().to(one.device) for part in (one, *parts)]
        return Cut(parts, gradients.anywhere(torch.stack(flags).any()))

    def _factors(self, slot: Slot, gradient: Tensor | None, finite: Tensor) -> Tensor:
        """Shape (units, 1, ...); of a sparse gradient, only for the rows that it has."""
        weight = slot.parameter.detach()
        if is_flat(slot.parameter):  # on every rank, whether or not it holds a part of the gradient
            raise GradHealthError(
                f"UnitwiseClip needs whole rows, but FSDP's flat shards cut through those of {slot.name!r}: use"
                ' NormClip or clip="adaptive", or shard with FSDP2 (ModelParallelStrategy)'
            )
        if gradient is None:
            return torch.ones_like(finite, dtype=torch.float32)
        if gradient.layout is torch.sparse_coo and gradient.sparse_dim() == 1:
            weight = weight if weight.ndim == 1 else weight.index_select(0, gradient._indices()[0])
            gradient = gradient._values()
        elif gradient.layout is not torch.strided:
            raise GradHealthError(
                f"UnitwiseClip needs whole rows, but the gradient of {slot.name!r} is {gradient.layout} with single"
                f" elements: leave it out by exclude={slot.name!r}, or use NormClip"
            )
        size, reach = (_unit_norms(tensor, slot.units, slot.groups) for tensor in (gradient, weight))
        reach = reach.clamp(min=self.eps) * self.clipping
        factors = local(torch.where(size > reach, reach / size, 1.0))
        return torch.where(finite.to(factors.device), factors, 1.0)

    def apply(self, gradients: Gradients, cut: Cut) -> None:
        """Multiply in place, unit by unit."""
        for tensor, part in zip(gradients.writable(), cut.parts, strict=True):
            if tensor is not None:
                multiply(tensor, part)


def _check_exclude(part: Any) -> type[nn.Module] | str:
    """Return one entry of `exclude`."""
    if isinstance(part, type) and issubclass(part, nn.Module):
        return part
    argument, remedy = "UnitwiseClip: exclude", 'e.g. exclude="head.*"'
    if not isinstance(part, str):
        raise TypeError(wrong(argument, "regular expressions or classes of modules", part, remedy))
    return check_regex(argument, part, remedy)


def _unit_norms(tensor: Tensor, units: tuple[int, ...], groups: int) -> Tensor:
    """L2 norm of each unit, in float64 where the device has it, in a shape that broadcasts; see `Slot`."""
    magnitude = tensor.abs() if tensor.is_complex() else tensor
    kept = units if groups == 1 else (0, *units)
    axes = [axis for axis in range(tensor.ndim) if axis not in kept] if tensor.ndim > 1 else None
    dtype = wide(tensor.device)
    if axes == []:  # each element is a unit; an empty list would stand for all axes
        return magnitude.abs().to(dtype)
    norms = torch.linalg.vector_norm(magnitude, dim=axes, keepdim=True, dtype=dtype)
    if groups > 1:
        return on_whole(norms, lambda whole: _over_groups(whole, groups))
    return reduced(norms)  # once, not at every use


def _over_groups(norms: Tensor, groups: int) -> Tensor:
    """From norms of (in, out / groups, ...) those over the inputs of each group, which stand in a row; same shape."""
    split = norms.view(groups, norms.shape[0] // groups, *norms.shape[1:])
    joined: Tensor = torch.linalg.vector_norm(split, dim=1, keepdim=True).expand_as(split).reshape(norms.shape)
    return joined


class Chain(Clipper):
    """Several clippers, one after the other; each sees the norms that the ones before it leave.

    Factors are multiplied out and applied at once. An element- or unitwise clipper, unless it is the only one, costs a
    copy of all gradients and another look at their norms.

    Args:
        clippers: At least one.

    Raises:
        TypeError: One of them is no clipper.
        ValueError: There is none.

    Example:
        >>> weight = nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([30.0, 0.4])
        >>> clipper, gradients = Chain([ValueClip(0.3), NormClip(0.3)]), Gradients.of(weight)
        >>> clipper.apply(gradients, clipper.decide(gradients)); weight.grad
        tensor([0.2121, 0.2121])
    """

    def __init__(self, clippers: Sequence[Clipper]) -> None:
        example = "e.g. Chain([NormClip(1.0)])"
        if isinstance(clippers, str) or not isinstance(clippers, Sequence):
            raise TypeError(wrong("Chain: clippers", "a list of clippers", clippers, example))
        if not clippers:
            raise ValueError(wrong("Chain: clippers", "at least one clipper", clippers, example))
        self.clippers = [check_clipper("Chain: clippers", clipper) for clipper in clippers]
        self.whole = all(clipper.whole for clipper in self.clippers)

    def children(self) -> Sequence[Clipper]:
        """The clippers, in order."""
        return self.clippers

    def decide(self, gradients: Gradients) -> Cut:
        """The cuts of all; where one looks at more than norms, the others work on a copy."""
        cuts: list[Cut] = []
        copied = False
        for number, clipper in enumerate(self.clippers, start=1):
            cuts.append(clipper.cut(gradients))
            rest = self.clippers[number:]
            if not rest:
                break
            if clipper.whole and all(each.whole for each in rest):
                gradients = replace(gradients, norms=gradients.norms * cuts[-1].parts[0])
                continue
            gradients, copied = gradients if copied else gradients.copy(), True
            clipper.apply(gradients, cuts[-1])
            gradients = replace(gradients, norms=gradients.measure(gradients.tensors))
        factors = [cut.coefficient for cut in cuts if cut.coefficient is not None]
        armed = [cut.armed for cut in cuts if cut.armed is not None]
        acted = [cut.acted for cut in cuts if cut.acted is not None]
        outbreak = [cut.outbreak for cut in cuts if cut.outbreak is not None]
        would = [cut.would for cut in cuts if cut.would is not None]
        refused = [cut.refused for cut in cuts if cut.refused is not None]
        return Cut(
            parts=[math.prod((cut.parts[0] for cut in cuts[1:]), start=cuts[0].parts[0])] if self.whole else [],
            clipped=torch.stack([cut.clipped for cut in cuts]).any(),
            coefficient=torch.stack(factors).prod() if len(factors) == len(cuts) else None,
            inner=cuts,
            armed=torch.stack(armed).any() if armed else None,
            would=torch.stack(would).prod() if would else None,
            acted=torch.stack(acted).any() if acted else None,
            refused=torch.stack(refused).any() if refused else None,
            outbreak=torch.stack(outbreak).any() if outbreak else None,
        )

    def apply(self, gradients: Gradients, cut: Cut) -> None:
        """All factors at once, or one clipper after the other."""
        if self.whole:
            super().apply(gradients, cut)
            return
        for clipper, inner in zip(self.clippers, cut.inner, strict=True):
            clipper.apply(gradients, inner)
