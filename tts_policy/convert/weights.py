# SPDX-License-Identifier: Apache-2.0
"""Weights of a checkpoint, taken by name: what is left over at the end was not understood."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from tts_policy.convert.restricted_pickle import CheckpointError

Stored = TypeVar('Stored')


class WeightSource(Generic[Stored]):
    """Named tensors, read when they are asked for, in single precision."""

    def __init__(self, tensors: Mapping[str, Stored], read: Callable[[Stored], Tensor]) -> None:
        self._tensors, self._read = tensors, read
        self._left = set(tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    @property
    def names(self) -> list[str]:
        """All names there are, in the order of the file."""
        return list(self._tensors)

    def take(self, name: str) -> Tensor:
        """Tensor of a name; raises CheckpointError if there is none or it is not finite."""
        if name not in self._tensors:
            raise CheckpointError(f'weight {name} expected, got nothing')
        self._left.discard(name)
        value = self._read(self._tensors[name])
        value = value.float() if value.is_floating_point() else value
        if not torch.isfinite(value).all():
            raise CheckpointError(f'weight {name} must be finite, got NaN or infinity')
        return value

    def pair(self, name: str, target: str) -> dict[str, Tensor]:
        """Weight and bias of a layer under the names of the target layer."""
        return {f'{target}.{part}': self.take(f'{name}.{part}') for part in ('weight', 'bias')}

    def ignore(self, unwanted: Callable[[str], bool]) -> None:
        """Do without the names that hold for `unwanted`."""
        self._left = {name for name in self._left if not unwanted(name)}

    def require_empty(self) -> None:
        """Raise CheckpointError if there are weights that nobody took."""
        if self._left:
            left = sorted(self._left)
            raise CheckpointError(
                f'weights of an unknown architecture: {len(left)} such as {", ".join(left[:3])}'
            )


def load_state(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load all weights of a module; raises CheckpointError naming what does not fit."""
    own = module.state_dict()
    for name in own.keys() | state.keys():
        if name not in state or name not in own:
            found, wanted = ('nothing', name) if name not in state else (name, 'nothing')
            raise CheckpointError(f'weight {wanted} expected, got {found}')
        if own[name].shape != state[name].shape:
            raise CheckpointError(
                f'weight {name} must be {tuple(own[name].shape)}, got {tuple(state[name].shape)}'
            )
    module.load_state_dict(state)
