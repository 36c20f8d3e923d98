"""`diagnose`: one forward and one backward pass before the first step, and all that they show."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_gradhealth.layers import LayersSpec, Layout
from lightning_gradhealth.origin import find_origin
from lightning_gradhealth.preflight.account import Account
from lightning_gradhealth.preflight.ends import (
    Ends,
    copied,
    from_loss,
    from_outputs,
    from_training_step,
    opened,
    pair_of,
)
from lightning_gradhealth.preflight.passes import run_once
from lightning_gradhealth.records import FlowReport
from lightning_gradhealth.rules import Thresholds
from lightning_gradhealth.sharding import is_sharded
from lightning_gradhealth.steps import has_training_step
from lightning_gradhealth.tracing.progress import working
from lightning_gradhealth.validation import check_number, wrong

BUDGET = 30.0  # seconds
COTANGENTS = 3  # random directions, where there is no loss: the median of three leaves one outlier out


def diagnose(
    model: nn.Module, batch: Any, loss_fn: Callable[..., Any] | None = None, *, budget: float | None = BUDGET
) -> FlowReport:
    """Look at the signal on its way through a model, forward and backward, before anything is trained.

    One batch goes through the model in training mode, and a gradient comes back. Afterwards everything is as it was,
    bit for bit, also when something raises: parameters, buffers, `.grad`, hooks, training flags, random state, grad
    mode, autocast, and the batch. The results are read from the device once.

    What the gradient starts from: `loss_fn(model(x), y)` where there is a `loss_fn`; otherwise what the `training_step`
    of a LightningModule returns, which needs no Trainer and logs nothing; otherwise the loss that the model returns
    itself (`output.loss`, as transformers do); otherwise random directions at all outputs: three passes, of
    whose gradients the median counts.

    Compiled modules run eagerly here, so that they can be looked into; scripted ones are not looked into.

    Args:
        model: The model, on its device. Wrap the call in `torch.autocast(...)` if you train with it.
        batch: With `loss_fn` a pair (x, y), where x is a tensor, a tuple of positional or a dict of keyword arguments
            of `forward`. For a LightningModule what its `training_step` takes. Otherwise x alone. Units are judged by
            256 samples or more.
        loss_fn: Gives one number for the model's output and y.
        budget: Seconds after which nothing more is begun, and the report's notes say what was not looked at: further
            random directions, where a NaN begins, what `init_weights` would change. The first pass forward and back is
            always made. None: no limit.

    Returns:
        The report: gains per layer, findings, remedies; `print(report)` in words, `rich.print(report)` as a table.

    Raises:
        TypeError: `model` is no module, `loss_fn` cannot be called, the loss is no tensor, or `budget` no number.
        ValueError: The batch does not go through the model; the loss is not one number, or needs no gradient; the
            model has no parameters, lazy ones, or ones that are sharded or on the meta device; or it is a
            LightningModule that optimizes by hand, whose training_step would step its optimizers.

    Example:
        >>> net = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(16)))
        >>> for layer in net:
        ...     layer.weight.data = 0.5 * torch.eye(64)
        >>> report = diagnose(net, torch.randn(32, 64))
        >>> round(report.forward_gain, 6), round(report.backward_gain, 6), report.depth_limit
        (0.5, 0.5, 10)
        >>> sorted(map(str, report.conditions))
        ['vanishing_activations', 'vanishing_gradients']
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}; pass the model itself")
    if loss_fn is not None and not callable(loss_fn):
        remedy = "e.g. loss_fn=torch.nn.functional.cross_entropy"
        raise TypeError(wrong("loss_fn", "a function of output and target or None", loss_fn, remedy))
    budget = check_budget(budget)
    model = opened(model)
    with working("diagnose", budget):
        if loss_fn is None and has_training_step(model):
            return examine(model, lambda: from_training_step(model, copied(batch)))
        if loss_fn is None:
            return examine(model, lambda: from_outputs(model, copied(batch)))
        pair = pair_of(batch)
        return examine(model, lambda: from_loss(model, copied(pair), loss_fn))


def check_budget(budget: float | None) -> float | None:
    """Return a budget in seconds.

    Raises:
        TypeError: It is no number.
        ValueError: It is not above 0.

    Example:
        >>> check_budget(0)
        Traceback (most recent call last):
        ...
        ValueError: budget must be a finite number > 0, got 0; seconds, or None for no limit
    """
    return None if budget is None else check_number("budget", budget, "seconds, or None for no limit")


def examine(
    model: nn.Module,
    run: Callable[[], Ends],
    *,
    layers: LayersSpec = "module",
    ignore: Mapping[str, str] | None = None,
    thresholds: Thresholds = Thresholds(),  # noqa: B008  (frozen)
    scale: float = 1.0,
) -> FlowReport:
    """Run one batch forward and backward, leave no trace, and judge what was seen.

    Args:
        model: The model, without wrappers.
        run: Runs the forward pass.
        layers: How parameters are grouped.
        ignore: Conditions to mute, as condition -> regex of layer names.
        thresholds: The numbers that verdicts depend on.
        scale: A factor for the loss, that keeps float16 gradients in their range; it is taken out again.

    Raises:
        ValueError: The model has nothing that could be looked at.

    Example:
        >>> net = nn.Linear(2, 1)
        >>> examine(net, lambda: Ends((net(torch.ones(4, 2)),))).layers[0].name
        'Linear'
    """
    _check(model)

    def again() -> Tensor:
        """What a NaN or Inf in the gradients is followed back from."""
        model.train()
        ends = run()
        return sum((end.sum() for end in ends.tensors), start=torch.zeros(())) * scale

    with working("diagnose", shown=False) as work:  # unless `diagnose` has begun it, there may be a bar of Lightning's
        work.tick("forward and back")
        passes = [run_once(model, run, scale=scale, seed=0)]
        for seed in range(1, 1 if passes[0].has_loss else COTANGENTS):
            work.tick("forward and back", seed, COTANGENTS)
            if work.is_over:
                work.leave(f"{COTANGENTS - seed} of {COTANGENTS} random directions")
                break
            passes.append(run_once(model, run, scale=scale, seed=seed))
        account = Account(model, Layout(model, layers), passes, thresholds, lambda: find_origin(model, again), work)
        return account.report(dict(ignore or {}))


def _check(model: nn.Module) -> None:
    parameters = dict(model.named_parameters())
    if not parameters:
        raise ValueError(f"model must have parameters, got {type(model).__name__} without any; nothing can be trained")
    for name, parameter in parameters.items():
        if is_lazy(parameter):
            raise ValueError(
                f"the parameter {name!r} of model has no shape yet (lazy module); run one forward pass first"
            )
        if parameter.is_meta:
            raise ValueError(
                f"the parameter {name!r} of model is on the meta device, without values; materialise the model first"
            )
        if is_sharded(parameter):
            raise ValueError(
                f"the parameter {name!r} of model is sharded over ranks; diagnose the model before it is sharded"
            )
