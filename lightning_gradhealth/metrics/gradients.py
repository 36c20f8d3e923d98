"""Gradient norms as metrics."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_gradhealth.layers import LayersSpec, Layout, check_layers
from lightning_gradhealth.metrics.sums import Sums, VectorSums
from lightning_gradhealth.norms import norms, norms_or_zero
from lightning_gradhealth.ratios import norm_ratios
from lightning_gradhealth.sharding import Sharding, local
from lightning_gradhealth.validation import check_choice, check_several

Model = nn.Module | Tensor | Iterable[Tensor]


class GradientNorm(Sums):
    """The L2 norm of all gradients together, averaged over the updates (or the greatest of them).

    Update it between `backward()` and `optimizer.step()`; in Lightning in `on_before_optimizer_step`, under a
    GradScaler after `unscale_`. NaN or Inf in a gradient makes the result NaN or Inf until `reset`.

    Over ranks: gradients that every rank holds alike, as under DDP, count once; where they are sharded (DTensor,
    FSDP1) it is the norm of the whole, and all ranks update together: an update is a collective then.

    Args:
        reduction: "mean" or "max" over updates.
        kwargs: What every `torchmetrics.Metric` takes.

    Raises:
        ValueError: `reduction` is neither of these.

    Example:
        >>> metric, weight = GradientNorm(), torch.zeros(2, requires_grad=True)
        >>> for gradient in ([3.0, 4.0], [6.0, 8.0]):
        ...     weight.grad = torch.tensor(gradient)
        ...     metric.update([weight])
        >>> metric.compute().item()
        7.5
    """

    higher_is_better = None
    plot_lower_bound = 0.0
    total: Tensor
    greatest: Tensor

    def __init__(self, reduction: Literal["mean", "max"] = "mean", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.reduction = check_choice("reduction", reduction, ("mean", "max"), 'leave it out for "mean"')
        self.add_state("total", torch.zeros(2, dtype=torch.float64), dist_reduce_fx="sum")  # of norms, of updates
        self.add_state("greatest", torch.tensor(-torch.inf, dtype=torch.float64), dist_reduce_fx="max")

    @torch.no_grad()
    def update(self, model: Model) -> None:
        """Take in the gradients that are there now; parameters without one are left out.

        Args:
            model: A module, a parameter, or an iterable of parameters. Under FSDP1 the outermost module.

        Raises:
            TypeError: `model` is none of these.
            ValueError: It has no parameters, or none of them has a gradient.
        """
        parameters = _parameters(model)
        whole, _, _ = _gradient_norms(model if isinstance(model, nn.Module) else nn.Module(), parameters)
        norm = torch.linalg.vector_norm(whole).to(self.total)
        self.total = self.total + torch.stack([norm, torch.ones_like(norm)])
        self.greatest = torch.maximum(self.greatest, norm)

    def compute(self) -> Tensor:
        """The mean or the greatest norm, shape (); NaN without any update."""
        total, updates = self.total.unbind()
        value = total / updates if self.reduction == "mean" else self.greatest
        return value.where(updates > 0, torch.nan)


class GradientNormRatio(VectorSums):
    """How large the gradient of each layer is beside those of the others.

    The RMS gradient of a layer over all updates, divided by the geometric mean of the layers (those whose RMS is
    finite and positive). About 1 everywhere is even; 1e-4 in the first layers says that the gradient vanishes on
    its way to them (Glorot and Bengio, "Understanding the difficulty of training deep feedforward neural networks",
    2010). A layer with zero gradients has 0, one without any gradient has NaN.

    When to update it, and what it does over ranks: see `GradientNorm`. A metric is for one model, until `reset`.

    Args:
        layers: How parameters are grouped: "module" (a layer is a module that directly owns parameters),
            "parameter", a depth, or regexes on parameter names (the first group names the layer).
        reduction: None: a ratio for each layer; "max" or "min": the greatest or smallest of those that have
            gradients, a single number for `self.log`.
        kwargs: What every `torchmetrics.Metric` takes.

    Attributes:
        layer_names: The layers, in the order of the ratios; empty before the first update.

    Raises:
        TypeError: `layers` is none of these.
        ValueError: `layers` or `reduction` is none of these.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
        >>> for layer, size in zip(net, (1.0, 4.0)):
        ...     layer.weight.grad = torch.full((2, 2), size)
        >>> metric = GradientNormRatio()
        >>> ratios = metric(net)
        >>> dict(zip(metric.layer_names, ratios.tolist()))
        {'0': 0.5, '1': 2.0}
    """

    higher_is_better = None
    plot_lower_bound = 0.0
    plot_legend_name = "Layer"

    def __init__(
        self, layers: LayersSpec = "module", reduction: Literal["max", "min"] | None = None, **kwargs: Any
    ) -> None:
        super().__init__("squares_and_updates", **kwargs)
        self.layers = check_layers(layers)
        self.reduction = check_choice("reduction", reduction, (None, "max", "min"), "leave it out for all ratios")
        self.layer_names: tuple[str, ...] = ()
        self._decided = False

    def forget(self) -> None:
        """Let the next update decide the layers."""
        self._decided = False

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the gradients that are there now.

        Args:
            model: The same module at every update until `reset`. Under FSDP1 the outermost one.

        Raises:
            TypeError: `model` is no module.
            ValueError: It has no parameters, none of them has a gradient, or its layers are not those of before.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}; its layers are compared")
        layout = Layout(model, self.layers)
        if self._decided and tuple(layout.names) != self.layer_names:
            raise ValueError(
                f"model has other layers than at earlier updates: {_few(layout.names)}, not {_few(self.layer_names)};"
                " use one metric for each model"
            )
        parameters = [slot.parameter for slot in layout.slots]
        _check_any("model", parameters)
        whole, present, numel = _gradient_norms(model, parameters)
        owner = torch.tensor([slot.layer for slot in layout.slots]).to(whole.device)
        sizes = torch.tensor(numel, dtype=whole.dtype).to(whole.device)
        squares = whole.new_zeros(len(layout.names)).index_add_(0, owner, whole.square())
        elements = torch.zeros_like(squares).index_add_(0, owner, sizes * present)
        self.layer_names, self._decided = tuple(layout.names), True
        self.add(torch.cat([squares / elements.clamp(min=1.0), (elements > 0).to(squares.dtype)]))

    def compute(self) -> Tensor:
        """The ratios, shape (layers,), or one of them, shape (); NaN without any update."""
        vector = self.vector
        if vector is None:
            return self.nothing()
        squares, updates = vector.view(2, -1)
        rms, counts = torch.stack([torch.sqrt(squares / updates), updates]).tolist()
        ratios = norm_ratios([value if count else None for value, count in zip(rms, counts, strict=True)])
        if self.reduction is None:
            return vector.new_tensor([torch.nan if ratio is None else ratio for ratio in ratios])
        known = vector.new_tensor([ratio for ratio in ratios if ratio is not None] or [torch.nan])
        return known.amax() if self.reduction == "max" else known.amin()

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Draw the ratio of each layer, by name; see `GradientNorm.plot`.

        Args:
            val: What `compute` or a call of the metric returned, or a list of such; None: what `compute` returns now.
            ax: The matplotlib axes to draw on; None: new ones.

        Returns:
            The figure (None where `ax` was given) and the axes.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.

        Example:
            >>> figure, axes = GradientNormRatio().plot([torch.ones(3)] * 5)  # doctest: +SKIP
        """
        val = self.compute() if val is None else val
        return super().plot([self._named(item) for item in val] if isinstance(val, Sequence) else self._named(val), ax)

    def _named(self, value: Any) -> Any:
        """The ratios by layer, wherever there is one for each."""
        if self.reduction is None and isinstance(value, Tensor) and value.numel() == len(self.layer_names):
            return dict(zip(self.layer_names, value.reshape(-1), strict=True))
        return value


def _gradient_norms(model: nn.Module, parameters: Sequence[Tensor]) -> tuple[Tensor, Tensor, list[int]]:
    """For each parameter the norm of its whole gradient, whether there is one, and its number of elements."""
    gradients = [parameter.grad for parameter in parameters]
    sharding = Sharding.of(model, parameters)
    if sharding is not None:  # a rank may hold nothing, but has to take part
        parts = norms([local(gradient) for gradient in gradients if gradient is not None])
        whole, present = sharding.reduce_gradients(parts, gradients)
        return whole, present, sharding.numel
    if all(gradient is None for gradient in gradients):
        raise ValueError(
            "model: none of its parameters has a gradient; update the metric after backward() and before zero_grad()"
            " (in Lightning in on_before_optimizer_step)"
        )
    whole = norms_or_zero(gradients)
    present = torch.tensor([gradient is not None for gradient in gradients]).to(whole.device)
    return whole, present, [parameter.numel() for parameter in parameters]


def _parameters(model: Model) -> list[Tensor]:
    """The parameters that `model` stands for."""
    if isinstance(model, nn.Module):
        found: list[Any] = list(model.parameters())
    elif isinstance(model, Tensor):
        found = [model]
    elif isinstance(model, Iterable) and not isinstance(model, str):
        remedy = "give the model, or model.parameters()"
        found = check_several("model", model, "a module or parameters", remedy)
    else:
        found = [model]
    strangers = [item for item in found if not isinstance(item, Tensor)]
    if strangers:
        raise TypeError(
            f"model must be a module or parameters, got {type(strangers[0]).__name__};"
            " give the model, or model.parameters() (not named_parameters, nor an optimizer's param_groups)"
        )
    _check_any("model", found)
    return found


def _check_any(name: str, parameters: Sequence[Tensor]) -> None:
    if not parameters:
        raise ValueError(f"{name} has no parameters; give what is trained (an iterator can be used only once)")


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
