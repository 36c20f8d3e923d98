"""What a recorded forward pass, or the order of the modules, says about the parameters of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from lightning_gradhealth.records import DepthPoint

Forecast = Callable[[Mapping[int, float], Mapping[int, str]], tuple[tuple[DepthPoint, ...], tuple[str, ...]]]


@dataclass(frozen=True)
class Advice:
    """What is known of one parameter.

    Attributes:
        role: "weight" (multiplied with activations and summed), "lookup" (rows are read by index), "bias" (added to
            what a weight gives), "phase" (a bias before a periodic activation: uniform within `gain`), "state" (used
            otherwise: a scale, a gate, a table of positions), "unused" (not met in the forward pass), "unknown" (met in
            an operator of which nobody can tell what it does).
        fan_in: Terms an output sums, as the forward pass used the weight; None: not traced.
        fan_out: Terms an input's gradient sums; None: not traced.
        scheme: The scheme that `scheme="auto"` takes: "he", "xavier", "lecun", "orthogonal" or
            "delta_orthogonal"; "" where nothing is known.
        gain: Its gain, without `size` and `factor`; None where nothing is known.
        size: What scheme "auto" multiplies the std by where the forward pass leaves the scale open.
        why_size: Why it does.
        factor: What `residual=` multiplies the std by: 1 outside residual branches, 0 sets the weight to zero.
        found: How the gain was found: "closed form", "quadrature", "replayed", "module order", "output",
            "edge of chaos", "given", "assumed".
        follows: What the signal passes on its way to the next weight, as "gelu 1.534".
        distribution: Of its numbers, where the rule names one that the call leaves open; "": the call's.
        meant: Whether the model shows that the scale is meant, so that other uses do not change it.
        keep: Why the parameter stays as it is whatever its role (the zero half of a low-rank pair); "": it does not.
        note: What else the report should say.
    """

    role: str
    fan_in: float | None = None
    fan_out: float | None = None
    scheme: str = ""
    gain: float | None = None
    size: float = 1.0
    why_size: str = ""
    factor: float = 1.0
    found: str = ""
    follows: str = ""
    distribution: str = ""
    meant: bool = False
    keep: str = ""
    note: str = ""


@dataclass(frozen=True)
class Advised:
    """All that is known before anything is drawn.

    Attributes:
        advice: By the identity of the parameter; of a parametrized weight, by that of each original.
        meant: What was set on purpose, by the identity of the parameter, with the reason.
        source: "trace (fake tensors)", "trace (real batch)", "trace (meta)", "trace (guessed 4×784)" (where there was
            no sample) or "module order".
        residual: What `residual="auto"` came to: "none", "depth", "zero_last" or "fixup".
        notes: Warnings about the model as a whole.
        forecast: The signal and its gradient at every weight, for given standard deviations of the weights by identity
            of the parameter and given names; with warnings. None without a trace.
    """

    advice: dict[int, Advice] = field(default_factory=dict)
    meant: Mapping[int, str] = field(default_factory=dict)
    source: str = "module order"
    residual: str = "none"
    notes: tuple[str, ...] = ()
    forecast: Forecast | None = None
