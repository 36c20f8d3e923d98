"""SignalProbe: what goes through the layers of a network at a probed step, forward and backward.

Forward hooks see what modules give and read, tensor hooks the gradients that come back, and the autograd graph says
what lies between (`paths`). All of it is summed up on the device; nothing outlives the step.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lightning_gradhealth import sharding
from lightning_gradhealth.layers import clean_name, has_own_parameters, is_compiled, unwrap
from lightning_gradhealth.naming import name_of
from lightning_gradhealth.signals.ending import Ending
from lightning_gradhealth.signals.hooks import (
    Backward,
    Hook,
    callable_roots,
    detached,
    first_floating,
    plain,
    written_to,
)
from lightning_gradhealth.signals.kinds import kind_of_module, kind_of_node
from lightning_gradhealth.signals.places import CALLS, NORMS, Step, Watched
from lightning_gradhealth.signals.ranks import in_order, nothing, united
from lightning_gradhealth.signals.reading import INPUT, UNITS, Reading, Spec
from lightning_gradhealth.signals.recurrent import flow_norms, outer_flow
from lightning_gradhealth.signals.sums import norm_of
from lightning_gradhealth.signals.survey import Survey
from lightning_gradhealth.trees import tensors

PASSES = 16  # forward passes of a step that are measured: the graph of each is kept until the step ...
LEAF_PASSES = 64  # ... but that of a single layer, as of a recurrent cell that a loop calls, is small
FLOW = 4  # cotangents and sequences of a sampled gradient through time
FLOW_STEPS = 64
SHORTEST = 8  # steps: fewer have no memory to lose
_PARAMETRIZATION = re.compile(r"(^|\.)parametrizations(\.|$)")  # what it gives is a weight, not a signal


class SignalProbe:
    """Measures signals while it is open: between `open` and `close` lie the forward passes of one optimizer step.

    Only passes in training mode with gradients count. Compiled and scripted modules, and what is inside them, are left
    alone, unless `compiled` is set.

    Args:
        model: The model; DDP's wrapper is looked through.
        compiled: Run compiled modules eagerly while the probe is open, and look inside.
        temporal: Keep what recurrent modules are given, for `temporal_flows`.

    Attributes:
        across_ranks: Whether to sum over ranks; then all ranks probe the same steps, with one collective each.
        wrapped: Modules through which a training step is called, as strategies do, before any forward pass: these calls
            are looked through.
        hidden: Compiled or scripted modules that are not looked into.
        before_backward: Called at the beginning of each backward pass that is seen.
        failure: Why a measure failed, once one has; nothing is measured from then on.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
        >>> for layer in net:
        ...     _ = nn.init.eye_(layer.weight).data.mul_(0.5)
        >>> probe = SignalProbe(net)
        >>> probe.open()
        >>> net(torch.ones(4, 2)).sum().backward()
        >>> reading = probe.close()
        >>> reading.read(reading.vector.tolist()).forward_rms
        [0.5, 0.25]
    """

    def __init__(self, model: nn.Module, *, compiled: bool = False, temporal: bool = False) -> None:
        self.model = unwrap(model)
        self.across_ranks = False
        self.wrapped: frozenset[nn.Module] = frozenset()
        self.hidden: tuple[str, ...] = ()
        self.before_backward: Callable[[], None] | None = None
        self.failure = ""
        self._compiled = compiled
        self._temporal = temporal
        self._thread = threading.get_ident()
        self._handles: list[Any] = []
        self._gates: list[Any] = []
        self._stance: Any = None
        self._modules: dict[nn.Module, Watched] = {}
        self._seen: list[tuple[nn.Module, bool]] = []
        self._survey = Survey()
        self._agreed: dict[int, Spec] = {}  # by optimizer
        self._passed: set[nn.Module] = set()
        self._stack: list[nn.Module] = []
        self._on = False
        self._held = False
        self._step = Step()
        self._look()

    # --- opening and closing ---

    def _look(self) -> None:
        """Find the modules that can be hooked, and those that hide what is inside; nothing to do if none is new."""
        seen = [(module, is_compiled(module)) for module in self.model.modules()]
        if seen == self._seen:
            return
        self._seen = seen
        hidden: list[str] = []
        self._modules.clear()
        for path, module in self.model.named_modules():
            if any(not top or path.startswith(f"{top}.") for top in hidden) or _PARAMETRIZATION.search(path):
                continue
            if hash(module) != object.__hash__(module):
                continue  # a metric: its hash changes with its state
            name = clean_name(f"{path}.").rstrip(".") or name_of(self.model)
            if isinstance(module, torch.jit.ScriptModule) or (is_compiled(module) and not self._compiled):
                hidden.append(path)
            else:
                measured = has_own_parameters(module) or isinstance(module, NORMS)
                self._modules[module] = Watched(name, measured, kind_of_module(module), not module._modules)
        self.hidden = tuple(clean_name(f"{path}.").rstrip(".") or name_of(self.model) for path in hidden)

    @property
    def wants_samples(self) -> bool:
        """Whether there are activations whose units have never been judged, for want of samples.

        Ranks have to do alike, but may see other activations and other numbers of samples: they always want some.
        """
        return self.across_ranks or self._survey.wants_samples

    @property
    def lacks_samples(self) -> bool:
        """Whether this rank has not seen enough samples yet to judge all units."""
        return self._survey.wants_samples

    @property
    def is_open(self) -> bool:
        """Whether hooks are on the modules."""
        return bool(self._handles)

    def open(self) -> None:
        """Put hooks on the modules; without effect where they are."""
        if self._handles or self.failure:
            return
        self._look()
        if self._compiled and any(map(is_compiled, self._modules)):
            self._stance = torch.compiler.set_stance("force_eager")
        self._thread = threading.get_ident()
        enter, leave = Hook(self._enter), Hook(self._leave)
        for module, watched in self._modules.items():
            if not watched.leaf:
                self._handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            self._handles.append(module.register_forward_hook(leave, with_kwargs=True, always_call=True))

    def pause(self) -> None:
        """Take the hooks off and keep what was measured; calling it twice does no harm."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._stack.clear()
        self._passed.clear()
        if self._stance is not None:
            self._stance.__exit__(None, None, None)
            self._stance = None

    def await_calls(self, due: bool) -> None:
        """Let the next call of the model in training open the probe, or let none do so any more.

        Where compiled code is run eagerly it has to be open before the call.
        """
        if due and self._compiled:
            self.open()
        if due and not self._gates and not self._compiled:
            roots = [root for root in callable_roots(self.model) if root in self._modules]
            self._gates = [root.register_forward_pre_hook(Hook(self._open_for), with_kwargs=True) for root in roots]
        elif not due:
            for gate in self._gates:
                gate.remove()
            self._gates = []

    def _open_for(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not self._handles and self.model.training and torch.is_grad_enabled() and not self._outside():
            self.open()
            if not self._modules[module].leaf:
                self._enter(module, args, kwargs)  # a hook that is added now is not called for this pass

    def temporal_flows(self) -> dict[str, dict[str, Tensor]]:
        """The gradient through time of every recurrent module that the passes so far have used, still on the device.

        Returns:
            By module, and by layer and direction, norms of shape (steps,), see `flow_norms`.
        """
        given, self._step.given = self._step.given, {}
        try:
            with self.held():
                return {
                    name: flow_norms(module, inputs, hx, cotangents=FLOW, samples=FLOW, steps=FLOW_STEPS)
                    for name, (module, inputs, hx) in given.items()
                }
        except Exception as error:
            self._fail(error)
            return {}

    @contextmanager
    def held(self) -> Iterator[None]:
        """Overlook calls of the modules for a while: those that are made to look at something else."""
        self._held = True
        try:
            yield
        finally:
            self._held = False

    @torch.no_grad()
    def close(
        self,
        *,
        step: int = 0,
        optimizer: int = 0,
        scale: Tensor | None = None,
        flows: dict[str, dict[str, Tensor]] | None = None,
    ) -> Reading | None:
        """Put together what was measured since the last time, still on the device; the hooks stay as they are.

        Args:
            step: The loggers' x value of the step.
            optimizer: Index of the optimizer whose step it is.
            scale: The factor by which the loss was scaled, shape (); None: by none.
            flows: What `temporal_flows` gave.

        Returns:
            None where nothing was measured.
        """
        done, self._step = self._step, Step()
        if not done.places and not self.across_ranks:
            return None
        spec, parts = Spec(), nothing(done.sums.device)
        try:
            spec = done.spec()
            parts = self._parts(done, spec, scale)
        except Exception as error:
            self._fail(error)  # the other ranks wait for this one all the same
        if self.across_ranks:
            agreed = self._agreed.get(optimizer, Spec())
            if not agreed.sites:  # the first probe: what all ranks will add up from now on
                agreed = self._agreed[optimizer] = united(sharding.gather_objects(spec))
            flat = torch.cat([part.flatten() for part in in_order(parts, spec, agreed)])
            spec, parts = agreed, [sharding.sum_over_ranks(flat)]
        vector = torch.cat([part.flatten() for part in parts])
        return (
            Reading(step, optimizer, vector, spec, {**done.flows, **done.calls_back(SHORTEST), **(flows or {})})
            if spec.sites
            else None
        )

    def _parts(self, done: Step, spec: Spec, scale: Tensor | None) -> list[Tensor]:
        """The sums of the sites, of the network's input, of the activations, the flags, and the histograms."""
        count = len(spec.sites)
        matrix = done.sums.matrix(count, scale)
        norm, number = done.sums.input or (matrix.new_zeros(()), 0)
        shares = [self._survey.windows[activation.name].take() for activation in spec.activations]
        units = [
            matrix.new_zeros(UNITS) if share is None else torch.cat([share.to(matrix), matrix.new_ones(1)])
            for share in shares
        ]
        entry = torch.stack([norm.to(matrix).square(), matrix.new_tensor(float(number))])
        table = torch.stack(units) if units else matrix.new_zeros(0, UNITS)
        tail = [done.sums.histograms(count)] if spec.histogram else []
        return [matrix, entry, table, done.sums.flags().unsqueeze(1), *tail]

    def _fail(self, error: Exception) -> None:
        first_line = str(error).partition("\n")[0]  # torch's errors may have a hundred
        self.failure = self.failure or f"{type(error).__name__}: {first_line}"

    # --- while a forward pass runs ---

    def _outside(self) -> bool:
        """Whether this is a recomputation in the backward pass, another thread, under vmap, or to be overlooked."""
        if self._held or torch._C._functorch.peek_interpreter_stack() is not None:
            return True
        return torch._C._current_graph_task_id() != -1 or threading.get_ident() != self._thread

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self._outside():
            return
        if not self._stack and module in self.wrapped - self._passed:
            self._passed.add(module)
            return
        self._begin_call(module)
        self._stack.append(module)
        if self._on and self._modules[module].measured:
            self._guarded(self._read, module, self._modules[module].name, (args, kwargs))

    def _guarded(self, measure: Callable[..., None], *args: Any) -> None:
        """Measure; a failure must not reach the forward pass."""
        try:
            measure(*args)
        except Exception as error:
            self._fail(error)

    def _begin_call(self, module: nn.Module) -> None:
        """Where no module is running yet, a loop has called one."""
        if not self._stack:
            passes = self._step.passes[module] = self._step.passes.get(module, 0) + 1
            few = passes <= (LEAF_PASSES if self._modules[module].leaf else PASSES)
            self._on = few and self.model.training and torch.is_grad_enabled() and not self.failure
            self._step.calls.clear()

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self._outside():
            return
        if not self._stack and module in self._passed:
            self._passed.remove(module)
            return
        watched = self._modules[module]
        if watched.leaf:
            self._begin_call(module)
        else:
            while self._stack and self._stack.pop() is not module:
                pass  # left by an exception that the model caught
        if self._on and not self.failure and output is not None:
            self._guarded(self._see, module, watched, (args, kwargs), output)

    def _see(self, module: nn.Module, watched: Watched, given: Any, output: Any) -> None:
        """Look at a call that is over."""
        if watched.leaf and watched.measured:
            self._read(module, watched.name, given)
        self._give(module, watched, output)
        if not self._stack:
            with torch.no_grad():
                self._survey.look(self._step, tensors(output), is_activation=watched.kind is not None)
            self._step.outputs += tensors(output)

    def _read(self, module: nn.Module, name: str, given: Any) -> None:
        """Measure what a module reads, if that is the sum of two signals, or what the network is given."""
        tensor = first_floating(given)
        if tensor is None or name in self._step.calls:
            return
        if self._temporal and isinstance(module, nn.RNNBase):
            args, kwargs = given
            inputs, hx = (*args, *kwargs.values(), None)[:2]
            self._step.given.setdefault(name, (module, detached(inputs), detached(hx)))
        if tensor.grad_fn is None:
            if not self._step.places and self._step.sums.input is None:
                norm = norm_of(plain(tensor))
                self._step.sums.input = norm, tensor.numel()
                self._step.sums.flag(INPUT, norm)
        elif self._step.paths.behind_merge(tensor.grad_fn):
            self._measure(f"{name} (input)", name, module, tensor)

    def _give(self, module: nn.Module, watched: Watched, output: Any) -> None:
        """Measure what a module gives, if it owns parameters or is a norm, and its units, if it is an activation."""
        tensor = first_floating(output)
        if tensor is None:
            return
        name, kind = watched.name, watched.kind
        if isinstance(module, (nn.RNNCell, nn.GRUCell)):  # an LSTM's h says nothing of what c carries
            self._step.unrolled.setdefault(name, {})
        if watched.measured:
            self._measure(name, name, module, tensor)
        elif kind is None and tensor.numel():  # known kinds make no NaN of what is finite
            self._step.sums.flag(name, norm_of(plain(tensor)))  # a sum may overflow
        if isinstance(module, nn.RNN) and name not in self._step.flows and not isinstance(output[0], PackedSequence):
            flow = outer_flow(module, tensor, cotangents=FLOW, samples=FLOW, steps=FLOW_STEPS)
            self._step.flows[name] = {key: norms for key, norms in flow.items() if len(norms) >= SHORTEST}
        latest = self._step.latest
        if kind is not None and latest is not None and not self._is_seen(module, tensor):
            self._survey.add(self._step, kind, latest, plain(tensor))

    def _is_seen(self, module: nn.Module, output: Tensor) -> bool:
        """Whether the autograd graph will show an activation's output."""
        if output.grad_fn is None or isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
            return False
        return kind_of_node(output.grad_fn) is not None

    def _measure(self, name: str, owner: str, module: nn.Module, tensor: Tensor) -> None:
        calls = self._step.calls[name] = self._step.calls.get(name, 0) + 1
        if calls > CALLS or not tensor.numel():
            return
        step, values = self._step, plain(tensor)
        tensor = written_to(tensor)
        known = step.paths.points.get(tensor.grad_fn) if tensor.grad_fn is not None else None
        if known is not None:  # what a module inside it has given
            step.latest = step.numbered[known]
            if name not in step.places:
                step.place(name, owner, module, values, known)
            return
        place = step.latest = step.place(name, owner, module, values)
        norm = step.sums.forward(place.number, values)
        if name == owner:
            step.sums.flag(name, norm)
        if name == owner and calls == 1:
            step.sums.sample(place.number, values)
        if tensor.requires_grad and tensor.grad_fn is not None:
            step.paths.mark(tensor.grad_fn, place.number, size=tensor.numel(), hidden=calls > 1)
            tensor.register_hook(  # type: ignore[no-untyped-call]
                Backward(
                    step.sums, place.number, step.unrolled.get(name), self._turn(module, calls), self._begin_backward
                )
            )

    # --- after a forward pass ---

    def _turn(self, module: nn.Module, calls: int) -> int:
        """Which call of a module it is: within the pass, or, where a loop calls the module itself, among these."""
        return calls if self._stack else self._step.passes.get(module, calls)

    def _begin_backward(self) -> None:
        """Once a backward pass, before it has come to any parameter."""
        task = torch._C._current_graph_task_id()
        if task != self._step.backward_pass:
            self._step.backward_pass = task
            if self.before_backward is not None:
                with torch.no_grad():
                    self._guarded(self.before_backward)

    def end(self, loss: Tensor | None) -> None:
        """Look at the graph of a loss, before its backward pass or after it.

        Args:
            loss: The loss; None: the outputs of the modules that the loop has called stand for it.
        """
        ends = self._step.outputs if loss is None else [loss]
        names = {node: self._step.numbered[point].owner for node, point in self._step.paths.points.items()}
        self._guarded(self._step.ending.look, ends, names)

    @property
    def ending(self) -> Ending:
        """What the graphs of the losses have shown since the last step."""
        return self._step.ending

    # --- state ---

    def state_dict(self) -> dict[str, Any]:
        """Return the unit windows that are not full yet, and what ranks have agreed on."""
        agreed = {optimizer: spec.to_dict() for optimizer, spec in self._agreed.items()}
        return {"windows": self._survey.state_dict(), "agreed": agreed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` returned."""
        self._agreed = {optimizer: Spec.from_dict(spec) for optimizer, spec in state["agreed"].items()}
        self._survey.load_state_dict(state["windows"])
