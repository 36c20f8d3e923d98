"""The zoo under pytest: a dozen architectures each time, all of them with `--zoo`."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from zoo import checks
from zoo.reachable import Snapshot
from zoo.registry import architectures

ALL = architectures()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "name" in metafunc.fixturenames:
        everything = metafunc.config.getoption("--zoo")
        names = [name for name, one in ALL.items() if everything or one.daily]
        metafunc.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * everything) for name in names])


@pytest.mark.filterwarnings("ignore")  # what the libraries warn of
def test_an_architecture(name: str, request: pytest.FixtureRequest) -> None:
    everything = request.config.getoption("--zoo")
    result = checks.examine(ALL[name], seeds=3 if everything else 1)
    if result.skipped:
        pytest.skip(result.skipped)
    said = [f"{check.name}: {check.reason}" for check in result.failures if not check.name.startswith("seconds")]
    assert not said, "\n".join(said)


# --- what the checks are worth ---


class Assigning(nn.Module):
    """Changes what the test is told to: by assignment, in place, or nothing."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.layer, self.how, self.kept = nn.Linear(2, 2), how, [torch.zeros(2)]
        self.register_buffer("flag", torch.tensor(False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.how == "buffer by .data":
            self.flag.data = torch.tensor(True)
        elif self.how == "equal value elsewhere":
            self.flag.data = torch.tensor(False)
        elif self.how == "in place and back":
            self.flag.logical_not_().logical_not_()
        elif self.how == "attribute":
            self.kept[0] = torch.ones(2)
        elif self.how == "frozen":
            self.layer.weight.requires_grad_(False)
        return self.layer(x)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("nothing", []),
        ("buffer by .data", ["another storage", "another value"]),
        ("equal value elsewhere", ["another storage"]),
        ("in place and back", ["version"]),
        ("attribute", ["another object", "another storage", "another value"]),
        ("frozen", ["requires_grad False"]),
    ],
)
def test_a_snapshot_sees_every_trace(how: str, said: list[str]) -> None:
    model = Assigning(how)
    before = Snapshot(model)
    model(torch.zeros(1, 2))
    changes = before.changes()
    assert all(any(what in change for change in changes) for what in said)
    assert bool(changes) == bool(said)


@pytest.mark.parametrize(
    ("at_first", "own", "ours", "ratio"),
    [
        (2.0, 1.0, 1.5, 1.5),
        (2.0, 1e-6, 1e-3, 1.0),  # both have learned the batch
        (2.0, 1e-6, 0.08, 4.0),
        (2.0, 1.0, float("nan"), float("inf")),
        (2.0, float("nan"), 1.0, 0.0),
        (3.0, -1.0, 1.0, 1.5),  # half of what the library's own gains is missing
        (3.0, -1.0, -1.0, 1.0),
        (3.0, -1.0, -9.0, 0.0),
    ],
)
def test_the_ratio_of_losses(at_first: float, own: float, ours: float, ratio: float) -> None:
    assert checks.loss_ratio(at_first, own, ours) == pytest.approx(ratio)
