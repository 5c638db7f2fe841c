# SPDX-License-Identifier: Apache-2.0
"""Where commands go: what a controller does not take, and what arm and gripper get."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip('rclpy', reason='rclpy is not installed')

from output_bench import JOINTS, PERIOD, RAMP, REST, T0, Bench, Recorder

from tts_policy.control.trajectory import TrajectoryRefused, plan_trajectory
from tts_policy.node.sinks import ActionSink, GripperStream, SplitSink


class Controller:
    """Stands for the client of an action whose server is there or not."""

    ready = False

    def __init__(self) -> None:
        self.goals: list[Any] = []
        self.answers, self.results = list[Any](), list[Any]()
        self.cancelled: list[int] = []

    def answer(self, accepted: bool) -> None:
        """Answer the newest goal."""
        number = len(self.goals)
        handle = SimpleNamespace(
            accepted=accepted,
            get_result_async=lambda: SimpleNamespace(add_done_callback=self.results.append),
            cancel_goal_async=lambda: self.cancelled.append(number),
        )
        self.answers[-1](SimpleNamespace(result=lambda: handle))

    def abort(self) -> None:
        """End the newest goal that was accepted."""
        end = SimpleNamespace(status=6, result=SimpleNamespace(error_string='off its path'))
        none = {'cancelled': lambda: False, 'exception': lambda: None}
        self.results[-1](SimpleNamespace(result=lambda: end, **none))

    def server_is_ready(self) -> bool:
        return self.ready

    def send_goal_async(self, goal: Any) -> Any:
        self.goals.append(goal)
        return SimpleNamespace(add_done_callback=self.answers.append)


@pytest.mark.fault
def test_what_no_controller_took_is_not_in_force_when_one_comes() -> None:
    controller, refused = Controller(), list[str]()
    bench = Bench(1.0, command=ActionSink(controller, SimpleNamespace, refused.append))
    with pytest.raises(TrajectoryRefused, match='expected an action server, got none'):
        bench.output.send(RAMP, T0, T0, enabled=True)
    assert not bench.output.hold(T0)
    controller.ready = True
    now = T0 + 8 * PERIOD
    bench.output.measured(now, REST, now)
    # The arm is where it was: 0.1 rad take more than one period.
    sent = bench.output.send(RAMP + RAMP[8] * [1, 1, 0], now, now, enabled=True)
    assert sent.trajectory.dropped > 0
    controller.ready = False
    assert bench.output.hold(now)
    assert len(controller.goals) == 1 and 'got none' in refused[0]


@pytest.mark.fault
@pytest.mark.parametrize('accepted', [False, True])
def test_after_a_goal_that_failed_the_next_chunk_is_a_start(accepted: bool) -> None:
    controller, refused = Controller(), list[str]()
    controller.ready = True
    bench = Bench(1.0, command=ActionSink(controller, SimpleNamespace, refused.append))
    bench.output.send(RAMP, T0, T0, enabled=True)
    assert bench.output.committed(T0 + PERIOD, PERIOD, True, soft=False)
    controller.answer(accepted)
    if accepted:
        controller.abort()
    assert len(refused) == 1
    now = T0 + 8 * PERIOD
    assert bench.output.committed(now, PERIOD, True, soft=False) is None
    bench.output.measured(now, REST, now)
    sent = bench.output.send(RAMP + RAMP[8] * [1, 1, 0], now, now, enabled=True)
    assert sent.trajectory.dropped > 0
    controller.answer(True)
    assert bench.output.committed(now + PERIOD, 14 * PERIOD, True, soft=False)
    # Whatever the controller made of it, it is told to hold when the gate closes.
    assert bench.output.hold(now)


@pytest.mark.fault
def test_where_a_controller_does_not_take_the_hold_the_goal_it_follows_is_cancelled() -> None:
    controller, refused = Controller(), list[str]()
    controller.ready = True
    bench = Bench(command=ActionSink(controller, SimpleNamespace, refused.append))
    bench.output.send(RAMP, T0, T0, enabled=True)
    controller.answer(True)
    bench.output.send(RAMP, T0 + PERIOD, T0 + PERIOD, enabled=True)
    controller.answer(False)
    assert controller.cancelled == []
    assert bench.output.hold(T0 + 2 * PERIOD)
    controller.answer(False)
    assert controller.cancelled == [1] and len(refused) == 2


def test_arm_and_gripper_get_their_own_joints() -> None:
    arm, gripper = Recorder(), Recorder()
    trajectory = plan_trajectory(RAMP, JOINTS, PERIOD, 1, T0, T0)
    SplitSink(arm, gripper, JOINTS, ['grip']).send(trajectory)
    assert arm.sent[0].joints == ('a', 'b')
    assert gripper.sent[0].joints == ('grip',)
    assert np.array_equal(gripper.sent[0].positions, RAMP[:, 2:])
    SplitSink(arm, None, JOINTS, ['grip']).finish(trajectory)
    assert arm.finished[0].joints == ('a', 'b')


@pytest.mark.fault
def test_the_hold_is_on_its_way_to_all_joints_before_a_controller_is_waited_for() -> None:
    done: list[str] = []

    class Slow(Recorder):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.finish = lambda trajectory: done.append(f'{name} sent')  # type: ignore[method-assign]
            self.settle = lambda: done.append(f'{name} waited')  # type: ignore[method-assign]

    bench = Bench(command=SplitSink(Slow('arm'), Slow('gripper'), JOINTS, ['grip']))
    bench.output.send(RAMP, T0, T0, enabled=True)
    assert bench.output.hold(T0)
    assert done == ['arm sent', 'gripper sent', 'arm waited', 'gripper waited']


def test_a_streamed_gripper_moves_to_the_first_point_no_faster_than_it_may() -> None:
    streamed: list[float] = []
    publisher = SimpleNamespace(publish=lambda message: streamed.append(message.data[0]))
    stream = GripperStream(publisher)  # type: ignore[arg-type]
    split = SplitSink(Recorder(), stream, JOINTS, ['grip'])
    bench = Bench(velocity=1.0, command=split)
    # 0.31 from where the gripper is: that takes 310 ms of the chunk at 1 rad/s.
    sent = bench.output.send(RAMP + [0, 0, 0.31], T0, T0, enabled=True)
    assert sent.trajectory.dropped == 6
    times = np.arange(0, 500, 10) * 1_000_000
    for time_ns in times:
        stream.stream(T0 + int(time_ns))
    assert streamed[0] == pytest.approx(REST[2]) and streamed[-1] == pytest.approx(0.35)
    assert np.abs(np.diff(streamed)).max() <= 0.01 + 1e-9
