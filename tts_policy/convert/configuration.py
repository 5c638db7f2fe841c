# SPDX-License-Identifier: Apache-2.0
"""Typed reading of a configuration; every error names the field, what was expected and found."""

from __future__ import annotations

from typing import Any, TypeVar

from tts_policy.convert.restricted_pickle import CheckpointError

Value = TypeVar('Value')
_REQUIRED: Any = object()


class Configuration:
    """One mapping of a configuration, with the path that leads to it."""

    def __init__(self, path: str, data: Any) -> None:
        """Wrap a mapping; raises CheckpointError for anything else."""
        if not isinstance(data, dict):
            raise CheckpointError(f'{path} must be a mapping, got {str(data)[:80]!r}')
        self._path, self._data = path, data

    @property
    def keys(self) -> list[str]:
        """Keys in the order of the file."""
        return list(self._data)

    @property
    def given(self) -> list[str]:
        """Keys whose value is not null."""
        return [key for key, value in self._data.items() if value is not None]

    def allow(self, keys: str) -> None:
        """Raise CheckpointError if there is a key that is not among `keys` (one string)."""
        unknown = sorted(set(self._data) - set(keys.split()))
        if unknown:
            raise CheckpointError(f'{self._path} has unknown options: {", ".join(unknown[:5])}')

    def section(self, key: str) -> Configuration:
        """Mapping of a key."""
        return Configuration(f'{self._path}.{key}', self._data.get(key))

    def sections(self, key: str) -> list[Configuration]:
        """Mappings of a list."""
        values = self._typed(key, list, _REQUIRED)
        return [Configuration(f'{self._path}.{key}[{n}]', v) for n, v in enumerate(values)]

    def integer(self, key: str, default: int = _REQUIRED) -> int:
        """Integer of a key."""
        return self._typed(key, int, default)

    def flag(self, key: str, default: bool = _REQUIRED) -> bool:
        """Boolean of a key."""
        return self._typed(key, bool, default)

    def text(self, key: str, default: str = _REQUIRED) -> str:
        """String of a key."""
        return self._typed(key, str, default)

    def number(self, key: str, default: float = _REQUIRED) -> float:
        """Integer or real number of a key, as a float."""
        value = self._data.get(key)
        return float(value) if type(value) is int else self._typed(key, float, default)

    def integers(self, key: str, default: list[int] = _REQUIRED) -> list[int]:
        """Positive integers of a key; none where the value is null and there is a default."""
        if key in self._data and self._data[key] is None and default is not _REQUIRED:
            return []
        values = self._typed(key, list, default)
        if not all(type(value) is int and 0 < value < 1 << 20 for value in values):
            raise CheckpointError(f'{self._path}.{key} must be positive integers, got {values}')
        return values

    def _typed(self, key: str, kind: type[Value], default: Value) -> Value:
        value = self._data.get(key)
        if value is None and default is not _REQUIRED:
            return default
        if type(value) is not kind:
            raise CheckpointError(
                f'{self._path}.{key} must be {kind.__name__}, got {str(value)[:80]!r}'
            )
        return value
