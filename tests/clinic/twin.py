"""The slow, obvious twin of the measures: it keeps everything, in float64, and shares no code with the package.

A label is a claim about physics. Here stands, for every condition, the number that decides it, with two limits: below
the first nobody would call it sick, above the second nobody would call it healthy. A label must not lie between.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from clinic import CATALOGUE, Scenario, fit
from slopes import slope_of, spread
from torch import Tensor, nn

SAMPLES = 256  # fewer cannot tell a dead unit from a rare one
EVERY = 10


def rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values)))) if values.size else math.nan


class Twin(pl.Callback):
    """Watches a training, slowly.

    Attributes:
        forward: For every measured step, the RMS of the output of each module of the chain, in order of use.
        backward: The same of the gradient of the loss by that output.
        read: For every measured step, the RMS of what the first module of the chain reads.
        flat: For each layer with an activation behind it the mean slope of its units, one array a window of samples.
        norms: For each optimizer the L2 norm of all its gradients at every step.
        losses: The loss at every batch.
        updates: For every measured step, layer -> |dw| / |w|.
        weights: For every measured step, layer -> RMS of its parameters, and their number.
        rates: The largest learning rate of each layer.
        silent: Trainable parameters that have not had a gradient so far.
        bad: Steps at which a gradient, or the loss, was not finite.
        orphans: At the end, for each tensor that had a gradient and never moved, whether that was a mistake.
        bounded: For every batch whether all that a loss on logits was given lay between 0 and 1.
        given: For each optimizer the loss of each of its steps, where a module says it.
        carried: For every step how much of the gradient was there before the backward pass, by its norm.
    """

    def __init__(self, case: Scenario) -> None:
        self.case = case
        self.forward: list[list[float]] = []
        self.backward: list[list[float]] = []
        self.read: list[float] = []
        self.flat: dict[str, list[np.ndarray]] = {}
        self.norms: dict[int, list[float]] = {}
        self.losses: list[float] = []
        self.updates: dict[int, dict[str, float]] = {}
        self.weights: dict[int, dict[str, tuple[float, int]]] = {}
        self.rates: dict[str, float] = {}
        self.silent: set[str] = set()
        self.bad: list[int] = []
        self._sums: dict[str, tuple[Any, int]] = {}
        self._handles: list[Any] = []
        self._kept: dict[str, list[list[np.ndarray]]] = {}
        self._before: dict[str, np.ndarray] = {}
        self._batch = 0
        self._read = math.nan
        self._moved: set[str] = set()
        self.orphans: list[bool] = []
        self.bounded: list[bool] = []
        self.carried: list[float] = []
        self._left: list[list[float]] = []
        self.given: dict[int, list[float]] = {}
        self._began: dict[int, Tensor] = {}
        self._there: set[int] = set()

    # --- watching ---

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._spy(pl_module)
        self._there = set(map(id, pl_module.parameters()))
        parameters = list(_parameters(pl_module))
        steered = {id(p) for optimizer in trainer.optimizers for g in optimizer.param_groups for p in g["params"]}
        self.silent = {n for n, p in pl_module.named_parameters() if p.requires_grad and id(p) in steered}
        self.rates = {
            layer: g["lr"]
            for o in trainer.optimizers
            for g in o.param_groups
            for layer, p in parameters
            if any(p is q for q in g["params"]) and p.requires_grad
        }

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._moved = set()
        if self._measuring:
            self._kept, self._read = {}, math.nan
            for name, module in pl_module.named_modules():
                if self._activation(name) or (self.case.chain and re.fullmatch(self.case.chain, name)):
                    self._handles.append(module.register_forward_hook(functools.partial(self._keep, name)))
            self._before = _weights(pl_module)

    def _spy(self, pl_module: Any) -> None:
        """Look at what a loss on logits is given."""
        loss = getattr(pl_module, "loss", None)
        on_logits = loss in (nn.functional.cross_entropy, nn.functional.binary_cross_entropy_with_logits)

        def spied(logits: Tensor, *rest: Any) -> Tensor:
            self.bounded.append(bool((logits.detach() >= 0).all() and (logits.detach() <= 1).all()))
            return loss(logits, *rest)

        if on_logits:
            pl_module.loss = spied

    def on_before_backward(self, trainer: pl.Trainer, pl_module: Any, loss: Tensor) -> None:
        steered = [[p for g in optimizer.param_groups for p in g["params"]] for optimizer in trainer.optimizers]
        there = [[_array(p.grad) for p in parameters if p.grad is not None] for parameters in steered]
        self._left.append([math.sqrt(sum(float(np.sum(np.square(g))) for g in gradients)) for gradients in there])
        for tensor in (*pl_module.parameters(), *_listed(pl_module)):
            self._began.setdefault(id(tensor), tensor.detach().clone())

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        mine, listed = list(pl_module.parameters()), list(_listed(pl_module))
        steered = [p for o in trainer.optimizers for g in o.param_groups for p in g["params"]]
        in_vain = any(p.grad is None and all(p is not q for q in mine) for p in steered)
        for tensor in (*mine, *listed):
            left = tensor.grad is not None and bool(_array(tensor.grad).any())
            if left and all(tensor is not p for p in steered) and torch.equal(tensor, self._began[id(tensor)]):
                self.orphans.append(in_vain or any(tensor is p for p in listed) or id(tensor) not in self._there)

    @property
    def _measuring(self) -> bool:
        return self._batch < 2 or self._batch % EVERY == EVERY - 1

    def _activation(self, name: str) -> str:
        return next((kind for regex, kind in self.case.units.items() if re.fullmatch(regex, name)), "")

    def _keep(self, name: str, module: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        output = output[0] if isinstance(output, tuple) else output
        if not self._kept and isinstance(given[0], Tensor) and given[0].is_floating_point():
            self._read = rms(_array(given[0]))
        kept = [spread(module, _array(given[0])) if self._activation(name) == "softmax" else _array(output)]
        self._kept.setdefault(name, []).append(kept)
        if output.requires_grad:
            output.register_hook(lambda gradient: kept.append(_array(gradient)))

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        mine = {id(p) for group in optimizer.param_groups for p in group["params"]}
        gradients = {n: p.grad for n, p in pl_module.named_parameters() if id(p) in mine and p.grad is not None}
        self.silent -= set(gradients)
        self._moved |= {layer for layer, p in _parameters(pl_module) if id(p) in mine and p.grad is not None}
        norm = math.sqrt(sum(float(np.sum(np.square(_array(g)))) for g in gradients.values()))
        number = next(i for i, o in enumerate(trainer.optimizers) if getattr(o, "optimizer", o) is optimizer)
        self.norms.setdefault(number, []).append(norm)
        self.given.setdefault(number, []).append(getattr(pl_module, "given", math.nan))
        if self._left and norm > 0:  # the least of the passes of a step: where one began with nothing, all is well
            self.carried.append(min(left[number] for left in self._left) / norm)
        self._left = []
        if not math.isfinite(norm):
            self.bad.append(len(self.norms[number]) - 1)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if isinstance(outputs, dict) and "loss" in outputs:
            self.losses.append(float(outputs["loss"]) * trainer.accumulate_grad_batches)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._measuring:
            self._read_chain()
            for name, calls in self._kept.items():
                self._read_units(name, [call[0] for call in calls])
            if self._moved:
                after = _weights(pl_module)
                self.weights[self._batch] = {n: (rms(w), w.size) for n, w in after.items() if n in self.rates}
                self.updates[self._batch] = {
                    name: float(np.linalg.norm(after[name] - weight) / np.linalg.norm(weight))
                    for name, weight in self._before.items()
                    if np.linalg.norm(weight) > 0 and name in self._moved & set(self.rates)
                }
        self._batch += 1

    def _read_chain(self) -> None:
        if self.case.chain is None:
            return
        chain = [calls for name, calls in self._kept.items() if re.fullmatch(self.case.chain, name)]
        if len(chain) == 1:  # a cell: its calls are the chain
            chain = [[call] for call in chain[0]]
        self.forward.append([rms(np.concatenate([call[0].ravel() for call in calls])) for calls in chain])
        gradients = [[gradient.ravel() for call in calls for gradient in call[1:]] for calls in chain]
        self.backward.append([rms(np.concatenate(parts)) if parts else 0.0 for parts in gradients])
        self.read.append(self._read)

    def _read_units(self, name: str, outputs: list[np.ndarray]) -> None:
        """Sum up the slopes of each unit until there are enough samples."""
        activation = self._activation(name)
        for output in outputs:
            if not activation or not np.isfinite(output).all():
                continue
            samples = np.moveaxis(output, 1, -1) if output.ndim == 4 else output  # channels of images
            slopes = slope_of(activation, samples.reshape(-1, samples.shape[-1]))
            total, count = self._sums.get(name, (0.0, 0))
            self._sums[name] = total, count = total + slopes.sum(0), count + len(slopes)
            if count >= SAMPLES:
                self.flat.setdefault(name, []).append(total / count)
                del self._sums[name]

    # --- concluding ---

    def shares(self, rectifiers: bool) -> dict[str, float]:
        """The largest share of dead (or saturated) units of each layer, in any window."""
        limit = 0.0 if rectifiers else 0.05
        return {
            name: max(float(np.mean(mean <= limit)) for mean in windows)
            for name, windows in self.flat.items()
            if self._activation(name).startswith("relu") == rectifiers
        }

    def share(self, rectifiers: bool) -> float:
        return max(self.shares(rectifiers).values(), default=0.0)

    def decades(self, forward: bool) -> list[float]:
        """By how many powers of ten the signal grows along its way over the chain, at each measured step.

        First against last quarter, and the fitted slope over all; the smaller of both where they agree, else 0.
        """
        found = []
        for signal, read in zip(self.forward if forward else self.backward, self.read, strict=True):
            way = np.array(signal if forward else signal[::-1])
            if len(way) < 4 or not np.isfinite(way).all() or not way.any():
                continue
            quarter = max(1, len(way) // 4)
            start, end = np.median(way[:quarter]), np.median(way[-quarter:])
            if start == 0.0:
                continue
            if end == 0.0:
                found.append(-math.inf)
                continue
            whole = math.log10(end / start)
            there = way > 0
            fitted = np.polyfit(np.arange(len(way))[there], np.log10(way[there]), 1)[0] * (len(way) - 1)
            agreed = 0.0 if whole * fitted < 0 else math.copysign(min(abs(whole), abs(fitted)), whole)
            if forward and agreed > 0 and read > 0:  # more than the net was given, too
                agreed = min(agreed, max(0.0, math.log10(end / read)))
            found.append(agreed)
        return found

    def swallowed(self) -> list[float]:
        """By how many powers of ten the gradient falls at one layer, where the weights of one are tiny at the start."""
        first = [size for size, numel in next(iter(self.weights.values()), {}).values() if numel >= 64][:-1]  # no head
        if len(first) < 3 or min(first) >= 0.1 * np.median(first):  # its biases are not scaled
            return []
        ways = [np.array(signal) for signal in self.backward if len(signal) > 1 and min(signal) > 0.0]
        return [float(np.max(np.diff(np.log10(way)))) for way in ways]

    def leap(self) -> float:
        """The largest leap of a gradient norm over its usual size, in powers of ten."""
        rests = 10 if len(self.norms) > 1 else 100  # a critic that has won rests until the generator catches up
        return max((math.log10(f) for norms in self.norms.values() for f in _leaps(norms, rests)), default=0.0)

    def settled(self) -> bool:
        """Whether the loss has come down since the start."""
        finite = [loss for loss in self.losses if math.isfinite(loss)]
        if len(finite) < 40:
            return True
        start, end = np.mean(finite[:20]), np.mean(finite[-20:])
        error = 2 * math.hypot(np.std(finite[:20]), np.std(finite[-20:])) / math.sqrt(20)
        return bool(start - end + error >= 0.05 * abs(start))

    def fall(self) -> float:
        """By which share of its start the loss has fallen."""
        some = max(3, len(self.losses) // 20)
        start, end = np.mean(self.losses[:some]), np.mean(self.losses[-some:])
        return float((start - end) / abs(start))

    def sizes(self, layer_share: float = 0.5) -> dict[int, float]:
        """For every measured step what the updates of this share of the layers exceed."""
        return {
            step: sorted(ratios.values(), reverse=True)[max(0, math.ceil(layer_share * len(ratios)) - 1)]
            for step, ratios in self.updates.items()
            if ratios and np.isfinite(list(ratios.values())).all()
        }

    def stalled(self, rate: float | None = None) -> set[str]:
        """Layers that hardly change at three measured steps or more, while others do, or while none ever has."""
        counts: dict[str, int] = {}
        greatest = max((max(ratios.values()) for ratios in self.updates.values() if ratios), default=math.inf)
        for ratios in self.updates.values():
            top = max(ratios.values(), default=0.0)
            for name, value in ratios.items():
                counts[name] = counts.get(name, 0) + bool(value < 1e-6 and (top > 1e-4 or greatest < 1e-6))
        slow = {name for name, count in counts.items() if count >= 3}
        return {n for n in slow if not 0 < self.rates[n] <= max(self.rates.values()) / 10}  # on purpose

    def drift(self, sign: int) -> float:
        """The least doublings (halvings) in two successive windows of 20 steps of the layer that drifts most.

        Growth up to the size of the other layers is healthy, and so is a number that passes through zero.
        """
        steps = [step for step in sorted(self.weights) if step >= 2][::2]
        best = 0.0
        for now, next_, last in zip(steps, steps[1:], steps[2:], strict=False):
            usual = np.median([size for size, _ in self.weights[last].values()])
            for name, (c, numel) in self.weights[last].items():
                a, b = self.weights[now][name][0], self.weights[next_][name][0]
                if numel < 8 or not (0 < a < math.inf and 0 < b < math.inf and 0 < c < math.inf):
                    continue
                greatest = max(self.weights[step][name][0] for step in steps if step <= now)
                if (c >= usual) if sign > 0 else (c < 0.1 * greatest):
                    best = max(best, min(sign * math.log2(b / a), sign * math.log2(c / b)))
        return best

    def high_losses(self) -> int:
        """The greatest number of losses, of five in a row, that are far above what was usual."""
        high = []
        for i, loss in enumerate(self.losses[20:], 20):
            recent = np.array(self.losses[max(0, i - 100) : i])
            usual = np.median(recent)
            sigma = 1.4826 * np.median(np.abs(recent - usual))
            fall = 0.1 * (max(self.losses[:20]) - recent.min())
            high.append(bool(loss - usual > max(10 * sigma, abs(usual), fall)))
        return max((sum(high[i : i + 5]) for i in range(len(high))), default=0)


def _array(tensor: Tensor) -> np.ndarray:
    dense = tensor.detach().to_dense() if tensor.layout is not torch.strided else tensor.detach()
    return dense.double().numpy().copy()


def _parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Every parameter with its layer; what a parametrization is made of belongs to its owner."""
    for name, parameter in module.named_parameters():
        yield re.sub(r"\.parametrizations\.\w+$", "", name.rpartition(".")[0]), parameter


def _weights(module: nn.Module) -> dict[str, np.ndarray]:
    """Every layer's parameters in one row."""
    parts: dict[str, list[np.ndarray]] = {}
    for layer, parameter in _parameters(module):
        parts.setdefault(layer, []).append(_array(parameter).ravel())
    return {name: np.concatenate(rows) for name, rows in parts.items()}


def _leaps(norms: list[float], rests: float) -> Iterator[float]:
    """Each norm over the median of those before it, where that is not tiny beside the first ones."""
    for i, norm in enumerate(norms):
        before = [n for n in norms[max(0, i - 100) : i] if math.isfinite(n)]
        early = [n for n in norms[:20] if math.isfinite(n)]
        usual = max(np.median(before), np.median(early) / rests) if len(before) >= 5 else 0.0
        if usual > 0 and 0 < norm < math.inf:
            yield norm / usual


def _third(values: list[float]) -> float:
    """The third greatest: one or two steps alone prove nothing."""
    return sorted(values, reverse=True)[2] if len(values) > 2 else 0.0


def _listed(pl_module: nn.Module) -> Iterator[Tensor]:
    """The parameters of layers that stand in plain lists and dicts."""
    for module in pl_module.modules():
        for value in vars(module).values():
            parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
            for part in parts:
                if isinstance(part, nn.Module) and all(part is not known for known in pl_module.modules()):
                    yield from part.parameters()


def _exploding(twin: Twin) -> float:
    """Over depth, in time, or since nobody clears the gradients: a third of every one is that of the step before."""
    kept = sorted(twin.carried)[len(twin.carried) // 10 :]
    return max(*twin.decades(forward=False), twin.leap(), 3.0 if kept and kept[0] > 0.1 else 0.0, 0.0)


def _vanishing(twin: Twin) -> float:
    over_depth = _third([-decades for decades in twin.decades(forward=False)])
    norms = twin.norms.get(0, [])
    early, late = [np.median(part) if part else 1.0 for part in (norms[:20], norms[-20:])]
    fallen = len(norms) >= 40 and 0 < late < early / 1e3 and not twin.settled()
    if len(twin.norms) > 1:  # each has a loss of its own, which has not come down
        fallen = any(
            _has_died(norms) and np.median(twin.given[number][-20:]) >= np.median(twin.given[number][:20])
            for number, norms in twin.norms.items()
        )
    falls = sorted(twin.swallowed(), reverse=True)[1:2]  # the layer may recover: twice is enough
    return max(over_depth, *falls, 3.0 if fallen else 0.0)


def _has_died(norms: list[float]) -> bool:
    """Whether norms are a thousandth of the largest of the first ones."""
    return len(norms) >= 40 and 0 < np.median(norms[-20:]) < max(norms[:20]) / 1e3


def _oversized(twin: Twin) -> float:
    sizes = twin.sizes()
    if not sizes:
        return 0.0
    later = sorted((size for step, size in sizes.items() if step > 0), reverse=True)
    return max(*sizes.values(), later[1] / 0.1 if len(later) > 1 else 0.0)


# condition -> its number, the greatest of the healthy, the least of the sick
SIGNS: dict[str, tuple[Callable[[Twin], float], float, float]] = {
    "vanishing_gradients": (_vanishing, 2.2, 3.0),
    "exploding_gradients": (_exploding, 2.2, 3.0),
    "vanishing_activations": (lambda t: _third([-d for d in t.decades(forward=True)]), 2.2, 3.0),
    "exploding_activations": (lambda t: max(t.decades(forward=True), default=0.0), 2.2, 3.0),
    "non_finite": (lambda t: len(t.bad) + sum(not math.isfinite(loss) for loss in t.losses), 0, 1),
    "dead_units": (lambda t: t.share(rectifiers=True), 0.4, 0.5),
    "saturated_units": (lambda t: t.share(rectifiers=False), 0.4, 0.5),
    "oversized_updates": (_oversized, 0.7, 1.0),
    "stalled_layers": (lambda t: len(t.stalled()), 0, 1),
    "growing_weights": (lambda t: t.drift(1), 0.8, 1.0),
    "collapsing_weights": (lambda t: t.drift(-1), 0.8, 1.0),
    "loss_spike": (lambda t: t.high_losses(), 2, 3),
    "stalled_loss": (lambda t: len(t.losses) >= 100 and not t.settled(), 0, 1),
    "not_in_optimizer": (lambda t: sum(t.orphans), 0, 1),
    "squashed_logits": (lambda t: len(t.bounded) > 0 and all(t.bounded), 0, 1),
    "no_gradient": (lambda t: len(t.silent) if sum(map(len, t.norms.values())) > 20 else 0, 0, 1),
}


@functools.cache
def watched(name: str, seed: int = 0) -> Twin:
    """A training of the catalogue as the twin has seen it."""
    twin = Twin(CATALOGUE[name])
    fit(CATALOGUE[name], seed, twin)
    return twin


def doubts(case: Scenario, twin: Twin) -> list[str]:
    """What of a label the twin's numbers do not bear out."""
    signs = {name: float(number(twin)) for name, (number, _, _) in SIGNS.items()}
    sick = {name for name, value in signs.items() if value >= SIGNS[name][2]}
    found = [
        f"{' or '.join(wanted.conditions)} is not there: {signs[wanted.chief]:.3g}"
        for wanted in case.must
        if not sick & set(wanted.conditions)
    ]
    for wanted in case.must:  # and they are where and when the label says
        exact = "non_finite" in wanted.conditions and wanted.by is not None and twin.bad
        if exact and not wanted.since <= twin.bad[0] <= wanted.by:
            found.append(f"non_finite begins at step {twin.bad[0]}")
        for name in sorted({"dead_units", "saturated_units"} & set(wanted.conditions)):
            layers = {layer for layer, share in twin.shares(name == "dead_units").items() if share >= SIGNS[name][2]}
            if wanted.named and wanted.named not in layers:
                found.append(f"{name} is not in {wanted.named}")
            elsewhere = [layer for layer in layers if wanted.layers and not re.fullmatch(wanted.layers, layer)]
            found += [f"{name} is in {layer}, too" for layer in elsewhere]
    clear = case.must_not - ({"stalled_loss"} if not case.must else set())  # alone it may be noise: an info
    found += [f"{name} is there: {signs[name]:.3g}" for name in sorted(clear) if signs[name] > SIGNS[name][1]]
    if not case.must and case.falls is not None and not twin.fall() >= case.falls:
        found.append(f"it does not learn: the loss falls by {twin.fall():.2g} of its start")
    if not case.must and case.falls is None and len(case.must_not) < len(SIGNS):
        found.append("a healthy training has nothing to allow")
    return found
