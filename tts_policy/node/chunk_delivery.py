# SPDX-License-Identifier: Apache-2.0
"""What happens to a chunk when the inference thread delivers it: gate, limits, topics, reports.

Runs in the inference thread with the worker held, so that settings change between ticks only.
"""

from __future__ import annotations

import json
import threading
import time
from typing import TYPE_CHECKING

from std_msgs.msg import String

from tts_policy.control.conversions import seconds_to_ns
from tts_policy.control.latency_budget import SparsityGovernor
from tts_policy.control.output import CommandOutput
from tts_policy.control.trajectory import ChunkTooLate, TrajectoryRefused
from tts_policy.node import diagnostics, parameters
from tts_policy.node.messages import plan_image

if TYPE_CHECKING:
    from collections.abc import Callable

    from tts_policy.control.gate import OutputGate
    from tts_policy.control.limit_source import LimitSource
    from tts_policy.control.output import Sent
    from tts_policy.node.command_topics import CommandTopics
    from tts_policy.node.monitor import Monitor
    from tts_policy.node.parameters import Settings
    from tts_policy.node.worker import Delivery
    from tts_policy.policy.contract import CommittedActions
    from tts_policy.policy.policy import TestTimeSparsePolicy

# How long a hold point may take after the inference thread failed.
_HOLD_TIMEOUT_S = 0.5


class ChunkDelivery:
    """The output side of a configured node."""

    def __init__(
        self,
        policy: TestTimeSparsePolicy,
        settings: Settings,
        limits: LimitSource,
        topics: CommandTopics,
        gate: OutputGate,
        monitor: Monitor,
        choose: Callable[[float, int], None],
    ) -> None:
        contract = policy.contract
        self.limits = limits
        self.sparsity = 0.0
        self.output = CommandOutput(
            parameters.chunk_timing(settings, contract),
            limits,
            parameters.hold_rule(settings, contract.action.joints),
            topics.command,
            topics.proposed,
        )
        self._contract = contract
        self._governor = SparsityGovernor(policy.recommended_sparsity)
        self._topics = topics
        self._gate = gate
        self._monitor = monitor
        self._choose = choose
        self._settings = settings

    def apply(self, settings: Settings) -> tuple[float, int]:
        """Take live settings; returns sparsity and replan interval in ns of the next tick."""
        self._settings = settings
        self._gate.enabled = settings['enable_output']
        self._gate.timeout_s = settings['emergency_stop_timeout_s']
        self.limits.scale = settings['limits_scale']
        self.output.blend_ns = settings.ns('blend_s')
        n_execute = settings['n_execute'] or self._contract.action.execute
        interval_ns = n_execute * seconds_to_ns(self._contract.observation.period_s)
        self.sparsity = self._governor.choose(settings['sparsity'], settings['latency_budget_s'])
        return self.sparsity, interval_ns

    def hold(self, now_ns: int, hung: bool) -> bool:
        """Command the present position once; False when nothing was commanded or went out.

        Where the inference thread is `hung` the way out may be what it hangs in: that is tried in
        a thread of its own, for a while.
        """
        if not hung:
            return self.output.hold(now_ns)
        held: list[bool] = []
        thread = threading.Thread(
            target=lambda: held.append(self.output.hold(now_ns)), name='hold', daemon=True
        )
        thread.start()
        thread.join(_HOLD_TIMEOUT_S)
        return any(held)

    def committed(self, stamp_ns: int, latency_s: float) -> CommittedActions | None:
        """What a chunk of the observation of that stamp has to continue, if anything."""
        kind = self._settings['hold_committed']
        if kind == 'none':
            return None
        enabled = self._gate.closed_by(time.monotonic()) is None
        return self.output.committed(stamp_ns, seconds_to_ns(latency_s), enabled, kind == 'soft')

    def deliver(self, delivery: Delivery) -> None:
        """Send a chunk where the gate lets it go, and report the tick."""
        sent: Sent | None = None
        refused = None
        too_late = False
        enabled = self._gate.closed_by(time.monotonic()) is None
        try:
            sent = self.output.send(
                delivery.chunk.actions, delivery.tick.stamp_ns, delivery.now_ns, enabled
            )
        except TrajectoryRefused as error:
            refused = str(error)
            too_late = isinstance(error, ChunkTooLate)
            self._monitor.statistics.refused_chunks += 1
            self._monitor.error('chunk', f'chunk refused: {refused}')
        if delivery.late or too_late:
            self._monitor.warn('deadline', f'deadline missed: chunk of age {delivery.age_s:.3f} s')
        self._monitor.statistics.record(delivery, sent, too_late)
        self._report(delivery, sent, refused)
        if delivery.tick.reset is None:
            self._governor.record(delivery.latency_s)
        if self._governor.short_s is not None:
            self._monitor.warn(
                'budget',
                f'latency budget of {self._settings["latency_budget_s"]:g} s not held: p95 is '
                f'{self._governor.short_s:.3f} s at the highest sparsity that is recommended',
            )
        self._choose(*self.apply(self._settings))

    def _report(self, delivery: Delivery, sent: Sent | None, refused: str | None) -> None:
        report = diagnostics.chunk_report(delivery, sent, refused)
        self._topics.chunk_stats.publish(String(data=json.dumps(report)))
        if self._topics.plan_image.get_subscription_count() > 0:
            image = plan_image(delivery.chunk.plan, delivery.tick.stamp_ns)
            self._topics.plan_image.publish(image)
