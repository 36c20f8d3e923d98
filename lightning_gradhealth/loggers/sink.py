"""Records to loggers: scalars for any of them; charts, text and the Grad Health tab for TensorBoard."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

from lightning_gradhealth.loggers.events import EventsWriter, why_not
from lightning_gradhealth.loggers.hosts import Host, host_of
from lightning_gradhealth.loggers.panels import findings_text, is_stand_in, layout, show
from lightning_gradhealth.loggers.scalars import (
    PREFIX,
    LogLayers,
    check_log_layers,
    layer_scalars,
    scalars,
    worst_layers,
)
from lightning_gradhealth.messages import printable, reason_of, say
from lightning_gradhealth.pages import page_of
from lightning_gradhealth.records import Finding, HealthReport, Severity, StepRecord
from lightning_gradhealth.validation import wrong

REPORT_EVERY = 600.0  # seconds between two reports for a service, each of which is a new file there


class LoggerSink:
    """Writes records, alerts and reports to loggers; one that fails is left alone from then on.

    Args:
        log_layers: How many layers' own scalars to write: "auto" the worst ten, chosen at the first record and
            kept, so that their lines go on, and none where the Grad Health tab shows all layers; a number; True for
            all; False for none.
        prefix: What all names begin with.

    Attributes:
        layers: The layers that were chosen; None before the first record.

    Example:
        >>> class Printer:
        ...     def log_metrics(self, metrics, step):
        ...         print(step, sorted(metrics)[0])
        >>> LoggerSink(False).write([Printer()], StepRecord(step=3, total_norm=1.0), [], ())
        3 gradhealth/findings
    """

    def __init__(self, log_layers: LogLayers = "auto", prefix: str = PREFIX) -> None:
        self._prefix = prefix
        self._count = check_log_layers(log_layers)
        self._is_auto = log_layers == "auto"
        self.layers: list[str] | None = None
        self._failed: set[int] = set()
        self._without_layers: set[int] = set()
        self._told: dict[int, set[tuple[str, str]]] = {}
        self._events: dict[int, EventsWriter | None] = {}
        self._hosts: dict[int, Host | None] = {}
        self._reported_at = time.monotonic()

    def take_up(self, layers: Any) -> None:
        """Go on with the layers that a checkpoint names.

        Raises:
            TypeError: They are no names.
        """
        if layers is not None and not (isinstance(layers, list) and all(isinstance(name, str) for name in layers)):
            raise TypeError(f"logged_layers must be a list of names, got {type(layers).__name__}")
        self.layers = layers

    def write(
        self, loggers: Iterable[Any], record: StepRecord, findings: Sequence[Finding], active: Collection[str]
    ) -> None:
        """Write one record: by a single `log_metrics` call a logger, and a single event for the Grad Health tab.

        Args:
            loggers: As `check_loggers` takes them.
            record: What to write.
            findings: All findings so far; TensorBoard shows them as text when there are new ones.
            active: The conditions that hold now.
        """
        grave = sum(finding.severity is not Severity.INFO and finding.condition in active for finding in findings)
        totals = scalars(record, grave, self._prefix)
        for logger in loggers:
            if id(logger) in self._failed:
                continue
            try:
                writer = _writer_of(logger)
                layers = {} if self._is_auto and self._has_tab(logger, writer) else self._layer_scalars(record)
                self._write_scalars(logger, record.step, totals, layers)
                if writer is not None:
                    self._write_panels(logger, writer, record, findings)
                    self._write_events(logger, writer, record, findings, active)
            except Exception as error:
                self._failed.add(id(logger))
                say(
                    f"gradhealth: {printable(type(logger).__name__)} could not write ({reason_of(error)}); it gets"
                    " nothing more from GradHealth, training goes on"
                )

    # --- services that show more than numbers

    def alert(self, loggers: Iterable[Any], finding: Finding) -> bool:
        """Tell a finding above info to services that have alerts; whether one has printed it."""
        if finding.severity is Severity.INFO:
            return False
        return any(host.prints for host in self._each(loggers, lambda host: host.alert(finding)))

    def report(self, loggers: Iterable[Any], report: Callable[[], HealthReport]) -> None:
        """Give the report to services that show one; what fails is told, and no more."""
        self._reported_at = time.monotonic()
        takers = [logger for logger in loggers if (host := self._host(logger)) is not None and host.shows_reports]
        if not takers:
            return
        try:
            latest = report()
            page = page_of(latest)
        except Exception as error:
            say(f"gradhealth: no report for the loggers ({reason_of(error)}); training goes on")
            return
        self._each(takers, lambda host: host.report(latest, page))

    def keep_up(self, loggers: Sequence[Any], report: Callable[[], HealthReport]) -> None:
        """Give the report of a run that goes on to services that show one, every ten minutes."""
        if time.monotonic() - self._reported_at >= REPORT_EVERY:
            self.report(loggers, report)

    def _each(self, loggers: Iterable[Any], show: Callable[[Host], None]) -> list[Host]:
        """Let every host show something; those that did. One that fails is told once, and shows nothing more."""
        shown = []
        for logger in loggers:
            host = self._host(logger)
            if host is None:
                continue
            try:
                show(host)
                shown.append(host)
            except Exception as error:
                self._hosts[id(logger)] = None
                name = printable(type(host).__name__)
                say(f"gradhealth: {name} shows neither alerts nor reports ({reason_of(error)}); numbers go on")
        return shown

    def _host(self, logger: Any) -> Host | None:
        if id(logger) in self._failed:
            return None
        if id(logger) not in self._hosts:
            try:
                self._hosts[id(logger)] = host_of(logger)
            except Exception:  # its experiment cannot be had, which `write` tells
                self._hosts[id(logger)] = None
        return self._hosts[id(logger)]

    def end(self, loggers: Iterable[Any], report: HealthReport, active: Collection[str]) -> None:
        """Write the report of a run that ends into its event files.

        Args:
            loggers: Those that the run was written to.
            report: The run's own report.
            active: The conditions that hold at its end.
        """
        for logger in loggers:
            events = self._events.get(id(logger))
            if events is None or id(logger) in self._failed:
                continue
            try:
                writer = _writer_of(logger)
                if getattr(writer, "all_writers", writer) is not None:  # torch's opens a new file once it was closed
                    events.end(writer, report, active)
            except Exception as error:
                say(f"gradhealth: the report was not written for `gradhealth report` ({reason_of(error)})")

    # --- scalars

    def _write_scalars(self, logger: Any, step: int, totals: dict[str, float], layers: dict[str, float]) -> None:
        """Write all scalars in a dict of the logger's own; where it refuses them, once more without those of layers."""
        if not layers or id(logger) in self._without_layers:
            _log(logger, dict(totals), step)
            return
        try:
            _log(logger, totals | layers, step)
        except Exception as error:
            _log(logger, dict(totals), step)
            self._without_layers.add(id(logger))
            say(
                f"gradhealth: {printable(type(logger).__name__)} refused the scalars of layers ({reason_of(error)}); it"
                " gets the others only"
            )

    def _layer_scalars(self, record: StepRecord) -> dict[str, float]:
        if self._count == 0:
            return {}
        if self.layers is None:
            count = len(record.layers) if self._count is None else self._count
            self.layers = worst_layers(record.layers, count)
        return layer_scalars(record.layers, self.layers, self._prefix)

    # --- TensorBoard

    def _write_panels(self, logger: Any, writer: Any, record: StepRecord, findings: Sequence[Finding]) -> None:
        """The layout once a writer, the findings whenever there is a new one."""
        if id(logger) not in self._told:
            self._told[id(logger)] = set()
            has_layers = self._count != 0 and not (self._is_auto and self._has_tab(logger, writer))
            show(writer, layout(has_layers, record.clips, self._prefix))
        known = self._told[id(logger)]
        if new := {(f.condition, f.severity) for f in findings} - known:
            known |= new
            writer.add_text(f"{self._prefix}/findings", findings_text(findings), record.step)

    def _has_tab(self, logger: Any, writer: Any) -> bool:
        """Whether the Grad Health tab gets what is written; where it does not, that is told once."""
        if writer is None:
            return False
        if id(logger) not in self._events:
            stands_in = is_stand_in(writer)
            why = why_not(writer)
            if why and not stands_in:
                say(f"gradhealth: nothing is written for TensorBoard's Grad Health tab: {why}")
            self._events[id(logger)] = None if why or stands_in else EventsWriter(self._prefix)
        return self._events[id(logger)] is not None

    def _write_events(
        self, logger: Any, writer: Any, record: StepRecord, findings: Sequence[Finding], active: Collection[str]
    ) -> None:
        """One event for the tab; where that fails, the scalars go on."""
        events = self._events[id(logger)] if self._has_tab(logger, writer) else None
        if events is None:
            return
        try:
            events.write(writer, record, findings, active)
        except Exception as error:
            self._events[id(logger)] = None
            say(
                f"gradhealth: nothing more is written for TensorBoard's Grad Health tab ({reason_of(error)}); training"
                " and scalars go on"
            )


def check_loggers(loggers: Any) -> list[Any]:
    """Return loggers as a list.

    Args:
        loggers: One or several: loggers of Lightning or Fabric, SummaryWriters, runs of W&B or Trackio.

    Raises:
        TypeError: One is neither.

    Example:
        >>> check_loggers("runs")
        Traceback (most recent call last):
        ...
        TypeError: loggers must be a SummaryWriter, a logger of Lightning or a run of W&B or Trackio, or several, ...
    """
    several = list(loggers) if isinstance(loggers, (list, tuple)) else [loggers]
    for logger in several:
        if isinstance(logger, type) or not (
            callable(getattr(logger, "log_metrics", None)) or _is_writer(logger) or _is_run(logger)
        ):
            must = "a SummaryWriter, a logger of Lightning or a run of W&B or Trackio, or several"
            remedy = 'e.g. loggers=torch.utils.tensorboard.SummaryWriter("runs/first")'
            raise TypeError(wrong("loggers", must, logger, remedy))
    return several


def _writer_of(logger: Any) -> Any:
    """The SummaryWriter of a TensorBoardLogger, of either package, or the writer itself; None: there is none."""
    if any(base.__name__ == "TensorBoardLogger" for base in type(logger).__mro__):
        return logger.experiment
    return logger if _is_writer(logger) else None


def _is_writer(logger: Any) -> bool:
    """Whether it is a SummaryWriter."""
    return not hasattr(logger, "log_metrics") and all(hasattr(logger, name) for name in ("add_scalar", "add_text"))


def _is_run(logger: Any) -> bool:
    """Whether it is a run of a service itself, as `wandb.init()` returns it."""
    return not hasattr(logger, "log_metrics") and callable(getattr(logger, "log", None)) and host_of(logger) is not None


def _log(logger: Any, values: dict[str, float], step: int) -> None:
    if hasattr(logger, "log_metrics"):
        logger.log_metrics(values, step=step)
    elif _is_writer(logger):
        for name, value in values.items():
            logger.add_scalar(name, value, step)
    elif (host := host_of(logger)) is not None:
        host.log(values, step)
