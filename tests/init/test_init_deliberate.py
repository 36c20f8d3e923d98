"""What was set on purpose stays, with the reason; the same layer without a purpose is drawn; who asks draws all."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_gradhealth.init import init_weights, plan_init
from lightning_gradhealth.records import InitEntry

WIDTH = 16


class Block(nn.Module):
    """A residual block whose branch ends in a norm."""

    def __init__(self):
        super().__init__()
        self.first, self.norm1 = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False), nn.BatchNorm2d(WIDTH)
        self.second, self.norm2 = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False), nn.BatchNorm2d(WIDTH)

    def forward(self, x):
        return F.relu(x + self.norm2(self.second(F.relu(self.norm1(self.first(x))))))


def residual() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, WIDTH, 3), Block(), Block(), nn.Flatten(), nn.LazyLinear(4))


def images() -> tuple[nn.Module, torch.Tensor]:
    model, x = residual(), torch.randn(4, 3, 8, 8)
    model(x)
    return model, x


def mlp(depth: int = 4) -> tuple[nn.Module, torch.Tensor]:
    hidden = [part for _ in range(depth) for part in (nn.Linear(WIDTH, WIDTH), nn.ReLU())]
    return nn.Sequential(nn.Linear(8, WIDTH), nn.ReLU(), *hidden, nn.Linear(WIDTH, 3)), torch.randn(32, 8)


def normed() -> tuple[nn.Module, torch.Tensor]:
    model, x = mlp()
    return nn.Sequential(nn.LayerNorm(8), *model, nn.BatchNorm1d(3)), x


def convolutions() -> tuple[nn.Module, torch.Tensor]:
    return nn.Sequential(*(nn.Conv2d(6, 6, 3, padding=1) for _ in range(3)), nn.Conv2d(6, 6, 1)), torch.randn(
        2, 6, 8, 8
    )


class Rotation(nn.Module):
    """A 1x1 convolution by a raw matrix, as in Glow."""

    def __init__(self, channels=6):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(channels, channels))

    def forward(self, x):
        return F.conv2d(x, self.matrix[:, :, None, None])


def glow() -> tuple[nn.Module, torch.Tensor]:
    return nn.Sequential(nn.Conv2d(6, 6, 3), nn.ReLU(), Rotation(), nn.Conv2d(6, 6, 3)), torch.randn(2, 6, 8, 8)


class Triangles(nn.Module):
    """A square weight made of two vectors of entries and a diagonal, as the LU layers of flows have it."""

    def __init__(self, size=8):
        super().__init__()
        self.lower, self.upper = (nn.Parameter(torch.randn(size * (size - 1) // 2)) for _ in range(2))
        self.diagonal = nn.Parameter(torch.rand(size))
        self.size = size

    def forward(self, x):
        (rows, columns), along = torch.tril_indices(self.size, self.size, -1), range(self.size)
        lower, upper = (entries.new_zeros(self.size, self.size) for entries in (self.lower, self.upper))
        lower[rows, columns], lower[along, along] = self.lower, 1.0
        upper[columns, rows], upper[along, along] = self.upper, F.softplus(self.diagonal)
        return F.linear(F.linear(x, upper), lower)


def triangles() -> tuple[nn.Module, torch.Tensor]:
    return nn.Sequential(Triangles(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), torch.randn(16, 8)


class Relative(nn.Module):
    """Attention whose scores get a product of the queries with a table of relative positions."""

    def __init__(self, length=6):
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.table = nn.Parameter(torch.randn(2 * length - 1, WIDTH))
        steps = torch.arange(length)
        self.register_buffer("distance", steps[:, None] - steps + length - 1)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        scores = q @ k.transpose(1, 2) + torch.einsum("bqc,qkc->bqk", q, self.table[self.distance])
        return self.out((scores / 4).softmax(-1) @ v)


def relative() -> tuple[nn.Module, torch.Tensor]:
    return nn.Sequential(Relative(), nn.Linear(WIDTH, 2)), torch.randn(2, 6, WIDTH)


def orthogonal_(weight: torch.Tensor) -> None:
    weight.copy_(torch.linalg.qr(torch.randn(len(weight), len(weight)))[0].view_as(weight))


# kind: the model, the parameter, what sets it, a word of the reason
KINDS: dict[str, tuple[Callable[[], tuple[nn.Module, torch.Tensor]], str, Callable[[torch.Tensor], object], str]] = {
    "norm at the end of a branch, 0": (images, "1.norm2.weight", nn.init.zeros_, "0 on purpose"),
    "norm at a constant": (normed, "0.weight", lambda w: w.fill_(1e-5), "1e-05 on purpose"),
    "shift of a norm": (normed, "12.bias", lambda b: b.fill_(0.5), "0.5 on purpose"),
    "zero layer": (mlp, "4.weight", nn.init.zeros_, "0 on purpose"),
    "constant layer": (convolutions, "3.weight", lambda w: w.fill_(1 / 6), "throughout"),
    "identity": (mlp, "4.weight", nn.init.eye_, "94 % of it are exactly 0"),
    "Dirac kernel": (convolutions, "1.weight", nn.init.dirac_, "exactly 0"),
    "triangle": (mlp, "4.weight", lambda w: w.tril_(), "exactly 0"),
    "signs": (mlp, "4.weight", lambda w: w.sign_(), "a few different numbers"),
    "rotation": (glow, "2.matrix", orthogonal_, "rotation"),
    "rotation of a 1x1 kernel": (convolutions, "3.weight", orthogonal_, "rotation"),
    "entries of a triangle, 0": (triangles, "0.lower", nn.init.zeros_, "0 on purpose"),
    "gate that begins closed": (mlp, "4.weight", lambda w: w.normal_(0, 1e-6), "small on purpose"),
    "output kept small": (mlp, "10.weight", lambda w: w.normal_(0, 0.01), "an output kept small"),
    "bias beyond the range": (mlp, "4.bias", lambda b: b.fill_(-3.0), "default range"),
}


def fresh(kind: str) -> tuple[nn.Module, torch.Tensor, nn.Parameter, str, str]:
    torch.manual_seed(0)
    make, name, _, word = KINDS[kind]
    model, x = make()
    return model, x, model.get_parameter(name), name, word


def set_on_purpose(kind: str) -> tuple[nn.Module, torch.Tensor, nn.Parameter, str, str]:
    model, x, parameter, name, word = fresh(kind)
    with torch.no_grad():
        KINDS[kind][2](parameter)
    return model, x, parameter, name, word


def entry_of(report: object, name: str) -> InitEntry:
    return next(entry for entry in report.entries if entry.name == name)


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_set_on_purpose_stays_and_the_report_says_why(kind):
    model, x, parameter, name, word = set_on_purpose(kind)
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    report = init_weights(model, x, seed=0)
    assert torch.equal(parameter, before[name])
    entry = entry_of(report, name)
    assert (entry.rule, entry.scheme) == ("state", "kept")
    assert word in entry.note
    weights = [key for key, value in model.named_parameters() if value.dim() > 1 and key != name]
    assert all(not torch.equal(model.get_parameter(key), before[key]) for key in weights)  # the others are drawn


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_parameter_without_a_purpose_is_drawn(kind):
    model, x, parameter, name, _ = fresh(kind)
    with torch.no_grad():
        parameter.add_(0.05 * torch.randn_like(parameter))  # as training leaves it
    before = parameter.detach().clone()
    assert entry_of(init_weights(model, x, seed=0), name).rule != "state"
    assert not torch.equal(parameter, before)


@pytest.mark.parametrize("kind", KINDS)
def test_keep_nothing_draws_all(kind):
    model, x, parameter, name, _ = set_on_purpose(kind)
    before = parameter.detach().clone()
    entry = entry_of(init_weights(model, x, seed=0, keep="nothing"), name)
    assert entry.scheme != "kept"
    assert not torch.equal(parameter, before)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "norm" not in kind and "bias" not in kind])
def test_an_override_draws_it_all_the_same(kind):
    model, x, parameter, name, _ = set_on_purpose(kind)
    report = init_weights(model, x, seed=0, overrides={name.replace(".", r"\."): {"std": 0.5}})
    assert "override" in entry_of(report, name).note
    assert 0.3 < parameter.std() < 0.7


@pytest.mark.parametrize("kind", ["norm at the end of a branch, 0", "norm at a constant", "bias beyond the range"])
def test_an_override_gives_norms_and_biases_a_value(kind):
    model, x, parameter, name, _ = set_on_purpose(kind)
    init_weights(model, x, seed=0, overrides={name.replace(".", r"\."): {"value": 0.25}})
    assert bool((parameter == 0.25).all())


@pytest.mark.parametrize("keep", ["deliberate", "nothing"])
def test_without_a_sample_purposes_are_told_by_the_values_alone(keep):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Bilinear(8, 8, 8))
    nn.init.zeros_(model[1].weight)
    report = plan_init(model, scheme="lecun", keep=keep).report
    assert entry_of(report, "1.weight").scheme == ("kept" if keep == "deliberate" else "constant")


def test_the_prediction_knows_the_scale_of_a_norm_that_stays():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 64), nn.LayerNorm(64), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    usual = init_weights(model, torch.randn(16, 8), seed=0).depth[1].forward
    nn.init.constant_(model[1].weight, 0.1)
    assert init_weights(model, torch.randn(16, 8), seed=0).depth[1].forward == pytest.approx(0.1 * usual, rel=1e-3)


def test_a_table_by_position_stays():
    torch.manual_seed(0)
    model, x = relative()
    before = model[0].table.detach().clone()
    assert "added to attention scores" in entry_of(init_weights(model, x, seed=0), "0.table").note
    assert torch.equal(model[0].table, before)
    init_weights(model, x, seed=0, keep="nothing")
    assert not torch.equal(model[0].table, before)


@pytest.mark.parametrize("bias", [-math.log(99), 0.0])
def test_the_weights_of_an_output_at_its_prior_stay_small(bias):
    torch.manual_seed(0)
    model, x = mlp()
    nn.init.constant_(model[10].bias, bias)
    before = model[10].weight.detach().clone()
    report = init_weights(model, x, seed=0)
    assert torch.equal(model[10].weight, before) == (bias != 0)
    assert ("prior" in entry_of(report, "10.weight").note) == (bias != 0)


@pytest.mark.parametrize(
    ("habit", "draw"),
    {
        "small": lambda w: nn.init.normal_(w, 0, 1e-4),
        "zero": nn.init.zeros_,
        "orthogonal": nn.init.orthogonal_,
        "ones": nn.init.ones_,
    }.items(),
)
def test_what_most_weights_have_in_common_is_a_habit_and_no_purpose(habit, draw):
    torch.manual_seed(0)
    model, x = mlp()
    for module in model[::2]:
        draw(module.weight)
    report = init_weights(model, x, seed=0)
    assert not [entry.name for entry in report.entries if entry.scheme == "kept"]


@pytest.mark.parametrize(
    ("residual", "value"), [("auto", 0.0), ("none", 0.0), ("depth", 0.5), ("zero_last", 0.0), ("fixup", 0.0)]
)
def test_what_is_asked_for_branches_rules_over_what_stands_there(residual, value):
    model, x, parameter, _, _ = set_on_purpose("norm at the end of a branch, 0")
    init_weights(model, x, seed=0, residual=residual)
    assert bool((parameter == value).all())


def test_a_trained_model_is_drawn_anew_as_a_fresh_one():
    torch.manual_seed(0)
    model, x = images()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(20):
        optimizer.zero_grad()
        F.cross_entropy(model(x), torch.tensor([0, 1, 2, 3])).backward()
        optimizer.step()
    report = init_weights(model, x, seed=0)
    assert not [entry.name for entry in report.entries if entry.scheme == "kept"]


def test_a_registered_initializer_rules_over_what_stands_there():
    from lightning_gradhealth.init import register_initializer

    class Mine(nn.Linear):
        pass

    @register_initializer(Mine)
    def mine(module, context):
        context.weight_(module.weight, gain=1.0)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), Mine(8, 8), nn.ReLU(), nn.Linear(8, 8))
    nn.init.zeros_(model[2].weight)
    assert entry_of(init_weights(model, torch.randn(2, 8), seed=0), "2.weight").rule == "mine"


def test_what_the_meta_device_hides_is_said():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    nn.init.zeros_(model[1].weight)
    report = plan_init(model, torch.zeros(4, 8), seed=0).report
    assert entry_of(report, "1.weight").scheme == "constant"
    assert any("constructors have set by hand" in note for note in report.notes)


@pytest.mark.parametrize("function", [init_weights, plan_init])
def test_keep_is_checked(function):
    with pytest.raises(ValueError, match="keep must be one of"):
        function(nn.Linear(2, 2), keep="all")


# --- periodic activations ---


class Sine(nn.Module):
    def __init__(self, ins, outs, omega):
        super().__init__()
        self.linear, self.omega = nn.Linear(ins, outs), omega

    def forward(self, x):
        return torch.sin(self.omega * self.linear(x))


def siren(own: bool, omega: float = 30.0, ins: int = 2, width: int = 64) -> nn.Sequential:
    """The network of Sitzmann et al. 2020, by their init or by torch's."""
    model = nn.Sequential(Sine(ins, width, omega), Sine(width, width, omega), Sine(width, width, omega))
    model.append(nn.Linear(width, 1))
    if own:
        bound = math.sqrt(6 / width) / omega
        model[0].linear.weight.data.uniform_(-1 / ins, 1 / ins)
        for layer in (model[1].linear, model[2].linear, model[3]):
            layer.weight.data.uniform_(-bound, bound)
    return model


def picture() -> tuple[torch.Tensor, torch.Tensor]:
    line = torch.linspace(-1, 1, 24)
    x = torch.stack(torch.meshgrid(line, line, indexing="ij"), -1).view(-1, 2)
    return x, torch.sin(12 * x[:, :1]) * torch.cos(9 * x[:, 1:])


def fitted(model: nn.Module) -> float:
    x, y = picture()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for _ in range(40):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
    return float(loss.detach())


@pytest.mark.parametrize("omega", [30.0, 10.0])
def test_an_init_by_the_rule_of_periodic_activations_stays(omega):
    torch.manual_seed(0)
    model = siren(True, omega)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    report = init_weights(model, picture()[0], seed=0)
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
    assert "frequencies" in report.entries[0].note
    assert f"/ {omega:g}" in entry_of(report, "1.linear.weight").note


@pytest.mark.parametrize(("own", "keep"), [(False, "deliberate"), (False, "nothing"), (True, "nothing")])
def test_a_network_of_periodic_activations_fits_as_well_as_by_its_own_rule(own, keep):
    ours, theirs = [], []
    for seed in range(3):
        torch.manual_seed(seed)
        theirs.append(fitted(siren(True)))
        model = siren(own)
        report = init_weights(model, picture()[0], seed=seed, keep=keep)
        hidden = entry_of(report, "1.linear.weight")
        assert (hidden.distribution, hidden.target_std) == ("uniform", pytest.approx(math.sqrt(2 / 64) / 30, 1e-3))
        ours.append(fitted(model))
    assert sum(ours) < 2 * sum(theirs) < 0.2


def test_frequencies_that_somebody_has_chosen_stay():
    torch.manual_seed(0)
    model = siren(False)
    with torch.no_grad():
        model[0].linear.weight.normal_(0, 4.0)
    before = model[0].linear.weight.detach().clone()
    init_weights(model, picture()[0], seed=0)
    assert torch.equal(model[0].linear.weight, before)
    init_weights(model, picture()[0], seed=0, keep="nothing")
    assert float(model[0].linear.weight.detach().abs().max()) <= 1 / 2


@pytest.mark.parametrize("activation", [torch.tanh, torch.sigmoid, F.gelu, lambda x: x + torch.sin(x) ** 2])
def test_other_activations_are_not_periodic(activation):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.last = nn.Linear(2, 64), nn.Linear(64, 64), nn.Linear(64, 1)

        def forward(self, x):
            return self.last(activation(self.second(activation(self.first(x)))))

    report = init_weights(Net(), torch.randn(8, 2), seed=0)
    assert not any(entry.scheme == "kept" or entry.distribution == "uniform" for entry in report.entries)


def test_both_waves_side_by_side_are_periodic():
    class Features(nn.Module):
        def __init__(self):
            super().__init__()
            self.waves, self.hidden, self.out = nn.Linear(2, 32, bias=False), nn.Linear(64, 64), nn.Linear(64, 1)

        def forward(self, x):
            waves = 6.28 * self.waves(x)
            return self.out(torch.relu(self.hidden(torch.cat([waves.sin(), waves.cos()], -1))))

    report = init_weights(Features(), torch.randn(8, 2), seed=0)
    assert [entry.name for entry in report.entries if entry.scheme == "kept"] == ["waves.weight"]
    assert "frequencies" in report.entries[0].note


def test_gates_that_begin_open_or_closed_stay() -> None:
    torch.manual_seed(0)
    lstm = nn.LSTM(4, 16)
    with torch.no_grad():  # Tallec and Ollivier 2018 (arXiv:1804.11188)
        remembers = torch.empty(16).uniform_(1.5, 50).log()
        lstm.bias_ih_l0.zero_()
        lstm.bias_ih_l0[:16], lstm.bias_ih_l0[16:32] = -remembers, remembers
    before = lstm.bias_ih_l0.detach().clone()
    report = init_weights(lstm, seed=0)
    assert torch.equal(lstm.bias_ih_l0, before)
    (entry,) = (e for e in report.entries if e.name == "bias_ih_l0")
    assert "gates set on purpose" in entry.note
    init_weights(lstm, seed=0, keep="nothing")
    assert lstm.bias_ih_l0[16:32].eq(1).all()
    assert not lstm.bias_ih_l0[:16].any()


def test_a_forget_bias_that_was_set_twice_is_one_in_total() -> None:
    lstm = nn.LSTM(4, 16)
    with torch.no_grad():
        lstm.bias_ih_l0[16:32], lstm.bias_hh_l0[16:32] = 1.0, 1.0
    init_weights(lstm, seed=0)
    assert (lstm.bias_ih_l0 + lstm.bias_hh_l0)[16:32].eq(1).all()


def test_orthogonal_layers_of_any_shape_and_gain_are_a_habit() -> None:
    def layer(inputs: int, outputs: int, gain: float) -> nn.Linear:
        made = nn.Linear(inputs, outputs)
        nn.init.orthogonal_(made.weight, gain)
        return made

    model = nn.Sequential(layer(8, 32, 2**0.5), nn.Tanh(), layer(32, 32, 1), nn.Tanh(), layer(32, 4, 0.01))
    report = init_weights(model, torch.randn(4, 8), seed=0)
    rules = {entry.name: entry.rule for entry in report.entries if entry.name.endswith("weight")}
    assert rules == {"0.weight": "Linear", "2.weight": "Linear", "4.weight": "state"}, "the last is small"


@pytest.mark.parametrize(("factor", "kept"), [(1.0, True), (-1.0, True), (0.5, False), (1.2, False)])
def test_a_net_of_identities_is_meant_unless_it_shrinks_or_blows_up_its_signals(factor: float, kept: bool) -> None:
    model = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(6)))
    with torch.no_grad():
        for layer in model:
            nn.init.eye_(layer.weight).mul_(factor)
    report = init_weights(model, torch.randn(4, 8), seed=0)
    assert {entry.rule for entry in report.entries} == {"state" if kept else "Linear"}


def test_one_stretched_identity_among_others_is_meant() -> None:
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
    with torch.no_grad():
        nn.init.eye_(model[1].weight).mul_(0.1)
    report = init_weights(model, torch.randn(4, 8), seed=0)
    assert {entry.name: entry.note for entry in report.entries}["1.weight"] == "0.1 times the identity, on purpose"
