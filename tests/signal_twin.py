"""The slow twin of the signal probe: plain hooks that keep everything, and sums that are spelt out in Python."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_gradhealth.signals import SignalProbe, Signals

SAMPLES = 256
FLAT = 0.05

# whether an element passes any gradient, or its slope over the greatest there is, from what goes in
RECTIFIERS: dict[str, Callable[[float], bool]] = {
    "relu": lambda x: x > 0,
    "relu6": lambda x: 0 < x < 6,
    "threshold": lambda x: x > 0.1,
    "unit clamp": lambda x: 0 < x < 1,
}
SATURATING: dict[str, Callable[[float], float]] = {
    "sigmoid": lambda x: 4 * _sigmoid(x) * (1 - _sigmoid(x)),
    "tanh": lambda x: 1 - math.tanh(x) ** 2,
    "hardtanh": lambda x: float(abs(x) < 1),
    "hardsigmoid": lambda x: float(abs(x) < 3),
    "softsign": lambda x: 1 / (1 + abs(x)) ** 2,
}


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


def bad_share(kind: str, samples: np.ndarray) -> float:
    """The share of units, unit by unit, that are dead or saturated; `samples`: shape (samples, units)."""
    bad = 0
    for unit in samples.T.tolist():
        if kind in RECTIFIERS:
            bad += not any(RECTIFIERS[kind](x) for x in unit)
        else:
            bad += math.fsum(SATURATING[kind](x) for x in unit) / len(unit) < FLAT
    return bad / samples.shape[1]


def by_unit(values: np.ndarray, axis: int) -> np.ndarray:
    """Shape (samples, units)."""
    moved = np.moveaxis(values, axis, -1)
    return moved.reshape(-1, moved.shape[-1])


def rms(arrays: list[np.ndarray]) -> float | None:
    """Root mean square over the elements of several arrays; None where there is none."""
    flat = [x for array in arrays for x in array.ravel().tolist()]
    return math.sqrt(math.fsum(x * x for x in flat) / len(flat)) if flat else None


def mean(arrays: list[np.ndarray]) -> float | None:
    flat = [x for array in arrays for x in array.ravel().tolist()]
    return math.fsum(flat) / len(flat) if flat else None


def array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().to(torch.float64, copy=True).numpy()


class Twin:
    """What the modules that own parameters put out, and the gradients that came back, by name and in order.

    Attributes:
        outputs: Values of every call.
        gradients: Gradients of every call to which one came back.
    """

    def __init__(self, model: nn.Module, also: tuple[type[nn.Module], ...] = ()) -> None:
        self.outputs: dict[str, list[np.ndarray]] = {}
        self.gradients: dict[str, list[np.ndarray]] = {}
        self.on = True
        self._handles = []
        for name, module in model.named_modules():
            own = bool(module._parameters) or hasattr(module, "parametrizations") or isinstance(module, also)
            if own and "parametrizations." not in f"{name}.":
                keep = functools.partial(self._keep, name or type(model).__name__)
                self._handles.append(module.register_forward_hook(keep))

    def _keep(self, name: str, module: nn.Module, given: Any, output: Any) -> None:
        if not self.on or torch._C._current_graph_task_id() != -1:  # checkpointing runs it again
            return
        output = first(output)
        self.outputs.setdefault(name, []).append(array(output))
        if output.requires_grad:
            kept = self.gradients.setdefault(name, [])
            output.register_hook(lambda gradient: kept.append(array(gradient)))

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()


def first(output: Any) -> Tensor:
    """The first floating tensor."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, dict):
        output = list(output.values())
    elif hasattr(output, "__dataclass_fields__"):
        output = list(vars(output).values())
    parts = [part for part in output if not isinstance(part, (int, str))]
    return next(first(part) for part in parts if not isinstance(part, Tensor) or part.is_floating_point())


def assert_alike(signals: Signals, twin: Twin, tolerance: float = 1e-6) -> None:
    """The probe says of every module what the twin says."""
    seen = {site.name: number for number, site in enumerate(signals.spec.sites) if site.name == site.owner}
    assert set(seen) == set(twin.outputs)
    for name, number in seen.items():
        outputs, scale = twin.outputs[name], rms(twin.outputs[name])
        assert signals.forward_rms[number] == approx(scale, tolerance), name
        assert signals.forward_mean[number] == approx(mean(outputs), tolerance, scale), name
        assert signals.backward_rms[number] == approx(rms(twin.gradients.get(name, [])), tolerance), name


def approx(value: float | None, tolerance: float, scale: float | None = None) -> Any:
    import pytest

    return value if value is None else pytest.approx(value, rel=tolerance, abs=tolerance * (scale or 0.0), nan_ok=True)


@contextmanager
def opened(model: nn.Module, **options: Any) -> Iterator[SignalProbe]:
    """A probe with its hooks on for the length of a block; nothing may have failed in it."""
    probe = SignalProbe(model, **options)
    probe.open()
    try:
        yield probe
    finally:
        probe.pause()
    assert not probe.failure


def read(probe: SignalProbe, **options: Any) -> Signals:
    """What the probe has measured since the last time."""
    reading = probe.close(**options)
    assert not probe.failure
    assert reading is not None
    return reading.read(*(vector.tolist() for vector in reading.vectors()))


def units(signals: Signals) -> dict[str, float | None]:
    """By site, kind and number: the share of bad units."""
    return {unit.name: share for unit, share in zip(signals.spec.activations, signals.bad_units, strict=True)}


def chain(signals: Signals) -> list[str]:
    """The names of the points of the main chain."""
    return [signals.spec.sites[number].name for number in signals.spec.chain]
