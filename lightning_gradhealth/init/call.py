"""The arguments that `init_weights` and `plan_init` share, checked before anything else happens."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_gradhealth.init.checks import one_of, positive
from lightning_gradhealth.init.fans import MODES
from lightning_gradhealth.init.gains import Nonlinearity, gain
from lightning_gradhealth.init.overrides import Override, Overrides, check_overrides
from lightning_gradhealth.init.residual import RESIDUAL
from lightning_gradhealth.init.schemes import DISTRIBUTIONS, SCHEMES
from lightning_gradhealth.init.settings import Settings


@dataclass(frozen=True)
class Call:
    """The arguments of `init_weights` and `plan_init`, checked."""

    settings: Settings
    nonlinearity: Nonlinearity
    overrides: Sequence[Override]
    residual: str
    skip: Sequence[re.Pattern[str]]
    seed: int | None
    on_uncovered: str


def check_call(
    scheme: str,
    distribution: str,
    mode: str | None,
    nonlinearity: Nonlinearity,
    gamma: float,
    overrides: Overrides,
    residual: str,
    skip: str | Sequence[str],
    seed: int | None,
    on_uncovered: str,
) -> Call:
    """Check the arguments of `init_weights`, as far as that needs no model.

    Raises:
        TypeError: `seed` is no integer, or `overrides` are no pairs.
        ValueError: An argument is out of range.
    """
    key = scheme.lower() if isinstance(scheme, str) else scheme
    one_of("scheme", key, SCHEMES)
    if mode is not None:
        one_of("mode", mode, MODES)
    one_of("distribution", distribution, DISTRIBUTIONS)
    one_of("on_uncovered", on_uncovered, ("warn", "raise", "ignore"))
    one_of("residual", residual, RESIDUAL)
    positive("gamma", gamma, "leave it out for the scheme's own scale")
    if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool)):
        raise TypeError(f"seed must be an int or None, got {seed!r}; None draws one from torch's global state")
    chosen = SCHEMES[key]
    found = isinstance(nonlinearity, str) and nonlinearity == "auto"
    own = gain(chosen.nonlinearity if found else nonlinearity)
    settings = Settings(chosen, distribution, mode, own, gamma, gain_given=not found)
    wishes = check_overrides(overrides)
    return Call(settings, nonlinearity, wishes, residual, _patterns(skip), seed, on_uncovered)


def _patterns(skip: str | Sequence[str]) -> list[re.Pattern[str]]:
    try:
        return [re.compile(pattern) for pattern in ([skip] if isinstance(skip, str) else skip)]
    except (re.error, TypeError) as error:
        raise ValueError(
            f"skip must be regular expressions, got {skip!r} ({error}); they match whole names of parameters,"
            r' such as r"head\..*"'
        ) from error
