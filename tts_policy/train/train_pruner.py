# SPDX-License-Identifier: Apache-2.0
"""`train_pruner`: recordings and a bundle's frozen policy to the pruner of one sampler.

Ordered ticks of recorded episodes; tick 0 dense, then each tick sparse with its caches carried
over. The sparsest plan starts from a static schedule, or grows from one of half its cost if that
ends up better; every other grows from the next sparser one. Each is searched for a number of
steps (see `plan_search`), and the plan that did best on lessons kept back becomes the table of
its sparsity.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from tts_policy.bag.topic_arguments import add_topic_argument, parse_pairs
from tts_policy.core.bundle import BundleError, load_bundle, save_pruner
from tts_policy.core.plan import Plan, Reuse, static_plan
from tts_policy.core.pruner import Pruner, PrunerSpec
from tts_policy.core.sampler import SamplerSpec
from tts_policy.train.dataset import BagError, Topics, find_bags, load_windows
from tts_policy.train.lessons import (
    ActionError,
    Lesson,
    LessonBatch,
    SharedPlanLoop,
    forced_cells,
    make_lessons,
)
from tts_policy.train.plan_comparison import compare_plans
from tts_policy.train.plan_search import PlanSearch, SearchSpec
from tts_policy.train.reuse_gradient import reuse_gradient
from tts_policy.train.tick_sequences import DenseTeacher, tick_sequences

KEPT_BACK = 24
VALIDATE_EVERY = 4


@dataclass(frozen=True)
class PrunerTrainingSpec:
    """Settings: search steps per sparsity, lessons a step and of them in a gradient, seed."""

    steps: int
    batch: int
    sample: int
    seed: int
    search: SearchSpec = field(default_factory=SearchSpec)


class PrunerTrainer:
    """Searches one plan per sparsity, the sparsest first, and owns all state of that."""

    def __init__(
        self,
        teacher: DenseTeacher,
        sampler: SamplerSpec,
        sparsities: list[float],
        lessons: list[Lesson],
        measure: ActionError,
        spec: PrunerTrainingSpec,
    ) -> None:
        self._loop, self._measure, self.spec = SharedPlanLoop(teacher), measure, spec
        self.sampler, self.sparsities = sampler, sorted(sparsities)
        kept = max(1, min(KEPT_BACK, len(lessons) // 4))
        self._kept = [
            LessonBatch(teacher, lessons[first : min(first + spec.batch, kept)])
            for first in range(0, kept, spec.batch)
        ]
        self._teacher, self.lessons = teacher, lessons[kept:]
        shape = (sampler.scheduler.steps, teacher.denoiser.spec.blocks)
        self._forced = forced_cells(shape, sampler.force_first_step)
        self.tables: dict[float, Tensor] = {}
        self.best_error = float('inf')
        self.step = 0
        count = max(1, self._budget() // shape[1])
        self._begin([static_plan(*shape, n) for n in sorted({count, max(1, count // 2)})])

    @property
    def sparsity(self) -> float:
        """The sparsity in work."""
        return self.sparsities[-1 - len(self.tables)]

    @property
    def total_steps(self) -> int:
        """Search steps for all sparsities."""
        return self.spec.steps * len(self.sparsities)

    def _budget(self) -> int:
        return round((1 - self.sparsity) * self._forced.size)

    def _begin(self, starts: list[Plan]) -> None:
        """Begin with the sparsity in work; the search starts from the best of some plans."""
        self._search: PlanSearch | None = None
        self._starts = starts
        self.best, self.best_error = starts[0], float('inf')

    def _new_search(self, plan: Plan) -> PlanSearch:
        budget = self._budget()
        return PlanSearch(self._loop, self._measure, plan, budget, self._forced, self.spec.search)

    def _started(self, random: np.random.Generator) -> PlanSearch:
        """Search from the start that is best once it has grown to the budget."""
        searches = [self._new_search(plan) for plan in self._starts]
        for search in searches:
            while search.computed < search.budget:
                search.grow(self._batch(random, self.spec.sample)[1])
        return min(searches, key=lambda search: self._kept_error(search.plan))

    def _random(self) -> np.random.Generator:
        """Random numbers of the step in work; they depend on seed and step alone."""
        return np.random.default_rng([self.spec.seed, self.step])

    def _batch(self, random: np.random.Generator, size: int) -> tuple[LessonBatch, LessonBatch]:
        chosen = random.choice(len(self.lessons), min(size, len(self.lessons)), replace=False)
        lessons = [self.lessons[index] for index in chosen]
        part = lessons[: self.spec.sample]
        return LessonBatch(self._teacher, lessons), LessonBatch(self._teacher, part)

    def train_step(self) -> tuple[float, float]:
        """One step of the search in work; returns the batch error before and after."""
        random = self._random()
        if self._search is None:
            self._search = self._started(random)
        errors = self._search.step(*self._batch(random, self.spec.batch), random)
        self.step += 1
        done = self.step % self.spec.steps == 0
        if done or self.step % VALIDATE_EVERY == 0:
            self._validate(self._search.plan)
        if done:
            self._finish(self._search)
        return errors

    def _kept_error(self, plan: Plan) -> float:
        """Error of a plan on the lessons kept back."""
        return float(np.mean([self._loop.error(b, plan, self._measure) for b in self._kept]))

    def _validate(self, plan: Plan) -> None:
        """Remember the plan if it is the best so far."""
        error = self._kept_error(plan)
        if error < self.best_error:
            self.best, self.best_error = plan, error

    def _finish(self, search: PlanSearch) -> None:
        """Turn the best plan into the table of its sparsity and go on to the next."""
        search.plan = self.best
        sample = self._batch(self._random(), self.spec.sample)[1]
        gradient = reuse_gradient(self._loop, sample, self.best, self._measure)
        self.tables[self.sparsity] = plan_table(self.best, search.ranking(gradient))
        if len(self.tables) < len(self.sparsities):
            self._begin([self.best])

    def pruner(self) -> Pruner:
        """The trained pruner."""
        denoiser = self._teacher.denoiser.spec
        steps, width = self.sampler.scheduler.steps, denoiser.width
        sparsities = tuple(self.sparsities)
        pruner = Pruner(PrunerSpec(steps, denoiser.blocks, width, denoiser.obs_steps, sparsities))
        with torch.no_grad():
            pruner.tables.copy_(torch.stack([self.tables[s] for s in sparsities]))
        return pruner

    def state(self) -> dict[str, Any]:
        """Everything that `restore` continues from."""
        return {
            'step': self.step,
            'tables': self.tables,
            'best': torch.from_numpy(self.best),
            'best_error': self.best_error,
            'search': None if self._search is None else self._search.state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a `state`."""
        self.step, self.tables = state['step'], state['tables']
        if len(self.tables) < len(self.sparsities):
            self._begin([state['best'].numpy()])
            self.best_error = state['best_error']
            if state['search'] is not None:
                self._search = self._new_search(self.best)
                self._search.restore(state['search'])


def plan_table(plan: Plan, ranking: NDArray[np.float32]) -> Tensor:
    """Logits [K, N, 4] whose plan at the sparsity of `plan` is that plan.

    ranking [K, N]: above 0 where the plan computes; orders cells for other sparsities. Where the
    class of the plan has no source, TIMESTEP is preferred to ROLLOUT and that to FORWARD.
    """
    table = np.zeros((*plan.shape, len(Reuse)), np.float32)
    table[..., Reuse.FORWARD], table[..., Reuse.ROLLOUT], table[..., Reuse.TIMESTEP] = (
        0.1,
        0.2,
        0.3,
    )
    reused = plan != Reuse.COMPUTE
    step, block = np.nonzero(reused)
    table[step, block, plan[reused]] = 1.0
    table[..., Reuse.COMPUTE] = table[..., Reuse.FORWARD :].max(axis=-1) + ranking
    return torch.from_numpy(table)


def _save(trainer: PrunerTrainer, out: Path) -> None:
    torch.save(trainer.state(), out / 'checkpoint.tmp')
    (out / 'checkpoint.tmp').replace(out / 'checkpoint.pt')


def _train(trainer: PrunerTrainer, out: Path) -> None:
    log_path = out / 'log.csv'
    new = not log_path.exists()
    with log_path.open('a', newline='') as handle:
        log = csv.writer(handle)
        if new:
            log.writerow(['step', 'sparsity', 'seconds', 'before', 'after', 'kept_back'])
        started = time.monotonic()
        bar = tqdm(total=trainer.total_steps, initial=trainer.step, unit='step', mininterval=5)
        while trainer.step < trainer.total_steps:
            sparsity = trainer.sparsity
            before, after = trainer.train_step()
            best = trainer.best_error
            seconds = round(time.monotonic() - started)
            log.writerow([trainer.step, sparsity, seconds, before, after, best])
            handle.flush()
            _save(trainer, out)
            bar.update()
            bar.set_postfix(sparsity=sparsity, error=f'{after:.4f}', kept_back=f'{best:.4f}')


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Command line of `train_pruner`."""
    parser = argparse.ArgumentParser(prog='train_pruner', description=__doc__.split('\n')[0])
    parser.add_argument(
        'bags', nargs='+', type=Path, help='rosbag2 recordings, or folders of them'
    )
    add_topic_argument(parser)
    parser.add_argument('--bundle', type=Path, required=True, help='gets the pruner')
    parser.add_argument('--sampler', required=True, help='sampler of the bundle, e.g. ddim10')
    parser.add_argument('--out', type=Path, required=True, help='checkpoints, log and report')
    parser.add_argument(
        '--sparsities', type=float, nargs='+', help="default: the sampler's recommendation"
    )
    parser.add_argument('--steps', type=int, default=30, help='search steps for every sparsity')
    parser.add_argument('--batch', type=int, default=16, help='lessons that decide a step')
    parser.add_argument('--sample', type=int, default=8, help='of them, in the gradient')
    parser.add_argument('--trials', type=int, default=12, help='flips tried of every sort')
    parser.add_argument('--episodes', type=int, default=96, help='sequences to train on')
    parser.add_argument('--ticks', type=int, default=5, help='ticks of a sequence')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--threads', type=int, default=1, help='torch threads')
    parser.add_argument('--held-out', type=int, default=10, help='bags kept for the comparison')
    return parser.parse_args(arguments)


def _check_sparsities(sparsities: list[float], sampler: SamplerSpec) -> None:
    """Raise ValueError for one that the sampler cannot run at."""
    for sparsity in sparsities:
        if not 0 < sparsity <= sampler.max_sparsity + 1e-9:
            raise ValueError(
                f'--sparsities must be in (0, {sampler.max_sparsity:.4g}], got {sparsity}'
            )


def main(arguments: list[str] | None = None) -> int:
    """Train, or go on training, add the pruner to the bundle and compare; returns exit status."""
    args = parse_arguments(arguments)
    torch.set_num_threads(args.threads)
    try:
        bundle = load_bundle(args.bundle)
        sampler, _ = bundle.sampler(args.sampler)
        sparsities = args.sparsities or [sampler.recommended_sparsity]
        _check_sparsities(sparsities, sampler)
        network = bundle.network.eval().requires_grad_(False)
        bags = find_bags(args.bags)
        topics = Topics.of(network.contract, parse_pairs(args.topic, 'topic: STREAM:=TOPIC'))
        held_out = load_windows(bags[: args.held_out], network.contract, topics)
        chosen = bags[args.held_out : args.held_out + args.episodes]
        windows = load_windows(chosen, network.contract, topics)
    except (BagError, BundleError, ValueError) as error:
        print(f'train_pruner: {error}', file=sys.stderr)
        return 2
    generator = torch.Generator().manual_seed(args.seed)
    teacher = DenseTeacher(network, sampler)
    sequences = tick_sequences(network, windows, args.episodes, args.ticks, generator)
    spec = PrunerTrainingSpec(
        args.steps, args.batch, args.sample, args.seed, SearchSpec(trials=args.trials)
    )
    contract = network.contract
    measure = ActionError(contract.newest_action, contract.action.execute)
    lessons = make_lessons(teacher, sequences)
    trainer = PrunerTrainer(teacher, sampler, sparsities, lessons, measure, spec)
    args.out.mkdir(parents=True, exist_ok=True)
    if (args.out / 'checkpoint.pt').exists():
        trainer.restore(torch.load(args.out / 'checkpoint.pt', weights_only=True))
        print(f'resumed at step {trainer.step}')
    try:
        _train(trainer, args.out)
    except KeyboardInterrupt:
        print(f'interrupted at step {trainer.step}; run the same command again to go on')
        return 130
    pruner = trainer.pruner()
    save_pruner(args.bundle, args.sampler, pruner)
    tests = tick_sequences(network, held_out, 2 * args.held_out, args.ticks, generator)
    trained = [lesson.sequence for lesson in trainer.lessons]
    report = [
        compare_plans(teacher, sampler, pruner.eval(), trained, tests, sparsity)
        for sparsity in trainer.sparsities
    ]
    (args.out / 'report.json').write_text(json.dumps(report, indent=2) + '\n')
    print(json.dumps(report, indent=2))
    return 0


if __name__ == '__main__':
    sys.exit(main())
