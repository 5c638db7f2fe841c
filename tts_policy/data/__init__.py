# SPDX-License-Identifier: Apache-2.0
"""Recordings and data sets: reading, windows, replay and reports."""
