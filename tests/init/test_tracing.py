"""What is recorded of a forward pass, and that nothing is left of it; which weights are found, with what fans."""

import collections
import dataclasses
import logging
import math
import time

import pytest
import torch
from calls import Calls, table
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint

import lightning_gradhealth as gh
from lightning_gradhealth.tracing import INPUT, Graph, TraceError, follow, trace


def graph_of(model, inputs):
    return Graph(trace(model, inputs))


def kinds(graph):
    return [station.kind for station in graph.stations.values()]


def found(model, inputs):
    """Names of the parameters behind every weight, in order of use."""
    graph = graph_of(model, inputs)
    names = {id(p): name for name, p in model.named_parameters()}
    return [
        [names[id(graph.trace.parameters[value])] for value in station.parameters]
        for station in graph.stations.values()
        if station.kind == "weight"
    ]


# --- record: what it runs on ---


@pytest.mark.parametrize(
    ("forward", "source"),
    [
        (lambda self, x: self.layer(x), "fake"),
        (lambda self, x: self.layer(x) if x.sum().item() != 0 else x, "real"),
        (lambda self, x: self.layer(x) if (x > 9).any() else self.layer(-x), "real"),
        (lambda self, x: self.layer(x[x[:, 0].nonzero()[:, 0]]), "real"),
        (lambda self, x: self.layer(x[x[:, 0] > 0]), "real"),
        (lambda self, x: self.layer(torch.from_numpy(x.numpy() * 2)), "real"),
        (lambda self, x: self.layer(torch.cat([row[None] for row in x.unbind() if float(row[0]) > -9])), "real"),
    ],
)
def test_fake_tensors_first_and_values_where_the_forward_needs_them(forward, source):
    model = Calls(forward, layer=nn.Linear(4, 3))
    recorded = trace(model, torch.randn(5, 4))
    assert recorded.source == source
    assert kinds(Graph(recorded)) == ["weight"]


def test_a_model_on_meta_is_run_there_and_keeps_its_dynamic_shapes_for_itself():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    recorded = trace(model, torch.randn(3, 4))
    assert recorded.source == "meta"
    assert kinds(Graph(recorded)) == ["weight", "weight"]
    with torch.device("meta"):
        dynamic = Calls(lambda self, x: self.layer(x) if x.sum().item() else x, layer=nn.Linear(4, 3))
    with pytest.raises(TraceError, match="on the meta device a forward cannot read values: make the plan with a model"):
        trace(dynamic, torch.randn(3, 4))


class Remembering(nn.Module):
    """Everything that a forward pass may change, it changes."""

    def __init__(self, fail=False):
        super().__init__()
        self.fail, self.calls, self.last, self.history = fail, 0, None, []
        self.layer, self.norm, self.drop = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)
        self.attention = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        self.count += 1
        self.count.add_(torch.rand(()))
        x = self.attention(self.drop(self.norm(self.layer(x)))[:, None])[:, 0]
        self.last = x
        self.history.append(x)
        self.training = False
        if self.fail:
            raise RuntimeError("this model\nnever works")
        return x


def everything(model):
    hooks = [len(getattr(module, name)) for module in model.modules() for name in vars(module) if "hooks" in name]
    return {
        "values": {name: value.clone() for name, value in model.state_dict(keep_vars=False).items()},
        "identities": [id(value) for value in (*model.parameters(), *model.buffers())],
        "versions": [parameter._version for parameter in model.parameters()],
        "training": [module.training for module in model.modules()],
        "requires_grad": [parameter.requires_grad for parameter in model.parameters()],
        "grad": [parameter.grad for parameter in model.parameters()],
        "hooks": hooks,
        "global_hooks": [
            len(getattr(nn.modules.module, name)) for name in ("_global_forward_hooks", "_global_forward_pre_hooks")
        ],
        "rng": torch.get_rng_state(),
        "memory": (model.calls, model.last, list(model.history)),
        "mha": torch.backends.mha.get_fastpath_enabled(),
        "sdpa": (
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.mem_efficient_sdp_enabled(),
            torch.backends.cuda.math_sdp_enabled(),
        ),
        "grad_mode": torch.is_grad_enabled(),
    }


def assert_same(before, after):
    values = before.pop("values"), after.pop("values")
    assert list(values[0]) == list(values[1])
    assert all(torch.equal(a, b) for a, b in zip(values[0].values(), values[1].values(), strict=True))
    assert torch.equal(before.pop("rng"), after.pop("rng"))
    grads = before.pop("grad"), after.pop("grad")
    assert all(a is b for a, b in zip(*grads, strict=True))
    assert before == after


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fail", [True, False])
@pytest.mark.parametrize("fastpath", [True, False])
def test_everything_is_as_it_was(training, fail, fastpath):
    model = Remembering(fail).train(training)
    model.norm.eval()
    model.layer.weight.requires_grad_(False)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) if parameter.requires_grad else None
    torch.backends.mha.set_fastpath_enabled(fastpath)
    try:
        x = torch.randn(8, 4)
        before, given = everything(model), x.clone()
        if fail:
            with pytest.raises(TraceError):
                trace(model, x)
        else:
            trace(model, x)
        assert_same(before, everything(model))
        assert torch.equal(x, given)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.parametrize("fail", [True, False])
@pytest.mark.parametrize("values", [True, False])
def test_parameters_that_the_forward_writes_are_put_back(values, fail):
    """As a table of embeddings with max_norm does, and weights that are clipped before they are used."""

    def forward(self, ids):
        x = self.table(ids)
        self.layer.weight.data.clamp_(-0.01, 0.01)
        with torch.no_grad():
            self.layer.bias.fill_(3)
            self.scale[:2].zero_()
        if values and x.sum().item() > 1e6:
            x = 2 * x
        if fail:
            raise RuntimeError("at last")
        return self.layer(x) * self.scale

    model = Calls(forward, table=nn.Embedding(5, 4, max_norm=0.1), layer=nn.Linear(4, 4), scale=table(4))
    before = [parameter.clone() for parameter in model.parameters()]
    if fail:
        with pytest.raises(TraceError, match="at last"):
            trace(model, torch.arange(5))
    else:
        assert trace(model, torch.arange(5)).source == ("real" if values else "fake")
    assert all(torch.equal(parameter, old) for parameter, old in zip(model.parameters(), before, strict=True))


def test_the_samples_own_values_stay_even_where_the_forward_overwrites_them():
    model = Calls(lambda self, x: self.layer(x.mul_(2)) if x.sum().item() else x, layer=nn.Linear(4, 4))
    x = torch.ones(2, 4)
    assert trace(model, x).source == "real"
    assert torch.equal(x, torch.ones(2, 4))


def test_the_error_names_shapes_cause_and_remedy():
    with pytest.raises(TraceError) as caught:
        trace(nn.Linear(4, 3), (torch.zeros(2, 5),))
    message = str(caught.value)
    assert "example_inputs must go through model.forward, got tensors of the shapes (2, 5)" in message
    assert "mat1 and mat2 shapes cannot be multiplied" in message
    assert "pass a tensor, a tuple of positional or a dict of keyword arguments of forward" in message
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert isinstance(caught.value, ValueError)
    with pytest.raises(TraceError, match=r"shapes \(8, 4\): RuntimeError: this model \(line \d+ of .*\);"):  # one line
        trace(Remembering(fail=True), torch.randn(8, 4))
    with pytest.raises(TraceError, match="got tensors of the shapes none: TypeError"):
        trace(nn.Linear(4, 3), {"wrong": 1})


def test_what_fails_on_fake_tensors_is_not_logged(capfd):
    log = logging.getLogger("torch._subclasses.fake_tensor")
    with pytest.raises(TraceError):
        trace(nn.Linear(4, 3), torch.zeros(2, 5))
    assert capfd.readouterr() == ("", "")
    assert not log.disabled


# --- record: what goes in and comes out ---

Pair = collections.namedtuple("Pair", ["first", "second"])


@dataclasses.dataclass
class Result:
    logits: torch.Tensor
    more: object = None


@pytest.mark.parametrize(
    ("inputs", "forward"),
    [
        (torch.ones(2, 4), lambda self, x: self.layer(x)),
        ((torch.ones(2, 4), 3), lambda self, x, times: self.layer(x) * times),
        ({"x": torch.ones(2, 4)}, lambda self, *, x: self.layer(x)),
        (Pair(torch.ones(2, 4), torch.ones(2, 4)), lambda self, pair: self.layer(pair.first + pair.second)),
        (([torch.ones(2, 4)],), lambda self, items: self.layer(items[0])),
        (({"a": {"b": torch.ones(2, 4)}},), lambda self, batch: self.layer(batch["a"]["b"])),
    ],
    ids=["tensor", "tuple", "dict", "namedtuple", "list in tuple", "nested dict"],
)
@pytest.mark.parametrize(
    "give",
    [
        lambda y: y,
        lambda y: (y, None),
        lambda y: [1, {"deep": (y,)}],
        lambda y: Pair(y, 2),
        Result,
        lambda y: Result(None, more=[Result(y)]),
        lambda y: collections.OrderedDict(y=y),
    ],
    ids=["tensor", "tuple", "nested", "namedtuple", "dataclass", "dataclass in list in dataclass", "ordered dict"],
)
def test_inputs_and_outputs_of_many_shapes(inputs, forward, give):
    model = Calls(lambda self, *a, **k: give(forward(self, *a, **k)), layer=nn.Linear(4, 3))
    graph = graph_of(model, inputs)
    assert kinds(graph) == ["weight"]
    (station,) = graph.stations
    (read,) = graph.stations[station].reads
    assert graph.sources(read, station) == {INPUT}
    assert list(graph.final.values()) == [frozenset({station})]


def test_a_function_sees_every_operation_and_may_change_its_result():
    seen = []

    def double(recorded, outputs, given):
        assert len(given) == len(recorded.events[-1].reads)
        seen.append(recorded.events[-1].name)
        if seen[-1] == "addmm":
            outputs[0].mul_(2)

    x, results = torch.randn(3, 4), []
    layer = nn.Linear(4, 2)
    model = Calls(lambda self, x: results.append(self.layer(x).relu()), layer=layer)
    with torch.no_grad():
        follow(model, x, double)
        torch.testing.assert_close(results[0], (2 * layer(x)).relu())
    assert seen == ["t", "addmm", "relu"]


# --- graph: how signals are followed ---


def reads_first(model, inputs):
    """The sources of what the last station reads, as positions among the stations; -1: the input."""
    graph = graph_of(model, inputs)
    order = list(graph.stations)
    last = graph.stations[order[-1]]
    return sorted(
        INPUT if source == INPUT else order.index(source)
        for value in last.reads
        for source in graph.sources(value, order[-1])
    )


TWO = {"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)}


def written_view(self, x):
    y = self.a(x)
    y[:, :3] = 0
    return self.b(y)


def overwritten(self, x):
    y = torch.zeros(2, 4)
    y[:, :2] = self.a(x)[:, :2]
    return self.b(y)


def filled_through_out(self, x):
    y = torch.empty(2, 4)
    torch.mul(self.a(x), 2, out=y)
    return self.b(y)


def view_taken_before_the_write(self, x):
    y = torch.zeros(2, 4)
    view = y.view(4, 2)
    y.copy_(self.a(x))
    return self.b(view.view(2, 4))


def split_and_joined(self, x):
    left, right = self.a(x).chunk(2, 1)
    return self.b(torch.cat([right.relu_(), left], 1))


def listed(self, x):
    return self.b(torch.stack(list(self.a(x).unbind(0))))


def through_index_put(self, x):
    y = torch.zeros(2, 4)
    y[torch.tensor([1, 0])] = self.a(x)
    return self.b(y)


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: self.b(self.a(x)),
        lambda self, x: self.b(self.a(x).relu_().mul_(2)),
        lambda self, x: self.b(self.a(x).view(4, 2).t().reshape(2, 4)),
        written_view,
        overwritten,
        filled_through_out,
        view_taken_before_the_write,
        split_and_joined,
        listed,
        through_index_put,
    ],
)
def test_signals_pass_views_and_writes(forward):
    assert reads_first(Calls(forward, **TWO), torch.randn(2, 4)) == [0]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda body: body,
        lambda body: Calls(lambda self, x: checkpoint(self.body, x, use_reentrant=False), body=body),
        lambda body: Calls(lambda self, x: checkpoint(self.body, x, use_reentrant=True), body=body),
        lambda body: torch.compile(body, backend="eager"),
        torch.jit.script,
        lambda body: torch.jit.trace(body, torch.randn(2, 4)),
    ],
    ids=["plain", "checkpoint", "reentrant", "compiled", "scripted", "jit_traced"],
)
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_wrapped_bodies_look_like_plain_ones(wrap):
    def body():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 3))

    plain = gh.init_weights(body(), torch.randn(2, 4), seed=0)
    wrapped = gh.init_weights(wrap(body()), torch.randn(2, 4), seed=0)
    assert [e.gain for e in wrapped.entries] == [e.gain for e in plain.entries]
    assert len(wrapped.depth) == len(plain.depth) == 2


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
@pytest.mark.parametrize("how", ["positional", "keyword", "packed"])
def test_recurrent_layers_are_one_station_however_they_are_called(kind, how):
    def forward(self, x):
        x = self.stem(x)
        if how == "packed":
            out, _ = self.rnn(pack_padded_sequence(x, torch.tensor([3, 2]), batch_first=True))
            return self.head(out.data)
        return self.head((self.rnn(input=x) if how == "keyword" else self.rnn(x))[0])

    model = Calls(forward, stem=nn.Linear(5, 4), rnn=kind(4, 6, batch_first=True), head=nn.Linear(6, 2))
    graph = graph_of(model, torch.randn(2, 3, 5))
    assert kinds(graph) == ["weight", "unit", "weight"]
    stem, unit, head = graph.stations
    assert graph.sources(graph.stations[unit].reads[0], unit) == {stem}
    assert graph.sources(graph.stations[head].reads[0], head) == {unit}
    assert {id(graph.trace.parameters[v]) for v in graph.stations[unit].parameters} == {
        id(p) for p in model.rnn.parameters()
    }


# --- graph: weights and their fans ---

FANNED = [
    (nn.Linear(6, 10), (3, 6)),
    (nn.Linear(6, 10), (2, 3, 6)),
    (nn.Linear(6, 10, bias=False), (6,)),
    (nn.Linear(6, 1), (3, 6)),
    (nn.Conv1d(4, 8, 3), (2, 4, 9)),
    (nn.Conv2d(4, 8, (3, 5), stride=(2, 1)), (2, 4, 9, 9)),
    (nn.Conv2d(4, 8, 3, groups=2, dilation=2), (2, 4, 9, 9)),
    (nn.Conv2d(4, 4, 3, groups=4), (2, 4, 9, 9)),
    (nn.Conv2d(4, 8, 1, stride=2), (2, 4, 9, 9)),
    (nn.Conv3d(2, 4, 3, stride=2), (1, 2, 7, 7, 7)),
    (nn.ConvTranspose1d(4, 8, 4, stride=2), (2, 4, 9)),
    (nn.ConvTranspose2d(4, 8, 4, stride=(2, 1), groups=2), (2, 4, 5, 5)),
    (nn.Conv2d(4, 8, 3, padding="same", padding_mode="circular"), (2, 4, 9, 9)),
    (nn.Conv2d(4, 8, 3), (4, 9, 9)),  # without a batch
]


@pytest.mark.parametrize(("module", "shape"), FANNED, ids=str)
def test_traced_fans_are_those_of_the_module(module, shape):
    graph = graph_of(module, torch.randn(shape))
    (station,) = graph.stations.values()
    assert (station.fan_in, station.fan_out) == pytest.approx(gh.fans(module, "weight"))
    bias = [graph.trace.parameters[value] for value in graph.biases]
    assert [p is module.bias for p in bias] == ([] if module.bias is None else [True])


def test_fans_of_a_bilinear_form():
    module = nn.Bilinear(3, 5, 7)
    (station,) = graph_of(module, (torch.randn(2, 3), torch.randn(2, 5))).stations.values()
    assert station.fan_in == gh.fans(module, "weight")[0] == 15


def measured_fan_in(forward, weight, x):
    """Variance of the output of standard normal weights and inputs: the number of terms that each output sums."""
    with torch.no_grad():
        return float(forward(torch.randn_like(x), torch.randn_like(weight)).double().var())


RAW = [
    (lambda x, w: x @ w, (7, 300), (300, 400)),
    (lambda x, w: w @ x, (300, 50), (400, 300)),
    (lambda x, w: x @ w, (2, 9, 200), (200, 300)),
    (lambda x, w: x @ w.T, (7, 300), (400, 300)),
    (lambda x, w: torch.einsum("bi,oi->bo", x, w), (7, 300), (400, 300)),
    (lambda x, w: torch.einsum("bti,hio->btho", x, w), (2, 5, 200), (4, 200, 50)),
    (lambda x, w: torch.einsum("bthi,hio->btho", x, w), (2, 5, 4, 200), (4, 200, 50)),
    (lambda x, w: torch.einsum("bthi,hio->bto", x, w), (2, 5, 4, 50), (4, 50, 300)),
    (lambda x, w: torch.einsum("btc,th->bhc", x, w), (2, 200, 30), (200, 90)),
    (torch.bmm, (4, 7, 200), (4, 200, 90)),
    (lambda x, w: torch.baddbmm(torch.zeros(1), x, w), (4, 7, 200), (4, 200, 90)),
    (lambda x, w: torch.tensordot(x, w, dims=([1, 2], [0, 1])), (7, 20, 15), (20, 15, 200)),
    (F.linear, (7, 300), (400, 300)),
    (lambda x, w: torch.mv(w, x), (300,), (4000, 300)),
    (lambda x, w: F.conv2d(x, w, stride=2), (2, 20, 30, 30), (40, 20, 3, 3)),
    (lambda x, w: F.conv_transpose1d(x, w, stride=2), (2, 20, 300), (20, 40, 4)),
]


@pytest.mark.parametrize(("forward", "given", "shape"), RAW)
def test_fans_of_raw_parameters_are_the_numbers_of_terms(forward, given, shape):
    x, weight = torch.randn(given), table(*shape)
    graph = graph_of(Calls(lambda self, x: forward(x, self.weight), weight=weight), x)
    (station,) = (s for s in graph.stations.values() if s.kind == "weight")
    assert station.fan_in == pytest.approx(measured_fan_in(forward, weight, x), rel=0.15)
    leaf = torch.randn(given, requires_grad=True)
    out = forward(leaf, torch.randn(shape))
    (back,) = torch.autograd.grad(out, leaf, torch.randn_like(out))
    assert station.fan_out == pytest.approx(float(back.square().mean()), rel=0.2)


@pytest.mark.parametrize(
    ("parts", "forward", "expected"),
    [
        ({"w": table(4, 4), "s": table(4, 1)}, lambda self, x: x @ (self.w * self.s), [["w", "s"]]),
        ({"w": table(4, 2), "v": table(4, 2)}, lambda self, x: x @ torch.cat([self.w, self.v], 1), [["w", "v"]]),
        (
            {"w": table(4, 4), "a": table(2, 4), "b": table(4, 2)},
            lambda self, x: F.linear(x, self.w + self.b @ self.a),
            [["w", "a", "b"]],
        ),
        ({"w": table(4, 4)}, lambda self, x: x @ (self.w / self.w.norm()), [["w"]]),
        ({"w": table(4, 4)}, lambda self, x: x @ self.w.tril(), [["w"]]),
        ({"w": table(4, 4)}, lambda self, x: x @ self.w @ self.w.T, [["w"], ["w"]]),
        ({"w": table(8, 4)}, lambda self, x: sum(x @ part.T for part in self.w.chunk(2)), [["w"], ["w"]]),
        ({"v": table(4)}, lambda self, x: x @ self.v, [["v"]]),
        ({"w": table(2, 4, 4)}, lambda self, x: torch.stack([x @ w for w in self.w]), [["w"], ["w"]]),
        ({"q": table(3, 4), "l": nn.Linear(4, 4)}, lambda self, x: self.l(self.q) @ self.l(x).T, [["l.weight"]] * 2),
        (
            {"n": nn.ParameterList([table(4, 4), table(4, 4)])},
            lambda self, x: (x @ self.n[0]).relu() @ self.n[1],
            [["n.0"], ["n.1"]],
        ),
        (
            {"n": nn.ParameterDict({"a": table(4, 4)})},
            lambda self, x: x @ self.n["a"],
            [["n.a"]],
        ),
        (
            {"l": parametrizations.weight_norm(nn.Linear(4, 4))},
            lambda self, x: self.l(x),
            [["l.parametrizations.weight.original0", "l.parametrizations.weight.original1"]],
        ),
        (
            {"l": parametrizations.spectral_norm(nn.Linear(4, 4))},
            lambda self, x: self.l(x),
            [["l.parametrizations.weight.original"]],
        ),
        (
            {"l": parametrizations.orthogonal(nn.Linear(4, 4))},
            lambda self, x: self.l(x),
            [["l.parametrizations.weight.original"]],
        ),
        ({"l": nn.utils.spectral_norm(nn.Linear(4, 4))}, lambda self, x: self.l(x), [["l.weight_orig"]]),
        ({"l": nn.utils.weight_norm(nn.Linear(4, 4))}, lambda self, x: self.l(x), [["l.weight_g", "l.weight_v"]]),
        ({"l": nn.Linear(4, 4)}, lambda self, x: torch.func.vmap(self.l)(x), [["l.weight"]]),
    ],
)
def test_weights_made_of_parameters(parts, forward, expected):
    model = Calls(forward, **parts)
    names = [sorted(group) for group in found(model, torch.randn(3, 4))]
    assert names == [sorted(group) for group in expected]


class TwoOfItsOwn(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = table(4, 8), table(8, 4)

    def forward(self, x):
        return (x @ self.up).relu() @ self.down


def test_a_module_may_own_two_weights():
    assert found(TwoOfItsOwn(), torch.randn(3, 4)) == [["up"], ["down"]]


def test_learned_queries_are_a_signal_where_a_module_multiplies_them():
    """As in DETR: the table is what the decoder begins with, no weight."""
    model = Calls(
        lambda self, x: self.attend(self.queries.expand(len(x), -1, -1), self.stem(x), self.stem(x))[0],
        queries=table(1, 5, 8),
        stem=nn.Linear(4, 8),
        attend=nn.MultiheadAttention(8, 2, batch_first=True),
    )
    inputs = torch.randn(2, 3, 4)
    assert ["queries"] not in found(model, inputs)
    report = gh.init_weights(model, inputs, seed=0)
    (entry,) = (e for e in report.entries if e.name == "queries")
    assert entry.scheme == "kept"


def test_tables_of_positions_are_no_weights_but_told():
    model = Calls(lambda self, x: self.layer(x + self.places[: x.shape[1]]), places=table(9, 4), layer=nn.Linear(4, 2))
    graph = graph_of(model, torch.randn(2, 6, 4))
    assert kinds(graph) == ["weight"]
    (value,) = graph.elementwise.keys() - graph.biases.keys()
    assert graph.trace.parameters[value] is model.places


def test_an_embedding_and_its_tied_head():
    table_ = nn.Embedding(11, 4)
    model = Calls(
        lambda self, ids: F.linear(self.body(self.emb(ids)), self.emb.weight), emb=table_, body=nn.Linear(4, 4)
    )
    graph = graph_of(model, torch.arange(6).view(2, 3))
    assert kinds(graph) == ["lookup", "weight", "weight"]
    first, _, last = graph.stations.values()
    assert first.parameters == last.parameters
    assert last.fan_in == 4


# --- graph: biases ---


@pytest.mark.parametrize(
    ("parts", "forward", "biases"),
    [
        ({"w": table(4, 4), "b": table(4)}, lambda self, x: x @ self.w + self.b, ["b"]),
        ({"w": table(4, 4), "b": table(4)}, lambda self, x: self.b + (x @ self.w).view(-1, 2, 4), ["b"]),
        ({"w": table(4, 4), "b": table(4)}, lambda self, x: (x @ self.w).add_(self.b), ["b"]),
        ({"w": table(4, 4), "b": table(4)}, lambda self, x: (x @ self.w) - self.b, ["b"]),
        ({"w": table(4, 4), "b": table(4)}, lambda self, x: torch.addmm(self.b, x, self.w), ["b"]),
        ({"w": table(4, 4), "b": table(4)}, lambda self, x: (x @ self.w) * self.b, []),
        ({"w": table(4, 4), "b": table(4)}, lambda self, x: (x + self.b) @ self.w, []),
        ({"n": nn.LayerNorm(4), "b": table(4)}, lambda self, x: self.n(x) + self.b, []),
        ({"c": nn.Conv2d(1, 3, 2)}, lambda self, x: self.c(x.view(2, 1, -1, 4)), ["c.bias"]),
        ({"l": nn.Linear(4, 4)}, lambda self, x: self.l(x.view(2, -1, 4)), ["l.bias"]),
    ],
)
def test_biases_are_vectors_added_to_what_a_weight_gives(parts, forward, biases):
    model = Calls(forward, **parts)
    graph = graph_of(model, torch.randn(8, 4))
    names = {id(p): name for name, p in model.named_parameters()}
    assert [names[id(graph.trace.parameters[value])] for value in graph.biases] == biases


# --- graph: norms and merges ---


def ones(*shape):
    return nn.Parameter(torch.ones(shape))


def zeros(*shape):
    return nn.Parameter(torch.zeros(shape))


def rms(x, dim=-1):
    return x * torch.rsqrt(x.square().mean(dim, keepdim=True) + 1e-6)


@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (nn.LayerNorm(8), (2, 8)),
        (nn.LayerNorm(8, elementwise_affine=False), (2, 8)),
        (nn.RMSNorm(8), (2, 8)),
        (nn.GroupNorm(2, 8), (2, 8, 5)),
        (nn.BatchNorm1d(8), (4, 8)),
        (nn.BatchNorm1d(8, track_running_stats=False), (4, 8)),
        (nn.BatchNorm2d(8), (4, 8, 3, 3)),
        (nn.BatchNorm3d(8, affine=False), (4, 8, 3, 3, 3)),
        (nn.SyncBatchNorm(8), (4, 8, 3)),
        (nn.InstanceNorm1d(8), (4, 8, 5)),
        (nn.InstanceNorm2d(8, affine=True, track_running_stats=True), (4, 8, 5, 5)),
        (Calls(lambda self, x: F.layer_norm(x, (8,), self.w, self.b), w=ones(8), b=zeros(8)), (2, 8)),
        (Calls(lambda self, x: F.rms_norm(x, (8,), self.w), w=ones(8)), (2, 8)),
        (Calls(lambda self, x: rms(x)), (64, 8)),
        (Calls(lambda self, x: rms(x) * self.w, w=ones(8)), (64, 8)),
        (Calls(lambda self, x: F.normalize(x, dim=-1) * 8**0.5), (64, 8)),
        (Calls(lambda self, x: (x - x.mean(-1, True)) / (x.std(-1, keepdim=True) + 1e-5)), (64, 8)),
    ],
    ids=str,
)
def test_what_is_a_norm_decouples_the_scale_of_the_weights_around_it(norm, shape):
    """Behind a norm a weight reads unit variance whatever came before it: here 7 times a normal signal's."""
    model = Calls(
        lambda self, x: self.last(self.norm(self.first(x.movedim(1, -1)).movedim(-1, 1).mul(7)).movedim(1, -1)),
        first=nn.Linear(8, 8),
        norm=norm,
        last=nn.Linear(8, 8),
    )
    x = torch.randn(shape)
    for scheme in ("auto", "lecun"):  # whatever the first one's scale
        report = gh.init_weights(model, x, scheme=scheme, seed=0, on_uncovered="ignore")
        (last,) = (e.gain for e in report.entries if e.name == "last.weight")
        assert last == pytest.approx(1, rel=0.1)
        assert report.depth[-1].forward == pytest.approx(1, rel=0.1)


@pytest.mark.parametrize(
    ("forward", "merges"),
    [
        (lambda self, x: x + self.a(x), 1),
        (lambda self, x: self.a(x).add_(x), 1),
        (lambda self, x: x - self.a(x), 1),
        (lambda self, x: torch.add(x, self.a(x), alpha=0.5), 1),
        (lambda self, x: self.a(x) + self.b(x), 1),
        (lambda self, x: sum([x, self.a(x), self.b(x)]), 2),
        (lambda self, x: 0.5 * (z := self.a(x)) * (1 + torch.tanh(0.8 * (z + 0.0447 * z**3))), 0),
        (lambda self, x: (z := self.a(x)) + z.relu(), 0),
        (lambda self, x: self.a(x) + 1, 0),
        (lambda self, x: self.a(x) + torch.ones(4), 0),
        (lambda self, x: x + x.relu(), 0),
        (lambda self, x: torch.cat([x, self.a(x)], 1), 0),
    ],
)
def test_merges_are_sums_of_different_signals(forward, merges):
    graph = graph_of(Calls(forward, **TWO), torch.randn(3, 4))
    assert kinds(graph).count("merge") == merges


def test_integers_are_never_merged():
    model = Calls(lambda self, ids: self.emb(ids + ids.roll(1, -1)), emb=nn.Embedding(50, 4))
    assert kinds(graph_of(model, torch.arange(6).view(2, 3))) == ["lookup"]


# --- cost ---


def allocated(run):
    """Bytes that a call allocates altogether, and at most at one time, as torch's own profiler counts them."""
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        run()
    steps = [e.nbytes() for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for step in steps:
        held += step
        peak = max(peak, held)
    return sum(step for step in steps if step > 0), peak


def test_tracing_takes_a_fraction_of_the_memory_of_a_forward_pass():
    model = nn.Sequential(
        *(module for _ in range(6) for module in (nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.GELU()))
    )
    x = torch.randn(8, 16, 64, 64)

    def forward():
        with torch.no_grad():
            model(x)

    real, traced = allocated(forward), allocated(lambda: trace(model, x))
    planned = allocated(lambda: gh.plan_init(model, x, seed=0))
    assert traced[0] < 0.05 * real[0]
    assert traced[1] < 0.05 * real[1]
    print(f"memory: real {real}, traced {traced}, planned {planned}")


def test_many_layers_are_traced_in_seconds():
    model = nn.Sequential(*(module for _ in range(300) for module in (nn.Linear(32, 32), nn.GELU())), nn.Linear(32, 4))
    start = time.process_time()
    graph = graph_of(model, torch.randn(4, 32))
    assert time.process_time() - start < 5
    assert kinds(graph) == ["weight"] * 301
    assert all(math.isclose(station.fan_in, 32) for station in graph.stations.values())
