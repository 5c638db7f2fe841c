# SPDX-License-Identifier: Apache-2.0
"""Engines that run the denoising loop of a sampler."""
