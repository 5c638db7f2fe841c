# SPDX-License-Identifier: Apache-2.0
"""Recorded bytes to messages, by rosbags: recordings are read without a ROS installation.

The messages have the fields of those of rclpy, so that live and recorded ones are read alike.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from rosbags.interfaces import MessageDefinitionFormat
from rosbags.serde import SerdeError
from rosbags.typesys import (
    Stores,
    TypesysError,
    get_types_from_idl,
    get_types_from_msg,
    get_typestore,
)

from tts_policy.data.reader import BagError, BagReader, RawMessage

_BIG_ENDIAN, _LITTLE_ENDIAN = b'\0\0', b'\0\1'

Decode = Callable[[RawMessage], Any]


def make_decoder(reader: BagReader, topics: list[str]) -> Decode:
    """Return a decoder for the messages on these topics of a bag.

    Raises
    ------
    BagError
        if a topic has a type that is neither known nor defined in the bag. The decoder raises it
        for bytes that are not a message of their type.

    """
    types = {reader.topics[topic].msgtype for topic in topics}
    store = get_typestore(Stores.ROS2_JAZZY)
    try:
        for msgtype in sorted(types - set(store.fielddefs)):
            definition = reader.definitions.get(msgtype)
            if definition is None or definition.format is MessageDefinitionFormat.NONE:
                raise BagError(
                    f'{reader.path}: type {msgtype!r}: expected a standard one or a definition in '
                    'the bag, got neither'
                )
            if definition.format is MessageDefinitionFormat.MSG:
                found = get_types_from_msg(definition.data, msgtype)
            else:
                found = get_types_from_idl(definition.data)
            store.register({n: t for n, t in found.items() if n not in store.fielddefs})
    except TypesysError as error:
        raise BagError(
            f'{reader.path}: type {msgtype!r}: {" ".join(str(error).split())}'
        ) from None

    def decode(message: RawMessage) -> Any:
        data = memoryview(message.data)
        definition = store.get_msgdef(message.msgtype)
        readers = {
            _BIG_ENDIAN: definition.deserialize_cdr_be,
            _LITTLE_ENDIAN: definition.deserialize_cdr_le,
        }
        try:
            # Bytes after the message are ignored, as rclpy ignores them: Fast CDR reserves room
            # for every empty sequence and does not give it back.
            read = readers[bytes(data[:2])]
            return read(data[4:], 0, definition.cls, store)[0]
        except (SerdeError, struct.error, ValueError, IndexError, KeyError) as error:
            raise _undecodable(reader, message, error) from None

    return decode


def _undecodable(reader: BagReader, message: RawMessage, error: Exception) -> BagError:
    return BagError(
        f'{reader.path}: {message.topic}: expected a {message.msgtype}, '
        f'got {len(message.data)} bytes that are not one: {" ".join(str(error).split())}'
    )
