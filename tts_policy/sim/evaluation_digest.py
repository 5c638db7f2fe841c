# SPDX-License-Identifier: Apache-2.0
"""What a measurement of an arm depends on, as a digest: it stays valid while the bundle grows.

A bundle gets a table for another sparsity or a pruner for another sampler, and the arms that read
neither are what they were. An arm that is not, is measured anew.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from tts_policy.core.bundle import Bundle
from tts_policy.core.pruner import Pruner
from tts_policy.sim.evaluation_arms import LEARNED_PLANS, Arm, ArmError

DIGITS = 16


class ArmDigests:
    """Digests of the arms of one bundle."""

    def __init__(self, bundle: Bundle) -> None:
        """Take in the policy, which all arms share."""
        self._bundle = bundle
        network = bundle.network
        self._policy = hashlib.sha256(repr((network.contract, network.spec)).encode())
        _take_in(self._policy, network.state_dict())

    def of(self, arm: Arm) -> str:
        """16 hexadecimal digits of the policy, its setting and what the plans are made from.

        Raises
        ------
        ArmError
            if the bundle cannot run the arm.

        """
        digest, setting = self._policy.copy(), arm.setting(self._bundle)
        # The recommendation is advice to a user; an arm runs at its own sparsity.
        setting = replace(setting, sampler=replace(setting.sampler, recommended_sparsity=0.0))
        digest.update(repr((arm.plan, arm.asked_sparsity, setting)).encode())
        if arm.plan in LEARNED_PLANS:
            _take_in(digest, self._plan_weights(arm))
        return digest.hexdigest()[:DIGITS]

    def _plan_weights(self, arm: Arm) -> Mapping[str, Tensor]:
        pruner = self._bundle.samplers.get(arm.sampler, (None, None))[1]
        if pruner is None:
            return {}
        if isinstance(pruner, Pruner) and not pruner.reads_observation:
            return {'table': pruner.table(arm.sparsity)}
        return pruner.state_dict()


class Validity:
    """Tells measurements, records of the log or rows, of the bundles at hand from others."""

    def __init__(self, bundles: Mapping[str, Bundle]) -> None:
        """Bundles of the tasks asked for; nothing is known of others, and they are left alone."""
        self._digests = {task: ArmDigests(bundle) for task, bundle in bundles.items()}
        self._known: dict[tuple[str, str], str] = {}

    def digest(self, task: str, arm: Arm) -> str:
        """Digest of an arm of a task asked for; raises ArmError if its bundle cannot run it."""
        if (task, arm.name) not in self._known:
            self._known[task, arm.name] = self._digests[task].of(arm)
        return self._known[task, arm.name]

    def holds(self, measured: Mapping[str, Any]) -> bool:
        """Whether the bundle at hand would be measured in the same way."""
        task = measured['task']
        if task not in self._digests:
            return True
        try:
            return self.digest(task, Arm.parse(measured['arm'])) == measured.get('digest')
        except ArmError:
            return False


def _take_in(digest: hashlib._Hash, weights: Mapping[str, Tensor]) -> None:
    for name, value in weights.items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
