# SPDX-License-Identifier: Apache-2.0
"""The simulated robot: physics and camera, scripted expert, trajectory player and ROS node.

MuJoCo reads MUJOCO_GL when it is first imported, so the default is set here, before any module of
this package can import it. A value chosen by the user is kept. Meshes dominate the picture, and
one rasteriser thread beside a busy core is faster than several.
"""

import os
from importlib import import_module
from importlib.util import find_spec

os.environ.setdefault('MUJOCO_GL', 'osmesa')
os.environ.setdefault('LP_NUM_THREADS', '1')
# Triton and the software renderer bring an LLVM each. A process that loads both, as one does where
# torch has CUDA, ends in a segmentation fault unless Triton's is the first.
if os.environ['MUJOCO_GL'] == 'osmesa' and find_spec('triton') is not None:
    import_module('triton')
