"""Parameters that get a gradient and that no optimizer steps: left out, replaced, made too late, or listed."""

from __future__ import annotations

import types
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_gradhealth.layers import Layout, clean_name
from lightning_gradhealth.norms import norms
from lightning_gradhealth.sharding import local

DEPTH = 6  # containers inside each other that are looked into
LOOKED_AT = 20_000  # objects, at most
_OTHERS = ("torch.", "lightning.", "pytorch_lightning.", "lightning_gradhealth.", "lightning_fabric.")


@dataclass(frozen=True)
class Holder:
    """Where a tensor is kept that belongs to no module's parameters.

    Attributes:
        name: As "net.hidden[0].weight".
        owner: The module of the model that holds it in the end, by its clean path.
        attribute: The attribute of that module, where modules stand in a list or dict directly; else "".
        container: The type of that: "list", "dict" or "".
        trains: The module around it is in training mode; True where there is none.
    """

    name: str
    owner: str
    attribute: str
    container: str
    trains: bool


def find_holders(model: nn.Module, wanted: set[int]) -> dict[int, Holder]:
    """Look for tensors in what the modules of a model hold besides their parameters: lists, dicts, objects, closures.

    Args:
        model: The model.
        wanted: The tensors, by identity.

    Example:
        >>> class Net(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.hidden = [nn.Linear(2, 2)]
        >>> net = Net()
        >>> [holder.name for holder in find_holders(net, {id(net.hidden[0].bias)}).values()]
        ['hidden[0].bias']
    """
    found: dict[int, Holder] = {}
    known = set(map(id, model.modules()))
    seen: set[int] = set()
    for path, module in model.named_modules():
        owner = clean_name(f"{path}.").rstrip(".")
        for attribute, value in list(vars(module).items()):
            if attribute.startswith("_") and attribute in vars(_PLAIN):
                continue  # torch's own: parameters, buffers, children, hooks
            direct = type(value).__name__ if isinstance(value, (list, tuple, dict)) else ""
            start = f"{owner}.{attribute}" if owner else attribute
            for name, tensor, trains, depth in _tensors_in(value, start, known, seen):
                if id(tensor) in wanted and id(tensor) not in found:
                    container = {"tuple": "list"}.get(direct, direct) if depth == 1 else ""
                    found[id(tensor)] = Holder(name, owner, attribute if container else "", container, trains)
    return found


_PLAIN = nn.Module()


def _tensors_in(start: Any, name: str, known: set[int], seen: set[int]) -> Iterator[tuple[str, Tensor, bool, int]]:
    """Every tensor, its name, whether its module trains, and in how many containers that module is."""
    open_: list[tuple[Any, str, int]] = [(start, name, 0)]
    while open_ and len(seen) < LOOKED_AT:
        value, path, depth = open_.pop()
        if isinstance(value, Tensor):
            yield path, value, True, 0
            continue
        if id(value) in known or id(value) in seen or depth > DEPTH:
            continue
        seen.add(id(value))
        if isinstance(value, nn.Module):
            for inner, parameter in value.named_parameters():
                yield f"{path}.{inner}", parameter, value.training, depth
        else:
            open_ += [(part, f"{path}{step}", depth + 1) for step, part in _parts(value)]


def _parts(value: Any) -> list[tuple[str, Any]]:
    """What an object holds, with the words that lead there."""
    if isinstance(value, (list, tuple, set, frozenset)):
        return [(f"[{number}]", part) for number, part in enumerate(value)]
    if isinstance(value, dict):
        return [(f"[{key!r}]", part) for key, part in value.items()]
    if isinstance(value, types.FunctionType):
        cells = zip(value.__code__.co_freevars, value.__closure__ or (), strict=False)
        return [(f".{name}", cell.cell_contents) for name, cell in cells if _is_filled(cell)]
    if isinstance(value, types.MethodType):
        return [("", value.__self__)]
    if f"{type(value).__module__}.".startswith(_OTHERS):
        return []
    return [(f".{name}", part) for name, part in getattr(value, "__dict__", {}).items()]


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018  (it raises where the variable was never set)
    except ValueError:
        return False
    return True


@dataclass(frozen=True)
class Entry:
    """A parameter that is not stepped, or that is stepped in vain; see `records.Unstepped` for what it becomes."""

    name: str
    layer: str
    kind: str
    fix: str
    tensor: Tensor


class UnsteppedWatch:
    """Looks for parameters that get a gradient and that no optimizer steps.

    Args:
        layout: The slots of the model.

    Example:
        >>> net = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
        >>> watch = UnsteppedWatch(Layout(net))
        >>> net(torch.ones(1, 1)).sum().backward()
        >>> [entry.name for entry in watch.look([torch.optim.SGD(net[1].parameters())], (), set())]
        ['0.weight', '0.bias']
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self._first = len(layout.slots)  # what comes later was not there when the optimizers were made
        self._frozen = {number for number, slot in enumerate(layout.slots) if not slot.parameter.requires_grad}
        self._holders: dict[int, tuple[Tensor, Holder | None]] = {}  # the tensor is kept, so that its id stays its own

    def look(self, optimizers: Iterable[Optimizer], leaves: Sequence[Any], had_grad: set[int]) -> list[Entry]:
        """Look now: after the backward pass, before the gradients are cleared.

        Args:
            optimizers: All that are known.
            leaves: Those of the loss's graph (`signals.ending.Leaf`).
            had_grad: Slots that have had a gradient.
        """
        model, layout = self.layout.model, self.layout
        mine = {id(parameter) for parameter in model.parameters()}
        if not mine <= layout.slot_of.keys():
            layout.refresh()
        stepped = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
        entries = []
        for number, slot in enumerate(layout.slots):
            parameter, layer = slot.parameter, layout.names[slot.layer]
            if id(parameter) in stepped and id(parameter) not in mine and number not in had_grad:
                entries.append(Entry(slot.name, layer, "replaced", "", parameter))
            elif id(parameter) in mine - stepped and parameter.requires_grad and parameter.grad is not None:
                kind = "gained" if number >= self._first else "thawed" if number in self._frozen else "held"
                entries.append(Entry(slot.name, layer, kind, "", parameter))
        strangers = [leaf for leaf in leaves if id(leaf.tensor) not in mine | stepped]
        return entries + self._outside(strangers)

    def _outside(self, leaves: Sequence[Any]) -> list[Entry]:
        """Leaves of the graph that belong to neither the model nor an optimizer."""
        new = {id(leaf.tensor) for leaf in leaves} - self._holders.keys()
        found = find_holders(self.layout.model, new) if new else {}
        self._holders = {
            id(leaf.tensor): self._holders.get(id(leaf.tensor), (leaf.tensor, found.get(id(leaf.tensor))))
            for leaf in leaves
        }
        return [self._entry(leaf, self._holders[id(leaf.tensor)][1], place) for place, leaf in enumerate(leaves)]

    def _entry(self, leaf: Any, holder: Holder | None, place: int) -> Entry:
        if holder is None:
            shape = "x".join(map(str, leaf.tensor.shape)) or "scalar"
            where = f", read by {leaf.reader}" if leaf.reader else ""
            return Entry(f"leaf {place} ({shape}, {leaf.operation}{where})", "", "outside", "", leaf.tensor)
        fix = ""
        if holder.container:
            kept = f"model.{holder.owner}.{holder.attribute}" if holder.owner else f"model.{holder.attribute}"
            fix = f"{kept} = torch.nn.Module{holder.container.capitalize()}({kept})"
        return Entry(holder.name, holder.name.split("[")[0], "listed" if holder.trains else "outside", fix, leaf.tensor)


@torch.no_grad()
def sizes_of(entries: Sequence[Entry]) -> Tensor | None:
    """Norms of the parameters, by which one sees whether somebody else steps them; None where there is none."""
    return norms([local(entry.tensor.detach()) for entry in entries], exact=False) if entries else None
