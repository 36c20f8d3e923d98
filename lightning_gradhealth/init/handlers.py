"""What is done to the parameters of each kind of module."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial, singledispatch
from typing import TypeVar

import torch
from torch import Tensor, nn

from lightning_gradhealth.init.axes import ATTRIBUTE, draw_declared
from lightning_gradhealth.init.context import InitContext
from lightning_gradhealth.init.fans import fans
from lightning_gradhealth.init.gains import gain as gain_of
from lightning_gradhealth.init.owned import Owned
from lightning_gradhealth.validation import wrong

H = TypeVar("H", bound=Callable[..., None])

_RULES: dict[type[nn.Module], str] = {}  # the names of the initializers that were registered


@singledispatch
def initialize(module: nn.Module, context: InitContext) -> None:
    """Say what is to be done to a module's parameters; nothing, for a kind of module that is not known."""


def visit(module: nn.Module, context: InitContext) -> None:
    """Let the initializers of a module's class and then of its bases decide about what is still open.

    The axes that a class declares come after an initializer that was registered for that class, before its bases.
    """
    for kind in type(module).__mro__:
        if kind in initialize.registry and kind is not object:
            if kind not in _RULES:
                context.keep_meant(module)
            context.enter(_RULES.get(kind, kind.__name__))
            initialize.registry[kind](module, context)
        if ATTRIBUTE in vars(kind):
            context.enter(kind.__name__)
            draw_declared(module, vars(kind)[ATTRIBUTE], context)


def reaches(owned: Owned, by_class: bool) -> bool:
    """Whether an override that names a scheme, a gain or a std means a parameter.

    It means weights: parameters of two axes or more that belong to no normalisation. By name it also means vectors,
    except those of torch's own modules: their biases and scales keep their rule under a pattern such as ".*".
    """
    if any(isinstance(owner, NORMS) for owner in owned.owners):
        return False
    kind = next(kind for kind in type(owned.module).__mro__ if kind in initialize.registry)
    return owned.parameter.ndim > 1 or (not by_class and (kind is object or kind in _RULES))


def register_initializer(module_type: type[nn.Module]) -> Callable[[H], H]:
    """Teach `init_weights` what to do with a class of modules and its subclasses.

    What it leaves open, the initializers of the bases decide: for a subclass of `nn.Linear` it is enough to
    speak of what is new. It may also speak for the parameters of the module's children: an enclosing module
    comes first, and what it has decided is not decided again. A later one for the same class replaces the earlier.

    Args:
        module_type: The class.

    Returns:
        A decorator for `fn(module, context) -> None`, which it returns unchanged; `context` is an
        `InitContext`.

    Raises:
        TypeError: `module_type` is no class of modules.

    Example:
        >>> import torch
        >>> class Positions(nn.Module):
        ...     def __init__(self, length, width):
        ...         super().__init__()
        ...         self.table = nn.Parameter(torch.zeros(length, width))
        >>> @register_initializer(Positions)
        ... def positions(module, context):
        ...     context.weight_(module.table, fan_in=module.table.shape[1], gain=1.0)
        >>> from lightning_gradhealth.init import init_weights
        >>> init_weights(Positions(16, 4), scheme="lecun").entries[0].target_std
        0.5
    """
    if not (isinstance(module_type, type) and issubclass(module_type, nn.Module)):
        remedy = "write @register_initializer(MyModule)"
        raise TypeError(wrong("module_type", "a subclass of nn.Module", module_type, remedy))

    def register(function: H) -> H:
        if not callable(function):
            raise TypeError(wrong("function", "a function fn(module, context)", function, "decorate a function"))
        initialize.register(module_type, function)
        _RULES[module_type] = getattr(function, "__name__", type(function).__name__)
        return function

    return register


# --- the modules of torch ----------------------------------------------------------------------------------
# Each handler asks the context for the weights of the module itself: what it computes by a parametrization is among
# them, what that is computed from is not.


def _weighted(module: nn.Module, context: InitContext) -> None:
    for name, parameter in context.own(module):
        if name == "weight" and parameter.ndim > 1 and not _is_state(parameter, context):
            fan_in, fan_out = fans(module)
            context.weight_(parameter, fan_in=fan_in or None, fan_out=fan_out or None)
        elif name == "bias":
            _bias(parameter, context)


def _convolution(module: nn.Conv2d, context: InitContext) -> None:
    for name, parameter in context.own(module):
        if name == "weight" and parameter.ndim > 1 and not _is_state(parameter, context):
            fan_in, fan_out = fans(module)
            ins, outs = ((0,), (1,)) if module.transposed else ((1,), (0,))
            context.weight_(
                parameter,
                fan_in=fan_in or None,
                fan_out=fan_out or None,
                in_axes=ins,
                out_axes=outs,
                groups=module.groups,
            )
        elif name == "bias":
            _bias(parameter, context)


def _bias(parameter: Tensor, context: InitContext) -> None:
    known = context.advice(parameter)
    if known is not None and known.role == "phase" and known.gain is not None:
        context.fill_(parameter, partial(_uniform, known.gain), distribution="uniform", note=known.note)
    elif not _is_state(parameter, context):
        context.constant_(parameter, 0.0)


def _uniform(bound: float, numbers: Tensor, generator: torch.Generator) -> None:
    numbers.uniform_(-bound, bound, generator=generator)


def _is_state(parameter: Tensor, context: InitContext) -> bool:
    """Whether a forward of its own uses it as something else than its module does: a step size, a gate, a factor."""
    known = context.advice(parameter)
    return known is not None and known.role == "state"


def _embedding(module: nn.Embedding | nn.EmbeddingBag, context: InitContext) -> None:
    for name, parameter in context.own(module):
        if name == "weight" and not _also_weight(parameter, context):
            context.lookup_(parameter)


def _also_weight(parameter: Tensor, context: InitContext) -> bool:
    """Whether a table of embeddings is also multiplied with activations: what comes out there decides its scale."""
    known = context.advice(parameter)
    tied = any(isinstance(owner, WEIGHTED) for owner in context.owners(parameter))
    return tied or (known is not None and known.role == "weight")


def _norm(module: nn.Module, context: InitContext) -> None:
    for name, parameter in context.own(module):
        if name == "weight":
            known = context.advice(parameter)
            factor = 1.0 if known is None else known.factor  # 0 where the norm ends a branch that starts silent
            context.constant_(parameter, factor, note="" if factor == 1 else f"= {factor:g}: ends a residual branch")
        elif name == "bias":
            context.constant_(parameter, 0.0)


def _prelu(module: nn.PReLU, context: InitContext) -> None:
    for name, parameter in context.own(module):
        if name == "weight":
            context.keep(parameter, "the slopes were chosen when the module was made")


_RECURRENT = re.compile(r"(weight|bias)_(ih|hh|hr)(_l\d+)?(_reverse)?")
_GATES = {1: ("",), 3: ("reset", "update", "new"), 4: ("input", "forget", "cell", "output")}


def _recurrent(module: nn.RNNBase | nn.RNNCellBase, context: InitContext) -> None:
    size = module.hidden_size
    gain = gain_of("relu") if getattr(module, "nonlinearity", "") == "relu" else 1.0  # of an RNN; gates have none
    for name, parameter in context.own(module):
        match = _RECURRENT.fullmatch(name)
        if match is None:
            continue
        kind, source = match.group(1, 2)
        if source == "hr":
            context.orthogonal_(parameter, note="the projection is part of the recurrence")
            continue
        for index, gate in enumerate(_GATES.get(len(parameter) // size, ())):
            rows = slice(index * size, (index + 1) * size)
            if kind == "bias":
                forget = gate == "forget" and source == "ih"
                note = "open at the start; this is the whole forget bias" if forget else ""
                context.constant_(parameter, float(forget), block=gate, rows=rows, note=note)
            elif source == "hh":
                context.orthogonal_(parameter, gain=gain, block=gate, rows=rows)
            else:
                fan_in, fan_out = fans(module, name)
                own = None if context.knows_gain(parameter) else gain
                context.weight_(parameter, fan_in=fan_in, fan_out=fan_out, gain=own, block=gate, rows=rows)


def _attention(module: nn.MultiheadAttention, context: InitContext) -> None:
    size = module.embed_dim
    for name, parameter in context.own(module):
        if name == "in_proj_bias":
            context.constant_(parameter, 0.0)
        elif name in (
            "in_proj_weight",
            "q_proj_weight",
            "k_proj_weight",
            "v_proj_weight",
            "bias_k",
            "bias_v",
        ):
            blocks = ("query", "key", "value") if name == "in_proj_weight" else ("",)
            fan_in, fan_out = fans(module, name)
            for index, block in enumerate(blocks):
                rows = slice(index * size, (index + 1) * size) if block else None
                gain = None if context.knows_gain(parameter) else 1.0
                context.weight_(parameter, fan_in=fan_in, fan_out=fan_out, gain=gain, block=block, rows=rows)
    for name, parameter in context.own(module.out_proj):
        if name == "weight":
            context.weight_(parameter, gain=None if context.knows_gain(parameter) else 1.0)
        elif name == "bias":
            context.constant_(parameter, 0.0)


def _install(handler: Callable[..., None], *kinds: type[nn.Module]) -> None:
    for kind in kinds:
        initialize.register(kind, handler)


CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
WEIGHTED = (nn.Linear, nn.Bilinear, *CONVOLUTIONS)
NORMS = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
    *(nn.LayerNorm, nn.GroupNorm, nn.RMSNorm),
)

_install(_weighted, nn.Linear, nn.Bilinear)
_install(_convolution, *CONVOLUTIONS)
_install(_embedding, nn.Embedding, nn.EmbeddingBag)
_install(_recurrent, nn.RNN, nn.LSTM, nn.GRU, nn.RNNCell, nn.LSTMCell, nn.GRUCell)
_install(_attention, nn.MultiheadAttention)
_install(_norm, *NORMS)
_install(_prelu, nn.PReLU)
