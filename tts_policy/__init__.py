# SPDX-License-Identifier: Apache-2.0
"""Test-time sparse diffusion policies on ROS 2."""
