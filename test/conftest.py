# SPDX-License-Identifier: Apache-2.0
"""Fixtures shared by all tests: a private ROS domain, child processes, a small random bundle.

Everything ROS runs in a domain of this test run's own and on this machine only. Modules that need
neither ROS nor torch import nothing of it: the imports are inside the fixtures.
"""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import tts_policy.sim  # noqa: F401  (chooses MuJoCo's renderer before anything imports it)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from processes import RosProcess
    from rclpy.node import Node

    from tts_policy.policy.contract import PolicyContract

# Domains above 101 use ports that Linux also gives to clients.
DOMAIN_ID = str(1 + os.getpid() % 100)
JOINTS = ('shoulder', 'elbow', 'finger')

os.environ.update(
    ROS_DOMAIN_ID=DOMAIN_ID,
    ROS_AUTOMATIC_DISCOVERY_RANGE='LOCALHOST',
    ROS_PYTHON_CHECK_FIELDS='1',
    OMP_NUM_THREADS='1',
)
os.environ.setdefault('AMENT_PREFIX_PATH', sys.prefix)
# Modules that tests share; test folders are no packages.
for folder in ('node', 'data', 'train', 'policy', 'convert', 'control'):
    sys.path.insert(0, str(Path(__file__).parent / folder))


@pytest.fixture
def start_process() -> Iterator[Callable[..., RosProcess]]:
    """Start modules as processes; all are stopped when the test ends."""
    from processes import RosProcess

    started: list[RosProcess] = []

    def start(module: str, *arguments: str, **environment: str) -> RosProcess:
        started.append(RosProcess(module, *arguments, **environment))
        return started[-1]

    yield start
    for process in reversed(started):
        process.stop()


@pytest.fixture(scope='session')
def ros() -> Iterator[None]:
    """Initialise rclpy for the test process."""
    rclpy = pytest.importorskip('rclpy', reason='rclpy is not installed')
    rclpy.init()
    yield
    rclpy.try_shutdown()


@pytest.fixture(scope='module')
def test_node(ros: None) -> Iterator[Node]:
    """Give a node of the test process, spun in a thread of its own."""
    from rclpy.executors import SingleThreadedExecutor
    from rclpy.node import Node

    executor = SingleThreadedExecutor()
    ended = threading.Event()

    def spin() -> None:
        while not ended.is_set():
            executor.spin_once(timeout_sec=0.05)

    thread = threading.Thread(target=spin, daemon=True)

    class SpunNode(Node):
        """Only its thread destroys: a spin that finds something gone ends with InvalidHandle."""

        def destroy_publisher(self, publisher: Any) -> bool:
            return self._between_waits(super().destroy_publisher, publisher)

        def destroy_subscription(self, subscription: Any) -> bool:
            return self._between_waits(super().destroy_subscription, subscription)

        def _between_waits(self, destroy: Callable[[Any], bool], entity: Any) -> bool:
            if not thread.is_alive() or threading.current_thread() is thread:
                return destroy(entity)
            done = threading.Event()
            task = executor.create_task(destroy, entity)
            task.add_done_callback(lambda _: done.set())
            assert done.wait(60), 'the thread of the test node does not spin any more'
            return bool(task.result())

    node = SpunNode('test_node')
    executor.add_node(node)
    thread.start()
    yield node
    ended.set()
    thread.join()
    executor.shutdown()
    node.destroy_node()


@pytest.fixture(scope='session')
def small_contract() -> PolicyContract:
    """One 32 x 24 camera, two arm joints and a finger, 20 Hz."""
    from tts_policy.policy.contract import ActionSpec, CameraSpec, ObservationSpec, PolicyContract

    return PolicyContract(
        ObservationSpec((CameraSpec('camera', 24, 32),), JOINTS, steps=2, period_s=0.05),
        ActionSpec(JOINTS, horizon=16, execute=8, offset_steps=1),
    )


@pytest.fixture(scope='session')
def small_bundle(small_contract: PolicyContract, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write an untrained bundle of that contract, small enough for a tick in milliseconds."""
    from tts_policy.policy.bundle import save_random_bundle
    from tts_policy.policy.network import NetworkSpec
    from tts_policy.policy.sampler import SamplerSpec
    from tts_policy.policy.schedulers.scheduler import SchedulerSpec

    folder = tmp_path_factory.mktemp('bundle')
    samplers = {
        'ddim10': SamplerSpec(SchedulerSpec('ddim', 10), recommended_sparsity=0.8),
        'ddpm100': SamplerSpec(SchedulerSpec('ddpm', 100), recommended_sparsity=0.95),
    }
    network = NetworkSpec(width=32, layers=2, heads=2)
    save_random_bundle(folder, small_contract, samplers, network, seed=0)
    return folder


@pytest.fixture(scope='session')
def bags(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of three recordings."""
    from bags import Recording

    from tts_policy.policy.contract import CONTRACT_FILE, write_contract
    from tts_policy.sim.panda import PANDA_CONTRACT

    folder = tmp_path_factory.mktemp('bags')
    for n in range(3):
        Recording(frames=20).write(folder / f'episode_{n}')
    write_contract(folder / CONTRACT_FILE, PANDA_CONTRACT)
    return folder


@pytest.fixture(scope='session')
def bundle(bags: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bundle of a policy trained for six steps, in the folder of the run; to be copied."""
    import torch
    from small_training import SMALL

    from tts_policy.train import train_policy

    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp('policy')
    steps = ['--steps', '6', '--encoder-steps', '2']
    assert train_policy.main([str(bags), '--out', str(out), *steps, *SMALL]) == 0
    return out / 'bundle'


@pytest.fixture(scope='session')
def world() -> Iterator[Any]:
    """One Lift world for all tests; each test resets it."""
    pytest.importorskip('robosuite', reason='robosuite is not installed')
    from tts_policy.sim.tasks.lift import LiftWorld

    with LiftWorld() as lift:
        yield lift
