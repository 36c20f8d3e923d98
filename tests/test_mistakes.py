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
    assert "optimizer.zero_grad()" in finding.code
    assert finding.evidence["carried_over"] > 0.1


def test_of_two_optimizers_the_one_that_is_not_cleared_is_named() -> None:
    one, other = tanh_net(), tanh_net()
    optimizers = [torch.optim.SGD(net.parameters(), lr=1e-2) for net in (one, other)]
    session = HealthSession(nn.ModuleDict({"one": one, "other": other}), probe_every_n_steps=10)
    for _ in range(60):
        optimizers[0].zero_grad()
        for net, optimizer in zip((one, other), optimizers, strict=True):
            loss = square(net, torch.randn(16, 8))
            loss.backward()
            session.apply(session.observe(optimizer, loss))
            optimizer.step()
    finding = found(session.report(), "exploding_gradients")
    assert "accumulate" in finding.summary
    assert finding.layers == ("other.0", "other.2")


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


@pytest.mark.parametrize(("loss", "squashed"), [(SQUASHED["softmax"], True), (NOT_SQUASHED["scaled sigmoid"], False)])
def test_diagnose_finds_squashed_logits(loss: Loss, squashed: bool) -> None:
    net, x = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)), torch.randn(32, 8)
    report = gh.diagnose(net, (x, x), lambda output, x: loss(lambda _: output, x))  # type: ignore[arg-type,return-value]
    finding = found(report, "squashed_logits")
    assert (finding is not None) is squashed
    assert not squashed or finding.layers == ("2",)


def test_the_rules_know_what_they_say_in_every_state() -> None:
    rules: dict[str, Rule] = {type(rule).__name__: rule for rule in default_rules(gh.Thresholds())}
    assert {"NotInOptimizer", "CarriedOver", "SquashedOnce"} <= rules.keys()
    for rule in rules.values():
        rule.load_state_dict(rule.state_dict())


# --- the calls of a cell as an axis of time --------------------------------------------------------------------


class Cell(nn.Module):
    """An LSTM's cell by hand, of raw parameters."""

    def __init__(self, std: float) -> None:
        super().__init__()
        self.read, self.back = nn.Parameter(std * torch.randn(64, 8)), nn.Parameter(std * torch.randn(64, 16))

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        h, c = state
        i, f, g, o = (x @ self.read.t() + h @ self.back.t()).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c


class Composed(nn.Module):
    """A plain cell made of two layers."""

    def __init__(self, std: float) -> None:
        super().__init__()
        self.read, self.back = nn.Linear(8, 16), nn.Linear(16, 16)
        nn.init.normal_(self.back.weight, std=std)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        h = functional.leaky_relu(self.read(x) + self.back(state[0]), 0.9)
        return h, state[1]


class Tied(nn.Module):
    """One layer, again and again, as in nets with tied depth."""

    def __init__(self, std: float) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)
        nn.init.normal_(self.layer.weight, std=std)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return self.layer(state[0] + functional.pad(x, (0, 8))), state[1]


class Unrolled(nn.Module):
    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell, self.head = cell, nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        state = torch.zeros(len(x), 16), torch.zeros(len(x), 16)
        for step in range(40):
            state = self.cell(x.roll(step, 1), state)
        return self.head(state[0])


@pytest.mark.parametrize(("make", "std", "name"), [(Cell, 4.0, "cell"), (Composed, 0.5, "back"), (Tied, 0.5, "layer")])
def test_gradients_that_explode_over_the_calls_of_a_cell_are_found(make: Any, std: float, name: str) -> None:
    torch.manual_seed(0)
    report = gh.diagnose(Unrolled(make(std)), (torch.randn(32, 8), torch.zeros(32, 1)), functional.mse_loss)
    finding = found(report, "exploding_gradients")
    assert any(name in layer for layer in finding.layers)
    assert "time" in finding.summary


@pytest.mark.parametrize(("make", "std"), [(Cell, 0.25), (Composed, 0.25), (Tied, 0.2)])
def test_cells_of_a_sensible_size_are_healthy(make: Any, std: float) -> None:
    torch.manual_seed(0)
    report = gh.diagnose(Unrolled(make(std)), (torch.randn(32, 8), torch.zeros(32, 1)), functional.mse_loss)
    assert not report.conditions


def test_a_module_that_is_called_often_side_by_side_has_no_axis_of_time() -> None:
    class Siamese(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([100.0**number * self.layer(x) for number in range(10)]).sum(0)

    assert not gh.diagnose(Siamese(), (torch.randn(32, 8), torch.zeros(32, 1)), functional.mse_loss).temporal


# --- inputs, one layer, loss scale ------------------------------------------------------------------------------


def diagnosed(net: nn.Module, x: Tensor) -> Any:
    return gh.diagnose(net, (x, torch.zeros(len(x), 1)), functional.mse_loss)


@pytest.mark.parametrize(("shift", "size"), [(12_000.0, 3_000.0), (0.0, 5_000.0), (-2e6, 1.0)])
def test_inputs_that_nobody_has_scaled_are_found_with_the_figure(shift: float, size: float) -> None:
    torch.manual_seed(0)
    x = shift + size * torch.randn(64, 8)
    finding = found(diagnosed(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1)), x), "exploding_activations")
    assert finding.evidence["input_rms"] == pytest.approx(x.square().mean().sqrt().item(), rel=1e-3)
    assert "normalise the inputs" in finding.remedy


def tokens() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Embedding(50_000, 8), nn.Flatten(), nn.Linear(24, 1)), torch.randint(50_000, (64, 3))


def normalised() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1)), 12_000 + torch.randn(64, 8)


def pixels() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1)), 255 * torch.rand(64, 8)


@pytest.mark.parametrize("make", [tokens, normalised, pixels])
def test_indices_normalised_inputs_and_pixels_are_no_large_inputs(make: Any) -> None:
    assert not diagnosed(*make()).conditions


def deep(place: int | None, size: float, norm: bool = False) -> nn.Module:
    torch.manual_seed(0)
    parts: list[nn.Module] = []
    for number in range(8):
        layer = nn.Linear(8 if number == 0 else 32, 32)
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        if number == place:
            layer.weight.data.mul_(size)
        parts += [layer, *([nn.LayerNorm(32)] if norm else []), nn.ReLU()]
    return nn.Sequential(*parts, nn.Linear(32, 1))


@pytest.mark.parametrize("place", [2, 4, 6])
def test_one_layer_that_swallows_the_signal_is_named_and_the_code_mends_it(place: int) -> None:
    model = deep(place, 1e-5)
    finding = found(train(model, torch.optim.SGD(model.parameters(), lr=1e-3)), "vanishing_gradients")
    assert finding.layers == (str(2 * place),)
    assert 2e-6 < finding.evidence["weight_rms"] < 1e-3  # a first step may have gone by
    assert finding.evidence["neighbours_rms"] == pytest.approx(0.25, rel=0.2)
    exec(finding.code, {"model": model})
    assert not train(model, torch.optim.SGD(model.parameters(), lr=1e-3)).conditions


class Audio(nn.Sequential):
    def __init__(self, size: float) -> None:
        torch.manual_seed(0)
        convs = [nn.Conv1d(4 if number == 0 else 16, 16, 5, padding=2) for number in range(6)]
        for conv in convs:
            nn.init.kaiming_normal_(conv.weight)
        convs[3].weight.data.mul_(size)
        head = nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(16, 1)
        super().__init__(*(part for conv in convs for part in (conv, nn.SiLU())), *head)


@pytest.mark.parametrize(
    ("make", "x", "name"),
    [
        (lambda size: deep(4, size), torch.randn(64, 8), "8"),
        (lambda size: deep(2, size), torch.randn(64, 8), "4"),
        (Audio, torch.randn(32, 4, 32), "6"),
    ],
)
@pytest.mark.parametrize("with_loss", [True, False])
def test_diagnose_names_the_layer_that_swallows_the_signal(make: Any, x: Tensor, name: str, with_loss: bool) -> None:
    loss = functional.mse_loss if with_loss else None
    batch = (x, torch.ones(len(x), 1)) if with_loss else x
    finding = found(gh.diagnose(make(1e-5), batch, loss), "vanishing_gradients")
    assert finding.layers == (name,)
    assert finding.evidence["weight_rms"] < 1e-4 * finding.evidence["neighbours_rms"]
    assert not found(gh.diagnose(make(1.0), batch, loss), "vanishing_gradients")


@pytest.mark.parametrize(("place", "size", "norm"), [(None, 1.0, False), (4, 1e-5, True), (4, 0.1, False)])
def test_a_norm_behind_it_or_a_moderate_size_is_no_swallowing(place: int | None, size: float, norm: bool) -> None:
    model = deep(place, size, norm)
    assert not train(model, torch.optim.SGD(model.parameters(), lr=1e-3)).conditions


def clipped_under_a_scaler(
    order: str, scale: float, limit: float, kind: Any, rate: float, net: nn.Module | None = None
) -> HealthReport:
    """`order` names what happens to the gradients: u(nscaled), c(lipped by norm), v (by value), o(bserved)."""
    net = net or tanh_net()
    optimizer = kind(net.parameters(), lr=rate)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    session = HealthSession(net, probe_every_n_steps=10, announce=lambda line: None)
    generator = torch.Generator().manual_seed(0)
    for _ in range(80):
        optimizer.zero_grad()
        loss = square(net, torch.randn(16, 8, generator=generator))
        scaler.scale(loss).backward()
        for what in order:
            if what == "u":
                scaler.unscale_(optimizer)
            elif what == "c":
                torch.nn.utils.clip_grad_norm_(net.parameters(), limit)
            elif what == "v":
                torch.nn.utils.clip_grad_value_(net.parameters(), limit)
            else:
                session.apply(session.observe(optimizer, loss, grad_scaler=scaler))
        scaler.step(optimizer)
        scaler.update()
    session.flush()
    return session.report()


SGD, ADAM = torch.optim.SGD, torch.optim.Adam


@pytest.mark.parametrize(
    ("order", "scale", "limit", "kind", "rate", "severity"),
    [
        ("co", 2.0**16, 1.0, SGD, 1e-2, Severity.WARNING),
        ("oc", 2.0**16, 0.5, SGD, 1e-2, Severity.WARNING),  # only what the optimizer is given tells
        ("cuo", 2.0**16, 1.0, SGD, 1e-2, Severity.WARNING),
        ("cuo", 2.0**12, 0.1, SGD, 1e-2, Severity.WARNING),
        ("ouc", 2.0**16, 1.0, SGD, 1e-2, None),
        ("uoc", 2.0**16, 0.01, SGD, 1e-2, None),
        ("uco", 2.0**16, 0.01, SGD, 1e-2, None),  # the limit, at every step
        ("uco", 2.0**10, 0.1, ADAM, 1e-3, None),
        ("co", 2.0**16, 1.0, ADAM, 1e-3, Severity.INFO),  # its steps are as large all the same
    ],
)
def test_clipping_before_unscale_is_said_so(
    order: str, scale: float, limit: float, kind: Any, rate: float, severity: Severity | None
) -> None:
    finding = found(clipped_under_a_scaler(order, scale, limit, kind, rate), "stalled_layers")
    if severity is None:
        assert finding is None
    else:
        assert finding.severity is severity
        assert f"loss scale {scale:g}" in finding.summary
        assert "unscale_" in finding.remedy
        assert finding.evidence["norm_with_scale"] == pytest.approx(limit, rel=1e-3)


def relu_net(norm: bool, width: int = 32) -> nn.Module:
    torch.manual_seed(1)
    layers = [nn.Linear(8 if number == 0 else width, width) for number in range(4)]
    norms = [nn.BatchNorm1d(width) if norm else nn.Identity() for _ in layers]
    parts = (part for layer, scale in zip(layers, norms, strict=True) for part in (layer, scale, nn.ReLU()))
    return nn.Sequential(*parts, nn.Linear(width, 1))


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(
    ("order", "limit", "rate", "sick"),
    [
        ("vo", 1.0, 1e-3, True),
        ("vo", 0.1, 1e-2, True),
        ("ov", 1.0, 1e-3, True),
        ("vuo", 1.0, 1e-3, True),
        ("ouv", 1.0, 1e-2, False),
        ("uvo", 0.01, 1e-2, False),
        ("uo", 1.0, 1e-2, False),
        ("uo", 1.0, 1e-5, False),  # slow, and nobody clips
    ],
)
def test_clipping_by_value_before_unscale_is_said_so(
    order: str, limit: float, rate: float, sick: bool, norm: bool
) -> None:
    report = clipped_under_a_scaler(order, 2.0**16, limit, SGD, rate, relu_net(norm))
    told = [f for f in report.findings if f.severity is not Severity.INFO and "loss scale" in f.summary]
    assert bool(told) is sick
    if told:
        assert "clip_grad_value_" in told[0].remedy
        assert told[0].evidence["loss_scale"] == 2.0**16


def test_layers_unfrozen_later_and_never_given_to_the_optimizer_are_a_mistake() -> None:
    def run(thaw: bool) -> gh.HealthReport:
        torch.manual_seed(0)
        net = tanh_net()
        for parameter in net[0].parameters():
            parameter.requires_grad_(False)
        optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=1e-2)
        session = gh.HealthSession(net, probe_every_n_steps=10)
        for step in range(80):
            if thaw and step == 20:
                net[0].requires_grad_(True)
            optimizer.zero_grad()
            x = torch.randn(16, 8)
            loss = (net(x) - x.sum(1, keepdim=True)).square().mean()
            loss.backward()
            session.apply(session.observe(optimizer, loss))
            optimizer.step()
        session.flush()
        return session.report()

    finding = found(run(thaw=True), "not_in_optimizer")
    assert (finding.severity, finding.layers) == ("warning", ("0",))
    assert "were frozen at the start" in finding.summary
    assert "add_param_group" in finding.code
    assert run(thaw=False).healthy


def test_inputs_that_saturate_the_first_layer_are_named_before_its_weights() -> None:
    def finding(size: float) -> gh.Finding:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
        net[0].weight.data.mul_(100.0 / size)
        return found(diagnosed(net, size * torch.randn(300, 8)), "saturated_units")

    raw, weights = finding(100.0), finding(1.0)
    assert "the network reads inputs of size" in raw.remedy
    assert "smaller weights before it" in weights.remedy
    net, x = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1)), 100.0 * torch.randn(300, 8)
    before = net[:2](x).abs().mean()
    exec(raw.code, {"model": net})
    assert net[:2](x).abs().mean() < 0.6 * before


class Variational(nn.Module):
    """An autoencoder whose log-variance is bounded, or not, before exp()."""

    def __init__(self, *, bounded: bool) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(20, 64), nn.ReLU())
        self.mean, self.log_variance = nn.Linear(64, 8), nn.Linear(64, 8)
        self.decoder = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 20))
        self.bounded = bounded

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.encoder(x)
        mean, log_variance = self.mean(hidden), self.log_variance(hidden)
        if self.bounded:
            log_variance = log_variance.clamp(-8, 4)
        return self.decoder(mean + (0.5 * log_variance).exp() * torch.randn_like(mean))


@pytest.mark.parametrize(("size", "bounded"), [(400.0, False), (400.0, True), (1.0, False), (1.0, True)])
def test_an_exp_that_leaps_is_found_before_the_first_step(size: float, bounded: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 20)
    x[:, 3] *= size
    report = gh.diagnose(Variational(bounded=bounded), (x, x), functional.mse_loss)
    sick = size > 1.0 and not bounded
    assert bool({"exploding_activations", "exploding_gradients"} & {str(c) for c in report.conditions}) == sick
    if sick:
        finding = found(report, "exploding_activations")
        assert finding.layers == ("decoder.0",)
        assert "exp()" in finding.remedy


@pytest.mark.parametrize("dead", [40, 60])
@pytest.mark.parametrize("without", [None, 7])
def test_a_layer_of_which_a_tenth_is_left_is_a_warning_though_the_net_learns(dead: int, without: int | None) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
    net[2].bias.data[:dead] = -50.0
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    session = gh.HealthSession(net, probe_every_n_steps=10)
    first = last = 0.0
    for step in range(150):
        x = torch.randn(32, 16)
        loss = (net(x) - x.sum(1, keepdim=True)).square().mean()
        first, last = first or loss.item(), loss.item()
        if step == without:
            continue  # a forward pass to which no gradient comes back
        optimizer.zero_grad()
        loss.backward()
        session.apply(session.observe(optimizer, loss))
        optimizer.step()
    session.flush()
    finding = found(session.report(), "dead_units")
    assert last < 0.5 * first
    assert finding.severity == ("warning" if dead == 60 else "info")
