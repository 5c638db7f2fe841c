# SPDX-License-Identifier: Apache-2.0
"""Inpainting: known actions of a chunk are held fixed while the rest is denoised around them.

At every noise level the known actions replace those of the noisy chunk, noised as that level
requires (RePaint, Lugmayr et al. 2022). Continuing a chunk in this way, with a soft mask over the
overlap, follows Real-Time Chunking (Black et al., arXiv 2506.07339), which guides by a gradient
instead.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Inpainting:
    """Known actions of one tick at every noise level of its sampler, and where they count.

    levels: [K + 1, T, A]; weights: [T, 1].
    """

    levels: Tensor
    weights: Tensor

    @staticmethod
    def of(noise_levels: Tensor, noise: Tensor, actions: Tensor, weights: Tensor) -> Inpainting:
        """Noise the known actions.

        noise_levels: [K + 1, 2], see `Scheduler.noise_levels`; noise: [1, T, A], of the
        chunk, so that a level is the chunk's own noisy version; actions: [T, A] normalised;
        weights: [T].
        """
        signal_factor, noise_factor = noise_levels.T[:, :, None, None]
        return Inpainting(signal_factor * actions + noise_factor * noise, weights[:, None])

    def impose(self, level: int, x: Tensor) -> None:
        """Set the known actions into x [..., T, A] as it is before step `level`, K: after all."""
        x.lerp_(self.levels[level], self.weights)
