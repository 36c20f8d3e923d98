"""Rescales every weight to what a real batch shows: one forward pass, each weight before the next one reads it."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from lightning_gradhealth.init.owned import Owned
from lightning_gradhealth.init.settings import joined
from lightning_gradhealth.isolation import undisturbed
from lightning_gradhealth.messages import where_and_why
from lightning_gradhealth.records import DepthPoint, InitReport
from lightning_gradhealth.tracing import UNITS, Graph, Station, Trace, TraceError, follow
from lightning_gradhealth.validation import wrong

STILL = "its output does not vary on the batch"
NON_FINITE = "its output is NaN or Inf on the batch"
TOLERANCE = 0.02  # of a standard deviation: what is not reached within it is told


class Calibrated(NamedTuple):
    """What calibration has found, by the name of the weight.

    Attributes:
        before: Standard deviation of the weight's output as it was drawn.
        after: The same afterwards, measured in a second pass.
        left: Why a weight could not be brought to its target.
    """

    before: dict[str, float]
    after: dict[str, float]
    left: dict[str, str]


def calibrate(model: nn.Module, batch: Any, targets: Sequence[tuple[Owned, float]], seed: int) -> Calibrated:
    """Rescale weights so that the output of each has the standard deviation that it should have on a batch.

    In one pass: as soon as a weight has been used its output is measured, the weight and the output are multiplied
    alike, and what comes behind sees the corrected signal. Batch norms take the statistics of the batch, dropout is
    off; nothing but the weights is changed.

    Args:
        model: The model, its weights drawn.
        batch: What it is called with: a tensor, a tuple of arguments or a dict of keyword arguments.
        targets: The weights, each with the standard deviation of its output.
        seed: For parametrizations that complete a basis at random.

    Returns:
        What it has measured.

    Raises:
        ValueError: The forward pass fails on the batch.

    Paper: Mishkin and Matas 2016, All you need is a good init (arXiv:1511.06422), here without iterations.
    """
    wanted = {id(original): (owned, std) for owned, std in targets for original in owned.originals.values()}
    rescaled = _Pass(wanted, seed, rescale=True)
    checked = _Pass(wanted, seed, rescale=False)
    for each in (rescaled, checked):
        with undisturbed(model, silent=True, weights=True), torch.no_grad():
            _prepare(model)
            hooks = [
                m.register_forward_pre_hook(_Preview(), with_kwargs=True)
                for m in model.modules()
                if isinstance(m, UNITS)
            ]
            try:
                follow(model, batch, each.see)
            except Exception as error:
                raise TraceError(
                    f"calibrate must be a batch that goes through model.forward: {where_and_why(error)}; pass a tensor,"
                    " a tuple of positional or a dict of keyword arguments of forward"
                ) from error
            finally:
                for hook in hooks:
                    hook.remove()
        each.write()  # what else the pass has written into weights (an average of others, a first batch) is undone
    left = {owned.name: "not used as a weight in the forward pass" for owned, _ in targets}
    left = {name: why for name, why in left.items() if name not in rescaled.stds} | rescaled.left
    return Calibrated(rescaled.stds, checked.stds, left)


def check_batch(batch: Any) -> None:
    """Raise unless a batch is made of numbers; a mask may hold -Inf.

    Raises:
        ValueError: It has a NaN or an Inf, or is nothing that could hold a tensor.

    Example:
        >>> check_batch(torch.tensor([0.0, math.nan]))
        Traceback (most recent call last):
        ...
        ValueError: calibrate must be a batch of numbers, got shape (2,) with NaN or Inf; give data of the training
    """
    leaves = tree_leaves(batch)
    if all(leaf is None or isinstance(leaf, (str, bytes, int, float, complex, type)) for leaf in leaves):
        raise ValueError(wrong("calibrate", "a batch of numbers", batch, "give data of the training"))
    for leaf in leaves:
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and not leaf.is_meta and not (leaf < math.inf).all():
            what = f"shape {tuple(leaf.shape)} with NaN or Inf"
            raise ValueError(f"calibrate must be a batch of numbers, got {what}; give data of the training")


def _prepare(model: nn.Module) -> None:
    """Dropout off, batch norms on: they would not normalise by statistics that nobody has gathered yet."""
    model.eval()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.train()


class _Pass:
    """One forward pass: measures what every weight gives, and rescales it where asked to."""

    def __init__(self, wanted: Mapping[int, tuple[Owned, float]], seed: int, *, rescale: bool) -> None:
        self._wanted, self._seed, self._rescale = wanted, seed, rescale
        self._graph: Graph | None = None
        self.stds: dict[str, float] = {}
        self.left: dict[str, str] = {}
        self._written: list[tuple[Tensor, Tensor]] = []

    def write(self) -> None:
        """Give the weights the values that they have been rescaled to."""
        with torch.no_grad():
            for parameter, values in self._written:
                parameter.copy_(values)

    def see(self, trace: Trace, outputs: list[Tensor], given: list[Tensor]) -> None:
        """Take in one operation."""
        if self._graph is None:
            self._graph = Graph(trace)
        station = self._graph.extend()
        if station is None or station.kind != "weight" or not outputs:
            return
        known = [self._wanted.get(id(trace.parameters[value])) for value in station.parameters]
        chosen = {owned.name: (owned, std) for owned, std in filter(None, known)}
        if len(chosen) > 1:
            self.left.update(dict.fromkeys(chosen, "one of several parameters that make one weight"))
        elif outputs[0].is_complex():
            self.left.update(dict.fromkeys(chosen, "it gives complex numbers, whose scale a transform may undo"))
        elif chosen and not self.stds.keys() & chosen.keys():  # a second use reads what the first has settled
            ((owned, std),) = chosen.values()
            self._settle(owned, std, outputs[0], _bias(trace, station, given))

    def _settle(self, owned: Owned, target: float, output: Tensor, bias: Tensor | float) -> None:
        linear = output - bias
        std = float(linear.double().std(correction=0))
        self.stds[owned.name] = std
        if not self._rescale:
            return
        if not (math.isfinite(std) and std > 0):
            self.left[owned.name] = STILL if std == 0 else NON_FINITE
            return
        if self._multiply(owned, target / std):
            self._written += [(parameter, parameter.detach().clone()) for parameter in owned.originals.values()]
            output.copy_(linear * (target / std) + bias)
        else:
            self.left[owned.name] = "its parametrization keeps a scale of its own"

    def _multiply(self, owned: Owned, factor: float) -> bool:
        """Multiply a weight, unless a parametrization has its own mind: whether it was done."""
        before, originals = owned.present().clone(), [p.detach().clone() for p in owned.originals.values()]
        owned.write(before * factor, self._seed)
        if owned.computed is None:
            return True
        reached = float(owned.present().double().norm() / before.double().norm())
        if abs(reached / factor - 1) < TOLERANCE:
            return True
        for parameter, values in zip(owned.originals.values(), originals, strict=True):
            parameter.detach().copy_(values)
        return False


def _bias(trace: Trace, station: Station, given: Sequence[Tensor]) -> Tensor | float:
    """What the operation has added to the product, in the shape of its output: a parameter, or a part of one."""
    if not station.bias:
        return 0.0
    event = trace.events[station.event]
    product = (station.reads[0], station.operand)
    by_value = dict(zip(event.reads, given, strict=True))
    data = by_value[station.reads[0]]
    bias = next(tensor.detach() for value, tensor in by_value.items() if value not in product)
    if bias.dim() == 1 and "conv" in event.name:
        return bias.view(-1, *[1] * (data.dim() - 2))
    return bias


class _Preview:
    """Shows what the input weights of a recurrent layer give, which its own operators hide.

    A forward pre-hook: every product that it computes is seen, and settled, before the layer itself runs.
    """

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        given = args[0] if args else kwargs["input"]
        if isinstance(module, nn.RNNCellBase):
            nn.functional.linear(given, module.weight_ih)
            return
        assert isinstance(module, nn.RNNBase)
        for layer in range(module.num_layers):
            read = given if layer == 0 else _first_layers(module, layer)(given)[0]
            data = read.data if isinstance(read, nn.utils.rnn.PackedSequence) else read
            for suffix in ("", "_reverse")[: 2 if module.bidirectional else 1]:
                nn.functional.linear(data, getattr(module, f"weight_ih_l{layer}{suffix}"))


def _first_layers(module: nn.RNNBase, number: int) -> Any:
    """The forward of a recurrent module that ends after some of its layers; it shares their weights."""
    short = copy.copy(module)
    weights = module._flat_weights[: len(module._flat_weights) // module.num_layers * number]
    vars(short).update(num_layers=number, dropout=0.0, _flat_weights=weights)
    return short.forward


def with_measured(report: InitReport, found: Calibrated, targets: Sequence[tuple[Owned, float]]) -> InitReport:
    """The report with what the calibration has measured."""
    predicted = {point.name: point for point in report.depth}
    wanted = {owned.name: target for owned, target in targets}
    points = {
        name: replace(
            predicted.get(name, DepthPoint(name, None, None, None)),
            target=wanted[name],
            before=found.before[name],
            after=after,
        )
        for name, after in found.after.items()
    }
    left = {
        original: found.left[owned.name]
        for owned, _ in targets
        if owned.name in found.left
        for original in owned.originals
    }
    entries = tuple(
        replace(entry, note=joined(entry.note, f"not calibrated: {left[name]}"))
        if (name := entry.name.partition("[")[0]) in left
        else entry
        for entry in report.entries
    )
    return replace(
        report,
        entries=entries,
        depth=tuple(({**predicted, **points}).values()),
        notes=(*report.notes, *_as_drawn(found)),
    )


def _as_drawn(found: Calibrated) -> list[str]:
    """What to say of a batch that tells nothing of a weight."""
    notes = []
    for reason in (STILL, NON_FINITE):
        names = [name for name, why in found.left.items() if why == reason]
        if names:
            few = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
            notes.append(f"calibrate: left as drawn, {len(names)} weights ({few}): {reason}")
    return notes
