# SPDX-License-Identifier: Apache-2.0
"""Digests of everything that the measurement of a variant depends on.

A bundle may grow: a table for another sparsity or a pruner for another sampler changes nothing for
variants that do not read it, so their digests and measurements stay valid. A variant whose digest
has changed is measured anew.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tts_policy.evaluate.variants import LEARNED_PLANS, Variant, VariantError
from tts_policy.policy.bundle import Bundle
from tts_policy.policy.network import PolicyNetwork
from tts_policy.policy.plan import PlanError, Reuse, make_plan
from tts_policy.policy.pruner import Pruner
from tts_policy.policy.sampler import SamplerSpec
from tts_policy.policy.state_hash import take_in

DIGITS = 16


def _described(network: PolicyNetwork) -> str:
    """Contract and sizes in the form of the first published digests, which must stay valid."""
    sizes = {
        'camera_blocks': 0,
        'resnet': None,
        'vit': None,
        'dit': None,
        'objective': 'diffusion',
    }
    known = 'width layers heads camera_channels camera_blocks train_steps causal cond_layers'
    given = sizes | network.spec.to_dict()
    ordered = {name: given.pop(name) for name in known.split()} | given
    fields = ', '.join(f'{name}={value!r}' for name, value in ordered.items())
    return f'({network.contract!r}, NetworkSpec({fields}))'


class VariantDigests:
    """Digests of the variants of one bundle."""

    def __init__(self, bundle: Bundle) -> None:
        """Take in the policy, which all variants share."""
        self._bundle = bundle
        network = bundle.network
        self._policy = hashlib.sha256(_described(network).encode())
        take_in(self._policy, network.state_dict())

    def of(self, variant: Variant) -> str:
        """16 hexadecimal digits of the policy, its setting and what the plans are made from.

        Raises
        ------
        VariantError
            if the bundle cannot run the variant.

        """
        digest, setting = self._policy.copy(), variant.setting(self._bundle)
        # The recommendation is advice to a user; a variant runs at its own sparsity.
        sampler = replace(setting.sampler, recommended_sparsity=0.0)
        if variant.plan in ('', 'static'):
            # Such a plan is the same whatever is forced, and takes nothing from earlier ticks.
            age = SamplerSpec.max_rollout_age
            sampler = replace(sampler, force_first_step=False, max_rollout_age=age)
        setting = replace(setting, sampler=sampler)
        digest.update(repr((variant.plan, variant.asked_sparsity, setting)).encode())
        pruner = variant.pruner(self._bundle)
        if variant.plan in LEARNED_PLANS and pruner is not None:
            if isinstance(pruner, Pruner) and not pruner.reads_observation:
                digest.update(repr(replace(pruner.spec, sparsities=(0.0,))).encode())
                take_in(digest, self._constant_plan(variant, pruner, sampler))
            else:
                digest.update(repr(pruner.spec).encode())
                take_in(digest, pruner.state_dict())
        return digest.hexdigest()[:DIGITS]

    def _constant_plan(
        self, variant: Variant, pruner: Pruner, sampler: SamplerSpec
    ) -> Mapping[str, Tensor]:
        """What decides the plans of all ticks: computed cells, and preferred classes elsewhere.

        The order in which cells would be computed next matters only at other sparsities.
        """
        spec = pruner.spec
        tokens = torch.zeros(1, spec.obs_steps, spec.memory_width)
        gates = torch.zeros(spec.steps, spec.hidden)
        source = LEARNED_PLANS[variant.plan](pruner, tokens)
        with torch.no_grad():
            logits = source(gates, tokens, variant.sparsity)[0]
        everywhere = np.ones((spec.steps, spec.blocks), bool)
        kinds, forced = self._bundle.network.denoiser.spec.stack.kinds, sampler.force_first_step
        try:
            plan = make_plan(logits.numpy(), variant.sparsity, everywhere, forced, kinds)
        except PlanError as error:
            raise VariantError(f'{variant.name}: {error}') from error
        computed = torch.from_numpy(plan == Reuse.COMPUTE)
        return {'computed': computed, 'reuse': logits[..., Reuse.FORWARD :]}


class ExpectedDigests:
    """Digests of the variants of the present bundles, by which their measurements are selected."""

    def __init__(self, bundles: Mapping[str, Bundle]) -> None:
        """Take in the bundles of the tasks that are asked for."""
        self._digests = {task: VariantDigests(bundle) for task, bundle in bundles.items()}
        self._known: dict[tuple[str, str], str | None] = {}

    def of(self, task: str, variant: str) -> str | None:
        """Digest of a variant by its name, None where the bundle cannot run it."""
        if (task, variant) not in self._known:
            try:
                self._known[task, variant] = self._digests[task].of(Variant.parse(variant))
            except VariantError:
                self._known[task, variant] = None
        return self._known[task, variant]

    def matching(self, measured: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        """Select the measurements of the present bundles, in their order.

        A task that is not asked for has no bundle here. Of its measurements those are kept whose
        digest equals the last one of their variant.
        """
        known = [one for one in measured if 'digest' in one]
        last = {(one['task'], one['variant']): one['digest'] for one in known}
        return [
            one
            for one in known
            if one['digest']
            == (
                self.of(one['task'], one['variant'])
                if one['task'] in self._digests
                else last[one['task'], one['variant']]
            )
        ]
