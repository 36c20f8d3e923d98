"""What modules are, as far as remedies depend on it."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from lightning_gradhealth.naming import class_of


def kind_of(module: type[nn.Module]) -> str:
    """What a class of modules is, as far as remedies depend on it; "" where it is none of what they know.

    Example:
        >>> kind_of(nn.Conv2d), kind_of(nn.BatchNorm1d), kind_of(nn.LSTM), kind_of(nn.Sequential)
        ('conv2d', 'norm', 'recurrent', '')
    """
    return next((kind for kind, classes in _KINDS.items() if issubclass(module, classes)), "") or (
        "norm" if module.__name__.lower().endswith("norm") else ""
    )


def applied_by_hand(module: nn.Module) -> dict[str, nn.Parameter]:
    """The matrices of a module that no module of their own applies: one of several, or beside modules inside.

    What goes in and out of each of them is seen by no hook. torch's own modules are known as a whole.

    Args:
        module: Any module.

    Example:
        >>> one, other = nn.Linear(1, 1), nn.Linear(1, 1)
        >>> list(applied_by_hand(nn.ParameterList([one.weight, one.bias, other.weight])))
        ['0', '2']
        >>> applied_by_hand(nn.LSTM(2, 2))
        {}
    """
    own = class_of(module).__module__
    if own.startswith("torch.nn.") and not isinstance(module, (nn.ParameterList, nn.ParameterDict)):
        return {}
    found = {name: p for name, p in module._parameters.items() if p is not None and p.ndim > 1}
    return found if len(found) > 1 or module._modules else {}


_CONV = nn.modules.conv
_KINDS: dict[str, tuple[type[nn.Module], ...]] = {
    "norm": (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm),
    "conv1d": (_CONV.Conv1d, _CONV.ConvTranspose1d),
    "conv2d": (_CONV.Conv2d, _CONV.ConvTranspose2d),
    "conv3d": (_CONV.Conv3d, _CONV.ConvTranspose3d),
    "recurrent": (nn.RNNBase, nn.RNNCellBase),
    "attention": (nn.MultiheadAttention,),
    "embedding": (nn.Embedding, nn.EmbeddingBag),
    "linear": (nn.Linear, nn.Bilinear),
    "relu": (nn.ReLU, nn.ReLU6),
    "sigmoid": (nn.Sigmoid,),
    "tanh": (nn.Tanh,),
}
