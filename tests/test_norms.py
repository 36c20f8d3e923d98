"""Norms equal a slow float64 twin to 1e-6, whatever the dtype, size, layout and magnitude."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import reference
import torch
from hypothesis import given, settings

from lightning_gradhealth import GradientMonitor
from lightning_gradhealth.gradients import norms, read_once

SIZES = (1, 100, 65_536, 65_537, 300_001)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("size", SIZES)
def test_equal_to_the_twin(dtype: torch.dtype, size: int, exact: bool) -> None:
    tensor = torch.randn(size).to(dtype)
    assert norms([tensor], exact=exact).item() == pytest.approx(reference.norm(tensor), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-25, 1e-15, 1e15, 1e20])
@pytest.mark.parametrize("size", SIZES)
def test_tiny_and_huge_elements_are_exact(dtype: torch.dtype, scale: float, size: int) -> None:
    tensor = (torch.randn(size) * scale).to(dtype)
    assert norms([tensor]).item() == pytest.approx(reference.norm(tensor), rel=1e-6)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("size", [100, 200_000])
def test_fp16_whose_own_norm_overflows(size: int, exact: bool) -> None:
    tensor = torch.full((size,), 6e4, dtype=torch.float16)
    assert tensor.norm().isinf()
    assert norms([tensor], exact=exact).item() == pytest.approx(6e4 * math.sqrt(size), rel=1e-3)
    assert norms([tensor], exact=exact).item() == pytest.approx(reference.norm(tensor), rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 1e-25, 1e20])
def test_ten_million_elements(dtype: torch.dtype, scale: float) -> None:
    if dtype is torch.float16:
        scale = {1.0: 1.0, 1e-25: 1e-6, 1e20: 1e4}[scale]
    tensor = (torch.randn(10_000_000) * scale).to(dtype)
    expected = reference.norm(tensor)
    assert norms([tensor]).item() == pytest.approx(expected, rel=1e-6)
    if 1e-15 < scale < 1e15:
        assert norms([tensor], exact=False).item() == pytest.approx(expected, rel=1e-6)


def test_layouts() -> None:
    dense = torch.randn(40, 60, 5, 7)
    last = dense.to(memory_format=torch.channels_last)
    indices = torch.tensor([[0, 0, 3]])
    repeated = torch.sparse_coo_tensor(indices, torch.tensor([1.0, 2.0, 4.0]), (5,))
    compressed = torch.eye(3).to_sparse_csr()
    complex_ = torch.randn(50, dtype=torch.complex64)
    tensors = [dense, last, dense[::2, 1:], dense[:1].expand(3, 60, 5, 7), repeated, compressed, complex_.conj()]
    for exact in (True, False):
        got = norms([*tensors, torch.zeros(0, 4)], exact=exact).tolist()
        assert got == pytest.approx([*(reference.norm(tensor) for tensor in tensors), 0.0], rel=1e-6)
    assert norms([]).shape == (0,)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("size", [10, 100_000])
@pytest.mark.parametrize("exact", [True, False])
def test_nan_and_inf_are_seen_in_their_own_slot_only(bad: float, size: int, exact: bool) -> None:
    tensor = torch.ones(size)
    tensor[size // 2] = bad
    first, second = norms([tensor, torch.ones(4)], exact=exact).tolist()
    assert not math.isfinite(first)
    assert second == 2.0


@settings(max_examples=30)
@given(
    shapes=st.lists(st.lists(st.integers(0, 9), min_size=0, max_size=3), min_size=1, max_size=6),
    exponent=st.integers(-30, 18),
)
def test_property_scaling_and_order(shapes: list[list[int]], exponent: int) -> None:
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    plain = norms(tensors)
    assert torch.allclose(norms([tensor * 2.0**exponent for tensor in tensors]), plain * 2.0**exponent, rtol=1e-12)
    assert torch.equal(norms(tensors[::-1]), plain.flip(0))
    total = math.sqrt(sum(value**2 for value in plain.tolist()))
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    assert total == pytest.approx(reference.norm(flat), rel=1e-12)


def test_read_once_keeps_shapes_apart() -> None:
    vectors = [torch.ones(2), torch.tensor(3.0, dtype=torch.float16), torch.zeros(0)]
    assert read_once(vectors) == [[1.0, 1.0], [3.0], []]
    assert read_once([]) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 1e-25, 1e20])
def test_the_monitor_equals_the_twin_per_layer(dtype: torch.dtype, scale: float) -> None:
    if dtype is torch.float16:
        scale = {1.0: 1.0, 1e-25: 1e-6, 1e20: 1e4}[scale]
    model = torch.nn.Sequential(torch.nn.Linear(300, 300), torch.nn.LayerNorm(300), torch.nn.Linear(300, 2)).to(dtype)
    for parameter in model.parameters():
        parameter.grad = (torch.randn(parameter.shape) * scale).to(dtype)
    monitor = GradientMonitor(model)
    monitor.observe(torch.optim.SGD(model.parameters(), lr=0.1))
    record = monitor.flush()
    assert {layer.name: layer.grad_norm for layer in record.layers} == pytest.approx(
        reference.layer_norms(model), rel=1e-6
    )
    assert {layer.name: layer.norm_ratio for layer in record.layers} == pytest.approx(
        reference.norm_ratios(model), rel=1e-6
    )
    assert record.total_norm == pytest.approx(math.hypot(*reference.layer_norms(model).values()), rel=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("scale", [1.0, 1e-25, 1e20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_to_the_twin_on_a_gpu(scale: float, dtype: torch.dtype) -> None:
    tensors = [(torch.randn(size) * scale).to("cuda", dtype) for size in SIZES]
    assert norms(tensors).tolist() == pytest.approx([reference.norm(t.cpu()) for t in tensors], rel=1e-6)
