# SPDX-License-Identifier: Apache-2.0
"""A contract, network and samplers that are small enough for tests."""

from __future__ import annotations

from tts_policy.policy.contract import ActionSpec, CameraSpec, ObservationSpec, PolicyContract
from tts_policy.policy.encoders.cnn import CnnSpec
from tts_policy.policy.network import NetworkSpec
from tts_policy.policy.sampler import SamplerSpec
from tts_policy.policy.schedulers.scheduler import SchedulerSpec

CONTRACT = PolicyContract(
    ObservationSpec((CameraSpec('camera', 32, 48),), ('a', 'b', 'c'), steps=2, period_s=0.05),
    ActionSpec(('a', 'b', 'c'), horizon=8, execute=4, offset_steps=1),
)
NETWORK = NetworkSpec(width=32, layers=2, heads=2, encoder=CnnSpec(16), train_steps=20)
SAMPLERS = {
    'ddim5': SamplerSpec(SchedulerSpec('ddim', 5, 20), False, recommended_sparsity=0.6),
    'ddpm20': SamplerSpec(SchedulerSpec('ddpm', 20, 20), True, recommended_sparsity=0.9),
}
