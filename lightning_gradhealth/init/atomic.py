"""All or nothing: what fails half way leaves the model and the random state bit for bit as they were."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from lightning_gradhealth.init.owned import Owned
from lightning_gradhealth.isolation import RandomState
from lightning_gradhealth.sharding import local


@contextmanager
def random_state_kept_on_error() -> Iterator[None]:
    """Put the random state back if what runs inside fails.

    Example:
        >>> before = torch.get_rng_state()
        >>> try:
        ...     with random_state_kept_on_error():
        ...         _ = torch.rand(3) / "three"
        ... except TypeError:
        ...     print(torch.equal(before, torch.get_rng_state()))
        True
    """
    state = RandomState.now()
    try:
        yield
    except BaseException:
        state.restore()
        raise


@contextmanager
def all_or_nothing(written: Sequence[Owned]) -> Iterator[None]:
    """Put parameters, what their modules compute from them, and the random state back if what runs inside fails.

    The old values are kept on the host while it runs.

    Args:
        written: The parameters that are written inside.

    Example:
        >>> layer = torch.nn.Linear(2, 1)
        >>> before = layer.weight.detach().clone()
        >>> try:
        ...     with all_or_nothing([Owned(layer.weight, ["weight"], [layer], {"weight": layer.weight})]):
        ...         _ = torch.nn.init.zeros_(layer.weight)
        ...         raise ValueError("no more")
        ... except ValueError:
        ...     print(torch.equal(before, layer.weight))
        True
    """
    originals = {id(tensor): tensor for owned in written for tensor in owned.originals.values()}
    buffers = [
        (part, name, buffer)
        for owned in written
        if owned.computed is not None
        for part in owned.computed.module.modules()
        for name, buffer in part.named_buffers(recurse=False)
    ]
    tensors = [local(tensor.detach()) for tensor in (*originals.values(), *(buffer for _, _, buffer in buffers))]
    kept = [(tensor, tensor.to("cpu", copy=True)) for tensor in tensors]
    attributes = [
        (vars(owned.computed.module), owned.computed.attribute)
        for owned in written
        if owned.computed is not None and owned.computed.attribute in vars(owned.computed.module)
    ]
    computed = [(values, name, values[name]) for values, name in attributes]  # by torch's older hooks
    with random_state_kept_on_error():
        try:
            yield
        except BaseException:
            with torch.no_grad():
                for tensor, values in kept:
                    tensor.copy_(values)
            for part, name, buffer in buffers:  # a parametrization may have put another in its place
                part._buffers[name] = buffer
            for values_of, name, value in computed:
                values_of[name] = value
            raise
