# SPDX-License-Identifier: Apache-2.0
"""Model bundles: a folder with model.yaml and safetensors files, loadable without pickle.

model.yaml holds the contract, the sizes of the network, the samplers, and the SHA-256 of every
weight file. Weights are stored in half precision and used in single precision. Saving replaces
the earlier bundle in one step; see bundle_files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import yaml

from tts_policy.policy.bundle_files import (
    MODEL_FILE,
    BundleError,
    StoredWeights,
    locked,
    malformed,
    read_model_text,
    read_weights,
    remove_unnamed,
    replace_file,
    serialised,
    stored_weights,
)
from tts_policy.policy.contract import PolicyContract
from tts_policy.policy.network import NetworkSpec, PolicyNetwork
from tts_policy.policy.pruner import Pruner, PrunerSpec
from tts_policy.policy.query_pruner import QueryPruner, QueryPrunerSpec
from tts_policy.policy.sampler import SamplerSpec
from tts_policy.policy.validation import WRITTEN_IF_SET, Mismatch, Text, checked, one_of, quoted
from tts_policy.policy.yaml_file import parse_yaml

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
_POLICY = WEIGHTS_FILE.partition('.')[0]
_SECTIONS = ('name', 'observation', 'action', 'network', 'weights', 'samplers')
_QUERY = 'query'
AnyPruner = Pruner | QueryPruner
_Samplers = Mapping[str, tuple[SamplerSpec, AnyPruner | None]]


@checked('pruner')
class _StoredPruner(StoredWeights):
    """Entry of model.yaml for a pruner; without a kind it is a `Pruner`."""

    spec: dict[str, Any]
    kind: Annotated[Text, one_of(_QUERY), WRITTEN_IF_SET] = ''


@dataclass(frozen=True)
class Bundle:
    """A loaded bundle: the network and, per sampler name, its settings and pruner if any."""

    name: str
    network: PolicyNetwork
    samplers: _Samplers

    @property
    def default_sampler(self) -> str:
        """The sampler listed first."""
        return next(iter(self.samplers))

    def sampler(self, name: str) -> tuple[SamplerSpec, AnyPruner | None]:
        """Settings and pruner of one sampler; raises BundleError naming those there are."""
        if name not in self.samplers:
            raise BundleError(f'sampler: expected one of {", ".join(self.samplers)}, got {name!r}')
        return self.samplers[name]


def load_bundle(folder: Path) -> Bundle:
    """Load and validate a bundle folder, even while another process saves it.

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
            # Weights named in the text are gone if the bundle was saved in the meantime.
            before, text = text, read_model_text(folder)
            if text == before:
                raise


def _load(folder: Path, text: str) -> Bundle:
    data = _parsed(folder, text)
    with malformed(folder / MODEL_FILE):
        network = _network(data)
        read_weights(folder, StoredWeights.from_dict(data['weights']), network)
        samplers = {
            str(name): _load_sampler(folder, network, str(name), entry)
            for name, entry in data['samplers'].items()
        }
    return Bundle(str(data['name']), network, samplers)


def _parsed(folder: Path, text: str) -> dict[str, Any]:
    path = folder / MODEL_FILE
    with malformed(f'{path}: not YAML'):
        data = parse_yaml(text)
    if not isinstance(data, dict) or data.get('format') != FORMAT:
        found = data.get('format') if isinstance(data, dict) else data
        raise BundleError(f'{path}: format: expected {FORMAT}, got {quoted(found)}')
    missing = [section for section in _SECTIONS if section not in data]
    if missing:
        raise BundleError(f'{path}: expected {", ".join(missing)}, got {quoted(list(data))}')
    if not isinstance(data['samplers'], dict) or not data['samplers']:
        raise BundleError(
            f'{path}: samplers: expected one or more, got {quoted(data["samplers"])}'
        )
    return data


def _network(data: dict[str, Any]) -> PolicyNetwork:
    return PolicyNetwork(PolicyContract.from_dict(data), NetworkSpec.from_dict(data['network']))


def _load_sampler(
    folder: Path, network: PolicyNetwork, name: str, data: Any
) -> tuple[SamplerSpec, AnyPruner | None]:
    spec, entry, sizes = _sampler_settings(network, name, data)
    if entry is None or sizes is None:
        return spec, None
    pruner = QueryPruner(sizes) if isinstance(sizes, QueryPrunerSpec) else Pruner(sizes)
    read_weights(folder, entry, pruner)
    return spec, pruner


def _sampler_settings(
    network: PolicyNetwork, name: str, data: Any
) -> tuple[SamplerSpec, _StoredPruner | None, PrunerSpec | QueryPrunerSpec | None]:
    """Settings of a sampler, entry and sizes of its pruner; raises Mismatch unless they fit."""
    data = dict(data)
    stored = data.pop('pruner', None)
    try:
        spec = SamplerSpec.from_dict(data)
        network.spec.check_scheduler(spec.scheduler)
        if stored is None:
            return spec, None, None
        entry = _StoredPruner.from_dict(stored)
        sizes = (QueryPrunerSpec if entry.kind else PrunerSpec).from_dict(entry.spec)
        denoiser = network.denoiser.spec
        for field, fitting, got in (
            ('steps', spec.scheduler.steps, sizes.steps),
            ('blocks', denoiser.blocks, sizes.blocks),
            ('memory_width', denoiser.memory_width, sizes.memory_width),
            ('obs_steps', denoiser.obs_steps, sizes.obs_steps),
            (
                'time_width',
                denoiser.time_width,
                getattr(sizes, 'time_width', None) or sizes.memory_width,
            ),
        ):
            if got != fitting:
                raise Mismatch(f'pruner.{field}', str(fitting), str(got))
    except Mismatch as error:
        raise Mismatch(f'samplers.{name}: {error.thing}', error.expected, error.got) from None
    return spec, entry, sizes


def bundle_digest(folder: Path) -> str:
    """SHA-256 of model.yaml, which holds those of all weights: tells one model from another."""
    return hashlib.sha256((folder / MODEL_FILE).read_bytes()).hexdigest()


def save_bundle(
    folder: Path,
    name: str,
    network: PolicyNetwork,
    samplers: Mapping[str, SamplerSpec],
    pruners: Mapping[str, AnyPruner] | None = None,
    half: bool = True,
) -> tuple[str, ...]:
    """Write a bundle; `folder` is created, and a bundle already there is replaced.

    half: weights, but not normalisation statistics, are rounded to half precision. A sampler that
    is given no pruner keeps the replaced bundle's pruner if neither its scheduler nor the policy
    (contract, network, weights as stored) has changed.

    Returns
    -------
    tuple of str
        the samplers of the replaced bundle whose pruner is dropped because the policy changed.

    Raises
    ------
    BundleError
        for what `load_bundle` would refuse; the bundle in the folder is left as it was.

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
        try:
            old = _parsed(folder, read_model_text(folder))
        except BundleError:
            old = {}  # none, or none that can be read
        draft = _Draft(folder, data)
        data['weights'] = draft.stage(_POLICY, weights).to_dict()
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


def _kept_pruners(
    folder: Path,
    old: dict[str, Any],
    sha256: str,
    network: PolicyNetwork,
    samplers: Mapping[str, SamplerSpec],
) -> dict[str, Any]:
    """Entries of the replaced bundle's pruners that serve these samplers of this network."""
    kept: dict[str, Any] = {}
    try:
        with malformed(MODEL_FILE):
            same = (
                StoredWeights.from_dict(old['weights']).sha256 == sha256
                and PolicyContract.from_dict(old) == network.contract
                and NetworkSpec.from_dict(old['network']) == network.spec
            )
    except BundleError:
        return kept
    for name in samplers if same else ():
        entry = old['samplers'].get(name)
        try:
            with malformed(MODEL_FILE):
                spec, pruner = _load_sampler(folder, network, name, entry)
        except BundleError:
            continue
        if pruner is not None and spec.scheduler == samplers[name].scheduler:
            kept[name] = entry['pruner']
    return kept


def save_pruner(folder: Path, sampler: str, pruner: AnyPruner, half: bool = True) -> None:
    """Add a sampler's pruner to an existing bundle, or replace it.

    Several processes may save pruners of different samplers at the same time.

    Raises
    ------
    BundleError
        for what `load_bundle` would refuse; the bundle is left as it was.

    """
    read_model_text(folder)
    with locked(folder):
        # It is read under the lock because another process may just have saved its pruner.
        data = _parsed(folder, read_model_text(folder))
        # The network is needed for its sizes alone: on this device it takes no memory and draws
        # no random numbers.
        with malformed(folder / MODEL_FILE), torch.device('meta'):
            network = _network(data)
        draft = _Draft(folder, data)
        draft.add_pruner(sampler, pruner, half)
        draft.write(network, replaced=data)


class _Draft:
    """A model file that is about to be written, and the weights that go with it."""

    def __init__(self, folder: Path, data: dict[str, Any]) -> None:
        self._folder, self._data = folder, data
        self._files: dict[str, bytes] = {}

    def stage(self, stem: str, content: bytes) -> StoredWeights:
        """Have weights written; returns their entry in the model file."""
        entry = stored_weights(self._folder, stem, content)
        self._files[entry.file] = content
        return entry

    def add_pruner(self, sampler: str, pruner: AnyPruner, half: bool) -> None:
        """Give a sampler a pruner; raises BundleError if there is no such sampler."""
        samplers = self._data['samplers']
        if sampler not in samplers:
            raise BundleError(
                f'{self._folder}: sampler: expected one of {", ".join(samplers)}, got {sampler!r}'
            )
        content = serialised(f'pruner of {sampler!r}', pruner, half)
        entry = self.stage(_pruner_stem(sampler), content).to_dict()
        kind = {} if isinstance(pruner, Pruner) else {'kind': _QUERY}
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
            text = '# Model bundle; see CARD.md.\n' + yaml.safe_dump(
                self._data, sort_keys=False, allow_unicode=True, default_flow_style=None
            )
            named = self._named(network, _parsed(self._folder, text))
        for file, content in self._files.items():
            replace_file(self._folder / file, content)
        replace_file(path, text.encode())
        samplers = {*self._data['samplers'], *replaced.get('samplers', {})}
        remove_unnamed(self._folder, {_POLICY, *map(_pruner_stem, samplers)}, named)

    def _named(self, network: PolicyNetwork, saved: dict[str, Any]) -> set[str]:
        """Weight files that the model file names; raises as `load_bundle` would."""
        entries = [StoredWeights.from_dict(saved['weights'])]
        for name, data in saved['samplers'].items():
            _, pruner, _ = _sampler_settings(network, str(name), data)
            entries += [] if pruner is None else [pruner]
        # A name may be a link to another file of the bundle.
        targets = {entry.path(self._folder).name for entry in entries}
        return targets | {entry.file for entry in entries}


def _pruner_stem(sampler: str) -> str:
    return f'pruner_{sampler}'


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
