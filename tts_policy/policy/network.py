# SPDX-License-Identifier: Apache-2.0
"""The trained network of a policy: normalisers, observation encoder and denoiser in one module."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from tts_policy.policy.contract import CameraSpec, PolicyContract
from tts_policy.policy.denoisers.denoiser import Denoiser
from tts_policy.policy.denoisers.dit import DiTDenoiser, DiTSpec
from tts_policy.policy.denoisers.transformer import TransformerDenoiser, TransformerSpec
from tts_policy.policy.encoders.observation_encoder import (
    CameraEncoder,
    CameraNetwork,
    ObservationEncoder,
)
from tts_policy.policy.encoders.resnet import ResNetEncoder, ResNetSpec
from tts_policy.policy.encoders.vision_transformer import VisionTransformer, ViTSpec
from tts_policy.policy.field_types import check_field_types
from tts_policy.policy.normalizer import LinearNormalizer
from tts_policy.policy.scheduler import FLOW, SchedulerSpec

OBJECTIVES = ('diffusion', FLOW)
# Heights and widths of camera encoders, lists in model.yaml.
_SIZES = {'resnet': ('crop',), 'vit': ('resize', 'crop')}


@dataclass(frozen=True)
class DiTOptions:
    """What a diffusion transformer has beside its sizes; see DiTSpec."""

    time_features: int = 256
    rotary: bool = True
    rotary_base: float = 10_000.0
    learned_position: bool = False


@dataclass(frozen=True)
class NetworkSpec:
    """Sizes of a policy network; `train_steps` is the length of the training noise schedule.

    causal, cond_layers: see TransformerSpec. Cameras are encoded by a ResNet where `resnet` is
    given, by a vision transformer where `vit` is, by a small network of `camera_channels` channels
    and `camera_blocks` residual blocks otherwise. The denoiser is a diffusion transformer where
    `dit` is given. objective: what it was trained for, 'diffusion' or 'flow'.
    """

    width: int = 256
    layers: int = 8
    heads: int = 4
    camera_channels: int = 32
    camera_blocks: int = 0
    train_steps: int = 100
    causal: bool = True
    cond_layers: int = 0
    resnet: ResNetSpec | None = None
    vit: ViTSpec | None = None
    dit: DiTOptions | None = None
    objective: str = 'diffusion'

    def __post_init__(self) -> None:
        """Refuse unknown objectives and impossible sizes; raises ValueError naming the field."""
        check_field_types('network', self)
        if self.objective not in OBJECTIVES:
            raise ValueError(
                f'network objective must be one of {list(OBJECTIVES)}, got {self.objective!r}'
            )
        if not 0 <= self.camera_blocks <= 5:
            raise ValueError(f'network camera_blocks must be in [0, 5], got {self.camera_blocks}')
        if self.camera_channels % 16 or not 16 <= self.camera_channels <= 4096:
            raise ValueError(
                f'network camera_channels must be a multiple of 16 in [16, 4096], '
                f'got {self.camera_channels}'
            )
        if not 1 <= self.train_steps <= 10_000:
            raise ValueError(f'network train_steps must be in [1, 10000], got {self.train_steps}')
        if self.resnet is not None and self.vit is not None:
            raise ValueError('network must have one kind of camera encoder, got resnet and vit')

    def camera_network(self, camera: CameraSpec) -> CameraNetwork:
        """Make the encoder of one camera."""
        if self.resnet is not None:
            return ResNetEncoder(camera.height, camera.width, self.resnet)
        if self.vit is not None:
            return VisionTransformer(camera.height, camera.width, self.vit)
        sizes = camera.height, camera.width
        return CameraEncoder(*sizes, self.camera_channels, self.camera_blocks)

    def check_scheduler(self, scheduler: SchedulerSpec) -> None:
        """Raise ValueError for a scheduler that cannot sample a network of this objective."""
        if scheduler.is_flow != (self.objective == FLOW):
            kinds = 'flow' if self.objective == FLOW else 'ddpm or ddim'
            raise ValueError(
                f'scheduler kind must be {kinds} for objective {self.objective!r}, '
                f'got {scheduler.kind!r}'
            )
        if not scheduler.is_flow and scheduler.train_steps != self.train_steps:
            raise ValueError(
                f'train_steps must be {self.train_steps}, got {scheduler.train_steps}'
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain containers, as they stand in model.yaml."""
        data = asdict(self)
        for name in ('resnet', 'vit', 'dit'):
            if data[name] is None:
                del data[name]
        for name, sizes in _SIZES.items():
            for size in sizes if name in data else ():
                data[name][size] = list(data[name][size])
        if self.camera_blocks == 0:
            del data['camera_blocks']
        if self.objective == 'diffusion':
            del data['objective']
        return data

    @staticmethod
    def from_dict(data: dict[str, Any]) -> NetworkSpec:
        """Inverse of `to_dict`; raises ValueError or TypeError for malformed data."""
        data = dict(data)
        encoders: dict[str, Callable[..., ResNetSpec | ViTSpec]]
        encoders = {'resnet': ResNetSpec, 'vit': ViTSpec}
        for name, make in encoders.items():
            if name in data:
                given = dict(data[name])
                sizes = {size: tuple(given.get(size, ())) for size in _SIZES[name]}
                data[name] = make(**{**given, **sizes})
        if 'dit' in data:
            data['dit'] = DiTOptions(**data['dit'])
        return NetworkSpec(**data)


class PolicyNetwork(nn.Module):
    """Everything that is trained with demonstrations; sampling it is the engine's business."""

    def __init__(self, contract: PolicyContract, spec: NetworkSpec) -> None:
        super().__init__()
        self.contract = contract
        self.spec = spec
        observation = contract.observation
        self.joint_normalizer = LinearNormalizer(len(observation.joints))
        self.action_normalizer = LinearNormalizer(len(contract.action.joints))
        self.observation_encoder = ObservationEncoder(observation, spec.camera_network)
        self.denoiser = self._make_denoiser()

    def _make_denoiser(self) -> Denoiser:
        contract, spec = self.contract, self.spec
        sizes: dict[str, Any] = {
            'action_dim': len(contract.action.joints),
            'horizon': contract.action.horizon,
            'obs_steps': contract.observation.steps,
            'obs_features': self.observation_encoder.out_features,
            'width': spec.width,
            'layers': spec.layers,
            'heads': spec.heads,
        }
        if spec.dit is not None:
            return DiTDenoiser(DiTSpec(**sizes, **asdict(spec.dit)))
        return TransformerDenoiser(
            TransformerSpec(**sizes, causal=spec.causal, cond_layers=spec.cond_layers)
        )

    def features(self, images: dict[str, Tensor], joints: Tensor) -> Tensor:
        """Observation features [B, To, Do].

        images: uint8 [B, To, H, W, 3] per camera; joints: robot units [B, To, J].
        """
        return self.observation_encoder(images, self.joint_normalizer.normalize(joints))
