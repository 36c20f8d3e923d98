"""Mistakes around a network: parameters that nobody steps, gradients that nobody clears, probabilities for logits."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import lightning_gradhealth as gh
from lightning_gradhealth import HealthReport, HealthSession, Severity
from lightning_gradhealth.rules import Rule, default_rules
from lightning_gradhealth.signals.ending import Ending

Loss = Callable[[nn.Module, Tensor], Tensor]


def square(net: nn.Module, x: Tensor) -> Tensor:
    return (net(x) - x[:, :1]).square().mean()


def train(
    net: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    loss: Loss = square,
    steps: int = 60,
    give_loss: bool = True,
    clear: Callable[[torch.optim.Optimizer, int], None] = lambda optimizer, step: optimizer.zero_grad(),
    every: int = 1,
) -> HealthReport:
    """A plain loop with a session; `every` micro-batches a step."""
    generator = torch.Generator().manual_seed(0)
    optimizer = optimizer or torch.optim.Adam(net.parameters(), lr=1e-3)
    session = HealthSession(net, probe_every_n_steps=10, announce=lambda line: None)
    for step in range(steps * every):
        clear(optimizer, step)
        value = loss(net, torch.randn(16, 8, generator=generator)) / every
        value.backward()
        if step % every == every - 1:
            session.apply(session.observe(optimizer, value if give_loss else None))
            optimizer.step()
    session.flush()
    report = session.report()
    session.close()
    return report


def found(report: HealthReport, condition: str) -> Any:
    return next((finding for finding in report.findings if finding.condition == condition), None)


def layers() -> list[nn.Module]:
    return [nn.Linear(8, 8), nn.Linear(8, 8)]


class Using(nn.Module):
    """Runs what `make` gives, which it keeps as it is, before a head of its own."""

    def __init__(self, kept: Any, run: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.kept, self.run, self.head = kept, run, nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.run(self.kept, x)))


def one_after_the_other(parts: Any, x: Tensor) -> Tensor:
    for part in parts:
        x = torch.tanh(part(x))
    return x


def closure() -> Callable[[Tensor], Tensor]:
    layer = nn.Linear(8, 8)
    return lambda x: layer(2 * x)


HIDDEN: dict[str, Callable[[], nn.Module]] = {
    "list": lambda: Using(layers(), one_after_the_other),
    "tuple": lambda: Using(tuple(layers()), one_after_the_other),
    "dict": lambda: Using(
        dict(zip("ab", layers(), strict=True)), lambda kept, x: one_after_the_other(kept.values(), x)
    ),
    "list in a dict": lambda: Using({"blocks": layers()}, lambda kept, x: one_after_the_other(kept["blocks"], x)),
    "object": lambda: Using(types.SimpleNamespace(inner=nn.Linear(8, 8)), lambda kept, x: kept.inner(x)),
    "closure": lambda: Using(closure(), lambda kept, x: kept(x)),
    "list of parameters": lambda: Using([nn.Parameter(torch.eye(8))], lambda kept, x: x @ kept[0]),
    "plain tensor": lambda: Using(torch.eye(8, requires_grad=True), lambda kept, x: x @ kept),
}


@pytest.mark.parametrize("give_loss", [True, False])
@pytest.mark.parametrize("make", HIDDEN.values(), ids=HIDDEN)
def test_layers_that_the_model_does_not_hold_are_found_and_named(make: Any, give_loss: bool) -> None:
    finding = found(train(make(), give_loss=give_loss), "not_in_optimizer")
    assert finding.severity is Severity.WARNING
    assert "ModuleList" in finding.remedy
    assert all(name.startswith("kept") for name in finding.evidence["parameters"])


def test_the_code_puts_them_where_they_belong() -> None:
    model = Using(layers(), one_after_the_other)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    code = found(train(model, optimizer), "not_in_optimizer").code
    exec(code, {"model": model, "optimizer": optimizer, "torch": torch})
    assert train(model, optimizer).healthy
    assert isinstance(model.kept, nn.ModuleList)


def frozen(parts: list[nn.Module]) -> list[nn.Module]:
    for part in parts:
        part.requires_grad_(False)
    return parts


def in_evaluation(parts: list[nn.Module]) -> list[nn.Module]:
    return [part.eval() for part in parts]


@pytest.mark.parametrize("keep", [frozen, in_evaluation, nn.ModuleList])
def test_what_is_frozen_in_evaluation_or_held_is_no_warning(keep: Any) -> None:
    assert train(Using(keep(layers()), one_after_the_other)).healthy


def test_a_list_that_the_optimizer_has_been_given_is_fine() -> None:
    net = Using(layers(), one_after_the_other)
    parameters = [*net.parameters(), *(p for layer in net.kept for p in layer.parameters())]
    assert not train(net, torch.optim.SGD(parameters, lr=1e-2)).findings


def test_a_list_that_somebody_else_steps_is_fine() -> None:
    net = Using(layers(), one_after_the_other)
    own = torch.optim.SGD([p for layer in net.kept for p in layer.parameters()], lr=1e-2)

    def clear(optimizer: torch.optim.Optimizer, step: int) -> None:
        own.step()
        own.zero_grad()
        optimizer.zero_grad()

    assert not train(net, clear=clear).findings


def test_inputs_that_want_a_gradient_are_no_parameters() -> None:
    def loss(net: nn.Module, x: Tensor) -> Tensor:
        return square(net, x.requires_grad_())

    assert not train(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1)), loss=loss).findings


def test_a_network_outside_that_the_loss_goes_through_is_an_info_at_most() -> None:
    judge = nn.Linear(1, 4)
    report = train(nn.Linear(8, 1), loss=lambda net, x: judge(net(x)).square().mean())
    assert found(report, "not_in_optimizer").severity is Severity.INFO
    assert report.healthy


class Growing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "first"):
            self.first = nn.Linear(8, 8)
        return self.head(torch.tanh(self.first(x)))


def test_layers_made_after_the_optimizer_are_found_and_the_code_gives_them_to_it() -> None:
    model = Growing()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    finding = found(train(model, optimizer), "not_in_optimizer")
    assert (finding.severity, finding.layers) == (Severity.WARNING, ("first",))
    assert "after the optimizer" in finding.summary
    exec(finding.code, {"model": model, "optimizer": optimizer})
    assert not train(model, optimizer).findings


@pytest.mark.parametrize("whole", [False, True])
def test_parameters_replaced_after_the_optimizer_was_made_are_found(whole: bool) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    for place in (0, 2) if whole else (2,):
        model[place] = nn.Linear(8, 8 if place == 0 else 1)
    finding = found(train(model, optimizer), "not_in_optimizer")
    assert finding.severity is Severity.WARNING
    assert finding.layers == (("0", "2") if whole else ("2",))
    assert "optimizer" in finding.summary
    assert finding.evidence["replaced"]


def test_a_head_that_is_trained_alone_is_an_info() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
    report = train(net, torch.optim.Adam(net[2].parameters()))
    assert found(report, "not_in_optimizer").severity is Severity.INFO
    assert report.healthy


def test_several_optimizers_that_take_turns_leave_nothing_out() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
    session = HealthSession(net, probe_every_n_steps=5, announce=lambda line: None)
    optimizers = [torch.optim.Adam(layer.parameters()) for layer in (net[0], net[2])]
    for step in range(80):
        optimizer = optimizers[step % 8 == 7]
        net.zero_grad()
        square(net, torch.randn(16, 8)).backward()
        session.apply(session.observe(optimizer))
        optimizer.step()
    assert not found(session.report(), "not_in_optimizer")


# --- gradients that are not cleared --------------------------------------------------------------------------


def tanh_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))


def never(optimizer: torch.optim.Optimizer, step: int) -> None:
    pass


def only_the_scheduler_is_called(optimizer: torch.optim.Optimizer, step: int) -> None:
    optimizer.param_groups[0]["lr"] *= 0.999


def cleared_once(optimizer: torch.optim.Optimizer, step: int) -> None:
    if step == 0:
        optimizer.zero_grad()


@pytest.mark.parametrize("clear", [never, only_the_scheduler_is_called, cleared_once])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_forgotten_zero_grad_is_said_so(clear: Any, kind: Any) -> None:
    net = tanh_net()
    finding = found(train(net, kind(net.parameters(), lr=1e-3), clear=clear), "exploding_gradients")
    assert "accumulate" in finding.summary
    assert finding.code == "optimizer.zero_grad()"
    assert finding.evidence["carried_over"] > 0.1


def zeros(optimizer: torch.optim.Optimizer, step: int) -> None:
    optimizer.zero_grad(set_to_none=False)


def every_fourth(optimizer: torch.optim.Optimizer, step: int) -> None:
    if step % 4 == 0:
        optimizer.zero_grad(set_to_none=False)


@pytest.mark.parametrize(("clear", "every"), [(zeros, 1), (every_fourth, 4)])
def test_cleared_gradients_and_accumulation_are_silent(clear: Any, every: int) -> None:
    assert not train(tanh_net(), clear=clear, every=every).findings


def test_a_pass_for_adversarial_inputs_before_the_clearing_is_silent() -> None:
    net = tanh_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-2)

    def loss(net: nn.Module, x: Tensor) -> Tensor:
        x.requires_grad_()
        square(net, x).backward()
        optimizer.zero_grad()
        return square(net, (x + 0.01 * x.grad.sign()).detach())

    assert not train(net, optimizer, loss=loss, clear=never).findings


# --- logits ----------------------------------------------------------------------------------------------------


def classes(x: Tensor) -> Tensor:
    return x[:, :4].argmax(1)


SQUASHED: dict[str, Loss] = {
    "softmax": lambda net, x: functional.cross_entropy(net(x).softmax(-1), classes(x)),
    "softmax in double": lambda net, x: functional.cross_entropy(net(x).double().softmax(1), classes(x)),
    "softmax over a sequence": lambda net, x: functional.cross_entropy(
        net(x).view(2, 8, 4).softmax(-1).transpose(1, 2), classes(x).view(2, 8)
    ),
    "softmax, soft targets": lambda net, x: functional.cross_entropy(net(x).softmax(-1), x[:, :4].softmax(-1)),
    "sigmoid": lambda net, x: functional.cross_entropy(net(x).sigmoid(), classes(x)),
    "binary": lambda net, x: functional.binary_cross_entropy_with_logits(net(x).sigmoid(), (x[:, :4] > 0).float()),
}


@pytest.mark.parametrize("loss", SQUASHED.values(), ids=SQUASHED)
def test_squashed_logits_are_found_with_the_least_loss(loss: Loss) -> None:
    net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    finding = found(train(net, loss=loss), "squashed_logits")
    assert (finding.severity, finding.layers) == (Severity.WARNING, ("2",))
    floor = finding.evidence["least_loss"]
    best = torch.eye(4)  # no output between 0 and 1 does better
    reached = functional.cross_entropy(best, torch.arange(4)).item()
    assert floor == pytest.approx(reached if finding.evidence["classes"] == 4 else 0.3133, abs=1e-3)


NOT_SQUASHED: dict[str, Loss] = {
    "log of probabilities": lambda net, x: functional.nll_loss(net(x).softmax(-1).log(), classes(x)),
    "log softmax twice": lambda net, x: functional.cross_entropy(net(x).log_softmax(-1), classes(x)),
    "distillation": lambda net, x: functional.kl_div(net(x).log_softmax(-1), net(x).softmax(-1), reduction="batchmean"),
    "mixture of experts": lambda net, x: functional.cross_entropy(net(x) * net(x).softmax(-1), classes(x)),
    "attention": lambda net, x: functional.cross_entropy(
        functional.scaled_dot_product_attention(net(x)[None], net(x)[None], net(x)[None])[0], classes(x)
    ),
    "scaled sigmoid": lambda net, x: functional.cross_entropy(8 * net(x).sigmoid(), classes(x)),
    "binary on probabilities": lambda net, x: functional.binary_cross_entropy(net(x).sigmoid(), (x[:, :4] > 0).float()),
}


@pytest.mark.parametrize("loss", NOT_SQUASHED.values(), ids=NOT_SQUASHED)
def test_what_only_looks_like_it_is_silent(loss: Loss) -> None:
    ending = Ending()
    ending.look([loss(nn.Linear(8, 4), torch.randn(16, 8))], {})
    assert not ending.squashed


def test_the_rules_know_what_they_say_in_every_state() -> None:
    rules: dict[str, Rule] = {type(rule).__name__: rule for rule in default_rules(gh.Thresholds())}
    assert {"NotInOptimizer", "CarriedOver", "SquashedOnce"} <= rules.keys()
    for rule in rules.values():
        rule.load_state_dict(rule.state_dict())
