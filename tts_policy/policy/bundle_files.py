# SPDX-License-Identifier: Apache-2.0
"""Files of a bundle: nothing in them is trusted, and the folder always holds a whole bundle.

A file that model.yaml names is never overwritten. New contents get a new name, model.yaml is
replaced in one step, and then the files that it no longer names are removed. A reader finds the
old bundle or the new one, also after an interruption.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from tts_policy.policy.validation import Spec, Text, checked

MODEL_FILE = 'model.yaml'
MAX_FILE_BYTES = 2 << 30
# Normalisation statistics map radians and metres: they keep full precision.
_FULL_PRECISION = ('normalizer',)
_HASH_DIGITS = 12
_TEMPORARY = '.tmp'
_WEIGHTS = re.compile(
    rf'(?P<stem>.+?)(-[0-9a-f]{{{_HASH_DIGITS}}})?\.safetensors({re.escape(_TEMPORARY)})?'
)
# Errors of reading malformed data and of building a network from it.
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
    """Turn the errors that malformed data causes into a BundleError of one line about `what`."""
    try:
        yield
    except BundleError:
        raise
    except _MALFORMED as error:
        reason = ' '.join(str(error).split())[:500] or type(error).__name__
        raise BundleError(f'{what}: {reason}') from error


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


@checked('weights')
class StoredWeights(Spec):
    """Entry of model.yaml for a weight file; `file` is a name in the bundle's folder."""

    file: Text
    sha256: Text

    def path(self, folder: Path) -> Path:
        """Where the weights are; raises BundleError unless that is in the bundle."""
        path = (folder / self.file).resolve()
        if Path(self.file).name != self.file or path.parent != folder.resolve():
            raise BundleError(
                f'{folder / MODEL_FILE}: file: expected a file in the bundle, got {self.file!r}'
            )
        return path


def stored_weights(folder: Path, stem: str, content: bytes) -> StoredWeights:
    """Entry for weights: stem.safetensors if that is free or holds them, else with their hash."""
    name, sha256 = f'{stem}.safetensors', hashlib.sha256(content).hexdigest()
    if (folder / name).exists() and _sha256(folder / name) != sha256:
        name = f'{stem}-{sha256[:_HASH_DIGITS]}.safetensors'
    return StoredWeights(name, sha256)


def _sha256(path: Path) -> str:
    """Hash of a file's content, '' where it cannot be read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return ''


def replace_file(path: Path, content: bytes) -> None:
    """Write a file in one step: at any time it holds the old content or the new one."""
    temporary = path.with_name(path.name + _TEMPORARY)
    try:
        with temporary.open('wb') as stream:
            stream.write(content)
            stream.flush()
            # Otherwise a power cut could leave an empty file of the new name.
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
            # A file that stays does no harm; a later save removes it.
            with suppress(OSError):
                path.unlink()


def read_model_text(folder: Path) -> str:
    """Text of a bundle's model.yaml; raises BundleError where there is none."""
    path = folder / MODEL_FILE
    if not path.is_file():
        raise BundleError(f'{path}: expected a bundle file, got nothing')
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
    _check_size(what, len(content))
    return content


def _half(name: str, value: Tensor) -> Tensor:
    keep = any(part in name for part in _FULL_PRECISION) or not value.is_floating_point()
    return value if keep else value.half()


def _check_finite(what: str | Path, state: Mapping[str, Tensor]) -> None:
    bad = [name for name, value in state.items() if not torch.isfinite(value).all()]
    if bad:
        raise BundleError(f'{what}: expected finite weights, got NaN or infinity in {bad[:3]}')


def read_weights(folder: Path, entry: StoredWeights, module: nn.Module) -> None:
    """Load the weights that an entry of model.yaml points to into a module.

    Raises
    ------
    BundleError
        for a file that is missing, elsewhere, too large, or of another hash or other sizes, and
        for weights that are not finite.

    """
    path = entry.path(folder)
    if not path.is_file():
        raise BundleError(f'{folder / entry.file}: expected a weight file, got nothing')
    _check_size(path, path.stat().st_size)
    with malformed(path):
        data = path.read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        if digest != entry.sha256:
            raise BundleError(f'{path}: expected sha256 {entry.sha256}, got {digest}')
        own = module.state_dict()
        state = load_tensors(data)
        module.load_state_dict(
            {k: v.to(own[k].dtype) if k in own else v for k, v in state.items()}
        )
    _check_finite(path, module.state_dict())


def _check_size(what: str | Path, size: int) -> None:
    if size > MAX_FILE_BYTES:
        raise BundleError(f'{what}: expected at most {MAX_FILE_BYTES} bytes, got {size}')
