"""Clippers: objects that decide on the device how to shrink the gradients of one step, and do it in place.

A clipper sees `Gradients` (the parameters and their global norms) and returns a `Cut`: a few device tensors that
say what is to be done. Nothing is read on the host. `apply` carries a cut out; a cut that has nothing to do leaves
every bit as it was. Statistics live in `state`, tensors by name, one clipper an optimizer.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gradhealth.errors import GradHealthError
from lightning_gradhealth.gradients.norms import dense, norms
from lightning_gradhealth.layers import Slot
from lightning_gradhealth.sharding import is_flat, local


@dataclass
class Gradients:
    """The gradients of one optimizer at one step, as a clipper sees them.

    Attributes:
        slots: The parameters that have a gradient (under FSDP1, a part of it on some rank).
        tensors: Their gradients; None where this rank has no part of one.
        norms: Their L2 norms over all ranks, shape (len(slots),), float64 (float32 on MPS).
        measure: Global norms of tensors that are split over the ranks as the gradients are; a collective of its own
            if they are split at all.
        anywhere: Whether a flag is set on any rank; a collective of its own if the gradients are split.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> layer.weight.grad = torch.tensor([[3.0, 4.0]])
        >>> Gradients.of(layer.weight).total.item()
        5.0
    """

    slots: Sequence[Slot]
    tensors: Sequence[Tensor | None]
    norms: Tensor
    measure: Callable[[Sequence[Tensor | None]], Tensor] = field(default=lambda tensors: _norms(tensors))
    anywhere: Callable[[Tensor], Tensor] = field(default=lambda flag: flag)

    @classmethod
    def of(cls, *parameters: nn.Parameter) -> Gradients:
        """The gradients of parameters that belong to no model (for tests and examples)."""
        slots = [Slot(str(i), p, i, "", is_bias=False, is_embedding=False) for i, p in enumerate(parameters)]
        tensors = [p.grad for p in parameters]
        return cls(slots, tensors, _norms(tensors))

    @property
    def total(self) -> Tensor:
        """L2 norm of all together, shape ()."""
        total: Tensor = torch.linalg.vector_norm(self.norms)
        return total

    def writable(self) -> list[Tensor | None]:
        """The memory of each gradient on this rank, as a plain, dense tensor."""
        return [None if tensor is None else _memory(tensor) for tensor in self.tensors]

    def copy(self) -> Gradients:
        """The same gradients in memory of their own."""
        return replace(self, tensors=[None if tensor is None else tensor.clone() for tensor in self.tensors])


def _norms(tensors: Sequence[Tensor | None]) -> Tensor:
    return norms([torch.zeros(0) if tensor is None else tensor for tensor in tensors])


def _memory(tensor: Tensor) -> Tensor:
    if tensor.layout is torch.strided:
        return local(tensor)
    return tensor._values() if tensor.layout is torch.sparse_coo else tensor.values()


@dataclass
class Cut:
    """What a clipper decided about one step; all of it on the device.

    Attributes:
        parts: What its `apply` needs: factors or limits.
        clipped: Whether it changes anything, shape (), bool.
        coefficient: Total norm after it over that before, shape (); None where that would take another pass.
        neutral: The value of every part that leaves the gradients as they are, bit for bit.
        inner: The cuts of the clippers inside.
        armed: Whether the gate is open, shape (), bool; None where there is no gate.
        would: The coefficient of a dry run, shape (): what would have been done; None where it is none.
    """

    parts: Sequence[Tensor]
    clipped: Tensor
    coefficient: Tensor | None = None
    neutral: float = 1.0
    inner: Sequence[Cut] = ()
    armed: Tensor | None = None
    would: Tensor | None = None

    def where(self, flag: Tensor) -> Cut:
        """The same cut where `flag` is set, and nothing at all where it is not."""
        return replace(
            self,
            parts=[torch.where(flag, part, self.neutral) for part in self.parts],
            clipped=self.clipped & flag,
            coefficient=None if self.coefficient is None else torch.where(flag, self.coefficient, 1.0),
            inner=[cut.where(flag) for cut in self.inner],
        )


class Clipper:
    """Base of all clippers. A subclass writes `decide`, and `apply` unless its parts are factors.

    Attributes:
        whole: It only looks at norms, and multiplies whole gradients.
        state: What it remembers, tensors by name; made at the first decision, on the gradients' device.

    Example:
        >>> class Halve(Clipper):
        ...     '''Halve every gradient.'''
        ...     def decide(self, gradients):
        ...         return factor(gradients, torch.full_like(gradients.total, 0.5))
        >>> weight = nn.Parameter(torch.ones(2))
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> gradients = Gradients.of(weight)
        >>> Halve().apply(gradients, Halve().decide(gradients)); weight.grad.tolist()
        [1.5, 2.0]
    """

    whole = True

    def __init__(self) -> None:
        self.state: dict[str, Tensor] = {}

    def decide(self, gradients: Gradients) -> Cut:
        """Take in the norms of a step and say what is to be done; reads nothing on the host."""
        raise NotImplementedError(f"{type(self).__name__} must define decide(gradients)")

    def apply(self, gradients: Gradients, cut: Cut) -> None:
        """Carry out what was decided, in place: here, multiply by one factor, or by one for each gradient."""
        tensors = gradients.writable()
        if len(cut.parts) == 1 and cut.parts[0].ndim == 0:
            _scale(tensors, cut.parts[0])
            return
        parts = cut.parts[0].unbind() if len(cut.parts) == 1 else cut.parts
        for tensor, part in zip(tensors, parts, strict=True):
            if tensor is not None:
                tensor.mul_(_like(part, tensor))

    def state_dict(self) -> dict[str, Any]:
        """Return what it remembers, as tensors and primitives."""
        return {name: value.clone() for name, value in self.state.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` returned."""
        self.state = dict(state)

    def on(self, device: torch.device) -> dict[str, Tensor]:
        """`state` on the device of the gradients, where a checkpoint may have left it on another."""
        for name, value in self.state.items():
            if value.device != device:
                self.state[name] = value.to(device)
        return self.state

    def __repr__(self) -> str:
        shown = ", ".join(f"{k}={v!r}" for k, v in vars(self).items() if k != "state" and not k.startswith("_"))
        return f"{type(self).__name__}({shown})"


def factor(gradients: Gradients, value: Tensor) -> Cut:
    """The cut that multiplies all gradients by one factor, shape (); 1 where a gradient is not finite.

    Example:
        >>> weight = nn.Parameter(torch.ones(1))
        >>> weight.grad = torch.tensor([float("nan")])
        >>> gradients = Gradients.of(weight)
        >>> factor(gradients, 1.0 / gradients.total).coefficient.item()
        1.0
    """
    value = torch.where(gradients.total.isfinite() & value.isfinite(), value, 1.0)
    return Cut([value], value != 1.0, value)


def limited(total: Tensor, limit: Tensor | float) -> Tensor:
    """The factor that brings a norm down to `limit`, and leaves a smaller one alone.

    Example:
        >>> limited(torch.tensor([5.0, 0.5]), 1.0).tolist()
        [0.2..., 1.0]
    """
    return torch.where(total > limit, limit / total, 1.0)


def _scale(tensors: Sequence[Tensor | None], value: Tensor) -> None:
    """Multiply in place by one factor, a foreach call for each device and dtype."""
    batches: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        if tensor is not None:
            batches.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    for batch in batches.values():
        torch._foreach_mul_(batch, _like(value, batch[0]))


def _like(part: Tensor, tensor: Tensor) -> Tensor:
    """A factor on a tensor's device, in the precision in which the product is worked out."""
    wide = tensor.dtype in (torch.float64, torch.complex128)
    return part.to(tensor.device, torch.float64 if wide else torch.float32, non_blocking=True)


def check_positive(owner: str, name: str, value: Any, remedy: str, *, below: float = math.inf) -> float:
    """Return a number > 0 (and < `below`) or raise an error that names argument, value and remedy.

    Raises:
        ValueError: It is none.

    Example:
        >>> check_positive("NormClip", "max_norm", -1.0, "1.0 is usual")
        Traceback (most recent call last):
        ...
        ValueError: NormClip: max_norm must be a number > 0, got -1.0; 1.0 is usual
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < below:
        bound = f" and < {below:g}" if below < math.inf else ""
        raise ValueError(f"{owner}: {name} must be a number > 0{bound}, got {value!r}; {remedy}")
    return float(value)


class NormClip(Clipper):
    """Scale all gradients together so that their L2 norm is at most `max_norm`: `g * min(1, max_norm / |g|)`.

    The usual clipping (Pascanu et al., 2013). The right `max_norm` depends on model, loss scale and batch size.

    Args:
        max_norm: The greatest norm, in the units of the gradient.

    Raises:
        ValueError: It is not a finite number > 0.

    Example:
        >>> weight = nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> clipper, gradients = NormClip(1.0), Gradients.of(weight)
        >>> clipper.apply(gradients, clipper.decide(gradients)); weight.grad
        tensor([0.6000, 0.8000])
    """

    def __init__(self, max_norm: float) -> None:
        super().__init__()
        self.max_norm = check_positive("NormClip", "max_norm", max_norm, "1.0 is usual")

    def decide(self, gradients: Gradients) -> Cut:
        """One factor for all."""
        return factor(gradients, limited(gradients.total, self.max_norm))


class ValueClip(Clipper):
    """Bound every element: `g.clamp(-limit, limit)`; it changes the direction of the gradient (Mikolov, 2012).

    Args:
        limit: The greatest absolute value, in the units of the gradient.

    Raises:
        ValueError: It is not a finite number > 0.

    Example:
        >>> weight = nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([3.0, -0.4])
        >>> clipper, gradients = ValueClip(0.5), Gradients.of(weight)
        >>> clipper.apply(gradients, clipper.decide(gradients)); weight.grad
        tensor([ 0.5000, -0.4000])
    """

    whole = False

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.limit = check_positive("ValueClip", "limit", limit, "0.5 is usual")

    def decide(self, gradients: Gradients) -> Cut:
        """The limit, and whether an element is beyond it."""
        home = gradients.norms.device
        views = [dense(t).abs() > self.limit for t in gradients.writable() if t is not None]
        flags = [view.any().to(home) for view in views]
        beyond = torch.stack(flags).any() if flags else torch.zeros((), dtype=torch.bool, device=home)
        limit = torch.full_like(gradients.total, self.limit)
        return Cut([limit], gradients.anywhere(beyond), neutral=math.inf)

    def apply(self, gradients: Gradients, cut: Cut) -> None:
        """Clamp in place."""
        for tensor in gradients.writable():
            if tensor is not None:
                view = torch.view_as_real(tensor) if tensor.is_complex() else tensor
                limit = cut.parts[0].to(view.device, view.dtype)
                torch.clamp(view, -limit, limit, out=view)


class SignClip(Clipper):
    """Keep only the signs: every element becomes `scale`, `-scale` or 0 (signSGD, Bernstein et al., 2018).

    The size of the gradient is lost: choose the learning rate for steps of one size. Elements that are NaN stay so.

    Args:
        scale: The size of every element.

    Raises:
        ValueError: It is not a finite number > 0.

    Example:
        >>> weight = nn.Parameter(torch.zeros(3))
        >>> weight.grad = torch.tensor([3.0, -0.4, 0.0])
        >>> clipper, gradients = SignClip(), Gradients.of(weight)
        >>> clipper.apply(gradients, clipper.decide(gradients)); weight.grad
        tensor([ 1., -1.,  0.])
    """

    whole = False

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = check_positive("SignClip", "scale", scale, "leave it out for 1.0")

    def decide(self, gradients: Gradients) -> Cut:
        """To act, wherever there is a gradient at all."""
        total = gradients.total
        return Cut([torch.zeros_like(total)], total > 0)

    def apply(self, gradients: Gradients, cut: Cut) -> None:
        """Replace by the sign, in place."""
        for tensor in gradients.writable():
            if tensor is not None:
                idle = (cut.parts[0] == 1.0).to(tensor.device)
                tensor.copy_(torch.where(idle, tensor, self._signs(tensor)))

    def _signs(self, tensor: Tensor) -> Tensor:
        signs = tensor.sgn() * self.scale
        return torch.where(tensor.isnan(), tensor, signs)


class UnitwiseClip(Clipper):
    """Adaptive gradient clipping (AGC; Brock et al., 2021): bound each unit's gradient by its weights' norm.

    A unit is a row of the first dimension (an output feature or channel); a vector or scalar is one unit. Its
    gradient is scaled by `min(1, clipping * max(|w|, eps) / |g|)`; `eps` lets weights that start at zero move.
    The paper leaves out the last linear layer: name it in `exclude`.

    Args:
        clipping: lambda, the greatest ratio of gradient to weight norm; the paper uses .01 to .08.
        eps: Least weight norm, in the units of the weights.
        exclude: Parameters to leave alone: regexes on their names, or classes of the modules that own them.

    Raises:
        ValueError: A number is not > 0, or a regex is not valid.

    Example:
        >>> weight = nn.Parameter(torch.tensor([[3.0, 4.0]]))
        >>> weight.grad = torch.tensor([[7.0, 24.0]])
        >>> clipper, gradients = UnitwiseClip(0.5), Gradients.of(weight)
        >>> clipper.apply(gradients, clipper.decide(gradients)); weight.grad
        tensor([[0.7000, 2.4000]])
    """

    whole = False

    def __init__(
        self, clipping: float = 0.01, eps: float = 1e-3, exclude: Sequence[str | type[nn.Module]] | str = ()
    ) -> None:
        super().__init__()
        self.clipping = check_positive("UnitwiseClip", "clipping", clipping, "0.01 is the paper's")
        self.eps = check_positive("UnitwiseClip", "eps", eps, "1e-3 is the paper's")
        self.exclude = [exclude] if isinstance(exclude, (str, type)) else list(exclude)
        for pattern in self.exclude:
            if isinstance(pattern, type):
                continue
            try:
                re.compile(pattern)
            except (re.error, TypeError) as error:
                raise ValueError(
                    f"UnitwiseClip: exclude: {pattern!r} is neither a module class nor a valid regular expression"
                    f' ({error}); e.g. exclude="head.*"'
                ) from error

    def _excluded(self, slot: Slot) -> bool:
        return any(
            issubclass(slot.kind, part) if isinstance(part, type) else re.fullmatch(part, slot.name)
            for part in self.exclude
        )

    def decide(self, gradients: Gradients) -> Cut:
        """A factor for each unit of each gradient."""
        one = torch.ones((), device=gradients.norms.device)
        parts = []
        for slot, gradient in zip(gradients.slots, gradients.tensors, strict=True):
            if is_flat(slot.parameter):
                raise GradHealthError(
                    f"UnitwiseClip needs whole rows, but FSDP's flat shards cut through those of {slot.name!r}: use"
                    ' NormClip or clip="adaptive", or shard with FSDP2 (ModelParallelStrategy)'
                )
            idle = gradient is None or self._excluded(slot)
            parts.append(one if gradient is None or idle else self._factors(slot.parameter.detach(), gradient))
        flags = [(part < 1).any().to(one.device) for part in parts]
        flag = torch.stack(flags).any() if flags else one < 1
        return Cut(parts, gradients.anywhere(flag))

    def _factors(self, weight: Tensor, gradient: Tensor) -> Tensor:
        """Shape (units, 1, ...); of a sparse gradient, only for the rows that it has."""
        if gradient.layout is torch.sparse_coo:
            weight, gradient = weight.index_select(0, gradient._indices()[0]), gradient._values()
        size, reach = _unit_norms(gradient), _unit_norms(weight).clamp(min=self.eps) * self.clipping
        return local(torch.where((size > reach) & size.isfinite(), reach / size, 1.0))


def _unit_norms(tensor: Tensor) -> Tensor:
    """L2 norm of each unit, in float64 where the device has it, in a shape that broadcasts."""
    magnitude = tensor.abs() if tensor.is_complex() else tensor
    dtype = torch.float32 if tensor.device.type == "mps" else torch.float64
    dims = tuple(range(1, tensor.ndim)) or None
    norm: Tensor = torch.linalg.vector_norm(magnitude, dim=dims, keepdim=True, dtype=dtype)
    return norm


class Chain(Clipper):
    """Several clippers, one after the other; each sees the norms that the ones before it leave.

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
        super().__init__()
        self.clippers = [check_clipper("Chain: clippers", clipper) for clipper in clippers]
        self.whole = all(clipper.whole for clipper in self.clippers)
        if not self.clippers:
            raise ValueError("Chain: clippers must hold at least one clipper, got none; e.g. Chain([NormClip(1.0)])")

    def decide(self, gradients: Gradients) -> Cut:
        """The cuts of all; where one looks at more than norms, the later ones work on a copy."""
        cuts: list[Cut] = []
        for number, clipper in enumerate(self.clippers):
            cuts.append(clipper.decide(gradients))
            rest = self.clippers[number:]
            if len(rest) > 1 and all(each.whole for each in rest):
                gradients = replace(gradients, norms=gradients.norms * cuts[-1].parts[0])
            elif len(rest) > 1:
                gradients = gradients.copy()
                clipper.apply(gradients, cuts[-1])
                gradients.norms = gradients.measure(gradients.tensors)
        factors = [cut.coefficient for cut in cuts if cut.coefficient is not None]
        armed = [cut.armed for cut in cuts if cut.armed is not None]
        would = [cut.would for cut in cuts if cut.would is not None]
        return Cut(
            parts=[math.prod((cut.parts[0] for cut in cuts[1:]), start=cuts[0].parts[0])] if self.whole else [],
            clipped=torch.stack([cut.clipped for cut in cuts]).any(),
            coefficient=torch.stack(factors).prod() if len(factors) == len(cuts) else None,
            inner=cuts,
            armed=torch.stack(armed).any() if armed else None,
            would=torch.stack(would).prod() if would else None,
        )

    def apply(self, gradients: Gradients, cut: Cut) -> None:
        """All factors at once, or one clipper after the other."""
        if self.whole:
            super().apply(gradients, cut)
            return
        for clipper, inner in zip(self.clippers, cut.inner, strict=True):
            clipper.apply(gradients, inner)

    def state_dict(self) -> dict[str, Any]:
        """The states of all, by position."""
        return {str(number): clipper.state_dict() for number, clipper in enumerate(self.clippers)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` returned."""
        for number, clipper in enumerate(self.clippers):
            clipper.load_state_dict(state[str(number)])


def check_clipper(name: str, clipper: Any) -> Clipper:
    """Return `clipper` if it is one.

    Raises:
        TypeError: It is not.

    Example:
        >>> check_clipper("clip", 1.0)
        Traceback (most recent call last):
        ...
        TypeError: clip must be a Clipper, got 1.0; e.g. NormClip(1.0)
    """
    if not isinstance(clipper, Clipper):
        raise TypeError(f"{name} must be a Clipper, got {clipper!r}; e.g. NormClip(1.0)")
    return clipper
