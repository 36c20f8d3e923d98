"""Clippers: objects that decide on the device how to shrink the gradients of one step, and do it in place.

A clipper sees `Gradients` (the parameters and their global norms) and returns a `Cut`: a few device tensors that
say what is to be done. Nothing is read on the host. `apply` carries a cut out; a cut that has nothing to do leaves
every bit as it was. A step with a NaN or Inf anywhere is left alone, and enters no statistics: what is done about it
is `on_non_finite`'s affair. Statistics live in `state`, tensors by name, one clipper an optimizer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gradhealth.layers import Slot
from lightning_gradhealth.messages import say
from lightning_gradhealth.norms import norms_or_zero, wide
from lightning_gradhealth.sharding import local, reduced
from lightning_gradhealth.validation import check_keys, wrong


def _here(flag: Tensor) -> Tensor:
    return flag


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
        sums: What clippers ask for, see `Clipper.sums`, over all ranks; empty where the gradients are not split.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> layer.weight.grad = torch.tensor([[3.0, 4.0]])
        >>> Gradients.of(layer.weight).total.item()
        5.0
    """

    slots: Sequence[Slot]
    tensors: Sequence[Tensor | None]
    norms: Tensor
    measure: Callable[[Sequence[Tensor | None]], Tensor] = norms_or_zero
    anywhere: Callable[[Tensor], Tensor] = _here
    sums: Mapping[Clipper, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, *parameters: nn.Parameter) -> Gradients:
        """The gradients of parameters that belong to no model (for tests and examples); each has one.

        What cannot be clipped in place becomes a tensor that can, in `grad`, see `summed_up`.

        Raises:
            TypeError: One of them is no tensor.
            ValueError: There is none, or one has no gradient.
        """
        if not parameters:
            raise ValueError("parameters must be at least one, got none; e.g. Gradients.of(layer.weight)")
        for parameter in parameters:
            if not isinstance(parameter, Tensor):
                raise TypeError(wrong("parameters", "tensors", parameter, "e.g. Gradients.of(*model.parameters())"))
            if parameter.grad is None:
                text = f"one of shape {tuple(parameter.shape)} without"
                raise ValueError(f"parameters must have gradients, got {text}; call it after backward()")
        slots = [Slot(str(i), p, i, "", is_bias=False, is_embedding=False) for i, p in enumerate(parameters)]
        tensors = [summed_up(p) for p in parameters]
        return cls(slots, tensors, norms_or_zero(tensors))

    @functools.cached_property
    def total(self) -> Tensor:
        """L2 norm of all together, shape ()."""
        total: Tensor = torch.linalg.vector_norm(self.norms)
        return total

    @functools.cached_property
    def finite(self) -> Tensor:
        """Whether neither a NaN nor an Inf is in them, on any rank, shape (), bool."""
        return self.total.isfinite()

    def writable(self) -> list[Tensor | None]:
        """The memory of each gradient on this rank, as a plain, dense tensor (of conjugates, that of the originals)."""
        return [None if tensor is None else _memory(tensor) for tensor in self.tensors]

    def copy(self) -> Gradients:
        """The same gradients in memory of their own."""
        return replace(self, tensors=[None if tensor is None else tensor.clone() for tensor in self.tensors])


def summed_up(parameter: nn.Parameter) -> Tensor | None:
    """A parameter's gradient in a form that can be clipped in place, put into `grad` where it was in another.

    Of summands and repeated rows it is the sum; of elements that share memory, as in `torch.ones(1).expand(3)`, a copy.

    Example:
        >>> weight = nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.sparse_coo_tensor([[1, 1]], [0.5, 0.5], (2,), check_invariants=True)
        >>> summed_up(weight).values().tolist()
        [1.0]
    """
    gradient = parameter.grad
    if gradient is None:
        return None
    whole = reduced(gradient)
    if whole.layout is torch.sparse_coo and not whole.is_coalesced():
        whole = whole.coalesce()
    if whole.layout is torch.strided and not whole.is_contiguous() and _overlaps(whole):
        whole = whole.clone(memory_format=torch.contiguous_format)
    if whole is not gradient:
        parameter.grad = whole
    return whole


def _overlaps(tensor: Tensor) -> bool:
    """Whether elements may share memory: a step along one axis does not lead beyond all that the smaller ones reach."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def _memory(tensor: Tensor) -> Tensor:
    if tensor.layout is torch.sparse_coo:
        part = tensor._values()
    else:
        part = local(tensor) if tensor.layout is torch.strided else tensor.values()
    return part.conj() if part.is_conj() else part


@dataclass
class Cut:
    """What a clipper decided about one step; all of it on the device.

    Attributes:
        parts: What its `apply` needs: factors or limits, finite and >= 0 (or the neutral value).
        clipped: Whether it changes anything, shape (), bool.
        coefficient: Total norm after it over that before, shape (); None where that would take another pass.
        neutral: The value of every part that leaves the gradients as they are, bit for bit.
        inner: The cuts of the clippers inside.
        armed: Whether the gate is open, shape (), bool; None where there is no gate.
        would: The coefficient of a dry run, shape (): what would have been done; None where it is none.
        acted: Whether what the gate let through changes, or in a dry run would change, anything, shape (), bool.
        refused: Whether a part was NaN, Inf or negative, and the neutral value was put in its place, shape (), bool.
        outbreak: Whether the gate stands open for longer than this one step, shape (), bool; None where there is none.

    Example:
        >>> Cut([torch.tensor(0.5)], torch.tensor(True)).where(torch.tensor(False)).parts
        [tensor(1.)]
    """

    parts: Sequence[Tensor]
    clipped: Tensor
    coefficient: Tensor | None = None
    neutral: float = 1.0
    inner: Sequence[Cut] = ()
    armed: Tensor | None = None
    would: Tensor | None = None
    acted: Tensor | None = None
    refused: Tensor | None = None
    outbreak: Tensor | None = None

    def where(self, flag: Tensor) -> Cut:
        """The same cut where `flag` is set, and nothing at all where it is not."""
        return replace(
            self,
            parts=[torch.where(flag, part, self.neutral) for part in self.parts],
            clipped=self.clipped & flag,
            coefficient=None if self.coefficient is None else torch.where(flag, self.coefficient, 1.0),
            inner=[cut.where(flag) for cut in self.inner],
        )


def checked(cut: Any, clipper: Clipper, gradients: Gradients) -> Cut:
    """What a clipper decided, fit to be carried out: on the gradients' device, and free of what would destroy weights.

    A part that is NaN, Inf or negative becomes the neutral value, on the device, and the cut says so.

    Raises:
        TypeError: It is no Cut of tensors.
        ValueError: Parts have a shape that `apply` cannot use.

    Example:
        >>> weight = nn.Parameter(torch.ones(1))
        >>> weight.grad = torch.ones(1)
        >>> bad = Cut([torch.tensor(float("nan"))], torch.tensor(True))
        >>> good = checked(bad, Clipper(), Gradients.of(weight))
        >>> good.parts, good.refused, good.clipped
        ([tensor(1.)], tensor(True), tensor(False))
    """
    name, home = type(clipper).__name__, gradients.norms.device
    if not isinstance(cut, Cut):
        raise TypeError(wrong(f"{name}.decide()", "a Cut", cut, "e.g. return factor(gradients, value)"))
    parts, flags = list(cut.parts), (cut.clipped, cut.coefficient, cut.armed, cut.would, cut.acted)
    if not all(isinstance(part, Tensor) for part in (*parts, *(flag for flag in flags if flag is not None))):
        raise TypeError(f"{name}.decide() must give a Cut of tensors, got {cut!r}; e.g. factor(gradients, value)")
    if type(clipper).apply is Clipper.apply and [tuple(p.shape) for p in parts] not in (
        [()],
        [(len(gradients.slots),)],
    ):
        shapes = [tuple(part.shape) for part in parts]
        text = f"{name}.decide() must give one part of shape () or ({len(gradients.slots)},), got {shapes}"
        raise ValueError(f"{text}; or define apply(gradients, cut)")
    if any(flag.numel() != 1 for flag in flags if flag is not None):
        raise ValueError(f"{name}.decide() must give flags of shape (), got {cut!r}; e.g. factor(gradients, value)")
    sound, bad, left = [], [], []
    for part in parts:
        fine = (part >= 0) & (part.isfinite() | (part == cut.neutral))
        sound.append(torch.where(fine, part, cut.neutral))
        bad.append(fine.logical_not().any().to(home))
        left.append((sound[-1] != cut.neutral).any().to(home))
    clipped, coefficient, armed, would, acted = (None if f is None else f.reshape(()).to(home) for f in flags)
    assert clipped is not None
    made = replace(cut, parts=sound, clipped=clipped, coefficient=coefficient, armed=armed, would=would, acted=acted)
    if not bad:
        return made
    refused = torch.stack(bad).any()
    if cut.refused is not None:
        refused = refused | cut.refused
    if coefficient is not None:
        coefficient = torch.where(coefficient.isfinite() & (coefficient >= 0), coefficient, 1.0)
    clipped = clipped.bool() & (torch.stack(left).any() | refused.logical_not())
    return replace(made, refused=refused, clipped=clipped, coefficient=coefficient)


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

    state: dict[str, Tensor]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Give it its state, whether or not a subclass calls `super().__init__`."""
        clipper = super().__new__(cls)
        clipper.state = {}
        return clipper

    def decide(self, gradients: Gradients) -> Cut:
        """Take in the norms of a step and say what is to be done; reads nothing on the host."""
        raise NotImplementedError(f"{type(self).__name__} must define decide(gradients)")

    def cut(self, gradients: Gradients) -> Cut:
        """What `decide` says, checked: this is what monitors, chains and gates ask for."""
        return checked(self.decide(gradients), self, gradients)

    def apply(self, gradients: Gradients, cut: Cut) -> None:
        """Carry out what was decided, in place: here, multiply by one factor, shape (), or one each, shape (n,)."""
        (part,) = cut.parts
        if part.ndim == 0:
            _scale(gradients.writable(), part)
            return
        for tensor, own in zip(gradients.writable(), part.unbind(), strict=True):
            if tensor is not None:
                multiply(tensor, own)

    def children(self) -> Sequence[Clipper]:
        """The clippers inside."""
        return ()

    def asking(self) -> list[Clipper]:
        """The clippers, itself and those inside, that want `sums` of this step."""
        return [clipper for child in self.children() for clipper in child.asking()]

    def sums(self, tensors: Sequence[Tensor | None], shares: Tensor | None = None) -> Tensor:
        """Sums over elements of the gradients that are wanted over all ranks, in the collective of the norms.

        Args:
            tensors: This rank's parts, plain tensors.
            shares: What each of them counts for on this rank, shape (len(tensors),); None: 1.

        Returns:
            Shape (n,), the same n on every rank and at every step.
        """
        raise NotImplementedError(f"{type(self).__name__} must define sums(tensors, shares): it asks for them")

    def state_dict(self) -> dict[str, Any]:
        """Return what it and the clippers inside remember, as tensors and primitives."""
        return {
            "kind": type(self).__name__,
            "state": {name: value.clone() for name, value in self.state.items()},
            "children": [child.state_dict() for child in self.children()],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` returned; what a clipper of another kind has left is told and not taken.

        Raises:
            TypeError: `state` is no dict.
            ValueError: It is not what `state_dict` returned.
        """
        check_keys("state", state, ("kind", "state", "children"))
        if state["kind"] != type(self).__name__:
            say(f"gradhealth: clip: the checkpoint holds the statistics of {state['kind']}: {self!r} starts without")
            return
        self.state = dict(state["state"])
        for child, saved in zip(self.children(), state["children"], strict=False):
            child.load_state_dict(saved)

    def on(self, device: torch.device) -> dict[str, Tensor]:
        """`state` on the device of the gradients, where a checkpoint may have left it on another."""
        for name, value in self.state.items():
            if value.device != device:
                dtype = wide(device) if value.is_floating_point() else value.dtype
                self.state[name] = value.to(dtype=dtype).to(device)
        return self.state

    def __repr__(self) -> str:
        hidden = ("state", "whole")
        shown = ", ".join(f"{k}={v!r}" for k, v in vars(self).items() if k not in hidden and not k.startswith("_"))
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
    value = torch.where(gradients.finite & value.isfinite() & (value >= 0), value, 1.0)
    return Cut([value], value != 1.0, value)


def limited(total: Tensor, limit: Tensor | float) -> Tensor:
    """The factor that brings a norm down to `limit`, and leaves a smaller one alone.

    Example:
        >>> limited(torch.tensor([5.0, 0.5]), 1.0).tolist()
        [0.2..., 1.0]
    """
    reached = total > limit if isinstance(limit, float) else (total > limit) & (limit >= 0)  # a state may have gone bad
    return torch.where(reached, limit / total, 1.0)


def usable(norms: Tensor) -> Tensor:
    """Which norms enter statistics: those that are finite and not 0.

    Example:
        >>> usable(torch.tensor([1.0, 0.0, float("nan")])).tolist()
        [True, False, False]
    """
    return norms.isfinite() & (norms > 0)


def multiply(tensor: Tensor, factor: Tensor) -> None:
    """Multiply in place by factors of shape () or one that broadcasts, in at least float32.

    A factor of shape () would be rounded to the tensor's own dtype first (on GPUs), and 1e-8 is nothing in float16.

    Example:
        >>> gradient = torch.full((2,), 1e4, dtype=torch.float16)
        >>> multiply(gradient, torch.tensor(1e-8, dtype=torch.float64)); gradient
        tensor([0.0001, 0.0001], dtype=torch.float16)
    """
    part = _like(factor, tensor)
    tensor.mul_(part.reshape((1,) * tensor.ndim) if part.ndim == 0 else part)


def _scale(tensors: Sequence[Tensor | None], value: Tensor) -> None:
    """Multiply in place by one factor, a foreach call for each device and dtype."""
    batches: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        if tensor is not None:
            batches.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    for (_, dtype), batch in batches.items():
        if dtype is not torch.float16:  # whose range a small factor would leave
            torch._foreach_mul_(batch, _like(value, batch[0]))
            continue
        for tensor in batch:
            multiply(tensor, value)


def _like(part: Tensor, tensor: Tensor) -> Tensor:
    """A factor on a tensor's device, in the precision in which the product is worked out."""
    dtype = torch.float64 if tensor.dtype in (torch.float64, torch.complex128) else torch.float32
    return part.to(dtype).to(tensor.device, non_blocking=True)


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
        is_class = isinstance(clipper, type) and issubclass(clipper, Clipper)
        remedy = f"make one: {clipper.__name__}(...)" if is_class else "e.g. NormClip(1.0)"
        raise TypeError(wrong(name, "a Clipper", clipper, remedy))
    return clipper
