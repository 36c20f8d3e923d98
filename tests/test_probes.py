"""Probes in the life of a training: steps without a backward pass, further calls, failures, threads, dtypes."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from conftest import Classifier, batches, mlp, trainer
from signal_twin import array, opened, read, rms
from test_signal_sessions import Keep, hooks_of
from test_signals import Uses, lin
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_gradhealth import GradHealth, HealthReport, HealthSession, diagnose
from lightning_gradhealth.signals import SIGNALS, TEMPORAL, SignalProbe, recurrent
from lightning_gradhealth.signals.ranks import united
from lightning_gradhealth.signals.reading import Site, Spec
from lightning_gradhealth.signals.sums import Sums
from lightning_gradhealth.signals.survey import Survey

# --- steps to which nothing comes back ---


def half_dead() -> nn.Sequential:
    """A net whose second layer has 60 of 64 dead units."""
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
    model[2].bias.data[:60] = -50.0
    return model


def loss_of(model: nn.Module, samples: int = 16) -> Tensor:
    return model(torch.randn(samples, 8)).square().mean()


def penalty(model: nn.Module) -> Tensor:
    return torch.stack([p.square().sum() for p in model.parameters()]).sum()


def by_hand(model: nn.Module) -> None:
    loss_of(model)
    for parameter in model.parameters():
        parameter.grad = 0.01 * torch.randn_like(parameter)


def into_grad(model: nn.Module) -> None:
    parameters = list(model.parameters())
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss_of(model), parameters), strict=True):
        parameter.grad = gradient


def fails(model: nn.Module) -> None:
    with contextlib.suppress(KeyError):
        loss_of(model)
        raise KeyError("a batch without a label")


BLANK: dict[str, Callable[[nn.Module], Any]] = {
    "no backward pass": loss_of,
    "an exception": fails,
    "nothing is called": lambda model: None,
    "a loss that ignores the output": lambda model: (
        model(torch.randn(16, 8)).detach().sum() + penalty(model)
    ).backward(),
    "gradients set by hand": by_hand,
    "torch.autograd.grad": into_grad,
    "no gradients wanted": torch.no_grad()(loss_of),
}


def run(
    model: nn.Module, step: Callable[[int], Any], steps: int = 40, **options: Any
) -> tuple[HealthSession, HealthReport]:
    """A plain loop with flushes."""
    options = {"probe_every_n_steps": 10, **options}
    optimizer, session = torch.optim.SGD(model.parameters(), lr=0.01), HealthSession(model, **options)
    for number in range(steps):
        optimizer.zero_grad()
        step(number)
        session.apply(session.observe(optimizer))
        optimizer.step()
        if number % 10 == 9:
            session.flush()
    session.close()
    return session, session.report()


@pytest.mark.parametrize("at", [(0,), (1, 2), (0, 1, 2, 4, 8), (9,), (19, 29)])
@pytest.mark.parametrize("how", BLANK)
def test_a_step_to_which_nothing_comes_back_ends_no_measuring(how: str, at: tuple[int, ...]) -> None:
    model, keep = half_dead(), Keep()
    _, report = run(
        model, lambda number: BLANK[how](model) if number in at else loss_of(model).backward(), rules=[keep]
    )
    assert report.unwatched == ()
    assert not any("Error" in note or "depth" in note for note in report.notes)
    assert [finding.layers for finding in report.findings if finding.condition == "dead_units"] == [("2",)]
    chains = {step: [point.name for point in chain.points] for step, r in keep.records.items() for chain in r.chains}
    assert all(names == ["0", "2", "4"] for names in chains.values())
    assert 39 in chains


@pytest.mark.parametrize("how", BLANK)
def test_a_net_to_which_nothing_ever_comes_back_is_watched_as_far_as_can_be(how: str) -> None:
    model = half_dead()
    _, report = run(model, lambda number: BLANK[how](model))
    assert report.unwatched == ()
    assert not any("Error" in note for note in report.notes)
    dead = [finding.layers for finding in report.findings if finding.condition == "dead_units"]
    assert dead == ([] if how in ("nothing is called", "no gradients wanted") else [("2",)])


def test_such_a_step_is_made_up_for_at_the_next_one() -> None:
    model, hooked = mlp(), []

    def step(number: int) -> None:
        loss = loss_of(model, 256)
        hooked.append(hooks_of(model) > 0)
        if number not in (19, 29, 30):
            loss.backward()

    run(model, step)
    assert [number for number, there in enumerate(hooked) if there] == [0, 1, 2, 4, 8, 9, 16, 19, 20, 29, 30, 32, 39]


def test_frozen_bodies_and_models_in_evaluation_are_not_probed_again_and_again() -> None:
    body = mlp(outputs=1).requires_grad_(False)
    model, hooked = Uses(lambda n, x: n.a(x) * n.b.weight, a=body, b=nn.Linear(1, 1, bias=False)), []

    def step(number: int) -> None:
        loss = loss_of(model, 256)
        hooked.append(hooks_of(model) > 0)
        loss.backward()

    _, report = run(model, step)
    assert sum(hooked) == 11
    assert report.unwatched == ()


@pytest.mark.parametrize("none_at", [(0,), (7,), (0, 1, 2, 4, 8, 9)])
def test_training_steps_that_return_none(none_at: tuple[int, ...]) -> None:
    class Skips(Classifier):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx in none_at else loss

    net = half_dead()
    net[4] = nn.Linear(64, 3)
    health = GradHealth()
    trainer(health, max_steps=50, log_every_n_steps=10).fit(Skips(net), batches(samples=400))
    report = health.report()
    assert report.unwatched == ()
    assert "dead_units" in report.conditions


class Penalised(pl.LightningModule):
    """A generator in manual optimization that is called once more after its own step."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.net = half_dead()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        optimizer = self.optimizers()
        for loss in (
            lambda: self.net(batch[0]).square().mean(),
            lambda: self.net(batch[0]).detach().mean() + penalty(self.net),
        ):
            optimizer.zero_grad()
            self.manual_backward(loss())
            optimizer.step()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-4)


def test_every_second_step_without_a_signal() -> None:
    health = GradHealth()
    trainer(health, max_steps=60, log_every_n_steps=10).fit(Penalised(), batches(samples=480))
    report = health.report()
    assert report.unwatched == ()
    assert "dead_units" in report.conditions
    assert not any("depth" in note for note in report.notes)


def test_ranks_agree_on_the_first_probe_that_has_a_chain() -> None:
    sites = (Site("a", "a"), Site("b", "b"))
    first, other = Spec(sites[1:]), Spec(sites, chain=(0, 1))
    both = united([first, other])
    assert ([site.name for site in both.sites], both.chain) == (["a", "b"], (0, 1))
    assert united([first, Spec()]).chain == ()


def test_ranks_that_began_with_a_blank_step_have_a_chain_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_gradhealth.sharding.gather_objects", lambda spec: [spec])
    monkeypatch.setattr("lightning_gradhealth.sharding.sum_over_ranks", lambda vector: vector)
    model = mlp()
    probe = SignalProbe(model)
    probe.across_ranks = True
    probe.open()
    chains = []
    for backward in (False, True, False, True):
        loss = loss_of(model)
        if backward:
            loss.backward()
        reading = probe.close()
        assert reading is not None
        chains.append(len(reading.spec.chain))
    assert chains == [0, 4, 4, 4]  # all ranks add up the same from then on


# --- modules that are called more than once ---


def euler(net: Any, x: Tensor) -> Tensor:
    for _ in range(4):
        x = x + 0.25 * net.f(x)
    return x


def looped(net: Any, x: Tensor) -> Tensor:
    for _ in range(3):
        x = net.g(torch.tanh(x))
    return x


def there_and_back(net: Any, x: Tensor) -> Tensor:
    return net.g(net.f(net.g(x)))


SHARED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "on its own output": lambda net, x: net.f(net.f(x)),
    "as a differential equation": euler,
    "a stack of views": lambda net, x: torch.stack([h := net.f(x), net.f(h)]),
    "two views": lambda net, x: net.f(x) - net.f(x.flip(0)).detach() + net.f(2 * x),
    "a layer in a loop": looped,
    "the first layer is the last": there_and_back,
    "three views of a pair": lambda net, x: (net.g(net.f(x)) * net.g(net.f(-x))).sum() + net.g(net.f(x + 1)).sum(),
}


@pytest.mark.parametrize("how", SHARED)
def test_modules_that_are_called_again_are_measured(how: str) -> None:
    model = Uses(SHARED[how], f=nn.Sequential(lin(4, 8), nn.Tanh(), lin(8, 4)), g=lin(4, 4))
    outputs: dict[str, list[Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda m, args, out, name=name: outputs.setdefault(name, []).append(out))
    with opened(model) as probe:
        loss = model(torch.randn(16, 4)).square().mean()
        calls = [out for outs in outputs.values() for out in outs]
        truth = iter(torch.autograd.grad(loss, calls, retain_graph=True, allow_unused=True))
        loss.backward()
    signals = read(probe)
    assert signals.spec.chain
    assert {site.name for site in signals.spec.sites if site.name == site.owner} == set(outputs)
    numbers = {site.name: number for number, site in enumerate(signals.spec.sites)}
    for name, outs in outputs.items():
        back = [array(gradient) for _ in outs if (gradient := next(truth)) is not None]
        assert signals.forward_rms[numbers[name]] == pytest.approx(rms([array(out) for out in outs])), name
        assert signals.backward_rms[numbers[name]] == pytest.approx(rms(back)), name


@pytest.mark.parametrize("how", SHARED)
def test_a_preflight_of_such_nets_has_a_verdict(how: str) -> None:
    model = Uses(SHARED[how], f=nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4)), g=nn.Linear(4, 4))
    report = diagnose(model, (torch.randn(16, 4), torch.zeros(())), lambda out, y: (out - y).square().mean())
    assert report.verdict == "healthy"
    assert not any("not measured" in note for note in report.notes)


# --- failures of our own ---


def breaks(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, at: Callable[[int], bool], error: Exception
) -> list[int]:
    """Let a function fail at some of its calls; gives the list that counts them."""
    calls, real = [0], getattr(owner, name)

    def broken(*args: Any, **options: Any) -> Any:
        calls[0] += 1
        if at(calls[0] - 1):
            raise error
        return real(*args, **options)

    monkeypatch.setattr(owner, name, broken)
    return calls


class Mute(Exception):
    """Its text cannot be had."""

    def __str__(self) -> str:
        raise ValueError("no text")


PLACES = [(Survey, "look"), (Sums, "forward"), (Sums, "matrix")]


@pytest.mark.parametrize("error", [RuntimeError("first line\nsecond line"), Mute(), KeyError("a\x1b[31mb")])
@pytest.mark.parametrize(("owner", "name"), PLACES, ids=lambda place: getattr(place, "__name__", place))
def test_one_failure_costs_one_probe(
    owner: Any, name: str, error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = half_dead()
    breaks(monkeypatch, owner, name, lambda call: call == 0, error)
    with caplog.at_level(logging.WARNING, "lightning_gradhealth"):
        _, report = run(model, lambda number: loss_of(model).backward())
    assert report.unwatched == ()
    (note,) = (note for note in report.notes if "not measured" in note)
    assert note.startswith(f"{SIGNALS}: not measured at 1 of the probed steps, first at step 0")
    assert "dead_units" in report.conditions
    told = [record.getMessage() for record in caplog.records if SIGNALS in record.getMessage()]
    assert len(told) == 1
    assert type(error).__name__ in told[0]
    assert not any(character in told[0] for character in "\n\x1b")


@pytest.mark.parametrize(
    ("owner", "name"), [*PLACES, (Sums, "backward")], ids=lambda place: getattr(place, "__name__", place)
)
def test_failures_in_a_row_end_the_measuring_and_the_report_says_so(
    owner: Any, name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, hooks = mlp(outputs=1), []
    started = [False]
    breaks(monkeypatch, owner, name, lambda call: started[0], RuntimeError("out of order"))

    def step(number: int) -> None:
        started[0] = number >= 8
        loss = loss_of(model, 256)
        hooks.append(hooks_of(model))
        loss.backward()

    with caplog.at_level(logging.WARNING, "lightning_gradhealth"):
        session, report = run(model, step)
    assert report.unwatched == (f"{SIGNALS}, since step 8 (RuntimeError: out of order)",)
    assert not report.healthy
    assert sum(SIGNALS in record.getMessage() for record in caplog.records) == 1
    assert [number for number, there in enumerate(hooks) if there] == [0, 1, 2, 4, 8, 9, 16]
    resumed = HealthSession(model, probe_every_n_steps=10)
    resumed.load_state_dict(session.state_dict())
    loss_of(model, 256)
    assert hooks_of(model) == 4  # those of the order of the layers
    assert resumed.report().unwatched == report.unwatched
    resumed.close()


def test_a_run_that_ends_with_a_failure_is_not_called_healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp(outputs=1)
    breaks(monkeypatch, Survey, "look", lambda call: call == 1, RuntimeError("late"))
    _, report = run(model, lambda number: loss_of(model, 256).backward(), steps=2)
    assert report.unwatched == (f"{SIGNALS}, since step 1 (RuntimeError: late)",)
    assert not report.healthy


def test_a_failure_in_the_backward_pass_does_not_reach_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def gradients(watched: bool) -> list[Tensor | None]:
        torch.manual_seed(1)
        model = mlp(outputs=1)
        session = HealthSession(model) if watched else None
        loss_of(model).backward()
        if session is not None:
            session.observe(torch.optim.SGD(model.parameters(), lr=0.1))
            assert "RuntimeError: back" in session.signals.failure
        return [parameter.grad for parameter in model.parameters()]

    breaks(monkeypatch, Sums, "backward", lambda call: True, RuntimeError("back"))
    assert all(torch.equal(*pair) for pair in zip(gradients(False), gradients(True), strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["outer_flow", "flow_norms"])
def test_time_that_cannot_be_measured_leaves_the_signals(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_gradhealth.signals import activations

    assert getattr(activations, name) is getattr(recurrent, name)
    breaks(monkeypatch, activations, name, lambda call: True, RuntimeError("no time"))
    model = Uses(lambda n, x: n.b(n.a(x)[0][:, -1]), a=nn.RNN(8, 4, batch_first=True), b=nn.Linear(4, 1))
    temporal = name == "flow_norms"
    _, report = run(model, lambda number: model(torch.randn(16, 12, 8)).square().mean().backward(), temporal=temporal)
    assert all(layer.backward_rms for layer in report.layers)
    assert report.unwatched == (f"{TEMPORAL}, since step 0 (RuntimeError: no time)",)


# --- which backward passes count ---


def saliency(net: Any, x: Tensor, create: bool) -> Tensor:
    x = x.clone().requires_grad_()
    out = net(x)
    torch.autograd.grad(out.square().sum(), x, retain_graph=True, create_graph=create)
    return out.square().mean()


def gradient_penalty(net: Any, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    out = net(x)
    (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    return out.square().mean() + (slope.norm(dim=1) - 1).square().mean()


def balanced(net: Any, x: Tensor) -> Tensor:
    """As GradNorm: the norms of the gradients of two losses at a shared weight."""
    out = net(x)
    losses = [out[:, 0].square().mean(), out[:, 1].abs().mean()]
    sizes = [torch.autograd.grad(loss, net[2].weight, retain_graph=True)[0].norm() for loss in losses]
    return losses[0] * sizes[1] + losses[1] * sizes[0]


def influence(net: Any, x: Tensor) -> Tensor:
    """Of every parameter, without a graph."""
    loss = net(x).square().mean()
    torch.autograd.grad(loss, list(net.parameters()), retain_graph=True)
    return loss


def at_an_activation(net: Any, x: Tensor) -> Tensor:
    h = net[1](net[0](x))
    out = net[2](h)
    torch.autograd.grad(out.exp().sum(), h, retain_graph=True)
    return out.square().mean()


def inner_loop(net: Any, x: Tensor) -> Tensor:
    """As MAML: a step on one batch, of which the loss of another is made."""
    weights = dict(net.named_parameters())
    loss = torch.func.functional_call(net, weights, (x,)).square().mean()
    inner = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
    moved = {name: weight - 0.1 * g for (name, weight), g in zip(weights.items(), inner, strict=True)}
    return torch.func.functional_call(net, moved, (x + 1,)).square().mean()


ON_THE_WAY: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "nothing": lambda net, x: net(x).square().mean(),
    "saliency": lambda net, x: saliency(net, x, False),
    "saliency with a graph": lambda net, x: saliency(net, x, True),
    "gradient penalty": gradient_penalty,
    "balanced losses": balanced,
    "influence": influence,
    "at an activation": at_an_activation,
    "inner loop": inner_loop,
}
BACK: dict[str, Callable[[Tensor, nn.Module], None]] = {
    "backward": lambda loss, net: loss.backward(),
    "of some parameters": lambda loss, net: loss.backward(inputs=[net[0].weight]),  # type: ignore[index]
    "in two parts": lambda loss, net: [(loss / 2).backward(retain_graph=True), (loss / 2).backward()][0],
}


@pytest.mark.parametrize("back", BACK)
@pytest.mark.parametrize("how", ON_THE_WAY)
def test_only_what_accumulates_counts(how: str, back: str) -> None:
    torch.manual_seed(3)
    net, x = nn.Sequential(lin(4, 8), nn.Tanh(), lin(8, 2)).double(), torch.randn(16, 4, dtype=torch.float64)
    outputs: dict[str, list[Tensor]] = {"0": [], "2": []}
    for name, outs in outputs.items():
        net[int(name)].register_forward_hook(lambda m, args, out, outs=outs: outs.append(out))
    with opened(net) as probe:
        loss = ON_THE_WAY[how](net, x)
        truth = torch.autograd.grad(loss, [*outputs["0"], *outputs["2"]], retain_graph=True)
        BACK[back](loss, net)
    signals = read(probe)
    gradients, parts = iter(truth), 2 if back == "in two parts" else 1
    for number, name in enumerate(outputs):
        expected = rms([array(next(gradients)) for _ in outputs[name]])
        assert signals.backward_rms[number] == pytest.approx(expected / parts, rel=1e-9), name  # type: ignore[operator]


@pytest.mark.filterwarnings("ignore:Using backward:UserWarning")
def test_a_backward_pass_that_keeps_its_graph_counts() -> None:
    net = nn.Sequential(lin(4, 8), nn.Tanh(), lin(8, 2))
    with opened(net) as probe:
        net(torch.randn(16, 4)).square().mean().backward(create_graph=True)  # as second-order optimizers do
    assert all(value for value in read(probe).backward_rms)
    net.zero_grad()


def test_forces_within_the_forward_pass_do_not_count() -> None:
    """Energies whose gradient by the positions is what is learned."""

    def forces(net: Any, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        energy = net.b(torch.tanh(net.a(x))).sum()
        return torch.autograd.grad(energy, x, create_graph=True)[0]

    model = Uses(forces, a=lin(4, 8), b=lin(8, 1))
    outputs: list[Tensor] = []
    model.a.register_forward_hook(lambda m, args, out: outputs.append(out))
    with opened(model) as probe:
        loss = model(torch.randn(16, 4)).square().mean()
        (truth,) = torch.autograd.grad(loss, outputs, retain_graph=True)
        loss.backward()
    assert read(probe).backward_rms[0] == pytest.approx(rms([array(truth)]), rel=1e-6)


def keep_gradients(module: nn.Module, kept: list[Tensor]) -> None:
    """Keep every gradient of what a module puts out."""

    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        output.register_hook(kept.append)  # type: ignore[no-untyped-call]

    module.register_forward_hook(hook)


def test_accumulation_goes_on_being_summed() -> None:
    net, kept = nn.Sequential(lin(4, 8), nn.ReLU(), lin(8, 2)), []
    keep_gradients(net[0], kept)
    with opened(net) as probe:
        for scale in (1.0, 3.0, 0.5):
            (scale * net(torch.randn(16, 4)).square().mean()).backward()
    assert len(kept) == 3
    assert read(probe).backward_rms[0] == pytest.approx(rms([array(gradient) for gradient in kept]))


# --- odd gradients and dtypes ---


class Table(nn.Module):
    """Gives its weights as an output."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 4))

    def forward(self) -> Tensor:
        return self.weight * 1.0


SPARSE: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "embedding": lambda n, x: n.b(x + F.embedding(torch.arange(len(x)) % 5, n.a(), sparse=True)),
    "bag": lambda n, x: n.b(x + F.embedding_bag(torch.arange(2 * len(x)).view(-1, 2) % 5, n.a(), sparse=True)),
    "gather": lambda n, x: n.b(
        x + torch.gather(n.a(), 0, (torch.arange(len(x)) % 5)[:, None].expand(-1, 4), sparse_grad=True)
    ),
}


@pytest.mark.parametrize("how", SPARSE)
def test_sparse_gradients_of_outputs_are_measured(how: str) -> None:
    model, kept = Uses(SPARSE[how], a=Table(), b=lin()), []
    keep_gradients(model.a, kept)
    with opened(model) as probe:
        model(torch.randn(8, 4)).square().mean().backward()
    assert kept[0].is_sparse
    assert read(probe).backward_rms[0] == pytest.approx(rms([array(kept[0].to_dense())]))


class Words(nn.Module):
    """Embeddings before a body of any dtype, and complex weights if asked."""

    def __init__(self, table: torch.dtype, body: torch.dtype, sparse: bool, middle: torch.dtype | None) -> None:
        super().__init__()
        self.table = nn.Embedding(40, 8, sparse=sparse, dtype=table)
        self.middle = None if middle is None else nn.Parameter(torch.randn(8, 8, dtype=middle))
        self.body = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1)).to(body)

    def forward(self, words: Tensor) -> Tensor:
        h = self.table(words).mean(1)
        if self.middle is not None:
            h = (h.to(self.middle.dtype) @ self.middle).abs()
        return self.body(h.to(self.body[0].weight.dtype))


HALF, SINGLE, DOUBLE = torch.bfloat16, torch.float32, torch.float64
MIXES: list[tuple[torch.dtype, torch.dtype, bool, torch.dtype | None]] = [
    (DOUBLE, DOUBLE, False, None),
    (DOUBLE, DOUBLE, True, None),
    (DOUBLE, SINGLE, False, None),
    (SINGLE, DOUBLE, True, None),
    (HALF, DOUBLE, False, None),
    (HALF, SINGLE, True, None),
    (torch.float16, SINGLE, False, None),
    (DOUBLE, DOUBLE, False, torch.complex128),
    (SINGLE, SINGLE, False, torch.complex64),
]


@pytest.mark.parametrize(("table", "body", "sparse", "middle"), MIXES)
def test_mixed_dtypes(table: torch.dtype, body: torch.dtype, sparse: bool, middle: torch.dtype | None) -> None:
    model = Words(table, body, sparse, middle)

    def step(number: int) -> None:
        model(torch.randint(0, 40, (256, 5))).float().square().mean().backward()

    _, report = run(model, step, steps=6, clip="adaptive")
    assert report.unwatched == ()
    assert all(layer.grad_norm and layer.update_to_weight is not None for layer in report.layers)
    assert all(layer.forward_rms for layer in report.layers if layer.name in ("table", "body.0", "body.2"))


# --- threads ---


def in_thread(work: Callable[[], Any]) -> Any:
    """What a function gives that is run in a thread of its own."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    thread.join()
    assert found
    return found[0]


def everywhere(kind: str, model: nn.Module) -> HealthReport:
    """A loop of which some parts run in other threads."""
    make = lambda: HealthSession(model, probe_every_n_steps=10, on_non_finite="skip")  # noqa: E731
    session = in_thread(make) if kind in ("session", "both") else make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def train() -> HealthReport:
        for _ in range(20):
            optimizer.zero_grad()
            (in_thread(lambda: loss_of(model)) if kind == "calls" else loss_of(model)).backward()
            session.apply(session.observe(optimizer))
            optimizer.step()
        session.flush()
        session.close()
        return session.report()

    return in_thread(train) if kind in ("loop", "both") else train()


@pytest.mark.parametrize("kind", ["session", "loop", "both", "calls"])
def test_whatever_the_thread_the_model_is_measured(kind: str) -> None:
    report = everywhere(kind, half_dead())
    assert "dead_units" in report.conditions
    assert all(layer.backward_rms is not None for layer in report.layers)
    assert not any("thread" in note or "not measured" in note for note in report.notes)


class Parallel(nn.Module):
    """Calls a net with the halves of a batch, in a thread each, as replicas of it or as it is."""

    def __init__(self, replicas: bool) -> None:
        super().__init__()
        self.net = half_dead()
        self.replicas = replicas

    def forward(self, x: Tensor) -> Tensor:
        nets = [self.net._replicate_for_data_parallel() if self.replicas else self.net for _ in range(2)]
        for net in nets:
            if self.replicas:
                for index, child in enumerate(self.net):
                    replica = child._replicate_for_data_parallel()
                    replica.__dict__.update(child._parameters)
                    net._modules[str(index)] = replica
        return torch.cat([in_thread(lambda net=net, part=part: net(part)) for net, part in zip(nets, x.chunk(2))])  # noqa: B905


@pytest.mark.parametrize("replicas", [False, True])
def test_what_several_threads_call_is_said(replicas: bool) -> None:
    model = Parallel(replicas)
    _, report = run(model, lambda number: loss_of(model).backward())
    assert report.unwatched == ()
    assert any(("copies" if replicas else "several threads") in note for note in report.notes)


def test_a_fit_in_a_thread() -> None:
    net = half_dead()
    net[4] = nn.Linear(64, 3)
    health = GradHealth()
    in_thread(lambda: trainer(health, max_steps=40, log_every_n_steps=10).fit(Classifier(net), batches(samples=320)))
    report = health.report()
    assert "dead_units" in report.conditions
    assert report.unwatched == ()


def test_evaluation_in_another_thread_is_none_of_it() -> None:
    model = half_dead()

    def step(number: int) -> None:
        loss = loss_of(model)
        in_thread(lambda: torch.no_grad()(loss_of)(model))
        loss.backward()

    _, report = run(model, step)
    assert not any("thread" in note for note in report.notes)


# --- when ---


@pytest.mark.parametrize(
    ("every", "expected"),
    [(50, [0, 1, 2, 4, 8, 16, 32, 49]), (7, [0, 1, 2, 4, 6, 8, 13, 16, 20, 27, 32, 34, 41, 48]), (1, list(range(50)))],
)
def test_probed_steps_follow_from_the_count_alone(every: int, expected: list[int]) -> None:
    model, keep = mlp(outputs=1), Keep()
    run(model, lambda number: loss_of(model, 256).backward(), steps=50, probe_every_n_steps=every, rules=[keep])
    probed = [step for step, record in keep.records.items() if any(la.update_to_weight for la in record.layers)]
    assert sorted(probed) == expected
    assert [step for step in sorted(keep.records) if keep.records[step].chains] == expected


@pytest.mark.parametrize("at", [2, 4, 16])
def test_a_leap_in_the_first_steps_is_found(at: int) -> None:
    model = mlp(outputs=1)

    def step(number: int) -> None:
        (loss_of(model) * (1e5 if number == at else 1.0)).backward()

    _, report = run(model, step, probe_every_n_steps=50)
    found = {finding.condition: finding for finding in report.findings}["oversized_updates"]
    assert found.first_step == at
    assert "smaller learning rate" in found.remedy


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """No test leaves a thread behind."""
    before = threading.active_count()
    yield
    assert threading.active_count() == before
