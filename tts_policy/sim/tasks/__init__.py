# SPDX-License-Identifier: Apache-2.0
"""Simulated tasks: one file each."""
