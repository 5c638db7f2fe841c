# SPDX-License-Identifier: Apache-2.0
"""The processes of one training, as torchrun starts them: every batch is shared out among them.

All hold the same lessons and draw the same random numbers. What a decision rests on, errors and
gradients, is gathered from all of them in the order of their ranks, so that all decide alike and
nothing else has to be sent. The first one alone reads a checkpoint and writes files.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor, distributed

from tts_policy.policy.device import DEVICES

Item = TypeVar('Item')


@dataclass(frozen=True)
class Replicas:
    """This process among `count`, and the device that it computes on."""

    rank: int = 0
    count: int = 1
    device: torch.device = field(default_factory=lambda: torch.device('cpu'))

    @staticmethod
    def joined(device: str = 'cpu') -> Replicas:
        """Join those that torchrun started with this one; without torchrun it is alone.

        device: of DEVICES; of several GPUs every process takes the one of its local rank.
        Raises ValueError for another, or where there is none.
        """
        if device not in DEVICES:
            raise ValueError(f'device must be one of {list(DEVICES)}, got {device!r}')
        local, count = int(os.environ.get('LOCAL_RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
        if device == 'cuda':
            if torch.cuda.device_count() <= local:
                raise ValueError(
                    f"device 'cuda': a GPU for each process of this machine expected, got "
                    f'{torch.cuda.device_count()} for process {local}'
                )
            torch.cuda.set_device(local)
        if count > 1:
            distributed.init_process_group('nccl' if device == 'cuda' else 'gloo')
        return Replicas(int(os.environ.get('RANK', 0)), count, torch.device(device))

    @staticmethod
    def leave() -> None:
        """Leave the group, where there is one."""
        if distributed.is_initialized():
            distributed.destroy_process_group()

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def of_first(self, made: Item | None) -> Item | None:
        """What the first process made; the others give None."""
        if self.count == 1:
            return made
        carried = [made]
        distributed.broadcast_object_list(carried, device=self.device)
        return carried[0]

    def _sizes(self, total: int) -> list[int]:
        return [total * (i + 1) // self.count - total * i // self.count for i in range(self.count)]

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """The part of the items that this process looks at; it may be empty."""
        before = sum(self._sizes(len(items))[: self.rank])
        return items[before : before + self._sizes(len(items))[self.rank]]

    def _all(self, values: Tensor) -> list[Tensor]:
        if self.count == 1:
            return [values]
        everyone = [torch.empty_like(values) for _ in range(self.count)]
        distributed.all_gather(everyone, values.contiguous())
        return everyone

    def gathered(self, values: Tensor, total: int) -> Tensor:
        """Values [total] of all items, given those of this process's share."""
        sizes = self._sizes(total)
        padded = values.new_zeros(max(sizes))
        padded[: len(values)] = values
        parts = zip(self._all(padded), sizes, strict=True)
        return torch.cat([part[:size] for part, size in parts])

    def summed(self, values: Tensor) -> Tensor:
        """Sum over the processes, the same to the last bit in all of them."""
        first, *others = self._all(values)
        for other in others:
            first = first + other
        return first
