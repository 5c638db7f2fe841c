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
import math
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from tts_policy.bag.data_check import DataCheck, write_check
from tts_policy.core.bundle import BundleError, load_bundle, save_bundle
from tts_policy.core.contract import PolicyContract, read_contract
from tts_policy.core.network import OBJECTIVES, DiTOptions, NetworkSpec, PolicyNetwork
from tts_policy.core.scheduler import (
    FLOW,
    NoiseScheduler,
    SchedulerSpec,
    TrainingNoise,
    flow_lesson,
)
from tts_policy.core.threads import set_threads
from tts_policy.train.dataset import Windows
from tts_policy.train.demonstrations import (
    add_demonstration_arguments,
    load_windows,
    split_demonstrations,
)
from tts_policy.train.panda_contract import FLOW_SAMPLERS, PANDA_CONTRACT, PANDA_SAMPLERS


@dataclass(frozen=True)
class TrainingSpec:
    """Optimisation settings; `encoder_steps` of `steps` train the encoder alone.

    bfloat16: matrix products and convolutions in that precision, weights and sums in float32.
    """

    steps: int
    encoder_steps: int
    batch: int
    learning_rate: float
    seed: int
    weight_decay: float = 1e-4
    warmup_steps: int = 200
    auxiliary_weight: float = 0.5
    ema_power: float = 0.75
    ema_max: float = 0.999
    bfloat16: bool = False

    def learning_rate_factor(self, step: int) -> float:
        """Linear warm-up, then half a cosine; the denoiser gets a warm-up of its own."""
        first = 0 if step < self.encoder_steps else self.encoder_steps
        warmup = min(1.0, (step - first + 1) / self.warmup_steps)
        return warmup * (0.02 + 0.49 * (1 + math.cos(math.pi * step / self.steps)))

    def ema_decay(self, step: int) -> float:
        """Decay that grows with the step, as in Diffusion Policy's EMA model."""
        return min(self.ema_max, 1 - (1 + max(step - self.encoder_steps, 0)) ** -self.ema_power)


class PolicyTrainer:
    """Owns network, average, optimiser and random state of one training run."""

    def __init__(
        self,
        contract: PolicyContract,
        network: NetworkSpec,
        spec: TrainingSpec,
        windows: Windows,
        initial: PolicyNetwork | None = None,
    ) -> None:
        torch.manual_seed(spec.seed)
        self.spec, self.windows, self.step = spec, windows, 0
        self.network = PolicyNetwork(contract, network)
        if initial is not None:
            # Residual blocks of the camera encoder that it lacks are identities.
            self.network.load_state_dict(self.network.state_dict() | initial.state_dict())
        actions, joints = windows.actions, windows.joints
        self.network.action_normalizer.fit(actions.amin(0), actions.amax(0))
        self.network.joint_normalizer.fit(joints.amin(0), joints.amax(0))
        obs, act = contract.observation, contract.action
        features = obs.steps * self.network.observation_encoder.out_features
        self.regressor = nn.Sequential(
            nn.Linear(features, 512), nn.GELU(), nn.Linear(512, act.horizon * len(act.joints))
        )
        self.noise = TrainingNoise(network.train_steps)
        self.generator = torch.Generator().manual_seed(spec.seed)
        self.average = AveragedModel(
            self.network,
            avg_fn=lambda mean, new, _: mean.lerp(new, 1 - spec.ema_decay(self.step)),
            use_buffers=False,
        )
        parameters = [*self.network.parameters(), *self.regressor.parameters()]
        decayed = [p for p in parameters if p.dim() > 1]
        rest = [p for p in parameters if p.dim() <= 1]
        self.optimizer = torch.optim.AdamW(
            [
                {'params': decayed, 'weight_decay': spec.weight_decay},
                {'params': rest, 'weight_decay': 0.0},
            ],
            lr=spec.learning_rate,
            betas=(0.9, 0.95),
            fused=True,
        )

    def losses(self) -> tuple[Tensor, Tensor]:
        """Denoising loss (zero while the encoder trains alone) and regression loss of a batch."""
        spec, network = self.spec, self.network
        index = torch.randint(len(self.windows), (spec.batch,), generator=self.generator)
        images, joints, actions = self.windows.gather(index)
        target = network.action_normalizer.normalize(actions)
        features = network.features(images, joints)
        regressed = self.regressor(features.flatten(1)).view_as(target)
        regression = F.l1_loss(regressed.float(), target)
        if self.step < spec.encoder_steps:
            return regression.new_zeros(()), regression
        if network.spec.objective == FLOW:
            noisy, times, velocity = flow_lesson(target, self.generator)
            predicted = network.denoiser(noisy, times, features)
            return F.mse_loss(predicted.float(), velocity), regression
        noise = torch.randn(target.shape, generator=self.generator)
        t = torch.randint(network.spec.train_steps, (spec.batch,), generator=self.generator)
        predicted = network.denoiser(self.noise.add(target, noise, t), t, features)
        return F.mse_loss(predicted.float(), noise), regression

    def train_step(self) -> dict[str, float]:
        """One optimiser step; returns the losses."""
        factor = self.spec.learning_rate_factor(self.step)
        for group in self.optimizer.param_groups:
            group['lr'] = self.spec.learning_rate * factor
        with torch.autocast('cpu', torch.bfloat16, enabled=self.spec.bfloat16):
            denoising, regression = self.losses()
        encoder_only = self.step < self.spec.encoder_steps
        weight = 1.0 if encoder_only else self.spec.auxiliary_weight
        self.optimizer.zero_grad(set_to_none=True)
        (denoising + weight * regression).backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        if not encoder_only:
            self.average.update_parameters(self.network)
        self.step += 1
        return {'denoising': denoising.item(), 'regression': regression.item()}

    @property
    def averaged_network(self) -> PolicyNetwork:
        """The moving average, in evaluation mode."""
        network = self.average.module
        assert isinstance(network, PolicyNetwork)
        return network.eval()

    @torch.inference_mode()
    def action_error(self, windows: Windows, count: int = 64) -> float:
        """Mean absolute error (normalised units) of ten-step samples on windows held out."""
        network = self.averaged_network
        generator = torch.Generator().manual_seed(0)
        index = torch.randperm(len(windows), generator=generator)[:count]
        images, joints, actions = windows.gather(index)
        target = network.action_normalizer.normalize(actions)
        features = network.features(images, joints)
        sampler = NoiseScheduler(ten_steps(network.spec))
        x = torch.randn(target.shape, generator=generator)
        for i, t in enumerate(sampler.spec.timesteps()):
            eps = network.denoiser(x, torch.full((len(x),), t), features)
            x = sampler.step(i, x, eps, None)
        return (x - target).abs().mean().item()

    def save(self, folder: Path) -> None:
        """Write a checkpoint that `load` continues from; the last write wins only when whole."""
        state = {
            'step': self.step,
            'network': self.network.state_dict(),
            'regressor': self.regressor.state_dict(),
            'average': self.average.state_dict(),
            'optimizer': self.optimizer.state_dict(),
            'generator': self.generator.get_state(),
        }
        torch.save(state, folder / 'checkpoint.tmp')
        (folder / 'checkpoint.tmp').replace(folder / 'checkpoint.pt')

    def load(self, folder: Path) -> None:
        """Continue from the checkpoint in `folder`."""
        state = torch.load(folder / 'checkpoint.pt', weights_only=True)
        self.step = state['step']
        self.network.load_state_dict(state['network'])
        self.regressor.load_state_dict(state['regressor'])
        self.average.load_state_dict(state['average'])
        self.optimizer.load_state_dict(state['optimizer'])
        self.generator.set_state(state['generator'])


def ten_steps(network: NetworkSpec) -> SchedulerSpec:
    """Ten deterministic steps for a network of either objective."""
    if network.objective == FLOW:
        return SchedulerSpec(FLOW, 10, prediction='velocity')
    return SchedulerSpec('ddim', 10, network.train_steps)


def _train(trainer: PolicyTrainer, held_out: Windows, out: Path, save_every_s: float) -> None:
    log_path = out / 'log.csv'
    new = not log_path.exists()
    with log_path.open('a', newline='') as handle:
        log = csv.writer(handle)
        if new:
            log.writerow(['step', 'seconds', 'denoising', 'regression', 'held_out_l1'])
        started = saved = time.monotonic()
        bar = tqdm(total=trainer.spec.steps, initial=trainer.step, unit='step', mininterval=5)
        means = {'denoising': 0.0, 'regression': 0.0}
        while trainer.step < trainer.spec.steps:
            losses = trainer.train_step()
            for name, value in losses.items():
                means[name] += (value - means[name]) / min(trainer.step, 50)
            bar.update()
            if trainer.step % 50 == 0:
                bar.set_postfix({name: f'{value:.4f}' for name, value in means.items()})
            if trainer.step % 500 == 0 or trainer.step == trainer.spec.steps:
                error = trainer.action_error(held_out)
                elapsed = time.monotonic() - started
                log.writerow([trainer.step, round(elapsed), *means.values(), error])
                handle.flush()
            if time.monotonic() - saved > save_every_s or trainer.step == trainer.spec.steps:
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


def network_spec(args: argparse.Namespace, initial: PolicyNetwork | None) -> NetworkSpec:
    """Sizes asked for; those of the initial network, but for residual blocks that are added."""
    if initial is not None:
        blocks = max(args.camera_blocks, initial.spec.camera_blocks)
        return replace(initial.spec, camera_blocks=blocks)
    return NetworkSpec(
        width=args.width,
        layers=args.layers,
        camera_blocks=args.camera_blocks,
        dit=DiTOptions() if args.denoiser == 'dit' else None,
        objective=args.objective,
    )


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Command line of `train_policy`."""
    parser = argparse.ArgumentParser(prog='train_policy', description=__doc__.split('\n')[0])
    add_demonstration_arguments(parser)
    parser.add_argument('--out', type=Path, required=True, help='checkpoints, log and bundle')
    parser.add_argument(
        '--contract',
        type=Path,
        help='yaml with observation and action, as in a model.yaml (default: those of the Panda)',
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
        '--denoiser',
        choices=('transformer', 'dit'),
        default='transformer',
        help="Diffusion Policy's transformer, or a DiT with modulated blocks",
    )
    parser.add_argument(
        '--objective',
        choices=OBJECTIVES,
        default='diffusion',
        help='predict noise, or the velocity of a flow that is sampled by Euler steps',
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


def main(arguments: list[str] | None = None) -> int:
    """Train, or go on training, and write the bundle; returns the exit status."""
    args = parse_arguments(arguments)
    try:
        set_threads(args.threads)
        contract = PANDA_CONTRACT if args.contract is None else read_contract(args.contract)
        initial = None if args.initial is None else initial_network(args.initial, contract)
        network = network_spec(args, initial)
        known = FLOW_SAMPLERS if network.objective == FLOW else PANDA_SAMPLERS
        samplers = {n: replace(spec, temperature=args.temperature) for n, spec in known.items()}
        kept, others = split_demonstrations(args, contract)
        check = DataCheck(contract)
        held_out = load_windows(kept, check=check)
        windows = load_windows(others, check=check)
    except ValueError as error:
        print(f'train_policy: {error}', file=sys.stderr)
        return 2
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
    write_check(args.out / 'data_check.json', check)
    if (args.out / 'checkpoint.pt').exists():
        trainer.load(args.out)
        print(f'resumed at step {trainer.step}')
    try:
        _train(trainer, held_out, args.out, args.save_every)
    except KeyboardInterrupt:
        trainer.save(args.out)
        print(f'interrupted at step {trainer.step}; run the same command again to go on')
        return 130
    save_bundle(args.out / 'bundle', args.name, trainer.averaged_network, samplers)
    return 0


if __name__ == '__main__':
    sys.exit(main())
