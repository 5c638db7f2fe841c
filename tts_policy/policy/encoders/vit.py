# SPDX-License-Identifier: Apache-2.0
"""CLIP's vision transformer, the camera encoder of LeRobot's multi-task DiT policy.

The feature of an image is its class token behind the last block. Source: Radford et al., "Learning
Transferable Visual Models From Natural Language Supervision" (2021).
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from tts_policy.policy.denoisers.attention import merge_heads, split_heads
from tts_policy.policy.encoders.camera_encoder import (
    CameraEncoderSpec,
    CameraModule,
    ImageSize,
    centre_crop,
    register_encoder,
)
from tts_policy.policy.normalizer import LinearNormalizer
from tts_policy.policy.validation import Integer, Size, checked

HEAD_WIDTH = 64


def quick_gelu(x: Tensor) -> Tensor:
    """Approximate GELU as OpenAI's CLIP does."""
    return x * torch.sigmoid(1.702 * x)


@register_encoder
@checked('vit')
class ViTSpec(CameraEncoderSpec):
    """Sizes of a vision transformer.

    patch: side of a patch; hidden: width inside a feed-forward block; resize and crop: height and
    width that an image is scaled to, and then cut to around its centre; none if empty.
    """

    width: Annotated[Integer, Field(ge=1, le=4096, multiple_of=HEAD_WIDTH)] = 768
    layers: Annotated[Integer, Field(ge=1, le=64)] = 12
    hidden: Size = 3072
    patch: Annotated[Integer, Field(ge=1, le=64)] = 16
    resize: ImageSize = ()
    crop: ImageSize = ()

    def make(self, height: int, width: int) -> VisionTransformer:
        """Make the encoder of one camera."""
        return VisionTransformer(height, width, self)


class VisionBlock(nn.Module):
    """Attention and feed-forward layer, each normalised before and added to the tokens."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self._heads = width // HEAD_WIDTH
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens [B, S, D]."""
        parts = self.qkv(self.norm1(tokens)).chunk(3, -1)
        q, k, v = (split_heads(part, self._heads) for part in parts)
        tokens = tokens + self.out(merge_heads(F.scaled_dot_product_attention(q, k, v)))
        mapped: Tensor = self.down(quick_gelu(self.up(self.norm2(tokens))))
        return tokens + mapped


class VisionTransformer(CameraModule):
    """Pixel normaliser, resize, centre crop, patches and blocks.

    The normaliser maps pixel values in [0, 1], per channel.
    """

    def __init__(self, height: int, width: int, spec: ViTSpec) -> None:
        super().__init__()
        height, width = self._resize = spec.resize or (height, width)
        self._crop = centre_crop(height, width, spec.crop)
        rows, columns = spec.crop or (height, width)
        patches = (rows // spec.patch) * (columns // spec.patch)
        self.normalizer = LinearNormalizer(3)
        self.patches = nn.Conv2d(3, spec.width, spec.patch, spec.patch, bias=False)
        self.class_token = nn.Parameter(torch.zeros(spec.width))
        self.positions = nn.Parameter(torch.zeros(1 + patches, spec.width))
        self.norm = nn.LayerNorm(spec.width)
        blocks = (VisionBlock(spec.width, spec.hidden) for _ in range(spec.layers))
        self.blocks = nn.Sequential(*blocks)
        self.out_features = spec.width

    def forward(self, image: Tensor) -> Tensor:
        """Map images with values 0 to 255, [B, 3, H, W], to features [B, D]."""
        normal = self.normalizer.normalize(image.movedim(-3, -1) / 255.0).movedim(-1, -3)
        if normal.shape[-2:] != self._resize:
            normal = F.interpolate(normal, self._resize, mode='bilinear', antialias=True)
        rows, columns = self._crop
        patches = self.patches(normal[..., rows, columns]).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_token.expand(len(patches), 1, -1), patches], dim=1)
        encoded: Tensor = self.blocks(self.norm(tokens + self.positions))
        return encoded[:, 0]
