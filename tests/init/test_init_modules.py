"""What `init_weights` does to each kind of module: variances, laws, gates, projections."""

import itertools
import math

import pytest
import torch
from scipy import stats
from torch import nn

from lightning_gradhealth.init import fans, init_weights
from lightning_gradhealth.init.schemes import DISTRIBUTIONS, TRUNCATED_STD

LAWS = {
    "normal": stats.norm(),
    "uniform": stats.uniform(-math.sqrt(3), 2 * math.sqrt(3)),
    "truncated_normal": stats.truncnorm(-2, 2, scale=1 / TRUNCATED_STD),
}
SQUARE_GAIN = {"he": 2.0, "xavier": 1.0, "lecun": 1.0}
MODE = {"he": "fan_in", "xavier": "fan_avg", "lecun": "fan_in"}
MODULES = {
    "linear": lambda: nn.Linear(300, 250),
    "conv1d": lambda: nn.Conv1d(128, 256, 3),
    "conv2d": lambda: nn.Conv2d(64, 128, 3),
    "conv3d": lambda: nn.Conv3d(32, 96, 3),
    "conv2d_grouped": lambda: nn.Conv2d(256, 256, 3, groups=4),
    "conv2d_depthwise": lambda: nn.Conv2d(4096, 4096, 5, groups=4096),
    "conv2d_strided": lambda: nn.Conv2d(64, 128, 3, stride=2),
    "conv_transpose1d": lambda: nn.ConvTranspose1d(128, 160, 4, stride=2),
    "conv_transpose2d": lambda: nn.ConvTranspose2d(64, 80, 4, stride=2, groups=2),
    "conv_transpose3d": lambda: nn.ConvTranspose3d(32, 32, 4, stride=2),
    "bilinear": lambda: nn.Bilinear(40, 50, 40),
}
every_draw = pytest.mark.parametrize("distribution", DISTRIBUTIONS)
every_scheme = pytest.mark.parametrize("scheme", SQUARE_GAIN)


def check_draw(values, variance, distribution):
    assert values.numel() > 40_000
    assert values.var().item() == pytest.approx(variance, rel=0.03)
    numbers = values.detach().double().flatten().numpy() / math.sqrt(variance)
    assert stats.kstest(numbers, LAWS[distribution].cdf).pvalue > 1e-4
    if distribution == "truncated_normal":
        assert abs(numbers).max() <= 2 / TRUNCATED_STD * (1 + 1e-6)


def check_singular_values(matrix):
    values = torch.linalg.svdvals(matrix.detach().double())
    torch.testing.assert_close(values, torch.ones_like(values), rtol=0, atol=1e-5)


@every_scheme
@every_draw
@pytest.mark.parametrize("kind", MODULES)
def test_weighted_modules(kind, scheme, distribution):
    module = MODULES[kind]()
    report = init_weights(module, scheme=scheme, distribution=distribution, seed=1)
    variance = SQUARE_GAIN[scheme] / fans(module).fan(MODE[scheme])
    check_draw(module.weight, variance, distribution)
    assert not module.bias.any()
    entry = report.entries[0]
    assert entry.target_std == pytest.approx(math.sqrt(variance))
    assert entry.measured_std == pytest.approx(module.weight.std().item())


@every_scheme
@every_draw
@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_embeddings_have_unit_variance(kind, scheme, distribution):
    module = kind(500, 200)
    init_weights(module, scheme=scheme, distribution=distribution, seed=1)
    check_draw(module.weight, 1.0, distribution)


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
@pytest.mark.parametrize("padding", [0, 3, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_padding_row_is_kept_exactly(kind, padding, dtype):
    module = kind(10, 4, padding_idx=padding, dtype=dtype)
    with torch.no_grad():
        module.weight[padding] = torch.tensor([0.1, -0.0, 1e-30, 7.0], dtype=dtype)
    before = module.weight[padding].detach().clone()
    report = init_weights(module, scheme="he", seed=0)
    assert torch.equal(module.weight[padding], before)
    assert report.entries[0].note == f"row {padding % 10}, the padding, is kept"
    other = kind(10, 4, dtype=dtype)
    init_weights(other, scheme="he", seed=0)
    rest = [row for row in range(10) if row != padding % 10]
    assert torch.equal(module.weight[rest], other.weight[rest])


RECURRENT = {
    "rnn": (nn.RNN, 1),
    "gru": (nn.GRU, 3),
    "lstm": (nn.LSTM, 4),
    "rnn_cell": (nn.RNNCell, 1),
    "gru_cell": (nn.GRUCell, 3),
    "lstm_cell": (nn.LSTMCell, 4),
}


@every_scheme
@every_draw
@pytest.mark.parametrize("kind", RECURRENT)
def test_recurrent_layers_gate_by_gate(kind, scheme, distribution):
    make, gates = RECURRENT[kind]
    module = make(400, 128)
    init_weights(module, scheme=scheme, distribution=distribution, seed=2)
    for name, parameter in module.named_parameters():
        blocks = parameter.detach().chunk(gates)
        if "weight_ih" in name:
            variance = 1 / (400 if MODE[scheme] == "fan_in" else (400 + 128) / 2)
            for block in blocks:
                check_draw(block, variance, distribution)
        elif "weight_hh" in name:
            for block in blocks:
                assert block.shape == (128, 128)
                check_singular_values(block)
            for first, second in itertools.pairwise(blocks):
                assert not torch.equal(first, second)
        else:
            expected = torch.zeros(gates, 128)
            if gates == 4 and "bias_ih" in name:
                expected[1] = 1.0
            assert torch.equal(parameter.detach(), expected.flatten())


def test_deep_bidirectional_lstm_with_projection():
    module = nn.LSTM(6, 8, num_layers=2, bidirectional=True, proj_size=5)
    report = init_weights(module, scheme="xavier", seed=0)
    assert not report.uncovered
    parameters = dict(module.named_parameters())
    for suffix in ("l0", "l0_reverse", "l1", "l1_reverse"):
        check_singular_values(parameters[f"weight_hr_{suffix}"])
        for block in parameters[f"weight_hh_{suffix}"].detach().chunk(4):
            check_singular_values(block)
        total = (parameters[f"bias_ih_{suffix}"] + parameters[f"bias_hh_{suffix}"]).detach().chunk(4)
        assert [bias.unique().tolist() for bias in total] == [[0.0], [1.0], [0.0], [0.0]]
    names = [entry.name for entry in report.entries]
    assert names[:4] == [f"weight_ih_l0[{gate}]" for gate in ("input", "forget", "cell", "output")]
    assert "bias_ih_l1_reverse[forget]" in names
    by_name = {entry.name: entry for entry in report.entries}
    assert by_name["weight_ih_l1[cell]"].fan == (10 + 8) / 2
    assert by_name["weight_ih_l1[cell]"].shape == (8, 10)


def test_without_biases():
    assert not init_weights(nn.LSTM(3, 4, bias=False), scheme="he").uncovered
    assert not init_weights(nn.Linear(3, 4, bias=False), scheme="he").uncovered
    assert not init_weights(nn.MultiheadAttention(4, 2, bias=False), scheme="he").uncovered


@every_scheme
@every_draw
def test_packed_attention_projection_by_projection(scheme, distribution):
    module = nn.MultiheadAttention(256, 4)
    with torch.no_grad():
        module.in_proj_bias.fill_(1.0)
    report = init_weights(module, scheme=scheme, distribution=distribution, seed=0)
    for block in (*module.in_proj_weight.chunk(3), module.out_proj.weight):
        check_draw(block, 1 / 256, distribution)
    assert not module.in_proj_bias.any()
    assert not module.out_proj.bias.any()
    assert [entry.name for entry in report.entries] == [
        "in_proj_weight[query]",
        "in_proj_weight[key]",
        "in_proj_weight[value]",
        "in_proj_bias",
        "out_proj.weight",
        "out_proj.bias",
    ]
    assert {entry.rule for entry in report.entries} == {"MultiheadAttention"}


@every_scheme
def test_separate_attention_projections(scheme):
    module = nn.MultiheadAttention(256, 4, kdim=200, vdim=300, add_bias_kv=True)
    report = init_weights(module, scheme=scheme, seed=0)
    for name, size in (("q", 256), ("k", 200), ("v", 300)):
        fan = size if MODE[scheme] == "fan_in" else (size + 256) / 2
        check_draw(getattr(module, f"{name}_proj_weight"), 1 / fan, "normal")
    assert not report.uncovered
    assert {e.target_std for e in report.entries if e.name in ("bias_k", "bias_v")} == {1 / 16}


@pytest.mark.parametrize(
    "module",
    [
        nn.BatchNorm1d(4),
        nn.BatchNorm2d(4),
        nn.BatchNorm3d(4),
        nn.SyncBatchNorm(4),
        nn.InstanceNorm1d(4, affine=True),
        nn.InstanceNorm2d(4, affine=True),
        nn.InstanceNorm3d(4, affine=True),
        nn.LayerNorm(4),
        nn.LayerNorm((4, 3), bias=False),
        nn.GroupNorm(2, 4),
        nn.RMSNorm(4),
    ],
    ids=lambda module: type(module).__name__,
)
def test_norm_layers_start_neutral_and_keep_their_statistics(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(5.0)
        for buffer in module.buffers():
            buffer.fill_(3)
    assert not init_weights(module, scheme="he").uncovered
    assert (module.weight == 1).all()
    assert getattr(module, "bias", None) is None or not module.bias.any()
    assert all((buffer == 3).all() for buffer in module.buffers())


def test_prelu_is_kept():
    module = nn.PReLU(3, init=0.4)
    (entry,) = init_weights(module, scheme="he").entries
    assert (module.weight == 0.4).all()
    assert (entry.rule, entry.scheme) == ("PReLU", "kept")
    assert "slopes" in entry.note


def test_transformer_layers_are_drawn_each_anew():
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0)
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    assert torch.equal(model.layers[0].linear1.weight, model.layers[1].linear1.weight)  # torch clones them
    report = init_weights(model, scheme="xavier", seed=0)
    assert not report.uncovered
    for part in ("linear1.weight", "linear2.weight", "self_attn.in_proj_weight", "self_attn.out_proj.weight"):
        first, second, third = (layer.get_parameter(part) for layer in model.layers)
        assert not torch.equal(first, second)
        assert not torch.equal(second, third)


class MyLinear(nn.Linear):
    pass


def test_subclasses_match():
    model = nn.Sequential(MyLinear(300, 300))
    (weight, _) = init_weights(model, scheme="he", seed=0).entries
    assert (weight.rule, weight.module) == ("Linear", "MyLinear")


def relu_stack(depth=30, width=512):
    return nn.Sequential(*(nn.Sequential(nn.Linear(width, width, bias=False), nn.ReLU()) for _ in range(depth)))


@torch.no_grad()
def test_thirty_relu_layers_keep_the_signal():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, x = relu_stack(), torch.randn(64, 512)
    assert model(x).square().mean().item() < 1e-15  # torch's own default
    for distribution in DISTRIBUTIONS:
        init_weights(model, scheme="he", distribution=distribution, seed=0)
        # E[z^2] = 2 E[relu(z)^2]: the stack ends behind a ReLU
        assert 0.3 < 2 * model(x).square().mean().item() < 3


@pytest.mark.parametrize("activation", [nn.GELU(), nn.ELU(), nn.LeakyReLU(0.3), nn.SiLU()])
@torch.no_grad()
def test_the_gain_of_the_activation_keeps_one_layers_variance(activation):
    layer = nn.Linear(2000, 500, bias=False)
    init_weights(layer, scheme="he", nonlinearity=activation, seed=0)
    z = torch.randn(200, 2000, generator=torch.Generator().manual_seed(0))
    assert layer(activation(z)).square().mean().item() == pytest.approx(1, rel=0.03)
