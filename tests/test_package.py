"""The package as a whole: lazy, typed, light, and with an example for every public name."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_gradhealth as gh

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lightning_gradhealth"


def imported_by(statement: str) -> set[str]:
    """Top-level modules that a fresh interpreter has after a statement."""
    code = f"{statement}\nimport sys\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "statement",
    [
        "import lightning_gradhealth",
        "import lightning_gradhealth.records",
        "import lightning_gradhealth.history",
        "import lightning_gradhealth.rules",
        "from lightning_gradhealth.reports import flow, health, initialization",
        "from lightning_gradhealth import HealthReport; HealthReport().to_json()",
    ],
)
def test_what_is_light_stays_light(statement: str) -> None:
    assert not {"torch", "lightning", "tensorboard"} & imported_by(statement)


def test_a_session_needs_no_lightning() -> None:
    modules = imported_by("from lightning_gradhealth import HealthSession, init_weights, GradientMonitor")
    assert "torch" in modules
    assert not {"lightning", "pytorch_lightning"} & modules


def test_lazy_names_and_typed_names_are_the_same() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    typed = {
        (alias.asname, str(node.module))
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert typed == {(name, f"lightning_gradhealth.{home}") for name, home in gh._HOME_OF.items()}
    assert set(gh.__all__) == {name for name, _ in typed} | {"__version__"}
    assert set(dir(gh)) == set(gh.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        gh.nonsense  # noqa: B018


@pytest.mark.parametrize("name", [name for name in gh.__all__ if name != "__version__"])
def test_every_public_name_has_a_doc_and_an_example(name: str) -> None:
    value = getattr(gh, name)
    doc = inspect.getdoc(value) or ""
    assert ">>>" in doc, f"{name} has no doctest"


def test_the_top_level_is_what_the_design_says() -> None:
    allowed = {"pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE", "lightning_gradhealth", "tests", "examples"}
    tracked = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT, check=False)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    tops = {line.split("/")[0] for line in tracked.stdout.splitlines()}
    assert {top for top in tops if not top.startswith(".")} <= allowed
    assert (PACKAGE / "py.typed").exists()
