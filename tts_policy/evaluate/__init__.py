# SPDX-License-Identifier: Apache-2.0
"""Closed-loop evaluation and its results page."""
