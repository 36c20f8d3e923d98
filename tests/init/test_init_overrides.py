"""`overrides=`: what is selected, what is done, who wins, and every way to get it wrong."""

import math

import pytest
import torch
from torch import nn

from lightning_gradhealth.init import init_weights, register_initializer

pytestmark = pytest.mark.usefixtures("own_registry")


class MyLinear(nn.Linear):
    pass


class Raw(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.full((40, 50), 3.0))
        self.decay = nn.Parameter(torch.full((400,), 3.0))


def net():
    return nn.ModuleDict(
        {
            "first": nn.Linear(100, 100),
            "norm": nn.LayerNorm(100),
            "mine": MyLinear(100, 100),
            "conv": nn.Conv1d(100, 100, 1),
        }
    )


def entries(model, overrides, **options):
    report = init_weights(model, **{"scheme": "he", "seed": 0, "overrides": overrides, **options})
    return {entry.name: entry for entry in report.entries}


def test_a_class_selects_what_its_instances_own_subclasses_too():
    found = entries(net(), {nn.Linear: "xavier"})
    assert {name: entry.scheme for name, entry in found.items() if "weight" in name} == {
        "first.weight": "xavier",
        "mine.weight": "xavier",
        "conv.weight": "he",
        "norm.weight": "constant",
    }
    assert found["first.weight"].gain == 1
    assert found["first.weight"].note == "by overrides[0]"
    assert found["first.bias"].note == "= 0"


@pytest.mark.parametrize(
    ("options", "action", "gain", "fan"),
    [
        ({"scheme": "he"}, "xavier", 1.0, 70),
        ({"scheme": "xavier"}, "he", math.sqrt(2), 40),
        ({"scheme": "he"}, "auto", 1.0, 40),
        ({"scheme": "he", "mode": "fan_out"}, "xavier", 1.0, 100),
        ({"scheme": "he", "nonlinearity": "tanh"}, "xavier", 1.5925374, 70),
        ({"scheme": "auto"}, {"gamma": 2.0}, 1.0, 40),
    ],
)
def test_what_the_call_names_holds_under_another_scheme(options, action, gain, fan):
    entry = entries(nn.Linear(40, 100), {nn.Linear: action}, **options)["weight"]
    assert entry.gain == pytest.approx(gain)
    assert entry.fan == fan
    assert entry.target_std == pytest.approx((2 if isinstance(action, dict) else 1) * gain / math.sqrt(fan))


def test_the_first_match_wins():
    found = entries(net(), [(MyLinear, 3.0), (r".*weight", {"std": 0.5}), (nn.Module, "ones")])
    assert found["mine.weight"].gain == 3
    assert found["mine.weight"].measured_std == pytest.approx(0.3, rel=0.05)
    assert found["first.weight"].measured_std == pytest.approx(0.5, rel=0.05)
    assert found["first.bias"].scheme == "constant"


def test_every_action():
    model = net()
    overrides = [
        ("first.weight", {"scheme": "xavier", "gain": 2.0, "gamma": 0.5, "mode": "fan_out", "distribution": "uniform"}),
        ("first.bias", {"value": 0.25}),
        (lambda name, parameter: name == "mine.weight" and parameter.ndim == 2, "orthogonal"),
        ("mine.bias", "ones"),
        (nn.Conv1d, "zeros"),
        (nn.LayerNorm, "skip"),
    ]
    with torch.no_grad():
        model["norm"].weight.fill_(7.0)
    found = entries(model, overrides)
    first = found["first.weight"]
    assert (first.scheme, first.gain, first.distribution, first.found) == ("xavier", 2.0, "uniform", "override")
    assert first.target_std == pytest.approx(0.1)
    assert model["first"].weight.abs().max() <= 0.1 * math.sqrt(3)
    assert (model["first"].bias == 0.25).all()
    values = torch.linalg.svdvals(model["mine"].weight.detach())
    torch.testing.assert_close(values, torch.ones(100), rtol=0, atol=1e-5)
    assert (model["mine"].bias == 1).all()
    assert not model["conv"].weight.any()
    assert (model["norm"].weight == 7).all()
    assert found["norm.weight"].rule == "skipped"
    assert found["conv.weight"].rule == "override"


def test_a_pattern_for_everything_spares_biases_and_norms():
    model = net()
    found = entries(model, {".*": {"std": 0.02}})
    assert {name for name, entry in found.items() if entry.found == "override"} == {
        "first.weight",
        "mine.weight",
        "conv.weight",
    }
    assert (model["norm"].weight == 1).all()
    assert not model["first"].bias.any()


def test_raw_parameters_count_as_covered():
    model = Raw()
    found = entries(model, {"table": "lecun", "decay": {"std": 0.1}}, on_uncovered="raise")
    assert found["table"].rule == found["decay"].rule == "override"
    assert found["table"].fan == 50
    assert model.decay.std().item() == pytest.approx(0.1, rel=0.1)


def test_a_raw_vector_has_no_fan_so_that_a_scheme_does_not_do():
    with pytest.raises(
        ValueError, match=r"overrides\[0\] cannot draw 'decay' with the shape \(400,\).*give its standard"
    ):
        entries(Raw(), {"decay": "he"}, skip="table")


def test_an_override_outdoes_a_registered_initializer_but_not_its_other_parameters():
    @register_initializer(Raw)
    def raw(module, context):
        context.constant_(module.table, 1.0)
        context.constant_(module.decay, 2.0)

    model = Raw()
    entries(model, {"table": {"std": 0.5}})
    assert model.table.std().item() == pytest.approx(0.5, rel=0.1)
    assert (model.decay == 2).all()


def test_blocks_stay_blocks():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(64, 2), "rnn": nn.LSTM(64, 64)})
    found = entries(
        model,
        [
            (r"attention\.in_proj_weight", {"std": 0.3}),
            (r"rnn\.weight_hh_l0", 0.5),
            (r"rnn\.weight_ih_l0", {"scheme": "orthogonal", "gain": 2.0}),
        ],
    )
    assert {name for name in found if "in_proj_weight" in name} == {
        f"attention.in_proj_weight[{block}]" for block in ("query", "key", "value")
    }
    assert model["attention"].in_proj_weight.std().item() == pytest.approx(0.3, rel=0.05)
    for name, size in (("weight_hh_l0", 0.5), ("weight_ih_l0", 2.0)):
        for gate in getattr(model["rnn"], name).detach().chunk(4):
            values = torch.linalg.svdvals(gate)
            torch.testing.assert_close(values, torch.full_like(values, size), rtol=1e-4, atol=0)


def test_a_recurrent_matrix_takes_another_scheme():
    found = entries(nn.LSTM(16, 16), {"weight_hh_l0": "xavier"})
    assert found["weight_hh_l0[input]"].scheme == "xavier"
    assert found["weight_ih_l0[input]"].scheme == "he"


def test_the_padding_row_is_kept():
    model = nn.Embedding(10, 4, padding_idx=0)
    with torch.no_grad():
        model.weight[0] = 5.0
    entries(model, {nn.Embedding: {"std": 0.02}})
    assert (model.weight[0] == 5).all()
    assert model.weight[1:].abs().max() < 0.2


def test_a_name_overrules_no_reinit_and_a_class_does_not():
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].weight._no_reinit = True
    before = model[0].weight.detach().clone()
    found = entries(model, {})
    assert found["0.weight"].rule == "state"
    assert "_no_reinit" in found["0.weight"].note
    assert torch.equal(model[0].weight, before)
    entries(model, {nn.Linear: {"std": 9.0}})
    assert torch.equal(model[0].weight, before)
    entries(model, {r"0\.weight": "zeros"})
    assert not model[0].weight.any()


def test_skip_goes_before_a_class():
    model = net()
    before = model["mine"].weight.detach().clone()
    found = entries(model, {nn.Linear: "xavier"}, skip=r"mine\..*")
    assert torch.equal(model["mine"].weight, before)
    assert found["first.weight"].scheme == "xavier"


class Branch(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x):
        return x + self.two(torch.relu(self.one(x)))


def test_a_gain_is_final_and_a_scheme_is_not():
    model, x = nn.Sequential(Branch(), Branch()), torch.randn(2, 64)
    plain = entries(model, {}, scheme="auto", example_inputs=x, residual="depth")["0.two.weight"]
    same = entries(model, {r"0\.two\.weight": "he"}, scheme="auto", example_inputs=x, residual="depth")["0.two.weight"]
    final = entries(model, {r"0\.two\.weight": 1.0}, scheme="auto", example_inputs=x, residual="depth")["0.two.weight"]
    assert plain.target_std == pytest.approx(0.5 * plain.gain / 8)
    assert same.target_std == pytest.approx(0.5 * math.sqrt(2) / 8)
    assert final.target_std == pytest.approx(1 / 8)


def test_zero_last_is_zero_whatever_the_scheme():
    model = nn.Sequential(Branch(), Branch())
    found = entries(model, {}, scheme="xavier", example_inputs=torch.randn(2, 64), residual="zero_last")
    assert not model[0].two.weight.any()
    assert model[0].one.weight.any()
    assert "starts silent" in found["0.two.weight"].note


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        ("he", TypeError, r"overrides must be pairs \(selector, action\), got 'he'; write overrides="),
        ([nn.Linear], TypeError, "overrides must be pairs .*got <class .*Linear"),
        ([("a", "he", 1)], TypeError, r"overrides must be pairs .*got \('a', 'he', 1\)"),
        (3, TypeError, "overrides must be pairs .*got 3"),
        ({3: "he"}, TypeError, r"overrides\[0\] must select by a class of modules, .*got 3; write nn.Linear"),
        ({int: "he"}, TypeError, r"overrides\[0\] must select by .*got <class 'int'>"),
        ({"(": "he"}, ValueError, r"overrides\[0\] must select by a regular expression, got '\(' \(.*whole names"),
        ({".*": "hee"}, ValueError, r"overrides\[0\] must be one of .*got 'hee'; did you mean 'he'"),
        ({".*": None}, TypeError, r"overrides\[0\] must say what to do by a scheme.*got None; write \{\"std\""),
        ({".*": True}, TypeError, r"overrides\[0\] must say what to do .*got True"),
        ({".*": 0}, ValueError, r"overrides\[0\] as a gain must be a finite number > 0, got 0; write \"zeros\""),
        ({".*": {}}, ValueError, r"overrides\[0\] must say what to do, got \{\}; give one of scheme"),
        ({".*": {"stdev": 1}}, ValueError, r"overrides\[0\] must have keys among .*got 'stdev'; did you mean 'std'"),
        ({".*": {"std": 1, "gain": 1}}, ValueError, r"overrides\[0\] contradicts itself: 'std' and 'gain' both"),
        ({".*": {"value": 1, "scheme": "he"}}, ValueError, r"overrides\[0\] contradicts itself: 'value' and 'scheme'"),
        ({".*": {"value": "x"}}, TypeError, r"overrides\[0\]\['value'\] must be a finite number, got 'x'"),
        ({".*": {"value": math.nan}}, ValueError, r"overrides\[0\]\['value'\] must be a finite number, got nan"),
        (
            {".*": {"std": -1}},
            ValueError,
            r"overrides\[0\]\['std'\] must be a finite number > 0, got -1; leave it out, or",
        ),
        ({".*": {"mode": "fan"}}, ValueError, r"overrides\[0\]\['mode'\] must be one of .*got 'fan'"),
        ({".*": {"scheme": "hee"}}, ValueError, r"overrides\[0\]\['scheme'\] must be one of .*got 'hee'"),
        ({".*": {"distribution": "g"}}, ValueError, r"overrides\[0\]\['distribution'\] must be one of"),
        ({"mine": "he"}, ValueError, r"overrides\[0\] matches no parameter: the pattern 'mine' must match whole names"),
        ({nn.Conv3d: "he"}, ValueError, r"overrides\[0\] matches no parameter: Conv3d owns no parameter in this model"),
        ({nn.ModuleDict: "he"}, ValueError, r"matches no parameter: ModuleDict owns no parameter"),
        ([(lambda name, p: False, "he")], ValueError, r"matches no parameter: <lambda> is true for none"),
        ({nn.LayerNorm: "he"}, ValueError, r"overrides\[0\] matches only parameters that it cannot set \(no weight\)"),
        (
            [(nn.Linear, "he"), (MyLinear, "xavier")],
            ValueError,
            r"overrides\[1\] is never used: overrides\[0\] .*'mine.weight'; put it before overrides\[0\]",
        ),
    ],
)
def test_errors_change_nothing(overrides, error, message):
    model = net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    with pytest.raises(error, match=message):
        init_weights(model, scheme="he", overrides=overrides)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_skip_and_a_name_contradict_each_other():
    with pytest.raises(ValueError, match=r"skip and overrides\[0\] both speak of 'first.weight'; leave it out of one"):
        entries(net(), {r"first\..*": "he"}, skip=r"first\.weight")
    entries(net(), {r"first\..*": "skip"}, skip=r"first\.weight")


def test_a_frozen_parameter_cannot_be_set():
    model = net()
    model["first"].requires_grad_(False)
    with pytest.raises(ValueError, match=r"it cannot set \(frozen\), such as 'first.weight'; leave it out"):
        entries(model, {r"first\.weight": "zeros"})
