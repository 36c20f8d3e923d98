"""Where the crude ratio of gradients, first weight to last, cries and `diagnose` does not: why that is right.

The gradients at the outputs of the layers settle it: on the main chain the signal goes through.
"""

from __future__ import annotations

import math
import re

import pytest

from lightning_gradhealth import diagnose
from zoo import checks
from zoo.registry import architectures

BEYOND = 1e3
QUIET = {  # a regular expression of names -> why
    "beit|eva02": "a head of tiny weights: all blocks get the same small gradient, its own weight a large one",
    "Rwkv|rwkv": "tiny embeddings before a norm: what it scales up on the way forth it scales up on the way back, too",
}
ALL = architectures()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "name" in metafunc.fixturenames:
        everything = metafunc.config.getoption("--zoo")
        names = [name for name, one in ALL.items() if everything or one.daily]
        metafunc.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * everything) for name in names])


@pytest.mark.filterwarnings("ignore")
def test_what_a_crude_ratio_cries_at_is_found_or_explained(name: str) -> None:
    architecture = ALL[name]
    try:
        model, inputs, target = checks._build(architecture, 0)
    except ModuleNotFoundError as error:
        pytest.skip(f"{error.name} is not installed")
    architecture.loss(checks._call(model, inputs), target).backward()
    norms = [float(p.grad.abs().double().norm()) for p in model.parameters() if p.grad is not None and p.ndim > 1]
    norms = [norm for norm in norms if norm > 0.0]  # without gates at zero, and what lies behind them
    if len(norms) < 2 or abs(math.log(norms[0] / norms[-1])) < math.log(BEYOND):
        return
    model, inputs, target = checks._build(architecture, 0)
    found = not diagnose(model, (inputs, target), architecture.loss).healthy
    assert found or any(re.search(pattern, name) for pattern in QUIET)
