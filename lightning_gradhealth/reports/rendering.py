"""What reports share: numbers, lines and findings as text, and their way to disk."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.rule import Rule
from rich.text import Text

from lightning_gradhealth.messages import in_words, printable
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
    """What a finding rests on, in one line of words and numbers.

    Example:
        >>> evidence(Finding("dead_units", Severity.INFO, (), 1, 2, evidence={"dead_fraction": 0.5, "loss": None}))
        'dead fraction 0.5'
    """
    known = [(name, value) for name, value in finding.evidence.items() if value is not None and value != ""]
    return ", ".join(
        f"{printable(name, 60).replace('_', ' ')} {figure(value) if isinstance(value, float) else in_words(value, 3)}"
        for name, value in known[:20]
    )


def status(findings: Iterable[Finding], active: Container[str], *, watched: bool = True) -> str:
    """The worst of the findings that hold now, in a few words.

    Args:
        findings: All findings.
        active: The conditions that hold now.
        watched: All that can be is still watched.

    Example:
        >>> spike = Finding("loss_spike", Severity.WARNING, (), 120, 125)
        >>> status([spike], {"loss_spike"}), status([spike], ()), status([], ())
        ('loss spike since 120', 'healthy again', 'healthy')
    """
    grave = [finding for finding in findings if finding.severity is not Severity.INFO]
    now = [finding for finding in grave if str(finding.condition) in active]
    if not now and not watched:
        return "partly watched"
    if not now:
        return "healthy again" if grave else "healthy"
    worst = min(now, key=lambda finding: (-finding.severity.rank, finding.first_step))
    words = printable(worst.condition, 60).replace("_", " ")  # a narrow bar breaks lines between words
    return f"{words} since {worst.first_step}"


def since(finding: Finding) -> str:
    """When a finding was seen.

    Example:
        >>> since(Finding("loss_spike", Severity.INFO, (), 3, 9)), since(Finding("loss_spike", Severity.INFO, (), 3, 3))
        ('steps 3 to 9', 'step 3')
    """
    if finding.last_step > finding.first_step:
        return f"steps {finding.first_step} to {finding.last_step}"
    return f"step {finding.first_step}"


def first_with_remedy(findings: Sequence[Finding]) -> list[Finding | None]:
    """For each finding the earlier one with the same remedy; None: it is the first to give it."""
    said: dict[str, Finding] = {}
    firsts = [said.setdefault(finding.remedy, finding) for finding in findings]
    return [None if first is finding else first for first, finding in zip(firsts, findings, strict=True)]


def render_findings(findings: Sequence[Finding], *, with_step: bool = True) -> list[RenderableType]:
    """Findings with their evidence and their remedies, each of these once.

    Args:
        findings: The findings.
        with_step: Whether to say when they were seen.
    """
    lines: list[RenderableType] = []
    said: set[str] = set()
    for finding, earlier in zip(findings, first_with_remedy(findings), strict=True):
        head = line(f"{finding.severity}: {finding.condition}", style=f"bold {COLOURS[finding.severity]}")
        head.append(f" in {finding.where}{f', {since(finding)}' if with_step else ''}", style="default")
        lines += [head, _below(finding.summary)] if finding.summary else [head]
        if known := evidence(finding):
            lines.append(_below(f"evidence: {known}", style="dim"))
        if earlier is not None:
            lines.append(_below(f"remedy: as for {earlier.condition}"))
        elif finding.remedy:
            lines.append(_below(f"remedy: {finding.remedy}"))
        if finding.code in said:
            lines.append(_below("the code above", style="dim", indent=4))
        elif finding.code:
            lines += [_below(code, style="bold", indent=4) for code in finding.code.splitlines()]
            said.add(finding.code)
    return lines


def _below(text: str, style: str = "", indent: int = 2) -> RenderableType:
    return Padding(line(text, style), (0, 0, 0, indent), expand=False)


def titled(parts: Sequence[RenderableType], colour: str) -> RenderableType:
    """A report under its title. It has no frame: what is copied from a terminal has none either.

    Args:
        parts: What it says.
        colour: The colour of its verdict.
    """
    return Group(Rule("GradHealth", align="left", style=colour), *parts)


def colour_of(findings: Sequence[Finding], healthy: bool) -> str:
    """The colour of a verdict: green, or that of the worst finding.

    Example:
        >>> colour_of((), healthy=True)
        'green'
    """
    worst = max((finding.severity for finding in findings), key=lambda severity: severity.rank, default=Severity.INFO)
    return "green" if healthy else COLOURS[worst]


def plain(renderable: RenderableType, width: int = 120) -> str:
    """What rich would print, without colours.

    Example:
        >>> plain(Text("ok", style="red"))
        'ok'
    """
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(renderable)
    return "\n".join(text.rstrip() for text in console.export_text().rstrip("\n").split("\n"))


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
