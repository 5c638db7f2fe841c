# SPDX-License-Identifier: Apache-2.0
"""ROS node `robot`: the simulated Panda with its camera, on one of two clocks.

realtime: physics follows the wall clock; a renderer that is too slow drops frames, never time.
lockstep: simulated time, published on /clock, advances only while nobody owes it an action. At
every tick it stands still until a JointTrajectory stamped with that tick has been accepted.

Everything runs in one thread: callbacks are served between physics steps, so in lockstep the same
trajectories give the same episode on any machine. Before the first ~/reset and after an episode
has ended the world is held: nothing is published and the clock stands still.
"""

from __future__ import annotations

import array
import json
import sys
import time

import numpy as np
import rclpy
from rcl_interfaces.msg import SetParametersResult
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.node import Node
from rclpy.parameter import Parameter
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import Bool, String
from std_srvs.srv import Trigger
from trajectory_msgs.msg import JointTrajectory

from tts_policy.control.conversions import NS_PER_S, seconds_to_ns, time_to_ns
from tts_policy.node.interface import COMMAND_QOS, LATCHED_QOS, RELIABLE_SENSOR_QOS
from tts_policy.node.messages import ns_to_time
from tts_policy.node.parameter_table import Change, ParameterSpec
from tts_policy.sim.episode import Episode, Timeline
from tts_policy.sim.panda import FRAME_NS, STEP_NS
from tts_policy.sim.task import PandaTask
from tts_policy.sim.tasks import PANDA_TASKS, panda_task
from tts_policy.sim.trajectory_player import TrajectoryError, TrajectoryPoint

REALTIME, LOCKSTEP = 'realtime', 'lockstep'
LOCKSTEP_START_NS = NS_PER_S
IDLE_WAIT_S = 0.1
CAMERA_FRAME = 'camera'
# Reliable publishers serve best-effort subscribers too, and let a recorder ask for everything.
SENSOR_QOS = RELIABLE_SENSOR_QOS


Type = Parameter.Type
PARAMETERS = (
    ParameterSpec(
        'task', Type.STRING, 'lift', Change.START, '', 'What is simulated.',
        choices=tuple(PANDA_TASKS),
    ),
    ParameterSpec(
        'clock', Type.STRING, REALTIME, Change.START, '',
        'Physics follows the wall clock, or waits for the policy.', choices=(REALTIME, LOCKSTEP),
    ),
    ParameterSpec(
        'seed', Type.INTEGER, 0, Change.LIVE, '',
        'Seed of the next episode. Every reset adds one; setting it starts anew.', 0, 2**31 - 1,
    ),
    ParameterSpec(
        'listeners', Type.INTEGER, 0, Change.LIVE, '',
        'Lockstep: an episode waits for so many subscriptions to its sensors.', 0, 100,
    ),
    ParameterSpec(
        'episode_s', Type.DOUBLE, None, Change.LIVE, 's',
        'Time limit of an episode; by default that of the task.', 0.5, 600.0,
    ),
    ParameterSpec(
        'action_period_s', Type.DOUBLE, 0.4, Change.START, 's', 'Lockstep: time between ticks.',
        0.05, 5.0,
    ),
    ParameterSpec(
        'owed_timeout_s', Type.DOUBLE, 60.0, Change.LIVE, 's',
        'Lockstep: an episode fails if an action takes longer.', 0.1, 1e4,
    ),
    ParameterSpec(
        'reset_gap_s', Type.DOUBLE, 1.0, Change.START, 's', 'Gap in the stamps at a reset.',
        0.1, 60.0,
    ),
)  # fmt: skip


def _image(rgb: np.ndarray, stamp_ns: int) -> Image:
    """Image message of uint8 [H, W, 3]."""
    height, width, _ = rgb.shape
    message = Image(height=height, width=width, encoding='rgb8', step=3 * width)
    message.header.stamp = ns_to_time(stamp_ns)
    message.header.frame_id = CAMERA_FRAME
    # Assigning bytes or a numpy array makes rclpy convert element by element.
    message.data = array.array('B', rgb.tobytes())
    return message


def _joint_state(positions: dict[str, float], stamp_ns: int) -> JointState:
    """Joint state message of positions by name (rad, m), without velocity and effort."""
    message = JointState(name=list(positions), position=list(positions.values()))
    message.header.stamp = ns_to_time(stamp_ns)
    return message


def _points(message: JointTrajectory) -> list[TrajectoryPoint]:
    """Points of a trajectory message as they are; the player validates them."""
    return [
        TrajectoryPoint(time_to_ns(p.time_from_start), list(p.positions), list(p.velocities))
        for p in message.points
    ]


class RobotNode(Node):
    """The simulated robot. `advance` does what is due and says how long it may wait then."""

    def __init__(self) -> None:
        """Declare parameters and build the world; raises ValueError for a bad parameter."""
        super().__init__('robot')
        task = self._declare()
        self._lockstep = self._clock_mode() == LOCKSTEP
        self._gap_ns = seconds_to_ns(self._double('reset_gap_s'))
        self._timeline()
        self._world = task.world()
        # The first picture takes seconds; it must not cost the first episode its frames.
        self._world.render()
        self._episode: Episode | None = None
        self._episodes = 0
        self._sim_ns = LOCKSTEP_START_NS
        self._start_monotonic_ns = 0
        self._published_ns = -1
        self._owed_ns: int | None = None
        self._owed_since_s = 0.0
        self._connect()
        self.get_logger().info(
            f'ready, task {task.name}, {self._clock_mode()} clock; held until ~/reset'
        )

    def _declare(self) -> PandaTask:
        task = PANDA_TASKS['lift']
        for spec in PARAMETERS:
            limit_s = task.frame_limit * FRAME_NS / NS_PER_S
            value = limit_s if spec.name == 'episode_s' else spec.default
            declared = self.declare_parameter(spec.name, value, spec.descriptor())
            if spec.name == 'task':
                task = panda_task(str(declared.value))
        self.add_on_set_parameters_callback(self._validate)
        self.add_post_set_parameters_callback(self._after_set)
        return task

    def _connect(self) -> None:
        self._image_pub = self.create_publisher(Image, 'camera/image', SENSOR_QOS)
        self._state_pub = self.create_publisher(JointState, 'joint_states', SENSOR_QOS)
        self._success_pub = self.create_publisher(Bool, '~/success', LATCHED_QOS)
        self._episode_pub = self.create_publisher(String, '~/episode', LATCHED_QOS)
        self._clock_pub = None
        if self._lockstep:
            self._clock_pub = self.create_publisher(Clock, '/clock', SENSOR_QOS)
        self.create_subscription(
            JointTrajectory, 'joint_trajectory', self._on_trajectory, COMMAND_QOS
        )
        self.create_service(Trigger, '~/reset', self._on_reset)

    def _double(self, name: str) -> float:
        return float(self.get_parameter(name).value)

    def _clock_mode(self) -> str:
        mode = str(self.get_parameter('clock').value)
        if mode not in (REALTIME, LOCKSTEP):
            raise ValueError(f'clock: expected {REALTIME} or {LOCKSTEP}, got {mode!r}')
        return mode

    def _timeline(self) -> Timeline:
        return Timeline.from_seconds(self._double('action_period_s'), self._double('episode_s'))

    def _validate(self, parameters: list[Parameter]) -> SetParametersResult:
        for parameter in parameters:
            if parameter.name == 'episode_s':
                try:
                    Timeline.from_seconds(self._double('action_period_s'), parameter.value)
                except ValueError as error:
                    return SetParametersResult(successful=False, reason=f'episode_s: {error}')
        return SetParametersResult(successful=True)

    def _after_set(self, parameters: list[Parameter]) -> None:
        if any(parameter.name == 'seed' for parameter in parameters):
            self._episodes = 0

    def _on_reset(self, _: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        seed = int(self.get_parameter('seed').value) + self._episodes
        self._episodes += 1
        if self._lockstep:
            if self._episode is not None:
                self._sim_ns = self._episode.now_ns
            start_ns = self._sim_ns + self._gap_ns
        else:
            start_ns = time.time_ns() + self._gap_ns
        self._episode = Episode(self._world, seed, start_ns, self._timeline())
        # The stamps of an episode start on the system clock and then run on the steady one.
        self._start_monotonic_ns = time.monotonic_ns() + start_ns - time.time_ns()
        self._published_ns = -1
        self._owed_ns = None
        self._frames = self._dropped = self._trajectories = self._refused = 0
        self._success_pub.publish(Bool(data=False))
        response.success = True
        response.message = f'seed {seed}'
        return response

    def _on_trajectory(self, message: JointTrajectory) -> None:
        episode = self._episode
        if episode is None or episode.ended is not None:
            self.get_logger().warning(
                'trajectory ignored: no episode is running, call ~/reset',
                throttle_duration_sec=5.0,
            )
            return
        stamp_ns = time_to_ns(message.header.stamp)
        try:
            episode.accept(message.joint_names, _points(message), stamp_ns)
        except TrajectoryError as error:
            self._refused += 1
            self.get_logger().error(f'trajectory refused: {error}')
            return
        self._trajectories += 1
        if stamp_ns == self._owed_ns:
            self._owed_ns = None

    def advance(self) -> float:
        """Publish and step what is due now; returns the longest wait in seconds until more is."""
        episode = self._episode
        if episode is None or episode.ended is not None:
            return IDLE_WAIT_S
        if self._lockstep:
            return self._advance_lockstep(episode)
        return self._advance_realtime(episode)

    def _advance_lockstep(self, episode: Episode) -> float:
        if self._published_ns != episode.now_ns:
            if episode.elapsed_ns == 0 and not self._heard():
                return IDLE_WAIT_S
            self._publish(episode, picture=episode.frame_due)
            if episode.tick_due:
                self._owed_ns = episode.now_ns
                self._owed_since_s = time.monotonic()
                return 0.0
        if self._owed_ns is not None:
            # A best-effort subscriber may have missed the clock; its value has not changed.
            self._publish_clock(episode.now_ns)
            waited_s = time.monotonic() - self._owed_since_s
            if waited_s > self._double('owed_timeout_s'):
                episode.abandon(f'no trajectory for stamp {self._owed_ns} ns in {waited_s:.1f} s')
                self._report(episode)
            return IDLE_WAIT_S
        self._step(episode)
        return 0.0

    def _heard(self) -> bool:
        """Whether as many as are waited for will get what is published.

        Time stands still until they answer, so a frame that was published before a subscription
        was found would never come.
        """
        expected = self.get_parameter('listeners').value
        publishers = (self._image_pub, self._state_pub)
        return all(publisher.get_subscription_count() >= expected for publisher in publishers)

    def _advance_realtime(self, episode: Episode) -> float:
        due_ns = self._start_monotonic_ns + episode.elapsed_ns
        behind_ns = time.monotonic_ns() - due_ns
        if self._published_ns != episode.now_ns:
            if behind_ns < 0:
                return -behind_ns / NS_PER_S
            late = behind_ns > FRAME_NS
            self._publish(episode, picture=episode.frame_due and not late)
            self._dropped += episode.frame_due and late
        wait_ns = due_ns + STEP_NS - time.monotonic_ns()
        if wait_ns > 0:
            return wait_ns / NS_PER_S
        self._step(episode)
        return 0.0

    def _step(self, episode: Episode) -> None:
        episode.step()
        if episode.ended is not None:
            self._report(episode)

    def _publish(self, episode: Episode, picture: bool) -> None:
        stamp_ns = episode.now_ns
        self._published_ns = stamp_ns
        self._publish_clock(stamp_ns)
        self._state_pub.publish(_joint_state(self._world.joint_positions(), stamp_ns))
        if picture:
            self._image_pub.publish(_image(self._world.render(), stamp_ns))
            self._frames += 1

    def _publish_clock(self, stamp_ns: int) -> None:
        if self._clock_pub is not None:
            self._clock_pub.publish(Clock(clock=ns_to_time(stamp_ns)))

    def _report(self, episode: Episode) -> None:
        self._owed_ns = None
        self._success_pub.publish(Bool(data=episode.success))
        report = {
            'seed': episode.seed,
            'success': episode.success,
            'reason': episode.ended,
            'duration_s': episode.elapsed_ns / NS_PER_S,
            'trajectories': self._trajectories,
            'refused': self._refused,
            'frames': self._frames,
            'dropped_frames': self._dropped,
        }
        self._episode_pub.publish(String(data=json.dumps(report)))
        self.get_logger().info(
            f'seed {episode.seed}: {episode.ended} after {report["duration_s"]:.2f} s'
        )

    def close(self) -> None:
        """Free the renderer."""
        self._world.close()


def main(arguments: list[str] | None = None) -> int:
    """Console command robot_node."""
    rclpy.init(args=arguments)
    node: RobotNode | None = None
    executor = SingleThreadedExecutor()
    try:
        node = RobotNode()
        executor.add_node(node)
        while rclpy.ok():
            executor.spin_once(timeout_sec=node.advance())
    except (KeyboardInterrupt, ExternalShutdownException):
        pass
    except (ValueError, ImportError) as error:
        rclpy.logging.get_logger('robot').fatal(str(error))
        return 1
    finally:
        executor.shutdown()
        if node is not None:
            node.close()
            node.destroy_node()
        rclpy.try_shutdown()
    return 0


if __name__ == '__main__':
    sys.exit(main())
