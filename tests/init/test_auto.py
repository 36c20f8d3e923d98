"""`scheme="auto"`: the gain of every weight is sqrt(q / m), whatever surrounds it; what is no weight stays."""

import math

import lightning.pytorch as pl
import pytest
import torch
from calls import Calls, table
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

import lightning_gradhealth as gh
from lightning_gradhealth.init.auto import advise

MOMENT = {  # E[f^2]
    name: gh.gain(name) ** -2 for name in ("linear", "relu", "gelu", "silu", "tanh", "sigmoid", "selu", "elu", "mish")
}
FUNCTIONS = {name: getattr(F, name) for name in MOMENT if name != "linear"} | {"linear": lambda z: z}


def advised(model, x, residual="auto", nonlinearity="auto"):
    found = advise(model, x, residual=residual, nonlinearity=nonlinearity, guess=False)
    return {name: found.advice[id(p)] for name, p in model.named_parameters() if id(p) in found.advice}


def entries(model, x, **options):
    return {e.name: e for e in gh.init_weights(model, x, seed=0, **options).entries}


def chain(names, width=12):
    layers = nn.ModuleList(nn.Linear(width, width) for _ in range(len(names) + 1))

    def forward(self, x):
        for layer, name in zip(self.layers, names, strict=False):
            x = FUNCTIONS[name](layer(x))
        return self.layers[-1](x)

    return Calls(forward, layers=layers)


def expected(names):
    """The recurrence by hand: m from the function behind, q from the one in front."""
    gains, reads = [], 1.0
    for name in names:
        gives = 1 / MOMENT[name] if name == "relu" else 1.0
        gains.append(math.sqrt(gives / reads))
        reads = gives * MOMENT[name]  # at unit variance, or for a homogeneous function
    return [*gains, 1.0]  # an output layer has the plain 1 / fan_in


@pytest.mark.parametrize(
    "names",
    [
        ["relu"] * 4,
        ["gelu"] * 4,
        ["tanh", "relu", "silu"],
        ["selu", "relu", "relu", "sigmoid"],
        ["linear", "linear", "gelu"],
        ["relu", "linear", "elu", "mish", "tanh"],
        [],
    ],
    ids=str,
)
def test_gains_follow_the_recurrence(names):
    found = advised(chain(names), torch.randn(8, 12))
    assert [found[f"layers.{i}.weight"].gain for i in range(len(names) + 1)] == pytest.approx(expected(names), rel=1e-3)


def test_the_invariant_holds_in_a_wide_net_of_mixed_functions():
    """Of what the weights read and give, by hooks: variance q at every weight but the last."""
    names = ["relu", "tanh", "gelu", "relu", "silu", "selu"]
    model, x = chain(names, width=768), torch.randn(256, 768)
    gh.init_weights(model, x, seed=0)
    with torch.no_grad():
        for layer, name in zip(model.layers, names, strict=False):
            x = layer(x)
            assert float(x.var()) == pytest.approx(2 if name == "relu" else 1, rel=0.1), name
            x = FUNCTIONS[name](x)


@pytest.mark.parametrize(
    ("function", "scheme"),
    [
        (F.relu, "he"),
        (F.leaky_relu, "he"),
        (F.gelu, "he"),
        (F.silu, "he"),
        (torch.tanh, "xavier"),
        (torch.sigmoid, "xavier"),
        (F.softsign, "xavier"),
        (F.hardtanh, "xavier"),
        (lambda z: 2 * torch.tanh(z / 2), "xavier"),
        (F.selu, "lecun"),
        (lambda z: z, "lecun"),
    ],
    ids=range(11),
)
def test_the_scheme_has_the_name_that_the_field_gives_it(function, scheme):
    layers = nn.ModuleList(nn.Linear(12, 12) for _ in range(3))
    model = Calls(lambda self, x: self.layers[2](function(self.layers[1](function(self.layers[0](x))))), layers=layers)
    assert advised(model, torch.randn(8, 12))["layers.1.weight"].scheme == scheme


@pytest.mark.parametrize(
    ("end", "is_output"),
    [
        (lambda z: z, True),
        (lambda z: z.view(-1), True),
        (lambda z: z.float().detach(), True),
        (lambda z: F.softmax(z, -1), True),
        (lambda z: F.log_softmax(z, -1), True),
        (lambda z: {"logits": z, "classes": z.argmax(-1)}, True),
        (lambda z: (z, z), True),
        (lambda z: z.chunk(2, 1), True),
        (F.relu, False),
        (torch.tanh, False),
    ],
    ids=range(10),
)
def test_output_layers(end, is_output):
    model = Calls(lambda self, x: end(self.head(F.gelu(self.body(x)))), body=nn.Linear(8, 8), head=nn.Linear(8, 4))
    advice = advised(model, torch.randn(6, 8))["head.weight"]
    assert (advice.found == "output") == is_output
    if is_output:
        assert advice.gain == 1
    else:
        gives = 2 if end is F.relu else 1
        assert advice.gain == pytest.approx(math.sqrt(gives / MOMENT["gelu"]), rel=1e-3)


def test_several_heads_are_all_outputs():
    model = Calls(
        lambda self, x: (self.a(h := F.relu(self.body(x))), self.b(h), h),
        body=nn.Linear(8, 8),
        a=nn.Linear(8, 2),
        b=nn.Linear(8, 3),
    )
    found = advised(model, torch.randn(6, 8))
    assert [found[f"{name}.weight"].found for name in "ab"] == ["output", "output"]
    assert found["body.weight"].gain == pytest.approx(2**0.5)


# --- what stays ---


def test_a_low_rank_pair_keeps_its_zero_however_it_is_written():
    parts = {"w": nn.Linear(8, 8), "a": nn.Linear(8, 2, bias=False), "b": nn.Linear(2, 8, bias=False)}
    nn.init.zeros_(parts["b"].weight)
    adapter = Calls(lambda self, x: self.w(x) + 0.5 * self.b(self.a(x)), **parts)
    merged = Calls(
        lambda self, x: F.linear(x, self.w + self.b @ self.a),
        w=table(8, 8),
        a=table(2, 8),
        b=nn.Parameter(torch.zeros(8, 2)),
    )
    for model, zero, others in ((adapter, "b.weight", ("w.weight", "a.weight")), (merged, "b", ("w", "a"))):
        head = nn.Sequential(model, nn.ReLU(), nn.Linear(8, 2))
        before = {name: p.clone() for name, p in head.named_parameters()}
        found = entries(head, torch.randn(4, 8))
        assert found[f"0.{zero}"].scheme == "kept"
        assert "0 at the start" in found[f"0.{zero}"].note
        assert not head.get_parameter(f"0.{zero}").any()
        for other in others:
            assert not torch.equal(head.get_parameter(f"0.{other}"), before[f"0.{other}"])


def test_a_weight_that_is_zero_for_no_reason_is_drawn():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    gh.init_weights(model, torch.randn(4, 8), seed=0)
    assert all(model[i].weight.any() for i in (0, 2, 4))


@pytest.mark.parametrize("start", [0.0, 1e-5, 1.0])
@pytest.mark.parametrize("shape", [(), (1,), (8,)])
def test_gates_and_layer_scales_stay(start, shape):
    model = Calls(
        lambda self, x: self.head(x + self.gate * self.layer(x)),
        gate=nn.Parameter(torch.full(shape, start)),
        layer=nn.Linear(8, 8),
        head=nn.Linear(8, 2),
    )
    found = entries(model, torch.randn(4, 8))
    assert found["gate"].scheme == "kept"
    assert bool((model.gate == start).all())
    assert float(model.layer.weight.detach().std()) == pytest.approx(8**-0.5, rel=0.4)
    assert found["layer.weight"].gain == pytest.approx(1)


def test_biases_start_at_zero_but_for_those_set_on_purpose():
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))
    nn.init.constant_(model[2].bias, -4.6)
    found = entries(Calls(lambda self, x: self.body(x) + self.own, body=model, own=table(4)), torch.randn(4, 16))
    assert found["body.2.bias"].scheme == "kept"
    assert bool((model[2].bias == -4.6).all())
    assert not model[0].bias.any()
    assert not model[4].bias.any()


@pytest.mark.parametrize("factor", [0.05, 3.0])
def test_a_constant_on_the_weight_is_made_up_for(factor):
    """Equalised learning rate: the weight has unit variance where the forward divides it by sqrt(fan_in)."""
    model = nn.Sequential(
        Calls(lambda self, x: F.linear(x, self.weight * factor), weight=table(256, 256)),
        nn.ReLU(),
        Calls(lambda self, x: F.linear(x, self.weight * factor), weight=table(256, 256)),
        nn.ReLU(),
        nn.Linear(256, 4),
    )
    x = torch.randn(512, 256)
    report = gh.init_weights(model, x, seed=0)
    assert float(model[0].weight.detach().std()) == pytest.approx(math.sqrt(2 / 256) / factor, rel=0.02)
    with torch.no_grad():
        assert float(model[:3](x).square().mean()) == pytest.approx(2, rel=0.2)
    assert report.depth[1].forward == pytest.approx(2**0.5, rel=0.02)


@pytest.mark.parametrize("scale", [1.0, 8**-0.5, 4.0])
def test_a_tied_head_behind_a_constant_gives_logits_of_order_one(scale):
    model = Calls(
        lambda self, ids: F.linear(F.layer_norm(self.body(self.emb(ids)), (64,)) * scale, self.emb.weight),
        emb=nn.Embedding(500, 64),
        body=nn.Linear(64, 64),
    )
    ids = torch.arange(500).view(10, 50)
    gh.init_weights(model, ids, seed=0)
    with torch.no_grad():
        assert float(model(ids).std()) == pytest.approx(1, rel=0.15)
        read = model.emb(ids)  # the body reads small rows, and makes up for it; a norm takes its scale
        assert float(model.body(read).std()) == pytest.approx(3**-0.5, rel=0.15)


def test_an_untied_table_has_unit_variance_and_is_read_as_such():
    model = Calls(
        lambda self, ids: self.head(F.gelu(self.body(self.emb(ids)))),
        emb=nn.Embedding(50, 8),
        body=nn.Linear(8, 8),
        head=nn.Linear(8, 2),
    )
    found = entries(model, torch.arange(8).view(2, 4))
    assert found["emb.weight"].target_std == 1
    assert found["body.weight"].gain == pytest.approx(1)


def test_a_shared_weight_is_told_where_its_uses_differ():
    model = Calls(
        lambda self, x: self.head(F.gelu(self.a(torch.tanh(self.a(x))))), a=nn.Linear(8, 8), head=nn.Linear(8, 2)
    )
    found = entries(model, torch.randn(4, 8))
    assert found["a.weight"].gain == pytest.approx(1, rel=1e-3)
    assert f"used again, where its gain would be {gh.gain('tanh'):.4g}" in found["a.weight"].note
    same = Calls(
        lambda self, x: self.head(F.relu(self.a(F.relu(self.a(F.relu(self.stem(x))))))),
        stem=nn.Linear(8, 8),
        a=nn.Linear(8, 8),
        head=nn.Linear(8, 2),
    )
    assert "used again" not in entries(same, torch.randn(4, 8))["a.weight"].note


def test_what_is_read_through_a_fork_serves_every_reader():
    """Where one reader sees a rectifier and another does not, no scale suits both: variance 1."""
    model = Calls(
        lambda self, x: self.a(F.relu(h := self.stem(x))) + self.b(h),
        stem=nn.Linear(8, 8),
        a=nn.Linear(8, 2),
        b=nn.Linear(8, 2),
    )
    assert advised(model, torch.randn(4, 8))["stem.weight"].gain == pytest.approx(1)


def test_unused_parameters_are_told():
    model = Calls(lambda self, x: self.used(x), used=nn.Linear(4, 4), idle=table(4, 4))
    with pytest.warns(UserWarning, match=r"idle \(not used in the recorded forward pass\)"):
        found = entries(model, torch.randn(2, 4))
    assert found["idle"].rule == "uncovered"


# --- a given nonlinearity, and other schemes ---


def test_a_given_nonlinearity_rules_all_but_output_layers():
    model = chain(["gelu", "tanh", "relu"])
    found = entries(model, torch.randn(4, 12), nonlinearity="relu")
    gains = [found[f"layers.{i}.weight"].gain for i in range(4)]
    assert gains == pytest.approx([2**0.5] * 3 + [1])


@pytest.mark.parametrize(("scheme", "gain"), [("he", 2**0.5), ("xavier", 1), ("lecun", 1), ("orthogonal", 1)])
def test_explicit_schemes_have_their_own_gain_everywhere(scheme, gain):
    found = entries(chain(["gelu", "tanh", "relu"]), torch.randn(4, 12), scheme=scheme)
    assert [found[f"layers.{i}.weight"].gain for i in range(4)] == pytest.approx([gain] * 4)


# --- without a sample ---


@pytest.mark.parametrize(
    "functions",
    [
        [nn.ReLU, nn.ReLU, nn.ReLU],
        [nn.GELU, nn.Tanh, nn.SiLU],
        [nn.ReLU, nn.GELU, nn.ReLU],
        [nn.SELU, nn.Identity, nn.LeakyReLU],
        [nn.PReLU, nn.Sigmoid, nn.ReLU],
        [lambda: nn.Sequential(nn.ReLU(), nn.Dropout()), nn.Tanh, lambda: nn.Sequential(nn.Dropout(), nn.GELU())],
        [lambda: nn.LayerNorm(12), nn.ReLU, lambda: nn.Sequential(nn.LayerNorm(12), nn.GELU())],
        [lambda: nn.Sequential(nn.BatchNorm1d(12), nn.ReLU()), nn.GELU, lambda: nn.BatchNorm1d(12)],
    ],
    ids=range(8),
)
def test_the_order_of_modules_tells_a_sequential_all_that_a_trace_does(functions):
    model = nn.Sequential(*(m for f in functions for m in (nn.Linear(12, 12), f())), nn.Linear(12, 3))
    names = [f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    traced, ordered = advised(model, torch.randn(8, 12)), advised(model, None)
    assert [ordered[n].gain for n in names] == pytest.approx([traced[n].gain for n in names], rel=1e-3)
    assert [ordered[n].scheme for n in names] == [traced[n].scheme for n in names]


def test_without_a_sample_the_report_says_so():
    model = Calls(
        lambda self, x, mask: self.body(x) * mask, body=nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    )
    report = gh.init_weights(model, seed=0)  # nobody can guess two arguments
    assert report.source == "module order"
    assert any("no sample was given" in note and "example_inputs=" in note for note in report.notes)
    assert report.depth == ()
    assert report.entries[0].found == "module order"


def test_an_activation_that_is_shared_is_registered_once():
    """The order of modules cannot see its second use; a trace can."""
    relu = nn.ReLU()
    model = nn.Sequential(nn.Linear(8, 8), relu, nn.Linear(8, 8), relu, nn.Linear(8, 2))
    traced = advised(model, torch.randn(4, 8))
    assert [traced[f"{i}.weight"].gain for i in (0, 2, 4)] == pytest.approx([2**0.5, 2**0.5, 1])
    ordered = advised(model, None)
    assert ordered["0.weight"].gain == pytest.approx(2**0.5)


class Lit(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        self.example_input_array = torch.zeros(3, 4)

    def forward(self, x):
        return self.net(F.gelu(x))


def test_a_lightning_module_brings_its_own_sample():
    model = Lit()
    report = gh.init_weights(model, seed=0)
    assert report.source == "trace (fake tensors)"
    assert [point.name for point in report.depth] == ["net.0.weight", "net.2.weight"]
    assert report.entries[0].gain == pytest.approx(math.sqrt(2 / MOMENT["gelu"]), rel=1e-3)


@pytest.mark.parametrize(
    ("scale", "function"), [(0.1, F.relu), (10.0, F.relu), (0.1, lambda z: z), (1e-5, F.leaky_relu)]
)
def test_what_is_made_small_on_purpose_stays_small(scale, function):
    """A weight makes up for what a rectifier takes, not for the constant behind it; the next one reads that."""
    model = Calls(
        lambda self, x: self.head(torch.tanh(self.mid(scale * function(self.stem(x))))),
        stem=nn.Linear(16, 16),
        mid=nn.Linear(16, 16),
        head=nn.Linear(16, 2),
    )
    found = advised(model, torch.randn(4, 16))
    assert found["stem.weight"].gain == pytest.approx(gh.gain(function), rel=1e-3)
    assert found["mid.weight"].gain == pytest.approx(1 / scale, rel=1e-3)


@pytest.mark.parametrize("mix", [nn.AvgPool1d(4), nn.Upsample(scale_factor=2, mode="linear")])
def test_linear_mixing_is_made_up_for_by_the_reader(mix):
    model = nn.Sequential(nn.Conv1d(4, 8, 3), mix, nn.Conv1d(8, 8, 1), nn.Tanh(), nn.Conv1d(8, 2, 1))
    found = advised(model, torch.randn(4, 4, 18))
    assert found["0.weight"].gain == pytest.approx(1)
    assert found["2.weight"].gain > 1.05


@pytest.mark.parametrize("factor", [2.0, 0.1])
def test_a_parametrization_is_written_through_not_made_up_for(factor):
    class Times(nn.Module):
        def forward(self, weight):
            return factor * weight

        def right_inverse(self, weight):
            return weight / factor

    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
    parametrize.register_parametrization(model[2], "weight", Times())
    report = gh.init_weights(model, torch.randn(4, 64), seed=0)
    assert float(model[2].weight.detach().std()) == pytest.approx(math.sqrt(2 / 64), rel=0.05)
    assert report.depth[1].forward == pytest.approx(2**0.5)


@pytest.mark.parametrize("pad", [(0, 0, 0, 8), (0, 0, 3, 5), (0, 0, 1, -1)], ids=["behind", "around", "shifted"])
def test_zeros_beside_the_positions_are_not_made_up_for(pad):
    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.mix, self.head = nn.LayerNorm(16), nn.Linear(16, 16), nn.Linear(16, 3)

        def forward(self, x):
            return self.head(self.mix(nn.functional.pad(self.norm(x), pad)).tanh().mean(1))

    report = gh.init_weights(Padded(), torch.randn(4, 8, 16), seed=0)
    gains = {entry.name: entry.gain for entry in report.entries}
    assert gains["mix.weight"] == pytest.approx(1, rel=0.01)


def test_zeros_beside_the_features_are():
    class Widened(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.mix, self.head = nn.LayerNorm(16), nn.Linear(32, 16), nn.Linear(16, 3)

        def forward(self, x):
            return self.head(self.mix(nn.functional.pad(self.norm(x), (0, 16))).tanh())

    report = gh.init_weights(Widened(), torch.randn(4, 16), seed=0)
    assert next(e.gain for e in report.entries if e.name == "mix.weight") == pytest.approx(2**0.5, rel=0.01)
