import math

import pytest
import torch
from hypothesis import given, strategies as st
from torch import nn

from lightning_gradhealth.init import Fans, fans
from lightning_gradhealth.init.fans import shape_fans


@pytest.mark.parametrize(
    ("axes", "expected"),
    [(([0], [1, 2]), (512, 512)), (([0, 1], [2]), (4096, 64)), (([-3], [-1]), (512 * 8, 64 * 8))],
)
def test_keras_published_vectors(axes, expected):
    assert shape_fans((512, 8, 64), *axes) == expected


@pytest.mark.parametrize("shape", [(7, 5), (7, 5, 3), (8, 4, 3, 2)])
def test_the_default_agrees_with_torch(shape):
    assert shape_fans(shape) == nn.init._calculate_fan_in_and_fan_out(torch.empty(shape))


@given(st.lists(st.integers(1, 9), min_size=2, max_size=5), st.randoms(use_true_random=False))
def test_permuting_axes_with_their_names_changes_nothing(shape, random):
    order = list(range(len(shape)))
    random.shuffle(order)
    permuted = [shape[axis] for axis in order]
    assert shape_fans(permuted, [order.index(1)], [order.index(0)]) == shape_fans(shape)


@given(st.floats(0.1, 1e6), st.floats(0.1, 1e6))
def test_the_means_of_the_fans_lie_between_them(fan_in, fan_out):
    both = Fans(fan_in, fan_out)
    low, high = sorted(both)
    assert low * (1 - 1e-12) <= both.fan("fan_geo") <= both.fan("fan_avg") * (1 + 1e-12)
    assert both.fan("fan_avg") <= high
    assert (both.fan("fan_in"), both.fan("fan_out")) == (fan_in, fan_out)


class Subclass(nn.Conv2d):
    pass


@pytest.mark.parametrize(
    ("module", "name", "expected"),
    [
        (nn.Linear(3, 5), "weight", (3, 5)),
        (nn.Conv1d(6, 4, 5), "weight", (30, 20)),
        (nn.Conv2d(8, 12, (3, 5), stride=(2, 3), groups=4), "weight", (2 * 15, 3 * 15 / 6)),
        (nn.Conv3d(2, 4, 3, stride=2), "weight", (54, 108 / 8)),
        (Subclass(8, 8, 3, groups=8), "weight", (9, 9)),
        (nn.ConvTranspose1d(6, 4, 4, stride=2), "weight", (12, 16)),
        (nn.ConvTranspose2d(8, 12, 4, stride=2, groups=2), "weight", (4 * 16 / 4, 6 * 16)),
        (nn.ConvTranspose3d(2, 4, 2), "weight", (16, 32)),
        (nn.Bilinear(3, 5, 7), "weight", (15, 28)),
        (nn.Embedding(10, 4), "weight", (1, 1)),
        (nn.EmbeddingBag(10, 4), "weight", (1, 1)),
        (nn.RNN(3, 5), "weight_ih_l0", (3, 5)),
        (nn.GRU(3, 5, num_layers=2, bidirectional=True), "weight_ih_l1_reverse", (10, 5)),
        (nn.LSTM(3, 5, proj_size=2), "weight_hh_l0", (2, 5)),
        (nn.LSTM(3, 5, proj_size=2), "weight_hr_l0", (5, 2)),
        (nn.LSTMCell(3, 5), "weight_hh", (5, 5)),
        (nn.MultiheadAttention(8, 2), "in_proj_weight", (8, 8)),
        (nn.MultiheadAttention(8, 2, kdim=3, vdim=5), "k_proj_weight", (3, 8)),
        (nn.MultiheadAttention(8, 2, kdim=3, vdim=5), "v_proj_weight", (5, 8)),
        (nn.MultiheadAttention(8, 2).out_proj, "weight", (8, 8)),
    ],
)
def test_fans_by_module(module, name, expected):
    assert fans(module, name) == expected


@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.parametrize(("groups", "stride"), [(1, 1), (1, 2), (4, 2), (16, 1)])
def test_conv_fans_are_what_the_signals_see(dim, groups, stride):
    """Mean squares forward and backward over a circularly padded convolution, against var(W) * fan."""
    size, wide = 8, 2048 if dim == 1 else 256
    kind = (nn.Conv1d, nn.Conv2d)[dim - 1]
    conv = kind(16, 32, 3, stride=stride, groups=groups, padding=1, padding_mode="circular", bias=False).double()
    _check_factors(conv, fans(conv), (wide, 16) + (size,) * dim)


@pytest.mark.parametrize(("groups", "stride", "kernel"), [(1, 2, 4), (4, 2, 3), (2, 1, 3)])
def test_transposed_conv_fans_are_what_the_signals_see(groups, stride, kernel):
    conv = nn.ConvTranspose2d(16, 32, kernel, stride=stride, groups=groups, bias=False).double()
    size = 8
    # Without padding the taps spill over the border; counted per inner position nothing is lost.
    spill = ((size - 1) * stride + kernel) ** 2 / (size * stride) ** 2
    _check_factors(conv, fans(conv), (128, 16, size, size), spill=spill)


def _check_factors(conv, fan, shape, spill=1.0):
    generator, tolerance = torch.Generator().manual_seed(3), 0.05
    with torch.no_grad():
        conv.weight.normal_(generator=generator)
        conv.weight.div_(conv.weight.square().mean().sqrt())  # so that only the signals are random
    x = torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()
    y = conv(x)
    cotangent = torch.randn(y.shape, dtype=torch.float64, generator=generator)
    (dx,) = torch.autograd.grad(y, x, cotangent)
    assert y.detach().square().mean().item() * spill == pytest.approx(fan.fan_in, rel=tolerance)
    assert dx.square().mean().item() == pytest.approx(fan.fan_out, rel=tolerance)


def test_torchs_fan_out_of_a_strided_conv_is_off_by_the_stride():
    conv = nn.Conv2d(16, 16, 3, stride=2)
    assert nn.init._calculate_fan_in_and_fan_out(conv.weight)[1] == 4 * fans(conv).fan_out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((5,),), r"must have 2 axes or more to tell its fans, got the shape \(5,\); give fan_in and fan_out"),
        (((5, 6), [0]), r"in_axes and out_axes must be given together, got \[0\] and None"),
        (((5, 6), [0], [0]), r"must be different axes of the shape \(5, 6\), got \[0\] and \[0\]"),
        (((5, 6), [0], [2]), r"name each axis once, from 0 to 1"),
        (((5, 6), [1], [-1]), r"must be different axes"),
    ],
)
def test_shape_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        shape_fans(*arguments)


def test_errors_of_fans():
    with pytest.raises(ValueError, match=r"mode must be one of .*, got 'fan_inn'; did you mean 'fan_in'"):
        Fans(1, 2).fan("fan_inn")
    with pytest.raises(ValueError, match=r"got 'bias' with the shape \(2,\); biases and scales have no fans"):
        fans(nn.Linear(2, 2), "bias")
    with pytest.raises(ValueError, match="name must be a parameter of Linear, got 'wait'"):
        fans(nn.Linear(2, 2), "wait")
    with pytest.raises(ValueError, match="initialised parameter of LazyLinear, got 'weight'; run one forward pass"):
        fans(nn.LazyLinear(2))
    custom = nn.Module()
    custom.table = nn.Parameter(torch.zeros(3, 4))
    with pytest.raises(TypeError, match=r"got Module with the shape \(3, 4\); use variance_scaling_ with fan_in"):
        fans(custom, "table")


def test_a_module_of_ones_own_can_be_taught():
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(3, 4))

    @fans.register(Table)
    def _(module, name="weight"):
        return Fans(4.0, 3.0)

    assert fans(Table()) == (4, 3)
    assert math.isclose(fans(Table()).fan("fan_geo"), math.sqrt(12))
