"""What the graph of a loss tells beyond the modules: leaves that no model holds, and logits that are probabilities."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.autograd.graph import Node

from lightning_gradhealth.signals.kinds import shown_name
from lightning_gradhealth.signals.paths import VIEWS

_LEAF = "torch::autograd::AccumulateGrad"
_SHAPES = {*VIEWS, "T", "Unsqueeze", "Squeeze", "Slice", "Select", "Index", "Alias", "Add", "Cat"}
_SQUASHING = {"Softmax": "softmax", "SafeSoftmax": "softmax", "Sigmoid": "sigmoid"}
_LOSSES = {"LogSoftmax": "cross entropy", "BinaryCrossEntropyWithLogits": "binary cross entropy with logits"}


@dataclass(frozen=True)
class Leaf:
    """A tensor that wants a gradient, where the graph begins.

    Attributes:
        tensor: It.
        operation: What reads it, as "Addmm".
        reader: The nearest measured module behind it; "" where only the loss is.
    """

    tensor: Tensor
    operation: str
    reader: str


@dataclass
class Ending:
    """What the graph of the losses of one step has shown.

    Attributes:
        leaves: By identity.
        squashed: The first loss whose logits are what a softmax or a sigmoid gives: `activation`, `loss`, `layer` (the
            measured module before it), `classes` and `floor`, below which that loss cannot fall; empty: none.
    """

    leaves: dict[int, Leaf] = field(default_factory=dict)
    squashed: dict[str, Any] = field(default_factory=dict)

    def look(self, ends: Iterable[Tensor], names: dict[Node, str]) -> None:
        """Walk through the graph once; nothing of it is computed or kept, but its leaves.

        Args:
            ends: A loss, or what else the backward pass starts from.
            names: The measured points, and the modules that they belong to.

        Example:
            >>> import torch
            >>> weight, ending = torch.ones(2, requires_grad=True), Ending()
            >>> shares = (weight * torch.ones(3, 2)).softmax(-1)
            >>> ending.look([torch.nn.functional.cross_entropy(shares, torch.ones(3).long())], {})
            >>> round(ending.squashed["floor"], 4), [leaf.operation for leaf in ending.leaves.values()]
            (0.3133, ['Mul'])
        """
        open_: list[tuple[Node, str, str]] = [(end.grad_fn, "", "") for end in ends if end.grad_fn is not None]
        seen: set[Node] = set()
        while open_:
            node, operation, reader = open_.pop()
            if node in seen:
                continue
            seen.add(node)
            if node.name() == _LEAF:
                tensor: Tensor = node.variable  # type: ignore[attr-defined]
                self.leaves.setdefault(id(tensor), Leaf(tensor, operation, reader))
                continue
            name = shown_name(node)
            if name in _LOSSES and not self.squashed:
                self.squashed = _squashed(node, name, names)
            reader = names.get(node, reader)
            operation = operation if name in _SHAPES and operation else name
            open_ += [(before, operation, reader) for before, _ in node.next_functions if before is not None]


def _squashed(loss: Node, name: str, names: dict[Node, str]) -> dict[str, Any]:
    """What squashes the logits of a loss; empty where nothing does."""
    for node in _straight(loss):
        activation = _SQUASHING.get(shown_name(node))
        if activation is not None:
            layer = next((names[before] for before in _straight(node, through_all=True) if before in names), "")
            classes = _classes(loss) if name == "LogSoftmax" else 1
            # all but the true logit at 0, that at 1; with a sigmoid before its own, a target of 1 at logit 1
            floor = math.log(math.e + classes - 1) - 1 if classes > 1 else math.log1p(math.exp(-1))
            found = {"activation": activation, "loss": _LOSSES[name], "layer": layer}
            return {**found, "classes": classes, "floor": floor}
        if shown_name(node) not in _SHAPES:
            break
    return {}


def _straight(node: Node, *, through_all: bool = False) -> Iterator[Node]:
    """The nodes before one, as long as there is only one; the first of several with `through_all`."""
    current: Node | None = node
    while current is not None:
        before = [other for other, _ in current.next_functions if other is not None]
        if not before or (len(before) > 1 and not through_all):
            return
        current = before[0]
        yield current


def _classes(node: Any) -> int:
    """The size of the axis that a softmax adds up over."""
    shape = node._input_metadata[0].shape
    axis = int(node._saved_dim)
    axis -= 2**64 if axis >= 2**63 else 0  # torch shows a negative one as unsigned
    return int(shape[axis])
