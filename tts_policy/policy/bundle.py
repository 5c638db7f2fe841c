# SPDX-License-Identifier: Apache-2.0
"""Model bundles: a folder with model.yaml and safetensors files, loadable without pickle.

model.yaml holds everything needed to rebuild the network and its contract, the samplers, and the
SHA-256 of every weight file. Weights are stored in half precision and used in single precision.
What is saved replaces the bundle before it in one step; see bundle_files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from tts_policy.policy.bundle_files import (
    MODEL_FILE,
    BundleError,
    locked,
    malformed,
    read_model_text,
    read_weights,
    remove_unnamed,
    replace_file,
    serialised,
    weights_name,
    weights_path,
)
from tts_policy.policy.contract import PolicyContract
from tts_policy.policy.network import NetworkSpec, PolicyNetwork
from tts_policy.policy.pruner import Pruner, PrunerSpec
from tts_policy.policy.query_pruner import QueryPruner, QueryPrunerSpec
from tts_policy.policy.sampler import SamplerSpec

__all__ = [
    'MODEL_FILE',
    'WEIGHTS_FILE',
    'AnyPruner',
    'Bundle',
    'BundleError',
    'bundle_digest',
    'load_bundle',
    'save_bundle',
    'save_pruner',
    'save_random_bundle',
]

FORMAT = 1
WEIGHTS_FILE = 'policy.safetensors'
QUERY_PRUNER = 'query'
AnyPruner = Pruner | QueryPruner
_POLICY = WEIGHTS_FILE.partition('.')[0]


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


def save_bundle(
    folder: Path,
    name: str,
    network: PolicyNetwork,
    samplers: Mapping[str, SamplerSpec],
    pruners: Mapping[str, AnyPruner] | None = None,
    half: bool = True,
) -> tuple[str, ...]:
    """Write a bundle; `folder` is created, a bundle that stands there is replaced.

    half: weights, but not normalisation statistics, are rounded to half precision. A sampler that
    is given no pruner keeps that of the replaced bundle if neither the sampler's scheduler nor
    the policy (contract, network, weights as stored) has changed.

    Returns
    -------
    tuple of str
        the samplers of the replaced bundle whose pruner is dropped: it was of another policy.

    Raises
    ------
    BundleError
        for what `load_bundle` would refuse; the folder's bundle is as before.

    """
    given = pruners or {}
    weights = serialised(_POLICY, network, half)
    data: dict[str, Any] = {
        'format': FORMAT,
        'name': name,
        **network.contract.to_dict(),
        'network': network.spec.to_dict(),
        'weights': {},
        'samplers': {key: spec.to_dict() for key, spec in samplers.items()},
    }
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        old = _replaced(folder)
        draft = _Draft(folder, data)
        data['weights'] = draft.stage(_POLICY, weights)
        kept = _kept_pruners(folder, old, data['weights']['sha256'], network, samplers)
        for key, entry in kept.items():
            data['samplers'][key]['pruner'] = entry
        for key, pruner in given.items():
            draft.add_pruner(key, pruner, half)
        draft.write(network, replaced=old)
    return tuple(
        key
        for key, entry in old.get('samplers', {}).items()
        if isinstance(entry, dict) and 'pruner' in entry and key not in {*kept, *given}
    )


def save_pruner(folder: Path, sampler: str, pruner: AnyPruner, half: bool = True) -> None:
    """Add a sampler's pruner to an existing bundle, or replace it.

    Processes that save pruners of different samplers at the same time all succeed.

    Raises
    ------
    BundleError
        for what `load_bundle` would refuse; the bundle is as before.

    """
    read_model_text(folder)
    with locked(folder):
        # Read under the lock: others may have saved theirs.
        data = _parsed(folder, read_model_text(folder))
        with malformed(folder / MODEL_FILE), torch.device('meta'):
            # For its sizes: it takes no memory, and draws no random numbers.
            contract = PolicyContract.from_dict(data)
            network = PolicyNetwork(contract, NetworkSpec.from_dict(data['network']))
        draft = _Draft(folder, data)
        draft.add_pruner(sampler, pruner, half)
        draft.write(network, replaced=data)


class _Draft:
    """Data of a model file, with the weights that are to be written for it."""

    def __init__(self, folder: Path, data: dict[str, Any]) -> None:
        self._folder, self._data = folder, data
        self._files: dict[str, bytes] = {}

    def stage(self, stem: str, content: bytes) -> dict[str, str]:
        """Have weights written; returns the entry of the model file that points to them."""
        sha256 = hashlib.sha256(content).hexdigest()
        file = weights_name(self._folder, stem, sha256)
        self._files[file] = content
        return {'file': file, 'sha256': sha256}

    def add_pruner(self, sampler: str, pruner: AnyPruner, half: bool) -> None:
        """Give a sampler a pruner; raises BundleError if there is no such sampler."""
        samplers = self._data['samplers']
        if sampler not in samplers:
            raise BundleError(
                f'{self._folder}: a pruner must be of a sampler of {list(samplers)}, '
                f'got {sampler!r}'
            )
        content = serialised(f'pruner of {sampler!r}', pruner, half)
        entry = self.stage(_pruner_stem(sampler), content)
        kind = {} if isinstance(pruner, Pruner) else {'kind': QUERY_PRUNER}
        samplers[sampler]['pruner'] = {**entry, **kind, 'spec': pruner.spec.to_dict()}

    def write(self, network: PolicyNetwork, replaced: dict[str, Any]) -> None:
        """Write weights and model file in the place of those of `replaced`, {} if none.

        Raises
        ------
        BundleError
            for what would not be loaded again.

        """
        path = self._folder / MODEL_FILE
        with malformed(path):
            text = yaml.safe_dump(
                self._data, sort_keys=False, allow_unicode=True, default_flow_style=None
            )
            text = '# Model bundle; see CARD.md.\n' + text
            named = self._named(network, _parsed(self._folder, text))
        for file, content in self._files.items():
            replace_file(self._folder / file, content)
        replace_file(path, text.encode())
        samplers = {*self._data['samplers'], *replaced.get('samplers', {})}
        remove_unnamed(self._folder, {_POLICY, *map(_pruner_stem, samplers)}, named)

    def _named(self, network: PolicyNetwork, saved: dict[str, Any]) -> set[str]:
        """Weight files that the model file names; raises as `load_bundle` would."""
        entries = [saved['weights']]
        for name, data in saved['samplers'].items():
            _, sizes = _sampler_settings(network, str(name), data)
            if sizes is not None:
                entries.append(data['pruner'])
        # A name may be a link to another file of the bundle.
        targets = {weights_path(self._folder, entry).name for entry in entries}
        return targets | {str(entry['file']) for entry in entries}


def _pruner_stem(sampler: str) -> str:
    return f'pruner_{sampler}'


def _replaced(folder: Path) -> dict[str, Any]:
    """Data of the bundle that stands in a folder, {} where there is none that can be read."""
    try:
        return _parsed(folder, read_model_text(folder))
    except BundleError:
        return {}


def _kept_pruners(
    folder: Path,
    old: dict[str, Any],
    sha256: str,
    network: PolicyNetwork,
    samplers: Mapping[str, SamplerSpec],
) -> dict[str, Any]:
    """Entries of the replaced bundle's pruners that serve these samplers of this network."""
    kept = {}
    for name in samplers if _is_policy(old, sha256, network) else ():
        entry = old['samplers'].get(name)
        try:
            with malformed(folder / MODEL_FILE):
                spec, pruner = _load_sampler(folder, network, name, entry)
        except BundleError:
            continue
        if pruner is not None and spec.scheduler == samplers[name].scheduler:
            kept[name] = entry['pruner']
    return kept


def _is_policy(data: dict[str, Any], sha256: str, network: PolicyNetwork) -> bool:
    """Whether a model file describes this network with weights of this hash."""
    try:
        with malformed(MODEL_FILE):
            return (
                data['weights']['sha256'] == sha256
                and PolicyContract.from_dict(data) == network.contract
                and NetworkSpec.from_dict(data['network']) == network.spec
            )
    except BundleError:
        return False


def _parsed(folder: Path, text: str) -> dict[str, Any]:
    path = folder / MODEL_FILE
    with malformed(f'{path}: not YAML'):
        data = yaml.safe_load(text)
    if not isinstance(data, dict) or data.get('format') != FORMAT:
        found = data.get('format') if isinstance(data, dict) else data
        raise BundleError(f'{path}: format {FORMAT} expected, got {str(found)[:80]!r}')
    missing = {'name', 'network', 'weights', 'samplers', 'observation', 'action'} - set(data)
    if missing:
        raise BundleError(f'{path}: {sorted(missing)} expected, got {list(data)}')
    if not isinstance(data['samplers'], dict) or not data['samplers']:
        raise BundleError(f'{path}: samplers must name at least one, got {data["samplers"]!r}')
    return data


def _sampler_settings(
    network: PolicyNetwork, name: str, data: Any
) -> tuple[SamplerSpec, PrunerSpec | QueryPrunerSpec | None]:
    """Settings of a sampler and sizes of its pruner; raises ValueError unless they fit."""
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
    return spec, sizes


def _load_sampler(
    folder: Path, network: PolicyNetwork, name: str, data: Any
) -> tuple[SamplerSpec, AnyPruner | None]:
    spec, sizes = _sampler_settings(network, name, data)
    if sizes is None:
        return spec, None
    pruner = QueryPruner(sizes) if isinstance(sizes, QueryPrunerSpec) else Pruner(sizes)
    read_weights(folder, data['pruner'], pruner)
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
    """Load and validate a bundle folder, also while it is saved anew.

    Raises
    ------
    BundleError
        for a missing file, a malformed model.yaml, a path that leaves the bundle, weights that
        do not match their hash or the network, or that are not finite.

    """
    text = read_model_text(folder)
    while True:
        try:
            return _load(folder, text)
        except BundleError:
            # Weights that it named are gone if the bundle was saved in the meantime.
            before, text = text, read_model_text(folder)
            if text == before:
                raise


def _load(folder: Path, text: str) -> Bundle:
    data = _parsed(folder, text)
    with malformed(folder / MODEL_FILE):
        contract = PolicyContract.from_dict(data)
        network = PolicyNetwork(contract, NetworkSpec.from_dict(data['network']))
        read_weights(folder, data['weights'], network)
        samplers = {
            str(name): _load_sampler(folder, network, str(name), entry)
            for name, entry in data['samplers'].items()
        }
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
