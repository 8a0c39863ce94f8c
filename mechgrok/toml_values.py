"""Nested settings as TOML and Python hold them."""

from collections.abc import Iterator
from typing import Any


def tuples(value: Any) -> Any:
    """TOML arrays as tuples, which is what frozen settings hold."""
    if isinstance(value, dict):
        return {key: tuples(item) for key, item in value.items()}
    return tuple(tuples(item) for item in value) if isinstance(value, list) else value


def without_none(value: Any) -> Any:
    """TOML has no null: an absent key means the default, which is None wherever None is allowed."""
    if isinstance(value, dict):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    return [without_none(item) for item in value] if isinstance(value, list) else value


def flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(key.of.keys, value) of every value that is no dict."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from flat(item, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, value
