# SPDX-License-Identifier: Apache-2.0
"""LeRobot's policy folders: the multi-task DiT policy as ours.

A folder holds `config.json`, `model.safetensors` and the two processors that normalise. The
instruction is the same at every tick, so its feature is encoded here and folded into the biases
of the modulations: no text encoder runs on the robot.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import functional as F

from tts_policy.convert.checkpoint import WeightSource as Source
from tts_policy.convert.checkpoint import load_state
from tts_policy.convert.clip import text_feature, vit_spec, vit_state
from tts_policy.convert.configuration import NoiseScheduler, flow_samplers, read_settings
from tts_policy.convert.converted_policy import ConvertedPolicy, Naming
from tts_policy.convert.lerobot_processors import read_json, read_normalizers
from tts_policy.convert.restricted_pickle import CheckpointError
from tts_policy.policy.contract import ActionSpec, CameraSpec, ObservationSpec, PolicyContract
from tts_policy.policy.denoisers.dit import DiTOptions
from tts_policy.policy.encoders.camera_encoder import ImageSize
from tts_policy.policy.encoders.vit import VisionTransformer, ViTSpec
from tts_policy.policy.network import NetworkSpec, PolicyNetwork
from tts_policy.policy.sampler import SamplerSpec
from tts_policy.policy.schedulers.scheduler import FLOW
from tts_policy.policy.validation import Flag, Integer, Number, Spec, Text, checked, one_of, quoted

KIND = 'multi_task_dit'
STATE, ACTION = 'observation.state', 'action'
MAX_WEIGHT_BYTES = 16 << 30
MAX_TENSOR_ELEMENTS = 1 << 29
# What their transformers compute with; others have another activation.
CLIP = 'openai/clip-'
_ENCODER = f'{CLIP}vit-base-patch16'
_REASONS = {'diffusion': 'convolutional U-Nets are not supported yet'}


@checked('feature', extra='ignore')
class _Feature(Spec):
    """An entry of input_features or output_features."""

    type: Text
    shape: tuple[Annotated[Integer, Field(ge=1, lt=1 << 20)], ...]


@checked('config', kw_only=True, extra='ignore')
class _Config(Spec):
    """What config.json says of a multi-task DiT policy, with LeRobot's defaults."""

    input_features: dict[str, _Feature]
    output_features: dict[str, _Feature]
    n_obs_steps: Integer = 2
    horizon: Integer = 32
    n_action_steps: Integer = 24
    objective: Annotated[Text, one_of('diffusion', 'flow_matching')] = 'diffusion'
    sigma_min: Number | None = 0.0
    num_integration_steps: Integer = 100
    integration_method: Text = 'euler'
    noise_scheduler_type: Text = 'DDPM'
    num_train_timesteps: Integer = 100
    num_inference_steps: Integer | None = None
    beta_schedule: Text = 'squaredcos_cap_v2'
    beta_start: Number = 0.0001
    beta_end: Number = 0.02
    prediction_type: Text = 'epsilon'
    clip_sample: Flag = True
    clip_sample_range: Number = 1.0
    hidden_dim: Integer = 512
    num_layers: Integer = 6
    num_heads: Integer = 8
    timestep_embed_dim: Integer = 256
    use_rope: Flag = True
    rope_base: Number = 10_000.0
    use_positional_encoding: Flag = False
    text_encoder_name: Text = _ENCODER
    vision_encoder_name: Text = _ENCODER
    use_separate_rgb_encoder_per_camera: Flag = False
    image_resize_shape: ImageSize | None = None
    image_crop_shape: ImageSize | None = (224, 224)

    def length(self, features: dict[str, _Feature], key: str) -> int:
        """Length of a vector; raises CheckpointError if it is missing or none."""
        if key not in features or len(features[key].shape) != 1:
            got = quoted(list(features[key].shape)) if key in features else 'nothing'
            raise CheckpointError(f'{key}: expected the length of a vector, got {got}')
        return features[key].shape[0]

    def samplers(self) -> dict[str, SamplerSpec]:
        """Samplers by name, the policy's own first."""
        if self.objective == 'flow_matching':
            if self.sigma_min:
                raise CheckpointError(f'config.sigma_min: expected 0, got {self.sigma_min}')
            return flow_samplers(self.num_integration_steps)
        same = 'beta_schedule beta_start beta_end prediction_type clip_sample clip_sample_range'
        settings = {name: getattr(self, name) for name in (*same.split(), 'num_train_timesteps')}
        settings['_target_'] = f'{self.noise_scheduler_type}Scheduler'
        scheduler = read_settings(NoiseScheduler, settings, 'config')
        return scheduler.samplers(self.num_inference_steps)

    def network_spec(self) -> NetworkSpec:
        """Sizes of our network, without those of its camera encoders."""
        flow = self.objective == 'flow_matching'
        return NetworkSpec(
            width=self.hidden_dim,
            layers=self.num_layers,
            heads=self.num_heads,
            train_steps=NetworkSpec.train_steps if flow else self.num_train_timesteps,
            denoiser=DiTOptions(
                time_features=self.timestep_embed_dim,
                rotary=self.use_rope,
                rotary_base=self.rope_base,
                learned_position=self.use_positional_encoding,
            ),
            objective=FLOW if flow else 'diffusion',
        )


def read_lerobot(folder: Path, naming: Naming, tokens: Sequence[int]) -> ConvertedPolicy:
    """Convert a policy folder; tokens: the instruction as CLIP's tokenizer gives it.

    Raises
    ------
    CheckpointError
        for another kind of policy, damaged files, or options that have no counterpart here.
    ValueError
        for sizes that no contract or network can have.

    """
    if not (folder / 'config.json').is_file():
        raise CheckpointError(
            f'{folder}: expected a checkpoint file or a LeRobot policy, got a folder'
        )
    data = read_json(folder / 'config.json')
    if not isinstance(data, dict):
        raise CheckpointError(f'config.json: expected a mapping, got {quoted(data)}')
    kind = data.get('type')
    if kind != KIND:
        reason = _REASONS.get(str(kind)[:80], 'others are not supported')
        raise CheckpointError(f'LeRobot policy: expected {KIND}, got {quoted(kind)}: {reason}')
    config = read_settings(_Config, data, 'config')
    cameras = _cameras(config.input_features)
    state_dim = config.length(config.input_features, STATE)
    action_dim = config.length(config.output_features, ACTION)
    if not tokens:
        raise CheckpointError(
            '--instruction-tokens: expected what the policy is told to do, got nothing'
        )
    observed, acted = naming.joints([('state', state_dim)], action_dim)
    contract = PolicyContract(
        ObservationSpec(tuple(cameras.values()), observed, config.n_obs_steps, naming.period_s),
        ActionSpec(acted, config.horizon, config.n_action_steps, offset_steps=0),
    )
    samplers = config.samplers()
    normalizers = read_normalizers(
        folder, {STATE: state_dim, ACTION: action_dim, **dict.fromkeys(cameras, 3)}
    )
    network = _read_network(folder / 'model.safetensors', config, contract, tokens)
    load_state(network.joint_normalizer, normalizers[STATE])
    load_state(network.action_normalizer, normalizers[ACTION])
    for feature, camera in cameras.items():
        load_state(_encoder(network, camera.key).normalizer, normalizers[feature])
    remarks = ['the instruction is part of the weights: convert once for each']
    if cameras:
        remarks.append(
            'every frame passes a vision transformer, which sparsity does not make cheaper'
        )
    if config.integration_method != 'euler':
        remarks.append('Euler steps, where LeRobot integrates by the Runge-Kutta method')
    return ConvertedPolicy(f'LeRobot {KIND}', network, samplers, tuple(remarks))


def _read_network(
    weights: Path, config: _Config, contract: PolicyContract, tokens: Sequence[int]
) -> PolicyNetwork:
    """Network with the weights of a file; normalisers as they are new."""
    if not weights.is_file() or weights.stat().st_size > MAX_WEIGHT_BYTES:
        raise CheckpointError(
            f'{weights}: expected weights of at most {MAX_WEIGHT_BYTES} bytes, got none or more'
        )
    try:
        with safe_open(weights, 'pt') as file:
            source = Source({name: name for name in file.keys()}, _Reader(file))  # noqa: SIM118
            return _build(config, contract, source, tokens)
    except SafetensorError as error:
        raise CheckpointError(f'{weights}: {" ".join(str(error).split())[:200]}') from error


class _Reader:
    """Tensors of an open safetensors file, none larger than is sensible."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def __call__(self, name: str) -> Tensor:
        count = math.prod(self._file.get_slice(name).get_shape())
        if count > MAX_TENSOR_ELEMENTS:
            raise CheckpointError(
                f'{name}: expected at most {MAX_TENSOR_ELEMENTS} values, got {count}'
            )
        tensor: Tensor = self._file.get_tensor(name)
        return tensor


def _cameras(features: dict[str, _Feature]) -> dict[str, CameraSpec]:
    """Cameras by feature, in the order of the configuration; a key is the feature's last word."""
    cameras: dict[str, CameraSpec] = {}
    for name, feature in features.items():
        if feature.type == 'STATE' or name == STATE:
            continue
        if feature.type != 'VISUAL':
            raise CheckpointError(
                f'{name}: expected type STATE or VISUAL, got {quoted(feature.type)}'
            )
        if len(feature.shape) != 3 or feature.shape[0] != 3:
            raise CheckpointError(
                f'{name}: expected 3 channels, height and width, got {list(feature.shape)}'
            )
        try:
            cameras[name] = CameraSpec(name.rpartition('.')[2], *feature.shape[1:])
        except ValueError as error:
            raise CheckpointError(f'{name}: {error}') from error
    return cameras


def _require_clip(option: str, name: str) -> None:
    if not name.startswith(CLIP):
        raise CheckpointError(
            f'{option}: expected a name beginning with {CLIP}, got {quoted(name)}'
        )


def _build(
    config: _Config, contract: PolicyContract, source: Source, tokens: Sequence[int]
) -> PolicyNetwork:
    """Network with all weights; normalisers as they are new."""
    spec, text = config.network_spec(), _text(config, source, tokens)
    # Read before any memory is taken for the sizes that the configuration names.
    encoders = _encoders(config, source, contract.observation.cameras)
    features = sum(vit.width for vit, _ in encoders.values())
    state = _denoiser(source, spec, contract, features, text)
    source.require_empty()
    if encoders:
        spec = replace(spec, encoder=next(iter(encoders.values()))[0])
    network = PolicyNetwork(contract, spec)
    load_state(network.denoiser, state)
    for key, (_, weights) in encoders.items():
        encoder = _encoder(network, key)
        own = {f'normalizer.{name}': v for name, v in encoder.normalizer.state_dict().items()}
        load_state(encoder, weights | own)
    return network


def _encoder(network: PolicyNetwork, key: str) -> VisionTransformer:
    encoder = network.observation_encoder.cameras[key]
    assert isinstance(encoder, VisionTransformer)
    return encoder


def _encoders(
    config: _Config, source: Source, cameras: Sequence[CameraSpec]
) -> dict[str, tuple[ViTSpec, dict[str, Tensor]]]:
    """Sizes and weights of the encoder of every camera, without its pixel normaliser."""
    if cameras:
        _require_clip('vision_encoder_name', config.vision_encoder_name)
    encoders = {}
    for n, camera in enumerate(cameras):
        number = f's.{n}' if config.use_separate_rgb_encoder_per_camera else ''
        prefix = f'observation_encoder.vision_encoder{number}.model.'
        # transformers 5 has done away with this part of the name.
        if f'{prefix}vision_model.embeddings.class_embedding' in source:
            prefix += 'vision_model.'
        resize, crop = config.image_resize_shape or (), config.image_crop_shape or ()
        rows, columns = resize or (camera.height, camera.width)
        # LeRobot leaves out a crop that does not fit.
        if crop and (crop[0] > rows or crop[1] > columns):
            crop = ()
        spec = vit_spec(source, prefix, camera, resize, crop)
        encoders[camera.key] = spec, vit_state(source, prefix, spec)
    if len({spec for spec, _ in encoders.values()}) > 1:
        raise CheckpointError('camera encoders: expected one size, got different ones')
    return encoders


def _text(config: _Config, source: Source, tokens: Sequence[int]) -> Tensor:
    """Feature of the instruction, as wide as the denoiser."""
    _require_clip('text_encoder_name', config.text_encoder_name)
    prefix = 'observation_encoder.text_encoder.'
    inner = f'{prefix}text_encoder.'
    # transformers 5 has done away with this part of the name.
    if f'{inner}text_model.final_layer_norm.weight' in source:
        inner += 'text_model.'
    feature = text_feature(source, inner, tokens)
    weight, bias = (source.take(f'{prefix}projection.{part}') for part in ('weight', 'bias'))
    if weight.ndim != 2 or weight.shape[1] != len(feature) or bias.shape != weight.shape[:1]:
        raise CheckpointError(
            f'text projection: expected a map of {len(feature)} values, got {tuple(weight.shape)}'
        )
    return F.linear(feature, weight, bias)


def _denoiser(
    source: Source,
    spec: NetworkSpec,
    contract: PolicyContract,
    camera_features: int,
    text: Tensor,
) -> dict[str, Tensor]:
    """State of our DiTDenoiser from LeRobot's DiffusionTransformer."""
    options = spec.denoiser
    assert isinstance(options, DiTOptions)
    prefix = 'noise_predictor.'
    state = {
        **source.pair(f'{prefix}input_proj', 'action'),
        **source.pair(f'{prefix}time_mlp.1', 'time.0'),
        **source.pair(f'{prefix}time_mlp.3', 'time.2'),
        **source.pair(f'{prefix}output_proj', 'head'),
    }
    if options.learned_position:
        state['position'] = source.take(f'{prefix}pos_embedding')[0]
    seen = len(contract.observation.joints) + camera_features
    step = torch.arange(seen + len(text)) < seen
    observed = step.repeat(contract.observation.steps)
    columns = torch.cat([torch.ones(options.time_features, dtype=torch.bool), observed])
    for n in range(spec.layers):
        layer, targets = (
            f'{prefix}transformer_blocks.{n}',
            (f'blocks.{2 * n}', f'blocks.{2 * n + 1}'),
        )
        if options.rotary:
            state |= source.pair(f'{layer}.attn.qkv_proj', f'{targets[0]}.qkv')
            state |= source.pair(f'{layer}.attn.out_proj', f'{targets[0]}.out')
        else:
            for part in ('weight', 'bias'):
                packed = source.take(f'{layer}.multihead_attn.in_proj_{part}')
                state[f'{targets[0]}.qkv.{part}'] = packed
            state |= source.pair(f'{layer}.multihead_attn.out_proj', f'{targets[0]}.out')
        state |= source.pair(f'{layer}.mlp.0', f'{targets[1]}.up')
        state |= source.pair(f'{layer}.mlp.2', f'{targets[1]}.down')
        modulation = f'{layer}.adaLN_modulation.1'
        weight = source.shaped(f'{modulation}.weight', 6 * spec.width, len(columns))
        bias = source.shaped(f'{modulation}.bias', 6 * spec.width)
        # The text is the same at every tick, and the map is linear behind the SiLU.
        told = F.silu(text).repeat(contract.observation.steps)
        bias = bias + weight[:, ~columns] @ told
        for target, rows in zip(
            targets, (slice(3 * spec.width), slice(3 * spec.width, None)), strict=True
        ):
            state[f'{target}.modulation.weight'] = weight[rows, columns].clone()
            state[f'{target}.modulation.bias'] = bias[rows].clone()
    return state
