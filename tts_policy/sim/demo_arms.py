# SPDX-License-Identifier: Apache-2.0
"""What the demo runs: the arms to compare, read from the bundle's model.yaml.

The demo process only drives and draws; it reads the few facts it needs without loading weights,
and thus without torch. The policy node judges the bundle as a whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tts_policy.policy.contract import PolicyContract
from tts_policy.sim.demo_process import DemoError

DENSE_SAMPLER = 'ddpm100'


@dataclass(frozen=True)
class Sampler:
    """A sampler of the bundle; `label` is how people call it, for instance DDIM-10."""

    name: str
    label: str
    steps: int
    recommended_sparsity: float


@dataclass(frozen=True)
class Arm:
    """One way to run the policy, and how often; `key` names it in summary.json."""

    key: str
    sampler: Sampler
    sparsity: float
    episodes: int

    @property
    def title(self) -> str:
        """Name for tables and pictures."""
        if self.sparsity == 0.0:
            return f'dense {self.sampler.label}'
        return f'sparse {self.sampler.label} at {100 * self.sparsity:g} %'


@dataclass(frozen=True)
class DemoBundle:
    """The facts of a bundle that the demo needs."""

    path: Path
    contract: PolicyContract
    samplers: dict[str, Sampler]

    @property
    def deadline_s(self) -> float:
        """Time from one tick to the next, by which a chunk has to be there."""
        return self.contract.action.execute * self.contract.observation.period_s

    def deadlines(self, duration_s: float) -> int:
        """How many deadlines pass in an episode on the real clock."""
        observation = self.contract.observation
        first_tick_s = (observation.steps - 1) * observation.period_s
        return max(0, int((duration_s - first_tick_s + 1e-6) / self.deadline_s))

    def sampler(self, name: str) -> Sampler:
        """Sampler of that name; raises DemoError naming those there are."""
        if name not in self.samplers:
            raise DemoError(f'sampler must be one of {list(self.samplers)}, got {name!r}')
        return self.samplers[name]


def read_bundle(path: Path) -> DemoBundle:
    """Read model.yaml; raises DemoError naming the file and the reason."""
    file = path / 'model.yaml'
    if not file.is_file():
        raise DemoError(f'bundle expected at {file}, got nothing')
    try:
        data = yaml.safe_load(file.read_text(encoding='utf-8'))
        samplers = {name: _sampler(name, entry) for name, entry in data['samplers'].items()}
        return DemoBundle(path, PolicyContract.from_dict(data), samplers)
    except (
        yaml.YAMLError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
    ) as error:
        reason = ' '.join(str(error).split())
        raise DemoError(f'{file}: {type(error).__name__}: {reason}') from error


def _sampler(name: str, entry: dict[str, Any]) -> Sampler:
    steps = int(entry['scheduler']['steps'])
    label = f'{str(entry["scheduler"]["kind"]).upper()}-{steps}'
    recommended = float(entry['recommended_sparsity']) if 'pruner' in entry else 0.0
    return Sampler(name, label, steps, recommended)


def choose_arms(
    bundle: DemoBundle, sampler: str, sparsity: float | None, episodes: int, dense_episodes: int
) -> list[Arm]:
    """Arms in the order in which they run; raises DemoError for what the bundle cannot do.

    The third one needs no start of its own: it is the dense node with its sparsity raised live.
    """
    sparse, dense = bundle.sampler(sampler), bundle.sampler(DENSE_SAMPLER)
    value = sparse.recommended_sparsity if sparsity is None else sparsity
    limit = 1.0 - 1.0 / sparse.steps
    if not 0.0 < value <= limit + 1e-9:
        raise DemoError(
            f'sparsity must be above 0 and at most {limit:g} (1 - 1/{sparse.steps} steps) for '
            f'{sampler!r}, got {value:g}'
        )
    if episodes < 1 or dense_episodes < 1:
        raise DemoError(
            f'episodes and dense-episodes must be at least 1, got {episodes} and {dense_episodes}'
        )
    arms = [Arm('sparse', sparse, value, episodes), Arm('dense', dense, 0.0, dense_episodes)]
    if dense.recommended_sparsity > 0.0 and dense.name != sparse.name:
        arms.append(Arm(f'sparse_{dense.name}', dense, dense.recommended_sparsity, 1))
    return arms
