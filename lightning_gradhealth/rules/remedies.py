"""The cures of the field, by what a network is made of: code that can be pasted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

_INIT = {
    "relu": 'gh.init_weights(model, x, scheme="he") gives ReLU the gain sqrt(2) that keeps the signal',
    "tanh": 'gh.init_weights(model, x) gives tanh its gain (scheme="xavier", nonlinearity="tanh" without a sample)',
    "sigmoid": (
        "nn.ReLU() in place of nn.Sigmoid(), whose derivative is at most 1/4, and then gh.init_weights(model, x); to"
        " keep it, gh.init_weights(model, x, gamma=3)"
    ),
    "": "gh.init_weights(model, x) finds the gain of every layer",
}
_OTHERS = "a normalisation between the layers (nn.BatchNorm1d, nn.LayerNorm), or residual connections x + f(x)"
# LayerNorm before a sigmoid still loses most of what tells one sample from another at every layer
_OTHERS_OF = {"sigmoid": "nn.BatchNorm1d between the layers, or residual connections x + f(x)"}


def chief(activations: Iterable[str]) -> str:
    """The activation that most layers go into; "" where none is known.

    Example:
        >>> chief(["relu", "", "relu", "tanh"])
        'relu'
    """
    known = Counter({"relu6": "relu"}.get(name, name) for name in activations if name and name != "attention")
    return known.most_common(1)[0][0] if known else ""


def for_depth(vanishing: bool, activations: Iterable[str]) -> str:
    """What to do where a signal vanishes or explodes over depth.

    Args:
        vanishing: It vanishes.
        activations: What the layers go into.

    Example:
        >>> for_depth(True, ["sigmoid"] * 9)[:31]
        'nn.ReLU() in place of nn.Sigmoi'
    """
    kind = chief(activations)
    cure = f"{_INIT.get(kind, _INIT[''])}; else {_OTHERS_OF.get(kind, _OTHERS)}"
    if vanishing:
        return cure
    return (
        f"if it was there from the start: {cure}; if it came with training: a smaller learning rate or a warm-up of it,"
        ' Trainer(gradient_clip_val=1.0) or GradHealth(clip="adaptive")'
    )


def for_dead(mean: float | None, rms: float | None) -> str:
    """What to do about units that are never active.

    Args:
        mean: Mean of what the layer gives to the activation.
        rms: Its root mean square.

    Example:
        >>> for_dead(-9.9, 10.0)[:44]
        'its output is negative all over (mean -9.9):'
    """
    shifted = mean is not None and rms is not None and mean < -0.9 * rms
    start = f"its output is negative all over (mean {mean:.2g}): set its bias to 0; " if shifted else ""
    return (
        f"{start}nn.LeakyReLU(0.01) or nn.ELU() in place of nn.ReLU() lets dead units recover; a smaller learning rate"
        " or a warm-up of it keeps them alive; gh.init_weights(model, x) if they were dead from the start"
    )


def for_saturated(kind: str) -> str:
    """What to do about units that are stuck where their activation is flat.

    Args:
        kind: The activation.

    Example:
        >>> for_saturated("attention")[:38]
        'normalise queries and keys (nn.RMSNorm'
    """
    if kind == "attention":
        return (
            "normalise queries and keys (nn.RMSNorm(head_dim) on q and k), scale scores by 1/sqrt(head_dim), smaller"
            " weights of q and k (gh.init_weights(model, x)), a smaller learning rate or a longer warm-up"
        )
    swap = {"sigmoid": "nn.ReLU()", "tanh": "nn.ReLU() or nn.GELU()"}.get(kind, "nn.ReLU()")
    return (
        f"smaller weights before it: gh.init_weights(model, x); nn.BatchNorm1d before the {kind}; {swap} in its place;"
        " inputs scaled to mean 0 and variance 1"
    )


def for_time(vanishing: bool) -> str:
    """What to do about gradients that vanish or explode through time.

    Args:
        vanishing: They vanish.

    Example:
        >>> for_time(False)[:20]
        'GradHealth(clip="ada'
    """
    if vanishing:
        return (
            "nothing if the task needs no longer memory; else nn.LSTM or nn.GRU in place of nn.RNN,"
            " gh.init_weights(model, x) (orthogonal recurrent weights, forget bias 1), or attention over the steps"
        )
    return (
        'GradHealth(clip="adaptive") or Trainer(gradient_clip_val=1.0); gh.init_weights(model, x) for orthogonal'
        " recurrent weights; a smaller learning rate"
    )
