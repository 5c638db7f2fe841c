# SPDX-License-Identifier: Apache-2.0
"""A small convolutional camera encoder with a spatial softmax, the default of train_policy."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor, nn

from tts_policy.policy.encoders.camera_encoder import (
    CameraEncoderSpec,
    CameraModule,
    register_encoder,
)
from tts_policy.policy.encoders.spatial_softmax import SpatialSoftmax
from tts_policy.policy.validation import Integer, checked


@register_encoder
@checked('cnn')
class CnnSpec(CameraEncoderSpec):
    """Channels of the activation maps, and how many residual blocks look at them at the end."""

    channels: Annotated[Integer, Field(ge=16, le=4096, multiple_of=16)] = 32
    blocks: Annotated[Integer, Field(ge=0, le=5)] = 0

    def make(self, height: int, width: int) -> CnnEncoder:
        """Make the encoder of one camera."""
        return CnnEncoder(height, width, self.channels, self.blocks)


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


class CnnEncoder(CameraModule):
    """Convolutions with GroupNorm and a spatial softmax: [B, 3, H, W] -> [B, 2C].

    Each of `blocks` residual blocks looks twice as far as the one before.
    """

    def __init__(self, height: int, width: int, channels: int, blocks: int) -> None:
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
