"""What a service takes beside numbers: an alert when something is found, the report as a page or as a figure."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from types import ModuleType
from typing import Any, ClassVar

from lightning_gradhealth.messages import printable
from lightning_gradhealth.records import Finding, HealthReport, Severity

LONGEST_TITLE = 63  # characters: W&B refuses more


class Host:
    """A service that shows more than numbers; what one of them cannot show, it passes over.

    Args:
        logger: A logger of Lightning, or a run of the service itself.

    Attributes:
        shows_reports: Whether `report` shows anything.
        prints: Whether an alert prints a line in the terminal, so that no second one is needed.
    """

    shows_reports: ClassVar[bool] = True
    prints: ClassVar[bool] = False

    def __init__(self, logger: Any) -> None:
        self.logger, self.run = logger, _run_of(logger)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Log numbers, where the logger is a run of the service itself."""
        self.run.log(dict(values), step=step)

    def alert(self, finding: Finding) -> None:
        """Tell a finding to those whom the service tells."""

    def report(self, report: HealthReport, page: str) -> None:
        """Show the report, of which `page` is the HTML file; empty: it is too large for one."""


class Wandb(Host):
    """Weights & Biases: an alert (by mail or Slack, if the user wants that), and the page as `wandb.Html`."""

    _LEVELS: ClassVar = {Severity.INFO: "INFO", Severity.WARNING: "WARN", Severity.CRITICAL: "ERROR"}

    def log(self, values: Mapping[str, float], step: int) -> None:
        """See `Host`; the step is a value, as in Lightning's logger, since W&B's own counts calls."""
        self.run.log({**values, "trainer/global_step": step})

    def alert(self, finding: Finding) -> None:
        """See `Host`."""
        self.run.alert(title=title_of(finding), text=str(finding), level=self._LEVELS[finding.severity])

    def report(self, report: HealthReport, page: str) -> None:
        """See `Host`; it goes along with the next numbers, so that W&B's count of steps stays as it is."""
        import wandb

        if page:
            self.run.log({"gradhealth/report": wandb.Html(page, inject=False, data_is_not_path=True)}, commit=False)


class MLflow(Host):
    """MLflow: page and JSON as artifacts of the run."""

    def report(self, report: HealthReport, page: str) -> None:
        """See `Host`."""
        if page:
            self.run.log_text(self.logger.run_id, page, "gradhealth/report.html")
        self.run.log_text(self.logger.run_id, report.to_json(indent=1), "gradhealth/report.json")


class Trackio(Host):
    """Trackio: an alert in its dashboard, which it prints as well."""

    shows_reports, prints = False, True

    def alert(self, finding: Finding) -> None:
        """See `Host`."""
        from trackio import AlertLevel

        level = {Severity.INFO: "INFO", Severity.WARNING: "WARN", Severity.CRITICAL: "ERROR"}[finding.severity]
        self.run.alert(title=title_of(finding), text=str(finding), level=AlertLevel[level])


class Figures(Host):
    """A SummaryWriter of tensorboardX, which has no events for the Grad Health tab: it takes a figure."""

    def report(self, report: HealthReport, page: str) -> None:
        """See `Host`; nothing where Matplotlib is not installed."""
        if importlib.util.find_spec("matplotlib") is not None:
            self.run.add_figure("gradhealth/report", report.plot()[0], max(report.step, 0))


_HOSTS: dict[str, type[Host]] = {"wandb": Wandb, "mlflow": MLflow, "trackio": Trackio, "tensorboardX": Figures}


def host_of(logger: Any) -> Host | None:
    """How a logger, or a run of a service itself, shows more than numbers; None: it does not.

    Example:
        >>> host_of(object()) is None
        True
    """
    run = _run_of(logger)
    names = [run.__name__] if isinstance(run, ModuleType) else [base.__module__ for base in type(run).__mro__]
    kinds = (_HOSTS.get(name.partition(".")[0]) for name in names)
    return next((kind(logger) for kind in kinds if kind is not None), None)


def title_of(finding: Finding) -> str:
    """A finding in a few words.

    Example:
        >>> title_of(Finding("loss_spike", "warning", ("net.0",), 7, 7))
        'loss_spike at step 7'
    """
    return printable(f"{finding.id} at step {finding.first_step}", LONGEST_TITLE)


def _run_of(logger: Any) -> Any:
    """What a logger of Lightning writes to; a service's own run is that itself."""
    return logger.experiment if hasattr(logger, "log_metrics") else logger
