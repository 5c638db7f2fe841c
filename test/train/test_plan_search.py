# SPDX-License-Identifier: Apache-2.0
"""Plan search on a small untrained policy: its errors, its gradient and what a search may do."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tts_policy.policy.denoisers.transformer import TransformerDenoiser, TransformerSpec
from tts_policy.policy.plan import (
    Reuse,
    make_plan,
    realised_sparsity,
    resolve_sources,
    static_plan,
)
from tts_policy.policy.sampler import SamplerSpec
from tts_policy.policy.schedulers.scheduler import SchedulerSpec
from tts_policy.train.plan_budget import PlanBudget
from tts_policy.train.plan_search import PlanSearch, SearchSpec
from tts_policy.train.plan_starts import refined, refinement_steps
from tts_policy.train.pruner_trainer import plan_table
from tts_policy.train.replicas import Replicas
from tts_policy.train.reuse_gradient import Flip, flipped, reuse_gradient
from tts_policy.train.sequences import (
    ActionError,
    DenseTeacher,
    PlanErrors,
    SequenceBatch,
    SequenceChoice,
    TickSequence,
    TrainingSequence,
)

MEASURE = ActionError(first=1, execute=4)
KINDS = np.arange(6) % 3
FORCED = np.arange(6)[:, None].repeat(6, 1) == 0
DDIM = SchedulerSpec('ddim', 5, 20)
DDPM = SchedulerSpec('ddpm', 6, 6)


class _Network:
    """What DenseTeacher reads of a policy."""

    def __init__(self, scale: float) -> None:
        torch.manual_seed(0)
        self.denoiser = TransformerDenoiser(
            TransformerSpec(3, 6, 2, 5, width=16, layers=2, heads=2)
        )
        for parameter in self.denoiser.parameters():
            parameter.requires_grad_(False).mul_(scale)


def _teacher(scheduler: SchedulerSpec, scale: float = 5.0) -> DenseTeacher:
    """Teacher whose weights are `scale` times as large as initial ones: at 1 blocks whisper."""
    return DenseTeacher(_Network(scale), SamplerSpec(scheduler, force_first_step=False))  # type: ignore[arg-type]


def test_the_teacher_has_the_noise_of_its_sampler() -> None:
    for temperature in (0.0, 0.5):
        spec = SamplerSpec(DDPM, temperature=temperature)
        cache = DenseTeacher(_Network(1.0), spec).cache(3)  # type: ignore[arg-type]
        whole = _teacher(DDPM).cache(3)
        assert torch.equal(cache.initial_noise, temperature * whole.initial_noise)
        assert torch.equal(cache.step_noise, temperature * whole.step_noise)
        assert cache.initial_noise.shape == (1, 6, 3)


def test_a_batch_of_several_processes_holds_its_share_and_counts_all() -> None:
    alone = _teacher(DDIM)
    sequences = _sequences(alone, 5)
    sequences[4] = replace(sequences[4], target=sequences[4].target[:2])
    whole = SequenceBatch(alone, sequences)
    sizes = []
    for rank in range(3):
        teacher = DenseTeacher(_Network(5.0), SamplerSpec(DDIM), Replicas(rank, 3))  # type: ignore[arg-type]
        batch = SequenceBatch(teacher, sequences)
        assert (batch.count, batch.ticks) == (whole.count, whole.ticks) == (5, 2)
        sizes.append(batch.size)
        assert batch.targets.shape[1] == batch.size
    assert sizes == [1, 2, 2]
    empty = SequenceBatch(
        DenseTeacher(_Network(5.0), SamplerSpec(DDIM), Replicas(0, 3)), sequences[:1]
    )  # type: ignore[arg-type]
    assert (empty.size, empty.count) == (0, 1)


def _sequences(teacher: DenseTeacher, count: int, ticks: int = 3) -> list[TrainingSequence]:
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(count, 1, 2, 5, generator=generator)
    drift = 0.3 * torch.randn(count, ticks, 2, 5, generator=generator).cumsum(1)
    return teacher.with_targets(
        [TickSequence(features, n) for n, features in enumerate(start + drift)]
    )


def _random_plan(seed: int, steps: int, sparsity: float) -> np.ndarray:
    logits = np.random.default_rng(seed).standard_normal((steps, 6, 4)).astype(np.float32)
    return make_plan(logits, sparsity, np.ones((steps, 6), bool), False, KINDS)


@pytest.mark.parametrize('scheduler', [DDIM, DDPM], ids=['ddim', 'ddpm'])
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000), sparsity=st.sampled_from([0.2, 0.5, 0.8]))
def test_a_batch_of_sequences_gives_what_each_gives_alone(
    scheduler: SchedulerSpec, seed: int, sparsity: float
) -> None:
    teacher = _teacher(scheduler)
    sequences = _sequences(teacher, 3)
    batch, errors = SequenceBatch(teacher, sequences), PlanErrors(teacher, MEASURE)
    plans = [_random_plan(seed + n, scheduler.steps, sparsity) for n in range(2)]
    cache = batch.cache()
    together = [errors.tick(batch, n + 1, plan, cache) for n, plan in enumerate(plans)]
    for row, sequence in enumerate(sequences):
        cache = teacher.first_tick(sequence.sequence)
        for tick, plan in enumerate(plans):
            teacher.conditioner.encode(sequence.sequence.features[tick + 1 : tick + 2])
            with torch.no_grad():
                alone = teacher.loop(cache).run(plan)
            cache.commit(plan)
            # Rounding, magnified by the scale of this network: at most 1.01e-4 in 1,800 cases.
            assert (together[tick][row] - alone[0]).abs().max() < 2e-4


@pytest.mark.parametrize('scheduler', [DDIM, DDPM], ids=['ddim', 'ddpm'])
def test_the_reuse_gradient_is_the_derivative_by_the_features_reused(
    scheduler: SchedulerSpec,
) -> None:
    teacher = _teacher(scheduler, scale=3.0)
    batch, errors = (
        SequenceBatch(teacher, _sequences(teacher, 4, ticks=2)),
        PlanErrors(teacher, MEASURE),
    )
    plan = _random_plan(3, scheduler.steps, 0.6)
    gradient = reuse_gradient(errors, batch, plan)
    base = errors.mean(batch, plan)
    for step, block in np.argwhere(plan == Reuse.ROLLOUT):
        # A rollout feature scaled by 1 + e changes the error by e times its product.
        scaled = copy.copy(batch)
        scaled.first_tick = batch.first_tick.clone()
        scaled.first_tick[step, block] *= 1.001
        derivative = (errors.mean(scaled, plan) - base) / 0.001
        assert derivative == pytest.approx(gradient.rollout[step, block], abs=5e-4)
    assert np.abs(gradient.rollout[plan == Reuse.ROLLOUT]).max() > 0.02
    assert gradient.change(plan) == 0.0


@pytest.mark.parametrize('scheduler', [DDIM, DDPM], ids=['ddim', 'ddpm'])
def test_the_reuse_gradient_foretells_what_flips_change(scheduler: SchedulerSpec) -> None:
    teacher = _teacher(scheduler, scale=1.0)
    batch, errors = (
        SequenceBatch(teacher, _sequences(teacher, 4, ticks=2)),
        PlanErrors(teacher, MEASURE),
    )
    plan = _random_plan(3, scheduler.steps, 0.6)
    gradient = reuse_gradient(errors, batch, plan)
    base = errors.mean(batch, plan)
    flips = [f for f in gradient.flips(tuple(Reuse)) if 0 < abs(f.change) < 0.2 * base]
    measured = [errors.mean(batch, flipped(plan, KINDS, flip)) - base for flip in flips]
    assert len(flips) > 20
    assert np.corrcoef([flip.change for flip in flips], measured)[0, 1] > 0.9


@pytest.mark.parametrize(
    ('cost', 'reached'),
    [((1.0, 1.0, 1.0), 0.9), ((4.0, 2.0, 8.0), 0.95)],
    ids=['equal', 'unequal'],
)
def test_a_search_lowers_the_error_and_keeps_budget_and_forced_cells(
    cost: tuple[float, ...], reached: float
) -> None:
    teacher = _teacher(DDPM)
    sequences = _sequences(teacher, 6)
    errors, batch = PlanErrors(teacher, MEASURE), SequenceBatch(teacher, sequences)
    sample = SequenceBatch(teacher, sequences[:3])
    forced = FORCED
    budget = PlanBudget(12, np.array(cost * 2))
    search = PlanSearch(errors, static_plan(6, 6, 1), budget, forced, SearchSpec(trials=6))
    while search.computed < budget.cells:
        search.grow(sample)
    error = errors.mean(batch, search.plan)
    first = error
    random = np.random.default_rng(0)
    for _ in range(8):
        before, after = search.step(batch, sample, random)
        assert before == pytest.approx(error) and after <= before
        assert search.computed == 12 and budget.affords(search.plan)
        assert (search.plan[0] == Reuse.COMPUTE).all()
        error = after
        assert errors.mean(batch, search.plan) == pytest.approx(error)
    assert error < reached * first


@pytest.mark.parametrize('cells', [12, 17])
def test_a_plan_that_is_too_dear_shrinks_into_the_budget_and_keeps_forced_cells(
    cells: int,
) -> None:
    teacher = _teacher(DDPM)
    batch = SequenceBatch(teacher, _sequences(teacher, 3))
    forced = FORCED
    # Three whole passes; the reserve makes even as many cells of whole passes too dear.
    budget = PlanBudget(cells, np.array((4.0, 2.0, 8.0) * 2), reserve=3.0)
    start = static_plan(6, 6, 3)
    search = PlanSearch(PlanErrors(teacher, MEASURE), start, budget, forced, SearchSpec())
    assert not search.affordable
    while not search.affordable and search.shrink(batch):
        assert (search.plan[0] == Reuse.COMPUTE).all()
        resolve_sources(search.plan, KINDS)
    assert search.computed <= cells
    # What was too dear is gone, and cheap cells fill the budget.
    while search.computed < cells:
        search.grow(batch)
    assert search.affordable and search.computed == cells


def test_a_plan_of_forced_cells_alone_does_not_shrink() -> None:
    teacher = _teacher(DDPM)
    batch = SequenceBatch(teacher, _sequences(teacher, 3))
    forced = FORCED
    budget = PlanBudget(6, np.array((4.0, 2.0, 8.0) * 2), reserve=3.0)
    start = static_plan(6, 6, 1)
    search = PlanSearch(PlanErrors(teacher, MEASURE), start, budget, forced, SearchSpec())
    assert not search.affordable and not search.shrink(batch)
    assert np.array_equal(search.plan, start)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), count=st.integers(1, 8), room=st.floats(-3.0, 3.0))
def test_an_exchange_stays_in_its_room_whenever_that_is_possible(
    seed: int, count: int, room: float
) -> None:
    random = np.random.default_rng(seed)
    cost = np.array([4.0, 2.0, 8.0] * 2)
    excess = cost / cost.mean() - 1

    def flips(reuse: Reuse) -> list[Flip]:
        drawn = random.choice(20 * 6, 24, replace=False)
        return [Flip(*divmod(int(n), 6), reuse, random.uniform(-0.01, 0.01)) for n in drawn]

    def spent(added: list[Flip], removed: list[Flip]) -> float:
        return sum(excess[f.block] for f in added) - sum(excess[f.block] for f in removed)

    budget = PlanBudget(10, cost)
    additions, removals = flips(Reuse.COMPUTE), flips(Reuse.TIMESTEP)
    added, removed = budget.exchange(additions, removals, count, room)
    assert 0 < len(added) == len(removed) <= count
    for chosen in (added, removed):
        assert len({(f.block, f.step) for f in chosen}) == len(chosen)
        for a in chosen:
            assert all(a is b or a.block != b.block or abs(a.step - b.step) > 2 for b in chosen)
    free = budget.exchange(additions, removals, count, 100.0)
    if spent(*free) <= room:
        assert (added, removed) == free
    cheapest = budget.exchange(additions, removals, count, -100.0)
    if spent(*cheapest) <= room:
        assert spent(added, removed) <= room + 1e-9


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), sparsity=st.sampled_from([0.4, 0.6, 0.8]))
def test_a_table_gives_back_its_plan_and_orders_cells_for_other_sparsities(
    seed: int, sparsity: float
) -> None:
    plan = _random_plan(seed, 5, sparsity)
    random = np.random.default_rng(seed)
    computed = plan == Reuse.COMPUTE
    ranking = np.where(computed, 1.0, -1.0) * random.uniform(0.01, 1.0, plan.shape)
    table = plan_table(plan, ranking.astype(np.float32)).numpy()
    valid = np.ones(plan.shape, bool)
    assert (make_plan(table, realised_sparsity(plan), valid, False, KINDS) == plan).all()
    denser = make_plan(table, realised_sparsity(plan) - 0.2, valid, False, KINDS)
    assert (denser[computed] == Reuse.COMPUTE).all()


@pytest.mark.parametrize(('steps', 'blocks'), [(100, 24), (10, 24)])
def test_a_table_in_half_precision_is_refined_pass_by_pass(steps: int, blocks: int) -> None:
    teacher = _teacher(DDIM)
    plan = static_plan(steps, blocks, 3)
    plan[refinement_steps(plan)[2], : blocks // 3] = Reuse.COMPUTE
    budget = PlanBudget(int((plan == Reuse.COMPUTE).sum()), np.ones(blocks))
    forced = np.zeros(plan.shape, bool)
    search = PlanSearch(PlanErrors(teacher, MEASURE), plan, budget, forced, SearchSpec())
    table = plan_table(plan, search.ranking()).half().float().numpy()
    kinds, valid = np.arange(blocks) % 3, np.ones(plan.shape, bool)
    for passes in range(steps - 3):
        dense = refined(plan, search.computed + passes * blocks)
        sparsity = realised_sparsity(dense)
        made = make_plan(table, sparsity, valid, False, kinds)
        assert np.array_equal(made == Reuse.COMPUTE, dense == Reuse.COMPUTE)


def test_a_flip_that_takes_away_a_source_leaves_a_plan_that_can_be_executed() -> None:
    plan = static_plan(4, 6, 1)
    without = flipped(plan, KINDS, Flip(0, 2, Reuse.ROLLOUT, 0.0))
    assert (without[:, 2] == Reuse.ROLLOUT).all()
    assert (np.delete(without, 2, axis=1) == np.delete(plan, 2, axis=1)).all()


def test_sequences_in_which_reuse_errs_most_are_drawn_more_often() -> None:
    teacher = _teacher(DDIM)
    sequences, errors = _sequences(teacher, 8), PlanErrors(teacher, MEASURE)
    choice = SequenceChoice(teacher, sequences, preference=0.5)
    plan = _random_plan(1, DDIM.steps, 0.8)
    choice.measure(errors, plan, size=3)
    alone = [errors.mean(SequenceBatch(teacher, [sequence]), plan) for sequence in sequences]
    assert choice.errors.tolist() == pytest.approx(alone, rel=1e-3)
    random = np.random.default_rng(0)
    counts = np.zeros(8)
    for _ in range(4000):
        (drawn,) = choice.draw(random, 1)
        counts[next(n for n, sequence in enumerate(sequences) if sequence is drawn)] += 1
    expected = 0.5 / 8 + 0.5 * np.array(alone) / sum(alone)
    assert expected.max() > 1.2 * expected.min()
    assert counts / 4000 == pytest.approx(expected, abs=0.03)


def test_without_preference_all_sequences_are_alike() -> None:
    teacher = _teacher(DDIM)
    choice = SequenceChoice(teacher, _sequences(teacher, 4), preference=0.0)
    choice.measure(PlanErrors(teacher, MEASURE), _random_plan(1, 5, 0.8), size=2)
    assert choice.errors is None
    assert len(choice.draw(np.random.default_rng(0), 9)) == 4
    with pytest.raises(ValueError, match=r'preference: expected a share in \[0, 1\], got 2'):
        SequenceChoice(teacher, _sequences(teacher, 2), preference=2)


def test_sequences_without_an_error_are_drawn_when_there_are_no_others() -> None:
    teacher = _teacher(DDIM)
    choice = SequenceChoice(teacher, _sequences(teacher, 4), preference=1.0)
    for errors in ([0.0, 0.0, 0.0, 0.0], [0.0, 0.3, 0.0, 0.0]):
        choice.errors = torch.tensor(errors)
        assert len({id(sequence) for sequence in choice.draw(np.random.default_rng(0), 3)}) == 3
