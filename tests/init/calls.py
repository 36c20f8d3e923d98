"""Models in one expression."""

import torch
from torch import nn


class Calls(nn.Module):
    """A module whose forward is the function that it is given, with modules and parameters by name."""

    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *args, **kwargs):
        return self.function(self, *args, **kwargs)


def table(*shape):
    return nn.Parameter(torch.randn(shape))
