# SPDX-License-Identifier: Apache-2.0
"""`train_policy`: train a policy on recorded demonstrations and write a bundle without pruners.

The observation encoder is trained first, by regressing the action chunk from its features, which
costs a fraction of a denoising step. The regression stays as an auxiliary loss while the denoiser
trains, and its head is dropped afterwards. The bundle holds the exponential moving average of the
weights. A run can start from the weights of a bundle of another task, and can be interrupted and
continued.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import yaml

from tts_policy.data.data_check import DataCheck, write_check
from tts_policy.data.demonstrations import (
    demonstrated_contract,
    load_windows,
    split_demonstrations,
)
from tts_policy.data.windows import Windows
from tts_policy.policy.bundle import BundleError, load_bundle, save_bundle
from tts_policy.policy.contract import PolicyContract
from tts_policy.policy.denoisers.denoiser import DENOISERS
from tts_policy.policy.device import set_threads
from tts_policy.policy.encoders.camera_encoder import ENCODERS
from tts_policy.policy.encoders.cnn import CnnSpec
from tts_policy.policy.network import OBJECTIVES, NetworkSpec, PolicyNetwork
from tts_policy.policy.sampler import DIFFUSION_SAMPLERS, FLOW_SAMPLERS, SamplerSpec
from tts_policy.policy.schedulers.scheduler import FLOW
from tts_policy.policy.validation import Mismatch, Spec
from tts_policy.train.policy_trainer import PolicyTrainer, TrainingSpec
from tts_policy.train.training_run import (
    RunLog,
    StopRequest,
    command_on,
    duration,
    report_interruption,
    training_parser,
)

Kind = TypeVar('Kind', bound=Spec)


COLUMNS = ('step', 'seconds', 'denoising', 'regression', 'held_out_l1')
SHOW_EVERY, VALIDATE_EVERY = 50, 500


def _train(trainer: PolicyTrainer, held_out: Windows, out: Path, save_every_s: float) -> None:
    """Train to the end, or to the end of the step in which a stop is requested; save at both."""
    first, last = trainer.step, trainer.spec.steps
    with RunLog(out, COLUMNS, first, last) as log, StopRequest() as stop:
        saved = time.monotonic()
        means = {'denoising': 0.0, 'regression': 0.0}
        while trainer.step < last and not stop.made:
            losses = trainer.train_step()
            for name, value in losses.items():
                means[name] += (value - means[name]) / min(trainer.step - first, SHOW_EVERY)
            shown = {name: f'{value:.4f}' for name, value in means.items()}
            log.advance(**shown if trainer.step % SHOW_EVERY == 0 else {})
            if trainer.step % VALIDATE_EVERY == 0 or trainer.step == last:
                error = trainer.action_error(held_out)
                log.write(trainer.step, log.seconds, *means.values(), error)
            due = time.monotonic() - saved > save_every_s
            if due or stop.made or trainer.step == last:
                trainer.save(out)
                saved = time.monotonic()


def initial_network(bundle: Path, contract: PolicyContract) -> PolicyNetwork:
    """Return the network of a bundle; raise BundleError unless it has this contract."""
    network = load_bundle(bundle).network
    if network.contract != contract:
        raise BundleError(
            f'{bundle}: observation and action: expected those to be trained, '
            f'{contract.to_dict()}, got {network.contract.to_dict()}'
        )
    return network


def chosen(
    option: str, kinds: Mapping[str, type[Kind]], words: Sequence[str], **defaults: dict[str, Any]
) -> Kind:
    """Return the settings of the kind that an option names, such as `vit width=64 layers=2`.

    defaults: settings by the name of a kind. Raises Mismatch for an unknown kind or setting.
    """
    name, *settings = words
    if name not in kinds:
        raise Mismatch(option, f'one of {", ".join(kinds)}', name)
    given = {key: yaml.safe_load(value) for key, _, value in (s.partition('=') for s in settings)}
    return kinds[name].from_dict({**defaults.get(name, {}), **given})


def network_spec(args: argparse.Namespace, initial: PolicyNetwork | None) -> NetworkSpec:
    """Return the sizes asked for, or those of the initial network with added residual blocks.

    Raises ValueError for impossible sizes and for another objective than the initial network's.
    """
    if initial is not None:
        if args.objective not in (None, initial.spec.objective):
            raise ValueError(
                f'--objective: expected {initial.spec.objective}, that of --initial, '
                f'got {args.objective}'
            )
        encoder = initial.spec.encoder
        if not isinstance(encoder, CnnSpec):
            return initial.spec
        blocks = max(args.camera_blocks, encoder.blocks)
        return replace(initial.spec, encoder=replace(encoder, blocks=blocks))
    return NetworkSpec(
        width=args.width,
        layers=args.layers,
        encoder=chosen('--encoder', ENCODERS, args.encoder, cnn={'blocks': args.camera_blocks}),
        denoiser=chosen('--denoiser', DENOISERS, args.denoiser),
        objective=args.objective or OBJECTIVES[0],
    )


def network_samplers(network: NetworkSpec, temperature: float) -> dict[str, SamplerSpec]:
    """Return samplers for a network; raise ValueError if its training schedule is too short."""
    known = FLOW_SAMPLERS if network.objective == FLOW else DIFFUSION_SAMPLERS
    samplers = {}
    for name, spec in known.items():
        scheduler = spec.scheduler
        if not scheduler.is_flow:
            scheduler = replace(scheduler, train_steps=network.train_steps)
        samplers[name] = replace(spec, scheduler=scheduler, temperature=temperature)
    return samplers


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Command line of `train_policy`."""
    parser = training_parser('train_policy', __doc__, threads=2)
    parser.add_argument(
        '--contract',
        type=Path,
        help='YAML file with observation and action, as in a model.yaml (default: contract.yaml '
        'beside the recordings)',
    )
    parser.add_argument('--name', default='panda_lift', help='name of the bundle')
    parser.add_argument('--steps', type=int, default=8000, help='optimiser steps in total')
    parser.add_argument(
        '--encoder-steps',
        type=int,
        default=1500,
        help='first steps, which train the encoder alone',
    )
    parser.add_argument('--batch', type=int, default=32, help='windows of a step')
    parser.add_argument('--learning-rate', type=float, default=3e-4)
    parser.add_argument(
        '--initial',
        type=Path,
        metavar='BUNDLE',
        help='start from weights and sizes of a bundle with the same contract; normalisers are '
        'fitted anew',
    )
    parser.add_argument('--width', type=int, default=256, help='denoiser width D')
    parser.add_argument('--layers', type=int, default=8, help='decoder layers L')
    parser.add_argument(
        '--camera-blocks',
        type=int,
        default=0,
        help='residual blocks of the camera encoder `cnn`; with --initial, missing ones are added',
    )
    parser.add_argument(
        '--encoder',
        nargs='+',
        default=['cnn'],
        metavar=('NAME', 'SETTING=VALUE'),
        help=f'camera encoder: {", ".join(ENCODERS)}; settings as in model.yaml, such as '
        'vit width=192 layers=4 hidden=768 (default: cnn)',
    )
    parser.add_argument(
        '--denoiser',
        nargs='+',
        default=['transformer'],
        metavar=('NAME', 'SETTING=VALUE'),
        help=f'architecture: {", ".join(DENOISERS)}; settings as in model.yaml (default: '
        'transformer)',
    )
    parser.add_argument(
        '--objective',
        choices=OBJECTIVES,
        help='predict noise, or the velocity of a flow that is sampled by Euler steps (default: '
        f'{OBJECTIVES[0]}, with --initial its own)',
    )
    parser.add_argument(
        '--bfloat16',
        action='store_true',
        help='multiply in bfloat16, which is faster if the processor has instructions for it',
    )
    parser.add_argument(
        '--temperature',
        type=float,
        default=1.0,
        metavar='SHARE',
        help="scale of the noise in the bundle's samplers; with 0 the same observation gives the "
        'same chunk (default %(default)s)',
    )
    parser.add_argument('--save-every', type=float, default=300.0, help='checkpoint interval, s')
    return parser.parse_args(arguments)


def _set_up(args: argparse.Namespace) -> tuple[PolicyTrainer, Windows, dict[str, SamplerSpec]]:
    """Read the inputs; return trainer, held-out windows and samplers of the bundle.

    Raises ValueError, including BagError and BundleError.
    """
    set_threads(args.threads)
    contract = demonstrated_contract(args.demonstrations, args.contract)
    initial = None if args.initial is None else initial_network(args.initial, contract)
    network = network_spec(args, initial)
    samplers = network_samplers(network, args.temperature)
    kept, others = split_demonstrations(args, contract)
    check = DataCheck(contract)
    held_out = load_windows(kept, check=check)
    windows = load_windows(others, check=check)
    spec = TrainingSpec(
        args.steps,
        args.encoder_steps,
        args.batch,
        args.learning_rate,
        args.seed,
        bfloat16=args.bfloat16,
    )
    trainer = PolicyTrainer(contract, network, spec, windows, initial)
    args.out.mkdir(parents=True, exist_ok=True)
    if trainer.load(args.out):
        print(f'continuing at step {trainer.step}')
    write_check(args.out / 'data_check.json', check)
    return trainer, held_out, samplers


def main(arguments: list[str] | None = None) -> int:
    """Train, or continue a training, and write the bundle; return the exit status."""
    args = parse_arguments(arguments)
    try:
        trainer, held_out, samplers = _set_up(args)
    except ValueError as error:
        print(f'train_policy: {error}', file=sys.stderr)
        return 2
    try:
        left = args.steps - trainer.step
        estimate = duration(trainer.seconds_left())
        print(f'steps left: {left}; expected time: {estimate} (threads: {args.threads})')
        _train(trainer, held_out, args.out, args.save_every)
    except KeyboardInterrupt:
        return report_interruption('within a step that is not saved')
    if trainer.step < args.steps:
        return report_interruption(f'at step {trainer.step}')
    bundle = args.out / 'bundle'
    dropped = save_bundle(bundle, args.name, trainer.averaged_network, samplers)
    if dropped:
        print(f'removed the pruners of {", ".join(dropped)}, which belonged to another policy')
    options = ['--bundle', bundle, '--sampler', next(iter(samplers)), '--held-out', args.held_out]
    command = command_on(args, 'train_pruner', *options, '--out', f'{args.out}_pruner')
    print(f'wrote {bundle}; next: {command}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
