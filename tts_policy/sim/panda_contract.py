# SPDX-License-Identifier: Apache-2.0
"""The simulated Panda as policies of every task see it: contract, topics and samplers."""

from __future__ import annotations

from tts_policy.data.samples import Topics
from tts_policy.policy.contract import ActionSpec, CameraSpec, ObservationSpec, PolicyContract
from tts_policy.policy.sampler import SamplerSpec
from tts_policy.policy.schedulers.scheduler import SchedulerSpec

JOINTS = (*(f'panda_joint{i}' for i in range(1, 8)), 'panda_finger_joint1')

PANDA_CONTRACT = PolicyContract(
    ObservationSpec(
        cameras=(CameraSpec('camera', 96, 96),), joints=JOINTS, steps=2, period_s=0.05
    ),
    ActionSpec(joints=JOINTS, horizon=16, execute=8, offset_steps=1),
)
PANDA_TOPICS = Topics(cameras={'camera': '/camera/image'})
PANDA_SAMPLERS = {
    'ddim10': SamplerSpec(
        SchedulerSpec('ddim', 10), force_first_step=False, recommended_sparsity=0.8
    ),
    'ddpm100': SamplerSpec(
        SchedulerSpec('ddpm', 100), force_first_step=True, recommended_sparsity=0.95
    ),
}
FLOW_SAMPLERS = {
    'flow10': SamplerSpec(
        SchedulerSpec('flow', 10, prediction='velocity'),
        force_first_step=False,
        recommended_sparsity=0.8,
    ),
}
