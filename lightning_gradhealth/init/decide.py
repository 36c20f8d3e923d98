"""What becomes of every parameter: who speaks first, and what is done about what nobody knows."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import nn

from lightning_gradhealth.init.advice import Advice, Advised
from lightning_gradhealth.init.blocks import Block, check_blocks
from lightning_gradhealth.init.context import InitContext
from lightning_gradhealth.init.deliberate import copies_in
from lightning_gradhealth.init.handlers import reaches, visit
from lightning_gradhealth.init.overrides import Override, assign, settings_by
from lightning_gradhealth.init.owned import Owned
from lightning_gradhealth.init.settings import Settings, joined
from lightning_gradhealth.sharding import is_sharded

WOULD_TELL = "; example_inputs= would tell"  # what a note ends with where a forward pass could help


def decide(
    model: nn.Module,
    parameters: Sequence[Owned],
    advised: Advised,
    settings: Settings,
    overrides: Sequence[Override],
    skip: Sequence[re.Pattern[str]],
) -> dict[str, list[Block]]:
    """Decide about every parameter, without touching any.

    Args:
        model: The model.
        parameters: All its parameters.
        advised: What is known of them.
        settings: Those of the call.
        overrides: In order; the first match wins.
        skip: Patterns of whole names.

    Returns:
        The blocks of each parameter, by its own name.

    Raises:
        ValueError: Overrides contradict each other, skip or the model; an initializer does something wrong.
    """
    skipped = {owned.name: why for owned in parameters if (why := _why_left(owned, skip))}
    chosen = assign(overrides, parameters, {name: rule for name, (rule, _) in skipped.items()}, reaches)
    drawn = {name: settings_by(override, settings) for name, override in chosen.items() if override.wish.draws}
    context = InitContext(
        settings=settings, owned=parameters, advice=advised.advice, overrides=drawn, meant=advised.meant
    )
    for owned in parameters:
        _settle_first(context, owned, skipped.get(owned.name), chosen.get(owned.name))
    _ask_initializers(model, context, parameters)
    context.keep_meant(model)
    for owned in parameters:
        if context.is_open(owned.parameter):
            _settle_last(context, owned, chosen.get(owned.name))
    decided = {owned.name: _finished(context, owned) for owned in parameters}
    return decided | _copied(model, parameters, decided)


def _why_left(owned: Owned, skip: Sequence[re.Pattern[str]]) -> tuple[str, str] | None:
    """Rule and note for what is skipped, frozen or of a dtype that no scheme draws."""
    values = owned.parameter
    if any(pattern.fullmatch(name) for pattern in skip for name in owned.all_names):
        return "skipped", ""
    if not (values.is_floating_point() or values.is_complex()):
        return "integer", f"{values.dtype}: initialise before quantising"
    if not all(original.requires_grad for original in owned.originals.values()):
        return "frozen", ""
    if owned.computed is not None and owned.computed.refusal:
        return "uncovered", owned.computed.refusal
    return None


def _settle_first(
    context: InitContext, owned: Owned, skipped: tuple[str, str] | None, override: Override | None
) -> None:
    """Decide what no initializer is asked about."""
    known = context.advice(owned.parameter)
    by_name = override is not None and not override.by_class
    if skipped is not None:
        context.leave(owned, *skipped)
    elif override is not None and override.wish.skip:
        context.leave(owned, "skipped", f"by {override.argument}")
    elif override is not None and override.wish.value is not None:
        value = override.wish.value
        context.set_constant(owned, "override", value, f"= {value:g}, by {override.argument}")
    elif not by_name and any(getattr(p, "_no_reinit", False) for p in owned.originals.values()):
        context.leave(owned, "state", "its attribute _no_reinit says so")
    elif not by_name and known is not None and known.keep:
        context.leave(owned, "state", known.keep)


def _ask_initializers(model: nn.Module, context: InitContext, parameters: Sequence[Owned]) -> None:
    """Let every module's initializer have its say, a module's before its children's."""
    originals = [(name, original) for owned in parameters for name, original in owned.originals.items()]
    before = [original._version for _, original in originals]
    for path, module in model.named_modules():
        try:
            visit(module, context)
        except ValueError as error:
            raise ValueError(
                f"{error} (asked for module {path!r}, a {type(module).__name__}: leave it alone by skip=[...], or say"
                " what to do by @register_initializer)"
            ) from error
    for (name, original), version in zip(originals, before, strict=True):
        if original._version != version:
            raise ValueError(
                f"an initializer has written into {name!r} by itself; let the context do it, by"
                " context.weight_, constant_ or fill_, so that seeds, skip and the report hold"
            )


def _settle_last(context: InitContext, owned: Owned, override: Override | None) -> None:
    """Decide about what no initializer knows: by an override, else by what the forward pass has shown."""
    known = context.advice(owned.parameter)
    if override is not None:
        context.enter("override")
        _draw_overridden(context, owned, known, override)
    elif known is None or (known.role == "weight" and known.fan_in is None):
        kind = type(owned.module).__name__
        context.leave(owned, "uncovered", f"no initializer knows {kind}{WOULD_TELL}")
    elif known.role == "bias" and owned.parameter.ndim < 2:
        context.set_constant(owned, "traced", 0.0, joined("= 0", known.note))
    elif known.factor != 1.0 and known.role != "weight":
        context.set_constant(owned, "traced", known.factor, joined(f"= {known.factor:g}", known.note))
    elif known.role == "weight":
        context.enter("traced")
        context.weight_(owned.parameter, fan_in=known.fan_in, fan_out=known.fan_out)
    elif known.role == "unused":
        context.leave(owned, "uncovered", joined("not used in the recorded forward pass", known.note))
    elif known.role == "unknown":
        context.leave(owned, "uncovered", known.note)
    else:
        context.leave(owned, "state", known.note or _STATE.get(known.role, known.role))


_STATE = {
    "lookup": "a table that is read by index: its scale is its owner's choice",
    "state": "no weight: it is added or multiplied, not summed over",
}


def _draw_overridden(context: InitContext, owned: Owned, known: Advice | None, override: Override) -> None:
    fan_in, fan_out = (None, None) if known is None else (known.fan_in, known.fan_out)
    try:
        context.weight_(owned.parameter, fan_in=fan_in, fan_out=fan_out)
    except ValueError as error:
        raise ValueError(
            f"{override.argument} cannot draw {owned.name!r} with the shape {tuple(owned.parameter.shape)} ({error});"
            ' give its standard deviation, {"std": ...}, or a {"value": ...}'
        ) from error


def _copied(
    model: nn.Module, parameters: Sequence[Owned], decided: Mapping[str, list[Block]]
) -> dict[str, list[Block]]:
    """The blocks of frozen copies of what is drawn, by name: they get the same numbers, to be copies still."""
    by_identity, sources, found = {id(owned.parameter): owned for owned in parameters}, copies_in(model), {}
    for owned in parameters:
        source = by_identity.get(id(sources.get(id(owned.parameter))))
        left_as_frozen = decided[owned.name][0].entry.rule == "frozen" and not hasattr(owned.parameter, "_no_reinit")
        if source is None or not left_as_frozen or all(block.draw is None for block in decided[source.name]):
            continue
        note = f"a frozen copy of {source.name}, and so still"
        found[owned.name] = [
            replace(
                block,
                entry=replace(
                    block.entry, name=block.entry.name.replace(source.name, owned.name, 1), rule="copy", note=note
                ),
                stream=block.entry.name,
            )
            for block in decided[source.name]
        ]
    return found


def _finished(context: InitContext, owned: Owned) -> list[Block]:
    """The blocks of a parameter, checked, with its ties and what it is computed for in the notes."""
    blocks = list(context.blocks[owned.name].values())
    readable = not (owned.parameter.is_meta or is_sharded(owned.parameter))
    check_blocks(owned.name, owned.parameter.shape, blocks, readable=readable)
    tied = f"tied: also {', '.join(owned.names[1:])}" if len(owned.names) > 1 else ""
    embeds = any(isinstance(owner, (nn.Embedding, nn.EmbeddingBag)) for owner in owned.owners)
    if embeds and blocks[0].entry.fan is not None and blocks[0].entry.rule not in ("Embedding", "EmbeddingBag"):
        tied = joined("a table of embeddings, drawn as the weight that it also is", tied)
    return [replace(block, entry=replace(block.entry, note=joined(block.entry.note, tied))) for block in blocks]
