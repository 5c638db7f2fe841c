# SPDX-License-Identifier: Apache-2.0
"""Frames are encoded once, whatever windows they appear in, and forgotten at a reset."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tts_policy.policy.bundle import load_bundle
from tts_policy.policy.frame_encoder import FrameEncoder
from tts_policy.policy.network import PolicyNetwork
from tts_policy.policy.policy import TestTimeSparsePolicy


@pytest.fixture
def frames() -> NDArray[np.uint8]:
    """Frames of six consecutive stamps."""
    return np.random.default_rng(0).integers(0, 256, (6, 32, 48, 3), dtype=np.uint8)


def frame_encoder(network: PolicyNetwork) -> FrameEncoder:
    observation = network.contract.observation
    return FrameEncoder(network.observation_encoder, observation, torch.device('cpu'))


@torch.inference_mode()
def test_a_frame_is_encoded_once_and_its_features_are_those_of_the_network(
    bundle: Path, frames: NDArray[np.uint8]
) -> None:
    network = load_bundle(bundle).network.eval()
    encoder = frame_encoder(network)
    joints = torch.zeros(1, 2, 3)
    for end in range(2, 7):
        window = frames[end - 2 : end]
        cameras = encoder({'camera': window})
        expected = network.features({'camera': torch.from_numpy(window)[None]}, joints)
        normalised = network.joint_normalizer.normalize(joints)
        features = network.observation_encoder.combine(cameras, normalised)
        assert (features - expected).abs().max() < 1e-5
    assert encoder.encoded == 6


@torch.inference_mode()
def test_a_buffer_that_is_written_anew_is_a_new_frame(
    bundle: Path, frames: NDArray[np.uint8]
) -> None:
    encoder = frame_encoder(load_bundle(bundle).network)
    buffer = frames[:2].copy()
    first = encoder({'camera': buffer})['camera']
    buffer[1, 5, 7] ^= 255
    second = encoder({'camera': buffer})['camera']
    assert torch.equal(first[0, 0], second[0, 0])
    assert not torch.equal(first[0, 1], second[0, 1])
    assert encoder.encoded == 3


@torch.inference_mode()
def test_a_repeated_frame_of_one_window_is_encoded_once(
    bundle: Path, frames: NDArray[np.uint8]
) -> None:
    encoder = frame_encoder(load_bundle(bundle).network)
    features = encoder({'camera': frames[[0, 0]]})['camera']
    assert encoder.encoded == 1 and torch.equal(features[0, 0], features[0, 1])


def test_overlapping_windows_give_the_chunks_of_a_policy_that_saw_no_overlap(
    bundle: Path, frames: NDArray[np.uint8]
) -> None:
    used, fresh = (TestTimeSparsePolicy.from_bundle(bundle, 'ddim5') for _ in range(2))
    windows = [
        {'camera': frames[end - 2 : end], 'joints': np.full((2, 3), 0.1 * end)}
        for end in range(2, 7)
    ]
    for window in windows[:-1]:
        used.act(window, 0.6)
    assert used._frames.encoded == 5
    used.reset(seed=5)
    fresh.reset(seed=5)
    # windows[-1] shares a frame with the window before it, which the reset has forgotten.
    after, expected = used.act(windows[-1], 0.6), fresh.act(windows[-1], 0.6)
    assert used._frames.encoded == 5 + 2
    assert np.array_equal(after.actions, expected.actions)
