# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of real-stanford/diffusion_policy's transformer policies as our networks.

A workspace checkpoint holds `cfg`, the resolved Hydra configuration, and `state_dicts` with the
policy as `model` and `ema_model`. Two policies are read: the hybrid one (cameras through
robomimic's encoder, beside low-dimensional observations) and the low-dimensional one, both with
observations as condition.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tts_policy.convert.checkpoint import Checkpoint
from tts_policy.convert.configuration import Configuration
from tts_policy.convert.converted_policy import ConvertedPolicy, Naming
from tts_policy.convert.noise_schedule import read_samplers
from tts_policy.convert.restricted_pickle import CheckpointError, StoredTensor, plain
from tts_policy.convert.robomimic_encoder import resnet_spec, resnet_state
from tts_policy.convert.transformer_weights import diffusion_transformer
from tts_policy.convert.weights import WeightSource, load_state
from tts_policy.policy.contract import ActionSpec, CameraSpec, ObservationSpec, PolicyContract
from tts_policy.policy.denoisers.transformer import TransformerOptions, TransformerSpec
from tts_policy.policy.encoders.cnn import CnnSpec
from tts_policy.policy.encoders.resnet import ResNetSpec
from tts_policy.policy.network import NetworkSpec, PolicyNetwork

Source = WeightSource[StoredTensor]
HYBRID = 'DiffusionTransformerHybridImagePolicy'
LOWDIM = 'DiffusionTransformerLowdimPolicy'


@dataclass(frozen=True)
class _Vector:
    """A low-dimensional observation: its key and length."""

    key: str
    length: int


def read_diffusion_policy(checkpoint: Checkpoint, weights: str, naming: Naming) -> ConvertedPolicy:
    """Convert a workspace checkpoint; `weights` is 'ema' or 'model'.

    Raises
    ------
    CheckpointError
        for another kind of checkpoint or policy, or an option that has no counterpart here.
    ValueError
        for sizes that no contract or network can have.

    """
    data = checkpoint.data
    if not isinstance(data, dict) or not {'cfg', 'state_dicts'} <= set(data):
        raise CheckpointError("Diffusion Policy's checkpoint needs cfg and state_dicts")
    cfg = Configuration('cfg', plain(data['cfg']))
    policy = cfg.section('policy')
    kind = policy.text('_target_').rpartition('.')[2]
    if kind not in (HYBRID, LOWDIM):
        hint = ': U-Nets have no residual blocks to reuse, train a transformer policy'
        raise CheckpointError(
            f'policy must be {HYBRID} or {LOWDIM}, got {kind}{hint if "Unet" in kind else ""}'
        )
    source = _policy_weights(checkpoint, weights)
    converted = (
        _hybrid(policy, source, naming) if kind == HYBRID else _lowdim(policy, source, naming)
    )
    source.ignore(lambda name: name.startswith('mask_generator.') or '_dummy_variable' in name)
    source.require_empty()
    return converted


def _policy_weights(checkpoint: Checkpoint, weights: str) -> Source:
    key = {'ema': 'ema_model', 'model': 'model'}[weights]
    states = checkpoint.data['state_dicts']
    if not isinstance(states, dict) or not isinstance(states.get(key), dict):
        hint = ': use --weights model' if weights == 'ema' else ''
        raise CheckpointError(f'state_dicts.{key} expected, got nothing{hint}')
    tensors = {str(name): value for name, value in states[key].items()}
    for name, value in tensors.items():
        if not isinstance(value, StoredTensor):
            raise CheckpointError(f'weight {name} must be a tensor, got {type(value).__name__}')
    return WeightSource(tensors, checkpoint.tensor)


def _contract(
    policy: Configuration,
    cameras: list[CameraSpec],
    observed: list[_Vector],
    action_dim: int,
    naming: Naming,
) -> PolicyContract:
    names, acted = naming.joints([(v.key, v.length) for v in observed], action_dim)
    steps, execute = policy.integer('n_obs_steps'), policy.integer('n_action_steps')
    newest = policy.flag('pred_action_steps_only', False)
    return PolicyContract(
        ObservationSpec(tuple(cameras), names, steps, naming.period_s),
        ActionSpec(
            acted,
            horizon=execute if newest else policy.integer('horizon'),
            execute=execute,
            offset_steps=0,
            starts_at_newest=newest,
        ),
    )


def _require_condition(policy: Configuration, model: Configuration, default: bool) -> None:
    if not policy.flag('obs_as_cond', default):
        raise CheckpointError(
            'obs_as_cond must be true, got false: without observations in the memory a pruner '
            'would see none of them'
        )
    if not model.flag('time_as_cond', True):
        raise CheckpointError(
            'time_as_cond must be true, got false: an encoder-only model has no memory to prune by'
        )


def _build(
    contract: PolicyContract,
    model: Configuration,
    resnet: ResNetSpec | None,
    train_steps: int,
    source: Source,
    columns: Tensor,
    encoder: dict[str, Tensor],
) -> PolicyNetwork:
    """Network with all weights; `columns` orders upstream's features as ours are ordered."""
    spec = NetworkSpec(
        width=model.integer('n_emb'),
        layers=model.integer('n_layer'),
        heads=model.integer('n_head'),
        train_steps=train_steps,
        denoiser=TransformerOptions(
            causal=model.flag('causal_attn', False),
            cond_layers=model.integer('n_cond_layers', 0),
        ),
        encoder=resnet or CnnSpec(),
    )
    # Built from the weights before any memory is taken for the sizes that the configuration names.
    denoiser = spec.denoiser_spec(contract, len(columns))
    assert isinstance(denoiser, TransformerSpec)
    state = diffusion_transformer(source, 'model.', denoiser)
    embedding = state['encoder.observation.weight']
    if embedding.shape != (spec.width, len(columns)):
        raise CheckpointError(
            f'cond_obs_emb must be {(spec.width, len(columns))}, got {tuple(embedding.shape)}'
        )
    state['encoder.observation.weight'] = embedding[:, columns].clone()
    network = PolicyNetwork(contract, spec)
    load_state(network, {**{f'denoiser.{k}': v for k, v in state.items()}, **encoder})
    return network


def _normalizer(source: Source, key: str, length: int, target: str) -> dict[str, Tensor]:
    """Scale and offset of one field of the normaliser; one value stands for all dimensions."""
    result = {}
    for part in ('scale', 'offset'):
        value = source.take(f'normalizer.params_dict.{key}.{part}').flatten()
        if len(value) not in (1, length):
            raise CheckpointError(f'normaliser {key} must have {length} values, got {len(value)}')
        result[f'{target}.{part}'] = value.expand(length).clone()
    if not (result[f'{target}.scale'] != 0).all():
        raise CheckpointError(f'normaliser {key} must have scales other than zero')
    statistics = f'normalizer.params_dict.{key}.input_stats.'
    source.ignore(lambda name: name.startswith(statistics))
    return result


def _lowdim(policy: Configuration, source: Source, naming: Naming) -> ConvertedPolicy:
    model = policy.section('model')
    policy.allow(
        '_target_ model noise_scheduler horizon obs_dim action_dim n_action_steps n_obs_steps '
        'num_inference_steps obs_as_cond pred_action_steps_only'
    )
    model.allow(
        '_target_ input_dim output_dim horizon n_obs_steps cond_dim n_layer n_head n_emb '
        'p_drop_emb p_drop_attn causal_attn time_as_cond obs_as_cond n_cond_layers'
    )
    _require_condition(policy, model, default=False)
    obs_dim, action_dim = policy.integer('obs_dim'), policy.integer('action_dim')
    contract = _contract(policy, [], [_Vector('obs', obs_dim)], action_dim, naming)
    samplers, train_steps = read_samplers(policy)
    normalizers = {
        **_normalizer(source, 'obs', obs_dim, 'joint_normalizer'),
        **_normalizer(source, 'action', action_dim, 'action_normalizer'),
    }
    columns = torch.arange(obs_dim)
    network = _build(contract, model, None, train_steps, source, columns, normalizers)
    return ConvertedPolicy(LOWDIM, network, samplers, ())


def _hybrid(policy: Configuration, source: Source, naming: Naming) -> ConvertedPolicy:
    policy.allow(
        '_target_ shape_meta noise_scheduler horizon n_action_steps n_obs_steps '
        'num_inference_steps crop_shape obs_encoder_group_norm eval_fixed_crop n_layer '
        'n_cond_layers n_head n_emb p_drop_emb p_drop_attn causal_attn time_as_cond obs_as_cond '
        'pred_action_steps_only'
    )
    _require_condition(policy, policy, default=True)
    meta = policy.section('shape_meta')
    action_dim = math.prod(meta.section('action').integers('shape'))
    cameras, vectors, order = _observations(meta.section('obs'))
    contract = _contract(policy, cameras, vectors, action_dim, naming)
    crop = policy.integers('crop_shape', default=[76, 76]) if cameras else []
    specs = {
        resnet_spec(
            source, f'obs_encoder.obs_nets.{camera.key}.', (crop[0], crop[1]) if crop else None
        )
        for camera in cameras
    }
    if len(specs) > 1:
        raise CheckpointError('cameras must have encoders of one layout, got several')
    resnet = specs.pop() if specs else None
    encoder = _normalizer(source, 'action', action_dim, 'action_normalizer')
    parts = [_normalizer(source, v.key, v.length, v.key) for v in vectors]
    for part in ('scale', 'offset'):
        fields = [p[f'{v.key}.{part}'] for p, v in zip(parts, vectors, strict=True)]
        encoder[f'joint_normalizer.{part}'] = torch.cat(fields)
    for camera in cameras:
        target = f'observation_encoder.cameras.{camera.key}'
        assert resnet is not None
        state = resnet_state(source, f'obs_encoder.obs_nets.{camera.key}.', resnet)
        encoder |= {f'{target}.{name}': value for name, value in state.items()}
        encoder |= _normalizer(source, camera.key, 3, f'{target}.normalizer')
    columns = _column_order(order, cameras, vectors, resnet)
    samplers, train_steps = read_samplers(policy)
    network = _build(contract, policy, resnet, train_steps, source, columns, encoder)
    fixed = policy.flag('eval_fixed_crop', False) or not crop
    remark = 'cameras: centre crop, where the checkpoint drew a random one at every inference'
    return ConvertedPolicy(HYBRID, network, samplers, () if fixed else (remark,))


def _observations(meta: Configuration) -> tuple[list[CameraSpec], list[_Vector], list[str]]:
    """Cameras, vectors and the order of all keys."""
    cameras, vectors = [], []
    for key in meta.keys:
        entry = meta.section(key)
        kind, shape = entry.text('type', 'low_dim'), entry.integers('shape')
        if kind == 'rgb':
            if len(shape) != 3 or shape[0] != 3:
                raise CheckpointError(f'camera {key} must have shape [3, H, W], got {shape}')
            cameras.append(CameraSpec(key, shape[1], shape[2]))
        elif kind == 'low_dim':
            vectors.append(_Vector(key, math.prod(shape)))
        else:
            raise CheckpointError(f"observation {key} must be 'rgb' or 'low_dim', got {kind!r}")
        if '.' in key or '/' in key:
            raise CheckpointError(f'observation {key!r} must not have dots or slashes in its name')
    if not vectors:
        raise CheckpointError('a low-dimensional observation is needed beside the cameras')
    return cameras, vectors, meta.keys


def _column_order(
    order: list[str],
    cameras: list[CameraSpec],
    vectors: list[_Vector],
    resnet: ResNetSpec | None,
) -> Tensor:
    """Upstream's feature columns, taken in our order: vectors first, then cameras."""
    lengths = {v.key: v.length for v in vectors}
    if resnet is not None:
        lengths |= {camera.key: resnet.features for camera in cameras}
    start, ranges = 0, {}
    for key in order:
        ranges[key] = torch.arange(start, start + lengths[key])
        start += lengths[key]
    return torch.cat(
        [ranges[key] for key in (*(v.key for v in vectors), *(c.key for c in cameras))]
    )
