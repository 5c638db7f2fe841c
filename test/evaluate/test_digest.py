# SPDX-License-Identifier: Apache-2.0
"""Which measurements stay valid when a bundle changes, and which do not."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip('robosuite', reason='robosuite is not installed')

from tts_policy.evaluate import evaluate_policy
from tts_policy.evaluate.digest import ExpectedDigests
from tts_policy.evaluate.variants import Variant
from tts_policy.policy.bundle import load_bundle, save_bundle, save_pruner
from tts_policy.policy.pruner import Pruner
from tts_policy.policy.sampler import DIFFUSION_SAMPLERS

Grow = Callable[[Path, Path, float], Path]


@pytest.fixture
def constant(bundle: Path, tmp_path: Path) -> Path:
    """A bundle whose pruner has the plan of its table whatever it sees."""
    other = Path(shutil.copytree(bundle, tmp_path / 'constant'))
    for name in DIFFUSION_SAMPLERS:
        pruner = load_bundle(other).samplers[name][1]
        assert isinstance(pruner, Pruner)
        torch.nn.init.zeros_(pruner.cell)
        save_pruner(other, name, pruner)
    return other


def digests(folder: Path, names: list[str]) -> dict[str, str | None]:
    expected = ExpectedDigests({'lift': load_bundle(folder)})
    return {name: expected.of('lift', name) for name in names}


def test_variants_that_read_what_a_bundle_kept_keep_their_measurements(
    constant: Path, tmp_path: Path, grow: Grow
) -> None:
    kept = ['ddpm100', 'ddim3', 'ddim10:static:0.8', 'ddim10:learned:0.8', 'ddim10+fresh']
    # 0.6 was served by the table of 0.8, and gets its own.
    names = [*kept, 'ddim10:learned:0.6']
    before, after = (
        digests(folder, names) for folder in (constant, grow(constant, tmp_path / 'more', 0.6))
    )
    assert [name for name in names if before[name] == after[name]] == kept
    assert len(set(before.values())) == len(names)


def test_the_order_of_cells_that_a_plan_reuses_matters_to_other_sparsities_alone(
    constant: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(constant, tmp_path / 'other'))
    pruner = load_bundle(other).samplers['ddim10'][1]
    assert isinstance(pruner, Pruner)
    with torch.no_grad():
        logits = pruner.table(0.8)
        best = logits[..., 1:].max(dim=-1).values
        margin = (logits[..., 0] - best).flatten()
        reused = margin.argsort(descending=True, stable=True)[round(0.2 * margin.numel()) :]
        margin[reused] = margin[reused.flip(0)]
        logits[..., 0] = best + margin.view_as(best)
    save_pruner(other, 'ddim10', pruner)
    names = [f'ddim10:learned:{sparsity}' for sparsity in (0.8, 0.6, 0.9)]
    before, after = digests(constant, names), digests(other, names)
    assert [before[name] == after[name] for name in names] == [True, False, True]


def test_a_table_that_only_looks_like_another_sparsity_is_told_apart(
    bundle: Path, tmp_path: Path, grow: Grow
) -> None:
    # A pruner that reads the observation is taken in whole.
    other = grow(bundle, tmp_path / 'more', 0.6)
    names = ['ddim10:learned:0.8', 'ddim10:static:0.8']
    before, after = digests(bundle, names), digests(other, names)
    assert before[names[0]] != after[names[0]] and before[names[1]] == after[names[1]]


def test_measurements_of_another_policy_or_setting_are_told_from_these(
    bundle: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(bundle, tmp_path / 'other'))
    network = load_bundle(other).network
    torch.nn.init.normal_(next(network.parameters()))
    known = {name: spec for name, (spec, _) in load_bundle(bundle).samplers.items()}
    save_bundle(other, 'retrained', network, known)
    noiseless = Path(shutil.copytree(bundle, tmp_path / 'noiseless'))
    save_bundle(
        noiseless,
        'noiseless',
        load_bundle(bundle).network,
        {name: replace(spec, temperature=0.0) for name, spec in known.items()},
    )
    here, there, quiet = (
        digests(folder, ['ddim10', 'ddim10+fresh']) for folder in (bundle, other, noiseless)
    )
    assert len({*here.values(), *there.values(), *quiet.values()}) == 5
    # The option sets the temperature, whatever the bundle's is.
    assert here['ddim10+fresh'] == quiet['ddim10+fresh']


def test_what_is_forced_matters_to_plans_of_a_pruner_alone(constant: Path, tmp_path: Path) -> None:
    bundle = load_bundle(constant)
    other = Path(shutil.copytree(constant, tmp_path / 'other'))
    specs = {
        name: replace(spec, force_first_step=not spec.force_first_step, max_rollout_age=3)
        for name, (spec, _) in bundle.samplers.items()
    }
    save_bundle(other, 'other', bundle.network, specs)
    for name, (_, pruner) in bundle.samplers.items():
        if isinstance(pruner, Pruner):
            save_pruner(other, name, pruner)
    names = ['ddim10', 'ddim10+execute4', 'ddim10:static:0.8', 'ddim10:learned:0.8']
    before, after = digests(constant, names), digests(other, names)
    assert [name for name in names if before[name] == after[name]] == names[:3]


def test_measurements_of_other_bundles_are_left_out_and_do_not_hide_these(bundle: Path) -> None:
    expected = ExpectedDigests({'lift': load_bundle(bundle)})
    own = expected.of('lift', 'ddim10')

    def record(
        task: str, seed: int, digest: str | None, variant: str = 'ddim10'
    ) -> dict[str, Any]:
        given = {} if digest is None else {'digest': digest}
        return {'task': task, 'variant': variant, 'seed': seed, **given}

    log = [
        record('lift', 1, own),
        record('lift', 1, 'other'),
        record('lift', 2, None),
        record('lift', 3, own, 'flow10'),
        # Of a task that is not asked for nothing is known: what came last stands, unmixed.
        record('can', 1, 'old'),
        record('can', 2, 'new'),
        record('can', 3, None),
    ]
    assert expected.matching(log) == [log[0], log[5]]


def test_a_constant_plan_is_its_own_mean(
    constant: Path, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [f'ddim10:{plan}:0.8' for plan in ('learned', 'mean', 'shuffled')]
    variants = [Variant.parse(name) for name in names]
    able = evaluate_policy.runnable('lift', variants, load_bundle(constant))
    assert [variant.name for variant in able] == names[:1]
    told = capsys.readouterr().err
    assert all(f'left out {name}: with this bundle it is {names[0]}' in told for name in names[1:])
    assert len(evaluate_policy.runnable('lift', variants, load_bundle(bundle))) == 3
