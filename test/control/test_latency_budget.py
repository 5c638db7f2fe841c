# SPDX-License-Identifier: Apache-2.0
"""Sparsity by latency: within the range, and no more than it takes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tts_policy.control.latency_budget import TICKS, SparsityGovernor


def run(governor: SparsityGovernor, requested: float, budget_s: float, full_s: float) -> float:
    """Ticks of a policy whose latency falls with sparsity, until it settles."""
    sparsity = requested
    for _ in range(40 * TICKS):
        governor.record(full_s * (1.0 - sparsity), requested, budget_s)
        sparsity = governor.choose(requested)
    return sparsity


def test_no_budget_changes_nothing() -> None:
    assert run(SparsityGovernor(0.8), 0.3, 0.0, 9.0) == 0.3


def test_sparsity_rises_until_the_budget_is_held() -> None:
    assert run(SparsityGovernor(0.8), 0.0, 0.1, 0.2) == pytest.approx(0.5, abs=0.051)


def test_it_stops_at_what_the_bundle_recommends() -> None:
    assert run(SparsityGovernor(0.8), 0.0, 0.001, 0.2) == pytest.approx(0.8)


@pytest.mark.parametrize(
    ('requested', 'budget_s', 'short'),
    [(0.0, 0.001, True), (0.9, 0.001, True), (0.0, 0.1, False), (0.9, 0.1, False)],
)
def test_a_budget_that_cannot_be_held_is_told(
    requested: float, budget_s: float, short: bool
) -> None:
    governor = SparsityGovernor(0.8)
    run(governor, requested, budget_s, 0.2)
    assert (governor.short_s is not None) is short
    run(governor, requested, 0.0, 0.2)
    assert governor.short_s is None


def test_it_comes_back_when_there_is_room_again() -> None:
    governor = SparsityGovernor(0.8)
    run(governor, 0.2, 0.001, 0.2)
    assert run(governor, 0.2, 10.0, 0.2) == pytest.approx(0.2)


def test_a_request_above_the_recommendation_stays() -> None:
    assert run(SparsityGovernor(0.8), 0.9, 0.001, 0.2) == 0.9


@given(
    st.lists(st.floats(0.0, 1.0), max_size=60), st.floats(0.0, 0.99), st.floats(0.0, 0.99),
    st.floats(0.0, 1.0),
)  # fmt: skip
def test_it_is_never_below_the_request_nor_above_the_larger_of_both(
    latencies_s: list[float], requested: float, recommended: float, budget_s: float
) -> None:
    governor = SparsityGovernor(recommended)
    for latency_s in latencies_s:
        governor.record(latency_s, requested, budget_s)
        chosen = governor.choose(requested)
        assert requested <= chosen <= max(requested, recommended) + 1e-12
