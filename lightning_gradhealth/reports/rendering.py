"""What reports share: numbers, lines and findings as text, and their way to disk."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.text import Text

from lightning_gradhealth.messages import printable
from lightning_gradhealth.records import Finding, Severity

COLOURS = {Severity.INFO: "cyan", Severity.WARNING: "yellow", Severity.CRITICAL: "red"}


def line(text: str, style: str = "") -> Text:
    """A line of a terminal, without control characters of others."""
    return Text(printable(text), style=style)


def figure(value: float | None) -> str:
    """A number of a table.

    Example:
        >>> figure(0.25), figure(1e-7), figure(None), figure(math.nan)
        ('0.25', '1.00e-07', '–', 'NaN')
    """
    if value is None:
        return "–"
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Inf"
    return f"{value:.2e}" if value and not 1e-3 <= abs(value) < 1e4 else f"{value:.4g}"


def evidence(finding: Finding) -> str:
    """The numbers that a finding rests on, in one line.

    Example:
        >>> evidence(Finding("dead_units", Severity.INFO, (), 1, 2, evidence={"dead_fraction": 0.5}))
        'dead_fraction 0.5'
    """
    shown = {k: v for k, v in finding.evidence.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
    return ", ".join(f"{key} {figure(float(value))}" for key, value in shown.items())


def render_finding(finding: Finding, *, with_step: bool = True) -> RenderableType:
    """A finding with its evidence and its remedy.

    Args:
        finding: The finding.
        with_step: Whether to say when it was seen.
    """
    colour = COLOURS[finding.severity]
    since = f", step {finding.first_step}"
    if finding.last_step > finding.first_step:
        since = f", steps {finding.first_step} to {finding.last_step}"
    head = line(f"{finding.severity}: {finding.condition}", style=f"bold {colour}")
    head.append(f" in {finding.where}{since if with_step else ''}", style="default")
    lines = [head, line(f"  {finding.summary}")]
    if numbers := evidence(finding):
        lines.append(line(f"  evidence: {numbers}", style="dim"))
    lines.append(line(f"  remedy: {finding.remedy}"))
    lines += [line(f"    {code}", style="bold") for code in finding.code.splitlines()]
    return Group(*lines)


def plain(renderable: RenderableType, width: int = 120) -> str:
    """What rich would print, without colours.

    Example:
        >>> plain(Text("ok", style="red"))
        'ok'
    """
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(renderable)
    return console.export_text().rstrip("\n")


def save(path: Path, formats: Mapping[str, Callable[[], str]]) -> Path:
    """Write what the path's suffix stands for."""
    if path.suffix not in formats:
        *others, last = formats
        must = f"{', '.join(others)} or {last}"
        raise ValueError(f"path must end in {must}, got {str(path)!r}; the suffix decides the format")
    content = formats[path.suffix]()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content + "\n", encoding="utf-8")
    return path
