"""The arguments that `init_weights` and `plan_init` share, checked before anything else happens."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_gradhealth.init.fans import MODES
from lightning_gradhealth.init.gains import Nonlinearity, gain
from lightning_gradhealth.init.overrides import Override, Overrides, check_overrides
from lightning_gradhealth.init.residual import RESIDUAL
from lightning_gradhealth.init.schemes import DISTRIBUTIONS, SCHEMES
from lightning_gradhealth.init.settings import Settings
from lightning_gradhealth.validation import check_choice, check_int, check_number, check_regexes

KEEP = ("deliberate", "nothing")


@dataclass(frozen=True)
class Call:
    """The arguments of `init_weights` and `plan_init`, checked."""

    settings: Settings
    nonlinearity: Nonlinearity
    overrides: Sequence[Override]
    residual: str
    keep: str
    skip: Sequence[re.Pattern[str]]
    seed: int | None
    lr: float | None
    on_uncovered: str


def check_call(
    scheme: str,
    distribution: str,
    mode: str | None,
    nonlinearity: Nonlinearity,
    gamma: float,
    overrides: Overrides,
    residual: str,
    keep: str,
    skip: str | Sequence[str],
    seed: int | None,
    lr: float | None,
    on_uncovered: str,
) -> Call:
    """Check the arguments of `init_weights`, as far as that needs no model.

    Raises:
        TypeError: `seed` is no integer, `gamma` or `lr` no number, or `overrides` are no pairs.
        ValueError: An argument is out of range.
    """
    key = scheme.lower() if isinstance(scheme, str) else scheme  # "He" and "Xavier" are names of people
    check_choice("scheme", key, SCHEMES)
    if mode is not None:
        check_choice("mode", mode, MODES)
    check_choice("distribution", distribution, DISTRIBUTIONS)
    check_choice("on_uncovered", on_uncovered, ("warn", "raise", "ignore"))
    check_choice("residual", residual, RESIDUAL)
    check_choice("keep", keep, KEEP)
    check_number("gamma", gamma, "leave it out for the scheme's own scale")
    if seed is not None:
        seed = check_int("seed", seed, None, "None draws one from torch's global state", "an int or None")
    if lr is not None:
        lr = check_number("lr", lr, "give the optimizer's learning rate, or leave it out")
    chosen = SCHEMES[key]
    found = isinstance(nonlinearity, str) and nonlinearity == "auto"
    own = gain(chosen.nonlinearity if found else nonlinearity)
    settings = Settings(chosen, distribution, mode, own, float(gamma), gain_given=not found)
    wishes = check_overrides(overrides)
    return Call(settings, nonlinearity, wishes, residual, keep, _patterns(skip), seed, lr, on_uncovered)


def _patterns(skip: str | Sequence[str]) -> list[re.Pattern[str]]:
    remedy = r'they match whole names of parameters, such as r"head\..*"'
    return [re.compile(pattern) for pattern in check_regexes("skip", skip, remedy)]
