"""A rule for one layer that swallows the signal in the middle of a healthy network."""

from __future__ import annotations

from lightning_gradhealth.flows import SignalChain
from lightning_gradhealth.ratios import median
from lightning_gradhealth.records import Condition, Severity, StepRecord
from lightning_gradhealth.rules.base import NOT_MEASURED, NotMeasured, Rule, Verdict
from lightning_gradhealth.rules.course import follow_loss, has_learned


class SwallowedSignal(Rule):
    """One layer in the middle of the main chain lets next to nothing of the gradient through: its weights are tiny.

    The whole fall is one hop, so that it is no matter of depth. Weights that were zero and the last layer are left
    alone; what is so small and not zero is no matter of chance, so that one probe is enough. A norm
    behind the layer makes up for any size of its weights, in both directions.
    """

    condition = Condition.VANISHING_GRADIENTS
    per_layer = True

    def check(self, record: StepRecord) -> Verdict | NotMeasured | None:
        """Look at every hop of the main chain, and at the weights of the layer that makes it."""
        follow_loss(self, record)
        sizes = {layer.name: layer.matrix_rms for layer in record.layers if layer.matrix_rms is not None}
        if not sizes or not record.chains:
            return NOT_MEASURED
        born = self.memory.setdefault("zero", [])  # they leave zero as they learn, at a pace of their own
        born += [name for name, size in sizes.items() if size == 0.0 and name not in born]
        hops = (hop for chain in record.chains for hop in self._hops(chain, sizes))
        hit = {name: found for name, found in hops if name not in born}
        if not hit:
            return None
        name, (hop, size, usual) = min(hit.items(), key=lambda item: item[1][0])
        return Verdict(
            severity=Severity.INFO if has_learned(self) else Severity.WARNING,
            summary=(
                f"{name} alone swallows the signal: of the gradient at its output {hop:.1e} is left before it;"
                f" its weights are of size {size:.1e} (root mean square), those of the layers around it {usual:.1e}"
            ),
            remedy=(
                f"give {name} weights of the size of its neighbours', {usual:.2g}, near 1/sqrt(fan_in):"
                " gh.init_weights(model, x) does; or a normalisation right behind it"
            ),
            layers=tuple(hit),
            evidence={"backward_hop": hop, "weight_rms": size, "neighbours_rms": usual},
            code=(
                f'weight = model.get_parameter("{name}.weight").data;'
                f" weight.mul_({usual:.6g} / weight.square().mean().sqrt())"
            ),
        )

    def _hops(self, chain: SignalChain, sizes: dict[str, float]) -> list[tuple[str, tuple[float, float, float]]]:
        """The layers inside a chain behind which the gradient falls at once, with the size of their weights."""
        points = [point for point in chain.points if point.backward_rms is not None]
        if len(points) < self.thresholds.depth_layers:
            return []
        found = []
        for before, point in zip(points, points[1:-1], strict=False):
            hop = (before.backward_rms or 0.0) / point.backward_rms if point.backward_rms else 0.0
            size = sizes.get(point.layer, 0.0)
            usual = median(
                [sizes[other.layer] for other in points if other.layer in sizes and other.layer != point.layer]
            )
            if 0.0 < hop < self.thresholds.depth_ratio and 0.0 < size < self.thresholds.swallowed_weights * usual:
                found.append((point.layer, (hop, size, usual)))
        return found
