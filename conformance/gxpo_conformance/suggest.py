"""What somebody who misspelt a name probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

LEAST = 0.6  # of difflib's ratio: below that a suggestion would be a guess


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """`; did you mean 'smoke'?`, to be put after a message about an unknown `word`; empty where nothing is near. Upper
    and lower case do not matter; of choices equally near, one of the same letters is taken, else the first."""
    low = word.lower()

    def nearness(choice: str) -> tuple[float, bool]:
        there = choice.lower()
        return difflib.SequenceMatcher(None, low, there).ratio(), sorted(low) == sorted(there)

    near = max(choices, key=nearness, default="")
    return f"; did you mean {near!r}?" if near and nearness(near)[0] >= LEAST else ""


def no_key(key: str, keys: Iterable[str]) -> str:
    """What to say of a key that a file may not have."""
    there = list(keys)
    return f"unknown key {key!r}{did_you_mean(key, there)} (known: {', '.join(there)})"
