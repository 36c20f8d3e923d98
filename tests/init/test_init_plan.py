"""Plans: made of shapes, carried out later; what the forward pass tells; what the report says."""

import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from lightning_gradhealth.init import init_weights, plan_init
from lightning_gradhealth.records import DepthPoint, InitEntry, InitReport
from lightning_gradhealth.reports.initialization import render_init
from lightning_gradhealth.reports.rendering import plain


def net():
    return nn.Sequential(nn.Embedding(9, 8, padding_idx=0), nn.Linear(8, 6), nn.GELU(), nn.LSTM(6, 5), nn.PReLU())


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(model, before):
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Mixer(nn.Module):
    """Raw parameters of every kind."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 32)
        self.mix = nn.Parameter(torch.full((6, 40), 7.0))
        self.project = nn.Parameter(torch.full((32, 48), 7.0))
        self.shift = nn.Parameter(torch.full((48,), 0.1))
        self.scale = nn.Parameter(torch.full((48,), 7.0))
        self.positions = nn.Parameter(torch.full((6, 32), 7.0))
        self.idle = nn.Parameter(torch.full((3, 3), 7.0))
        self.head = nn.ParameterList([torch.full((48, 2), 7.0)])

    def forward(self, tokens):
        x = self.embed(tokens) + self.positions
        x = torch.tanh(torch.einsum("btd,df->btf", x, self.project) + self.shift) * self.scale
        return torch.einsum("btf,tk->bkf", x, self.mix) @ self.head[0]


TOKENS = torch.arange(12).reshape(2, 6) % 11


# --- plans -------------------------------------------------------------------------------------------------


def test_applying_a_plan_is_init_weights():
    one, two = net(), net()
    report = init_weights(one, scheme="he", seed=0)
    plan = plan_init(two, scheme="he", seed=0)
    before = state(two)
    assert (plan.report.applied, {entry.measured_std for entry in plan.report.entries}) == (False, {None})
    assert_same(two, before)
    two[0].weight.data[0] = one[0].weight.data[0]
    assert plan.apply() == report
    assert_same(two, state(one))
    assert plan.apply() == report  # again, the same


def test_the_seed_is_drawn_when_the_plan_is_made():
    torch.manual_seed(5)
    plan = plan_init(net(), scheme="he")
    drawn = torch.get_rng_state()
    plan.apply()
    assert torch.equal(torch.get_rng_state(), drawn)
    torch.manual_seed(5)
    assert init_weights(net(), scheme="he").seed == plan.report.seed


def test_a_dry_run_changes_nothing_and_tells_the_seed_that_would_come():
    model, random = net(), torch.get_rng_state()
    before = state(model)
    report = init_weights(model, scheme="he", dry_run=True)
    assert_same(model, before)
    assert torch.equal(torch.get_rng_state(), random)
    assert not report.applied
    assert init_weights(model, scheme="he").seed == report.seed


def test_a_plan_of_a_model_on_meta():
    with torch.device("meta"):
        model = net()
    plan = plan_init(model, scheme="he", seed=0, skip=r"3\..*")
    assert init_weights(model, scheme="he", seed=0, skip=r"3\..*", dry_run=True) == plan.report
    for function in (plan.apply, lambda: init_weights(model, scheme="he")):
        with pytest.raises(
            ValueError, match=r"'0\.weight' of model is on the meta device; use plan_init\(\.\.\.\)\.bind"
        ):
            function()
    model.to_empty(device="cpu")
    plan.apply()
    real = net()
    with torch.no_grad():
        real[0].weight[0] = 0.0
    init_weights(real, scheme="he", seed=0)
    assert torch.equal(model[0].weight, real[0].weight)  # the padding row has become 0
    assert torch.equal(model[1].weight, real[1].weight)


def test_fillers_fill_what_the_plan_sets_and_kept_says_why_not():
    model = net()
    model[1].bias.requires_grad_(False)
    plan = plan_init(model, scheme="he", seed=0)
    fillers, kept = plan.fillers(), plan.kept()
    assert kept == {"1.bias": "frozen", "4.weight": "PReLU: the slopes were chosen when the module was made"}
    assert {*fillers, *kept} == {name for name, _ in model.named_parameters()}
    targets = {name: torch.full_like(p, 9.0) for name, p in model.named_parameters() if name in fillers}
    for name, target in targets.items():
        fillers[name](target)
    plan.apply()
    assert all(torch.equal(targets[name], model.get_parameter(name)) for name in targets)


def test_fillers_of_computed_weights():
    model = nn.Sequential(
        parametrizations.weight_norm(nn.Linear(6, 4)), parametrizations.spectral_norm(nn.Linear(4, 4))
    )
    plan = plan_init(model, scheme="he", seed=0)
    fillers = plan.fillers()
    assert set(plan.kept()) == {"1.parametrizations.weight.original"}
    assert "only init_weights on a real device" in plan.kept()["1.parametrizations.weight.original"]
    plan.apply()
    for name in ("0.parametrizations.weight.original0", "0.parametrizations.weight.original1"):
        target = torch.empty_like(model.get_parameter(name))
        fillers[name](target)
        assert torch.equal(target, model.get_parameter(name))


def test_a_plan_that_calibrates_cannot_be_bound():
    plan = plan_init(nn.Linear(3, 3), scheme="he", calibrate=torch.randn(4, 3))
    with pytest.raises(ValueError, match=r"calibrate must be None to bind a plan.*leave it out, or call"):
        plan.bind()


def test_a_part_that_is_kept_needs_values():
    from lightning_gradhealth.init.blocks import Block, check_blocks

    entry = InitEntry("w", "M", (2, 4), "mine", "custom")
    blocks = [Block(entry, None, 0, slice(0, 2)), Block(entry, lambda n, g: n.zero_(), 0, slice(2, 4))]
    check_blocks("w", (4, 4), blocks, readable=True)
    with pytest.raises(
        ValueError, match="initializer mine keeps a part of 'w', which is on the meta device or sharded"
    ):
        check_blocks("w", (4, 4), blocks, readable=False)
    mixed = [Block(entry, None, 0, slice(0, 4)), Block(entry, None, 1, slice(0, 4))]
    with pytest.raises(ValueError, match=r"mine cuts 'w' along the axes \[0, 1\]; cut it along one axis only"):
        check_blocks("w", (4, 4), mixed, readable=True)
    short = [Block(entry, None, 1, slice(0, 3))]
    with pytest.raises(ValueError, match="mine sets index 3 of axis 1 of 'w' 0 times"):
        check_blocks("w", (4, 4), short, readable=True)


# --- what the forward pass tells ---------------------------------------------------------------------------


def test_raw_parameters_are_drawn_kept_or_named_by_their_use():
    model = Mixer()
    with pytest.warns(
        UserWarning, match=r"1 parameters are not covered .*idle \(not used in the recorded forward pass\)"
    ):
        report = init_weights(model, TOKENS, seed=0)
    entries = {entry.name: entry for entry in report.entries}
    assert {name: entries[name].rule for name in entries} == {
        "embed.weight": "Embedding",
        "mix": "traced",
        "project": "traced",
        "shift": "traced",
        "scale": "state",
        "positions": "state",
        "idle": "uncovered",
        "head.0": "traced",
    }
    assert (entries["project"].fan, entries["mix"].fan, entries["head.0"].fan) == ((32 + 48) / 2, 6, 48)
    assert entries["head.0"].found == "output"
    assert "tanh" in entries["project"].follows
    assert not model.shift.any()  # added to what a weight gives: a bias
    for kept in (model.scale, model.positions, model.idle):
        assert (kept == 7).all()
    for name in ("project", "mix", "head.0"):
        assert entries[name].measured_std == pytest.approx(entries[name].target_std, rel=0.2)


def test_without_a_sample_the_note_says_what_would_tell():
    with pytest.warns(UserWarning, match="Give example_inputs= to have their use traced, say what to do by overrides="):
        report = init_weights(Mixer(), seed=0)
    (entry,) = (entry for entry in report.entries if entry.name == "mix")
    assert entry.note == "no initializer knows Mixer; example_inputs= would tell"
    assert report.source == "module order"


def test_auto_gains_stand_at_every_layer_and_the_output_has_one():
    model = nn.Sequential(nn.Linear(40, 50), nn.ReLU(), nn.Linear(50, 60), nn.GELU(), nn.Linear(60, 3))
    report = init_weights(model, torch.randn(2, 40), seed=0)
    gains = [entry.gain for entry in report.entries if entry.gain is not None]
    assert gains == pytest.approx([math.sqrt(2), 1.0, 1.0], rel=1e-3)
    assert (report.source, report.residual) == ("trace (fake tensors)", "none")
    assert [point.name for point in report.depth] == ["0.weight", "2.weight", "4.weight"]
    xavier = init_weights(model, torch.randn(2, 40), scheme="xavier", seed=0)
    assert [entry.gain for entry in xavier.entries if entry.gain is not None] == [1, 1, 1]
    mine = init_weights(model, torch.randn(2, 40), nonlinearity="tanh", seed=0)
    assert [e.gain for e in mine.entries if e.gain is not None] == pytest.approx([1.5925, 1.5925, 1], rel=1e-3)


def test_mode_holds_for_auto():
    model = nn.Sequential(nn.Linear(40, 10), nn.ReLU(), nn.Linear(10, 3))
    report = init_weights(model, torch.randn(2, 40), mode="fan_out", seed=0)
    assert [entry.fan for entry in report.entries if entry.fan] == [10, 3]


def test_the_forecast_knows_frozen_weights():
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(3 * torch.eye(64))
    model[0].requires_grad_(False)
    report = init_weights(model, torch.randn(2, 64), seed=0)
    assert report.depth[0].forward == pytest.approx(3, rel=1e-3)
    assert report.depth[1].forward == pytest.approx(3, rel=1e-3)


def test_a_tied_table_is_drawn_as_the_weight_that_it_also_is():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(30, 16, padding_idx=3)

        def forward(self, tokens):
            return nn.functional.linear(self.embed(tokens), self.embed.weight)

    (entry,) = init_weights(Tied(), torch.arange(5)[None], seed=0).entries
    assert (entry.rule, entry.fan) == ("traced", 16)
    assert "drawn as the weight that it also is" in entry.note
    assert "row 3, the padding, is kept" in entry.note


def test_a_low_rank_pair_keeps_its_zero():
    class Lora(nn.Module):
        def __init__(self):
            super().__init__()
            self.base = nn.Linear(16, 16)
            self.a, self.b = nn.Parameter(torch.randn(4, 16)), nn.Parameter(torch.zeros(16, 4))

        def forward(self, x):
            return self.base(x) + x @ self.a.T @ self.b.T

    model = Lora()
    report = init_weights(model, torch.randn(3, 16), seed=0)
    entries = {entry.name: entry for entry in report.entries}
    assert not model.b.any()
    assert (entries["b"].rule, entries["b"].scheme) == ("state", "kept")
    assert "0 at the start" in entries["b"].note
    assert entries["a"].rule == "traced"


def test_a_bias_that_is_none_stays():
    class Gate(nn.Linear):
        def forward(self, x):
            return nn.functional.linear(x, self.weight) * self.bias

    model = Gate(8, 8)
    before = model.bias.detach().clone()
    report = init_weights(model, torch.randn(2, 8), seed=0)
    assert torch.equal(model.bias, before)
    assert report.entries[1].rule == "state"


class Normed(nn.Module):
    def __init__(self, size=16):
        super().__init__()
        self.one, self.two = nn.Linear(size, size), nn.Linear(size, size)
        self.norm = nn.BatchNorm1d(size)

    def forward(self, x):
        return x + self.norm(self.two(torch.relu(self.one(x))))


def test_zero_last_silences_a_branch_by_the_norm_that_ends_it():
    model = nn.Sequential(Normed(), Normed())
    report = init_weights(model, torch.randn(8, 16), residual="zero_last", seed=0)
    assert report.residual == "zero_last"
    entries = {entry.name: entry for entry in report.entries}
    assert not model[0].norm.weight.any()
    assert model[0].two.weight.any()
    assert entries["0.norm.weight"].note == "= 0: ends a residual branch"


def test_a_table_of_ones_own_that_is_read_by_index_stays():
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias_table = nn.Parameter(torch.full((9, 4), 0.5))
            self.head = nn.Linear(4, 2)

        def forward(self, index):
            return self.head(self.bias_table[index])

    model = Table()
    report = init_weights(model, torch.arange(9), seed=0, on_uncovered="raise")
    assert (model.bias_table == 0.5).all()
    assert report.entries[0].rule == "state"


def test_calibrate_brings_every_output_to_its_scale():
    model = nn.Sequential(*(m for _ in range(3) for m in (nn.Conv2d(8, 8, 3, padding=1), nn.SiLU())), nn.Flatten())
    x = torch.randn(16, 8, 6, 6)
    report = init_weights(model, calibrate=x, seed=0, overrides={r"4\.weight": {"std": 0.3}})
    assert report.source == "trace (fake tensors)"  # the batch is the sample, too
    seen = {}
    for index in (0, 2):
        model[index].register_forward_hook(lambda m, i, o, index=index: seen.update({index: o.var().item()}))
    model(x)
    assert seen[0] == pytest.approx(1, rel=0.04)
    assert seen[2] == pytest.approx(1, rel=0.04)
    points = {point.name: point for point in report.depth}
    assert points["2.weight"].after == pytest.approx(1, rel=0.02)
    assert points["2.weight"].before != points["2.weight"].after
    assert points["4.weight"].after is None
    assert model[4].weight.std().item() == pytest.approx(0.3, rel=0.1)


# --- the report --------------------------------------------------------------------------------------------


def test_a_full_report_makes_the_round_trip():
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))
    report = init_weights(model, calibrate=torch.randn(32, 8), seed=0)
    assert report.depth[0].after is not None
    assert InitReport.from_json(report.to_json()) == report


def test_what_the_rendering_says():
    points = tuple(DepthPoint(f"layer{i}.weight", 1.0, 2.0, 1.0, 0.5, 1.25) for i in range(100))
    report = InitReport(
        entries=(
            InitEntry(
                "a.weight",
                "Linear",
                (4, 3),
                "Linear",
                "he",
                "normal",
                3.0,
                1.534,
                0.5,
                0.49,
                "why",
                "replayed",
                "gelu 1.534",
            ),
            InitEntry("b" * 200, "Own", (2,), "uncovered", "kept", note="no initializer knows Own"),
        ),
        seed=7,
        source="trace (real batch)",
        residual="depth",
        depth=points,
        notes=("gradients are predicted to vanish",),
        applied=False,
    )
    text = plain(render_init(report), width=100)
    assert max(map(len, text.splitlines())) <= 100
    for part in (
        "a.weight 4×3",
        "Linear: he",
        "1.534",
        "gelu 1.534",
        "(replayed)",
        "read by trace (real batch); residual branches: depth;",
        "gain per weight 1 forward, 1 back",
        "layer0.weight",
        "layer99.weight",
        "calibrated",
        "note: gradients are predicted to vanish",
        "dry run: nothing was changed",
    ):
        assert part in text
    assert text.count("layer") <= 13


def test_a_bare_report_says_no_more_than_it_knows():
    text = plain(render_init(InitReport(seed=1)))
    assert "dry run" not in text
    assert "read by" not in text
    assert "seed 1" in text


def test_a_bias_of_ones_own_in_a_linear_product_starts_at_zero():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.b = nn.Parameter(torch.ones(6, 4)), nn.Parameter(torch.full((6,), 0.2))

        def forward(self, x):
            return nn.functional.linear(x, self.w, self.b)

    model = Own()
    report = init_weights(model, torch.randn(2, 4), seed=0)
    assert not model.b.any()
    assert [entry.rule for entry in report.entries] == ["traced", "traced"]


@pytest.mark.parametrize("bias", [torch.full((6,), -2.0), torch.linspace(-7, -2, 6)])
def test_a_bias_set_on_purpose_stays(bias):
    """As that of a gate that begins closed, or of a state-space model's step: no default of torch reaches so far."""
    model = nn.Sequential(nn.Linear(4, 6), nn.Sigmoid(), nn.Linear(6, 2))
    with torch.no_grad():
        model[0].bias.copy_(bias)
    report = init_weights(model, torch.randn(2, 4), seed=0)
    assert torch.equal(model[0].bias, bias)
    assert not model[2].bias.any()
    assert "on purpose" in next(entry.note for entry in report.entries if entry.name == "0.bias")
    init_weights(model, torch.randn(2, 4), seed=0, overrides={"0.bias": "zeros"})
    assert not model[0].bias.any()


@pytest.mark.parametrize("function", [init_weights, plan_init])
def test_warnings_point_at_the_caller(function):
    with pytest.warns(UserWarning, match="skip: 'none' matches") as caught:
        function(nn.Linear(2, 2), scheme="he", skip="none")
    assert {warning.filename for warning in caught} == {__file__}


def test_a_plan_says_which_parameters_are_gone():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    plan, before = plan_init(model, scheme="he", seed=0), model[1].weight.detach().clone()
    old = model[1]
    model[1] = nn.Linear(4, 5, bias=False)
    model[1].register_parameter("weight", None)
    with pytest.warns(UserWarning, match=r"^1\.weight, 1\.bias: no longer in the model"):
        report = plan.apply()
    assert torch.equal(old.weight, before)
    assert "0.weight" in {entry.name for entry in report.entries}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan_init(nn.Linear(4, 4), scheme="he").apply()
