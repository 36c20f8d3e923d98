"""The predicted signal and gradient at every weight, against what wide nets show, and the warnings drawn from them."""

import ast
import math

import pytest
import torch
from measure import output_gradients, output_variances
from torch import nn
from torch.nn import functional as F

import lightning_gradhealth as gh
from lightning_gradhealth.init.prediction import Prediction
from lightning_gradhealth.init.recurrence import LONGEST, UNITS, simulate
from lightning_gradhealth.init.replay import Replayer
from lightning_gradhealth.init.residual import factors, find_branches
from lightning_gradhealth.init.verdict import _change
from lightning_gradhealth.tracing import Graph, trace

WIDTH = 400


def mlp(function, depth, width=WIDTH, **options):
    layers = [m for _ in range(depth) for m in (nn.Linear(width, width, **options), function())]
    return nn.Sequential(*layers, nn.Linear(width, width))


class Residual(nn.Module):
    def __init__(self, *body, gate=None):
        super().__init__()
        self.body = nn.Sequential(*body)
        self.gate = None if gate is None else nn.Parameter(torch.tensor(gate))

    def forward(self, x):
        h = self.body(x)
        return x + (h if self.gate is None else self.gate * h)


def block(*before, width=WIDTH, gate=None):
    return Residual(*before, nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), gate=gate)


def stack(make, number):
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), *(make() for _ in range(number)), nn.Linear(WIDTH, WIDTH))


def measured(model, x):
    """Standard deviation of what every Linear gives, and RMS of the gradient there, by hooks and autograd."""
    outputs = {}
    handles = [
        module.register_forward_hook(lambda m, a, out, name=f"{name}.weight": outputs.update({name: out}))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    result = model(x)
    for handle in handles:
        handle.remove()
    cotangent = torch.randn(result.shape, generator=torch.Generator().manual_seed(5))
    gradients = torch.autograd.grad(result, list(outputs.values()), cotangent)
    back = {n: float(g.double().square().mean().sqrt()) for n, g in zip(outputs, gradients, strict=True)}
    return {n: float(z.detach().double().square().mean().sqrt()) for n, z in outputs.items()}, back


NETS = {
    "relu": lambda: mlp(nn.ReLU, 8),
    "gelu": lambda: mlp(nn.GELU, 8),
    "tanh": lambda: mlp(nn.Tanh, 8),
    "silu": lambda: mlp(nn.SiLU, 4),
    "selu": lambda: mlp(nn.SELU, 8),
    "leaky": lambda: mlp(lambda: nn.LeakyReLU(0.3), 8),
    "norms": lambda: mlp(lambda: nn.Sequential(nn.LayerNorm(WIDTH), nn.ReLU()), 6),
    "plain blocks": lambda: stack(block, 6),
    "pre-LN": lambda: stack(lambda: block(nn.LayerNorm(WIDTH)), 6),
    "gated": lambda: stack(lambda: block(gate=0.3), 6),
    "ReZero": lambda: stack(lambda: block(gate=0.0), 3),
}
OPTIONS = {
    "auto": {},
    "he": {"scheme": "he"},
    "lecun": {"scheme": "lecun"},
    "orthogonal": {"scheme": "orthogonal"},
    "xavier, larger": {"scheme": "xavier", "gamma": 1.3},
    "no residual factor": {"residual": "none"},
    "depth": {"residual": "depth"},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", NETS)
def test_wide_nets_do_what_was_predicted(name, options):
    model = NETS[name]()
    x = torch.randn(64, WIDTH)
    report = gh.init_weights(model, x, seed=0, **OPTIONS[options])
    forward, backward = measured(model, x)
    assert list(forward) == [point.name for point in report.depth]
    last = backward[report.depth[-1].name]
    for point in report.depth:
        # by chance a layer of n units changes log(variance), with a variance of about 5 / n, which GELU amplifies
        assert forward[point.name] == pytest.approx(point.forward, rel=0.3), point.name
        if point.backward:
            assert 2 / 3 < backward[point.name] / last / point.backward < 3 / 2, point.name
        else:
            assert backward[point.name] == 0


def test_frozen_weights_count_as_they_are():
    model = mlp(nn.ReLU, 3)
    for parameter in model[2].parameters():
        parameter.requires_grad_(False)
    with torch.no_grad():
        model[2].weight.normal_(0, 5 * WIDTH**-0.5)
    x = torch.randn(64, WIDTH)
    report = gh.init_weights(model, x, seed=0)
    forward, _ = measured(model, x)
    for point in report.depth:
        assert forward[point.name] == pytest.approx(point.forward, rel=0.15)
    assert report.depth[1].forward == pytest.approx(5, rel=0.05)


def notes(model, x, **options):
    report = gh.init_weights(model, x, seed=0, dry_run=True, **options)
    return [note for note in report.notes if "predicted" in note or "no gain holds" in note]


def test_a_deep_chain_of_gelus_without_norms_is_warned_of():
    """Its chi_q of 1.144 to the 20th is 15: the facts page says that no gain is stable."""
    (note,) = notes(mlp(nn.GELU, 20, 16), torch.randn(4, 16))
    assert "no gain holds the scale through this depth" in note
    percent = float(note.split("about")[1].split("%")[0])
    assert percent == pytest.approx(1.144**20, rel=0.1)
    assert notes(mlp(nn.GELU, 8, 16), torch.randn(4, 16)) == []


def test_sigmoids_let_gradients_vanish():
    (note,) = notes(mlp(nn.Sigmoid, 6, 16), torch.randn(4, 16))
    assert "gradients are predicted to vanish" in note
    assert "0.weight" in note
    assert "12.weight" in note
    assert notes(mlp(nn.Sigmoid, 2, 16), torch.randn(4, 16)) == []


def test_a_scheme_that_does_not_fit_is_warned_of():
    """LeCun's gain of 1 loses half of the variance at every rectifier."""
    x = torch.randn(4, 16)
    report = gh.init_weights(mlp(nn.ReLU, 30, 16), x, seed=0, scheme="lecun")
    for index, point in enumerate(report.depth):
        assert point.forward == pytest.approx(2 ** (-index / 2), rel=1e-3)
    found = notes(mlp(nn.ReLU, 30, 16), x, scheme="lecun")
    assert any(f"the signal is predicted to change by a factor of {2**-15:.2g}" in note for note in found)
    assert any("gradients are predicted to vanish" in note for note in found)
    assert notes(mlp(nn.ReLU, 30, 16), x, scheme="he") == []
    assert any("explode" in note for note in notes(mlp(nn.ReLU, 30, 16), x, scheme="he", gamma=1.5))


class BasicBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.a, self.b = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        self.na, self.nb = nn.BatchNorm2d(width), nn.BatchNorm2d(width)

    def forward(self, x):
        return F.relu(x + self.nb(self.b(F.relu(self.na(self.a(x))))))


def resnet():
    body = (BasicBlock(8) for _ in range(8))
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)
    )


def transformer():
    def layer():
        return nn.TransformerEncoderLayer(16, 2, 32, 0.0, "gelu", batch_first=True, norm_first=True)

    return nn.Sequential(nn.Linear(8, 16), *(layer() for _ in range(12)), nn.LayerNorm(16), nn.Linear(16, 8))


@pytest.mark.parametrize(
    ("make", "x"),
    [
        (resnet, torch.randn(2, 3, 12, 12)),
        (transformer, torch.randn(2, 5, 8)),
        (lambda: mlp(nn.ReLU, 30, 16), torch.randn(4, 16)),
        (lambda: mlp(nn.SELU, 30, 16), torch.randn(4, 16)),
        (lambda: stack(block, 12), torch.randn(4, WIDTH)),
        (lambda: nn.LSTM(8, 8, num_layers=2), torch.randn(5, 2, 8)),
    ],
    ids=["BN-ResNet", "pre-LN transformer", "relu", "selu", "plain blocks", "lstm"],
)
def test_healthy_nets_are_not_warned_of(make, x):
    assert notes(make(), x) == []


# --- streams that are never negative ---


class Post(nn.Module):
    """f(x + branch(x)), or what `join` makes of the two."""

    def __init__(self, after=F.relu, join=torch.add, layers=2, norm=None, width=WIDTH):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.norm, self.after, self.join = norm or nn.Identity(), after, join

    def forward(self, x):
        h = self.layers[0](x)
        for layer in self.layers[1:]:
            h = layer(F.relu(h))
        return self.after(self.join(x, self.norm(h)))


def sums_of_rectified(join):
    return Post(after=nn.Identity(), join=lambda x, h: join(x, F.relu(h)), layers=1)


class Highway(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.gate = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        share = torch.sigmoid(self.gate(x))
        return share * torch.tanh(self.body(x)) + (1 - share) * x


POSITIVE = {
    "ResNet v1": lambda: stack(Post, 12),
    "behind a rectifier": lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), stack(Post, 6)),
    "leaky": lambda: stack(lambda: Post(lambda x: F.leaky_relu(x, 0.1)), 8),
    "ELU": lambda: stack(lambda: Post(F.elu), 8),
    "softplus": lambda: stack(lambda: Post(F.softplus), 5),
    "LN in the branch": lambda: stack(lambda: Post(norm=nn.LayerNorm(WIDTH)), 8),
    "sums of rectified": lambda: stack(lambda: sums_of_rectified(torch.add), 6),
    "differences": lambda: stack(lambda: sums_of_rectified(torch.sub), 6),
    "subtracted from": lambda: stack(lambda: sums_of_rectified(lambda x, h: torch.rsub(h, x)), 6),
    "post-LN": lambda: stack(lambda: Post(nn.LayerNorm(WIDTH), lambda x, h: x + F.relu(h), layers=1), 6),
    "highway": lambda: stack(Highway, 5),
}


@pytest.mark.parametrize("residual", ["auto", "none"])
@pytest.mark.parametrize("name", POSITIVE)
def test_streams_that_keep_a_mean_do_what_was_predicted(name, residual):
    """A rectifier takes little from what is nearly all positive: once the head was told .025 and had .83."""
    model, x = POSITIVE[name](), torch.randn(64, WIDTH)
    report = gh.init_weights(model, x, seed=0, residual=residual)
    forward, backward = output_variances(model, x), output_gradients(model, x)
    last = backward[report.depth[-1].name]
    assert {point.name for point in report.depth} == set(forward)
    for point in report.depth:
        assert 0.75 < point.forward / math.sqrt(forward[point.name]) < 4 / 3, point.name
        assert 0.6 < backward[point.name] / last / point.backward < 1 / 0.6, point.name
    assert not any("vanish" in note for note in report.notes)


def flow_of(model, x):
    graph = Graph(trace(model, x))
    stds = {id(p): p.shape[1] ** -0.5 for p in model.parameters() if p.dim() > 1}
    return graph, Prediction(graph, Replayer(graph), {}).flow(stds)


ACTIVATIONS = [F.relu, F.gelu, F.elu, torch.tanh, torch.abs, torch.sign, lambda x: 3 * F.leaky_relu(x, -0.2)]


@pytest.mark.parametrize("scale", [1e-4, 1.0, 50.0])
@pytest.mark.parametrize("after", ACTIVATIONS)
def test_an_activation_of_a_signal_with_a_mean_is_integrated(after, scale):
    """f behind |a| + b for normal a and b, against plain sums over many quantiles and their autograd slopes."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(4, 4, bias=False) for _ in range(3))

        def forward(self, x):
            return self.c(after((scale * self.a(x)).abs() + scale * self.b(x)))

    graph, flow = flow_of(Net(), torch.randn(2, 4))
    *_, merge, last = graph.stations
    mean = scale * math.sqrt(2 / math.pi)
    assert flow.means[merge] == pytest.approx(mean, rel=1e-6)
    assert flow.moments[merge] == pytest.approx(2 * scale**2, rel=1e-6)
    quantiles = torch.special.ndtri((torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000)
    z = mean + math.sqrt(2 * scale**2 - mean**2) * quantiles
    z.requires_grad_()
    values = after(z)
    (slopes,) = torch.autograd.grad(values.sum(), z)
    assert flow.moments[last] == pytest.approx(float(values.detach().square().mean()), rel=0.01)
    assert flow.gradients[merge] == pytest.approx(float(slopes.square().mean()), rel=0.01)


@pytest.mark.parametrize(
    ("join", "first", "second"),
    [(torch.add, 1, 1), (torch.sub, 1, -1), (torch.rsub, -1, 1), (lambda a, b: a.clone().sub_(b), 1, -1)],
    ids=["add", "sub", "rsub", "in place"],
)
def test_means_are_added_with_their_signs(join, first, second):
    """|a| joined with relu(b): their means are sqrt(2 / pi) and half of it, their mean squares 1 and 1/2."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = (nn.Linear(4, 4, bias=False) for _ in range(2))

        def forward(self, x):
            return join(self.a(x).abs(), F.relu(self.b(x)))

    graph, flow = flow_of(Net(), torch.randn(2, 4))
    merge = max(graph.stations)
    assert flow.means[merge] == pytest.approx((first + second / 2) * math.sqrt(2 / math.pi))
    assert flow.moments[merge] == pytest.approx(1.5 + first * second * 2 / math.pi)


def test_odd_activations_and_norms_leave_no_mean():
    """What goes the old way stays as it was, to the last bit."""
    odd = lambda: Post(torch.tanh)  # noqa: E731
    for make in (odd, lambda: block(nn.LayerNorm(WIDTH)), lambda: Post(nn.LayerNorm(WIDTH))):
        graph, flow = flow_of(stack(make, 3), torch.randn(2, WIDTH))
        assert set(flow.means) == set(graph.stations)
        assert set(flow.means.values()) == {0.0}


def test_what_two_positions_share_goes_on_behind_a_mean():
    """Every correlation lies within its bounds, and that of nearly constant streams is nearly 1."""
    _, flow = flow_of(stack(lambda: sums_of_rectified(torch.add), 6), torch.randn(2, 5, WIDTH))
    assert all(0 <= alike <= 1 for alike in flow.alike.values())
    assert list(flow.alike.values())[-1] > 0.6


# --- norms whose scale is multiplied ---


@pytest.mark.parametrize("residual", ["zero_last", "depth"])
def test_the_factor_of_a_norm_at_the_end_of_a_branch_counts(residual):
    """The scale of such a norm, and not the weight before, is what `residual=` multiplies."""
    make = lambda: Residual(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH))  # noqa: E731
    model, x = stack(make, 12), torch.randn(64, WIDTH)
    gh.init_weights(model, x, seed=0, residual=residual)
    graph = Graph(trace(model, x))
    replayer = Replayer(graph)
    found = factors(residual, find_branches(graph, replayer), auto=False)
    assert {graph.stations[index].kind for index in found} == {"norm"}
    weights = {name: p for name, p in model.named_parameters() if p.dim() > 1}
    stds = {id(p): float(p.detach().std()) for p in weights.values()}
    names = {id(p): name for name, p in weights.items()}
    points, _ = Prediction(graph, replayer, {}, factors=found)(stds, names)
    without, _ = Prediction(graph, replayer, {})(stds, names)
    forward, backward = output_variances(model, x), output_gradients(model, x)
    last = backward[points[-1].name]
    for point in points:
        assert point.forward == pytest.approx(math.sqrt(forward[point.name]), rel=0.15)
        assert backward[point.name] / last == pytest.approx(point.backward, rel=0.25)
    assert without[-1].forward > 2 * points[-1].forward


# --- when to warn ---


class Inverted(nn.Module):
    """MobileNetV2's block: 1x1 up, depthwise 3x3, 1x1 down, a norm after each."""

    def __init__(self, inputs, outputs, stride, ratio):
        super().__init__()
        inner = inputs * ratio

        def layer(i, o, size, groups=1, steps=1):
            return nn.Conv2d(i, o, size, steps, size // 2, groups=groups, bias=False), nn.BatchNorm2d(o)

        up = (*layer(inputs, inner, 1), nn.ReLU6()) if ratio > 1 else ()
        self.body = nn.Sequential(*up, *layer(inner, inner, 3, inner, stride), nn.ReLU6(), *layer(inner, outputs, 1))
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, x):
        return x + self.body(x) if self.shortcut else self.body(x)


def mobile_net():
    """All 53 weights of MobileNetV2, a quarter as wide."""
    rows = [(1, 4, 1, 1), (6, 6, 2, 2), (6, 8, 3, 2), (6, 16, 4, 2), (6, 24, 3, 1), (6, 40, 3, 2), (6, 80, 1, 1)]
    layers, width = [nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6()], 8
    for ratio, outputs, number, stride in rows:
        for index in range(number):
            layers.append(Inverted(width, outputs, 1 if index else stride, ratio))
            width = outputs
    layers += [nn.Conv2d(width, 320, 1, bias=False), nn.BatchNorm2d(320), nn.ReLU6(), nn.AdaptiveAvgPool2d(1)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(320, 10))


def test_normed_residual_nets_of_fifty_layers_are_not_warned_of():
    x = torch.randn(2, 3, 64, 64)
    assert len(gh.init_weights(mobile_net(), x, seed=0, dry_run=True).depth) == 53
    assert notes(mobile_net(), x) == []


@pytest.mark.parametrize(
    ("make", "options", "expected"),
    [
        (lambda: mlp(nn.Sigmoid, 3, 16), {}, "vanish"),
        (lambda: mlp(nn.Sigmoid, 12, 16), {}, "vanish"),
        (lambda: mlp(nn.Tanh, 100, 16), {"nonlinearity": "tanh"}, "explode"),
        (lambda: mlp(nn.Tanh, 20, 16), {"nonlinearity": "tanh"}, ""),
        (lambda: mlp(nn.ReLU, 12, 16), {"gamma": 0.4}, "vanish"),
        (lambda: mlp(nn.ReLU, 12, 16), {"gamma": 0.9}, ""),
        (lambda: mlp(nn.ReLU, 2, 16), {"gamma": 0.2}, ""),
    ],
    ids=["sigmoid 3", "sigmoid 12", "tanh 100", "tanh 20", "steep", "gentle", "few"],
)
def test_far_from_1_at_once_or_at_every_layer(make, options, expected):
    found = [note for note in notes(make(), torch.randn(4, 16), **options) if "gradients" in note]
    assert len(found) == bool(expected)
    assert all(f"predicted to {expected}" in note for note in found)


@pytest.mark.parametrize(
    ("sizes", "told"),
    [
        ([1e-4, 1.0], 1e-4),
        ([1e4, 1.0], 1e4),
        ([1e-2, 1.0], None),
        ([0.4**4, 0.4**3, 0.4**2, 0.4, 1.0], 0.4**4),
        ([2.6**4, 2.6**3, 2.6**2, 2.6, 1.0], 2.6**4),
        ([0.6**9 * 0.6**-i for i in range(10)], None),
        ([0.4**2, 0.4, 1.0], None),
        ([0.0, 0.5, 1.0, 0.0], None),
        ([math.inf, 1e4, 1.0], 1e4),
        ([1.0], None),
        ([], None),
    ],
)
def test_what_counts_as_a_change(sizes, told):
    found = _change([(str(index), size) for index, size in enumerate(sizes)])
    assert (found and found[2]) == (told and pytest.approx(told))


def test_a_zero_head_is_no_vanishing_gradient():
    """It shuts the way for one step, as intended."""
    assert notes(mlp(nn.ReLU, 4, 16), torch.randn(4, 16), overrides=[("8.weight", "zeros")]) == []


def test_loud_outputs_are_told_with_what_brings_them_down():
    x = torch.randn(64, WIDTH)
    model = stack(Post, 12)
    report = gh.init_weights(model, x, seed=0, residual="none")
    (note,) = [note for note in report.notes if "outputs are predicted" in note]
    rms = math.sqrt(output_variances(model, x)["13.weight"])
    assert rms > 10
    assert float(note.split("RMS of ")[1].split(":")[0]) == pytest.approx(rms, rel=0.3)
    overrides = ast.literal_eval(note.split("overrides=")[1])
    again = gh.init_weights(model, x, seed=0, residual="none", overrides=overrides)
    assert not any("outputs are predicted" in note for note in again.notes)
    assert output_variances(model, x)["13.weight"] == pytest.approx(1, rel=0.5)
    assert notes(stack(Post, 12), x) == []  # its branches are scaled down


def test_remedies_fit_the_model():
    """Nobody is told to put in what is there."""

    def told(model):
        (note,) = [note for note in notes(model, torch.randn(4, 16), gamma=0.3) if "gradients" in note]
        return note

    def residual(*norm):
        return Residual(*norm, nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))

    def between(make):
        return nn.Sequential(*mlp(nn.ReLU, 8, 16), make(), *mlp(nn.ReLU, 8, 16))

    assert told(between(nn.Identity)).endswith("put normalisation layers or residual connections between")
    assert told(between(residual)).endswith("put normalisation layers between")
    assert told(between(lambda: nn.LayerNorm(16))).endswith("put residual connections around them")
    assert "at the beginning of the residual branches" in told(between(lambda: residual(nn.LayerNorm(16))))
    signal = [n for n in notes(between(lambda: nn.LayerNorm(16)), torch.randn(4, 16), gamma=3.0) if "the signal" in n]
    assert [note.split("; ")[1] for note in signal] == ["put one where it changes"]


def test_a_branch_unstable_by_itself_counts_by_its_share():
    """What 1 % more of the first variance becomes, by running the model twice."""
    deep = lambda: Residual(*(m for _ in range(6) for m in (nn.GELU(), nn.Linear(WIDTH, WIDTH))))  # noqa: E731
    model, x = stack(deep, 4), torch.randn(256, WIDTH)
    gh.init_weights(model, x, seed=0, residual="none")
    graph = Graph(trace(model, x))
    stds = {id(p): float(p.detach().std()) for p in model.parameters() if p.dim() > 1}
    flow = Prediction(graph, Replayer(graph), {}).flow(stds)
    before = output_variances(model, x)["5.weight"]
    with torch.no_grad():
        model[0].weight.mul_(1.01**0.5)
    percent = 100 * (output_variances(model, x)["5.weight"] / before - 1)
    assert flow.sensitivity[max(graph.stations)] == pytest.approx(percent, rel=0.4)


# --- recurrent layers ---


def real_layers(module, steps, batch=64):
    """What the layers of the module itself give, drawn as `init_weights` draws them."""
    gh.init_weights(module, torch.randn(steps, batch, module.input_size), seed=0)
    given, found = torch.randn(steps, batch, module.input_size), []
    for layer in range(module.num_layers):
        one = (
            type(module)(given.shape[-1], module.hidden_size, nonlinearity=module.nonlinearity)
            if isinstance(module, nn.RNN)
            else type(module)(given.shape[-1], module.hidden_size)
        )
        with torch.no_grad():
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
                getattr(one, f"{name}_l0").copy_(getattr(module, f"{name}_l{layer}"))
            given = one(given)[0]
        found.append(float(given.square().mean()))
    return found


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("steps", [1, 6, 30])
def test_recurrent_layers_give_what_the_simulation_says(kind, steps):
    module = kind(128, 128, num_layers=2)
    layers = simulate(module, steps)
    assert [tuple(layer.shape) for layer in layers] == [(steps, UNITS)] * 2
    simulated = [float(layer.square().mean()) for layer in layers]
    for real, told in zip(real_layers(module, steps), simulated, strict=True):
        assert told == pytest.approx(real, rel=0.25)


def test_the_simulation_is_bounded_and_uses_no_global_random_numbers():
    module, cell = nn.GRU(4, 4), nn.LSTMCell(4, 4)
    state = torch.get_rng_state()
    (first,), (second,) = (simulate(module, 10_000) for _ in range(2))
    assert len(first) == LONGEST
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(simulate(cell, 0)[0]) == 1


def test_what_reads_a_recurrent_layer_makes_up_for_its_small_outputs():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.next, self.head = nn.LSTM(64, 128, batch_first=True), nn.Linear(128, 256), nn.Linear(256, 4)

        def forward(self, x):
            return self.head(F.relu(self.next(self.rnn(x)[0])))

    model, x = Net(), torch.randn(16, 20, 64)
    gh.init_weights(model, x, seed=0)
    with torch.no_grad():
        z = model.next(model.rnn(x)[0])
    assert float(z.square().mean()) == pytest.approx(2, rel=0.2)
    assert math.isfinite(float(z.sum()))
