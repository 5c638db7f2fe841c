# SPDX-License-Identifier: Apache-2.0
"""The pruner's tables: one per sparsity, the nearest serves."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tts_policy.policy.plan import Reuse, make_plan, realised_sparsity
from tts_policy.policy.pruner import Pruner, PrunerSpec

KINDS = np.arange(6) % 3


def _spec(*sparsities: float) -> PrunerSpec:
    return PrunerSpec(10, 6, 8, 2, sparsities)


@pytest.mark.parametrize(
    ('sparsities', 'expected'),
    [
        ((), 'at least 1 entries'),
        ((0.8, 0.5), 'sparsities that rise'),
        ((0.5, 0.5), 'sparsities that rise'),
        ((1.0,), 'less than 1.0'),
        ((-0.1,), 'at least 0.0'),
    ],
)
def test_sparsities_without_order_are_refused(
    sparsities: tuple[float, ...], expected: str
) -> None:
    with pytest.raises(ValueError, match=rf'pruner\.sparsities.*: expected {expected}, got'):
        _spec(*sparsities)


@pytest.mark.parametrize(
    ('asked', 'served'),
    [(0.0, 0.5), (0.5, 0.5), (0.6, 0.5), (0.63, 0.75), (0.76, 0.75), (0.79, 0.8), (0.9, 0.8)],
)
def test_the_table_of_the_nearest_sparsity_serves(asked: float, served: float) -> None:
    pruner = Pruner(_spec(0.5, 0.75, 0.8))
    with torch.no_grad():
        for table, sparsity in zip(pruner.tables, pruner.spec.sparsities, strict=True):
            table.fill_(sparsity)
    assert (pruner.table(asked) == torch.tensor(served)).all()


@pytest.mark.parametrize('sparsity', [0.3, 0.5, 0.7, 0.8, 0.9])
def test_an_untrained_pruner_follows_the_static_schedule(sparsity: float) -> None:
    pruner = Pruner(_spec(0.5, 0.8))
    pruner.start_from_static()
    with torch.no_grad():
        logits = pruner(torch.ones(10, 96), torch.ones(1, 2, 8), sparsity)[0]
    plan = make_plan(logits.numpy(), sparsity, torch.zeros(10, 6).bool().numpy(), True, KINDS)
    assert realised_sparsity(plan) == pytest.approx(sparsity)
    assert (plan[0] == Reuse.COMPUTE).all()
    assert all(row.min() == row.max() for row in plan)


def _filled(*sparsities: float, value: float) -> Pruner:
    pruner = Pruner(_spec(*sparsities))
    torch.nn.init.constant_(pruner.tables, value)
    return pruner


def test_tables_of_another_pruner_serve_the_sparsities_that_have_none() -> None:
    joined = _filled(0.7, 0.8, value=1.0).with_tables_of(_filled(0.5, 0.8, 0.9, value=2.0))
    assert joined.sparsities == (0.5, 0.7, 0.8, 0.9)
    assert [joined.table(s)[0, 0, 0].item() for s in joined.sparsities] == [2.0, 1.0, 1.0, 2.0]


def test_tables_of_a_pruner_that_looks_or_is_of_other_sizes_are_refused() -> None:
    looking = _filled(0.5, value=0.0)
    torch.nn.init.ones_(looking.cell)
    assert looking.reads_observation
    for other in (looking, Pruner(PrunerSpec(9, 6, 8, 2, (0.5,)))):
        with pytest.raises(ValueError, match='expected one of the same sizes with constant plans'):
            _filled(0.8, value=1.0).with_tables_of(other)
