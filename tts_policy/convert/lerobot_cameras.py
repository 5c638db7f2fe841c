# SPDX-License-Identifier: Apache-2.0
"""Cameras of LeRobot's multi-task DiT policy: their images, and the encoders that see them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from tts_policy.convert.clip_vision import Size, vit_spec, vit_state
from tts_policy.convert.configuration import Configuration
from tts_policy.convert.restricted_pickle import CheckpointError
from tts_policy.convert.weights import WeightSource
from tts_policy.policy.contract import CameraSpec
from tts_policy.policy.encoders.vit import ViTSpec

# What their transformers compute with; others have another activation.
CLIP = 'openai/clip-'
DEFAULT_CROP = [224, 224]
Source = WeightSource[Any]


def read_cameras(config: Configuration) -> list[tuple[str, CameraSpec]]:
    """Feature and camera, in the order of the configuration; a key is the feature's last word.

    Raises
    ------
    CheckpointError
        for images that are not RGB, keys that repeat, and observations of another kind.

    """
    inputs = config.section('input_features')
    cameras: list[tuple[str, CameraSpec]] = []
    for feature in inputs.keys:
        kind = inputs.section(feature).text('type')
        if kind == 'STATE' or feature == 'observation.state':
            continue
        if kind != 'VISUAL':
            raise CheckpointError(f'{feature}: type STATE or VISUAL expected, got {kind[:80]!r}')
        shape = inputs.section(feature).integers('shape')
        if len(shape) != 3 or shape[0] != 3:
            raise CheckpointError(f'{feature}: 3 channels, height and width expected, got {shape}')
        try:
            camera = CameraSpec(feature.rpartition('.')[2], shape[1], shape[2])
        except ValueError as error:
            raise CheckpointError(f'{feature}: {error}') from error
        cameras.append((feature, camera))
    return cameras


def read_encoders(
    config: Configuration, source: Source, cameras: Sequence[CameraSpec]
) -> dict[str, tuple[ViTSpec, dict[str, Tensor]]]:
    """Sizes and weights of the encoder of every camera, without its pixel normaliser.

    Raises
    ------
    CheckpointError
        for encoders that are not OpenAI's CLIP, and of different sizes.

    """
    if not cameras:
        return {}
    name = config.text('vision_encoder_name', f'{CLIP}vit-base-patch16')
    if not name.startswith(CLIP):
        raise CheckpointError(f'vision_encoder_name must begin with {CLIP}, got {name[:80]!r}')
    apart = config.flag('use_separate_rgb_encoder_per_camera', False)
    encoders = {}
    for n, camera in enumerate(cameras):
        prefix = f'observation_encoder.vision_encoder{f"s.{n}" if apart else ""}.model.'
        # transformers 5 has done away with this part of the name.
        if f'{prefix}vision_model.embeddings.class_embedding' in source:
            prefix += 'vision_model.'
        spec = vit_spec(source, prefix, camera, *_sizes(config, camera))
        encoders[camera.key] = spec, vit_state(source, prefix, spec)
    if len({spec for spec, _ in encoders.values()}) > 1:
        raise CheckpointError('camera encoders must be of one size, got different ones')
    return encoders


def _sizes(config: Configuration, camera: CameraSpec) -> tuple[Size, Size]:
    """Resize and crop; a crop that does not fit is not done, as in LeRobot."""
    resize = _size(config, 'image_resize_shape', [])
    crop = _size(config, 'image_crop_shape', DEFAULT_CROP)
    seen = resize or (camera.height, camera.width)
    if crop and (crop[0] > seen[0] or crop[1] > seen[1]):
        crop = ()
    return resize, crop


def _size(config: Configuration, key: str, default: list[int]) -> Size:
    size = config.integers(key, default) if key in config.keys else default
    if not size:
        return ()
    if len(size) != 2:
        raise CheckpointError(f'config.{key} must be height and width, got {size}')
    return size[0], size[1]
