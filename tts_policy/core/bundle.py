# SPDX-License-Identifier: Apache-2.0
"""Model bundles: a folder with model.yaml and safetensors files, loadable without pickle.

model.yaml holds everything needed to rebuild the network and its contract, the samplers, and the
SHA-256 of every weight file. Weights are stored in half precision and used in single precision.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from tts_policy.core.contract import PolicyContract
from tts_policy.core.network import NetworkSpec, PolicyNetwork
from tts_policy.core.pruner import Pruner, PrunerSpec
from tts_policy.core.query_pruner import QueryPruner, QueryPrunerSpec
from tts_policy.core.sampler import SamplerSpec

FORMAT = 1
MODEL_FILE = 'model.yaml'
WEIGHTS_FILE = 'policy.safetensors'
MAX_FILE_BYTES = 2 << 30
QUERY_PRUNER = 'query'
AnyPruner = Pruner | QueryPruner
# Normalisation statistics map radians and metres: they keep full precision.
_FULL_PRECISION = ('normalizer',)


class BundleError(ValueError):
    """A bundle that cannot be used; the message names the file and the reason."""


@dataclass(frozen=True)
class Bundle:
    """A loaded bundle: the network and, per sampler name, its settings and pruner if any."""

    name: str
    network: PolicyNetwork
    samplers: Mapping[str, tuple[SamplerSpec, AnyPruner | None]]

    @property
    def default_sampler(self) -> str:
        """The sampler listed first."""
        return next(iter(self.samplers))

    def sampler(self, name: str) -> tuple[SamplerSpec, AnyPruner | None]:
        """Settings and pruner of one sampler; raises BundleError naming those there are."""
        if name not in self.samplers:
            raise BundleError(f'sampler must be one of {list(self.samplers)}, got {name!r}')
        return self.samplers[name]


def _half(name: str, value: Tensor) -> Tensor:
    keep = any(part in name for part in _FULL_PRECISION) or not value.is_floating_point()
    return value if keep else value.half()


def _write_weights(folder: Path, file: str, module: nn.Module, half: bool) -> dict[str, str]:
    """Write a module's state; returns the entry of model.yaml that points to it."""
    state = {name: value.cpu() for name, value in module.state_dict().items()}
    state = {k: (_half(k, v) if half else v).contiguous() for k, v in state.items()}
    data = save_tensors(state)
    (folder / file).write_bytes(data)
    return {'file': file, 'sha256': hashlib.sha256(data).hexdigest()}


def _read_weights(folder: Path, entry: Any, module: nn.Module) -> None:
    """Check and load the weights that an entry of model.yaml points to."""
    if not isinstance(entry, dict) or not {'file', 'sha256'} <= set(entry):
        raise BundleError(f'{folder / MODEL_FILE}: weights need file and sha256, got {entry!r}')
    name = str(entry['file'])
    path = (folder / name).resolve()
    if Path(name).name != name or path.parent != folder.resolve():
        raise BundleError(f'{folder / MODEL_FILE}: file must lie in the bundle, got {name!r}')
    if not path.is_file():
        raise BundleError(f'weight file expected at {folder / name}, got nothing')
    if path.stat().st_size > MAX_FILE_BYTES:
        raise BundleError(f'{path}: at most {MAX_FILE_BYTES} bytes, got {path.stat().st_size}')
    data = path.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if digest != entry['sha256']:
        raise BundleError(f'{path}: sha256 {entry["sha256"]} expected, got {digest}')
    try:
        state = load_tensors(data)
        own = module.state_dict()
        module.load_state_dict(
            {k: v.to(own[k].dtype) if k in own else v for k, v in state.items()}
        )
    except (SafetensorError, RuntimeError) as error:
        raise BundleError(f'{path}: {" ".join(str(error).split())[:500]}') from error
    bad = [k for k, v in module.state_dict().items() if not torch.isfinite(v).all()]
    if bad:
        raise BundleError(f'{path}: finite weights expected, got NaN or infinity in {bad[:3]}')


def save_bundle(
    folder: Path,
    name: str,
    network: PolicyNetwork,
    samplers: Mapping[str, SamplerSpec],
    pruners: Mapping[str, AnyPruner] | None = None,
    half: bool = True,
) -> None:
    """Write a bundle; `folder` is created, files of the same names are replaced.

    half: weights, but not normalisation statistics, are rounded to half precision.
    """
    folder.mkdir(parents=True, exist_ok=True)
    data: dict[str, Any] = {
        'format': FORMAT,
        'name': name,
        **network.contract.to_dict(),
        'network': network.spec.to_dict(),
        'weights': _write_weights(folder, WEIGHTS_FILE, network, half),
        'samplers': {key: spec.to_dict() for key, spec in samplers.items()},
    }
    _write_model_file(folder, data)
    for key, pruner in (pruners or {}).items():
        save_pruner(folder, key, pruner, half)


def save_pruner(folder: Path, sampler: str, pruner: AnyPruner, half: bool = True) -> None:
    """Add a sampler's pruner to an existing bundle, or replace it."""
    data = _read_model_file(folder)
    entry = _write_weights(folder, f'pruner_{sampler}.safetensors', pruner, half)
    kind = {} if isinstance(pruner, Pruner) else {'kind': QUERY_PRUNER}
    data['samplers'][sampler]['pruner'] = {**entry, **kind, 'spec': pruner.spec.to_dict()}
    _write_model_file(folder, data)


def _write_model_file(folder: Path, data: dict[str, Any]) -> None:
    text = yaml.safe_dump(data, sort_keys=False, allow_unicode=True, default_flow_style=None)
    (folder / MODEL_FILE).write_text('# Model bundle; see CARD.md.\n' + text, encoding='utf-8')


def _read_model_file(folder: Path) -> dict[str, Any]:
    path = folder / MODEL_FILE
    if not path.is_file():
        raise BundleError(f'bundle file expected at {path}, got nothing')
    try:
        data = yaml.safe_load(path.read_text(encoding='utf-8'))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BundleError(f'{path}: not YAML: {" ".join(str(error).split())}') from error
    if not isinstance(data, dict) or data.get('format') != FORMAT:
        found = data.get('format') if isinstance(data, dict) else data
        raise BundleError(f'{path}: format {FORMAT} expected, got {str(found)[:80]!r}')
    missing = {'name', 'network', 'weights', 'samplers', 'observation', 'action'} - set(data)
    if missing:
        raise BundleError(f'{path}: {sorted(missing)} expected, got {sorted(data)}')
    if not isinstance(data['samplers'], dict) or not data['samplers']:
        raise BundleError(f'{path}: samplers must name at least one, got {data["samplers"]!r}')
    return data


def _load_sampler(
    folder: Path, network: PolicyNetwork, name: str, data: Any
) -> tuple[SamplerSpec, AnyPruner | None]:
    data = dict(data)
    entry = data.pop('pruner', None)
    spec = SamplerSpec.from_dict(data)
    try:
        network.spec.check_scheduler(spec.scheduler)
    except ValueError as error:
        raise ValueError(f'sampler {name!r} {error}') from error
    if entry is None:
        return spec, None
    denoiser, sizes = network.denoiser.spec, _pruner_spec(entry)
    expected = (spec.scheduler.steps, denoiser.blocks, denoiser.memory_width, denoiser.obs_steps)
    got = (sizes.steps, sizes.blocks, sizes.memory_width, sizes.obs_steps)
    if got != expected:
        raise ValueError(
            f'pruner of {name!r} must have (steps, blocks, memory_width, obs_steps) {expected}, '
            f'got {got}'
        )
    time_width = getattr(sizes, 'time_width', None) or sizes.memory_width
    if time_width != denoiser.time_width:
        raise ValueError(
            f'pruner of {name!r} must have time_width {denoiser.time_width}, got {time_width}'
        )
    pruner = QueryPruner(sizes) if isinstance(sizes, QueryPrunerSpec) else Pruner(sizes)
    _read_weights(folder, entry, pruner)
    return spec, pruner


def _pruner_spec(entry: dict[str, Any]) -> PrunerSpec | QueryPrunerSpec:
    kind = entry.get('kind')
    if kind == QUERY_PRUNER:
        return QueryPrunerSpec(**entry['spec'])
    if kind is not None:
        raise ValueError(f'pruner kind must be {QUERY_PRUNER!r} or missing, got {kind!r}')
    return PrunerSpec(**entry['spec'])


def bundle_digest(folder: Path) -> str:
    """SHA-256 of model.yaml, which holds those of all weights: tells one model from another."""
    return hashlib.sha256((folder / MODEL_FILE).read_bytes()).hexdigest()


def load_bundle(folder: Path) -> Bundle:
    """Load and validate a bundle folder.

    Raises
    ------
    BundleError
        for a missing file, a malformed model.yaml, a path that leaves the bundle, weights that
        do not match their hash or the network, or that are not finite.

    """
    data = _read_model_file(folder)
    try:
        contract = PolicyContract.from_dict(data)
        network = PolicyNetwork(contract, NetworkSpec.from_dict(data['network']))
        _read_weights(folder, data['weights'], network)
        samplers = {
            str(name): _load_sampler(folder, network, str(name), entry)
            for name, entry in data['samplers'].items()
        }
    except BundleError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise BundleError(f'{folder / MODEL_FILE}: {error}') from error
    return Bundle(str(data['name']), network, samplers)


def save_random_bundle(
    folder: Path,
    contract: PolicyContract,
    samplers: Mapping[str, SamplerSpec],
    network: NetworkSpec | None = None,
    seed: int = 0,
) -> None:
    """Write an untrained bundle with pruners, for tests and benchmarks of everything but skill."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        policy = PolicyNetwork(contract, network or NetworkSpec())
        denoiser = policy.denoiser.spec
        pruners = {}
        for name, spec in samplers.items():
            sparsity = min(0.8, spec.max_sparsity)
            pruners[name] = Pruner(PrunerSpec.of(denoiser, spec.scheduler.steps, (sparsity,)))
            pruners[name].start_from_static()
            torch.nn.init.normal_(pruners[name].cell, std=0.02)
    save_bundle(folder, 'random', policy, samplers, pruners)
