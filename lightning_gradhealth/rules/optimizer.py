"""Rules for what an optimizer is given: parameters that none has, gradients that nobody has cleared."""

from __future__ import annotations

import math

from lightning_gradhealth.records import Condition, Severity, StepRecord, StepStats, Unstepped
from lightning_gradhealth.rules.base import NOT_MEASURED, NotMeasured, Rule, Verdict, keep_last, stepped_by
from lightning_gradhealth.rules.course import (
    follow_loss,
    follow_updates,
    followed_losses,
    followed_updates,
    is_learning,
)

_ADD = (
    'known = {id(p) for g in optimizer.param_groups for p in g["params"]}; optimizer.add_param_group('
    '{"params": [p for p in model.parameters() if p.requires_grad and id(p) not in known]})'
)


class NotInOptimizer(Rule):
    """Parameters that get a gradient and that no optimizer steps.

    Beyond doubt it is a mistake where the optimizer steps parameters that the model no longer has, where the model
    has gained them since, or has had them frozen at first, and where the model keeps layers in a Python list, of which
    torch knows nothing. Otherwise it may be on purpose, as where a head alone is trained: an info. What changes
    nevertheless is stepped by somebody else.
    """

    condition = Condition.NOT_IN_OPTIMIZER

    def check(self, record: StepRecord) -> Verdict | NotMeasured | None:
        """Collect those that have not moved for long enough; the surest mistake counts."""
        if not record.unstepped:
            return None if record.probed else NOT_MEASURED
        seen: dict[str, list[float]] = self.memory.setdefault(
            "seen", {}
        )  # name -> norm, since when; one that moves: []
        still = []
        for entry in record.unstepped:
            known = seen.setdefault(entry.name, [entry.norm, record.step])
            if known and known[0] != entry.norm:
                seen[entry.name] = []
            elif known and record.step - known[1] >= self.thresholds.no_gradient_steps:
                still.append(entry)
        by_kind = {kind: [entry for entry in still if entry.kind == kind] for kind in (*_TEXTS, "replaced")}
        if not any(by_kind[kind] for kind in _TEXTS):
            return None
        if by_kind["listed"]:
            return self._verdict(by_kind["listed"], "listed", [], seen)
        left_out = by_kind["held"] + by_kind["thawed"] + by_kind["gained"]
        if left_out and by_kind["replaced"]:
            return self._verdict(left_out, "replaced", by_kind["replaced"], seen)
        kind = next(kind for kind in ("gained", "thawed", "held", "outside") if by_kind[kind])
        return self._verdict(by_kind[kind], kind, [], seen)

    def _verdict(
        self, entries: list[Unstepped], kind: str, replaced: list[Unstepped], seen: dict[str, list[float]]
    ) -> Verdict:
        severity, what, remedy = _TEXTS[kind]
        names = [entry.name for entry in entries]
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        gone = ", ".join(entry.name for entry in replaced[:3])
        fixes = dict.fromkeys(entry.fix for entry in entries if entry.fix)
        code = "; ".join([*fixes, _ADD]) if severity is Severity.WARNING and (fixes or kind != "listed") else ""
        return Verdict(
            severity=severity,
            summary=what.format(shown=shown, count=len(names), gone=gone),
            remedy=remedy,
            layers=tuple(dict.fromkeys(entry.layer for entry in entries if entry.layer)),
            evidence={"parameters": names, "replaced": [entry.name for entry in replaced]},
            first_step=int(min(seen[name][1] for name in names)),
            code=code,
        )


_TEXTS = {
    "listed": (
        Severity.WARNING,
        "{count} parameters get a gradient but belong neither to the model nor to an optimizer, and stay as they began:"
        " {shown}, of modules that are kept in a Python list or another plain object, not as modules of the model",
        "keep them in an nn.ModuleList (nn.ModuleDict for a dict, nn.ParameterList for parameters), so that"
        " model.parameters() holds them, and make the optimizer after that",
    ),
    "replaced": (
        Severity.WARNING,
        "{count} parameters of the model get a gradient but no optimizer steps them ({shown}), while the optimizer"
        " holds parameters that the model does not have ({gone}): they were replaced after the optimizer was made",
        "make the optimizer after the last change of the model, or give it the new parameters by"
        " optimizer.add_param_group",
    ),
    "gained": (
        Severity.WARNING,
        "{count} parameters of the model get a gradient but no optimizer steps them ({shown}): they were made after the"
        " optimizer",
        "make these layers before the optimizer (in __init__, or by a forward pass first), or give them to it"
        " by optimizer.add_param_group",
    ),
    "thawed": (
        Severity.WARNING,
        "{count} parameters of the model were frozen at the start and get a gradient now, but no optimizer steps them:"
        " {shown}",
        "give them to the optimizer where they are unfrozen, by optimizer.add_param_group, or make it of all"
        " parameters: those that are frozen get no gradient, and are passed over",
    ),
    "held": (
        Severity.INFO,
        "{count} parameters of the model get a gradient but no optimizer steps them: {shown}",
        "if they are to stay as they are, parameter.requires_grad_(False) saves their gradients; else give them to the"
        " optimizer",
    ),
    "outside": (
        Severity.INFO,
        "{count} tensors want a gradient but belong neither to the model nor to an optimizer: {shown}",
        "if they are to stay as they are, requires_grad_(False) or torch.no_grad() saves their gradients; layers in a"
        " Python list belong in an nn.ModuleList",
    ),
}


class CarriedOver(Rule):
    """The gradient of one step is still in `.grad` at the next: `zero_grad` is forgotten, gradients add up for good."""

    condition = Condition.EXPLODING_GRADIENTS
    patience = 2

    def check(self, record: StepRecord) -> Verdict | NotMeasured | None:
        """Hold what was left before the backward pass against what the optimizer was given after it."""
        if record.carried is None:
            return NOT_MEASURED
        if record.carried < self.thresholds.carried_over:
            return None
        least = self.thresholds.carried_over
        guilty = {step.optimizer for step in record.window if step.carried is not None and step.carried >= least}
        return Verdict(
            severity=Severity.WARNING,
            layers=stepped_by(record, guilty) if guilty else (),
            summary=(
                "gradients accumulate over the steps: what the optimizer had been given is still in .grad when the next"
                f" backward pass begins, {100 * record.carried:.3g} % of the gradient that comes of it"
            ),
            remedy="optimizer.zero_grad() before the backward pass of every step; it seems to be missing",
            evidence={"carried_over": record.carried},
            code="optimizer.register_step_post_hook(lambda optimizer, *_: optimizer.zero_grad())",
        )


class ClippedScaled(Rule):
    """Gradients are clipped while they are still multiplied by the loss scale: next to nothing of them is left.

    What the optimizer is given has, the scale included, the same norm at every step then, to the rounding; no gradient
    is like that. Looked at after `unscale_`, gradients that were clipped in the right order have one norm, too: that of
    the limit. There it has to be a norm that nobody clips to on purpose, and the limit nearer to 1 with the scale.
    Clipped by value, all elements that are not 0 have one size: that of the limit, with the scale. Then the layers lie
    close together, at every step, and nothing moves or learns.
    """

    condition = Condition.STALLED_LAYERS

    def check(self, record: StepRecord) -> Verdict | NotMeasured | None:
        """Look at the norms of the last steps of each optimizer under a loss scaler, as observed and as applied."""
        follow_updates(self, record)
        follow_loss(self, record)
        steps = [step for step in record.window if step.loss_scale and not step.clipped]
        for step in steps:
            for what, norm in (("observed", step.total_norm), ("applied", step.applied_norm)):
                if norm is not None and step.loss_scale:
                    series = self.memory.setdefault(f"{what}{step.optimizer}", [])
                    keep_last(series, norm * step.loss_scale, self.thresholds.growth_window)
        answers = [self._judge_last(record, step) for step in {step.optimizer: step for step in steps}.values()]
        verdicts = [answer for answer in answers if isinstance(answer, Verdict)]
        if verdicts:
            return verdicts[0]
        return None if None in answers else NOT_MEASURED

    def _judge_last(self, record: StepRecord, step: StepStats) -> Verdict | NotMeasured | None:
        """The verdict on an optimizer, whose last step it is."""
        observed, applied = (self.memory.get(f"{what}{step.optimizer}", []) for what in ("observed", "applied"))
        enough = {"observed": self.thresholds.growth_window, "applied": self.thresholds.time_warmup}
        if len(observed) < enough["observed"] and len(applied) < enough["applied"]:
            return NOT_MEASURED
        scale = step.loss_scale or 1.0
        for norms, least, certain in (
            (observed, enough["observed"], step.unscaled is False),
            (applied, enough["applied"], False),
        ):
            if (
                len(norms) >= least
                and self._are_one(norms)
                and (certain or self._is_no_limit(norms[-1] / scale, scale))
            ):
                return self._verdict(record, step.optimizer, norms[-1], scale)
        if len(applied) >= enough["applied"] and self._is_one_value(record, step, applied, scale):
            return self._verdict(record, step.optimizer, applied[-1], scale)
        return None

    def _is_one_value(self, record: StepRecord, step: StepStats, norms: list[float], scale: float) -> bool:
        """Whether what the optimizer is given looks clipped by value with the scale, in a run that goes nowhere."""
        sizes = [
            layer.applied_norm * scale / math.sqrt(layer.numel)
            for layer in record.layers
            if layer.optimizer == step.optimizer and layer.applied_norm and layer.numel
        ]
        updates, (early, late) = followed_updates(self), followed_losses(self)
        fastest = 0.0 if updates is None else updates.largest
        unknown = bool(early) and len(late) < self.thresholds.growth_window
        if len(sizes) < 2 or (fastest >= self.thresholds.stalled_update and (unknown or is_learning(self))):
            return False
        moves = fastest >= self.thresholds.moving_update
        steady = max(norms) < self.thresholds.growth * min(norms)
        even = max(sizes) < self.thresholds.even_layers * min(sizes)
        return not moves and steady and even and max(sizes) <= self.thresholds.largest_value

    def _are_one(self, norms: list[float]) -> bool:
        return min(norms) > 0.0 and max(norms) / min(norms) - 1.0 <= self.thresholds.same_norm

    def _is_no_limit(self, norm: float, scale: float) -> bool:
        return norm < self.thresholds.least_limit and abs(math.log(norm * scale)) < abs(math.log(norm))

    def _verdict(self, record: StepRecord, optimizer: int, limit: float, scale: float) -> Verdict:
        updates = followed_updates(self)
        moves = updates is not None and updates.largest >= self.thresholds.moving_update  # Adam's steps have a size
        left = f"what is left of them is {limit / scale:.1e} at every step"
        return Verdict(
            severity=Severity.INFO if moves else Severity.WARNING,
            summary=(
                f"gradients are clipped to {limit:.3g} while still multiplied by the loss scale {scale:.6g}: {left}"
                + ("" if moves else ", and no layer moves as it should")
            ),
            remedy=(
                "scaler.unscale_(optimizer) before torch.nn.utils.clip_grad_norm_(...) or clip_grad_value_(...), or"
                " clip= of the session, which unscales first"
            ),
            layers=tuple(layer.name for layer in record.layers if layer.optimizer == optimizer),
            evidence={"norm_with_scale": limit, "loss_scale": scale, "norm": limit / scale},
        )
