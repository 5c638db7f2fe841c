# SPDX-License-Identifier: Apache-2.0
"""Training of a policy on windows of demonstrations: losses, optimiser and checkpoints.

See `train_policy` for the order in which encoder and denoiser are trained.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

from tts_policy.data.windows import Windows
from tts_policy.policy.contract import PolicyContract
from tts_policy.policy.network import NetworkSpec, PolicyNetwork
from tts_policy.policy.schedulers.flow import flow_targets
from tts_policy.policy.schedulers.noise_schedule import TrainingNoise
from tts_policy.policy.schedulers.scheduler import FLOW, SchedulerSpec
from tts_policy.train.training_run import (
    check_settings,
    digest,
    read_checkpoint,
    write_checkpoint,
)


@dataclass(frozen=True)
class TrainingSpec:
    """Optimisation settings; the first `encoder_steps` of `steps` train the encoder alone.

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
        """Return the factor of a step: linear warm-up, one for each phase, and half a cosine."""
        first = 0 if step < self.encoder_steps else self.encoder_steps
        warmup = min(1.0, (step - first + 1) / self.warmup_steps)
        return warmup * (0.02 + 0.49 * (1 + math.cos(math.pi * step / self.steps)))

    def ema_decay(self, step: int) -> float:
        """Return a decay that grows with the step, as in Diffusion Policy's EMA model."""
        return min(self.ema_max, 1 - (1 + max(step - self.encoder_steps, 0)) ** -self.ema_power)


class PolicyTrainer:
    """Owns network, moving average, optimiser and random state of one training run."""

    def __init__(
        self,
        contract: PolicyContract,
        network: NetworkSpec,
        spec: TrainingSpec,
        windows: Windows,
        initial: PolicyNetwork | None = None,
    ) -> None:
        self.settings = run_settings(contract, network, spec, initial)
        torch.manual_seed(spec.seed)
        self.spec, self.windows, self.step = spec, windows, 0
        self.network = PolicyNetwork(contract, network)
        if initial is not None:
            # Residual blocks that the initial camera encoder lacks begin as identities.
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
        """Return denoising loss (zero during encoder training) and regression loss of a batch."""
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
            noisy, times, velocity = flow_targets(target, self.generator)
            predicted = network.denoiser(noisy, times, features)
            return F.mse_loss(predicted.float(), velocity), regression
        noise = torch.randn(target.shape, generator=self.generator)
        t = torch.randint(network.spec.train_steps, (spec.batch,), generator=self.generator)
        predicted = network.denoiser(self.noise.add(target, noise, t), t, features)
        return F.mse_loss(predicted.float(), noise), regression

    def _backward(self) -> tuple[Tensor, Tensor]:
        with torch.autocast('cpu', torch.bfloat16, enabled=self.spec.bfloat16):
            denoising, regression = self.losses()
        weight = 1.0 if self.step < self.spec.encoder_steps else self.spec.auxiliary_weight
        self.optimizer.zero_grad(set_to_none=True)
        (denoising + weight * regression).backward()
        return denoising, regression

    def train_step(self) -> dict[str, float]:
        """Take one optimiser step; return the losses."""
        factor = self.spec.learning_rate_factor(self.step)
        for group in self.optimizer.param_groups:
            group['lr'] = self.spec.learning_rate * factor
        denoising, regression = self._backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        if self.step >= self.spec.encoder_steps:
            self.average.update_parameters(self.network)
        self.step += 1
        return {'denoising': denoising.item(), 'regression': regression.item()}

    def seconds_left(self) -> float:
        """Estimate the time to the last step from one measured step of each phase.

        Losses and gradients are computed as in training, and then dropped: weights, step and
        random numbers stay as they are. Saving and validation are not included.
        """
        step, state, left = self.step, self.generator.get_state(), 0.0
        encoder_end = min(self.spec.encoder_steps, self.spec.steps)
        for first, last in ((0, encoder_end), (encoder_end, self.spec.steps)):
            if (count := last - max(step, first)) <= 0:
                continue
            self.step = first
            with torch.random.fork_rng(devices=[]):
                self._backward()
                started = time.perf_counter()
                self._backward()
            left += count * (time.perf_counter() - started)
        self.optimizer.zero_grad(set_to_none=True)
        self.generator.set_state(state)
        self.step = step
        return left

    @property
    def averaged_network(self) -> PolicyNetwork:
        """Network of the moving average, in evaluation mode."""
        network = self.average.module
        assert isinstance(network, PolicyNetwork)
        return network.eval()

    @torch.inference_mode()
    def action_error(self, windows: Windows, count: int = 64) -> float:
        """Return the mean absolute error (normalised) of ten-step samples on held-out windows."""
        network = self.averaged_network
        generator = torch.Generator().manual_seed(0)
        index = torch.randperm(len(windows), generator=generator)[:count]
        images, joints, actions = windows.gather(index)
        target = network.action_normalizer.normalize(actions)
        features = network.features(images, joints)
        sampler = ten_steps(network.spec).make()
        x, x0 = torch.randn(target.shape, generator=generator), None
        for i, t in enumerate(sampler.spec.timesteps()):
            eps = network.denoiser(x, torch.full((len(x),), t), features)
            x, x0 = sampler.step(i, x, eps, previous_x0=x0)
        return (x - target).abs().mean().item()

    def save(self, folder: Path) -> None:
        """Write a checkpoint for `load`."""
        state = {
            'settings': self.settings,
            'step': self.step,
            'network': self.network.state_dict(),
            'regressor': self.regressor.state_dict(),
            'average': self.average.state_dict(),
            'optimizer': self.optimizer.state_dict(),
            'generator': self.generator.get_state(),
        }
        write_checkpoint(folder, state)

    def load(self, folder: Path) -> bool:
        """Continue from the checkpoint in `folder`; return False if there is none.

        Raises ValueError if it belongs to another run.
        """
        state = read_checkpoint(folder)
        if state is None:
            return False
        check_settings(folder, state.get('settings', {}), self.settings)
        self.step = state['step']
        self.network.load_state_dict(state['network'])
        self.regressor.load_state_dict(state['regressor'])
        self.average.load_state_dict(state['average'])
        self.optimizer.load_state_dict(state['optimizer'])
        self.generator.set_state(state['generator'])
        return True


def run_settings(
    contract: PolicyContract,
    network: NetworkSpec,
    spec: TrainingSpec,
    initial: PolicyNetwork | None,
) -> dict[str, str]:
    """Return what a continued run must have in common with its beginning, by name.

    The number of steps is not part of it, so that a run can be made longer.
    """
    optimisation = {k: v for k, v in asdict(spec).items() if k != 'steps'}
    return {
        **{f'training {name}': str(value) for name, value in optimisation.items()},
        **{f'network {name}': str(value) for name, value in asdict(network).items()},
        **{name: str(value) for name, value in contract.to_dict().items()},
        'weights of --initial': 'none' if initial is None else digest(initial),
    }


def ten_steps(network: NetworkSpec) -> SchedulerSpec:
    """Return a scheduler of ten deterministic steps for a network of either objective."""
    if network.objective == FLOW:
        return SchedulerSpec(FLOW, 10, prediction='velocity')
    return SchedulerSpec('ddim', 10, network.train_steps)
