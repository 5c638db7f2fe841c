# SPDX-License-Identifier: Apache-2.0
"""Classes of ROS messages by the name of their type, and definitions by their class."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rosbags.typesys import Stores, TypesysError, get_types_from_msg, get_typestore
from rosbags.typesys.store import Typestore

# How a class calls the types that a definition calls otherwise.
_PRIMITIVES = {'boolean': 'bool', 'octet': 'byte', 'float': 'float32', 'double': 'float64'}
_SEQUENCE = re.compile(r'sequence<(.+?)(?:, (\d+))?>')
_ARRAY = re.compile(r'(.+)(\[\d+\])')
_MESSAGE_TYPE = re.compile(r'([a-z][a-z0-9_]*)/msg/([A-Z][A-Za-z0-9]*)')
_INDEX = 'share/ament_index/resource_index/rosidl_interfaces'


def message_class(msgtype: str) -> Any:
    """Class of a type such as sensor_msgs/msg/Image.

    Recordings and other nodes choose `msgtype`, and importing a module runs it. Only interface
    packages that the ament index lists are imported, from the prefix that lists them, and never
    from the working directory.

    Raises
    ------
    ImportError
        if its package is not installed or has no such message.

    """
    match = _MESSAGE_TYPE.fullmatch(msgtype)
    if match is None:
        raise ImportError(f'type: expected PACKAGE/msg/NAME, got {msgtype[:80]!r}')
    package, name = match.groups()
    with _without_working_directory():
        spec = importlib.util.find_spec(package)
        file = None if spec is None or spec.origin is None else Path(os.path.abspath(spec.origin))
        if file is None or not any(map(file.is_relative_to, _interface_folders(package))):
            raise ImportError(f'{package}: expected an installed interface package, got none')
        try:
            return getattr(importlib.import_module(f'{package}.msg'), name)
        except AttributeError as error:
            raise ImportError(str(error)) from None


def _interface_folders(package: str) -> Iterator[Path]:
    """Folders of Python packages of every prefix whose index lists an interface package."""
    for prefix in (*os.environ.get('AMENT_PREFIX_PATH', '').split(os.pathsep), sys.prefix):
        if prefix and (Path(prefix) / _INDEX / package).is_file():
            # A prefix may be a link to where its modules lie, or hold links to them.
            for root in {Path(os.path.abspath(prefix)), Path(prefix).resolve()}:
                yield from root.glob('lib/python3*/*-packages')
                yield from root.glob('local/lib/python3*/*-packages')


@contextmanager
def _without_working_directory() -> Iterator[None]:
    """Leave the working directory out of what modules are imported from."""
    kept = sys.path[:]
    sys.path[:] = [entry for entry in kept if entry and Path(entry).resolve() != Path.cwd()]
    try:
        yield
    finally:
        sys.path[:] = kept


def definition(msgtype: str) -> tuple[str, set[str]]:
    """Definition of an installed type, without its constants, and the messages it is made of.

    Raises
    ------
    ImportError
        as `message_class`.

    """
    lines, parts = [], set()
    for name, kind in message_class(msgtype).get_fields_and_field_types().items():
        suffix = ''
        if match := _SEQUENCE.fullmatch(kind):
            kind, suffix = match[1], f'[<={match[2]}]' if match[2] else '[]'
        elif match := _ARRAY.fullmatch(kind):
            kind, suffix = match[1], match[2]
        if '/' in kind:
            parts.add(kind.replace('/', '/msg/'))
        bounded = re.sub(r'(w?string)<(\d+)>', r'\1<=\2', _PRIMITIVES.get(kind, kind))
        lines.append(f'{bounded}{suffix} {name}')
    return '\n'.join(lines) + '\n', parts


def typestore_with(msgtype: str, store: Typestore | None = None) -> Typestore:
    """Typestore of ROS 2 with a type and all it is made of, from the installed classes.

    Raises
    ------
    ImportError
        as `message_class`, of any part, or if rosbags cannot write such a message.

    """
    store = get_typestore(Stores.ROS2_JAZZY) if store is None else store
    if msgtype not in store.fielddefs:
        text, parts = definition(msgtype)
        for part in parts:
            typestore_with(part, store)
        try:
            store.register(get_types_from_msg(text, msgtype))
        except TypesysError as error:
            raise ImportError(f'{msgtype}: {" ".join(str(error).split())}') from None
    return store
