# SPDX-License-Identifier: Apache-2.0
"""The policy itself: torch and numpy only, usable where no ROS is installed."""
