"""What people do on purpose: noise in a forward, zeros, gates, tables, loops, stretched activations, long skips."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from calls import Calls
from torch import nn
from torch.nn import functional as F

from lightning_gradhealth.init import init_weights, plan_init
from lightning_gradhealth.init.replay import Replayer
from lightning_gradhealth.init.residual import find_branches
from lightning_gradhealth.tracing import Graph, trace


def entry(report, name):
    return next(entry for entry in report.entries if entry.name == name)


# --- random numbers ---


@pytest.mark.parametrize(
    "noisy",
    [
        lambda x: F.gumbel_softmax(x, dim=-1),
        lambda x: x + torch.randn_like(x),
        lambda x: x * torch.bernoulli(torch.full_like(x, 0.5)),
        lambda x: torch.distributions.Normal(x, 1.0).rsample(),
    ],
    ids=["gumbel", "noise", "mask", "rsample"],
)
def test_a_forward_that_draws_changes_neither_the_weights_nor_the_random_state(noisy):
    weights = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = Calls(lambda self, x: self.b(noisy(self.a(x))), a=nn.Linear(6, 8), b=nn.Linear(8, 3))
        state = torch.get_rng_state()
        init_weights(model, torch.ones(4, 6), seed=0)
        assert torch.equal(torch.get_rng_state(), state)
        weights.append([parameter.clone() for parameter in model.parameters()])
    assert all(map(torch.equal, *weights))


# --- zeros and biases ---


def blocks_with_zero_ends():
    ends = [nn.Conv2d(6, 6, 1) for _ in range(2)]
    for end in ends:
        nn.init.zeros_(end.weight)
    body = [
        Calls(lambda self, x: x + self.end(F.silu(self.conv(x))), conv=nn.Conv2d(6, 6, 3, padding=1), end=e)
        for e in ends
    ]
    return nn.Sequential(nn.Conv2d(3, 6, 1), *body, nn.Flatten(), nn.Linear(6 * 16, 4)), torch.randn(2, 3, 4, 4)


def test_layers_set_to_zero_stay_so_and_say_it():
    model, x = blocks_with_zero_ends()
    report = init_weights(model, x, seed=0)
    for block in (1, 2):
        assert not model[block].end.weight.any()
        assert "on purpose" in entry(report, f"{block}.end.weight").note
    assert model[1].conv.weight.any()
    init_weights(model, x, seed=0, overrides={r".*end\.weight": "lecun"})
    assert model[1].end.weight.any()


def test_a_residual_scheme_that_is_asked_for_decides_about_zeros():
    model, x = blocks_with_zero_ends()
    init_weights(model, x, seed=0, residual="depth")
    assert model[1].end.weight.any()


def test_fresh_memory_is_no_purpose():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    init_weights(model, torch.randn(4, 6), seed=0)
    assert model[0].weight.any()
    assert model[2].weight.any()


@pytest.mark.parametrize(("values", "stays"), [([-2.0] * 6, True), ([3.0, -3.0] * 3, False), ([0.1] * 6, False)])
def test_which_biases_are_set_on_purpose(values, stays):
    model = nn.Sequential(nn.Linear(9, 6), nn.Sigmoid(), nn.Linear(6, 2))
    with torch.no_grad():
        model[0].bias.copy_(torch.tensor(values))
    init_weights(model, torch.randn(4, 9), seed=0)
    assert model[0].bias.tolist() == (pytest.approx(values) if stays else [0.0] * 6)


def test_a_kept_bias_is_there_when_gains_are_found():
    """A gate that begins nearly closed lets little through, and the next weight makes up for it."""
    model = nn.Sequential(nn.Linear(9, 64), nn.Sigmoid(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2))
    open_ = entry(init_weights(model, torch.randn(4, 9), seed=0), "2.weight").gain
    nn.init.constant_(model[0].bias, -2.0)
    closed = entry(init_weights(model, torch.randn(4, 9), seed=0), "2.weight").gain
    z = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0))
    for found, shift in ((open_, 0.0), (closed, -2.0)):
        assert found == pytest.approx(float((z + shift).sigmoid().square().mean()) ** -0.5, rel=0.01)


def test_what_is_computed_from_a_parameter_before_it_is_added_is_no_bias():
    model = Calls(
        lambda self, x: self.head(self.mean(x) + self.log_scale.exp() * torch.ones_like(x)),
        mean=nn.Linear(6, 6),
        log_scale=nn.Parameter(torch.full((6,), -0.1)),
        head=nn.Linear(6, 2),
    )
    report = init_weights(model, torch.randn(4, 6), seed=0)
    assert torch.equal(model.log_scale, torch.full((6,), -0.1))
    assert entry(report, "log_scale").rule == "state"


def test_complex_layers_are_drawn():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64, dtype=torch.complex64))
    model.forward = lambda x: model[1](model[0](x).to(torch.complex64)).abs()
    report = init_weights(model, torch.randn(2, 64), seed=0)
    assert not report.uncovered
    weight = model[1].weight.detach()
    assert float(weight.abs().square().mean()) * 64 == pytest.approx(1, rel=0.05)
    assert entry(report, "1.weight").measured_std == pytest.approx(1 / 8, rel=0.05)
    assert not model[1].bias.any()


# --- scales ---


def test_tables_before_a_norm_get_one_over_the_root_of_the_width():
    model = Calls(
        lambda self, x: self.head(self.norm(self.tokens(x) + self.places(torch.arange(x.shape[1])))),
        tokens=nn.Embedding(50, 64),
        places=nn.Embedding(8, 64),
        norm=nn.LayerNorm(64),
        head=nn.Linear(64, 3),
    )
    report = init_weights(model, torch.zeros(2, 8, dtype=torch.long), seed=0)
    for name in ("tokens.weight", "places.weight"):
        assert entry(report, name).target_std == pytest.approx(1 / 8)
    plain = Calls(lambda self, x: self.head(self.tokens(x)), tokens=nn.Embedding(50, 64), head=nn.Linear(64, 3))
    report = init_weights(plain, torch.zeros(2, 8, dtype=torch.long), seed=0)
    assert entry(report, "tokens.weight").target_std == 1


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("last", [True, False])
def test_an_output_layer_behind_a_recurrent_one_is_plain(kind, last):
    model = Calls(
        lambda self, x: self.head(self.rnn(x)[0][:, -1] if last else self.rnn(x)[0]),
        rnn=kind(5, 7, batch_first=True),
        head=nn.Linear(7, 3),
    )
    assert entry(init_weights(model, torch.randn(2, 6, 5), seed=0), "head.weight").gain == 1


def test_an_output_layer_makes_up_for_a_constant_but_not_for_a_pool():
    """T5 multiplies by width^-0.5 before its tied head; a mean over tokens is an average like any other."""
    scaled = Calls(lambda self, x: self.head(self.norm(self.body(x)) * 0.25), **parts())
    pooled = Calls(lambda self, x: self.head(self.norm(self.body(x)).mean(1)), **parts())
    x = torch.randn(3, 5, 16)
    assert entry(init_weights(scaled, x, seed=0), "head.weight").gain == pytest.approx(4, rel=1e-2)
    assert entry(init_weights(pooled, x, seed=0), "head.weight").gain == 1


def parts():
    return {"body": nn.Linear(16, 16), "norm": RMSNorm(), "head": nn.Linear(16, 3)}


class RMSNorm(nn.Module):
    """Written by hand, so that no operator says what it is."""

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


def test_shares_are_not_blown_up():
    model = nn.Sequential(nn.Linear(6, 40), nn.Softmax(-1), nn.Linear(40, 8), nn.ReLU(), nn.Linear(8, 2))
    assert entry(init_weights(model, torch.randn(4, 6), seed=0), "2.weight").gain < 2


class Sine(nn.Module):
    def forward(self, x):
        return torch.sin(30 * x)


def test_a_stretched_activation_gets_an_argument_of_variance_one():
    """SIREN's own rule: std sqrt(2 / n) / 30 in hidden layers; the first layer's frequencies are nobody's business."""
    model = nn.Sequential(*[part for _ in range(4) for part in (nn.Linear(64, 64), Sine())], nn.Linear(64, 1))
    report = init_weights(model, torch.randn(8, 64), seed=0)
    assert entry(report, "2.weight").gain == pytest.approx(math.sqrt(2) / 30, rel=0.01)
    assert entry(report, "0.weight").scheme == "kept"
    assert not any("signal is predicted" in note for note in report.notes)  # it is as small as it is meant to be


def test_in_a_loop_the_smallest_gain_holds():
    """At the first step the state is 0, so that half of what the weight reads is nothing."""

    def forward(self, x):
        state = torch.zeros(x.shape[0], 8)
        for step in range(4):
            state = torch.tanh(self.cell(torch.cat([x[:, step], state], -1)))
        return self.head(state)

    model = Calls(forward, cell=nn.Linear(16, 8), head=nn.Linear(8, 2))
    report = init_weights(model, torch.randn(4, 4, 8), seed=0)
    tanh = 0.3943  # E tanh(z)^2
    assert entry(report, "cell.weight").gain == pytest.approx(((1 + tanh) / 2) ** -0.5, rel=0.01)
    assert "used again" in entry(report, "cell.weight").note


# --- residual ---


class Plain(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.inner, self.outer = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x):
        return x + self.outer(F.relu(self.inner(x)))


@pytest.mark.parametrize("last", [nn.Identity, lambda: nn.Linear(16, 16)])
def test_a_long_skip_leaves_the_branches_inside(last):
    model = Calls(
        lambda self, x: x + self.last(self.body(x)), body=nn.Sequential(*[Plain() for _ in range(6)]), last=last()
    )
    graph = Graph(trace(model, torch.randn(4, 16)))
    assert len(find_branches(graph, Replayer(graph))) == (6 if last is nn.Identity else 7)
    assert init_weights(model, torch.randn(4, 16), seed=0).residual == "depth"


def test_products_of_signals_end_no_branch():
    model = Calls(
        lambda self, x: x + torch.bmm(torch.softmax(self.a(x), -1), self.b(x)),
        a=nn.Linear(8, 5, bias=False),
        b=nn.Linear(8, 8),
    )
    graph = Graph(trace(model, torch.randn(2, 5, 8)))
    assert find_branches(graph, Replayer(graph)) == []


def test_a_residual_scheme_without_a_branch_is_told():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    assert any("no residual branch" in n for n in init_weights(model, torch.randn(2, 4), residual="depth").notes)


# --- meta ---


def test_what_a_class_gives_its_parameters_is_known_on_meta():
    def make():
        return nn.Sequential(nn.Linear(6, 8), nn.PReLU(8), nn.Linear(8, 8), nn.PReLU(), nn.Linear(8, 3))

    with torch.device("meta"):
        late = make()
    plan = plan_init(late, torch.zeros(2, 6), seed=0)
    assert any("on the meta device" in note for note in plan.report.notes)
    plan.bind()
    late.to_empty(device="cpu")
    for module in late.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    real = make()
    init_weights(real, torch.zeros(2, 6), seed=0)
    assert all(map(torch.equal, late.parameters(), real.parameters()))


def test_calibration_leaves_a_weight_whose_scale_is_not_its_own():
    model = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(6, 8)), nn.ReLU(), nn.Linear(8, 3))
    x = torch.randn(64, 6)
    init_weights(model, x, seed=0)
    before = model[0].parametrizations.weight.original.clone()
    report = init_weights(model, x, seed=0, calibrate=x)
    assert torch.equal(model[0].parametrizations.weight.original, before)
    assert "scale of its own" in entry(report, "0.parametrizations.weight.original").note


# --- samples ---


def test_a_large_batch_of_images_gives_the_weights_of_a_small_one():
    weights = []
    for rows in (4, 64):
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 8, 3),
            nn.ReLU(),
            nn.Flatten(),
            nn.LazyLinear(3),
        )
        model(torch.zeros(1, 3, 12, 12))
        init_weights(model, torch.randn(rows, 3, 12, 12), seed=0)
        weights.append([parameter.clone() for parameter in model.parameters()])
    assert all(map(torch.equal, *weights))


def test_a_model_that_wants_all_its_rows_gets_them():
    model = Calls(lambda self, x: self.conv(x.view(16, 3, 6, 6)), conv=nn.Conv2d(3, 2, 3))
    assert init_weights(model, torch.randn(16, 3, 6, 6), seed=0).source == "trace (fake tensors)"


# --- messages ---


def test_a_batch_of_a_loader_is_recognised():
    report = init_weights(nn.Linear(4, 2), [torch.randn(3, 4), torch.zeros(3)], seed=0)
    assert report.source.startswith("trace")
    assert "forward was given a part of the batch: its first entry" in report.notes
    with pytest.raises(ValueError, match=r"as a DataLoader gives: pass the inputs alone, such as batch\[0\]"):
        init_weights(nn.Linear(4, 2), [torch.randn(3, 5), torch.zeros(3)], seed=0)


def test_a_model_in_two_places_is_told():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2, device="meta"))
    with pytest.raises(ValueError, match="a part of the model is on the meta device"):
        plan_init(model, torch.randn(3, 4), seed=0)


def test_a_matrix_used_again_by_what_follows_is_no_output() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.into = nn.Linear(8, 12)
            self.again = nn.Parameter(torch.randn(12, 12) * 0.1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            state = torch.zeros(len(x), 12)
            for step in range(5):
                state = torch.tanh(self.into(x[:, step]) + state @ self.again)
            return state

    report = init_weights(Recurrent(), torch.randn(4, 5, 8), seed=0)
    assert {entry.name: entry.rule for entry in report.entries}["again"] == "traced"


def test_sparse_weights_are_kept_without_a_crash() -> None:
    class Sparse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("places", torch.stack([torch.arange(8), torch.arange(8).flip(0)]))
            self.weight, self.head = nn.Parameter(torch.randn(8)), nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                matrix = torch.sparse_coo_tensor(self.places, self.weight, (8, 8))
                return self.head(torch.sparse.mm(matrix, x.T).T)

    model = Sparse()
    report = init_weights(model, torch.randn(4, 8), seed=0, on_uncovered="ignore")
    assert {entry.name for entry in report.entries} == {"weight", "head.weight", "head.bias"}
