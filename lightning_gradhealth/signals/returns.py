"""What comes back in the backward passes of a step, and which of these passes count."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from lightning_gradhealth import sharding
from lightning_gradhealth.messages import reason_of
from lightning_gradhealth.signals.sums import Sums

LEAF = "torch::autograd::AccumulateGrad"


class Returns:
    """What the hooks on the tensors of a step share: its sums, the leaves of its graph, and the first failure.

    A gradient counts if the backward pass that brings it accumulates into `.grad`. What `torch.autograd.grad` computes
    on the way, for a penalty, a saliency map or the balance of several losses, is no gradient of the loss.

    It holds no part of the graph but the leaves, so that the hooks keep nothing alive.

    Args:
        sums: Where gradients are added.

    Attributes:
        failure: Why a measure failed; nothing is measured in this step from then on.
        awaited: Number of tensors whose gradient is waited for.
        began: Called at the beginning of each backward pass that counts, before it has come to any parameter.

    Example:
        >>> returns, x = Returns(Sums()), torch.ones(2, requires_grad=True)
        >>> y = 3 * x
        >>> returns.expect(y, 0, [node for node, _ in y.grad_fn.next_functions if node])
        >>> _ = torch.autograd.grad(y.sum(), x, retain_graph=True)  # does not count
        >>> (2 * y).sum().backward()
        >>> len(returns.sums.returned), returns.sums.matrix(sites=1)[0, 3:].round().tolist()
        (1, [8.0, 2.0])
    """

    def __init__(self, sums: Sums) -> None:
        self.sums = sums
        self.failure = ""
        self.awaited = 0
        self.began: Callable[[], None] | None = None
        self._parameters: list[Node] = []
        self._others: list[Node] = []
        self._counts: dict[int, bool] = {}  # by backward pass
        self._all = False

    def expect(
        self,
        tensor: Tensor,
        site: int,
        leaves: Iterable[Node],
        norms: dict[int, Tensor] | None = None,
        call: int = 0,
    ) -> None:
        """Add the gradient of a tensor to the sums of a site as often as it comes.

        Args:
            tensor: It has a history.
            site: The number of the site.
            leaves: The leaves that it comes from and that are new.
            norms: Where the norm of the first gradient is kept, by the number of the call.
            call: That number.
        """
        self._take_leaves(leaves)
        tensor.register_hook(Backward(self, site, norms, call))  # type: ignore[no-untyped-call]

    def expect_at(self, node: Node, site: int, leaves: Iterable[Node]) -> None:
        """The same of what a node has given, of which there is no tensor any more."""
        self._take_leaves(leaves)
        add = Backward(self, site, None, 0)
        node.register_prehook(lambda gradients: None if gradients[0] is None else add(gradients[0]))

    def _take_leaves(self, leaves: Iterable[Node]) -> None:
        for leaf in leaves:
            is_parameter = isinstance(getattr(leaf, "variable", None), nn.Parameter)
            (self._parameters if is_parameter else self._others).append(leaf)
        self.awaited += 1

    def fail(self, error: Exception) -> None:
        """Measure nothing more in this step."""
        self.failure = self.failure or reason_of(error)

    @contextmanager
    def of_any_pass(self) -> Iterator[None]:
        """Let what `torch.autograd.grad` computes count for a while."""
        self._all = True
        try:
            yield
        finally:
            self._all = False

    def count(self) -> bool:
        """Whether the backward pass that runs accumulates into `.grad`."""
        task = torch._C._current_graph_task_id()
        if self._all or task == -1:
            return True
        if task not in self._counts:
            leaves = self._parameters or self._others
            # where no leaf is seen, as behind functions of the user's own, a graph is only kept by other passes
            self._counts[task] = any(map(_accumulates, leaves)) if leaves else not torch.is_grad_enabled()
            if self._counts[task] and self.began is not None:
                with torch.no_grad():
                    self.began()
        return self._counts[task]


def _accumulates(leaf: Node) -> bool:
    """Whether the backward pass that runs adds to the `.grad` of a leaf."""
    try:
        found: bool = torch._C._will_engine_execute_node(leaf)
    except RuntimeError:  # it is captured for `torch.autograd.grad`
        return False
    return found


class Backward:
    """The hook of a tensor: adds its gradient, and keeps its norm under the number of the call where that is asked."""

    def __init__(self, returns: Returns, number: int, norms: dict[int, Tensor] | None, call: int) -> None:
        self._returns = returns
        self._number = number
        self._norms = norms
        self._call = call

    def __call__(self, gradient: Any) -> None:
        """Add it; a failure must not reach the backward pass."""
        returns = self._returns
        if returns.failure:
            return
        try:
            if returns.count():
                self._add(gradient)
        except Exception as error:
            returns.fail(error)

    @torch.no_grad()
    def _add(self, gradient: Tensor) -> None:
        values = sharding.local(gradient.detach())
        if values.layout is not torch.strided:  # as large as the output that it belongs to
            values = values.to_dense()
        norm = self._returns.sums.backward(self._number, values)
        if self._norms is not None:
            self._norms.setdefault(self._call, norm)
