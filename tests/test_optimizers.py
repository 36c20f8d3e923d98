"""Optimizers of all kinds: wrapped, without step hooks, replacing what they step, and gone."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import Classifier, batches, mlp, trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from lightning_gradhealth import GradHealth, GradientMonitor, HealthSession, NormClip
from lightning_gradhealth.gradients.optimizers import bare, takes_hooks


class Lookahead(Optimizer):
    """Pulls the weights back to slow ones every second step; as in many libraries, without `super().__init__`."""

    def __init__(self, base: Optimizer) -> None:
        self.base = base
        self.param_groups, self.state, self.defaults = base.param_groups, base.state, base.defaults
        self.slow = [p.detach().clone() for group in self.param_groups for p in group["params"]]
        self.steps = 0

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.base.zero_grad(set_to_none)

    def step(self, closure: Any = None) -> Any:
        loss = self.base.step(closure)
        self.steps += 1
        if self.steps % 2 == 0:
            fast = [p for group in self.param_groups for p in group["params"]]
            for slow, parameter in zip(self.slow, fast, strict=True):
                slow.add_(parameter.detach() - slow, alpha=0.5)
                parameter.data.copy_(slow)
        return loss

    def state_dict(self) -> dict[str, Any]:
        return self.base.state_dict()


class Delegating(Optimizer):
    """Keeps the optimizer in `.optimizer`, its groups in a property, and its hooks nowhere, as Accelerate's does."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer, self.scaler = optimizer, None

    @property
    def param_groups(self) -> Any:
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:
        return self.optimizer.state

    @property
    def defaults(self) -> Any:
        return self.optimizer.defaults

    def step(self, closure: Any = None) -> Any:
        return self.optimizer.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()


class Scheduled:
    """No optimizer at all, but it has one."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer

    def step(self) -> None:
        self._optimizer.step()

    def zero_grad(self) -> None:
        self._optimizer.zero_grad()


class Bare(Optimizer):
    """Plain descent without `super().__init__`: there is nothing inside that takes hooks."""

    def __init__(self, parameters: Any, lr: float = 0.1) -> None:
        self.defaults, self.state = {"lr": lr}, {}
        self.param_groups = [{"params": list(parameters), "lr": lr}]

    def zero_grad(self, set_to_none: bool = True) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else closure()
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter.sub_(group["lr"] * parameter.grad)
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {}


class Duck:
    """No Optimizer, but one in all that counts."""

    def __init__(self, parameters: Any) -> None:
        self.param_groups = [{"params": list(parameters), "lr": 0.1}]

    def step(self) -> None:
        Bare.step(self)  # type: ignore[arg-type]

    def zero_grad(self) -> None:
        Bare.zero_grad(self)  # type: ignore[arg-type]


class Replacing(SGD):
    """Gives the parameters new memory instead of writing into the old one."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.data = parameter.data - group["lr"] * parameter.grad
        return None


class Projecting(SGD):
    """Steps as its parent does, and then does more."""

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.mul_(0.5)
        return loss


class NewObjects(SGD):
    """Puts new parameters in the place of the old ones."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["params"] = [
                nn.Parameter(p.detach() - group["lr"] * p.grad) if p.grad is not None else p for p in group["params"]
            ]
        return None


def steps(
    make: Callable[[Any], Any], count: int = 4, **options: Any
) -> tuple[HealthSession, list[Tensor], list[float]]:
    """Run a loop that is probed at every step; the changes of the weights of each layer, and the norms given."""
    torch.manual_seed(0)
    model = mlp(depth=3)
    optimizer, session = make(model.parameters()), HealthSession(model, probe_every_n_steps=1, **options)
    changes, norms = [], []
    for _ in range(count):
        optimizer.zero_grad()
        model(torch.randn(8, 8)).square().mean().backward()
        session.apply(session.observe(optimizer))
        norms.append(float(torch.cat([p.grad.flatten() for p in model.parameters()]).norm()))
        groups = bare(optimizer).param_groups
        before = [p.detach().clone() for group in groups for p in group["params"]]
        optimizer.step()
        after = [p.detach().clone() for group in groups for p in group["params"]]
        pairs = list(zip(before, after, strict=True))
        layers = [pairs[i : i + 2] for i in range(0, len(pairs), 2)]
        changes.append(
            torch.stack(
                [
                    torch.cat([(b - a).flatten() for a, b in layer]).norm()
                    / torch.cat([a.flatten() for a, _ in layer]).norm()
                    for layer in layers
                ]
            )
        )
    return session, changes, norms


MEASURED: dict[str, Callable[[Any], Any]] = {
    "plain": lambda ps: SGD(ps, lr=0.1),
    "lookahead": lambda ps: Lookahead(SGD(ps, lr=0.1)),
    "delegating": lambda ps: Delegating(Adam(ps, lr=0.01)),
    "twice wrapped": lambda ps: Delegating(Lookahead(SGD(ps, lr=0.1))),
    "scheduled": lambda ps: Scheduled(SGD(ps, lr=0.1)),
    "replacing": lambda ps: Replacing(ps, lr=0.1),
    "projecting": lambda ps: Projecting(ps, lr=0.1),
    "replacing inside": lambda ps: Lookahead(Replacing(ps, lr=0.1)),
}


@pytest.mark.parametrize("name", MEASURED)
def test_updates_are_what_the_step_did(name: str) -> None:
    session, changes, _ = steps(MEASURED[name])
    record = session.monitor.records([v.reshape(-1).tolist() for v in session.monitor.pending()])
    got = [[layer.update_to_weight for layer in one.layers] for one in record]
    assert got == [pytest.approx(change.tolist(), rel=1e-5) for change in changes]
    assert not any("update/weight" in note for note in session.report().notes)


def test_new_parameters_in_the_place_of_old_ones_are_compared() -> None:
    session, changes, _ = steps(lambda ps: NewObjects(ps, lr=0.1), count=1)
    layers = session.flush().layers
    assert [layer.update_to_weight for layer in layers] == pytest.approx(changes[0].tolist(), rel=1e-5)


@pytest.mark.parametrize("make", [Bare, Duck])
def test_without_hooks_only_the_update_is_lost(make: Callable[[Any], Any]) -> None:
    session, _, norms = steps(make, clip=NormClip(0.05))
    report = session.report()
    assert report.steps == len(norms) == 4
    assert max(norms) <= 0.0501
    assert f"update/weight: not measured: {make.__name__} takes no step hooks" in report.notes
    assert all(layer.update_to_weight is None and layer.weight_norm for layer in report.layers)
    assert report.clipped_steps > 0


@pytest.mark.parametrize("wrong", [5, None, "adam", SGD, [1], nn.Linear(1, 1)])
def test_what_is_no_optimizer_is_refused(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"optimizer must be a torch\.optim\.Optimizer, got"):
        HealthSession(mlp()).observe(wrong)


def test_wrappers_in_a_circle_end() -> None:
    optimizer = SGD(mlp().parameters(), lr=0.1)
    optimizer.base = optimizer  # type: ignore[attr-defined]
    assert bare(optimizer) is optimizer
    first, second = Delegating(optimizer), Delegating(optimizer)
    first.optimizer, optimizer.base = second, first  # type: ignore[attr-defined,assignment]
    assert bare(first) is optimizer


def test_what_steps_other_parameters_is_no_wrapped_optimizer() -> None:
    outer, inner = SGD(mlp().parameters(), lr=0.1), SGD(mlp().parameters(), lr=0.1)
    outer.base = inner  # type: ignore[attr-defined]
    assert bare(outer) is outer


def test_accelerate() -> None:
    accelerate = pytest.importorskip("accelerate")
    optimizer = SGD(mlp().parameters(), lr=0.1)
    wrapped = accelerate.Accelerator(cpu=True).prepare_optimizer(optimizer)
    assert bare(wrapped) is optimizer
    assert not takes_hooks(wrapped)
    assert takes_hooks(optimizer)


@pytest.mark.parametrize("wrap", [Lookahead, Delegating])
@pytest.mark.parametrize("options", [{}, {"clip": NormClip(0.05), "on_non_finite": "skip"}])
def test_lightning_goes_on_with_wrappers(wrap: Callable[[Any], Any], options: dict[str, Any]) -> None:
    module, health = Classifier(optimizer=lambda ps, lr: wrap(SGD(ps, lr=lr))), GradHealth(**options)
    trainer(health, max_steps=16, log_every_n_steps=1).fit(module, batches())
    report = health.report()
    assert not report.aside
    assert report.steps == 16
    assert all(layer.update_to_weight for layer in report.layers)
    assert report.clipped_steps == (16 if options else 0)


def test_a_scaler_unscales_once_whoever_it_knows() -> None:
    model = mlp()
    for make in (lambda o: o, Lookahead, Delegating):
        inner = SGD(model.parameters(), lr=0.0)
        optimizer, scaler = make(inner), torch.amp.GradScaler("cpu", init_scale=1024.0)
        if isinstance(optimizer, Delegating):
            optimizer.scaler = scaler
        session = HealthSession(model, clip=NormClip(1e9))
        inner.zero_grad()
        scaler.scale(model(torch.ones(2, 8)).sum()).backward()
        truth = torch.cat([p.grad.flatten() for p in model.parameters()]).norm() / 1024.0
        given = None if isinstance(optimizer, Delegating) else scaler  # it is found where the wrapper keeps it
        decision = session.observe(optimizer, grad_scaler=given)
        session.apply(decision)
        assert decision.total_norm.item() == pytest.approx(truth.item(), rel=1e-6)
        scaler.step(inner if isinstance(optimizer, Delegating) else optimizer)  # would unscale a second time
        left = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
        assert left.item() == pytest.approx(truth.item(), rel=1e-6)


@pytest.mark.parametrize("make", [Adam, lambda ps: Lookahead(SGD(ps, lr=0.1)), lambda ps: Adam(ps, fused=True)])
@pytest.mark.parametrize("mode", ["warn", "skip"])
def test_replaced_optimizers_are_let_go(make: Callable[[Any], Any], mode: Any) -> None:
    model = mlp()
    session, known = HealthSession(model, on_non_finite=mode, clip="adaptive", probe_every_n_steps=1), []
    for _ in range(20):
        optimizer = make(model.parameters())
        known.append(weakref.ref(optimizer))
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(4, 8)).square().mean().backward()
            session.apply(session.observe(optimizer))
            optimizer.step()
    del optimizer
    gc.collect()
    assert [reference() for reference in known] == [None] * 20
    assert session.report().steps == 60


def test_what_is_left_of_replaced_weights_is_one_empty_tensor() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    session = HealthSession(model, probe_every_n_steps=1)
    for _ in range(10):
        model[1] = nn.Linear(8, 2)
        optimizer = SGD(model.parameters(), lr=0.1)
        model(torch.randn(4, 8)).square().mean().backward()
        session.apply(session.observe(optimizer))
        optimizer.step()
        session.flush()
    slots = session.monitor.layout.slots
    left = [slot.parameter for slot in slots if slot.parameter.is_meta]
    assert len(left) >= 8
    assert len({id(parameter) for parameter in left}) == len({parameter.ndim for parameter in left})
    assert not any(parameter.numel() for parameter in left)


def test_the_x_value_goes_on_when_another_optimizer_takes_over() -> None:
    model = mlp()
    session, seen = HealthSession(model), []
    for stage in range(3):
        optimizer = SGD(model.parameters(), lr=0.1 / (stage + 1))
        for _ in range(4):
            model(torch.randn(4, 8)).square().mean().backward()
            decision = session.observe(optimizer)
            seen.append(decision.row.step)
            session.apply(decision)
            optimizer.step()
    assert seen == [0, 1, 2, 3, 3, 4, 5, 6, 6, 7, 8, 9]


def test_two_optimizers_of_one_round_have_one_x_value() -> None:
    parts = [mlp(), mlp()]
    monitor = GradientMonitor(nn.ModuleList(parts))
    first, second = (SGD(part.parameters(), lr=0.1) for part in parts)
    seen = []
    for optimizer in (first, second, first, second, first, first, second):
        for part in parts:
            part(torch.randn(4, 8)).sum().backward()
        seen.append(monitor.observe(optimizer).row.step)
    assert seen == [0, 0, 1, 1, 2, 3, 3]


class Head(nn.Linear):
    """The last layer of the net, of a shape that nothing else has."""

    def __init__(self) -> None:
        super().__init__(8, 7)


def heads_alive() -> int:
    """Weights of heads that are still in memory; a weak reference to a parameter forbids torch to swap it."""
    gc.collect()
    found = (each for each in gc.get_objects() if isinstance(each, nn.Parameter) and not each.is_meta)
    return sum(each.shape == (7, 8) for each in found if not torch.nn.parameter.is_lazy(each))


@pytest.mark.parametrize("flushed", [1, 4])
def test_replaced_heads_are_let_go_and_the_new_one_is_measured(flushed: int) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), Head())
    session, before = HealthSession(model, probe_every_n_steps=1), heads_alive()
    for _ in range(20):
        model[2] = Head()
        optimizer = Adam(model.parameters(), lr=0.01)
        for step in range(4):
            optimizer.zero_grad()
            model(torch.randn(4, 8)).square().mean().backward()
            session.apply(session.observe(optimizer))
            old = torch.cat([p.detach().flatten() for p in model[2].parameters()])
            optimizer.step()
            if step % flushed == flushed - 1:
                record = session.flush()
        new = torch.cat([p.detach().flatten() for p in model[2].parameters()])
        head = next(layer for layer in record.layers if layer.name == "2")
        assert head.update_to_weight == pytest.approx(((new - old).norm() / old.norm()).item(), rel=1e-4)
        assert head.numel == 63
    assert heads_alive() == before
    report = session.report()
    assert not report.aside
    assert [layer.name for layer in report.layers] == ["0", "2"]
    session.close()


def test_heads_replaced_within_a_fit_are_let_go() -> None:
    class Swaps(Callback):
        def __init__(self) -> None:
            self.alive = 0

        def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if trainer.global_step % 3 == 2:
                pl_module.net[-1] = Head()
                trainer.optimizers[0].param_groups[0]["params"] = list(pl_module.parameters())
                trainer.optimizers[0].state.clear()

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            self.alive = heads_alive()

    before, swaps, health = heads_alive(), Swaps(), GradHealth(probe_every_n_steps=1)
    trainer(health, swaps, max_steps=63, max_epochs=-1, log_every_n_steps=3).fit(Classifier(mlp(width=8)), batches())
    assert swaps.alive == before + 1
    assert health.report().steps == 63
    assert not health.report().aside


@pytest.mark.parametrize("broken", ["torch._foreach_norm", "torch.take", "torch.cat"])
def test_a_failure_behind_the_optimizers_step_stays_there(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    class Breaks(SGD):
        def step(self, closure: Any = None) -> Any:
            loss = super().step(closure)
            patch.setattr(broken, full)  # until the hook behind this step is over
            return loss

    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
    session, optimizer = HealthSession(model, probe_every_n_steps=1), Breaks(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(8, 64)).square().mean().backward()
        session.apply(session.observe(optimizer))
        with monkeypatch.context() as patch:
            optimizer.step()
    report = session.report()
    assert report.steps == 3
    assert not report.aside
    assert all(layer.grad_norm and not layer.update_to_weight for layer in report.layers) or broken != "torch.cat"
    assert [note for note in report.notes if note.startswith("update/weight: not measured")]
