# SPDX-License-Identifier: Apache-2.0
"""LeRobot's policy folders: which of them could be run sparse, and why the others cannot."""

from __future__ import annotations

import json
from pathlib import Path

from tts_policy.convert.restricted_pickle import CheckpointError

MAX_CONFIG_BYTES = 1 << 20
_REASONS = {
    'diffusion': 'its U-Net has no residual blocks to reuse, train a transformer policy',
    'multi_task_dit': 'its CLIP encoders of images and text are not supported',
}


def refuse_lerobot(folder: Path) -> None:
    """Raise CheckpointError with the reason why a LeRobot policy folder cannot be converted."""
    config = folder / 'config.json'
    if not config.is_file():
        raise CheckpointError(f'{folder}: checkpoint file expected, got a folder')
    if config.stat().st_size > MAX_CONFIG_BYTES:
        raise CheckpointError(f'{config}: at most {MAX_CONFIG_BYTES} bytes')
    try:
        data = json.loads(config.read_text(encoding='utf-8'))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f'{config}: not JSON: {str(error)[:100]}') from error
    kind = str(data.get('type'))[:80] if isinstance(data, dict) else 'none'
    reason = _REASONS.get(kind, 'only Diffusion Policy checkpoints are')
    raise CheckpointError(f'{folder}: LeRobot policy of type {kind!r} is not converted: {reason}')
