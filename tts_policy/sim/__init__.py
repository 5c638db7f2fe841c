# SPDX-License-Identifier: Apache-2.0
"""The simulated robot: physics and camera, scripted expert, trajectory player and ROS node.

MuJoCo reads MUJOCO_GL when it is first imported, so the default is set here, before any module of
this package can import it. A value chosen by the user is kept. Meshes dominate the picture, and
one rasteriser thread beside a busy core is faster than several.
"""

import os

os.environ.setdefault('MUJOCO_GL', 'osmesa')
os.environ.setdefault('LP_NUM_THREADS', '1')
