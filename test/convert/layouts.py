# SPDX-License-Identifier: Apache-2.0
"""Checkpoints with the documented key layouts of other projects, of random weights.

Written around torch's own transformer layers, so that they also compute: a second implementation
to compare a conversion with.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import dill
import hydra
import torch
import yaml
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn


def sinusoid(positions: Tensor, width: int) -> Tensor:
    frequency = torch.exp(-math.log(10_000) / (width // 2 - 1) * torch.arange(width // 2))
    angles = positions[:, None] * frequency
    return torch.cat([angles.sin(), angles.cos()], -1)


@dataclass(frozen=True)
class Sizes:
    layers: int = 2
    heads: int = 2
    width: int = 32
    horizon: int = 8
    obs_steps: int = 2
    execute: int = 4
    obs_dim: int = 5
    action_dim: int = 3
    causal: bool = True
    cond_layers: int = 0
    newest_only: bool = False
    scheduler: dict[str, Any] = field(default_factory=dict)


def _layer_options(sizes: Sizes) -> dict[str, Any]:
    return {
        'd_model': sizes.width,
        'nhead': sizes.heads,
        'dim_feedforward': 4 * sizes.width,
        'activation': 'gelu',
        'batch_first': True,
        'norm_first': True,
    }


class DiffusionTransformer(nn.Module):
    """Parameters named as in Diffusion Policy's transformer."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        width, options = sizes.width, _layer_options(sizes)
        self.sizes = sizes
        self._dummy_variable = nn.Parameter()
        self.input_emb = nn.Linear(sizes.action_dim, width)
        self.pos_emb = nn.Parameter(torch.randn(1, sizes.horizon, width))
        self.cond_obs_emb = nn.Linear(sizes.obs_dim, width)
        self.cond_pos_emb = nn.Parameter(torch.randn(1, 1 + sizes.obs_steps, width))
        self.encoder: nn.Module
        if sizes.cond_layers:
            layer = nn.TransformerEncoderLayer(**options)
            self.encoder = nn.TransformerEncoder(
                layer, sizes.cond_layers, enable_nested_tensor=False
            )
        else:
            self.encoder = nn.Sequential(
                nn.Linear(width, 4 * width), nn.Mish(), nn.Linear(4 * width, width)
            )
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(**options), sizes.layers)
        self.ln_f = nn.LayerNorm(width)
        self.head = nn.Linear(width, sizes.action_dim)
        if sizes.causal:
            rows = torch.arange(sizes.horizon)[:, None]
            for name, allowed in (
                ('mask', rows >= torch.arange(sizes.horizon)),
                ('memory_mask', rows >= torch.arange(1 + sizes.obs_steps) - 1),
            ):
                mask = torch.zeros(allowed.shape).masked_fill(~allowed, float('-inf'))
                self.register_buffer(name, mask)
        for parameter in self.parameters():
            if parameter.numel():
                parameter.data += 0.1 * torch.randn(parameter.shape)

    def forward(self, noisy: Tensor, timesteps: Tensor, features: Tensor) -> Tensor:
        """Prediction [B, T, A]."""
        time = sinusoid(timesteps, self.sizes.width)[:, None]
        tokens = torch.cat([time, self.cond_obs_emb(features)], 1) + self.cond_pos_emb
        count = noisy.shape[1]
        memory_mask = getattr(self, 'memory_mask', None)
        x = self.decoder(
            self.input_emb(noisy) + self.pos_emb[:, :count],
            self.encoder(tokens),
            None if memory_mask is None else self.mask[:count, :count],
            None if memory_mask is None else memory_mask[:count],
        )
        return self.head(self.ln_f(x))


class Normalizer:
    """Random scale and offset, in the layout of Diffusion Policy's normaliser."""

    def __init__(self, dim: int) -> None:
        self.scale, self.offset = torch.rand(dim) + 0.5, torch.randn(dim)

    def state(self, key: str) -> dict[str, Tensor]:
        prefix = f'normalizer.params_dict.{key}.'
        return {
            f'{prefix}scale': self.scale,
            f'{prefix}offset': self.offset,
            f'{prefix}input_stats.min': torch.zeros(len(self.scale)),
        }


def noise_scheduler(**changes: Any) -> dict[str, Any]:
    return {
        '_target_': 'diffusers.schedulers.scheduling_ddpm.DDPMScheduler',
        'num_train_timesteps': 20,
        'beta_start': 0.0001,
        'beta_end': 0.02,
        'beta_schedule': 'squaredcos_cap_v2',
        'variance_type': 'fixed_small',
        'clip_sample': True,
        'prediction_type': 'epsilon',
        **changes,
    }


def _options(sizes: Sizes) -> dict[str, Any]:
    return {
        'n_layer': sizes.layers,
        'n_head': sizes.heads,
        'n_emb': sizes.width,
        'p_drop_emb': 0.0,
        'p_drop_attn': 0.3,
        'causal_attn': sizes.causal,
        'time_as_cond': True,
        'obs_as_cond': True,
        'n_cond_layers': sizes.cond_layers,
    }


def _policy(sizes: Sizes, name: str) -> dict[str, Any]:
    return {
        '_target_': f'diffusion_policy.policy.some_module.{name}',
        'noise_scheduler': noise_scheduler(**sizes.scheduler),
        'horizon': sizes.horizon,
        'n_action_steps': sizes.execute,
        'n_obs_steps': sizes.obs_steps,
        'num_inference_steps': 20,
        'obs_as_cond': True,
        'pred_action_steps_only': sizes.newest_only,
    }


def lowdim_policy(sizes: Sizes) -> dict[str, Any]:
    """Configuration of a low-dimensional policy."""
    return {
        **_policy(sizes, 'DiffusionTransformerLowdimPolicy'),
        'obs_dim': sizes.obs_dim,
        'action_dim': sizes.action_dim,
        'model': {
            '_target_': 'diffusion_policy.model.diffusion.TransformerForDiffusion',
            'input_dim': sizes.action_dim,
            'output_dim': sizes.action_dim,
            'horizon': sizes.horizon,
            'n_obs_steps': sizes.obs_steps,
            'cond_dim': sizes.obs_dim,
            **_options(sizes),
        },
    }


def _composed(policy: dict[str, Any]) -> DictConfig:
    """Compose a configuration as upstream's train.py does, with resolvers that leave traces."""
    OmegaConf.register_new_resolver('eval', eval, replace=True)
    config = {
        '_target_': 'diffusion_policy.workspace.Workspace',
        'n_action_steps': policy['n_action_steps'],
        'n_latency_steps': 0,
        'policy': {
            **policy,
            'n_action_steps': "${eval:'${n_action_steps}+${n_latency_steps}'}",
        },
        'logging': {'name': '${now:%Y.%m.%d-%H.%M.%S}_run', 'tags': ['run']},
        'multi_run': {'run_dir': 'data/outputs/${now:%Y.%m.%d}/${now:%H.%M.%S}'},
    }
    with TemporaryDirectory() as folder:
        (Path(folder) / 'train.yaml').write_text(yaml.safe_dump(config, sort_keys=False))
        with hydra.initialize_config_dir(folder, version_base=None):
            composed = hydra.compose('train')
    OmegaConf.resolve(composed)
    return composed


def save_workspace(
    path: Path,
    policy: dict[str, Any],
    state: dict[str, Tensor],
    average: bool = True,
    prefix: str = '',
) -> Path:
    """Write a workspace checkpoint as upstream's BaseWorkspace.save_checkpoint does.

    average: whether there is an averaged model; the last weights are zeros then. prefix: of the
    names of all weights.
    """
    state = {f'{prefix}{name}': value for name, value in state.items()}
    parameters = [nn.Parameter(value.detach().clone().float()) for value in state.values()]
    optimizer = torch.optim.AdamW(parameters)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    states: dict[str, Any] = {'model': state, 'optimizer': optimizer.state_dict()}
    if average:
        states['model'] = {name: 0 * value for name, value in state.items()}
        states['ema_model'] = state
    payload = {
        'cfg': _composed(policy),
        'state_dicts': states,
        'pickles': {'global_step': dill.dumps(7), 'epoch': dill.dumps(1)},
    }
    with path.open('wb') as file:
        torch.save(payload, file, pickle_module=dill)
    return path


def save_lowdim(
    path: Path, sizes: Sizes, policy: dict[str, Any] | None = None, **options: Any
) -> tuple[DiffusionTransformer, Normalizer, Normalizer]:
    """Write a low-dimensional policy; returns its modules: model, normalisers of obs, action."""
    model = DiffusionTransformer(sizes).eval()
    obs, action = Normalizer(sizes.obs_dim), Normalizer(sizes.action_dim)
    state = {f'model.{name}': value for name, value in model.state_dict().items()}
    state |= obs.state('obs') | action.state('action') | {'_dummy_variable': torch.empty(0)}
    save_workspace(path, policy or lowdim_policy(sizes), state, **options)
    return model, obs, action


class _Block(nn.Module):
    """A residual block with torchvision's names."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: type[nn.Module]) -> None:
        super().__init__()

        def make() -> nn.Module:
            return nn.BatchNorm2d(outputs) if norm is nn.BatchNorm2d else _group_norm(outputs)

        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1, self.relu = make(), nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = make()
        if stride > 1:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), make()
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(y + (self.downsample(x) if hasattr(self, 'downsample') else x))


def _group_norm(channels: int) -> nn.Module:
    return nn.GroupNorm(channels // 16, channels)


class _Backbone(nn.Module):
    def __init__(self, norm: type[nn.Module]) -> None:
        super().__init__()
        stages = []
        for inputs, outputs in ((64, 64), (64, 128), (128, 256), (256, 512)):
            stride = 1 if inputs == outputs else 2
            stages.append(
                nn.Sequential(
                    _Block(inputs, outputs, stride, norm), _Block(outputs, outputs, 1, norm)
                )
            )
        first = nn.BatchNorm2d(64) if norm is nn.BatchNorm2d else _group_norm(64)
        stem = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.nets = nn.Sequential(stem, first, nn.ReLU(), nn.MaxPool2d(3, 2, 1), *stages)

    def forward(self, x: Tensor) -> Tensor:
        return self.nets(x)


class _Keypoints(nn.Module):
    def __init__(self, height: int, width: int) -> None:
        super().__init__()
        self.nets = nn.Conv2d(512, 32, 1)
        self.register_buffer('temperature', torch.tensor([0.7]))
        y, x = torch.meshgrid(
            torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing='ij'
        )
        self.register_buffer('pos_x', x.reshape(1, -1))
        self.register_buffer('pos_y', y.reshape(1, -1))

    def forward(self, maps: Tensor) -> Tensor:
        share = (self.nets(maps).flatten(2) / self.temperature).softmax(-1)
        return torch.stack([(share * self.pos_x).sum(-1), (share * self.pos_y).sum(-1)], -1)


class VisualCore(nn.Module):
    """Parameters named as in robomimic 0.2's visual core; takes crops, [B, 3, H, W]."""

    def __init__(self, height: int, width: int, norm: type[nn.Module]) -> None:
        super().__init__()
        self.backbone = _Backbone(norm)
        self.pool = _Keypoints(math.ceil(height / 32), math.ceil(width / 32))
        self.nets = nn.Sequential(self.backbone, self.pool, nn.Flatten(), nn.Linear(64, 64))
        for name, buffer in self.named_buffers():
            if name.endswith(('running_mean', 'running_var')):
                buffer.uniform_(0.5, 1.5)

    def forward(self, crop: Tensor) -> Tensor:
        return torch.relu(self.nets(crop))


@dataclass(frozen=True)
class Hybrid:
    """Modules of a hybrid policy; `order` is that of the observations in its shape_meta."""

    model: DiffusionTransformer
    cores: dict[str, VisualCore]
    normalizers: dict[str, Normalizer]
    meta: dict[str, Any]
    crop: tuple[int, int] | None

    def features(self, images: dict[str, Tensor], vectors: dict[str, Tensor]) -> Tensor:
        """Features [To, Do] of images [To, H, W, 3] and vectors [To, n], in shape_meta's order."""
        parts = []
        for key in self.meta:
            normal = self.normalizers[key]
            if key not in self.cores:
                parts.append(vectors[key] * normal.scale + normal.offset)
                continue
            pixels = images[key].permute(0, 3, 1, 2) / 255 * normal.scale + normal.offset
            if self.crop is not None:
                rows, columns = self.crop
                top = round((pixels.shape[2] - rows) / 2)
                left = round((pixels.shape[3] - columns) / 2)
                pixels = pixels[:, :, top : top + rows, left : left + columns]
            parts.append(self.cores[key](pixels))
        return torch.cat(parts, -1)


def save_hybrid(
    path: Path, cameras: int, norm: type[nn.Module], crop: tuple[int, int] | None, fixed: bool
) -> Hybrid:
    """Write a hybrid policy with cameras of 40 x 48 pixels between two vectors."""
    rgb = {'shape': [3, 40, 48], 'type': 'rgb'}
    meta = {'pose': {'shape': [3], 'type': 'low_dim'}}
    meta |= {f'view{n}': rgb for n in range(cameras)}
    meta['grip'] = {'shape': [2]}
    sizes = Sizes(obs_dim=5 + 64 * cameras)
    model = DiffusionTransformer(sizes).eval()
    seen = crop or (40, 48)
    cores = {f'view{n}': VisualCore(*seen, norm).eval() for n in range(cameras)}
    normalizers = {k: Normalizer(1 if k in cores else v['shape'][0]) for k, v in meta.items()}
    action = Normalizer(sizes.action_dim)
    state = {f'model.{name}': value for name, value in model.state_dict().items()}
    for key, core in cores.items():
        for name, value in core.state_dict().items():
            state[f'obs_encoder.obs_nets.{key}.{name}'] = value
    for key, normalizer in normalizers.items():
        state |= normalizer.state(key)
    policy = {
        **_policy(sizes, 'DiffusionTransformerHybridImagePolicy'),
        **_options(sizes),
        'shape_meta': {'obs': meta, 'action': {'shape': [sizes.action_dim]}},
        'crop_shape': None if crop is None else list(crop),
        'obs_encoder_group_norm': norm is nn.GroupNorm,
        'eval_fixed_crop': fixed,
    }
    save_workspace(path, policy, state | action.state('action'))
    return Hybrid(model, cores, normalizers, meta, crop)


class PublishedPruner(nn.Module):
    """Parameters named as in the pruner of the paper's code."""

    def __init__(
        self, memory_width: int, width: int = 32, heads: int = 4, classes: int = 4
    ) -> None:
        super().__init__()
        layer = nn.TransformerDecoderLayer(
            width, heads, 48, activation='relu', batch_first=True, norm_first=True
        )
        self.transformer_decoder = nn.TransformerDecoder(layer, 1)
        self.memory_proj = nn.Linear(memory_width, width)
        self.head = nn.Linear(width, classes)
        self.width, self.heads = width, heads
        for parameter in self.parameters():
            parameter.data += 0.3 * torch.randn(parameter.shape)
        if classes == 4:
            # No class is preferred: the memory decides, and all of them appear.
            with torch.no_grad():
                self.eval().head.bias -= self.logits(torch.randn(20, 3, memory_width), 6).mean(
                    (0, 1)
                )

    def logits(self, rows: Tensor, blocks: int) -> Tensor:
        """Logits [K, N, 4] of memory rows [K, 1 + To, D]: the step axis is turned round."""
        queries = sinusoid(torch.arange(blocks), self.width).expand(len(rows), -1, -1)
        return self.head(self.transformer_decoder(queries, self.memory_proj(rows))).flip(0)

    def save(self, path: Path) -> Path:
        """Write the pruner's checkpoint."""
        sizes = {'hidden_dim': self.width, 'attn_heads': self.heads, 'dim_feedforward': 48}
        more = {'structure': 'ca', 'block_encoder_type': 'SA', 'epoch': 20}
        torch.save({'model_state_dict': self.state_dict(), **sizes, **more}, path)
        return path
