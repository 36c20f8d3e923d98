"""What becomes of a signal between two weights: replayed, against integrals, simulation and symmetry."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lightning_gradhealth as gh
from lightning_gradhealth.init.gains import backward_gain
from lightning_gradhealth.init.replay import Replayer
from lightning_gradhealth.tracing import Graph, trace

WIDTH = 16


class Between(nn.Module):
    """Two weights, and a function between them; `widen`: what it divides the width by."""

    def __init__(self, function, widen=1, width=WIDTH, **parts):
        super().__init__()
        self.function = function
        self.first, self.last = nn.Linear(width, width * widen), nn.Linear(width, 4)
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.last(self.function(self.first(x)))


def passage_of(model, x=None, stds=None):
    """The passage to the last weight."""
    graph = Graph(trace(model, torch.randn(64, WIDTH) if x is None else x))
    last = max(graph.stations)
    first = min(graph.stations)
    return Replayer(graph).passage(graph.stations[last].reads[0], last, stds and {first: stds})


def through(function, **options):
    return passage_of(Between(function, **options))


def gelu_by_hand(z):
    return 0.5 * z * (1 + torch.erf(z / math.sqrt(2)))


def tanh_gelu_by_hand(z):
    return 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


def mish_by_hand(z):
    return z * torch.tanh(torch.log1p(torch.exp(z)))


def relu_by_index(z):
    z = z.clone()
    z[z < 0] = 0
    return z


def rowwise_relu(z):
    return torch.stack([row.clamp(min=0) for row in z])


TABLE = [  # function, E[f^2], E[f'^2], as the facts page has them from adaptive quadrature
    (lambda z: z, 1, 1),
    (nn.ReLU(), 0.5, 0.5),
    (nn.ReLU(inplace=True), 0.5, 0.5),
    (F.relu, 0.5, 0.5),
    (torch.relu_, 0.5, 0.5),
    (lambda z: z.clamp(min=0), 0.5, 0.5),
    (lambda z: torch.maximum(z, torch.zeros_like(z)), 0.5, 0.5),
    (lambda z: torch.maximum(z, torch.zeros(())), 0.5, 0.5),
    (lambda z: torch.where(z > 0, z, 0.0), 0.5, 0.5),
    (lambda z: z * (z > 0), 0.5, 0.5),
    (lambda z: (z + z.abs()) / 2, 0.5, 0.5),
    (lambda z: z.masked_fill(z < 0, 0.0), 0.5, 0.5),
    (relu_by_index, 0.5, 0.5),
    (rowwise_relu, 0.5, 0.5),
    (lambda z: F.threshold(z, 0.0, 0.0), 0.5, 0.5),
    (nn.LeakyReLU(0.2), 0.52, 0.52),
    (nn.PReLU(), 0.53125, 0.53125),
    (nn.PReLU(WIDTH), 0.53125, 0.53125),
    (lambda z: torch.where(z > 0, z, 0.2 * z), 0.52, 0.52),
    (nn.ELU(), 1.2452**-2, 1.2234**-2),
    (nn.SELU(), 1, 0.9660**-2),
    (nn.GELU(), 1.5335**-2, 1.4811**-2),
    (gelu_by_hand, 1.5335**-2, 1.4811**-2),
    (nn.SiLU(), 1.6765**-2, 1.6233**-2),
    (lambda z: z * torch.sigmoid(z), 1.6765**-2, 1.6233**-2),
    (lambda z: z / (1 + (-z).exp()), 1.6765**-2, 1.6233**-2),
    (nn.Mish(), 1.4868**-2, 1.4448**-2),
    (mish_by_hand, 1.4868**-2, 1.4448**-2),
    (nn.Hardswish(), 1.7367**-2, 1.6701**-2),
    (lambda z: z * F.relu6(z + 3) / 6, 1.7367**-2, 1.6701**-2),
    (nn.Tanh(), 1.5925**-2, 1.4674**-2),
    (lambda z: 2 * torch.sigmoid(2 * z) - 1, 1.5925**-2, 1.4674**-2),
    (nn.Sigmoid(), 1.8462**-2, 4.7226**-2),
    (nn.Softplus(), 1.0419**-2, 1.8462**-2),
    (nn.Softsign(), 2.3375**-2, 2.0958**-2),
    (lambda z: z / (1 + z.abs()), 2.3375**-2, 2.0958**-2),
    (lambda z: F.relu(z) ** 2, 1.5, 2),
    (lambda z: F.relu(z).square(), 1.5, 2),
    (nn.Sequential(nn.ReLU(), nn.Dropout(0.5)), 0.5, 0.5),
    (nn.Sequential(nn.Unflatten(1, (4, 4)), nn.Tanh(), nn.Flatten()), 1.5925**-2, 1.4674**-2),
    (torch.cos, (1 + math.exp(-2)) / 2, (1 - math.exp(-2)) / 2),
]


@pytest.mark.parametrize(("function", "moment", "slope"), TABLE, ids=range(len(TABLE)))
def test_the_table_of_gains(function, moment, slope):
    """To the table's last digit where every element goes its own way, within 1 % where it has to be measured."""
    passage = through(function)
    assert passage.replayed
    rel = 2e-4 if passage.curve is not None or not passage.operations else 0.01
    assert passage.moment == pytest.approx(moment, rel=rel)
    assert list(passage.slopes.values()) == [pytest.approx(slope, rel=3 * rel)]


@pytest.mark.parametrize("name", ["relu", "gelu", "silu", "tanh", "elu", "selu", "softplus", "mish"])
def test_elementwise_ones_agree_with_the_gain_by_name(name):
    passage = through(getattr(F, name))
    assert passage.moment == pytest.approx(gh.gain(name) ** -2, rel=1e-4)
    assert sum(passage.slopes.values()) == pytest.approx(backward_gain(name) ** -2, rel=1e-4)


@pytest.mark.parametrize("std", [0.3, 1.0, 2.0])
@pytest.mark.parametrize(
    "function",
    [F.relu, F.gelu, torch.tanh, torch.sigmoid, lambda z: 3 * z, lambda z: z * torch.rsqrt(z.square().mean())],
)
def test_at_any_scale_it_is_the_moment_of_a_simulation(function, std):
    z = std * torch.randn(30_000, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    z.requires_grad_(True)
    values = function(z)
    (slope,) = torch.autograd.grad(values.sum(), z)
    passage = passage_of(Between(function), stds=std)
    assert passage.moment == pytest.approx(float(values.detach().square().mean()), rel=0.01)
    if passage.curve is not None:
        assert sum(passage.slopes.values()) == pytest.approx(float(slope.square().mean()), rel=0.01)


def gates(function):
    """E[(a f(b))^2] for independent normal a and b."""
    return gh.gain(function) ** -2


GATED = [
    (F.glu, 2, gates("sigmoid")),
    (lambda z: (h := z.chunk(2, -1))[0] * torch.sigmoid(h[1]), 2, gates("sigmoid")),
    (lambda z: F.silu(z[:, :WIDTH]) * z[:, WIDTH:], 2, gates("silu")),
    (lambda z: (h := z.unflatten(1, (WIDTH, 2)))[..., 0] * F.gelu(h[..., 1]), 2, gates("gelu")),
    (lambda z: (h := z.chunk(3, 1))[0] * torch.sigmoid(h[1]) + torch.tanh(h[2]), 3, gates("sigmoid") + gates("tanh")),
    (lambda z: F.relu(torch.cat([z, -z], 1)), 1, 0.5),
    (lambda z: z.view(len(z), WIDTH, 2).amax(2), 2, 1.0),  # E[max(a, b)^2] = 1
    (lambda z: z.view(len(z), WIDTH, 2).sum(2), 2, 2.0),
    (lambda z: z[:, ::2], 2, 1.0),
    (lambda z: z.roll(1, 1), 1, 1.0),
    (lambda z: torch.softmax(z, 1), 1, None),
]


@pytest.mark.parametrize(("function", "widen", "moment"), GATED, ids=range(len(GATED)))
def test_gains_of_gates_and_whatever_mixes_elements_within_one_percent(function, widen, moment):
    outputs = function(torch.randn(8, WIDTH * widen)).shape[1]
    model = Between(function, widen=widen)
    model.last = nn.Linear(outputs, 4)
    passage = passage_of(model)
    if moment is None:
        z = torch.randn(20_000, WIDTH, generator=torch.Generator().manual_seed(1))
        moment = float(function(z).square().mean())
    assert passage.moment**0.5 == pytest.approx(moment**0.5, rel=0.01)


class Mean(nn.Module):
    def forward(self, z):
        return z.mean((2, 3), keepdim=True)


@pytest.mark.parametrize("pool", [nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(1), Mean()])
def test_pooling_lies_between_equal_and_independent_positions(pool):
    """Neighbouring positions are neither: their correlation is taken to be in the middle."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), pool, nn.Flatten(), nn.LazyLinear(4))
    x = torch.randn(4, 3, 8, 8)
    model(x)
    averaged = x[:1, :1].numel() / pool(x)[:1, :1].numel()
    same = 0.5  # E[relu^2]
    mean = (2 * math.pi) ** -0.5  # E[relu], which no averaging removes
    independent = mean**2 + (same - mean**2) / averaged
    moment = passage_of(model, x).moment
    assert independent * 1.02 < moment < same / 1.02


# --- flags ---


@pytest.mark.parametrize(
    ("function", "homogeneous", "invariant", "linear", "saturates"),
    [
        (lambda z: z, True, False, True, False),
        (lambda z: -3 * z, True, False, True, False),
        (F.relu, True, False, False, False),
        (F.leaky_relu, True, False, False, False),
        (torch.abs, True, False, False, False),
        (F.gelu, False, False, False, False),
        (F.softplus, False, False, False, False),
        (torch.tanh, False, False, False, True),
        (torch.sigmoid, False, False, False, True),
        (F.softsign, False, False, False, True),
        (F.hardtanh, False, False, False, True),
        (F.relu6, True, False, False, False),  # its cut is far out
        (torch.sign, False, True, True, False),
        (lambda z: z + 1, False, False, False, False),
        (lambda z: z.square(), False, False, False, False),
        (lambda z: z * torch.rsqrt(z.square().mean(-1, True) + 1e-6), False, True, True, False),
        (lambda z: F.normalize(z, dim=-1), False, True, True, False),
        (lambda z: F.relu(F.normalize(z, dim=-1)), False, True, False, False),
        (lambda z: z.cumsum(1), True, False, True, False),
        (lambda z: z.sort(1).values, True, False, False, False),
        (lambda z: torch.softmax(z, 1), False, False, False, False),
    ],
    ids=range(21),
)
def test_flags(function, homogeneous, invariant, linear, saturates):
    passage = through(function)
    if passage.curve is None:
        saturates = passage.saturates  # of single elements only
    flags = passage.homogeneous, passage.invariant, passage.linear, passage.saturates
    assert flags == (homogeneous, invariant, linear, saturates)


def test_a_cut_that_lies_far_out_does_not_make_a_rectifier_something_else():
    assert gh.gain("relu6") == pytest.approx(through(F.relu6).moment ** -0.5, rel=1e-4)


# --- parameters and constants on the way ---


@pytest.mark.parametrize("values", [(0.25, 0.25), (0.1, 0.9), (0.0, 1.0)])
def test_constants_of_equal_paths_are_told_apart(values):
    """Two blocks that differ in nothing but a slope, a multiplier, a buffer."""

    class Block(nn.Module):
        def __init__(self, value):
            super().__init__()
            self.slope = nn.PReLU(init=value)
            self.scale = nn.Parameter(torch.tensor(1 + value))
            self.register_buffer("wide", torch.full((WIDTH,), 1 + value))
            self.shift = 1 + value
            self.layer = nn.Linear(WIDTH, WIDTH)

    for use in ("slope", "scale", "wide", "shift", "large"):
        blocks = [Block(value) for value in values]
        for block in blocks:
            block.forward = {
                "slope": lambda x, b=block: b.slope(b.layer(x)),
                "scale": lambda x, b=block: b.scale * b.layer(x),
                "wide": lambda x, b=block: b.wide * b.layer(x),
                "shift": lambda x, b=block: b.shift * b.layer(x),
                "large": lambda x, b=block: b.wide.repeat(2)[:WIDTH] * b.layer(x),
            }[use]
        graph = Graph(trace(nn.Sequential(*blocks, nn.Linear(WIDTH, 2)), torch.randn(4, WIDTH)))
        replayer = Replayer(graph)
        _, second, last = graph.stations.values()
        found = [replayer.passage(station.reads[0], station.event).moment for station in (second, last)]
        expected = [(1 + v * v) / 2 if use == "slope" else (1 + v) ** 2 for v in values]
        assert found == pytest.approx(expected, rel=1e-3), use


def test_equal_blocks_are_replayed_once():
    model = nn.Sequential(*(m for _ in range(20) for m in (nn.Linear(8, 16), nn.GLU())), nn.Linear(8, 2))
    graph = Graph(trace(model, torch.randn(4, 8)))
    replayer = Replayer(graph)
    runs = []
    replay = replayer._replayed
    replayer._replayed = lambda path: runs.append(path) or replay(path)
    stations = list(graph.stations.values())
    passages = [replayer.passage(station.reads[0], station.event) for station in stations]
    assert len(runs) == 2  # the input, and one GLU
    assert {passage.moment for passage in passages[1:]} == {passages[1].moment}
    for station, passage in zip(stations[1:], passages[1:], strict=True):
        assert passage.sources == graph.sources(station.reads[0], station.event) == passage.slopes.keys()


def test_the_same_numbers_every_time_and_no_random_state_used():
    model = Between(lambda z: torch.softmax(z, 1).cumsum(1))
    state = torch.get_rng_state()
    first = passage_of(model, torch.ones(8, WIDTH))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    second = passage_of(model, torch.ones(8, WIDTH))
    assert first.moment == second.moment
    assert first.slopes == second.slopes


def test_the_model_is_not_written_to():
    model = Between(
        lambda z: model.norm(z.mul_(model.scale)), norm=nn.BatchNorm1d(WIDTH), scale=nn.Parameter(torch.ones(()))
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for parameter in model.parameters():
        parameter.grad = None
    gh.plan_init(model, torch.randn(8, WIDTH), seed=0, on_uncovered="ignore")
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(
    "function", [F.gelu, F.glu, lambda z: F.relu(z.float()).to(z.dtype)], ids=["gelu", "glu", "cast"]
)
def test_models_of_any_precision_are_replayed_alike(dtype, function):
    model = Between(function, widen=2 if function is F.glu else 1)
    x = torch.randn(8, WIDTH)
    plain = passage_of(model, x)
    other = passage_of(model.to(dtype), x.to(dtype))
    assert other.replayed
    assert other.moment == pytest.approx(plain.moment, rel=1e-5)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_the_callers_grad_mode_does_not_matter(mode):
    model, x = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8), nn.GLU(), nn.Linear(4, 2)), torch.randn(4, 8)
    plain = gh.init_weights(model, x, seed=0, calibrate=x)
    with mode():
        inside = gh.init_weights(model, x, seed=0, calibrate=x)
    assert inside == plain
    assert gh.init_weights(model, x, seed=0, calibrate=x) == plain


def test_what_cannot_be_replayed_is_told_and_assumed():
    """Values that are not here, as on the meta device, and operators that have no implementation here."""
    with torch.device("meta"):
        model = Between(lambda z: z[:, model.order], order=nn.Parameter(torch.arange(WIDTH), requires_grad=False))
    passage = passage_of(model, torch.randn(8, WIDTH))
    assert not passage.replayed
    assert passage.moment == 1.0

    class Refused(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z):
            return torch.ops.gradhealth_tests.refuse(z)

    library = torch.library.Library("gradhealth_tests", "FRAGMENT")
    library.define("refuse(Tensor z) -> Tensor")
    library.impl("refuse", torch.empty_like, "Meta")
    try:
        assumed = Between(Refused.apply)
        report = gh.init_weights(assumed, torch.randn(8, WIDTH), seed=0)
    finally:
        library._destroy()
    gains = {e.name: (e.gain, e.found) for e in report.entries if e.name.endswith("weight")}
    assert gains["last.weight"][0] == 1
    assert gains["first.weight"] == (1, "assumed")


def test_attention_tells_over_how_many_positions_it_averages():
    attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
    graph = Graph(trace(attention, (torch.randn(2, 6, WIDTH), torch.randn(2, 9, WIDTH), torch.randn(2, 9, WIDTH))))
    last = max(graph.stations)
    passage = Replayer(graph).passage(graph.stations[last].reads[0], last)
    assert passage.averages == 9
    assert 1 / 9 < passage.moment < 1
