"""Hyperparameters and scores as YAML, written without a YAML package: JSON values are YAML values."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

# YAML 1.1 reads these as no strings.
_WORDS = {"y", "n", "yes", "no", "on", "off", "true", "false", "null"}


def to_yaml(values: Mapping[str, Any]) -> str:
    """One line per key; a value that is no plain data is written as its `str`.

    >>> to_yaml({"lr": 0.1, "layers": [8, 4], "name": "a"})
    'lr: 0.1\\nlayers: [8, 4]\\nname: "a"\\n'
    """
    if not values:
        return "{}\n"
    return "".join(f"{_key(key)}: {_value(value)}\n" for key, value in values.items())


def _key(key: object) -> str:
    text = str(key)
    plain = text.isidentifier() and text.isascii() and text.lower() not in _WORDS
    return text if plain else json.dumps(text)


def _value(value: Any) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return ".nan" if math.isnan(value) else ".inf" if value > 0 else "-.inf"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(str(k))}: {_value(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple, set, frozenset)):
        return "[" + ", ".join(map(_value, value)) + "]"
    if isinstance(value, (bool, int, float, str, type(None))):
        return json.dumps(value)
    if hasattr(value, "item") and getattr(value, "ndim", 1) == 0:
        return _value(value.item())
    return json.dumps(str(value))
