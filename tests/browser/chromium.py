"""What the browser's tests share: one Chromium, pages whose errors are failures, a few runs with known diseases."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_gradhealth as gh
from lightning_gradhealth.view.data import RunView
from lightning_gradhealth.view.recording import Recording

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
NEEDS_IT = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")]
READY = "html[data-ready]"
NAN, INF = [214, 0, 110], [31, 191, 58]  # the colours of cells


def residual(blocks: int = 4, width: int = 16) -> nn.Sequential:
    """Blocks with names that have a structure: blocks.0.attn, blocks.0.norm ..."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(width)
            self.attn = nn.Linear(width, width)
            self.mlp = nn.Linear(width, width)

        def forward(self, x: Tensor) -> Tensor:
            x = x + torch.tanh(self.attn(self.norm(x)))
            result: Tensor = x + torch.relu(self.mlp(x))
            return result

    net = nn.Sequential()
    net.add_module("embed", nn.Linear(8, width))
    net.add_module("blocks", nn.Sequential(*(Block() for _ in range(blocks))))
    net.add_module("head", nn.Linear(width, 3))
    return net


def chain(depth: int = 14, width: int = 16) -> nn.Sequential:
    """A chain of sigmoids: its gradients vanish."""
    hidden = [part for _ in range(depth) for part in (nn.Sigmoid(), nn.Linear(width, width))]
    return nn.Sequential(nn.Linear(8, width), *hidden, nn.Linear(width, 3))


def watched(
    name: str,
    build: Callable[[], nn.Module],
    steps: int = 60,
    poison: Callable[[int, Tensor], Tensor] = lambda step, x: x,
) -> RunView:
    """Train a network, always the same, and return what was recorded of it."""
    torch.manual_seed(0)
    net = build()
    session = gh.HealthSession(net, probe_every_n_steps=2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    recording = Recording()
    for step in range(steps):
        x = poison(step, torch.randn(32, 8))
        loss = nn.functional.cross_entropy(net(x), torch.randint(0, 3, (32,)))
        optimizer.zero_grad()
        loss.backward()
        session.apply(session.observe(optimizer, loss))
        optimizer.step()
        if step % 2 == 1:
            record = session.flush()
            holding = {finding.condition for finding in session.findings if finding.last_step >= step - 2}
            recording.append(record, session.findings, holding)
    session.close()
    return recording.view(name)


# --- what is on a page ---


def shown(page: Any, **attributes: str) -> None:
    """Wait until the page shows what these attributes of its root say."""
    wanted = "".join(f'[data-{key}="{value}"]' for key, value in attributes.items())
    page.wait_for_selector(READY + wanted, state="attached")


def pixel(page: Any, step: float, row: int, panel: str = "heat") -> list[int]:
    """The colour of a canvas at a step and row, out of the hatching's way: the commonest of its surroundings."""
    return page.evaluate(  # type: ignore[no-any-return]
        """([step, row, name]) => {
          const panel = document.body.gradhealth.columns[0][name];
          panel.draw();
          const g = new OffscreenCanvas(5, 5).getContext("2d"), s = panel.scale, n = new Map();
          g.drawImage(panel.canvas, (panel.px(step) - 2) * s, (panel.py(row) - 2) * s, 5 * s, 5 * s, 0, 0, 5, 5);
          const at = g.getImageData(0, 0, 5, 5).data;
          for (let i = 0; i < at.length; i += 4) { const k = at.slice(i, i + 3).join(); n.set(k, (n.get(k) ?? 0) + 1); }
          return [...n].sort((a, b) => b[1] - a[1])[0][0].split(",").map(Number);
        }""",
        [step, row, panel],
    )


def place(page: Any, step: float, row: float, panel: str = "heat") -> tuple[float, float]:
    """Where on the screen a step and row are."""
    x, y = page.evaluate(
        """([step, row, name]) => {
          const panel = document.body.gradhealth.columns[0][name];
          panel.host.scrollIntoView({ block: "center" });
          const box = panel.over.getBoundingClientRect();
          return [box.left + panel.px(step), box.top + panel.py(row)];
        }""",
        [step, row, panel],
    )
    return float(x), float(y)


def zoom_of(page: Any) -> list[float]:
    return page.evaluate("[document.body.gradhealth.x.a, document.body.gradhealth.x.b]")  # type: ignore[no-any-return]


def settled(page: Any) -> None:
    """Let a zoom rest, and its finer picture come."""
    page.wait_for_timeout(250)
    page.wait_for_selector(READY, state="attached")
