# SPDX-License-Identifier: Apache-2.0
"""Would a budget of its own for every tick beat the fixed one at equal mean cost?

    python bench/adaptive_budget.py models/panda_lift data/lift --sparsities .6 .7 .8

Of held-out ticks, the half that asks for more gets the densest of three sparsities, the rest the
sparsest; the fixed budget is the one between. What a tick asks is told by how far the observation
tokens moved since the last tick (`change`), by nothing (`random`), or by the gain itself, measured
beforehand, which no policy can know (`oracle`). Caches are carried over the ticks of a sequence.
Prints one JSON object: mean and 95th percentile of the L1 action error (normalised) of a tick.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from tts_policy.data.demonstrations import find_demonstrations, load_windows
from tts_policy.policy.bundle import load_bundle
from tts_policy.policy.feature_cache import FeatureCache
from tts_policy.policy.plan import Plan, make_plan
from tts_policy.policy.pruner import Pruner
from tts_policy.policy.sampler import SamplerSpec
from tts_policy.train.plan_comparison import sparse_actions
from tts_policy.train.tick_sequences import DenseTeacher, TickSequence, tick_sequences

# Whether tick r of sequence n gets the larger budget.
Choice = Callable[[int, int], bool]


class Comparison:
    """Sequences with their dense actions, run with one sparsity or two."""

    def __init__(
        self,
        teacher: DenseTeacher,
        spec: SamplerSpec,
        pruner: Pruner,
        sequences: list[TickSequence],
    ) -> None:
        self._teacher, self._spec, self._pruner = teacher, spec, pruner
        self._sequences = sequences
        self._targets = [teacher.actions(s) for s in tqdm(sequences, desc='dense targets')]

    def errors(self, dense: float, sparse: float, choice: Choice) -> NDArray[np.float64]:
        """Error [S, R - 1] of every tick after the first."""
        rows = []
        for n, sequence in enumerate(tqdm(self._sequences, desc=f'{dense} or {sparse}')):

            def make(cache: FeatureCache, tokens: Tensor, tick: int, n: int = n) -> Plan:
                sparsity = dense if choice(n, tick) else sparse
                logits = self._pruner.table(sparsity).detach().numpy()
                valid = cache.rollout_valid(self._spec.max_rollout_age)
                kinds = self._teacher.denoiser.spec.stack.kinds
                return make_plan(logits, sparsity, valid, self._spec.force_first_step, kinds)

            cache = self._teacher.first_tick(sequence)
            actions, _ = sparse_actions(self._teacher, sequence, cache, make)
            rows.append((actions - self._targets[n][1:]).abs().mean(dim=(1, 2)).numpy())
        return np.array(rows, np.float64)

    def changes(self) -> NDArray[np.float64]:
        """How far the observation tokens moved before every tick after the first, [S, R - 1]."""
        denoiser = self._teacher.denoiser
        with torch.no_grad():
            tokens = [denoiser.observation_tokens(s.features) for s in self._sequences]
        return np.array([t.diff(dim=0).flatten(1).norm(dim=1).numpy() for t in tokens])


def _upper_half(signal: NDArray[np.float64]) -> Choice:
    chosen = np.zeros(signal.size, bool)
    chosen[np.argsort(-signal, axis=None, kind='stable')[: signal.size // 2]] = True
    table = chosen.reshape(signal.shape)
    return lambda n, tick: bool(table[n, tick - 1])


def main() -> None:
    """Run the comparison of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('bundle', type=Path)
    parser.add_argument('bags', type=Path, nargs='+')
    parser.add_argument('--sampler', default='ddim10')
    parser.add_argument('--sparsities', type=float, nargs=3, default=[0.6, 0.7, 0.8])
    parser.add_argument('--sequences', type=int, default=60)
    parser.add_argument('--ticks', type=int, default=5)
    parser.add_argument('--skip', type=int, default=120, help='bags the pruner may have seen')
    args = parser.parse_args()
    torch.set_num_threads(1)
    bundle = load_bundle(args.bundle)
    spec, pruner = bundle.sampler(args.sampler)
    if not isinstance(pruner, Pruner):
        parser.error(f'{args.sampler}: a pruner with tables expected, got {type(pruner).__name__}')
    network = bundle.network.eval().requires_grad_(False)
    found = find_demonstrations(args.bags, network.contract, {})
    windows = load_windows(found[args.skip : args.skip + args.sequences])
    generator = torch.Generator().manual_seed(0)
    sequences = tick_sequences(network, windows, args.sequences, args.ticks, generator)
    whole = [s for s in sequences if len(s.features) == args.ticks]
    comparison = Comparison(DenseTeacher(network, spec), spec, pruner, whole)
    dense, middle, sparse = sorted(args.sparsities)
    fixed = {s: comparison.errors(s, s, lambda n, tick: True) for s in (dense, middle, sparse)}
    random = np.random.default_rng(0).random(fixed[middle].shape)
    signals = {
        'change': comparison.changes(),
        'random': random,
        'oracle': fixed[sparse] - fixed[dense],
    }
    errors = {f'fixed {s}': e for s, e in fixed.items()}
    for name, signal in signals.items():
        errors[name] = comparison.errors(dense, sparse, _upper_half(signal))
    result = {
        name: {'mean': float(e.mean()), 'p95': float(np.percentile(e, 95))}
        for name, e in errors.items()
    }
    print(json.dumps({'ticks': int(fixed[middle].size), 'l1_error': result}, indent=2))


if __name__ == '__main__':
    main()
