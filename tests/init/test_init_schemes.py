import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy import stats
from torch import nn

import lightning_gradhealth.init as gh
from lightning_gradhealth.init.schemes import DISTRIBUTIONS, TRUNCATED_STD, orthogonal_

SHAPE, FAN_IN, FAN_OUT = (160, 100, 3, 3), 900, 1440
NORMALS = [
    (gh.he_normal_, 2 / FAN_IN),
    (gh.xavier_normal_, 2 / (FAN_IN + FAN_OUT)),
    (gh.lecun_normal_, 1 / FAN_IN),
]
UNIFORMS = [
    (gh.he_uniform_, 2 / FAN_IN),
    (gh.xavier_uniform_, 2 / (FAN_IN + FAN_OUT)),
    (gh.lecun_uniform_, 1 / FAN_IN),
]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def p_value(values, std, distribution):
    law = {
        "normal": stats.norm(),
        "uniform": stats.uniform(-math.sqrt(3), 2 * math.sqrt(3)),
        "truncated_normal": stats.truncnorm(-2, 2, scale=1 / TRUNCATED_STD),
    }[distribution]
    return stats.kstest(values.detach().double().flatten().numpy() / std, law.cdf).pvalue


@pytest.mark.parametrize(("fill_", "variance"), [*NORMALS, *UNIFORMS])
@pytest.mark.parametrize("seed", [0, 1])
def test_variance_and_law_of_the_named_schemes(fill_, variance, seed):
    weight = fill_(torch.empty(SHAPE), generator=seeded(seed))
    assert weight.var().item() == pytest.approx(variance, rel=0.03)
    law = "uniform" if "uniform" in fill_.__name__ else "normal"
    assert p_value(weight, math.sqrt(variance), law) > 1e-4


@pytest.mark.parametrize(("fill_", "variance"), NORMALS)
def test_truncated_draws_have_the_std_and_never_leave_two_sigma(fill_, variance):
    """Keras's GlorotNormal and HeNormal: cut at two sigma, sigma corrected so that the std is right."""
    weight = fill_(torch.empty(SHAPE), distribution="truncated_normal", generator=seeded())
    std = math.sqrt(variance)
    assert weight.var().item() == pytest.approx(variance, rel=0.03)
    assert p_value(weight, std, "truncated_normal") > 1e-4
    assert weight.abs().max().item() <= 2 * std / TRUNCATED_STD * (1 + 1e-6)


def test_the_truncation_constant():
    assert stats.truncnorm(-2, 2).std() == pytest.approx(TRUNCATED_STD, rel=1e-12)


def test_uniform_draws_stay_within_their_limit():
    weight = gh.he_uniform_(torch.empty(SHAPE), generator=seeded())
    assert weight.abs().max().item() <= math.sqrt(6 / FAN_IN) * (1 + 1e-6)


@pytest.mark.parametrize(
    ("mode", "fan"),
    [("fan_in", 900), ("fan_out", 1440), ("fan_avg", 1170), ("fan_geo", math.sqrt(900 * 1440))],
)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_modes(mode, fan, distribution):
    weight = gh.variance_scaling_(torch.empty(SHAPE), mode=mode, distribution=distribution, generator=seeded(4))
    assert weight.var().item() * fan == pytest.approx(1, rel=0.03)


def test_gain_nonlinearity_and_gamma_multiply():
    def std(fill_=gh.variance_scaling_, **options):
        return fill_(torch.empty(300, 300), generator=seeded(), **options).std().item()

    one = std()
    assert std(gain=3.0) == pytest.approx(3 * one)
    assert std(gamma=0.5) == pytest.approx(0.5 * one)
    assert std(nonlinearity="tanh", gamma=2.0) == pytest.approx(2 * 1.5925 * one, rel=1e-4)
    assert std(nonlinearity="tanh", gain=3.0) == pytest.approx(3 * one)  # a gain that is given wins
    assert std(gh.he_normal_, gain=1.0) == pytest.approx(one)
    assert std(gh.he_normal_, nonlinearity=nn.LeakyReLU(0.5)) == pytest.approx(math.sqrt(2 / 1.25) * one)
    assert std(gh.lecun_normal_, mode="fan_out") == pytest.approx(one)


@settings(max_examples=25)
@given(gamma=st.floats(1e-3, 1e3), gain=st.floats(1e-2, 1e2), fan=st.integers(1, 10**6))
def test_the_formula(gamma, gain, fan):
    unit = torch.randn(50, generator=seeded(), dtype=torch.float64)
    weight = torch.empty(50, dtype=torch.float64)
    gh.variance_scaling_(weight, gamma=gamma, gain=gain, fan_in=fan, generator=seeded())
    torch.testing.assert_close(weight, unit * (gamma * gain / math.sqrt(fan)), rtol=1e-12, atol=0)


def test_given_fans_and_axes_override_the_shape():
    def std(shape, **options):
        return gh.variance_scaling_(torch.empty(shape), generator=seeded(), **options).std().item()

    assert std((90_000,), fan_in=100) == pytest.approx(0.1, rel=0.02)
    assert std((300, 300), fan_in=100) == pytest.approx(0.1, rel=0.02)
    assert std((300, 300), fan_in=100, mode="fan_avg") == pytest.approx(200**-0.5, rel=0.02)
    assert std((300, 300), fan_in=100, fan_out=25, mode="fan_geo") == pytest.approx(50**-0.5, rel=0.02)
    assert std((512, 8, 64), in_axes=[0, 1], out_axes=[2]) == pytest.approx(4096**-0.5, rel=0.02)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_dtype_and_memory_format_only_round(distribution):
    def draw(tensor):
        return gh.variance_scaling_(tensor, distribution=distribution, generator=seeded(7))

    plain = draw(torch.empty(8, 6, 5, 5))
    last = torch.empty(8, 6, 5, 5, memory_format=torch.channels_last)
    assert torch.equal(draw(last), plain)
    assert last.is_contiguous(memory_format=torch.channels_last)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(draw(torch.empty(8, 6, 5, 5, dtype=dtype)), plain.to(dtype))
    assert draw(torch.empty(8, 6, 5, 5, dtype=torch.float64)).dtype is torch.float64


def test_works_in_place_on_parameters_and_returns_them():
    weight = nn.Linear(4, 4).weight
    assert gh.he_normal_(weight) is weight
    assert weight.requires_grad
    assert weight.grad_fn is None


def test_the_global_state_rules_without_a_generator():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        first = gh.he_normal_(torch.empty(9, 9))
        torch.manual_seed(5)
        assert torch.equal(first, gh.he_normal_(torch.empty(9, 9)))


def test_aliases():
    assert gh.kaiming_normal_ is gh.he_normal_
    assert gh.kaiming_uniform_ is gh.he_uniform_
    assert gh.glorot_normal_ is gh.xavier_normal_
    assert gh.glorot_uniform_ is gh.xavier_uniform_


def test_empty_tensors_are_left_empty():
    assert gh.he_normal_(torch.empty(5, 0)).shape == (5, 0)


@pytest.mark.parametrize("shape", [(20, 20), (40, 20), (20, 40), (1, 5)])
def test_orthogonal(shape):
    weight = orthogonal_(torch.empty(shape), generator=seeded())
    values = torch.linalg.svdvals(weight.double())
    torch.testing.assert_close(values, torch.ones_like(values), rtol=0, atol=1e-5)


def test_orthogonal_matrices_are_uniform():
    """Of a Haar matrix the trace has mean 0 and variance 1; without the signs of R it has not."""
    traces = torch.stack([orthogonal_(torch.empty(6, 6), generator=seeded(i)).trace() for i in range(2000)])
    assert abs(traces.mean().item()) < 0.1
    assert traces.var().item() == pytest.approx(1, rel=0.12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": -1}, "gamma must be > 0 and finite, got -1; leave it out"),
        ({"gamma": 0}, "gamma must be > 0 and finite, got 0"),
        ({"gamma": math.nan}, "gamma must be > 0 and finite, got nan"),
        ({"gamma": math.inf}, "gamma must be > 0 and finite, got inf"),
        ({"gamma": "big"}, "gamma must be > 0 and finite, got 'big'"),
        ({"gain": -2.0}, "gain must be > 0 and finite, got -2.0"),
        ({"fan_in": 0}, "fan_in must be > 0 and finite, got 0; leave it out"),
        ({"mode": "fan_inn"}, "mode must be one of .*, got 'fan_inn'; did you mean 'fan_in'"),
        ({"mode": None}, "mode must be one of fan_avg, fan_geo, fan_in, fan_out, got None"),
        (
            {"distribution": "gauss"},
            "distribution must be one of normal, truncated_normal, uniform, got 'gauss'",
        ),
        ({"nonlinearity": "softmax"}, "nonlinearity must be one of .*, got 'softmax'"),
        ({"in_axes": [0]}, "in_axes and out_axes must be given together"),
    ],
)
def test_errors_of_options(options, message):
    with pytest.raises(ValueError, match=message):
        gh.variance_scaling_(torch.empty(4, 4), **options)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.empty(4), r"2 axes or more to tell its fans, got \(4,\); give fan_in and fan_out"),
        (torch.empty(4, 4, device="meta"), r"is on the meta device; materialise it with model.to_empty"),
        (nn.LazyLinear(3).weight, r"is not initialised yet \(a lazy module\); run one forward pass first"),
        (torch.empty(4, 4, dtype=torch.int32), "tensor must be floating, got torch.int32; initialise before"),
        (torch.empty(4, 4, dtype=torch.complex64), "tensor must be real, got torch.complex64"),
    ],
)
def test_errors_of_tensors(tensor, message):
    with pytest.raises(ValueError, match=message):
        gh.he_normal_(tensor)


def test_more_errors():
    with pytest.raises(TypeError, match=r"tensor must be a torch\.Tensor, got Linear; pass module\.weight"):
        gh.he_normal_(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"tensor must have 2 axes, got the shape \(2, 2, 2\)"):
        orthogonal_(torch.empty(2, 2, 2))
    with pytest.raises(TypeError, match="distribution"):
        gh.he_uniform_(torch.empty(2, 2), distribution="normal")
