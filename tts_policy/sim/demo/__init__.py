# SPDX-License-Identifier: Apache-2.0
"""The demo: a simulated Panda driven over ROS 2 by the sparse policy, and by the dense one."""
