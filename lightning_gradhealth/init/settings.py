"""How a weight is drawn: what the call says, what an override says instead, and what is known of the parameter."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_gradhealth.init.advice import Advice
from lightning_gradhealth.init.schemes import AUTO, LECUN, SCHEMES, Scheme

OVERRIDE = "override"  # how a gain or a std was found that a person has given


@dataclass(frozen=True)
class Settings:
    """How weights are drawn, for the whole call or, by an override, for one parameter.

    Attributes:
        scheme: The scheme.
        distribution: The law of the numbers.
        mode: The fan to divide by; None: the scheme's own.
        gain: The gain where neither the parameter's advice nor an initializer gives one.
        gamma: The factor on every gain.
        gain_given: The call has named the nonlinearity, so that the gain holds for any scheme.
        fixed_gain: An override's gain, which neither an initializer nor a residual factor changes.
        std: An override's standard deviation, which takes the place of the formula.
        names_scheme: The scheme is an override's.
        note: Which override speaks.
    """

    scheme: Scheme
    distribution: str
    mode: str | None
    gain: float
    gamma: float
    gain_given: bool = False
    fixed_gain: float | None = None
    std: float | None = None
    names_scheme: bool = False
    note: str = ""


@dataclass(frozen=True)
class Recipe:
    """What comes of the settings for one parameter; `factor` is that of a residual branch and of a free size."""

    scheme: Scheme
    distribution: str
    mode: str
    gain: float
    gamma: float
    factor: float = 1.0
    found: str = ""
    follows: str = ""
    note: str = ""


def recipe(settings: Settings, advice: Advice | None, gain: float | None) -> Recipe:
    """Join settings, advice and the gain that an initializer asks for (None: it leaves that open)."""
    scheme, found, follows, size = settings.scheme, "", "", 1.0
    factor = 1.0 if advice is None else advice.factor
    if scheme is AUTO:
        scheme = LECUN if advice is None or not advice.scheme else SCHEMES[advice.scheme]
        if settings.fixed_gain is None and gain is None and advice is not None and advice.gain is not None:
            gain, found, follows, size = advice.gain, advice.found, advice.follows, advice.size
    if settings.fixed_gain is not None:
        gain, factor, found = settings.fixed_gain, 1.0, OVERRIDE
    drawn = advice is not None and advice.role in ("weight", "lookup")
    notes = [settings.note, advice.note if advice is not None and drawn else ""]
    if factor not in (0.0, 1.0):
        notes.append(f"std times {factor:.3g} for its residual branch")
    if advice is not None and size != 1:
        notes.append(f"std times {size:.3g}: {advice.why_size}")
    return Recipe(
        scheme=scheme,
        distribution=_distribution(settings, advice),
        mode=settings.mode or scheme.mode,
        gain=settings.gain if gain is None else gain,
        gamma=settings.gamma,
        factor=factor * size,
        found=found,
        follows=follows,
        note=joined(*notes),
    )


def _distribution(settings: Settings, advice: Advice | None) -> str:
    """That of the call, unless it is the default and the rule names another."""
    if advice is None or settings.scheme is not AUTO or settings.distribution != "normal":
        return settings.distribution
    return advice.distribution or settings.distribution


def joined(*notes: str) -> str:
    """The notes that say something, in one line."""
    return "; ".join(filter(None, notes))
