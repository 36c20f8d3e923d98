"""What happens between backward and the optimizer's step, where nobody looks: gradients changed, or gone already.

Both are known without reading anything: torch counts the changes of a tensor in place.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor
from torch.optim import Optimizer

from lightning_gradhealth.layers import Slot

_LOOKED_AT = 4  # gradients of an optimizer: what clips them clips all
_STEPS = 2  # weights that move between two steps of an optimizer that has no gradient are moved by somebody else


class Changed:
    """Tells whether gradients were changed in place after backward, as by `clip_gradients` in manual optimization.

    Example:
        >>> import torch
        >>> net = torch.nn.Linear(2, 1)
        >>> optimizer, changed = torch.optim.SGD(net.parameters(), lr=0.1), Changed()
        >>> net(torch.ones(1, 2)).sum().backward()
        >>> changed.after_backward([optimizer])
        >>> _ = torch.nn.utils.clip_grad_norm_(net.parameters(), 0.1)
        >>> changed.before_step(optimizer)
        True
    """

    def __init__(self) -> None:
        self._seen: list[tuple[Tensor, int]] = []

    def after_backward(self, optimizers: Iterable[Optimizer]) -> None:
        """Take down how often some gradients of each optimizer have been changed until now."""
        self._seen.clear()
        for optimizer in optimizers:
            found = 0
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    gradient = parameter.grad
                    if gradient is not None and found < _LOOKED_AT:
                        self._seen.append((gradient, gradient._version))
                        found += 1

    def before_step(self, optimizer: Optimizer) -> bool:
        """Whether gradients of this optimizer have been changed since the last `after_backward`."""
        if not self._seen:
            return False
        own = {id(parameter.grad) for group in optimizer.param_groups for parameter in group["params"]}
        mine = [gradient._version > version for gradient, version in self._seen if id(gradient) in own]
        self._seen = [(gradient, version) for gradient, version in self._seen if id(gradient) not in own]
        return any(mine)

    def forget(self) -> None:
        """Let go of the gradients."""
        self._seen.clear()


class Gone:
    """Finds parameters whose gradients are used up before the optimizer steps: one that steps in backward.

    Such a parameter has no gradient at the step, and a hook that runs once its gradient is there, while no other
    parameter with such a hook has one; or nothing that the optimizer steps has a gradient, and yet weights change.

    Attributes:
        slots: Number of each such parameter -> x value since when.
        news: Whether there are more of them than had been told; for the reader to reset.
    """

    def __init__(self) -> None:
        self.slots: dict[int, int] = {}
        self.news = False
        self._versions: dict[int, list[int]] = {}  # of the parameters of an optimizer that had no gradient at all
        self._moved: dict[int, int] = {}

    def look(self, number: int, step: int, missing: Sequence[tuple[int, Slot]], present: Sequence[Slot]) -> None:
        """Look at the parameters without gradient of an optimizer that is about to step.

        Args:
            number: The number of the optimizer.
            step: The loggers' x value.
            missing: Trainable parameters that have never had a gradient at a step, with their numbers.
            present: Parameters that have one now.
        """
        hooked = [index for index, slot in missing if _has_hook(slot)]
        gone = hooked if hooked and not any(map(_has_hook, present)) else []
        if not present and self._moves(number, missing):
            gone = [index for index, _ in missing]
        for index in gone:
            self.news |= index not in self.slots
            self.slots.setdefault(index, step)

    def _moves(self, number: int, missing: Sequence[tuple[int, Slot]]) -> bool:
        """Whether weights have changed between all the last steps, although nothing has a gradient at any."""
        now = [slot.parameter._version for _, slot in missing]
        before = self._versions.get(number)
        changed = before is not None and len(before) == len(now) and before != now
        self._versions[number] = now
        self._moved[number] = self._moved.get(number, 0) + 1 if changed else 0
        return self._moved[number] >= _STEPS


def _has_hook(slot: Slot) -> bool:
    return bool(getattr(slot.parameter, "_post_accumulate_grad_hooks", None))
