# SPDX-License-Identifier: Apache-2.0
"""ResNet-18 with a spatial softmax, the camera encoder of Diffusion Policy and robomimic.

Sources: He et al., "Deep Residual Learning for Image Recognition" (CVPR 2016); Mandlekar et al.,
"What Matters in Learning from Offline Human Demonstrations" (CoRL 2021) for pooling and crop;
Chi et al., "Diffusion Policy" (RSS 2023) for GroupNorm in the place of BatchNorm.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from tts_policy.policy.encoders.camera_encoder import (
    CameraEncoderSpec,
    CameraModule,
    ImageSize,
    centre_crop,
    register_encoder,
)
from tts_policy.policy.encoders.spatial_softmax import SpatialSoftmax
from tts_policy.policy.normalizer import LinearNormalizer
from tts_policy.policy.validation import Integer, Text, checked, one_of

WIDTHS = (64, 128, 256, 512)
_Width = Annotated[Integer, Field(ge=1, le=4096)]


@register_encoder
@checked('resnet')
class ResNetSpec(CameraEncoderSpec):
    """Layout of a ResNet encoder.

    norm: 'group' (16 channels a group) or 'batch' (with the statistics of training); crop: height
    and width of the centre crop, none if empty; keypoints and features: widths of spatial softmax
    and of the output.
    """

    norm: Annotated[Text, one_of('group', 'batch')] = 'group'
    crop: ImageSize = ()
    keypoints: _Width = 32
    features: _Width = 64

    def make(self, height: int, width: int) -> ResNetEncoder:
        """Make the encoder of one camera."""
        return ResNetEncoder(height, width, self)


def _norm(kind: str, channels: int) -> nn.Module:
    return nn.GroupNorm(channels // 16, channels) if kind == 'group' else nn.BatchNorm2d(channels)


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions beside the identity, or beside a 1 x 1 convolution."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = _norm(norm, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = _norm(norm, outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), _norm(norm, outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map activations [B, C, H, W] to [B, C', H / stride, W / stride]."""
        y = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class ResNetEncoder(CameraModule):
    """Centre crop, pixel normaliser, ResNet-18, keypoints, linear layer and ReLU.

    The normaliser maps pixel values in [0, 1], per channel.
    """

    def __init__(self, height: int, width: int, spec: ResNetSpec) -> None:
        super().__init__()
        self._crop = centre_crop(height, width, spec.crop)
        rows, columns = spec.crop or (height, width)
        self.normalizer = LinearNormalizer(3)
        self.stem = nn.Sequential(
            nn.Conv2d(3, WIDTHS[0], 7, 2, 3, bias=False),
            _norm(spec.norm, WIDTHS[0]),
            nn.ReLU(),
            nn.MaxPool2d(3, 2, 1),
        )
        blocks: list[nn.Module] = []
        inputs = WIDTHS[0]
        for stage, outputs in enumerate(WIDTHS):
            blocks.append(ResidualBlock(inputs, outputs, 1 if stage == 0 else 2, spec.norm))
            blocks.append(ResidualBlock(outputs, outputs, 1, spec.norm))
            inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.keypoints = nn.Conv2d(WIDTHS[-1], spec.keypoints, 1)
        self.pool = SpatialSoftmax((rows + 31) // 32, (columns + 31) // 32)
        self.out = nn.Linear(2 * spec.keypoints, spec.features)
        self.out_features = spec.features

    def forward(self, image: Tensor) -> Tensor:
        """Map images with values 0 to 255, [B, 3, H, W], to features [B, F]."""
        rows, columns = self._crop
        pixels = image[..., rows, columns].movedim(-3, -1) / 255.0
        normal = self.normalizer.normalize(pixels).movedim(-1, -3).contiguous()
        maps = self.keypoints(self.blocks(self.stem(normal)))
        return torch.relu(self.out(self.pool(maps)))
