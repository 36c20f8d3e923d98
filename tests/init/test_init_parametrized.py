"""Weights under parametrizations, torch's older hooks and pruning: written through what computes them."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from lightning_gradhealth.init import init_weights, plan_init

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*")

WRAPS = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "householder": lambda m: parametrizations.orthogonal(m, orthogonal_map="householder", use_trivialization=False),
    "old_weight_norm": nn.utils.weight_norm,
    "old_spectral_norm": nn.utils.spectral_norm,
    "pruned": lambda m: prune.l1_unstructured(m, "weight", 0.5),
    "pruned_twice": lambda m: prune.l1_unstructured(prune.l1_unstructured(m, "weight", 0.5), "weight", 0.5),
}


class Double(nn.Module):
    """A parametrization of one's own, which can be undone."""

    def forward(self, value):
        return 2 * value

    def right_inverse(self, value):
        return value / 2


class OneWay(nn.Module):
    def forward(self, value):
        return value.triu()


def wrapped(kind, rows=24, columns=16):
    return nn.Sequential(nn.Linear(8, columns), WRAPS[kind](nn.Linear(columns, rows)))


def plain_weight(rows=24, columns=16, scheme="lecun"):
    model = nn.Sequential(nn.Linear(8, columns), nn.Linear(columns, rows))
    init_weights(model, scheme=scheme, seed=0)
    return model[1].weight.detach()


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("kind", ["weight_norm", "old_weight_norm"])
def test_weight_norm_computes_the_weight_of_the_bare_layer(kind):
    model = wrapped(kind)
    init_weights(model, scheme="lecun", seed=0, on_uncovered="raise")
    model(torch.randn(2, 8))
    torch.testing.assert_close(model[1].weight.detach(), plain_weight())


def test_the_hook_of_weight_norm_is_up_to_date_at_once():
    model = wrapped("old_weight_norm")
    init_weights(model, scheme="lecun", seed=0)
    torch.testing.assert_close(model[1].weight.detach(), plain_weight())
    torch.testing.assert_close(model[1].weight_g.flatten(), plain_weight().norm(dim=1))


@pytest.mark.parametrize("kind", ["spectral_norm", "old_spectral_norm"])
def test_spectral_norm_knows_the_norm_of_the_new_weight(kind):
    model = wrapped(kind).eval()
    init_weights(model, scheme="lecun", seed=0, on_uncovered="raise")
    model(torch.randn(2, 8))
    expected = plain_weight() / torch.linalg.matrix_norm(plain_weight(), 2)
    torch.testing.assert_close(model[1].weight.detach(), expected, rtol=0.02, atol=1e-3)
    assert torch.equal(
        next(p for n, p in model.named_parameters() if n.startswith("1.") and "orig" in n), plain_weight()
    )


@pytest.mark.parametrize("kind", ["orthogonal", "householder"])
@pytest.mark.parametrize("shape", [(16, 16), (24, 16), (16, 24)])
def test_orthogonal_spans_what_was_drawn(kind, shape):
    model = wrapped(kind, *shape)
    init_weights(model, scheme="lecun", seed=0, on_uncovered="raise")
    weight, drawn = model[1].weight.detach(), plain_weight(*shape)
    values = torch.linalg.svdvals(weight)
    torch.testing.assert_close(values, torch.ones_like(values), rtol=0, atol=1e-4)
    long, drawn_long = (weight, drawn) if shape[0] >= shape[1] else (weight.T, drawn.T)
    torch.testing.assert_close(long @ (long.T @ drawn_long), drawn_long, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["pruned", "pruned_twice"])
def test_the_mask_goes_on_to_hold(kind):
    model = wrapped(kind)
    mask = model[1].weight_mask.clone()
    assert 0 < mask.mean() < 1
    init_weights(model, scheme="lecun", seed=0, on_uncovered="raise")
    assert torch.equal(model[1].weight.detach(), plain_weight() * mask)
    assert torch.equal(model[1].weight_mask, mask)


def test_a_parametrization_of_ones_own():
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 24))
    parametrize.register_parametrization(model[1], "weight", Double())
    init_weights(model, scheme="lecun", seed=0, on_uncovered="raise")
    assert torch.equal(model[1].weight.detach(), plain_weight())


def test_a_chain_of_two():
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 24))
    parametrizations.weight_norm(model[1])
    parametrize.register_parametrization(model[1], "weight", Double())
    init_weights(model, scheme="lecun", seed=0, on_uncovered="raise")
    torch.testing.assert_close(model[1].weight.detach(), plain_weight())


@pytest.mark.parametrize("kind", WRAPS)
def test_every_original_is_in_the_report_and_a_seed_gives_the_same_again(kind):
    one, two = wrapped(kind), wrapped(kind)
    report = init_weights(one, scheme="he", seed=3)
    init_weights(two, scheme="he", seed=3)
    assert [entry.name for entry in report.entries] == [name for name, _ in one.named_parameters()]
    assert [entry.shape for entry in report.entries] == [tuple(p.shape) for p in one.parameters()]
    x = torch.randn(4, 8)
    one(x), two(x)  # the hooks compute
    masked = "prune" in kind  # the mask came from the weight that was there
    assert masked or torch.equal(one[1].weight, two[1].weight)
    (main,) = (e for e in report.entries if e.name.startswith("1.") and e.fan is not None)
    assert (main.rule, main.fan) == ("Linear", 16)
    assert main.measured_std == pytest.approx(one[1].weight.std().item(), rel=1e-2)


@pytest.mark.parametrize("kind", WRAPS)
def test_planning_changes_nothing_and_neither_does_a_dry_run(kind):
    model = wrapped(kind).train()
    before, random = state(model), torch.get_rng_state()
    weight = model[1].weight.detach().clone() if "old" in kind or "pruned" in kind else None
    plan_init(model, scheme="he", seed=0)
    init_weights(model, torch.randn(2, 8, generator=torch.Generator().manual_seed(0)), dry_run=True)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert weight is None or torch.equal(weight, model[1].weight)
    assert torch.equal(random, torch.get_rng_state())
    assert model.training


@pytest.mark.parametrize("kind", ["orthogonal", "spectral_norm"])
def test_applying_with_a_seed_leaves_the_random_state(kind):
    model, random = wrapped(kind), torch.get_rng_state()
    init_weights(model, scheme="he", seed=0)
    assert torch.equal(random, torch.get_rng_state())


REFUSED = {
    "no right_inverse": (
        lambda m: parametrize.register_parametrization(m, "weight", OneWay()),
        r"1\.parametrizations\.weight\.original \(its parametrization OneWay has no right_inverse",
    ),
    "refuses": (
        lambda m: parametrizations.orthogonal(m, orthogonal_map="cayley", use_trivialization=False),
        r"1\.parametrizations\.weight\.original \(its parametrization refuses values: NotImplementedError: It is not",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_assigned_is_named_and_left_alone(kind):
    wrap, message = REFUSED[kind]
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 16))
    wrap(model[1])
    before = model[1].weight.detach().clone()
    with pytest.warns(UserWarning, match=message):
        report = init_weights(model, scheme="he")
    assert torch.equal(model[1].weight, before)
    assert report.uncovered == ("1.parametrizations.weight.original",)
    assert not model[1].bias.any()


def test_frozen_and_skipped_ones_stay():
    model = wrapped("weight_norm")
    model[1].parametrizations.weight.original0.requires_grad_(False)
    before = model[1].weight.detach().clone()
    report = init_weights(model, scheme="he")
    assert {e.rule for e in report.entries if "parametrizations" in e.name} == {"frozen"}
    assert torch.equal(model[1].weight, before)
    for skip in (r"1\.weight", r".*\.original1"):
        model = wrapped("weight_norm")
        before = model[1].weight.detach().clone()
        init_weights(model, scheme="he", skip=skip)
        assert torch.equal(model[1].weight, before)


def test_an_override_by_the_name_of_the_weight():
    model = wrapped("weight_norm")
    init_weights(model, scheme="he", overrides={r"1\.weight": {"std": 0.5}}, seed=0)
    assert model[1].weight.std().item() == pytest.approx(0.5, rel=0.1)


def test_the_gates_of_a_recurrent_layer_under_weight_norm():
    model = nn.utils.weight_norm(nn.LSTM(4, 4), "weight_hh_l0")
    report = init_weights(model, scheme="he", seed=0, on_uncovered="raise")
    for gate in model.weight_hh_l0.detach().chunk(4):
        values = torch.linalg.svdvals(gate)
        torch.testing.assert_close(values, torch.ones(4), rtol=0, atol=1e-5)
    names = [entry.name for entry in report.entries]
    assert {"weight_hh_l0_g", "weight_hh_l0_v[forget]"} <= set(names)


def test_a_convolution_and_a_shared_module():
    shared = parametrizations.weight_norm(nn.Conv2d(4, 4, 3, padding=1))
    bare = nn.Conv2d(4, 4, 3, padding=1)
    report = init_weights(nn.Sequential(shared, nn.ReLU(), shared), scheme="he", seed=0)
    init_weights(nn.Sequential(bare, nn.ReLU(), bare), scheme="he", seed=0)
    torch.testing.assert_close(shared.weight.detach(), bare.weight.detach())
    assert [e.name for e in report.entries if e.rule == "uncovered"] == []
    assert any("tied: also 2.weight" in entry.note for entry in report.entries)


def test_a_net_of_weight_norms_keeps_the_signal():
    layers = [parametrizations.weight_norm(nn.Linear(256, 256)) for _ in range(20)]
    model = nn.Sequential(*(part for layer in layers for part in (layer, nn.ReLU())))
    x = torch.randn(32, 256)
    init_weights(model, x, seed=0)
    with torch.no_grad():
        assert 0.2 < 2 * model(x).square().mean().item() / 2 < 5
