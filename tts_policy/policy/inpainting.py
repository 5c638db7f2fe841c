# SPDX-License-Identifier: Apache-2.0
"""Actions that are committed already, held while the rest of a chunk is denoised around them.

What a robot will have done before a chunk reaches it cannot be changed any more; a chunk that is
denoised with those actions given continues them. At every noise level the known actions are set
into the noisy chunk, noised as that level asks (replacement as in RePaint, Lugmayr et al. 2022);
that chunks are continued so, and the soft mask over the rest of the overlap, is Real-Time Chunking
(Black et al., arXiv 2506.07339), which guides by a gradient instead.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class CommittedActions:
    """First actions of a chunk, from the newest observation on: [n, A] in robot units.

    weights [n] in [0, 1]: 1 holds an action, 0 leaves it free.
    """

    actions: NDArray[np.float64]
    weights: NDArray[np.float64]


def hold_weights(held: int, overlap: int, soft: bool) -> NDArray[np.float64]:
    """Weights [overlap] that hold the first `held` actions; soft: decaying over the others.

    The decay is that of Real-Time Chunking, equation 5: c (e^c - 1) / (e - 1) with c falling
    linearly from the last action held to the end of the overlap.
    """
    weights = np.zeros(overlap)
    weights[:held] = 1.0
    if soft and overlap > held:
        c = np.arange(overlap - held, 0, -1) / (overlap - held + 1)
        weights[held:] = c * np.expm1(c) / np.expm1(1.0)
    return weights


class Inpainting:
    """Known actions of one tick at every noise level of its sampler, and where they count.

    levels: [K + 1, T, A]; weights: [T, 1].
    """

    def __init__(
        self, noise_levels: Tensor, noise: Tensor, actions: Tensor, weights: Tensor
    ) -> None:
        """Noise the known actions.

        noise_levels: [K + 1, 2], see `NoiseScheduler.noise_levels`; noise: [1, T, A], of the
        chunk, so that a level is the chunk's own noisy version; actions: [T, A] normalised;
        weights: [T].
        """
        signal_factor, noise_factor = noise_levels.T[:, :, None, None]
        self.levels = signal_factor * actions + noise_factor * noise
        self.weights = weights[:, None]

    def impose(self, level: int, x: Tensor) -> None:
        """Set the known actions into x [..., T, A] as it is before step `level`, K: after all."""
        x.lerp_(self.levels[level], self.weights)
