# SPDX-License-Identifier: Apache-2.0
"""Options of the smallest training of a policy."""

from __future__ import annotations

SMALL = ['--width', '32', '--layers', '2', '--batch', '4', '--threads', '1', '--held-out', '1']
