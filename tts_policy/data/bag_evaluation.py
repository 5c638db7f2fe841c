# SPDX-License-Identifier: Apache-2.0
"""One policy over the ticks of a recording: dense, and sparse at every sparsity asked for.

Every arm is a policy object of its own with its own caches; all draw the same noise, which
depends on the seed and the number of the episode alone. What a tick gave is written to disk in
segments, so that memory stays bounded and an interrupted evaluation goes on where it was.
"""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Iterator, MutableSequence
from concurrent.futures import FIRST_COMPLETED, wait
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from tts_policy.control.images import ImageFit
from tts_policy.data.bag_samples import SampleReader, Topics
from tts_policy.data.reader import BagError, BagLimits, BagReader
from tts_policy.data.replay import RecordedTick, RecordedTicks
from tts_policy.data.worker_processes import worker_processes
from tts_policy.policy.bundle import bundle_digest
from tts_policy.policy.contract import PolicyContract
from tts_policy.policy.policy import Chunk, TestTimeSparsePolicy

SEGMENT_TICKS = 200
WORST_PER_SEGMENT = 4
PICTURE_PIXELS = 320
ENGINES = ('local', 'ray')
POLL_S = 0.2

Progress = Callable[[float], None]


@dataclass(frozen=True)
class EvaluationSpec:
    """What is evaluated and how; sparsities in ascending order."""

    bundle: Path
    sampler: str
    sparsities: tuple[float, ...]
    topics: dict[str, str] = field(default_factory=dict)
    device: str = 'cpu'
    seed: int = 0
    threads: int = 1
    n_execute: int = 0
    image_fit: str = ImageFit.EXACT.value
    limits: BagLimits = field(default_factory=BagLimits)

    def to_dict(self) -> dict[str, Any]:
        """What decides the result, for telling one evaluation from another."""
        return {
            'model_sha256': bundle_digest(self.bundle),
            'sampler': self.sampler,
            'sparsities': list(self.sparsities),
            'topics': self.topics,
            'device': self.device,
            'seed': self.seed,
            'n_execute': self.n_execute,
            'image_fit': self.image_fit,
        }


@dataclass(frozen=True)
class Part:
    """Those episodes of a recording whose number is `index` modulo `of`: any may run anywhere.

    All parts of a recording share one folder.
    """

    bag: Path
    index: int
    of: int
    folder: Path


@dataclass(frozen=True)
class PartOutcome:
    """What became of a part: its problems are one line each."""

    bag: Path
    ticks: int
    problems: list[str]


class SparsityVariants:
    """The dense reference and one policy per sparsity, in this order."""

    def __init__(self, spec: EvaluationSpec) -> None:
        self.spec = spec
        self.sparsities = (0.0, *spec.sparsities)

    @cached_property
    def policies(self) -> list[TestTimeSparsePolicy]:
        """Policies of the reference and of every sparsity; loaded when first needed."""
        spec = self.spec
        return [
            TestTimeSparsePolicy.from_bundle(
                spec.bundle, spec.sampler, spec.device, spec.seed, spec.threads
            )
            for _ in self.sparsities
        ]

    @property
    def contract(self) -> PolicyContract:
        """What the policy sees and commands."""
        return self.policies[0].contract

    def act(self, recorded: RecordedTick) -> list[Chunk]:
        """Chunks of one tick, the dense reference first."""
        tick = recorded.scheduled
        chunks = []
        for policy, sparsity in zip(self.policies, self.sparsities, strict=True):
            if tick.reset is not None:
                policy.reset(self.spec.seed + tick.episode)
            chunks.append(policy.act(tick.observation, sparsity))
        return chunks


class _Segment:
    """Ticks of one episode on their way to a file."""

    def __init__(self) -> None:
        self.columns: dict[str, list[Any]] = {}
        self._pictures: list[tuple[float, int, NDArray[np.uint8]]] = []

    def __len__(self) -> int:
        return len(self.columns.get('stamp_ns', ()))

    def add(self, recorded: RecordedTick, chunks: list[Chunk], camera: str | None) -> None:
        actions = np.stack([chunk.actions for chunk in chunks])
        row: dict[str, Any] = {
            'stamp_ns': recorded.scheduled.stamp_ns,
            'first': recorded.scheduled.reset is not None,
            'skipped': recorded.scheduled.skipped,
            'actions': actions,
            'future': recorded.future,
            'plan': np.stack([chunk.plan for chunk in chunks[1:]]),
        }
        stats = [chunk.stats for chunk in chunks]
        for name in ('sparsity', 'flops', 'dense_flops', 'latency_s', 'oldest_rollout_ticks'):
            row[name] = [getattr(s, name) for s in stats]
        row['mix'] = [list(s.reuse_mix.values()) for s in stats]
        if camera is not None:
            score = float(np.abs(actions[1:] - actions[0]).mean())
            self._keep_picture(score, len(self), recorded.scheduled.observation[camera][-1])
        for name, value in row.items():
            self.columns.setdefault(name, []).append(value)

    def _keep_picture(self, score: float, row: int, image: NDArray[np.uint8]) -> None:
        if len(self._pictures) == WORST_PER_SEGMENT:
            if score <= self._pictures[-1][0]:
                return
            self._pictures.pop()
        scale = PICTURE_PIXELS / max(image.shape)
        if scale < 1:
            image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        self._pictures.append((score, row, image.copy()))
        self._pictures.sort(key=lambda picture: -picture[0])

    def write(self, path: Path) -> None:
        """Write whole or not at all."""
        arrays = {name: np.array(values) for name, values in self.columns.items()}
        arrays['worst_rows'] = np.array([row for _, row, _ in self._pictures], np.int64)
        arrays['worst_images'] = np.array([image for _, _, image in self._pictures], np.uint8)
        partial = path.with_suffix('.tmp')
        with partial.open('wb') as file:
            np.savez_compressed(file, **arrays)
        partial.replace(path)


class _EpisodeFiles:
    """Segments of a bag: `e000003_s0000.npz`, the last one of an episode ending in `_end`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._done = {int(p.name[1:7]) for p in folder.glob('e*_end.npz')}
        self._episode = -1
        self._numbers: Iterator[int] = count()
        self._segment = _Segment()

    def has(self, episode: int) -> bool:
        """Whether all of an episode is there from an earlier run."""
        return episode in self._done

    def add(self, recorded: RecordedTick, chunks: list[Chunk], camera: str | None) -> None:
        """Append a tick; a new episode closes the one before."""
        episode = recorded.scheduled.episode
        if episode != self._episode:
            self.close(complete=True)
            self._episode = episode
            self._numbers = count()
            for stale in self._folder.glob(f'e{episode:06d}_*'):
                stale.unlink()
        elif len(self._segment) == SEGMENT_TICKS:
            self._flush('')
        self._segment.add(recorded, chunks, camera)

    def close(self, complete: bool) -> None:
        """Write what is left; an episode cut short by damage is not complete."""
        if len(self._segment):
            self._flush('_end' if complete else '')

    def _flush(self, mark: str) -> None:
        name = f'e{self._episode:06d}_s{next(self._numbers):04d}{mark}.npz'
        self._segment.write(self._folder / name)
        self._segment = _Segment()


def evaluate_part(variants: SparsityVariants, part: Part, progress: Progress) -> PartOutcome:
    """Evaluate the episodes of a part that are not there yet, and write them to its folder.

    `progress` is told the recorded seconds that went by.
    """
    done = part.folder / f'done_{part.index}_of_{part.of}.json'
    if done.is_file():
        kept = json.loads(done.read_text())
        progress(kept['recorded_s'])
        return PartOutcome(part.bag, kept['ticks'], [])
    spec, files, problems = variants.spec, _EpisodeFiles(part.folder), []
    ticks, end_ns, complete = 0, None, False
    start_ns = 0
    try:
        samples = SampleReader(
            BagReader(part.bag, spec.limits),
            variants.contract,
            Topics.of(variants.contract, spec.topics),
            ImageFit(spec.image_fit),
        )
        recorded_ticks = _recorded_ticks(samples, spec)
        camera = next(iter(samples.topics.cameras), None)
        for recorded in recorded_ticks:
            stamp_ns = recorded.scheduled.stamp_ns
            start_ns = start_ns or stamp_ns
            progress((stamp_ns - (end_ns or stamp_ns)) * 1e-9)
            end_ns, ticks = stamp_ns, ticks + 1
            episode = recorded.scheduled.episode
            if episode % part.of == part.index and not files.has(episode):
                files.add(recorded, variants.act(recorded), camera)
        complete = True
        problems = samples.problems()
        if ticks == 0:
            reason = recorded_ticks.schedule.waiting_for or 'too few messages that fit'
            problems.append(f'{part.bag}: expected ticks, got none: {reason}')
    except BagError as error:
        problems = [str(error)]
    finally:
        files.close(complete)
    if not problems:
        summary = {'ticks': ticks, 'recorded_s': ((end_ns or 0) - start_ns) * 1e-9}
        done.write_text(json.dumps(summary))
    return PartOutcome(part.bag, ticks, problems)


def _recorded_ticks(samples: SampleReader, spec: EvaluationSpec) -> RecordedTicks:
    contract = samples.contract
    n_execute = spec.n_execute or contract.action.execute
    period_ns = round(contract.observation.period_s * 1e9)
    return RecordedTicks(samples, n_execute * period_ns)


def run_parts(
    spec: EvaluationSpec, parts: list[Part], engine: str, processes: int, progress: Progress
) -> Iterator[PartOutcome]:
    """Outcomes as they come; `progress` is told the recorded seconds that went by.

    Raises
    ------
    BagError
        if Ray is asked for and not installed.
    ChildProcessError
        if a process died.

    """
    if engine == 'ray':
        yield from _run_ray(spec, parts, progress)
    elif processes == 1:
        variants = SparsityVariants(spec)
        for part in parts:
            yield evaluate_part(variants, part, progress)
    else:
        yield from _run_pool(spec, parts, processes, progress)


class _Worker:
    """One process: policies made once; the seconds that went by in each part are shared."""

    variants: SparsityVariants
    seconds: MutableSequence[float]

    @classmethod
    def start(cls, spec: EvaluationSpec, seconds: MutableSequence[float]) -> None:
        cls.variants, cls.seconds = SparsityVariants(spec), seconds

    @classmethod
    def run(cls, number: int, part: Part) -> PartOutcome:
        def progress(seconds: float) -> None:
            cls.seconds[number] += seconds

        return evaluate_part(cls.variants, part, progress)


def _run_pool(
    spec: EvaluationSpec, parts: list[Part], processes: int, progress: Progress
) -> Iterator[PartOutcome]:
    # Without a lock, of which a killed process would never let go: each number has one writer.
    seconds = multiprocessing.RawArray('d', len(parts))
    shown_s = 0.0
    with worker_processes(min(processes, len(parts)), _Worker.start, (spec, seconds)) as workers:
        pending = {workers.submit(_Worker.run, *job) for job in enumerate(parts)}
        while pending:
            done, pending = wait(pending, POLL_S, FIRST_COMPLETED)
            progress(sum(seconds) - shown_s)
            shown_s = sum(seconds)
            for future in done:
                yield future.result()


def _run_ray(spec: EvaluationSpec, parts: list[Part], progress: Progress) -> Iterator[PartOutcome]:
    """The folder of the results must be one that every node of the cluster sees."""
    try:
        import ray
    except ImportError:
        raise BagError('engine ray: expected the package ray, got none') from None
    ray.init(ignore_reinit_error=True, log_to_driver=False)
    remote = ray.remote(_evaluate_alone)
    pending = [remote.remote(spec, part) for part in parts]
    while pending:
        ready, pending = ray.wait(pending)
        for outcome, seconds in ray.get(ready):
            progress(seconds)
            yield outcome


def _evaluate_alone(spec: EvaluationSpec, part: Part) -> tuple[PartOutcome, float]:
    seconds: list[float] = []
    outcome = evaluate_part(SparsityVariants(spec), part, seconds.append)
    return outcome, sum(seconds)
