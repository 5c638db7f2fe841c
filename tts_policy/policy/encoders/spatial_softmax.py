# SPDX-License-Identifier: Apache-2.0
"""Spatial softmax: activation maps to the image coordinates where they are strongest."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SpatialSoftmax(nn.Module):
    """Expected image coordinate of every channel: [B, C, H, W] -> [B, 2C] in [-1, 1].

    Source: Levine et al., "End-to-End Training of Deep Visuomotor Policies", section 5.
    """

    columns: Tensor
    rows: Tensor

    def __init__(self, height: int, width: int) -> None:
        super().__init__()
        rows = torch.linspace(-1.0, 1.0, height)[:, None].expand(height, width)
        columns = torch.linspace(-1.0, 1.0, width)[None, :].expand(height, width)
        self.register_buffer('rows', rows.reshape(-1, 1).clone(), persistent=False)
        self.register_buffer('columns', columns.reshape(-1, 1).clone(), persistent=False)
        self.temperature = nn.Parameter(torch.ones(()))

    def forward(self, maps: Tensor) -> Tensor:
        """Map activation maps [B, C, H, W] to coordinates [B, 2C]."""
        weights = torch.softmax(maps.flatten(2) / self.temperature, dim=-1)
        return torch.cat([weights @ self.columns, weights @ self.rows], dim=-1).flatten(1)
