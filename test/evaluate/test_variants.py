# SPDX-License-Identifier: Apache-2.0
"""Variants of an evaluation: how they are written, and what plans they make of one bundle."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tts_policy.evaluate.variants import PLANS, VARIANT_SETS, Variant, VariantError, parse_variants
from tts_policy.policy.bundle import Bundle, BundleError, load_bundle, save_random_bundle
from tts_policy.policy.denoisers.dit import DiTOptions
from tts_policy.policy.encoders.cnn import CnnSpec
from tts_policy.policy.network import NetworkSpec
from tts_policy.policy.plan import Plan, Reuse, make_plan, static_plan
from tts_policy.policy.pruner import Pruner
from tts_policy.policy.sampler import DIFFUSION_SAMPLERS, FLOW_SAMPLERS
from tts_policy.sim.panda import PANDA_CONTRACT

TINY = NetworkSpec(width=16, layers=2, heads=2, encoder=CnnSpec(16))


@pytest.fixture(scope='module')
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp('bundle')
    save_random_bundle(folder, PANDA_CONTRACT, DIFFUSION_SAMPLERS, TINY)
    return load_bundle(Path(folder))


@pytest.fixture(scope='module')
def tokens() -> torch.Tensor:
    return torch.randn(5, 2, TINY.width, generator=torch.Generator().manual_seed(0))


def plans(text: str, bundle: Bundle, tokens: torch.Tensor, ticks: int = 3) -> list[Plan]:
    """Plans of ticks with different memories, every earlier feature valid."""
    variant = Variant.parse(text)
    setting, source = variant.setting(bundle), variant.plan_source(bundle, tokens)
    assert source is not None
    source.begin(7)
    valid = np.ones((variant.steps, bundle.network.denoiser.spec.blocks), bool)
    forced = setting.sampler.force_first_step
    with torch.no_grad():
        gates = source.gates(torch.randn(variant.steps, TINY.width))
        return [
            make_plan(
                source(gates, tokens[tick : tick + 1], variant.asked_sparsity)[0].numpy(),
                variant.asked_sparsity,
                valid,
                forced,
                bundle.network.denoiser.spec.stack.kinds,
            )
            for tick in range(ticks)
        ]


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(['ddpm100', 'ddim1', 'ddim10', 'ddim16']),
    st.sampled_from(['', *(f':{plan}:0.8' for plan in PLANS)]),
    st.lists(
        st.sampled_from(['forced', 'free', 'fresh', 'execute4', 'age3', 'blind']), max_size=2
    ),
)
def test_a_name_is_parsed_back(scheduler: str, plan: str, options: list[str]) -> None:
    name = scheduler + plan + ''.join(f'+{option}' for option in options)
    assert Variant.parse(name).name == name


@pytest.mark.parametrize(
    ('text', 'reason'),
    [
        ('heun10', 'variant: expected a scheduler such as ddim10'),
        ('ddim10:learned', 'plan: expected PLAN:SPARSITY'),
        ('ddim10:guessed:0.8', 'plan: expected PLAN:SPARSITY'),
        ('ddim10:learned:1', 'sparsity: expected above 0 and below 1'),
        ('ddim10:learned:nan', 'sparsity: expected above 0 and below 1'),
        ('ddim10+execute', 'option: expected one of'),
        ('ddim10+forced2', 'option: expected one of'),
        ('ddim10+deaf', 'option: expected one of'),
    ],
)
def test_variants_off_the_form_are_refused_with_the_reason(text: str, reason: str) -> None:
    with pytest.raises(VariantError, match=reason):
        Variant.parse(text)


def test_sets_hold_every_variant_once_and_the_named_ones_first() -> None:
    everything = parse_variants(['all'])
    assert [variant.name for variant in everything] == VARIANT_SETS['all']
    assert VARIANT_SETS['all'][: len(VARIANT_SETS['named'])] == VARIANT_SETS['named']
    assert parse_variants(['named', 'ddpm100', 'ddim7']) == parse_variants(
        [*VARIANT_SETS['named'], 'ddim7']
    )


def test_a_dense_scheduler_needs_no_entry_in_the_bundle(bundle: Bundle) -> None:
    variant = Variant.parse('ddim3')
    setting = variant.setting(bundle)
    assert (setting.sampler.scheduler.kind, setting.sampler.scheduler.steps) == ('ddim', 3)
    assert setting.sampler.hold_noise and setting.execute == 8
    assert setting.sampler.temperature == bundle.samplers['ddim10'][0].temperature
    assert variant.plan_source(bundle, torch.empty(0)) is None


@pytest.mark.parametrize('off', [Reuse.FORWARD, Reuse.TIMESTEP, Reuse.ROLLOUT])
def test_without_a_class_of_reuse_the_same_cells_are_computed(
    bundle: Bundle, tokens: torch.Tensor, off: Reuse
) -> None:
    mixed = copy.deepcopy(bundle)
    pruner = mixed.samplers['ddim10'][1]
    assert isinstance(pruner, Pruner)
    torch.manual_seed(0)
    torch.nn.init.normal_(pruner.tables)
    torch.nn.init.zeros_(pruner.cell)
    whole, without = (
        np.stack(plans(name, mixed, tokens))
        for name in ('ddim10:learned:0.8+free', f'ddim10:no_{off.name.lower()}:0.8+free')
    )
    assert np.array_equal(whole == Reuse.COMPUTE, without == Reuse.COMPUTE)
    kept = whole != off
    assert np.array_equal(whole[kept], without[kept])
    # The class stays the last resort, where no other one is valid.
    assert (whole == off).sum() > 2 * (without == off).sum()


def test_options_change_what_they_name_and_nothing_else(bundle: Bundle) -> None:
    plain = Variant.parse('ddim10:learned:0.8').setting(bundle)
    assert plain.sampler == bundle.samplers['ddim10'][0]
    changed = Variant.parse('ddim10:learned:0.8+forced+fresh+age3+execute2+blind').setting(bundle)
    sampler = changed.sampler
    assert (sampler.force_first_step, sampler.hold_noise, sampler.max_rollout_age) == (
        True,
        False,
        3,
    )
    assert (changed.execute, changed.blind) == (2, True)
    assert sampler.scheduler == plain.sampler.scheduler


@pytest.mark.parametrize(
    ('option', 'hold_noise', 'temperature'),
    [('held', True, 1.0), ('fresh', False, 1.0), ('noiseless', True, 0.0)],
)
def test_noise_of_a_variant_is_what_its_option_says(
    bundle: Bundle, option: str, hold_noise: bool, temperature: float
) -> None:
    for sampler in ('ddim10', 'ddim3'):
        spec = Variant.parse(f'{sampler}+{option}').setting(bundle).sampler
        assert (spec.hold_noise, spec.temperature) == (hold_noise, temperature)


def test_a_plan_without_a_pruner_in_the_bundle_is_refused(bundle: Bundle) -> None:
    with pytest.raises(
        BundleError, match=r"ddim16:learned:0\.8: expected a bundle with a pruner for 'ddim16'"
    ):
        Variant.parse('ddim16:learned:0.8').plan_source(bundle, torch.empty(0))


@pytest.mark.parametrize('name', PLANS)
def test_every_plan_computes_the_cells_it_was_asked_for(
    name: str, bundle: Bundle, tokens: torch.Tensor
) -> None:
    for plan in plans(f'ddim10:{name}:0.8', bundle, tokens):
        assert (plan == Reuse.COMPUTE).sum() == 12


def test_the_static_plan_is_the_schedule_of_whole_steps(
    bundle: Bundle, tokens: torch.Tensor
) -> None:
    (plan, *_) = plans('ddim16:static:0.8', bundle, tokens)
    # 3.2 steps are rounded up: the baseline is never cheaper than what it is compared with.
    assert np.array_equal(plan, static_plan(16, 6, 4))


@pytest.mark.parametrize('off', [Reuse.FORWARD, Reuse.TIMESTEP, Reuse.ROLLOUT])
def test_a_class_that_is_off_is_in_no_plan(
    off: Reuse, bundle: Bundle, tokens: torch.Tensor
) -> None:
    seen = plans(f'ddim10:no_{off.name.lower()}:0.8', bundle, tokens)
    assert not any((plan == off).any() for plan in seen)


def test_the_mean_plan_does_not_look_and_random_ones_depend_on_the_seed(
    bundle: Bundle, tokens: torch.Tensor
) -> None:
    first, *others = plans('ddim10:mean:0.8', bundle, tokens)
    assert all(np.array_equal(first, other) for other in others)
    for name in ('random', 'shuffled'):
        once, again = (plans(f'ddim10:{name}:0.8', bundle, tokens) for _ in range(2))
        assert np.array_equal(once, again)
    assert not np.array_equal(*plans('ddim10:random:0.8', bundle, tokens, 2))


def test_only_plans_that_run_the_pruner_pay_for_it(bundle: Bundle, tokens: torch.Tensor) -> None:
    pruner = bundle.samplers['ddim10'][1]
    assert pruner is not None
    for name in PLANS:
        source = Variant.parse(f'ddim10:{name}:0.8').plan_source(bundle, tokens)
        assert source is not None
        free = name in ('mean', 'static', 'random')
        assert source.flops == (0 if free else pruner.spec.flops), name


def test_a_sampler_made_on_the_fly_keeps_the_noise_schedule_of_the_bundle(bundle: Bundle) -> None:
    spec = bundle.samplers['ddim10'][0]
    linear = replace(spec.scheduler, beta_schedule='linear', prediction='sample', clip=2.0)
    imported = replace(bundle, samplers={'ddim10': (replace(spec, scheduler=linear), None)})
    made = Variant.parse('ddim3').setting(imported).sampler.scheduler
    assert made == replace(linear, steps=3)


@pytest.mark.parametrize('text', ['ddim101', 'ddim10:learned:0.8+age0'])
def test_a_variant_beyond_the_limits_of_samplers_is_refused(text: str, bundle: Bundle) -> None:
    with pytest.raises(VariantError, match=re.escape(text)):
        Variant.parse(text).setting(bundle)


def test_a_flow_is_run_by_euler_steps_and_by_nothing_else(tmp_path: Path) -> None:
    network = replace(TINY, denoiser=DiTOptions(time_features=16), objective='flow')
    save_random_bundle(tmp_path, PANDA_CONTRACT, FLOW_SAMPLERS, network)
    flow = load_bundle(tmp_path)
    variant = Variant.parse('flow5:static:0.6')
    assert variant.setting(flow).sampler.scheduler.timesteps() == [0.0, 0.2, 0.4, 0.6, 0.8]
    assert variant.reference == 'flow10'
    assert variant.plan_source(flow, torch.empty(0)) is not None
    with pytest.raises(VariantError, match='ddim10: scheduler'):
        Variant.parse('ddim10').setting(flow)


@pytest.mark.parametrize('steps', [3, 5, 8])
def test_dpm_solver_samples_what_a_diffusion_bundle_predicts(bundle: Bundle, steps: int) -> None:
    variant = Variant.parse(f'dpm{steps}')
    scheduler = variant.setting(bundle).sampler.scheduler
    known = bundle.samplers['ddim10'][0].scheduler
    assert scheduler == replace(known, kind='dpm_solver', steps=steps)
    assert len(scheduler.make().table) == steps
    assert variant.name == f'dpm{steps}' and variant.reference == 'ddpm100'
