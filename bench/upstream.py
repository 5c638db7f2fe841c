# SPDX-License-Identifier: Apache-2.0
"""The denoising loop as Diffusion Policy runs it: the baseline of the benchmark.

torch's own decoder layers called through their own forward, the conditional encoder at every
step, and the scheduler of diffusers. It has the weights of a
`TransformerDenoiser` and computes the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tts_policy.policy.denoisers.transformer import TransformerDenoiser
from tts_policy.policy.schedulers.scheduler import SchedulerSpec


def decoder_of(denoiser: TransformerDenoiser) -> nn.TransformerDecoder:
    """torch's decoder with the weights of a denoiser's residual blocks."""
    spec = denoiser.spec
    layer = nn.TransformerDecoderLayer(
        spec.width,
        spec.heads,
        4 * spec.width,
        dropout=0.0,
        activation='gelu',
        batch_first=True,
        norm_first=True,
    )
    decoder = nn.TransformerDecoder(layer, spec.layers).eval()
    for index, target in enumerate(decoder.layers):
        sa, ca, ff = (block.state_dict() for block in denoiser.layer_blocks(index))
        state = {
            'self_attn.in_proj_weight': sa['qkv.weight'],
            'self_attn.in_proj_bias': sa['qkv.bias'],
            'multihead_attn.in_proj_weight': torch.cat([ca['q.weight'], ca['kv.weight']]),
            'multihead_attn.in_proj_bias': torch.cat([ca['q.bias'], ca['kv.bias']]),
        }
        for part in ('weight', 'bias'):
            state |= {
                f'self_attn.out_proj.{part}': sa[f'out.{part}'],
                f'multihead_attn.out_proj.{part}': ca[f'out.{part}'],
                f'linear1.{part}': ff[f'up.{part}'],
                f'linear2.{part}': ff[f'down.{part}'],
                f'norm1.{part}': sa[f'norm.{part}'],
                f'norm2.{part}': ca[f'norm.{part}'],
                f'norm3.{part}': ff[f'norm.{part}'],
            }
        target.load_state_dict(state)
    return decoder.requires_grad_(False)


def diffusers_scheduler(spec: SchedulerSpec) -> Any:
    """The scheduler of diffusers that a spec stands for, its timesteps set."""
    from diffusers import DDIMScheduler, DDPMScheduler

    shared = {
        'num_train_timesteps': spec.train_steps,
        'beta_schedule': 'squaredcos_cap_v2',
        'clip_sample': True,
        'prediction_type': 'epsilon',
    }
    scheduler: Any
    if spec.kind == 'ddpm':
        scheduler = DDPMScheduler(variance_type='fixed_small', **shared)
    else:
        scheduler = DDIMScheduler(set_alpha_to_one=True, steps_offset=0, **shared)
    scheduler.set_timesteps(spec.steps)
    return scheduler


class UpstreamSampler:
    """Dense sampling the way Diffusion Policy does it, one network call a step."""

    def __init__(self, denoiser: TransformerDenoiser, spec: SchedulerSpec, seed: int = 0) -> None:
        self._denoiser = denoiser
        self._decoder = decoder_of(denoiser).to(denoiser.device)
        self._scheduler = diffusers_scheduler(spec)
        self._generator = torch.Generator(denoiser.device).manual_seed(seed)
        self._masks = tuple(
            torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, float('-inf'))
            for mask in (denoiser.self_mask, denoiser.memory_mask)
        )

    def predict(self, x: Tensor, timestep: Tensor, features: Tensor) -> Tensor:
        """Noise in x [B, T, A] at a timestep [] given features [B, To, Do]."""
        encoder, (self_mask, memory_mask) = self._denoiser.encoder, self._masks
        time = encoder.time_tokens(timestep.expand(len(x)))[:, None]
        memory = torch.cat([time, encoder.observation_tokens(features)], dim=1)
        tokens = self._decoder(
            self._denoiser.embed(x), memory, tgt_mask=self_mask, memory_mask=memory_mask
        )
        return self._denoiser.predict(tokens)

    @torch.inference_mode()
    def sample(self, features: Tensor, initial_noise: Tensor) -> Tensor:
        """Normalised actions [B, T, A] from features [B, To, Do]."""
        x = initial_noise
        # They stay on the host, as upstream's do: the scheduler reads each of them there.
        for timestep in self._scheduler.timesteps:
            predicted = self.predict(x, timestep.to(x.device), features)
            x = self._scheduler.step(predicted, timestep, x, generator=self._generator)
            x = x.prev_sample
        return x
