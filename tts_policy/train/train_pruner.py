# SPDX-License-Identifier: Apache-2.0
"""`train_pruner`: recordings and a bundle's frozen policy to the pruner of one sampler.

Ordered ticks of recorded episodes; tick 0 dense, then each tick sparse with its caches carried
over. See `pruner_trainer` for what is trained. Under torchrun processes share every batch; each
holds all lessons (about 40 MB one, of DDPM-100):

    torchrun --nproc-per-node 4 -m tts_policy.train.train_pruner ... --device cuda
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TextIO

import torch
from tqdm import tqdm

from tts_policy.data.demonstrations import (
    add_demonstration_arguments,
    load_windows,
    split_demonstrations,
)
from tts_policy.policy.bundle import BundleError, load_bundle, save_pruner
from tts_policy.policy.device import DEVICES, set_threads
from tts_policy.policy.network import PolicyNetwork
from tts_policy.policy.pruner import Pruner, PrunerSpec
from tts_policy.policy.sampler import SamplerSpec
from tts_policy.train.checkpoint import (
    check_settings,
    digest,
    read_checkpoint,
    write_checkpoint,
)
from tts_policy.train.lessons import ActionError, make_lessons
from tts_policy.train.plan_comparison import compare_plans
from tts_policy.train.plan_search import SearchSpec
from tts_policy.train.prior_plans import PriorPlans
from tts_policy.train.pruner_trainer import PrunerTrainer, PrunerTrainingSpec
from tts_policy.train.replicas import Replicas
from tts_policy.train.tick_sequences import (
    DenseTeacher,
    TickSequence,
    split_sequences,
    tick_sequences,
)

# Smallest values of options; two sequences are one to train on and one to keep back.
LEAST = {'steps': 1, 'batch': 1, 'sample': 1, 'trials': 1, 'episodes': 2, 'ticks': 2, 'seed': 0}


def _option(name: str) -> str:
    return f'--{name.replace("_", "-")}'


def _settings(
    args: argparse.Namespace,
    network: PolicyNetwork,
    sampler: SamplerSpec,
    sparsities: list[float],
    prior: PriorPlans | None,
) -> dict[str, str]:
    """What a resumed run must have in common with the one it continues, by name.

    Bundles by what they hold, not by their paths: a policy may have been trained anew meanwhile.
    """
    free = ('demonstrations', 'bundle', 'out', 'add', 'topic', 'image_fit', 'threads', 'device')
    options = {_option(k): str(v) for k, v in vars(args).items() if k not in (*free, 'prior')}
    sampling = replace(sampler, recommended_sparsity=0.0).to_dict()
    sizes = (network.contract.to_dict(), network.spec.to_dict())
    plans = 'none' if prior is None else digest(prior.pruner, prior.pruner.sparsities)
    return options | {
        '--sparsities': str(sorted(sparsities)),
        'policy of --bundle': digest(network, *sizes),
        'sampler of --bundle': str(sampling),
        'plans of --prior': plans,
    }


def _resume(trainer: PrunerTrainer, out: Path, settings: dict[str, str], own: Replicas) -> None:
    """Continue from the first replica's checkpoint, if there is one.

    Raises ValueError if it was made otherwise.
    """
    state = own.of_first(read_checkpoint(out) if own.is_first else None)
    if state is None:
        return
    check_settings(out, state['settings'], settings)
    trainer.restore(state)
    if own.is_first:
        print(f'resumed at step {trainer.step}')


def _log(out: Path) -> TextIO:
    """Log of the run, opened to go on; with its header where it is new."""
    path = out / 'log.csv'
    new = not path.exists()
    handle = path.open('a', newline='')
    if new:
        csv.writer(handle).writerow(
            ['step', 'sparsity', 'seconds', 'before', 'after', 'kept_back']
        )
    return handle


def _train(run: _Run, out: Path, replicas: Replicas) -> None:
    """Train to the end, from the checkpoint if there is one; the first replica writes."""
    trainer = run.trainer
    _resume(trainer, out, run.settings, replicas)
    if not replicas.is_first:
        while trainer.step < trainer.total_steps:
            trainer.train_step()
        return
    with _log(out) as handle:
        log = csv.writer(handle)
        started = time.monotonic()
        bar = tqdm(total=trainer.total_steps, initial=trainer.step, unit='step', mininterval=5)
        while trainer.step < trainer.total_steps:
            sparsity = trainer.sparsity
            before, after, best = trainer.train_step()
            seconds = round(time.monotonic() - started)
            log.writerow([trainer.step, sparsity, seconds, before, after, best])
            handle.flush()
            write_checkpoint(out, {**trainer.state(), 'settings': run.settings})
            bar.update()
            bar.set_postfix(sparsity=sparsity, error=f'{after:.4f}', kept_back=f'{best:.4f}')


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Command line of `train_pruner`."""
    parser = argparse.ArgumentParser(prog='train_pruner', description=__doc__.split('\n')[0])
    add_demonstration_arguments(parser)
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
        help='its plans are starts too, if they end up better than placed passes',
    )
    parser.add_argument(
        '--prior-sampler',
        metavar='NAME',
        help='sampler of the prior whose plans these are (default: --sampler); those of another '
        'number of steps are carried over by noise level',
    )
    parser.add_argument(
        '--add',
        action='store_true',
        help="keep the tables that the bundle's pruner has for other sparsities",
    )
    parser.add_argument('--steps', type=int, default=30, help='search steps for every sparsity')
    parser.add_argument('--batch', type=int, default=16, help='lessons that decide a step')
    parser.add_argument('--sample', type=int, default=8, help='of them, in the gradient')
    parser.add_argument('--trials', type=int, default=12, help='flips tried of every sort')
    parser.add_argument(
        '--preference',
        type=float,
        default=0.5,
        metavar='SHARE',
        help='share of the lessons drawn by their error; 0: all uniformly (default %(default)s)',
    )
    parser.add_argument(
        '--episodes',
        type=int,
        default=96,
        help='sequences to train on; a quarter of them, of other episodes, judges the plans',
    )
    parser.add_argument('--ticks', type=int, default=5, help='ticks of a sequence')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--threads', type=int, default=1, help='torch threads')
    parser.add_argument(
        '--device',
        choices=DEVICES,
        default='cpu',
        help='with torchrun every process takes a GPU of its own',
    )
    return parser.parse_args(arguments)


def _check_numbers(args: argparse.Namespace) -> None:
    """Raise ValueError naming the first option that is out of its range."""
    for name, least in LEAST.items():
        if getattr(args, name) < least:
            raise ValueError(
                f'{_option(name)} must be at least {least}, got {getattr(args, name)}'
            )
    if not 0.0 <= args.preference <= 1.0:
        raise ValueError(f'--preference must be in [0, 1], got {args.preference}')


def _check_sampler(args: argparse.Namespace, sampler: SamplerSpec) -> None:
    """Raise ValueError if features of an earlier tick are those of another noise."""
    if not sampler.hold_noise and sampler.temperature > 0:
        raise ValueError(
            f'--sampler: hold_noise, or temperature 0, expected of {args.sampler!r}, as plans are '
            f'searched with held noise; got noise of temperature {sampler.temperature} that is '
            'drawn for every chunk'
        )


def _check_sparsities(sparsities: list[float], sampler: SamplerSpec) -> None:
    """Raise ValueError for one that the sampler cannot run at."""
    for sparsity in sparsities:
        if not 0 < sparsity <= sampler.max_sparsity + 1e-9:
            raise ValueError(
                f'--sparsities must be in (0, {sampler.max_sparsity:.4g}], got {sparsity}'
            )


def _tables(folder: Path, name: str, blocks: int) -> PriorPlans:
    """Plans of a bundle's sampler; raises BundleError unless they are for so many blocks."""
    sampler, pruner = load_bundle(folder).sampler(name)
    if not isinstance(pruner, Pruner) or pruner.spec.blocks != blocks:
        got = 'none' if pruner is None else f'{pruner.spec.steps} x {pruner.spec.blocks}'
        raise BundleError(
            f'{folder}: {name}: pruner with tables for {blocks} blocks expected, got {got}'
        )
    return PriorPlans(pruner, sampler)


def _prior(args: argparse.Namespace, sampler: SamplerSpec, blocks: int) -> PriorPlans | None:
    """Plans to start from; raises ValueError if their noise levels are none of this sampler's."""
    if args.prior is None:
        if args.prior_sampler is not None:
            raise ValueError('--prior-sampler: --prior expected with it, got none')
        return None
    name = args.prior_sampler or args.sampler
    prior = _tables(args.prior, name, blocks)
    levels = [
        (s.is_flow, s.train_steps, s.beta_schedule, s.beta_start, s.beta_end)
        for s in (sampler.scheduler, prior.sampler.scheduler)
    ]
    if levels[0] != levels[1]:
        raise ValueError(
            f'--prior: a sampler with the noise levels of {args.sampler!r} expected, got {name!r}'
        )
    return prior


@dataclass(frozen=True)
class _Run:
    """A training that was set up, and the held-out sequences that its plans are compared on.

    settings: see `_settings`.
    """

    teacher: DenseTeacher
    sampler: SamplerSpec
    trainer: PrunerTrainer
    tests: list[TickSequence]
    settings: dict[str, str]


def _set_up(args: argparse.Namespace, replicas: Replicas) -> _Run:
    """Read bundle and demonstrations; raises ValueError, BundleError among them."""
    _check_numbers(args)
    bundle = load_bundle(args.bundle)
    sampler, _ = bundle.sampler(args.sampler)
    _check_sampler(args, sampler)
    sparsities = args.sparsities or [sampler.recommended_sparsity]
    _check_sparsities(sparsities, sampler)
    blocks = bundle.network.denoiser.spec.blocks
    prior = _prior(args, sampler, blocks)
    if args.add:
        sizes = PrunerSpec.of(bundle.network.denoiser.spec, sampler.scheduler.steps, (0.5,))
        Pruner(sizes).with_tables_of(_tables(args.bundle, args.sampler, blocks).pruner)
    network = bundle.network.to(replicas.device).eval().requires_grad_(False)
    kept, others = split_demonstrations(args, network.contract)
    held_out = load_windows(kept)
    windows = load_windows(others[: args.episodes])
    generator = torch.Generator().manual_seed(args.seed)
    kept_back, sequences = split_sequences(network, windows, args.episodes, args.ticks, generator)
    tests = tick_sequences(network, held_out, 2 * args.held_out, args.ticks, generator)
    teacher = DenseTeacher(network, sampler, replicas)
    spec = PrunerTrainingSpec(
        args.steps,
        args.batch,
        args.sample,
        args.seed,
        args.preference,
        SearchSpec(trials=args.trials),
    )
    contract = network.contract
    measure = ActionError(contract.newest_action, contract.action.execute)
    lessons = make_lessons(teacher, [*kept_back, *sequences])
    judges, lessons = lessons[: len(kept_back)], lessons[len(kept_back) :]
    trainer = PrunerTrainer(teacher, sampler, sparsities, lessons, judges, measure, spec, prior)
    settings = _settings(args, network, sampler, sparsities, prior)
    return _Run(teacher, sampler, trainer, tests, settings)


def _finish(run: _Run, args: argparse.Namespace) -> None:
    """Add the pruner to the bundle and compare its plans with others."""
    pruner = run.trainer.pruner()
    if args.add:
        # Read now: the tables of a search that ended in the meantime are kept as well.
        blocks = run.teacher.denoiser.spec.blocks
        pruner = pruner.with_tables_of(_tables(args.bundle, args.sampler, blocks).pruner)
    save_pruner(args.bundle, args.sampler, pruner)
    pruner = pruner.to(run.teacher.replicas.device).eval()
    trained = [lesson.sequence for lesson in run.trainer.choice.lessons]
    report = [
        compare_plans(run.teacher, run.sampler, pruner, trained, run.tests, sparsity)
        for sparsity in run.trainer.sparsities
    ]
    (args.out / 'report.json').write_text(json.dumps(report, indent=2) + '\n')
    print(json.dumps(report, indent=2))


def main(arguments: list[str] | None = None) -> int:
    """Train, or go on training, add the pruner to the bundle and compare; returns exit status."""
    args = parse_arguments(arguments)
    replicas = Replicas()
    try:
        set_threads(args.threads)
        replicas = Replicas.joined(args.device)
        run = _set_up(args, replicas)
        args.out.mkdir(parents=True, exist_ok=True)
        try:
            _train(run, args.out, replicas)
        except KeyboardInterrupt:
            if replicas.is_first:
                step = run.trainer.step
                print(f'interrupted at step {step}; run the same command again to go on')
            return 130
    except ValueError as error:
        process = '' if replicas.is_first else f' (process {replicas.rank})'
        print(f'train_pruner: {error}{process}', file=sys.stderr)
        return 2
    finally:
        Replicas.leave()
    if replicas.is_first:
        _finish(run, args)
    return 0


if __name__ == '__main__':
    sys.exit(main())
