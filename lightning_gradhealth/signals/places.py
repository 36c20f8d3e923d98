"""Where signals are measured: the sites of one optimizer step, while they are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from lightning_gradhealth.signals.ending import Ending
from lightning_gradhealth.signals.kinds import Kind
from lightning_gradhealth.signals.paths import Applied, Matrices, Paths, size_of
from lightning_gradhealth.signals.reading import UNITS, Activation, Site, Spec
from lightning_gradhealth.signals.returns import Returns
from lightning_gradhealth.signals.sums import Sums
from lightning_gradhealth.signals.units import UnitWindow

CALLS = 64  # calls of a shared module within one forward pass that are measured
GREATEST = 2_000  # sites beyond which no histograms are kept
NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_CHANNELS_FIRST = (_ConvNd, _NormBase, nn.GroupNorm)


class Watched(NamedTuple):
    """What the probe has to know of a module.

    Attributes:
        name: Its clean path, the class name for the model itself.
        measured: Its output is measured: it owns parameters, or is a norm.
        kind: The kind of activation that it is.
        leaf: It has no modules inside.
    """

    name: str
    measured: bool
    kind: Kind | None
    leaf: bool


class Place:
    """A site while it is being measured.

    Attributes:
        number: Its number, in order of first use.
        name: See `Site`.
        owner: See `Site`.
        module: The module that it belongs to.
        size: Elements of the tensor, of one pass.
        same: The site whose tensor it shares; -1 for one of its own.
        ndim: Dimensions of the tensor.
        axis: The axis of its channels or features.
    """

    def __init__(self, number: int, name: str, owner: str, module: nn.Module, values: Tensor, same: int = -1) -> None:
        self.number, self.name, self.owner, self.module, self.same = number, name, owner, module, same
        self.size = values.numel()
        self.ndim = values.ndim
        self.axis = -1
        if isinstance(module, _CHANNELS_FIRST) and self.ndim > 2:
            space = self.ndim - (len(module.kernel_size) + 1 if isinstance(module, _ConvNd) else self.ndim - 1)
            self.axis = space  # 1, or 0 where there is no batch
        elif self.ndim > 3 and any(p is not None and p.ndim == self.ndim for p in module._parameters.values()):
            self.axis = 1  # a convolution of the user's own

    @property
    def is_norm(self) -> bool:
        """Whether it is the output of a norm."""
        return isinstance(self.module, NORMS) and self.name == self.owner


class Step:
    """What has been measured since the last optimizer step.

    Attributes:
        sums: The sums over signals.
        returns: What the hooks on tensors share.
        paths: The graph that the signals take.
        places: The sites by name.
        numbered: The same in order of first use.
        latest: The last one that was met.
        calls: Calls of modules, and of activations, within the forward pass that runs.
        passes: Forward passes, by the module that was called.
        activations: The activations that were met.
        flows: The gradient through time of recurrent modules.
        unrolled: Norms of the gradients of what modules give, by module and by call.
        beside: The same of what they give besides, as the second state of an LSTM.
        repeated: Modules each of whose calls is fed by the last, as a recurrent cell, or a layer that a net uses again
            and again: their calls are an axis of time.
        given: What recurrent modules were given, where more of that is to be measured.
        ending: What the graphs of the losses show.
        outputs: What the modules have given that a loop has called.
        matrices: Those that modules apply by hand.
    """

    def __init__(self) -> None:
        self.sums = Sums()
        self.returns = Returns(self.sums)
        self.paths = Paths()
        self.places: dict[str, Place] = {}
        self.numbered: list[Place] = []
        self.calls: dict[str, int] = {}
        self.passes: dict[nn.Module, int] = {}
        self.latest: Place | None = None
        self.flows: dict[str, dict[str, Tensor]] = {}
        self.unrolled: dict[str, dict[int, Tensor]] = {}
        self.beside: dict[str, dict[int, Tensor]] = {}
        self.repeated: set[str] = set()
        self.given: dict[str, tuple[nn.RNNBase, Any, Any]] = {}
        self.activations: dict[str, Activation] = {}
        self.ending = Ending()
        self.outputs: list[Tensor] = []
        self.matrices = Matrices()

    def place(self, name: str, owner: str, module: nn.Module, values: Tensor, same: int = -1) -> Place:
        """The place of that name, a new one if there is none yet."""
        if name not in self.places:
            self.places[name] = Place(len(self.places), name, owner, module, values, same)
            self.numbered.append(self.places[name])
        return self.places[name]

    def look_for_matrices(self, ends: Iterable[Tensor], known: Mapping[int, Applied]) -> None:
        """Wait for the gradient of what matrices read that modules apply by hand, before the backward pass.

        Args:
            ends: What the graph leads to.
            known: The matrices, by identity.
        """
        for node, applied in self.matrices.look(ends, known):
            if node not in self.paths.points:
                size = torch.empty(size_of(node), device="meta")
                place = self.place(f"{applied.name} (input)", applied.owner, applied.module, size)
                self.matrices.points[node] = place.number
                self.returns.expect_at(node, place.number, self.paths.leaves(node))

    @property
    def is_blank(self) -> bool:
        """Whether no gradient has come back, although one could have: nobody called, or none went backward."""
        return not self.sums.returned and (self.returns.awaited > 0 or not self.places)

    def calls_back(self, shortest: int) -> dict[str, dict[str, Tensor]]:
        """The gradient on its way back over the calls of each module that was called so often, each fed by the last."""
        found = {}
        for name, norms in self.unrolled.items():
            if name in self.repeated and len(norms) >= shortest:
                calls = sorted(norms)
                whole = torch.stack([norms[call] for call in calls])
                others = self.beside.get(name, {})
                rest = [others.get(call, norms[call].new_zeros(())) for call in calls]
                found[name] = {"calls": torch.hypot(whole, torch.stack(rest).to(whole))}
        return found

    def parts(self, spec: Spec, scale: Tensor | None, windows: Mapping[str, UnitWindow]) -> list[Tensor]:
        """The sums of the sites, of the network's input, of the activations, the flags, and the histograms.

        Args:
            spec: What `spec` gave.
            scale: The factor by which the loss was scaled, shape (); None: by none.
            windows: The units of the activations.
        """
        count = len(spec.sites)
        matrix = self.sums.matrix(count, scale)
        norm, number = self.sums.input or (matrix.new_zeros(()), 0)
        shares = [windows[activation.name].take() for activation in spec.activations]
        units = [
            matrix.new_zeros(UNITS) if share is None else torch.cat([share.to(matrix), matrix.new_ones(1)])
            for share in shares
        ]
        entry = torch.stack([norm.to(matrix).square(), matrix.new_tensor(float(number))])
        table = torch.stack(units) if units else matrix.new_zeros(0, UNITS)
        tail = [self.sums.histograms(count)] if spec.histogram else []
        return [matrix, entry, table, self.sums.flags().unsqueeze(1), *tail]

    def spec(self) -> Spec:
        """What was measured, in order of first use."""
        before = self.paths.predecessors()
        places = list(self.places.values())
        sites = tuple(
            Site(place.name, place.owner, place.size, before.get(place.number, -1), place.same) for place in places
        )
        chain = self.paths.chain(self.sums.returned)
        # what a weight gives to a norm may have any size
        kept = [
            number
            for number, after in zip_longest(chain, chain[1:])
            if after is None or not places[after].is_norm or places[number].name != places[number].owner
        ]
        units = tuple(self.activations.values())
        crossed, readers = self.matrices.crossed(self.paths, self.sums.returned)
        names = [""] * len(crossed)
        for position, point in enumerate(crossed):
            applied = readers.get(point)
            # what a module gives at the end comes of its last matrix, which may have any size
            if applied and any(places[after].name != applied.owner for after in crossed[position + 1 :]):
                names[position] = applied.name
        return Spec(sites, units, tuple(kept), self.sums.flagged, len(sites) <= GREATEST, crossed, tuple(names))
