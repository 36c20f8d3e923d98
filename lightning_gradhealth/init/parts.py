"""One parameter's share of a plan: what is written, and what the report says of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lightning_gradhealth.init.advice import Advice
from lightning_gradhealth.init.blocks import Block, whole
from lightning_gradhealth.init.owned import Owned
from lightning_gradhealth.init.settings import OVERRIDE, joined
from lightning_gradhealth.layers import clean_name
from lightning_gradhealth.records import InitEntry, InitReport
from lightning_gradhealth.sharding import fill, is_sharded

# of a weight's size, by a first step: healthy runs stay below .05, and oversized_updates reports from here on
MOVES = 0.1
APART = 100.0  # as far is it from that to the usual share of a step, .001


@dataclass(frozen=True)
class Part:
    """What a plan does to one parameter, or to all from which one weight is computed.

    Attributes:
        owned: The parameter.
        blocks: What is done to it.
        target: The standard deviation to which a calibration brings the output of the weight; None: it does not.
    """

    owned: Owned
    blocks: Sequence[Block]
    target: float | None = None

    @property
    def sets(self) -> bool:
        """Whether anything is written."""
        return any(block.draw is not None for block in self.blocks)

    @property
    def binds(self) -> bool:
        """Whether its values can be written one original at a time."""
        return self.sets and (self.owned.computed is None or self.owned.computed.binds)

    @property
    def why_kept(self) -> str:
        """Why nothing is written, or nothing can be while the model is materialised."""
        if self.sets:
            return "its parametrization keeps buffers that only init_weights on a real device can set"
        entry = self.blocks[0].entry
        return f"{entry.rule}: {entry.note}" if entry.note else entry.rule

    @property
    def copied_from(self) -> str:
        """The name of the parameter of which it is a copy; "" for what is drawn by itself."""
        return self.blocks[0].stream.partition("[")[0]

    def scale(self) -> float | None:
        """The root mean square that the weight will have; None where nobody knows yet."""
        if not self.sets:
            unreadable = any(map(_unreadable, self.owned.originals.values()))
            return None if unreadable or not self.owned.parameter.is_floating_point() else _rms(self.owned.parameter)
        squares = 0.0
        for block in self.blocks:
            if block.entry.target_std is None:
                return None
            squares += block.entry.target_std**2 * math.prod(block.entry.shape)
        return math.sqrt(squares / max(1, self.owned.parameter.numel()))

    def refreshed(self, now: Mapping[str, nn.Parameter]) -> Part:
        """The same for the parameters that the model has now under the same names."""
        originals = {name: now.get(name, original) for name, original in self.owned.originals.items()}
        return replace(self, owned=replace(self.owned, originals=originals))

    def whole(self, seed: int) -> Tensor:
        """All values of the weight, on the CPU."""
        owned = self.owned
        return whole(owned.parameter, self.blocks, owned.padding, seed)

    def fill(self, index: int, seed: int, target: Tensor) -> None:
        """Fill a tensor with the values of one of the originals."""
        with torch.no_grad():
            fill(target, self.owned.values(self.whole(seed), seed)[index])

    def write(self, seed: int) -> None:
        """Carry it out."""
        if self.sets:
            self.owned.write(self.whole(seed), seed)

    def entries(self, measured: bool, lr: float | None) -> dict[str, list[InitEntry]]:
        """What the report says, by the name of the original.

        Args:
            measured: Whether it has been carried out, so that there is something to measure.
            lr: The learning rate of an Adam-like optimizer; None: not known.
        """
        owned = self.owned
        values = owned.present() if measured and not any(map(_unreadable, owned.originals.values())) else None
        entries = [_measured(block, values) for block in self.blocks]
        if owned.computed is None:
            return {
                owned.name: [self._stepped(entry, block, lr) for entry, block in zip(entries, self.blocks, strict=True)]
            }
        said = {}
        for name, original in owned.originals.items():
            if name == owned.main:
                said[name] = [
                    replace(e, name=e.name.replace(owned.name, name, 1), note=joined(e.note, f"gives {owned.name}"))
                    for e in entries
                ]
            else:
                first, note = entries[0], f"gives {owned.name}, with {owned.main}"
                said[name] = [InitEntry(name, first.module, tuple(original.shape), first.rule, first.scheme, note=note)]
        return said

    def _stepped(self, entry: InitEntry, block: Block, lr: float | None) -> InitEntry:
        """The entry with what one step moves, of a parameter that is trained and not 0."""
        values = self.owned.parameter
        if lr is None or not (values.requires_grad and values.is_floating_point()):
            return entry
        if entry.measured_std is None and block.draw is not None:  # a plan, or sharded
            rms = entry.target_std
        else:
            rms = None if _unreadable(values) else _rms(block.part(values.detach()))
        return replace(entry, relative_step=lr / rms) if rms else entry


def target_of(owned: Owned, blocks: Sequence[Block], advice: Mapping[int, Advice]) -> float | None:
    """What a calibration brings the output of a weight to; None for all that no formula scales."""
    known = next((advice[id(p)] for p in owned.originals.values() if id(p) in advice), None)
    scaled = all(block.entry.fan is not None and block.entry.target_std for block in blocks)
    chosen = any(block.entry.found == OVERRIDE for block in blocks)
    table = blocks[0].entry.rule in ("Embedding", "EmbeddingBag") or (known is not None and known.role != "weight")
    copied = bool(blocks[0].stream)
    return None if chosen or table or copied or not scaled else (1.0 if known is None else known.factor)


def _rms(values: Tensor) -> float:
    return float(values.detach().abs().double().square().mean().sqrt()) if values.numel() else 0.0


def _unreadable(tensor: Tensor) -> bool:
    return tensor.is_meta or is_sharded(tensor)


def _measured(block: Block, values: Tensor | None) -> InitEntry:
    part = None if values is None else block.part(values)
    if part is None or part.numel() < 2 or not (part.is_floating_point() or part.is_complex()):
        return block.entry
    precise = part if part.dtype is torch.float64 or part.is_complex() else part.float()
    return replace(block.entry, measured_std=float(precise.std()))


def in_order(model: nn.Module, parts: Sequence[Part], *, measured: bool, lr: float | None) -> tuple[InitEntry, ...]:
    """The entries of all parameters, in registration order."""
    said = {name: entries for part in parts for name, entries in part.entries(measured, lr).items()}
    names = [clean_name(path) for path, _ in model.named_parameters(remove_duplicate=False)]
    return tuple(entry for name in dict.fromkeys(names) for entry in said.get(name, ()))


def with_step_notes(report: InitReport, lr: float | None) -> InitReport:
    """The report with what there is to say of the first step at a learning rate; the drawn weights are looked at."""
    steps = {e.name: e.relative_step for e in report.entries if e.relative_step and e.target_std and len(e.shape) > 1}
    if lr is None or not steps:
        return report
    least, greatest = min(steps, key=lambda name: steps[name]), max(steps, key=lambda name: steps[name])
    share = steps[greatest]
    notes = []
    if share > MOVES:
        many = sum(step > MOVES for step in steps.values())
        notes.append(
            f"at lr={lr:g} the first step of an Adam-like optimizer moves {many} of {len(steps)} weights by more than"
            f" {MOVES:.0%} of their size, {greatest} by {share:.2g} times: warm the rate up, or take a smaller one"
        )
    if share > APART * steps[least]:
        notes.append(
            f"a step of an Adam-like optimizer moves {greatest} by {share:.2g} of its size, {least} by only"
            f" {steps[least]:.2g}: no learning rate suits both; give them rates of their own by parameter groups"
        )
    return replace(report, notes=(*report.notes, *notes))
