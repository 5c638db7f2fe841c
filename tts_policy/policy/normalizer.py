# SPDX-License-Identifier: Apache-2.0
"""Linear normalisation of vectors to [-1, 1] from the range seen in the demonstrations."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LinearNormalizer(nn.Module):
    """Per-dimension map of [low, high] to [-1, 1] (Diffusion Policy's `limits` mode).

    A dimension that never moved in the data keeps a unit scale, so that it neither explodes nor
    vanishes.
    """

    scale: Tensor
    offset: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer('scale', torch.ones(dim))
        self.register_buffer('offset', torch.zeros(dim))

    def fit(self, low: Tensor, high: Tensor, min_range: float = 1e-4) -> None:
        """Set the map from the lowest and highest value of every dimension, each [dim]."""
        span = high - low
        scale = torch.where(span < min_range, torch.ones_like(span), 2.0 / span)
        self.scale.copy_(scale)
        self.offset.copy_(-scale * (low + high) / 2.0)

    def normalize(self, value: Tensor) -> Tensor:
        """Map robot units [..., dim] to [-1, 1]."""
        return value * self.scale + self.offset

    def unnormalize(self, value: Tensor) -> Tensor:
        """Map [-1, 1] back to robot units."""
        return (value - self.offset) / self.scale
