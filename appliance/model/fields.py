"""Typed reading of a configuration's fields: a value of the wrong type or range is a ModelError that names file, field and value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from appliance.errors import ModelError


class Fields:
    """A JSON object or GGUF metadata. A field that is null counts as absent, as transformers' configurations have it."""

    def __init__(self, values: Mapping[str, Any], source: str, prefix: str = "") -> None:
        self._values = values
        self.source = source
        self._prefix = prefix

    def has(self, name: str) -> bool:
        return self._get(name) is not None

    def count(self, name: str, default: int | None = None, *, least: int = 1) -> int:
        """A whole number >= `least`. Raises ModelError where it is absent and has no default."""
        value = self._get(name)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            self._fail(name, value, f"a whole number of at least {least}")
        return value

    def optional_count(self, name: str, default: int | None = None) -> int | None:
        """None where the field stands there as null; `default` where it does not stand there."""
        if self._prefix + name not in self._values:
            return default
        return self.count(name) if self.has(name) else None

    def number(self, name: str, default: float | None = None) -> float:
        """A number above 0. Raises ModelError where it is absent and has no default."""
        value = self._get(name)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            self._fail(name, value, "a number above 0")
        return float(value)

    def optional_number(self, name: str) -> float | None:
        return self.number(name) if self.has(name) else None

    def flag(self, name: str, default: bool) -> bool:
        value = self._get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            self._fail(name, value, "true or false")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        value = self._get(name)
        if value is None and default is not None:
            return default
        if not isinstance(value, str):
            self._fail(name, value, "a string")
        return value

    def texts(self, name: str) -> tuple[str, ...] | None:
        value = self._get(name)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            self._fail(name, value, "a list of strings")
        return tuple(value)

    def table(self, name: str) -> Fields:
        """A nested object; empty where it is absent."""
        value = self._get(name)
        if value is None:
            return Fields({}, self.source)
        if not isinstance(value, dict):
            self._fail(name, value, "an object")
        return Fields({f"{name}.{key}": item for key, item in value.items()}, self.source, prefix=f"{name}.")

    def optional_id(self, name: str) -> int | None:
        ids = self.ids(name)
        return ids[0] if ids else None

    def ids(self, name: str) -> tuple[int, ...]:
        """Token ids: one, a list of them, or none."""
        value = self._get(name)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if not all(isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in ids):
            self._fail(name, value, "a token id or a list of them")
        return tuple(ids)

    def _get(self, name: str) -> Any:
        return self._values.get(self._prefix + name)

    def _fail(self, name: str, value: object, allowed: str) -> NoReturn:
        what = "is missing" if value is None else f"is {value!r}"
        raise ModelError(f"{self.source}: {self._prefix}{name} {what}; it must be {allowed}")
