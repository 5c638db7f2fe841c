# SPDX-License-Identifier: Apache-2.0
"""Camera features of an observation window, every frame encoded once.

Consecutive windows share frames if ticks come faster than a window is long. Frames are compared by
their pixels, which costs a comparison of bytes and never takes one frame for another; a stamp can
repeat, and the owner of a buffer can overwrite it. Bytes go to the device as they are: conversion
and crop happen there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tts_policy.policy.contract import CameraSpec, ObservationSpec
from tts_policy.policy.device import Upload
from tts_policy.policy.encoders.observation_encoder import ObservationEncoder


class _Slot:
    """Carries one frame of a window to the device and encodes it there."""

    def __init__(
        self, encoder: ObservationEncoder, camera: CameraSpec, device: torch.device
    ) -> None:
        self._upload = Upload((1, camera.height, camera.width, 3), torch.uint8, device)
        self._encoder, self._key = encoder, camera.key

    def encode(self, frame: NDArray[np.uint8]) -> Tensor:
        """Features [1, F] of a frame [H, W, 3]."""
        return self._encoder.camera_features(self._key, self._upload.send(frame[None]))


class FrameEncoder:
    """Encodes the frames of windows one by one and keeps those of the last window.

    A frame's features do not depend on what was encoded with it, so a window gives the same bits
    whether or not its frames were seen before. The caller must wait for the end of a tick before
    it begins the next: each frame of a window has one buffer, written at most once a tick.
    """

    def __init__(
        self,
        encoder: ObservationEncoder,
        observation: ObservationSpec,
        device: torch.device,
    ) -> None:
        """Allocate the buffers that carry the frames of a window to the device."""
        self._seen: dict[str, list[tuple[NDArray[np.uint8], Tensor]]] = {}
        self._slots = {
            camera.key: [_Slot(encoder, camera, device) for _ in range(observation.steps)]
            for camera in observation.cameras
        }
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
        for frame, slot in zip(frames, self._slots[key], strict=True):
            found = next((f for f in (*window, *seen) if np.array_equal(f[0], frame)), None)
            if found is None:
                found = frame.copy(), slot.encode(frame)
                self.encoded += 1
            window.append(found)
        self._seen[key] = window
        return torch.cat([features for _, features in window])[None]
