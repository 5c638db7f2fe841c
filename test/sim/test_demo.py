# SPDX-License-Identifier: Apache-2.0
"""The demo as a user runs it, in a process of its own, with an untrained bundle."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip('rclpy', reason='rclpy is not installed')
pytest.importorskip('robosuite', reason='robosuite is not installed')
pytest.importorskip('torch', reason='torch is not installed')

from processes import BUSY_FACTOR, END_LIMIT_S, child_environment, wait_until

from tts_policy.policy.sampler import DIFFUSION_SAMPLERS
from tts_policy.sim.panda import FINGER_OPEN_M, HOME_RAD, PANDA_CONTRACT

pytestmark = pytest.mark.slow


FRAMES = 25  # of an episode of 1.25 s
TICKS = 3
STEEP = DIFFUSION_SAMPLERS['ddpm100'].recommended_sparsity
VARIANTS = ('sparse', 'dense', 'sparse_ddpm100')


@pytest.fixture(scope='module')
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write an untrained bundle for the simulated robot, small enough to be quick.

    Its actions stay near the pose at the start, as the limits of the demo ask.
    """
    import torch

    from tts_policy.policy.bundle import load_bundle, save_bundle, save_random_bundle
    from tts_policy.policy.network import NetworkSpec

    folder = tmp_path_factory.mktemp('lift_bundle')
    network = NetworkSpec(width=32, layers=2, heads=2)
    save_random_bundle(folder, PANDA_CONTRACT, DIFFUSION_SAMPLERS, network)
    made = load_bundle(folder)
    start = torch.tensor([*HOME_RAD, FINGER_OPEN_M / 2])
    made.network.action_normalizer.fit(start - 0.01, start + 0.01)
    pruners = {name: pruner for name in made.samplers if (pruner := made.sampler(name)[1])}
    save_bundle(folder, 'near_home', made.network, DIFFUSION_SAMPLERS, pruners)
    return folder


class DemoRun:
    """One demo process; its children are known by the log folder in their environment."""

    def __init__(self, folder: Path, *arguments: object) -> None:
        self.out = folder / 'out'
        self._marker = f'ROS_LOG_DIR={folder}'.encode()
        self._process = subprocess.Popen(
            [sys.executable, '-m', 'tts_policy.sim.demo.command', '--out', self.out]
            + [str(argument) for argument in arguments],
            env=child_environment(ROS_LOG_DIR=str(folder)),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def finish(self, limit_s: float) -> tuple[int, str, str]:
        """Wait for the end; returns status, output and error output."""
        output, errors = self._process.communicate(timeout=limit_s)
        return self._process.returncode, output, errors

    def nodes(self) -> dict[str, int]:
        """Process ids of the nodes that are running, by their module."""
        found = {}
        for process in Path('/proc').iterdir():
            try:
                environment = (process / 'environ').read_bytes()
                words = (process / 'cmdline').read_bytes().decode().split('\0')
            except (OSError, NotADirectoryError):
                continue
            if self._marker in environment.split(b'\0') and int(process.name) != self._process.pid:
                found[next((word for word in words if '_node' in word), 'child')] = int(
                    process.name
                )
        return found

    def interrupt(self) -> None:
        """Press Ctrl-C."""
        self._process.send_signal(signal.SIGINT)

    def close(self) -> None:
        """End whatever is left."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        for pid in self.nodes().values():
            os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope='module')
def start_demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., DemoRun]]:
    """Start demos; what is left of them is ended after the module."""
    runs: list[DemoRun] = []

    def start(*arguments: object) -> DemoRun:
        runs.append(DemoRun(tmp_path_factory.mktemp('demo'), *arguments))
        return runs[-1]

    yield start
    for run in runs:
        run.close()


@pytest.fixture(scope='module')
def finished(start_demo: Callable[..., DemoRun], bundle: Path) -> tuple[Path, str]:
    """Run one episode of 1.25 s in every variant; gives the output folder and what was printed."""
    run = start_demo(
        '--bundle', bundle, '--episodes', 1, '--dense-episodes', 1, '--episode-s', 1.25
    )
    status, output, errors = run.finish(240)
    assert status == 0, errors
    assert not run.nodes()
    return run.out, output


@pytest.fixture(scope='module')
def summary(finished: tuple[Path, str]) -> dict[str, Any]:
    """The parsed summary.json."""
    parsed: dict[str, Any] = json.loads((finished[0] / 'summary.json').read_text())
    return parsed


def test_the_summary_holds_the_numbers_of_every_variant(summary: dict[str, Any]) -> None:
    for name in VARIANTS:
        variant = summary[name]
        assert (variant['episodes'], variant['successes'], variant['ticks']) == (1, 0, TICKS)
        assert 0 < variant['latency_ms']['p50'] <= variant['latency_ms']['p95']
        assert 0 <= variant['deadline_misses'] <= TICKS
        assert variant['refused_chunks'] == 0
        (episode,) = variant['per_episode']
        assert (episode['seed'], episode['frames']) == (200_000, FRAMES)
        assert episode['trajectories'] == TICKS
    assert summary['setup']['deadline_ms'] == 400.0


def test_sparsity_and_flops_are_those_that_ran(summary: dict[str, Any]) -> None:
    sparse, dense, steep = (summary[name] for name in VARIANTS)
    assert (dense['sparsity'], dense['flops_ratio'], dense['flops_ratio_steady']) == (0, 1, 1)
    assert sparse['sparsity'] == pytest.approx(0.8, abs=0.01)
    assert steep['sparsity'] == pytest.approx(STEEP, abs=0.01)
    for variant in (sparse, steep):
        # The first tick of an episode is dense, the other two are not.
        assert variant['sparsity_all_ticks'] == pytest.approx(variant['sparsity'] * 2 / 3)
        assert variant['flops_ratio'] == pytest.approx((1 + 2 * variant['flops_ratio_steady']) / 3)
        assert variant['flops_ratio_steady'] < 1


def test_the_table_and_a_line_per_episode_are_printed(finished: tuple[Path, str]) -> None:
    output = finished[1]
    assert output.count('seed 200000  failed (time limit) after 1.25 s, 3 ticks') == len(VARIANTS)
    for title in (
        'sparse DDIM-10 at 80 %',
        'dense DDPM-100',
        f'sparse DDPM-100 at {100 * STEEP:g} %',
    ):
        rows = [line.split() for line in output.splitlines() if line.startswith(title)]
        assert any('0/1' in row and str(TICKS) in row for row in rows), title
    assert 'Deadlines missed on this machine, a chunk every 400 ms' in output


def test_the_plan_is_drawn_in_the_colours_of_its_classes(finished: tuple[Path, str]) -> None:
    from matplotlib.colors import to_rgb
    from PIL import Image

    from tts_policy.policy.plan import REUSE_COLOURS, Reuse

    pixels = np.asarray(Image.open(finished[0] / 'plan.png').convert('RGB')) / 255
    shares = {
        kind: float((np.abs(pixels - to_rgb(colour)).max(axis=2) < 0.01).mean())
        for kind, colour in zip(Reuse, REUSE_COLOURS, strict=True)
    }
    assert min(shares.values()) > 0, 'the legend names every class'
    assert shares[Reuse.COMPUTE] > 0.02
    assert shares[Reuse.TIMESTEP] > 2 * shares[Reuse.COMPUTE], (
        'an untrained plan reuses earlier steps'
    )


def test_the_video_shows_every_frame_and_moves(finished: tuple[Path, str]) -> None:
    import cv2
    from PIL import Image

    from tts_policy.sim.demo.video import GIF_BYTES

    video = cv2.VideoCapture(str(finished[0] / 'demo.mp4'))
    frames = []
    while (read := video.read())[0]:
        frames.append(read[1].astype(np.int16))
    assert len(frames) == FRAMES + 20
    assert frames[0].shape == (720, 1280, 3)
    left, right = np.s_[90:560, 45:515], np.s_[480:630, 622:1244]
    assert frames[0][left].std() > 20, 'the camera sees something'
    assert np.abs(frames[FRAMES - 1] - frames[FRAMES // 2]).mean() > 0.5
    assert np.abs(frames[FRAMES - 1][right] - frames[0][right]).mean() > 20, 'the plan appears'

    gif = finished[0] / 'demo.gif'
    assert gif.stat().st_size < GIF_BYTES
    with Image.open(gif) as picture:
        assert picture.size == (800, 450)
        assert FRAMES // 2 < picture.n_frames <= FRAMES


def test_a_missing_bundle_is_named_before_anything_is_started(
    start_demo: Callable[..., DemoRun], tmp_path: Path
) -> None:
    status, _, errors = start_demo('--bundle', tmp_path / 'none').finish(30)
    assert status == 1
    assert errors == f'demo: bundle: expected {tmp_path}/none/model.yaml, got nothing\n'


@pytest.mark.fault
def test_a_bundle_the_node_refuses_ends_the_demo_with_its_reason(
    start_demo: Callable[..., DemoRun], bundle: Path, tmp_path: Path
) -> None:
    for file in bundle.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (weights,) = tmp_path.glob('policy*.safetensors')
    weights.write_bytes(weights.read_bytes()[:-1] + b'?')
    run = start_demo('--bundle', tmp_path)
    status, _, errors = run.finish(120)
    assert status == 1
    first = errors.splitlines()[0]
    assert first.startswith('demo: policy_node could not be started: configure failed: ')
    assert 'sha256' in first
    assert not run.nodes()


@pytest.mark.fault
def test_a_node_that_dies_ends_the_demo_with_its_last_words(
    start_demo: Callable[..., DemoRun], bundle: Path
) -> None:
    run = start_demo('--bundle', bundle)
    ready = run.out / 'log' / 'robot_node.log'
    wait_until(lambda: ready.exists() and 'ready' in ready.read_text(), 60, 'robot_node')
    os.kill(run.nodes()['tts_policy.sim.robot_node'], signal.SIGKILL)
    status, _, errors = run.finish(BUSY_FACTOR * 20)
    assert status == 1
    assert 'demo: robot_node ended with status -9' in errors
    assert 'held until ~/reset' in errors
    assert not run.nodes()


def test_ctrl_c_ends_everything_within_two_seconds(
    start_demo: Callable[..., DemoRun], bundle: Path
) -> None:
    run = start_demo('--bundle', bundle, '--episodes', 100)
    ended = run.out / 'log' / 'robot_node.log'
    wait_until(lambda: ended.exists() and 'time limit' in ended.read_text(), 90, 'an episode')
    assert len(run.nodes()) == 2
    began_s = time.monotonic()
    run.interrupt()
    status, _, errors = run.finish(BUSY_FACTOR * 10)
    assert time.monotonic() - began_s < BUSY_FACTOR * END_LIMIT_S
    assert status == 130, errors
    assert errors.endswith('demo: interrupted, all processes ended\n')
    assert not run.nodes()
