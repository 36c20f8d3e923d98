"""However a forward pass writes: looking at a model leaves its storages, versions and values as before."""

from __future__ import annotations

import warnings
from collections import OrderedDict, namedtuple
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import batches, trainer
from lightning.pytorch import LightningModule
from torch import Tensor, nn

import lightning_gradhealth as gh


class Writer(nn.Module):
    """A student and its frozen teacher, a queue, and a forward pass that writes in one of many ways."""

    def __init__(self, how: str, needs_values: bool) -> None:
        super().__init__()
        self.how, self.needs_values, self.fails = how, needs_values, False
        self.student, self.out = nn.Linear(8, 16), nn.Linear(16, 3)
        self.teacher = nn.Linear(8, 16).requires_grad_(False)
        self.register_buffer("queue", torch.randn(16, 8))
        self.register_buffer("flag", torch.tensor(False))
        self.last: Any = torch.zeros(4)  # neither parameter nor buffer
        self.seen: dict[str, Any] = {"all": [torch.ones(2)], "calls": 0}
        self.object = SimpleNamespace(mean=torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.out(torch.tanh(self.student(x)) * (1 + self.teacher(x)))
        if self.needs_values and float(y.detach().abs().sum()) < 0:  # fake tensors do not suffice
            return y
        with torch.no_grad():
            WAYS[self.how](self, x)
        if self.fails:
            raise RuntimeError("as it was told to")
        return y


def new_parameter(net: Writer, x: Tensor) -> None:
    net.teacher.weight = nn.Parameter(net.teacher.weight * 0.9, requires_grad=False)


def registered(net: Writer, x: Tensor) -> None:
    net.register_buffer("late", x.mean(0))
    net.register_parameter("later", nn.Parameter(torch.zeros(2)))
    net.later_module = nn.Linear(2, 2)


def attributes(net: Writer, x: Tensor) -> None:
    net.last = x.mean(0)
    net.seen["all"].append(x.sum())
    net.seen["calls"] += 1
    net.object.mean += 1.0
    net.teacher.weight.note = "seen"  # type: ignore[attr-defined]


def in_place(net: Writer, x: Tensor) -> None:
    net.teacher.weight.mul_(0.9).add_(net.student.weight * 0.1)
    net.teacher.bias.zero_()


def through_data(net: Writer, x: Tensor) -> None:
    net.teacher.weight.data.mul_(0.9).add_(net.student.weight.data * 0.1)


def assigned(net: Writer, x: Tensor) -> None:
    net.teacher.weight.data = net.teacher.weight.data * 0.9 + net.student.weight.data * 0.1


def assigned_then_written(net: Writer, x: Tensor) -> None:
    net.teacher.weight.data = net.teacher.weight.data * 0.9
    net.teacher.weight.mul_(0.5)


def flagged(net: Writer, x: Tensor) -> None:
    if not net.flag:
        net.student.weight.data = net.student.weight.data / x.std()
        net.student.bias.copy_(-x.mean() * torch.ones(16))
        net.flag.data = torch.tensor(True)


def emptied(net: Writer, x: Tensor) -> None:
    net.queue.untyped_storage().resize_(0)


WAYS: dict[str, Callable[[Writer, Tensor], None]] = {
    "in place": in_place,
    "through data": through_data,
    "data assigned": assigned,
    "data assigned, then written": assigned_then_written,
    "flag": flagged,
    "queue slice": lambda net, x: net.queue[:, :4].zero_(),  # type: ignore[dict-item]
    "queue assigned": lambda net, x: setattr(net.queue, "data", net.queue * 2),
    "queue set": lambda net, x: net.queue.set_(torch.zeros(3)),  # type: ignore[dict-item, call-overload]
    "queue resized": lambda net, x: net.queue.resize_(40, 8).zero_(),  # type: ignore[dict-item]
    "queue shrunk": lambda net, x: net.queue.resize_(2, 8).zero_(),  # type: ignore[dict-item]
    "queue emptied": emptied,
    "queue replaced": lambda net, x: setattr(net, "queue", net.queue + 1),
    "new parameter": new_parameter,
    "registered": registered,
    "attributes": attributes,
    "thawed": lambda net, x: net.teacher.requires_grad_(True),  # type: ignore[dict-item]
}


def reachable(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor that a model holds, by where it is."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, (nn.Module, SimpleNamespace)):
        yield from reachable(vars(value), path)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from reachable(item, f"{path}.{key}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from reachable(item, f"{path}.{index}")


def state_of(model: nn.Module, *, of: Callable[[str], bool] = lambda path: True) -> dict[str, Any]:
    """Identity, memory, version and values of every tensor."""
    return {
        path: (
            *(id(tensor), tensor.untyped_storage()._cdata, tensor.untyped_storage().nbytes(), tensor.storage_offset()),
            *(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device.type),
            *(tensor._version, tensor.requires_grad, tensor.grad_fn, id(tensor.grad), tuple(vars(tensor))),
            tuple(tensor.detach().flatten().tolist()),
        )
        for path, tensor in reachable(model)
        if of(path)
    }


X, Y = torch.randn(32, 8, generator=torch.Generator().manual_seed(0)), torch.zeros(32, dtype=torch.long)


def planned(net: nn.Module) -> None:
    gh.plan_init(net, X, seed=0)


LOOKS: dict[str, Callable[[Any], object]] = {
    "diagnose": lambda net: gh.diagnose(net, (X, Y), nn.functional.cross_entropy),
    "diagnose without a loss": lambda net: gh.diagnose(net, X),
    "dry run": lambda net: gh.init_weights(net, X, dry_run=True),
    "dry run, calibrated": lambda net: gh.init_weights(net, X, dry_run=True, calibrate=X),
    "plan": planned,
}


@pytest.mark.parametrize("needs_values", [False, True])
@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("how", WAYS)
def test_looking_leaves_no_trace(how: str, look: str, needs_values: bool) -> None:
    net = Writer(how, needs_values)
    before = state_of(net)
    LOOKS[look](net)
    assert state_of(net) == before
    net.fails = True
    with pytest.raises(ValueError, match="as it was told to"):
        LOOKS[look](net)
    assert state_of(net) == before


@pytest.mark.parametrize("needs_values", [False, True])
@pytest.mark.parametrize("calibrate", [None, X])
@pytest.mark.parametrize("how", sorted(WAYS.keys() - {"flag"}))
def test_initialising_changes_what_it_says(how: str, calibrate: Tensor | None, needs_values: bool) -> None:
    net = Writer(how, needs_values)

    def others(path: str) -> bool:
        return not any(part in path for part in (".student.", ".out."))

    before, drawn = state_of(net, of=others), net.student.weight.clone()
    report = gh.init_weights(net, X, seed=0, calibrate=calibrate)
    assert state_of(net, of=others) == before
    assert not torch.equal(net.student.weight, drawn)
    other = Writer(how, not needs_values)
    other.load_state_dict(net.state_dict())
    again = gh.init_weights(other, X, seed=0, calibrate=calibrate)  # not by how often forward has run
    assert [entry.measured_std for entry in again.entries] == [entry.measured_std for entry in report.entries]


def test_calibration_undoes_what_forward_makes_of_weights_that_are_drawn() -> None:
    net = Writer("flag", False)
    gh.init_weights(net, X, seed=0, calibrate=X)
    assert not net.flag
    assert not net.student.bias.any()
    assert net.student(X).std().item() == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("how", WAYS)
def test_preflight_leaves_no_trace(how: str) -> None:
    class Lit(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Writer(how, False)

        def training_step(self, batch: Any, index: int) -> Tensor:
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.0)

        def on_train_batch_start(self, batch: Any, index: int) -> None:
            states.append(state_of(self.net))

    states: list[dict[str, Any]] = []
    model = Lit()
    before = state_of(model.net)
    trainer(gh.GradHealth(preflight=True), max_steps=1).fit(model, batches())
    assert states == [before]


# --- hostile attributes ---


class Refuses:
    """Answers nothing: no attribute, no comparison, no truth, no length, no iteration, no copy."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError

    __eq__ = __bool__ = __len__ = __iter__ = __hash__ = __repr__ = __copy__ = __deepcopy__ = __contains__ = (  # type: ignore[assignment]
        lambda self, *_: self.nothing
    )


def refusing(kind: type) -> type:
    names = (
        "__len__",
        "__iter__",
        "__eq__",
        "__ne__",
        "__bool__",
        "__repr__",
        "__copy__",
        "__deepcopy__",
        "__reduce__",
    )
    names += ("__getitem__", "__contains__", "keys", "values", "items", "get", "__hash__")

    def refuse(self: Any, *_: Any) -> Any:
        raise NotImplementedError

    return type(f"Refusing{kind.__name__}", (kind,), {name: refuse for name in names if hasattr(kind, name)})


Point = namedtuple("Point", "x y")
HOSTILE: dict[str, Callable[[], Any]] = {
    "object": Refuses,
    "tuple": lambda: refusing(tuple)((1, torch.ones(1))),
    "namedtuple": lambda: refusing(Point)(1, torch.ones(1)),
    "list": lambda: refusing(list)([1, torch.ones(1)]),
    "dict": lambda: refusing(dict)(a=1, b=torch.ones(1)),
    "ordered": lambda: refusing(OrderedDict)(a=1),
    "set": lambda: refusing(set)((1, 2)),
    "frozenset": lambda: refusing(frozenset)((1, 2)),
}


class Holder(nn.Module):
    def __init__(self, held: Any) -> None:
        super().__init__()
        self.held, self.inside = held, {"one": [held]}
        self.first, self.norm, self.last = nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 3)

    @property
    def example_input_array(self) -> Any:
        raise RuntimeError

    @property
    def weight(self) -> Any:
        raise RuntimeError("no weight here")

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(torch.relu(self.norm(self.first(x))))
        return out


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("look", [*LOOKS, "init", "no sample"])
def test_attributes_that_refuse_everything(kind: str, look: str) -> None:
    net = Holder(HOSTILE[kind]())
    looks = {**LOOKS, "init": lambda net: gh.init_weights(net, X), "no sample": gh.init_weights}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        looks[look](net)


class Fails(nn.Module):
    def __init__(self, error: BaseException, only_real: bool = False) -> None:
        super().__init__()
        self.layer, self.error, self.only_real = nn.Linear(8, 3), error, only_real

    def forward(self, x: Tensor) -> Tensor:
        if not self.only_real or type(x) is Tensor:
            raise self.error
        return self.layer(torch.tensor(x.tolist()))  # type: ignore[no-any-return]


class SilentError(Exception):
    def __str__(self) -> str:
        raise RuntimeError


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("error", [KeyError("speaker"), NotImplementedError(), SilentError(), AssertionError()])
@pytest.mark.parametrize("only_real", [False, True])
def test_errors_of_forward_are_told_as_they_are(look: str, error: Exception, only_real: bool) -> None:
    with pytest.raises(ValueError, match=type(error).__name__) as told:
        LOOKS[look](Fails(error, only_real))
    line = Fails.forward.__code__.co_firstlineno + 2
    assert f"line {line} of {__file__}, in forward" in str(told.value)


def test_what_fails_on_fake_tensors_alone_is_not_told() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            assert type(x) is Tensor
            return self.layer(torch.from_numpy(x.detach().numpy()))  # type: ignore[no-any-return]

    assert gh.init_weights(Odd(), X).source == "trace (real batch)"
