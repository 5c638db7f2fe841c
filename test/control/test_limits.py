# SPDX-License-Identifier: Apache-2.0
"""A trajectory keeps every bound of its joints, or is refused whole."""

from __future__ import annotations

import numpy as np
import pytest

from tts_policy.control.limits import JointLimits, LimitSource
from tts_policy.control.trajectory import Trajectory, TrajectoryRefused, plan_trajectory
from tts_policy.control.urdf import UrdfLimits

JOINTS = ('a', 'b')
PERIOD = 50_000_000
STAMP = 1_700_000_000_000_000_000
RAMP = np.stack([np.arange(15) * 0.01, 1.0 - np.arange(15) * 0.02], axis=1)


def plan(actions: np.ndarray = RAMP) -> Trajectory:
    return plan_trajectory(actions, JOINTS, PERIOD, 1, STAMP, STAMP)


def limits(**changes: object) -> JointLimits:
    values = {
        'lower': np.array([-1.0, -1.0]),
        'upper': np.array([1.0, 1.0]),
        'velocity': np.array([1.0, 1.0]),
        'acceleration': np.full(2, np.inf),
        'first_distance': np.array([0.3, 0.3]),
        'tolerance': 0.1,
        **changes,
    }
    return JointLimits(JOINTS, **values)  # type: ignore[arg-type]


MEASURED = np.array([0.0, 1.0])


def test_a_chunk_within_limits_is_unchanged() -> None:
    got = limits().apply(plan(), MEASURED)
    assert np.array_equal(got.positions, RAMP)


def test_positions_within_the_tolerance_are_clipped() -> None:
    actions = RAMP + np.array([0.0, 0.15])
    got = limits().apply(plan(actions), MEASURED)
    assert got.positions.max() == 1.0
    assert np.array_equal(got.positions, np.clip(actions, -1, 1))


def test_a_clipped_point_is_at_rest_so_that_no_spline_passes_the_bound() -> None:
    rising = np.stack([np.zeros(15), 0.96 + np.arange(15) * 0.01], axis=1)
    got = limits().apply(plan(rising), MEASURED)
    assert got.positions[:, 1].max() == 1.0
    assert (got.velocities[5:, 1] == 0.0).all()
    assert np.allclose(got.velocities[:4, 1], 0.2)


def test_the_velocity_of_the_first_point_is_bounded_whatever_was_dropped_before_it() -> None:
    spike = RAMP.copy()
    spike[2, 0] = -0.9
    late = plan_trajectory(spike, JOINTS, PERIOD, 1, STAMP, STAMP + 3 * PERIOD)
    assert late.velocities[0, 0] > 9.0
    got = limits().apply(late, MEASURED)
    assert np.abs(got.velocities).max() <= 1.0


@pytest.mark.parametrize(
    ('actions', 'changes', 'reason'),
    [
        (
            RAMP + np.array([0.0, 0.21]),
            {},
            r'b: expected position \[-1\.0, 1\.0\], got 1\.2100 at point 0',
        ),
        (
            -RAMP,
            {'first_distance': np.full(2, 9.0), 'lower': np.array([0.0, -1.0])},
            'a: expected',
        ),
        (RAMP * [6.0, 1.0], {}, r'a: expected velocity at most 1\.0, got 1\.2'),
        (RAMP + np.array([0.31, 0.0]), {}, 'a: expected distance of the first point'),
    ],
)
def test_a_violation_beyond_the_tolerance_refuses_the_whole_chunk(
    actions: np.ndarray, changes: dict[str, object], reason: str
) -> None:
    with pytest.raises(TrajectoryRefused, match=reason):
        limits(**changes).apply(plan(actions), MEASURED)


def test_unbounded_limits_let_everything_finite_pass() -> None:
    actions = RAMP * 1e6
    got = JointLimits.unbounded(JOINTS).apply(plan(actions), MEASURED)
    assert np.array_equal(got.positions, actions)


def test_acceleration_between_points_is_bounded() -> None:
    bend = RAMP.copy()
    bend[7:, 0] += 0.02
    bounded = limits(acceleration=np.array([5.0, 5.0]))
    assert np.array_equal(bounded.apply(plan(), MEASURED).positions, RAMP)
    with pytest.raises(
        TrajectoryRefused, match=r'a: expected acceleration at most 5\.0, got 8\.0'
    ):
        bounded.apply(plan(bend), MEASURED)


def test_the_step_from_the_set_point_in_force_counts_as_motion() -> None:
    before = np.array([-0.06, 1.0])
    times = np.array([0])
    limits().apply(plan(), MEASURED, (times, RAMP[:1]))
    with pytest.raises(TrajectoryRefused, match=r'a: expected velocity at most 1\.0, got 1\.2'):
        limits().apply(plan(), MEASURED, (times, before[None]))


def test_joints_without_a_bound_are_named() -> None:
    assert limits().missing() is None
    assert limits(acceleration=np.full(2, np.inf)).missing() is None
    one = limits(velocity=np.array([1.0, np.inf]), upper=np.array([np.inf, 1.0]))
    expected = 'limits: expected bounds of position and velocity for every joint, got none on '
    assert one.missing() == f"{expected}position of ['a'] and velocity of ['b']"
    source = LimitSource(one, 'when_present')
    source.describe(URDF)
    assert source.unbounded() == f"{expected}velocity of ['b']"


def test_scaling_tightens_motion_but_not_the_range() -> None:
    half = limits().scaled(0.5)
    assert half.velocity.tolist() == [0.5, 0.5]
    assert half.first_distance.tolist() == [0.15, 0.15]
    assert half.upper.tolist() == [1.0, 1.0]
    limits().scaled(0.3).apply(plan(RAMP * [1.0, 0.5]), MEASURED * [1.0, 0.5])
    with pytest.raises(TrajectoryRefused, match=r'b: expected velocity at most 0\.3'):
        limits().scaled(0.3).apply(plan(), MEASURED)


def test_a_urdf_only_tightens_and_leaves_unnamed_joints_alone() -> None:
    tightened = limits().tightened(
        {'a': UrdfLimits(-0.5, 3.0, 0.4), 'elsewhere': UrdfLimits(0.0, 0.0, 0.0)}
    )
    assert tightened.lower.tolist() == [-0.5, -1.0]
    assert tightened.upper.tolist() == [1.0, 1.0]
    assert tightened.velocity.tolist() == [0.4, 1.0]
    with pytest.raises(ValueError, match='a: expected room between the limits'):
        limits().tightened({'a': UrdfLimits(2.0, 3.0)})


URDF = """<robot name="r"><joint name="a" type="revolute">
<limit lower="-2" upper="2" velocity="0.1" effort="1"/></joint></robot>"""


def test_required_limits_that_are_missing_or_broken_let_nothing_pass() -> None:
    source = LimitSource(limits(), 'required', ['b'])
    with pytest.raises(TrajectoryRefused, match='expected a URDF on robot_description'):
        source.current()
    source.describe(URDF)
    assert source.current().velocity.tolist() == [0.1, 1.0]
    source.describe('<robot')
    with pytest.raises(TrajectoryRefused, match='robot_description: expected XML'):
        source.current()
    source.describe(URDF)
    source.scale = 0.5
    assert source.current().velocity.tolist() == [0.05, 0.5]


JOINT = URDF.partition('>')[2].removesuffix('</robot>')
BOTH = f'<robot name="r">{JOINT}{JOINT}</robot>'.replace('"a"', '"b"', 1)


@pytest.mark.fault
def test_a_required_description_has_to_be_that_of_the_arm() -> None:
    source = LimitSource(limits(), 'required')
    source.describe(URDF)
    with pytest.raises(
        TrajectoryRefused, match=r"expected the joints \['a', 'b'\], missing \['b'"
    ):
        source.current()
    source.describe(BOTH)
    assert source.current().velocity.tolist() == [0.1, 0.1]


@pytest.mark.fault
@pytest.mark.parametrize('urdf', ['when_present', 'required'])
@pytest.mark.parametrize('arm_first', [True, False])
def test_descriptions_of_arm_and_gripper_bound_both_in_either_order(
    urdf: str, arm_first: bool
) -> None:
    source = LimitSource(limits(), urdf, ['b'])
    texts = [URDF, URDF.replace('"a"', '"b"').replace('"0.1"', '"0.2"')]
    for text in texts if arm_first else reversed(texts):
        source.describe(text)
    assert source.current().velocity.tolist() == [0.1, 0.2]
    source.describe(URDF.replace('"0.1"', '"0.05"'))
    assert source.current().velocity.tolist() == [0.05, 0.2]


def test_a_description_that_names_other_joints_says_so_where_it_is_not_required() -> None:
    source = LimitSource(limits(), 'when_present')
    source.describe(URDF.replace('"a"', '"left_a"'))
    assert source.unnamed == ['a', 'b']
    assert source.current().velocity.tolist() == [1.0, 1.0]


def test_limits_of_the_parameters_hold_while_no_urdf_is_present() -> None:
    assert LimitSource(limits(), 'when_present').current().velocity.tolist() == [1.0, 1.0]
