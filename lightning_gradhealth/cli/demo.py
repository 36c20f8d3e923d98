"""`gradhealth demo`: the runs of examples/quickstart.py, also where only the wheel is installed."""

from __future__ import annotations

import runpy
from pathlib import Path

from lightning_gradhealth.cli.misuse import MisuseError, needs
from lightning_gradhealth.messages import printable


def run(logdir: Path = Path("runs"), epochs: int = 20) -> int:
    """Train a sick network, the same one cured, and one at a wild learning rate, on handwritten digits.

    Args:
        logdir: Where their logs and reports go (default: runs).
        epochs: Epochs of each (default: 20).
    """
    needs("sklearn", "the demo needs the digits of scikit-learn", "examples")
    if epochs < 1:
        raise MisuseError(f"--epochs must be >= 1, got {epochs}; leave it out for 20")
    if logdir.exists() and not logdir.is_dir():
        raise MisuseError(f"--logdir must be a folder, got {printable(logdir)}, which is a file")
    runpy.run_path(str(quickstart()))["main"](["--logdir", str(logdir), "--epochs", str(epochs)])
    print(f"In the terminal: gradhealth report {printable(logdir)}")
    print(f"In a browser, without TensorBoard: gradhealth serve {printable(logdir)}")
    return 0


def quickstart() -> Path:
    """The example that is run: the wheel has a copy of it beside this file.

    Example:
        >>> quickstart().name
        'quickstart.py'
    """
    here = Path(__file__)
    beside, in_checkout = here.with_name("quickstart.py"), here.parents[2] / "examples" / "quickstart.py"
    return beside if beside.is_file() else in_checkout
