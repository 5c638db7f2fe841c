# SPDX-License-Identifier: Apache-2.0
"""The policy node with a policy that does wrong on demand: `~/fault` says what.

Inference is that of the bundle; its chunk, random in an untrained bundle, is replaced by a slow
motion away from the measured state, so that limits can be tight, and spoiled then.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from rclpy.logging import get_logger
from std_msgs.msg import String

from tts_policy.node.policy_node import PolicyNode
from tts_policy.node.process import run_node
from tts_policy.node.sinks import TopicSink
from tts_policy.policy.policy import TestTimeSparsePolicy

if TYPE_CHECKING:
    from collections.abc import Callable

# Joints of the small bundle: shoulder, elbow, finger.
PACE = np.array([0.001, 0.0005, 0.0])


def _zigzag(actions: np.ndarray) -> np.ndarray:
    return actions + 0.02 * (np.arange(len(actions)) % 2)[:, None]


SPOILED: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    'nan': lambda actions: np.where(np.arange(len(actions))[:, None] == 9, np.nan, actions),
    'inf': lambda actions: np.where(np.arange(len(actions))[:, None] == 14, np.inf, actions),
    'outside': lambda actions: actions + np.linspace(0, 0.7, len(actions))[:, None] * [1, 0, 0],
    'fast': lambda actions: actions + np.arange(len(actions))[:, None] * [0, 0.0512, 0],
    'jump': lambda actions: actions + [0.3, 0.0, 0.0],
    'zigzag': _zigzag,
    'sweep': lambda actions: actions + np.arange(1, len(actions) + 1)[:, None] * [0.005, 0, 0],
    'columns': lambda actions: actions[:, :2],
    'empty': lambda actions: actions[:0],
}


class FaultyPolicy(TestTimeSparsePolicy):
    """Faults: a name of SPOILED, `stall SECONDS` (once), `slow SECONDS`, `hang`, `raise`.

    `publish` hangs after the policy, where its chunk is delivered.
    """

    __test__ = False
    fault = ''
    released = threading.Event()

    def act(self, window: Any, sparsity: float, committed: Any = None) -> Any:
        """Infer, then do what the fault says."""
        chunk = super().act(window, sparsity, committed)
        steps = np.arange(1, len(chunk.actions) + 1)[:, None]
        actions = np.asarray(window['joints'][-1]) + steps * PACE
        kind, _, seconds = FaultyPolicy.fault.partition(' ')
        if kind == 'stall':
            FaultyPolicy.fault = ''
        if kind in ('stall', 'slow'):
            time.sleep(float(seconds))
        elif kind == 'hang':
            FaultyPolicy.released.wait(60.0)
        elif kind == 'raise':
            raise RuntimeError('out of memory')
        return replace(chunk, actions=SPOILED.get(kind, lambda same: same)(actions))


def load(
    path: str,
    sampler: str,
    device: str,
    seed: int,
    threads: int,
    engine: str,
    sparsity: float | None,
) -> tuple[FaultyPolicy, float]:
    """Load the bundle within LOAD_S seconds; nothing is wrong with it yet."""
    get_logger('faulty_node').info('loading')
    time.sleep(float(os.environ.get('LOAD_S', '0')))
    policy = FaultyPolicy.from_bundle(path, sampler, device, seed, threads, engine)
    return policy, 0.01


class FaultyNode(PolicyNode):
    """Hears of faults."""

    def __init__(self) -> None:
        super().__init__(load=load)
        self.create_subscription(String, '~/fault', self._on_fault, 10)

    def _on_fault(self, message: String) -> None:
        FaultyPolicy.fault = message.data
        if message.data in ('hang', 'publish'):
            FaultyPolicy.released.clear()
        else:
            FaultyPolicy.released.set()


def hanging_send(sink: TopicSink, trajectory: Any) -> None:
    """Publish, unless the fault says that the inference thread hangs in doing so."""
    if FaultyPolicy.fault == 'publish' and threading.current_thread().name == 'inference':
        FaultyPolicy.released.wait(60.0)
    send(sink, trajectory)


send, TopicSink.send = TopicSink.send, hanging_send  # type: ignore[method-assign]

if __name__ == '__main__':
    sys.exit(run_node(FaultyNode, 'tts_policy'))
