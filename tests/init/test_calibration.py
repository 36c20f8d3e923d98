"""One pass over a batch brings every weight's output to its target, and changes nothing but the weights."""

import math

import pytest
import torch
from calls import Calls, table
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence

import lightning_gradhealth as gh


def variances(model, x):
    """Of what every Linear and convolution gives without its bias, at its first use; batch norms by their batch."""
    found, flags = {}, {m: m.training for m in model.modules()}
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train()

    def hook(module, args, out, name):
        bias = 0 if module.bias is None else module.bias.reshape(-1, *[1] * len(getattr(module, "kernel_size", ())))
        found.setdefault(name, float((out - bias).double().var(correction=0)))

    kinds = (nn.Linear, nn.modules.conv._ConvNd)
    handles = [
        m.register_forward_hook(lambda m, a, out, n=f"{n}.weight": hook(m, a, out, n))
        for n, m in model.named_modules()
        if isinstance(m, kinds)
    ]
    with torch.no_grad():
        model(*x) if isinstance(x, tuple) else model(x)
    for handle in handles:
        handle.remove()
    for module, flag in flags.items():
        module.training = flag
    return found


NETS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 9), nn.Tanh(), nn.Linear(9, 3)), (20, 6)),
    "narrow": (lambda: nn.Sequential(*(m for _ in range(12) for m in (nn.Linear(5, 5), nn.Tanh()))), (7, 5)),
    "biased": (lambda: nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 4)), (20, 6)),
    "zero padded": (
        lambda: nn.Sequential(*(m for _ in range(6) for m in (nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()))),
        (3, 4, 5, 5),
    ),
    "transposed": (
        lambda: nn.Sequential(nn.ConvTranspose1d(4, 6, 4, stride=2), nn.GELU(), nn.Conv1d(6, 6, 3, groups=3)),
        (3, 4, 9),
    ),
    "batch norm": (
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(54, 3)),
        (8, 4, 5, 5),
    ),
    "dropout": (lambda: nn.Sequential(nn.Linear(6, 9), nn.Dropout(0.5), nn.ReLU(), nn.Linear(9, 3)), (20, 6)),
    "vectors": (lambda: nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 30)), (6,)),
    "attention": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (3, 5, 8)),
    "checkpoint": (
        lambda: Calls(
            lambda self, x: torch.utils.checkpoint.checkpoint(self.body, x, use_reentrant=False),
            body=nn.Sequential(nn.Linear(6, 9), nn.SiLU(), nn.Linear(9, 3)),
        ),
        (20, 6),
    ),
}


@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize("scheme", ["auto", "orthogonal"])
@pytest.mark.parametrize("name", NETS)
def test_every_output_has_its_target(name, scheme, scale):
    make, shape = NETS[name]
    model, x = make(), scale * torch.randn(shape) + 0.3
    if name == "biased":
        nn.init.constant_(model[0].bias, 5.0)  # on purpose, so that it stays
    report = gh.init_weights(model, x, scheme=scheme, seed=0, calibrate=x)
    if name == "biased" and scheme == "auto":
        assert bool((model[0].bias == 5).all())
    found = variances(model, x)
    targets = {point.name: point.target**2 for point in report.depth}
    assert found
    for key, value in found.items():
        assert value == pytest.approx(targets[key], rel=0.02), key
    for point in report.depth:
        if point.name in found:
            assert point.after == pytest.approx(math.sqrt(found[point.name]), rel=1e-3)


def test_weights_are_only_rescaled():
    make, shape = NETS["zero padded"]
    plain, model, x = make(), make(), torch.randn(shape)
    gh.init_weights(plain, x, seed=0)
    report = gh.init_weights(model, x, seed=0, calibrate=x)
    first = variances(plain, x)["0.weight"]
    assert report.depth[0].before == pytest.approx(first**0.5, rel=1e-4)
    for a, b in zip(plain.parameters(), model.parameters(), strict=True):
        ratio = (b / a)[a != 0]
        assert ratio.numel() == 0 or float(ratio.detach().std()) < 1e-5 * float(ratio.detach().mean())
        assert torch.equal(a == 0, b == 0)


@pytest.mark.parametrize("training", [True, False])
def test_nothing_else_is_changed(training):
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(54, 8),
        nn.BatchNorm1d(8, momentum=None),
        nn.Linear(8, 2),
    ).train(training)
    model[3].train()
    x = torch.randn(5, 3, 5, 5)
    given, flags = x.clone(), [m.training for m in model.modules()]
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    state = torch.get_rng_state()
    gh.init_weights(model, x, seed=0, calibrate=x)
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == flags
    assert all(torch.equal(value, buffers[name]) for name, value in model.named_buffers())
    assert torch.equal(x, given)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_dropout_is_off_while_it_measures():
    """Else the second weight would be measured on twice the variance of what it reads."""
    seen = []
    model = nn.Sequential(
        nn.Linear(6, 6), nn.Dropout(0.5), Calls(lambda self, x: seen.append(self.training) or x), nn.Linear(6, 6)
    )
    gh.init_weights(model, torch.randn(9, 6), seed=0, calibrate=torch.randn(9, 6))
    assert seen
    assert not any(seen)
    assert model[1].training


def test_what_is_kept_or_chosen_is_not_calibrated():
    model = nn.Sequential(*(m for _ in range(5) for m in (nn.Linear(6, 6), nn.ReLU())), nn.Linear(6, 2))
    for p in model[0].parameters():
        p.requires_grad_(False)
    with torch.no_grad():
        model[0].weight.mul_(3)
    before = {i: model[i].weight.detach().clone() for i in (0, 2)}
    x = torch.randn(30, 6)
    overrides = {r"4\.weight": {"std": 0.02}, r"6\.weight": {"value": 0.1}}
    report = gh.init_weights(model, x, seed=0, calibrate=x, skip=r"2\.weight", overrides=overrides)
    assert all(torch.equal(model[i].weight, value) for i, value in before.items())
    entry = next(e for e in report.entries if e.name == "4.weight")
    assert entry.measured_std == pytest.approx(0.02, rel=0.5)
    assert bool((model[6].weight == 0.1).all())
    found = variances(model, x)
    assert [found[f"{i}.weight"] for i in (8, 10)] == pytest.approx([1, 1], rel=0.02)


def test_a_weight_used_twice_is_settled_by_its_first_use():
    model = Calls(lambda self, x: self.head(F.relu(self.a(F.relu(self.a(x))))), a=nn.Linear(6, 6), head=nn.Linear(6, 2))
    x = 10 * torch.randn(30, 6)
    gh.init_weights(model, x, seed=0, calibrate=x)
    with torch.no_grad():
        first = F.linear(x, model.a.weight)
        last = model.head(F.relu(model.a(F.relu(model.a(x)))))
    assert float(first.var(correction=0)) == pytest.approx(1, rel=0.02)
    assert float(last.var(correction=0)) == pytest.approx(1, rel=0.02)


def test_raw_parameters_and_residual_factors():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = table(8, 16), table(16, 8)

        def forward(self, x):
            self.z = F.gelu(x @ self.up) @ self.down
            return x + self.z

    model, x = nn.Sequential(nn.Linear(8, 8), *(Block() for _ in range(4))), torch.randn(40, 8)
    report = gh.init_weights(model, x, seed=0, calibrate=x)
    assert report.residual == "depth"
    with torch.no_grad():
        model(x)
    for block in list(model)[1:]:
        assert float(block.z.var(correction=0)) == pytest.approx(1 / 8, rel=0.02)
    zeroed = nn.Sequential(nn.Linear(8, 8), *(Block() for _ in range(2)))
    gh.init_weights(zeroed, x, seed=0, calibrate=x, residual="zero_last")
    assert not any(block.down.any() for block in list(zeroed)[1:])
    assert all(p.isfinite().all() for p in zeroed.parameters())


@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, nn.utils.weight_norm])
def test_weight_norm_is_written_through(wrap):
    model = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), wrap(nn.Linear(9, 9)), nn.ReLU(), nn.Linear(9, 2))
    x = 7 * torch.randn(30, 6)
    report = gh.init_weights(model, x, seed=0, calibrate=x)
    assert list(variances(model, x).values()) == pytest.approx([1, 1, 1], rel=0.02)
    assert not any("not calibrated" in e.note for e in report.entries)


@pytest.mark.parametrize("wrap", [parametrizations.spectral_norm, parametrizations.orthogonal])
def test_a_parametrization_with_a_scale_of_its_own_is_told(wrap):
    model = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), wrap(nn.Linear(9, 9)), nn.ReLU(), nn.Linear(9, 2))
    x = 7 * torch.randn(30, 6)
    report = gh.init_weights(model, x, seed=0, calibrate=x)
    told = [e.name for e in report.entries if "not calibrated: its parametrization keeps a scale of its own" in e.note]
    assert told == ["2.parametrizations.weight.original"]
    found = variances(model, x)
    assert [found[f"{i}.weight"] for i in (0, 4)] == pytest.approx([1, 1], rel=0.02)


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
@pytest.mark.parametrize("how", ["plain", "bidirectional", "packed", "keyword", "batch first"])
def test_the_input_weights_of_recurrent_layers(kind, how):
    rnn = kind(5, 16, num_layers=2, bidirectional=how == "bidirectional", batch_first=how == "batch first")

    def forward(self, x):
        if how == "packed":
            return self.rnn(pack_padded_sequence(x, torch.full((x.shape[1],), len(x))))[0].data
        return (self.rnn(input=x) if how == "keyword" else self.rnn(x))[0]

    model, x = Calls(forward, rnn=rnn), 20 * torch.randn(7, 7, 5)
    report = gh.init_weights(model, x, seed=0, calibrate=x)
    first = F.linear(x, rnn.weight_ih_l0.detach())
    assert float(first.var(correction=0)) == pytest.approx(1, rel=0.02)
    one = kind(5, 16, bidirectional=rnn.bidirectional, batch_first=rnn.batch_first)
    with torch.no_grad():
        for name, parameter in one.named_parameters():
            parameter.copy_(getattr(rnn, name))
        second = F.linear(one(x)[0], rnn.weight_ih_l1)
    assert float(second.var(correction=0)) == pytest.approx(1, rel=0.02)
    wanted = {f"rnn.{name}" for name, _ in rnn.named_parameters() if name.startswith("weight_ih")}
    assert wanted <= {point.name for point in report.depth if point.after == pytest.approx(1, rel=0.02)}


def test_cells_in_a_loop():
    def forward(self, x):
        h = torch.zeros(len(x), 6)
        for step in x.unbind(1):
            h = self.cell(step, h)
        return self.head(h)

    model, x = Calls(forward, cell=nn.GRUCell(5, 6), head=nn.Linear(6, 2)), 9 * torch.randn(40, 4, 5)
    gh.init_weights(model, x, seed=0, calibrate=x)
    first = F.linear(x[:, 0], model.cell.weight_ih.detach())
    assert float(first.var(correction=0)) == pytest.approx(1, rel=0.02)
    assert variances(model, x)["head.weight"] == pytest.approx(1, rel=0.02)


def test_an_input_of_zeros_is_told_and_leaves_the_draw():
    model, plain = (nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 2)) for _ in range(2))
    report = gh.init_weights(model, torch.zeros(4, 6), seed=0, calibrate=torch.zeros(4, 6))
    gh.init_weights(plain, torch.zeros(4, 6), seed=0)
    told = [e.name for e in report.entries if "not calibrated: its output does not vary on the batch" in e.note]
    assert told == ["0.weight", "2.weight"]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


def test_a_weight_that_the_batch_does_not_reach_is_told():
    model = Calls(lambda self, x, other=False: self.b(x) if other else self.a(x), a=nn.Linear(4, 4), b=nn.Linear(4, 4))
    report = gh.init_weights(model, {"x": torch.randn(8, 4)}, seed=0, calibrate={"x": torch.randn(8, 4), "other": True})
    told = [e.name for e in report.entries if "not calibrated: not used as a weight in the forward pass" in e.note]
    assert told == ["a.weight"]


def test_the_batch_serves_as_the_sample_and_may_be_of_another_size():
    model, x = nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 2)), torch.randn(30, 6)
    report = gh.init_weights(model, seed=0, calibrate=(x,))
    assert report.source == "trace (fake tensors)"
    gh.init_weights(model, torch.randn(2, 6), seed=0, calibrate=x)
    assert list(variances(model, x).values()) == pytest.approx([1, 1], rel=0.02)


def test_errors():
    model, x = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 2)), torch.randn(3, 6)
    flags, hooks = [m.training for m in model.modules()], lambda: [len(m._forward_hooks) for m in model.modules()]
    before = hooks()
    with pytest.raises(ValueError, match=r"calibrate must be a batch that goes through model\.forward: RuntimeError"):
        gh.init_weights(model, x, seed=0, calibrate=torch.randn(3, 7))
    assert [m.training for m in model.modules()] == flags
    assert hooks() == before
    with pytest.raises(ValueError, match="calibrate must be None to bind a plan"):
        gh.plan_init(model, x, seed=0, calibrate=x).bind()
    with torch.device("meta"):
        meta = nn.Linear(6, 2)
    with pytest.raises(ValueError, match=r"on the meta device; use plan_init\(...\).bind"):
        gh.init_weights(meta, x, seed=0, calibrate=x)


def test_a_plan_is_applied_later_and_a_dry_run_measures_nothing():
    model, x = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 2)), 50 * torch.randn(30, 6)
    before = [p.clone() for p in model.parameters()]
    report = gh.init_weights(model, x, seed=0, calibrate=x, dry_run=True)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(point.after is None for point in report.depth)
    plan = gh.plan_init(model, x, seed=0, calibrate=x)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    plan.apply()
    assert list(variances(model, x).values()) == pytest.approx([1, 1], rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions(dtype):
    model, x = (
        nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)).to(dtype),
        torch.randn(64, 32, dtype=dtype),
    )
    gh.init_weights(model, x, seed=0, calibrate=x)
    assert list(variances(model, x).values()) == pytest.approx([1, 1], rel=0.02)
