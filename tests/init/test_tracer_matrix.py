"""One model for each thing that tracers stumble over: the weights in order of use, and the exact gain of each."""

import copy
import math
import re

import pytest
import torch
from measure import run
from samples import MATRIX

import lightning_gradhealth as gh
from lightning_gradhealth.layers import clean_name

HE = math.sqrt(2)
GELU, SILU, MISH, TANH = (gh.gain(name) for name in ("gelu", "silu", "mish", "tanh"))
GLU = gh.gain("sigmoid")  # E[(a sigmoid(b))^2] = E[a^2] E[sigmoid(b)^2], a and b independent, E[a^2] = 1
LEAKY, PRELU = gh.gain(torch.nn.LeakyReLU(0.2)), gh.gain(torch.nn.PReLU())
JOIN = 1 / math.sqrt((1 / 2 + 2 * TANH**-2 + 1) / 4)  # a quarter each of ReLU and the input, half of tanh
ENCODER = "layer.self_attn.in_proj_weight", "layer.self_attn.out_proj.weight"

# The weights in order of use, each with its gain sqrt(q / m): m is the second moment of what it reads, q the
# variance that it should give: 2 where nothing but ReLU follows (2 / (1 + a^2) for a leaky one), else 1. None: no
# closed form.
EXPECTED: dict[str, dict[str, float | None]] = {
    "modules": {
        "0.weight": HE,
        "2.weight": 1,
        "4.weight": GELU,
        "6.weight": SILU,
        "8.weight": MISH,
        "10.weight": 1,
    },
    "functional": {
        "a.weight": 1,
        "b.weight": GELU,
        "c.weight": TANH * LEAKY,
        "d.weight": 1,
        "head.weight": 1,
    },
    "in_place": {"stem.weight": HE, "up.weight": HE, "down.weight": 1, "head.weight": 1},
    "silu_by_hand": {"layers.0.weight": 1, "layers.1.weight": SILU, "layers.2.weight": 1},
    "autograd_function": {"layers.0.weight": 1, "layers.1.weight": SILU, "layers.2.weight": 1},
    "glu": {"layers.0.weight": 1, "layers.1.weight": GLU, "layers.2.weight": 1},
    "where": {"layers.0.weight": HE, "layers.1.weight": HE, "layers.2.weight": 1},
    "views": {"a.weight": HE, "b.weight": HE, "head.weight": 1},
    "raw_parameters": {"mix": HE, "back": HE, "channel": HE, "heads": 1},
    "tied_and_shared": {"a.weight": HE, "shared.weight": HE, "head.weight": 1},
    "checkpoint": {"stem.weight": 1, "body.0.weight": GELU, "body.2.weight": SILU * HE, "head.weight": 1},
    "checkpoint_reentrant": {"stem.weight": 1, "body.0.weight": GELU, "body.2.weight": SILU * HE, "head.weight": 1},
    "compiled": {"stem.weight": 1, "body.0.weight": GELU, "body.2.weight": SILU * HE, "head.weight": 1},
    "scripted": {"stem.weight": 1, "body.0.weight": GELU, "body.2.weight": SILU * HE, "head.weight": 1},
    "lstm": {"stem.weight": HE, "rnn.weight_ih_l0": None, "rnn.weight_ih_l1": None, "head.weight": 1},
    "gru": {"stem.weight": HE, "rnn.weight_ih_l0": None, "rnn.weight_ih_l1": None, "head.weight": 1},
    "attention": {
        "stem.weight": 1,
        "attention.in_proj_weight": 1,
        "attention.out_proj.weight": None,
        "cross.q_proj_weight": None,
        "cross.k_proj_weight": 1,
        "cross.v_proj_weight": 1,
        "cross.out_proj.weight": None,
        "head.weight": 1,
    },
    "encoder_layer": {
        "stem.weight": 1,
        **dict.fromkeys(ENCODER),
        "layer.linear1.weight": HE,
        "layer.linear2.weight": 1,
        "head.weight": 1,
    },
    "encoder_layer_batch_first": {
        "stem.weight": 1,
        **dict.fromkeys(ENCODER),
        "layer.linear1.weight": 1,
        "layer.linear2.weight": GELU,
        "head.weight": 1,
    },
    "dynamic_if": {"left.weight": 1, "head.weight": 1},
    "dictionaries": {"image.weight": HE, "text.weight": HE, "head.weight": 1},
    "branches": {"a.weight": 1, "b.weight": 1, "join.weight": JOIN, "head.weight": 1},
    "positions": {"branch.weight": 1, "head.weight": 1},
    "supervised": {"body.weight": HE, "head.weight": 1},
    "frozen": {"layers.1.weight": None, "layers.2.weight": 1},
    "dropout_and_norm": {"0.weight": 1, "4.weight": None, "8.weight": 1},
    "prelu": {"layers.0.weight": PRELU, "layers.1.weight": PRELU, "layers.2.weight": 1},
}
every_model = pytest.mark.parametrize("name", MATRIX)


def test_every_model_has_its_expectation():
    assert set(EXPECTED) == set(MATRIX)


def made(name):
    torch.manual_seed(0)
    try:
        return MATRIX[name].make(), MATRIX[name].inputs()
    except RuntimeError as error:
        if name in ("compiled", "scripted"):
            pytest.skip(f"not available here: {error}")
        raise


@every_model
def test_the_weights_in_order_of_use(name):
    model, inputs = made(name)
    report = gh.init_weights(model, inputs, seed=0)
    expected = EXPECTED[name]
    assert [point.name for point in report.depth if point.name in expected] == list(expected)
    names = {clean_name(n) for n, _ in model.named_parameters()}
    assert {point.name for point in report.depth} <= names
    assert {re.sub(r"\[.*\]$", "", entry.name) for entry in report.entries} == names
    assert not report.uncovered


@every_model
def test_the_gains_are_those_of_quadrature(name):
    model, inputs = made(name)
    report = gh.init_weights(model, inputs, seed=0)
    expected = {key: gain for key, gain in EXPECTED[name].items() if gain is not None}
    found = {}
    for entry in report.entries:
        key = re.sub(r"\[.*\]$", "", entry.name)
        if key in expected:
            found[entry.name] = (entry.gain, pytest.approx(expected[key], rel=0.01))
    assert {re.sub(r"\[.*\]$", "", key) for key in found} == set(expected)
    assert {key: gain for key, (gain, _) in found.items()} == {key: right for key, (_, right) in found.items()}


@every_model
def test_the_source_is_told(name):
    model, inputs = made(name)
    source = gh.init_weights(model, inputs, seed=0).source
    assert source == ("trace (real batch)" if name == "dynamic_if" else "trace (fake tensors)")


@every_model
def test_looking_changes_nothing(name):
    model, inputs = made(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    given = copy.deepcopy(inputs)
    random = torch.get_rng_state()
    report = gh.init_weights(model, inputs, seed=0, dry_run=True)
    assert not report.applied
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in model.modules()] == modes
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert same(inputs, given)


def same(left, right):
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # the compiler's own affair
@every_model
def test_the_model_still_runs_and_learns(name):
    model, inputs = made(name)
    gh.init_weights(model, inputs, seed=0)
    output = run(model, inputs)
    output = output["logits"] if isinstance(output, dict) else output
    assert 0.1 < output.square().mean().sqrt().item() < 4
    output.square().mean().backward()
    gradients = [p.grad for n, p in model.named_parameters() if p.requires_grad and not n.startswith("right")]
    assert all(g is not None and g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("name", ["modules", "raw_parameters", "tied_and_shared", "encoder_layer", "lstm"])
def test_two_looks_agree(name):
    reports = [gh.init_weights(model, inputs, seed=0) for model, inputs in (made(name), made(name))]
    assert reports[0] == reports[1]
