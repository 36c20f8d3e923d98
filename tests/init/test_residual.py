"""Residual branches: found at the additions, counted by block, and scaled as papers say."""

import math

import pytest
import torch
from calls import Calls
from torch import nn
from torch.nn import functional as F

import lightning_gradhealth as gh
from lightning_gradhealth.init.replay import Replayer
from lightning_gradhealth.init.residual import blocks, factors, find_branches, resolve
from lightning_gradhealth.tracing import Graph, trace

WIDTH = 8


class Residual(nn.Module):
    """x + body(x), and variations of it."""

    def __init__(self, body, shortcut=None, pre=None, post=None, gate=None):
        super().__init__()
        self.body, self.shortcut, self.pre, self.post = body, shortcut, pre, post
        self.gate = None if gate is None else nn.Parameter(torch.tensor(gate))

    def forward(self, x):
        h = self.body(x if self.pre is None else self.pre(x))
        h = h if self.gate is None else self.gate * h
        x = (x if self.shortcut is None else self.shortcut(x)) + h
        return x if self.post is None else self.post(x)


def layer(inputs=WIDTH, outputs=WIDTH):
    return nn.Linear(inputs, outputs)


def two_layers():
    return nn.Sequential(layer(), nn.ReLU(), layer())


def net(make, number=4):
    return nn.Sequential(layer(), *(make() for _ in range(number)), layer())


def branches_of(model, x):
    graph = Graph(trace(model, x))
    found = find_branches(graph, Replayer(graph))
    names = {id(p): name for name, p in model.named_parameters()}

    def named(stations):
        return [names[id(graph.trace.parameters[graph.stations[s].parameters[-1]])] for s in stations]

    return found, named


ROWS = torch.randn(6, WIDTH)


@pytest.mark.parametrize(
    ("make", "normed", "gated"),
    [
        (lambda: Residual(two_layers()), False, False),
        (lambda: Residual(two_layers(), pre=nn.LayerNorm(WIDTH)), True, False),
        (lambda: Residual(two_layers(), post=nn.LayerNorm(WIDTH)), True, False),
        (lambda: Residual(nn.Sequential(nn.ReLU(), layer(), nn.ReLU(), layer())), False, False),
        (lambda: Residual(nn.Sequential(*two_layers(), nn.BatchNorm1d(WIDTH))), True, False),
        (lambda: Residual(two_layers(), shortcut=layer()), False, False),
        (lambda: Residual(two_layers(), gate=0.0), False, True),
        (lambda: Residual(two_layers(), gate=[1e-5] * WIDTH), False, True),
        (lambda: Residual(two_layers(), pre=lambda x: x * torch.rsqrt(x.square().mean(-1, True) + 1e-6)), True, False),
        (lambda: Residual(nn.Sequential(*two_layers(), nn.Dropout(0.1))), False, False),
        (lambda: Residual(nn.Sequential(*two_layers(), nn.Unflatten(1, (2, 4)), nn.Flatten())), False, False),
    ],
    ids=[
        "plain",
        "pre-LN",
        "post-LN",
        "pre-act",
        "norm last",
        "projection",
        "ReZero",
        "LayerScale",
        "rms by hand",
        "dropout",
        "views",
    ],
)
def test_branches_of_common_kinds(make, normed, gated):
    model = net(make)
    found, named = branches_of(model, ROWS)
    assert len(found) == 4
    assert blocks(found) == 4
    assert {(branch.normed, branch.gated) for branch in found} == {(normed, gated)}
    ends = [name for branch in found for name in named(branch.last)]
    last_of_body = [
        [name for name, p in block.named_parameters(prefix=str(i + 1)) if p.dim() == 2 and ".body" in f".{name}"][-1]
        for i, block in enumerate(list(model)[1:-1])
    ]
    assert ends == last_of_body
    assert resolve("auto", found) == ("none" if normed or gated else "depth")


def unrolled_cell(self, x):
    h, c = torch.zeros(len(x), WIDTH), torch.zeros(len(x), WIDTH)
    for step in x.unbind(1):
        i, f, g, o = (self.x(step) + self.h(h)).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
    return self.head(h)


def unet(self, x):
    top = F.relu(self.a(x))
    low = F.relu(self.b(top))
    return self.c(torch.cat([top, low], -1))


def dense(self, x):
    for part in (self.a, self.b):
        x = torch.cat([x, F.relu(part(x))], -1)
    return self.c(x)


@pytest.mark.parametrize(
    ("model", "x"),
    [
        (nn.Sequential(layer(), nn.ReLU(), layer()), ROWS),
        (
            Calls(unrolled_cell, x=layer(outputs=4 * WIDTH), h=layer(outputs=4 * WIDTH), head=layer()),
            torch.randn(2, 5, WIDTH),
        ),
        (Calls(unet, a=layer(), b=layer(), c=layer(2 * WIDTH)), ROWS),
        (Calls(dense, a=layer(), b=layer(2 * WIDTH), c=layer(4 * WIDTH)), ROWS[:, :WIDTH]),
        (Calls(lambda self, x: self.a(x) + self.b(x), a=layer(), b=layer()), ROWS),
        (Calls(lambda self, x: self.a(x[:, :4]) + self.b(x[:, 4:]), a=layer(4), b=layer(4)), ROWS),
        (nn.LSTM(WIDTH, WIDTH), ROWS),
    ],
    ids=["mlp", "lstm cell in a loop", "unet", "densenet", "siblings", "two towers", "lstm"],
)
def test_what_is_no_residual_net(model, x):
    if isinstance(model, Calls) and model.function is dense:
        model.b, model.c = layer(2 * WIDTH, 2 * WIDTH), layer(4 * WIDTH)
    assert branches_of(model, x)[0] == []
    assert gh.plan_init(model, x, seed=0).report.residual == "none"


class Parallel(nn.Module):
    """Attention and MLP side by side, as in GPT-J."""

    def __init__(self, norm):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH) if norm else nn.Identity()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.up, self.down = layer(outputs=32), layer(32)

    def forward(self, x):
        h = self.norm(x)
        return x + self.attention(h, h, h)[0] + self.down(F.gelu(self.up(h)))


@pytest.mark.parametrize("norm", [True, False])
def test_parallel_branches_are_two_of_one_block(norm):
    model = nn.Sequential(layer(), *(Parallel(norm) for _ in range(3)), layer())
    found, named = branches_of(model, torch.randn(2, 5, WIDTH))
    assert sorted(name for branch in found for name in named(branch.last)) == sorted(
        f"{i}.{name}" for i in (1, 2, 3) for name in ("attention.out_proj.weight", "down.weight")
    )
    assert blocks(found) == 3
    assert {branch.normed for branch in found} == {norm}


def test_a_transformer_layer_is_one_block():
    """So that "depth" gives GPT-2's 1 / sqrt(2 n_layer)."""
    model = nn.Sequential(
        layer(),
        *(nn.TransformerEncoderLayer(WIDTH, 2, 16, 0.0, batch_first=True, norm_first=True) for _ in range(5)),
        nn.LayerNorm(WIDTH),
        layer(),
    )
    x = torch.randn(2, 4, WIDTH)
    report = gh.init_weights(model, x, seed=0, residual="depth")
    assert report.residual == "depth"
    factor = 1 / math.sqrt(2 * 5)
    scaled = ("self_attn.out_proj.weight", "linear2.weight")
    plain = {e.name: e.target_std for e in gh.init_weights(model, x, seed=0, residual="none").entries}
    for e in report.entries:
        if e.target_std is not None and e.fan and "weight" in e.name:
            assert e.target_std == pytest.approx(plain[e.name] * (factor if e.name.endswith(scaled) else 1)), e.name
    assert gh.init_weights(model, x, seed=0).residual == "none"  # norms hold the branches


@pytest.mark.parametrize("scheme", ["auto", "he", "lecun", "orthogonal"])
def test_sixty_four_plain_blocks(scheme):
    model = net(lambda: Residual(two_layers()), 64)
    report = gh.init_weights(model, ROWS, scheme=scheme, seed=0)
    assert report.residual == "depth"
    entries = {e.name: e for e in report.entries}
    ends = [entries[f"{i}.body.2.weight"] for i in range(1, 65)]
    inner = [entries[f"{i}.body.0.weight"] for i in range(1, 65)]
    for e in ends:
        assert e.target_std == pytest.approx(e.gain * e.fan**-0.5 / math.sqrt(128))
    for e in inner:
        assert e.target_std == pytest.approx(e.gain * e.fan**-0.5)


def test_depth_adds_half_of_the_variance():
    model = net(lambda: Residual(nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256))), 16)
    model[0], model[-1] = nn.Linear(WIDTH, 256), nn.Linear(256, 8)
    x = torch.randn(256, WIDTH)
    gh.init_weights(model, x, seed=0)
    with torch.no_grad():
        before, after = model[0](x), model[:-1](x)
    # each block adds 1 / 32 of what its branch reads at gain 1, or less where the stream has grown
    assert 1.3 < float(after.square().mean() / before.square().mean()) < 1.8


def test_mixed_nets_scale_the_plain_branches_only():
    model = nn.Sequential(
        layer(),
        Residual(two_layers()),
        Residual(two_layers(), pre=nn.LayerNorm(WIDTH)),
        Residual(two_layers(), gate=0.0),
        layer(),
    )
    entries = {e.name: e for e in gh.init_weights(model, ROWS, seed=0).entries}
    found = {i: entries[f"{i}.body.2.weight"] for i in (1, 2, 3)}
    ratios = [found[i].target_std / (found[i].gain * WIDTH**-0.5) for i in (1, 2, 3)]
    assert ratios == pytest.approx([2**-0.5, 1, 1])


def test_none_means_none():
    report = gh.init_weights(net(lambda: Residual(two_layers())), ROWS, seed=0, residual="none")
    assert report.residual == "none"
    assert all(e.target_std == pytest.approx(e.gain * e.fan**-0.5) for e in report.entries if e.gain and e.fan)


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.BatchNorm1d])
def test_zero_last_silences_every_branch(norm):
    """By the norm's weight where a norm ends the branch, which would undo any other scale."""
    plain = net(lambda: Residual(two_layers()))
    normed = net(lambda: Residual(nn.Sequential(*two_layers(), norm(WIDTH))))
    for model, zeros in ((plain, "body.2.weight"), (normed, "body.3.weight")):
        report = gh.init_weights(model, ROWS, seed=0, residual="zero_last")
        assert report.residual == "zero_last"
        model.eval()
        with torch.no_grad():
            torch.testing.assert_close(model(ROWS), model[-1](model[0](ROWS)))
        silent = [name for name, p in model.named_parameters() if not p.any() and not name.endswith("bias")]
        assert silent == [f"{i}.{zeros}" for i in (1, 2, 3, 4)]


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
@pytest.mark.parametrize("number", [2, 9])
def test_fixup_has_its_exponents(layers, number):
    def body():
        return nn.Sequential(*(m for _ in range(layers) for m in (nn.ReLU(), layer())))

    report = gh.init_weights(net(lambda: Residual(body()), number), ROWS, seed=0, residual="fixup")
    entries = {e.name: e for e in report.entries}
    for block in range(1, number + 1):
        ratios = [
            e.target_std / (e.gain * e.fan**-0.5)
            for i in range(layers)
            if (e := entries[f"{block}.body.{2 * i + 1}.weight"]).gain
        ]
        expected = [number ** (-1 / (2 * layers - 2)) if layers > 1 else 1] * (layers - 1)
        assert ratios[: layers - 1] == pytest.approx(expected)
        assert entries[f"{block}.body.{2 * layers - 1}.weight"].target_std == 0


def test_what_is_asked_for_acts_on_normed_and_gated_branches_too():
    model = net(lambda: Residual(two_layers(), pre=nn.LayerNorm(WIDTH), gate=0.5), 3)
    found, _ = branches_of(model, ROWS)
    assert set(factors("depth", found, auto=False).values()) == {1 / math.sqrt(6)}
    assert factors("depth", found, auto=True) == {}
    assert factors("none", found, auto=False) == {}


@pytest.mark.parametrize("residual", ["depth", "zero_last", "fixup"])
def test_without_a_sample_there_are_no_branches(residual):
    with pytest.raises(
        ValueError, match=rf"residual='{residual}' needs example_inputs, .*; give a sample, or residual="
    ):
        gh.init_weights(two_layers(), residual=residual)
    assert gh.init_weights(two_layers(), residual="none", seed=0).residual == "none"


class Refiner(nn.Module):
    """y = y + step * f(y), the same f again and again."""

    def __init__(self, times, step=None, norm=False):
        super().__init__()
        self.times, self.step = times, step
        self.body = nn.Sequential(nn.LayerNorm(64) if norm else nn.Identity(), nn.Linear(64, 64), nn.Tanh())
        self.delta = nn.Linear(64, 64)

    def forward(self, x):
        state = x
        for _ in range(self.times):
            change = self.delta(self.body(state))
            state = state + (change if self.step is None else self.step * change)
        return state


def delta_std(model):
    report = gh.init_weights(model, torch.randn(32, 64), seed=0)
    (entry,) = (e for e in report.entries if e.name == "delta.weight")
    return entry.target_std


PLAIN = gh.init.gain("tanh") / math.sqrt(64)


@pytest.mark.parametrize("times", [4, 12])
def test_the_same_branch_again_and_again_is_a_step_of_one_over_n(times):
    """Equal steps add up in amplitude: 1 / sqrt(N) for each would not do."""
    assert delta_std(Refiner(times)) == pytest.approx(PLAIN / times, rel=1e-2)
    model, x = Refiner(times), torch.randn(256, 64)
    report = gh.init_weights(model, x, seed=0)
    assert "residual" in next(entry.note for entry in report.entries if entry.name == "delta.weight")
    with torch.no_grad():
        assert 0.3 < float((model(x) - x).square().mean().sqrt()) < 3


@pytest.mark.parametrize("step", [0.1, 0.5])
def test_a_step_that_is_there_counts(step):
    assert delta_std(Refiner(10, step)) == pytest.approx(PLAIN / max(10 * step, 1), rel=1e-2)


def test_a_norm_holds_a_branch_however_often():
    assert delta_std(Refiner(10, norm=True)) == pytest.approx(PLAIN, rel=1e-2)


class Flow(Refiner):
    """Coordinates that begin as constants, as in iterative matching: the state of the net is another one."""

    def forward(self, x):
        place, hidden = torch.arange(64.0).expand(len(x), 64), self.body[1](x)
        for _ in range(self.times):
            change = self.delta((hidden + (place - torch.arange(64.0))).tanh())
            place = place.detach() + change
        return place


def test_a_state_that_begins_as_a_constant_counts_all_steps():
    assert delta_std(Flow(8)) == pytest.approx(PLAIN / 8, rel=1e-2)
