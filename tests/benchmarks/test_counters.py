"""Exact counters of what a watched step does: operators, host reads, device vectors. They hold on any machine."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from counting import host_reads
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import lightning_gradhealth as gh
from lightning_gradhealth import HealthSession


class Operators(TorchDispatchMode):
    """Counts dispatched operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.name()] += 1
        return func(*args, **(kwargs or {}))


def observed(
    depth: int, width: int = 20, clip: gh.Clipper | str | None = None
) -> tuple[HealthSession, torch.optim.Optimizer, nn.Module]:
    """A session that has its probed first steps behind it, the last of them step 32."""
    model = nn.Sequential(*(nn.Linear(width, width) for _ in range(depth)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    session = HealthSession(model, clip=clip, probe_every_n_steps=1_000)
    model(torch.randn(2, width)).square().mean().backward()
    for _ in range(33):
        session.apply(session.observe(optimizer, loss=0.0))
        optimizer.step()
    session.flush()
    return session, optimizer, model


@pytest.mark.parametrize("depth", [2, 20, 200])
def test_operators_of_a_step_do_not_grow_with_the_layers(depth: int) -> None:
    session, optimizer, _ = observed(depth)
    loss = torch.tensor(0.0)
    with Operators() as operators:
        session.apply(session.observe(optimizer, loss))
    seen = {name: count for name, count in operators.counts.items() if "detach" not in name}
    assert seen == {"aten::_foreach_norm.Scalar": 1, "aten::stack": 1, "aten::clone": 1}  # the clone: of the loss


@pytest.mark.parametrize("depth", [2, 200])
def test_one_read_a_flush_whatever_it_holds(depth: int) -> None:
    session, optimizer, _ = observed(depth)
    for _ in range(10):
        session.observe(optimizer, loss=torch.tensor(0.0))
    with host_reads() as reads:
        session.flush()
    assert reads.count == 1


@pytest.mark.parametrize("depth", [2, 200])
def test_what_stays_on_the_device_is_one_short_vector_a_step(depth: int) -> None:
    session, optimizer, model = observed(depth)
    for _ in range(10):
        session.observe(optimizer)
    held = sum(vector.numel() for vector in session.monitor.pending())
    assert held == 10 * len(list(model.parameters()))


def test_large_tensors_are_read_once_and_never_copied() -> None:
    session, optimizer, _ = observed(2, width=600)
    with Operators() as operators:
        session.observe(optimizer)
    assert not {name for name in operators.counts if "copy" in name or "clone" in name or "cat" in name}
    assert operators.counts["aten::linalg_vector_norm"] == 2 * 4  # for each: blocks, rest, total, the largest block


CLIPPERS = {"norm": lambda: gh.NormClip(1.0), "adaptive": lambda: "adaptive", "z-score": gh.ZScoreClip}


@pytest.mark.parametrize("clip", CLIPPERS)
def test_clipping_by_one_factor_costs_one_more_pass_and_no_operator_a_layer(clip: str) -> None:
    def operators(depth: int) -> Counter[str]:
        session, optimizer, _ = observed(depth, clip=CLIPPERS[clip]())
        for _ in range(gh.WhenExploding.LOOKS if clip == "adaptive" else 0):
            session.apply(session.observe(optimizer, torch.tensor(0.0)))
        with Operators() as seen:
            session.apply(session.observe(optimizer, torch.tensor(0.0)))
        return seen.counts

    few, many = operators(2), operators(200)
    assert few == many
    assert many["aten::_foreach_mul_.Tensor"] == many["aten::_foreach_norm.Scalar"] == 1
    assert sum(many.values()) < 240  # of single numbers, however many layers there are


def test_directions_are_compared_in_the_largest_tensors_only() -> None:
    def operators(depth: int) -> int:
        session, optimizer, _ = observed(depth, clip="adaptive")
        for _ in range(2):
            with Operators() as seen:
                session.apply(session.observe(optimizer, torch.tensor(0.0)))
        return sum(seen.counts.values())

    assert operators(20) == operators(200)
