# SPDX-License-Identifier: Apache-2.0
"""Classes of ROS messages by the name of their type, and definitions by their class."""

from __future__ import annotations

import importlib
import re
from typing import Any

from rosbags.typesys import Stores, TypesysError, get_types_from_msg, get_typestore
from rosbags.typesys.store import Typestore

# How a class calls the types that a definition calls otherwise.
_PRIMITIVES = {'boolean': 'bool', 'octet': 'byte', 'float': 'float32', 'double': 'float64'}
_SEQUENCE = re.compile(r'sequence<(.+?)(?:, (\d+))?>')
_ARRAY = re.compile(r'(.+)(\[\d+\])')


def message_class(msgtype: str) -> Any:
    """Class of a type such as sensor_msgs/msg/Image.

    Raises
    ------
    ImportError
        if its package is not installed or has no such message.

    """
    package, separator, name = msgtype.partition('/msg/')
    if not separator:
        raise ImportError(f'type: expected PACKAGE/msg/NAME, got {msgtype!r}')
    try:
        return getattr(importlib.import_module(f'{package}.msg'), name)
    except (AttributeError, ValueError) as error:
        raise ImportError(str(error)) from None


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
