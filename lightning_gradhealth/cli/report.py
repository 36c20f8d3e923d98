"""`gradhealth report`: the findings of runs from their event files, for people, for machines and for CI."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING

from rich.text import Text

from lightning_gradhealth.cli.misuse import MisuseError
from lightning_gradhealth.cli.terminal import Terminal
from lightning_gradhealth.messages import as_markdown, printable, reason_of
from lightning_gradhealth.records import Condition, HealthReport
from lightning_gradhealth.validation import check_choice, is_remote

if TYPE_CHECKING:
    from lightning_gradhealth.view.data import RunView

_STDOUT = Path("-")
NO_DATA = (
    "no run below {} has Grad Health data; a run has where its Trainer was given callbacks=[gh.GradHealth()] and"
    " logger=TensorBoardLogger(...), and `gradhealth demo` makes three"
)


def run(
    logdir: Path, html: Path | None = None, json: Path | None = None, md: Path | None = None, fail_on: str = ""
) -> int:
    """Say what was found in the runs below a folder, from their event files alone.

    Args:
        logdir: A folder as TensorBoard takes it.
        html: Write all runs as one page, in one file, here.
        json: Write their reports as JSON here; "-" is standard output, and what else is said goes to standard error.
        md: Write their reports as Markdown here, as for a pull request.
        fail_on: Conditions, separated by commas: the exit code is 1 where one was found in a run, above info.
    """
    from lightning_gradhealth.tensorboard.logdir import Logs

    if (html, json, md).count(_STDOUT) > 1:
        raise MisuseError('"-", which is standard output, can be given once; give a file for the others')
    console = Terminal(highlight=False, stderr=_STDOUT in (html, json, md))
    logs = Logs(folder_of(logdir))
    views = logs.runs()
    if not views:
        raise MisuseError(NO_DATA.format(printable(logdir)))
    reports, broken = _reports(views, console)
    broken |= dict.fromkeys(logs.unread(), "no event could be read")
    wanted = _conditions(fail_on, reports.values())
    for name, one in reports.items():
        console.print(Text(f"run {printable(_path(logdir, name))}", style="bold"), overflow="fold")
        console.print(one)
    _write(console, html, lambda: _page(views))
    listed = [{"run": name, **one.to_dict()} for name, one in reports.items()]
    _write(console, json, lambda: dumps({"runs": listed}, indent=1))
    _write(console, md, lambda: "\n\n".join(_markdown(_path(logdir, name), one) for name, one in reports.items()))
    failed = {name: hit for name, one in reports.items() if (hit := one.conditions & wanted)}
    for name, hit in failed.items():
        found = ", ".join(sorted(map(str, hit)))
        print(f"gradhealth report: found {printable(found)} in {printable(_path(logdir, name))}", file=sys.stderr)
    for name, why in broken.items():
        print(f"gradhealth report: {printable(_path(logdir, name))} cannot be read: {why}", file=sys.stderr)
    return 1 if failed else 2 if broken else 0


def folder_of(logdir: Path) -> Path:
    """A folder that there is.

    Raises:
        MisuseError: There is none.

    Example:
        >>> folder_of(Path("no/such"))
        Traceback (most recent call last):
        ...
        lightning_gradhealth.cli.misuse.MisuseError: LOGDIR must be a folder, got no/such, which does not exist; ...
    """
    if logdir.is_dir():
        return logdir
    why = "which is a file" if logdir.exists() else "which does not exist"
    raise MisuseError(
        f"LOGDIR must be a folder, got {printable(logdir)}, {why}; give the one that you would give to TensorBoard,"
        " e.g."
        " lightning_logs"
    )


def _reports(views: Sequence[RunView], console: Terminal) -> tuple[dict[str, HealthReport], dict[str, str]]:
    """Reports of runs by name, and why there are none of others."""
    from lightning_gradhealth.view.health import health_of

    reports, broken = {}, {}
    for view in views:
        try:
            one = health_of(view)
            console.render_lines(one)  # whatever stands in the file, it can be printed
            reports[view.name] = one
        except Exception as error:
            broken[view.name] = reason_of(error)
    return reports, broken


def _conditions(fail_on: str, reports: Iterable[HealthReport]) -> frozenset[str]:
    """The conditions that are named, a user's own where one of the runs has them."""
    own = {str(finding.condition) for one in reports for finding in one.findings}
    known = sorted({*own, *(each.value for each in Condition)})
    try:
        return frozenset(
            check_choice("--fail-on", name.strip().replace("-", "_"), known) for name in fail_on.split(",") if fail_on
        )
    except ValueError as error:
        raise MisuseError(str(error)) from None


def _path(logdir: Path, run: str) -> str:
    """A run as a reader finds it: TensorBoard calls the one in the folder itself "."."""
    return os.path.normpath(logdir / run)


def _page(views: Sequence[RunView]) -> str:
    from lightning_gradhealth.view.page import document
    from lightning_gradhealth.view.payload import payload

    return document(payload(views), "Training health")


def _markdown(path: str, one: HealthReport) -> str:
    from lightning_gradhealth.reports.health import markdown

    return f"# {as_markdown(path)}\n\n#{markdown(one)}"


def _write(console: Terminal, path: Path | None, content: Callable[[], str]) -> None:
    """Write a file, if one was asked for.

    Raises:
        MisuseError: It cannot be written there.
    """
    from lightning_gradhealth.pages import write

    if path is None:
        return
    if path == _STDOUT:
        print(content())
        return
    if is_remote(path):
        raise MisuseError(
            f"{printable(path)} cannot be written: it is not on this machine; write a file here, and copy it"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, content() + "\n")
    except Exception as error:
        raise MisuseError(f"{printable(path)} cannot be written: {reason_of(error)}") from None
    console.print(Text(f"written: {printable(path)}"), soft_wrap=True)
