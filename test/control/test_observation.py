# SPDX-License-Identifier: Apache-2.0
"""The observation window: what becomes of every kind of message, and what a window holds."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tts_policy.control.observation import (
    Arrival,
    ObservationWindow,
    WindowSpec,
    WindowUnavailable,
)

MS = 1_000_000
PERIOD = 50 * MS
SPEC = WindowSpec(
    keys=('camera', 'joints'),
    steps=2,
    period_ns=PERIOD,
    tolerance_ns=25 * MS,
    max_age_ns=250 * MS,
    gap_limit_ns=500 * MS,
    future_limit_ns=100 * MS,
)
T0 = 10_000 * MS


def filled(spec: WindowSpec = SPEC, frames: int = 2) -> ObservationWindow:
    """Return a window with camera frames every period and joints every 10 ms from T0."""
    window = ObservationWindow(spec)
    end = T0 + (frames - 1) * PERIOD
    for stamp in range(T0, end + 1, PERIOD):
        window.add('camera', stamp, np.array([stamp]), end)
    for stamp in range(T0, end + 1, 10 * MS):
        window.add('joints', stamp, np.array([stamp]), end)
    return window


def test_first_tick_is_at_the_second_frame_and_is_never_padded() -> None:
    window = filled(frames=1)
    assert window.tick_stamp(None) == T0
    with pytest.raises(WindowUnavailable, match='camera: expected a sample within'):
        window.window(T0, T0)
    window = filled(frames=2)
    got = window.window(window.tick_stamp(None), T0 + PERIOD)
    assert got['camera'][:, 0].tolist() == [T0, T0 + PERIOD]
    assert got['joints'][:, 0].tolist() == [T0, T0 + PERIOD]


def test_tick_waits_for_the_slowest_key() -> None:
    window = filled()
    window.add('camera', T0 + 2 * PERIOD, np.array([0]), T0 + 2 * PERIOD)
    assert window.tick_stamp(T0 + 2 * PERIOD) is None
    window.add('joints', T0 + 2 * PERIOD, np.array([0]), T0 + 2 * PERIOD)
    assert window.tick_stamp(T0 + 2 * PERIOD) == T0 + 2 * PERIOD


def test_tick_takes_the_newest_due_frame_half_a_period_early_at_most() -> None:
    window = filled(frames=6)
    newest = T0 + 5 * PERIOD
    assert window.tick_stamp(T0 + PERIOD) == newest
    assert window.tick_stamp(newest + 25 * MS) == newest
    assert window.tick_stamp(newest + 26 * MS) is None


def test_nearest_sample_is_taken_but_never_one_after_the_tick() -> None:
    window = ObservationWindow(SPEC)
    for stamp in (T0 - 3 * MS, T0 + 8 * MS, T0 + PERIOD):
        window.add('camera', stamp, np.array([stamp]), T0 + PERIOD)
    for stamp in (T0, T0 + PERIOD - 9 * MS, T0 + PERIOD + 1 * MS):
        window.add('joints', stamp, np.array([stamp]), T0 + PERIOD)
    got = window.window(T0 + PERIOD, T0 + PERIOD)
    assert got['camera'][:, 0].tolist() == [T0 - 3 * MS, T0 + PERIOD]
    assert got['joints'][:, 0].tolist() == [T0, T0 + PERIOD - 9 * MS]


def test_missing_sample_names_key_and_distance() -> None:
    window = filled()
    window.add('camera', T0 + 5 * PERIOD, np.array([0]), T0 + 5 * PERIOD)
    window.add('joints', T0 + 5 * PERIOD, np.array([0]), T0 + 5 * PERIOD)
    with pytest.raises(WindowUnavailable, match=r'camera: .*step 0 of 2, nearest is \+50\.0 ms'):
        window.window(T0 + 5 * PERIOD, T0 + 5 * PERIOD)


def test_duplicate_is_ignored_and_the_first_one_stays() -> None:
    window = filled()
    assert window.add('camera', T0, np.array([-1]), T0) is Arrival.DUPLICATE
    assert window.window(T0 + PERIOD, T0 + PERIOD)['camera'][0, 0] == T0
    assert window.arrivals['camera'][Arrival.DUPLICATE] == 1


def test_out_of_order_message_is_put_in_its_place() -> None:
    window = ObservationWindow(SPEC)
    now = T0 + PERIOD
    window.add('camera', T0 + PERIOD, np.array([1]), now)
    assert window.add('camera', T0, np.array([0]), now) is Arrival.REORDERED
    for stamp in (T0, T0 + PERIOD):
        window.add('joints', stamp, np.array([2]), now)
    assert window.window(T0 + PERIOD, now)['camera'][:, 0].tolist() == [0, 1]


def test_message_older_than_any_window_is_dropped() -> None:
    window = filled()
    late = T0 + PERIOD - SPEC.span_ns - 1
    assert window.add('camera', late, np.array([0]), T0 + PERIOD) is Arrival.LATE


def test_future_message_waits_until_the_clock_is_there() -> None:
    window = filled()
    stamp = T0 + 4 * PERIOD
    assert window.add('camera', stamp, np.array([7]), T0 + PERIOD) is Arrival.FUTURE
    assert window.latest('camera')[0] == T0 + PERIOD
    assert window.advance(stamp - SPEC.future_limit_ns - 1) == []
    assert window.advance(stamp - SPEC.future_limit_ns) == [Arrival.STORED]
    assert window.latest('camera')[0] == stamp


def test_messages_of_a_far_future_never_block_the_present() -> None:
    window = filled()
    for year in range(30):
        stamp = T0 + year * 10**18 + 10**15
        assert window.add('camera', stamp, np.array([0]), T0) is Arrival.FUTURE
    now = T0 + 2 * PERIOD
    assert window.add('camera', now, np.array([0]), now) is Arrival.STORED


@pytest.mark.fault
def test_a_stamp_of_a_wrong_clock_is_forgotten_once_its_source_has_the_right_one() -> None:
    window = filled()
    hour, now = 3600 * 10**9, T0 + 2 * PERIOD
    soon = now + SPEC.gap_limit_ns
    for stamp in (now + hour, soon, now + hour + PERIOD):
        assert window.add('camera', stamp, np.array([9]), T0) is Arrival.FUTURE
    assert window.add('joints', now, np.array([0]), now) is Arrival.STORED
    assert window.add('camera', now, np.array([0]), now) is Arrival.STORED
    assert window.advance(soon) == [Arrival.STORED]
    assert window.advance(now + 2 * hour) == []
    assert window.latest('camera')[0] == soon


def test_gap_starts_the_key_anew_and_is_reported_once() -> None:
    window = filled()
    stamp = T0 + PERIOD + SPEC.gap_limit_ns + 1
    assert window.add('camera', stamp, np.array([0]), stamp) is Arrival.GAP
    assert Arrival.GAP.breaks_continuity
    assert window.add('camera', stamp + PERIOD, np.array([0]), stamp + PERIOD) is Arrival.STORED
    window.add('joints', stamp + PERIOD, np.array([0]), stamp + PERIOD)
    with pytest.raises(WindowUnavailable, match='joints'):
        window.window(stamp + PERIOD, stamp + PERIOD)


def test_a_gap_of_exactly_the_limit_is_none() -> None:
    window = filled()
    stamp = T0 + PERIOD + SPEC.gap_limit_ns
    assert window.add('camera', stamp, np.array([0]), stamp) is Arrival.STORED


def test_backward_jump_starts_the_key_anew() -> None:
    window = filled()
    stamp = T0 - 10_000 * MS
    assert window.add('camera', stamp, np.array([0]), T0) is Arrival.BACKWARD
    assert window.latest('camera')[0] == stamp


def test_rewind_clears_the_old_time_and_keeps_the_new() -> None:
    window = filled()
    back = T0 - 5_000 * MS
    window.add('camera', back, np.array([0]), T0)
    assert window.rewind(back)
    assert window.latest('camera')[0] == back
    assert window.latest('joints') is None
    assert not window.rewind(back)


def test_an_old_tick_gives_no_window() -> None:
    window = filled()
    tick = T0 + PERIOD
    window.window(tick, tick + SPEC.max_age_ns)
    with pytest.raises(WindowUnavailable, match=r'at most 0\.250 s, got one of 0\.250 s'):
        window.window(tick, tick + SPEC.max_age_ns + 1)


def test_stale_and_missing_keys_are_named() -> None:
    window = ObservationWindow(SPEC)
    assert window.stale(T0) == [
        'camera: nothing received yet',
        'joints: nothing received yet',
    ]
    window.add('camera', T0, np.array([0]), T0)
    window.add('joints', T0, np.array([0]), T0)
    assert window.stale(T0 + SPEC.max_age_ns) == []
    window.add('joints', T0 + 300 * MS, np.array([0]), T0 + 300 * MS)
    assert window.stale(T0 + 300 * MS) == ['camera: nothing for 0.30 s, limit 0.25 s']


def test_clear_forgets_everything() -> None:
    window = filled()
    window.clear()
    assert window.tick_stamp(None) is None
    assert window.latest('joints') is None


def test_windows_are_copies() -> None:
    window = filled()
    window.window(T0 + PERIOD, T0 + PERIOD)['camera'][:] = 0
    assert window.window(T0 + PERIOD, T0 + PERIOD)['camera'][1, 0] == T0 + PERIOD


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(['camera', 'joints']),
            st.integers(-2000, 2000).map(lambda ms: T0 + ms * MS),
            st.integers(-2000, 2000).map(lambda ms: T0 + ms * MS),
        ),
        max_size=60,
    )
)
def test_whatever_arrives_a_window_is_true_to_its_stamps(
    messages: list[tuple[str, int, int]],
) -> None:
    window = ObservationWindow(replace(SPEC, capacity=8))
    now = T0 - 2000 * MS
    for key, stamp, later in messages:
        now = max(now, later)
        window.add(key, stamp, np.array([stamp]), now)
        window.advance(now)
        for buffer in window._buffers.values():
            assert buffer.stamps == sorted(set(buffer.stamps))
            assert len(buffer.stamps) == len(buffer.values) <= 8 + 1
            assert all(s <= now + SPEC.future_limit_ns for s in buffer.stamps)
        tick = window.tick_stamp(None)
        if tick is None:
            continue
        try:
            got = window.window(tick, now)
        except WindowUnavailable:
            continue
        targets = np.array([tick - PERIOD, tick])
        for values in got.values():
            assert (np.abs(values[:, 0] - targets) <= SPEC.tolerance_ns).all()
            assert (values[:, 0] <= tick).all()
        assert now - tick <= SPEC.max_age_ns


def test_skew_between_the_keys_of_a_step_is_bounded() -> None:
    def window(skew_ms: int) -> ObservationWindow:
        window = ObservationWindow(replace(SPEC, max_skew_ns=10 * MS))
        for stamp in (T0, T0 + PERIOD):
            window.add('camera', stamp, np.array([stamp]), T0 + PERIOD)
            window.add('joints', stamp - skew_ms * MS, np.array([stamp]), T0 + PERIOD)
        return window

    assert window(10).window(T0 + PERIOD, T0 + PERIOD)['joints'].shape == (2, 1)
    with pytest.raises(
        WindowUnavailable, match=r'joints: .* 10\.0 ms of the one of camera, got 11'
    ):
        window(11).window(T0 + PERIOD, T0 + PERIOD)
