"""Lightning's own tests with a GradHealth in every fit, where a checkout of Lightning's sources is at hand.

Run with LIGHTNING_SOURCES=<checkout> (of the release that is installed); LIGHTNING_TESTS may name other folders of its
`tests/tests_pytorch` than those that touch callbacks, loops and checkpoints. It takes many minutes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

SOURCES = os.environ.get("LIGHTNING_SOURCES", "")
FOLDERS = os.environ.get("LIGHTNING_TESTS", "callbacks loops checkpointing models trainer").split()
HERE = Path(__file__).parent
LEFT_OUT = "not spawn and not fsdp and not ddp and not legacy"  # other processes, and checkpoints that are downloaded


def run(targets: list[str], results: Path, *options: str) -> tuple[int, list[str], str]:
    """Run tests of the checkout; how many ran, which of them failed, and the last lines of the output."""
    path = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts=--doctest-modules"]
    done = subprocess.run(
        [*command, *options, f"--junitxml={results}", *targets],
        cwd=Path(SOURCES) / "tests",
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    cases = [case for case in ElementTree.parse(results).iter("testcase") if case.find("skipped") is None]
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    names = [f"{str(case.get('classname')).replace('.', '/')}.py::{case.get('name')}" for case in failed]
    return len(cases), names, done.stdout[-2_000:]


@pytest.mark.skipif(not SOURCES, reason="no checkout of Lightning's sources (LIGHTNING_SOURCES)")
@pytest.mark.parametrize("folder", FOLDERS)
def test_lightnings_tests_pass_as_they_do_without(folder: str, tmp_path: Path) -> None:
    watched = ["-p", "lightning_suite", "-k", LEFT_OUT]
    ran, failed, tail = run([f"tests_pytorch/{folder}"], tmp_path / "with.xml", *watched)
    print(tail)
    assert ran > 50, tail
    assert "gradhealth:" in tail
    if failed:  # tests that compare all that a logger was given pass where it is given nothing more
        _, failed, _ = run(failed, tmp_path / "quiet.xml", *watched, "--gradhealth-quiet")
    if failed:  # what fails without a GradHealth, too, is not of our making
        _, alone, _ = run(failed, tmp_path / "without.xml", "-o", "markers=flaky")
        assert sorted(set(failed) - set(alone)) == []
