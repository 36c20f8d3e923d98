"""The cures of the field, by what a network is made of and what its run has shown: words, and code that runs.

The names that code may use are those of `Finding.code`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from lightning_gradhealth.records import LayerStats, StepRecord
from lightning_gradhealth.rules.course import Updates, rounded

INIT = "gh.init_weights(model, batch)"
CLIP = "Trainer(gradient_clip_val=1.0)"
BOUND = (
    "bound what goes into exp(), as log-variances by .clamp(-30, 20), and divisors from below; scale inputs and targets"
    " to mean 0 and variance 1"
)


class Remedy(NamedTuple):
    """What to do.

    Attributes:
        words: In words.
        code: In one line or two that run; "" where it takes an edit of the model, the loss or the data.
    """

    words: str
    code: str = ""


@dataclass(frozen=True)
class Makeup:
    """What a network is made of, as far as it decides what helps.

    Attributes:
        kinds: The kinds of its modules, see `StepRecord.kinds`.
        main: The kind of most of the layers concerned.
        activation: What most of them go into; "" where none is known.
        residual: Signals are added up on its main chain.

    Example:
        >>> Makeup(kinds=("conv2d", "relu"), main="conv2d").norm
        'nn.BatchNorm2d'
    """

    kinds: tuple[str, ...] = ()
    main: str = ""
    activation: str = ""
    residual: bool = False

    @classmethod
    def of(cls, record: StepRecord, layers: Collection[str] = ()) -> Makeup:
        """What a record tells.

        Args:
            record: The record.
            layers: The layers concerned; empty: all.
        """
        concerned = [layer for layer in record.layers if not layers or layer.name in layers]
        kinds = Counter(layer.kind for layer in concerned if layer.kind not in ("", "norm"))
        points = (point.name for chain in record.chains for point in chain.points)
        return cls(
            kinds=record.kinds,
            main=next((kind for kind, _ in kinds.most_common(1)), ""),
            activation=chief(layer.activation for layer in record.layers),
            residual=any(name.endswith(" (input)") for name in points),  # what a module reads behind a merge
        )

    @property
    def norm(self) -> str:
        """The normalisation layer that fits the layers concerned best."""
        if self.main in ("recurrent", "attention", "embedding"):
            return "nn.LayerNorm"
        return f"nn.BatchNorm{self.main[-2]}d" if self.main.startswith("conv") else "nn.BatchNorm1d"


def chief(activations: Iterable[str]) -> str:
    """The activation that most layers go into; "" where none is known.

    Example:
        >>> chief(["relu", "", "relu", "tanh"])
        'relu'
    """
    known = Counter({"relu6": "relu"}.get(name, name) for name in activations if name and name != "attention")
    return known.most_common(1)[0][0] if known else ""


def swapped(old: str, new: str) -> str:
    """Code that puts one activation in the place of another, where it is a module.

    Args:
        old: The class of the module to replace.
        new: What makes the new one.
    """
    return (
        f"for name in [n for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, {old})]:"
        f" model.set_submodule(name, {new})"
    )


def in_groups(change: str) -> str:
    """Code that changes every parameter group of the optimizer.

    Args:
        change: As 'group["lr"] *= 0.1'.
    """
    return f"for group in optimizer.param_groups: {change}"


def at_rate(operation: str, number: float, *, scheduled: bool) -> str:
    """Code that gives every parameter group another learning rate; at each step, where a schedule sets it.

    Args:
        operation: What is done with it, as "*" or "or".
        number: And with what.
        scheduled: A schedule would write over what is set once.

    Example:
        >>> at_rate("*", 0.1, scheduled=False)
        'for group in optimizer.param_groups: group["lr"] *= 0.1'
    """
    value = f'group["lr"] {operation} {number:g}'
    if not scheduled:
        return in_groups(f'group["lr"] *= {number:g}' if operation == "*" else f'group["lr"] = {value}')
    pre, post = f'group.update(set=group["lr"], lr={value})', 'group.update(lr=group.pop("set"))'
    return "\n".join(
        f"optimizer.register_step_{when}_hook(lambda o, *_: [{change} for group in o.param_groups] and None)"
        for when, change in (("pre", pre), ("post", post))
    )


# --- the rate ----------------------------------------------------------------------------------------------


def for_rate(updates: Updates | None, more: str = "") -> Remedy:
    """What to do where the learning rate is too high, by how far the steps have moved the weights.

    Args:
        updates: How far; None: not known.
        more: What to do besides.

    Example:
        >>> for_rate(Updates(0.1, 0.1, 107.6, 2, 0.1)).words.partition(":")[0]
        'a smaller learning rate (x 0.01) and a warm-up of it'
        >>> for_rate(None).code
        'for group in optimizer.param_groups: group["lr"] *= 0.1'
    """
    scheduled = updates is not None and updates.scheduled
    by_schedule = "; the schedule sets it: multiply what that is given (max_lr of OneCycleLR)" if scheduled else ""
    if updates is None or not updates.fast:
        code = at_rate("*", 0.1, scheduled=scheduled)
        return Remedy(f"a smaller learning rate (a tenth) and a warm-up of it{by_schedule}{more}", code)
    start = f"{updates.first:.2g} of their size"
    whose = "" if updates.optimizer is None else f" of optimizer {updates.optimizer}"
    if updates.unscaled:
        more = (
            f"; such a step at such a rate comes of a huge loss: bring inputs and targets to mean 0, variance 1{more}"
        )
    if updates.largest > 1.5 * updates.first:
        start += f" at first and by {updates.largest:.2g} at step {updates.at}"
    return Remedy(
        f"a smaller learning rate{whose} (x {updates.factor:g}) and a warm-up of it: a step moved the weights by"
        f" {start}, where near 1e-3 is usual{by_schedule}{more}",
        at_rate("*", updates.factor, scheduled=scheduled),
    )


def for_decay(
    record: StepRecord, layers: Collection[str], updates: Updates | None = None, *, shrunk: bool = False
) -> Remedy | None:
    """What to do about weights that decay takes away; None where it takes no more than a thousandth at a step.

    Args:
        record: The record.
        layers: The layers that shrink.
        updates: How far the steps move the weights, if decay has to be the larger part of it to be to blame.
        shrunk: These layers have lost more than half of their size already.
    """
    momenta = {stats.optimizer: stats.momentum or 0.0 for stats in record.optimizers if stats.name == "SGD"}
    worst: tuple[float, float, float] | None = None
    for layer in record.layers:
        if layer.name in layers and layer.weight_decay and layer.learning_rate:
            share = layer.learning_rate / max(1e-3, 1.0 - momenta.get(layer.optimizer or 0, 0.0))
            if worst is None or share * layer.weight_decay > worst[0]:
                worst = share * layer.weight_decay, layer.weight_decay, 5e-5 / share
    least = 1e-3 if updates is None or shrunk else max(1e-3, updates.share / 2)
    if worst is not None and worst[0] < least and shrunk and _divides(record, layers):
        return Remedy(
            f"weight_decay={worst[1] / 100:g} in place of {worst[1]:g}, which has taken more than half of the weights:"
            " Adam and its like divide it by the size of the gradients, too, where AdamW does not",
            in_groups(f'group["weight_decay"] = min(group["weight_decay"], {worst[1] / 100:g})'),
        )
    if worst is None or worst[0] < least:
        return None
    share, decay, better = worst[0], worst[1], rounded(worst[2])
    return Remedy(
        f"weight_decay={better:g} in place of {decay:g}, which takes {share:.2g} of every weight at each step (rate x"
        " decay, over 1 - momentum)",
        in_groups(f'group["weight_decay"] = min(group["weight_decay"], {better:g})'),
    )


def _divides(record: StepRecord, layers: Collection[str]) -> bool:
    """Whether some layers are stepped by an optimizer that divides the decay by the size of the gradients."""
    numbers = {layer.optimizer for layer in record.layers if layer.name in layers}
    coupled = ("Adam", "Adamax", "NAdam", "RAdam", "RMSprop", "Adagrad", "Adadelta")
    return any(each.name in coupled for each in record.optimizers if each.optimizer in numbers)


# --- over depth --------------------------------------------------------------------------------------------

_INIT = {
    "relu": f'{INIT} (scheme="he" gives ReLU the gain sqrt(2) that keeps the signal)',
    "tanh": f'{INIT} gives tanh its gain (scheme="xavier", nonlinearity="tanh" without a sample)',
    "sigmoid": (
        f"nn.ReLU() in place of nn.Sigmoid(), whose derivative is at most 1/4, and then {INIT}; to keep it,"
        " gh.init_weights(model, batch, gamma=3)"
    ),
    "": f"{INIT} finds the gain of every layer",
}


def for_depth(vanishing: bool, makeup: Makeup) -> Remedy:
    """What to do where a signal vanishes or explodes over depth from the start.

    Args:
        vanishing: It vanishes.
        makeup: What the network is made of.

    Example:
        >>> for_depth(True, Makeup(activation="sigmoid")).words[:31]
        'nn.ReLU() in place of nn.Sigmoi'
    """
    kind = makeup.activation
    others = []
    if "norm" not in makeup.kinds:
        # LayerNorm before a sigmoid still loses most of what tells one sample from another at every layer
        plain = makeup.norm == "nn.BatchNorm1d" and kind != "sigmoid"
        others.append(f"a normalisation between the layers ({makeup.norm}{', nn.LayerNorm' if plain else ''})")
    if not makeup.residual:
        others.append("residual connections x + f(x)")
    words = "; else ".join([_INIT.get(kind, _INIT[""]), *([" or ".join(others)] if others else [])])
    code = INIT
    if kind == "sigmoid":
        code = (
            f"{swapped('nn.Sigmoid', 'nn.ReLU()')}\n{INIT}" if "sigmoid" in makeup.kinds else f"{INIT[:-1]}, gamma=3)"
        )
    return Remedy(words if vanishing else f"{words}; {CLIP} meanwhile", code)


def for_depth_in_training(
    updates: Updates | None, decay: Remedy | None, before: float | None, *, weak: bool = False
) -> Remedy:
    """What to do where a signal was sound at first, and vanishes or explodes by what training has done.

    Args:
        updates: How far steps have moved the weights.
        decay: What to do about weight decay, if it takes too much.
        before: What the signal was at the start: the far end over the near one.
        weak: It was none too good then.

    Example:
        >>> for_depth_in_training(None, None, 0.8).words[:55]
        'it was sound at the start (0.8) and came with training:'
    """
    start = "it was weak at the start" if weak else "it was sound at the start"
    start += (f" ({before:.2g})" if before is not None else "") + " and came with training"
    if decay is not None:
        return Remedy(f"{start}: {decay.words}", decay.code)
    more = "" if updates is not None and updates.clipped else f"; {CLIP}"
    rate = for_rate(updates, f"{more}; then {INIT}" if weak else more)
    # where steps are small, something else has happened that no rate undoes
    return Remedy(f"{start}: {rate.words}", rate.code if updates is None or updates.fast else "")


# --- units -------------------------------------------------------------------------------------------------


def for_dead(
    layers: Iterable[LayerStats], makeup: Makeup, updates: Updates | None, decay: Remedy | None = None, *, died: bool
) -> Remedy:
    """What to do about units that are never active.

    Args:
        layers: The layers concerned, the worst first.
        makeup: What the network is made of.
        updates: How far steps have moved the weights.
        decay: What to do about weight decay, if it takes too much.
        died: They were alive before, or a step has replaced the weights.

    Example:
        >>> layer = LayerStats("0", forward_mean=-9.9, forward_rms=10.0, bias_grad_rms=0.0)
        >>> for_dead([layer], Makeup(), None, died=False).words[:44]
        'its output is negative all over (mean -9.9):'
    """
    layers = list(layers)
    leaky = "nn.LeakyReLU(0.01) or nn.ELU() in place of nn.ReLU() lets dead units recover"
    swap = swapped("nn.ReLU", "nn.LeakyReLU(0.01)") if "relu" in makeup.kinds else ""
    if died and decay is not None:
        return decay
    if died and (updates is None or updates.fast):
        return for_rate(updates, f", which keeps them alive; {leaky}")
    if died:
        return Remedy(f"{leaky}; a smaller learning rate or a warm-up of it keeps them alive", swap)
    shifted = [layer for layer in layers if _shifted(layer)]
    if shifted:
        return Remedy(
            f"its output is negative all over (mean {shifted[0].forward_mean:.2g}): set its bias to 0; {leaky}",
            zeroed(shifted) or swap,
        )
    return Remedy(
        f"{leaky}; {INIT}, as they were dead from the start; a smaller learning rate or a warm-up of it",
        swap or INIT,
    )


def _shifted(layer: LayerStats) -> bool:
    """Whether a layer's output lies on one side of zero, nearly all of it."""
    mean, rms = layer.forward_mean, layer.forward_rms
    return mean is not None and rms is not None and abs(mean) > 0.9 * rms and rms > 0.0


def zeroed(layers: Iterable[LayerStats]) -> str:
    """Code that sets the biases of layers to zero; "" where none has one."""
    names = [layer.name for layer in layers if layer.bias_grad_rms is not None]
    return f"for name in {names!r}: nn.init.zeros_(model.get_submodule(name).bias)" if names else ""


# a layer of torch's default weights makes a third of the mean square of it: there, tanh and sigmoid are flat
LARGE_INPUT = 5.0


def for_large_inputs(layer: str, size: float) -> Remedy:
    """What to do about inputs that nobody has scaled.

    Args:
        layer: The layer that reads them; "" where it is not known.
        size: Their root mean square.

    Example:
        >>> for_large_inputs("0", 141.0).words[:36]
        'the network reads inputs of size 141'
    """
    factor = rounded(size)
    return Remedy(
        f"the network reads inputs of size {size:.3g} (root mean square): normalise the inputs to mean 0 and variance"
        " 1, (x - mean) / std, by the figures of the training set (of pixels: divided by 255 at least), and targets of"
        " such a size too; or nn.BatchNorm1d as the first layer",
        f"model.get_submodule({layer!r}).register_forward_pre_hook(lambda m, args: (args[0] / {factor:g}, *args[1:]))"
        if layer
        else "",
    )


def for_saturated(layers: Iterable[LayerStats], makeup: Makeup, updates: Updates | None, *, came: bool) -> Remedy:
    """What to do about units that are stuck where their activation is flat.

    Args:
        layers: The layers concerned, the worst first.
        makeup: What the network is made of.
        updates: How far steps have moved the weights.
        came: They were sound before, or a step has replaced the weights.

    Example:
        >>> for_saturated([LayerStats("q", activation="attention")], Makeup(), None, came=False).words[:38]
        'normalise queries and keys (nn.RMSNorm'
    """
    layers = list(layers)
    kind = layers[0].activation if layers else ""
    if came:
        more = "; normalise queries and keys (nn.RMSNorm(head_dim) on q and k)" if kind == "attention" else ""
        return for_rate(updates, more)
    if kind == "attention":
        return Remedy(
            "normalise queries and keys (nn.RMSNorm(head_dim) on q and k), scale scores by 1/sqrt(head_dim), smaller"
            f" weights of q and k ({INIT}), a smaller learning rate or a longer warm-up",
            INIT,
        )
    swap = {"sigmoid": "nn.ReLU()", "tanh": "nn.ReLU() or nn.GELU()"}.get(kind, "nn.ReLU()")
    norm = "" if "norm" in makeup.kinds else f"{makeup.norm} before the {kind}; "
    shifted = [layer for layer in layers if _shifted(layer)]
    code = zeroed(shifted)
    start = (
        f"its output lies on one side of 0 (mean {shifted[0].forward_mean:.2g}): set its bias to 0; " if code else ""
    )
    return Remedy(
        f"{start}smaller weights before it: {INIT}; {norm}{swap} in its place; inputs scaled to mean 0 and variance 1",
        code or INIT,
    )


# --- through time ------------------------------------------------------------------------------------------


def for_time(vanishing: bool) -> Remedy:
    """What to do about gradients that vanish or explode through time.

    Args:
        vanishing: They vanish.

    Example:
        >>> for_time(False).words[:20]
        'GradHealth(clip="ada'
    """
    if vanishing:
        return Remedy(
            "nothing if the task needs no longer memory; else nn.LSTM or nn.GRU in place of nn.RNN,"
            f" {INIT} (orthogonal recurrent weights, forget bias 1), or attention over the steps",
            INIT,
        )
    return Remedy(
        f'GradHealth(clip="adaptive") or {CLIP}; {INIT} for orthogonal recurrent weights; a smaller learning rate',
        INIT,
    )
