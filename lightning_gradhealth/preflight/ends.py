"""What a forward pass ends in: a loss, or outputs; and what to say of a batch that does not go through."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gradhealth.layers import unwrap
from lightning_gradhealth.messages import where_and_why
from lightning_gradhealth.steps import step_arguments
from lightning_gradhealth.tracing.record import as_arguments
from lightning_gradhealth.trees import tensors


@dataclass(frozen=True)
class Ends:
    """What a forward pass ends in.

    Attributes:
        tensors: What the backward pass starts from.
        loss: The loss, if there is one; it is the only tensor then.
    """

    tensors: tuple[Tensor, ...]
    loss: Tensor | None = None


def opened(model: nn.Module) -> nn.Module:
    """The module inside the wrappers of strategies and of torch.compile."""
    model = unwrap(model)
    inner = getattr(model, "_orig_mod", None)
    return opened(inner) if isinstance(inner, nn.Module) else model


def copied(batch: Any) -> Any:
    """A batch that a forward pass may change in place, or take things out of; itself, where it cannot be copied.

    Example:
        >>> batch = {"x": torch.ones(1)}
        >>> copied(batch)["x"].add_(1.0), batch["x"]
        (tensor([2.]), tensor([1.]))
    """
    try:
        return copy.deepcopy(batch)
    except Exception:  # whatever its classes do, and tensors that have a history, which nothing changes in place
        return batch


def pair_of(batch: Any) -> tuple[Any, Any]:
    """The x and y of a batch.

    Raises:
        ValueError: It is no pair.
    """
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        got = f"a {type(batch).__name__}" + (f" of {len(batch)}" if isinstance(batch, (tuple, list)) else "")
        raise ValueError(
            f"batch must be a pair (x, y) where loss_fn is given, got {got}; what else loss_fn needs can be bound to it"
        )
    return batch[0], batch[1]


def from_loss(model: nn.Module, pair: tuple[Any, Any], loss_fn: Callable[..., Any]) -> Ends:
    """Run the model, and the loss function on what it gives.

    Raises:
        ValueError: One of them does not take what it is given.
    """
    inputs, target = pair
    output = _forward(model, inputs)
    try:
        loss = loss_fn(output, target)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise ValueError(
            f"loss_fn must take the model's output and y, got {_shapes(output)} and {_shapes(target)}:"
            f" {where_and_why(error)}; it is called as loss_fn(model(x), y) for batch = (x, y)"
        ) from error
    return with_loss(loss, "loss_fn")


def from_outputs(model: nn.Module, inputs: Any) -> Ends:
    """Run the model: a loss of its own, or all outputs that need a gradient.

    Raises:
        ValueError: It does not take the inputs, or nothing needs a gradient.
    """
    output = _forward(model, inputs)
    own = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(own, Tensor) and own.numel() == 1 and own.requires_grad:
        return Ends((own,), own)
    found = {id(tensor): tensor for tensor in tensors(output) if tensor.is_floating_point() and tensor.requires_grad}
    if not found:
        raise ValueError(
            f"model must give a floating tensor that needs a gradient, got {_shapes(output)}; is everything frozen,"
            " detached or under no_grad?"
        )
    return Ends(tuple(found.values()))


def from_training_step(model: nn.Module, batch: Any) -> Ends:
    """Run the `training_step` of a LightningModule.

    Raises:
        ValueError: It does not take the batch, or the module optimizes by hand.
    """
    if not getattr(model, "automatic_optimization", True):
        raise ValueError(
            f"model must not optimize by hand, but {type(model).__name__}.automatic_optimization is False: its"
            " training_step would step its optimizers; diagnose its networks one by one, e.g."
            " gh.diagnose(model.generator, inputs)"
        )
    step: Callable[..., Any] = model.training_step  # type: ignore[assignment]
    args, kwargs = step_arguments(step, batch)
    try:
        result = step(*args, **kwargs)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        lonely = " is not attached to a `Trainer`" in str(error)
        hint = (
            "; it asks for its Trainer: use GradHealth(preflight=True) in the fit, or diagnose(model, (x, y), loss_fn)"
            if lonely
            else "; give what the DataLoader gives"
        )
        raise ValueError(
            _refused("batch", f"{type(model).__name__}.training_step", model, batch, error, hint)
        ) from error
    return of_step(result, type(model).__name__)


def of_step(result: Any, name: str) -> Ends:
    """The loss in what a `training_step` has returned.

    Args:
        result: The loss, or a mapping with "loss".
        name: Class of the LightningModule, for messages.

    Raises:
        TypeError: There is no loss.
        ValueError: It is not one number that needs a gradient.

    Example:
        >>> of_step({"loss": torch.ones((), requires_grad=True)}, "Net").loss.item()
        1.0
    """
    if result is None:
        raise TypeError(
            f"{name}.training_step must return a loss, got None: it skips this batch, or optimizes by hand; give"
            " another batch, or diagnose(model, (x, y), loss_fn)"
        )
    return with_loss(result.get("loss") if isinstance(result, Mapping) else result, f"{name}.training_step")


def with_loss(loss: Any, giver: str) -> Ends:
    """A loss that a backward pass can start from.

    Args:
        loss: What is to be one.
        giver: Who gave it, for messages.

    Raises:
        TypeError: It is no tensor.
        ValueError: It is not one number that needs a gradient.

    Example:
        >>> with_loss(torch.ones(2), "loss_fn")
        Traceback (most recent call last):
        ...
        ValueError: loss_fn must give one number, got shape (2,); reduce it, e.g. by .mean()
    """
    if not isinstance(loss, Tensor):
        raise TypeError(
            f"{giver} must give a loss as a tensor, got {type(loss).__name__}; leave out .item() or float()"
        )
    if loss.numel() != 1:
        raise ValueError(f"{giver} must give one number, got shape {tuple(loss.shape)}; reduce it, e.g. by .mean()")
    if not loss.requires_grad:
        raise ValueError(
            f"the loss of {giver} must need a gradient, got one that does not; is the model frozen, or the output"
            " detached or computed under no_grad?"
        )
    return Ends((loss,), loss)


def _forward(model: nn.Module, inputs: Any) -> Any:
    args, kwargs = as_arguments(inputs)
    try:
        return model(*args, **kwargs)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        hint = "; pass a tensor, a tuple of positional or a dict of keyword arguments of forward"
        if isinstance(inputs, (tuple, list)) and len(inputs) == 2:
            hint += "; if it is (x, y), give loss_fn too, or pass batch[0]"
        raise ValueError(_refused("batch", "model.forward", model, inputs, error, hint)) from error


def _refused(name: str, what: str, model: nn.Module, value: Any, error: Exception, hint: str) -> str:
    """What to say of a batch that does not go through: the device, if that is why, or what it is made of."""
    homes = {tensor.device for tensor in [*model.parameters(), *model.buffers()]}
    strange = next((tensor.device for tensor in tensors(value) if tensor.device not in homes), None)
    if strange is not None and "device" in str(error).lower():
        home = min(map(str, homes))
        move = f'move it by .to("{home}")'
        return f"{name} must be on the device of the model, {home}, got {strange}; {move}: {where_and_why(error)}"
    return f"{name} must go through {what}, got {_shapes(value)}: {where_and_why(error)}{hint}"


def _shapes(value: Any) -> str:
    """What a value is, and the shapes of the tensors in it."""
    shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors(value))
    return f"{type(value).__name__}" + (f" of shape {shapes}" if shapes else " without tensors")
