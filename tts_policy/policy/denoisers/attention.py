# SPDX-License-Identifier: Apache-2.0
"""Attention heads and positions, as every architecture here needs them."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sinusoidal_embedding(positions: Tensor, width: int) -> Tensor:
    """Sines and cosines of positions [n] at wavelengths 2 pi to 20,000 pi, [n, width]."""
    half = width // 2
    exponent = torch.arange(half, device=positions.device, dtype=torch.float32) / (half - 1)
    angles = positions[:, None].float() * torch.exp(-math.log(10_000.0) * exponent)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def split_heads(tokens: Tensor, heads: int) -> Tensor:
    """[..., S, D] -> [..., heads, S, D / heads]."""
    return tokens.unflatten(-1, (heads, -1)).transpose(-3, -2)


def merge_heads(tokens: Tensor) -> Tensor:
    """[..., heads, S, D / heads] -> [..., S, D]."""
    return tokens.transpose(-3, -2).flatten(-2)


def rotary_angles(positions: int, width: int, base: float) -> Tensor:
    """Angle of every position and pair of components of a head, [positions, width / 2]."""
    frequencies = base ** (-torch.arange(0, width, 2, dtype=torch.float32) / width)
    return torch.outer(torch.arange(positions, dtype=torch.float32), frequencies)


def rotate(tokens: Tensor, angles: Tensor) -> Tensor:
    """Turn components c and c + half of [..., S, width] by angles [S, width / 2].

    Source: Su et al., "RoFormer" (2021), with halves in the place of neighbours.
    """
    first, second = tokens.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
