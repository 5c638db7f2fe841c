# SPDX-License-Identifier: Apache-2.0
"""What every reader of checkpoints returns, and the names that no checkpoint holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tts_policy.convert.restricted_pickle import CheckpointError
from tts_policy.policy.network import PolicyNetwork
from tts_policy.policy.sampler import SamplerSpec

MAX_VALUES = 4096


@dataclass(frozen=True)
class Naming:
    """What a checkpoint does not say: the control period, and names where they are given."""

    period_s: float
    observation_joints: tuple[str, ...] = ()
    action_joints: tuple[str, ...] = ()

    def joints(
        self, observed: Sequence[tuple[str, int]], action_dim: int
    ) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Names of observed vectors, given as (key, length), and of the actions.

        Raises
        ------
        CheckpointError
            if names are given, but not as many as there are values, or a length is absurd.

        """
        # Before anything is made of these lengths: a damaged one would take all memory.
        for what, count in (('observation', sum(n for _, n in observed)), ('action', action_dim)):
            if not 1 <= count <= MAX_VALUES:
                raise CheckpointError(
                    f'{what} must have 1 to {MAX_VALUES} values, got {str(count)[:20]}'
                )
        names = tuple(f'{key}_{n}' for key, length in observed for n in range(length))
        acted = tuple(f'action_{n}' for n in range(action_dim))
        for what, given, default in (
            ('observation', self.observation_joints, names),
            ('action', self.action_joints, acted),
        ):
            if given and len(given) != len(default):
                raise CheckpointError(f'{len(default)} {what} joints expected, got {len(given)}')
        return self.observation_joints or names, self.action_joints or acted


@dataclass(frozen=True)
class ConvertedPolicy:
    """A policy of another project: its name, network, samplers, and remarks for the user."""

    name: str
    network: PolicyNetwork
    samplers: dict[str, SamplerSpec]
    remarks: tuple[str, ...]
