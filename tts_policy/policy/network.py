# SPDX-License-Identifier: Apache-2.0
"""The trained network of a policy: normalisers, observation encoder and denoiser in one module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import Field, InstanceOf
from torch import Tensor, nn
from typing_extensions import Self

from tts_policy.policy.contract import PolicyContract
from tts_policy.policy.denoisers.denoiser import DENOISERS, DenoiserOptions, DenoiserSpec
from tts_policy.policy.denoisers.transformer import TransformerOptions
from tts_policy.policy.encoders.camera_encoder import ENCODERS, CameraEncoderSpec
from tts_policy.policy.encoders.cnn import CnnSpec
from tts_policy.policy.encoders.observation_encoder import ObservationEncoder
from tts_policy.policy.normalizer import LinearNormalizer
from tts_policy.policy.schedulers.scheduler import FLOW, SCHEDULERS, SchedulerSpec
from tts_policy.policy.validation import Integer, Mismatch, Size, Spec, Text, checked, one_of

OBJECTIVES = ('diffusion', FLOW)
# In model.yaml the settings of most encoders and architectures stand below their name. These stand
# among the sizes of the network: they are as old as the format.
_FLAT = {
    'cnn': {'camera_channels': 'channels', 'camera_blocks': 'blocks'},
    'transformer': {'causal': 'causal', 'cond_layers': 'cond_layers'},
}
_Kind = TypeVar('_Kind', bound=Spec)
if _TAKEN_TWICE := sorted(ENCODERS.keys() & DENOISERS.keys()):
    raise ValueError(
        f'NAME: expected encoders and denoisers of different names, got {_TAKEN_TWICE}'
    )


@checked('network')
class NetworkSpec(Spec):
    """Sizes of a policy network, and the kinds of its camera encoder and denoiser.

    train_steps: length of the training noise schedule; objective: what the denoiser was trained
    for.
    """

    width: Size = 256
    layers: Size = 8
    heads: Size = 4
    train_steps: Annotated[Integer, Field(ge=1, le=10_000)] = 100
    encoder: InstanceOf[CameraEncoderSpec] = CnnSpec()
    denoiser: InstanceOf[DenoiserOptions] = TransformerOptions()
    objective: Annotated[Text, one_of(*OBJECTIVES)] = 'diffusion'

    def denoiser_spec(self, contract: PolicyContract, obs_features: int) -> DenoiserSpec:
        """Sizes of the denoiser; raises ValueError for those that the architecture cannot have."""
        return self.denoiser.sized(
            action_dim=len(contract.action.joints),
            horizon=contract.action.horizon,
            obs_steps=contract.observation.steps,
            obs_features=obs_features,
            width=self.width,
            layers=self.layers,
            heads=self.heads,
        )

    def check_scheduler(self, scheduler: SchedulerSpec) -> None:
        """Raise Mismatch for a scheduler that cannot sample a network of this objective."""
        kinds = [kind for kind, made in SCHEDULERS.items() if made.objective == self.objective]
        if scheduler.kind not in kinds:
            fitting = f'{" or ".join(kinds)} for objective {self.objective!r}'
            raise Mismatch('scheduler.kind', fitting, repr(scheduler.kind))
        if not scheduler.is_flow and scheduler.train_steps != self.train_steps:
            raise Mismatch(
                'scheduler.train_steps', str(self.train_steps), str(scheduler.train_steps)
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain containers, as they stand in model.yaml."""
        cnn = self.encoder if isinstance(self.encoder, CnnSpec) else CnnSpec()
        plain = isinstance(self.denoiser, TransformerOptions)
        transformer = self.denoiser if plain else TransformerOptions()
        data = {
            'width': self.width,
            'layers': self.layers,
            'heads': self.heads,
            'camera_channels': cnn.channels,
            **({'camera_blocks': cnn.blocks} if cnn.blocks else {}),
            'train_steps': self.train_steps,
            **transformer.to_dict(),
        }
        for kind in (self.encoder, self.denoiser):
            if kind.NAME not in _FLAT:
                data[kind.NAME] = kind.to_dict()
        return data if self.objective == OBJECTIVES[0] else {**data, 'objective': self.objective}

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        """Inverse of `to_dict`; raises Mismatch naming the first field that is wrong."""
        if not isinstance(data, dict):
            return super().from_dict(data)
        rest = dict(data)
        return super().from_dict(
            {
                'encoder': _chosen(rest, ENCODERS, 'cnn'),
                'denoiser': _chosen(rest, DENOISERS, 'transformer'),
                **rest,
            }
        )


def _chosen(data: dict[str, Any], kinds: Mapping[str, type[_Kind]], default: str) -> _Kind:
    """Settings of the kind that is named in the data, from which they are taken."""
    names = {name: data.pop(key) for key, name in _FLAT[default].items() if key in data}
    named = [name for name in kinds if name in data]
    if len(named) > 1:
        raise Mismatch('network', f'one of {", ".join(kinds)}', ' and '.join(named))
    try:
        chosen = kinds[default].from_dict(names)
        return kinds[named[0]].from_dict(data.pop(named[0])) if named else chosen
    except Mismatch as error:
        keys = {f'{default}.{name}': key for key, name in _FLAT[default].items()}
        thing = f'network.{keys.get(error.thing, error.thing)}'
        raise Mismatch(thing, error.expected, error.got) from None


class PolicyNetwork(nn.Module):
    """Everything that is trained with demonstrations; sampling it is the engine's business."""

    def __init__(self, contract: PolicyContract, spec: NetworkSpec) -> None:
        super().__init__()
        self.contract = contract
        self.spec = spec
        observation = contract.observation
        self.joint_normalizer = LinearNormalizer(len(observation.joints))
        self.action_normalizer = LinearNormalizer(len(contract.action.joints))
        self.observation_encoder = ObservationEncoder(observation, spec.encoder)
        features = self.observation_encoder.out_features
        self.denoiser = spec.denoiser_spec(contract, features).make()

    def features(self, images: dict[str, Tensor], joints: Tensor) -> Tensor:
        """Observation features [B, To, Do].

        images: uint8 [B, To, H, W, 3] per camera; joints: robot units [B, To, J].
        """
        return self.observation_encoder(images, self.joint_normalizer.normalize(joints))
