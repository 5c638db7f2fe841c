# SPDX-License-Identifier: Apache-2.0
"""The reuse plan of a tick as a picture: a row per denoising step, a column per residual block."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from sensor_msgs.msg import Image

from tts_policy.control.conversions import ns_to_time

if TYPE_CHECKING:
    from tts_policy.policy.plan import Plan

# Compute stands out; the three kinds of reuse are cool colours. In the order of the classes.
COLOURS = np.array(
    [(230, 97, 0), (94, 201, 180), (64, 120, 192), (40, 46, 74)], dtype=np.uint8
)  # fmt: skip
CELL_PIXELS = 12


def plan_image(plan: Plan, stamp_ns: int) -> Image:
    """rgb8 image of a plan int8 [K, N], a square per cell: COMPUTE, FORWARD, TIMESTEP, ROLLOUT."""
    pixels = COLOURS[np.asarray(plan)].repeat(CELL_PIXELS, axis=0).repeat(CELL_PIXELS, axis=1)
    # A dark line between cells keeps neighbours of the same class countable.
    pixels[CELL_PIXELS - 1 :: CELL_PIXELS] //= 2
    pixels[:, CELL_PIXELS - 1 :: CELL_PIXELS] //= 2
    height, width, _ = pixels.shape
    message = Image(
        height=height, width=width, encoding='rgb8', step=3 * width, data=pixels.tobytes()
    )
    message.header.stamp = ns_to_time(stamp_ns)
    return message
