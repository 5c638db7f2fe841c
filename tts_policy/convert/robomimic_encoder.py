# SPDX-License-Identifier: Apache-2.0
"""Weights of robomimic's visual core: ResNet-18, spatial softmax and a linear layer.

Layout of robomimic 0.2, below `obs_nets.KEY`: `backbone.nets` holds the children of torchvision's
resnet18 by number, `pool` the spatial softmax, and `nets` the whole sequence once more, with the
linear layer as its fourth member.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tts_policy.convert.restricted_pickle import CheckpointError
from tts_policy.convert.weights import WeightSource
from tts_policy.policy.encoders.resnet import ResNetSpec

Source = WeightSource[Any]


def resnet_spec(source: Source, prefix: str, crop: tuple[int, int] | None) -> ResNetSpec:
    """Layout of the encoder under `prefix`, read off its weights."""
    if f'{prefix}backbone.nets.7.2.conv1.weight' in source:
        raise CheckpointError('camera encoder must be a ResNet-18, got a deeper one')
    if f'{prefix}backbone.nets.7.1.conv2.weight' not in source:
        raise CheckpointError('camera encoder must be a ResNet-18 of robomimic 0.2')
    for name in (f'{prefix}pool.nets.weight', f'{prefix}nets.3.weight'):
        if name not in source:
            raise CheckpointError(
                f'camera encoder must end in spatial softmax and linear layer, {name} is missing'
            )
    return ResNetSpec(
        norm='batch' if f'{prefix}backbone.nets.1.running_mean' in source else 'group',
        crop=crop or (),
        keypoints=len(source.take(f'{prefix}pool.nets.weight')),
        features=len(source.take(f'{prefix}nets.3.weight')),
    )


def resnet_state(source: Source, prefix: str, spec: ResNetSpec) -> dict[str, Tensor]:
    """State of our ResNetEncoder, without its pixel normaliser."""

    def norm(name: str, target: str) -> dict[str, Tensor]:
        state = source.pair(name, target)
        if spec.norm == 'batch':
            for part in ('running_mean', 'running_var', 'num_batches_tracked'):
                state[f'{target}.{part}'] = source.take(f'{name}.{part}')
        return state

    backbone = f'{prefix}backbone.nets.'
    state = {
        'stem.0.weight': source.take(f'{backbone}0.weight'),
        **norm(f'{backbone}1', 'stem.1'),
        **source.pair(f'{prefix}pool.nets', 'keypoints'),
        'pool.temperature': source.take(f'{prefix}pool.temperature').reshape(()),
        **source.pair(f'{prefix}nets.3', 'out'),
    }
    for number in range(8):
        name, target = f'{backbone}{4 + number // 2}.{number % 2}.', f'blocks.{number}.'
        for part in ('1', '2'):
            state[f'{target}conv{part}.weight'] = source.take(f'{name}conv{part}.weight')
            state |= norm(f'{name}bn{part}', f'{target}norm{part}')
        if f'{name}downsample.0.weight' in source:
            state[f'{target}shortcut.0.weight'] = source.take(f'{name}downsample.0.weight')
            state |= norm(f'{name}downsample.1', f'{target}shortcut.1')
    # The sequence repeats backbone and pool; coordinates follow from the size of the maps.
    again = (f'{prefix}nets.0.', f'{prefix}nets.1.', f'{prefix}pool.pos_')
    source.ignore(lambda name: name.startswith(again))
    return state
