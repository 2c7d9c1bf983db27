"""Results for programs: JSON that any reader takes."""

import json
import math
from collections.abc import Mapping
from typing import Any


def to_json(facts: Mapping[str, Any]) -> str:
    """JSON without NaN, which is none: null stands for it."""
    return json.dumps(_without_nan(facts), indent=1, allow_nan=False)


def to_json_line(facts: Mapping[str, Any]) -> str:
    """The same without a line break in it."""
    return json.dumps(_without_nan(facts), allow_nan=False)


def _without_nan(value: Any) -> Any:
    if type(value) is float:  # most of what there is
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _without_nan(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
