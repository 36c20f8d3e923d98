"""What a module is called: by the class that its author wrote, whatever has been put around it or mixed into it."""

from __future__ import annotations

import torch
from torch import nn

# where torch makes classes while a program runs, as FSDP2's "FSDPNet" and parametrize's "ParametrizedLinear"
_MAKERS = ("torch.distributed.", "torch.nn.utils.parametrize")
_INSIDE = ("_orig_mod", "_forward_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def class_of(module: nn.Module) -> type[nn.Module]:
    """The class of a module as its author wrote it, the same under every strategy.

    DDP's and FSDP1's wrappers, torch.compile's, and Fabric's are looked through, and the classes that FSDP2,
    `replicate` and `register_parametrization` derive from a module's own while the program runs.

    Args:
        module: Any module.

    Example:
        >>> class_of(nn.utils.parametrizations.weight_norm(nn.Linear(1, 1))).__name__
        'Linear'
    """
    kind = type(module)
    if isinstance(module, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        return class_of(module.module)
    for name in _INSIDE:
        if isinstance(inner := getattr(module, name, None), nn.Module):
            return class_of(inner)
    while own := _derived_from(kind):
        kind = own
    return kind


def _derived_from(kind: type[nn.Module]) -> type[nn.Module] | None:
    """What a class that torch has made while the program runs was derived from; None where it is no such class."""
    if not kind.__module__.startswith(_MAKERS):
        return None
    bases = (base for base in kind.__bases__ if issubclass(base, nn.Module) and base is not nn.Module)
    return next((base for base in bases if kind.__name__.endswith(base.__name__)), None)


def name_of(module: nn.Module) -> str:
    """The name of that class.

    Example:
        >>> name_of(nn.DataParallel(nn.Linear(1, 1)))
        'Linear'
    """
    kind = class_of(module)
    scripted = issubclass(kind, torch.jit.ScriptModule)  # which keeps only the name
    return str(getattr(module, "original_name", kind.__name__) if scripted else kind.__name__)
