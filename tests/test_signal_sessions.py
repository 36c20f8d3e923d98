"""The probe in sessions and fits: whatever the model does, without a trace, compiled modules, state."""

from __future__ import annotations

import contextlib
import copy
import gc
import math
import weakref
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import signal_twin
import torch
from conftest import Classifier, batches, mlp, trainer
from lightning.pytorch.plugins import MixedPrecision
from signal_twin import Twin, opened, read
from test_resume import same
from test_signals import Lambda, Uses, lin, with_every_fate
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lightning_gradhealth import GradHealth, HealthSession, Rule, StepRecord
from lightning_gradhealth.signals.reading import INPUT
from lightning_gradhealth.signals.survey import Survey

# --- sessions and fits ---


class Keep(Rule):
    """Keeps every record; sessions share it instead of copying it."""

    condition = "keep"

    def __init__(self) -> None:
        super().__init__()
        self.records: dict[int, StepRecord] = {}

    def __deepcopy__(self, memo: Any) -> Keep:
        return self

    def check(self, record: StepRecord) -> None:
        self.records[record.step] = record


def assert_record(record: StepRecord, twin: Twin, only: set[str] | None = None) -> None:
    """The layers of a record say what the twin says, which then forgets it."""
    layers = {layer.name: layer for layer in record.layers}
    for name in only or set(twin.outputs):
        layer, outputs, back = layers[name], twin.outputs[name], twin.gradients.get(name, [])
        assert layer.forward_rms == signal_twin.approx(signal_twin.rms(outputs), 1e-6), name
        assert layer.backward_rms == signal_twin.approx(signal_twin.rms(back), 1e-6), name
    twin.outputs.clear()
    for kept in twin.gradients.values():
        kept.clear()


class Fitted(pl.Callback):
    """Compares every record with the twin's at the end of each batch."""

    def __init__(self, keep: Keep) -> None:
        self.keep, self.compared = keep, 0

    def on_train_batch_start(self, trainer: Any, module: pl.LightningModule, *_: Any) -> None:
        if not hasattr(self, "twin"):
            self.twin = Twin(module)

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
        for step in sorted(set(self.keep.records) - {-1}):
            self.compare(self.keep.records.pop(step))
            self.compared += 1

    def compare(self, record: StepRecord) -> None:
        assert_record(record, self.twin)


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-mixed", "fp16"])
def test_in_a_fit(precision: str, accumulate: int) -> None:
    keep, model = Keep(), Classifier(nn.Sequential(lin(8, 16), nn.BatchNorm1d(16), nn.ReLU(), lin(16, 3)))
    seen = Fitted(keep)
    options: dict[str, Any] = {"precision": precision}
    if precision == "fp16":
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        options = {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}

        def compare(record: StepRecord) -> None:  # the twin has seen scaled gradients
            scale = 2.0 ** (10 + record.step // 2)
            seen.twin.gradients = {n: [g / scale for g in calls] for n, calls in seen.twin.gradients.items()}
            assert_record(record, seen.twin)
            seen.twin.close()
            seen.twin = Twin(model)

        seen.compare = compare  # type: ignore[method-assign]
    health = GradHealth(probe_every_n_steps=1, rules=[keep])
    trainer(
        health, seen, max_steps=5, log_every_n_steps=1, accumulate_grad_batches=accumulate, max_epochs=9, **options
    ).fit(model, batches(samples=8 * 15))
    assert seen.compared == 5
    assert not health.report().aside


class Adversaries(pl.LightningModule):
    """A generator and a discriminator in turn; the discriminator sees two batches."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 4))
        self.critic = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        self.twin: Twin | None = None
        self.found: list[dict[str, tuple[Any, Any]]] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        first, second = self.optimizers()
        z = torch.randn(len(batch[0]), 2)
        for optimizer, loss in (
            (first, lambda: self.critic(self.generator(z).detach()).mean() - self.critic(batch[0][:, :4]).mean()),
            (second, lambda: -self.critic(self.generator(z)).mean()),
        ):
            optimizer.zero_grad()
            self.manual_backward(loss())
            self.take()
            optimizer.step()

    def take(self) -> None:
        if self.twin is not None:
            twin = self.twin
            numbers = {n: (signal_twin.rms(o), signal_twin.rms(twin.gradients[n])) for n, o in twin.outputs.items()}
            self.found.append(numbers)
            twin.close()
            self.twin = Twin(self)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        rates = {"lr": 0.01}
        return [
            torch.optim.SGD(self.critic.parameters(), **rates),
            torch.optim.SGD(self.generator.parameters(), **rates),
        ]


def test_each_optimizer_has_what_its_own_step_has_seen() -> None:
    model, keep = Adversaries(), Keep()
    model.twin = Twin(model)
    health = GradHealth(probe_every_n_steps=1, rules=[keep])
    trainer(health, max_steps=8, log_every_n_steps=1).fit(model, batches())
    assert len(model.found) == 8
    records = [record for _, record in sorted(keep.records.items())]
    assert len(records) == 4
    for record, of_critic, of_generator in zip(records, model.found[::2], model.found[1::2], strict=True):
        assert {chain.optimizer for chain in record.chains} == {0, 1}
        (chain,) = (chain for chain in record.chains if chain.optimizer == 1)
        assert [point.name for point in chain.points] == ["generator.0", "generator.2", "critic.0", "critic.2"]
        for layer in record.layers:
            forward, backward = (of_critic if layer.name.startswith("critic") else of_generator)[layer.name]
            assert layer.forward_rms == signal_twin.approx(forward, 1e-6)
            assert layer.backward_rms == signal_twin.approx(backward, 1e-6)


def test_an_optimizer_that_never_steps_is_not_waited_for() -> None:
    model, idle = nn.Sequential(lin(), lin()), nn.Linear(1, 1)
    session = HealthSession(nn.ModuleList([model, idle]), probe_every_n_steps=10)
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.01) for net in (model, idle)]
    for optimizer in optimizers:
        session.monitor.index_of(optimizer)
    hooked = []
    for _ in range(20):
        model(torch.randn(8, 4)).sum().backward()
        hooked.append(session.signals.is_open)
        session.apply(session.observe(optimizers[0]))
        optimizers[0].step()
    assert [step for step, there in enumerate(hooked) if there] == [0, 1, 2, 4, 8, 9, 16, 19]


@pytest.mark.parametrize("mode", ["warn", "skip"])
def test_what_is_run_again_does_not_count(mode: str) -> None:
    model, keep = nn.Sequential(lin(), nn.Tanh(), lin()), Keep()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    session = HealthSession(model, on_non_finite=mode, probe_every_n_steps=1, rules=[keep], announce=lambda line: None)  # type: ignore[arg-type]
    for step in range(3):
        twin = Twin(model)
        optimizer.zero_grad()
        model(torch.full((8, 4), math.nan) if step == 1 else torch.randn(8, 4)).sum().backward()
        decision = session.observe(optimizer)
        twin.on = False
        session.apply(decision)
        optimizer.step()
        session.flush()
        twin.close()
        if step != 2 or mode == "skip":  # else the weights are NaN
            assert_record(keep.records[step], twin)
        spoilt = {1: INPUT, 2: "0" if mode == "warn" else ""}
        assert keep.records[step].first_non_finite == spoilt.get(step, "")


# --- whatever the model does ---


def padded(net: Any, x: Tensor) -> Tensor:
    net.a.eval()
    padding = torch.zeros(x.shape[:2], dtype=torch.bool)
    padding[:, 4:] = True
    with torch.no_grad():
        h = net.a(x, src_key_padding_mask=padding)  # nested tensors inside
    return net.b(h)


def of_every_sample(net: Any, x: Tensor) -> Tensor:
    parameters = dict(net.a.named_parameters())

    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        return torch.func.functional_call(net.a, parameters, (sample,)).square().sum()

    torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    return net.b(net.a(x))


def fails_first(net: Any, x: Tensor) -> Tensor:
    for given in (x[:, :3], x[:, :2]):
        with contextlib.suppress(RuntimeError):
            net.a(given)
    return net.b(net.a(x))


ODD: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "nested tensors": (
        lambda: Uses(
            padded, a=nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 2), b=lin()
        ),
        (3, 6, 4),
    ),
    "a gradient of every sample": (lambda: Uses(of_every_sample, a=nn.Sequential(lin(), nn.ReLU()), b=lin()), (8, 4)),
    "fails at first": (lambda: Uses(fails_first, a=nn.Sequential(lin(), nn.Tanh(), lin()), b=lin()), (8, 4)),
    "complex numbers": (lambda: Uses(lambda n, x: n.b(torch.fft.fft(n.a(x)).real), a=lin(), b=lin()), (8, 4)),
    "sparse": (
        lambda: Uses(lambda n, x: n.b(torch.sparse.mm(x.relu().to_sparse(), n.a.weight)), a=lin(), b=lin()),
        (8, 4),
    ),
    "nothing in the batch": (lambda: nn.Sequential(lin(), nn.ReLU(), lin()), (0, 4)),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(4), nn.ReLU(), nn.LazyLinear(2)), (8, 4)),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("name", ODD)
def test_nothing_fails_and_training_is_the_same(name: str) -> None:
    make, shape = ODD[name]
    model, x = make(), torch.randn(shape)
    model(x)  # lazy modules
    copied = copy.deepcopy(model)
    torch.manual_seed(3)
    copied(x).sum().backward()
    torch.manual_seed(3)
    with opened(model) as probe:
        model(x).sum().backward()
    probe.close()
    assert not probe.failure
    for (key, one), other in zip(copied.named_parameters(), model.parameters(), strict=True):
        assert same(one.grad, other.grad), key


def test_a_failure_is_told_in_one_line_and_ends_the_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("first line\nsecond line")

    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    session = HealthSession(model)
    monkeypatch.setattr(Survey, "look", fails)
    for _ in range(3):
        model(torch.randn(4, 8)).sum().backward()
        session.apply(session.observe(optimizer))
        optimizer.step()
    session.flush()
    report = session.report()
    assert any("RuntimeError: first line" in what for what in report.unwatched)
    assert not report.healthy
    assert hooks_of(model) <= 1  # the gate


def test_a_probe_on_fake_tensors_reads_nothing() -> None:
    layers = {
        "a": nn.Embedding(50, 16),
        "b": nn.Linear(16, 3000),
        "c": nn.LayerNorm(3000),
        "d": nn.Linear(3000, 16),
        "e": nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True),
        "f": nn.LSTM(16, 4, batch_first=True),
        "g": nn.Linear(4, 2),
    }

    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.d(m.c(m.b(m.a(x)).clamp(min=0.0)).sigmoid())
        h = h + F.hardtanh(m.e(F.softsign(h)))
        return m.g(F.relu6(m.f(h)[0]))

    with FakeTensorMode(allow_non_fake_inputs=True):
        model = Uses(forward, **layers)
        for module in model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(torch.empty(parameter.shape)))
        with opened(model) as probe:
            for _ in range(2):
                out = model(torch.zeros(9, 40, dtype=torch.long))
                out.square().sum().backward()
        reading = probe.close(scale=torch.ones(()))
        assert not probe.failure
        assert reading is not None
        assert len(reading.spec.activations) >= 3
        with pytest.raises(DataDependentOutputException):
            reading.vector[0].item()  # a read does raise here


# --- no trace ---


def hooks_of(model: nn.Module) -> int:
    """Number of hooks on all modules."""
    places = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, place)) for module in model.modules() for place in places)


class Operations(TorchDispatchMode):
    """Counts operations, by whether they allocate or not: all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_other_steps_cost_nothing() -> None:
    def operations(watched: bool) -> tuple[list[int], list[int]]:
        torch.manual_seed(0)
        model = mlp(8)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        session = HealthSession(model, probe_every_n_steps=5) if watched else None
        counts, hooks = [], []
        for _ in range(10):
            with Operations() as counted:
                optimizer.zero_grad()
                loss = model(torch.randn(256, 8)).square().mean()  # samples enough for the units
                hooks.append(hooks_of(model))
                loss.backward()
            counts.append(counted.count)
            if session is not None:
                session.apply(session.observe(optimizer))
            optimizer.step()
        return counts, hooks

    bare, _ = operations(False)
    watched, hooks = operations(True)
    probed = [step for step in range(10) if watched[step] > bare[step]]
    assert probed == [0, 1, 2, 4, 8, 9]
    assert [step for step in range(10) if hooks[step]] == probed


def test_closed_sessions_leave_no_hook() -> None:
    model = mlp()
    for options in ({}, {"probe_every_n_steps": 1}, {"on_non_finite": "skip"}):
        session = HealthSession(model, **options)
        model(torch.randn(2, 8)).sum().backward()
        session.close()
        assert hooks_of(model) == 0


class Breaks(Classifier):
    """Fails in the third step."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if self.global_step == 2:
            raise KeyError("a fault of the user's")
        return loss


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("model", [Classifier, Breaks])
def test_fits_leave_no_hook_and_no_stance(model: type[Classifier], compiled: bool) -> None:
    from torch._dynamo.eval_frame import _stance

    module, before = model(), _stance.stance
    run = trainer(GradHealth(probe_every_n_steps=1, probe_compiled=compiled), max_steps=4)
    with pytest.raises(KeyError) if model is Breaks else contextlib.nullcontext():
        run.fit(module, batches())
    assert hooks_of(module) == 0
    assert torch._dynamo.eval_frame._stance.stance == before


def test_evaluation_between_steps_is_that_of_the_bare_model() -> None:
    def evaluated(watched: bool) -> list[Tensor]:
        torch.manual_seed(4)
        encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), 2)
        model = nn.Sequential(encoder, nn.Linear(8, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        session = HealthSession(model, probe_every_n_steps=1) if watched else None
        found = []
        for _ in range(3):
            model.train()
            optimizer.zero_grad()
            model(torch.randn(4, 5, 8)).sum().backward()
            if session is not None:
                session.apply(session.observe(optimizer))
            optimizer.step()
            model.eval()
            with torch.no_grad():
                found.append(model(torch.randn(4, 5, 8)))
        if session is not None:
            assert len(read_forward(session)) == 2 * 5 + 1  # of out_proj only the weight is used
        return found

    assert same(evaluated(False), evaluated(True))


def read_forward(session: HealthSession) -> list[float]:
    return [layer.forward_rms for layer in session.flush().layers if layer.forward_rms is not None]


class Token:
    """Something that can be watched, kept in a node's metadata."""


@pytest.mark.parametrize("how", ["with backward", "without backward", "two passes"])
def test_nothing_outlives_its_step(how: str) -> None:
    model, alive = nn.Sequential(lin(), nn.Tanh(), lin(), nn.ReLU(), lin()), []

    def watch(module: nn.Module, given: Any, output: Tensor) -> None:
        alive.append(weakref.ref(output))
        assert output.grad_fn is not None
        output.grad_fn.metadata["token"] = token = Token()
        alive.append(weakref.ref(token))

    for module in model:
        module.register_forward_hook(watch)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    session = HealthSession(model, probe_every_n_steps=1)
    for _ in range(3):
        for _ in range(2 if how == "two passes" else 1):
            loss = model(torch.randn(8, 4)).sum()
            if how != "without backward":
                loss.backward()
        session.apply(session.observe(optimizer))
        optimizer.step()
        del loss
        gc.collect()
        assert len(alive) >= 10
        assert not any(reference() is not None for reference in alive)


def test_passes_without_a_step_do_not_pile_up() -> None:
    model, alive = nn.Sequential(lin(), nn.Tanh(), lin()), []

    def watch(module: nn.Module, given: Any, output: Tensor) -> None:
        assert output.grad_fn is not None
        output.grad_fn.metadata["token"] = token = Token()
        alive.append(weakref.ref(token))

    model[0].register_forward_hook(watch)
    session = HealthSession(model)
    for _ in range(200):
        model(torch.randn(2, 4))
    gc.collect()
    assert sum(reference() is not None for reference in alive) <= 16
    assert not session.signals.failure


class Noisy(Classifier):
    """Dropout, batch norm and a checkpointed part, with a teacher in evaluation mode; keeps its losses."""

    def __init__(self) -> None:
        part = nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.2), nn.ReLU(inplace=True), nn.Linear(16, 16))
        super().__init__(
            nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), Lambda(self.checkpointed), nn.Linear(16, 3))
        )
        self.part = part
        encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.teacher = nn.TransformerEncoder(encoder, 2).requires_grad_(False)
        self.losses: list[Tensor] = []

    def checkpointed(self, x: Tensor) -> Tensor:
        return checkpoint(self.part, x, use_reentrant=False)

    def forward(self, x: Tensor) -> Tensor:
        self.teacher.eval()
        with torch.no_grad():
            y = self.teacher(x.unsqueeze(1)).squeeze(1)
        return self.net(torch.cat([x, y], -1))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.losses.append(super().training_step(batch, batch_idx))
        return self.losses[-1]

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.losses.append(nn.functional.cross_entropy(self(batch[0]), batch[1]))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_probed_at_every_step_a_fit_is_the_same_bit_for_bit(accumulate: int) -> None:
    def fitted(*callbacks: pl.Callback) -> tuple[dict[str, Tensor], list[Tensor], Tensor]:
        torch.manual_seed(2)
        model = Noisy()
        run = trainer(
            *callbacks, max_steps=12, log_every_n_steps=2, accumulate_grad_batches=accumulate, val_check_interval=3
        )
        run.fit(model, batches(), batches(samples=16))
        return model.state_dict(), model.losses, torch.get_rng_state()

    health = GradHealth(probe_every_n_steps=1)
    weights, losses, random = fitted()
    weights_seen, losses_seen, random_seen = fitted(health)
    assert {layer.name for layer in health.report().layers if layer.forward_rms} >= {"part.0", "part.3", "net.0"}
    assert same(losses, losses_seen)
    assert len(losses) > 12
    assert all(torch.equal(weights[name], weights_seen[name]) for name in weights)
    assert torch.equal(random, random_seen)


@pytest.mark.parametrize("how", ["two optimizers", "reentrant checkpoints", "recurrent"])
def test_other_makes_are_the_same_bit_for_bit(how: str) -> None:
    def net() -> nn.Module:
        part = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.3), nn.ReLU(inplace=True))
        if how == "recurrent":
            cells = {"a": nn.LSTM(2, 8, 2, batch_first=True, dropout=0.3), "b": nn.Linear(8, 3)}
            return Uses(lambda n, x: n.b(n.a(x.unflatten(1, (4, 2)))[0][:, -1]), **cells)
        used: dict[str, nn.Module] = {"a": nn.Linear(8, 8), "b": part, "c": nn.Linear(8, 3)}
        return Uses(lambda n, x: n.c(checkpoint(n.b, n.a(x), use_reentrant=True)), **used)

    def fitted(*callbacks: pl.Callback) -> tuple[dict[str, Tensor], Tensor]:
        torch.manual_seed(2)
        model = Adversaries() if how == "two optimizers" else Classifier(net(), torch.optim.Adam, lr=1e-2)
        trainer(*callbacks, max_steps=16, log_every_n_steps=3).fit(model, batches())
        return model.state_dict(), torch.get_rng_state()

    health = GradHealth(probe_every_n_steps=1)
    (weights, random), (weights_seen, random_seen) = fitted(), fitted(health)
    assert all(torch.equal(weights[name], weights_seen[name]) for name in weights)
    assert torch.equal(random, random_seen)
    assert not health.report().aside
    assert any(layer.forward_rms for layer in health.report().layers)


def test_a_model_can_be_copied_while_it_is_probed(tmp_path: Any) -> None:
    model = nn.Sequential(lin(), nn.ReLU(), lin())
    with opened(model) as probe:
        model(torch.randn(8, 4)).sum().backward()
        copied = copy.deepcopy(model)
        copied(torch.randn(8, 4)).sum().backward()
        torch.save(model, tmp_path / "model.pt")
        torch.load(tmp_path / "model.pt", weights_only=False)(torch.randn(8, 4)).sum().backward()
    signals = read(probe)
    assert sum(signals.histograms[0]) == 32
    assert [round(row) for row in (signals.spec.sites[0].size,)] == [32]


# --- compiled and scripted modules ---


@pytest.mark.filterwarnings("ignore")  # torch's own
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("compiled", [False, True])
def test_compiled_modules(backend: str, compiled: bool) -> None:
    from torch._dynamo.utils import counters

    def fitted(watched: bool) -> tuple[dict[str, Tensor], HealthSession | None]:
        torch._dynamo.reset()
        counters.clear()
        torch.manual_seed(0)
        inner = Uses(lambda n, x: n.b(n.a(x).tanh()), a=nn.Linear(8, 8), b=nn.Linear(8, 8))
        model = nn.Sequential(nn.Linear(8, 8), torch.compile(inner, backend=backend), nn.Linear(8, 3))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        session = HealthSession(model, probe_every_n_steps=4, probe_compiled=compiled) if watched else None
        graphs = []
        for _ in range(10):
            optimizer.zero_grad()
            model(torch.randn(16, 8)).square().mean().backward()
            if session is not None:
                session.apply(session.observe(optimizer))
            optimizer.step()
            graphs.append(counters["stats"]["unique_graphs"])
        if session is not None:
            session.flush()
            session.close()
        assert not counters["graph_break"]
        assert graphs[-1] == 1
        return model.state_dict(), session

    try:
        weights, _ = fitted(False)
    except Exception as error:
        if backend == "inductor" and "ompiler" in str(error):
            pytest.skip("no C++ compiler")
        raise
    weights_seen, session = fitted(True)
    assert session is not None
    report = session.report()
    measured = {layer.name for layer in report.layers if layer.forward_rms is not None}
    told = any("not measured inside" in note for note in report.notes)
    if compiled:
        assert measured == {"0", "1.a", "1.b", "2"}
        assert not told
    else:
        assert measured == {"0", "2"}
        assert told
    if not compiled or backend == "aot_eager":
        assert all(torch.equal(weights[name], weights_seen[name]) for name in weights)


@pytest.mark.filterwarnings("ignore")  # torch's own
def test_a_compiled_function_that_calls_modules_is_left_whole() -> None:
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    inner = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    step = torch.compile(lambda x: inner(x).square(), backend="aot_eager")
    model = Uses(lambda n, x: n.b(step(n.a(x))), a=lin(8, 8), b=lin(8, 2), inner=inner)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    session, graphs = HealthSession(model, probe_every_n_steps=3), []
    for _ in range(24):
        optimizer.zero_grad()
        model(torch.randn(4, 8)).square().mean().backward()
        session.apply(session.observe(optimizer))
        optimizer.step()
        graphs.append(counters["stats"]["unique_graphs"])
    session.flush()
    assert not counters["graph_break"]
    assert graphs[6:] == graphs[6:7] * 18  # with hooks and without them, and not once a probe
    assert {layer.name for layer in session.report().layers if layer.forward_rms} == {"a", "b"}
    assert not session.signals.failure


@pytest.mark.parametrize("make", [torch.jit.script, lambda net: torch.jit.trace(net, torch.randn(8, 4))])
def test_scripted_modules_are_left_alone(make: Callable[[nn.Module], nn.Module]) -> None:
    model = nn.Sequential(lin(), make(nn.Sequential(lin(), nn.ReLU())), lin())
    with opened(model) as probe:
        model(torch.randn(8, 4)).sum().backward()
    assert {site.name for site in read(probe).spec.sites} == {"0", "2"}
    assert probe.hidden == ("1",)


# --- state ---


@pytest.mark.parametrize("cut", [1, 4, 7])
def test_resumed_inside_a_window_it_says_what_the_unbroken_one_says(cut: int, tmp_path: Any) -> None:
    """Windows of units are not full, and readings wait for the flush."""

    def steps(session: HealthSession, model: nn.Module, numbers: range) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        session.monitor.index_of(optimizer)  # as the callback does, so that its gradients are known before its step
        for number in numbers:
            optimizer.zero_grad()
            x = torch.randn(50, 4, generator=torch.Generator().manual_seed(number))
            model(x).square().mean().backward()
            session.apply(session.observe(optimizer))
            optimizer.step()

    def make() -> tuple[HealthSession, nn.Module]:
        torch.manual_seed(1)
        net = nn.Sequential(with_every_fate(nn.Linear(4, 12)), nn.ReLU(), nn.Linear(12, 4), nn.Sigmoid(), lin())
        return HealthSession(net, probe_every_n_steps=1), net

    whole, model = make()
    steps(whole, model, range(11))
    first, model = make()
    steps(first, model, range(cut))
    torch.save({"session": first.state_dict(), "model": model.state_dict()}, tmp_path / "state.pt")
    second, other = make()
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    other.load_state_dict(state["model"])
    second.load_state_dict(state["session"])
    steps(second, other, range(cut, 11))
    assert same(second.state_dict(), whole.state_dict())
    assert second.flush() == whole.flush()
    assert second.report() == whole.report()
    assert any(layer.dead_fraction for layer in whole.report().layers)


@pytest.mark.parametrize("make", [nn.RNNCell, nn.GRUCell])
def test_the_calls_of_a_recurrent_cell_tell_the_gradient_through_time(make: Any) -> None:
    class Unrolled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.head = make(3, 5), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            state = torch.zeros(x.shape[1], 5)
            self.states = []
            for step in x:
                state = self.cell(step, state)
                state.retain_grad()
                self.states.append(state)
            return self.head(state)

    model = Unrolled()
    with opened(model) as probe:
        model(torch.randn(12, 4, 3)).square().sum().backward()
    flow = read(probe).temporal["cell"]
    assert flow.grad_norms == pytest.approx([state.grad.norm().item() for state in model.states], rel=1e-5)
    with opened(model) as probe:
        model(torch.randn(7, 4, 3)).square().sum().backward()
    assert not read(probe).temporal


def test_a_loop_may_call_the_cell_itself() -> None:
    cell, states = nn.RNNCell(3, 5), [torch.zeros(4, 5)]
    with opened(cell) as probe:
        for step in torch.randn(12, 4, 3):
            states.append(cell(step, states[-1]))
            states[-1].retain_grad()
        states[-1].square().sum().backward()
    (flow,) = read(probe).temporal.values()
    assert flow.grad_norms == pytest.approx([state.grad.norm().item() for state in states[1:]], rel=1e-5)


def relu_net() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(*(part for _ in range(6) for part in (nn.Linear(32, 32), nn.ReLU())), nn.Linear(32, 4))
    for layer in net[:-1:2]:
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    return net


def watched(net: nn.Module, at: int, change: Callable[[], None], steps: int = 160) -> HealthSession:
    """Train on noise that has something to learn; at one step something happens."""
    session = HealthSession(net, probe_every_n_steps=5)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    for step in range(steps):
        if step == at:
            change()
        x = torch.randn(64, 32)
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), x[:, :4].argmax(1))
        loss.backward()
        session.apply(session.observe(optimizer, loss))
        optimizer.step()
        if step % 5 == 4:
            session.flush()
    session.close()
    return session


def test_units_whose_output_is_nan_are_not_dead() -> None:
    net = relu_net()
    report = watched(net, 60, lambda: net[0].weight.data.fill_(math.nan)).report()
    assert "non_finite" in report.conditions
    assert "dead_units" not in report.conditions
    assert all((layer.dead_fraction or 0.0) < 0.5 for layer in report.layers)


def test_where_dead_units_block_the_gradient_they_are_the_cause_and_their_cure_the_remedy() -> None:
    net = relu_net()
    report = watched(net, 40, lambda: net[4].bias.data.fill_(-50.0)).report()
    (blocked,) = (finding for finding in report.findings if finding.condition == "vanishing_gradients")
    (dead,) = (finding for finding in report.findings if finding.condition == "dead_units")
    assert blocked.layers == ("0", "2", "4")
    assert blocked.summary.endswith("the signal at 0 is exactly 0: 100 % of the units of 4 are never active")
    assert (blocked.remedy, blocked.code) == (dead.remedy, dead.code)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    exec(blocked.code, {"model": net, "optimizer": optimizer})
    x = torch.randn(64, 32)
    F.cross_entropy(net(x), x[:, :4].argmax(1)).backward()
    assert net[0].weight.grad.abs().max() > 0.0
