# SPDX-License-Identifier: Apache-2.0
"""`train_pruner`: recordings and a bundle's frozen policy to the pruner of one sampler.

Ordered ticks of recorded episodes; tick 0 dense, then each tick sparse with its caches carried
over. The sparsest plan starts from a static schedule, or grows from one of half its cost, or is
another bundle's, whichever is best; every other grows from the next sparser one. Each is searched
for a number of steps (see `plan_search`) within a budget of cells and of their cost (see
`plan_budget`), and the plan that did best on lessons kept back becomes the table of its sparsity.
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
from tts_policy.core.bundle import Bundle, BundleError, load_bundle, save_pruner
from tts_policy.core.flops import block_flops, pruner_flops
from tts_policy.core.plan import Plan, Reuse, make_plan, static_plan
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
from tts_policy.train.plan_budget import PlanBudget
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
        prior: Pruner | None = None,
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
        self._prior = prior
        count = max(1, self._budget().cells // shape[1])
        self._begin([static_plan(*shape, n) for n in sorted({count, max(1, count // 2)})])

    @property
    def sparsity(self) -> float:
        """The sparsity in work."""
        return self.sparsities[-1 - len(self.tables)]

    @property
    def total_steps(self) -> int:
        """Search steps for all sparsities."""
        return self.spec.steps * len(self.sparsities)

    def _budget(self) -> PlanBudget:
        """Cells of the sparsity in work, at the cost of whole passes with the pruner's in it."""
        cells = round((1 - self.sparsity) * self._forced.size)
        cost = block_flops(self._teacher.denoiser.spec)
        return PlanBudget(cells, cost, pruner_flops(self._pruner_spec()))

    def _begin(self, starts: list[Plan]) -> None:
        """Begin with the sparsity in work; the search starts from the best of some plans."""
        self._search: PlanSearch | None = None
        self._starts = [*starts, *self._prior_plans()]
        self.best, self.best_error = starts[0], float('inf')

    def _prior_plans(self) -> list[Plan]:
        """The prior's plan for the sparsity in work, if there is a prior."""
        if self._prior is None:
            return []
        logits = self._prior.table(self.sparsity).detach().numpy()
        everywhere = np.ones(self._forced.shape, bool)
        return [make_plan(logits, self.sparsity, everywhere, self.sampler.force_first_step)]

    def _new_search(self, plan: Plan) -> PlanSearch:
        budget = self._budget()
        return PlanSearch(self._loop, self._measure, plan, budget, self._forced, self.spec.search)

    def _started(self, random: np.random.Generator) -> PlanSearch:
        """Search from the start that is best once it has grown to the budget."""
        searches = [self._new_search(plan) for plan in self._starts]
        for search in searches:
            while search.computed < search.budget.cells:
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
            self.best = self._search.plan
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
        """Remember the plan if it is the best so far; one within the budget beats one that is not.

        A static start is as dear as whole passes and so beyond the budget by the pruner's cost.
        """
        affords = self._budget().affords
        error = self._kept_error(plan)
        if (not affords(plan), error) < (not affords(self.best), self.best_error):
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
        pruner = Pruner(self._pruner_spec())
        with torch.no_grad():
            pruner.tables.copy_(torch.stack([self.tables[s] for s in self.sparsities]))
        return pruner

    def _pruner_spec(self) -> PrunerSpec:
        denoiser, steps = self._teacher.denoiser.spec, self.sampler.scheduler.steps
        sparsities = tuple(self.sparsities)
        return PrunerSpec(steps, denoiser.blocks, denoiser.width, denoiser.obs_steps, sparsities)

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


def _settings(args: argparse.Namespace) -> dict[str, str]:
    """What a resumed run must have in common with the one it continues."""
    free = ('bags', 'bundle', 'out', 'topic', 'threads')
    return {name: str(value) for name, value in vars(args).items() if name not in free}


def _resume(trainer: PrunerTrainer, out: Path, settings: dict[str, str]) -> None:
    """Continue from the checkpoint of `out`; raises ValueError if it was made otherwise."""
    state = torch.load(out / 'checkpoint.pt', weights_only=True)
    for name, value in settings.items():
        if state['settings'].get(name) != value:
            raise ValueError(
                f'{out}: --{name.replace("_", "-")}: this run began with '
                f'{state["settings"].get(name)}, got {value}; another --out begins a new one'
            )
    trainer.restore(state)
    print(f'resumed at step {trainer.step}')


def _save(trainer: PrunerTrainer, out: Path, settings: dict[str, str]) -> None:
    torch.save({**trainer.state(), 'settings': settings}, out / 'checkpoint.tmp')
    (out / 'checkpoint.tmp').replace(out / 'checkpoint.pt')


def _train(trainer: PrunerTrainer, out: Path, settings: dict[str, str]) -> None:
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
            _save(trainer, out, settings)
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
    parser.add_argument(
        '--prior',
        type=Path,
        metavar='BUNDLE',
        help='its plans are starts too, if they end up better than static ones',
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


def _prior(folder: Path, name: str, bundle: Bundle) -> Pruner:
    """Pruner of another bundle; raises BundleError unless its plans fit this bundle's sampler."""
    pruner = load_bundle(folder).sampler(name)[1]
    shape = (bundle.sampler(name)[0].scheduler.steps, bundle.network.denoiser.spec.blocks)
    if not isinstance(pruner, Pruner) or (pruner.spec.steps, pruner.spec.blocks) != shape:
        got = 'none' if pruner is None else f'{pruner.spec.steps} x {pruner.spec.blocks}'
        raise BundleError(
            f'{folder}: {name}: pruner with tables of {shape[0]} x {shape[1]} expected, got {got}'
        )
    return pruner


def main(arguments: list[str] | None = None) -> int:
    """Train, or go on training, add the pruner to the bundle and compare; returns exit status."""
    args = parse_arguments(arguments)
    torch.set_num_threads(args.threads)
    try:
        bundle = load_bundle(args.bundle)
        sampler, _ = bundle.sampler(args.sampler)
        sparsities = args.sparsities or [sampler.recommended_sparsity]
        _check_sparsities(sparsities, sampler)
        prior = None if args.prior is None else _prior(args.prior, args.sampler, bundle)
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
    trainer = PrunerTrainer(teacher, sampler, sparsities, lessons, measure, spec, prior)
    args.out.mkdir(parents=True, exist_ok=True)
    settings = _settings(args)
    try:
        if (args.out / 'checkpoint.pt').exists():
            _resume(trainer, args.out, settings)
        _train(trainer, args.out, settings)
    except ValueError as error:
        print(f'train_pruner: {error}', file=sys.stderr)
        return 2
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
