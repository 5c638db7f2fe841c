# SPDX-License-Identifier: Apache-2.0
"""Observation encoder: camera images and proprioception to one feature vector per observation."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tts_policy.policy.contract import ObservationSpec
from tts_policy.policy.encoders.camera_encoder import CameraEncoderSpec


class ObservationEncoder(nn.Module):
    """Images and normalised proprioception to features [B, To, Do].

    The window's images are uint8 [B, To, H, W, 3]; joints are normalised, [B, To, J].
    """

    def __init__(self, spec: ObservationSpec, encoder: CameraEncoderSpec) -> None:
        """Make an encoder for every camera."""
        super().__init__()
        encoders = {c.key: encoder.make(c.height, c.width) for c in spec.cameras}
        self.cameras = nn.ModuleDict(encoders)
        self.out_features = len(spec.joints) + sum(e.out_features for e in encoders.values())

    def forward(self, images: dict[str, Tensor], joints: Tensor) -> Tensor:
        """Encode a batch of windows into features [B, To, Do]."""
        cameras = {
            key: self.camera_features(key, images[key].flatten(0, 1)).view(*joints.shape[:2], -1)
            for key in self.cameras
        }
        return self.combine(cameras, joints)

    def camera_features(self, key: str, images: Tensor) -> Tensor:
        """Features [n, F] of uint8 images [n, H, W, 3] of one camera."""
        features: Tensor = self.cameras[key](images.permute(0, 3, 1, 2).float())
        return features

    def combine(self, cameras: Mapping[str, Tensor], joints: Tensor) -> Tensor:
        """Features [B, To, Do] from those of the cameras [B, To, F] and joints [B, To, J]."""
        return torch.cat([joints, *(cameras[key] for key in self.cameras)], dim=-1)
