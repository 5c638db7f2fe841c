# SPDX-License-Identifier: Apache-2.0
"""Statistics of LeRobot's normaliser processors as scales and offsets of state, images and action.

`policy_preprocessor.json` and `policy_postprocessor.json` list steps by their registered names; a
step that has tensors names the safetensors file beside it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tts_policy.convert.configuration import read_settings
from tts_policy.convert.restricted_pickle import CheckpointError
from tts_policy.policy.validation import Number, Spec, Text, checked, quoted

MAX_JSON_BYTES = 1 << 20
MAX_STATISTICS_BYTES = 16 << 20
_RANGES = {'MIN_MAX': ('min', 'max'), 'QUANTILES': ('q01', 'q99'), 'QUANTILE10': ('q10', 'q90')}
# Steps that leave the values of a state and an action as they are.
_PASSIVE = {
    'rename_observations_processor',
    'to_batch_processor',
    'tokenizer_processor',
    'device_processor',
}
_TYPES = {'observation.state': 'STATE', 'action': 'ACTION'}
_OBSERVED = ('policy_preprocessor.json', 'normalizer_processor')
_ACTED = ('policy_postprocessor.json', 'unnormalizer_processor')


def read_json(path: Path) -> Any:
    """Content of a JSON file; raises CheckpointError for one that is missing, large or none."""
    if not path.is_file():
        raise CheckpointError(f'{path.name}: expected a file, got nothing')
    if path.stat().st_size > MAX_JSON_BYTES:
        raise CheckpointError(f'{path.name}: expected at most {MAX_JSON_BYTES} bytes, got more')
    try:
        return json.loads(path.read_text(encoding='utf-8'))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f'{path.name}: expected JSON, got other text: {str(error)[:100]}'
        ) from error


def read_normalizers(folder: Path, lengths: Mapping[str, int]) -> dict[str, dict[str, Tensor]]:
    """`scale` and `offset` [length] of every key: normalised = value * scale + offset.

    Keys are `observation.state`, `action` and those of cameras, whose values are in [0, 1].

    Raises
    ------
    CheckpointError
        for steps that change values in another way, unknown modes and damaged files.

    """
    return {key: _field(folder, key, length) for key, length in lengths.items()}


@checked('step', extra='ignore')
class _Step(Spec):
    """A step of a processor."""

    registry_name: Text = 'a class'
    state_file: Text | None = None
    config: dict[str, Any] | None = None


@checked('processor', extra='ignore')
class _Processor(Spec):
    """Content of a processor's file."""

    steps: tuple[_Step, ...]


@checked('config', extra='ignore')
class _Normalizer(Spec):
    """Settings of a normaliser; norm_map: its mode by the type of a feature."""

    norm_map: dict[str, Text]
    eps: Number = 1e-8
    normalize_observation_keys: None = None


def _field(folder: Path, key: str, length: int) -> dict[str, Tensor]:
    file, wanted = _ACTED if key == 'action' else _OBSERVED
    steps = read_settings(_Processor, read_json(folder / file), file).steps
    for step in steps:
        if step.registry_name not in _PASSIVE | {wanted}:
            raise CheckpointError(
                f'{file}: expected steps of known effect, got {quoted(step.registry_name)}'
            )
    found = [step for step in steps if step.registry_name == wanted]
    if len(found) != 1:
        raise CheckpointError(f'{file}: expected one {wanted}, got {len(found)}')
    settings = read_settings(_Normalizer, found[0].config or {}, file)
    mode = settings.norm_map.get(_TYPES.get(key, 'VISUAL'), 'IDENTITY')
    statistics = _statistics(folder, found[0].state_file or '')
    if mode == 'IDENTITY' or not any(name.rpartition('.')[0] == key for name in statistics):
        return {'scale': torch.ones(length), 'offset': torch.zeros(length)}
    return _affine(key, length, mode, settings.eps, statistics)


def _statistics(folder: Path, name: str) -> dict[str, Tensor]:
    if not name:
        return {}
    path = folder / name
    if Path(name).name != name or not path.is_file():
        raise CheckpointError(f'state_file: expected a file in the folder, got {quoted(name)}')
    if path.stat().st_size > MAX_STATISTICS_BYTES:
        raise CheckpointError(f'{name}: expected at most {MAX_STATISTICS_BYTES} bytes, got more')
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f'{name}: {" ".join(str(error).split())[:200]}') from error


def _affine(
    key: str, length: int, mode: str, eps: float, statistics: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    def take(name: str) -> Tensor:
        value = statistics.get(f'{key}.{name}')
        if value is None or value.numel() != length or not torch.isfinite(value).all():
            raise CheckpointError(f'{key}.{name}: expected {length} finite statistics, got others')
        return value.flatten().double()

    if mode == 'MEAN_STD':
        spread, shift = take('std'), take('mean')
        # Actions are multiplied by the deviation itself, which must not be zero here.
        scale = 1 / (spread + eps if key != 'action' else spread.clamp(min=eps))
        offset = -shift * scale
    elif mode in _RANGES:
        low, high = (take(name) for name in _RANGES[mode])
        still = low == high
        # An observation that never moved was always -1; LeRobot would magnify any change of it.
        width = torch.where(still, torch.tensor(eps if key == 'action' else 2.0), high - low)
        scale = 2 / width
        offset = -low * scale - 1
    else:
        raise CheckpointError(
            f'norm_map of {key}: expected MEAN_STD or a range, got {quoted(mode)}'
        )
    return {'scale': scale.float(), 'offset': offset.float()}
