import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.nn import functional as F

from lightning_gradhealth.init import gain
from lightning_gradhealth.init.gains import _NAMED, backward_gain

TABLE = [  # f, forward gain, backward gain: by adaptive quadrature elsewhere
    ("linear", 1.0, 1.0),
    ("relu", 1.4142, 1.4142),
    ("prelu", 1.3720, 1.3720),
    ("elu", 1.2452, 1.2234),
    ("selu", 1.0000, 0.9660),
    ("gelu", 1.5335, 1.4811),
    ("silu", 1.6765, 1.6233),
    ("mish", 1.4868, 1.4448),
    ("hardswish", 1.7367, 1.6701),
    ("tanh", 1.5925, 1.4674),
    ("sigmoid", 1.8462, 4.7226),
    ("softplus", 1.0419, 1.8462),
    ("softsign", 2.3375, 2.0958),
    (lambda z: z.relu().square(), 0.8165, 0.7071),
]


@pytest.mark.parametrize(("f", "forward", "backward"), TABLE)
def test_the_table(f, forward, backward):
    assert gain(f) == pytest.approx(forward, abs=5.1e-5)
    assert backward_gain(f) == pytest.approx(backward, abs=5.1e-5)


def test_torchs_published_leaky_gain():
    assert gain(nn.LeakyReLU(10.0)) == pytest.approx(0.14071950894605836, rel=1e-14)


@pytest.mark.parametrize("slope", [0.0, 0.01, 0.25, 1.0, 3.0])
def test_closed_forms_are_exact_and_agree_with_the_integral(slope):
    exact = math.sqrt(2 / (1 + slope**2))
    assert gain(nn.LeakyReLU(slope)) == pytest.approx(exact, rel=1e-15)
    assert gain(lambda z: F.leaky_relu(z, slope)) == pytest.approx(exact, rel=1e-12)


def test_the_integral_against_closed_forms():
    assert gain(torch.square) == pytest.approx(3**-0.5, rel=1e-12)
    assert gain(torch.sin) == pytest.approx(((1 - math.exp(-2)) / 2) ** -0.5, rel=1e-12)
    assert gain(lambda z: (z / 2).exp()) == pytest.approx(math.exp(-0.25), rel=1e-12)
    assert gain(lambda z: z > 1) == pytest.approx((0.5 * math.erfc(2**-0.5)) ** -0.5, rel=1e-12)


@settings(max_examples=20)
@given(st.floats(1e-3, 1e3), st.sampled_from([torch.tanh, F.gelu, F.relu, F.softplus]))
def test_scaling_the_function_divides_the_gain(c, f):
    assert gain(lambda z: c * f(z)) == pytest.approx(gain(f) / c, rel=1e-12)
    assert backward_gain(lambda z: c * f(z)) == pytest.approx(backward_gain(f) / c, rel=1e-12)


@pytest.mark.parametrize("name", sorted(_NAMED))
def test_every_name_has_a_gain_that_a_sample_confirms(name):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        f = _NAMED[name]().double().eval()
        sample = f(torch.randn(400_000, dtype=torch.float64)).detach()
    assert gain(name) == pytest.approx(sample.square().mean().item() ** -0.5, rel=0.01)


def test_modules_custom_modules_and_functions_agree():
    class Gate(nn.Module):
        def forward(self, x):
            return x * torch.sigmoid(x)

    values = [gain("silu"), gain("swish"), gain(nn.SiLU(inplace=True)), gain(F.silu), gain(Gate())]
    assert values == pytest.approx([values[0]] * 5, rel=1e-12)
    assert gain(None) == gain("identity") == gain(nn.Identity()) == 1.0


def test_prelu_counts_with_its_present_slopes():
    many = nn.PReLU(3)
    with torch.no_grad():
        many.weight.copy_(torch.tensor([0.0, 0.5, 1.0]))
    assert gain(many) == pytest.approx(math.sqrt(2 / (1 + 1.25 / 3)), rel=1e-12)
    assert gain(nn.PReLU(init=0.25)) == pytest.approx(math.sqrt(2 / 1.0625))


def test_rrelu_counts_with_its_mean_slope():
    f = nn.RReLU(0.1, 0.3)
    assert f.training
    assert gain(f) == pytest.approx(math.sqrt(2 / 1.04), rel=1e-12)
    assert f.training


def test_a_subclass_with_a_forward_of_its_own_is_taken_at_its_word():
    class Squared(nn.ReLU):
        def forward(self, x):
            return super().forward(x).square()

    assert gain(Squared()) == pytest.approx(1.5**-0.5, rel=1e-12)


class Counting(nn.Module):
    """Everything that an evaluation could disturb: a parameter, a buffer, a flag, a hook."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.scale * torch.tanh(x)


def test_evaluation_changes_nothing():
    f, heard = Counting().eval(), []
    f.register_forward_hook(lambda *_: heard.append(1))
    f.scale.grad = torch.tensor(3.0)
    state = torch.get_rng_state()
    assert gain(f) == pytest.approx(1.5925 / 2, abs=1e-4)
    assert backward_gain(f) == pytest.approx(1.4674 / 2, abs=1e-4)
    assert (f.calls.item(), f.scale.item(), f.scale.grad.item(), f.training, heard) == (0, 2, 3, False, [])
    assert f.scale.dtype is torch.float32
    with pytest.raises(ValueError, match="random"):
        gain(nn.Dropout())
    assert torch.equal(torch.get_rng_state(), state)


def test_default_device_and_dtype_do_not_matter():
    with torch.device("meta"):
        assert gain("tanh") == pytest.approx(1.5925, abs=1e-4)
        assert gain("prelu") == pytest.approx(1.3720, abs=1e-4)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("rellu", "nonlinearity must be one of 'celu', .*'tanhshrink', got 'rellu'; did you mean 'relu'"),
        ("ReLU", "got 'ReLU'; did you mean 'relu'"),
        (3, 'got 3: it cannot be called; pass a name such as "relu"'),
        (nn.ReLU, "it is a class, not an instance of it"),
        (nn.Linear(4, 4), r"got Linear\(in_features=4.*it fails on a float64 vector"),
        (nn.Softmax(dim=-1), r"got Softmax\(dim=-1\): .*mixing elements; pass a name"),
        (nn.Dropout(), r"got Dropout\(p=0.5.*random"),
        (nn.Dropout().eval(), "random"),
        (F.dropout, "random"),
        (nn.GLU(), "no real tensor of the input's shape"),
        (lambda z: z.sum(), "no real tensor of the input's shape"),
        (lambda z: z.tolist(), "no real tensor of the input's shape"),
        (lambda z: z + 1j, "no real tensor of the input's shape"),
        (torch.zeros_like, "it is zero everywhere"),
        (torch.log, "it is NaN or Inf somewhere"),
        (lambda z: z / 0, "it is NaN or Inf somewhere"),
        (lambda z: z - z.mean() + 1, "mixing elements"),
    ],
)
def test_errors(wrong, message):
    with pytest.raises(TypeError if wrong in (3, nn.ReLU) else ValueError, match=message):
        gain(wrong)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.ones_like, "fails on a float64 vector"),
        (torch.sign, "its derivative is zero everywhere"),
        (lambda z: z.detach(), "fails on a float64 vector"),
    ],
)
def test_errors_of_the_backward_gain(wrong, message):
    with pytest.raises(ValueError, match=message):
        backward_gain(wrong)
