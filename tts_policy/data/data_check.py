# SPDX-License-Identifier: Apache-2.0
"""What a set of recordings is like, before anything is trained on it: rates, gaps, skew, ranges.

Every finding is one line; none of them stops the training. A bag stands out when one of its
numbers is more than `OUTLIER_MADS` median absolute deviations off the median of all bags.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tts_policy.data.samples import Sample
from tts_policy.policy.contract import PolicyContract

OUTLIER_MADS = 8.0
# A share of the median below which a deviation is no news, however even the other bags are.
OUTLIER_SHARE = 0.2
# More bags than this share, standing out by the same number, are another way of doing the task.
MODE_SHARE = 0.05
FLAT_LEVELS = 2.0


@dataclass
class _Stream:
    """Stamps of one key of one bag."""

    stamps: list[int] = field(default_factory=list)

    def array(self) -> NDArray[np.int64]:
        return np.sort(np.array(self.stamps, np.int64))


@dataclass
class _BagCheck:
    """What one bag showed."""

    name: str
    streams: dict[str, _Stream] = field(default_factory=dict)
    low: NDArray[np.float64] | None = None
    high: NDArray[np.float64] | None = None
    speed: NDArray[np.float64] | None = None
    last_joints: tuple[int, NDArray[np.float64]] | None = None
    last_image: dict[str, NDArray[np.uint8]] = field(default_factory=dict)
    frozen: int = 0
    flat: int = 0
    commands: int = 0


class DataCheck:
    """Collects samples bag by bag: call `begin` for each, `add` for its samples, then `report`."""

    def __init__(self, contract: PolicyContract) -> None:
        self._contract = contract
        self._period_ns = round(contract.observation.period_s * 1e9)
        self._bags: list[_BagCheck] = []

    def begin(self, name: str) -> None:
        """Start the next bag."""
        self._bags.append(_BagCheck(name))

    def add(self, sample: Sample) -> None:
        """Take one sample of the bag begun last."""
        bag = self._bags[-1]
        if sample.key == 'commands':
            bag.commands += 1
        elif sample.key == 'joints':
            self._add_joints(bag, sample)
        elif sample.value is not None:
            last = bag.last_image.get(sample.key)
            bag.frozen += last is not None and np.array_equal(last, sample.value)
            bag.flat += float(sample.value.std()) < FLAT_LEVELS
            bag.last_image[sample.key] = sample.value
        if sample.value is not None:
            bag.streams.setdefault(sample.key, _Stream()).stamps.append(sample.stamp_ns)

    def _add_joints(self, bag: _BagCheck, sample: Sample) -> None:
        values = sample.value
        assert values is not None
        bag.low = values.copy() if bag.low is None else np.minimum(bag.low, values)
        bag.high = values.copy() if bag.high is None else np.maximum(bag.high, values)
        if bag.last_joints is not None and sample.stamp_ns > bag.last_joints[0]:
            speed = np.abs(values - bag.last_joints[1]) / (
                (sample.stamp_ns - bag.last_joints[0]) * 1e-9
            )
            bag.speed = speed if bag.speed is None else np.maximum(bag.speed, speed)
        bag.last_joints = (sample.stamp_ns, values)

    def report(self) -> dict[str, Any]:
        """Plain containers: `streams` and `joints` of all bags, and `findings`, one line each."""
        keys = [*(c.key for c in self._contract.observation.cameras), 'joints']
        joints = self._contract.observation.joints
        full = [bag for bag in self._bags if bag.low is not None and bag.high is not None]
        low, high = (np.array([getattr(b, name) for b in full]) for name in ('low', 'high'))
        return {
            'bags': len(self._bags),
            'seconds': sum(self._duration_s(bag) for bag in self._bags),
            'commands': sum(bag.commands for bag in self._bags),
            'images': {
                c.key: f'{c.height} x {c.width}' for c in self._contract.observation.cameras
            },
            'streams': {key: self._stream(key) for key in keys},
            'joints': {
                name: {'low': float(low[:, j].min()), 'high': float(high[:, j].max())}
                for j, name in enumerate(joints)
                if len(full)
            },
            'findings': self._findings(keys),
        }

    def _duration_s(self, bag: _BagCheck) -> float:
        stamps = [s for stream in bag.streams.values() for s in stream.stamps]
        return (max(stamps) - min(stamps)) * 1e-9 if stamps else 0.0

    def _stream(self, key: str) -> dict[str, float]:
        """Rate, largest gap, and how far behind it the other keys' newest sample is at most."""
        steps, skew = [], [0.0]
        for bag in self._bags:
            stamps = bag.streams.get(key, _Stream()).array()
            steps.append(np.diff(stamps))
            if key != 'joints' and len(stamps) and 'joints' in bag.streams:
                others = bag.streams['joints'].array()
                at = np.searchsorted(others, stamps, side='right') - 1
                known = at >= 0
                skew.append(float((stamps - others[np.maximum(at, 0)])[known].max(initial=0)))
        every = np.concatenate(steps) if steps else np.zeros(0)
        if not len(every):
            return {'rate_hz': 0.0, 'largest_gap_s': 0.0, 'largest_skew_s': 0.0}
        return {
            'rate_hz': float(1e9 / max(np.median(every), 1.0)),
            'largest_gap_s': float(every.max() * 1e-9),
            'largest_skew_s': max(skew) * 1e-9,
        }

    def _findings(self, keys: list[str]) -> list[str]:
        findings = []
        for bag in self._bags:
            for key in keys:
                steps = np.diff(bag.streams.get(key, _Stream()).array())
                gaps = int((steps > 1.5 * self._period_ns).sum())
                if gaps:
                    findings.append(
                        f'{bag.name}: {key}: {gaps} gaps of more than 1.5 periods, the largest '
                        f'{steps.max() * 1e-9:.3f} s: their windows are left out'
                    )
            images = sum(len(s.stamps) for key, s in bag.streams.items() if key != 'joints')
            for count, what in (
                (bag.frozen, 'equal to the one before'),
                (bag.flat, 'of one colour'),
            ):
                if count > 0.05 * max(images, 1):
                    findings.append(f'{bag.name}: {count} of {images} images are {what}')
        return findings + self._outliers()

    def _outliers(self) -> list[str]:
        """Bags that differ from the others in duration, or in range or speed of a joint."""
        measures: dict[str, list[float]] = {
            'duration in s': list(map(self._duration_s, self._bags))
        }
        for j, name in enumerate(self._contract.observation.joints):
            for what in ('low', 'high', 'speed'):
                values = [getattr(bag, what) for bag in self._bags]
                measures[f'{name}: {what}'] = [
                    np.nan if v is None else float(v[j]) for v in values
                ]
        findings = []
        for what, listed in measures.items():
            column = np.array(listed)
            centre = float(np.nanmedian(column)) if not np.isnan(column).all() else 0.0
            off = np.abs(column - centre)
            spread = float(np.nanmedian(off)) if not np.isnan(off).all() else 0.0
            limit = max(OUTLIER_MADS * spread, OUTLIER_SHARE * abs(centre), 1e-3)
            standing_out = np.flatnonzero(off > limit)
            if len(standing_out) > max(1, MODE_SHARE * len(column)):
                continue
            for at in standing_out:
                findings.append(
                    f'{self._bags[at].name}: {what} is {column[at]:.3f}, median of all '
                    f'{len(column)} bags {centre:.3f}'
                )
        return findings


def describe(report: dict[str, Any]) -> list[str]:
    """The report as lines for a person."""
    lines = [
        f'{report["bags"]} bags, {report["seconds"]:.1f} s, {report["commands"]} commands, '
        f'images {report["images"]}'
    ]
    for key, stream in report['streams'].items():
        lines.append(
            f'{key}: {stream["rate_hz"]:.1f} Hz, largest gap {stream["largest_gap_s"]:.3f} s'
            + (
                ''
                if key == 'joints'
                else f', joints behind by up to {stream["largest_skew_s"]:.3f} s'
            )
        )
    for name, joint in report['joints'].items():
        lines.append(f'{name}: {joint["low"]:.3f} to {joint["high"]:.3f}')
    return lines + [f'check: {finding}' for finding in report['findings']]


def write_check(path: Path, check: DataCheck) -> None:
    """Write the report as JSON and say it."""
    report = check.report()
    path.write_text(json.dumps(report, indent=2) + '\n')
    for line in describe(report):
        print(line)
