# SPDX-License-Identifier: Apache-2.0
"""Schedulers, one file per kind: `scheduler.py` says how to add one."""

from importlib import import_module
from pkgutil import iter_modules

# Every scheduler registers itself.
for _module in iter_modules(__path__):
    import_module(f'{__name__}.{_module.name}')
