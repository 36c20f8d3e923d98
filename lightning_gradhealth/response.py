"""What is done about a step whose gradients are NaN or Inf: `on_non_finite`, and the search for the origin."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_gradhealth.errors import NonFiniteGradientError
from lightning_gradhealth.gradients import Decision
from lightning_gradhealth.isolation import RandomState
from lightning_gradhealth.layers import unwrap
from lightning_gradhealth.origin import find_origin
from lightning_gradhealth.records import StepRecord
from lightning_gradhealth.sharding import first_over_ranks

log = logging.getLogger("lightning_gradhealth")

OnNonFinite = Literal["warn", "skip", "raise", "stop"]

SEARCHED_STEPS = 1_000
_REMEDY = (
    "a smaller learning rate or a warm-up of it; look for log(0), division by 0, sqrt(0) and bad values in the batch of"
    " that step"
)


def check_on_non_finite(on_non_finite: OnNonFinite) -> OnNonFinite:
    """Return `on_non_finite` if it is one of the four.

    Raises:
        ValueError: It is not.

    Example:
        >>> check_on_non_finite("skip")
        'skip'
    """
    if on_non_finite not in get_args(OnNonFinite):
        raise ValueError(
            f'on_non_finite must be "warn", "skip", "raise" or "stop", got {on_non_finite!r}; leave it out for "warn"'
        )
    return on_non_finite


class Response:
    """Skips steps whose gradients are NaN or Inf, or ends the run, and says where they came from.

    A skipped step leaves parameters, moments, weight decay and step count of the optimizer untouched. Fused
    optimizers take the device's own flag; with others, and to raise or stop, one flag a step is read. Under a loss
    scaler, which skips by itself, nothing is done.

    Args:
        model: The model; under DDP or FSDP, the wrapper.
        mode: "warn" (nothing is done), "skip", "raise" or "stop".
        limit: So many steps skipped in a row end the run.

    Attributes:
        stop: Why the fit should end; empty while it should not.

    Example:
        >>> Response(nn.Linear(1, 1), "skip", 25).stop
        ''
    """

    def __init__(self, model: nn.Module, mode: OnNonFinite, limit: int) -> None:
        self.mode = check_on_non_finite(mode)
        self.limit = limit
        self.stop = ""
        self._model = model
        self._forwards: list[tuple[Callable[[], Any], RandomState]] = []
        self._stepped = False
        self._in_a_row: dict[int, int] = {}
        self._read: set[tuple[int, int]] = set()  # optimizer and step, since the last review
        self._searching = False
        self._search = 0  # steps for which a flag that could stay on the device is read, to catch the next one
        self._fused: dict[int, Optimizer] = {}
        self._hooks: list[Any] = []

    # --- what can be run again ---

    def remember(self, rerun: Callable[[], Any]) -> None:
        """Keep a forward pass that is about to run, until the optimizer has stepped.

        Args:
            rerun: Runs it again, and returns the loss if there is one.
        """
        if self.mode == "warn":
            return
        if self._stepped:
            self._forwards.clear()
            self._stepped = False
        self._forwards.append((rerun, RandomState.now()))

    def remember_calls(self) -> None:
        """From now on, keep the arguments of each call of the model in training, for loops without a Trainer."""
        if self.mode == "warn":
            return
        inner = unwrap(self._model)

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if module.training and not self._searching:
                self.remember(lambda: inner(*args, **kwargs))

        self._hooks.append(inner.register_forward_pre_hook(before, with_kwargs=True))

    def _find_origin(self, sharded: bool) -> str:
        """Run the forwards of this step again, on every rank, and say in words where it began."""
        self._searching, found = True, ""
        for rerun, random in self._forwards:
            origin = find_origin(self._model, rerun, backward=not sharded, random=random)
            found = found or (str(origin) if origin.phase else "")
        self._searching = False
        return first_over_ranks(found)

    # --- every step ---

    def judge(self, decision: Decision) -> None:
        """Mark a decision as one to skip, on the device."""
        if self.mode != "warn" and not decision.row.scaled and len(decision.norms):
            decision.skip = ~decision.total_norm.isfinite()

    def carry_out(self, decision: Decision, *, sharded: bool) -> bool:
        """Do what is to be done; True where the step is known to be skipped.

        Raises:
            NonFiniteGradientError: The mode is "raise", or too many steps were skipped in a row.
        """
        self._stepped = True
        if decision.skip is None:
            return False
        row, optimizer = decision.row, decision.optimizer
        if self.mode == "skip" and self._search == 0 and getattr(optimizer, "_step_supports_amp_scaling", False):
            row.skip = decision.skip
            self._flag(row.optimizer, optimizer, decision.skip)
            return False
        self._search = max(0, self._search - 1)
        row.skip = bool(decision.skip)
        self._read.add((row.optimizer, row.step))
        if not row.skip:
            self._in_a_row[row.optimizer] = 0
            return False
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None
        self._search = 0
        if not self._in_a_row.get(row.optimizer):
            row.origin = self._find_origin(sharded)
        what = f"gradients are NaN or Inf at step {row.step} ({row.origin or 'origin unknown'})"
        if self.mode == "raise":
            raise NonFiniteGradientError(f"{what}; the weights are those before that step. {_REMEDY.capitalize()}")
        if self.mode == "stop":
            self.stop = what
        self._count(row.optimizer, row.step)
        return True

    def _flag(self, number: int, optimizer: Optimizer, skip: Tensor) -> None:
        """Give a fused optimizer the flag by which a loss scaler would make it skip."""
        device = next(p.device for group in optimizer.param_groups for p in group["params"])
        optimizer.found_inf = skip.to(device, torch.float32)  # type: ignore[attr-defined]
        if number not in self._fused:
            self._fused[number] = optimizer
            self._hooks.append(optimizer.register_step_post_hook(_forget_flag))

    def _count(self, number: int, step: int) -> None:
        self._in_a_row[number] = self._in_a_row.get(number, 0) + 1
        if self._in_a_row[number] >= self.limit:
            raise NonFiniteGradientError(
                f"gradients were NaN or Inf in {self.limit} steps in a row, all skipped, the last at step {step}: the run"
                f" does not recover. {_REMEDY.capitalize()}; Thresholds(skipped_in_a_row=...) sets this limit"
            )

    def review(self, records: Iterable[StepRecord]) -> None:
        """After a flush, take in the steps that fused optimizers have skipped unread.

        Raises:
            NonFiniteGradientError: Too many steps were skipped in a row.
        """
        for record in records:
            for step in record.window:
                if step.optimizer not in self._fused or (step.optimizer, step.step) in self._read:
                    continue
                if not step.skipped:
                    self._in_a_row[step.optimizer] = 0
                else:
                    self._search = SEARCHED_STEPS
                    self._count(step.optimizer, step.step)
        self._read.clear()

    def close(self) -> None:
        """Remove every hook; calling it twice does no harm."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._fused.clear()
        self._forwards.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return the state as primitives."""
        return {"in_a_row": dict(self._in_a_row), "search": self._search}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` returned."""
        self._in_a_row, self._search = dict(state["in_a_row"]), state["search"]


def _forget_flag(optimizer: Optimizer, *_: Any) -> None:
    vars(optimizer).pop("found_inf", None)
