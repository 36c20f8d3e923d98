"""`gradhealth explain`: what a condition means."""

from __future__ import annotations

import textwrap

from lightning_gradhealth.cli.misuse import MisuseError
from lightning_gradhealth.records import Condition
from lightning_gradhealth.rules.meaning import MEANINGS
from lightning_gradhealth.validation import check_choice

_WIDTH = 80


def run(condition: str = "") -> int:
    """Say what a condition means, when it is found, and what to do; without one, list all.

    Args:
        condition: The condition, as exploding_gradients.
    """
    if not condition:
        for each, meaning in MEANINGS.items():
            print(f"{each}\n{_block(meaning.what)}")
        print("\nMore of one of them: gradhealth explain CONDITION")
        return 0
    try:
        known = Condition(check_choice("CONDITION", condition.replace("-", "_"), [each.value for each in Condition]))
    except ValueError as error:
        raise MisuseError(str(error)) from None
    meaning = MEANINGS[known].told()
    print(f"{known}\n{_block(meaning.what)}\n")
    for title, text in (("when", meaning.when), ("what to do", meaning.remedy), ("source", meaning.source)):
        print(f"{title}:\n{_block(text)}\n")
    print("Figures stand behind their names in gh.Thresholds, which has their reasons.")
    return 0


def _block(text: str) -> str:
    return textwrap.fill(text, _WIDTH, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
