# SPDX-License-Identifier: Apache-2.0
"""Recorded bytes to messages: by rclpy where it is present, otherwise by rosbags.

Both give messages with the same fields, and everything downstream takes either.
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
from tts_policy.node.message_types import message_class

DECODERS = ('auto', 'rclpy', 'rosbags')
_BIG_ENDIAN, _LITTLE_ENDIAN = b'\0\0', b'\0\1'

Decode = Callable[[RawMessage], Any]


def make_decoder(reader: BagReader, topics: list[str], kind: str = 'auto') -> Decode:
    """Decoder of the messages on these topics of a bag.

    Raises
    ------
    BagError
        if the type of a topic is unknown here and not defined in the bag; the decoder raises it
        for bytes that are no message of their type.

    """
    types = {reader.topics[topic].msgtype for topic in topics}
    if kind == 'rosbags':
        return _rosbags_decoder(reader, types)
    try:
        return _rclpy_decoder(reader, types)
    except ImportError as error:
        if kind == 'rclpy':
            raise BagError(f'{reader.path}: {error}') from None
        return _rosbags_decoder(reader, types)


def _rclpy_decoder(reader: BagReader, types: set[str]) -> Decode:
    from rclpy.serialization import deserialize_message

    classes = {msgtype: message_class(msgtype) for msgtype in types}

    def decode(message: RawMessage) -> Any:
        try:
            return deserialize_message(bytes(message.data), classes[message.msgtype])
        except Exception as error:  # noqa: BLE001 - rclpy raises its C++ errors as they come
            raise _undecodable(reader, message, error) from None

    return decode


def _rosbags_decoder(reader: BagReader, types: set[str]) -> Decode:
    store = get_typestore(Stores.ROS2_JAZZY)
    try:
        for msgtype in sorted(types - set(store.fielddefs)):
            definition = reader.definitions.get(msgtype)
            if definition is None or definition.format is MessageDefinitionFormat.NONE:
                raise BagError(f'{reader.path}: type {msgtype!r} is unknown here, and not defined')
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
            # What is left behind the message is not looked at, as rclpy does: Fast CDR reserves
            # room for every empty sequence and does not give it back.
            read = readers[bytes(data[:2])]
            return read(data[4:], 0, definition.cls, store)[0]
        except (SerdeError, struct.error, ValueError, IndexError, KeyError) as error:
            raise _undecodable(reader, message, error) from None

    return decode


def _undecodable(reader: BagReader, message: RawMessage, error: Exception) -> BagError:
    return BagError(
        f'{reader.path}: {message.topic}: a {message.msgtype} expected, '
        f'got {len(message.data)} bytes that are none: {" ".join(str(error).split())}'
    )
