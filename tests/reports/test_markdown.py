"""Reports as GitHub's Markdown: what a comment on a pull request shows, whatever the names of layers are."""

from __future__ import annotations

import html

import hypothesis.strategies as st
import pytest
from hypothesis import example, given, settings
from markdown_it import MarkdownIt
from markdown_it.token import Token

from lightning_gradhealth import Finding, FlowReport, HealthReport, LayerStats, Severity
from lightning_gradhealth.messages import printable
from lightning_gradhealth.reports.flow import flow_markdown
from lightning_gradhealth.reports.health import markdown


def parsed(text: str) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(text)


def text_of(token: Token) -> str:
    """What a reader sees of an inline token."""
    return "".join(child.content for child in token.children or () if child.type in ("text", "code_inline"))


def layer(name: str, **values: float) -> LayerStats:
    return LayerStats(name, grad_norm=0.5, optimizer=0, **values)


texts = st.text(max_size=40) | st.sampled_from(
    [
        "</details>",
        "<script>x</script>",
        "a|b",
        "```",
        "| x |",
        "# x",
        "- x",
        "[l](http://x)",
        "&lt;",
        "\n\n---\n",
        "`a`",
    ]
)


@settings(max_examples=150, deadline=None)
@given(names=st.lists(texts, min_size=1, max_size=5), words=texts, code=texts, condition=texts.filter(bool))
@example(["a"], "x\n```\n</details>", "```\n</details>\n~~~", "</summary>")
def test_hostile_texts_stay_where_they_belong(names: list[str], words: str, code: str, condition: str) -> None:
    finding = Finding(condition, Severity.WARNING, tuple(names), 1, 2, words, {words: words}, words, code)
    tokens = parsed(markdown(HealthReport((finding,), tuple(map(layer, names)), 2, 3, notes=(words,))))
    kinds = [token.type for token in tokens]
    assert kinds[0] == "heading_open"
    assert kinds.count("heading_open") == kinds.count("table_open") == 1
    assert kinds.count("hr") == 0
    raw = [token.content for token in tokens if token.type == "html_block"]
    assert len(raw) == 2
    assert raw[0].startswith("<details><summary>")
    assert raw[0].count("<") == 3
    assert raw[1].strip() == "</details>"
    assert not [child for token in tokens for child in token.children or () if child.type == "html_inline"]
    assert not [child for token in tokens for child in token.children or () if child.type == "link_open"]
    assert kinds.count("fence") == bool(code)
    if code:
        assert next(t for t in tokens if t.type == "fence").content.splitlines() == list(
            map(printable, code.splitlines())
        )
    body = tokens[kinds.index("tbody_open") : kinds.index("tbody_close")]
    rows = [i for i, token in enumerate(body) if token.type == "tr_open"]
    assert len(rows) == len(names)
    assert [text_of(body[i + 2]).split() for i in rows] == [printable(name).split() for name in names]


def test_a_comment_begins_with_verdict_and_findings_and_the_table_waits() -> None:
    finding = Finding(
        "dead_units", Severity.WARNING, ("b",), 3, 9, "60 % are dead", {"worst_share": 0.6}, "a smaller rate", "lr = 1"
    )
    text = markdown(HealthReport((finding,), (layer("a"), layer("b", dead_fraction=0.6)), 9, 10, notes=("no loss",)))
    assert text.splitlines() == [
        "# Health: dead_units after 10 optimizer steps",
        "",
        "- **warning: dead_units** in b, steps 3 to 9: 60 % are dead.",
        "  Evidence: worst share 0.6.",
        "  Remedy: a smaller rate.",
        "",
        "  ```python",
        "  lr = 1",
        "  ```",
        "",
        "<details><summary>2 layers: 1 dead units, 1 ok</summary>",
        "",
        "| layer | state | grad norm | norm ratio | grad/weight | update/weight | dead |",
        "|---|---|---|---|---|---|---|",
        "| b | dead units | 0.5 | – | – | – | 0.6 |",
        "| a | ok | 0.5 | – | – | – | – |",
        "",
        "</details>",
        "",
        "- Note: no loss",
    ]


@pytest.mark.parametrize("kind", ["health", "flow"])
def test_a_thousand_layers_fit_a_comment_and_the_sick_ones_come_first(kind: str) -> None:
    names = [f"model.encoder.transformer_blocks.{i}.attention.out_proj.weight" for i in range(1_000)]
    finding = Finding("dead_units", Severity.WARNING, (names[-1],), 3, 9, "dead")
    layers = tuple(map(layer, names))
    reports = {"health": HealthReport((finding,), layers, 9, 10), "flow": FlowReport(layers, findings=(finding,))}
    text = {"health": markdown, "flow": flow_markdown}[kind](reports[kind])  # type: ignore[operator]
    assert len(text) < 65_536
    rows = [line for line in text.splitlines() if line.startswith("| model")]
    assert names[-1] in rows[0]
    assert f"{1_000 - len(rows)} more are not shown" in text


def test_a_remedy_that_findings_share_is_said_once() -> None:
    findings = tuple(
        Finding(name, Severity.WARNING, (), 1, 2, "so", {}, "a smaller rate", "lr = 1") for name in ("one", "two")
    )
    for text in (markdown(HealthReport(findings, (), 2, 3)), flow_markdown(FlowReport(findings=findings))):
        assert text.count("Remedy: a smaller rate.") == 1
        assert text.count("lr = 1") == 1
        assert "Remedy: as for one." in html.unescape(text)
