# SPDX-License-Identifier: Apache-2.0
"""The variants of an evaluation: a scheduler, a source of plans, and how the policy is run.

A variant is written SCHEDULER[:PLAN:SPARSITY][+OPTION...], for instance

    ddpm100                           dense, DDPM with 100 steps
    ddim3                             dense, DDIM with 3 steps
    dpm5                              dense, DPM-Solver++(2M) with 5 steps
    ddim10:learned:0.8                the pruner's plan at 80 % reuse
    ddim10:static:0.8+forced          static schedule of that cost, step 0 computed
    ddim10:learned:0.8+execute4+age8  4 actions a chunk, cached features at most 8 ticks old
    ddpm100+fresh                     noise of full temperature, drawn anew for every chunk
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from tts_policy.evaluate.plan_sources import (
    Learned,
    Mean,
    PlanSource,
    Random,
    Shuffled,
    Static,
    Without,
)
from tts_policy.policy.bundle import AnyPruner, Bundle, BundleError
from tts_policy.policy.plan import Reuse
from tts_policy.policy.pruner import PrunerSpec
from tts_policy.policy.sampler import SamplerSpec
from tts_policy.policy.schedulers.scheduler import FLOW, SCHEDULERS

REFERENCE = 'ddpm100'
FLOW_REFERENCE = 'flow10'
# Kinds of schedulers by the names they have in variants; `dpm` is short for `dpm_solver`.
KINDS = {'dpm': 'dpm_solver'} | {kind: kind for kind in SCHEDULERS}
_SCHEDULER = re.compile(f'({"|".join(KINDS)})([1-9][0-9]*)')
_OPTION = re.compile(r'([a-z]+)(\d*)')


class VariantError(ValueError):
    """A variant that cannot be written or run like this; the message says what was expected."""


@dataclass(frozen=True)
class Setting:
    """How a variant runs: sampler, actions executed a chunk, and whether the camera deceives."""

    sampler: SamplerSpec
    execute: int
    blind: bool = False


def _sampler(**changes: object) -> Callable[[Setting, int], Setting]:
    return lambda setting, _: replace(setting, sampler=replace(setting.sampler, **changes))  # type: ignore[arg-type]


NOISE: dict[str, Callable[[Setting, int], Setting]] = {
    'held': _sampler(hold_noise=True, temperature=1.0),
    'fresh': _sampler(hold_noise=False, temperature=1.0),
    'noiseless': _sampler(temperature=0.0),
}
OPTIONS: dict[str, Callable[[Setting, int], Setting]] = {
    **NOISE,
    'forced': _sampler(force_first_step=True),
    'free': _sampler(force_first_step=False),
    'age': lambda s, ticks: replace(s, sampler=replace(s.sampler, max_rollout_age=ticks)),
    'execute': lambda setting, actions: replace(setting, execute=actions),
    'blind': lambda setting, _: replace(setting, blind=True),
}
WITH_NUMBER = {'age', 'execute'}

# Plan sources by name, made from a pruner and observation tokens [M, To, D] of other episodes.
LEARNED_PLANS: dict[str, Callable[[AnyPruner, Tensor], PlanSource]] = {
    'learned': lambda pruner, _: Learned(pruner),
    'mean': Mean,
    'shuffled': Shuffled,
    'no_forward': lambda pruner, _: Without(pruner, Reuse.FORWARD),
    'no_timestep': lambda pruner, _: Without(pruner, Reuse.TIMESTEP),
    'no_rollout': lambda pruner, _: Without(pruner, Reuse.ROLLOUT),
}
PLANS = (*LEARNED_PLANS, 'static', 'random')


@dataclass(frozen=True)
class Variant:
    """One way to run a policy; `plan` is empty for a dense variant."""

    scheduler: str
    steps: int
    plan: str = ''
    sparsity: float = 0.0
    options: tuple[str, ...] = ()

    @property
    def sampler(self) -> str:
        """Name that a bundle would have for the sampler."""
        return f'{self.scheduler}{self.steps}'

    @property
    def name(self) -> str:
        """Name as given on the command line."""
        plan = f':{self.plan}:{self.sparsity:g}' if self.plan else ''
        return f'{self.sampler}{plan}' + ''.join(f'+{option}' for option in self.options)

    @property
    def reference(self) -> str:
        """Dense variant to compare with, which executes as many actions of a chunk."""
        execute = [f'+{option}' for option in self.options if option.startswith('execute')]
        return (FLOW_REFERENCE if self.scheduler == FLOW else REFERENCE) + ''.join(execute)

    @property
    def asked_sparsity(self) -> float:
        """Sparsity the policy is run at; a static schedule takes whole steps, rounded up."""
        if self.plan != 'static':
            return self.sparsity
        return 1.0 - self.static_count / self.steps

    @property
    def static_count(self) -> int:
        """Steps of the static schedule of this sparsity."""
        return math.ceil((1 - self.sparsity) * self.steps - 1e-9)

    @staticmethod
    def parse(text: str) -> Variant:
        """Inverse of `name`; raises VariantError saying what was expected."""
        head, *options = text.split('+')
        scheduler, *plan = head.split(':')
        match = _SCHEDULER.fullmatch(scheduler)
        if match is None:
            raise VariantError(f'variant: expected a scheduler such as ddim10 first, got {text!r}')
        for option in options:
            _check_option(option)
        variant = Variant(match[1], int(match[2]), options=tuple(options))
        if not plan:
            return variant
        if len(plan) != 2 or plan[0] not in PLANS:
            raise VariantError(
                f'plan: expected PLAN:SPARSITY, PLAN one of {list(PLANS)}, got {text!r}'
            )
        try:
            sparsity = float(plan[1])
        except ValueError:
            sparsity = -1.0
        if not 0.0 < sparsity < 1.0:
            raise VariantError(f'sparsity: expected above 0 and below 1, got {text!r}')
        return replace(variant, plan=plan[0], sparsity=sparsity)

    def setting(self, bundle: Bundle) -> Setting:
        """How the variant runs with a bundle: its sampler of that name, or one made on the fly.

        Raises
        ------
        VariantError
            if the bundle's noise schedule or a limit of samplers does not allow the variant.

        """
        try:
            return self._setting(bundle)
        except ValueError as error:
            raise VariantError(f'{self.name}: {error}') from error

    def _setting(self, bundle: Bundle) -> Setting:
        known = bundle.samplers.get(self.sampler)
        if known is not None:
            spec = known[0]
        else:
            # The network's noise schedule and prediction are the same for every sampler.
            scheduler = bundle.samplers[bundle.default_sampler][0].scheduler
            scheduler = replace(scheduler, kind=KINDS[self.scheduler], steps=self.steps)
            bundle.network.spec.check_scheduler(scheduler)
            temperature = bundle.samplers[bundle.default_sampler][0].temperature
            spec = SamplerSpec(scheduler, force_first_step=False, temperature=temperature)
        if self.plan == 'no_rollout':
            # Nothing else is valid at step 0 before anything has been computed.
            spec = replace(spec, force_first_step=True)
        setting = Setting(spec, bundle.network.contract.action.execute)
        for option in self.options:
            name, number = _OPTION.fullmatch(option).groups()  # type: ignore[union-attr]
            setting = OPTIONS[name](setting, int(number or 0))
        return setting

    def made_plan(self, bundle: Bundle) -> str:
        """`plan`, or `learned` where it comes to the same: a constant plan is its own mean."""
        pruner = self.pruner(bundle)
        constant = pruner is not None and not pruner.reads_observation
        return 'learned' if constant and self.plan in ('mean', 'shuffled') else self.plan

    def pruner(self, bundle: Bundle) -> AnyPruner | None:
        """Pruner that the bundle has for the variant's sampler."""
        return bundle.samplers.get(self.sampler, (None, None))[1]

    def plan_source(self, bundle: Bundle, tokens: Tensor) -> PlanSource | None:
        """Source of the plans, None for a dense variant; tokens [M, To, D] are other episodes'.

        Raises
        ------
        BundleError
            if the variant needs a pruner that the bundle does not have.

        """
        if not self.plan:
            return None
        if self.plan in LEARNED_PLANS:
            pruner = self.pruner(bundle)
            if pruner is None:
                raise BundleError(
                    f'{self.name}: expected a bundle with a pruner for {self.sampler!r}, got none'
                )
            return LEARNED_PLANS[self.plan](pruner, tokens)
        denoiser = bundle.network.denoiser.spec
        sizes = PrunerSpec.of(denoiser, self.steps, (0.0,), hidden=1)
        return Random(sizes) if self.plan == 'random' else Static(sizes, self.static_count)


def _check_option(option: str) -> None:
    match = _OPTION.fullmatch(option)
    if match is None or match[1] not in OPTIONS or bool(match[2]) != (match[1] in WITH_NUMBER):
        names = [f'{name}N' if name in WITH_NUMBER else name for name in OPTIONS]
        raise VariantError(f'option: expected one of {names}, got {option!r}')


def _named() -> list[str]:
    dense = [REFERENCE, *(f'ddim{steps}' for steps in (2, 3, 5, 10, 16))]
    headline = ['ddim10:learned:0.8', 'ddpm100:learned:0.95']
    return [*dense[:1], *headline, *dense[1:], 'ddim10:static:0.8', 'ddpm100:static:0.95']


def _everything() -> list[str]:
    points = ('ddim10', '0.8'), ('ddpm100', '0.95')
    ddpm = [
        f'ddpm100:{plan}:{s}' for s in (0.9, 0.93, 0.95, 0.97) for plan in ('learned', 'static')
    ]
    ddim = [
        f'ddim{steps}:{plan}:{s}{step}'
        for steps in (10, 16)
        for s in (0.6, 0.7, 0.8, 0.85)
        for plan, step in (
            ('learned', ''),
            ('learned', '+forced'),
            ('learned', '+free'),
            ('static', ''),
        )
    ]
    controls = [
        f'{sampler}:{plan}:{s}'
        for sampler, s in points
        for plan in ('mean', 'shuffled', 'no_forward', 'no_timestep', 'no_rollout', 'random')
    ]
    modes = [
        f'{sampler}:learned:{s}{mode}'
        for sampler, s in points
        for mode in (
            '+fresh',
            '+held',
            '+execute4',
            '+execute2',
            '+execute4+age8',
            '+execute2+age8',
        )
    ]
    dense = [
        *(f'dpm{steps}' for steps in (3, 5, 8)),
        *(f'ddim10+{mode}' for mode in ('fresh', 'held', 'execute4', 'execute2', 'blind')),
        *(f'{REFERENCE}+{mode}' for mode in ('execute4', 'execute2')),
    ]
    return list(dict.fromkeys([*_named(), *ddpm, *ddim, *controls, *modes, *dense]))


VARIANT_SETS = {'named': _named(), 'all': _everything()}


def parse_variants(texts: list[str]) -> list[Variant]:
    """Variants of a command line, sets of variants by their name; raises VariantError."""
    names = [name for text in texts for name in VARIANT_SETS.get(text, [text])]
    return [Variant.parse(name) for name in dict.fromkeys(names)]
