"""The gradient through time: against analytic products, finite differences and the Jacobians of the module itself."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from counting import host_reads
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.autograd.functional import jacobian
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from lightning_gradhealth.flows import TemporalFlow, memory_length
from lightning_gradhealth.signals.recurrent import _directions, flow_norms, outer_flow, temporal_flow
from lightning_gradhealth.signals.unrolling import unrolled

KINDS = [nn.RNN, nn.LSTM, nn.GRU]


def flat(state: Any) -> tuple[Tensor, ...]:
    return (state,) if isinstance(state, Tensor) else tuple(state)


# --- slow twins ---


def analytic(rnn: nn.RNN, inputs: Tensor, cotangents: Tensor) -> list[float]:
    """From v^T prod diag(sigma'(a_s)) W over s = t+1..T, sample by sample; of a plain RNN with one layer."""
    weight, relu = rnn.weight_hh_l0.detach(), rnn.nonlinearity == "relu"
    squares = [0.0] * len(inputs)
    for sample in range(inputs.shape[1]):
        h, slopes = torch.zeros(rnn.hidden_size, dtype=inputs.dtype), []
        for x in inputs[:, sample]:
            a = (rnn.weight_ih_l0 @ x + rnn.bias_ih_l0 + weight @ h + rnn.bias_hh_l0).detach()
            h = a.relu() if relu else a.tanh()
            slopes.append((a > 0).to(a) if relu else 1 - h**2)
        product = cotangents.to(inputs)
        for t in reversed(range(len(inputs))):
            squares[t] += product.double().square().sum().item() / len(cotangents)
            product = product @ (torch.diag(slopes[t]) @ weight)
    return [math.sqrt(square / inputs.shape[1]) for square in squares]


def single(rnn: nn.RNNBase, layer: int, reverse: bool) -> nn.RNNBase:
    """A module of one layer and direction with the same weights."""
    directions = 2 if rnn.bidirectional else 1
    features = rnn.input_size if layer == 0 else (rnn.proj_size or rnn.hidden_size) * directions
    options: dict[str, Any] = {"bias": rnn.bias}
    if rnn.proj_size:
        options["proj_size"] = rnn.proj_size
    if isinstance(rnn, nn.RNN):
        options["nonlinearity"] = rnn.nonlinearity
    twin = type(rnn)(features, rnn.hidden_size, dtype=rnn.weight_ih_l0.dtype, **options)
    suffix = f"_l{layer}" + ("_reverse" if reverse else "")
    for name, parameter in twin.named_parameters():
        parameter.data.copy_(getattr(rnn, name.removesuffix("_l0") + suffix).detach())
    return twin


def by_jacobians(rnn: nn.RNNBase, inputs: Tensor, hx: Any = None) -> dict[str, list[float]]:
    """Frobenius norms of the Jacobians of the last output, by autograd through the module's own forward."""
    directions, found = 2 if rnn.bidirectional else 1, {}
    for layer in range(rnn.num_layers):
        outputs = []
        for reverse in range(directions):
            twin, index = single(rnn, layer, bool(reverse)), layer * directions + reverse
            start = None if hx is None else tuple(part[index : index + 1] for part in flat(hx))
            x = inputs.flip(0) if reverse else inputs
            name = f"l{layer}" + ("_reverse" if reverse else "")
            found[name] = [_norm_of_one(twin, x, start, t) for t in range(1, len(x) + 1)]
            output = twin(x, _hx(start))[0].detach()
            outputs.append(output.flip(0) if reverse else output)
        inputs = torch.cat(outputs, -1)
    return found


def _hx(state: tuple[Tensor, ...] | None) -> Any:
    return state if state is None or len(state) > 1 else state[0]


def _norm_of_one(twin: nn.RNNBase, x: Tensor, start: tuple[Tensor, ...] | None, t: int) -> float:
    state = tuple(part.detach() for part in flat(twin(x[:t], _hx(start))[1]))

    def last(*state: Tensor) -> Tensor:
        # the hidden state itself at the last step, so that its Jacobian is the unit matrix
        return (twin(x[t:], _hx(state))[0][-1] if t < len(x) else state[0][0]).sum(0)  # samples do not mix

    parts = jacobian(last, state)
    total = sum(part.square().sum() for part in parts)
    outputs = state[0].shape[-1]
    return (total / outputs / x.shape[1]).sqrt().item()


# --- the analytic product ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
def test_equals_the_analytic_product(nonlinearity: str, dtype: torch.dtype, scale: float) -> None:
    rnn = nn.RNN(5, 12, nonlinearity=nonlinearity, dtype=dtype)
    rnn.weight_hh_l0.data *= scale
    inputs = torch.randn(15, 4, 5, dtype=dtype)
    assert temporal_flow(rnn, inputs).grad_norms == pytest.approx(analytic(rnn, inputs, torch.eye(12)), rel=1e-5)


@settings(max_examples=25)
@given(
    hidden=st.integers(1, 9),
    steps=st.integers(2, 9),
    batch=st.integers(1, 4),
    scale=st.floats(0.1, 4.0),
    cotangents=st.integers(1, 9),
    nonlinearity=st.sampled_from(["tanh", "relu"]),
    seed=st.integers(0, 99),
)
def test_equals_the_analytic_product_for_the_same_directions(
    hidden: int, steps: int, batch: int, scale: float, cotangents: int, nonlinearity: str, seed: int
) -> None:
    torch.manual_seed(seed)
    rnn = nn.RNN(3, hidden, nonlinearity=nonlinearity, dtype=torch.float64)
    rnn.weight_hh_l0.data *= scale
    inputs = torch.randn(steps, batch, 3, dtype=torch.float64)
    found = flow_norms(rnn, inputs, cotangents=cotangents)["l0"].tolist()
    assert found == pytest.approx(analytic(rnn, inputs, _directions(hidden, cotangents)), rel=1e-9, abs=1e-300)


def test_a_wide_layer_is_estimated_from_directions_at_right_angles() -> None:
    rnn, inputs = nn.RNN(5, 100), torch.randn(12, 6, 5)
    few, exact = temporal_flow(rnn, inputs).grad_norms, analytic(rnn, inputs, torch.eye(100))
    assert few != pytest.approx(exact, rel=1e-5)  # it is an estimate
    assert few == pytest.approx(exact, rel=0.25)
    directions = _directions(100, 64).double()
    torch.testing.assert_close(directions @ directions.t(), torch.eye(64).double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gain", [0.5, 0.9, 1.0, 1.2])
def test_scaled_orthogonal_weights_give_their_scale(gain: float, dtype: torch.dtype) -> None:
    rnn = nn.RNN(3, 10, bias=False, dtype=dtype)
    rnn.weight_hh_l0.data = gain * torch.linalg.qr(torch.randn(10, 10, dtype=torch.float64))[0].to(dtype)
    flow = temporal_flow(rnn, torch.zeros(700, 2, 3, dtype=dtype))  # at 0, tanh is linear
    tolerance = 1e-6 if dtype is torch.float64 else 1e-5
    assert flow.gain_per_step == pytest.approx(gain, rel=tolerance)
    # 0.5**699 is far below what float32 holds, and 1.2**699 above
    assert math.log(flow.grad_norms[0]) == pytest.approx(699 * math.log(gain), abs=1e-2)
    assert flow.memory == {0.5: 7, 0.9: 44}.get(gain)


# --- finite differences and Jacobians ---


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_equals_finite_differences(kind: type[nn.RNNBase]) -> None:
    rnn, inputs, tiny = kind(3, 4, dtype=torch.float64), torch.randn(6, 1, 3, dtype=torch.float64), 1e-5
    rnn.requires_grad_(False)
    expected = []
    for t in range(1, 6):
        state, square = flat(rnn(inputs[:t])[1]), 0.0
        for part in range(len(state)):
            for unit in range(4):
                ends = []
                for sign in (1, -1):
                    moved = tuple(value.clone() for value in state)
                    moved[part][0, 0, unit] += sign * tiny
                    ends.append(rnn(inputs[t:], _hx(moved))[0][-1])
                square += ((ends[0] - ends[1]) / (2 * tiny)).square().sum().item()
        expected.append(math.sqrt(square / 4))
    assert temporal_flow(rnn, inputs).grad_norms == pytest.approx([*expected, 1.0], rel=1e-7)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"num_layers": 3},
    {"bias": False},
    {"bidirectional": True},
    {"num_layers": 2, "bidirectional": True, "bias": False},
]


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(
    ("kind", "own"),
    [(nn.RNN, {}), (nn.RNN, {"nonlinearity": "relu"}), (nn.GRU, {}), (nn.LSTM, {}), (nn.LSTM, {"proj_size": 2})],
)
def test_equals_the_jacobians_of_the_module_itself(
    kind: type[nn.RNNBase], own: dict[str, Any], options: dict[str, Any], with_state: bool
) -> None:
    rnn = kind(3, 4, **own, **options, dtype=torch.float64)
    inputs = torch.randn(5, 2, 3, dtype=torch.float64)
    hx = _hx(tuple(torch.randn_like(part) for part in flat(rnn(inputs)[1]))) if with_state else None
    expected = by_jacobians(rnn, inputs, hx)
    flow = temporal_flow(rnn, inputs, hx)
    assert flow.by_layer is not None
    assert list(flow.by_layer) == list(expected)
    for name, norms in expected.items():
        assert flow.by_layer[name] == pytest.approx(norms, rel=1e-9), name


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("kind", "own"), [*((kind, {}) for kind in KINDS), (nn.LSTM, {"proj_size": 3})])
def test_the_states_are_those_of_the_modules_forward(
    kind: type[nn.RNNBase], own: dict[str, Any], dtype: torch.dtype
) -> None:
    rnn = kind(5, 8, num_layers=2, bidirectional=True, dtype=dtype, **own)
    inputs = torch.randn(9, 3, 5, dtype=dtype)
    hx = tuple(torch.randn_like(part) for part in flat(rnn(inputs)[1]))
    output, last = rnn(inputs, _hx(hx))
    layers = list(unrolled(rnn, inputs, _hx(hx)))
    for index, layer in enumerate(layers):
        for part, expected in zip(layer.states[-1], flat(last), strict=True):
            torch.testing.assert_close(part, expected[index], rtol=0, atol=1e-6)
    ahead, back = (torch.stack([state[0] for state in layer.states[1:]]) for layer in layers[2:])
    torch.testing.assert_close(torch.cat([ahead, back.flip(0)], -1), output, rtol=0, atol=1e-6)


# --- forms of the input ---


@pytest.mark.parametrize("kind", KINDS)
def test_forms_of_the_same_input(kind: type[nn.RNNBase]) -> None:
    rnn, inputs = kind(3, 6, num_layers=2), torch.randn(7, 1, 3)
    hx = tuple(torch.randn_like(part) for part in flat(rnn(inputs)[1]))
    expected = temporal_flow(rnn, inputs, _hx(hx))
    unbatched = _hx(tuple(part.squeeze(1) for part in hx))
    rnn(inputs.squeeze(1), unbatched)  # the module takes it
    assert temporal_flow(rnn, inputs.squeeze(1), unbatched) == expected
    rnn.batch_first = True
    assert temporal_flow(rnn, inputs.transpose(0, 1), _hx(hx)) == expected


def test_lists_batch_first_samples_as_samples() -> None:
    first, inputs = nn.GRU(3, 6, batch_first=True), torch.randn(4, 9, 3)
    assert len(temporal_flow(first, inputs).grad_norms) == 9
    norms = [flow_norms(first, inputs[i : i + 1])["l0"] for i in range(4)]
    mean = torch.stack(norms).square().mean(0).sqrt()
    torch.testing.assert_close(flow_norms(first, inputs)["l0"], mean)  # root mean square over the samples


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("with_state", [False, True])
def test_packed_sequences_are_counted_from_their_ends(kind: type[nn.RNNBase], with_state: bool) -> None:
    rnn = kind(3, 4, num_layers=2, bidirectional=True, dtype=torch.float64)
    sequences = [torch.randn(length, 3, dtype=torch.float64) for length in (3, 6, 1, 6)]
    packed = pack_sequence(sequences, enforce_sorted=False)
    hx = tuple(torch.randn_like(part) for part in flat(rnn(packed)[1]))
    given_state = _hx(hx) if with_state else None
    alone = [
        flow_norms(rnn, x.unsqueeze(1), _hx(tuple(part[:, i : i + 1] for part in hx)) if with_state else None)
        for i, x in enumerate(sequences)
    ]
    found = flow_norms(rnn, packed, given_state)
    for name, norms in found.items():
        for back in range(1, 7):
            there = torch.stack([one[name][-back] for one in alone if len(one[name]) >= back])
            torch.testing.assert_close(norms[-back], there.square().mean().sqrt())


def test_a_sample_is_the_first_sequences_and_the_last_steps() -> None:
    rnn, inputs = nn.LSTM(3, 5, num_layers=2, bidirectional=True), torch.randn(9, 6, 3)
    sample = flow_norms(rnn, inputs, samples=2, steps=4)
    for name, norms in flow_norms(rnn, inputs[:, :2]).items():
        assert torch.equal(sample[name], norms[-4:])
    assert all(len(norms) == 9 for norms in flow_norms(rnn, inputs, samples=99, steps=99).values())
    longest = [torch.randn(length, 3) for length in (2, 5, 4)]
    packed = flow_norms(rnn, pack_sequence(longest, enforce_sorted=False), samples=1)
    assert torch.equal(packed["l0"], flow_norms(rnn, longest[1].unsqueeze(1))["l0"])


# --- cells ---


@pytest.mark.parametrize(("kind", "cell"), [(nn.RNN, nn.RNNCell), (nn.LSTM, nn.LSTMCell), (nn.GRU, nn.GRUCell)])
def test_cells_give_what_the_layer_gives(kind: type[nn.RNNBase], cell: type[nn.RNNCellBase]) -> None:
    rnn, inputs = kind(3, 5), torch.randn(8, 2, 3)
    one = cell(3, 5)
    one.load_state_dict({name.removesuffix("_l0"): value for name, value in rnn.state_dict().items()})
    hx = tuple(torch.randn(1, 2, 5) for _ in flat(rnn(inputs)[1]))
    assert temporal_flow(one, inputs) == temporal_flow(rnn, inputs)
    assert temporal_flow(one, inputs, _hx(tuple(part[0] for part in hx))) == temporal_flow(rnn, inputs, _hx(hx))
    assert temporal_flow(one, inputs[:, 0]) == temporal_flow(rnn, inputs[:, 0])


class Wrapped(nn.Module):
    """A cell of one's own around a torch cell, returning what `give` makes of its state."""

    def __init__(self, cell: nn.Module, give: Callable[[Any], Any] = lambda state: state) -> None:
        super().__init__()
        self.cell, self.give = cell, give

    def forward(self, x: Tensor, state: Any) -> Any:
        return self.give(self.cell(x, state))


@pytest.mark.parametrize(
    ("cell", "give"),
    [
        (nn.RNNCell(3, 5), lambda h: h),
        (nn.GRUCell(3, 5), lambda h: (h[:, :2], h)),
        (nn.LSTMCell(3, 5), lambda state: state),
        (nn.LSTMCell(3, 5), list),
        (nn.LSTMCell(3, 5), lambda state: (state[0].sum(), state)),
    ],
)
def test_cells_of_ones_own(cell: nn.Module, give: Callable[[Any], Any]) -> None:
    inputs, zeros = torch.randn(6, 2, 3), torch.zeros(2, 5)
    hx = (zeros, zeros) if isinstance(cell, nn.LSTMCell) else zeros
    assert temporal_flow(Wrapped(cell, give), inputs, hx) == temporal_flow(cell, inputs)


class Convolved(nn.Module):
    """States that are images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular", bias=False, dtype=torch.float64)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return x + self.conv(h)


def test_states_of_any_shape() -> None:
    cell, inputs = Convolved(), torch.randn(5, 3, 2, 4, 4, dtype=torch.float64)
    matrix = jacobian(lambda h: cell.conv(h[None])[0], inputs[0, 0]).reshape(32, 32)
    expected = [torch.linalg.matrix_power(matrix, 4 - t).norm().item() / math.sqrt(32) for t in range(5)]
    assert temporal_flow(cell, inputs, inputs[0]).grad_norms == pytest.approx(expected, rel=1e-9)


class Cut(nn.Module):
    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return x + h.detach()


def test_nothing_comes_through_a_cell_that_cuts_the_graph() -> None:
    flow = temporal_flow(Cut(), torch.randn(4, 2, 3), torch.zeros(2, 3))
    assert flow.grad_norms == (0.0, 0.0, 0.0, 1.0)
    assert (flow.gain_per_step, flow.memory) == (0.0, 1)


# --- nothing is left of it ---


class Restless(nn.Module):
    """A cell that remembers, counts and draws."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.norm, self.dropout = nn.GRUCell(3, 5), nn.BatchNorm1d(5), nn.Dropout(0.5)
        self.calls: list[int] = []
        self.register_buffer("seen", torch.zeros(5))
        self.fail_at = 10**6

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        if len(self.calls) >= self.fail_at:
            raise RuntimeError("the cell fails")
        self.calls.append(len(self.calls))
        self.seen += h.detach().sum(0)[:5] + torch.rand(5)
        return self.dropout(self.norm(self.cell(x, h)))


@pytest.mark.parametrize("fail_at", [10**6, 12, 3])
def test_a_cell_is_left_as_it_was(fail_at: int) -> None:
    cell = Restless()
    cell.dropout.eval()
    cell(torch.randn(4, 3), torch.randn(4, 5)).sum().backward()
    cell.fail_at = fail_at
    hook = cell.register_forward_hook(lambda *_: None)
    before = copy.deepcopy(cell.state_dict()), list(cell.calls), torch.get_rng_state()
    grads = {name: (parameter.grad, parameter.grad.clone()) for name, parameter in cell.named_parameters()}  # type: ignore[union-attr]
    if fail_at < 10**6:
        with pytest.raises(RuntimeError, match="the cell fails"):
            temporal_flow(cell, torch.randn(8, 4, 3, generator=torch.Generator()), torch.zeros(4, 5))
    else:
        temporal_flow(cell, torch.randn(8, 4, 3, generator=torch.Generator()), torch.zeros(4, 5))
    after = cell.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before[0].items())
    assert cell.calls == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])
    for name, parameter in cell.named_parameters():
        assert parameter.grad is grads[name][0]
        assert torch.equal(parameter.grad, grads[name][1])  # type: ignore[arg-type]
    assert (cell.training, cell.norm.training, cell.dropout.training) == (True, True, False)
    assert list(cell._forward_hooks) == [hook.id]


def test_a_stack_is_left_as_it_was() -> None:
    rnn, inputs = nn.LSTM(3, 80, num_layers=2, dropout=0.5), torch.randn(5, 2, 3, requires_grad=True)
    rnn(inputs)[0].sum().backward()
    before = copy.deepcopy(rnn.state_dict()), [parameter.grad for parameter in rnn.parameters()], torch.get_rng_state()
    values, grad = [p.grad.clone() for p in rnn.parameters()], inputs.grad.clone()  # type: ignore[union-attr]
    temporal_flow(rnn, inputs)
    assert all(torch.equal(value, rnn.state_dict()[name]) for name, value in before[0].items())
    assert all(
        p.grad is old and torch.equal(old, v) for p, old, v in zip(rnn.parameters(), before[1], values, strict=True)
    )
    assert torch.equal(inputs.grad, grad)  # type: ignore[arg-type]
    assert torch.equal(torch.get_rng_state(), before[2])
    assert rnn.training


def test_a_cell_is_measured_in_evaluation_mode() -> None:
    cell, inputs, zeros = Restless(), torch.randn(6, 4, 3), torch.zeros(4, 5)
    plain = Wrapped(cell.cell, lambda h: h / math.sqrt(1 + cell.norm.eps))  # what the norm does with its first buffers
    found, expected = (flow_norms(one, inputs, zeros)["l0"] for one in (cell, plain))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_a_graph_that_is_being_built_stays_valid() -> None:
    rnn, inputs = nn.GRU(3, 4), torch.randn(5, 2, 3)
    rnn(inputs)[0].sum().backward()
    expected = rnn.weight_hh_l0.grad.clone()
    rnn.zero_grad()
    loss = rnn(inputs)[0].sum()
    temporal_flow(rnn, inputs)
    loss.backward()
    assert torch.equal(rnn.weight_hh_l0.grad, expected)


def test_dropout_does_not_count() -> None:
    rnn, inputs = nn.LSTM(3, 6, num_layers=3, dropout=0.9), torch.randn(6, 2, 3)
    flow = temporal_flow(rnn, inputs)
    rnn.dropout = 0.0
    assert temporal_flow(rnn, inputs) == flow


@pytest.mark.parametrize("make", [lambda: nn.LSTM(3, 6, num_layers=2, proj_size=2), lambda: nn.GRUCell(3, 6)])
def test_the_same_in_every_mode(make: Callable[[], nn.Module]) -> None:
    rnn, inputs = make(), torch.randn(6, 2, 3)
    expected = temporal_flow(rnn, inputs)
    with torch.no_grad():
        assert temporal_flow(rnn, inputs) == expected
        assert not torch.is_grad_enabled()
    with torch.inference_mode():
        assert temporal_flow(rnn, inputs + 0) == expected  # an inference tensor
        flow_norms(rnn, inputs + 0, cotangents=1)  # whose memory is then used as it is
        assert torch.is_inference_mode_enabled()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert temporal_flow(rnn, inputs) == expected
        assert torch.is_autocast_enabled("cpu")
    rounded = inputs.bfloat16()
    assert temporal_flow(rnn, rounded) == temporal_flow(rnn, rounded.float())  # what autocast hands over
    rnn.requires_grad_(False)
    assert temporal_flow(rnn.eval(), inputs) == expected


def test_parametrized_weights() -> None:
    rnn, inputs = nn.RNN(3, 6), torch.zeros(9, 2, 3)
    for name in ("bias_ih_l0", "bias_hh_l0"):
        nn.init.zeros_(getattr(rnn, name))
    parametrizations.orthogonal(rnn, "weight_hh_l0")
    assert temporal_flow(rnn, inputs).gain_per_step == pytest.approx(1.0, abs=1e-6)


def test_compiled_modules_are_measured_uncompiled() -> None:
    def refuse(*_: Any) -> Any:
        raise AssertionError("nothing is to be compiled")

    rnn, cell, inputs, zeros = nn.GRU(3, 6), Wrapped(nn.GRUCell(3, 6)), torch.randn(5, 2, 3), torch.zeros(2, 6)
    assert temporal_flow(torch.compile(rnn, backend=refuse), inputs) == temporal_flow(rnn, inputs)
    compiled = torch.compile(cell, backend=refuse)
    assert temporal_flow(compiled, inputs, zeros) == temporal_flow(cell, inputs, zeros)


# --- host reads ---


@pytest.mark.parametrize("kind", KINDS)
def test_flow_norms_reads_nothing_and_temporal_flow_once(kind: type[nn.RNNBase]) -> None:
    rnn, inputs = kind(3, 5, num_layers=2, bidirectional=True), torch.randn(6, 2, 3)
    packed = pack_sequence([torch.randn(length, 3) for length in (2, 5, 4)], enforce_sorted=False)
    cell = Wrapped(nn.GRUCell(3, 5))
    with host_reads() as reads:
        flow_norms(rnn, inputs, cotangents=2, samples=1, steps=4)
        flow_norms(rnn, packed)
        flow_norms(cell, inputs, torch.zeros(2, 5))
    assert reads.count == 0
    with host_reads() as reads:
        temporal_flow(rnn, inputs)
    assert reads.count == 1


@pytest.mark.parametrize("kind", KINDS)
def test_flow_norms_reads_nothing_of_tensors_without_memory(kind: type[nn.RNNBase]) -> None:
    with FakeTensorMode():
        rnn, inputs = kind(3, 100, num_layers=2, bidirectional=True), torch.empty(6, 2, 3)
        norms = flow_norms(rnn, inputs, cotangents=4)
        assert [norm.shape for norm in norms.values()] == [(6,)] * 4
        with pytest.raises(DataDependentOutputException):
            norms["l0"].sum().item()  # a read does raise here


def test_directions_leave_the_global_generator_alone_and_are_the_same_at_every_call() -> None:
    state = torch.get_rng_state()
    first = _directions(100, 4)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, _directions(100, 4))


# --- what is concluded ---


def test_the_headline_is_the_layer_farthest_from_one() -> None:
    by_layer = {"l0": (0.9, 0.95, 1.0), "l1": (4.0, 2.0, 1.0), "l2": (0.36, 0.6, 1.0)}
    flow = TemporalFlow.of(by_layer)
    assert flow.grad_norms == by_layer["l1"]
    assert flow.gain_per_step == pytest.approx(2.0)
    assert TemporalFlow.of({**by_layer, "l3": (0.0, 0.0, 1.0)}).gain_per_step == 0.0
    assert TemporalFlow.of({"l0": (math.nan, math.nan, 1.0)}).gain_per_step is None
    assert TemporalFlow.of({}) == TemporalFlow(by_layer={})
    assert TemporalFlow.from_json(flow.to_json()) == flow


def test_memory_is_where_the_norm_falls_for_good() -> None:
    assert memory_length([0.5**t for t in range(20, -1, -1)]) == 7  # 0.5**7 is the first below a hundredth
    assert memory_length([0.5, 0.001, 0.001, 1.0]) is None  # it comes back
    assert memory_length([0.001, 0.5, 0.001, 1.0]) == 3
    assert memory_length([2.0, 2.0, 1.0]) is None
    assert memory_length([math.nan, 0.5, 1.0]) is None
    assert memory_length([]) is None
    assert memory_length([0.1, 0.5, 1.0], share=0.2) == 2


def test_a_forget_gate_that_is_open_remembers() -> None:
    rnn, inputs = nn.LSTM(3, 8), 0.1 * torch.randn(120, 4, 3)
    for parameter in (rnn.bias_ih_l0, rnn.bias_hh_l0, rnn.weight_hh_l0):
        nn.init.zeros_(parameter)  # only the cell state carries anything from step to step
    shut = temporal_flow(rnn, inputs)
    rnn.bias_ih_l0.data[8:16] = 6.0
    opened = temporal_flow(rnn, inputs)
    for flow, bias in ((shut, 0.0), (opened, 6.0)):
        assert flow.gain_per_step == pytest.approx(1 / (1 + math.exp(-bias)), rel=0.02)  # what the forget gate lets by
    assert shut.memory is not None
    assert shut.memory < 10
    assert opened.memory is None


# --- bad input ---


def pretrained(weight: float) -> nn.RNN:
    rnn = nn.RNN(3, 4, nonlinearity="relu")
    nn.init.constant_(rnn.weight_hh_l0, weight)
    nn.init.ones_(rnn.weight_ih_l0)
    return rnn


@pytest.mark.parametrize(
    ("rnn", "inputs", "hx", "error", "message"),
    [
        (nn.Linear(3, 3), torch.zeros(4, 2, 3), None, TypeError, "nn.RNN, nn.LSTM.*got Linear"),
        (nn.Linear(3, 3), torch.zeros(4, 2, 3), torch.zeros(2, 3), TypeError, "Linear cannot be called so"),
        (nn.Bilinear(3, 3, 7), torch.zeros(4, 2, 3), torch.zeros(2, 3), TypeError, "Bilinear must return"),
        (torch.zeros, torch.zeros(4, 2, 3), None, TypeError, "rnn must be nn.RNN"),
        (nn.LSTM(3, 4), [1.0], None, TypeError, "a tensor or a PackedSequence, got list"),
        (nn.GRUCell(3, 4), [1.0], None, TypeError, "must be a tensor of shape .T, batch, features., got list"),
        (nn.LSTM(3, 4), torch.zeros(4, 2, 5), None, ValueError, "3 features, got .4, 2, 5."),
        (nn.LSTM(3, 4), torch.zeros(3), None, ValueError, "got .3,."),
        (nn.LSTM(3, 4, batch_first=True), torch.zeros(1, 2, 3, 3), None, ValueError, ".batch, T, features."),
        (nn.GRUCell(3, 4), torch.zeros(4, 2, 5), None, ValueError, "3 features, got .4, 2, 5."),
        (nn.GRU(3, 4), torch.zeros(4, 2, 3, dtype=torch.long), None, ValueError, "floating, got torch.int64"),
        (nn.GRU(3, 4), torch.zeros(4, 2, 3, device="meta"), None, ValueError, "module's device, cpu, got meta"),
        (nn.GRUCell(3, 4), torch.zeros(4, 2, 3, device="meta"), None, ValueError, "module's device, cpu, got meta"),
        (nn.GRU(3, 4), torch.zeros(4, 2, 3), torch.zeros(1, 2, 4, device="meta"), ValueError, "hx must be on"),
        (nn.GRU(3, 4), torch.zeros(0, 2, 3), None, ValueError, "0 steps of 2 samples"),
        (nn.GRU(3, 4), torch.zeros(4, 0, 3), None, ValueError, "4 steps of 0 samples"),
        (nn.GRUCell(3, 4), torch.zeros(0, 2, 3), None, ValueError, "0 steps of 2 samples"),
        (nn.GRU(3, 4), torch.zeros(1, 2, 3), None, ValueError, "at least 2 steps, got 1"),
        (nn.GRU(3, 4), torch.zeros(4, 2, 3), torch.zeros(2, 2, 4), ValueError, "shape .1, 2, 4., got .2, 2, 4."),
        (nn.LSTM(3, 4), torch.zeros(4, 2, 3), torch.zeros(1, 2, 4), TypeError, "tuple of two tensors"),
        (nn.GRU(3, 4), torch.zeros(4, 2, 3), "zeros", TypeError, "hx must be a tensor, got str"),
        (nn.LSTMCell(3, 4), torch.zeros(4, 2, 3), torch.zeros(2, 4), TypeError, "tuple of two tensors"),
        (Convolved(), torch.zeros(4, 2, 3), torch.zeros(3, 3), ValueError, "shape .2, ....*got .3, 3."),
        (Convolved(), torch.zeros(4), torch.zeros(3, 3), ValueError, "must have shape .T, batch, ....*got .4,."),
        (nn.RNN(3, 4), torch.full((4, 2, 3), math.nan), None, ValueError, "inputs must be finite, got NaN or Inf"),
        (nn.GRU(3, 4), torch.zeros(4, 2, 3), torch.full((1, 2, 4), math.nan), ValueError, "hx must be finite"),
        (pretrained(math.nan), torch.zeros(4, 2, 3), None, ValueError, "'weight_hh_l0' of rnn must be finite"),
    ],
)  # fmt: skip
def test_bad_input_is_named(rnn: Any, inputs: Any, hx: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        temporal_flow(rnn, inputs, hx)


def test_a_growth_beyond_the_range_of_the_dtype_is_no_bad_input() -> None:
    flow = temporal_flow(pretrained(1e8), torch.ones(50, 2, 3))
    assert flow.gain_per_step is None or flow.gain_per_step > 1e3


@pytest.mark.parametrize("name", ["cotangents", "samples", "steps"])
def test_numbers_below_one_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be >= 1, got 0"):
        flow_norms(nn.GRU(3, 4), torch.zeros(4, 2, 3), **{name: 0})


def test_packed_features_are_checked() -> None:
    packed: PackedSequence = pack_sequence([torch.zeros(3, 5), torch.zeros(2, 5)])
    with pytest.raises(ValueError, match="3 features"):
        temporal_flow(nn.GRU(3, 4), packed)


def test_one_step_has_no_way_back() -> None:
    assert flow_norms(nn.LSTM(3, 4), torch.zeros(1, 2, 3))["l0"].tolist() == [1.0]


@pytest.mark.parametrize("kind", ["tanh", "relu"])
@pytest.mark.parametrize("options", [{}, {"batch_first": True}, {"num_layers": 3}, {"bidirectional": True}])
def test_what_a_plain_network_puts_out_tells_the_flow_of_its_last_layer(kind: str, options: dict[str, Any]) -> None:
    rnn = nn.RNN(5, 6, nonlinearity=kind, **options).double()
    x = torch.randn(4, 12, 5, dtype=torch.float64) if "batch_first" in options else torch.randn(12, 4, 5).double()
    quick = outer_flow(rnn, rnn(x)[0], cotangents=6, samples=4, steps=12)
    last = f"l{rnn.num_layers - 1}"
    assert set(quick) == {last}
    torch.testing.assert_close(quick[last], flow_norms(rnn, x)[last], rtol=1e-9, atol=1e-12)
