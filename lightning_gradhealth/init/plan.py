"""`init_weights` and `plan_init`: one call for a whole model, with an account of every parameter."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_gradhealth.init.advice import Advised
from lightning_gradhealth.init.atomic import all_or_nothing, random_state_kept_on_error
from lightning_gradhealth.init.auto import advise
from lightning_gradhealth.init.binding import bind
from lightning_gradhealth.init.calibration import (
    calibrate as calibrate_weights,
    check_batch,
    with_measured,
)
from lightning_gradhealth.init.call import Call, check_call
from lightning_gradhealth.init.decide import WOULD_TELL, decide
from lightning_gradhealth.init.gains import Nonlinearity
from lightning_gradhealth.init.overrides import Overrides
from lightning_gradhealth.init.owned import check_shapes, owned_by
from lightning_gradhealth.init.parametrized import has_computed
from lightning_gradhealth.init.parts import Part, in_order, target_of, with_step_notes
from lightning_gradhealth.isolation import RandomState, undisturbed
from lightning_gradhealth.layers import check_model, clean_name, unwrap
from lightning_gradhealth.records import DepthPoint, InitEntry, InitReport
from lightning_gradhealth.tracing.progress import tick, working
from lightning_gradhealth.validation import check_flag


def init_weights(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    scheme: str = "auto",
    distribution: str = "normal",
    mode: str | None = None,
    nonlinearity: Nonlinearity = "auto",
    gamma: float = 1.0,
    overrides: Overrides = (),
    residual: str = "auto",
    keep: str = "deliberate",
    calibrate: Any = None,
    skip: str | Sequence[str] = (),
    seed: int | None = None,
    lr: float | None = None,
    on_uncovered: str = "warn",
    dry_run: bool = False,
) -> InitReport:
    r"""Initialise all parameters of a model in place, so that signals and gradients keep their scale through it.

    With `example_inputs` one recorded forward pass shows what lies between a weight and the next: whatever the
    activation, functional or your own, its gain is found; parameters that are multiplied with activations are
    weights, whoever owns them; and residual branches are known. Without, a guess at what the first layer takes is
    followed, and where none fits, the order of the modules has to serve.

    Weights get the variance `(gamma * gain)^2 / fan` (a third of it where a norm takes their scale, as torch's own
    layers), biases 0, norm layers 1 and 0. Recurrent layers are drawn gate by gate, with orthogonal recurrent weights
    and a forget bias of 1 in total, attention projection by projection; embeddings have variance 1 (1 / width where a
    norm takes their scale). A tied parameter is drawn once, as the weight of a layer where it is one.
    Weights under weight_norm, spectral_norm, pruning and other parametrizations are written through them. A padding
    row, buffers, frozen parameters (copies of trained ones get the same numbers), those with the attribute
    `_no_reinit`, and state that is no weight (a scale, a gate, a table of positions) or was set on purpose (see `keep`)
    stay as they are, and are listed.

    Each parameter has random numbers of its own, made from the seed and its name: the order of the modules,
    device, dtype, memory format and sharding change nothing.

    Args:
        model: The model; its lazy modules initialised, its parameters on a real device (see `plan_init` for meta).
        example_inputs: What the model is called with: a tensor, a tuple of arguments or a dict of keyword arguments. Or
            a batch of the DataLoader: where `forward` does not take it, the calls that a LightningModule's
            `training_step` makes are followed, or else `forward` on the part of the batch that it takes.
            None: a LightningModule's `example_input_array`, where it has one.
        scheme: "auto" (the gain of what follows, 1 for output layers), or one formula for all: "he" ("kaiming"),
            "xavier" ("glorot"), "lecun", "orthogonal" or "delta_orthogonal" (convolutions; orthogonal elsewhere).
        distribution: "normal", "uniform" or "truncated_normal" (cut at two sigma, std corrected).
        mode: "fan_in", "fan_out", "fan_avg" or "fan_geo"; None: the scheme's own (Xavier fan_avg, others fan_in).
        nonlinearity: The activation behind all layers: a name, module or elementwise function (None: linear). "auto":
            what is found, or the scheme's own (He ReLU, the others linear).
        gamma: A factor on every gain.
        overrides: What takes precedence for some parameters: pairs (selector, action), or a dict of them; the first
            match wins. A selector is a class of modules (the parameters that such modules own), a regular expression
            that matches whole names, or a predicate `fn(name, parameter)`. An action is a scheme, "skip", "zeros",
            "ones", a gain, or a dict with some of scheme, gain, gamma, mode, distribution, or with a std, or with a
            value for every element. Schemes, gains and stds reach weights (two axes or more, no norm layers; by name
            also raw vectors), the other actions everything selected. A gain or a std is final: no residual factor.
        residual: What the weights that end residual branches get: "none", "depth" (std times 1/sqrt(2 N)), "zero_last"
            (0), "fixup" (Zhang et al. 2019), or "auto" (depth, unless norm layers hold the branches).
        keep: "deliberate": what was set on purpose stays, as no class and no rule would give it: norms at 0 or at
            another constant, weights that are 0, constant, an identity, triangular or orthogonal, scales far below
            those of all rules, biases at a prior with their weights, the frequencies before a periodic activation. A
            name in `overrides`, and a `residual` other than "auto" for what ends branches, draw it all the same.
            "nothing": all is drawn.
        calibrate: A batch, as `example_inputs`: after the draw a real forward pass rescales every weight until its
            output has variance 1 (times the square of a residual factor), but for gains and stds of overrides. It also
            serves as `example_inputs` where there are none. None: not.
        skip: Regular expressions (or one) that match the whole names of parameters to leave alone.
        seed: Where all random numbers come from; the global random state then stays as it is. None: a seed
            is drawn from the global state, so that `torch.manual_seed` rules. On several processes give a
            seed, or set the global one alike.
        lr: The learning rate, for the report alone: by how much the first step of an Adam-like optimizer will move
            each parameter, as a share of its size. Such a step moves every element by `lr`, whatever its gradient;
            what SGD does depends on the gradient, and is not told. None: not told.
        on_uncovered: What to do where nothing is known of a parameter: "warn", "raise" (before anything
            is changed) or "ignore".
        dry_run: Only report what would be done: nothing is changed, the global random state included.

    Returns:
        What was done to every parameter, and why.

    Raises:
        TypeError: `model` is no module, `seed` no integer, or `overrides` no pairs.
        ValueError: An argument is out of range; an override matches nothing or contradicts another; a parameter is
            lazy, on the meta device or a flat shard; or one is uncovered and `on_uncovered="raise"`.

    Example:
        >>> model = nn.Sequential(nn.Linear(512, 256), nn.GELU(), nn.Linear(256, 10))
        >>> report = init_weights(model, torch.randn(8, 512), seed=0)
        >>> [entry.name for entry in report.entries]
        ['0.weight', '0.bias', '2.weight', '2.bias']
        >>> report = init_weights(model, scheme="he", overrides={r"2\.weight": {"std": 0.02}}, seed=0)
        >>> abs(model[0].weight.var().item() * 512 - 2) < 0.05, round(report.entries[2].measured_std, 2)
        (True, 0.02)
        >>> report = init_weights(nn.Linear(100, 10), lr=1e-3, seed=0)
        >>> f"{report.entries[0].relative_step:.1%}"
        '1.0%'

    Paper: He et al. 2015 (arXiv:1502.01852); Glorot and Bengio 2010; LeCun et al. 1998; for recurrent
    layers Saxe et al. 2014 (arXiv:1312.6120) and Jozefowicz et al. 2015.
    """
    call = check_call(
        scheme, distribution, mode, nonlinearity, gamma, overrides, residual, keep, skip, seed, lr, on_uncovered
    )
    if not check_flag("dry_run", dry_run, "leave it out to initialise the model"):
        with working("init_weights"), random_state_kept_on_error():
            return _plan(model, example_inputs, calibrate, call).apply()
    state = RandomState.now()
    try:
        with working("init_weights"):
            return _plan(model, example_inputs, calibrate, call).report
    finally:
        state.restore()


def plan_init(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    scheme: str = "auto",
    distribution: str = "normal",
    mode: str | None = None,
    nonlinearity: Nonlinearity = "auto",
    gamma: float = 1.0,
    overrides: Overrides = (),
    residual: str = "auto",
    keep: str = "deliberate",
    calibrate: Any = None,
    skip: str | Sequence[str] = (),
    seed: int | None = None,
    lr: float | None = None,
    on_uncovered: str = "warn",
) -> InitPlan:
    """Decide what `init_weights` would do, now, and do it later: a model on the meta device is enough.

    Args:
        model: The model. Its parameters may be on the meta device: shapes are all that a plan needs.
        example_inputs: As for `init_weights`.
        scheme: As for `init_weights`.
        distribution: As for `init_weights`.
        mode: As for `init_weights`.
        nonlinearity: As for `init_weights`.
        gamma: As for `init_weights`.
        overrides: As for `init_weights`.
        residual: As for `init_weights`.
        keep: As for `init_weights`; on the meta device nobody can read what was set.
        calibrate: As for `init_weights`; such a plan can be applied, not bound.
        skip: As for `init_weights`.
        seed: As for `init_weights`; None: drawn now.
        lr: As for `init_weights`.
        on_uncovered: As for `init_weights`.

    Returns:
        The plan: its `report` says what it is, `apply()` carries it out, `bind()` lets the model carry it out itself
        when it is materialised.

    Raises:
        TypeError: As `init_weights`.
        ValueError: As `init_weights`, but for parameters on the meta device.

    Example:
        >>> with torch.device("meta"):
        ...     model = nn.Linear(256, 1024)
        >>> plan = plan_init(model, scheme="lecun", seed=0)
        >>> plan.report.entries[0].target_std
        0.0625
        >>> plan.bind()
        >>> model.to_empty(device="cpu").reset_parameters()  # Lightning and FSDP2 do this by themselves
        >>> round(float(model.weight.detach().std()), 2)
        0.06
    """
    call = check_call(
        scheme, distribution, mode, nonlinearity, gamma, overrides, residual, keep, skip, seed, lr, on_uncovered
    )
    with working("plan_init"), random_state_kept_on_error():
        return _plan(model, example_inputs, calibrate, call)


class InitPlan:
    """What is to be done to a model's parameters: made by `plan_init`.

    Attributes:
        report: What would be done; nothing is measured yet.

    Example:
        >>> model = nn.Linear(4, 4)
        >>> plan = plan_init(model, scheme="he", seed=0)
        >>> plan.report.applied, plan.apply().applied
        (False, True)
    """

    def __init__(
        self, model: nn.Module, parts: Sequence[Part], report: InitReport, batch: Any = None, lr: float | None = None
    ) -> None:
        self._model, self._parts, self._calibrate, self._lr = model, parts, batch, lr
        self._bare = report
        self.report = with_step_notes(report, lr)

    def apply(self) -> InitReport:
        """Write all values into the model's parameters, plain or sharded.

        Returns:
            What was done, with the standard deviations measured. A UserWarning names what the model no longer has.

        Raises:
            ValueError: A parameter that the plan sets is on the meta device, or an initializer fills it with NaN.

        Example:
            >>> plan_init(nn.Linear(100, 100), scheme="lecun", seed=0).apply().entries[0].measured_std > 0.09
            True
        """
        now = {clean_name(path): p for path, p in self._model.named_parameters(remove_duplicate=False)}
        lost = [name for part in self._parts if part.sets for name in part.owned.originals if name not in now]
        parts = [part.refreshed(now) for part in self._parts if not any(name in lost for name in part.owned.originals)]
        for part in parts:
            for name, original in part.owned.originals.items():
                if part.sets and original.is_meta:
                    raise ValueError(
                        f"the parameter {name!r} of model is on the meta device; use plan_init(...).bind() before it is"
                        " materialised, or materialise it by model.to_empty(device=...) first"
                    )
        seed = self.report.seed
        targets = [(part.owned, part.target) for part in parts if part.target is not None]
        with all_or_nothing([part.owned for part in parts if part.sets]):
            with torch.no_grad():
                for done, part in enumerate(parts):
                    tick("drawing weights", done, len(parts))
                    part.write(seed)
            found = None if self._calibrate is None else calibrate_weights(self._model, self._calibrate, targets, seed)
            with torch.no_grad():
                drawn = {part.owned.name: part.owned for part in parts}
                for part in parts if found is not None else ():
                    if part.copied_from in drawn:  # rescaled since
                        part.owned.write(drawn[part.copied_from].present(), seed)
                entries = in_order(self._model, parts, measured=True, lr=self._lr)
        report = replace(self._bare, entries=entries, applied=True)
        if lost:
            warnings.warn(_of_lost(lost), UserWarning, stacklevel=2)
        if found is not None:
            report = with_measured(report, found, targets)
        return with_step_notes(report, self._lr)

    def bind(self) -> None:
        """Let every module of the model carry out its part by `reset_parameters()`, once there is memory for it.

        Lightning (`configure_model` with FSDP2 or tensor parallelism) and torch's own recipe, `model.to_empty(...)`
        and then `reset_parameters()` of each module, so give exactly the weights that one process gets.

        Raises:
            ValueError: The plan calibrates, which needs a model that can run; or a parameter that it keeps would be
                lost, as it has no values yet and its module no `reset_parameters`.

        Example:
            >>> with torch.device("meta"):
            ...     model = nn.Linear(2, 2)
            >>> plan_init(model, scheme="he", seed=0).bind()
            >>> model.to_empty(device="cpu").reset_parameters()
            >>> bool(model.weight.any()), bool(model.bias.any())
            (True, False)
        """
        if self._calibrate is not None:
            raise ValueError(
                "calibrate must be None to bind a plan, since it needs a model that can run; leave it out, or call"
                " init_weights(..., calibrate=batch) once the model is materialised"
            )
        bind(self._model, self.fillers(), self.kept())

    def fillers(self) -> dict[str, Callable[[Tensor], None]]:
        """What fills a tensor with the values of a parameter, by the parameter's name, for all that the plan sets.

        Example:
            >>> sorted(plan_init(nn.Linear(2, 2), scheme="he").fillers())
            ['bias', 'weight']
        """
        seed = self.report.seed
        return {
            name: partial(part.fill, index, seed)
            for part in self._parts
            if part.binds
            for index, name in enumerate(part.owned.originals)
        }

    def kept(self) -> dict[str, str]:
        """Why the plan leaves a parameter alone, by the parameter's name.

        Example:
            >>> plan_init(nn.PReLU(), scheme="he").kept()
            {'weight': 'PReLU: the slopes were chosen when the module was made'}
        """
        return {name: part.why_kept for part in self._parts if not part.binds for name in part.owned.originals}


def _plan(model: nn.Module, example_inputs: Any, batch: Any, call: Call) -> InitPlan:
    """Make a plan; its warnings are told to whoever called the function that called this."""
    model = unwrap(check_model("model", model))
    if batch is not None:
        check_batch(batch)
    check_shapes(model)
    sample = batch if example_inputs is None else example_inputs
    auto = call.settings.scheme.name == "auto"
    advised = advise(model, sample, residual=call.residual, nonlinearity=call.nonlinearity, keep=call.keep, guess=auto)
    with torch.no_grad(), ExitStack() as stack:
        if has_computed(model):  # while it trains, to ask for a parametrized weight may change what it remembers
            stack.enter_context(undisturbed(model))
            stack.enter_context(parametrize.cached())
        parameters = owned_by(model)
        blocks = decide(model, parameters, advised, call.settings, call.overrides, call.skip)
    parts = [
        Part(owned, blocks[owned.name], target_of(owned, blocks[owned.name], advised.advice)) for owned in parameters
    ]
    entries = in_order(model, parts, measured=False, lr=call.lr)
    for pattern in call.skip:
        if not any(pattern.fullmatch(name) for owned in parameters for name in owned.all_names):
            warnings.warn(f"skip: {pattern.pattern!r} matches no parameter's whole name", UserWarning, stacklevel=3)
    if message := _about_uncovered(entries, call.on_uncovered):
        warnings.warn(message, UserWarning, stacklevel=3)
    seed = int(torch.randint(2**31, (), device="cpu")) if call.seed is None else call.seed
    depth, warned = _forecast(advised, parts)
    report = InitReport(
        entries=entries,
        seed=seed,
        source=advised.source,
        residual=advised.residual,
        depth=depth,
        notes=(*advised.notes, *warned),
        applied=False,
    )
    return InitPlan(model, parts, report, batch, call.lr)


def _of_lost(names: Sequence[str]) -> str:
    """What is said of parameters that the plan would set, and that the model no longer has."""
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"{shown}: no longer in the model, nothing was written there; make the plan anew if others took their place"


def _forecast(advised: Advised, parts: Sequence[Part]) -> tuple[tuple[DepthPoint, ...], tuple[str, ...]]:
    """The predicted signal at every weight, with what there is to warn of."""
    if advised.forecast is None:
        return (), ()
    scales = [(part, part.scale()) for part in parts]
    stds = {id(p): scale for part, scale in scales if scale is not None for p in part.owned.originals.values()}
    names = {id(p): part.owned.name for part in parts for p in part.owned.originals.values()}
    return advised.forecast(stds, names)


def _about_uncovered(entries: Sequence[InitEntry], on_uncovered: str) -> str:
    """What to warn of where parameters are uncovered."""
    uncovered = [
        f"{entry.name} ({entry.note.removesuffix(WOULD_TELL)})" for entry in entries if entry.rule == "uncovered"
    ]
    if not uncovered or on_uncovered == "ignore":
        return ""
    traced = any(entry.rule == "uncovered" and entry.note.endswith(WOULD_TELL) for entry in entries)
    message = (
        f"{len(uncovered)} parameters are not covered and keep their values: {', '.join(uncovered)}."
        f" {'Give example_inputs= to have their use traced, say' if traced else 'Say'} what to do by overrides= or"
        f" @register_initializer(TheModule), or leave them alone by skip=[...]"
    )
    if on_uncovered == "raise":
        raise ValueError(f"{message}; nothing was changed")
    return message
