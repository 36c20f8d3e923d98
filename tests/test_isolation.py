"""Whatever runs inside `undisturbed`, nothing is left of it: compared bit for bit."""

from __future__ import annotations

import copy
import dataclasses
import io
import itertools
import random
import threading
from collections import Counter, deque
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from conftest import Classifier, batches, mlp, trainer
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.aggregation import CatMetric
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from lightning_gradhealth import diagnose
from lightning_gradhealth.isolation import RandomState, undisturbed


def draws() -> list[float]:
    return [torch.rand(()).item(), random.random(), float(np.random.rand()), torch.randn(3).sum().item()]  # noqa: NPY002


def test_random_state_comes_back() -> None:
    state = RandomState.now()
    first = draws()
    assert draws() != first
    for _ in range(2):  # as often as is wanted
        state.restore()
        assert draws() == first


def test_random_state_takes_devices_and_skips_the_cpu() -> None:
    state = RandomState.now(devices=["cpu"])
    assert state.accelerators == ()
    first = draws()
    state.restore()
    assert draws() == first


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_random_state_of_cuda() -> None:
    torch.rand(1, device="cuda")
    state = RandomState.now()
    first = torch.rand(4, device="cuda")
    state.restore()
    assert torch.equal(torch.rand(4, device="cuda"), first)


class Rich(pl.LightningModule):
    """Has everything that a rerun might disturb."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 3))
        self.mean = MeanMetric()
        self.all = CatMetric()
        self.accuracy = MulticlassAccuracy(3, average="micro")
        self.several = MetricCollection([MulticlassAccuracy(3), MulticlassF1Score(3)])
        self.register_buffer("replaced", torch.zeros(2))
        self.register_buffer("removed", torch.ones(2))
        self.register_buffer("last", None)
        self.count = 0
        self.losses: list[Tensor] = []
        self.notes: dict[str, Any] = {"deep": [torch.zeros(2)], "tags": {"a"}}
        self.recent: deque[int] = deque([1], maxlen=2)
        self.hidden = (torch.zeros(1), torch.zeros(1))
        self.teacher = [mlp()]  # not registered
        self.noise = torch.Generator().manual_seed(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int = 0) -> Tensor:
        x, y = batch
        out = self(x + torch.randn(x.shape, generator=self.noise))
        loss = nn.functional.cross_entropy(out, y)
        self.mean(loss)
        self.mean.compute()
        self.all.update(loss)
        self.accuracy(out, y)
        self.several(out, y)
        self.several.compute()
        self.count += 1
        self.losses.append(loss.detach())
        self.notes["deep"][0] += 1
        self.notes["deep"].append(1)
        self.notes["tags"] |= {"b"}
        self.notes["new"] = 1
        self.recent.append(2)
        self.hidden[0].add_(1)
        self.replaced = torch.ones(2)
        del self.removed
        self.last = torch.ones(1)
        self.register_buffer("added", torch.ones(1))
        self.net[1].running_var.data.mul_(2)
        self.net[3].eval()
        self.teacher[0].eval()
        self.net[0].weight.requires_grad_(False)
        draws()
        self.log("loss", loss)
        self.log_dict({"loss": loss})
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def picture(value: Any, seen: dict[int, Any] | None = None) -> Any:
    """All that a model holds, as copies, together with the identity of every tensor."""
    seen = {} if seen is None else seen
    if isinstance(value, Tensor):
        gradient = None if not value.is_leaf or value.grad is None else (id(value.grad), value.grad.clone())
        return id(value), value.detach().clone(), gradient, value.requires_grad
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, nn.Module):
        if id(value) in seen:
            return id(value)
        seen[id(value)] = value
        return picture(vars(value), seen)
    if isinstance(value, dict):
        return [(str(key), picture(item, seen)) for key, item in value.items()]
    if isinstance(value, (list, tuple, deque)):
        return [picture(item, seen) for item in value]
    return copy.copy(value) if isinstance(value, set) else value if isinstance(value, (int, float, str)) else id(value)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


@pytest.fixture
def rich() -> Rich:
    """The model after some training, with gradients, and metrics that have seen something."""
    model = Rich()
    x, y = torch.randn(16, 8), torch.randint(3, (16,))
    out = model(x)
    nn.functional.cross_entropy(out, y).backward()
    for metric in (model.accuracy, model.several):
        metric(out.detach(), y)
    model.mean.update(1.0)
    model.all.update(1.0)
    with torch.inference_mode():  # as validation does
        model.several.update(out, y)
    model.net[4].bias.grad = None
    return model


BATCH = (torch.linspace(-1, 1, 64).reshape(8, 8), torch.arange(8) % 3)


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_of_a_training_step(rich: Rich, fails: bool) -> None:
    before, keys, state = picture(rich), list(rich.state_dict()), RandomState.now()

    def block() -> None:
        with undisturbed(rich, silent=True):
            assert all(parameter.grad is None for parameter in rich.parameters())
            loss = rich.training_step(BATCH)  # type: ignore[arg-type]
            loss.backward()
            assert not same(picture(rich), before)
            torch.set_grad_enabled(False)
            torch.set_autocast_enabled("cpu", True)
            if fails:
                raise KeyboardInterrupt

    if fails:
        with pytest.raises(KeyboardInterrupt):
            block()
    else:
        block()
    assert same(picture(rich), before)
    assert list(rich.state_dict()) == keys
    assert "log" not in vars(rich)
    assert torch.is_grad_enabled()
    assert not torch.is_autocast_enabled("cpu")
    after = draws()
    state.restore()
    assert draws() == after
    assert rich.mean.compute() == 1.0


def test_twice_the_same(rich: Rich) -> None:
    losses = []
    for _ in range(2):
        with undisturbed(rich, silent=True):
            losses.append(rich.training_step(BATCH).item())  # type: ignore[arg-type]
    assert losses[0] == losses[1]


def test_logging_is_silent_only_inside() -> None:
    model = Classifier()
    with undisturbed(model, silent=True):
        model.log("nowhere", 1.0)
        model.log_dict({})
    assert model.log == pl.LightningModule.log.__get__(model)
    with undisturbed(model), pytest.raises(RuntimeError, match="Trainer"):
        model.trainer.fit  # noqa: B018  (untouched: no trainer is attached)


def test_a_log_of_its_own_survives() -> None:
    model = Classifier()
    own = model.log = lambda *_, **__: None  # type: ignore[method-assign]
    with undisturbed(model, silent=True):
        assert model.log is not own
    assert model.log is own


def test_gradients_keep_their_objects() -> None:
    net = mlp()
    net(torch.ones(2, 8)).sum().backward()
    net[0].bias.grad = None
    gradients = [parameter.grad for parameter in net.parameters()]
    with undisturbed(net):
        net(torch.ones(4, 8)).sum().backward()
    assert all(a is b.grad for a, b in zip(gradients, net.parameters(), strict=True))


def test_a_graph_from_before_stays_valid() -> None:
    """A preflight may run between a forward and its backward pass: what that saved is neither changed nor stale."""
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()
    loss = net(torch.ones(2, 4)).sum()
    with undisturbed(net):
        net(torch.ones(2, 4))
    loss.backward()
    assert net[0].weight.grad is not None


def test_buffers_of_any_kind() -> None:
    net = nn.Module()
    net.register_buffer("row", torch.zeros(1).expand(5))
    net.register_buffer("sparse", torch.eye(3).to_sparse())
    net.register_buffer("grown", torch.arange(3.0))
    net.register_buffer("moved", torch.ones(2))
    grown, moved = net.grown, net.moved
    with undisturbed(net):
        net.grown.resize_(7).fill_(1)
        net.moved.data = torch.zeros(2, dtype=torch.float16)
    assert net.grown is grown
    assert torch.equal(grown, torch.arange(3.0))
    assert net.moved is moved
    assert torch.equal(moved, torch.ones(2))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_module() -> None:
    net = torch.jit.script(nn.Sequential(nn.BatchNorm1d(2)))
    with undisturbed(net):
        net(torch.randn(4, 2))
        net.eval()
    assert net.training
    assert next(iter(net.modules())).training
    assert [buffer.tolist() for buffer in net.buffers()] == [[0, 0], [1, 1], 0]


def test_lazy_parameters_are_refused_without_a_trace() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(2))
    gradient = net[0].weight.grad = torch.ones(2, 2)
    with pytest.raises(ValueError, match="run one forward pass first"), undisturbed(net):
        pass
    assert net[0].weight.grad is gradient


def test_training_goes_on_as_if_nothing_had_been() -> None:
    """The same fit, with and without a rerun of each batch."""

    class Curious(pl.Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Rich, optimizer: Any) -> None:
            with undisturbed(pl_module, silent=True):
                pl_module.training_step(self.batch, 0).backward()

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            self.batch = batch

    class Model(Classifier):
        def __init__(self) -> None:
            super().__init__(nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.3), nn.Linear(16, 3)))
            self.mean = MeanMetric()

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            self.mean(loss)
            self.log("mean", self.mean, on_epoch=True, on_step=True)
            return loss

    results = []
    for callbacks in ([], [Curious()]):
        pl.seed_everything(1, verbose=False)
        model = Model()
        fit = trainer(*callbacks, max_epochs=2)
        fit.fit(model, batches(shuffle=True))
        results.append(([value.clone() for value in model.state_dict().values()], fit.callback_metrics, draws()))
    assert same(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]
    assert results[0][2] == results[1][2]


class Replay:
    """A buffer of the user's, in a class that no framework knows."""

    def __init__(self) -> None:
        self.items: list[float] = []
        self.count = 0

    def __repr__(self) -> str:
        return f"Replay({self.items}, {self.count})"


class Slotted:
    __slots__ = ("count", "last", "unset")

    def __init__(self) -> None:
        self.count, self.last = 0, [0.0]


@dataclasses.dataclass
class Statistics:
    steps: int = 0
    history: list[int] = dataclasses.field(default_factory=list)
    inner: Replay = dataclasses.field(default_factory=Replay)


@dataclasses.dataclass(frozen=True)
class Frozen:
    table: dict[str, int] = dataclasses.field(default_factory=dict)


class Refuses(tuple[int, ...]):
    """A tuple that has no length, as the irreducible representations of e3nn."""

    __slots__ = ()

    def __len__(self) -> int:
        raise NotImplementedError


class Collects(nn.Module):
    """Counts in every way that a forward pass may count."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)
        self.replay, self.slotted, self.statistics, self.frozen = Replay(), Slotted(), Statistics(), Frozen()
        self.space = SimpleNamespace(count=0)
        self.counter: Counter[str] = Counter()
        self.array = np.zeros(3)
        self.objects = np.array([Replay(), None], dtype=object)
        self.bytes = bytearray(b"ab")
        self.dice = random.Random(0)
        self.numpy_dice = np.random.default_rng(0)
        self.loop = self.replay
        self.irreps = Refuses((1, 2))
        self.circle = SimpleNamespace(owner=self)

    def forward(self, x: Tensor) -> Tensor:
        self.replay.items.append(float(x.sum()))
        self.replay.count += 1
        self.slotted.count += 1
        self.slotted.last.append(1.0)
        self.slotted.last = [*self.slotted.last, 2.0]
        self.statistics.steps += 1
        self.statistics.history.append(1)
        self.statistics.inner.items.append(1.0)
        self.frozen.table["calls"] = self.frozen.table.get("calls", 0) + 1
        self.space.count += 1
        self.space.new = True
        self.counter["calls"] += 1
        self.array += 1.0
        self.objects[0].count += 1
        self.objects[1] = self.replay
        self.bytes += b"c"
        out: Tensor = self.layer(x) * (1 + self.dice.random() + self.numpy_dice.random())
        return out

    def picture(self) -> Any:
        return copy.deepcopy(
            [
                [vars(part) for part in (self.replay, self.statistics, self.statistics.inner, self.frozen, self.space)],
                [self.slotted.count, self.slotted.last, hasattr(self.slotted, "unset")],
                [dict(self.counter), self.array.tolist(), vars(self.objects[0]), bytes(self.bytes)],
                self.objects[1] is None,
                [self.dice.getstate(), self.numpy_dice.bit_generator.state],
            ]
        )


def test_objects_of_the_users_own_classes_are_as_before() -> None:
    model = Collects()
    model(torch.ones(2, 4))
    kept = model.slotted.last
    before = repr(model.picture())
    with undisturbed(model):
        model(torch.ones(2, 4))
        assert repr(model.picture()) != before
    assert repr(model.picture()) == before
    assert model.slotted.last is kept
    assert model.loop is model.replay


def test_what_belongs_to_the_loop_is_left_alone() -> None:
    """Optimizers, callbacks, datasets and loggers go on: a model may hold them, but does not remember by them."""

    class Mine(pl.Callback):
        count = 0

    model = nn.Linear(2, 1)
    vars(model)["optimizer"] = optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    vars(model)["callback"] = callback = Mine()
    vars(model)["watch"] = threading.Event()
    with undisturbed(model):
        optimizer.param_groups[0]["lr"] = 0.5
        callback.count = 3
        vars(model)["watch"].set()
    assert (optimizer.param_groups[0]["lr"], callback.count, vars(model)["watch"].is_set()) == (0.5, 3, True)


class Writes(nn.Module):
    """A forward pass that writes into parameters and buffers, in one of several ways."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.layer = nn.Linear(4, 4)
        self.teacher = nn.Linear(4, 4).requires_grad_(False)
        self.register_buffer("flag", torch.tensor(False))
        self.register_buffer("queue", torch.randn(4, 8))
        self.table = nn.Embedding(4, 4, max_norm=0.1)

    @torch.no_grad()
    def write(self) -> None:
        mean, queue, flag = self.teacher.weight, self.queue, self.flag
        assert isinstance(queue, Tensor)
        assert isinstance(flag, Tensor)
        if self.how == "assign":
            mean.data = 0.9 * mean.data + 0.1 * self.layer.weight.data
            flag.data = torch.tensor(True)
            queue.data = 2 * queue
        elif self.how == "in place":
            mean.mul_(0.9).add_(0.1 * self.layer.weight)
            queue[:, :2] = 0.0
        elif self.how == "through data":
            mean.data.mul_(0.9)
            queue.data.mul_(2)
        else:
            self.queue = queue[:, :3].clone()
            flag.data = torch.ones(3)

    def forward(self, x: Tensor) -> Tensor:
        self.write()
        out: Tensor = self.layer(x) + self.teacher(x) + self.table(torch.arange(len(x)) % 4)
        return out


@pytest.mark.parametrize("how", ["assign", "in place", "through data", "replace"])
def test_parameters_and_memory_are_as_before(how: str) -> None:
    model = Writes(how)
    before = copy.deepcopy(model.state_dict())
    memory = {name: value.untyped_storage().data_ptr() for name, value in model.state_dict().items()}
    with undisturbed(model, weights=True):
        model(torch.ones(8, 4)).sum().backward()
        assert not same(list(model.state_dict().values()), list(before.values()))
    after = model.state_dict()
    assert list(after) == list(before)
    assert same(list(after.values()), list(before.values()))
    assert {name: value.untyped_storage().data_ptr() for name, value in after.items()} == memory


@pytest.mark.parametrize("how", ["assign", "in place", "through data", "replace"])
def test_diagnose_leaves_parameters_and_memory(how: str) -> None:
    model = Writes(how)
    before = copy.deepcopy(model.state_dict())
    memory = {name: value.untyped_storage().data_ptr() for name, value in model.state_dict().items()}
    diagnose(model, torch.ones(8, 4))
    after = model.state_dict()
    assert same(list(after.values()), list(before.values()))
    assert {name: value.untyped_storage().data_ptr() for name, value in after.items()} == memory


def test_weights_are_copied_to_the_host_where_there_is_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("no room")

    model = Writes("in place")
    before = copy.deepcopy(model.state_dict())
    monkeypatch.setattr(Tensor, "clone", full)
    memory = undisturbed(model, weights=True)
    memory.__enter__()
    monkeypatch.undo()
    model(torch.ones(8, 4))
    memory.__exit__(None, None, None)
    assert same(list(model.state_dict().values()), list(before.values()))


class Counts:
    """Counts in whatever a model may have at hand."""

    total = 0
    names: ClassVar[list[int]] = []

    def __init__(self, file: Any) -> None:
        self.bound = self.advance
        self.ids, self.rows, self.steps = itertools.count(), iter([5, 6, 7, 8]), iter(range(9))
        self.text, self.data, self.file = io.StringIO("a\nb\nc\n"), io.BytesIO(), file
        self.place = 0

    def advance(self) -> int:
        self.place += 1
        return self.place

    def use(self) -> list[Any]:
        cls = type(self)
        cls.total += 1
        cls.names.append(cls.total)
        cls.last = self.data.write(b"xy")
        read = [self.text.readline(), self.file.readline(), self.data.tell(), hasattr(cls, "extra")]
        cls.extra = True
        mine = [self.bound(), next(self.ids), next(self.rows), next(self.steps)]
        return [*mine, *read, cls.total, list(cls.names)]


@pytest.mark.parametrize("held", ["by the model", "by an object"])
def test_iterators_classes_and_files_are_as_before(held: str, tmp_path: Path) -> None:
    def traced() -> list[list[Any]]:
        class Fresh(Counts):
            names: ClassVar[list[int]] = []

        (tmp_path / "lines").write_text("1\n2\n3\n")
        counts = Fresh((tmp_path / "lines").open(encoding="utf8"))
        model = mlp()
        if held == "by an object":
            model.counts = SimpleNamespace(inner=[counts])
        else:
            model.counts = counts
        seen = []
        for run in runs:
            if run == "again":
                with undisturbed(model):
                    counts.use()
            else:
                seen.append(counts.use())
        counts.file.close()
        return seen

    runs = ["once", "once"]
    expected = traced()
    runs = ["again", "once", "again", "again", "once"]
    assert traced() == expected
