# SPDX-License-Identifier: Apache-2.0
"""`train_pruner`: recordings and a bundle's frozen policy to the pruner of one sampler.

Ordered ticks of recorded episodes; tick 0 dense, then each tick sparse with its caches carried
over. Teacher and student share the held noise, so the dense action is an exact target. The plan
meets the sparsity exactly, so the paper's penalty on the mean reuse is not needed. The bias starts
from the static schedule, and the pruner that did best on sequences kept back is written.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from tts_policy.core.bundle import BundleError, load_bundle, save_pruner
from tts_policy.core.lattice import Lattice
from tts_policy.core.network import PolicyNetwork
from tts_policy.core.plan import dense_plan, make_plan
from tts_policy.core.pruner import Pruner, PrunerSpec
from tts_policy.core.sampler import SamplerSpec
from tts_policy.train.dataset import BagError, find_bags, load_windows
from tts_policy.train.lift_contract import LIFT_TOPICS
from tts_policy.train.plan_comparison import (
    PlanMaker,
    PlanMakers,
    compare_plans,
    sparse_actions,
)
from tts_policy.train.sparse_student import CellGates, SparseStudent, soft_gates
from tts_policy.train.tick_sequences import DenseTeacher, TickSequence, tick_sequences

KEPT_BACK = 8
VALIDATE_EVERY = 10


@dataclass(frozen=True)
class PrunerTrainingSpec:
    """Optimisation settings.

    explore_steps: of `steps`, those that explore; explore_sparsity: range of sparsity there;
    explore_noise: noise on the logits that plans are made of there; step_size: how far the logit
    with the largest gradient moves in the first step of descent; network_share: how far the
    weights of the network move against that.
    """

    steps: int
    batch: int
    seed: int
    sparsity: float
    explore_steps: int
    explore_sparsity: tuple[float, float]
    candidates: float = 0.1
    explore_noise: float = 0.1
    table_learning_rate: float = 0.02
    network_learning_rate: float = 2e-3
    step_size: float = 0.1
    network_share: float = 0.03
    trials: int = 3


@dataclass(frozen=True)
class Lesson:
    """A sequence with its exact targets, and the features of its dense first tick.

    target: normalised dense actions [R, T, A]; first_tick: [K, N, T, D]. Both depend on the frozen
    policy and the held noise alone, so they are made once.
    """

    sequence: TickSequence
    target: Tensor
    first_tick: Tensor


class PrunerTrainer:
    """Owns pruner, optimiser and random state of one training run."""

    def __init__(
        self,
        network: PolicyNetwork,
        sampler: SamplerSpec,
        spec: PrunerTrainingSpec,
        lessons: list[Lesson],
        start: Pruner | None = None,
    ) -> None:
        """Start from the given pruner, or from the static schedule."""
        torch.manual_seed(spec.seed)
        self.sampler, self.spec = sampler, spec
        kept = max(1, min(KEPT_BACK, len(lessons) // 4))
        self.kept_back, self.lessons = lessons[:kept], lessons[kept:]
        self.teacher = DenseTeacher(network, sampler)
        denoiser = network.denoiser.spec
        steps = sampler.scheduler.steps
        if start is None:
            start = Pruner(PrunerSpec(steps, denoiser.blocks, denoiser.width, denoiser.obs_steps))
            start.start_from_static(max(1, round((1 - sampler.recommended_sparsity) * steps)))
        self.pruner = start
        self.generator = torch.Generator().manual_seed(spec.seed)
        self.step = 0
        self.best_error = float('inf')
        self.best: dict[str, Tensor] = {}
        self.step_size = spec.step_size
        rest = [p for p in self.pruner.parameters() if p is not self.pruner.bias]
        self.optimizer = torch.optim.Adam(
            [
                {'params': [self.pruner.bias], 'lr': spec.table_learning_rate},
                {'params': rest, 'lr': spec.network_learning_rate},
            ],
            betas=(0.8, 0.99),
        )

    def train_step(self) -> float:
        """One optimiser step on a batch of sequences; returns the L1 loss."""
        order = torch.randperm(len(self.lessons), generator=self.generator)[: self.spec.batch]
        lessons = [self.lessons[int(n)] for n in order]
        if self.step == self.spec.explore_steps and self.best:
            self.pruner.load_state_dict(self.best)
        explore = self.step < self.spec.explore_steps
        self.step += 1
        return self._explore(lessons) if explore else self._refine(lessons)

    def _explore(self, lessons: list[Lesson]) -> float:
        """Adaptive step: moves all cells alike, and so crosses to plans far from the prior.

        The rate falls to zero as half a cosine over the exploring steps.
        """
        low, high = self.spec.explore_sparsity
        sparsity = low + (high - low) * float(torch.rand((), generator=self.generator))
        self.pruner.zero_grad(set_to_none=True)
        loss = self._loss(lessons, sparsity, learn=True, noise=self.spec.explore_noise)
        torch.nn.utils.clip_grad_norm_(self.pruner.parameters(), 1.0)
        cosine = math.cos(math.pi * (self.step - 1) / self.spec.explore_steps)
        rates = (self.spec.table_learning_rate, self.spec.network_learning_rate)
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group['lr'] = 0.5 * (1 + cosine) * rate
        self.optimizer.step()
        return loss

    def _refine(self, lessons: list[Lesson]) -> float:
        """Descend at the sparsity wanted, by steps that are taken back if they do not help.

        A plan is discrete: a small step changes nothing and a large one flips many cells at once,
        for which a straight-through gradient does not speak. So the step is a trial, and shorter
        next time if the error of the new plans on the batch is larger.
        """
        sparsity = self.spec.sparsity
        self.pruner.zero_grad(set_to_none=True)
        loss = self._loss(lessons, sparsity, learn=True)
        before = {name: value.clone() for name, value in self.pruner.state_dict().items()}
        for _ in range(self.spec.trials):
            self._descend()
            with torch.no_grad():
                trial = self._loss(lessons, sparsity, learn=False)
            if trial <= loss:
                self.step_size = min(1.5 * self.step_size, 1.0)
                return trial
            self.pruner.load_state_dict(before)
            self.step_size = max(0.4 * self.step_size, 0.01)
        return loss

    @torch.no_grad()
    def _descend(self) -> None:
        """Move along the gradient: the table by its largest entry, the network by its own."""
        for parameter in self.pruner.parameters():
            assert parameter.grad is not None
            share = 1.0 if parameter is self.pruner.bias else self.spec.network_share
            largest = parameter.grad.abs().max().clamp(min=1e-12)
            parameter.sub_(share * self.step_size * parameter.grad / largest)

    def _loss(
        self, lessons: list[Lesson], sparsity: float, learn: bool, noise: float = 0.0
    ) -> float:
        """L1 error over the ticks of sequences; with `learn`, gradients are accumulated."""
        ticks = min(len(lesson.target) for lesson in lessons)
        lattices = [self._lattice(lesson) for lesson in lessons]
        denoiser, scheduler = self.teacher.denoiser, self.teacher.scheduler
        memory = self.teacher.memory
        total = 0.0
        for tick in range(1, ticks):
            with torch.no_grad():
                memory.encode(torch.stack([lesson.sequence.features[tick] for lesson in lessons]))
            student = SparseStudent(denoiser, scheduler, memory, lattices)
            candidates = self.spec.candidates if learn else 0.0
            gates = self._gates(lattices, sparsity, candidates, noise)
            target = torch.stack([lesson.target[tick] for lesson in lessons])
            loss = (student.tick(gates) - target).abs().mean() / (ticks - 1)
            if learn:
                loss.backward()
            total += loss.item()
        return total

    def _lattice(self, lesson: Lesson) -> Lattice:
        """Lattice as the dense first tick of a lesson leaves it."""
        lattice = self.teacher.lattice(lesson.sequence.seed)
        lattice.features.copy_(lesson.first_tick)
        lattice.commit(dense_plan(lattice.steps, lattice.blocks))
        return lattice

    def _gates(
        self, lattices: list[Lattice], sparsity: float, candidates: float, noise: float
    ) -> CellGates:
        memory = self.teacher.memory
        logits = self.pruner(self.pruner.gates(memory.time_tokens), memory.observation_tokens)
        disturbance = noise * torch.randn(logits.shape[1:], generator=self.generator)
        valid = [lattice.rollout_valid(self.sampler.max_rollout_age) for lattice in lattices]
        plans = [
            make_plan(row, sparsity, rollout, self.sampler.force_first_step)
            for row, rollout in zip((logits + disturbance).detach().numpy(), valid, strict=True)
        ]
        share = torch.rand(plans[0].shape, generator=self.generator).numpy()
        return CellGates(np.stack(plans), soft_gates(logits, plans, valid), share < candidates)

    def validate(self) -> float:
        """L1 error at the sparsity wanted on the lessons kept back; remembers the best pruner.

        The pruner competes with its own constant plan: where looking at the observation does not
        pay, the pruner that ignores it is the one to keep.
        """
        trained = [lesson.sequence for lesson in self.lessons]
        makers = PlanMakers(self.teacher, self.sampler, self.pruner, trained, self.spec.sparsity)
        learned = self._error(makers.learned)
        self._keep(learned, self.pruner.state_dict())
        constant = self._error(makers.constant)
        flat = {**self.pruner.state_dict(), 'bias': torch.from_numpy(makers.mean_logits)}
        flat['cell'] = torch.zeros_like(flat['cell'])
        self._keep(constant, flat)
        return min(learned, constant)

    def _error(self, make: PlanMaker) -> float:
        errors = []
        for lesson in self.kept_back:
            lattice = self._lattice(lesson)
            actions, _ = sparse_actions(self.teacher, lesson.sequence, lattice, make)
            errors.append((actions - lesson.target[1:]).abs().mean().item())
        return float(np.mean(errors))

    def _keep(self, error: float, state: dict[str, Tensor]) -> None:
        if error < self.best_error:
            self.best_error = error
            self.best = {name: value.clone() for name, value in state.items()}

    def save(self, folder: Path) -> None:
        """Write a checkpoint that `load` continues from."""
        state = {
            'step': self.step,
            'pruner': self.pruner.state_dict(),
            'best': self.best,
            'best_error': self.best_error,
            'step_size': self.step_size,
            'optimizer': self.optimizer.state_dict(),
            'generator': self.generator.get_state(),
        }
        torch.save(state, folder / 'checkpoint.tmp')
        (folder / 'checkpoint.tmp').replace(folder / 'checkpoint.pt')

    def load(self, folder: Path) -> None:
        """Continue from the checkpoint in `folder`."""
        state = torch.load(folder / 'checkpoint.pt', weights_only=True)
        self.step = state['step']
        self.pruner.load_state_dict(state['pruner'])
        self.best, self.best_error = state['best'], state['best_error']
        self.step_size = state['step_size']
        self.optimizer.load_state_dict(state['optimizer'])
        self.generator.set_state(state['generator'])


def make_lessons(teacher: DenseTeacher, sequences: list[TickSequence]) -> list[Lesson]:
    """Dense targets of every sequence, with a progress bar."""
    bar = tqdm(sequences, desc='dense targets', unit='episode', mininterval=5)
    return [
        Lesson(sequence, teacher.actions(sequence), teacher.first_tick(sequence).features)
        for sequence in bar
    ]


def _train(trainer: PrunerTrainer, out: Path, save_every_s: float) -> None:
    log_path = out / 'log.csv'
    new = not log_path.exists()
    with log_path.open('a', newline='') as handle:
        log = csv.writer(handle)
        if new:
            log.writerow(['step', 'seconds', 'l1', 'validation_l1'])
        started = saved = time.monotonic()
        bar = tqdm(total=trainer.spec.steps, initial=trainer.step, unit='step', mininterval=5)
        mean, validation = 0.0, trainer.validate()
        while trainer.step < trainer.spec.steps:
            loss = trainer.train_step()
            mean += (loss - mean) / min(trainer.step, 20)
            if trainer.step % VALIDATE_EVERY == 0 or trainer.step == trainer.spec.steps:
                validation = trainer.validate()
            log.writerow([trainer.step, round(time.monotonic() - started), loss, validation])
            handle.flush()
            bar.update()
            bar.set_postfix(l1=f'{mean:.4f}', validation=f'{validation:.4f}')
            if time.monotonic() - saved > save_every_s:
                trainer.save(out)
                saved = time.monotonic()
    trainer.save(out)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Command line of `train_pruner`."""
    parser = argparse.ArgumentParser(prog='train_pruner', description=__doc__.split('\n')[0])
    parser.add_argument(
        'bags', nargs='+', type=Path, help='rosbag2 recordings, or folders of them'
    )
    parser.add_argument('--bundle', type=Path, required=True, help='gets the pruner')
    parser.add_argument('--sampler', required=True, help='sampler of the bundle, e.g. ddim10')
    parser.add_argument('--out', type=Path, required=True, help='checkpoints, log and report')
    parser.add_argument('--steps', type=int, default=200, help='optimiser steps')
    parser.add_argument('--batch', type=int, default=8, help='sequences a step')
    parser.add_argument('--episodes', type=int, default=64, help='sequences to train on')
    parser.add_argument('--ticks', type=int, default=5, help='ticks of a sequence')
    parser.add_argument('--explore-steps', type=int, default=0, help='of them, adaptive ones')
    parser.add_argument('--sparsity', type=float, help="default: the sampler's recommendation")
    parser.add_argument('--refine', action='store_true', help="start from the bundle's pruner")
    parser.add_argument('--table-rate', type=float, default=0.02, help='exploring, of the table')
    parser.add_argument('--network-rate', type=float, default=2e-3, help='exploring, of the rest')
    parser.add_argument('--candidates', type=float, default=0.1, help='share of cells explored')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--threads', type=int, default=1, help='torch threads')
    parser.add_argument('--held-out', type=int, default=10, help='bags kept for the comparison')
    parser.add_argument('--save-every', type=float, default=120.0, help='checkpoint interval, s')
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Train, or go on training, add the pruner to the bundle and compare; returns exit status."""
    args = parse_arguments(arguments)
    torch.set_num_threads(args.threads)
    try:
        bundle = load_bundle(args.bundle)
        sampler, present = bundle.sampler(args.sampler)
        network = bundle.network.eval().requires_grad_(False)
        bags = find_bags(args.bags)
        held_out = load_windows(bags[: args.held_out], network.contract, LIFT_TOPICS)
        chosen = bags[args.held_out : args.held_out + args.episodes]
        windows = load_windows(chosen, network.contract, LIFT_TOPICS)
    except (BagError, BundleError) as error:
        print(f'train_pruner: {error}', file=sys.stderr)
        return 2
    sparsity = sampler.recommended_sparsity if args.sparsity is None else args.sparsity
    # Exploring a little below the sparsity wanted gives the cells next in rank a gradient too.
    explored = (sparsity - 0.25 * (1 - sparsity), sparsity)
    spec = PrunerTrainingSpec(
        steps=args.steps,
        batch=args.batch,
        seed=args.seed,
        sparsity=sparsity,
        explore_steps=args.explore_steps,
        explore_sparsity=explored,
        candidates=args.candidates,
        table_learning_rate=args.table_rate,
        network_learning_rate=args.network_rate,
    )
    generator = torch.Generator().manual_seed(args.seed)
    teacher = DenseTeacher(network, sampler)
    lessons = make_lessons(
        teacher, tick_sequences(network, windows, args.episodes, args.ticks, generator)
    )
    start = present if args.refine else None
    trainer = PrunerTrainer(network, sampler, spec, lessons, start)
    args.out.mkdir(parents=True, exist_ok=True)
    if (args.out / 'checkpoint.pt').exists():
        trainer.load(args.out)
        print(f'resumed at step {trainer.step}')
    try:
        _train(trainer, args.out, args.save_every)
    except KeyboardInterrupt:
        trainer.save(args.out)
        print(f'interrupted at step {trainer.step}; run the same command again to go on')
        return 130
    trainer.pruner.load_state_dict(trainer.best)
    save_pruner(args.bundle, args.sampler, trainer.pruner)
    tests = tick_sequences(network, held_out, 2 * args.held_out, args.ticks, generator)
    trained = [lesson.sequence for lesson in lessons]
    report = compare_plans(teacher, sampler, trainer.pruner.eval(), trained, tests, sparsity)
    (args.out / 'report.json').write_text(json.dumps(report, indent=2) + '\n')
    print(json.dumps(report, indent=2))
    return 0


if __name__ == '__main__':
    sys.exit(main())
