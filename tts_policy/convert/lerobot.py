# SPDX-License-Identifier: Apache-2.0
"""LeRobot's policy folders: the multi-task DiT policy as ours.

A folder holds `config.json`, `model.safetensors` and the two processors that normalise. The
denoiser is `core/dit.py`, cameras are encoded by `core/vision_transformer.py`. The instruction's
feature is a constant of the robot: it is encoded here and folded into the biases of the
modulations, so that no text encoder runs on the robot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import functional as F

from tts_policy.convert.clip_text import text_feature
from tts_policy.convert.configuration import Configuration
from tts_policy.convert.converted_policy import ConvertedPolicy, Naming
from tts_policy.convert.lerobot_cameras import CLIP, read_cameras, read_encoders
from tts_policy.convert.lerobot_processors import read_json, read_normalizers
from tts_policy.convert.noise_schedule import flow_samplers, read_samplers
from tts_policy.convert.restricted_pickle import CheckpointError
from tts_policy.convert.weights import WeightSource, load_state
from tts_policy.policy.contract import ActionSpec, CameraSpec, ObservationSpec, PolicyContract
from tts_policy.policy.denoisers.dit import DiTOptions
from tts_policy.policy.encoders.vit import VisionTransformer
from tts_policy.policy.network import NetworkSpec, PolicyNetwork
from tts_policy.policy.sampler import SamplerSpec
from tts_policy.policy.schedulers.scheduler import FLOW

KIND = 'multi_task_dit'
STATE, ACTION = 'observation.state', 'action'
MAX_WEIGHT_BYTES = 16 << 30
MAX_TENSOR_ELEMENTS = 1 << 29
_REASONS = {
    'diffusion': 'its U-Net has no residual blocks to reuse, train a multi_task_dit policy',
}
Source = WeightSource[str]


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
            f'{folder}: checkpoint file or LeRobot policy expected, got a folder'
        )
    config = Configuration('config', read_json(folder / 'config.json'))
    kind = config.text('type', 'none')[:80]
    if kind != KIND:
        reason = _REASONS.get(kind, f'only {KIND} is')
        raise CheckpointError(f'LeRobot policy of type {kind!r} is not converted: {reason}')
    cameras = read_cameras(config)
    state_dim, action_dim = _features(config)
    if not tokens:
        raise CheckpointError('--instruction-tokens expected: the policy is told what to do')
    weights = folder / 'model.safetensors'
    if not weights.is_file() or weights.stat().st_size > MAX_WEIGHT_BYTES:
        raise CheckpointError(f'{weights}: weights of at most {MAX_WEIGHT_BYTES} bytes expected')
    specs = tuple(camera for _, camera in cameras)
    contract = _contract(config, naming, specs, state_dim, action_dim)
    samplers, train_steps = _samplers(config)
    lengths = {STATE: state_dim, ACTION: action_dim, **{feature: 3 for feature, _ in cameras}}
    normalizers = read_normalizers(folder, lengths)
    try:
        with safe_open(weights, 'pt') as file:
            source = WeightSource({name: name for name in file.keys()}, _Reader(file))  # noqa: SIM118
            network = _build(config, contract, train_steps, source, tokens)
    except SafetensorError as error:
        raise CheckpointError(f'{weights}: {" ".join(str(error).split())[:200]}') from error
    for feature, normalizer in (
        (STATE, network.joint_normalizer),
        (ACTION, network.action_normalizer),
        *((feature, _encoder(network, camera.key).normalizer) for feature, camera in cameras),
    ):
        load_state(normalizer, normalizers[feature])
    remarks = ['the instruction is part of the weights: convert once for each']
    if cameras:
        remarks.append(
            'every frame passes a vision transformer, which sparsity does not make cheaper'
        )
    if config.text('integration_method', 'euler') != 'euler':
        remarks.append('Euler steps, where LeRobot integrates by the Runge-Kutta method')
    return ConvertedPolicy(f'LeRobot {KIND}', network, samplers, tuple(remarks))


class _Reader:
    """Tensors of an open safetensors file, none larger than is sensible."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def __call__(self, name: str) -> Tensor:
        count = 1
        for size in self._file.get_slice(name).get_shape():
            count *= size
        if count > MAX_TENSOR_ELEMENTS:
            raise CheckpointError(
                f'weight {name}: at most {MAX_TENSOR_ELEMENTS} values, got {count}'
            )
        tensor: Tensor = self._file.get_tensor(name)
        return tensor


def _features(config: Configuration) -> tuple[int, int]:
    """Lengths of state and action."""
    inputs, outputs = config.section('input_features'), config.section('output_features')
    lengths = []
    for section, key in ((inputs, STATE), (outputs, ACTION)):
        shape = section.section(key).integers('shape')
        if len(shape) != 1:
            raise CheckpointError(f'{key} must be a vector, got shape {shape}')
        lengths.append(shape[0])
    return lengths[0], lengths[1]


def _contract(
    config: Configuration,
    naming: Naming,
    cameras: tuple[CameraSpec, ...],
    state_dim: int,
    action_dim: int,
) -> PolicyContract:
    observed, acted = naming.joints([('state', state_dim)], action_dim)
    return PolicyContract(
        ObservationSpec(cameras, observed, config.integer('n_obs_steps', 2), naming.period_s),
        ActionSpec(
            acted,
            horizon=config.integer('horizon', 32),
            execute=config.integer('n_action_steps', 24),
            offset_steps=0,
        ),
    )


def _samplers(config: Configuration) -> tuple[dict[str, SamplerSpec], int]:
    """Samplers by name, the policy's own first, and the length of the training schedule."""
    objective = config.text('objective', 'diffusion')
    if objective == 'flow_matching':
        if config.number('sigma_min', 0.0):
            raise CheckpointError(f'sigma_min must be 0, got {config.number("sigma_min")}')
        steps = config.integer('num_integration_steps', 100)
        return flow_samplers(steps), NetworkSpec.train_steps
    if objective != 'diffusion':
        raise CheckpointError(
            f"objective must be 'diffusion' or 'flow_matching', got {objective[:80]!r}"
        )
    train_steps = config.integer('num_train_timesteps', 100)
    scheduler = {
        '_target_': f'{config.text("noise_scheduler_type", "DDPM")}Scheduler',
        'num_train_timesteps': train_steps,
        'beta_schedule': config.text('beta_schedule', 'squaredcos_cap_v2'),
        'beta_start': config.number('beta_start', 0.0001),
        'beta_end': config.number('beta_end', 0.02),
        'prediction_type': config.text('prediction_type', 'epsilon'),
        'clip_sample': config.flag('clip_sample', True),
        'clip_sample_range': config.number('clip_sample_range', 1.0),
    }
    steps = config.integer('num_inference_steps', train_steps)
    settings = {'noise_scheduler': scheduler, 'num_inference_steps': steps}
    return read_samplers(Configuration('config', settings))


def _build(
    config: Configuration,
    contract: PolicyContract,
    train_steps: int,
    source: Source,
    tokens: Sequence[int],
) -> PolicyNetwork:
    """Network with all weights; normalisers as they are new."""
    text = _text(config, source, tokens)
    options = DiTOptions(
        time_features=config.integer('timestep_embed_dim', 256),
        rotary=config.flag('use_rope', True),
        rotary_base=config.number('rope_base', 10_000.0),
        learned_position=config.flag('use_positional_encoding', False),
    )
    spec = NetworkSpec(
        width=config.integer('hidden_dim', 512),
        layers=config.integer('num_layers', 6),
        heads=config.integer('num_heads', 8),
        train_steps=train_steps,
        denoiser=options,
        objective=FLOW if config.text('objective', 'diffusion') != 'diffusion' else 'diffusion',
    )
    # Read before any memory is taken for the sizes that the configuration names.
    encoders = read_encoders(config, source, contract.observation.cameras)
    features = sum(vit.width for vit, _ in encoders.values())
    state = _denoiser(source, spec, options, contract, features, text)
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


def _text(config: Configuration, source: Source, tokens: Sequence[int]) -> Tensor:
    """Feature of the instruction, as wide as the denoiser."""
    name = config.text('text_encoder_name', 'openai/clip-vit-base-patch16')
    if not name.startswith(CLIP):
        raise CheckpointError(f'text_encoder_name must begin with {CLIP}, got {name[:80]!r}')
    prefix = 'observation_encoder.text_encoder.'
    inner = f'{prefix}text_encoder.'
    # transformers 5 has done away with this part of the name.
    if f'{inner}text_model.final_layer_norm.weight' in source:
        inner += 'text_model.'
    feature = text_feature(source, inner, tokens)
    weight, bias = (source.take(f'{prefix}projection.{part}') for part in ('weight', 'bias'))
    if weight.ndim != 2 or weight.shape[1] != len(feature) or bias.shape != weight.shape[:1]:
        raise CheckpointError(
            f'text projection must map {len(feature)} values, got {tuple(weight.shape)}'
        )
    return F.linear(feature, weight, bias)


def _denoiser(
    source: Source,
    spec: NetworkSpec,
    options: DiTOptions,
    contract: PolicyContract,
    camera_features: int,
    text: Tensor,
) -> dict[str, Tensor]:
    """State of our DiTDenoiser from LeRobot's DiffusionTransformer."""
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
        weight = source.take(f'{layer}.adaLN_modulation.1.weight')
        bias = source.take(f'{layer}.adaLN_modulation.1.bias')
        if weight.shape != (6 * spec.width, len(columns)) or bias.shape != (6 * spec.width,):
            raise CheckpointError(
                f'{layer}.adaLN_modulation must map {len(columns)} to {6 * spec.width} values, '
                f'got {tuple(weight.shape)}'
            )
        # The text is the same at every tick, and the map is linear behind the SiLU.
        told = F.silu(text).repeat(contract.observation.steps)
        bias = bias + weight[:, ~columns] @ told
        for target, rows in zip(
            targets, (slice(3 * spec.width), slice(3 * spec.width, None)), strict=True
        ):
            state[f'{target}.modulation.weight'] = weight[rows, columns].clone()
            state[f'{target}.modulation.bias'] = bias[rows].clone()
    return state
