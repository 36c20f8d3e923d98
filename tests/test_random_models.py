"""Random models, trained with and without a session: nothing is changed, nothing is given up, nothing is left behind.

`pytest tests/test_random_models.py --random-models 5000` draws more of them, and others each time.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import lightning.pytorch as pl
import pytest
import torch
from conftest import trainer
from hypothesis import HealthCheck, given, settings
from random_models import OPTIMIZERS, Case, batch_of, cases, loss_of, made, trained
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_gradhealth import GradHealth, HealthReport, HealthSession, diagnose

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's, on odd shapes and dtypes


def hooks_of(model: nn.Module) -> int:
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, name)) for module in model.modules() for name in names)


def check_report(report: HealthReport) -> None:
    assert report.aside == ""
    assert report.unwatched == ()
    assert HealthReport.from_json(report.to_json()) == report or "NaN" in report.to_json()


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(
        torch.equal(one, b[name]) or bool(((one == b[name]) | (one.isnan() & b[name].isnan())).all())
        for name, one in a.items()
    )


def check_session(case: Case) -> None:
    weights, random, _ = trained(case)
    watched, random_watched, session = trained(
        case, lambda net: HealthSession(net, probe_every_n_steps=case.cadence, temporal=case.seed % 4 == 0)
    )
    assert same(watched, weights)
    assert torch.equal(random_watched, random)
    report = session.report()
    check_report(report)
    assert report.steps == case.steps * len(made(case)[1])
    torch.save(session.state_dict(), buffer := io.BytesIO())
    buffer.seek(0)
    torch.load(buffer, weights_only=True)
    session.close()
    assert hooks_of(session.monitor._model) == hooks_of(made(case)[0])


def check_diagnose(case: Case) -> None:
    net, _ = made(case)
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    before, random = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    places = {name: value.data_ptr() for name, value in net.state_dict().items()}
    hooks = hooks_of(net)
    report = diagnose(net, batch_of(case, 0), lambda output, labels: loss_of(case, output, labels))
    assert report.measured
    assert same(net.state_dict(), before)
    assert {name: value.data_ptr() for name, value in net.state_dict().items()} == places
    assert all(parameter.grad is not None and bool((parameter.grad == 1).all()) for parameter in net.parameters())
    assert torch.equal(torch.get_rng_state(), random)
    assert hooks_of(net) == hooks
    assert net.training


class Module(pl.LightningModule):
    """A case for the Trainer."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        self.net, _ = made(case)

    def training_step(self, batch: int, batch_idx: int) -> Tensor | None:
        x, labels = batch_of(self.case, batch_idx)
        loss = loss_of(self.case, self.net(x), labels)
        return None if batch_idx == self.case.skips or not loss.requires_grad else loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return OPTIMIZERS[self.case.optimizers[0]](self.net.parameters())


def check_fit(case: Case) -> None:
    results = []
    health = GradHealth(probe_every_n_steps=case.cadence, preflight=case.seed % 2 == 0)
    for callbacks in ((), (health,)):
        module = Module(case)
        torch.manual_seed(case.seed + 1)
        run = trainer(*callbacks, max_epochs=1, log_every_n_steps=case.flush, accumulate_grad_batches=case.micro)
        run.fit(module, DataLoader(range(case.steps * case.micro), batch_size=None))  # type: ignore[arg-type]
        results.append((module.net.state_dict(), torch.get_rng_state(), hooks_of(module.net)))
    assert same(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert results[0][2] == results[1][2]
    check_report(health.report())


@pytest.mark.parametrize(
    ("check", "share"),
    [(check_session, 1.0), (check_diagnose, 0.5), (check_fit, 0.3)],
    ids=["session", "diagnose", "fit"],
)
def test_random_models(check: Callable[[Case], None], share: float, pytestconfig: pytest.Config) -> None:
    count = pytestconfig.getoption("--random-models")

    @settings(
        max_examples=max(1, round(share * (count or 100))),
        derandomize=count is None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(cases())
    def each(case: Case) -> None:
        check(case)

    each()
