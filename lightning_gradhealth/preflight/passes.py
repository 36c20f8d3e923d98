"""One pass forward and backward through a model that is left as it was; what was measured stays on the device."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gradhealth.isolation import undisturbed
from lightning_gradhealth.norms import norms_or_zero
from lightning_gradhealth.preflight.ends import Ends
from lightning_gradhealth.signals import Reading, SignalProbe
from lightning_gradhealth.tracing.progress import tick


class FirstCall:
    """A hook that keeps the first call of any module, and so the outermost one: what `init_weights` could be given."""

    def __init__(self) -> None:
        self.module: nn.Module | None = None
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Keep the first."""
        tick()
        if self.module is None:
            self.module, self.args, self.kwargs = module, args, kwargs

    def example_inputs(self) -> Any:
        """The arguments as a tuple or a dict."""
        if self.module is None:
            raise ValueError("no call of a module was seen")
        if not self.args or not self.kwargs:
            return self.kwargs or self.args
        return dict(inspect.signature(self.module.forward).bind(*self.args, **self.kwargs).arguments)


@dataclass(frozen=True)
class Pass:
    """What one pass has shown.

    Attributes:
        reading: The signals; None where nothing was measured.
        numbers: The norms of the gradients of all parameters (0 for none), the norms of the parameters, how many
            numbers among those that the forward pass ends in are not finite, and the loss: shape (2 parameters + 2,).
        squashed: What squashes the logits of the loss, as in `Ending`; empty: nothing.
        reached: Whether a gradient came, by parameter.
        has_loss: There is a loss.
        call: The outermost call.
        notes: What could not be measured.
    """

    reading: Reading | None
    numbers: Tensor
    squashed: dict[str, Any]
    reached: tuple[bool, ...]
    has_loss: bool
    call: FirstCall
    notes: tuple[str, ...]


def run_once(model: nn.Module, run: Callable[[], Ends], *, scale: float, seed: int) -> Pass:
    """Run a model forward and backward under a probe, and leave it as it was, bit for bit.

    Args:
        model: The model, without wrappers.
        run: Runs the forward pass.
        scale: A factor for the loss; it is taken out of what is measured again.
        seed: Of the random directions, where there is no loss; 0 also looks back through time.

    Example:
        >>> net = nn.Linear(2, 1)
        >>> done = run_once(net, lambda: Ends((net(torch.ones(4, 2)),)), scale=1.0, seed=0)
        >>> done.reached, done.has_loss, net.weight.grad is None
        ((True, True), False, True)
    """
    try:
        return _run(model, run, scale, seed, _gradients)
    except _ReentrantError:
        return _run(model, run, scale, seed, _accumulated_gradients)


def _run(model: nn.Module, run: Callable[[], Ends], scale: float, seed: int, back: _Back) -> Pass:
    probe, call = SignalProbe(model, compiled=True, temporal=seed == 0), FirstCall()
    with undisturbed(model, silent=True, weights=True), torch.inference_mode(False), torch.enable_grad():
        if not model.training:
            model.train()
        try:
            for module in model.modules():
                if not isinstance(module, torch.jit.ScriptModule):
                    module.register_forward_pre_hook(call, with_kwargs=True)  # `undisturbed` takes it off again
            parameters = list(model.parameters())  # what forward registers anew is gone afterwards
            probe.open()
            ends = run()
            starts = _directions(ends, scale, seed)
            if ends.loss is not None:
                probe.end(ends.loss)
            squashed = probe.ending.squashed
            with probe.of_any_pass():
                gradients = back(ends.tensors, starts, parameters)
            factor = torch.tensor(scale, dtype=torch.float64)
            reading = probe.close(scale=None if scale == 1.0 else factor, flows=probe.temporal_flows())
            numbers = _numbers(ends, parameters, gradients, scale)
        finally:
            probe.pause()
    reached = tuple(gradient is not None for gradient in gradients)
    return Pass(reading, numbers, squashed, reached, ends.loss is not None, call, tuple(_notes(probe)))


def _notes(probe: SignalProbe) -> Iterator[str]:
    for what, why in probe.failures.items():
        yield f"{what}: not measured ({why})"
    if probe.elsewhere:
        yield f"signals: {probe.elsewhere}"
    if probe.hidden:
        yield f"signals: not measured inside scripted modules ({', '.join(probe.hidden)})"


def _directions(ends: Ends, scale: float, seed: int) -> list[Tensor]:
    """What the backward pass starts with: the factor of the loss, or random directions from a generator of its own."""
    if ends.loss is not None:
        return [torch.full_like(ends.loss, scale)]
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(end.shape, generator=generator, dtype=torch.float32) for end in ends.tensors]
    return [(scale * start).to(end) for start, end in zip(drawn, ends.tensors, strict=True)]


def _numbers(
    ends: Ends, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor | None], scale: float
) -> Tensor:
    device = ends.tensors[0].device
    norms = norms_or_zero(gradients, device) / scale
    floats = [p.detach() if p.is_floating_point() or p.is_complex() else None for p in parameters]
    sizes = norms_or_zero(floats, device).to(norms)
    flags = [(~end.detach().isfinite()).sum().to(norms) for end in ends.tensors]
    loss = norms.new_zeros(()) if ends.loss is None else ends.loss.detach().reshape(())
    return torch.cat([norms, sizes, torch.stack([torch.stack(flags).sum(), loss.to(norms)])])


# --- the backward pass ---

_Back = Callable[[Sequence[Tensor], Sequence[Tensor], Sequence[nn.Parameter]], list[Tensor | None]]


class _ReentrantError(Exception):
    """The model has activation checkpointing that only `backward()` can go through."""


def _gradients(
    ends: Sequence[Tensor], starts: Sequence[Tensor], parameters: Sequence[nn.Parameter]
) -> list[Tensor | None]:
    """The gradients, without a word to those who wait for their accumulation: DDP, optimizers in the backward pass."""
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    try:
        found = iter(torch.autograd.grad(ends, trainable, starts, allow_unused=True))
    except RuntimeError as error:
        if "use_reentrant" not in str(error):
            raise
        raise _ReentrantError from error
    return [next(found) if parameter.requires_grad else None for parameter in parameters]


def _accumulated_gradients(
    ends: Sequence[Tensor], starts: Sequence[Tensor], parameters: Sequence[nn.Parameter]
) -> list[Tensor | None]:
    """The same through `.grad`, which is empty inside `undisturbed`."""
    waited_for = any(parameter._post_accumulate_grad_hooks for parameter in parameters)
    if waited_for or (torch.distributed.is_available() and torch.distributed.is_initialized()):
        raise ValueError(
            "model must not checkpoint activations with use_reentrant=True here, where others wait for gradients (DDP,"
            " or hooks after their accumulation); use torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"
        )
    torch.autograd.backward(ends, starts)
    return [parameter.grad for parameter in parameters]
