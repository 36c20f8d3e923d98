"""`overrides=`: what a person wants done to some parameters whatever everybody else says; the first match wins."""

from __future__ import annotations

import difflib
import math
import numbers
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from lightning_gradhealth.init.fans import MODES
from lightning_gradhealth.init.gains import gain as gain_of
from lightning_gradhealth.init.owned import Owned
from lightning_gradhealth.init.schemes import DISTRIBUTIONS, SCHEMES
from lightning_gradhealth.init.settings import Settings
from lightning_gradhealth.validation import check_choice, check_number, wrong

Selector = type[nn.Module] | str | Callable[[str, Tensor], bool]
Action = str | float | Mapping[str, Any]
Overrides = Sequence[tuple[Selector, Action]] | Mapping[Selector, Action]

_WORDS = ("skip", "zeros", "ones")
_KEYS = ("scheme", "gain", "gamma", "mode", "distribution", "std", "value")
_APART = {
    "std": ("scheme", "gain", "gamma", "mode"),
    "value": ("scheme", "gain", "gamma", "mode", "distribution", "std"),
}


@dataclass(frozen=True)
class Wish:
    """What an override wants: one of "leave it alone", a constant, or changes of the settings."""

    skip: bool = False
    value: float | None = None
    changes: Mapping[str, Any] | None = None

    @property
    def draws(self) -> bool:
        """Whether it speaks of how a weight is drawn."""
        return self.changes is not None


@dataclass(frozen=True)
class Override:
    """One entry of `overrides=`, checked.

    Attributes:
        argument: What an error calls it.
        selector: A class of modules, a pattern of whole names, or a predicate.
        wish: What is to be done.
    """

    argument: str
    selector: Any
    wish: Wish

    @property
    def by_class(self) -> bool:
        """Whether it speaks of a class of modules rather than of parameters by name."""
        return isinstance(self.selector, type)

    def selects(self, owned: Owned) -> bool:
        """Whether it speaks of a parameter, by any of its names or owners."""
        if isinstance(self.selector, type):
            return any(isinstance(owner, self.selector) for owner in owned.owners)
        if isinstance(self.selector, re.Pattern):
            return any(self.selector.fullmatch(name) for name in owned.all_names)
        return any(bool(self.selector(name, owned.parameter)) for name in owned.names)


def check_overrides(overrides: Overrides) -> list[Override]:
    """Return the overrides, checked as far as that needs no model.

    Raises:
        TypeError: They are no pairs, or a selector or an action is of no known kind.
        ValueError: A regular expression, an action or one of its keys is wrong, or keys contradict each other.
    """
    pairs = list(overrides.items()) if isinstance(overrides, Mapping) else overrides
    if isinstance(pairs, (str, bytes)) or not isinstance(pairs, Sequence):
        raise TypeError(_no_pairs(overrides))
    checked = []
    for index, pair in enumerate(pairs):
        if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
            raise TypeError(_no_pairs(pair))
        argument = f"overrides[{index}]"
        checked.append(Override(argument, _selector(argument, pair[0]), _wish(argument, pair[1])))
    return checked


def _no_pairs(value: object) -> str:
    return wrong("overrides", "pairs (selector, action)", value, 'write overrides=[(nn.Linear, "xavier")]')


def _selector(argument: str, selector: Any) -> Any:
    if isinstance(selector, type):
        if issubclass(selector, nn.Module):
            return selector
    elif isinstance(selector, (str, re.Pattern)):
        try:
            return re.compile(selector)
        except re.error as error:
            raise ValueError(
                f"{argument} must select by a regular expression, got {selector!r} ({error}); it matches whole names"
                r' of parameters, such as r"head\..*"'
            ) from error
    elif callable(selector) and not isinstance(selector, nn.Module):
        return selector
    raise TypeError(
        f"{argument} must select by a class of modules, a regular expression or a predicate fn(name, parameter), got"
        f' {selector!r}; write nn.Linear, r"head\\..*" or lambda name, parameter: ...'
    )


def _wish(argument: str, action: Any) -> Wish:
    if isinstance(action, str):
        word = action.lower()
        check_choice(argument, word, (*SCHEMES, *_WORDS))
        if word in _WORDS:
            return Wish(skip=word == "skip", value=None if word == "skip" else float(word == "ones"))
        return Wish(changes={"scheme": word})
    if isinstance(action, numbers.Real) and not isinstance(action, bool):
        check_number(f"{argument} as a gain", action, 'write "zeros" to set it to 0')
        return Wish(changes={"gain": float(action)})
    if isinstance(action, Mapping):
        return _from_keys(argument, action)
    raise TypeError(
        f'{argument} must say what to do by a scheme, "skip", "zeros", "ones", a gain or a dict of'
        f' {", ".join(_KEYS)}, got {action!r}; write {{"std": 0.02}}, for example'
    )


def _from_keys(argument: str, action: Mapping[str, Any]) -> Wish:
    if not action:
        raise ValueError(f"{argument} must say what to do, got {{}}; give one of {', '.join(_KEYS)}")
    for key in action:
        if key not in _KEYS:
            close = difflib.get_close_matches(str(key), _KEYS, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"{argument} must have keys among {', '.join(_KEYS)}, got {key!r}{hint}")
    for key, others in _APART.items():
        if key in action and (clash := [other for other in others if other in action]):
            raise ValueError(
                f"{argument} contradicts itself: {key!r} and {clash[0]!r} both say how large the weight is; keep one"
            )
    if "value" in action:
        value = check_number(f"{argument}['value']", action["value"], "every element gets it", above=-math.inf)
        return Wish(value=value)
    changes = dict(action)
    if "scheme" in changes:
        changes["scheme"] = str(changes["scheme"]).lower()
        check_choice(f"{argument}['scheme']", changes["scheme"], SCHEMES)
    for key, known in (("mode", MODES), ("distribution", DISTRIBUTIONS)):
        if key in changes:
            check_choice(f"{argument}[{key!r}]", changes[key], known)
    for key in ("gain", "gamma", "std"):
        if key in changes:
            changes[key] = check_number(
                f"{argument}[{key!r}]", changes[key], 'leave it out, or write "zeros" to set it to 0'
            )
    return Wish(changes=changes)


def settings_by(override: Override, call: Settings) -> Settings:
    """The settings of the call with an override's changes."""
    changes = override.wish.changes or {}
    settings = replace(call, note=f"by {override.argument}")
    if "scheme" in changes:
        scheme = SCHEMES[changes["scheme"]]
        own = call.gain if call.gain_given else gain_of(scheme.nonlinearity)
        settings = replace(settings, scheme=scheme, gain=own, names_scheme=True)
    if "gain" in changes:
        settings = replace(settings, fixed_gain=float(changes["gain"]))
    for key in ("gamma", "mode", "distribution", "std"):
        if key in changes:
            settings = replace(settings, **{key: changes[key]})
    return settings


def assign(
    overrides: Sequence[Override],
    parameters: Sequence[Owned],
    skipped: Mapping[str, str],
    reaches: Callable[[Owned, bool], bool],
) -> dict[str, Override]:
    """Which override speaks for which parameter, by its own name.

    What is frozen, skipped or no real floating number stays as it is.

    Args:
        overrides: In order.
        parameters: All of the model.
        skipped: Why some of them are left alone, by name: "skipped", "frozen" and the like.
        reaches: Whether a scheme, a gain or a std means a parameter, selected by class (True) or by name.

    Raises:
        ValueError: An override matches nothing, or nothing that it could reach; all that it reaches was taken by
            earlier ones; or a parameter that it names is skipped, too.
    """
    taken: dict[str, Override] = {}
    for override in overrides:
        matches = [owned for owned in parameters if override.selects(owned)]
        if not matches:
            raise ValueError(f"{override.argument} matches no parameter: {_shown(override)} {_hint(override)}")
        for owned in matches:
            if skipped.get(owned.name) == "skipped" and not (override.by_class or override.wish.skip):
                raise ValueError(
                    f"skip and {override.argument} both speak of {owned.name!r}; leave it out of one of them"
                )
        reached = [
            owned
            for owned in matches
            if owned.name not in skipped and (not override.wish.draws or reaches(owned, override.by_class))
        ]
        if not reached:
            reasons = {skipped.get(owned.name, "no weight") for owned in matches}
            raise ValueError(
                f"{override.argument} matches only parameters that it cannot set ({', '.join(sorted(reasons))}), such"
                f" as {matches[0].name!r}; leave it out, or select weights that are trained"
            )
        new = [owned for owned in reached if owned.name not in taken]
        if not new:
            earlier = taken[reached[0].name].argument
            raise ValueError(
                f"{override.argument} is never used: {earlier} and those before it take all that it matches, such as"
                f" {reached[0].name!r}; put it before {earlier}, since the first match wins"
            )
        taken.update((owned.name, override) for owned in new)
    return taken


def _shown(override: Override) -> str:
    if isinstance(override.selector, re.Pattern):
        return f"the pattern {override.selector.pattern!r}"
    return f"{getattr(override.selector, '__name__', override.selector)}"


def _hint(override: Override) -> str:
    if override.by_class:
        return "owns no parameter in this model; select by the class of the module that owns it, or by name"
    if isinstance(override.selector, re.Pattern):
        return r'must match whole names, such as r"head\..*"; see model.named_parameters()'
    return "is true for none; it is called with the name and the parameter"
