"""Words of prompts that say something exact: the tempo, and how many beats a bar has."""

from __future__ import annotations

import re

_TEMPO = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)\s*(?:bpm|beats per minute)\b|\btempo (\d+(?:\.\d+)?)\b", re.IGNORECASE)


def states_tempo(prompt: str) -> bool:
    """Tell whether a prompt states a tempo, or several."""
    return _TEMPO.search(prompt) is not None


def tempo_of(prompt: str) -> float | None:
    """The beats per minute that a prompt states; None where it states none, or several."""
    found = {float(match[1] or match[2]) for match in _TEMPO.finditer(prompt)}
    return found.pop() if len(found) == 1 else None


def beats_of(prompt: str) -> int:
    """Beats of a bar: 3 of a waltz, otherwise 4."""
    return 3 if re.search(r"\bwaltz", prompt, re.IGNORECASE) else 4
