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

from tts_policy.convert.configuration import Configuration
from tts_policy.convert.restricted_pickle import CheckpointError

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
        raise CheckpointError(f'{path.name} expected, got nothing')
    if path.stat().st_size > MAX_JSON_BYTES:
        raise CheckpointError(f'{path.name}: at most {MAX_JSON_BYTES} bytes expected')
    try:
        return json.loads(path.read_text(encoding='utf-8'))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f'{path.name}: not JSON: {str(error)[:100]}') from error


def read_normalizers(folder: Path, lengths: Mapping[str, int]) -> dict[str, dict[str, Tensor]]:
    """`scale` and `offset` [length] of every key: normalised = value * scale + offset.

    Keys are `observation.state`, `action` and those of cameras, whose values are in [0, 1].

    Raises
    ------
    CheckpointError
        for steps that change values in another way, unknown modes and damaged files.

    """
    return {key: _field(folder, key, length) for key, length in lengths.items()}


def _field(folder: Path, key: str, length: int) -> dict[str, Tensor]:
    file, wanted = _ACTED if key == 'action' else _OBSERVED
    steps = Configuration(file, read_json(folder / file)).sections('steps')
    unknown = [s.text('registry_name', 'a class')[:80] for s in steps]
    unknown = [name for name in unknown if name not in _PASSIVE | {wanted}]
    if unknown:
        raise CheckpointError(f'{file}: steps of known effect expected, got {unknown[0]!r}')
    found = [step for step in steps if step.text('registry_name') == wanted]
    if len(found) != 1:
        raise CheckpointError(f'{file}: one {wanted} expected, got {len(found)}')
    settings = found[0].section('config')
    if 'normalize_observation_keys' in settings.given:
        raise CheckpointError(f'{file}: normalize_observation_keys must be null, got a list')
    mode = settings.section('norm_map').text(_TYPES.get(key, 'VISUAL'), 'IDENTITY')
    statistics = _statistics(folder, found[0].text('state_file', ''))
    if mode == 'IDENTITY' or not any(name.rpartition('.')[0] == key for name in statistics):
        return {'scale': torch.ones(length), 'offset': torch.zeros(length)}
    return _affine(key, length, mode, settings.number('eps', 1e-8), statistics)


def _statistics(folder: Path, name: str) -> dict[str, Tensor]:
    if not name:
        return {}
    path = folder / name
    if Path(name).name != name or not path.is_file():
        raise CheckpointError(f'state_file must lie in the folder, got {name[:80]!r}')
    if path.stat().st_size > MAX_STATISTICS_BYTES:
        raise CheckpointError(f'{name}: at most {MAX_STATISTICS_BYTES} bytes expected')
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
            raise CheckpointError(f'{key}.{name}: {length} finite statistics expected')
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
        raise CheckpointError(f'{key}: norm_map must be MEAN_STD or a range, got {mode[:80]!r}')
    return {'scale': scale.float(), 'offset': offset.float()}
