"""`init_weights`: one call for a whole model, with an account of every parameter."""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from lightning_gradhealth.init.checks import one_of, positive
from lightning_gradhealth.init.context import InitContext, Owned, Task
from lightning_gradhealth.init.fans import MODES
from lightning_gradhealth.init.gains import Nonlinearity, gain
from lightning_gradhealth.init.handlers import visit
from lightning_gradhealth.init.schemes import DISTRIBUTIONS, SCHEMES, why_not_whole
from lightning_gradhealth.layers import clean_name, unwrap
from lightning_gradhealth.records import InitEntry, InitReport


def init_weights(
    model: nn.Module,
    *,
    scheme: str,
    distribution: str = "normal",
    mode: str | None = None,
    nonlinearity: Nonlinearity = None,
    gamma: float = 1.0,
    skip: str | Sequence[str] = (),
    seed: int | None = None,
    on_uncovered: str = "warn",
) -> InitReport:
    """Initialise all parameters of a model in place, each by the kind of module that owns it.

    Weights get the variance `(gamma * gain)^2 / fan`, biases 0, norm layers 1 and 0. Recurrent layers are
    drawn gate by gate, with orthogonal recurrent weights and a forget bias of 1 in total, attention
    projection by projection; these and embeddings have gain 1 (an `nn.RNN` of ReLUs theirs). A tied parameter
    is drawn once, by its first owner; a padding row, buffers and frozen parameters stay as they are.

    Each parameter has random numbers of its own, made from the seed and its name: the order of the modules,
    device, dtype and memory format change nothing.

    Args:
        model: The model; its lazy modules initialised, its parameters on a real device and not sharded.
        scheme: "he" ("kaiming"), "xavier" ("glorot") or "lecun".
        distribution: "normal", "uniform" or "truncated_normal" (cut at two sigma, std corrected).
        mode: "fan_in", "fan_out", "fan_avg" or "fan_geo"; None: the scheme's own (He and LeCun fan_in,
            Xavier fan_avg).
        nonlinearity: The activation behind the layers: a name, module or elementwise function; None: the
            scheme's own (He ReLU, the others linear).
        gamma: A factor on every gain.
        skip: Regular expressions (or one) that match the whole names of parameters to leave alone.
        seed: Where all random numbers come from; the global random state then stays as it is. None: a seed
            is drawn from the global state, so that `torch.manual_seed` rules. On several processes give a
            seed, or set the global one alike.
        on_uncovered: What to do where no initializer knows a parameter: "warn", "raise" (before anything
            is changed) or "ignore".

    Returns:
        What was done to every parameter, and why.

    Raises:
        TypeError: `model` is no module, or `seed` no integer.
        ValueError: An argument is out of range; a parameter is lazy, on the meta device or sharded; or one
            is uncovered and `on_uncovered="raise"`.

    Example:
        >>> model = nn.Sequential(nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 10))
        >>> report = init_weights(model, scheme="he", seed=0)
        >>> [(entry.name, entry.fan) for entry in report.entries]
        [('0.weight', 512.0), ('0.bias', None), ('2.weight', 256.0), ('2.bias', None)]
        >>> abs(model[0].weight.var().item() * 512 - 2) < 0.05
        True

    Paper: He et al. 2015 (arXiv:1502.01852); Glorot and Bengio 2010; LeCun et al. 1998; for recurrent
    layers Saxe et al. 2014 (arXiv:1312.6120) and Jozefowicz et al. 2015.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}; pass the model itself")
    if isinstance(scheme, str) and scheme.lower() == "auto":
        raise ValueError(f'scheme "auto" is not available yet; choose one of {", ".join(sorted(SCHEMES))}')
    key = scheme.lower() if isinstance(scheme, str) else scheme
    one_of("scheme", key, SCHEMES)
    chosen = SCHEMES[key]
    mode = chosen.mode if mode is None else mode
    one_of("mode", mode, MODES)
    one_of("distribution", distribution, DISTRIBUTIONS)
    one_of("on_uncovered", on_uncovered, ("warn", "raise", "ignore"))
    positive("gamma", gamma, "leave it out for the scheme's own scale")
    if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool)):
        raise TypeError(f"seed must be an int or None, got {seed!r}; None draws one from torch's global state")
    patterns = _patterns(skip)
    activation_gain = gain(chosen.nonlinearity if nonlinearity is None else nonlinearity)

    model = unwrap(model)
    owned = _owned(model)
    context = InitContext(
        scheme=chosen, distribution=distribution, mode=mode, gain=activation_gain, gamma=gamma, owned=owned
    )
    with torch.no_grad():
        tasks = _plan(model, context, list(owned.values()), patterns)
        _report_uncovered([task.entry for task in tasks], on_uncovered)
        if seed is None:
            seed = int(torch.randint(2**31, (), device="cpu"))
        for task in tasks:
            task.run(_generator(seed, task.entry.name))
        return InitReport(entries=tuple(_measured(task) for task in tasks), seed=seed)


def _patterns(skip: str | Sequence[str]) -> list[re.Pattern[str]]:
    try:
        return [re.compile(pattern) for pattern in ([skip] if isinstance(skip, str) else skip)]
    except (re.error, TypeError) as error:
        raise ValueError(
            f"skip must be regular expressions, got {skip!r} ({error}); they match whole names of parameters,"
            r' such as r"head\..*"'
        ) from error


def _owned(model: nn.Module) -> dict[int, Owned]:
    """All parameters by identity, in registration order, each with its first owner and all its names."""
    found: dict[int, Owned] = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        name = clean_name(path)
        if (reason := why_not_whole(parameter)) is not None:
            raise ValueError(f"the parameter {name!r} of model must hold its values, but it {reason}")
        first = found.get(id(parameter))
        module = model.get_submodule(path.rpartition(".")[0])
        padding = module.padding_idx if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) else None
        if first is None:
            found[id(parameter)] = Owned(parameter, module, (name,), padding)
        else:
            padding = padding if first.padding is None else first.padding
            found[id(parameter)] = first._replace(names=(*first.names, name), padding=padding)
    return found


def _plan(model: nn.Module, context: InitContext, parameters: list[Owned], skip: list[re.Pattern[str]]) -> list[Task]:
    """Decide about every parameter, without touching any."""
    _set_aside(context, parameters, skip)
    _ask_initializers(model, context, parameters)
    tasks = []
    for owned in parameters:
        name, *ties = owned.names
        if name not in context.tasks:
            context.leave(owned, "uncovered", _why_uncovered(owned))
        blocks = list(context.tasks[name].values())
        _check_rows(owned, blocks)
        tied = f"tied: also {', '.join(ties)}" if ties else ""
        for task in blocks:
            note = "; ".join(filter(None, (task.entry.note, tied)))
            tasks.append(replace(task, entry=replace(task.entry, note=note)))
    return tasks


def _set_aside(context: InitContext, parameters: list[Owned], skip: list[re.Pattern[str]]) -> None:
    """Leave alone what is skipped, frozen or of a dtype that no scheme draws."""
    for pattern in skip:
        if not any(pattern.fullmatch(name) for owned in parameters for name in owned.names):
            warnings.warn(f"skip: {pattern.pattern!r} matches no parameter's whole name", UserWarning, stacklevel=4)
    for owned in parameters:
        if any(pattern.fullmatch(name) for pattern in skip for name in owned.names):
            context.leave(owned, "skipped")
        elif owned.parameter.is_complex():
            context.leave(owned, "uncovered", "complex numbers: no scheme here draws them")
        elif not owned.parameter.is_floating_point():
            context.leave(owned, "integer", f"{owned.parameter.dtype}: initialise before quantising")
        elif not owned.parameter.requires_grad:
            context.leave(owned, "frozen")


def _ask_initializers(model: nn.Module, context: InitContext, parameters: list[Owned]) -> None:
    """Let every module's initializer have its say, a module's before its children's."""
    before = [owned.parameter._version for owned in parameters]
    for path, module in model.named_modules():
        try:
            visit(module, context)
        except ValueError as error:
            raise ValueError(
                f"{error} (asked for module {path!r}, a {type(module).__name__}: leave it alone by skip=[...], or say"
                " what to do by @register_initializer)"
            ) from error
    for owned, version in zip(parameters, before, strict=True):
        if owned.parameter._version != version:
            raise ValueError(
                f"an initializer has written into {owned.names[0]!r} by itself; let the context do it, by"
                " context.weight_, constant_ or fill_, so that seeds, skip and the report hold"
            )


def _check_rows(owned: Owned, blocks: list[Task]) -> None:
    """Raise unless the blocks set each row of a parameter exactly once."""
    if all(task.rows is None for task in blocks):
        return
    times = [0] * len(owned.parameter)
    for task in blocks:
        for row in range(len(times))[slice(None) if task.rows is None else task.rows]:
            times[row] += 1
    wrong = [row for row, count in enumerate(times) if count != 1]
    if wrong:
        raise ValueError(
            f"the initializer {blocks[0].entry.rule} sets row {wrong[0]} of {owned.names[0]!r} {times[wrong[0]]} times;"
            " give each of its rows exactly one block"
        )


def _why_uncovered(owned: Owned) -> str:
    if isinstance(owned.module, ParametrizationList):
        return "parametrized: initialise before parametrizing, or assign module.weight = W"
    base, _, suffix = owned.names[0].rpartition(".")[2].rpartition("_")
    if suffix in ("g", "v", "orig") and isinstance(getattr(owned.module, base, None), Tensor):
        return f"{base} is computed from it (weight_norm, spectral_norm, pruning): initialise before that"
    return f"no initializer knows {type(owned.module).__name__}"


def _report_uncovered(entries: list[InitEntry], on_uncovered: str) -> None:
    uncovered = [f"{entry.name} ({entry.note})" for entry in entries if entry.rule == "uncovered"]
    if not uncovered or on_uncovered == "ignore":
        return
    message = (
        f"{len(uncovered)} parameters are not covered and keep their values: {', '.join(uncovered)}. Say what"
        f" to do by @register_initializer(TheModule), or leave them alone by skip=[...]"
    )
    if on_uncovered == "raise":
        raise ValueError(f"{message}; nothing was changed")
    warnings.warn(message, UserWarning, stacklevel=3)


def _generator(seed: int, name: str) -> torch.Generator:
    """A stream of random numbers that depends on the seed and the name alone (`hash` differs by process)."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest, "big") >> 1)


def _measured(task: Task) -> InitEntry:
    values = task.target
    if values.numel() < 2 or not values.is_floating_point():
        return task.entry
    precise = values if values.dtype is torch.float64 else values.float()
    return replace(task.entry, measured_std=float(precise.std()))
