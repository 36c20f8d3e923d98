"""HealthSession: the trainer-free heart. It composes monitor, weight probes and judgement, and computes nothing."""

from __future__ import annotations

import contextlib
import copy
import numbers
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from lightning_gradhealth.arguments import Ignore, StopOn, check_arguments, check_stop_on, unmatched_mutes
from lightning_gradhealth.gradients import Clip, Decision, GradientMonitor
from lightning_gradhealth.gradients.clipping import Gradients
from lightning_gradhealth.gradients.monitor import CAPACITY, check_step
from lightning_gradhealth.gradients.optimizers import bare, check_optimizer, check_scaler, scaler_of
from lightning_gradhealth.gradients.rows import Pattern, Row
from lightning_gradhealth.guard import Guard, never_fatal, world_size
from lightning_gradhealth.judgement import Judgement
from lightning_gradhealth.layers import LayersSpec, UseRecorder, check_model
from lightning_gradhealth.loggers import LoggerSink, LogLayers, check_loggers
from lightning_gradhealth.merging import merged
from lightning_gradhealth.messages import reason_of, say
from lightning_gradhealth.norms import read_once
from lightning_gradhealth.records import Condition, Finding, HealthReport, Severity, StepRecord
from lightning_gradhealth.response import OnNonFinite, Response
from lightning_gradhealth.rules import Rule, Thresholds, default_rules
from lightning_gradhealth.saving import Saver
from lightning_gradhealth.signals import SIGNALS, TEMPORAL, Reading, SignalProbe, with_signals
from lightning_gradhealth.validation import check_flag, check_keys, check_type, takes, wrong
from lightning_gradhealth.view.recording import Recording

DEFAULT_CADENCE = 50
ALWAYS_PROBED = frozenset({0, 1, 2, 4, 8, 16, 32})  # what goes wrong at the start does so within a few steps
_SAVED = ("monitor", "judgement", "response", "signals", "readings", "losses")
NO_LOSS = "loss: unavailable"
EARLY = 64  # the first steps whose signals are measured until the units of all activations have been judged once
_IN_BACKWARD = (
    "an optimizer that steps in backward? gh.GradientMonitor(model).observe(optimizer) in its hook, before its step,"
    " sees them"
)
_CLIP_HERE = "With clip=gh.NormClip(limit) instead, they are measured before it"


class HealthSession:
    """Watches a training loop of any kind and says what is wrong; `GradHealth` is this, for Lightning.

    Each step: `observe` after backward and before `optimizer.step()`, then `apply`. Nothing is read from the
    device until `flush` (call it when you log) or `report`; a window of more than 1,024 steps is read in between.
    Training is not changed, unless `clip` or `on_non_finite` says so. A failure of the session's own never ends the
    loop: it is told once, nothing more is watched or clipped, and `report().aside` says why.

    Args:
        model: The model; DDP's wrapper is looked through, FSDP's is needed.
        clip: "adaptive" (clip while an explosion is detected), a clipper, or None.
        on_non_finite: What to do about NaN and Inf in gradients: "warn"; "skip" the step, so that the optimizer does
            not see it; "raise" an error before it; or skip it and set `should_stop` ("stop"). The last three name
            the module where it began. Under a loss scaler, which skips such steps by itself, nothing is done,
            but "raise" and "stop" act after 25 in a row.
        probe_every_n_steps: Weights, updates and signals are measured at every n-th step of an optimizer, and at its
            steps 0, 1, 2, 4, 8, 16 and 32; None: 50.
        layers: How parameters are grouped: "module", "parameter", a depth, or regexes.
        rules: Rules of your own, in addition to the default ones.
        ignore: Conditions to mute: a name, several, or condition -> regex of layer names.
        thresholds: The numbers that verdicts depend on.
        stop_on: Conditions that set `should_stop` when they are found with severity warning or above.
        announce: Called once with one line for every new or graver finding; None: the logger
            "lightning_gradhealth" warns, on rank zero.
        probe_compiled: Run compiled modules eagerly at probed steps, so that their signals can be measured, too. It
            changes rounding and dropout masks there. False: they are not looked into.
        temporal: Measure the gradient through time of recurrent modules (nn.RNN, LSTM, GRU) at probed steps, too.
        watch_calls: Whether calls of the model open the signal probe, and have their arguments kept until the optimizer
            steps if `on_non_finite` may have to run them again; False for loops that call `open_probe` and
            `response.remember` themselves.
        loggers: What `flush` and `conclude` write to, on rank zero: a `torch.utils.tensorboard.SummaryWriter` (which
            also gets what TensorBoard's Grad Health tab shows), a logger of Lightning or Fabric, a run of W&B or
            Trackio, or several. W&B and Trackio are alerted, W&B and MLflow get the report when the session closes.
        log_layers: How many layers' own scalars they get: "auto" (the worst ten; none where the tab shows all of them),
            True, False, a number.

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
        probe_compiled: bool = False,
        temporal: bool = False,
        watch_calls: bool = True,
        loggers: Any = (),
        log_layers: LogLayers = "auto",
    ) -> None:
        muted = check_arguments(clip, on_non_finite, probe_every_n_steps, layers, rules, ignore, thresholds)
        check_model("model", model)
        if announce is not None and not callable(announce):
            raise TypeError(wrong("announce", "a function of one line, or None", announce, "e.g. announce=print"))
        if announce is not None and not takes(announce, 1):
            must = "a function that can be called with one line alone"
            raise TypeError(wrong("announce", must, announce, "e.g. announce=lambda line: print(line)"))
        watch_calls = check_flag("watch_calls", watch_calls)
        self.stop_on = check_stop_on(stop_on, rules)
        self.probe_every_n_steps = probe_every_n_steps or DEFAULT_CADENCE
        self.monitor = GradientMonitor(model, clip, layers)
        self.response = Response(model, on_non_finite, thresholds.skipped_in_a_row)
        if watch_calls:
            self.response.remember_calls()
        self.signals = SignalProbe(
            model,
            compiled=check_flag("probe_compiled", probe_compiled),
            temporal=check_flag("temporal", temporal),
        )
        self.signals.before_backward = self.monitor.note_carried
        self._watch_calls = watch_calls
        self._readings: list[Reading] = []
        self._is_second_try = False
        self._missed: dict[str, list[Any]] = {}  # what -> at how many probed steps, the first of them, why
        self._set_due()
        self.judgement = Judgement([*default_rules(thresholds), *copy.deepcopy(list(rules))], muted)
        self._announce = announce or _warn_on_rank_zero
        self.monitor.clippers.tell = self._announce
        for line in unmatched_mutes(muted, self.monitor.layout.names):
            say(f"gradhealth: {line}", through=self._announce)
        self._recorder: UseRecorder | None = UseRecorder(model)
        self._order_complete = True
        self._losses: Tensor | float | None = None
        self._last = StepRecord(step=-1)
        self._unlogged: StepRecord | None = None  # what has been read since the last flush
        self.notes: list[str] = []
        self.guard = Guard.of(clip, on_non_finite, stop_on)
        self.guard.close = self.close
        self._loggers = check_loggers(loggers)
        self._sink = LoggerSink(log_layers)
        self.alert: Callable[[Finding], bool] = partial(self._sink.alert, self._loggers)
        self._recording: Recording | None = Recording()
        self._shown: Recording | None = self._recording  # or its copy that has seen a window that is not over yet
        self._saver = Saver()
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
            step: The loggers' x value; None counts from 0, one more whenever an optimizer comes round again.

        Returns:
            What is to be done, for `apply`.

        Raises:
            TypeError: An argument has the wrong type.
            ValueError: `loss` has several elements, or `step` is below 0.
        """
        if loss is not None:
            _check_loss(loss)
        check_optimizer(bare(optimizer))
        return self._observe(optimizer, loss, check_scaler(grad_scaler), step=check_step(step))

    def _stand_by(self, optimizer: Optimizer, *_: Any, **__: Any) -> Decision:
        """Nothing to be done; but take part in what the other ranks would wait for."""
        if world_size() > 1:
            with contextlib.suppress(Exception):  # it has been told already
                self.accompany(optimizer)
        nothing = torch.zeros(0, dtype=torch.float64)
        return Decision(optimizer, Gradients((), (), nothing), Row(-1, 0, Pattern((), (), ()), (), nothing, False))

    @never_fatal(_stand_by, together=True)
    def _observe(
        self, optimizer: Optimizer, loss: Tensor | float | None, grad_scaler: GradScaler | None, *, step: int | None
    ) -> Decision:
        decision = self._measure(optimizer, loss, grad_scaler, step)
        if loss is not None:
            self.add_loss(loss)
        return decision

    def _measure(
        self, optimizer: Optimizer, loss: Tensor | float | None, grad_scaler: GradScaler | None, step: int | None
    ) -> Decision:
        self._settle_order()
        if len(self.monitor.rows) >= CAPACITY:
            self._take_in()
        grad_scaler = scaler_of(optimizer, grad_scaler)
        probed = self._is_probed(self.monitor.steps_of(optimizer))
        decision = self.monitor.observe(optimizer, step=step, grad_scaler=grad_scaler, exact=probed, probe=probed)
        self.see_loss(loss if isinstance(loss, Tensor) else None)
        if probed:
            ending = self.signals.ending
            self.monitor.look_for_unstepped(decision.row, list(ending.leaves.values()))
            squashed = ending.squashed
            decision.row.squashed = squashed and {**squashed, "layer": self.monitor.layout.layer_of(squashed["layer"])}
        self.response.judge(decision)
        if self.monitor.gone.news:
            self._lose_gradients(decision.row.step)
        self._close_probe(decision.row.step, decision.row.optimizer, grad_scaler)
        return decision

    def _lose_gradients(self, step: int) -> None:
        """Say that gradients are gone before the optimizer steps, so that they cannot be measured here."""
        names = [self.monitor.layout.slots[slot].name for slot in self.monitor.gone.slots]
        self.monitor.gone.news = False
        shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
        what = f"gradients that are gone before optimizers step ({shown})"
        if self.judgement.lose(what, _IN_BACKWARD, step):
            say(f"gradhealth: {what} are not watched: {_IN_BACKWARD}", through=self._announce)

    def _is_probed(self, count: int) -> bool:
        """Whether the step of an optimizer after `count` others is probed."""
        return count in ALWAYS_PROBED or (count + 1) % self.probe_every_n_steps == 0

    def _set_due(self) -> None:
        """Find out whether the step that comes may be one to probe; calls of the model will open the probe then."""
        early = self.monitor.expects(lambda count: count < EARLY) and self.signals.wants_samples
        self._due = early or self._is_second_try or self.monitor.expects(self._is_probed)
        if self.signals.has_given_up and not self.signals.across_ranks:
            self._due = False
        if self._watch_calls:
            self.signals.await_calls(self._due)

    @never_fatal(together=True)
    def see_loss(self, loss: Tensor | None) -> None:
        """Look at the graph of a loss, if the step to come may be one to probe; its values are not read.

        Args:
            loss: The training loss, before its backward pass or after it; None: it is not known.
        """
        if self._due and (loss is not None or not self.signals.ending.leaves):
            self.signals.end(loss)

    @never_fatal(together=True)
    def open_probe(self) -> None:
        """Measure signals in the forward passes that follow, if the step to come may be one to probe."""
        if self._due:
            self.signals.open()

    @never_fatal(together=True)
    def pause_probe(self) -> None:
        """Take the hooks off the modules until `open_probe` is called again."""
        self.signals.pause()

    def _close_probe(self, step: int, optimizer: int, grad_scaler: GradScaler | None) -> None:
        """Take what the forward and backward passes of a step have shown, and look ahead to the next."""
        if self._due:
            scaled = grad_scaler is not None and grad_scaler.is_enabled()
            scale = grad_scaler._scale if grad_scaler is not None and scaled else None
            flows = self.signals.temporal_flows()
            reading = self.signals.close(step=step, optimizer=optimizer, scale=scale, flows=flows)
            self._readings += [] if reading is None else [reading]
            self._account(step)
            # once more, if nothing came back; ranks go by the count of the steps alone
            self._is_second_try = self.signals.is_owed and not self._is_second_try and not self.signals.across_ranks
        self._set_due()
        if self._watch_calls or not self._due:
            self.signals.pause()

    def _account(self, step: int) -> None:
        """Keep in the judgement what the probe cannot measure, for as long as it cannot; say so the first time."""
        for what in (SIGNALS, TEMPORAL):
            why = self.signals.failures.get(what)
            if why is None:
                self.judgement.regain(what)
                continue
            if what not in self._missed:
                say(f"gradhealth: {what}: not measured at step {step} ({why}); training goes on")
            missed = self._missed.setdefault(what, [0, step, why])
            missed[0] += 1
            self.judgement.lose(what, why, step)

    def accompany(self, optimizer: Optimizer) -> None:
        """Take part in what the ranks do together at a step, and keep nothing of it: for one that has stepped aside.

        Args:
            optimizer: The optimizer that is about to step.
        """
        if self.monitor.sharded or self.signals.across_ranks:
            self._measure(optimizer, None, None, None)
            self.monitor.rows.clear()
            self._readings.clear()

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

        Raises:
            TypeError: It is neither a real tensor nor a number.
            ValueError: It has several elements.
        """
        _check_loss(loss)
        self._add_loss(loss)

    @never_fatal(together=True)
    def _add_loss(self, loss: Tensor | float) -> None:
        value = float(loss) if not isinstance(loss, Tensor) else loss.detach().clone()
        if isinstance(value, Tensor) and value.ndim:
            value = value.reshape(())
        self._losses = value if self._losses is None else self._losses + value
        waiting = False
        for row in reversed(self.monitor.rows):
            if row.loss is not None or row.step != self.monitor.rows[-1].step:
                break
            row.loss, waiting = self._losses, True
        if waiting:
            self._losses = None

    @never_fatal(together=True)
    def add_losses(self, losses: Iterable[tuple[Optimizer, Tensor]]) -> None:
        """Give the last step of each of several optimizers its own loss.

        Args:
            losses: The optimizers, and shape () each.
        """
        for optimizer, loss in losses:
            number = self.monitor.index_of(optimizer)
            row = next((row for row in reversed(self.monitor.rows) if row.optimizer == number), None)
            if row is not None and row.loss is None:
                row.loss = loss.clone().reshape(())

    def apply(self, decision: Decision) -> None:
        """Carry out what `observe` decided: clip the gradients, or set them to None, which skips the step.

        Raises:
            TypeError: `decision` is not what `observe` returned.
            NonFiniteGradientError: `on_non_finite` is "raise", or too many steps were skipped in a row.
        """
        check_type(
            "decision", decision, Decision, "what observe() returned", "session.apply(session.observe(optimizer))"
        )
        self._apply(decision)

    @never_fatal(together=True)
    def _apply(self, decision: Decision) -> None:
        with self.signals.held():  # forward passes may run again
            skipped = self.response.carry_out(decision, sharded=self.monitor.sharded)
        if not skipped:
            self.monitor.apply(decision)
        elif decision.row.origin and any(condition == Condition.NON_FINITE for condition, _ in self._told):
            say(f"gradhealth: step {decision.row.step}: {decision.row.origin}", through=self._announce)

    @property
    def should_stop(self) -> str:
        """Why the training should end (`on_non_finite="stop"`, `stop_on`); empty while it should not."""
        seen = self.judgement.findings.values()
        found = [f for f in seen if f.condition in self.stop_on and f.last_step > self._resumed_at]
        grave = (str(finding) for finding in found if finding.severity is not Severity.INFO)
        return self.response.stop or next(grave, "")

    # --- at the logging cadence ---

    @never_fatal(lambda self: self._last, together=True)
    def flush(self) -> StepRecord:
        """Read everything since the last flush in one transfer, judge it, and return it as one record.

        Returns:
            One record of all steps since the last flush: their counts and extremes, and the last of what was measured
            more than once; the previous one where nothing was observed since.
        """
        self._take_in()
        if self._unlogged is not None:
            self._last, self._unlogged = self._unlogged, None
            self._write(self._last)
        return self._last

    def _write(self, record: StepRecord, *, over: bool = True) -> None:
        """Keep a record for the page of the report, and give it to the loggers; nothing of that can end the watch.

        Args:
            record: The record.
            over: The window is over; a copy keeps what is not, so that a resumed run equals an unbroken one.
        """
        findings, active = self.findings, self.active_conditions
        try:
            self._shown = self._recording if over else copy.deepcopy(self._recording)
            if self._shown is not None:
                self._shown.append(record, findings, active)
        except Exception as error:
            self._recording = self._shown = None
            say(f"gradhealth: the report will have no pictures ({reason_of(error)}); training goes on")
        if self._loggers and _is_rank_zero():
            self._sink.write(self._loggers, record, findings, active)
            self._sink.keep_up(self._loggers, self.report)

    def _take_in(self) -> None:
        """Read and judge what waits on the device, and keep one record of it for the next flush."""
        rows = list(self.monitor.rows)
        records = self._records()
        self.monitor.rows.clear()
        self._readings.clear()
        refused = self.judgement.refused_steps
        for record in records:
            self._tell(self.judgement.add(record))
        if self.judgement.refused_steps and not refused:
            say(f"gradhealth: {_refused(self.judgement)}", through=self._announce)
        self._unlogged = self._gathered(records)
        self._latest = self.judgement
        self.monitor.let_go()
        self.signals.let_go()
        self.response.review(zip(rows, (step for record in records for step in record.window), strict=True))

    def _gathered(self, records: Sequence[StepRecord]) -> StepRecord | None:
        """One record of what has been read since the last flush, and of some more; None where there is nothing."""
        known = [*([] if self._unlogged is None else [self._unlogged]), *records]
        return merged(known) if known else None

    def _records(self) -> list[StepRecord]:
        """What waits on the device, read in one transfer: gradients and signals of each window."""
        if self.monitor.clippers.lost is not None:
            name, step, why = self.monitor.clippers.lost
            self.judgement.lose(f"clipping by {name}", f"it failed: {why}", step)
        pending = self.monitor.pending()
        vectors = [reading.vectors() for reading in self._readings]
        values = read_once([*pending, *(vector for group in vectors for vector in group)])
        records = self.monitor.records(values[: len(pending)])
        rest = iter(values[len(pending) :])
        signals = [
            reading.read(*(next(rest) for _ in group)) for reading, group in zip(self._readings, vectors, strict=True)
        ]
        return [
            with_signals(
                record,
                [one for one in signals if one.step in {step.step for step in record.window}],
                self.monitor.layout.layer_of,
            )
            for record in records
        ]

    @never_fatal(lambda self: self._last)
    def conclude(self) -> StepRecord:
        """Judge a window that is not over yet, on a copy, so that a resumed run equals an unbroken one.

        Returns:
            One record of all steps since the last flush; the previous one where nothing was observed since.
        """
        self._latest, records = self._peek()
        self._tell(self._latest.findings.values())
        record = self._gathered(records)
        if record is not None:
            self._write(record, over=False)
        return record or self._last

    def _peek(self) -> tuple[Judgement, list[StepRecord]]:
        """The judgement, or a copy of it that has seen the pending window too, and that window's records."""
        records = self._records()
        judgement = copy.deepcopy(self.judgement) if records else self.judgement
        for record in records:
            judgement.add(record)
        return judgement, records

    def _tell(self, findings: Iterable[Finding]) -> None:
        """Announce each finding once for every severity that it reaches."""
        for finding in findings:
            if (finding.condition, finding.severity) not in self._told:
                self._told.add((finding.condition, finding.severity))
                if not (_is_rank_zero() and self.alert(finding)):
                    say(f"gradhealth: {finding}", through=self._announce)

    @property
    def findings(self) -> tuple[Finding, ...]:
        """All findings as of the last flush or conclusion."""
        return self._latest.report(()).findings

    @property
    def active_conditions(self) -> frozenset[str]:
        """The conditions that held at the last flush or conclusion."""
        return self._latest.holding

    @property
    def waits(self) -> bool:
        """Whether anything has been observed since the last flush."""
        return bool(self.monitor.rows) or self._unlogged is not None

    def observed(self, step: int) -> bool:
        """Whether a step with this x value has been observed since the last flush."""
        return bool(self.monitor.rows) and self.monitor.rows[-1].step == step

    def report(self) -> HealthReport:
        """The verdict so far, steps since the last flush included (reads the device once if there are any)."""
        report = self._report().changed(aside=self.guard.aside)
        return report if self._shown is None else report.changed(_recorded=self._shown.view("this run"))

    def _judged(self) -> HealthReport:
        """The verdict up to where it was watched."""
        try:
            return self.judgement.report(self.notes)
        except Exception as error:
            return HealthReport(notes=(f"no findings can be given: {reason_of(error)}",))

    @never_fatal(_judged)
    def _report(self) -> HealthReport:
        judgement, _ = self._peek()
        return judgement.report(self._notes(judgement))

    def _notes(self, judgement: Judgement) -> list[str]:
        notes = list(self.notes)
        if judgement.steps and not self._order_complete:
            notes.append("layers stand in registration order where compiled or scripted modules hide their use")
        elif judgement.steps and not self.monitor.layout.used:
            notes.append("layers stand in registration order: no forward pass was seen")
        notes += self._notes_on_steps(judgement)
        if judgement.steps and not judgement.depth_seen:
            notes.append("depth: not measured (no signals on a main chain, nor two layers with biases)")
        notes += self._notes_on_signals(judgement)
        if judgement.steps and self.signals.lacks_samples:
            notes.append("units: not judged in every layer (fewer than 256 samples were seen there)")
        if judgement.steps and not judgement.loss_seen:
            notes.append(NO_LOSS)
        if judgement.refused_steps:
            notes.append(_refused(judgement))
        notes += [f"update/weight: not measured: {why}" for why in self.monitor.updates.unmeasured.values()]
        return notes

    def _notes_on_steps(self, judgement: Judgement) -> list[str]:
        """What happens to gradients before the optimizers step, and which optimizers do not."""
        notes = []
        unseen = [str(number) for number in self.monitor.unseen]
        if judgement.steps and unseen:
            notes.append(f"optimizer {', '.join(unseen)}: no step was seen")
        for number in sorted({*self.monitor.changed_since, *judgement.ceilings}):
            ceiling, since = judgement.ceilings.get(number), self.monitor.changed_since.get(number)
            limit = ceiling.limit if ceiling is not None else None
            if since is not None:
                notes.append(
                    f"optimizer {number}: gradients are changed in place between backward and the step since step"
                    f" {since}, as by clip_gradients or clip_grad_norm_: norms are those after it. {_CLIP_HERE}"
                )
            elif ceiling is not None and limit is not None:
                notes.append(
                    f"optimizer {number}: the norms look clipped before they were measured (none above {limit:g}, and"
                    f" {ceiling.hits} of exactly that). {_CLIP_HERE}"
                )
        return notes

    def _notes_on_signals(self, judgement: Judgement) -> list[str]:
        notes = [
            f"{what}: not measured at {count} of the probed steps, first at step {first} ({why})"
            for what, (count, first, why) in self._missed.items()
            if what not in judgement.unwatched
        ]
        if self.signals.elsewhere:
            notes.append(f"signals: {self.signals.elsewhere}")
        return [*notes, *self._notes_on_modules(judgement)]

    def _notes_on_modules(self, judgement: Judgement) -> list[str]:
        if SIGNALS in judgement.unwatched:
            return []  # the report says why
        if self.signals.hidden:
            hidden = ", ".join(self.signals.hidden[:3]) + (", …" if len(self.signals.hidden) > 3 else "")
            return [f"signals: not measured inside compiled or scripted modules ({hidden}); see probe_compiled"]
        if judgement.steps and not judgement.signals_seen and not self.signals.elsewhere:
            return ["signals: not measured (no call of the model in training was seen)"]
        return []

    def close(self) -> None:
        """Remove every hook, and give the report to loggers that take one; calling it twice does no harm."""
        if self._loggers and _is_rank_zero():
            self._sink.report(self._loggers, self.report)
            self._sink.end(self._loggers, self.report(), self.active_conditions)
        if self._recorder is not None:
            self._recorder.close()
        self.monitor.close()
        self.response.close()
        self.signals.await_calls(False)
        self.signals.pause()

    # --- state ---

    def state_dict(self) -> dict[str, Any]:
        """Return the state as primitives and tensors, fit for `torch.load(weights_only=True)`."""
        return self._state()

    @never_fatal(lambda self: {"aside": self.guard.aside})
    def _state(self) -> dict[str, Any]:
        state: dict[str, Any] = {}
        parts: dict[str, Callable[[], Any]] = {
            "monitor": self.monitor.state_dict,
            "judgement": self.judgement.state_dict,
            "response": self.response.state_dict,
            "signals": self.signals.state_dict,
            "second_try": lambda: self._is_second_try,
            "missed": lambda: {what: list(missed) for what, missed in self._missed.items()},
            "readings": lambda: [reading.state_dict() for reading in self._readings],
            "losses": lambda: self._losses,
            "unlogged": lambda: None if self._unlogged is None else self._unlogged.to_dict(),
            "recording": lambda: None if self._recording is None else self._recording.state_dict(),
        }
        for name, make in parts.items():
            self._saver.put(state, name, f"the state of GradHealth ({name})", make)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` returned.

        Raises:
            TypeError: `state` is no dict.
            ValueError: It is not what `state_dict` returned; the session is as it was then.
        """
        if isinstance(state, dict) and state.keys() == {"aside"}:
            return  # of a run that was no longer watched: there is nothing to go on from
        check_keys("state", state, _SAVED)
        before = self.state_dict()
        try:
            self._take_up(state)
            self._peek()[0].report(())  # it can be gone on from
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            self._take_up(before)
            raise ValueError(
                f"state must be what state_dict() returned, got one that cannot be read ({reason_of(error)}); it may be"
                " of another version, or of another model"
            ) from error

    def _take_up(self, state: dict[str, Any]) -> None:
        self.monitor.load_state_dict(state["monitor"])
        self.judgement.load_state_dict(state["judgement"])
        self.response.load_state_dict(state["response"])
        self.signals.load_state_dict(state["signals"])
        self._readings = [Reading.from_state(reading) for reading in state["readings"]]
        self._is_second_try = state.get("second_try", False)
        self._missed = {what: list(missed) for what, missed in state.get("missed", {}).items()}
        self._set_due()
        self._resumed_at = self.judgement.step
        self._losses = state["losses"]
        unlogged = state.get("unlogged")
        self._unlogged = None if unlogged is None else StepRecord.from_dict(unlogged)
        self._told = {(f.condition, f.severity) for f in self.judgement.findings.values()}
        if self._recording is not None and state.get("recording") is not None:
            try:
                self._recording.load_state_dict(state["recording"])
            except ValueError as error:
                say(f"gradhealth: the report's pictures begin with this process ({reason_of(error)})")


def _check_loss(loss: Any) -> None:
    """Raise unless it is one real number."""
    if isinstance(loss, Tensor):
        if loss.is_complex() or loss.dtype is torch.bool:
            raise TypeError(f"loss must be a real tensor of shape () or a float, got {loss.dtype}; e.g. loss=loss.real")
        if loss.numel() != 1:
            raise ValueError(
                f"loss must be one number, got a tensor of shape {tuple(loss.shape)}; e.g. loss=loss.mean()"
            )
        return
    must, remedy = "a tensor of shape () or a float", "leave it out where there is none"
    if isinstance(loss, bool) or not isinstance(loss, numbers.Real):
        raise TypeError(wrong("loss", must, loss, remedy))
    if isinstance(loss, int) and abs(loss) > sys.float_info.max:
        raise ValueError(wrong("loss", must, loss, remedy))


def _is_rank_zero() -> bool:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not distributed or torch.distributed.get_rank() == 0


def _warn_on_rank_zero(line: str) -> None:
    if _is_rank_zero():
        say(line)


def _refused(judgement: Judgement) -> str:
    many = judgement.refused_steps
    what = "clip: the clipper gave a factor that is NaN, Inf or negative"
    return f"{what} at {many} step{'s' * (many > 1)}; it was taken for 1"
