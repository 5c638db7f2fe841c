# SPDX-License-Identifier: Apache-2.0
"""Observation encoder: camera images and proprioception to one feature vector per observation."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from tts_policy.policy.contract import CameraSpec, ObservationSpec
from tts_policy.policy.encoders.resnet import ResNetEncoder
from tts_policy.policy.encoders.spatial_softmax import SpatialSoftmax
from tts_policy.policy.encoders.vision_transformer import VisionTransformer


class DilatedBlock(nn.Module):
    """Residual block that looks `dilation` pixels away; the identity until it is trained."""

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        last = nn.GroupNorm(8, channels)
        nn.init.zeros_(last.weight)
        self.layers = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=dilation, dilation=dilation),
            nn.GroupNorm(8, channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, padding=1),
            last,
        )

    def forward(self, maps: Tensor) -> Tensor:
        """Add to maps [B, C, h, w]."""
        added: Tensor = self.layers(maps)
        return maps + added


class CameraEncoder(nn.Module):
    """Convolutions with GroupNorm and a spatial softmax: [B, 3, H, W] -> [B, 2C].

    Each of `blocks` residual blocks looks twice as far as the one before.
    """

    def __init__(self, height: int, width: int, channels: int = 32, blocks: int = 0) -> None:
        super().__init__()

        def stage(inputs: int, outputs: int, kernel: int, stride: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2),
                nn.GroupNorm(8, outputs),
                nn.ReLU(inplace=True),
            )

        self.stages = nn.Sequential(
            stage(3, channels // 2, 5, 2),
            stage(channels // 2, channels, 3, 2),
            stage(channels, channels, 3, 1),
            stage(channels, channels, 3, 1),
            nn.Conv2d(channels, channels, 1),
        )
        self.blocks = nn.Sequential(*(DilatedBlock(channels, 2**i) for i in range(blocks)))
        self.pool = SpatialSoftmax((height + 3) // 4, (width + 3) // 4)
        self.out_features = 2 * channels

    def forward(self, image: Tensor) -> Tensor:
        """Map images with values 0 to 255, [B, 3, H, W], to keypoints [B, 2C]."""
        maps = self.stages(image.div(127.5).sub(1.0).contiguous())
        return self.pool(self.blocks(maps))


CameraNetwork = CameraEncoder | ResNetEncoder | VisionTransformer


class ObservationEncoder(nn.Module):
    """Images and normalised proprioception to features [B, To, Do].

    The window's images are uint8 [B, To, H, W, 3]; joints are normalised, [B, To, J].
    """

    def __init__(self, spec: ObservationSpec, make: Callable[[CameraSpec], CameraNetwork]) -> None:
        """Make a network for every camera."""
        super().__init__()
        encoders = {camera.key: make(camera) for camera in spec.cameras}
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
