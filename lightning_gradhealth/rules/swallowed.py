"""A rule for one layer, or one matrix of a layer, that swallows the signal in the middle of a healthy network."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from lightning_gradhealth.flows import SignalChain
from lightning_gradhealth.ratios import median
from lightning_gradhealth.records import Condition, LayerStats, Severity, StepRecord
from lightning_gradhealth.rules.base import NOT_MEASURED, NotMeasured, Rule, Verdict
from lightning_gradhealth.rules.course import follow_loss, has_learned


class Hop(NamedTuple):
    """What becomes of the gradient at some weights.

    Attributes:
        layer: Their layer.
        name: What swallows: the layer, or one matrix of it.
        weight: The parameter.
        gain: What is left of the gradient before them.
        size: Their root mean square.
        usual: That of the others around.
    """

    layer: str
    name: str
    weight: str
    gain: float
    size: float
    usual: float


class SwallowedSignal(Rule):
    """One layer in the middle of the main chain lets next to nothing of the gradient through: its weights are tiny.

    The whole fall is one hop, so that it is no matter of depth. Weights that were zero and the last layer are left
    alone; what is so small and not zero is no matter of chance, so that one probe is enough. A norm
    behind the layer makes up for any size of its weights, in both directions. Matrices that a module applies by hand,
    as those of an `nn.ParameterList`, are judged one by one.
    """

    condition = Condition.VANISHING_GRADIENTS
    per_layer = True

    def check(self, record: StepRecord) -> Verdict | NotMeasured | None:
        """Look at every hop of the main chain, and at the weights that make it."""
        follow_loss(self, record)
        sizes = {layer.name: layer.matrix_rms for layer in record.layers if layer.matrix_rms is not None}
        by_hand = {matrix.name: matrix.rms for layer in record.layers for matrix in layer.matrices}
        judged = any(matrix.backward_gain is not None for layer in record.layers for matrix in layer.matrices)
        if not sizes or not (record.chains or judged):
            return NOT_MEASURED
        born = self.memory.setdefault("zero", [])  # they leave zero as they learn, at a pace of their own
        born += [name for name, size in {**sizes, **by_hand}.items() if size == 0.0 and name not in born]
        hops = [*(hop for chain in record.chains for hop in self._hops(chain, sizes)), *self._by_hand(record.layers)]
        hit = [hop for hop in hops if hop.name not in born and self._swallows(hop)]
        if not hit:
            return None
        worst = min(hit, key=lambda hop: hop.gain)
        return Verdict(
            severity=Severity.INFO if has_learned(self) else Severity.WARNING,
            summary=(
                f"{worst.name} alone swallows the signal: of the gradient at its output {worst.gain:.1e} is left before"
                f" it; its weights are of size {worst.size:.1e} (root mean square), those of the layers around it"
                f" {worst.usual:.1e}"
            ),
            remedy=(
                f"give {worst.name} weights of the size of its neighbours', {worst.usual:.2g}, near 1/sqrt(fan_in):"
                " gh.init_weights(model, x) does; or a normalisation right behind it"
            ),
            layers=tuple(dict.fromkeys(hop.layer for hop in hit)),
            evidence={
                "backward_hop": worst.gain,
                "weight_rms": worst.size,
                "neighbours_rms": worst.usual,
                "parameter": worst.weight,
            },
            code=(
                f'weight = model.get_parameter("{worst.weight}").data;'
                f" weight.mul_({worst.usual:.6g} / weight.square().mean().sqrt())"
            ),
        )

    def _swallows(self, hop: Hop) -> bool:
        limit = self.thresholds.swallowed_weights * hop.usual
        return 0.0 < hop.gain < self.thresholds.depth_ratio and 0.0 < hop.size < limit

    def _hops(self, chain: SignalChain, sizes: dict[str, float]) -> Iterator[Hop]:
        """What becomes of the gradient at each layer inside a chain."""
        points = [point for point in chain.points if point.backward_rms is not None]
        if len(points) < self.thresholds.depth_layers:
            return
        for before, point in zip(points, points[1:-1], strict=False):
            gain = (before.backward_rms or 0.0) / point.backward_rms if point.backward_rms else 0.0
            others = [sizes[other.layer] for other in points if other.layer in sizes and other.layer != point.layer]
            size = sizes.get(point.layer, 0.0)
            yield Hop(point.layer, point.layer, f"{point.layer}.weight", gain, size, median(others))

    def _by_hand(self, layers: tuple[LayerStats, ...]) -> Iterator[Hop]:
        """The same at each matrix that a layer applies by hand."""
        for layer in layers:
            for matrix in layer.matrices if len(layer.matrices) >= self.thresholds.depth_layers else ():
                others = [other.rms for other in layer.matrices if other is not matrix]
                if matrix.backward_gain is not None:
                    yield Hop(layer.name, matrix.name, matrix.name, matrix.backward_gain, matrix.rms, median(others))
