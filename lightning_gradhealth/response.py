"""What is done about a step whose gradients are NaN or Inf: `on_non_finite`, and the search for the origin."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable
from inspect import signature
from typing import Any, Literal, get_args
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer
from torch.utils._pytree import tree_map

from lightning_gradhealth.errors import GradHealthError, NonFiniteGradientError
from lightning_gradhealth.gradients import Decision
from lightning_gradhealth.gradients.flags import without_effect
from lightning_gradhealth.gradients.optimizers import takes_hooks
from lightning_gradhealth.gradients.rows import Row
from lightning_gradhealth.isolation import RandomState, undisturbed
from lightning_gradhealth.layers import unwrap
from lightning_gradhealth.origin import Origin, find_origin
from lightning_gradhealth.records import StepStats
from lightning_gradhealth.sharding import first_over_ranks, reshard
from lightning_gradhealth.trees import KeptBatch
from lightning_gradhealth.validation import check_choice

OnNonFinite = Literal["warn", "skip", "raise", "stop"]

SEARCHED_STEPS = 1_000
KEPT_FORWARDS = 256
_REMEDY = (
    "look for log(0), division by 0, sqrt(0) and bad values in the batch of that step; a smaller learning rate or a"
    " warm-up of it, and clipping by norm, if the gradient norms had grown before"
)


def check_on_non_finite(on_non_finite: OnNonFinite) -> OnNonFinite:
    """Return `on_non_finite` if it is one of the four.

    Raises:
        ValueError: It is another word.
        TypeError: It is no word.

    Example:
        >>> check_on_non_finite("skip")
        'skip'
    """
    found: OnNonFinite = check_choice("on_non_finite", on_non_finite, get_args(OnNonFinite), 'leave it out for "warn"')
    return found


class Response:
    """Skips steps whose gradients are NaN or Inf, or ends the run, and says where they came from.

    A skipped step leaves parameters, moments, weight decay and step count of the optimizer untouched. Fused
    optimizers take the device's own flag; with others, and to raise or stop, one flag a step is read. Under a loss
    scaler, which skips by itself, nothing is done, but after `limit` such steps in a row "raise" and "stop" act.

    Args:
        model: The model; under DDP or FSDP, the wrapper.
        mode: "warn" (nothing is done), "skip", "raise" or "stop".
        limit: So many steps skipped in a row end the run.

    Attributes:
        stop: Why the fit should end; empty while it should not.
        no_rerun: Why forward passes cannot be run again, where they cannot.

    Example:
        >>> Response(nn.Linear(1, 1), "skip", 25).stop
        ''
    """

    def __init__(self, model: nn.Module, mode: OnNonFinite, limit: int) -> None:
        self.mode = check_on_non_finite(mode)
        self.limit = limit
        self.stop = ""
        self.no_rerun = ""
        self._model = model
        self._forwards: deque[tuple[Callable[[], Any], RandomState, KeptBatch | None]] = deque(maxlen=KEPT_FORWARDS)
        self._stepped = False
        self._in_a_row: dict[int, int] = {}
        self._searched: set[int] = set()  # optimizers whose last healthy step came before the last search
        self._searching = False
        self._search = 0  # steps for which a flag that could stay on the device is read, to catch the next one
        self._fused: WeakKeyDictionary[Optimizer, bool] = WeakKeyDictionary()
        self._flags: WeakKeyDictionary[Optimizer, Tensor] = WeakKeyDictionary()
        self._hooks: WeakKeyDictionary[Optimizer | nn.Module, Any] = WeakKeyDictionary()

    # --- what can be run again ---

    def remember(self, rerun: Callable[[], Any], batch: KeptBatch | None = None) -> None:
        """Keep a forward pass that is about to run, until the optimizer has stepped.

        Args:
            rerun: Runs it again, and returns the loss if there is one.
            batch: What it is given.
        """
        if self.mode == "warn" or self._searching:
            return
        if self._stepped:
            self._forwards.clear()
            self._stepped = False
        self._forwards.append((rerun, RandomState.now(), batch))

    def remember_calls(self) -> None:
        """From now on, keep the arguments of each call of the model in training, for loops without a Trainer."""
        inner = unwrap(self._model)
        # module.compile() would make the hook a part of the compiled code
        if self.mode != "warn" and getattr(inner, "_compiled_call_impl", None) is None:
            hook = nn.Module.register_forward_pre_hook(inner, _Remembers(self), with_kwargs=True)
            self._hooks[inner] = hook

    def forget(self) -> None:
        """Let go of the forward passes of a step that is done."""
        if self._stepped:
            self._forwards.clear()

    def _find_origin(self, sharded: bool) -> tuple[str, str]:
        """Run the forwards of this step again, on every rank: in words where it began, or else why nobody knows.

        Ranks do alike, for a forward or a backward pass may talk to the others: only where all forwards were finite
        on all ranks are the gradients followed back.
        """
        found, unknown = "", self.no_rerun or "no forward pass of this step was kept"
        self._searching = True
        try:
            for backward in (False,) if sharded else (False, True):
                for rerun, random, batch in self._forwards:
                    origin = self._search_again(rerun, random, backward, batch)
                    found = found or (str(origin) if origin.phase else "")
                    unknown = origin.reason or "the rerun was finite"
                    if batch is not None and batch.changed:
                        unknown += "; the batch was written to in place, so that it cannot be run as it was"
                found = first_over_ranks(found)
                if found:
                    break
        finally:
            self._searching = False
        return found, "" if found else unknown

    def _search_again(
        self, rerun: Callable[[], Any], random: RandomState, backward: bool, batch: KeptBatch | None
    ) -> Origin:
        """Find the origin in one forward pass, which does run on this rank whatever is found before it."""
        ran = False

        def run() -> Any:
            nonlocal ran
            ran = True
            try:
                return rerun()
            finally:
                reshard(self._model)

        given = None if batch is None else batch.fresh()
        origin = find_origin(self._model, run, backward=backward, random=random, batch=given)
        if not ran:  # the weights were to blame; but other ranks may have sound parts of them, and wait for this one
            with contextlib.suppress(Exception), undisturbed(unwrap(self._model), silent=True, weights=True):
                run()
        return origin

    # --- every step ---

    def judge(self, decision: Decision) -> None:
        """Mark a decision as one to skip, on the device."""
        if self.mode == "skip" and isinstance(decision.optimizer, LBFGS):
            raise GradHealthError(
                'on_non_finite="skip" cannot be kept with LBFGS, which moves the weights between its gradients; use'
                ' "raise" or "stop"'
            )
        if self.mode != "warn" and not decision.row.scaled and len(decision.norms):
            decision.skip = ~decision.total_norm.isfinite()
            if decision.row.cut is not None:
                decision.row.cut = without_effect(decision.row.cut, decision.skip)

    def carry_out(self, decision: Decision, *, sharded: bool) -> bool:
        """Do what is to be done; True where the step is known to be skipped.

        Raises:
            NonFiniteGradientError: The mode is "raise", or too many steps were skipped in a row.
        """
        self._stepped = True
        if decision.skip is None:
            return False
        row, optimizer = decision.row, decision.optimizer
        if self.mode == "skip" and self._search == 0 and self._takes_flag(optimizer):
            row.skip = decision.skip
            self._flag(optimizer, decision.skip)
            return False
        self._search = max(0, self._search - 1)
        row.skip = bool(decision.skip)
        if not row.skip:
            self._recovered(row.optimizer)
            return False
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None
        if row.optimizer not in self._searched:
            self._search = 0
            self._searched.add(row.optimizer)
            row.origin, row.origin_unknown = self._find_origin(sharded)
        unknown = f"origin unknown: {row.origin_unknown}" if row.origin_unknown else "origin unknown"
        what = f"gradients are NaN or Inf at step {row.step} ({row.origin or unknown})"
        if self.mode == "raise":
            raise NonFiniteGradientError(f"{what}; the weights are those before that step. Remedy: {_REMEDY}")
        if self.mode == "stop":
            self.stop = f"{what}; the weights are those before that step. Remedy: {_REMEDY}"
        self._count(row.optimizer, row.step)
        return True

    def _takes_flag(self, optimizer: Optimizer) -> bool:
        """Whether the optimizer can be made to skip by a flag on the device, as torch's fused ones can."""
        if not takes_hooks(optimizer):  # nor could the flag be taken back
            return False
        if optimizer not in self._fused:  # those that take the scaler itself look for no flag
            fused = getattr(optimizer, "_step_supports_amp_scaling", False)
            self._fused[optimizer] = fused and "grad_scaler" not in signature(optimizer.step).parameters
        return self._fused[optimizer] and not _starts_momentum(optimizer)

    def _flag(self, optimizer: Optimizer, skip: Tensor) -> None:
        """Give a fused optimizer the flag by which a loss scaler would make it skip."""
        device = next(p.device for group in optimizer.param_groups for p in group["params"])
        flag = skip.to(device, torch.float32)
        optimizer.found_inf = flag  # type: ignore[attr-defined]
        self._flags[optimizer] = flag
        if optimizer not in self._hooks:
            self._hooks[optimizer] = optimizer.register_step_post_hook(self._forget_flag)

    def _forget_flag(self, optimizer: Optimizer, *_: Any) -> None:
        """Take the flag back, unless a loss scaler has put its own in its place."""
        flag = self._flags.pop(optimizer, None)
        if flag is not None and vars(optimizer).get("found_inf") is flag:
            del optimizer.found_inf  # type: ignore[attr-defined]

    def _recovered(self, number: int) -> None:
        self._in_a_row[number] = 0
        self._searched.discard(number)

    def _count(self, number: int, step: int) -> None:
        self._in_a_row[number] = self._in_a_row.get(number, 0) + 1
        if self._in_a_row[number] >= self.limit:
            raise NonFiniteGradientError(
                f"gradients were NaN or Inf in {self.limit} steps in a row, all skipped, the last at step {step}: the"
                f" run does not recover. Remedy: {_REMEDY}; Thresholds(skipped_in_a_row=...) sets this limit"
            )

    def review(self, steps: Iterable[tuple[Row, StepStats]]) -> None:
        """After a flush, take in the steps that fused optimizers may have skipped unread.

        Args:
            steps: Every row that was read, and what was in it.

        Raises:
            NonFiniteGradientError: Too many steps were skipped in a row.
        """
        for row, step in steps:
            if row.scaled and self.mode in ("raise", "stop"):
                self._review_scaled(row, bad=step.overflow or step.non_finite)
            if not isinstance(row.skip, Tensor):
                continue
            if not step.skipped:
                self._recovered(row.optimizer)
                continue
            if row.optimizer not in self._searched:
                self._search = SEARCHED_STEPS
            self._count(row.optimizer, row.step)

    def _review_scaled(self, row: Row, *, bad: bool) -> None:
        """Under a loss scaler single overflows are everyday business; a run of them is not."""
        self._in_a_row[row.optimizer] = self._in_a_row.get(row.optimizer, 0) + 1 if bad else 0
        if self._in_a_row[row.optimizer] >= self.limit:
            what = (
                f"the loss scaler has skipped {self.limit} steps in a row for NaN or Inf, the last at step {row.step}"
            )
            if self.mode == "raise":
                raise NonFiniteGradientError(f"{what}. Remedy: {_REMEDY}")
            self.stop = f"{what}. Remedy: {_REMEDY}"

    def close(self) -> None:
        """Remove every hook and flag; calling it twice does no harm."""
        for hook in self._hooks.values():
            hook.remove()
        self._hooks.clear()
        for optimizer in list(self._flags):
            self._forget_flag(optimizer)
        self._forwards.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return the state as primitives."""
        return {"in_a_row": dict(self._in_a_row), "search": self._search, "searched": sorted(self._searched)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` returned."""
        self._in_a_row, self._search = dict(state["in_a_row"]), state["search"]
        self._searched = set(state["searched"])


class _Remembers:
    """The hook of `remember_calls`; a class that leaves the session behind, so that its model can be copied."""

    _response: Response | None = None

    def __init__(self, response: Response) -> None:
        self._response = response

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._response is None or not module.training or not torch.is_grad_enabled():
            return
        kept = KeptBatch(tree_map(_without_graph, (args, kwargs)))
        kind = next((parameter.device.type for parameter in module.parameters()), "cpu")
        enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)

        def rerun() -> Any:
            given, named = kept.fresh()
            with torch.autocast(kind, dtype, enabled):
                return module(*given, **named)

        self._response.remember(rerun, kept)


def _without_graph(value: Any) -> Any:
    """An argument that another network has computed, without what it takes to go back into that."""
    if isinstance(value, Tensor) and value.grad_fn is not None:
        return value.detach().requires_grad_()
    return value


def _starts_momentum(optimizer: Optimizer) -> bool:
    """Whether a step of fused SGD would be the first: skipped, its kernel would leave the momentum uninitialised."""
    for group in optimizer.param_groups:
        moved = [parameter for parameter in group["params"] if parameter.grad is not None]
        if group.get("momentum") and moved:
            buffers = (optimizer.state.get(parameter, {}).get("momentum_buffer") for parameter in moved)
            if all(buffer is None for buffer in buffers):
                return True
    return False
