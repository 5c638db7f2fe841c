# SPDX-License-Identifier: Apache-2.0
"""Joint limits of a URDF, read from text that anybody in the DDS domain may have published.

Only joint names and limits are looked at. A document type declaration is refused before anything
in it is expanded, so no entity can grow or read a file; so are text that is too long and numbers
that are none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from xml.parsers import expat

MAX_BYTES = 16 << 20
# Types of a joint that moves along one axis; the others have no limits of interest.
_BOUNDED = ('revolute', 'prismatic')
_MOVING = (*_BOUNDED, 'continuous')


class UrdfError(ValueError):
    """A robot description that is not used; one line with the reason."""


@dataclass(frozen=True)
class UrdfLimits:
    """Limits of one joint in rad or m, and rad/s or m/s; infinity where it has none."""

    lower: float = -math.inf
    upper: float = math.inf
    velocity: float = math.inf


def parse_limits(text: str) -> dict[str, UrdfLimits]:
    """Limits of every moving joint by name: <limit>, and <safety_controller> where it is tighter.

    Raises
    ------
    UrdfError
        for anything that is not a well-formed URDF with sensible limits, and for every document
        type declaration.

    """
    data = text.encode('utf-8', 'replace')
    if len(data) > MAX_BYTES:
        raise UrdfError(f'robot_description: expected at most {MAX_BYTES} bytes, got {len(data)}')
    reader = _Reader()
    # The message is a string already: what encoding a declaration in it names is of no account.
    parser = expat.ParserCreate('utf-8')
    parser.StartDoctypeDeclHandler = _refuse_doctype
    parser.StartElementHandler = reader.begin
    parser.EndElementHandler = reader.end
    try:
        parser.Parse(data, True)
    except expat.ExpatError as error:
        raise UrdfError(f'robot_description: expected XML, got {error}') from error
    return reader.limits


def _refuse_doctype(name: str, *_: object) -> None:
    raise UrdfError(
        f'robot_description: expected no document type declaration, got <!DOCTYPE {name[:40]}>'
    )


class _Reader:
    """Follows the elements and keeps the limits of the joint that is open."""

    def __init__(self) -> None:
        self.limits: dict[str, UrdfLimits] = {}
        self._path: list[str] = []
        self._joint: str | None = None
        self._bounded = False

    def begin(self, tag: str, attributes: dict[str, str]) -> None:
        self._path.append(tag)
        if len(self._path) == 1 and tag != 'robot':
            raise UrdfError(f'robot_description: expected a <robot>, got <{tag[:40]}>')
        if self._path == ['robot', 'joint'] and attributes.get('type') in _MOVING:
            self._joint = attributes.get('name', '')
            if not self._joint or self._joint in self.limits:
                raise UrdfError(
                    f'robot_description: expected each joint named once, got {self._joint!r}'
                )
            self._bounded = attributes['type'] in _BOUNDED
            self.limits[self._joint] = UrdfLimits()
        elif self._joint is not None and len(self._path) == 3:
            if tag == 'limit':
                self._tighten(attributes, 'lower', 'upper', 'velocity')
            elif tag == 'safety_controller':
                self._tighten(attributes, 'soft_lower_limit', 'soft_upper_limit', '')

    def end(self, tag: str) -> None:
        self._path.pop()
        if tag == 'joint':
            self._joint = None

    def _tighten(self, attributes: dict[str, str], lower: str, upper: str, velocity: str) -> None:
        assert self._joint is not None
        before = self.limits[self._joint]
        # Both bounds are 0 where a <limit> leaves them out, as the URDF specification says.
        default = '0' if lower == 'lower' else None
        low = self._number(attributes, lower, default) if self._bounded else -math.inf
        high = self._number(attributes, upper, default) if self._bounded else math.inf
        limits = UrdfLimits(
            max(before.lower, -math.inf if low is None else low),
            min(before.upper, math.inf if high is None else high),
            min(before.velocity, abs(self._number(attributes, velocity, 'inf') or 0.0)),
        )
        if limits.lower > limits.upper:
            raise UrdfError(
                f'robot_description: {self._joint}: expected lower at most upper, '
                f'got {limits.lower} and {limits.upper}'
            )
        self.limits[self._joint] = limits

    def _number(self, attributes: dict[str, str], name: str, default: str | None) -> float | None:
        text = attributes.get(name, default)
        if text is None:
            return None
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if math.isnan(value) or (name in attributes and math.isinf(value)):
            raise UrdfError(
                f'robot_description: {self._joint}: expected a number for {name}, '
                f'got {text[:40]!r}'
            )
        return value
