"""Reports as pages: HTML of what was recorded of a run, or at least of what its report says; and its way to disk."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from lightning_gradhealth.messages import printable, reason_of, say
from lightning_gradhealth.records import HealthReport, StepRecord
from lightning_gradhealth.view.data import RunView
from lightning_gradhealth.view.page import document, frame
from lightning_gradhealth.view.payload import payload
from lightning_gradhealth.view.recording import Recording

LARGEST = 2_000_000  # bytes of a page: MLflow and mail take it
_NAME = "run"


def recorded(report: HealthReport) -> RunView:
    """What was recorded of the run; of a report that was read from a file, what it says itself.

    Example:
        >>> view = recorded(HealthReport(step=9, steps=10, trend=((4.0, 2.0), (9.0, 1.0))))
        >>> view.totals.column("total_norm")[1].tolist()
        [2.0, 1.0]
    """
    kept = report.__dict__.get("_recorded")
    if isinstance(kept, RunView):
        return kept
    recording = Recording()
    active = {finding.condition for finding in report.findings if finding.last_step >= report.step}
    for step, total in (point[:2] for point in report.trend):
        if step < report.step:
            recording.append(StepRecord(step=int(step), total_norm_max=total), (), ())
    if report.step >= 0:
        largest = next((float(point[1]) for point in report.trend if point[0] >= report.step), None)
        latest = StepRecord(step=report.step, total_norm_max=largest, layers=report.layers)
        recording.append(latest, report.findings, active)
    return recording.view(_NAME)


def health_page(report: HealthReport, title: str = "Training health") -> str:
    """A report as one HTML file that needs nothing else.

    Args:
        report: The report.
        title: Its title.

    Example:
        >>> health_page(HealthReport())[:15]
        '<!doctype html>'
    """
    return document(payload([recorded(report)]), title)


def health_frame(report: HealthReport) -> str:
    """A report as a notebook shows it.

    Example:
        >>> health_frame(HealthReport())[:7]
        '<iframe'
    """
    return frame(health_page(report))


def page_of(report: HealthReport, tell: Callable[[str], None] | None = None) -> str:
    """The page of a run's report, titled by its verdict; empty, which is told, where it would be too large to send.

    Example:
        >>> page_of(HealthReport()).count("Training health: nothing was watched")
        1
    """
    page = health_page(report, f"Training health: {report.verdict}")
    if len(page.encode()) <= LARGEST:
        return page
    say(f"gradhealth: no page of the report: it would have more than {LARGEST:,} bytes", through=tell)
    return ""


def keep(report: HealthReport, folder: Path, stem: str = "report", tell: Callable[[str], None] | None = None) -> None:
    """Write a report as HTML and JSON, each at once or not at all; a failure is told, and goes no further.

    Args:
        report: The report.
        folder: Where to; it is made.
        stem: The files' name without suffix.
        tell: Says a line; None: the log does.

    Example:
        >>> with tempfile.TemporaryDirectory() as place:
        ...     keep(HealthReport(), Path(place) / "logs", tell=lambda line: None)
        ...     sorted(path.name for path in Path(place, "logs").iterdir())
        ['report.html', 'report.json']
    """
    path = folder / f"{stem}.html"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write(path.with_suffix(".json"), report.to_json(indent=1) + "\n")
        page = page_of(report, tell)
        if not page:
            return
        write(path, page)
    except Exception as error:
        say(f"gradhealth: the report could not be written to {printable(folder)} ({reason_of(error)})", through=tell)
        return
    say(f"gradhealth: report: {printable(path)}", through=tell)


def write(path: Path, text: str) -> None:
    """Write a file so that nobody ever sees a part of it, and a part of it never stays."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(name).chmod(0o666 & ~_umask())
        Path(name).replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(name).unlink()
        raise


def _umask() -> int:
    """The bits that this process's files do not get; there is no way to ask but to set it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
