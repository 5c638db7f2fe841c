# SPDX-License-Identifier: Apache-2.0
"""What a camera encoder is, and all encoders by name.

To add one, put a file beside this one that holds its module, a `CameraModule`, and its settings, a
`CameraEncoderSpec`:

    @register_encoder
    @checked('mine')
    class MineSpec(CameraEncoderSpec):
        channels: Size = 32

        def make(self, height: int, width: int) -> MineEncoder:
            return MineEncoder(height, width, self.channels)

Then `train_policy --encoder mine channels=64` trains it, and model.yaml holds its settings as
`network.mine`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Annotated, TypeVar

from pydantic import AfterValidator, Field
from torch import nn

from tts_policy.policy.validation import Integer, Spec

_Spec = TypeVar('_Spec', bound='type[CameraEncoderSpec]')


class CameraModule(nn.Module):
    """Maps images with values 0 to 255, [B, 3, H, W], to features [B, out_features]."""

    out_features: int


class CameraEncoderSpec(Spec, ABC):
    """Settings of a kind of camera encoder; NAME is what bundles and commands call it."""

    @abstractmethod
    def make(self, height: int, width: int) -> CameraModule:
        """Make the encoder of one camera; raises ValueError for images it cannot read."""


ENCODERS: dict[str, type[CameraEncoderSpec]] = {}


def register_encoder(spec: _Spec) -> _Spec:
    """Make a kind of camera encoder known by its NAME."""
    ENCODERS[spec.NAME] = spec
    return spec


def _height_and_width(size: tuple[int, ...]) -> tuple[int, ...]:
    if len(size) not in (0, 2):
        raise ValueError('height and width, or nothing')
    return size


# Height and width in pixels that images are scaled or cut to; empty if they are left as they are.
ImageSize = Annotated[
    tuple[Annotated[Integer, Field(ge=1, le=2048)], ...], AfterValidator(_height_and_width)
]


def centre_crop(height: int, width: int, crop: tuple[int, ...]) -> tuple[slice, slice]:
    """Rows and columns of a centre crop, as torchvision cuts it; all of them where it is empty.

    Raises
    ------
    ValueError
        if the crop does not fit into the image.

    """
    rows, columns = crop or (height, width)
    if rows > height or columns > width:
        raise ValueError(f'crop: expected at most {height} x {width}, got {rows} x {columns}')
    # Rounded half to even.
    top, left = round((height - rows) / 2), round((width - columns) / 2)
    return slice(top, top + rows), slice(left, left + columns)
