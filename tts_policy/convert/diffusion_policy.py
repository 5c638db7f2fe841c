# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of real-stanford/diffusion_policy's transformer policies as our networks.

A workspace checkpoint holds `cfg`, the resolved Hydra configuration, and `state_dicts` with the
policy as `model` and `ema_model`. Two policies are read: the hybrid one (cameras through
robomimic's encoder, beside low-dimensional observations) and the low-dimensional one, both with
observations as condition.

robomimic 0.2 names the weights of a camera below `obs_nets.KEY`: `backbone.nets` holds the
children of torchvision's resnet18 by number, `pool` the spatial softmax, and `nets` the whole
sequence once more, with the linear layer as its fourth member.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from tts_policy.convert.checkpoint import WRAPPERS, Checkpoint, load_state
from tts_policy.convert.checkpoint import WeightSource as Source
from tts_policy.convert.configuration import NoiseScheduler, Target, read_settings
from tts_policy.convert.converted_policy import ConvertedPolicy, Naming
from tts_policy.convert.restricted_pickle import CheckpointError, plain
from tts_policy.convert.transformer_weights import diffusion_transformer
from tts_policy.policy.contract import ActionSpec, CameraSpec, ObservationSpec, PolicyContract
from tts_policy.policy.denoisers.transformer import TransformerOptions, TransformerSpec
from tts_policy.policy.encoders.camera_encoder import ImageSize
from tts_policy.policy.encoders.cnn import CnnSpec
from tts_policy.policy.encoders.resnet import ResNetSpec
from tts_policy.policy.network import NetworkSpec, PolicyNetwork
from tts_policy.policy.validation import Flag, Integer, Spec, Text, checked, one_of, quoted

UNWRAPPED = f'removed {" and ".join(WRAPPERS)} from the names of weights'
HYBRID = 'DiffusionTransformerHybridImagePolicy'
LOWDIM = 'DiffusionTransformerLowdimPolicy'
Shape = tuple[Annotated[Integer, Field(ge=1, lt=1 << 20)], ...]


@checked('model', kw_only=True)
class _Transformer(Spec):
    """Options of TransformerForDiffusion."""

    n_layer: Integer
    n_head: Integer
    n_emb: Integer
    n_cond_layers: Integer = 0
    causal_attn: Flag = False
    time_as_cond: Flag = True
    obs_as_cond: Any = None
    p_drop_emb: Any = None
    p_drop_attn: Any = None


@checked('model', kw_only=True)
class _LowdimModel(_Transformer):
    """The same with sizes that the policy repeats."""

    target: Target
    input_dim: Any = None
    output_dim: Any = None
    horizon: Any = None
    n_obs_steps: Any = None
    cond_dim: Any = None


@checked('policy', kw_only=True)
class _Policy(Spec):
    """What both policies have."""

    target: Target
    noise_scheduler: NoiseScheduler
    horizon: Integer
    n_action_steps: Integer
    n_obs_steps: Integer
    num_inference_steps: Integer | None = None
    pred_action_steps_only: Flag = False


@checked('policy', kw_only=True)
class _Lowdim(_Policy):
    """Configuration of the low-dimensional policy."""

    model: _LowdimModel
    obs_dim: Integer
    action_dim: Integer
    obs_as_cond: Flag = False


@checked('observation', kw_only=True)
class _Observation(Spec):
    """An entry of shape_meta."""

    shape: Shape
    type: Annotated[Text, one_of('rgb', 'low_dim')] = 'low_dim'


@checked('shape_meta')
class _ShapeMeta(Spec):
    """Observations by name in the order of their features, and the action."""

    obs: dict[str, _Observation]
    action: _Observation


@checked('policy', kw_only=True)
class _Hybrid(_Policy, _Transformer):
    """Configuration of the hybrid policy."""

    shape_meta: _ShapeMeta
    crop_shape: ImageSize | None = (76, 76)
    obs_encoder_group_norm: Any = None
    eval_fixed_crop: Flag = False
    obs_as_cond: Flag = True


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
        raise CheckpointError(
            "checkpoint: expected cfg and state_dicts of Diffusion Policy's workspace, got others"
        )
    cfg = plain(data['cfg'])
    policy = cfg.get('policy') if isinstance(cfg, dict) else None
    target = policy.get('_target_') if isinstance(policy, dict) else None
    kind = target.rpartition('.')[2] if isinstance(target, str) else quoted(target)
    if kind not in (HYBRID, LOWDIM):
        hint = ': convolutional U-Nets are not supported yet' if 'Unet' in kind else ''
        raise CheckpointError(f'policy: expected {HYBRID} or {LOWDIM}, got {kind[:80]}{hint}')
    source = _policy_weights(checkpoint, weights)
    if kind == HYBRID:
        converted = _hybrid(read_settings(_Hybrid, policy, 'cfg.policy'), source, naming)
    else:
        converted = _lowdim(read_settings(_Lowdim, policy, 'cfg.policy'), source, naming)
    source.ignore(lambda name: name.startswith('mask_generator.') or '_dummy_variable' in name)
    source.require_empty()
    remarks = (UNWRAPPED,) if source.wrapped else ()
    return replace(converted, remarks=converted.remarks + remarks)


def _policy_weights(checkpoint: Checkpoint, weights: str) -> Source:
    key = {'ema': 'ema_model', 'model': 'model'}[weights]
    states = checkpoint.data['state_dicts']
    if not isinstance(states, dict) or not isinstance(states.get(key), dict):
        hint = ': use --weights model' if weights == 'ema' else ''
        raise CheckpointError(f'state_dicts.{key}: expected weights, got nothing{hint}')
    return checkpoint.weights(states[key], f'state_dicts.{key}')


def _contract(
    policy: _Policy,
    cameras: list[CameraSpec],
    observed: list[tuple[str, int]],
    action_dim: int,
    naming: Naming,
) -> PolicyContract:
    names, acted = naming.joints(observed, action_dim)
    newest = policy.pred_action_steps_only
    return PolicyContract(
        ObservationSpec(tuple(cameras), names, policy.n_obs_steps, naming.period_s),
        ActionSpec(
            acted,
            horizon=policy.n_action_steps if newest else policy.horizon,
            execute=policy.n_action_steps,
            offset_steps=0,
            starts_at_newest=newest,
        ),
    )


def _require_condition(obs_as_cond: bool, model: _Transformer) -> None:
    if not obs_as_cond:
        raise CheckpointError(
            'obs_as_cond: expected true, got false: without observations in the memory a pruner '
            'would see none of them'
        )
    if not model.time_as_cond:
        raise CheckpointError(
            'time_as_cond: expected true, got false: an encoder-only model has no memory to '
            'prune by'
        )


def _build(
    contract: PolicyContract,
    model: _Transformer,
    resnet: ResNetSpec | None,
    train_steps: int,
    source: Source,
    columns: Tensor,
    encoder: dict[str, Tensor],
) -> PolicyNetwork:
    """Network with all weights; `columns` orders upstream's features as ours are ordered."""
    spec = NetworkSpec(
        width=model.n_emb,
        layers=model.n_layer,
        heads=model.n_head,
        train_steps=train_steps,
        denoiser=TransformerOptions(
            causal=model.causal_attn,
            cond_layers=model.n_cond_layers,
        ),
        encoder=resnet or CnnSpec(),
    )
    # Built from the weights before any memory is taken for the sizes that the configuration names.
    denoiser = spec.denoiser_spec(contract, len(columns))
    assert isinstance(denoiser, TransformerSpec)
    state = diffusion_transformer(source, 'model.', denoiser)
    embedding = source.shaped('model.cond_obs_emb.weight', spec.width, len(columns))
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
            raise CheckpointError(f'normaliser {key}: expected {length} values, got {len(value)}')
        result[f'{target}.{part}'] = value.expand(length).clone()
    if not (result[f'{target}.scale'] != 0).all():
        raise CheckpointError(f'normaliser {key}: expected scales other than zero, got zero')
    statistics = f'normalizer.params_dict.{key}.input_stats.'
    source.ignore(lambda name: name.startswith(statistics))
    return result


def _lowdim(policy: _Lowdim, source: Source, naming: Naming) -> ConvertedPolicy:
    _require_condition(policy.obs_as_cond, policy.model)
    contract = _contract(policy, [], [('obs', policy.obs_dim)], policy.action_dim, naming)
    samplers = policy.noise_scheduler.samplers(policy.num_inference_steps)
    normalizers = {
        **_normalizer(source, 'obs', policy.obs_dim, 'joint_normalizer'),
        **_normalizer(source, 'action', policy.action_dim, 'action_normalizer'),
    }
    network = _build(
        contract,
        policy.model,
        None,
        policy.noise_scheduler.num_train_timesteps,
        source,
        torch.arange(policy.obs_dim),
        normalizers,
    )
    return ConvertedPolicy(LOWDIM, network, samplers, ())


def _hybrid(policy: _Hybrid, source: Source, naming: Naming) -> ConvertedPolicy:
    _require_condition(policy.obs_as_cond, policy)
    cameras, vectors = _observations(policy.shape_meta.obs)
    action_dim = math.prod(policy.shape_meta.action.shape)
    contract = _contract(policy, cameras, list(vectors.items()), action_dim, naming)
    crop = (policy.crop_shape or ()) if cameras else ()
    prefixes = {camera.key: f'obs_encoder.obs_nets.{camera.key}.' for camera in cameras}
    specs = {_resnet_spec(source, prefix, crop) for prefix in prefixes.values()}
    if len(specs) > 1:
        raise CheckpointError('cameras: expected encoders of one layout, got several')
    resnet = specs.pop() if specs else None
    state = _normalizer(source, 'action', action_dim, 'action_normalizer')
    parts = [_normalizer(source, key, length, '') for key, length in vectors.items()]
    for part in ('scale', 'offset'):
        state[f'joint_normalizer.{part}'] = torch.cat([p[f'.{part}'] for p in parts])
    for key, prefix in prefixes.items():
        assert resnet is not None
        target = f'observation_encoder.cameras.{key}'
        encoder = _resnet_state(source, prefix, resnet)
        state |= {f'{target}.{name}': value for name, value in encoder.items()}
        state |= _normalizer(source, key, 3, f'{target}.normalizer')
    samplers = policy.noise_scheduler.samplers(policy.num_inference_steps)
    network = _build(
        contract,
        policy,
        resnet,
        policy.noise_scheduler.num_train_timesteps,
        source,
        _column_order(list(policy.shape_meta.obs), cameras, vectors, resnet),
        state,
    )
    remark = 'cameras: centre crop, where the checkpoint drew a random one at every inference'
    return ConvertedPolicy(
        HYBRID, network, samplers, () if policy.eval_fixed_crop or not crop else (remark,)
    )


def _observations(meta: dict[str, _Observation]) -> tuple[list[CameraSpec], dict[str, int]]:
    """Cameras, and the lengths of vectors by name."""
    cameras: list[CameraSpec] = []
    vectors: dict[str, int] = {}
    for key, entry in meta.items():
        if '.' in key or '/' in key:
            raise CheckpointError(
                f'observation: expected a name without dots and slashes, got {quoted(key)}'
            )
        if entry.type == 'low_dim':
            vectors[key] = math.prod(entry.shape)
        elif len(entry.shape) != 3 or entry.shape[0] != 3:
            raise CheckpointError(
                f'camera {key}: expected shape [3, height, width], got {list(entry.shape)}'
            )
        else:
            cameras.append(CameraSpec(key, *entry.shape[1:]))
    if not vectors:
        raise CheckpointError(
            'observations: expected a low-dimensional one beside the cameras, got none'
        )
    return cameras, vectors


def _column_order(
    order: list[str],
    cameras: list[CameraSpec],
    vectors: dict[str, int],
    resnet: ResNetSpec | None,
) -> Tensor:
    """Upstream's feature columns, taken in our order: vectors first, then cameras."""
    keys = [camera.key for camera in cameras]
    lengths = vectors | dict.fromkeys(keys, 0 if resnet is None else resnet.features)
    columns = torch.arange(sum(lengths.values())).split([lengths[key] for key in order])
    ranges = dict(zip(order, columns, strict=True))
    return torch.cat([ranges[key] for key in (*vectors, *keys)])


def _resnet_spec(source: Source, prefix: str, crop: tuple[int, ...]) -> ResNetSpec:
    """Layout of the encoder under `prefix`, read off its weights."""
    if f'{prefix}backbone.nets.7.2.conv1.weight' in source:
        raise CheckpointError('camera encoder: expected a ResNet-18, got a deeper one')
    if f'{prefix}backbone.nets.7.1.conv2.weight' not in source:
        raise CheckpointError('camera encoder: expected a ResNet-18 of robomimic 0.2, got another')
    for name in (f'{prefix}pool.nets.weight', f'{prefix}nets.3.weight'):
        if name not in source:
            raise CheckpointError(
                f'camera encoder: expected spatial softmax and linear layer, got no {name}'
            )
    return ResNetSpec(
        norm='batch' if f'{prefix}backbone.nets.1.running_mean' in source else 'group',
        crop=crop,
        keypoints=len(source.take(f'{prefix}pool.nets.weight')),
        features=len(source.take(f'{prefix}nets.3.weight')),
    )


def _resnet_state(source: Source, prefix: str, spec: ResNetSpec) -> dict[str, Tensor]:
    """State of our ResNetEncoder, without its pixel normaliser."""

    def norm(name: str, target: str) -> dict[str, Tensor]:
        state = source.pair(name, target)
        if spec.norm == 'batch':
            for part in ('running_mean', 'running_var', 'num_batches_tracked'):
                state[f'{target}.{part}'] = source.take(f'{name}.{part}')
        return state

    backbone = f'{prefix}backbone.nets.'
    state = {
        'stem.0.weight': source.take(f'{backbone}0.weight'),
        **norm(f'{backbone}1', 'stem.1'),
        **source.pair(f'{prefix}pool.nets', 'keypoints'),
        'pool.temperature': source.take(f'{prefix}pool.temperature').reshape(()),
        **source.pair(f'{prefix}nets.3', 'out'),
    }
    for number in range(8):
        name, target = f'{backbone}{4 + number // 2}.{number % 2}.', f'blocks.{number}.'
        for part in ('1', '2'):
            state[f'{target}conv{part}.weight'] = source.take(f'{name}conv{part}.weight')
            state |= norm(f'{name}bn{part}', f'{target}norm{part}')
        if f'{name}downsample.0.weight' in source:
            state[f'{target}shortcut.0.weight'] = source.take(f'{name}downsample.0.weight')
            state |= norm(f'{name}downsample.1', f'{target}shortcut.1')
    # The sequence repeats backbone and pool; coordinates follow from the size of the maps.
    again = (f'{prefix}nets.0.', f'{prefix}nets.1.', f'{prefix}pool.pos_')
    source.ignore(lambda name: name.startswith(again))
    return state
