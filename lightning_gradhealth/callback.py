"""GradHealth: translates Lightning's hooks into calls of the session. It holds no mathematics."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.optim import Optimizer

from lightning_gradhealth import _lightning, pages
from lightning_gradhealth.arguments import Ignore, StopOn, check_arguments, check_stop_on
from lightning_gradhealth.copies import Shared
from lightning_gradhealth.errors import GradHealthError
from lightning_gradhealth.gradients import Clip
from lightning_gradhealth.guard import Guard, never_fatal
from lightning_gradhealth.layers import LayersSpec
from lightning_gradhealth.loggers import LoggerSink, LogLayers, prefix_of
from lightning_gradhealth.messages import printable, reason_of, say
from lightning_gradhealth.preflight import copied, examine, of_step
from lightning_gradhealth.records import FlowReport, HealthReport, StepRecord
from lightning_gradhealth.reports.rendering import status
from lightning_gradhealth.response import OnNonFinite
from lightning_gradhealth.rules import Rule, Thresholds
from lightning_gradhealth.session import DEFAULT_CADENCE, NO_LOSS, HealthSession
from lightning_gradhealth.trees import KeptBatch
from lightning_gradhealth.validation import check_flag, check_type, is_remote, wrong


class GradHealth(Callback):
    """Tracks gradient norms per layer, says what is wrong, where, since when and what to do.

    Add it to the Trainer's callbacks. Unless `clip`, `on_non_finite` or `stop_on` says so, it never changes training:
    weights, losses and random state are bit for bit those without it. It reads the device once at every logged step
    and at no other (but once in 1,024 steps, where the Trainer logs more rarely).

    Args:
        clip: "adaptive" (`WhenExploding()`: clip while an explosion of the gradient norm is detected, and leave every
            bit alone otherwise), a clipper, which always acts, or None. `Trainer(gradient_clip_val=...)` comes after
            it: the smaller of both limits holds.
        on_non_finite: What to do about NaN and Inf in gradients: "warn"; "skip" the optimizer step, so that weights,
            moments, weight decay and step count stay as they are (the Trainer's `global_step` and the schedulers go
            on; unless a fused optimizer skips it, the gradients are None in the hooks that follow); "raise" an error;
            or skip it and "stop" the fit. The last three run the batch's forward again to name the module where it
            began; they read one flag a step, unless the step is skipped by a fused optimizer. Under a loss scaler,
            which skips such steps by itself, nothing is done, but "raise" and "stop" act after 25 in a row.
        stop_on: Condition or conditions that end the fit when found with severity warning or above; not before the
            Trainer's `min_epochs` and `min_steps` are met.
        probe_every_n_steps: Weight norms and updates are measured at every n-th optimizer step, and at
            steps 0, 1, 2, 4, 8, 16 and 32; None: the Trainer's `log_every_n_steps`.
        probe_compiled: Run compiled modules eagerly at probed steps (`torch.compiler.set_stance("force_eager")`), so
            that signals inside them are measured, too: that changes rounding there, and the dropout masks drawn. False:
            they are left alone, and the report says so.
        temporal: Measure at probed steps, too, how gradients fare on their way back through time in nn.RNN, LSTM and
            GRU modules (`temporal_flow`, of a few sequences and their last 64 steps).
        preflight: Run the first batch forward and backward before the first step (see `diagnose`), tell what is wrong,
            and keep the report as `preflight_report`. It leaves no trace in the training, but in what cannot be put
            back: a generator, the iterator of a DataLoader, a file that is written. Not done where a run goes on,
            in manual optimization, and where parameters are sharded.
        layers: How parameters are grouped: "module" (a layer is a module that directly owns parameters),
            "parameter", a depth, or one or more regexes on parameter names (the first group names the layer).
        log_layers: How many layers' own scalars the loggers get: "auto" (the worst ten; none where TensorBoard's Grad
            Health tab shows all of them), True, False, a number.
        rules: Rules of your own, in addition to the default ones.
        ignore: Conditions to mute: a name, several, or condition -> regex of layer names.
        thresholds: The numbers that verdicts depend on, each with its reason.
        loss_key: Name of a metric logged at every step that is the training loss, for where `training_step`
            returns none, as in manual optimization; None: there the losses given to `manual_backward`, for each
            optimizer those before its step (where it is not called, the sum of all training losses, by their names,
            that were given to `self.log`).
        report_dir: Where `report.html` (the run's pictures and findings in one file) and `report.json` go at the end of
            the fit, also of one that fails or is interrupted: "auto" (the run's own log folder; nowhere without a
            logger that has one), a folder, or None (nowhere). Not under `fast_dev_run`; on rank zero only. Where it
            is not None, loggers that show a report get it, too, every ten minutes and at the end: W&B the page, MLflow
            both files.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of range.

    Example:
        >>> health = GradHealth(ignore={"stalled_layers": "head.*"})
        >>> trainer = pl.Trainer(callbacks=[health], logger=False, enable_checkpointing=False)
        >>> health.report()  # before trainer.fit(model)
        HealthReport(nothing was watched; 0 layers, 0 steps)
    """

    def __init__(
        self,
        clip: Clip = None,
        on_non_finite: OnNonFinite = "warn",
        stop_on: StopOn = (),
        probe_every_n_steps: int | None = None,
        probe_compiled: bool = False,
        temporal: bool = False,
        preflight: bool = False,
        layers: LayersSpec = "module",
        log_layers: LogLayers = "auto",
        rules: Sequence[Rule] = (),
        ignore: Ignore = None,
        thresholds: Thresholds = Thresholds(),  # noqa: B008  (frozen)
        loss_key: str | None = None,
        report_dir: str | os.PathLike[str] | None = "auto",
    ) -> None:
        self.clip = clip
        self.on_non_finite = on_non_finite
        self.stop_on = stop_on
        check_stop_on(stop_on, rules)
        self.ignore = check_arguments(clip, on_non_finite, probe_every_n_steps, layers, rules, ignore, thresholds)
        self.probe_every_n_steps = probe_every_n_steps
        self.temporal = check_flag("temporal", temporal)
        self.probe_compiled = check_flag("probe_compiled", probe_compiled)
        self.preflight = check_flag("preflight", preflight)
        self.layers = layers
        self.log_layers = log_layers
        self.rules = list(rules)
        self.thresholds = thresholds
        self.loss_key = loss_key
        if loss_key is not None:
            must, remedy = "the name of a logged metric or None", 'e.g. loss_key="train_loss"'
            if not check_type("loss_key", loss_key, str, must, remedy):
                raise ValueError(wrong("loss_key", must, loss_key, remedy))
        self.report_dir = report_dir
        if report_dir is not None:
            must, remedy = '"auto", a folder or None', 'e.g. report_dir="auto"; None writes nothing'
            if not isinstance(report_dir, os.PathLike) and not check_type("report_dir", report_dir, str, must, remedy):
                raise ValueError(wrong("report_dir", must, report_dir, remedy))
            if is_remote(report_dir):
                raise ValueError(wrong("report_dir", '"auto", a folder of this machine or None', report_dir, remedy))
        self._shared = Shared()
        self._ran = False
        self._reset()

    def _reset(self) -> None:
        self._session: HealthSession | None = None
        self._sink = LoggerSink(self.log_layers)
        self._state: dict[str, Any] = {}  # from a checkpoint before the first batch, or left by the last fit
        self._report = HealthReport(
            notes=("nothing was observed in this process: no fit yet, or one in processes of its own (ddp_spawn)",)
        )
        self.guard = Guard.of(self.clip, self.on_non_finite, self.stop_on)
        self._logged: set[str] = set()  # the metrics that were logged where `loss_key` was not
        self._losses = _lightning.BackwardLosses()
        self._batches = 0
        self._stem = "report"
        self._status = ""  # for the progress bar, as of the last logged step
        self._bar_name = "grad_health"
        self._preflight: FlowReport | None = None

    # --- lifecycle ---

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Forget the fit before this one."""
        if stage == "fit":
            if self._session is not None:
                self._session.close()
            self._reset()
            mine = [callback for callback in trainer.callbacks if isinstance(callback, GradHealth)]  # type: ignore[attr-defined]
            number = next((place for place, callback in enumerate(mine) if callback is self), 0)
            self._sink = LoggerSink(self.log_layers, prefix_of(number))
            suffix = "" if number == 0 else f"-{number + 1}"
            self._stem, self._bar_name = f"report{suffix}", f"grad_health{suffix}"
            self._ran, self._shared.last = True, self

    @never_fatal(together=True)
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """At the first batch, start watching the model, which has its final form now."""
        if self._session is not None:
            self._session.open_probe()
            self._remember(trainer, pl_module, batch, batch_idx)
            return
        if _lightning.hides_gradients(trainer):
            if self.clip is not None or self.on_non_finite != "warn":
                raise GradHealthError(
                    "DeepSpeed keeps the gradients to itself, so that clip and on_non_finite can do nothing; leave"
                    " them out, and give DeepSpeed its own: Trainer(gradient_clip_val=...)"
                )
            self.guard.step_aside("gradients are unavailable under DeepSpeed, which keeps them to itself")
            return
        self._session = self._watch(trainer, pl_module)
        if not self._load():  # it may be half loaded: start afresh, but do watch, and do what was asked for
            self._session.close()
            self._session = self._watch(trainer, pl_module)
        _lightning.show_in_bar(trainer, self._bar_name, self._bar_line)
        if self.preflight:
            self._diagnose(trainer, pl_module, batch, batch_idx)
        self._session.open_probe()
        self._remember(trainer, pl_module, batch, batch_idx)

    def _watch(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> HealthSession:
        session = HealthSession(
            _lightning.outermost(trainer, pl_module),
            clip=self.clip,
            on_non_finite=self.on_non_finite,
            stop_on=self.stop_on,
            probe_every_n_steps=self.probe_every_n_steps or _lightning.log_cadence(trainer),
            layers=self.layers,
            rules=self.rules,
            ignore=self.ignore,
            thresholds=self.thresholds,
            announce=_lightning.announcer(trainer),
            probe_compiled=self.probe_compiled,
            temporal=self.temporal,
            watch_calls=False,  # whole batches are watched and remembered here
        )
        session.alert = lambda finding: self._sink.alert(trainer.loggers, finding)
        self.guard = session.guard
        for optimizer in trainer.optimizers:
            session.monitor.index_of(optimizer)
        session.signals.across_ranks = trainer.world_size > 1
        session.signals.wrapped = _lightning.called_through(trainer, pl_module)
        session.notes += _lightning.other_clipping(trainer, pl_module)
        return session

    def _diagnose(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Run the first batch of a fresh run, and tell what is wrong; the training goes on whatever comes of it."""
        if self._state or _lightning.logged_step(trainer) > 0:
            return  # a run that goes on has shown already what there is
        tell = _lightning.announcer(trainer)
        why = _lightning.no_preflight(trainer, pl_module)
        if why:
            tell(f"gradhealth: no preflight ({why})")
            return

        def run() -> Any:
            step = _lightning.rerun(trainer, pl_module, lambda: copied(batch), batch_idx)
            return of_step(step(), type(pl_module).__name__)

        try:
            self._preflight = report = examine(
                pl_module,
                run,
                layers=self.layers,
                ignore=self.ignore,
                thresholds=self.thresholds,
                scale=_lightning.loss_scale(trainer),
            )
        except Exception as error:
            tell(f"gradhealth: no preflight ({reason_of(error)})")
            return
        said = {finding.remedy for finding in report.findings}
        for line in (*report.findings, *(remedy for remedy in report.remedies if remedy not in said)):
            tell(f"gradhealth: preflight: {line}")

    def _remember(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep what it takes to run this batch again, if a NaN is to be traced to its origin."""
        if self._session is not None and self.on_non_finite != "warn":
            response = self._session.response
            response.no_rerun = _lightning.no_rerun(pl_module)
            if not response.no_rerun:
                kept = KeptBatch(batch)
                response.remember(_lightning.rerun(trainer, pl_module, kept.fresh, batch_idx), kept)

    @never_fatal(together=True)
    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Look at the graph of the loss; in manual optimization it is that of the optimizer that steps next."""
        if self._session is not None:
            self._session.see_loss(loss)
            if not pl_module.automatic_optimization and self.loss_key is None:
                self._losses.add(trainer, loss)

    @never_fatal(together=True)
    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take down what the gradients are like now: in manual optimization they may be clipped before the step."""
        if self._session is not None:
            self._session.monitor.changed.after_backward(trainer.optimizers)

    @never_fatal(lambda self, *args: self._accompany(*args), together=True)
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Look at the gradients: unscaled, accumulated, reduced, not yet clipped."""
        if self._session is not None:
            scaler, step = _lightning.grad_scaler(trainer), _lightning.logged_step(trainer)
            loss = self._losses.of_step()
            self._session.apply(self._session.observe(optimizer, loss, grad_scaler=scaler, step=step))
            self._stop(trainer, self._session.response.stop)

    @never_fatal(together=True)
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take the loss; at the logging cadence read the device, judge and log."""
        if self._session is None:
            return
        self._batches += 1
        self._session.pause_probe()
        self._session.monitor.changed.forget()
        known = self._losses.end_batch()
        own = [] if known or self.loss_key is not None else _lightning.losses_by_optimizer(trainer, outputs)
        self._session.add_losses(own)
        loss = None if known or own else _lightning.loss_of(trainer, outputs, self.loss_key)
        if loss is not None:
            self._session.add_loss(loss)
            note = _lightning.note_on_loss(outputs)
            self._session.notes += [note] if note and note not in self._session.notes else []
        elif self.loss_key is not None:
            self._logged.update(trainer.callback_metrics)
        self._session.response.forget()
        step = _lightning.logged_step(trainer)
        if self._session.observed(step) and _lightning.due(trainer, step, DEFAULT_CADENCE):
            try:
                self._log(trainer, self._session.flush())
            except GradHealthError:  # too many skipped steps: the loggers get the last record nevertheless
                self._log(trainer, self._session.conclude())
                raise
            self._stop(trainer, self._session.response.stop)
            if self.stop_on:  # losses differ from rank to rank, and so may findings
                found = self._session.should_stop
                elsewhere = _lightning.anywhere(trainer, bool(found))
                self._stop(trainer, found or elsewhere)

    def _stop(self, trainer: pl.Trainer, why: str) -> None:
        if why and not trainer.should_stop:
            trainer.should_stop = True
            when = _lightning.held_back(trainer)
            if when and self._session is not None:  # the steps until then are made all the same
                self._session.notes.append(
                    f"stopping: at step {_lightning.logged_step(trainer)} the fit was to end{when}"
                )
            _lightning.announcer(trainer)(f"gradhealth: ends the fit{when}: {why}")

    @never_fatal()
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Judge and log what came after the last logged step."""
        self._conclude(trainer)
        if self._unseen:
            _lightning.announcer(trainer)(f"gradhealth: {self._unseen}")

    @never_fatal()
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Judge a run that dies, or is interrupted, up to its last step."""
        self._conclude(trainer)
        self._keep(trainer)
        self._release(trainer)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Remove every hook and let the model go; the report and the state stay."""
        if self._session is None and self._state and not self._batches and not self.guard.aside:
            self._restore(trainer, pl_module)
        if stage == "fit":
            self._keep(trainer)
            self._release(trainer)

    def _keep(self, trainer: pl.Trainer) -> None:
        """Write the report of a run that has ended, however it did; what fails is told, and no more."""
        if self._session is None or not self._batches or not trainer.is_global_zero:
            return
        try:
            report = self.report()
            self._sink.end(trainer.loggers, report, self._session.active_conditions)
            folder = _lightning.report_folder(trainer, self.report_dir)
            if folder is not None:
                pages.keep(report, folder, self._stem, _lightning.announcer(trainer))
            if self.report_dir is not None:
                self._sink.report(trainer.loggers, lambda: report)
        except Exception as error:
            say(f"gradhealth: no report was written ({reason_of(error)})")

    def _restore(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Report what the checkpoint holds, where nothing was trained after it was loaded."""
        try:
            session = self._session = self._watch(trainer, pl_module)
            session.notes.append("nothing was trained in this process: the report is that of the checkpoint")
            if self._load():
                self._report = session.report()
            session.close()
        except Exception as error:
            self.guard.step_aside(f"no report: {reason_of(error)}", error)
        self._session = None

    @property
    def _unseen(self) -> str:
        """Words for a run in which no optimizer was seen to step; empty where one was."""
        if not self._batches or self._session is None or self._session.monitor.stepped:
            return ""
        return (
            f"no optimizer step was seen in {self._batches} batches: an optimizer that steps in backward, or comes from"
            " optimizers(use_pl_optimizer=False), steps where Lightning tells nobody."
            " gh.GradientMonitor(model).observe(optimizer), before it steps, sees it"
        )

    def _conclude(self, trainer: pl.Trainer) -> None:
        if self._session is not None and self._session.waits:
            self._log(trainer, self._session.conclude())

    def _log(self, trainer: pl.Trainer, record: StepRecord) -> None:
        logs = trainer.loggers and _lightning.log_cadence(trainer) is not None
        if self._session is None or self.guard.aside or not (logs or trainer.progress_bar_callback):
            return
        findings, active = self._session.findings, self._session.active_conditions
        self._status = status(findings, active, watched=not self._session.judgement.unwatched)
        if logs:
            self._sink.write(trainer.loggers, record, findings, active)
            if self.report_dir is not None and trainer.is_global_zero:
                self._sink.keep_up(trainer.loggers, self.report)

    def _bar_line(self) -> str:
        """What the progress bar says of the run; nothing before the first logged step."""
        return "not watched" if self.guard.aside else self._status

    def _accompany(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer) -> None:
        """Having stepped aside, take part in what the other ranks would wait for."""
        if self._session is not None and trainer.world_size > 1:
            with contextlib.suppress(Exception):  # it has been told already
                self._session.accompany(optimizer)

    def _release(self, trainer: pl.Trainer) -> None:
        """Keep what is asked for after a fit, and nothing else."""
        _lightning.hide_from_bar(trainer, self._bar_name)
        self._report, self._state = self.report(), self.state_dict()
        if self._session is not None:
            try:
                self._session.close()
            except Exception as error:
                say(f"gradhealth: some hooks may be left on the model ({reason_of(error)})")
        self.guard.release()
        self._session = None
        for name in ("log", "log_dict"):  # the Trainer's, bound to the model; it gives new ones to every run
            vars(self).pop(name, None)

    # --- what is asked of it ---

    def report(self) -> HealthReport:
        """The verdict on the run so far, or on the last one.

        Returns:
            A report that is not healthy, and says why, where nothing was observed in this process; that of a deep copy
            of this instance, where only such a copy was in a fit.
        """
        ran = self._shared.last
        if not self._ran and ran is not None:
            note = "the report of a deep copy of this callback: the library that made the Trainer has copied it"
            report: HealthReport = ran.report()
            return report.changed(notes=(note, *report.notes))
        report = self._report
        if self._session is not None:
            report = self._with_loss_key(self._session.report())
            if self._unseen:
                report = report.changed(notes=(self._unseen, *report.notes))
        return report.changed(aside=self.guard.aside)

    @property
    def preflight_report(self) -> FlowReport | None:
        """What the preflight has shown; None where there was none."""
        source = self if self._ran else self._shared.last or self
        return source._preflight

    def _with_loss_key(self, report: HealthReport) -> HealthReport:
        """The report, where no loss is known since nothing was logged under `loss_key`, with what was logged."""
        if self.loss_key is None or self.loss_key in self._logged or NO_LOSS not in report.notes:
            return report
        names = ", ".join(printable(name, 60) for name in sorted(self._logged)[:10]) or "nothing"
        note = f"{NO_LOSS}: loss_key={self.loss_key!r} was never logged; logged were: {names}"
        return report.changed(notes=tuple(note if line == NO_LOSS else line for line in report.notes))

    @property
    def state_key(self) -> str:
        """Distinguishes several instances in one Trainer."""
        return self._generate_state_key(layers=self.layers, probe_every_n_steps=self.probe_every_n_steps)

    def state_dict(self) -> dict[str, Any]:
        """Primitives and tensors only, so that checkpoints load with `weights_only=True`."""
        if self._session is not None:
            self._state = {**self._session.state_dict(), "logged_layers": self._sink.layers}
        return self._state

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take what is no state of ours out of a checkpoint, before the Trainer looks at it."""
        states = checkpoint.get("callbacks")
        if isinstance(states, dict) and not isinstance(states.get(self.state_key, {}), dict):
            self._starts_afresh(f"it is a {type(states.pop(self.state_key)).__name__}")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint; a state that does not fit is reported and left."""
        if not isinstance(state_dict, dict):
            self._starts_afresh(f"it is a {type(state_dict).__name__}")
            return
        self._state = state_dict
        self._load()

    def _load(self) -> bool:
        """Take up the state of a checkpoint; False where it does not fit, which is told."""
        if self._session is not None and self._state:
            try:
                self._session.load_state_dict({k: v for k, v in self._state.items() if k != "logged_layers"})
                self._sink.take_up(self._state.get("logged_layers"))
            except Exception as error:
                self._state = {}
                self._starts_afresh(reason_of(error))
                return False
        return True

    def _starts_afresh(self, why: str) -> None:
        say(f"gradhealth: the checkpoint's state does not fit ({why}): GradHealth starts afresh")

    def __getstate__(self) -> dict[str, Any]:
        """Leave behind what belongs to this process, and the log methods that the Trainer puts on callbacks."""
        mine = {k: v for k, v in vars(self).items() if k not in ("log", "log_dict")}
        return {**mine, "_session": None, "_sink": LoggerSink(self.log_layers)}
