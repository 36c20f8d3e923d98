"""Weights that the forward pass makes of several parameters: the weight has the std that it should have."""

import math

import pytest
import torch
from calls import Calls
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

import lightning_gradhealth as gh

OUT, IN = 96, 128
WANTED = math.sqrt(2 / IN)  # He: a ReLU follows


class Made(Calls):
    """A linear layer whose weight is what a function makes of its parameters."""

    def __init__(self, make, **parts):
        super().__init__(lambda self, x: F.linear(x, self.make(self)), **parts)
        self.make = make


def table(*shape, std=0.3):
    return nn.Parameter(std * torch.randn(shape))


def frozen(tensor):
    return nn.Parameter(tensor, requires_grad=False)


def ints(*shape):
    return frozen(torch.randint(-7, 8, shape, dtype=torch.int8))


def ones(*shape):
    return nn.Parameter(torch.linspace(0.5, 1.5, math.prod(shape)).view(shape))


def normed(v):
    return v / v.norm(dim=1, keepdim=True)


def net(layer):
    return nn.Sequential(layer, nn.ReLU(), nn.Linear(OUT, 4))


def drawn(layer, **options):
    """The std of the weight, the parameters that changed, the report."""
    model, before = net(layer), {name: p.detach().clone() for name, p in layer.named_parameters()}
    state = torch.get_rng_state()
    report = gh.init_weights(model, torch.randn(8, IN, generator=torch.Generator().manual_seed(1)), seed=0, **options)
    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():
        weight = layer.make(layer).double()
    changed = {name for name, p in layer.named_parameters() if not torch.equal(p, before[name])}
    return float(weight.square().mean().sqrt()), changed, report


def cases():
    torch.manual_seed(0)
    return {
        "low rank": (Made(lambda m: m.u @ m.v, u=table(OUT, 16), v=table(16, IN)), "u v"),
        "low rank, square": (Made(lambda m: m.u @ m.v, u=table(OUT, IN), v=table(IN, IN)), "u v"),
        "rank 1": (Made(lambda m: m.u @ m.v, u=table(OUT, 1), v=table(1, IN)), "u v"),
        "three factors": (Made(lambda m: m.a @ m.b @ m.c, a=table(OUT, 16), b=table(16, 24), c=table(24, IN)), "a b c"),
        "with singular values": (
            Made(lambda m: m.u * m.s @ m.v, s=ones(16), u=table(OUT, 16), v=table(16, IN)),
            "u v",
        ),
        "a given factor": (Made(lambda m: m.u @ m.v, u=frozen(3 * torch.randn(OUT, 16)), v=table(16, IN)), "v"),
        "an integer factor": (Made(lambda m: m.u.float() @ m.v, u=ints(OUT, 16), v=table(16, IN)), "v"),
        "low rank of layers": (
            Made(lambda m: m.u.weight @ m.v.weight, u=nn.Linear(16, OUT, bias=False), v=nn.Linear(IN, 16, bias=False)),
            "u.weight v.weight",
        ),
        "Kronecker": (Made(lambda m: torch.kron(m.a, m.b), a=table(8, 16), b=table(12, 8)), "a b"),
        "a gate": (Made(lambda m: m.w * torch.sigmoid(m.mask), mask=table(OUT, IN), w=table(OUT, IN)), "w"),
        "a scale of rows": (Made(lambda m: m.w * m.s, s=ones(OUT, 1), w=table(OUT, IN)), "w"),
        "a scale of each": (Made(lambda m: m.w * m.s, w=table(OUT, IN), s=ones(OUT, IN)), "w"),
        "a frozen mask": (Made(lambda m: m.w * m.m, w=table(OUT, IN), m=frozen(torch.rand(OUT, IN))), "w"),
        "splines": (
            Made(lambda m: (m.c * m.s[..., None]).flatten(1), c=table(OUT, 16, 8), s=ones(OUT, 16)),
            "c",
        ),
        "joined": (Made(lambda m: torch.cat([m.a, 3 * m.b]), a=table(OUT // 3, IN), b=table(2 * OUT // 3, IN)), "a b"),
        "stacked rows": (
            Made(lambda m: torch.cat([m.w, m.row[None]]), row=table(IN), w=table(OUT - 1, IN)),
            "row w",
        ),
        "a sum": (Made(lambda m: m.a + m.b, a=table(OUT, IN), b=table(OUT, IN)), "a b"),
        "a sum and a product": (
            Made(lambda m: m.w + m.u @ m.v, w=table(OUT, IN), u=table(OUT, 16), v=table(16, IN)),
            "w u v",
        ),
        "low rank, zero": (
            Made(lambda m: m.w + m.b @ m.a, w=table(OUT, IN), b=nn.Parameter(torch.zeros(OUT, 16)), a=table(16, IN)),
            "w a",
        ),
        "a shift": (Made(lambda m: m.w + m.shift, shift=nn.Parameter(torch.zeros(1)), w=table(OUT, IN)), "w"),
        "all zero": (
            Made(
                lambda m: m.u @ m.v,
                u=nn.Parameter(torch.zeros(OUT, 16)),
                v=nn.Parameter(torch.zeros(16, IN)),
            ),
            "u v",
        ),
    }


@pytest.mark.parametrize("name", cases())
def test_the_weight_has_the_std_that_it_should_have(name):
    layer, names = cases()[name]
    std, changed, report = drawn(layer)
    assert changed == set(names.split())  # all others bit for bit
    # by few numbers, as in a product of vectors, the std of one draw is random itself
    numbers = min(p.numel() for n, p in layer.named_parameters() if n in changed)
    assert std == pytest.approx(WANTED, rel=0.05 + 1.5 / math.sqrt(numbers))
    assert report.depth[0].forward == pytest.approx(WANTED * math.sqrt(IN), rel=0.1)


def test_the_parts_of_a_joined_weight_have_one_std():
    layer, _ = cases()["joined"]
    drawn(layer)
    weight = layer.make(layer).detach()
    for part in weight.split([OUT // 3, 2 * OUT // 3]):
        assert float(part.std()) == pytest.approx(WANTED, rel=0.05)


def test_a_product_of_several_is_drawn_alike():
    layer, _ = cases()["three factors"]
    _, _, report = drawn(layer)
    stds = {entry.target_std for entry in report.entries if entry.name.startswith("0.")}
    assert len(stds) == 1
    assert all("one of 3" in entry.note for entry in report.entries[:3])


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_weight_norm_by_hand_keeps_its_lengths(scale):
    layer = Made(lambda m: m.g * normed(m.v), g=nn.Parameter(torch.full((OUT, 1), scale)), v=table(OUT, IN))
    std, changed, report = drawn(layer)
    assert changed == {"v"}
    entry = next(e for e in report.entries if e.name == "0.g")
    assert (entry.rule, entry.note) == ("state", "a factor of the weight that v makes: kept")
    assert report.depth[0].forward == pytest.approx(std * math.sqrt(IN), rel=0.01)


def test_quantised_weights_and_their_scales_stay():
    for s in (ones(OUT), ones(OUT, 1)):
        layer = Made(lambda m: m.q.float() * m.s.view(-1, 1), q=ints(OUT, IN), s=s)
        std, changed, report = drawn(layer)
        assert changed == set()
        assert report.depth[0].forward == pytest.approx(std * math.sqrt(IN), rel=0.01)


@pytest.mark.parametrize("zero", [True, False])
def test_the_magnitudes_of_dora_stay(zero):
    layer = Made(
        lambda m: m.m * normed(m.w + m.b @ m.a),
        w=frozen(torch.randn(OUT, IN)),
        b=nn.Parameter(torch.zeros(OUT, 4)) if zero else table(OUT, 4),
        a=table(4, IN),
        m=ones(OUT, 1),
    )
    std, changed, report = drawn(layer)
    assert not changed & {"w", "m"}
    assert "a" in changed or not zero
    assert (report.depth[0].forward == pytest.approx(std * math.sqrt(IN), rel=0.1)) or not zero


def test_a_silent_branch_still_learns():
    """Of a product that starts at 0 one factor is 0, the other is not."""
    layer = Made(lambda m: m.u @ m.v, u=table(IN, 16), v=table(16, IN))
    model = nn.Sequential(Skip(nn.Sequential(nn.Linear(IN, IN), nn.ReLU(), layer)), nn.Linear(IN, 4))
    gh.init_weights(model, torch.randn(8, IN), seed=0, residual="zero_last")
    assert layer.u.any()
    assert not layer.v.any()


class Skip(nn.Module):
    def __init__(self, branch):
        super().__init__()
        self.branch = branch

    def forward(self, x):
        return x + self.branch(x)


def test_a_residual_factor_is_that_of_the_product():
    layer = Made(lambda m: m.u @ m.v, u=table(IN, 32), v=table(32, IN))
    blocks = [Skip(nn.Sequential(nn.Linear(IN, IN), nn.ReLU(), nn.Linear(IN, IN))) for _ in range(7)]
    model = nn.Sequential(Skip(nn.Sequential(nn.Linear(IN, IN), nn.ReLU(), layer)), *blocks, nn.Linear(IN, 4))
    gh.init_weights(model, torch.randn(8, IN), seed=0, residual="depth")
    plain = float(model[1].branch[2].weight.detach().std())
    assert float(layer.make(layer).detach().std()) == pytest.approx(plain, rel=0.05)


@pytest.mark.parametrize("scheme", ["auto", "he"])
@pytest.mark.parametrize(
    "wrap",
    [
        weight_norm,
        parametrizations.weight_norm,
        lambda m: prune.random_unstructured(m, "weight", 0.3),
        spectral_norm,
        lambda m: m,
    ],
    ids=["weight_norm", "parametrized", "prune", "spectral_norm", "plain"],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_what_torch_computes_is_written_through_as_ever(wrap, scheme):
    torch.manual_seed(0)
    layer = wrap(nn.Linear(IN, OUT))
    report = gh.init_weights(net(layer), torch.randn(8, IN), seed=0, scheme=scheme)
    assert next(entry.gain for entry in report.entries if entry.gain) == pytest.approx(2**0.5)


def test_what_is_shared_by_steps_is_composed_once_and_alike():
    layer = Made(lambda m: m.u @ m.v, u=table(IN, 16), v=table(16, IN))
    loop = nn.Sequential(*[module for _ in range(3) for module in (layer, nn.ReLU())], nn.Linear(IN, 4))
    gh.init_weights(loop, torch.randn(8, IN), seed=0)
    assert float(layer.make(layer).detach().std()) == pytest.approx(WANTED, rel=0.1)


def test_weights_of_one_kind_have_their_own_scales():
    """How a weight is made is found out once for all of a kind; what its given factors are is looked at for each."""
    layers = [
        Made(lambda m: m.s * (m.u @ m.v), u=table(IN, 16), v=table(16, IN), s=nn.Parameter(torch.full((IN, 1), scale)))
        for scale in (1.0, 0.2)
    ]
    model = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), nn.Linear(IN, 4))
    gh.init_weights(model, torch.randn(8, IN), seed=0)
    for layer in layers:
        assert float(layer.make(layer).detach().std()) == pytest.approx(WANTED, rel=0.1)


@pytest.mark.parametrize("scheme", ["he", "xavier", "orthogonal"])
def test_factors_stay_under_every_scheme(scheme):
    layer = Made(lambda m: m.g * normed(m.v), g=ones(OUT, 1), v=table(OUT, IN))
    _, changed, _ = drawn(layer, scheme=scheme)
    assert changed == {"v"}


def test_a_plan_on_meta_is_the_same():
    stds = []
    for device in ("cpu", "meta"):
        with torch.device(device):
            layer = Made(
                lambda m: m.g * (m.u @ m.v), g=nn.Parameter(torch.ones(OUT, 1)), u=table(OUT, 16), v=table(16, IN)
            )
            model = net(layer)
        report = gh.plan_init(model, torch.randn(8, IN), seed=0).report
        stds.append([entry.target_std for entry in report.entries[:3]])
    assert stds[0] == stds[1]


def test_what_follows_no_rule_is_drawn_as_ever_and_not_foretold():
    for make in (lambda m: torch.tanh(m.v) * m.g, lambda m: F.softplus(m.v) * m.g):
        layer = Made(make, v=table(OUT, IN), g=ones(OUT, 1))
        _, changed, report = drawn(layer)
        assert changed == {"v"}
        assert report.entries[0].target_std == pytest.approx(WANTED)


def test_the_weight_of_a_layer_that_serves_as_a_factor_stays():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.mask = nn.Linear(6, 8), nn.Linear(6, 8, bias=False)

        def forward(self, x):
            return F.linear(x, self.layer.weight * torch.sigmoid(self.mask.weight), self.layer.bias)

    model = Masked()
    before = model.mask.weight.clone()
    report = gh.init_weights(model, torch.randn(4, 6), seed=0)
    assert torch.equal(model.mask.weight, before)
    assert next(entry.rule for entry in report.entries if entry.name == "mask.weight") == "state"
