# SPDX-License-Identifier: Apache-2.0
"""The processes of one training, as torchrun starts them, which share every batch.

All hold the same sequences and draw the same random numbers. Errors and gradients are gathered
from all of them in the order of their ranks, so that all make the same decisions and nothing else
has to be sent. Only the first process reads a checkpoint and writes files.
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
        """Join the processes that torchrun started; without torchrun there is only this one.

        device: one of DEVICES; with several GPUs every process uses that of its local rank.
        Raises ValueError for another device, or if it does not exist.
        """
        if device not in DEVICES:
            raise ValueError(f'device: expected one of {list(DEVICES)}, got {device!r}')
        local, count = int(os.environ.get('LOCAL_RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
        if device == 'cuda':
            if torch.cuda.device_count() <= local:
                raise ValueError(
                    'device: expected a GPU for each process of this machine, got '
                    f'{torch.cuda.device_count()} for process {local}'
                )
            torch.cuda.set_device(local)
        if count > 1:
            distributed.init_process_group('nccl' if device == 'cuda' else 'gloo')
        return Replicas(int(os.environ.get('RANK', 0)), count, torch.device(device))

    @staticmethod
    def leave() -> None:
        """Leave the group, if there is one."""
        if distributed.is_initialized():
            distributed.destroy_process_group()

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def of_first(self, made: Item | None) -> Item | None:
        """Return what the first process made; the others pass None."""
        if self.count == 1:
            return made
        carried = [made]
        distributed.broadcast_object_list(carried, device=self.device)
        return carried[0]

    def _sizes(self, total: int) -> list[int]:
        return [total * (i + 1) // self.count - total * i // self.count for i in range(self.count)]

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """Return the part of the items for this process; it may be empty."""
        before = sum(self._sizes(len(items))[: self.rank])
        return items[before : before + self._sizes(len(items))[self.rank]]

    def _all(self, values: Tensor) -> list[Tensor]:
        if self.count == 1:
            return [values]
        everyone = [torch.empty_like(values) for _ in range(self.count)]
        distributed.all_gather(everyone, values.contiguous())
        return everyone

    def gathered(self, values: Tensor, total: int) -> Tensor:
        """Return the values [total] of all items, given those of this process's share."""
        sizes = self._sizes(total)
        padded = values.new_zeros(max(sizes))
        padded[: len(values)] = values
        parts = zip(self._all(padded), sizes, strict=True)
        return torch.cat([part[:size] for part, size in parts])

    def summed(self, values: Tensor) -> Tensor:
        """Return the sum over the processes, the same to the last bit in all of them."""
        first, *others = self._all(values)
        for other in others:
            first = first + other
        return first
