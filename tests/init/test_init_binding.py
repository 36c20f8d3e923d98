"""A plan bound to a model on the meta device: whatever way it is materialised, the values are those of the plan."""

from __future__ import annotations

import copy
import hashlib
import io
import pickle
import random
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.nn.utils import parametrizations

from lightning_gradhealth.init import init_weights, plan_init
from lightning_gradhealth.init.binding import bind, bound
from lightning_gradhealth.init.stand_ins import own_tensors, values_by_class
from lightning_gradhealth.sharding import fill

META = torch.device("meta")


class Block(nn.Module):
    """All sorts of modules, and parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.table = nn.ParameterList([nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(2))])
        self.tokens = nn.Embedding(5, 4, padding_idx=1)
        self.attention = nn.MultiheadAttention(4, 2)
        self.norm = nn.BatchNorm1d(4)
        self.lstm = nn.LSTM(4, 3, num_layers=2, bidirectional=True)
        self.convolution = nn.Conv2d(2, 4, 3)
        self.low = nn.Linear(4, 4, dtype=torch.bfloat16)
        self.head = nn.Linear(4, 5)
        self.head.weight = self.tokens.weight


class Masked(nn.Module):
    """Gives its buffers their values by itself, of which one is not in its checkpoints."""

    def __init__(self, size: int = 3, old_style: bool = False) -> None:
        super().__init__()
        self.old_style = old_style
        self.weight = nn.Parameter(torch.empty(size, size))
        self.register_buffer("mask", torch.empty(size, size, dtype=torch.bool), persistent=False)
        self.register_buffer("steps", torch.empty((), dtype=torch.int64))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.old_style:
            self.weight.data.uniform_()
            self.mask.data.copy_(torch.ones(3, 3).tril())
            self.steps.data.fill_(7)
        else:
            nn.init.orthogonal_(self.weight)
            self.mask = torch.ones(self.mask.shape, dtype=torch.bool).tril()
            self.steps.fill_(7)


class Lazy(Masked):
    """Forgets one buffer."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        self.mask = torch.ones(3, 3, dtype=torch.bool)


class Bare(nn.Module):
    """Initialises its children, as many do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))

    def reset_parameters(self) -> None:
        for layer in self.inner:
            layer.reset_parameters()
            nn.init.constant_(layer.weight, 9.0)


class Rude(Bare):
    """The same, with something of its own, and with an eye for where its children live."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("offset", torch.zeros(2))
        self.register_buffer("visible", torch.zeros(2, dtype=torch.bool))
        self.below = ""

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.below = self.inner[0].weight.device.type
        self.offset.fill_(2.0)
        self.visible.fill_(True)


def values(name: str, shape: torch.Size) -> Tensor:
    """Numbers that depend on the name alone."""
    seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "big")
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Plan:
    """Numbers for the parameters of a model, but for some."""

    def __init__(self, model: nn.Module, keep: tuple[str, ...] = ()) -> None:
        self.model = model
        self.kept = dict.fromkeys(keep, "frozen")
        self.drawn: list[str] = []
        self.expected = {n: values(n, p.shape).to(p.dtype) for n, p in model.named_parameters() if n not in keep}
        first = {id(p): n for n, p in model.named_parameters()}
        self.names = {n: first[id(p)] for n, p in model.named_parameters(remove_duplicate=False)}

    def bind(self, model: nn.Module | None = None) -> Plan:
        bind(model or self.model, {name: self._filler(name) for name in self.expected}, self.kept)
        return self

    def _filler(self, name: str) -> Callable[[Tensor], None]:
        def filler(target: Tensor) -> None:
            self.drawn.append(name)
            fill(target, values(name, target.shape))

        return filler

    def wrong(self, model: nn.Module | None = None) -> list[str]:
        """The names under which a model does not have the values."""
        found = (model or self.model).named_parameters(remove_duplicate=False)
        return [n for n, p in found if self.names[n] in self.expected and not same(p, self.expected[self.names[n]])]


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


def largest(tensor: Tensor) -> float:
    return tensor.detach().abs().max().item()


def make(kind: Callable[[], nn.Module]) -> nn.Module:
    with META:
        return kind()


def as_lightning(model: nn.Module) -> None:
    """What its strategies do."""
    model.to_empty(device="cpu")
    spoil(model)
    for module in model.modules():
        if [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
            module.reset_parameters()


def as_torch(model: nn.Module) -> None:
    model.to_empty(device="cpu")
    spoil(model)
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()


def children_first(model: nn.Module) -> None:
    model.to_empty(device="cpu")
    spoil(model)
    model.apply(lambda module: module.reset_parameters() if hasattr(module, "reset_parameters") else None)


def shuffled(model: nn.Module) -> None:
    model.to_empty(device="cpu")
    spoil(model)
    modules = [module for module in model.modules() if hasattr(module, "reset_parameters")]
    random.Random(0).shuffle(modules)
    for module in modules + modules[::2]:
        module.reset_parameters()


def one_by_one(model: nn.Module) -> None:
    """What FSDP1 does: there is memory for one module at a time."""
    for module in model.modules():
        if any(tensor.is_meta for tensor in own_tensors(module).values()):
            module.to_empty(device="cpu", recurse=False)
            spoil(module, recurse=False)
            module.reset_parameters()


def spoil(model: nn.Module, recurse: bool = True) -> None:
    """Memory that has not been written is often zero; here it never is what anybody expects."""
    with torch.no_grad():
        for tensor in (*model.parameters(recurse), *model.buffers(recurse)):
            tensor.fill_(True if tensor.dtype is torch.bool else 77)


WAYS = [as_lightning, as_torch, children_first, shuffled, one_by_one]
ways = pytest.mark.parametrize("materialise", WAYS)


# --- materialising ---


@ways
def test_every_way_gives_the_values_of_the_plan(materialise: Callable[[nn.Module], None]) -> None:
    model = make(Block)
    keys = list(model.state_dict())
    state = torch.get_rng_state()
    plan = Plan(model).bind()
    assert all(p.is_meta for p in model.parameters())
    materialise(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert plan.wrong() == []
    assert list(model.state_dict()) == keys
    assert set(plan.drawn) == set(plan.expected)
    fresh = nn.BatchNorm1d(4)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert same(getattr(model.norm, name), getattr(fresh, name))


def test_each_parameter_is_drawn_once() -> None:
    plan = Plan(make(Block)).bind()
    as_lightning(plan.model)
    ties = 1  # the embedding's, once more by the head
    assert len(plan.drawn) == len(plan.expected) + ties


def test_no_memory_no_numbers() -> None:
    plan = Plan(make(Block)).bind()
    plan.model.tokens.reset_parameters()
    assert plan.drawn == []
    as_lightning(plan.model)
    assert plan.wrong() == []


@ways
def test_ties_are_tied_again(materialise: Callable[[nn.Module], None]) -> None:
    plan = Plan(make(Block)).bind()
    materialise(plan.model)
    assert plan.model.head.weight is plan.model.tokens.weight
    assert len(list(plan.model.parameters())) == len(plan.expected)


def test_a_model_that_is_real_already() -> None:
    model = Block()
    mean = model.norm.running_mean.fill_(3.0).clone()
    plan = Plan(model, keep=("convolution.weight",))
    kept = model.convolution.weight.detach().clone()
    plan.bind()
    assert plan.wrong()
    assert not any(reset.remembered for module in model.modules() if (reset := bound(module)))
    for module in list(model.modules())[1:]:
        getattr(module, "reset_parameters", lambda: None)()
    model.reset_parameters()
    assert plan.wrong() == []
    assert same(model.convolution.weight, kept)
    assert same(model.norm.running_mean, mean)


@pytest.mark.parametrize("kind", [Bare, Rude])
def test_the_root_alone_resets_all_if_its_class_would(kind: Callable[[], nn.Module]) -> None:
    plan = Plan(make(kind)).bind()
    plan.model.to_empty(device="cpu")
    spoil(plan.model)
    plan.model.reset_parameters()
    assert plan.wrong() == []


@ways
def test_a_parent_does_not_overwrite_its_children(materialise: Callable[[nn.Module], None]) -> None:
    def tied() -> nn.Module:
        model = nn.Sequential(nn.Linear(2, 3), Rude(), Rude())
        model[0].weight = model[1].inner[0].weight
        return model

    plan = Plan(make(tied)).bind()
    materialise(plan.model)
    assert plan.wrong() == []
    for rude in list(plan.model)[1:]:
        assert rude.offset.tolist() == [2.0, 2.0]
        assert rude.visible.tolist() == [True, True]
        assert rude.below == "meta"  # no memory for what is not wanted


def test_what_was_added_later_is_refused_by_name() -> None:
    plan = Plan(make(lambda: nn.Linear(2, 2))).bind()
    plan.model.to_empty(device="cpu").extra = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=r"'extra' has come to a Linear after its plan was bound; call plan_init"):
        plan.model.reset_parameters()


# --- what the plan leaves alone ---


@pytest.mark.parametrize("old_style", [False, True])
@ways
def test_the_class_gives_buffers_their_values(materialise: Callable[[nn.Module], None], old_style: bool) -> None:
    plan = Plan(make(lambda: nn.Sequential(Masked(old_style=old_style)))).bind()
    materialise(plan.model)
    masked = plan.model[0]
    assert plan.wrong() == []
    assert same(masked.mask, torch.ones(3, 3, dtype=torch.bool).tril())
    assert int(masked.steps) == 7
    assert "mask" not in "".join(plan.model.state_dict())


@ways
def test_kept_parameters_get_the_values_of_the_class(materialise: Callable[[nn.Module], None]) -> None:
    keep = ("attention.in_proj_weight", "norm.weight", "low.weight", "lstm.weight_hh_l1", "attention.out_proj.bias")
    model = make(Block)
    plan = Plan(model, keep).bind()
    materialise(model)
    assert plan.wrong() == []
    assert model.norm.weight.tolist() == [1.0] * 4
    assert 0 < largest(model.lstm.weight_hh_l1) <= 3**-0.5
    assert 0 < largest(model.low.weight) <= 0.5
    assert 0 < largest(model.attention.in_proj_weight) <= (6 / 16) ** 0.5  # Xavier, as _reset_parameters has it


def test_the_numbers_of_the_class_follow_the_seed_and_the_name_alone() -> None:
    def kept(seed: int, way: Callable[[nn.Module], None], noise: int) -> list[Tensor]:
        torch.manual_seed(seed)
        torch.rand(noise)
        plan = Plan(make(lambda: nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))), ("0.weight", "1.weight")).bind()
        torch.rand(noise)
        before = torch.get_rng_state()
        way(plan.model)
        assert torch.equal(torch.get_rng_state(), before)
        return [layer.weight for layer in plan.model]

    first, again, other = kept(1, as_lightning, 0), kept(1, shuffled, 5), kept(2, as_lightning, 0)
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], other[0])


@ways
def test_real_values_outlive_to_empty(materialise: Callable[[nn.Module], None]) -> None:
    model = make(Block)
    model.convolution = nn.Conv2d(2, 4, 3).requires_grad_(False)
    model.register_buffer("positions", torch.arange(4.0), persistent=False)
    model.norm = nn.BatchNorm1d(4)
    model.norm.running_mean.fill_(3.0)
    frozen = model.convolution.weight.clone()
    plan = Plan(model, keep=("convolution.weight", "convolution.bias")).bind()
    materialise(model)
    if materialise is one_by_one:  # asks nothing of a module that is real already
        model.norm.reset_parameters()
    assert plan.wrong() == []
    assert same(model.convolution.weight, frozen)
    assert not model.convolution.weight.requires_grad
    assert model.positions.tolist() == [0.0, 1.0, 2.0, 3.0]
    assert model.norm.running_mean.tolist() == [3.0] * 4
    if materialise is not one_by_one:  # where nothing is lost, nothing needs to be brought back
        assert not any(reset.remembered for module in model.modules() if (reset := bound(module)))


def test_nobody_can_give_a_value() -> None:
    model = make(Block)
    plan = Plan(model, keep=("scale",))
    model.register_buffer("mask", torch.ones(2, device=META), persistent=False)
    message = r"one to 'scale' of Block \(frozen\), 'mask' of Block \(a buffer\); let the class define.*overrides="
    with pytest.raises(ValueError, match=message):
        plan.bind()
    assert not any(bound(module) for module in model.modules())
    assert not hasattr(model, "reset_parameters")
    assert not model._load_state_dict_post_hooks


def test_a_class_that_forgets_a_buffer() -> None:
    plan = Plan(make(Lazy)).bind()
    plan.model.to_empty(device="cpu")
    with pytest.raises(ValueError, match=r"Lazy's own reset_parameters\(\) gives no value to 'steps'; let the class"):
        plan.model.reset_parameters()
    assert {*plan.model._parameters, *plan.model._buffers} == {"weight", "mask", "steps"}
    assert plan.wrong() == []


def test_scripted_modules_are_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(2, 2), torch.jit.script(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match=r"the scripted module '1', to which nothing can be bound; script it once"):
        Plan(model).bind()
    assert bound(model[0]) is None


def test_values_of_a_class_without_a_method() -> None:
    with pytest.raises(ValueError, match=r"module must have a reset_parameters\(\) of its class, Block has none"):
        values_by_class(Block(), ["scale"], "any")


def test_a_parameter_that_nobody_knows_counts_as_kept() -> None:
    model = make(lambda: nn.Linear(2, 2))
    bind(model, {"weight": nn.init.ones_}, {})
    as_lightning(model)
    assert model.weight.tolist() == [[1.0, 1.0]] * 2
    assert 0 < largest(model.bias) <= 0.5**0.5


# --- checkpoints ---


def checkpoint(model: nn.Module) -> dict[str, Tensor]:
    made = {k: torch.rand(v.shape).to(v.dtype) for k, v in model.state_dict().items()}
    return {**made, "head.weight": made["tokens.weight"]}


def differs(model: nn.Module, loaded: dict[str, Tensor]) -> list[str]:
    state = model.state_dict()
    return [name for name, value in loaded.items() if not same(state[name], value)]


def reset_all(model: nn.Module) -> None:
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()


def load(model: nn.Module, loaded: dict[str, Tensor]) -> None:
    model.load_state_dict(loaded)


def load_around(model: nn.Module, loaded: dict[str, Tensor]) -> None:
    """As a part of something larger, whose prefix nobody could know when the plan was bound."""
    nn.ModuleDict({"net": model}).load_state_dict({f"net.{name}": value for name, value in loaded.items()})


def load_distributed(model: nn.Module, loaded: dict[str, Tensor]) -> None:
    set_model_state_dict(model, dict(loaded), options=StateDictOptions(full_state_dict=True))


@pytest.mark.parametrize("way", [load, load_around, load_distributed])
@pytest.mark.parametrize("early", [False, True], ids=["after", "before"])
def test_a_checkpoint_is_not_overwritten(way: Callable[..., None], early: bool) -> None:
    """Loaded into memory that reset_parameters() has, or has not yet, filled."""
    plan = Plan(make(Block)).bind()
    loaded = checkpoint(plan.model)
    plan.model.to_empty(device="cpu")
    if not early:
        reset_all(plan.model)
    way(plan.model, loaded)
    reset_all(plan.model)
    assert differs(plan.model, loaded) == []
    plan.bind()
    reset_all(plan.model)
    assert differs(plan.model, loaded) == []


def test_a_checkpoint_assigned_to_meta() -> None:
    plan = Plan(make(Block)).bind()
    loaded = checkpoint(plan.model)
    plan.model.load_state_dict(loaded, assign=True)
    assert not any(bound(module).remembered for module in plan.model.modules() if bound(module))
    reset_all(plan.model)
    assert differs(plan.model, loaded) == []


@pytest.mark.parametrize("materialise", [as_lightning, as_torch, shuffled, one_by_one])
@pytest.mark.parametrize("name", ["tokens.weight", "head.weight"])
def test_the_plan_gives_what_a_checkpoint_lacks(materialise: Callable[[nn.Module], None], name: str) -> None:
    plan = Plan(make(Block)).bind()
    whole = checkpoint(plan.model)
    loaded = {key: whole[key] for key in (name, "lstm.bias_ih_l0", "norm.running_mean", "low.weight", "scale")}
    plan.model.load_state_dict(loaded, strict=False, assign=True)
    materialise(plan.model)
    tied = {"tokens.weight", "head.weight"}
    assert differs(plan.model, {**loaded, **dict.fromkeys(tied, whole[name])}) == []
    assert {*plan.wrong()} == {*loaded, *tied} - {"norm.running_mean"}
    assert plan.model.norm.running_var.tolist() == [1.0] * 4
    reset_all(plan.model)
    assert differs(plan.model, loaded) == []


@pytest.mark.parametrize("name", ["tokens.weight", "head.weight"])
def test_a_checkpoint_with_one_name_of_a_tied_weight(name: str) -> None:
    plan = Plan(make(Block)).bind()
    loaded = {name: torch.rand(5, 4)}
    plan.model.to_empty(device="cpu")  # unties
    plan.model.load_state_dict(loaded, strict=False)
    reset_all(plan.model)
    assert plan.model.tokens.weight is plan.model.head.weight
    assert differs(plan.model, loaded) == []


@pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter.*no-op")
def test_what_could_not_be_copied_into_meta_is_not_loaded() -> None:
    plan = Plan(make(Block)).bind()
    plan.model.load_state_dict(checkpoint(plan.model))
    as_lightning(plan.model)
    assert plan.wrong() == []


@pytest.mark.parametrize("again", [False, True], ids=["bound once", "bound again"])
def test_what_is_loaded_is_remembered_while_something_is_still_missing(again: bool) -> None:
    """A buffer that no checkpoint has makes Lightning call to_empty() for all."""
    plan = Plan(make(lambda: nn.Sequential(Masked(), nn.Linear(3, 3)))).bind()
    loaded = {key: torch.rand(value.shape).to(value.dtype) for key, value in plan.model.state_dict().items()}
    plan.model.load_state_dict(loaded, assign=True)
    if again:
        plan.bind()
    as_lightning(plan.model)
    assert differs(plan.model, loaded) == []
    assert same(plan.model[0].mask, torch.ones(3, 3, dtype=torch.bool).tril())


# --- binding again, copies and pickles ---


def test_binding_again_replaces_the_plan() -> None:
    model = make(Block)
    old = Plan(model).bind()
    hooks = [
        len(module._load_state_dict_pre_hooks) + len(module._load_state_dict_post_hooks) for module in model.modules()
    ]
    resets = [bound(module) for module in model.modules()]
    bind(model, {name: (lambda target: fill(target, torch.ones(target.shape))) for name in old.expected}, {})
    assert [bound(module) for module in model.modules()] == resets
    assert hooks == [
        len(module._load_state_dict_pre_hooks) + len(module._load_state_dict_post_hooks) for module in model.modules()
    ]
    as_lightning(model)
    assert old.drawn == []
    assert all(bool((p == 1).all()) for p in model.parameters())


@ways
def test_a_copy_is_bound_by_itself(materialise: Callable[[nn.Module], None]) -> None:
    plan = Plan(make(Block)).bind()
    twin = copy.deepcopy(plan.model)
    materialise(twin)
    assert plan.wrong(twin) == []
    assert twin.head.weight is twin.tokens.weight
    assert all(p.is_meta for p in plan.model.parameters())
    loaded = checkpoint(plan.model)
    twin.load_state_dict(loaded)
    reset_all(twin)
    assert differs(twin, loaded) == []
    as_lightning(plan.model)
    assert plan.wrong() == []


def test_a_copy_of_a_part_takes_no_more_along() -> None:
    plan = Plan(make(Block)).bind()
    twin = copy.deepcopy(plan.model.lstm)
    as_lightning(twin)
    assert all(same(p, plan.expected[f"lstm.{name}"]) for name, p in twin.named_parameters())


def test_a_pickle_is_to_be_bound_again() -> None:
    plan = Plan(make(Block)).bind()
    as_lightning(plan.model)
    file = io.BytesIO()
    torch.save(plan.model, file)
    for twin in (pickle.loads(pickle.dumps(plan.model)), torch.load(io.BytesIO(file.getvalue()), weights_only=False)):
        assert plan.wrong(twin) == []
        with pytest.raises(RuntimeError, match=r"the plan of Embedding.reset_parameters\(\) was not pickled.*bind\(\)"):
            twin.tokens.reset_parameters()
        plan.bind(twin)
        spoil(twin)
        reset_all(twin)
        assert plan.wrong(twin) == []
        loaded = checkpoint(twin)
        twin.load_state_dict(loaded)
        reset_all(twin)
        assert differs(twin, loaded) == []


def test_a_state_dict_can_be_loaded_by_anybody() -> None:
    plan = Plan(make(Block)).bind()
    as_lightning(plan.model)
    file = io.BytesIO()
    torch.save(plan.model.state_dict(), file)
    file.seek(0)
    other = Block()
    other.load_state_dict(torch.load(file, weights_only=True))
    assert plan.wrong(other) == []


# --- by a real plan ---


def real(kind: Callable[[], nn.Module], **options: Any) -> nn.Module:
    model = kind()
    init_weights(model, scheme="he", seed=2, **options)
    return model


def planned(kind: Callable[[], nn.Module], **options: Any) -> nn.Module:
    model = make(kind)
    plan_init(model, scheme="he", seed=2, **options).bind()
    as_lightning(model)
    return model


class Lightning(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), parametrizations.weight_norm(nn.Linear(4, 2)))


def halved() -> nn.Module:
    return nn.Sequential(nn.Embedding(4, 3, padding_idx=2), nn.LSTM(3, 2), nn.Conv1d(2, 2, 3)).bfloat16()


@pytest.mark.parametrize("kind", [Lightning, normed, halved, lambda: nn.TransformerEncoderLayer(4, 2, 8)])
def test_as_init_weights_gives_it(kind: Callable[[], nn.Module]) -> None:
    expected, found = real(kind).state_dict(), planned(kind).state_dict()
    assert list(expected) == list(found)
    assert [name for name, value in expected.items() if not same(value, found[name])] == []


def test_numbers_of_the_global_state() -> None:
    torch.manual_seed(4)
    model = make(normed)
    plan_init(model, scheme="he").bind()
    as_lightning(model)
    other = normed()
    torch.manual_seed(4)
    init_weights(other, scheme="he")
    assert all(map(same, model.state_dict().values(), other.state_dict().values()))


def test_what_its_parametrization_cannot_set_is_refused() -> None:
    model = make(lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(2, 2))))
    with pytest.raises(ValueError, match=r"nobody can give one to '0.parametrizations.weight.original'.*_u' of"):
        plan_init(model, scheme="he", on_uncovered="ignore").bind()


def test_compiled_models_are_bound_as_what_they_compile() -> None:
    model = torch.compile(make(lambda: nn.Sequential(nn.Linear(2, 2))))
    plan = Plan(model._orig_mod)
    plan.bind(model)
    as_lightning(model)
    assert plan.wrong() == []
