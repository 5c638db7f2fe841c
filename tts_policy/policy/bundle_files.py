# SPDX-License-Identifier: Apache-2.0
"""Files of a bundle: read with distrust, written so that the folder always holds a whole bundle.

A file that model.yaml names is never written to. Other contents get a name of their own,
model.yaml is replaced in one step, and then what it no longer names is removed: a reader, or
whoever looks after an interruption, finds the old bundle or the new one.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

MODEL_FILE = 'model.yaml'
MAX_FILE_BYTES = 2 << 30
# Normalisation statistics map radians and metres: they keep full precision.
_FULL_PRECISION = ('normalizer',)
_HASH_DIGITS = 12
_TEMPORARY = '.tmp'
_WEIGHTS = re.compile(
    rf'(?P<stem>.+?)(-[0-9a-f]{{{_HASH_DIGITS}}})?\.safetensors({re.escape(_TEMPORARY)})?'
)
# What reading malformed data, and building a network from it, can end with.
_MALFORMED = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RuntimeError,  # of torch, and RecursionError
    MemoryError,
    OSError,
    yaml.YAMLError,
    SafetensorError,
)


class BundleError(ValueError):
    """A bundle that cannot be used; the message names the file and the reason."""


@contextmanager
def malformed(what: str | Path) -> Iterator[None]:
    """Turn what malformed data leads to into a BundleError of one line about `what`."""
    try:
        yield
    except BundleError:
        raise
    except _MALFORMED as error:
        reason = ' '.join(str(error).split())[:500] or type(error).__name__
        missing = ' expected, got nothing' if isinstance(error, KeyError) else ''
        raise BundleError(f'{what}: {reason}{missing}') from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other writers, of this and other processes, out of an existing bundle folder."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        # A file system without such locks still serves one writer at a time.
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def weights_name(folder: Path, stem: str, sha256: str) -> str:
    """Name for weights: stem.safetensors if that is free or holds them, else with their hash."""
    name = f'{stem}.safetensors'
    if not (folder / name).exists() or _sha256(folder / name) == sha256:
        return name
    return f'{stem}-{sha256[:_HASH_DIGITS]}.safetensors'


def _sha256(path: Path) -> str:
    """Hash of a file's content, '' where it cannot be read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return ''


def replace_file(path: Path, content: bytes) -> None:
    """Write a file in one step: it has its old content, if any, or all of the new one."""
    temporary = path.with_name(path.name + _TEMPORARY)
    try:
        with temporary.open('wb') as stream:
            stream.write(content)
            stream.flush()
            # Else a power cut could leave the new name with nothing behind it.
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def remove_unnamed(folder: Path, stems: Collection[str], named: Collection[str]) -> None:
    """Remove weights of these stems, as `weights_name` calls them, that are not in `named`."""
    for path in sorted(folder.iterdir()):
        match = _WEIGHTS.fullmatch(path.name)
        if match and match['stem'] in stems and path.name not in named:
            # What stays does no harm, and goes with a later save.
            with suppress(OSError):
                path.unlink()


def read_model_text(folder: Path) -> str:
    """Text of a bundle's model.yaml; raises BundleError where there is none."""
    path = folder / MODEL_FILE
    if not path.is_file():
        raise BundleError(f'bundle file expected at {path}, got nothing')
    with malformed(f'{path}: not YAML'):
        return path.read_text(encoding='utf-8')


def serialised(what: str, module: nn.Module, half: bool) -> bytes:
    """File content of a module's state, which can be read again.

    what: names the module in the message; half: all but normalisation statistics are rounded to
    half precision.

    Raises
    ------
    BundleError
        for weights that are not finite as stored, or too large.

    """
    state = {name: value.cpu() for name, value in module.state_dict().items()}
    state = {k: (_half(k, v) if half else v).contiguous() for k, v in state.items()}
    _check_finite(what, state)
    content: bytes = save_tensors(state)
    if len(content) > MAX_FILE_BYTES:
        raise BundleError(f'{what}: at most {MAX_FILE_BYTES} bytes, got {len(content)}')
    return content


def _half(name: str, value: Tensor) -> Tensor:
    keep = any(part in name for part in _FULL_PRECISION) or not value.is_floating_point()
    return value if keep else value.half()


def _check_finite(what: str | Path, state: Mapping[str, Tensor]) -> None:
    bad = [name for name, value in state.items() if not torch.isfinite(value).all()]
    if bad:
        raise BundleError(f'{what}: finite weights expected, got NaN or infinity in {bad[:3]}')


def weights_path(folder: Path, entry: Any) -> Path:
    """File that an entry of model.yaml points to; raises BundleError for one elsewhere."""
    if not isinstance(entry, dict) or not {'file', 'sha256'} <= set(entry):
        raise BundleError(f'{folder / MODEL_FILE}: weights need file and sha256, got {entry!r}')
    name = str(entry['file'])
    path = (folder / name).resolve()
    if Path(name).name != name or path.parent != folder.resolve():
        raise BundleError(f'{folder / MODEL_FILE}: file must lie in the bundle, got {name!r}')
    return path


def read_weights(folder: Path, entry: Any, module: nn.Module) -> None:
    """Load the weights that an entry of model.yaml points to into a module.

    Raises
    ------
    BundleError
        for a file that is missing, elsewhere, too large, or of another hash or other sizes, and
        for weights that are not finite.

    """
    path = weights_path(folder, entry)
    if not path.is_file():
        raise BundleError(f'weight file expected at {folder / str(entry["file"])}, got nothing')
    if path.stat().st_size > MAX_FILE_BYTES:
        raise BundleError(f'{path}: at most {MAX_FILE_BYTES} bytes, got {path.stat().st_size}')
    with malformed(path):
        data = path.read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        if digest != entry['sha256']:
            raise BundleError(f'{path}: sha256 {entry["sha256"]} expected, got {digest}')
        state = load_tensors(data)
        own = module.state_dict()
        module.load_state_dict(
            {k: v.to(own[k].dtype) if k in own else v for k, v in state.items()}
        )
    _check_finite(path, module.state_dict())
