import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy import stats
from torch import nn

import lightning_gradhealth.init as gh
from lightning_gradhealth.init.orthogonal import orthogonal_
from lightning_gradhealth.init.schemes import DISTRIBUTIONS, TRUNCATED_STD

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
        ({"gamma": -1}, "gamma must be a finite number > 0, got -1; leave it out"),
        ({"gamma": 0}, "gamma must be a finite number > 0, got 0"),
        ({"gamma": math.nan}, "gamma must be a finite number > 0, got nan"),
        ({"gamma": math.inf}, "gamma must be a finite number > 0, got inf"),
        ({"gamma": "big"}, "gamma must be a finite number > 0, got 'big'"),
        ({"gain": -2.0}, "gain must be a finite number > 0, got -2.0"),
        ({"fan_in": 0}, "fan_in must be a finite number > 0, got 0; leave it out"),
        ({"mode": "fan_inn"}, "mode must be one of .*, got 'fan_inn'; did you mean 'fan_in'"),
        ({"mode": None}, "mode must be one of .*, got None"),
        (
            {"distribution": "gauss"},
            "distribution must be one of .*, got 'gauss'",
        ),
        ({"nonlinearity": "softmax"}, "nonlinearity must be one of .*, got 'softmax'"),
        ({"in_axes": [0]}, "in_axes and out_axes must be given together"),
    ],
)
def test_errors_of_options(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        gh.variance_scaling_(torch.empty(4, 4), **options)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.empty(4), r"2 axes or more to tell its fans, got the shape \(4,\); give fan_in and fan_out"),
        (torch.empty(4, 4, device="meta"), r"is on the meta device; materialise it with model.to_empty"),
        (nn.LazyLinear(3).weight, r"is not initialised yet \(a lazy module\); run one forward pass first"),
        (
            torch.empty(4, 4, dtype=torch.int32),
            "tensor must be floating or complex, got torch.int32; initialise before",
        ),
    ],
)
def test_errors_of_tensors(tensor, message):
    with pytest.raises(ValueError, match=message):
        gh.he_normal_(tensor)


def test_more_errors():
    with pytest.raises(TypeError, match=r"tensor must be a torch\.Tensor, got Linear\(.*\); pass module\.weight"):
        gh.he_normal_(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"tensor must have 2 axes, got the shape \(2, 2, 2\)"):
        orthogonal_(torch.empty(2, 2, 2))
    with pytest.raises(TypeError, match="distribution"):
        gh.he_uniform_(torch.empty(2, 2), distribution="normal")


# --- orthogonal --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_delta_orthogonal_keeps_the_norm_of_any_input(make, kernel):
    conv = make(4, 6, kernel, padding=kernel // 2, padding_mode="circular", bias=False)
    gh.delta_orthogonal_(conv.weight, gain=1.5, gamma=2.0, generator=seeded())
    x = torch.randn(3, 4, *[6] * (conv.weight.dim() - 2), generator=seeded(1))
    ratio = conv(x).flatten(1).norm(dim=1) / x.flatten(1).norm(dim=1)
    torch.testing.assert_close(ratio, torch.full((3,), 3.0))


def test_delta_orthogonal_takes_the_gain_of_the_activation_and_is_repeatable():
    one, two = (gh.delta_orthogonal_(torch.ones(8, 8, 3, 3), nonlinearity="relu", generator=seeded()) for _ in range(2))
    assert torch.equal(one, two)
    values = torch.linalg.svdvals(one[:, :, 1, 1])
    torch.testing.assert_close(values, torch.full((8,), math.sqrt(2)))
    assert one.count_nonzero() <= 64
    half = gh.delta_orthogonal_(torch.ones(8, 8, 3, 3, dtype=torch.bfloat16), nonlinearity="relu", generator=seeded())
    assert torch.equal(half, one.bfloat16())


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((4, 4), {}, r"tensor must be a convolution's weight .*\(4, 4\) has no kernel; use scheme orthogonal"),
        ((4, 5, 3), {}, r"\(4, 5, 3\) has fewer outputs than inputs; use scheme orthogonal"),
        ((5, 4, 3, 2), {}, r"\(5, 4, 3, 2\) has a kernel without a centre; use odd kernel sizes"),
        ((5, 4, 3), {"gain": 0}, "gain must be a finite number > 0, got 0"),
        ((5, 4, 3), {"gamma": -1}, "gamma must be a finite number > 0, got -1"),
    ],
)
def test_errors_of_delta_orthogonal(shape, options, message):
    tensor = torch.ones(shape)
    with pytest.raises(ValueError, match=message):
        gh.delta_orthogonal_(tensor, **options)
    assert (tensor == 1).all()


def matrices(weight, groups, transposed):
    parts = weight.detach().chunk(groups)
    return [(part.transpose(0, 1) if transposed else part).flatten(1) for part in parts]


@pytest.mark.parametrize(
    ("module", "groups"),
    [
        (nn.Linear(12, 20), 1),
        (nn.Conv2d(8, 12, 3, groups=4), 4),
        (nn.Conv1d(4, 40, 3), 1),
        (nn.ConvTranspose2d(8, 6, 3, groups=2), 2),
    ],
    ids=["linear", "grouped", "conv", "transposed"],
)
def test_the_orthogonal_scheme_group_by_group(module, groups):
    (entry, _) = gh.init_weights(module, scheme="orthogonal", nonlinearity="relu", gamma=0.5, seed=0).entries
    for matrix in matrices(module.weight, groups, isinstance(module, nn.ConvTranspose2d)):
        values = torch.linalg.svdvals(matrix)
        torch.testing.assert_close(values, torch.full_like(values, math.sqrt(0.5)), rtol=1e-4, atol=0)
    assert entry.scheme == "orthogonal"
    assert entry.target_std == pytest.approx(module.weight.square().mean().sqrt().item(), rel=1e-4)


@pytest.mark.parametrize(
    ("module", "groups"),
    [(nn.Conv2d(8, 12, 3), 1), (nn.Conv1d(8, 8, 5, groups=4), 4), (nn.ConvTranspose1d(6, 8, 3), 1)],
)
def test_the_delta_orthogonal_scheme(module, groups):
    (entry, _) = gh.init_weights(module, scheme="delta_orthogonal", seed=0).entries
    assert entry.scheme == "delta_orthogonal"
    centre = module.weight.detach()
    for size in module.kernel_size:
        centre = centre.select(2, size // 2)
    for part in matrices(centre[..., None], groups, isinstance(module, nn.ConvTranspose1d)):
        values = torch.linalg.svdvals(part)
        torch.testing.assert_close(values, torch.ones_like(values), rtol=1e-4, atol=0)
    assert module.weight.count_nonzero() <= centre.numel()
    assert entry.target_std == pytest.approx(module.weight.square().mean().sqrt().item(), rel=1e-4)


def test_the_delta_orthogonal_scheme_says_where_it_is_orthogonal_only():
    model = nn.Sequential(nn.Conv2d(8, 4, 3), nn.Conv2d(4, 4, 2), nn.Linear(4, 4), nn.Embedding(50, 40))
    entries = [e for e in gh.init_weights(model, scheme="delta_orthogonal", seed=0).entries if "weight" in e.name]
    assert [entry.scheme for entry in entries] == ["orthogonal", "orthogonal", "orthogonal", "lecun"]
    assert "fewer outputs than inputs" in entries[0].note
    assert "without a centre" in entries[1].note
    assert entries[2].note == ""
    assert entries[3].measured_std == pytest.approx(1, rel=0.05)
