# SPDX-License-Identifier: Apache-2.0
"""Camera encoders, one file each: `camera_encoder.py` says how to add one."""

from importlib import import_module
from pkgutil import iter_modules

# Every file registers the encoder that it holds.
for _module in iter_modules(__path__):
    import_module(f'{__name__}.{_module.name}')
