"""Typed access to a JSON object from a file that anyone may have written."""

from dataclasses import dataclass
from typing import Any

from bbb_ao.errors import ModelError

# How the log writes what JSON has no numbers for.
SPECIAL = ("nan", "inf", "-inf")


@dataclass(frozen=True)
class Fields:
    """A JSON object with the place it came from. Every method takes a key, and raises a ModelError that names both."""

    values: dict[str, Any]
    where: str

    def error(self, key: str, expected: str, got: Any) -> ModelError:
        return ModelError(f"{self.where}: {key}: expected {expected}, got {got!r:.60}; fix: restore the file")

    def text(self, key: str) -> str:
        value = self.values.get(key)
        if not isinstance(value, str):
            raise self.error(key, "text", value)
        return value

    def optional_text(self, key: str) -> str | None:
        return None if self.values.get(key) is None else self.text(key)

    def flag(self, key: str) -> bool:
        return self.values.get(key) is True

    def number(self, key: str) -> float:
        return self._number(key, self.values.get(key))

    def optional_number(self, key: str) -> float | None:
        return None if self.values.get(key) is None else self.number(key)

    def integer(self, key: str) -> int:
        value = self.values.get(key)
        if type(value) is not int or not 0 <= value < 2**53:
            raise self.error(key, "a whole number", value)
        return value

    def numbers(self, key: str) -> tuple[float, ...]:
        return tuple(self._number(key, item) for item in self._list(key))

    def integers(self, key: str, count: int) -> tuple[int, ...]:
        values = self._list(key)
        if len(values) != count or any(type(value) is not int for value in values):
            raise self.error(key, f"{count} whole numbers", values)
        return tuple(values)

    def text_list(self, key: str) -> tuple[str, ...]:
        values = self._list(key)
        if not values or not all(isinstance(value, str) for value in values):
            raise self.error(key, "a list of text", values)
        return tuple(values)

    def number_map(self, key: str) -> dict[str, float]:
        return {name: self._number(key, value) for name, value in self._map(key).items()}

    def texts(self, key: str) -> dict[str, str]:
        values = self._map(key)
        if not all(isinstance(value, str) for value in values.values()):
            raise self.error(key, "text by name", values)
        return values

    def _number(self, key: str, value: Any) -> float:
        if value in SPECIAL or (isinstance(value, int | float) and not isinstance(value, bool)):
            try:
                return float(value)
            except OverflowError:
                pass
        raise self.error(key, "a number", value)

    def _list(self, key: str) -> list[Any]:
        value = self.values.get(key)
        if not isinstance(value, list):
            raise self.error(key, "a list", value)
        return value

    def _map(self, key: str) -> dict[str, Any]:
        value = self.values.get(key)
        if not isinstance(value, dict):
            raise self.error(key, "an object", value)
        return value
