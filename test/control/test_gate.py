# SPDX-License-Identifier: Apache-2.0
"""The output gate: what closes it, and that only the service opens it again."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tts_policy.control.gate import OutputGate


def gate(timeout_s: float = 0.0) -> OutputGate:
    made = OutputGate()
    made.enabled, made.timeout_s = True, timeout_s
    return made


def test_the_operator_opens_and_closes_it() -> None:
    made = OutputGate()
    assert made.closed_by(0.0) == 'output disabled'
    made.enabled = True
    assert made.closed_by(0.0) is None


def test_a_stop_stays_until_the_service_and_is_not_forgotten_while_it_is_true() -> None:
    made = gate()
    made.hear(True, 1.0)
    assert 'emergency stop' in str(made.closed_by(1.0))
    assert 'still true' in str(made.reopen(1.1))
    made.hear(False, 2.0)
    made.enabled = False
    made.enabled = True
    assert made.closed_by(100.0) is not None
    assert made.reopen(100.0) is None
    assert made.closed_by(100.0) is None
    assert made.stops == 1


def test_silence_closes_it_and_only_a_heartbeat_and_the_service_open_it() -> None:
    made = gate(timeout_s=0.5)
    assert 'nothing received yet' in str(made.closed_by(0.0))
    made.hear(False, 10.0)
    assert made.closed_by(10.5) is None
    assert 'nothing within 0.5 s' in str(made.closed_by(10.51))
    assert 'nothing within 0.5 s' in str(made.reopen(10.6))
    made.hear(False, 11.0)
    assert 'clear_stop' in str(made.closed_by(11.0))
    assert made.reopen(11.1) is None
    assert made.closed_by(11.2) is None


def test_silence_that_nobody_looked_at_does_not_pass_unseen() -> None:
    made = gate(timeout_s=0.5)
    made.hear(False, 0.0)
    made.hear(False, 5.0)
    assert made.closed_by(5.0) is not None


def test_a_time_in_which_nobody_listened_is_no_silence_but_keeps_it_closed() -> None:
    """While a bundle is loaded the heartbeats of a live switch wait to be heard."""
    made = gate(timeout_s=0.5)
    made.hear(False, 0.0)
    made.listen_anew()
    assert 'nothing received yet' in str(made.closed_by(3.0))
    made.hear(False, 3.0)
    assert made.closed_by(3.0) is None
    assert made.stops == 0
    made.hear(True, 3.1)
    made.listen_anew()
    made.hear(False, 6.0)
    assert 'emergency stop' in str(made.closed_by(6.0))


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just('hear'), st.booleans()),
            st.tuples(st.just('wait'), st.floats(0.0, 2.0)),
            st.tuples(st.just('clear'), st.none()),
        ),
        max_size=40,
    )
)
def test_after_a_stop_it_is_never_open_before_a_successful_clear(
    events: list[tuple[str, object]],
) -> None:
    made, now_s, latched = gate(timeout_s=0.5), 0.0, False
    for kind, value in events:
        if kind == 'hear':
            made.hear(bool(value), now_s)
            latched |= bool(value)
        elif kind == 'wait':
            now_s += float(value)  # type: ignore[arg-type]
        elif made.reopen(now_s) is None:
            latched = False
        if latched:
            assert made.closed_by(now_s) is not None
