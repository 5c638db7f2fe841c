# SPDX-License-Identifier: Apache-2.0
"""The lifecycle node: camera images and joint states in, joint trajectories out.

    unconfigured --configure--> inactive --activate--> active

configure loads and warms up the bundle and checks every parameter against it, or stays
unconfigured and says why. activate starts a new episode. A command leaves the node only while it
is active and its gate is open; when either ends after a command was sent, one hold follows and
nothing after it. This file declares parameters, connects topics and reports. A message takes this
way, and nothing comes back along it:

    sensors.Sensors          converts and checks a message, in the executor's thread
    worker.InferenceWorker   stores it in the observation window; runs the policy in its own thread
    control.ticks            says which window is due
    control.output           times, blends and limits the chunk, or holds
    outputs, sinks           topics and actions that take the commands

What happens on the way is reported to `monitor.Monitor`.
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
from tts_policy.control.limits import LimitSource
from tts_policy.control.observation import ObservationWindow
from tts_policy.control.output import CommandOutput
from tts_policy.node import parameters
from tts_policy.node.interface import RESET
from tts_policy.node.monitor import Monitor
from tts_policy.node.outputs import Outputs
from tts_policy.node.process import run_node
from tts_policy.node.safety import SafetyInputs
from tts_policy.node.sensors import Sensors
from tts_policy.node.worker import InferenceFailed, InferenceWorker, load_policy

if TYPE_CHECKING:
    from collections.abc import Callable

    from rclpy.lifecycle import LifecycleState
    from rclpy.parameter import Parameter
    from std_srvs.srv import Trigger

    from tts_policy.policy.policy import TestTimeSparsePolicy

    Transition = Callable[['PolicyNode', LifecycleState], TransitionCallbackReturn]

SUCCESS = TransitionCallbackReturn.SUCCESS
FAILURE = TransitionCallbackReturn.FAILURE

WATCH_PERIOD_S = 0.05
REPORT_EVERY = 20
STOP_TIMEOUT_S = 1.5


def _logged(transition: Transition) -> Transition:
    """Log what a transition raises, which rclpy turns into ERROR silently."""

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
        self, load: Callable[..., tuple[TestTimeSparsePolicy, float]] = load_policy, **kwargs: Any
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
        self._output: CommandOutput | None = None
        self._limits: LimitSource | None = None
        self._entities: list[Callable[[], object]] = []
        self._watch_count = 0
        self._monitor = Monitor(self)
        self._gate = OutputGate()
        self._safety = SafetyInputs(self, self._gate, self._obey_gate)
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
            partial(self._load, *parameters.model_options(settings)),
            self._now_ns,
            self._monitor,
            settings['seed'],
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
        assert self._worker is not None and self._limits is not None
        self._safety.hear()
        reason = self._worker.fault()
        if reason is not None:
            self.get_logger().error(f'not activated: {reason}')
            return FAILURE
        result = super().on_activate(state)
        self._worker.activate()
        self._state = 'active'
        self._monitor.activated()
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
            self.get_logger().warning('the inference thread is still busy and is left behind')
        self._worker = None
        self._output = self._limits = None
        self._gate.barred = None
        for destroy in self._entities:
            destroy()
        self._entities.clear()
        gc.unfreeze()

    def _while_loading(self) -> bool:
        """Whether to stop loading; the executor waits for it, so stops are heard here."""
        self._safety.hear()
        return self.stopping()

    def _autostart(self) -> None:
        """Do one transition a call: if shutdown is requested during loading, do not activate."""
        if self._state == 'unconfigured' and self.trigger_configure() == SUCCESS:
            return
        self.destroy_timer(self._autostart_timer)
        if self._state == 'inactive':
            self.trigger_activate()

    def _connect(self, worker: InferenceWorker, policy: TestTimeSparsePolicy) -> None:
        """Create everything that depends on the bundle; raises ValueError with the reason."""
        settings, contract = self._settings, policy.contract
        joints = contract.action.joints
        parameters.check_with_policy(policy, settings.values)
        worker.simulated = bool(self.get_parameter('use_sim_time').value)
        if worker.simulated:
            # Simulated time may stand still during inference.
            worker.warm_latency_s = 0.0
        if settings['check_latency']:
            parameters.check_latency(contract, settings, worker.latency_s())
        gripper_joints = settings['gripper.joints'] or ()
        self._limits = LimitSource(
            parameters.joint_limits(settings, joints), settings['limits.urdf'], gripper_joints
        )
        outputs = Outputs(
            self, contract.observation.period_s, partial(self._monitor.error, 'action')
        )
        self._entities.append(outputs.close)
        outputs.open(settings['output'], settings['gripper.output'], joints, gripper_joints)
        self._output = CommandOutput(
            parameters.chunk_timing(settings, contract),
            self._limits,
            parameters.hold_rule(settings, joints),
            outputs.command,
            outputs.proposed,
        )
        self._monitor.open()
        self._entities.append(self._monitor.close)
        window = ObservationWindow(parameters.window_spec(settings, contract))
        worker.connect(window, self._output, self._gate)
        self._apply_settings()
        sensors = Sensors(
            self, contract, parameters.sensor_options(settings), worker, self._monitor
        )
        self._entities.append(sensors.destroy)
        self._safety.listen(settings['limits.urdf'], self._on_robot_description)
        self._entities.append(self._safety.stop_listening)

    # Events

    def _on_robot_description(self, text: str) -> None:
        assert self._worker is not None and self._limits is not None
        limits = self._limits
        with self._worker.exclusive():
            limits.describe(text)
            self._gate.barred = self._barred()
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
            response.message = f'reset: expected a configured node, got {self._state}'
            return response
        response.success = self._worker.request_reset('service')
        response.message = 'the next tick starts a new episode'
        if not response.success:
            response.message = (
                f'reset: expected a running inference thread, got: {self._worker.fault()}'
            )
        return response

    # Parameters

    def _on_set_parameters(self, changes: list[Parameter]) -> SetParametersResult:
        worker = self._worker
        policy = None if worker is None else worker.policy
        latency_s = 0.0
        if worker is not None and self._settings['check_latency']:
            latency_s = worker.latency_s()
        simulated = bool(self.get_parameter('use_sim_time').value)
        reason = parameters.refusal(changes, worker is not None, policy, latency_s, simulated)
        if reason is None and worker is not None and self._gate.barred is not None:
            enables = any(c.name == 'enable_output' and c.value for c in changes)
            reason = f'enable_output: {self._gate.barred}' if enables else None
        return SetParametersResult(successful=reason is None, reason=reason or '')

    def _after_set_parameters(self, changes: list[Parameter]) -> None:
        settings = parameters.read(self)
        self._settings = settings
        if self._output is not None:
            self._apply_settings()
            self._obey_gate()

    def _apply_settings(self) -> None:
        """Let the live parameters take effect together, between two ticks."""
        assert self._worker is not None and self._worker.policy is not None
        assert self._output is not None and self._limits is not None
        settings = self._settings
        with self._worker.exclusive():
            self._worker.settings = parameters.tick_settings(
                settings, self._worker.policy.contract
            )
            self._gate.enabled = settings['enable_output']
            self._gate.timeout_s = settings['emergency_stop_timeout_s']
            self._gate.barred = self._barred()
            self._limits.scale = settings['limits_scale']
            self._output.blend_ns = settings.ns('blend_s')

    def _barred(self) -> str | None:
        """Why no command may leave although output is enabled: joints without limits."""
        assert self._limits is not None
        return None if self._settings['limits.allow_unbounded'] else self._limits.unbounded()

    def _obey_gate(self) -> None:
        """Hold the position if the gate is closed."""
        if self._worker is not None and self._output is not None:
            closed = self._worker.obey_gate()
            if closed is not None:
                self.get_logger().info(f'{closed}: holding position')

    def _hold(self, why: str) -> None:
        if self._worker is not None and self._output is not None and self._worker.hold():
            self.get_logger().info(f'{why}: holding position')

    # Watch

    def _watch(self) -> None:
        worker = self._worker
        if self._state == 'active' and worker is not None:
            reason = worker.fault()
            if reason is not None:
                self._monitor.fail(reason)
                self.trigger_deactivate()
            else:
                self._obey_gate()
                self._monitor.look_at_input(worker, self._settings['max_observation_age_s'])
        self._look_at_limits()
        if self._gate.stopped is not None:
            self._monitor.error('gate', f'output closed: {self._gate.stopped}')
        self._watch_count += 1
        if self._watch_count % REPORT_EVERY == 0:
            self._publish_report()

    def _look_at_limits(self) -> None:
        """Report joints without limits, for as long as there are any."""
        unbounded = None if self._limits is None else self._limits.unbounded()
        if unbounded is not None and self._settings['enable_output']:
            if self._settings['limits.allow_unbounded']:
                self._monitor.warn('unbounded', f'limits.allow_unbounded: {unbounded}')
            else:
                self._monitor.error('unbounded', f'output closed: {unbounded}')

    def _publish_report(self) -> None:
        gate = self._gate.values(time.monotonic())
        values = {'sparsity': self._settings['sparsity'], **gate}
        worker = None if self._output is None else self._worker
        if worker is not None:
            values['sparsity_chosen'] = round(worker.sparsity, 4)
        self._monitor.publish(
            self._state, self._settings['bundle'], self._now_ns(), values, worker
        )

    def _now_ns(self) -> int:
        return int(self.get_clock().now().nanoseconds)


def main(arguments: list[str] | None = None) -> int:
    """Console command policy_node."""
    return run_node(PolicyNode, 'tts_policy', arguments)


if __name__ == '__main__':
    sys.exit(main())
