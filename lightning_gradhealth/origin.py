"""Where a NaN or Inf comes from: one rerun of a batch, watched module by module.

Forward, each module's first output that is not finite is known when the module finishes. Backward, every node of
the autograd graph belongs to the innermost module that made it; the first node that turns finite gradients into
others is the fault. Flags stay on the device and are read together.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn.modules.batchnorm import _NormBase

from lightning_gradhealth import sharding
from lightning_gradhealth.isolation import RandomState, undisturbed
from lightning_gradhealth.layers import clean_name, is_compiled, unwrap
from lightning_gradhealth.messages import reason_of
from lightning_gradhealth.naming import name_of
from lightning_gradhealth.trees import tensors

SHOWN = 3
FINITE, MASKED, BAD = 0, 1, 2  # MASKED: nothing worse than -inf, as attention masks have on purpose


@dataclasses.dataclass(frozen=True)
class Origin:
    """The first place where something was not finite.

    Attributes:
        module: Clean name of the module, the class name for the root; "" where it is not known.
        kind: Its class name.
        phase: "input", "parameters", "forward", "loss", "backward"; "" where the fault was not reproduced.
        healthy: The last healthy modules before it, at most 3, latest last.
        operation: In the backward phase, the autograd operation, e.g. "Sqrt"; else "".
        reason: Where the origin is not known, why.

    Example:
        >>> print(Origin("net.3", "Log", "forward", ("net.1", "net.2")))
        the first output that is not finite is that of net.3 (Log); healthy before it: net.1, net.2
        >>> print(Origin("", "", "", ()))
        origin unknown: the rerun was finite
    """

    module: str
    kind: str
    phase: str
    healthy: tuple[str, ...]
    operation: str = ""
    reason: str = ""

    def __str__(self) -> str:
        name = f"{self.module} ({self.kind})" if self.kind not in ("", self.module) else self.module
        clause = {
            "input": f"the batch is not finite before {name} has done anything",
            "parameters": f"weights or buffers of {name} are not finite before the forward pass",
            "forward": f"the first output that is not finite is that of {name}",
            "loss": f"the loss of {name} is not finite, although the outputs of its modules are",
            "backward": f"the gradients turn non-finite in the backward pass of {name}",
        }.get(self.phase)
        if clause is None:
            return f"origin unknown: {self.reason or 'the rerun was finite'}"
        operation = f", at {self.operation}" if self.operation else ""
        return clause + operation + (f"; healthy before it: {', '.join(self.healthy)}" if self.healthy else "")


def find_origin(
    model: nn.Module,
    rerun: Callable[[], Any],
    *,
    backward: bool = True,
    random: RandomState | None = None,
    batch: Any = None,
) -> Origin:
    """Run a batch again and name the first module that makes a NaN or Inf; the model is left as it was, bit for bit.

    Args:
        model: Any module; DDP's wrapper is looked through, and should be by `rerun` too.
        rerun: Runs the forward pass, e.g. `training_step` on that batch, under the autocast that it needs; returns
            the loss (scaled, if an overflow of scaled gradients is looked for), a dict with it, or anything.
        backward: Whether to follow the gradients too, where the forward pass and the loss are finite. Never done
            for sharded parameters.
        random: The random state before that batch, so that dropout masks come again.
        batch: What `rerun` feeds in; it tells a bad batch from bad code before the first module.

    Example:
        >>> class Log(nn.Module):
        ...     def forward(self, x):
        ...         return x.log()
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), Log(), nn.Linear(2, 1))
        >>> _ = nn.init.constant_(net[0].bias, -100.0)
        >>> find_origin(net, lambda: net(torch.ones(4, 2)).sum())
        Origin(module='2', kind='Log', phase='forward', healthy=('0', '1'), operation='', reason='')
    """
    model = unwrap(model)
    try:
        with undisturbed(model, silent=True, weights=True):
            if random is not None:
                random.restore()
            return _Search(model, backward).run(rerun, batch)
    except Exception as error:  # a diagnosis must not end the run that it is made for
        return _unknown(f"the rerun failed: {reason_of(error)}")


@dataclasses.dataclass(eq=False)
class _Call:
    """One call of a module; numbers refer to flags."""

    name: str
    module: nn.Module
    parent: _Call | None
    before: int  # how many calls had finished when it began
    main: int  # its first argument
    rest: int  # the others, where masks are
    out: int = -1
    number: int = -1  # its place among the calls that have finished
    leaf: bool = True
    sources: frozenset[Node] = frozenset()  # the nodes that its arguments come from


class _Search:
    """One rerun under watch."""

    def __init__(self, model: nn.Module, backward: bool) -> None:
        self.model = model
        self.root = _kind(model)
        self.sharded = any(sharding.is_sharded(parameter) for parameter in model.parameters())
        self.backward = backward and not self.sharded
        self.flags = _Flags()
        self.stack: list[_Call] = []
        self.done: list[_Call] = []
        self.maker: dict[Node, _Call] = {}

    def run(self, rerun: Callable[[], Any], batch: Any) -> Origin:
        """Parameters first, then the forward pass, the loss, and the gradients."""
        weights = [(path, m, self.flags.add(m.parameters(recurse=False))) for path, m in self.model.named_modules()]
        tables = {m: self.flags.add(m.buffers(recurse=False)) for _, m, _ in weights}
        values = self.flags.read()
        for path, module, flag in weights:
            if values[flag] != FINITE:
                return self._origin(self._name(path), module, "parameters")
        with torch.inference_mode(False), torch.enable_grad():
            loss = self._watched(rerun)
            ends, enters = self.flags.add(tensors(loss)), self.flags.add(tensors(batch))
            values = self.flags.read()
            culprit = self._first_bad(values, finite_loss=loss is not None and values[ends] == FINITE)
            if culprit is not None:
                start = None if next(tensors(batch), None) is None else values[enters]
                stale = values[tables[culprit.module]] == BAD
                return self._explain(culprit, values, start, stale)
            if values[ends] != FINITE:
                # where compiled or scripted code hides all modules, nobody knows whether the loss is to blame
                phase = "input" if values[enters] == BAD else "loss" if self.done else "forward"
                return self._origin(self.root, self.model, phase, self._healthy(self.done, values))
            if self.backward and loss is not None and loss.requires_grad:
                return self._follow_back(loss)
        if self.sharded:
            return _unknown("the forward pass was finite; the backward pass of sharded parameters is not rerun")
        return _unknown()

    # --- forward ---

    def _watched(self, rerun: Callable[[], Any]) -> Tensor | None:
        """Run under hooks, and return the loss."""
        handles: list[Any] = []
        hidden: list[str] = []
        try:
            for path, module in self.model.named_modules():
                if any(not top or path.startswith(f"{top}.") for top in hidden):
                    continue  # inside compiled or scripted code hooks are ignored, or change the code
                if is_compiled(module) or isinstance(module, torch.jit.ScriptModule):
                    hidden.append(path)
                if getattr(module, "_compiler_ctx", None) is None:  # Lightning's way: its calls are compiled as well
                    self._attach(self._name(path), module, handles)
            result = rerun()
        finally:
            for handle in handles:
                handle.remove()  # before the backward pass: activation checkpointing runs modules once more there
        loss = result.get("loss") if isinstance(result, Mapping) else result
        return loss if isinstance(loss, Tensor) else None

    def _attach(self, name: str, module: nn.Module, handles: list[Any]) -> None:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            self._enter(name, module, args, kwargs)

        def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self._leave(module, output)

        compiled = getattr(module, "_compiled_call_impl", None)
        if compiled is not None:  # by module.compile(): hooks would be part of the compiled code

            def call(*args: Any, **kwargs: Any) -> Any:
                enter(module, args, kwargs)
                output = compiled(*args, **kwargs)
                leave(module, args, kwargs, output)
                return output

            module._compiled_call_impl = call  # `undisturbed` puts it back
            return
        # unbound, as scripted modules hide these methods
        handles.append(nn.Module.register_forward_pre_hook(module, enter, with_kwargs=True))
        handles.append(nn.Module.register_forward_hook(module, leave, with_kwargs=True))

    def _enter(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        parent = self.stack[-1] if self.stack else None
        if parent is not None:
            parent.leaf = False
        first, *others = [*args, *kwargs.values()] or [None]
        call = _Call(name, module, parent, len(self.done), self.flags.add(tensors(first)), 0)
        call.rest = self.flags.add(tensors(others))
        if self.backward:
            call.sources = frozenset(t.grad_fn for t in tensors([first, others]) if t.grad_fn is not None)
        self.stack.append(call)

    def _leave(self, module: nn.Module, output: Any) -> None:
        while self.stack and self.stack[-1].module is not module:
            self.stack.pop()  # left by an exception that the model caught
        if not self.stack:
            return
        call = self.stack.pop()
        call.out = self.flags.add(tensors(output))
        self.done.append(call)
        if self.backward:

            def outside(node: Node) -> bool:
                maker = self.maker.get(node)
                return node in call.sources or (maker is not None and maker.number < call.before)

            call.number = len(self.done) - 1
            for node in _walk(tensors(output), outside):
                self.maker.setdefault(node, call)  # children have claimed theirs: the rest is the module's own code
            call.sources = frozenset()

    def _first_bad(self, values: list[int], finite_loss: bool) -> _Call | None:
        """The first call with a bad output; -inf alone is a mask where what follows is finite."""
        outputs = [values[call.out] for call in self.done]
        for call, output, following in zip(self.done, outputs, [*outputs[1:], BAD], strict=False):
            harmless = finite_loss or following == FINITE
            if output == BAD or (output == MASKED and not harmless):
                return call
        return None

    def _explain(self, call: _Call, values: list[int], batch: int | None, stale: bool) -> Origin:
        """Say whether the call, the code around it, or the batch is to blame."""
        inner: _Call | None = None
        outer: _Call | None = call
        while outer is not None and (values[outer.main] != FINITE or values[outer.rest] == BAD):
            inner, outer = outer, outer.parent
        if inner is None:
            # statistics of batch normalisation are written in training, by this very batch, but not used
            phase = "parameters" if stale and not (isinstance(call.module, _NormBase) and call.module.training) else ""
            healthy = self._healthy(self.done[: self.done.index(call)], values)
            return self._origin(call.name, call.module, phase or "forward", healthy)
        healthy = self._healthy(self.done[: inner.before], values)
        if outer is not None:
            return self._origin(outer.name, outer.module, "forward", healthy)
        bad_batch = batch != FINITE if batch is not None else not inner.before or inner.module is self.model
        return self._origin(self.root, self.model, "input" if bad_batch else "forward", healthy)

    # --- backward ---

    def _follow_back(self, loss: Tensor) -> Origin:
        """Watch every node of the graph; the gradients of the leaves are returned, so that no `.grad` is touched."""
        steps: list[tuple[_Call | None, str, int]] = []

        def watch(node: Node) -> None:
            call, operation = self.maker.get(node), re.sub(r"Backward\d*$", "", node.name())
            node.register_hook(lambda *sides: steps.append((call, operation, self.flags.add(tensors(sides)))))

        leaves = []
        for node in _walk([loss], lambda _: False):
            if type(node).__name__ == "AccumulateGrad":
                leaves.append(node.variable)  # type: ignore[attr-defined]
            else:
                watch(node)
        self.maker.clear()
        try:
            gradients = torch.autograd.grad(loss, leaves, torch.ones_like(loss), allow_unused=True)
        except RuntimeError as error:  # e.g. reentrant activation checkpointing
            return _unknown(f"the forward pass was finite; the backward pass could not be run again: {error}")
        ends = [self.flags.add(tensors(gradient)) for gradient in gradients]
        del gradients
        values = self.flags.read()
        bad = [leaf for leaf, flag in zip(leaves, ends, strict=True) if values[flag] != FINITE]
        first = next((number for number, step in enumerate(steps) if values[step[-1]] != FINITE), None)
        if not bad:  # what a later operation has masked did no harm
            return _unknown()
        if first is None:  # each share of a gradient was finite, but not their sum
            for path, module in self.model.named_modules():
                if any(leaf is parameter for leaf in bad for parameter in module.parameters(recurse=False)):
                    return self._origin(self._name(path), module, "backward")
            return _unknown("the sum of finite gradients overflowed")
        call, operation, _ = steps[first]
        healthy = [call.name for call, *_ in steps[:first] if call is not None and call.leaf]
        name, module = (call.name, call.module) if call is not None else (self.root, self.model)
        return dataclasses.replace(self._origin(name, module, "backward", healthy), operation=operation)

    # --- names ---

    def _name(self, path: str) -> str:
        return clean_name(f"{path}.").rstrip(".") or self.root

    def _healthy(self, calls: list[_Call], values: list[int]) -> list[str]:
        return [call.name for call in calls if call.leaf and values[call.out] == FINITE]

    def _origin(self, name: str, module: nn.Module, phase: str, healthy: Iterable[str] = ()) -> Origin:
        latest = dict.fromkeys(other for other in reversed(list(healthy)) if other != name)
        return Origin(name, _kind(module), phase, tuple(reversed(list(latest)[:SHOWN])))


def _kind(module: nn.Module) -> str:
    """Class name, that of the module inside for a compiled or scripted one."""
    return name_of(getattr(module, "_orig_mod", module))


def _unknown(reason: str = "") -> Origin:
    return Origin("", "", "", (), reason=reason)


class _Flags:
    """How bad tensors are: computed on their devices, read together."""

    def __init__(self) -> None:
        self._count = 0
        self._known: dict[int, int] = {}
        self._waiting: list[tuple[int, Tensor]] = []

    def add(self, tensors: Iterable[Tensor]) -> int:
        """Return the number under which the worst of `tensors` will be found."""
        self._count += 1
        for tensor in tensors:
            if (flag := _severity(tensor)) is not None:
                self._waiting.append((self._count, flag))
        return self._count

    def read(self) -> list[int]:
        """FINITE, MASKED or BAD for each number so far; one transfer a device."""
        for device in {flag.device for _, flag in self._waiting}:
            here = [(number, flag) for number, flag in self._waiting if flag.device == device]
            for (number, _), value in zip(here, torch.stack([flag for _, flag in here]).tolist(), strict=True):
                self._known[number] = max(value, self._known.get(number, FINITE))
        self._waiting.clear()
        return [self._known.get(number, FINITE) for number in range(self._count + 1)]


@torch.no_grad()
def _severity(tensor: Tensor) -> Tensor | None:
    """0, 1 or 2 on the device of `tensor`; None where there is nothing to look at."""
    try:
        # to reduce a partial tensor takes a collective, and what vmap or grad wrap is gone when flags are read:
        # both are left out, and what is made of them is looked at all the same
        if sharding.is_partial(tensor) or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            return None
        values = sharding.local(tensor.detach())
        values = values._values() if values.is_sparse else values
        values = torch.view_as_real(values) if values.is_complex() else values
        if not values.is_floating_point() or not values.numel():
            return None
        low, high = torch.aminmax(values.float() if values.itemsize == 1 else values)  # NaN comes through both
    except (RuntimeError, TypeError):  # an exotic layout or type: it is left out
        return None
    return (~(high < torch.inf)).int() + (~((high < torch.inf) & (low > -torch.inf))).int()


def _walk(outputs: Iterable[Tensor], stop: Callable[[Node], bool]) -> list[Node]:
    """The nodes of the autograd graph behind `outputs`, down to those where it stops."""
    found: dict[Node, None] = {}
    waiting = [output.grad_fn for output in outputs]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found and not stop(node):
            found[node] = None
            waiting += [before for before, _ in node.next_functions]
    return list(found)
