"""Results of commands, as JSON or as text."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any


def print_result(as_json: bool, data: Any, text: str) -> None:
    """Print `data` as JSON where that is asked for, and `text` otherwise."""
    print(json.dumps(without_nan(data), indent=2) if as_json else text)


def without_nan(value: Any) -> Any:
    """Plain values for JSON, which has no NaN and no infinity: None stands for them."""
    if isinstance(value, Mapping):
        return {key: without_nan(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
