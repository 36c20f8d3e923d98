"""Grouping, names, order of first use, and which biases can stand in for the backward signal."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from conftest import mlp
from torch import Tensor, nn
from torch.distributed._composable.replicate import replicate
from torch.distributed.fsdp import fully_shard
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.parametrize import register_parametrization

from lightning_gradhealth.layers import Layout, UseRecorder, clean_name, is_compiled, unwrap
from lightning_gradhealth.naming import name_of
from lightning_gradhealth.signals import SignalProbe


class Backwards(nn.Module):
    """Registers its layers in one order and uses them in another; one of them is never used by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(4, 2)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.first = nn.Linear(3, 4)
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x) * self.scale
        return self.last(self.attention(x, x, x)[0])


@pytest.mark.parametrize(
    ("layers", "names"),
    [
        ("module", ["Sequential", "0", "1.0", "1.1"]),
        ("parameter", ["extra", "0.weight", "0.bias", "1.0.weight", "1.0.bias", "1.1.weight", "1.1.bias"]),
        (1, ["Sequential", "0", "1"]),
        (5, ["Sequential", "0", "1.0", "1.1"]),
        ([r"(1\.\d)\.weight", r"1\."], ["Sequential", "0", "1.0", "1.", "1.1"]),
        (r".*bias", ["Sequential", "0", "0.bias", "1.0", "1.0.bias", "1.1", "1.1.bias"]),
    ],
)
def test_grouping(layers: object, names: list[str]) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)))
    model.register_parameter("extra", nn.Parameter(torch.zeros(1)))
    layout = Layout(model, layers)  # type: ignore[arg-type]
    assert layout.names == names
    assert sorted({slot.layer for slot in layout.slots}) == list(range(len(names)))


@pytest.mark.parametrize(
    ("layers", "error", "message"),
    [
        (0, ValueError, "layers as a depth must be an int >= 1, got 0; 1 groups by the model's children"),
        (True, TypeError, 'layers must be "module", "parameter", a depth or regexes, got True'),
        (1.5, TypeError, 'layers must be "module", "parameter", a depth or regexes, got 1.5'),
        ("(", ValueError, r"layers: '\(' is not a valid regular expression"),
        ([3], TypeError, "layers must be a regular expression, got 3"),
    ],
)
def test_wrong_grouping(layers: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Layout(mlp(), layers)  # type: ignore[arg-type]


def test_a_regex_that_matches_nothing_is_said(caplog: pytest.LogCaptureFixture) -> None:
    assert Layout(mlp(depth=2), "encoder").names == ["0", "2"]
    assert "layers: 'encoder' matches no parameter name" in caplog.text


def test_names_lose_what_wrappers_add() -> None:
    assert clean_name("_forward_module._fsdp_wrapped_module.a._checkpoint_wrapped_module.w") == "a.w"
    assert clean_name("module.weight") == "module.weight"  # a user's own attribute stays
    assert Layout(nn.DataParallel(mlp(depth=2))).names == ["0", "2"]
    compiled = nn.Sequential(torch.compile(nn.Linear(2, 2)), nn.Linear(2, 2))
    assert Layout(compiled).names == ["0", "1"]
    assert is_compiled(compiled[0])
    assert not UseRecorder(compiled).complete


def test_parametrized_weights_fold_into_their_owner() -> None:
    layout = Layout(nn.Sequential(weight_norm(nn.Linear(2, 2)), nn.Linear(2, 2)))
    assert layout.names == ["0", "1"]
    assert [slot.layer for slot in layout.slots] == [0, 0, 0, 1, 1]


class Rooted(nn.Module):
    """A module with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.body = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * self.scale


class Twice(torch.nn.Module):
    """What parametrizes a weight."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def parametrized() -> nn.Module:
    model = Rooted()
    register_parametrization(model, "scale", Twice())
    return model


def inner_parametrized() -> nn.Module:
    model = Rooted()
    weight_norm(model.body)
    return model


@pytest.mark.parametrize(
    "make",
    [
        Rooted,
        parametrized,
        inner_parametrized,
        lambda: torch.compile(Rooted()),
        lambda: nn.DataParallel(Rooted()),
        lambda: nn.DataParallel(torch.compile(parametrized())),
        lambda: torch.jit.script(Rooted()),
        lambda: torch.compile(nn.DataParallel(Rooted())),
        lambda: torch.compile(nn.DataParallel(torch.compile(Rooted()))),
    ],
)
def test_a_root_is_called_by_the_class_that_was_written(make: Callable[[], nn.Module]) -> None:
    model = make()
    assert name_of(model) == "Rooted"
    assert sorted(Layout(model).names) == ["Rooted", "body"]


@pytest.mark.parametrize("wrap", [fully_shard, replicate])
def test_a_root_has_the_same_name_on_every_strategy(wrap: Callable[[nn.Module], nn.Module]) -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = wrap(Rooted())
        assert name_of(model) == "Rooted"
        assert Layout(model).names[0] == SignalProbe(model)._modules[unwrap(model)].name == "Rooted"
    finally:
        torch.distributed.destroy_process_group()


def test_a_class_that_looks_derived_keeps_its_name() -> None:
    class FSDPRooted(Rooted):
        """The author's own class, whatever its name."""

    class ParametrizedRooted(nn.Module):
        """Another one."""

    assert [name_of(kind()) for kind in (FSDPRooted, ParametrizedRooted)] == ["FSDPRooted", "ParametrizedRooted"]


def test_tied_parameters_have_one_slot() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False)})
    model["head"].weight = model["embed"].weight
    assert [slot.name for slot in Layout(model).slots] == ["embed.weight"]


def test_order_of_first_use() -> None:
    model = Backwards()
    layout, recorder = Layout(model), UseRecorder(model)
    assert [layout.names[i] for i in layout.order()] == layout.names  # registration order until something ran
    model(torch.zeros(1, 5, 3))
    recorder.close()
    layout.record_use(recorder.used)
    assert [layout.names[i] for i in layout.order()] == [
        "Backwards",
        "first",
        "attention",
        "attention.out_proj",  # its forward is never called: it follows its owner
        "last",
    ]
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_model_that_is_being_recorded_can_be_copied_and_saved() -> None:
    model = Backwards()
    recorder = UseRecorder(model)
    twin = copy.deepcopy(model)
    torch.save(model, io.BytesIO())
    twin(torch.zeros(1, 5, 3))
    assert recorder.used == []
    recorder.close()


def test_biases_before_batch_norm_do_not_stand_in() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 2, 3), nn.Flatten(), mlp())
    layout = Layout(model)
    names = [layout.slots[slot].name for slot in layout.signal_slots()]
    assert "0.bias" not in names
    assert {"1.bias", "3.bias", "5.0.bias"} <= set(names)
    assert not any(name.endswith("weight") for name in names)


def test_new_and_foreign_parameters_get_slots() -> None:
    model = mlp(depth=2)
    layout = Layout(model)
    model.append(nn.Linear(3, 3))
    layout.refresh()
    assert layout.names == ["0", "2", "3"]
    foreign = nn.Parameter(torch.zeros(2))
    assert layout.slots[layout.adopt(foreign, "optimizer0.9")].name == "optimizer0.9"
