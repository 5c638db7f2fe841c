# SPDX-License-Identifier: Apache-2.0
"""`train_pruner`: train the pruner of one sampler of a bundle on recorded demonstrations.

Training runs ordered ticks of recorded episodes: tick 0 is dense, and each later tick is sparse,
with its caches carried over. See `pruner_trainer` for the search. Under torchrun, processes share
every batch, and each holds all sequences (about 40 MB each with DDPM-100):

    torchrun --nproc-per-node 4 -m tts_policy.train.train_pruner ... --device cuda
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from tts_policy.data.demonstrations import load_windows, split_demonstrations
from tts_policy.policy.bundle import BundleError, load_bundle, save_pruner
from tts_policy.policy.device import DEVICES, set_threads
from tts_policy.policy.network import PolicyNetwork
from tts_policy.policy.pruner import Pruner, PrunerSpec
from tts_policy.policy.sampler import SamplerSpec
from tts_policy.train.plan_comparison import compare_plans
from tts_policy.train.plan_search import SearchSpec
from tts_policy.train.plan_starts import PriorPlans
from tts_policy.train.pruner_trainer import PrunerTrainer, PrunerTrainingSpec
from tts_policy.train.replicas import Replicas
from tts_policy.train.sequences import (
    ActionError,
    DenseTeacher,
    TickSequence,
    split_sequences,
    tick_sequences,
)
from tts_policy.train.training_run import (
    INTERRUPTED,
    RunLog,
    check_settings,
    command_on,
    digest,
    read_checkpoint,
    report_interruption,
    training_parser,
    write_checkpoint,
)

COLUMNS = ('step', 'sparsity', 'seconds', 'before', 'after', 'kept_back')
# Smallest values of options. Two sequences are one to train on and one for validation.
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
    """Return what a continued run must have in common with its beginning, by name.

    Bundles are compared by content and not by path: a policy may have been trained again.
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
    """Continue from the checkpoint of the first process, if there is one.

    Raises ValueError if it was made with other settings.
    """
    state = own.of_first(read_checkpoint(out) if own.is_first else None)
    if state is None:
        return
    check_settings(out, state['settings'], settings)
    trainer.restore(state)
    if own.is_first:
        print(f'continuing at step {trainer.step}')


def _train(run: _Run, out: Path, replicas: Replicas) -> None:
    """Train to the end, from the checkpoint if there is one; only the first process writes."""
    trainer = run.trainer
    _resume(trainer, out, run.settings, replicas)
    if not replicas.is_first:
        while trainer.step < trainer.total_steps:
            trainer.train_step()
        return
    with RunLog(out, COLUMNS, trainer.step, trainer.total_steps) as log:
        while trainer.step < trainer.total_steps:
            sparsity = trainer.sparsity
            before, after, best = trainer.train_step()
            log.write(trainer.step, sparsity, log.seconds, before, after, best)
            write_checkpoint(out, {**trainer.state(), 'settings': run.settings})
            log.advance(sparsity=sparsity, error=f'{after:.4f}', kept_back=f'{best:.4f}')


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Command line of `train_pruner`."""
    parser = training_parser('train_pruner', __doc__, threads=1)
    parser.add_argument(
        '--bundle', type=Path, required=True, help='bundle that the pruner is added to'
    )
    parser.add_argument('--sampler', required=True, help='sampler of the bundle, e.g. ddim10')
    parser.add_argument(
        '--sparsities', type=float, nargs='+', help="default: the sampler's recommendation"
    )
    parser.add_argument(
        '--prior',
        type=Path,
        metavar='BUNDLE',
        help='bundle whose plans the search may start from too',
    )
    parser.add_argument(
        '--prior-sampler',
        metavar='NAME',
        help='sampler of that bundle (default: that of --sampler); plans of another number of '
        'steps are carried over by noise level',
    )
    parser.add_argument(
        '--add',
        action='store_true',
        help="keep the tables of the bundle's pruner for other sparsities",
    )
    parser.add_argument('--steps', type=int, default=30, help='search steps for every sparsity')
    parser.add_argument('--batch', type=int, default=16, help='sequences that decide a step')
    parser.add_argument('--sample', type=int, default=8, help='of them, those in the gradient')
    parser.add_argument('--trials', type=int, default=12, help='flips tried of each kind')
    parser.add_argument(
        '--preference',
        type=float,
        default=0.5,
        metavar='SHARE',
        help='share of the sequences drawn by their error; 0: all uniformly (default %(default)s)',
    )
    parser.add_argument(
        '--episodes',
        type=int,
        default=96,
        help='sequences; a quarter of them, from other episodes, are for validation',
    )
    parser.add_argument('--ticks', type=int, default=5, help='ticks of a sequence')
    parser.add_argument(
        '--device',
        choices=DEVICES,
        default='cpu',
        help='with torchrun, every process uses a GPU of its own',
    )
    return parser.parse_args(arguments)


def _check_numbers(args: argparse.Namespace) -> None:
    """Raise ValueError for the first option that is out of its range."""
    for name, least in LEAST.items():
        if getattr(args, name) < least:
            raise ValueError(
                f'{_option(name)}: expected at least {least}, got {getattr(args, name)}'
            )
    if not 0.0 <= args.preference <= 1.0:
        raise ValueError(f'--preference: expected a share in [0, 1], got {args.preference}')


def _check_sampler(args: argparse.Namespace, sampler: SamplerSpec) -> None:
    """Raise ValueError if features of an earlier tick belong to other noise."""
    if not sampler.hold_noise and sampler.temperature > 0:
        raise ValueError(
            f'--sampler: expected {args.sampler!r} to have hold_noise or temperature 0, since '
            f'plans are searched with held noise, got noise of temperature {sampler.temperature} '
            'that is drawn for every chunk'
        )


def _check_sparsities(sparsities: list[float], sampler: SamplerSpec) -> None:
    """Raise ValueError for a sparsity that the sampler cannot run at."""
    for sparsity in sparsities:
        if not 0 < sparsity <= sampler.max_sparsity + 1e-9:
            raise ValueError(
                f'--sparsities: expected in (0, {sampler.max_sparsity:.4g}], got {sparsity}'
            )


def _tables(folder: Path, name: str, blocks: int) -> PriorPlans:
    """Return the plans of a bundle's sampler; raise BundleError unless they have these blocks."""
    sampler, pruner = load_bundle(folder).sampler(name)
    if not isinstance(pruner, Pruner) or pruner.spec.blocks != blocks:
        got = 'none' if pruner is None else f'{pruner.spec.steps} x {pruner.spec.blocks}'
        raise BundleError(
            f'{folder}: {name}: expected a pruner with tables for {blocks} blocks, got {got}'
        )
    return PriorPlans(pruner, sampler)


def _prior(args: argparse.Namespace, sampler: SamplerSpec, blocks: int) -> PriorPlans | None:
    """Return the plans of --prior; raise ValueError if their noise levels are not comparable."""
    if args.prior is None:
        if args.prior_sampler is not None:
            raise ValueError('--prior-sampler: expected --prior with it, got none')
        return None
    name = args.prior_sampler or args.sampler
    prior = _tables(args.prior, name, blocks)
    levels = [
        (s.is_flow, s.train_steps, s.beta_schedule, s.beta_start, s.beta_end)
        for s in (sampler.scheduler, prior.sampler.scheduler)
    ]
    if levels[0] != levels[1]:
        raise ValueError(
            f'--prior: expected a sampler with the noise levels of {args.sampler!r}, got {name!r}'
        )
    return prior


@dataclass(frozen=True)
class _Run:
    """A training, and the held-out sequences on which its plans are compared.

    settings: see `_settings`.
    """

    teacher: DenseTeacher
    sampler: SamplerSpec
    trainer: PrunerTrainer
    tests: list[TickSequence]
    settings: dict[str, str]


def _set_up(args: argparse.Namespace, replicas: Replicas) -> _Run:
    """Read bundle and demonstrations; raise ValueError, including BundleError."""
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
    held_out, others = split_demonstrations(args, network.contract)
    held_out_windows = load_windows(held_out)
    windows = load_windows(others[: args.episodes])
    generator = torch.Generator().manual_seed(args.seed)
    kept, sequences = split_sequences(network, windows, args.episodes, args.ticks, generator)
    tests = tick_sequences(network, held_out_windows, 2 * args.held_out, args.ticks, generator)
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
    both = teacher.with_targets([*kept, *sequences])
    validation, training = both[: len(kept)], both[len(kept) :]
    trainer = PrunerTrainer(
        teacher, sampler, sparsities, training, validation, measure, spec, prior
    )
    settings = _settings(args, network, sampler, sparsities, prior)
    return _Run(teacher, sampler, trainer, tests, settings)


def _finish(run: _Run, args: argparse.Namespace) -> None:
    """Add the pruner to the bundle and compare its plans with others."""
    pruner = run.trainer.pruner()
    if args.add:
        # Read only now, so that the tables of a search that ended in the meantime are kept too.
        blocks = run.teacher.denoiser.spec.blocks
        pruner = pruner.with_tables_of(_tables(args.bundle, args.sampler, blocks).pruner)
    save_pruner(args.bundle, args.sampler, pruner)
    pruner = pruner.to(run.teacher.replicas.device).eval()
    trained = [each.sequence for each in run.trainer.choice.sequences]
    report = [
        compare_plans(run.teacher, run.sampler, pruner, trained, run.tests, sparsity)
        for sparsity in run.trainer.sparsities
    ]
    (args.out / 'report.json').write_text(json.dumps(report, indent=2) + '\n')
    print(json.dumps(report, indent=2))
    options = ['--bundle', args.bundle, '--sampler', args.sampler, '--out', args.out / 'replay']
    command = command_on(args, 'evaluate_bag', *options)
    print(f'wrote the pruner of {args.sampler} to {args.bundle}; next: {command}')


def main(arguments: list[str] | None = None) -> int:
    """Train, or continue a training, add the pruner and compare plans; return the exit status."""
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
            if not replicas.is_first:
                return INTERRUPTED
            return report_interruption(f'at step {run.trainer.step}')
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
