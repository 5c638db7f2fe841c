# SPDX-License-Identifier: Apache-2.0
"""Denoising networks: one file per architecture."""
