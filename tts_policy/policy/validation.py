# SPDX-License-Identifier: Apache-2.0
"""Validated settings, and the one form of all error messages: `THING: expected A, got B`.

Settings are frozen pydantic dataclasses that declare their bounds. They are strict about scalars
(a bool is no number, a text is no flag), because YAML readily gives a text where a flag is due.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import wraps
from reprlib import Repr
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import AfterValidator, ConfigDict, Field, Strict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from typing_extensions import Self, dataclass_transform

Flag = Annotated[bool, Strict()]
Text = Annotated[str, Strict()]
Integer = Annotated[int, Strict()]
Number = Annotated[float, Strict(), Field(allow_inf_nan=False)]
Size = Annotated[int, Strict(), Field(ge=1, le=16384)]
# Marks a field that is written only where it is set.
WRITTEN_IF_SET = Field(exclude_if=lambda value: not value)

_Class = TypeVar('_Class', bound=type[Any])
_LONGEST = 80
_short = Repr()
_short.maxlevel = 3
_short.maxstring = _short.maxother = _short.maxlong = _LONGEST
# What pydantic expected, by its type of error; {} are filled from the error's context.
_EXPECTED = {
    'missing': 'a value',
    'int_type': 'an integer',
    'float_type': 'a number',
    'finite_number': 'a finite number',
    'bool_type': 'true or false',
    'none_required': 'nothing',
    'string_type': 'a text',
    'tuple_type': 'a list',
    'list_type': 'a list',
    'dict_type': 'a mapping',
    'dataclass_type': 'a mapping',
    'greater_than': 'more than {gt}',
    'greater_than_equal': 'at least {ge}',
    'less_than': 'less than {lt}',
    'less_than_equal': 'at most {le}',
    'multiple_of': 'a multiple of {multiple_of}',
    'too_short': 'at least {min_length} entries',
    'too_long': 'at most {max_length} entries',
    'string_too_short': 'a text of at least {min_length} characters',
    'string_too_long': 'a text of at most {max_length} characters',
    'invalid_key': 'names as keys',
    'unexpected_keyword_argument': 'no field of this name',
    'extra_forbidden': 'no field of this name',
}


def one_of(*values: str) -> AfterValidator:
    """Annotation of a text that must be one of these."""

    def check(value: str) -> str:
        if value not in values:
            raise ValueError(' or '.join(map(repr, values)))
        return value

    return AfterValidator(check)


class Mismatch(ValueError):
    """Something is not as it must be; the message is `THING: expected EXPECTED, got GOT`."""

    def __init__(self, thing: str, expected: str, got: str) -> None:
        super().__init__(thing, expected, got)
        self.thing, self.expected, self.got = thing, expected, got

    def __str__(self) -> str:
        return f'{self.thing}: expected {self.expected}, got {self.got}'


def quoted(value: object) -> str:
    """A value as a message quotes it: in one line of at most 80 characters."""
    # Unlike repr, this neither builds nor walks the whole of a huge or deeply nested value.
    try:
        return _short.repr(value)[:_LONGEST]
    except ValueError:  # Python refuses to write integers of more than 4300 digits
        return f'a huge {type(value).__name__}'


def mismatch(error: ValidationError, thing: str = '', arguments: Sequence[str] = ()) -> Mismatch:
    """Word the first problem that pydantic found.

    thing: what was validated; arguments: names of positional arguments, which pydantic numbers.
    """
    problem = error.errors(include_url=False)[0]
    parts = list(problem['loc'])
    if parts and isinstance(parts[0], int) and parts[0] < len(arguments):
        parts[0] = arguments[parts[0]]
    place = thing + ''.join(f'[{p}]' if isinstance(p, int) else f'.{p}' for p in parts)
    place = place.lstrip('.')
    context: dict[str, Any] = problem.get('ctx', {})
    reason = context.get('error')
    if isinstance(reason, Mismatch):
        return Mismatch('.'.join(filter(None, (place, reason.thing))), reason.expected, reason.got)
    template = _EXPECTED.get(problem['type'])
    if template is None:
        expected = str(reason or problem['msg'].removeprefix('Input should be '))
    else:
        expected = template.format(**context)
    got = 'nothing' if problem['type'] == 'missing' else quoted(problem['input'])
    return Mismatch(place or 'data', expected, got)


class Spec:
    """Base of settings that stand in a file; `NAME` begins messages about them."""

    NAME: ClassVar[str] = ''

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        """Inverse of `to_dict`; raises Mismatch naming the first field that is wrong."""
        try:
            return TypeAdapter(cls).validate_python(data)
        except ValidationError as error:
            raise mismatch(error, cls.NAME) from None

    def to_dict(self) -> dict[str, Any]:
        """Plain containers, as they stand in model.yaml."""
        data: dict[str, Any] = TypeAdapter(type(self)).dump_python(self, mode='json')
        return data


@dataclass_transform(frozen_default=True)
def checked(
    name: str = '', *, kw_only: bool = False, extra: Literal['forbid', 'ignore'] = 'forbid'
) -> Callable[[_Class], _Class]:
    """Make a Spec a frozen dataclass that is validated when it is made; it raises Mismatch.

    extra: what happens to fields of a mapping that the Spec does not have.
    """
    config = ConfigDict(extra=extra)

    def decorate(cls: _Class) -> _Class:
        made: Any = dataclass(frozen=True, kw_only=kw_only, config=config)(cls)
        make, names = made.__init__, [field.name for field in fields(made)]

        @wraps(make)
        def validated(self: Any, *args: Any, **kwargs: Any) -> None:
            try:
                make(self, *args, **kwargs)
            except ValidationError as error:
                raise mismatch(error, made.NAME, names) from None

        made.__init__ = validated
        made.NAME = name
        result: _Class = made
        return result

    return decorate


def check_heads(width: int, heads: int) -> None:
    """Raise Mismatch unless every head has an even number of components of the width."""
    if width % (2 * heads):
        raise Mismatch('width', f'a multiple of 2 x heads = {2 * heads}', str(width))
