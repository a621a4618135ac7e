"""Results of commands, as JSON or as text."""

from __future__ import annotations

import json
from typing import Any


def print_result(as_json: bool, data: Any, text: str) -> None:
    """Print `data` as JSON where that is asked for, and `text` otherwise."""
    print(json.dumps(without_nan(data), indent=2) if as_json else text)


def without_nan(value: Any) -> Any:
    """Plain values for JSON, which has no NaN and no infinity: None stands for them."""
    return json.loads(json.dumps(value), parse_constant=lambda _: None)
