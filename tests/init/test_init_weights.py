"""What `init_weights` promises about a whole model: its account, its seeds, its errors."""

import json
import math
import re

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from lightning_gradhealth.init import InitContext, gain, init_weights, register_initializer
from lightning_gradhealth.records import InitReport

pytestmark = pytest.mark.usefixtures("own_registry")


def snapshot(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_same(model, state):
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


class Patches(nn.Module):
    """A module of one's own: a projection, and raw parameters that no rule knows."""

    def __init__(self, size=6, length=5):
        super().__init__()
        self.project = nn.Linear(4, size)
        self.positions = nn.Parameter(torch.full((length, size), 0.25))
        self.temperature = nn.Parameter(torch.tensor(3.0))


# --- the account -------------------------------------------------------------------------------------------


def test_every_parameter_is_in_the_report_once_in_registration_order():
    model = nn.ModuleDict(
        {
            "embed": nn.Embedding(7, 6, padding_idx=0),
            "conv": nn.Conv2d(3, 4, 3),
            "norm": nn.BatchNorm2d(4),
            "rnn": nn.GRU(6, 6),
            "attention": nn.MultiheadAttention(6, 2),
            "act": nn.PReLU(),
            "own": Patches(),
        }
    )
    report = init_weights(model, scheme="he", on_uncovered="ignore")
    names = [re.sub(r"\[.*", "", entry.name) for entry in report.entries]
    assert list(dict.fromkeys(names)) == [name for name, _ in model.named_parameters()]
    assert len({entry.name for entry in report.entries}) == len(report.entries)
    sizes = dict.fromkeys(names, 0)
    for name, entry in zip(names, report.entries, strict=True):
        sizes[name] += math.prod(entry.shape)
    assert sizes == {name: parameter.numel() for name, parameter in model.named_parameters()}


def test_a_real_report_makes_the_round_trip_through_json():
    model = nn.Sequential(nn.Linear(3, 4), nn.LSTM(4, 4), Patches())
    report = init_weights(model, scheme="lecun", on_uncovered="ignore")
    assert InitReport.from_json(report.to_json()) == report
    assert json.loads(report.to_json())["entries"][0]["name"] == "0.weight"


def test_what_an_entry_says():
    report = init_weights(nn.Linear(200, 300), scheme="Kaiming", gamma=0.5, seed=3)
    weight, bias = report.entries
    assert (weight.name, weight.module, weight.shape, weight.rule) == (
        "weight",
        "Linear",
        (300, 200),
        "Linear",
    )
    assert (weight.scheme, weight.distribution, weight.fan) == ("he", "normal", 200)
    assert weight.gain == pytest.approx(math.sqrt(2))
    assert weight.target_std == pytest.approx(0.05)
    assert weight.measured_std == pytest.approx(0.05, rel=0.02)
    assert (bias.scheme, bias.distribution, bias.target_std, bias.measured_std) == ("constant", "", 0, 0)
    assert report.seed == 3


def test_mode_and_nonlinearity_override_the_schemes_own():
    (weight, _) = init_weights(nn.Linear(4, 9), scheme="glorot", mode="fan_geo", nonlinearity="tanh").entries
    assert (weight.fan, weight.gain) == (6, gain("tanh"))
    assert weight.scheme == "xavier"


# --- what is left alone ------------------------------------------------------------------------------------


def test_frozen_skipped_and_integer_parameters_are_kept_and_listed():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    model[0].requires_grad_(False)
    model[2].weight = nn.Parameter(torch.ones(3, 3, dtype=torch.int8), requires_grad=False)
    before = snapshot(model)
    report = init_weights(model, scheme="he", skip=r"1\..*")
    entries = {entry.name: entry for entry in report.entries}
    assert_same(model, {**before, "2.bias": torch.zeros(3)})
    assert [entries[name].rule for name in ("0.weight", "1.weight", "2.weight")] == [
        "frozen",
        "skipped",
        "integer",
    ]
    kept = {name: entry for name, entry in entries.items() if entry.scheme == "kept"}
    assert set(kept) == {"0.weight", "0.bias", "1.weight", "1.bias", "2.weight"}
    assert all(entry.target_std is None for entry in kept.values())
    assert kept["0.weight"].measured_std == pytest.approx(before["0.weight"].std().item())
    assert "quantising" in kept["2.weight"].note


def test_skip_matches_whole_names():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    with pytest.warns(UserWarning, match="matches no parameter's whole name"):
        report = init_weights(model, scheme="he", skip=["0", "weight", r"1\.bias"])
    assert [entry.name for entry in report.entries if entry.rule == "skipped"] == ["1.bias"]


def tied_model():
    model = nn.ModuleDict({"embed": nn.Embedding(50, 8, padding_idx=0), "head": nn.Linear(8, 50)})
    model["head"].weight = model["embed"].weight
    return model


def test_tied_weights_are_drawn_once_by_their_owner():
    model = tied_model()
    report = init_weights(model, scheme="he", seed=0)
    assert model["head"].weight is model["embed"].weight
    assert not model["embed"].weight[0].any()
    assert [entry.name for entry in report.entries] == ["embed.weight", "head.bias"]
    assert (report.entries[0].rule, report.entries[0].fan) == ("Linear", 8)
    assert report.entries[0].note.endswith("drawn as the weight that it also is; tied: also head.weight")


def test_a_tied_weight_is_skipped_by_any_of_its_names():
    model = tied_model()
    before = model["embed"].weight.detach().clone()
    init_weights(model, scheme="he", skip=r"head\..*")
    assert torch.equal(model["embed"].weight, before)


def test_a_shared_module_is_drawn_once():
    shared = nn.Linear(4, 4)
    report = init_weights(nn.Sequential(shared, nn.ReLU(), shared), scheme="he")
    assert [(entry.name, entry.note) for entry in report.entries] == [
        ("0.weight", "tied: also 2.weight"),
        ("0.bias", "= 0; tied: also 2.bias"),
    ]


# --- what no rule knows ------------------------------------------------------------------------------------


def test_uncovered_warns_once_and_names_the_remedies():
    model = Patches()
    with pytest.warns(UserWarning, match="2 parameters are not covered") as caught:
        report = init_weights(model, scheme="he")
    (warning,) = caught
    message = str(warning.message)
    assert "positions (no initializer knows Patches), temperature" in message
    assert "Give example_inputs=" in message
    assert "overrides=" in message
    assert "@register_initializer" in message
    assert "skip=" in message
    assert warning.filename == __file__
    assert report.uncovered == ("positions", "temperature")
    assert (model.positions == 0.25).all()
    assert not model.project.bias.any()


def test_uncovered_raise_changes_nothing():
    model = nn.Sequential(nn.Linear(3, 3), Patches(), nn.LSTM(3, 3))
    before, state = snapshot(model), torch.get_rng_state()
    with pytest.raises(ValueError, match=r"1\.positions \(no initializer knows Patches\).*nothing was changed"):
        init_weights(model, scheme="he", on_uncovered="raise")
    assert_same(model, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_uncovered_ignore_is_silent_and_skip_covers():
    assert init_weights(Patches(), scheme="he", on_uncovered="ignore").uncovered
    skip = ["positions", "temperature"]
    assert not init_weights(Patches(), scheme="he", skip=skip, on_uncovered="raise").uncovered


def test_complex_weights_have_half_of_the_variance_in_each_part():
    model = nn.Linear(200, 300, dtype=torch.complex64)
    init_weights(model, scheme="he", seed=0)
    for part in (model.weight.real, model.weight.imag):
        assert float(part.detach().square().mean()) == pytest.approx(1 / 200, rel=0.03)


# --- initializers of one's own -----------------------------------------------------------------------------


def test_a_registered_initializer_covers_its_class_and_subclasses():
    @register_initializer(Patches)
    def patches(module, context):
        assert isinstance(context, InitContext)
        context.weight_(module.positions, fan_in=1, gain=0.02, note="as in the paper")
        context.keep(module.temperature, "chosen by hand")

    class Deeper(Patches):
        pass

    report = init_weights(Deeper(64, 1000), scheme="he", seed=0, on_uncovered="raise")
    entries = {entry.name: entry for entry in report.entries}
    positions = entries["positions"]
    assert (positions.rule, positions.module, positions.note) == ("patches", "Deeper", "as in the paper")
    assert positions.measured_std == pytest.approx(0.02, rel=0.03)
    assert entries["temperature"].scheme == "kept"
    assert entries["project.weight"].rule == "Linear"


def test_it_returns_the_function_and_the_later_one_rules():
    def first(module, context):
        context.constant_(module.weight, 1.0)

    assert register_initializer(nn.Linear)(first) is first
    model = nn.Linear(3, 3, bias=False)
    init_weights(model, scheme="he")
    assert (model.weight == 1).all()
    register_initializer(nn.Linear)(lambda module, context: context.constant_(module.weight, 2.0))
    init_weights(model, scheme="he")
    assert (model.weight == 2).all()


def test_a_container_comes_before_its_children_and_stands():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(3, 3), nn.Linear(3, 3)

    @register_initializer(Block)
    def zero_last(module, context):
        context.constant_(module.last.weight, 0.0, note="the block starts as the identity")

    model = nn.Sequential(Block())
    report = init_weights(model, scheme="he")
    assert not model[0].last.weight.any()
    assert model[0].first.weight.all()
    rules = {entry.name: entry.rule for entry in report.entries}
    assert rules["0.last.weight"] == "zero_last"
    assert rules["0.last.bias"] == rules["0.first.weight"] == "Linear"


def test_skip_and_frozen_overrule_a_registered_initializer():
    model = Patches()
    model.temperature.requires_grad_(False)

    @register_initializer(Patches)
    def patches(module, context):
        context.constant_(module.positions, 9.0)
        context.constant_(module.temperature, 9.0)
        context.constant_(None, 9.0)

    init_weights(model, scheme="he", skip="positions")
    assert (model.positions == 0.25).all()
    assert model.temperature == 3


def test_fill_takes_any_function_and_blocks_any_rows():
    @register_initializer(Patches)
    def patches(module, context):
        context.keep(module.temperature)
        half = slice(0, 2), slice(2, 5)
        context.orthogonal_(module.positions, block="top", rows=half[0])
        context.fill_(
            module.positions,
            lambda numbers, generator: numbers.exponential_(generator=generator),
            block="rest",
            rows=half[1],
        )

    model = Patches().bfloat16()
    report = init_weights(model, scheme="he", seed=0)
    names = [entry.name for entry in report.entries]
    assert names[:2] == ["positions[top]", "positions[rest]"]
    assert report.entries[1].scheme == "custom"
    assert (model.positions[2:] > 0).all()
    first = model.positions.detach().clone()
    init_weights(model, scheme="he", seed=0)
    assert torch.equal(model.positions, first)


def test_blocks_along_another_axis():
    @register_initializer(Patches)
    def patches(module, context):
        context.keep(module.temperature)
        context.constant_(module.positions, 4.0, block="left", rows=slice(0, 2), axis=1)
        context.weight_(module.positions, block="right", rows=slice(2, None), axis=-1, gain=1.0)

    model = Patches()
    report = init_weights(model, scheme="he", seed=0)
    assert [entry.shape for entry in report.entries if "positions" in entry.name] == [(5, 2), (5, 4)]
    assert (model.positions[:, :2] == 4).all()
    assert (model.positions[:, 2:] != 4).all()
    assert report.entries[1].fan == 4


def test_errors_of_initializers():
    with pytest.raises(TypeError, match=r"module_type must be a subclass of nn\.Module, got 3"):
        register_initializer(3)

    @register_initializer(Patches)
    def half(module, context):
        context.constant_(module.positions, 1.0, block="top", rows=slice(0, 2))

    model = Patches()
    before = snapshot(model)
    with pytest.raises(ValueError, match="initializer half sets row 2 of 'positions' 0 times"):
        init_weights(model, scheme="he")

    @register_initializer(Patches)
    def computed(module, context):
        context.weight_(module.positions * 2)

    with pytest.raises(ValueError, match=r"one of the model's own, got a tensor .*\(5, 6\) from .* computed"):
        init_weights(model, scheme="he")
    assert_same(model, before)


# --- seeds -------------------------------------------------------------------------------------------------


def ordered(names):
    make = {
        "linear": lambda: nn.Linear(6, 5),
        "conv": lambda: nn.Conv2d(3, 4, 3),
        "rnn": lambda: nn.LSTM(4, 3),
        "attention": lambda: nn.MultiheadAttention(4, 2),
    }
    return nn.ModuleDict({name: make[name]() for name in names})


@settings(max_examples=10)
@given(
    st.permutations(["linear", "conv", "rnn", "attention"]),
    st.integers(),
    st.sampled_from(["normal", "truncated_normal"]),
)
def test_a_seed_gives_the_same_weights_whatever_the_order(names, seed, distribution):
    one, two = ordered(sorted(names)), ordered(names)
    state = torch.get_rng_state()
    for model in (one, two):
        init_weights(model, scheme="he", seed=seed, distribution=distribution)
    assert torch.equal(torch.get_rng_state(), state)
    assert_same(two, snapshot(one))


def test_seeds_names_and_blocks_draw_differently():
    one, two = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5)), nn.Sequential(nn.Linear(5, 5))
    init_weights(one, scheme="he", seed=0)
    init_weights(two, scheme="he", seed=1)
    assert not torch.equal(one[0].weight, one[1].weight)
    assert not torch.equal(one[0].weight, two[0].weight)
    attention = nn.MultiheadAttention(4, 2)
    init_weights(attention, scheme="he", seed=0)
    query, key, _ = attention.in_proj_weight.chunk(3)
    assert not torch.equal(query, key)


def test_memory_format_and_dtype_only_round():
    def model():
        return nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3))

    plain, last, half = model(), model().to(memory_format=torch.channels_last), model().bfloat16()
    for each in (plain, last, half):
        init_weights(each, scheme="he", seed=0)
    assert_same(last, snapshot(plain))
    assert last[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert_same(half, {name: value.bfloat16() for name, value in snapshot(plain).items()})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
@pytest.mark.parametrize("distribution", ["normal", "uniform", "truncated_normal"])
def test_the_device_changes_nothing(distribution):
    here, there = (ordered(["linear", "conv", "rnn", "attention"]) for _ in range(2))
    for model in (here, there.cuda()):
        init_weights(model, scheme="he", seed=0, distribution=distribution)
    assert_same(there.cpu(), snapshot(here))


def test_the_draws_of_a_seed_are_pinned():
    """A change here changes the weights of everybody who relies on a seed."""
    model = nn.Linear(2, 2)
    init_weights(model, scheme="lecun", seed=0)
    expected = torch.tensor([[0.822416, 0.267646], [-0.898863, 0.272284]])
    torch.testing.assert_close(model.weight.detach(), expected, rtol=1e-5, atol=1e-6)


def test_the_global_seed_rules_where_none_is_given():
    reports, weights = [], []
    with torch.random.fork_rng(devices=[]):
        for seed in (7, 7, 8):
            torch.manual_seed(seed)
            model = nn.Linear(4, 4)
            reports.append(init_weights(model, scheme="he"))
            weights.append(model.weight.detach().clone())
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    again = nn.Linear(4, 4)
    init_weights(again, scheme="he", seed=reports[2].seed)
    assert torch.equal(again.weight, weights[2])


def test_autograd_is_not_involved():
    model = nn.Linear(4, 4)
    weight = model.weight
    init_weights(model, scheme="he")
    assert model.weight is weight
    assert weight.grad_fn is None
    assert weight.grad is None
    model(torch.randn(2, 4)).sum().backward()


def test_default_device_and_dtype_do_not_matter():
    one, two = nn.LSTM(4, 4), nn.LSTM(4, 4)
    init_weights(one, scheme="he", seed=0)
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            init_weights(two, scheme="he", seed=0)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same(two, snapshot(one))


@pytest.fixture
def _process_group(tmp_path):
    if not torch.distributed.is_available():
        pytest.skip("no torch.distributed")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("_process_group")
def test_a_model_inside_ddp():
    model = nn.parallel.DistributedDataParallel(nn.Linear(200, 200))
    report = init_weights(model, scheme="he", seed=0)
    assert [entry.name for entry in report.entries] == ["weight", "bias"]
    assert report.entries[0].measured_std == pytest.approx(0.1, rel=0.03)


def test_empty_models_and_layers():
    assert init_weights(nn.ReLU(), scheme="he").entries == ()
    with pytest.warns(UserWarning, match="zero-element"):
        empty = nn.Linear(0, 3)
    report = init_weights(empty, scheme="xavier", mode="fan_geo")
    assert report.entries[0].measured_std is None


# --- errors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"scheme": "hee"},
            ValueError,
            "scheme must be one of 'auto', .*, got 'hee'; did you",
        ),
        ({"residual": "deep"}, ValueError, "residual must be one of .*, got 'deep'"),
        ({"residual": "depth"}, ValueError, "residual='depth' needs example_inputs"),
        ({"scheme": None}, TypeError, "scheme must be one of .*, got None"),
        ({"gamma": -1}, ValueError, "gamma must be a finite number > 0, got -1; leave it out"),
        ({"mode": "fan"}, ValueError, "mode must be one of .*, got 'fan'"),
        ({"distribution": "gauss"}, ValueError, "distribution must be one of .*, got 'gauss'"),
        (
            {"on_uncovered": "explode"},
            ValueError,
            "on_uncovered must be one of .*, got 'explode'",
        ),
        ({"nonlinearity": nn.Softmax(-1)}, ValueError, "nonlinearity must be an activation .* got Softmax"),
        ({"nonlinearity": "rellu"}, ValueError, "nonlinearity must be one of .*did you mean 'relu'"),
        ({"skip": "("}, ValueError, r"skip: '\(' is not a valid regular expression \(.*whole names"),
        ({"skip": [3]}, TypeError, "skip must be a regular expression, got 3"),
        ({"skip": 3}, TypeError, "skip must be regular expressions, got 3"),
        ({"seed": 1.5}, TypeError, "seed must be an int or None, got 1.5; None draws one"),
        ({"seed": True}, TypeError, "seed must be an int or None, got True"),
    ],
)
def test_errors_of_arguments_change_nothing(options, error, message):
    model = nn.Linear(3, 3)
    before = snapshot(model)
    with pytest.raises(error, match=message):
        init_weights(model, **{"scheme": "he", **options})
    assert_same(model, before)


def test_errors_of_models():
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got \[Linear.*; give the model"):
        init_weights([nn.Linear(2, 2)], scheme="he")
    with pytest.raises(ValueError, match=r"parameter '1\.weight' of model .* lazy module\); run one forward pass"):
        init_weights(nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(2)), scheme="he")
    with pytest.raises(ValueError, match=r"'0\.weight' of model is on the meta device; use plan_init\(\.\.\.\)\.bind"):
        init_weights(nn.Sequential(nn.Linear(2, 2, device="meta")), scheme="he")


@pytest.mark.usefixtures("_process_group")
def test_sharded_parameters_get_the_weights_of_one_process():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_module

    plain = nn.Sequential(nn.Linear(3, 2))
    init_weights(plain, scheme="he", seed=0)
    model = nn.Sequential(distribute_module(nn.Linear(3, 2), init_device_mesh("cpu", (1,))))
    report = init_weights(model, scheme="he", seed=0)
    assert torch.equal(model[0].weight.full_tensor(), plain[0].weight)
    assert report.entries[0].measured_std is None


def test_flat_shards_are_refused():
    model = nn.Linear(2, 2)
    model.weight._fsdp_flattened = True
    with pytest.raises(ValueError, match=r"'weight' of model .* flat shard of FSDP1.*; initialise the model before"):
        init_weights(model, scheme="he")


@pytest.mark.parametrize("first", ["embedding", "head"])
def test_a_tied_embedding_keeps_its_padding_whoever_owns_it(first: str) -> None:
    parts = {"embedding": nn.Embedding(7, 4, padding_idx=2), "head": nn.Linear(4, 7, bias=False)}
    parts["head"].weight = parts["embedding"].weight
    model = nn.ModuleDict({name: parts[name] for name in sorted(parts, key=lambda name: name != first)})
    before = parts["embedding"].weight.detach().clone()
    (entry,) = init_weights(model, scheme="he", seed=0).entries
    assert torch.equal(parts["head"].weight[2], before[2])
    assert not torch.equal(parts["head"].weight[3], before[3])
    assert "row 2, the padding, is kept" in entry.note


def test_a_skip_that_matches_nothing_is_said() -> None:
    with pytest.warns(UserWarning, match=r"skip: 'hed\\\\..\*' matches no parameter's whole name"):
        init_weights(nn.Linear(2, 2), scheme="he", skip=r"hed\..*")


class Packed(nn.Module):
    """A weight of five rows, to be set in blocks."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(5, 4))


def test_blocks_that_overlap_are_refused():
    @register_initializer(Packed)
    def overlapping(module, context):
        context.weight_(module.w, block="a", rows=slice(0, 3))
        context.weight_(module.w, block="b", rows=slice(2, 5))

    with pytest.raises(ValueError, match="overlapping sets row 2 of 'w' 2 times; give each of its rows exactly one"):
        init_weights(Packed(), scheme="he")


@pytest.mark.parametrize(
    "draw",
    [lambda n, g: torch.ones(5, 4), lambda n, g: n.fill_(math.nan), lambda n, g: n[:4].normal_(generator=g)],
    ids=["returns instead of filling", "NaN", "leaves a row"],
)
def test_a_draw_that_does_not_fill_is_refused(draw):
    @register_initializer(Packed)
    def careless(module, context):
        context.fill_(module.w, draw)

    model = Packed()
    with pytest.raises(ValueError, match=r"careless leaves NaN or Inf in 'w'.*must fill every element in place"):
        init_weights(model, scheme="he")
    assert not model.w.any()


def test_a_gamma_beyond_the_dtype_is_refused():
    with pytest.raises(ValueError, match=r"leaves NaN or Inf in 'weight' \(torch.float16\)"):
        init_weights(nn.Linear(4, 4).half(), scheme="he", gamma=1e6)


def test_an_initializer_that_writes_by_itself_is_told_so():
    @register_initializer(Packed)
    def direct(module, context):
        nn.init.ones_(module.w)

    with pytest.raises(ValueError, match="has written into 'w' by itself; let the context do it"):
        init_weights(Packed(), scheme="he")


def test_a_subclass_speaks_only_of_what_is_new():
    class Shifted(nn.Linear):
        def __init__(self):
            super().__init__(64, 32)
            self.shift = nn.Parameter(torch.ones(3))

    @register_initializer(Shifted)
    def shifted(module, context):
        context.constant_(module.shift, 0.5)

    entries = {entry.name: entry for entry in init_weights(Shifted(), scheme="he", seed=0).entries}
    assert {name: entry.rule for name, entry in entries.items()} == {
        "weight": "Linear",
        "bias": "Linear",
        "shift": "shifted",
    }
    assert entries["weight"].fan == 64


@pytest.mark.parametrize("skip", [[], [r"0\.weight"]])
def test_a_linear_with_an_odd_weight_is_uncovered_or_skipped(skip):
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].weight = nn.Parameter(torch.ones(4))
    report = init_weights(model, scheme="he", skip=skip, on_uncovered="ignore")
    assert report.entries[0].rule == ("skipped" if skip else "uncovered")


def test_a_compiled_model_gets_the_same_weights():
    plain, compiled = nn.Sequential(nn.Linear(8, 8)), torch.compile(nn.Sequential(nn.Linear(8, 8)), backend="eager")
    for model in (plain, compiled):
        init_weights(model, scheme="he", seed=3)
    assert torch.equal(plain[0].weight, compiled._orig_mod[0].weight)


def test_a_recurrent_net_of_relus_keeps_its_gradient_through_time():
    torch.manual_seed(0)
    rnn = nn.RNN(16, 256, nonlinearity="relu")
    init_weights(rnn, scheme="he", seed=0)
    x = torch.randn(40, 8, 16, requires_grad=True)
    rnn(x)[0][-1].square().sum().backward()
    norms = x.grad.flatten(1).norm(dim=1)
    assert 0.05 < norms[0] / norms[-1] < 20
