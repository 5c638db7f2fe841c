# SPDX-License-Identifier: Apache-2.0
"""YAML that others wrote: bounded in size, in depth, and in what its aliases expand to.

A few hundred bytes of nested aliases stand for billions of values; whoever walks them needs
minutes and gigabytes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

MAX_CHARACTERS = 8 << 20
MAX_DEPTH = 50
MAX_VALUES = 1_000_000


class _BoundedLoader(yaml.SafeLoader):
    """Counts values as they are composed, those behind an alias as often as it is used."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._values = 0
        self._size_of: dict[int, int] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Compose one value; raises YAMLError beyond a limit."""
        is_alias = self.check_event(yaml.AliasEvent)
        before = self._values
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise yaml.YAMLError(f'YAML: expected at most {MAX_DEPTH} levels, got more')
        node = super().compose_node(parent, index)
        self._depth -= 1
        if is_alias and id(node) not in self._size_of:
            raise yaml.YAMLError('YAML: expected aliases of earlier values, got a circle')
        self._values += self._size_of[id(node)] if is_alias else 1
        if self._values > MAX_VALUES:
            raise yaml.YAMLError(f'YAML: expected at most {MAX_VALUES} values, got more')
        self._size_of.setdefault(id(node), self._values - before)
        return node


def parse_yaml(text: str) -> Any:
    """Plain containers of a text; raises yaml.YAMLError, also for one that is too large."""
    if len(text) > MAX_CHARACTERS:
        raise yaml.YAMLError(f'YAML: expected at most {MAX_CHARACTERS} characters, got more')
    loader = _BoundedLoader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def read_yaml(path: Path) -> Any:
    """Plain containers of a file; raises OSError, UnicodeDecodeError, or as `parse_yaml`."""
    with path.open(encoding='utf-8') as file:
        return parse_yaml(file.read(MAX_CHARACTERS + 1))
