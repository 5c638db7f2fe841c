# SPDX-License-Identifier: Apache-2.0
"""`train_policy`: demonstrations in rosbag2 files to a model bundle without pruners.

The observation encoder is warmed up by regressing the action chunk from its features, which
costs a fraction of a denoising step, and keeps that regression as an auxiliary loss while the
denoiser trains. The regression head is dropped afterwards. The bundle holds the exponential
moving average of the weights. A run can start from the weights of a bundle of another task, and
can be interrupted and resumed.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import yaml
from tqdm import tqdm

from tts_policy.data.data_check import DataCheck, write_check
from tts_policy.data.demonstrations import (
    add_demonstration_arguments,
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
from tts_policy.train.stop_request import StopRequest

Kind = TypeVar('Kind', bound=Spec)


def _train(trainer: PolicyTrainer, held_out: Windows, out: Path, save_every_s: float) -> None:
    """Train to the end, or to that of the step in which one asks to stop; both are saved."""
    log_path = out / 'log.csv'
    new = not log_path.exists()
    with log_path.open('a', newline='') as handle, StopRequest() as stop:
        log = csv.writer(handle)
        if new:
            log.writerow(['step', 'seconds', 'denoising', 'regression', 'held_out_l1'])
        started = saved = time.monotonic()
        first, last = trainer.step, trainer.spec.steps
        bar = tqdm(total=last, initial=first, unit='step', mininterval=5)
        means = {'denoising': 0.0, 'regression': 0.0}
        while trainer.step < last and not stop.made:
            losses = trainer.train_step()
            for name, value in losses.items():
                means[name] += (value - means[name]) / min(trainer.step - first, 50)
            bar.update()
            if trainer.step % 50 == 0:
                bar.set_postfix({name: f'{value:.4f}' for name, value in means.items()})
            if trainer.step % 500 == 0 or trainer.step == last:
                error = trainer.action_error(held_out)
                elapsed = time.monotonic() - started
                log.writerow([trainer.step, round(elapsed), *means.values(), error])
                handle.flush()
            due = time.monotonic() - saved > save_every_s
            if due or stop.made or trainer.step == last:
                trainer.save(out)
                saved = time.monotonic()


def initial_network(bundle: Path, contract: PolicyContract) -> PolicyNetwork:
    """Network of a bundle to start from; raises BundleError unless it has this contract."""
    network = load_bundle(bundle).network
    if network.contract != contract:
        raise BundleError(
            f'{bundle}: observation and action must be those to be trained, '
            f'{contract.to_dict()}, got {network.contract.to_dict()}'
        )
    return network


def chosen(
    option: str, kinds: Mapping[str, type[Kind]], words: Sequence[str], **defaults: dict[str, Any]
) -> Kind:
    """Settings of the kind that an option names, such as `vit width=64 layers=2`.

    defaults: settings by the name of a kind. Raises Mismatch for an unknown kind or setting.
    """
    name, *settings = words
    if name not in kinds:
        raise Mismatch(option, f'one of {", ".join(kinds)}', name)
    given = {key: yaml.safe_load(value) for key, _, value in (s.partition('=') for s in settings)}
    return kinds[name].from_dict({**defaults.get(name, {}), **given})


def network_spec(args: argparse.Namespace, initial: PolicyNetwork | None) -> NetworkSpec:
    """Sizes asked for; those of the initial network, but for residual blocks that are added.

    Raises ValueError for impossible ones, and for another objective than the initial network's.
    """
    if initial is not None:
        if args.objective not in (None, initial.spec.objective):
            raise ValueError(
                f'--objective: {initial.spec.objective}, that of --initial, expected, '
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
    """Samplers of the network's objective and training schedule; raises ValueError if none fit."""
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
    parser = argparse.ArgumentParser(prog='train_policy', description=__doc__.split('\n')[0])
    add_demonstration_arguments(parser)
    parser.add_argument('--out', type=Path, required=True, help='checkpoints, log and bundle')
    parser.add_argument(
        '--contract',
        type=Path,
        help='YAML file with observation and action, as in a model.yaml (default: contract.yaml '
        'beside the recordings)',
    )
    parser.add_argument('--name', default='panda_lift', help='of the bundle')
    parser.add_argument('--steps', type=int, default=8000, help='optimiser steps in all')
    parser.add_argument('--encoder-steps', type=int, default=1500, help='of them, encoder alone')
    parser.add_argument('--batch', type=int, default=32, help='windows a step')
    parser.add_argument('--learning-rate', type=float, default=3e-4)
    parser.add_argument(
        '--initial',
        type=Path,
        metavar='BUNDLE',
        help='start from its weights, with its sizes; same contract, normalisers fitted anew',
    )
    parser.add_argument('--width', type=int, default=256, help='denoiser width D')
    parser.add_argument('--layers', type=int, default=8, help='decoder layers L')
    parser.add_argument(
        '--camera-blocks',
        type=int,
        default=0,
        help='residual blocks of the camera encoder; with --initial, those it lacks are added',
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
        help='products in bfloat16: faster where the processor has instructions for it',
    )
    parser.add_argument(
        '--temperature',
        type=float,
        default=1.0,
        metavar='SHARE',
        help="of the noise that the bundle's samplers start from; 0: none, the same observation "
        'gives the same chunk (default %(default)s)',
    )
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--threads', type=int, default=2, help='torch threads')
    parser.add_argument('--save-every', type=float, default=300.0, help='checkpoint interval, s')
    return parser.parse_args(arguments)


def _set_up(args: argparse.Namespace) -> tuple[PolicyTrainer, Windows, dict[str, SamplerSpec]]:
    """Read what is given; returns trainer, windows held out and samplers of the bundle.

    Raises ValueError, BagError and BundleError among them.
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
        print(f'resumed at step {trainer.step}')
    write_check(args.out / 'data_check.json', check)
    return trainer, held_out, samplers


def main(arguments: list[str] | None = None) -> int:
    """Train, or go on training, and write the bundle; returns the exit status."""
    args = parse_arguments(arguments)
    try:
        trainer, held_out, samplers = _set_up(args)
    except ValueError as error:
        print(f'train_policy: {error}', file=sys.stderr)
        return 2
    try:
        _train(trainer, held_out, args.out, args.save_every)
    except KeyboardInterrupt:
        print('interrupted within a step; the same command goes on from the last checkpoint')
        return 130
    if trainer.step < args.steps:
        print(f'interrupted at step {trainer.step}; run the same command again to go on')
        return 130
    dropped = save_bundle(args.out / 'bundle', args.name, trainer.averaged_network, samplers)
    if dropped:
        print(f'pruners of {list(dropped)} were of another policy and are gone')
    return 0


if __name__ == '__main__':
    sys.exit(main())
