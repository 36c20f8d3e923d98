"""What the probe says of signals and of units, against the slow twin."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import signal_twin
import torch
from signal_twin import Twin, assert_alike, by_unit, opened, read, units
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from lightning_gradhealth.signals import SignalProbe
from lightning_gradhealth.signals.reading import INPUT

# --- units ---


class Between(nn.Module):
    """A layer, an activation, a layer."""

    def __init__(self, layer: nn.Module, activation: Callable[[Tensor], Tensor], units: int) -> None:
        super().__init__()
        self.layer = layer
        self.activation = activation
        self.head = nn.Linear(units, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.activation(self.layer(x))
        return self.head(h.flatten(2).mean(2) if isinstance(self.layer, (nn.Conv1d, nn.Conv2d)) else h)


ACTIVATIONS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "relu": ("relu", torch.relu),
    "relu module": ("relu", nn.ReLU()),
    "relu inplace": ("relu", nn.ReLU(inplace=True)),
    "relu_": ("relu", torch.relu_),
    "clamp at 0": ("relu", lambda x: x.clamp(min=0)),
    "clamp_ at 0": ("relu", lambda x: x.clamp_(min=0)),
    "clamp to 1": ("unit clamp", lambda x: x.clamp(0.0, 1.0)),
    "relu6": ("relu6", F.relu6),
    "relu6 module": ("relu6", nn.ReLU6()),
    "relu6 inplace": ("relu6", nn.ReLU6(inplace=True)),
    "relu6 functional inplace": ("relu6", lambda x: F.relu6(x, inplace=True)),
    "threshold": ("threshold", lambda x: F.threshold(x, 0.1, 0.0)),
    "threshold module": ("threshold", nn.Threshold(0.1, 0.0)),
    "threshold inplace": ("threshold", nn.Threshold(0.1, 0.0, inplace=True)),
    "sigmoid": ("sigmoid", torch.sigmoid),
    "sigmoid module": ("sigmoid", nn.Sigmoid()),
    "sigmoid_": ("sigmoid", torch.sigmoid_),
    "tanh": ("tanh", torch.tanh),
    "tanh module": ("tanh", nn.Tanh()),
    "tanh_": ("tanh", torch.tanh_),
    "hardtanh": ("hardtanh", F.hardtanh),
    "hardtanh module": ("hardtanh", nn.Hardtanh()),
    "hardtanh inplace": ("hardtanh", nn.Hardtanh(inplace=True)),
    "hardsigmoid": ("hardsigmoid", F.hardsigmoid),
    "hardsigmoid module": ("hardsigmoid", nn.Hardsigmoid()),
    "hardsigmoid inplace": ("hardsigmoid", nn.Hardsigmoid(inplace=True)),
    "softsign": ("softsign", F.softsign),
    "softsign module": ("softsign", nn.Softsign()),
}
# a Linear of tokens gives a view, and autograd does not show what is written into one
HIDDEN_IN_VIEWS = {"relu_", "clamp_ at 0", "relu6 functional inplace", "sigmoid_", "tanh_"}
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "linear": (lambda: nn.Linear(4, 12), (300, 4), -1),
    "tokens": (lambda: nn.Linear(4, 12), (30, 10, 4), -1),
    "conv1d": (lambda: nn.Conv1d(2, 12, 3), (30, 2, 12), 1),
    "conv2d": (lambda: nn.Conv2d(2, 12, 3), (8, 2, 8, 8), 1),
    "normed": (lambda: nn.Sequential(nn.Linear(4, 12), nn.LayerNorm(12)), (300, 4), -1),
}


def with_every_fate(layer: nn.Module) -> nn.Module:
    """Units that are dead or saturated for good, that live at times, and that live."""
    weights = [p for name, p in layer.named_parameters() if name.endswith("weight")]
    biases = [p for name, p in layer.named_parameters() if name.endswith("bias")]
    with torch.no_grad():
        scale = torch.tensor([1.0, 1, 40, 40, 1, 1, 4, 4, 1, 1, 0.1, 3])
        weights[-1].mul_(scale.view(-1, *[1] * (weights[-1].ndim - 1)))
        biases[-1].copy_(torch.tensor([-90.0, 90, 0, 3, -2.5, 2.5, -8, 8, 0, 0.5, -0.2, -12]))
    return layer


@pytest.mark.parametrize("shape", LAYERS)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_bad_units_are_those_of_the_twin(name: str, shape: str) -> None:
    kind, activation = ACTIVATIONS[name]
    make, size, axis = LAYERS[shape]
    model = Between(with_every_fate(make()), activation, 12)
    owner, x = "layer.1" if shape == "normed" else "layer", torch.randn(size)
    sister = Between(
        copy.deepcopy(model.layer), lambda h: activation(h.clone()), 12
    )  # written over, a view loses hooks
    sister.head = model.head
    twin = Twin(sister)
    sister(x).square().sum().backward()
    twin.close()
    with opened(model) as probe:
        model(x).square().sum().backward()
    signals = read(probe)
    assert_alike(signals, twin)
    share = signal_twin.bad_share(kind, by_unit(twin.outputs[owner][0], axis))
    assert 0 < share < 1
    if shape == "tokens" and name in HIDDEN_IN_VIEWS:
        assert units(signals) == {}
    else:
        ((found, value),) = units(signals).items()
        assert value == share
        assert found.startswith(f"{owner}:")
    assert signal_twin.chain(signals) == [owner, "head"]


class OwnConv(nn.Module):
    """A convolution that is no `nn.Conv2d`."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(12, 2, 3, 3))
        self.bias = nn.Parameter(torch.randn(12))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias)


def test_channels_of_other_makes() -> None:
    own = nn.Sequential(with_every_fate(OwnConv()), nn.ReLU())
    image = Uses(lambda n, x: torch.relu(n.a(x).view(-1, 12, 4, 4)), a=nn.Linear(4, 192))
    with torch.no_grad():
        image.a.bias.view(12, 16)[:5] = -90.0
    for net, size, name in ((own, (8, 2, 8, 8), "0"), (image, (64, 4), "a")):
        twin = Twin(net)
        with opened(net) as probe:
            net(torch.randn(size)).square().sum().backward()
        samples = by_unit(twin.outputs[name][0].reshape(size[0], 12, -1), 1)
        share = signal_twin.bad_share("relu", samples)
        assert 0 < share < 1
        assert units(read(probe)) == {f"{name}:relu": share}


@pytest.mark.parametrize("name", ["relu", "tanh", "hardsigmoid"])
@pytest.mark.parametrize("size", [1, 100, 129])
def test_units_wait_for_256_samples_and_begin_anew(name: str, size: int) -> None:
    kind, activation = ACTIVATIONS[name]
    model = Between(with_every_fate(nn.Linear(4, 12)), activation, 12)
    twin, probe, window, seen = Twin(model), SignalProbe(model), [], 0
    for _ in range(600 // size):
        probe.open()
        model(torch.randn(size, 4)).sum().backward()
        probe.pause()
        window.append(twin.outputs["layer"].pop())
        (value,) = units(read(probe)).values()
        samples = by_unit(signal_twin.np.concatenate(window), -1)
        if len(samples) < signal_twin.SAMPLES:
            assert value is None
        else:
            assert value == signal_twin.bad_share(kind, samples)
            window, seen = [], seen + 1
    assert seen == 600 // size // math.ceil(256 / size)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_nan_is_neither_death_nor_saturation(name: str) -> None:
    model = Between(nn.Linear(4, 12), ACTIVATIONS[name][1], 12)
    with opened(model) as probe:
        model(torch.full((300, 4), torch.nan)).sum().backward()
    signals = read(probe)
    assert set(units(signals).values()) <= {0.0}
    assert signals.first_non_finite == INPUT
    assert math.isnan(signals.forward_rms[0] or 0.0)


class Clamp(torch.autograd.Function):
    """A function of the user's own; its name is that of one of torch's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clamp(0, 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class Hardtanh(Clamp):
    pass


class Threshold(Clamp):
    pass


class Softmax(Clamp):
    pass


OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    **{f"own {kind.__name__}": kind.apply for kind in (Clamp, Hardtanh, Threshold, Softmax)},
    "bounds that are tensors": lambda x: x.clamp(min=torch.zeros(12), max=torch.ones(12)),
    "a bound that is a tensor": lambda x: x.clamp(min=torch.tensor(0.0)),
    "a bound above": lambda x: x.clamp(max=1.0),
    "gelu": F.gelu,
    "elu": F.elu,
    "a gate": lambda x: x * x.sigmoid(),
    "division": lambda x: x / (1 + x.square()),
    "glu": lambda x: F.glu(torch.cat([x, x], -1)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_can_neither_die_nor_saturate(name: str) -> None:
    model = Between(nn.Linear(4, 12), OTHERS[name], 12)
    twin = Twin(model)
    with opened(model) as probe:
        model(torch.randn(300, 4)).sum().backward()
    signals = read(probe)
    assert units(signals) == {}
    assert_alike(signals, twin)


def test_the_end_of_a_network_may_be_sharp() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    whole = Between(nn.Linear(4, 12), lambda x: x, 12)
    whole.head = nn.Sequential(model[0], model[1], nn.Linear(4, 1))
    whole.layer, whole.activation = nn.Identity(), lambda x: x
    for end in (torch.sigmoid, torch.tanh, F.hardsigmoid):
        net = nn.Sequential(model, Lambda(lambda x, end=end: end(100 * x)))
        with opened(net) as probe:
            net(torch.randn(300, 4)).sum().backward()
        assert list(units(read(probe))) == ["0.0:tanh"]


class Lambda(nn.Module):
    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


# --- sums ---


@dataclasses.dataclass
class Pair:
    label: str
    value: Tensor


class Point(NamedTuple):
    count: Tensor
    value: Tensor


class Wrapped(nn.Linear):
    """Gives its output in something else."""

    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__(4, 4)
        self.wrap = wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(super().forward(x))


class Uses(nn.Module):
    """Whatever modules, put together by a function."""

    def __init__(self, function: Callable[..., Any], **modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def lin(inputs: int = 4, outputs: int = 4) -> nn.Linear:
    return nn.Linear(inputs, outputs)


def caught(net: Any, x: Tensor) -> Tensor:
    h = net.a(x)
    try:
        net.bad(h)
    except ZeroDivisionError:
        h = h + 1
    return net.b(h)


class Raises(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = lin()

    def forward(self, x: Tensor) -> Tensor:
        self.inner(x)
        raise ZeroDivisionError


class Raw(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x @ self.weight)


def written_over(net: Any, x: Tensor) -> Tensor:
    h = net.a(x)
    h[:, :2] = 0.0
    h.view(-1, 2, 2)[:, 0].mul_(2.0)
    return net.b(h.sin().relu_().mul(2).add_(x))


def unused_branch(net: Any, x: Tensor) -> Tensor:
    h = net.a(x)
    torch.relu(net.c(h)).mul_(2)  # backward through this would fail
    return net.b(h)


def frozen(net: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        h = net.c(x)
    return net.b(net.a(h))


def inner_gradient(net: Any, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    out = net.b(net.a(x).tanh())
    (gradient,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    return out + gradient.norm(dim=-1, keepdim=True)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: nn.Sequential(lin(), nn.ReLU(inplace=True), lin(), nn.Tanh(), lin()), (8, 4)),
    "wide": (lambda: nn.Sequential(lin(4, 9000), nn.ReLU(), lin(9000, 2)), (16, 4)),
    "batch norm": (lambda: nn.Sequential(lin(), nn.BatchNorm1d(4), nn.ReLU(), lin()), (8, 4)),
    "norm without weights": (
        lambda: nn.Sequential(lin(), nn.BatchNorm1d(4, affine=False), nn.LayerNorm(4, elementwise_affine=False), lin()),
        (8, 4),
    ),
    "conv": (
        lambda: nn.Sequential(nn.Conv2d(2, 5, 3), nn.GroupNorm(1, 5), nn.ReLU(), nn.Flatten(), lin(180, 3)),
        (3, 2, 8, 8),
    ),
    "no batch": (lambda: nn.Sequential(nn.Conv2d(2, 5, 3), nn.ReLU(), nn.Flatten(0), lin(180, 3)), (2, 8, 8)),
    "one vector": (lambda: nn.Sequential(lin(), nn.ReLU(), lin()), (4,)),
    "in a dict": (lambda: Uses(lambda n, x: n.b(n.a(x)["y"]), a=Wrapped(lambda y: {"y": y}), b=lin()), (8, 4)),
    "in a nest": (
        lambda: Uses(lambda n, x: n.b(n.a(x)[1]["y"][0]), a=Wrapped(lambda y: (3, {"y": [y]})), b=lin()),
        (8, 4),
    ),
    "in a dataclass": (lambda: Uses(lambda n, x: n.b(n.a(x).value), a=Wrapped(lambda y: Pair("", y)), b=lin()), (8, 4)),
    "behind integers": (
        lambda: Uses(lambda n, x: n.b(n.a(x).value), a=Wrapped(lambda y: Point(torch.ones(2).long(), y)), b=lin()),
        (8, 4),
    ),
    "shared": (lambda: Uses(lambda n, x: n.b(n.a(n.a(n.a(x)).tanh())), a=lin(), b=lin()), (8, 4)),
    "written over": (lambda: Uses(written_over, a=lin(), b=lin()), (8, 4)),
    "a view": (lambda: Uses(lambda n, x: n.b(n.a(x).view(2, -1).relu_().view(-1, 4)), a=lin(), b=lin()), (8, 4)),
    "chunks": (lambda: Uses(lambda n, x: n.b(torch.cat(n.a(x).chunk(2, -1)[::-1], -1)), a=lin(), b=lin()), (8, 4)),
    "raises": (lambda: Uses(caught, a=lin(), bad=Raises(), b=lin()), (8, 4)),
    "raw parameters": (lambda: nn.Sequential(Raw(), Raw(), lin()), (8, 4)),
    "the model owns parameters": (Raw, (8, 4)),
    "unused branch": (lambda: Uses(unused_branch, a=lin(), b=lin(), c=lin()), (8, 4)),
    "frozen prefix": (lambda: Uses(frozen, a=lin(), b=lin(), c=lin()), (8, 4)),
    "frozen parameters": (
        lambda: nn.Sequential(lin().requires_grad_(False), lin(), lin().requires_grad_(False)),
        (8, 4),
    ),
    "weight norm": (lambda: nn.Sequential(parametrizations.weight_norm(lin()), nn.ReLU(), lin()), (8, 4)),
    "spectral norm": (lambda: nn.Sequential(parametrizations.spectral_norm(lin()), nn.ReLU(), lin()), (8, 4)),
    "gradient penalty": (lambda: Uses(inner_gradient, a=lin(), b=lin(4, 1)), (8, 4)),
    "lstm": (
        lambda: Uses(lambda n, x: n.b(n.a(x)[0][:, -1]), a=nn.LSTM(4, 4, 2, batch_first=True), b=lin()),
        (3, 6, 4),
    ),
    "embedding": (
        lambda: Uses(lambda n, x: n.b(n.a(x.abs().long())), a=nn.Embedding(9, 4), b=lin()),
        (8, 5),
    ),
    "transformer": (lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True), (3, 5, 4)),
    "nothing comes back": (lambda: Uses(lambda n, x: n.b(n.a(x).detach()), a=lin(), b=lin()), (8, 4)),
}


def runs_lstm_in_bfloat16() -> bool:
    """Whether torch can do so on this processor: its library of kernels leaves some out."""
    try:
        with torch.autocast("cpu", torch.bfloat16):
            nn.LSTM(2, 2)(torch.randn(2, 1, 2))
    except RuntimeError:
        return False
    return True


@pytest.mark.parametrize("precision", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_sums_are_those_of_the_twin(name: str, precision: str) -> None:
    if (name, precision) == ("lstm", "bfloat16") and not runs_lstm_in_bfloat16():
        pytest.skip("torch runs no LSTM in bfloat16 on this processor")
    make, shape = MODELS[name]
    model = make()
    if precision == "float64":
        model, x = model.double(), torch.randn(shape, dtype=torch.float64)
    else:
        x = torch.randn(shape)
    twin = Twin(model, also=(nn.BatchNorm1d, nn.LayerNorm))
    with opened(model) as probe, torch.autocast("cpu", torch.bfloat16, precision == "bfloat16"):
        model(x).square().sum().backward()
    if name == "gradient penalty":  # the twin has seen the inner gradient, too, which came first
        twin.gradients = {key: calls[1:] for key, calls in twin.gradients.items()}
    assert_alike(read(probe), twin)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_are_measured_once(reentrant: bool) -> None:
    inner = nn.Sequential(lin(), nn.ReLU(), lin(), nn.Tanh())
    model = Uses(lambda n, x: n.b(checkpoint(n.a, x, use_reentrant=reentrant)), a=inner, b=lin())
    x = torch.randn(150, 4).requires_grad_()
    twin = Twin(model)
    with opened(model) as probe:
        for part in (x, 2 * x):  # in the second pass no layer is new
            model(part).sum().backward()
    signals = read(probe)
    assert_alike(signals, twin)
    assert len(twin.outputs["a.0"]) == 2
    first, second = (by_unit(signal_twin.np.concatenate(twin.outputs[name]), -1) for name in ("a.0", "a.2"))
    shares = {"a.0:relu": signal_twin.bad_share("relu", first), "a.2:tanh": signal_twin.bad_share("tanh", second)}
    assert units(signals) == shares
    assert signal_twin.chain(signals) == (["b"] if reentrant else ["a.0", "a.2", "b"])


def test_of_gradients_that_come_back_twice_both_count() -> None:
    model = nn.Sequential(lin(), nn.Tanh(), lin())
    twin = Twin(model)
    with opened(model) as probe:
        out = model(torch.randn(8, 4))
        out.sum().backward(retain_graph=True)
        out.square().sum().backward()
    assert_alike(read(probe), twin)


def test_large_masks_and_gates_are_no_infinities() -> None:
    mask = Lambda(lambda x: x.masked_fill(x > 0, torch.finfo(x.dtype).min))
    model = nn.Sequential(lin(), mask, Lambda(lambda x: x.clamp(-1, 1)), lin())
    with opened(model) as probe:
        model(torch.randn(40_000, 4)).sum().backward()
    assert read(probe).first_non_finite == ""


class LogOfReLU(nn.Module):
    """Finite inside, not finite as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = lin()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).relu().log()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_the_first_module_that_was_not_finite(bad: float) -> None:
    spoil = Lambda(lambda x: x.masked_fill(torch.arange(4) == 2, bad))
    for net, origin in (
        (nn.Sequential(lin(), nn.ReLU(), spoil, lin()), "2"),
        (nn.Sequential(lin(), nn.Sequential(nn.ReLU(), Wrapped(lambda x: x * bad)), lin()), "1.1"),
        (nn.Sequential(lin(), LogOfReLU(), lin()), "1"),  # a container's own code
        (nn.Sequential(lin(), nn.ReLU(), lin()), ""),
    ):
        with opened(net) as probe:
            net(torch.randn(8, 4)).sum().backward()
        assert read(probe).first_non_finite == origin


def test_scaled_gradients_are_unscaled() -> None:
    model, x = nn.Sequential(lin(), nn.ReLU(), lin()), torch.randn(8, 4)
    twin = Twin(model)
    with opened(model) as probe:
        model(x).sum().backward()
        plain = read(probe)
        (1024 * model(x).sum()).backward()
        scaled = read(probe, scale=torch.tensor(1024.0))
    assert scaled.backward_rms == pytest.approx(plain.backward_rms, rel=1e-9)
    assert len(twin.outputs["0"]) == 2
