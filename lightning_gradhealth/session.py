"""HealthSession: the trainer-free heart. It composes monitor, weight probes and judgement, and computes nothing."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from lightning_gradhealth.gradients import Clip, Decision, GradientMonitor, check_clip, read_once
from lightning_gradhealth.gradients.monitor import CAPACITY
from lightning_gradhealth.judgement import Judgement
from lightning_gradhealth.layers import LayersSpec, UseRecorder, check_layers
from lightning_gradhealth.records import Condition, Finding, HealthReport, Severity, StepRecord
from lightning_gradhealth.response import OnNonFinite, Response, check_on_non_finite
from lightning_gradhealth.rules import Rule, Thresholds, default_rules

log = logging.getLogger("lightning_gradhealth")

DEFAULT_CADENCE = 50
ALWAYS_PROBED = 2

Ignore = Mapping[str, str] | Iterable[str] | str | None
StopOn = Sequence[str] | str


def check_arguments(
    clip: Clip,
    on_non_finite: OnNonFinite,
    probe_every_n_steps: int | None,
    layers: LayersSpec,
    rules: Sequence[Rule],
    ignore: Ignore,
    thresholds: Thresholds,
) -> dict[str, str]:
    """Check what GradHealth and HealthSession have in common, and return `ignore` as condition -> regex.

    Raises:
        ValueError: A value is out of range, with its name and the remedy.
        TypeError: A value is of the wrong type.

    Example:
        >>> check_arguments(None, "warn", None, "module", (), "loss_spike", Thresholds())
        {'loss_spike': '.*'}
    """
    check_clip(clip)
    check_on_non_finite(on_non_finite)
    if probe_every_n_steps is not None:
        if isinstance(probe_every_n_steps, bool) or not isinstance(probe_every_n_steps, int):
            raise TypeError(
                f"probe_every_n_steps must be an int or None, got {probe_every_n_steps!r};"
                " leave it out to follow the Trainer"
            )
        if probe_every_n_steps < 1:
            raise ValueError(
                f"probe_every_n_steps must be >= 1, got {probe_every_n_steps}; leave it out to follow the Trainer"
            )
    check_layers(layers)
    if not isinstance(thresholds, Thresholds):
        raise TypeError(f"thresholds must be a Thresholds, got {thresholds!r}; e.g. Thresholds(time_ratio=100.0)")
    if not isinstance(rules, Sequence):
        raise TypeError(f"rules must be a sequence of Rule instances, got {rules!r}; e.g. rules=[MyRule()]")
    for rule in rules:
        if not isinstance(rule, Rule) or not rule.condition:
            raise TypeError(
                f"rules must be instances of subclasses of Rule with a condition, got {rule!r}; e.g. rules=[MyRule()]"
            )
    return _check_ignore(ignore, rules)


def _check_ignore(ignore: Ignore, rules: Sequence[Rule]) -> dict[str, str]:
    if ignore is None:
        ignore = {}
    elif isinstance(ignore, str):
        ignore = {ignore: ".*"}
    elif not isinstance(ignore, Iterable):
        raise TypeError(
            f"ignore must be a condition, several, or condition -> regex, got {ignore!r};"
            ' e.g. ignore={"stalled_layers": "head.*"}'
        )
    elif not isinstance(ignore, Mapping):
        ignore = dict.fromkeys(ignore, ".*")
    for condition, pattern in ignore.items():
        _check_condition("ignore", condition, rules)
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise ValueError(
                f"ignore: {pattern!r} is not a valid regular expression ({error}); it is matched against layer names"
            ) from error
    return {str(condition): pattern for condition, pattern in ignore.items()}


def _check_condition(argument: str, condition: Any, rules: Sequence[Rule]) -> None:
    known = {condition.value for condition in Condition} | {str(rule.condition) for rule in rules}
    if not isinstance(condition, str) or str(condition) not in known:
        raise ValueError(
            f"{argument}: {str(condition)!r} is no condition; the conditions are {', '.join(sorted(known))}"
        )


def check_stop_on(stop_on: StopOn, rules: Sequence[Rule]) -> frozenset[str]:
    """Return the conditions that end a fit.

    Raises:
        TypeError: `stop_on` is neither a condition nor a sequence of them.
        ValueError: One of them is no condition.

    Example:
        >>> sorted(check_stop_on("exploding_gradients", ()))
        ['exploding_gradients']
    """
    if not isinstance(stop_on, (str, Iterable)):
        raise TypeError(f'stop_on must be a condition or several, got {stop_on!r}; e.g. stop_on="exploding_gradients"')
    conditions = [stop_on] if isinstance(stop_on, str) else list(stop_on)
    for condition in conditions:
        _check_condition("stop_on", condition, rules)
    return frozenset(map(str, conditions))


class HealthSession:
    """Watches a training loop of any kind and says what is wrong; `GradHealth` is this, for Lightning.

    Each step: `observe` after backward and before `optimizer.step()`, then `apply`. Nothing is read from the
    device until `flush` (call it when you log) or `report`; a window of more than 1,024 steps is read in between.
    Training is not changed, unless `clip` or `on_non_finite` says so.

    Args:
        model: The model; DDP's wrapper is looked through, FSDP's is needed.
        clip: "adaptive" (clip while an explosion is detected), a clipper, or None.
        on_non_finite: What to do about NaN and Inf in gradients: "warn"; "skip" the step, so that the optimizer does
            not see it; "raise" an error before it; or skip it and set `should_stop` ("stop"). The last three name
            the module where it began. Under a loss scaler, which skips such steps by itself, nothing is done,
            but "raise" and "stop" act after 25 in a row.
        probe_every_n_steps: Weights and updates are measured at every n-th step of an optimizer, and at its
            first two; None: 50.
        layers: How parameters are grouped: "module", "parameter", a depth, or regexes.
        rules: Rules of your own, in addition to the default ones.
        ignore: Conditions to mute: a name, several, or condition -> regex of layer names.
        thresholds: The numbers that verdicts depend on.
        stop_on: Conditions that set `should_stop` when they are found with severity warning or above.
        announce: Called once with one line for every new or graver finding; None: the logger
            "lightning_gradhealth" warns, on rank zero.
        remember_calls: Whether to keep the arguments of the model's calls until the optimizer steps, so that they
            can be run again when a NaN is traced to its origin; False for loops that call `response.remember`
            themselves. Without effect while `on_non_finite` is "warn".

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        >>> session = HealthSession(net)
        >>> for _ in range(3):
        ...     optimizer.zero_grad()
        ...     loss = net(torch.randn(16, 4)).square().mean()
        ...     loss.backward()
        ...     session.apply(session.observe(optimizer, loss=loss))
        ...     _ = optimizer.step()
        >>> session.flush().step, session.report().healthy
        (2, True)
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        clip: Clip = None,
        on_non_finite: OnNonFinite = "warn",
        probe_every_n_steps: int | None = None,
        layers: LayersSpec = "module",
        rules: Sequence[Rule] = (),
        ignore: Ignore = None,
        thresholds: Thresholds = Thresholds(),  # noqa: B008  (frozen)
        stop_on: StopOn = (),
        announce: Callable[[str], None] | None = None,
        remember_calls: bool = True,
    ) -> None:
        muted = check_arguments(clip, on_non_finite, probe_every_n_steps, layers, rules, ignore, thresholds)
        self.stop_on = check_stop_on(stop_on, rules)
        self.probe_every_n_steps = probe_every_n_steps or DEFAULT_CADENCE
        self.monitor = GradientMonitor(model, clip, layers)
        self.response = Response(model, on_non_finite, thresholds.skipped_in_a_row)
        if remember_calls:
            self.response.remember_calls()
        self.judgement = Judgement([*default_rules(thresholds), *copy.deepcopy(list(rules))], muted)
        self._announce = announce or _warn_on_rank_zero
        self._recorder: UseRecorder | None = UseRecorder(model)
        self._order_complete = True
        self._losses: Tensor | float | None = None
        self._last = StepRecord(step=-1)
        self.notes: list[str] = []
        self._latest = self.judgement  # or its copy that has seen a window that is not over yet
        self._told: set[tuple[str, str]] = set()
        self._resumed_at = -1

    # --- every step ---

    def observe(
        self,
        optimizer: Optimizer,
        loss: Tensor | float | None = None,
        grad_scaler: GradScaler | None = None,
        *,
        step: int | None = None,
    ) -> Decision:
        """Look at the gradients of `optimizer`, after backward and before it steps; reads nothing on the host.

        Args:
            optimizer: The optimizer that is about to step; only its parameters are looked at.
            loss: The training loss of this step, shape () or a float.
            grad_scaler: The scaler of the loss, if there is one, before or after its `unscale_`.
            step: The loggers' x value; None counts from 0 the steps of the optimizer that stepped most.

        Returns:
            What is to be done, for `apply`.
        """
        self._settle_order()
        if len(self.monitor.rows) >= CAPACITY:
            self.flush()
        count = self.monitor.steps_of(optimizer)
        probed = count < ALWAYS_PROBED or (count + 1) % self.probe_every_n_steps == 0
        decision = self.monitor.observe(optimizer, step=step, grad_scaler=grad_scaler, exact=probed, probe=probed)
        self.response.judge(decision)
        if loss is not None:
            self.add_loss(loss)
        return decision

    def _settle_order(self) -> None:
        """Take the order of first use, once the first batch has been through the forward pass."""
        if self._recorder is not None and self._recorder.used:
            self._recorder.close()
            if not self.monitor.layout.used:
                self.monitor.layout.record_use(self._recorder.used)
            self._order_complete = self._recorder.complete
            self._recorder = None

    def add_loss(self, loss: Tensor | float) -> None:
        """Add the loss of a batch; the losses of the micro-batches of one step are summed.

        Args:
            loss: Shape () or a float: the share of one micro-batch in the loss of the step.
        """
        value = loss.detach().clone() if isinstance(loss, Tensor) else float(loss)
        self._losses = value if self._losses is None else self._losses + value
        waiting = False
        for row in reversed(self.monitor.rows):
            if row.loss is not None or row.step != self.monitor.rows[-1].step:
                break
            row.loss, waiting = self._losses, True
        if waiting:
            self._losses = None

    def apply(self, decision: Decision) -> None:
        """Carry out what `observe` decided: clip the gradients, or set them to None, which skips the step.

        Raises:
            NonFiniteGradientError: `on_non_finite` is "raise", or too many steps were skipped in a row.
        """
        if not self.response.carry_out(decision, sharded=self.monitor.sharded):
            self.monitor.apply(decision)
        elif decision.row.origin and any(condition == Condition.NON_FINITE for condition, _ in self._told):
            self._announce(f"gradhealth: step {decision.row.step}: {decision.row.origin}")

    @property
    def should_stop(self) -> str:
        """Why the training should end (`on_non_finite="stop"`, `stop_on`); empty while it should not."""
        seen = self.judgement.findings.values()
        found = [f for f in seen if f.condition in self.stop_on and f.last_step > self._resumed_at]
        grave = (str(finding) for finding in found if finding.severity is not Severity.INFO)
        return self.response.stop or next(grave, "")

    # --- at the logging cadence ---

    def flush(self) -> StepRecord:
        """Read everything since the last flush in one transfer, judge it, and return the latest record.

        Returns:
            The record of the last step; the previous one where nothing was observed since.
        """
        rows = list(self.monitor.rows)
        records = self.monitor.records(read_once(self.monitor.pending()))
        self.monitor.rows.clear()
        for record in records:
            self._tell(self.judgement.add(record))
        self._last = records[-1] if records else self._last
        self._latest = self.judgement
        self.response.review(zip(rows, (step for record in records for step in record.window), strict=True))
        return self._last

    def conclude(self) -> StepRecord:
        """Judge a window that is not over yet, on a copy, so that a resumed run equals an unbroken one.

        Returns:
            The record of the last step observed.
        """
        self._latest, records = self._peek()
        self._tell(self._latest.findings.values())
        return records[-1] if records else self._last

    def _peek(self) -> tuple[Judgement, list[StepRecord]]:
        """The judgement, or a copy of it that has seen the pending window too, and that window's records."""
        records = self.monitor.records(read_once(self.monitor.pending()))
        judgement = copy.deepcopy(self.judgement) if records else self.judgement
        for record in records:
            judgement.add(record)
        return judgement, records

    def _tell(self, findings: Iterable[Finding]) -> None:
        """Announce each finding once for every severity that it reaches."""
        for finding in findings:
            if (finding.condition, finding.severity) not in self._told:
                self._told.add((finding.condition, finding.severity))
                self._announce(f"gradhealth: {finding}")

    @property
    def findings(self) -> tuple[Finding, ...]:
        """All findings as of the last flush or conclusion."""
        return self._latest.report(()).findings

    @property
    def active_findings(self) -> int:
        """Number of conditions above info that held at the last flush or conclusion."""
        return self._latest.active

    def observed(self, step: int) -> bool:
        """Whether a step with this x value has been observed since the last flush."""
        return bool(self.monitor.rows) and self.monitor.rows[-1].step == step

    def report(self) -> HealthReport:
        """The verdict so far, steps since the last flush included (reads the device once if there are any)."""
        judgement, _ = self._peek()
        return judgement.report(self._notes(judgement))

    def _notes(self, judgement: Judgement) -> list[str]:
        notes = list(self.notes)
        if judgement.steps and not self._order_complete:
            notes.append("layers stand in registration order where compiled or scripted modules hide their use")
        elif judgement.steps and not self.monitor.layout.used:
            notes.append("layers stand in registration order: no forward pass was seen")
        if judgement.steps and not judgement.depth_seen:
            notes.append("depth: not measured (it needs two layers with biases)")
        if judgement.steps and not judgement.loss_seen:
            notes.append("loss: unavailable")
        return notes

    def close(self) -> None:
        """Remove every hook; calling it twice does no harm, and the report stays."""
        if self._recorder is not None:
            self._recorder.close()
        self.monitor.close()
        self.response.close()

    # --- state ---

    def state_dict(self) -> dict[str, Any]:
        """Return the state as primitives and tensors, fit for `torch.load(weights_only=True)`."""
        return {
            "monitor": self.monitor.state_dict(),
            "judgement": self.judgement.state_dict(),
            "response": self.response.state_dict(),
            "losses": self._losses,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` returned."""
        self.monitor.load_state_dict(state["monitor"])
        self.judgement.load_state_dict(state["judgement"])
        self.response.load_state_dict(state["response"])
        self._resumed_at = self.judgement.step
        self._losses = state["losses"]
        self._told = {(f.condition, f.severity) for f in self.judgement.findings.values()}


def _warn_on_rank_zero(line: str) -> None:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not distributed or torch.distributed.get_rank() == 0:
        log.warning(line)
