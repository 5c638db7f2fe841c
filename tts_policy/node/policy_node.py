# SPDX-License-Identifier: Apache-2.0
"""The lifecycle node: camera images and joint states in, joint trajectories out.

    unconfigured --configure--> inactive --activate--> active

configure loads and warms up the bundle and checks every parameter against it, or stays
unconfigured with the reason. activate starts a new episode. A command leaves the node only while
it is active and its gate is open (`gate.OutputGate`); when either ends after a command was sent,
one hold-position point follows and nothing after it. Callbacks only convert and store messages;
`tts_policy.node.worker` runs the policy in a thread of its own, which a timer here watches.
"""

from __future__ import annotations

import gc
import sys
import time
from functools import partial, wraps
from typing import TYPE_CHECKING, Any

from rcl_interfaces.msg import SetParametersResult
from rclpy.clock import Clock, JumpThreshold
from rclpy.clock_type import ClockType
from rclpy.duration import Duration
from rclpy.lifecycle import LifecycleNode, TransitionCallbackReturn

from tts_policy.control.gate import OutputGate
from tts_policy.control.limit_source import LimitSource
from tts_policy.control.observation import ObservationWindow
from tts_policy.node import parameters
from tts_policy.node.chunk_delivery import ChunkDelivery
from tts_policy.node.command_topics import CommandTopics
from tts_policy.node.intake import Intake
from tts_policy.node.interface import RESET
from tts_policy.node.monitor import Monitor
from tts_policy.node.process import run_node
from tts_policy.node.safety import SafetyInputs
from tts_policy.node.sensors import Sensors
from tts_policy.node.worker import InferenceFailed, InferenceWorker, load_policy

if TYPE_CHECKING:
    from collections.abc import Callable

    from rclpy.lifecycle import LifecycleState
    from rclpy.parameter import Parameter
    from std_srvs.srv import Trigger

    from tts_policy.control.ticks import ScheduledTick
    from tts_policy.policy.contract import CommittedActions
    from tts_policy.policy.policy import TestTimeSparsePolicy

    Transition = Callable[['PolicyNode', LifecycleState], TransitionCallbackReturn]

SUCCESS = TransitionCallbackReturn.SUCCESS
FAILURE = TransitionCallbackReturn.FAILURE

WATCH_PERIOD_S = 0.05
REPORT_EVERY = 20
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
    """ROS shell around one `InferenceWorker`; `load` is called in its thread at configure."""

    def __init__(
        self, load: Callable[..., TestTimeSparsePolicy] = load_policy, **kwargs: Any
    ) -> None:
        """Declare parameters; raises `parameters.ParameterError` for a bad override."""
        super().__init__('tts_policy', **kwargs)
        parameters.declare(self)
        self.finalized = False
        self.stopping: Callable[[], bool] = lambda: False
        self._load = load
        self._state = 'unconfigured'
        self._settings = parameters.read(self)
        self._worker: InferenceWorker | None = None
        self._delivery: ChunkDelivery | None = None
        self._entities: list[Callable[[], object]] = []
        self._watch_count = 0
        self._warm_latency_s = 0.0
        self._monitor = Monitor(self)
        self._gate = OutputGate()
        self._safety = SafetyInputs(self, self._gate, self._close_gate)
        self.create_service(RESET.kind, RESET.name, self._on_reset_service)
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
        self._monitor.begin()
        self._gate.listen_anew()
        worker = InferenceWorker(
            partial(self._load, *parameters.model_options(settings), warmed=self._on_warm),
            self._now_ns,
            self._deliver,
            self._count_reset,
            settings['seed'],
            self._committed,
            settings['inference_timeout_s'],
        )
        try:
            parameters.check(settings)
            self._worker = worker
            policy = worker.start(self._while_loading)
            self._connect(worker, policy)
        except (InferenceFailed, ValueError) as error:
            self._release()
            self._monitor.fail(f'configure failed: {error}')
            self._publish_report()
            return FAILURE
        # A full collection over what torch and rclpy bring along can take longer than a tick.
        gc.collect()
        gc.freeze()
        self._state = 'inactive'
        self.get_logger().info(
            f'configured {settings["bundle"]}: {settings["sampler"]} on {settings["device"]}, '
            f'sparsity {settings["sparsity"]} of at most {policy.max_sparsity}'
        )
        return super().on_configure(state)

    @_logged
    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Begin a new episode."""
        assert self._worker is not None and self._delivery is not None
        self._safety.hear()
        reason = self._worker.fault()
        if reason is not None:
            self.get_logger().error(f'not activated: {reason}')
            return FAILURE
        self._delivery.output.begin()
        result = super().on_activate(state)
        self._worker.activate()
        self._state = 'active'
        self._monitor.activated()
        if unbounded := self._delivery.limits.unbounded():
            self.get_logger().warning(unbounded)
        closed = self._gate.closed_by(time.monotonic())
        self.get_logger().info(f'active, {f"{closed} (dry run)" if closed else "output enabled"}')
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
        self._monitor.fail(f'transition from {state.label} failed, see the log')
        if self._worker is not None:
            self._worker.deactivate()
            self._hold('failed')
        self._release()
        self._state = 'unconfigured'
        return SUCCESS

    def _release(self) -> None:
        if self._worker is not None and not self._worker.stop(STOP_TIMEOUT_S):
            self.get_logger().warning('inference thread is still busy, leaving it behind')
        self._worker = None
        self._delivery = None
        for destroy in self._entities:
            destroy()
        self._entities.clear()
        gc.unfreeze()

    def _while_loading(self) -> bool:
        """Whether to stop loading; the executor waits for it, so stops are heard here."""
        self._safety.hear()
        return self.stopping()

    def _autostart(self) -> None:
        """Do one transition a call: who stops the node while it loads wants no active one."""
        if self._state == 'unconfigured' and self.trigger_configure() == SUCCESS:
            return
        self.destroy_timer(self._autostart_timer)
        if self._state == 'inactive':
            self.trigger_activate()

    def _connect(self, worker: InferenceWorker, policy: TestTimeSparsePolicy) -> None:
        """Create everything that depends on the bundle; raises ValueError with the reason."""
        settings, contract = self._settings, policy.contract
        parameters.check_with_policy(policy, settings.values)
        if settings['check_latency']:
            parameters.check_latency(contract, settings, self._latency_s())
        limits = LimitSource(
            parameters.joint_limits(settings, contract.action.joints),
            settings['limits.urdf'],
            settings['gripper.joints'] or (),
        )
        topics = CommandTopics(
            self, settings, contract.action.joints, partial(self._monitor.error, 'action')
        )
        self._entities.append(topics.destroy)
        self._delivery = ChunkDelivery(
            policy, settings, limits, topics, self._gate, self._monitor, worker.configure_ticks
        )
        worker.window = ObservationWindow(parameters.window_spec(settings, contract))
        intake = Intake(
            worker,
            self._delivery.output,
            self._monitor,
            self._now_ns,
            lambda: self._state == 'active',
        )
        sensors = Sensors(self, contract, parameters.sensor_options(settings), intake)
        self._entities.append(sensors.destroy)
        self._apply_tick_settings()
        self._safety.listen(settings['limits.urdf'], self._on_robot_description)
        self._entities.append(self._safety.stop_listening)
        if topics.stream is not None:
            period_s = contract.observation.period_s
            timer = self.create_timer(period_s, partial(self._stream, topics.stream.stream))
            self._entities.append(partial(self.destroy_timer, timer))

    # Events

    def _on_robot_description(self, text: str) -> None:
        assert self._worker is not None and self._delivery is not None
        limits = self._delivery.limits
        with self._worker.exclusive():
            limits.describe(text)
        if limits.missing is not None:
            self._monitor.error('limits', limits.missing)
        elif limits.unnamed:
            self._monitor.warn('limits', f'robot_description: no limits of {limits.unnamed}')
        else:
            self.get_logger().info('limits tightened by robot_description')

    def _on_clock_jump(self, jump: Any) -> None:
        if self._worker is not None and self._state == 'active':
            self._worker.clock_moved(backward=jump.delta.nanoseconds < 0)

    def _on_reset_service(
        self, request: Trigger.Request, response: Trigger.Response
    ) -> Trigger.Response:
        if self._worker is None:
            response.message = f'expected a configured node, it is {self._state}'
            return response
        response.success = self._worker.request_reset('service')
        response.message = 'the next tick starts a new episode'
        if not response.success:
            response.message = f'expected an inference thread, {self._worker.fault()}'
        return response

    # Parameters

    def _on_set_parameters(self, changes: list[Parameter]) -> SetParametersResult:
        policy = None if self._worker is None else self._worker.policy
        latency_s = self._latency_s() if self._settings['check_latency'] else 0.0
        reason = parameters.refusal(changes, self._worker is not None, policy, latency_s)
        return SetParametersResult(successful=reason is None, reason=reason or '')

    def _after_set_parameters(self, changes: list[Parameter]) -> None:
        settings = parameters.read(self)
        if self._worker is None or self._delivery is None:
            self._settings = settings
            return
        with self._worker.exclusive():
            self._settings = settings
            self._apply_tick_settings()
        if not settings['enable_output']:
            self._close_gate()

    def _apply_tick_settings(self) -> None:
        assert self._worker is not None and self._delivery is not None
        sparsity, interval_ns = self._delivery.apply(self._settings)
        self._worker.configure_ticks(sparsity, interval_ns)

    def _on_warm(self, latency_s: float) -> None:
        self._warm_latency_s = latency_s

    def _latency_s(self) -> float:
        """Time from an observation to its chunk, as far as it is known (ROS clock)."""
        measured_s = self._monitor.statistics.age_p95_s()
        if measured_s is not None:
            return measured_s
        # Simulated time may stand still during inference.
        return 0.0 if self.get_parameter('use_sim_time').value else self._warm_latency_s

    # Commands out

    def _deliver(self, delivery: Any) -> None:
        """Send a chunk; runs in the inference thread, with the worker held."""
        assert self._delivery is not None
        self._delivery.deliver(delivery)

    def _committed(self, tick: ScheduledTick) -> CommittedActions | None:
        """Say what a tick has to continue; runs in the inference thread, with the worker held."""
        assert self._delivery is not None
        return self._delivery.committed(tick.stamp_ns, self._latency_s())

    def _stream(self, stream: Callable[[int], None]) -> None:
        if self._worker is not None and self._state == 'active':
            with self._worker.exclusive():
                stream(self._now_ns())

    def _close_gate(self) -> None:
        """Hold the position if the gate is closed; what is in flight becomes a proposal."""
        if self._worker is None:
            return
        with self._worker.exclusive():
            closed = self._gate.closed_by(time.monotonic())
            if closed is not None:
                self._hold(closed)

    def _hold(self, why: str) -> None:
        hung = self._worker is not None and self._worker.fault() is not None
        if self._delivery is not None and self._delivery.hold(self._now_ns(), hung):
            self.get_logger().info(f'{why}: holding position')

    # Watch

    def _count_reset(self, reason: str) -> None:
        self._monitor.statistics.resets[reason] += 1
        self.get_logger().info(f'new episode ({reason})')

    def _watch(self) -> None:
        worker = self._worker
        if self._state == 'active' and worker is not None:
            reason = worker.fault()
            if reason is not None:
                self._monitor.fail(reason)
                self.trigger_deactivate()
            else:
                self._close_gate()
                self._monitor.look_at_input(worker, self._settings['max_observation_age_s'])
        if self._gate.stopped is not None:
            self._monitor.error('gate', f'output closed: {self._gate.stopped}')
        self._watch_count += 1
        if self._watch_count % REPORT_EVERY == 0:
            self._publish_report()

    def _publish_report(self) -> None:
        gate = self._gate.values(time.monotonic())
        values = {'sparsity': self._settings['sparsity'], **gate}
        if self._delivery is not None:
            values['sparsity_chosen'] = round(self._delivery.sparsity, 4)
        self._monitor.publish(
            self._state, self._settings['bundle'], self._now_ns(), values, self._worker
        )

    def _now_ns(self) -> int:
        return int(self.get_clock().now().nanoseconds)


def main(arguments: list[str] | None = None) -> int:
    """Console command policy_node."""
    return run_node(PolicyNode, 'tts_policy', arguments)


if __name__ == '__main__':
    sys.exit(main())
