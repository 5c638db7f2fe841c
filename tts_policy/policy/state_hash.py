# SPDX-License-Identifier: Apache-2.0
"""Hashing of weights and other tensors, to tell what was made of which."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from torch import Tensor


def take_in(digest: hashlib._Hash, values: Mapping[str, Tensor]) -> None:
    """Add tensors, by name and in their order, to a digest."""
    for name, value in values.items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
