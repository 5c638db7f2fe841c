# SPDX-License-Identifier: Apache-2.0
"""Types of dataclass fields that are filled from a file: YAML gives a text where a flag is due."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

# Annotations, as text, and what may stand there; other annotations are left to the dataclass.
_EXPECTED: dict[Any, tuple[tuple[type, ...], str]] = {
    'bool': ((bool,), 'true or false'),
    'int': ((int,), 'an integer'),
    'float': ((int, float), 'a number'),
    'str': ((str,), 'a text'),
}


def check_field_types(owner: str, spec: Any) -> None:
    """Check the fields of a dataclass that are annotated as bool, int, float or str.

    owner: prefix of the message. A bool is no number. The module of the dataclass must postpone
    the evaluation of annotations, so that they are text.

    Raises
    ------
    ValueError
        naming the first field of another type.

    """
    for field in fields(spec):
        if field.type not in _EXPECTED:
            continue
        value, (types, expected) = getattr(spec, field.name), _EXPECTED[field.type]
        # To Python a bool is an int.
        if not isinstance(value, types) or (isinstance(value, bool) and field.type != 'bool'):
            raise ValueError(f'{owner} {field.name} must be {expected}, got {value!r}')
