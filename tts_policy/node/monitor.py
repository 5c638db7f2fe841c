# SPDX-License-Identifier: Apache-2.0
"""What a node tells about itself: faults into log and report, tick statistics, /diagnostics."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from tts_policy.node import diagnostics
from tts_policy.node.interface import DIAGNOSTICS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rclpy.node import Node

    from tts_policy.node.worker import InferenceWorker

# What stands still for so many looks in a row is told: the first frame never has a window.
WAITS_BEFORE_WARNING = 8
DISCOVERY_S = 0.5


class Monitor:
    """Faults and statistics of one node, and the report made of them.

    `failure` is a reason that stays in the report until the next configure, or an activate that
    succeeds.
    """

    def __init__(self, node: Node) -> None:
        self.statistics = diagnostics.TickStatistics()
        self.failure: str | None = None
        self._node = node
        self._faults = diagnostics.Faults()
        self._active_since_s = 0.0
        self._waits = 0
        topic = DIAGNOSTICS
        self._publisher = node.create_publisher(topic.kind, topic.name, topic.qos)

    def begin(self) -> None:
        """Start anew: a new configuration."""
        self.statistics = diagnostics.TickStatistics()
        self.failure = None
        self._faults.clear()

    def activated(self) -> None:
        """Forget why the node was not active; be patient with missing input for a while."""
        self.failure = None
        self._active_since_s = time.monotonic()
        self._waits = 0

    def error(self, subject: str, reason: str) -> None:
        """Report something that stops the arm; logged at most every few seconds."""
        if self._faults.raise_(diagnostics.ERROR, subject, reason):
            self._node.get_logger().error(reason)

    def warn(self, subject: str, reason: str) -> None:
        """Report something that the node copes with; logged at most every few seconds."""
        if self._faults.raise_(diagnostics.WARN, subject, reason):
            self._node.get_logger().warning(reason)

    def fail(self, reason: str) -> None:
        """Report what will not go away by itself."""
        self.failure = reason
        self._node.get_logger().error(reason)

    def look_at_input(self, worker: InferenceWorker, max_age_s: float) -> None:
        """Report input that is stale or makes no window; to be called while active."""
        _, stale = worker.inspect()
        if stale and time.monotonic() - self._active_since_s > DISCOVERY_S + max_age_s:
            self.error('stale', f'no chunk: {"; ".join(stale)}')
        self._waits = self._waits + 1 if worker.waiting_for else 0
        if not stale and self._waits >= WAITS_BEFORE_WARNING:
            self.warn('window', f'no chunk: {worker.waiting_for}')

    def publish(
        self,
        state: str,
        hardware_id: str,
        now_ns: int,
        values: Mapping[str, Any],
        worker: InferenceWorker | None,
    ) -> None:
        """Publish one report."""
        faults = self._faults.current()
        if self.failure is not None:
            faults.insert(0, (diagnostics.ERROR, self.failure))
        table = dict(values)
        ages: dict[str, float | None] = {}
        if worker is not None:
            ages, _ = worker.inspect()
            with worker.exclusive():
                self.statistics.discarded_chunks = worker.discarded
                table |= self.statistics.values()
        self._publisher.publish(
            diagnostics.report(
                node_name=self._node.get_fully_qualified_name().lstrip('/'),
                hardware_id=hardware_id,
                now_ns=now_ns,
                state=state,
                faults=faults,
                ages_s=ages,
                values=table,
            )
        )
