"""The main chain against a brute-force enumeration of all paths, on nets of every make; and attention."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies
from signal_twin import chain, opened, read, units
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_gradhealth.signals import SignalProbe

# --- random nets ---


class Net(nn.Module):
    """A stem, then nodes, each a layer or a sum of earlier ones; what nobody reads is summed up, or given as it is.

    Args:
        nodes: For every node its kind and the earlier nodes that it reads.
        joined: Whether the loose ends are put together by a last layer.
    """

    def __init__(self, nodes: list[tuple[str, tuple[int, ...]]], joined: bool) -> None:
        super().__init__()
        self.nodes, self.joined = nodes, joined
        self.layers = nn.ModuleDict({str(i): nn.Linear(3, 3) for i, (kind, _) in enumerate(nodes) if kind == "linear"})
        self.stem, self.head = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Any:
        values = [self.stem(x)]
        for number, (kind, read_) in enumerate(self.nodes):
            total = sum_of([values[source] for source in read_])
            values.append(self.layers[str(number)](total) if kind == "linear" else total)
        ends = [values[end] for end in self.ends()]
        return self.head(sum_of(ends)) if self.joined else ends

    def ends(self) -> list[int]:
        used = {source for _, read_ in self.nodes for source in read_}
        return [number for number in range(len(self.nodes) + 1) if number not in used]


def sum_of(values: list[Tensor]) -> Tensor:
    total = values[0]
    for value in values[1:]:
        total = total + value
    return total


class Graph:
    """The same net as names of measured points and what each reads; sums stand for themselves, without a name."""

    def __init__(self, net: Net) -> None:
        self.reads: dict[str, list[str]] = {"stem": []}
        self.named: list[str] = ["stem"]
        values = ["stem"]
        for number, (kind, read_) in enumerate(net.nodes):
            sources = [values[source] for source in read_]
            values.append(self._layer(f"layers.{number}", sources) if kind == "linear" else self._sum(sources))
        ends = [values[end] for end in net.ends()]
        self.ends = [self._layer("head", ends)] if net.joined else ends

    def _sum(self, sources: list[str]) -> str:
        if len(sources) == 1:
            return sources[0]
        name = f"sum {len(self.reads)}"
        self.reads[name] = sources
        return name

    def _layer(self, name: str, sources: list[str]) -> str:
        source = self._sum(sources)
        if source.startswith("sum "):  # the first layer that reads a sum gives it a name
            named = f"{name} (input)"
            self.reads[named] = self.reads.pop(source)
            self.reads = {key: [named if s == source else s for s in value] for key, value in self.reads.items()}
            self.renamed = getattr(self, "renamed", {}) | {source: named}
            self.named.append(named)
            source = named
        self.reads[name] = [source]
        self.named.append(name)
        return name

    def paths(self, node: str) -> Iterator[list[str]]:
        """All paths from the stem to a node."""
        node = getattr(self, "renamed", {}).get(node, node)
        before = self.reads[node]
        if not before:
            yield [node]
        for source in before:
            yield from ([*path, node] for path in self.paths(source))

    def on_every_path(self, node: str) -> list[str]:
        paths = list(self.paths(node))
        return [name for name in paths[0] if name in self.named and all(name in path for path in paths)]

    def follows_named(self, node: str) -> bool:
        """Whether a named point comes after a node."""
        renamed = getattr(self, "renamed", {})
        readers = [name for name, sources in self.reads.items() if node in [renamed.get(s, s) for s in sources]]
        return any(reader in self.named or self.follows_named(reader) for reader in readers)


def chains_of(graph: Graph) -> list[list[str]]:
    """The chains of all ends that are the longest."""
    ends = [name for name in graph.named if not graph.follows_named(name)]
    chains = [graph.on_every_path(end) for end in ends]
    return [one for one in chains if len(one) == max(map(len, chains))]


@strategies.composite
def nets(draw: Any) -> Net:
    nodes = []
    for number in range(draw(strategies.integers(0, 7))):
        kind = draw(strategies.sampled_from(["linear", "linear", "sum"]))
        count = draw(strategies.integers(1, 3)) if kind == "linear" else 2
        sources = draw(strategies.lists(strategies.integers(0, number), min_size=1, max_size=count, unique=True))
        if kind == "sum" and len(sources) == 1:
            kind = "linear"
        nodes.append((kind, tuple(sources)))
    return Net(nodes, draw(strategies.booleans()))


@settings(max_examples=150)
@given(nets())
def test_the_chain_is_what_lies_on_every_path(net: Net) -> None:
    with opened(net) as probe:
        outputs = net(torch.randn(2, 3))
        sum_of([output.sum() for output in ([outputs] if net.joined else outputs)]).backward()
    signals = read(probe)
    graph = Graph(net)
    assert chain(signals) in chains_of(graph)
    for number, site in enumerate(signals.spec.sites):
        around = graph.on_every_path(site.name)
        before = around[-2] if len(around) > 1 else None
        found = signals.spec.sites[site.before].name if site.before >= 0 else None
        assert found == before, (site.name, number)


# --- nets that are in use ---


class Made(nn.Module):
    """Modules by name, put together by a function."""

    def __init__(self, function: Callable[..., Any], **modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, *given: Tensor) -> Any:
        return self.function(self, *given)


def lin(inputs: int = 4, outputs: int = 4) -> nn.Linear:
    return nn.Linear(inputs, outputs)


def branch(depth: int = 2) -> nn.Sequential:
    return nn.Sequential(*[module for _ in range(depth) for module in (lin(), nn.ReLU())][:-1])


def residual(kind: str) -> nn.Module:
    steps: dict[str, Callable[[nn.Module, nn.Module, Tensor], Tensor]] = {
        "plain": lambda b, n, x: x + b(x),
        "in place": lambda b, n, x: b(x).add_(x),
        "added to": lambda b, n, x: x.clone().add_(b(x)),
        "post-activation": lambda b, n, x: torch.relu(x + b(x)),
        "scaled": lambda b, n, x: x + 0.1 * b(x),
        "pre-norm": lambda b, n, x: x + b(n(x)),
        "post-norm": lambda b, n, x: n(x + b(x)),
    }
    blocks = [Made(lambda m, x: steps[kind](m.b, m.n, x), b=branch(), n=nn.LayerNorm(4)) for _ in range(3)]
    return nn.Sequential(lin(), *blocks, nn.Linear(4, 2))


RESIDUAL = {
    "plain": ["0", "2.b.0 (input)", "3.b.0 (input)", "4 (input)", "4"],
    "in place": ["0", "2.b.0 (input)", "3.b.0 (input)", "4 (input)", "4"],
    "added to": ["0", "2.b.0 (input)", "3.b.0 (input)", "4 (input)", "4"],
    "post-activation": ["0", "2.b.0 (input)", "3.b.0 (input)", "4 (input)", "4"],
    "scaled": ["0", "2.b.0 (input)", "3.b.0 (input)", "4 (input)", "4"],
    "pre-norm": ["0", "2.n (input)", "3.n (input)", "4 (input)", "4"],
    "post-norm": ["0", "1.n (input)", "1.n", "2.n (input)", "2.n", "3.n (input)", "3.n", "4"],
}


def seen(model: nn.Module, *given: Tensor, loss: Callable[[Any], Tensor] = lambda out: out.sum()) -> list[str]:
    with opened(model) as probe:
        loss(model(*given)).backward()
    return chain(read(probe))


@pytest.mark.parametrize("kind", RESIDUAL)
def test_residual_nets_run_through_their_merges(kind: str) -> None:
    assert seen(residual(kind), torch.randn(8, 4)) == RESIDUAL[kind]


def dense(m: Any, x: Tensor) -> Tensor:
    h = m.stem(x)
    one = m.one(h)
    two = m.two(torch.cat([h, one], -1))
    return m.head(torch.cat([h, one, two], -1))


def u_net(m: Any, x: Tensor) -> Tensor:
    high = torch.relu(m.down(m.stem(x)))
    low = m.up(torch.relu(m.middle(F.max_pool2d(high, 2))))
    return m.head(torch.cat([high, F.interpolate(low, scale_factor=2)], 1))


def towers(m: Any, x: Tensor, y: Tensor) -> Tensor:
    return (m.left(x) * m.right(y)).sum(-1)


def vae(m: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    h = torch.relu(m.encoder(x))
    mean, log_variance = m.mean(h), m.spread(h)
    z = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
    return m.out(torch.relu(m.decoder(z))), mean, log_variance


def heads(m: Any, x: Tensor) -> dict[str, Tensor]:
    h = torch.relu(m.body(torch.relu(m.stem(x))))
    return {"short": m.short(h), "long": m.long(h)}


class Attention(nn.Module):
    def __init__(self, fused: bool, causal: bool = False, width: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fused, self.causal, self.heads = fused, causal, heads

    def parts(self, x: Tensor) -> list[Tensor]:
        return [part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1)]

    def weights(self, q: Tensor, k: Tensor) -> Tensor:
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        if self.causal:
            later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
            scores = scores.masked_fill(later, -math.inf)
        return scores.softmax(-1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.parts(x)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal) if self.fused else self.weights(q, k) @ v
        return self.out(mixed.transpose(1, 2).flatten(2))


def gpt(fused: bool) -> nn.Module:
    def block(m: Any, x: Tensor) -> Tensor:
        x = x + m.attention(m.norm1(x))
        return x + m.down(F.gelu(m.up(m.norm2(x))))

    blocks = [
        Made(
            block,
            norm1=nn.LayerNorm(8),
            attention=Attention(fused, causal=True),
            norm2=nn.LayerNorm(8),
            up=nn.Linear(8, 16),
            down=nn.Linear(16, 8),
        )
        for _ in range(2)
    ]
    return nn.Sequential(nn.Embedding(11, 8), *blocks, nn.LayerNorm(8), nn.Linear(8, 11))


GPT = [
    *("0", "1.norm2 (input)", "2.norm1 (input)", "2.norm2 (input)", "3 (input)", "3", "4"),
]


@pytest.mark.parametrize("fused", [False, True])
def test_gpt_runs_through_its_residual_stream(fused: bool) -> None:
    assert seen(gpt(fused), torch.randint(11, (2, 6))) == GPT


def test_other_makes() -> None:
    x, image = torch.randn(8, 4), torch.randn(2, 2, 8, 8)
    assert seen(nn.Sequential(lin(), nn.ReLU(), lin(), nn.Tanh(), lin()), x) == ["0", "2", "4"]
    assert seen(Made(dense, stem=lin(), one=lin(), two=lin(8), head=lin(12)), x) == ["stem", "head"]
    conv = {"stem": (2, 4), "down": (4, 4), "middle": (4, 4), "up": (4, 4), "head": (8, 1)}
    net = Made(u_net, **{name: nn.Conv2d(*sizes, 3, padding=1) for name, sizes in conv.items()})
    assert seen(net, image) == ["stem", "down", "head"]
    assert seen(Made(towers, left=branch(3), right=branch(2)), x, x) == ["left.0", "left.2", "left.4"]
    names = ("encoder", "mean", "spread", "decoder", "out")
    reconstruct = seen(Made(vae, **{name: lin() for name in names}), x, loss=lambda out: sum_of([o.sum() for o in out]))
    assert reconstruct == ["encoder", "decoder (input)", "decoder", "out"]
    made = {"stem": lin(), "body": lin(), "short": lin(4, 1), "long": branch(3)}
    loss = {"loss": lambda out: out["short"].sum() + out["long"].sum()}
    assert seen(Made(heads, **made), x, **loss) == ["stem", "body", "long.0", "long.2", "long.4"]


def test_an_encoder_that_the_decoder_looks_at() -> None:
    def forward(m: Any, source: Tensor, target: Tensor) -> Tensor:
        memory = torch.relu(m.e2(torch.relu(m.e1(source))))
        h = m.d1(target)
        mixed = F.scaled_dot_product_attention(m.q(h).unsqueeze(1), memory.unsqueeze(1), memory.unsqueeze(1)).squeeze(1)
        return m.out(h + m.o(mixed))

    names = ("e1", "e2", "d1", "q", "o", "out")
    net = Made(forward, **{name: lin() for name in names})
    assert seen(net, torch.randn(3, 5, 4), torch.randn(3, 6, 4)) in (
        ["d1", "out (input)", "out"],
        ["out (input)", "out"],
    )


def steered(m: Any, x: Tensor) -> Tensor:
    """As in diffusion: what a time is embedded in is added in every block."""
    steer, h = m.t2(F.silu(m.t1(x[:, :1]))), m.stem(x)
    for up, shift, down in zip(m.up, m.shift, m.down, strict=True):
        h = h + down(F.silu(up(h) + shift(steer)))
    return m.head(h)


def biased(m: Any, x: Tensor) -> Tensor:
    """As in T5: a table of distances is added to the scores of every attention."""
    h = m.words(x)
    bias = m.table((torch.arange(5)[:, None] - torch.arange(5)).abs()).permute(2, 0, 1)
    for mixed, out in zip(m.mixed, m.out, strict=True):
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in mixed(h).chunk(3, -1))
        h = h + out(((q @ k.mT + bias).softmax(-1) @ v).transpose(1, 2).flatten(2))
    return m.head(h)


def test_what_steers_a_net_is_not_what_runs_through_it() -> None:
    def layers(inputs: int, outputs: int) -> nn.ModuleList:
        return nn.ModuleList(nn.Linear(inputs, outputs) for _ in range(3))

    made: dict[str, nn.Module] = {"t1": lin(1, 2), "t2": lin(2, 2), "stem": lin(), "head": lin()}
    net = Made(steered, **made, up=layers(4, 4), shift=layers(2, 4), down=layers(4, 4))
    assert seen(net, torch.randn(8, 4)) == ["stem", "up.1 (input)", "up.2 (input)", "head (input)", "head"]
    made = {"words": nn.Embedding(9, 8), "table": nn.Embedding(5, 2), "head": lin(8, 9)}
    net = Made(biased, **made, mixed=layers(8, 24), out=layers(8, 8))
    stream = ["words", "mixed.1 (input)", "mixed.2 (input)", "head (input)", "head"]
    assert seen(net, torch.randint(9, (6, 5))) == stream


# --- attention ---


def share_of_sharp_heads(weights: Tensor, limit: float = 0.01) -> float:
    """Heads whose queries look, on average, at one key only; weights: shape (batch, heads, queries, keys)."""
    openness = [
        math.fsum(1 - math.fsum(p * p for p in row) for row in head.flatten(0, 1).tolist()) / head[..., 0].numel()
        for head in weights.double().transpose(0, 1)
    ]
    return sum(value < limit for value in openness) / len(openness)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_collapsed_attention(fused: bool, causal: bool) -> None:
    net = nn.Sequential(Attention(fused, causal, width=16, heads=4), nn.Linear(16, 2))
    attention, x = net[0], torch.randn(8, 33, 16)
    with torch.no_grad():  # the first two heads are sharp
        sharp = torch.tensor([1e5, 1e4, 1.0, 0.0]).repeat_interleave(4)
        attention.qkv.weight[:16] *= sharp.unsqueeze(1)
        attention.qkv.bias[:16] *= sharp
        q, k, _ = attention.parts(x)
        expected = share_of_sharp_heads(attention.weights(q, k))
    with opened(net) as probe:
        net(x).sum().backward()
    found = units(read(probe))
    assert expected == 0.5
    assert found == {"0.out:attention": 0.5}


@pytest.mark.parametrize("kind", ["none", "bool", "float", "grouped"])
def test_openness_of_fused_attention(kind: str) -> None:
    from lightning_gradhealth.signals.attention import openness_of

    q = torch.randn(2, 4, 9, 8, requires_grad=True)
    k, v = (torch.randn(2, 2 if kind == "grouped" else 4, 7, 8, requires_grad=True) for _ in range(2))
    keep = torch.rand(2, 1, 9, 7) > 0.3
    keep[..., 0] = True
    mask = {"bool": keep, "float": torch.randn(2, 4, 9, 7)}.get(kind)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=kind == "grouped", scale=0.7)
    whole = k.repeat_interleave(2, 1) if kind == "grouped" else k
    scores = (q @ whole.transpose(-1, -2)).double() * 0.7
    if kind == "bool":
        scores = scores.masked_fill(~keep, -math.inf)
    elif mask is not None:
        scores = scores + mask
    expected = (1 - scores.softmax(-1).square().sum(-1)) / (1 - 1 / 7)
    nodes, found = [out.grad_fn], None
    while nodes and found is None:  # the fused node may stand behind a few others
        node = nodes.pop()
        found = openness_of(node) if "Attention" in node.name() or "Softmax" in node.name() else None
        nodes += [other for other, _ in node.next_functions if other is not None]
    assert found is not None
    values, axis = found
    assert values.shape[axis] == 4
    assert torch.allclose(values.double(), expected, atol=1e-5)


def test_a_softmax_over_classes_is_no_attention() -> None:
    net = nn.Sequential(lin(), Made(lambda m, x: m.a(x).softmax(-1) * 1.0, a=lin()))
    with opened(net) as probe:
        net(torch.randn(300, 4) * 1e4).square().sum().backward()
    assert units(read(probe)) == {}


# --- gains ---


@pytest.mark.parametrize("factor", [0.5, 0.9, 1.0, 1.2])
def test_gains_of_multiples_of_the_identity(factor: float) -> None:
    net = nn.Sequential(*(nn.Linear(5, 5, bias=False) for _ in range(12))).double()
    for layer in net:
        layer.weight.data.copy_(factor * torch.eye(5))
    with opened(net) as probe:
        net(torch.randn(4, 5, dtype=torch.float64)).square().sum().backward()
    found = read(probe).chain(str)
    assert found.forward_gain == pytest.approx(factor, rel=1e-6)
    assert found.backward_gain == pytest.approx(factor, rel=1e-6)
    fields = read_fields(net)
    assert all(layer["forward_gain"] == pytest.approx(factor, rel=1e-6) for layer in fields[1:])
    assert all(layer["backward_gain"] == pytest.approx(factor, rel=1e-6) for layer in fields[1:])


def read_fields(net: nn.Module) -> list[dict[str, Any]]:
    probe = SignalProbe(net)
    probe.open()
    net(torch.randn(4, 5, dtype=torch.float64)).square().sum().backward()
    probe.pause()
    return list(read(probe).of_layers(str).values())


def test_calls_one_by_one_are_one_chain() -> None:
    """As a `training_step` without `forward` calls them."""
    net = nn.ModuleDict({name: lin() for name in "abc"})
    with opened(net) as probe:
        h = torch.randn(300, 4)
        for name in "abc":
            h = torch.tanh(net[name](h))
        h.sum().backward()
    signals = read(probe)
    assert chain(signals) == ["a", "b", "c"]
    assert list(units(signals)) == ["a:tanh", "b:tanh"]


def test_ends_do_not_depend_on_the_order_of_calls() -> None:
    for order in itertools.permutations(["short", "long"]):
        made = {"stem": lin(), "short": branch(1), "long": branch(3)}
        net = Made(lambda m, x, order=order: [getattr(m, name)(m.stem(x)) for name in order], **made)
        names = seen(net, torch.randn(8, 4), loss=lambda out: sum_of([o.sum() for o in out]))
        assert names[-1] == "long.4"
