"""Parts of reports as GitHub's Markdown, whatever names and texts hold."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

from lightning_gradhealth.messages import as_markdown, printable
from lightning_gradhealth.records import Finding
from lightning_gradhealth.reports.rendering import evidence, first_with_remedy, since

_ROOM = 40_000  # characters of a table: a comment on GitHub has at most 65,536


def findings_markdown(findings: Sequence[Finding], *, with_step: bool = True) -> list[str]:
    r"""Findings as a list: what, where, since when, the evidence and, once, the remedy with its code.

    Args:
        findings: The findings.
        with_step: Whether to say when they were seen.

    Example:
        >>> from lightning_gradhealth.records import Severity
        >>> spike = Finding("loss_spike", Severity.WARNING, (), 7, 7, "loss 40", remedy="wait")
        >>> print(*findings_markdown([spike]), sep="\n")
        - **warning: loss_spike** in the whole network, step 7: loss 40.
          Remedy: wait.
        <BLANKLINE>
    """
    lines: list[str] = []
    said: set[str] = set()
    for finding, earlier in zip(findings, first_with_remedy(findings), strict=True):
        where = f"in {finding.where}{f', {since(finding)}' if with_step else ''}"
        clause = f": {_clause(finding.summary)}" if finding.summary else ""
        lines.append(f"- **{finding.severity}: {as_markdown(finding.condition)}** {as_markdown(where)}{clause}.")
        if known := evidence(finding):
            lines.append(f"  Evidence: {as_markdown(known)}.")
        if earlier is not None:
            lines.append(f"  Remedy: as for {as_markdown(earlier.condition)}.")
        elif finding.remedy:
            lines.append(f"  Remedy: {_clause(finding.remedy)}.")
        if finding.code and finding.code not in said:
            lines += ["", *(f"  {text}" for text in _fenced(finding.code))]
            said.add(finding.code)
    return [*lines, ""] if lines else []


def _clause(text: str) -> str:
    return as_markdown(text).rstrip(". ")


def _fenced(code: str) -> list[str]:
    """A block of code that none of its own lines can end."""
    lines = [printable(text) for text in code.splitlines()]
    fence = "`" * max(3, 1 + max((len(run) for text in lines for run in re.findall("`+", text)), default=0))
    return [f"{fence}python", *lines, fence]


def table_markdown(summary: str, titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    r"""A table that opens on a click.

    Args:
        summary: What is seen of it before.
        titles: The titles of its columns.
        rows: Its cells.

    Example:
        >>> print(*table_markdown("1 layer", ("layer", "state"), [("a|b", "ok")]), sep="\n")
        <details><summary>1 layer</summary>
        <BLANKLINE>
        | layer | state |
        |---|---|
        | a\|b | ok |
        <BLANKLINE>
        </details>
        <BLANKLINE>
    """
    lines = [f"<details><summary>{_as_html(summary)}</summary>", "", f"| {' | '.join(titles)} |"]
    lines.append(f"|{'---|' * len(titles)}")
    room = _ROOM
    for number, row in enumerate(rows):
        text = f"| {' | '.join(map(as_markdown, row))} |"
        room -= len(text)
        if room < 0:
            lines += ["", f"{len(rows) - number} more are not shown; the report as .json has them."]
            break
        lines.append(text)
    return [*lines, "", "</details>", ""]


def _as_html(text: str) -> str:
    """A text within HTML, which Markdown does not read: no backslashes there."""
    return html.escape(printable(text), quote=False)
