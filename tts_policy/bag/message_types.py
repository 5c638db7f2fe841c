# SPDX-License-Identifier: Apache-2.0
"""Classes of ROS messages by the name of their type."""

from __future__ import annotations

import importlib
from typing import Any


def message_class(msgtype: str) -> Any:
    """Class of a type such as sensor_msgs/msg/Image.

    Raises
    ------
    ImportError
        if its package is not installed or has no such message.

    """
    package, separator, name = msgtype.partition('/msg/')
    if not separator:
        raise ImportError(f'type PACKAGE/msg/NAME expected, got {msgtype!r}')
    try:
        return getattr(importlib.import_module(f'{package}.msg'), name)
    except (AttributeError, ValueError) as error:
        raise ImportError(str(error)) from None
