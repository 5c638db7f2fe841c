# SPDX-License-Identifier: Apache-2.0
"""LeRobot's multi-task DiT policy in its documented layout, of random weights.

Written around torch's own layers, so that it also computes: a second implementation to compare a
conversion with.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from layouts import sinusoid
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

VOCABULARY, TEXT_WIDTH = 49408, 64
TEXT = [49406, 320, 1125, 49407]


@dataclass(frozen=True)
class LeRobotSizes:
    width: int = 16
    layers: int = 2
    heads: int = 2
    horizon: int = 8
    obs_steps: int = 2
    execute: int = 4
    state_dim: int = 5
    action_dim: int = 3
    position: bool = True
    mode: str = 'MIN_MAX'
    cameras: tuple[str, ...] = ()
    separate: bool = False
    image: tuple[int, int] = (40, 48)


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def clip_layers(count: int) -> nn.ModuleList:
    return nn.ModuleList(
        nn.TransformerEncoderLayer(
            TEXT_WIDTH, 1, 96, 0.0, quick_gelu, batch_first=True, norm_first=True
        )
        for _ in range(count)
    )


def clip_layers_state(layers: nn.ModuleList) -> dict[str, Tensor]:
    """Weights of blocks by transformers' names."""
    state = {}
    for n, layer in enumerate(layers):
        name = f'encoder.layers.{n}'
        for part, weight, bias in zip(
            'qkv',
            layer.self_attn.in_proj_weight.chunk(3),
            layer.self_attn.in_proj_bias.chunk(3),
            strict=True,
        ):
            state[f'{name}.self_attn.{part}_proj.weight'] = weight
            state[f'{name}.self_attn.{part}_proj.bias'] = bias
        state |= _pair(f'{name}.self_attn.out_proj', layer.self_attn.out_proj)
        state |= _pair(f'{name}.layer_norm1', layer.norm1)
        state |= _pair(f'{name}.layer_norm2', layer.norm2)
        state |= _pair(f'{name}.mlp.fc1', layer.linear1)
        state |= _pair(f'{name}.mlp.fc2', layer.linear2)
    return state


class TextEncoder(nn.Module):
    """CLIP's text transformer; `state` names its weights as transformers does."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, TEXT_WIDTH)
        self.positions = nn.Embedding(77, TEXT_WIDTH)
        self.layers = clip_layers(layers)
        self.norm = nn.LayerNorm(TEXT_WIDTH)

    def forward(self, tokens: list[int]) -> Tensor:
        """Feature [D] of the first end of text, with all that is behind it in place."""
        x = self.tokens(torch.tensor([tokens])) + self.positions.weight[: len(tokens)]
        mask = nn.Transformer.generate_square_subsequent_mask(len(tokens))
        for layer in self.layers:
            x = layer(x, mask)
        return self.norm(x)[0, tokens.index(TEXT[-1])]

    def state(self, prefix: str) -> dict[str, Tensor]:
        state = {
            'embeddings.token_embedding.weight': self.tokens.weight,
            'embeddings.position_embedding.weight': self.positions.weight,
            **_pair('final_layer_norm', self.norm),
        }
        state |= clip_layers_state(self.layers)
        return {f'{prefix}{name}': value for name, value in state.items()}


def _pair(name: str, layer: nn.Module) -> dict[str, Tensor]:
    return {f'{name}.weight': layer.weight, f'{name}.bias': layer.bias}


class VisionEncoder(nn.Module):
    """CLIP's vision transformer for images of 16 x 16; the feature is that of the class token."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, TEXT_WIDTH, 8, 8, bias=False)
        self.class_token = nn.Parameter(torch.randn(TEXT_WIDTH))
        self.positions = nn.Embedding(5, TEXT_WIDTH)
        self.first, self.last = nn.LayerNorm(TEXT_WIDTH), nn.LayerNorm(TEXT_WIDTH)
        self.layers = clip_layers(layers)

    def forward(self, images: Tensor) -> Tensor:
        """Feature [B, D] of [B, 3, 16, 16]."""
        patches = self.patches(images).flatten(2).mT
        x = torch.cat([self.class_token.expand(len(images), 1, -1), patches], 1)
        x = self.first(x + self.positions.weight)
        for layer in self.layers:
            x = layer(x)
        return x[:, 0]

    def state(self, prefix: str) -> dict[str, Tensor]:
        state = {
            'embeddings.class_embedding': self.class_token,
            'embeddings.patch_embedding.weight': self.patches.weight,
            'embeddings.position_embedding.weight': self.positions.weight,
            **_pair('pre_layrnorm', self.first),
            **_pair('post_layernorm', self.last),
            **clip_layers_state(self.layers),
        }
        return {f'{prefix}{name}': value for name, value in state.items()}


class LeRobotPolicy(nn.Module):
    """Parameters of the policy; without rotary positions, whose attention torch has."""

    def __init__(self, sizes: LeRobotSizes, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.sizes, width, time = sizes, sizes.width, 32
        self.text, self.projection = TextEncoder(), nn.Linear(TEXT_WIDTH, width)
        encoders = len(sizes.cameras) if sizes.separate else min(1, len(sizes.cameras))
        self.vision = nn.ModuleList(VisionEncoder() for _ in range(encoders))
        seen = sizes.state_dim + TEXT_WIDTH * len(sizes.cameras)
        inputs = time + sizes.obs_steps * (seen + width)
        self.time_mlp = nn.Sequential(
            nn.Identity(),
            nn.Linear(time, 2 * time),
            nn.GELU(),
            nn.Linear(2 * time, time),
            nn.GELU(),
        )
        self.input_proj = nn.Linear(sizes.action_dim, width)
        self.pos_embedding = nn.Parameter(torch.randn(1, sizes.horizon, width))
        self.attentions = nn.ModuleList(
            nn.MultiheadAttention(width, sizes.heads, batch_first=True)
            for _ in range(sizes.layers)
        )
        self.mlps = nn.ModuleList(
            nn.Sequential(
                nn.Linear(width, 4 * width), nn.GELU('tanh'), nn.Linear(4 * width, width)
            )
            for _ in range(sizes.layers)
        )
        self.modulations = nn.ModuleList(nn.Linear(inputs, 6 * width) for _ in range(sizes.layers))
        self.output_proj = nn.Linear(width, sizes.action_dim)
        self.low = {'observation.state': torch.randn(sizes.state_dim), 'action': torch.randn(3)}
        self.low |= {f'observation.images.{key}': torch.rand(3) / 2 for key in sizes.cameras}
        self.spread = {k: torch.rand(len(v)) + 0.5 for k, v in self.low.items()}

    def normalize(self, key: str, value: Tensor) -> Tensor:
        """Normalise by `mode`, with low and spread as minimum and range, or mean and deviation."""
        share = (value - self.low[key]) / self.spread[key]
        return 2 * share - 1 if self.sizes.mode == 'MIN_MAX' else share

    def observe(self, states: Tensor, images: dict[str, Tensor]) -> Tensor:
        """Features [B, To, F] of states and of images uint8 [B, To, H, W, 3] by camera."""
        features = [self.normalize('observation.state', states)]
        for n, key in enumerate(self.sizes.cameras):
            pixels = self.normalize(f'observation.images.{key}', images[key] / 255)
            pixels = pixels.flatten(0, 1).permute(0, 3, 1, 2)
            pixels = F.interpolate(pixels, (20, 19), mode='bilinear', antialias=True)
            # 1.5 columns to the left of the crop: half to even is 2.
            feature = self.vision[n if self.sizes.separate else 0](pixels[..., 2:18, 2:18])
            features.append(feature.view(*states.shape[:2], -1))
        return torch.cat(features, -1)

    def forward(self, noisy: Tensor, timesteps: Tensor, states: Tensor, text: Tensor) -> Tensor:
        """Prediction [B, T, A] from observed features [B, To, F] and the text's feature."""
        told = self.projection(text).expand(*states.shape[:2], -1)
        seen = torch.cat([states, told], -1).flatten(1)
        cond = F.silu(torch.cat([self.time_mlp(sinusoid(timesteps, 32)), seen], -1))
        x = self.input_proj(noisy) + (self.pos_embedding if self.sizes.position else 0)
        for attention, mlp, modulation in zip(
            self.attentions, self.mlps, self.modulations, strict=True
        ):
            parts = modulation(cond)[:, None].chunk(6, -1)
            normed = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + parts[1]) + parts[0]
            x = x + parts[2] * attention(normed, normed, normed)[0]
            normed = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + parts[4]) + parts[3]
            x = x + parts[5] * mlp(normed)
        return self.output_proj(x)

    def state(self) -> dict[str, Tensor]:
        """Weights by LeRobot's names."""
        prefix = 'observation_encoder.text_encoder.'
        state = {
            **self.text.state(f'{prefix}text_encoder.text_model.'),
            **_pair(f'{prefix}projection', self.projection),
        }
        for n, encoder in enumerate(self.vision):
            name = f's.{n}' if self.sizes.separate else ''
            state |= encoder.state(f'observation_encoder.vision_encoder{name}.model.vision_model.')
        own = {'input_proj': self.input_proj, 'output_proj': self.output_proj}
        own |= {f'time_mlp.{n}': self.time_mlp[n] for n in (1, 3)}
        for n in range(self.sizes.layers):
            layer = f'transformer_blocks.{n}'
            own |= {f'{layer}.mlp.{m}': self.mlps[n][m] for m in (0, 2)}
            own[f'{layer}.adaLN_modulation.1'] = self.modulations[n]
            own[f'{layer}.multihead_attn.out_proj'] = self.attentions[n].out_proj
            for part in ('weight', 'bias'):
                packed = getattr(self.attentions[n], f'in_proj_{part}')
                state[f'noise_predictor.{layer}.multihead_attn.in_proj_{part}'] = packed
        for name, layer in own.items():
            state |= _pair(f'noise_predictor.{name}', layer)
        if self.sizes.position:
            state['noise_predictor.pos_embedding'] = self.pos_embedding
        return {name: value.detach().clone() for name, value in state.items()}

    def config(self, **changes: Any) -> dict[str, Any]:
        """Content of config.json."""
        sizes = self.sizes
        return {
            'type': 'multi_task_dit',
            'n_obs_steps': sizes.obs_steps,
            'horizon': sizes.horizon,
            'n_action_steps': sizes.execute,
            'objective': 'diffusion',
            'hidden_dim': sizes.width,
            'num_layers': sizes.layers,
            'num_heads': sizes.heads,
            'timestep_embed_dim': 32,
            'use_rope': False,
            'use_positional_encoding': sizes.position,
            'text_encoder_name': 'openai/clip-vit-base-patch16',
            'vision_encoder_name': 'openai/clip-vit-base-patch16',
            'use_separate_rgb_encoder_per_camera': sizes.separate,
            'image_resize_shape': [20, 19],
            'image_crop_shape': [16, 16],
            'input_features': {
                'observation.state': {'type': 'STATE', 'shape': [sizes.state_dim]},
                **{
                    f'observation.images.{key}': {'type': 'VISUAL', 'shape': [3, *sizes.image]}
                    for key in sizes.cameras
                },
            },
            'output_features': {'action': {'type': 'ACTION', 'shape': [sizes.action_dim]}},
            **changes,
        }

    def random_images(self, batch: int) -> dict[str, Tensor]:
        """Images of every camera, uint8 [batch, To, H, W, 3]."""
        shape = (batch, self.sizes.obs_steps, *self.sizes.image, 3)
        return {key: torch.randint(256, shape, dtype=torch.uint8) for key in self.sizes.cameras}

    def save(self, folder: Path, **changes: Any) -> Path:
        """Write the folder of the policy; `changes` go into config.json."""
        folder.mkdir()
        (folder / 'config.json').write_text(json.dumps(self.config(**changes)))
        save_file(self.state(), folder / 'model.safetensors')
        names = ('min', 'max') if self.sizes.mode == 'MIN_MAX' else ('mean', 'std')
        statistics = {}
        for key, low in self.low.items():
            top = low + self.spread[key] if names[0] == 'min' else self.spread[key]
            shape = (3, 1, 1) if 'images' in key else (-1,)
            for name, value in zip(names, (low, top), strict=True):
                statistics[f'{key}.{name}'] = value.reshape(shape)
        for side, step in (('pre', 'normalizer'), ('post', 'unnormalizer')):
            state_file = f'policy_{side}processor_step_1_{step}_processor.safetensors'
            settings = {
                'eps': 1e-8,
                'norm_map': dict.fromkeys(('STATE', 'VISUAL', 'ACTION'), self.sizes.mode),
            }
            steps = [
                {'registry_name': 'device_processor', 'config': {}},
                {
                    'registry_name': f'{step}_processor',
                    'config': settings,
                    'state_file': state_file,
                },
            ]
            text = json.dumps({'name': f'policy_{side}processor', 'steps': steps})
            (folder / f'policy_{side}processor.json').write_text(text)
            save_file(statistics, folder / state_file)
        return folder
