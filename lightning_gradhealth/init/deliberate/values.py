"""Values that no class gives and no rule draws: somebody has set them.

A fresh layer holds what its class writes (0, 1, random numbers of the layer's scale), and so does one that any of the
usual rules has drawn, or that was trained: no two elements are equal, none is 0, and the scale is that of a fan. What
is nothing of the kind was meant.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_gradhealth.init.fans import Fans, fans
from lightning_gradhealth.init.handlers import NORMS, WEIGHTED
from lightning_gradhealth.init.parametrized import originals
from lightning_gradhealth.sharding import is_sharded

# Below the least of all rules. Of 4,076 weights of 67 models in timm, torchvision, transformers and diffusers, and
# of the flows in nflows, none lies between 1/24 and 1/170: those above are the whole model's .02 in a layer of four
# inputs, those below gates that begin closed, ends of branches and heads that begin silent.
FAR = 1 / 32
# Of a layer that ends the model, where a small answer is wanted: heads drawn by N(0, .01) lie at .16 to .48 of 1 by the
# root of the largest fan, torch's default at .58 and above, trained or not.
FAR_AT_THE_END = 1 / 2
BEYOND = 1.005  # times torch's default range
SPARSE = 0.25  # of the elements
FEW = 8  # different values, of four times as many elements at least
SAME = 0.15  # by which standard deviations of one habit differ

_NORMS_OWN = {"weight": 1.0, "bias": 0.0}
_TABLES = (nn.Embedding, nn.EmbeddingBag)
_OWN = (nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)
_SHAPED = ("structure", "few")  # which are a purpose even where all weights have it


@dataclass(frozen=True)
class _Weight:
    """A weight: its fans, its root mean square, and what no draw gives.

    Attributes:
        parameter: It.
        fans: None: its scale tells nothing.
        rms: Its root mean square.
        mark: What it has that no draw gives.
        orthogonal: Whether its rows or its columns are orthogonal and of one length, whatever that is.
    """

    parameter: Tensor
    fans: Fans | None
    rms: float
    mark: str
    orthogonal: bool


def meant(
    model: nn.Module,
    known: Mapping[int, Fans | None] = MappingProxyType({}),
    biases: Mapping[int, float] = MappingProxyType({}),
    ends: Mapping[int, int | None] = MappingProxyType({}),
) -> dict[int, str]:
    """What a model's values say of themselves: which were set on purpose, and what shows it.

    A habit is no purpose: what more than half of the weights have in common, such as a scale or being orthogonal, is
    how the model is drawn. Where half of the weights hold one number only, they hold nothing yet.

    Args:
        model: The model; parameters on the meta device or sharded are passed over, as nobody can read them.
        known: Fans of further weights, by identity, as a forward pass has used them; None: one of several parameters
            that a weight is made of.
        biases: Fans in of further biases, by identity.
        ends: The weights behind which no other follows, by identity, each with the identity of its bias.

    Returns:
        The reason, by the identity of the parameter.

    Example:
        >>> net = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8))
        >>> _ = nn.init.zeros_(net[1].weight), nn.init.eye_(net[2].weight)
        >>> sorted(meant(net).values())
        ['0 on purpose, where its class gives 1', 'a structure on purpose: 88 % of it are exactly 0']
    """
    weights = list(_weights(model, known))
    drawn = [weight.mark for weight in weights if weight.fans is not None]
    if not drawn:
        return dict(_biases(model, biases))
    if 2 * sum(mark.startswith("=") for mark in drawn) > len(drawn):
        return {}
    found = dict(_norms(model))
    found.update(_biases(model, biases))
    marks = Counter(weight.mark for weight in weights)
    marks["orthogonal"] = sum(weight.orthogonal for weight in weights)
    small = 2 * sum(_share(weight) < FAR for weight in weights) > len(weights)  # all of them are: no mark of one
    for weight in weights:
        if weight.mark and (weight.mark in _SHAPED or 2 * marks[weight.mark] <= len(weights)):
            found[id(weight.parameter)] = _in_words(weight)
        elif not weight.mark and not small and _share(weight) < FAR:
            times = f"1/{1 / _share(weight):.0f}"
            found[id(weight.parameter)] = f"small on purpose: its std is {times} of the least that any rule gives"
    for weight in weights:
        key = id(weight.parameter)
        if key in ends and key not in found and (reason := _at_the_end(weight, weights, ends[key] in found)):
            found[key] = reason
    return found


def is_zero(tensor: Tensor) -> bool:
    """Whether a tensor holds numbers, and all of them are 0.

    Example:
        >>> import torch
        >>> is_zero(torch.zeros(2)), is_zero(torch.zeros(0))
        (True, False)
    """
    numbers = tensor.is_complex() and not tensor.is_meta and not is_sharded(tensor) and tensor.numel() > 0
    return (numbers or _is_readable(tensor)) and not bool(tensor.detach().any())


def scale_of(tensor: Tensor) -> float | None:
    """The root mean square of a tensor; None where nobody can read it.

    Example:
        >>> import torch
        >>> scale_of(torch.ones(2)), scale_of(torch.ones(2, device="meta"))
        (1.0, None)
    """
    return float(tensor.detach().double().square().mean().sqrt()) if _is_readable(tensor) else None


def _is_readable(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and not tensor.is_meta and not is_sharded(tensor) and tensor.numel() > 0


def _constant(tensor: Tensor) -> float | None:
    """The one number that a tensor holds; None for several."""
    first = tensor.detach().flatten()[0]
    return float(first) if bool((tensor.detach() == first).all()) else None


# --- norms and biases ---


def _norms(model: nn.Module) -> Iterator[tuple[int, str]]:
    for module in model.modules():
        if isinstance(module, NORMS):
            for name, own in _NORMS_OWN.items():
                parameter = module._parameters.get(name)
                if parameter is None or not _is_readable(parameter):
                    continue
                value = _constant(parameter)
                if value is not None and value != own and (value == 0 or parameter.numel() > 1):
                    yield id(parameter), f"{value:g} on purpose, where its class gives {own:g}"


def _biases(model: nn.Module, known: Mapping[int, float]) -> Iterator[tuple[int, str]]:
    """Biases that lie beyond torch's default range, 1 / sqrt(fan_in), all on one side of 0.

    As those of a gate that begins closed, of an output at its prior, of a state-space model's step.
    """
    open_ = {
        id(bias): (bias, fans(module).fan_in)
        for module in model.modules()
        if isinstance(module, WEIGHTED)
        and not parametrize.is_parametrized(module)
        and module.weight.dim() > 1
        and (bias := module._parameters.get("bias")) is not None
    }
    own = {id(parameter): parameter for parameter in model.parameters()}
    open_.update({key: (own[key], fan_in) for key, fan_in in known.items() if key in own})
    for key, (bias, fan_in) in open_.items():
        if not _is_readable(bias):
            continue
        if _is_beyond(bias, fan_in):
            yield key, "a bias set on purpose: every element lies beyond torch's default range"
    for module in model.modules():
        if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
            yield from _gates(module)


def _gates(module: nn.RNNBase | nn.RNNCellBase) -> Iterator[tuple[int, str]]:
    """Biases of gates that begin open or closed, but for one constant of forget gates, whose total has a rule."""
    long = isinstance(module, (nn.LSTM, nn.LSTMCell))
    for name, bias in module._parameters.items():
        if bias is None or not name.startswith("bias") or not _is_readable(bias) or len(bias) % module.hidden_size:
            continue
        for gate, values in enumerate(torch.split(bias.detach(), module.hidden_size)):
            usual = long and gate == 1 and _constant(values) is not None
            if _is_beyond(values, module.hidden_size) and not usual:
                yield id(bias), "gates set on purpose: all biases of one lie beyond torch's default range"
                break


def _is_beyond(bias: Tensor, fan_in: float) -> bool:
    values = bias.detach()
    beyond = bool((values.abs() * math.sqrt(fan_in) > BEYOND).all())
    return beyond and bool((values > 0).all() | (values < 0).all())


# --- weights ---


def _weights(model: nn.Module, known: Mapping[int, Fans | None]) -> Iterator[_Weight]:
    """The weights and tables of torch's own modules, and those that a forward pass has shown to be weights."""
    made: set[int] = {id(original) for original in originals(model)}
    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or id(parameter) in seen | made or not _is_readable(parameter):
                continue
            own, values = known.get(id(parameter)), parameter.detach()
            table = isinstance(module, _TABLES)
            weighted = isinstance(module, WEIGHTED) and name == "weight" and values.dim() > 1
            if not (table or weighted or id(parameter) in known or (isinstance(module, _OWN) and values.dim() > 1)):
                continue
            orthogonal = _is_orthogonal(values)
            if table:
                own, mark = Fans(1.0, float(parameter.shape[-1])), "=0" if is_zero(values) else ""
            else:
                own, mark = own or (fans(module) if weighted else None), _mark(values, orthogonal)
            seen.add(id(parameter))
            yield _Weight(parameter, own, scale_of(values) or 0.0, mark, orthogonal and mark in ("", "orthogonal"))


def _mark(values: Tensor, orthogonal: bool) -> str:
    """What a weight has that no draw gives; "" for nothing. Weights with one mark are alike."""
    value = _constant(values)
    if value is not None:
        return f"={value:g}" if values.numel() > 1 or value == 0 else ""
    if float((values == 0).float().mean()) >= SPARSE:
        return _stretched(values) or "structure"
    if values.numel() >= 4 * FEW and _count(values.flatten()[: 16 * FEW]) <= FEW >= _count(values):
        return "few"
    return "orthogonal" if orthogonal and _keeps_lengths(values) else ""


def _stretched(values: Tensor) -> str:
    """The mark of an identity times a number but 1 and -1: a net of nothing else loses its signals or drowns them."""
    if values.dim() != 2 or values.shape[0] != values.shape[1]:
        return ""
    factor = float(values[0, 0])
    identity = factor * torch.eye(len(values), dtype=values.dtype, device=values.device)
    return f"*{factor:g}" if abs(factor) not in (0, 1) and torch.equal(values, identity) else ""


def _count(values: Tensor) -> int:
    """How many different numbers there are."""
    return len(torch.unique(values))


def _keeps_lengths(values: Tensor) -> bool:
    """Whether a matrix of orthogonal rows is square and changes no length, to precision."""
    square = values.numel() == len(values) ** 2
    return square and abs(float(values[0].float().square().sum()) - 1) <= _bound(values)


def _is_orthogonal(values: Tensor) -> bool:
    """Whether the rows or the columns of a matrix are orthogonal and of one length, to precision."""
    if values.dim() < 2 or min(len(values), values.numel() // len(values)) < 2:
        return False
    matrix = values.reshape(len(values), -1).float()
    matrix = matrix if len(matrix) <= matrix.shape[1] else matrix.T
    squares = matrix.square().sum(1)
    if bool(((squares / squares[0] - 1).abs() > _bound(values)).any()) or not float(squares[0]) > 0:
        return False
    some = matrix[:8]  # of a matrix whose rows have one length but point anywhere eight tell as well as all
    products = some @ matrix.T / squares[0]
    return bool(((products - torch.eye(len(matrix), device=matrix.device)[:8]).abs() <= _bound(values)).all())


def _bound(values: Tensor) -> float:
    return 16 * max(torch.finfo(values.dtype).eps, 1e-6)


def _in_words(weight: _Weight) -> str:
    zeros = float((weight.parameter.detach() == 0).float().mean())
    words = {
        "=0": "0 on purpose, as no class and no rule leaves it",
        "structure": f"a structure on purpose: {100 * zeros:.0f} % of it are exactly 0",
        "few": "a structure on purpose: it holds but a few different numbers",
        "orthogonal": "a rotation on purpose: orthogonal to precision, as few weights here are",
    }
    if weight.mark.startswith("*"):
        return f"{weight.mark.removeprefix('*')} times the identity, on purpose"
    return words.get(weight.mark, f"{weight.mark.removeprefix('=')} throughout, on purpose")


def _share(weight: _Weight) -> float:
    """A weight's scale, where the least that a rule would give is 1."""
    if weight.fans is None or weight.parameter.numel() < 4 or weight.mark:
        return math.inf
    return weight.rms * math.sqrt(max(3 * weight.fans.fan_in, weight.fans.fan_out))


def _at_the_end(weight: _Weight, weights: list[_Weight], prior: bool) -> str:
    """What the scale of a weight says that ends the model, where its bias is at a prior or not."""
    if weight.fans is None or _share(weight) == math.inf:
        return ""
    if prior and weight.rms < 1.2 * (3 * weight.fans.fan_in) ** -0.5:
        return "its bias is a prior, which its weights must not drown"
    few = 3 / math.sqrt(2 * weight.parameter.numel())  # three times the error of a standard deviation
    share = weight.rms * (1 + few) * math.sqrt(max(weight.fans))
    alike = [other for other in weights if abs(other.rms - weight.rms) <= SAME * weight.rms]
    if share < FAR_AT_THE_END and 2 * len(alike) <= len(weights):
        return f"an output kept small on purpose: its std is {share:.2g} / sqrt(fan), for the larger of its fans"
    return ""
