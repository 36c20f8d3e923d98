"""SignalProbe: what goes through the layers of a network at a probed step, forward and backward.

Forward hooks see what modules give and read, tensor hooks the gradients that come back, and the autograd graph says
what lies between (`paths`). All of it is summed up on the device; nothing outlives the step.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lightning_gradhealth import sharding
from lightning_gradhealth.layers import is_compiled, unwrap
from lightning_gradhealth.messages import reason_of
from lightning_gradhealth.signals.ending import Ending
from lightning_gradhealth.signals.hooks import Beside, Hook, callable_roots, detached, first_floating, plain, written_to
from lightning_gradhealth.signals.modules import matrices_by_hand, watched_modules
from lightning_gradhealth.signals.paths import Applied
from lightning_gradhealth.signals.places import CALLS, NORMS, Step, Watched
from lightning_gradhealth.signals.ranks import in_order, nothing, united
from lightning_gradhealth.signals.reading import INPUT, Reading, Spec
from lightning_gradhealth.signals.recurrent import flow_norms, outer_flow
from lightning_gradhealth.signals.sums import norm_of
from lightning_gradhealth.signals.survey import Survey, is_seen
from lightning_gradhealth.trees import tensors

PASSES = 16  # forward passes of a step that are measured: the graph of each is kept until the step ...
LEAF_PASSES = 64  # ... but that of a single layer, as of a recurrent cell that a loop calls, is small
FLOW = 4  # cotangents and sequences of a sampled gradient through time
FLOW_STEPS = 64
SHORTEST = 8  # steps: fewer have no memory to lose
ATTEMPTS = 3  # probes that fail in a row before no more are made: what fails once may be the doing of a batch
SIGNALS, TEMPORAL = "signals inside the network", "the gradient through time"


class SignalProbe:
    """Measures signals while it is open: between `open` and `close` lie the forward passes of one optimizer step.

    Only passes in training mode with gradients count, in the first thread that calls the model, and of the gradients
    those that accumulate into `.grad`. Compiled and scripted modules, and what is inside them, are left alone, unless
    `compiled` is set.

    Args:
        model: The model; DDP's wrapper is looked through.
        compiled: Run compiled modules eagerly while the probe is open, and look inside.
        temporal: Keep what recurrent modules are given, for `temporal_flows`.

    Attributes:
        across_ranks: Whether to sum over ranks; then all ranks probe the same steps, with one collective each.
        wrapped: Modules through which a training step is called, as strategies do, before any forward pass: these calls
            are looked through.
        hidden: Compiled or scripted modules that are not looked into.
        before_backward: Called at the beginning of each backward pass that is seen and accumulates into `.grad`.
        failures: What the last probe could not measure, and why: `SIGNALS`, `TEMPORAL`. After `ATTEMPTS` in a row
            nothing is measured any more.
        is_owed: Nothing came back to the last probe, although it could have: it has shown no more than activations.
        elsewhere: Calls in further threads, of copies of the model, or in transforms of torch.func were overlooked.

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
        self.failures: dict[str, str] = {}
        self.is_owed = False
        self.elsewhere = ""
        self._compiled = compiled
        self._temporal = temporal
        self._thread: int | None = None  # of the step: the first one that calls
        self._in_a_row = 0  # probes that failed
        self._handles: list[Any] = []
        self._gates: list[Any] = []
        self._stance: Any = None
        self._modules: dict[nn.Module, Watched] = {}
        self._seen: list[tuple[nn.Module, bool]] = []
        self._by_hand: dict[int, Applied] = {}
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
        self._modules, self.hidden = watched_modules(self.model, compiled=self._compiled)

    def let_go(self) -> None:
        """Between two probes, forget modules that the model no longer has; the next probe looks anew."""
        if self.is_open:
            return
        kept = set(self.model.modules())
        self._modules = {module: watched for module, watched in self._modules.items() if module in kept}
        self._seen = [(module, compiled) for module, compiled in self._seen if module in kept]

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

    @property
    def failure(self) -> str:
        """Why a measure has failed in the step that runs, or in the last one; empty where none has."""
        return self._step.returns.failure or self.failures.get(SIGNALS, "")

    @property
    def has_given_up(self) -> bool:
        """Whether too many probes have failed in a row."""
        return self._in_a_row >= ATTEMPTS

    def open(self) -> None:
        """Put hooks on the modules; without effect where they are."""
        if self._handles or self.has_given_up:
            return
        self._look()
        if self._compiled and any(map(is_compiled, self._modules)):
            self._stance = torch.compiler.set_stance("force_eager")
        self._thread, self._by_hand = None, matrices_by_hand(self.model)
        enter, leave = Hook(self._enter, self._fail), Hook(self._leave, self._fail)
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
            gate = Hook(self._open_for, self._fail)
            self._gates = [root.register_forward_pre_hook(gate, with_kwargs=True) for root in roots]
        elif not due:
            for gate in self._gates:
                gate.remove()
            self._gates = []

    def _open_for(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not self._handles and self.model.training and torch.is_grad_enabled() and not self._outside():
            self.open()
            watched = self._modules.get(module)
            if self._handles and watched is not None and not watched.leaf:
                self._enter(module, args, kwargs)  # a hook that is added now is not called for this pass

    def temporal_flows(self) -> dict[str, dict[str, Tensor]]:
        """The gradient through time of every recurrent module that the passes so far have used, still on the device.

        Returns:
            By module, and by layer and direction, norms of shape (steps,), see `flow_norms`.
        """
        given, self._step.given = self._step.given, {}
        if not given:
            return {}
        try:
            with self.held():
                flows = {
                    name: flow_norms(module, inputs, hx, cotangents=FLOW, samples=FLOW, steps=FLOW_STEPS)
                    for name, (module, inputs, hx) in given.items()
                }
        except Exception as error:
            self.failures[TEMPORAL] = reason_of(error)
            return {}
        self.failures.pop(TEMPORAL, None)
        return flows

    @contextmanager
    def of_any_pass(self) -> Iterator[None]:
        """Let gradients that `torch.autograd.grad` computes count for a while."""
        with self._step.returns.of_any_pass():
            yield

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
        done, self._step, self._thread = self._step, Step(), None
        self.is_owed = done.is_blank
        if not (done.places or done.returns.failure or self.across_ranks):
            return None
        spec, parts = Spec(), nothing(done.sums.device)
        if not done.returns.failure:
            try:
                full = done.spec()
                spec, parts = full, done.parts(full, scale, self._survey.windows)
            except Exception as error:
                done.returns.fail(error)
        self._account(done)
        if not spec.sites and not self.across_ranks:
            return None  # else the other ranks wait for this one all the same
        if self.across_ranks:
            agreed = self._agreed.get(optimizer, Spec())
            if not agreed.chain:  # the first probe with a backward pass: what all ranks will add up from now on
                agreed = self._agreed[optimizer] = united(sharding.gather_objects(spec))
            flat = torch.cat([part.flatten() for part in in_order(parts, spec, agreed)])
            spec, parts = agreed, [sharding.sum_over_ranks(flat)]
        vector = torch.cat([part.flatten() for part in parts])
        return (
            Reading(step, optimizer, vector, spec, {**done.flows, **done.calls_back(SHORTEST), **(flows or {})})
            if spec.sites
            else None
        )

    def _account(self, done: Step) -> None:
        """Count the probes that fail in a row, and say what this one could not measure."""
        if done.returns.failure:
            self.failures[SIGNALS] = done.returns.failure
            self._in_a_row += 1
        elif done.places:
            self.failures.pop(SIGNALS, None)
            self._in_a_row = 0

    def _fail(self, error: Exception) -> None:
        self._step.returns.fail(error)
        self._stack.clear()

    # --- while a forward pass runs ---

    def _outside(self) -> bool:
        """Whether this is a recomputation in the backward pass, a further thread, under vmap, or to be overlooked."""
        if self._held:
            return True
        if torch._C._functorch.peek_interpreter_stack() is not None:
            self.elsewhere = self.elsewhere or "not measured in transforms of torch.func (vmap, grad, jvp)"
            return True
        if torch._C._current_graph_task_id() != -1:
            return True
        own = threading.get_ident()
        if self._thread is None:
            self._thread = own
        elif own != self._thread and self.model.training and torch.is_grad_enabled():
            self.elsewhere = "the model is called in several threads, of which the first in each step is measured"
        return own != self._thread

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        watched = self._watched(module)
        if watched is None or self._outside():
            return
        if not self._stack and module in self.wrapped - self._passed:
            self._passed.add(module)
            return
        self._begin_call(module, watched)
        self._stack.append(module)
        if self._on and watched.measured:
            self._read(module, watched.name, (args, kwargs))

    def _watched(self, module: nn.Module) -> Watched | None:
        """What is known of a module; None of a copy that shares its hooks, as replicas of `nn.DataParallel` do."""
        watched = self._modules.get(module)
        if watched is None and self.model.training and torch.is_grad_enabled():
            self.elsewhere = "copies of the model are called, as nn.DataParallel makes them, and are not measured"
        return watched

    def _begin_call(self, module: nn.Module, watched: Watched) -> None:
        """Where no module is running yet, a loop has called one."""
        if not self._stack:
            passes = self._step.passes[module] = self._step.passes.get(module, 0) + 1
            few = passes <= (LEAF_PASSES if watched.leaf else PASSES)
            self._on = few and self.model.training and torch.is_grad_enabled() and not self._step.returns.failure
            self._step.calls.clear()

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        watched = self._watched(module)
        if watched is None or self._outside():
            return
        if not self._stack and module in self._passed:
            self._passed.remove(module)
            return
        if watched.leaf:
            self._begin_call(module, watched)
        else:
            while self._stack and self._stack.pop() is not module:
                pass  # left by an exception that the model caught
        if self._on and not self._step.returns.failure and output is not None:
            self._see(module, watched, (args, kwargs), output)

    def _see(self, module: nn.Module, watched: Watched, given: Any, output: Any) -> None:
        """Look at a call that is over."""
        if watched.leaf and watched.measured:
            self._read(module, watched.name, given)
        self._give(module, watched, output)
        if not self._stack:
            with torch.no_grad():
                self._survey.look(self._step, tensors(output), is_activation=watched.kind is not None)
            self._step.outputs += tensors(output)
            self._step.look_for_matrices(tensors(output), self._by_hand)

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
        if watched.measured:
            self._measure(name, name, module, tensor)
            self._follow(name, module, output, tensor)
        elif kind is None and tensor.numel():  # known kinds make no NaN of what is finite
            self._step.sums.flag(name, norm_of(plain(tensor)))  # a sum may overflow
        if isinstance(module, nn.RNN) and name not in self._step.flows and not isinstance(output[0], PackedSequence):
            self._look_back(module, name, tensor)
        latest = self._step.latest
        if kind is not None and latest is not None and not is_seen(module, tensor):
            self._survey.add(self._step, kind, latest, plain(tensor))

    def _look_back(self, module: nn.RNN, name: str, output: Tensor) -> None:
        """Measure the gradient through time by what a recurrent module has put out."""
        try:
            flow = outer_flow(module, output, cotangents=FLOW, samples=FLOW, steps=FLOW_STEPS)
        except Exception as error:  # the signals are measured all the same
            self.failures[TEMPORAL] = reason_of(error)
            return
        self.failures.pop(TEMPORAL, None)
        self._step.flows[name] = {key: norms for key, norms in flow.items() if len(norms) >= SHORTEST}

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
        turn = self._turn(module, calls)
        if (
            name == owner
            and turn in (2, SHORTEST)
            and not isinstance(module, NORMS)
            and step.paths.leads_back(tensor.grad_fn, place.number)
        ):
            step.repeated.add(name)
        norm = step.sums.forward(place.number, values)
        if name == owner:
            step.sums.flag(name, norm)
        if name == owner and calls == 1:
            step.sums.sample(place.number, values)
        if tensor.requires_grad and tensor.grad_fn is not None:
            step.paths.mark(tensor.grad_fn, place.number, size=tensor.numel(), hidden=calls > 1)
            step.returns.began = self.before_backward
            leaves = step.paths.leaves(tensor.grad_fn)
            step.returns.expect(tensor, place.number, leaves, step.unrolled.setdefault(name, {}), turn)

    def _follow(self, name: str, module: nn.Module, output: Any, first: Tensor) -> None:
        """Measure what comes back to the other states that a cell gives: an LSTM's h says nothing of what c carries."""
        if isinstance(output, Tensor) or isinstance(module, nn.RNNBase):
            return
        turn = self._turn(module, self._step.calls.get(name, 0))
        for other in [tensor for tensor in tensors(output) if tensor is not first and tensor.is_floating_point()][:3]:
            if turn <= CALLS and other.requires_grad and other.grad_fn is not None:
                hook = Beside(self._step.beside.setdefault(name, {}), turn)
                written_to(other).register_hook(hook)  # type: ignore[no-untyped-call]

    def _turn(self, module: nn.Module, calls: int) -> int:
        """Which call of a module it is: within the pass, or, where a loop calls the module itself, among these."""
        return calls if self._stack else self._step.passes.get(module, calls)

    def end(self, loss: Tensor | None) -> None:
        """Look at the graph of a loss, before its backward pass or after it.

        Args:
            loss: The loss; None: the outputs of the modules that the loop has called stand for it.
        """
        step = self._step
        try:
            names = {node: step.numbered[point].owner for node, point in step.paths.points.items()}
            step.ending.look(step.outputs if loss is None else [loss], names)
            if loss is not None:
                step.look_for_matrices([loss], self._by_hand)
        except Exception as error:
            self._fail(error)

    @property
    def ending(self) -> Ending:
        """What the graphs of the losses have shown since the last step."""
        return self._step.ending

    # --- state ---

    def state_dict(self) -> dict[str, Any]:
        """Return the unit windows that are not full yet, what ranks have agreed on, and the failures in a row."""
        agreed = {optimizer: spec.to_dict() for optimizer, spec in self._agreed.items()}
        return {"windows": self._survey.state_dict(), "agreed": agreed, "failed": [self._in_a_row, self.failures]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` returned."""
        self._agreed = {optimizer: Spec.from_dict(spec) for optimizer, spec in state["agreed"].items()}
        self._survey.load_state_dict(state["windows"])
        self._in_a_row, failures = state.get("failed", [0, {}])
        self.failures = dict(failures)
