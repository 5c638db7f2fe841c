# SPDX-License-Identifier: Apache-2.0
"""The lifecycle node: camera images and joint states in, joint trajectories out.

    unconfigured --configure--> inactive --activate--> active

configure loads and warms up the bundle and checks every parameter against it, or stays
unconfigured with the reason. activate starts a new episode. A command leaves the node only while
it is active and `enable_output` is true; when either ends after a command was sent, one
hold-position point follows and nothing after it. Callbacks only convert and store messages;
`tts_policy.ros.inference` runs the policy in a thread of its own.
"""

from __future__ import annotations

import json
import sys
import time
from functools import partial, wraps
from typing import TYPE_CHECKING, Any

from diagnostic_msgs.msg import DiagnosticArray
from rcl_interfaces.msg import SetParametersResult
from rclpy.clock import Clock, JumpThreshold
from rclpy.clock_type import ClockType
from rclpy.duration import Duration
from rclpy.lifecycle import LifecycleNode, TransitionCallbackReturn
from rclpy.parameter import Parameter
from rclpy.qos import QoSProfile, ReliabilityPolicy
from std_msgs.msg import String
from std_srvs.srv import Trigger
from trajectory_msgs.msg import JointTrajectory

from tts_policy.ros import diagnostics, parameters
from tts_policy.ros.conversions import seconds_to_ns
from tts_policy.ros.inference import InferenceFailed, InferenceWorker, load_policy
from tts_policy.ros.observation import Arrival, ObservationWindow
from tts_policy.ros.output import CommandOutput
from tts_policy.ros.process import run_node
from tts_policy.ros.sensors import Sensors
from tts_policy.ros.trajectory import TrajectoryRefused

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from rclpy.lifecycle import LifecycleState

    from tts_policy.core.contract import PolicyContract
    from tts_policy.ros.conversions import ConversionError
    from tts_policy.ros.inference import Delivery
    from tts_policy.ros.trajectory import JointLimits

    Transition = Callable[['PolicyNode', LifecycleState], TransitionCallbackReturn]

SUCCESS = TransitionCallbackReturn.SUCCESS
FAILURE = TransitionCallbackReturn.FAILURE

WATCH_PERIOD_S = 0.1
REPORT_EVERY = 10
DISCOVERY_S = 0.5
WAITS_BEFORE_WARNING = 4
STOP_TIMEOUT_S = 1.5


def _logged(transition: Transition) -> Transition:
    """Log what a transition raises: rclpy turns it into ERROR without a word."""

    @wraps(transition)
    def logged(node: PolicyNode, state: LifecycleState) -> TransitionCallbackReturn:
        try:
            return transition(node, state)
        except Exception as error:
            node.get_logger().error(f'{transition.__name__}: {type(error).__name__}: {error}')
            raise

    return logged


class PolicyNode(LifecycleNode):
    """ROS shell around one `InferenceWorker`."""

    def __init__(self, **kwargs: Any) -> None:
        """Declare parameters; raises `parameters.ParameterError` for a bad override."""
        super().__init__('tts_policy', **kwargs)
        parameters.declare(self)
        self.finalized = False
        self._state = 'unconfigured'
        self._settings = parameters.read(self)
        self._worker: InferenceWorker | None = None
        self._statistics = diagnostics.TickStatistics()
        self._faults = diagnostics.Faults()
        self._configure_failure: str | None = None
        self._output: CommandOutput | None = None
        self._entities: list[Callable[[], object]] = []
        self._watch_count = self._waits = 0
        self._diagnostics = self.create_publisher(DiagnosticArray, '/diagnostics', 10)
        self.create_service(Trigger, '~/reset', self._on_reset_service)
        self.add_on_set_parameters_callback(self._on_set_parameters)
        self.add_post_set_parameters_callback(self._after_set_parameters)
        # Wall time on purpose: a simulation that stands still must not blind the watch.
        steady = Clock(clock_type=ClockType.STEADY_TIME)
        self.create_timer(WATCH_PERIOD_S, self._watch, clock=steady)
        self._jumps = self.get_clock().create_jump_callback(
            JumpThreshold(
                min_forward=Duration(nanoseconds=1),
                min_backward=Duration(nanoseconds=-1),
                on_clock_change=False,
            ),
            post_callback=self._on_clock_jump,
        )
        if self._settings['autostart']:
            self._autostart_timer = self.create_timer(0.0, self._autostart, clock=steady)

    # Lifecycle

    @_logged
    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Load and warm up the bundle, check the parameters against it, create topics."""
        self._settings = settings = parameters.read(self)
        self._statistics = diagnostics.TickStatistics()
        self._faults.clear()
        worker = InferenceWorker(
            partial(
                load_policy,
                *(settings[name] for name in ('bundle', 'sampler', 'device', 'seed', 'threads')),
            ),
            self._now_ns,
            self._deliver,
            self._count_reset,
            settings['seed'],
        )
        try:
            policy = worker.start()
            parameters.check_with_policy(policy, settings.values)
            limits = parameters.joint_limits(settings, policy.contract.action.joints)
        except (InferenceFailed, ValueError) as error:
            worker.stop(STOP_TIMEOUT_S)
            self._configure_failure = f'configure failed: {error}'
            self.get_logger().error(self._configure_failure)
            self._publish_report()
            return FAILURE
        self._configure_failure = None
        self._contract = policy.contract
        worker.window = ObservationWindow(parameters.window_spec(settings, policy.contract))
        self._worker = worker
        self._apply_tick_settings()
        self._create_topics(policy.contract, limits)
        self._state = 'inactive'
        self.get_logger().info(
            f'configured {settings["bundle"]}: {settings["sampler"]} on {settings["device"]}, '
            f'sparsity {settings["sparsity"]} of at most {policy.max_sparsity}'
        )
        return super().on_configure(state)

    @_logged
    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Begin a new episode."""
        assert self._worker is not None and self._output is not None
        if self._worker.failure is not None:
            self.get_logger().error(f'inference failed before: {self._worker.failure}')
            return FAILURE
        self._output.begin()
        result = super().on_activate(state)
        self._worker.activate()
        self._state = 'active'
        self._active_since_s = time.monotonic()
        gate = 'enabled' if self._settings['enable_output'] else 'disabled (dry run)'
        self.get_logger().info(f'active, output {gate}')
        return result

    @_logged
    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Drop the chunk in flight, hold the position, stop."""
        assert self._worker is not None
        self._worker.deactivate()
        self._hold('deactivated')
        self._state = 'inactive'
        return super().on_deactivate(state)

    @_logged
    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Free the policy and the topics."""
        self._release()
        self._state = 'unconfigured'
        return SUCCESS

    @_logged
    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Do as deactivate and cleanup, from any state."""
        if self._worker is not None:
            self._worker.deactivate()
            self._hold('shut down')
        self._release()
        self._state = 'finalized'
        self.finalized = True
        return SUCCESS

    @_logged
    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Go back to unconfigured after a transition raised."""
        self._configure_failure = f'transition from {state.label} failed, see the log'
        self._release()
        self._state = 'unconfigured'
        return SUCCESS

    def _release(self) -> None:
        if self._worker is not None and not self._worker.stop(STOP_TIMEOUT_S):
            self.get_logger().warning('inference thread is still busy, leaving it behind')
        self._worker = None
        self._output = None
        for destroy in self._entities:
            destroy()
        self._entities.clear()

    def _autostart(self) -> None:
        self.destroy_timer(self._autostart_timer)
        if self.trigger_configure() == SUCCESS:
            self.trigger_activate()

    def _create_topics(self, contract: PolicyContract, limits: JointLimits) -> None:
        command_qos = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE)
        command, proposed = (
            self.create_lifecycle_publisher(JointTrajectory, topic, command_qos)
            for topic in ('joint_trajectory', '~/proposed_trajectory')
        )
        self._chunk_stats = self.create_lifecycle_publisher(String, '~/chunk_stats', 100)
        for publisher in (command, proposed, self._chunk_stats):
            self._entities.append(partial(self.destroy_lifecycle_publisher, publisher))
        rule = parameters.hold_rule(self._settings)
        self._output = CommandOutput(contract, limits, rule, command, proposed)
        self._sensors = Sensors(self, contract, self._settings['reliable_sensors'], self)
        self._entities.append(self._sensors.destroy)

    # Messages in

    def on_sample(self, key: str, topic: str, stamp_ns: int, value: np.ndarray) -> None:
        """Store one sample; see `SensorReceiver`."""
        assert self._worker is not None
        arrival = self._worker.store(key, stamp_ns, value)
        if arrival in (Arrival.LATE, Arrival.FUTURE):
            ahead_s = (stamp_ns - self._now_ns()) * 1e-9
            text = f'{topic}: message is {arrival.value}, stamped {ahead_s:+.3f} s from now'
            self._fault(diagnostics.WARN, topic, text)

    def on_measured(self, stamp_ns: int, positions: np.ndarray) -> None:
        """Remember the measured state; see `SensorReceiver`."""
        assert self._output is not None
        self._output.measured(stamp_ns, positions)

    def on_refused(self, topic: str, error: ConversionError) -> None:
        """Report a message that does not fit; see `SensorReceiver`."""
        if self._state == 'active':
            self._statistics.refused_messages[topic] += 1
            self._fault(diagnostics.ERROR, topic, f'message refused: {error}')

    def _on_clock_jump(self, jump: Any) -> None:
        if self._worker is not None and self._state == 'active':
            self._worker.clock_moved(backward=jump.delta.nanoseconds < 0)

    def _on_reset_service(
        self, request: Trigger.Request, response: Trigger.Response
    ) -> Trigger.Response:
        response.success = self._worker is not None
        if self._worker is not None:
            self._worker.request_reset('service')
            response.message = 'the next tick starts a new episode'
        else:
            response.message = f'expected a configured node, it is {self._state}'
        return response

    # Parameters

    def _on_set_parameters(self, changes: list[Parameter]) -> SetParametersResult:
        policy = None if self._worker is None else self._worker.policy
        reason = parameters.refusal(changes, self._worker is not None, policy)
        return SetParametersResult(successful=reason is None, reason=reason or '')

    def _after_set_parameters(self, changes: list[Parameter]) -> None:
        settings = parameters.read(self)
        if self._worker is None:
            self._settings = settings
            return
        with self._worker.exclusive():
            self._settings = settings
            self._apply_tick_settings()
            if not settings['enable_output']:
                self._hold('output disabled')

    def _apply_tick_settings(self) -> None:
        assert self._worker is not None
        contract = self._contract
        n_execute = self._settings['n_execute'] or contract.action.execute
        interval_ns = n_execute * seconds_to_ns(contract.observation.period_s)
        self._worker.configure_ticks(self._settings['sparsity'], interval_ns)

    # Commands out

    def _deliver(self, delivery: Delivery) -> None:
        """Send a chunk; runs in the inference thread, with the worker held."""
        assert self._output is not None
        tick, refused, trajectory = delivery.tick, None, None
        try:
            trajectory = self._output.send(
                delivery.chunk.actions,
                tick.stamp_ns,
                delivery.now_ns,
                self._settings['enable_output'],
            )
        except TrajectoryRefused as error:
            refused = str(error)
            self._statistics.refused_chunks += 1
            self._fault(diagnostics.ERROR, 'chunk', f'chunk refused: {refused}')
        self._statistics.record(delivery)
        if delivery.late:
            self._faults.raise_(diagnostics.WARN, 'deadline', 'deadline missed')
        report = diagnostics.chunk_report(delivery, trajectory, refused)
        self._chunk_stats.publish(String(data=json.dumps(report)))

    def _hold(self, why: str) -> None:
        if self._output is not None and self._output.hold(self._now_ns()):
            self.get_logger().info(f'{why}: holding position')

    # Diagnostics

    def _count_reset(self, reason: str) -> None:
        self._statistics.resets[reason] += 1
        self.get_logger().info(f'new episode ({reason})')

    def _patience_s(self) -> float:
        """Wall time after activate before missing input is a fault: discovery, then the limit."""
        return DISCOVERY_S + float(self._settings['max_observation_age_s'])

    def _values(self) -> dict[str, Any]:
        values = {
            'sparsity': self._settings['sparsity'],
            'output_enabled': self._settings['enable_output'],
        }
        if self._worker is None:
            return values
        with self._worker.exclusive():
            self._statistics.discarded_chunks = self._worker.discarded
            return {**values, **self._statistics.values()}

    def _fault(self, level: bytes, key: str, reason: str) -> None:
        if self._faults.raise_(level, key, reason):
            logger = self.get_logger()
            logger.error(reason) if level == diagnostics.ERROR else logger.warning(reason)

    def _watch(self) -> None:
        worker = self._worker
        if self._state == 'active' and worker is not None:
            if worker.failure is not None:
                self.get_logger().error(f'inference failed: {worker.failure}')
                self.trigger_deactivate()
            _, stale = worker.inspect()
            if stale and time.monotonic() - self._active_since_s > self._patience_s():
                self._fault(diagnostics.ERROR, 'stale', f'no chunk: {"; ".join(stale)}')
            # The first frame of an episode never has a window: only one that stays away counts.
            self._waits = self._waits + 1 if worker.waiting_for else 0
            if not stale and self._waits >= WAITS_BEFORE_WARNING:
                self._fault(diagnostics.WARN, 'window', f'no chunk: {worker.waiting_for}')
        self._watch_count += 1
        if self._watch_count % REPORT_EVERY == 0:
            self._publish_report()

    def _publish_report(self) -> None:
        faults = self._faults.current()
        worker = self._worker
        ages: dict[str, float | None] = {}
        if self._configure_failure is not None:
            faults.insert(0, (diagnostics.ERROR, self._configure_failure))
        if worker is not None:
            if worker.failure is not None:
                faults.insert(0, (diagnostics.ERROR, f'inference failed: {worker.failure}'))
            ages, _ = worker.inspect()
        self._diagnostics.publish(
            diagnostics.report(
                node_name=self.get_fully_qualified_name().lstrip('/'),
                hardware_id=self._settings['bundle'],
                now_ns=self._now_ns(),
                state=self._state,
                faults=faults,
                ages_s=ages,
                values=self._values(),
            )
        )

    def _now_ns(self) -> int:
        return int(self.get_clock().now().nanoseconds)


def main(arguments: list[str] | None = None) -> int:
    """Console command policy_node."""
    return run_node(PolicyNode, 'tts_policy', arguments)


if __name__ == '__main__':
    sys.exit(main())
