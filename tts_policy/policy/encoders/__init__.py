# SPDX-License-Identifier: Apache-2.0
"""Camera encoders: one file per architecture."""
