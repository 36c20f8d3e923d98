"""Operators that nobody knows by name: what they do with a parameter is found out by calling them."""

import math

import pytest
import torch
from calls import Calls
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.nn import functional as F

import lightning_gradhealth as gh
from lightning_gradhealth.init.orthogonal import orthogonal_
from lightning_gradhealth.tracing import Graph, trace
from lightning_gradhealth.tracing.probe import use_of

# --- the probe against a slow, obvious twin ---


def dense_fans(function, x, w):
    """Fans by the whole Jacobian: elements of w that an output reads, outputs that an element of x reaches."""
    by_x, by_w = torch.autograd.functional.jacobian(function, (x, w))
    by_x, by_w = by_x.reshape(-1, x.numel()) != 0, by_w.reshape(-1, w.numel()) != 0
    read, reached = by_w.sum(1), by_x.sum(0)
    return float(read[read > 0].double().mean()), float(reached[reached > 0].double().mean())


@st.composite
def contractions(draw):
    """An einsum equation over at most five letters, each in one or two operands and, or not, in the output."""
    letters = draw(st.lists(st.sampled_from("abcde"), min_size=2, max_size=5, unique=True))
    places = {each: draw(st.sampled_from(["x", "w", "xw"])) for each in letters}
    x, w = ([each for each in letters if name in places[each]] for name in "xw")
    summed = {each for each in letters if places[each] == "xw" and draw(st.booleans())}
    out = [each for each in letters if each not in summed]
    order = [draw(st.permutations(part)) for part in (x, w, out)]
    sizes = {each: draw(st.integers(1, 4)) for each in letters}
    shapes = [tuple(sizes[each] for each in part) for part in order[:2]]
    return "{},{}->{}".format(*("".join(part) for part in order)), *shapes


@given(contractions(), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_fans_are_those_of_the_whole_jacobian(contraction, seed):
    equation, of_x, of_w = contraction
    generator = torch.Generator().manual_seed(seed)
    x, w = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in (of_x, of_w))

    def function(x, w):
        return torch.einsum(equation, x, w)

    use = use_of(function, x, w)
    fan_in, fan_out = dense_fans(function, x, w)
    if fan_in <= 1:
        assert use.kind == "elementwise"
    else:
        assert use.kind == "product"
        assert (use.fan_in, use.scale) == (fan_in, pytest.approx(1))
        assert use.fan_out == pytest.approx(fan_out)


USES = {
    "a product by elements": (torch.mul, (4, 3), (3,), "elementwise"),
    "a join": (lambda x, w: torch.cat([x, w]), (4, 3), (2, 3), "elementwise"),
    "a norm": (lambda x, w: F.rms_norm(x, (3,), w), (4, 3), (3,), "elementwise"),
    "slopes": (lambda x, w: torch.where(x > 0, x, w * x), (4, 3), (3,), "elementwise"),
    "a total that is added": (lambda x, w: x + w.sum(0), (4, 3), (5, 3), "sum"),
    "distances": (torch.cdist, (4, 3), (5, 3), "unknown"),
    "places on a plane": (lambda x, w: F.grid_sample(w, x, align_corners=False), (1, 4, 4, 2), (1, 2, 8, 8), "unknown"),
    "a square of products": (lambda x, w: (x @ w) ** 2, (4, 3), (3, 5), "unknown"),
}


@pytest.mark.parametrize("name", USES)
def test_what_is_no_contraction(name):
    function, of_x, of_w, kind = USES[name]
    assert use_of(function, torch.empty(of_x), torch.empty(of_w)).kind == kind


def test_operators_without_derivative_are_tried_step_by_step():
    def function(x, w):
        return torch.from_numpy(2 * (x.detach().numpy() @ w.detach().numpy()))

    use = use_of(function, torch.empty(3, 4), torch.empty(4, 5))
    assert (use.kind, use.fan_in, use.fan_out) == ("product", 4, 5)
    assert use.scale == pytest.approx(2)


# --- in a model ---

WIDTH, OUT, EXPERTS = 24, 40, 4


def table(*shape, std=0.02, dtype=None):
    return nn.Parameter(std * torch.randn(shape, dtype=dtype))


def entry(model, sample, name="w", **options):
    report = gh.init_weights(model, sample, seed=0, on_uncovered="ignore", **options)
    return next(entry for entry in report.entries if entry.name == name)


def routed(self, x):
    """Tokens sorted by the expert that a router has chosen, all experts in one operator."""
    chosen = (x @ self.router).argmax(-1)
    order = chosen.argsort()
    ends = torch.bincount(chosen, minlength=EXPERTS).cumsum(0).to(torch.int32)
    hidden = F.relu(torch._grouped_mm(x[order], self.w, offs=ends))
    return torch._grouped_mm(hidden, self.down.transpose(1, 2), offs=ends)


def test_fused_experts_have_the_fans_of_one():
    model = Calls(routed, router=table(WIDTH, EXPERTS), w=table(EXPERTS, WIDTH, OUT), down=table(EXPERTS, WIDTH, OUT))
    report = gh.init_weights(model, torch.randn(32, WIDTH), seed=0)
    fans = {each.name: (each.fan, each.rule) for each in report.entries}
    assert fans == {"router": (WIDTH, "traced"), "w": (WIDTH, "traced"), "down": (OUT, "traced")}
    for name, fan in (("w", WIDTH), ("down", OUT)):
        stds = model.get_parameter(name).detach().flatten(1).std(dim=1) * math.sqrt(fan)
        wanted = next(e for e in report.entries if e.name == name).gain
        assert torch.allclose(stds, torch.full_like(stds, wanted), rtol=0.1)  # each expert by itself
    assert not torch.equal(model.w[0], model.w[1])


def by_hand(self, x):
    return (x.unsqueeze(-1) * self.w).sum(-2)


def averaged(self, x):
    return (x.unsqueeze(1) * self.w).mean(-1)


def unfolded(self, x):
    patches = F.unfold(x.view(-1, WIDTH, 1, 1).expand(-1, -1, 3, 3), 3, padding=1).view(len(x), WIDTH, 9, 9)
    return torch.einsum("bckl,ck->bcl", patches, self.w)


def chosen(self, x):
    return torch.bmm(x.unsqueeze(1), self.w[(x.sum(-1) > 0).long()]).squeeze(1)


def by_spectrum(self, x):
    hidden = torch.fft.irfft(torch.fft.rfft(x.unsqueeze(1)) * torch.fft.rfft(self.w), n=WIDTH)
    return F.relu(hidden).flatten(1) @ self.out


CONTRACTIONS = {
    "a product and a sum": (by_hand, (WIDTH, OUT), WIDTH, 1),
    "a product and a mean": (averaged, (OUT, WIDTH), WIDTH, 1 / WIDTH),
    "a depthwise kernel on patches": (unfolded, (WIDTH, 9), 9, 1),
    "experts that an index chooses": (chosen, (EXPERTS, WIDTH, OUT), WIDTH, 1),
    "experts in one equation": (lambda s, x: torch.einsum("bi,eio->beo", x, s.w), (EXPERTS, WIDTH, OUT), WIDTH, 1),
    "baddbmm": (
        lambda s, x: torch.baddbmm(torch.zeros(()), x.expand(EXPERTS, -1, -1), s.w),
        (EXPERTS, WIDTH, OUT),
        WIDTH,
        1,
    ),
}


@pytest.mark.parametrize("name", CONTRACTIONS)
def test_contractions_by_other_means(name):
    call, shape, fan, scale = CONTRACTIONS[name]
    model = Calls(call, w=table(*shape))
    found = entry(model, torch.randn(8, WIDTH))
    assert (found.rule, found.fan) == ("traced", fan)
    assert float(model.w.detach().std()) * scale * math.sqrt(fan) == pytest.approx(1, rel=0.15)


def test_a_convolution_by_its_spectrum_keeps_the_variance():
    model = Calls(by_spectrum, w=table(OUT, WIDTH), out=table(OUT * WIDTH, 2))
    found = entry(model, torch.randn(8, WIDTH))
    assert found.rule == "traced"
    assert float(model.w.detach().std()) * math.sqrt(WIDTH) == pytest.approx(math.sqrt(2), rel=0.15)


SCALES = {
    "a scale": (lambda s, x: x * s.w, (WIDTH,)),
    "a scale of channels, pooled": (lambda s, x: (x.view(-1, 4, 6) * s.w).mean(-1), (4, 1)),
    "a token": (lambda s, x: torch.cat([x, s.w]), (2, WIDTH)),
    "positions": (lambda s, x: x + s.w, (8, WIDTH)),
}


@pytest.mark.parametrize("name", SCALES)
def test_what_is_no_weight_stays(name):
    call, shape = SCALES[name]
    model = Calls(call, w=table(*shape))
    before = model.w.detach().clone()
    assert entry(model, torch.randn(8, WIDTH)).rule == "state"
    assert torch.equal(model.w, before)


def test_what_nobody_can_tell_is_said():
    model = Calls(lambda self, x: -torch.cdist(x, self.w), w=table(OUT, WIDTH))
    with pytest.warns(UserWarning, match="neither linear in it nor element by element"):
        report = gh.init_weights(model, torch.randn(8, WIDTH))
    assert report.entries[0].rule == "uncovered"


@torch.library.custom_op("gradhealth_tests::mixed", mutates_args=())
def mixed(x: torch.Tensor, weight: torch.Tensor, shift: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """Rows times the matrix of their group, transposed, and a shift: an operator that nobody has heard of."""
    return torch.einsum("bi,boi->bo", x, weight[groups]) + shift


@mixed.register_fake
def _(x, weight, shift, groups):
    return x.new_empty(x.shape[0], weight.shape[1])


def test_a_custom_operator_with_groups_and_a_shift():
    def call(self, x):
        return mixed(F.relu(x @ self.first), self.w, self.shift, (x[:, 0] > 0).long())

    model = Calls(call, first=table(WIDTH, WIDTH), w=table(EXPERTS, OUT, WIDTH), shift=table(OUT))
    found = entry(model, torch.randn(8, WIDTH))
    assert (found.rule, found.fan) == ("traced", WIDTH)
    assert not model.shift.any()


def test_large_operators_are_tried_at_small_sizes(monkeypatch):
    model = Calls(lambda self, x: mixed(x, self.w, self.shift, x[:, 0].long()), w=table(8, 256, 192), shift=table(256))
    run: list[int] = []
    original = torch.randint
    monkeypatch.setattr(torch, "randint", lambda *a, **k: run.append(math.prod(a[2])) or original(*a, **k))
    station = next(iter(Graph(trace(model, torch.randn(4, 192))).stations.values()))
    assert (station.fan_in, station.fan_out) == (192, 256)
    assert max(run) < 1 << 15


def test_random_numbers_are_as_before():
    model = Calls(routed, router=table(WIDTH, EXPERTS), w=table(EXPERTS, WIDTH, OUT), down=table(EXPERTS, WIDTH, OUT))
    state = torch.get_rng_state()
    gh.plan_init(model, torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(0)), seed=0)
    assert torch.equal(torch.get_rng_state(), state)


# --- complex numbers ---


@pytest.mark.parametrize("distribution", ["normal", "uniform", "truncated_normal"])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_each_part_of_complex_numbers_has_half_of_the_variance(distribution, dtype):
    generator = torch.Generator().manual_seed(0)
    weight = torch.empty(200, 100, dtype=dtype)
    gh.variance_scaling_(weight, distribution=distribution, generator=generator)
    for part in (weight.real, weight.imag):
        assert float(part.square().mean()) * 100 == pytest.approx(0.5, rel=0.05)
        bound = {"normal": math.inf, "uniform": math.sqrt(3), "truncated_normal": 2 / 0.8796}[distribution]
        assert float(part.abs().max()) <= bound / math.sqrt(200)
    assert abs(complex((weight.real * weight.imag).mean())) < 1e-3


def test_complex_orthogonal_matrices_are_unitary():
    weight = orthogonal_(torch.empty(4, 6, dtype=torch.complex64))
    assert torch.allclose(weight @ weight.mH, torch.eye(4, dtype=torch.complex64), atol=1e-5)


CHANNELS, SIZE, MODES = 32, 16, 5


class Spectral(nn.Module):
    """A Fourier layer: a matrix of channels for each of the lowest modes."""

    def __init__(self, norm, parts=False):
        super().__init__()
        self.norm, self.parts = norm, parts
        shape = (CHANNELS, CHANNELS, MODES)
        self.weight = table(*shape, 2, std=0.1) if parts else table(*shape, std=0.1, dtype=torch.complex64)
        self.skip = nn.Conv1d(CHANNELS, CHANNELS, 1)

    def forward(self, x):
        spectrum = torch.fft.rfft(x, norm=self.norm)
        weight = torch.view_as_complex(self.weight) if self.parts else self.weight
        low = torch.einsum("bim,iom->bom", spectrum[..., :MODES], weight)
        out = torch.zeros_like(spectrum)
        out[..., :MODES] = low
        return torch.fft.irfft(out, n=x.shape[-1], norm=self.norm) + self.skip(x)


@pytest.mark.parametrize("parts", [False, True], ids=["complex", "two real parts"])
@pytest.mark.parametrize("norm", ["forward", "backward", "ortho"])
def test_weights_of_fourier_layers_keep_the_scale_of_the_modes(norm, parts):
    first, second = Spectral(norm, parts), Spectral(norm, parts)
    model = nn.Sequential(first, nn.GELU(), second)
    report = gh.init_weights(model, torch.randn(4, CHANNELS, SIZE), seed=0)
    assert not report.uncovered
    for layer, gain in ((first, 1.0), (second, gh.gain("gelu"))):
        weight = layer.weight.detach()
        square = weight.square().sum(-1).mean() if parts else weight.abs().square().mean()
        assert float(square) * CHANNELS == pytest.approx(gain**2, rel=0.06)
    smooth = torch.cos(torch.arange(SIZE) * 2 * math.pi / SIZE) * math.sqrt(2) * torch.randn(64, CHANNELS, 1)
    with torch.no_grad():
        given = first(smooth) - first.skip(smooth)
    assert float(given.square().mean()) == pytest.approx(1, rel=0.25)


def test_factors_of_a_complex_weight_make_one_of_the_right_scale():
    def make(self):
        return torch.einsum("ir,or,mr->iom", self.ins, self.outs, self.modes)

    def call(self, x):
        spectrum = torch.fft.rfft(x, norm="forward")
        low = torch.einsum("bim,iom->bom", spectrum[..., :MODES], make(self))
        return torch.fft.irfft(F.pad(low, (0, spectrum.shape[-1] - MODES)), n=SIZE, norm="forward")

    sizes = {"ins": CHANNELS, "outs": CHANNELS, "modes": MODES}
    model = Calls(call, **{name: table(size, 8, dtype=torch.complex64) for name, size in sizes.items()})
    report = gh.init_weights(model, torch.randn(4, CHANNELS, SIZE), seed=0)
    assert not report.uncovered
    assert {entry.rule for entry in report.entries} == {"traced"}
    with torch.no_grad():
        assert float(make(model).abs().square().mean()) * CHANNELS == pytest.approx(1, rel=0.5)


def test_calibration_leaves_complex_weights_as_drawn():
    model = Spectral("forward")
    batch = torch.randn(8, CHANNELS, SIZE)
    drawn = gh.init_weights(model, batch, seed=0).entries[0].measured_std
    report = gh.init_weights(model, batch, seed=0, calibrate=batch)
    assert report.entries[0].measured_std == drawn
    assert "complex numbers" in report.entries[0].note


# --- scales that lie elsewhere ---


def paths(self, x):
    """One flat vector holds the matrices of two paths; what they give is divided by the root of the terms."""
    first, second = self.w[: WIDTH * OUT].view(WIDTH, OUT), self.w[WIDTH * OUT :].view(OUT, WIDTH)
    hidden = torch.tanh(2 * (x @ first) / WIDTH**0.5)
    return (hidden @ second) / OUT**0.5


def test_weights_whose_products_are_divided_behind_them_keep_variance_one():
    model = Calls(paths, w=table(2 * WIDTH * OUT, std=1.0))
    found = entry(model, torch.randn(64, WIDTH))
    assert found.target_std == pytest.approx(1)
    assert "divided by the root of their number" in found.note
    nn.init.normal_(model.w, std=0.1)  # where nobody has meant it, the constant is there by chance
    assert entry(model, torch.randn(64, WIDTH)).target_std < 0.5


def test_a_scale_of_one_path_is_exact():
    def call(self, x):
        return F.linear(x, self.w[: WIDTH * WIDTH].view(WIDTH, WIDTH) / 7)

    found = entry(Calls(call, w=nn.Parameter(torch.randn(20 * WIDTH * WIDTH))), torch.randn(8, WIDTH))
    assert found.gain == pytest.approx(7, rel=1e-6)
