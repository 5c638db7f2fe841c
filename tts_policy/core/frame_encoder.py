# SPDX-License-Identifier: Apache-2.0
"""Camera features of an observation window, every frame encoded once.

Consecutive windows share frames when ticks come faster than a window is long. A frame is known by
its pixels, which costs a comparison of bytes and cannot mistake one frame for another; stamps, or
the identity of a buffer that its owner writes anew, could.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tts_policy.core.vision import ObservationEncoder


class FrameEncoder:
    """Encodes the frames of windows one by one and keeps those of the last window.

    A frame's features do not depend on what was encoded with it, so the same window gives the
    same bits whether or not its frames were seen before.
    """

    def __init__(self, encoder: ObservationEncoder, device: torch.device) -> None:
        self._encoder, self._device = encoder, device
        self._seen: dict[str, list[tuple[NDArray[np.uint8], Tensor]]] = {}
        self.encoded = 0

    def clear(self) -> None:
        """Forget every frame."""
        self._seen.clear()

    def __call__(self, images: Mapping[str, NDArray[Any]]) -> dict[str, Tensor]:
        """Features [1, To, F] by camera from uint8 images [To, H, W, 3]."""
        return {key: self._window(key, frames) for key, frames in images.items()}

    def _window(self, key: str, frames: NDArray[Any]) -> Tensor:
        seen = self._seen.get(key, [])
        window: list[tuple[NDArray[np.uint8], Tensor]] = []
        for frame in frames:
            found = next((f for f in (*window, *seen) if np.array_equal(f[0], frame)), None)
            window.append(found or self._encode(key, frame.copy()))
        self._seen[key] = window
        return torch.cat([features for _, features in window])[None]

    def _encode(self, key: str, frame: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], Tensor]:
        self.encoded += 1
        on_device = torch.from_numpy(frame).to(self._device)[None]
        return frame, self._encoder.camera_features(key, on_device)
