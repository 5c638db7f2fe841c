# SPDX-License-Identifier: Apache-2.0
"""A tick of the worker: what is asked of it, and what it reports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from tts_policy.control.output import Sent
    from tts_policy.control.ticks import ScheduledTick
    from tts_policy.policy.contract import CommittedActions
    from tts_policy.policy.policy import Chunk

# Why an episode begins after a chunk that was refused.
CHUNK_REFUSED = 'chunk refused'


@dataclass(frozen=True)
class TickSettings:
    """What is asked of the next tick; `continuing` is none, hard or soft (`hold_committed`)."""

    sparsity: float = 0.0
    latency_budget_s: float = 0.0
    interval_ns: int = 1
    continuing: str = 'none'


@dataclass(frozen=True)
class Tick:
    """One control tick: the window it saw, what was asked of it, and what it has to continue."""

    scheduled: ScheduledTick
    sparsity: float
    interval_ns: int
    generation: int
    began_s: float
    committed: CommittedActions | None = None


@dataclass(frozen=True)
class TickReport:
    """A finished tick: its chunk, its times, and what became of it.

    latency_s: wall clock from taking the window to delivery; `sent` is None where the chunk was
    `refused`, with the reason; over_budget_s: p95 latency in s where no sparsity is left to raise.
    """

    tick: Tick
    chunk: Chunk
    now_ns: int
    latency_s: float
    sent: Sent | None = None
    refused: str | None = None
    too_late: bool = False
    over_budget_s: float | None = None

    @property
    def age_s(self) -> float:
        """Age of the newest observation at delivery (ROS clock)."""
        return (self.now_ns - self.tick.scheduled.stamp_ns) * 1e-9

    @property
    def late(self) -> bool:
        """Whether the next tick's observation was due before this chunk arrived (ROS clock)."""
        return self.now_ns - self.tick.scheduled.stamp_ns > self.tick.interval_ns

    @property
    def late_wall(self) -> bool:
        """Whether the wall latency exceeds the replan interval, whatever the ROS clock does."""
        return self.latency_s * 1e9 > self.tick.interval_ns


class Reports(Protocol):
    """Hears what the worker does, with the worker held."""

    def on_reset(self, reason: str) -> None:
        """A new episode begins."""

    def on_tick(self, report: TickReport) -> None:
        """A tick is finished."""
