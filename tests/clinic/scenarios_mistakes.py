"""Mistakes in the code around a network, after public reports, each beside the same without it and beside its like."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from clinic import Built, must, scenario
from lightning.pytorch.plugins import MixedPrecision
from nets import CHAIN, HE, Task, adam, classes, classifier, scaled, sgd, stack
from torch import Tensor, nn
from torch.nn import functional

SLOW = ("stalled_loss", "stalled_layers", "no_gradient")


# --- layers in a Python list (pytorch/pytorch 715, 666, 38639) ----------------------------------------------


class Listed(nn.Module):
    """Hidden layers in whatever they are put into, then a head that the model holds."""

    def __init__(self, kept: Any) -> None:
        super().__init__()
        self.hidden = kept
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        layers: Sequence[Any] = list(self.hidden.values()) if isinstance(self.hidden, dict) else self.hidden
        for layer in layers:
            x = torch.relu(layer(x))
        return self.head(x)


def _layers() -> list[nn.Module]:
    return [nn.Linear(16 if number == 0 else 32, 32) for number in range(3)]


@scenario(
    "layers in a Python list",
    80,
    must=(must("not_in_optimizer", by=60),),
    allow=SLOW,
    report="pytorch/pytorch#715, #666, #38639",
)
def in_a_list() -> Built:
    return classifier(Listed(_layers()), adam(3e-3)), classes(80)


@scenario("layers in a Python dict", 80, must=(must("not_in_optimizer", by=60),), allow=SLOW)
def in_a_dict() -> Built:
    return classifier(Listed(dict(zip("abc", _layers(), strict=True))), sgd(0.1)), classes(80)


@scenario("layers in an nn.ModuleList", 120)
def in_a_module_list() -> Built:
    return classifier(Listed(nn.ModuleList(_layers())), adam(3e-3)), classes(120)


@scenario("layers in a Python list that the optimizer is given", 120)
def given_by_hand() -> Built:
    def optimizer(net: Any) -> torch.optim.Optimizer:
        return torch.optim.Adam([*net.parameters(), *(p for la in net.hidden for p in la.parameters())], lr=3e-3)

    return classifier(Listed(_layers()), optimizer), classes(120)


# --- parameters that come too late (microsoft/nni 4521, pytorch/pytorch 14467) -------------------------------


def _replaced(net: nn.Module) -> torch.optim.Optimizer:
    """The optimizer is made, and then the head is another one."""
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    net[-1] = nn.Linear(32, 4)
    return optimizer


@scenario(
    "head replaced after the optimizer was made",
    80,
    must=(must("not_in_optimizer", layers=r"net\.6", by=60),),
    allow=SLOW,
)
def replaced_head() -> Built:
    return classifier(stack(4, outputs=9), _replaced), classes(80)


class Late(nn.Module):
    """Its first layer is made when the first batch comes."""

    def __init__(self) -> None:
        super().__init__()
        self.rest = stack(3, inputs=32)

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "enter"):
            self.enter = nn.Linear(x.shape[1], 32)
        return self.rest(torch.tanh(self.enter(x)))


@scenario(
    "layer made in the first forward pass",
    80,
    must=(must("not_in_optimizer", layers=r"net\.enter", by=60),),
    allow=SLOW,
)
def late_layer() -> Built:
    return classifier(Late(), adam(3e-3)), classes(80)


@scenario("head alone in the optimizer, nothing frozen", 120, noted=("not_in_optimizer",), falls=0.05)
def head_alone() -> Built:
    net = stack(4, width=64)
    return classifier(net, lambda net: torch.optim.Adam(net[-1].parameters(), lr=1e-2)), classes(120)


# --- gradients that nobody clears (IBM/aihwkit 446, pytorch/pytorch 47175) -----------------------------------


class NeverCleared(Task):
    """zero_grad is forgotten."""

    def optimizer_zero_grad(self, *_: Any) -> None:
        pass


@scenario(
    "gradients never cleared",
    120,
    must=(must("exploding_gradients", by=60),),
    allow=("growing_weights", "loss_spike", "stalled_loss", "saturated_units", "oversized_updates"),
)
def never_cleared() -> Built:
    return NeverCleared(stack(3, nn.Tanh), functional.cross_entropy, sgd(0.1)), classes(120)


class ByHand(Task):
    """Accumulates four batches by hand, and clears the gradients in the manner that is asked for.

    Args:
        to_none: Whether gradients are None afterwards, or zeros.
    """

    def __init__(self, *parts: Any, to_none: bool) -> None:
        super().__init__(*parts)
        self.automatic_optimization = False
        self.to_none = to_none

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(self.net(batch[0]), batch[1])
        self.manual_backward(loss / 4)
        if batch_idx % 4 == 3:
            self.optimizers().step()
            self.optimizers().zero_grad(set_to_none=self.to_none)
        return loss


@scenario("accumulation by hand, gradients set to zero", 80, falls=0.1)
def accumulated() -> Built:
    return ByHand(stack(3), functional.cross_entropy, adam(3e-3), to_none=False), classes(320, batch=16)


# --- gradients clipped while the loss scale is in them -------------------------------------------------------


def _scaler() -> list[Any]:
    return [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**12))]


class ClippedEarly(Task):
    """Clips right after the backward pass, before `unscale_`, by norm or by value."""

    def __init__(self, *parts: Any, by_value: bool) -> None:
        super().__init__(*parts)
        self.by_value = by_value

    def on_after_backward(self) -> None:
        if self.by_value:
            nn.utils.clip_grad_value_(self.parameters(), 0.05)
        else:
            nn.utils.clip_grad_norm_(self.parameters(), 0.05)


EARLY = {"must": (must("stalled_layers"),), "allow": ("stalled_loss",), "options": {"plugins": _scaler}}


@scenario("gradients clipped by norm before unscale_", 120, **EARLY)
def clipped_by_norm_early() -> Built:
    return ClippedEarly(scaled(stack(4), HE), functional.cross_entropy, sgd(0.01), by_value=False), classes(120)


@scenario("gradients clipped by value before unscale_", 120, **EARLY)
def clipped_by_value_early() -> Built:
    return ClippedEarly(scaled(stack(4), HE), functional.cross_entropy, sgd(0.01), by_value=True), classes(120)


BY_VALUE = {"gradient_clip_val": 0.05, "gradient_clip_algorithm": "value"}


@scenario("gradients clipped by norm after unscale_", 150, options={"plugins": _scaler, "gradient_clip_val": 0.5})
def clipped_by_norm() -> Built:
    return classifier(scaled(stack(4), HE), sgd(0.05)), classes(150)


@scenario("gradients clipped by value after unscale_", 150, options={"plugins": _scaler, **BY_VALUE})
def clipped_by_value() -> Built:
    return classifier(scaled(stack(4), HE), sgd(0.05)), classes(150)


# --- one layer alone -----------------------------------------------------------------------------------------


def _eight(size: float) -> nn.Module:
    net = scaled(stack(8, width=48), HE)
    net[8].weight.data.mul_(size)
    return net


@scenario(
    "weights of one layer in the middle 1e-5 of the others'",
    80,
    chain=CHAIN,
    must=(must("vanishing_gradients", layers=r"net\.8", by=40),),
    allow=("stalled_loss", "stalled_layers", "vanishing_activations", "dead_units"),
)
def swallowed() -> Built:
    return classifier(_eight(1e-5), sgd(1e-3)), classes(80)


@scenario("weights of one layer in the middle a fifth of the others'", 150, chain=CHAIN)
def weakened() -> Built:
    return classifier(_eight(0.2), adam(2e-3)), classes(150)


# --- probabilities for logits --------------------------------------------------------------------------------


@scenario("softmax before cross entropy", 120, must=(must("squashed_logits", layers=r"net\.0\.4", by=20),), allow=SLOW)
def softmax_twice() -> Built:
    return classifier(nn.Sequential(stack(3), nn.Softmax(-1)), adam(3e-3)), classes(120)


def _one_hot(steps: int) -> Any:
    return [(x, functional.one_hot(y, 4).float()) for x, y in classes(steps)]


@scenario(
    "sigmoid before binary cross entropy with logits",
    120,
    must=(must("squashed_logits", layers=r"net\.0\.4", by=20),),
    allow=SLOW,
)
def sigmoid_twice() -> Built:
    net = nn.Sequential(stack(3), nn.Sigmoid())
    return Task(net, functional.binary_cross_entropy_with_logits, adam(3e-3)), _one_hot(120)


def _on_probabilities(logits: Tensor, target: Tensor) -> Tensor:
    return functional.nll_loss(logits.softmax(-1).clamp(min=1e-8).log(), target)


@scenario("negative log likelihood of probabilities", 150)
def probabilities() -> Built:
    return Task(stack(3), _on_probabilities, adam(3e-3)), classes(150)


def _distilled(logits: Tensor, target: Tensor) -> Tensor:
    soft = (4 * functional.one_hot(target, 4).float()).softmax(-1)
    own = functional.kl_div(logits.log_softmax(-1), logits.roll(1, 0).softmax(-1).detach(), reduction="batchmean")
    return functional.cross_entropy(logits, soft) + 0.01 * own


@scenario("distillation on softmax targets", 150, falls=0.1)
def distilled() -> Built:
    return Task(stack(3), _distilled, adam(3e-3)), classes(150)


@scenario("sigmoid before binary cross entropy without logits", 150)
def sigmoid_once() -> Built:
    return Task(nn.Sequential(stack(3), nn.Sigmoid()), functional.binary_cross_entropy, adam(3e-3)), _one_hot(150)
