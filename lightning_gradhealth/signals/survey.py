"""The activations of a network: found in the graph of a forward pass, their units watched over successive probes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import Node

from lightning_gradhealth.signals.attention import ATTENTION, FUSED, openness_of
from lightning_gradhealth.signals.kinds import Kind, kind_of_node, shown_name
from lightning_gradhealth.signals.paths import MATRIX_PRODUCTS, PRODUCTS, VIEWS, Paths
from lightning_gradhealth.signals.places import CALLS, Place, Step
from lightning_gradhealth.signals.reading import Activation
from lightning_gradhealth.signals.units import UnitWindow


class Survey:
    """Watches the units of all activations.

    Attributes:
        windows: The units of each, until there are samples enough.

    Example:
        >>> Survey().wants_samples
        False
    """

    def __init__(self) -> None:
        self.windows: dict[str, UnitWindow] = {}

    @property
    def wants_samples(self) -> bool:
        """Whether there are activations whose units have never been judged."""
        return any(not window.judged for window in self.windows.values())

    def look(self, step: Step, outputs: Iterable[Tensor], *, is_activation: bool) -> None:
        """Look at the activations in the part of the graph that has come about.

        Args:
            step: What has been measured so far; its paths take in the new part.
            outputs: What the module has given that a loop has called.
            is_activation: That module is an activation itself, so that its end is not that of a network.
        """
        nodes = list(step.paths.extend(outputs))
        feeding = step.paths.feeding(nodes)
        for node in nodes:
            found = kind_of_node(node)
            if found is not None:
                kind, values = found
                is_end = node not in feeding and not is_activation
                before = _before(step, node)
                # probabilities at the end of a network are to be sharp, and gates may stay open
                if before is not None and (kind.is_rectifier or not (is_end or _is_gate(step.paths, node))):
                    self.add(step, kind, before, values)
            elif (place := _attention(step, node)) and (attention := openness_of(node)):
                self.add(step, ATTENTION, place, *attention)

    def add(self, step: Step, kind: Kind, place: Place, values: Tensor, axis: int | None = None) -> None:
        """Sum up the units of an activation that follows a place, or of an attention that leads to it.

        Args:
            step: What has been measured so far.
            kind: The activation.
            place: The place.
            values: What the activation gave.
            axis: The axis of the units; None: that of the place.
        """
        if axis is None:
            flat = values.ndim == 2 or place.ndim == 2  # features, or features that are seen as images from here on
            axis = place.axis if values.ndim == place.ndim else 1 if flat else -1
        key = f"{place.name}:{kind.name}"
        number = step.calls[key] = step.calls.get(key, 0) + 1
        if number > CALLS:
            return
        key = key if number == 1 else f"{key}:{number}"
        if key not in step.activations:
            step.activations[key] = Activation(key, place.owner, kind.name, kind.is_rectifier, values.shape[axis])
        self.windows.setdefault(key, UnitWindow(kind)).kind = kind
        self.windows[key].add(values, axis)

    def state_dict(self) -> dict[str, Any]:
        """Return the windows that are not full yet."""
        return {key: window.state_dict() for key, window in self.windows.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` returned."""
        for key, window in state.items():
            self.windows[key] = UnitWindow(ATTENTION)  # its true kind is set when it is met
            self.windows[key].load_state_dict(window)


def is_seen(module: nn.Module, output: Tensor) -> bool:
    """Whether the autograd graph will show an activation's output.

    Args:
        module: The activation.
        output: What it has given.

    Example:
        >>> is_seen(nn.ReLU(), nn.ReLU()(nn.Linear(1, 1).bias))
        True
    """
    if output.grad_fn is None or isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        return False
    return kind_of_node(output.grad_fn) is not None


def _before(step: Step, node: Node) -> Place | None:
    """The place whose signal an activation takes; its own, where a module computes both."""
    paths, places = step.paths, step.numbered
    number = paths.point_before(node)
    if number is not None and node in paths.points and places[number].name != places[number].owner:
        source = next(iter(paths.sources(node)), None)  # it is what a module reads: look before it
        number = None if source is None else paths.point_before(source)
    return None if number is None else places[number]


def _is_gate(paths: Paths, node: Node) -> bool:
    """Whether all that becomes of an activation is that it is multiplied with another signal."""
    followers = paths.follows(node, PRODUCTS, VIEWS)
    return bool(followers) and all(
        shown_name(after) in PRODUCTS and len(paths.sources(after)) > 1 for after in followers
    )


def _attention(step: Step, node: Node) -> Place | None:
    """The place that an attention leads to, if a node is one: fused, or a softmax that weighs other signals."""
    name, paths = shown_name(node), step.paths
    if name in ("Softmax", "SafeSoftmax"):
        followers = paths.follows(node, MATRIX_PRODUCTS, {*VIEWS, *PRODUCTS})
        if not any(shown_name(after) in MATRIX_PRODUCTS and len(paths.sources(after)) > 1 for after in followers):
            return None
    elif name not in FUSED:
        return None
    after = paths.point_after(node)
    return None if after is None else step.numbered[after]
