"""What modules are, as far as remedies depend on it."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _NormBase


def kind_of(module: type[nn.Module]) -> str:
    """What a class of modules is, as far as remedies depend on it; "" where it is none of what they know.

    Example:
        >>> kind_of(nn.Conv2d), kind_of(nn.BatchNorm1d), kind_of(nn.LSTM), kind_of(nn.Sequential)
        ('conv2d', 'norm', 'recurrent', '')
    """
    return next((kind for kind, classes in _KINDS.items() if issubclass(module, classes)), "") or (
        "norm" if module.__name__.lower().endswith("norm") else ""
    )


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
