# SPDX-License-Identifier: Apache-2.0
"""Arguments that say what a recording holds: NAME:=TOPIC pairs as in ROS, and image sizes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from tts_policy.control.images import ImageFit
from tts_policy.data.reader import BagError


def parse_pairs(pairs: Sequence[str], expected: str) -> dict[str, str]:
    """Left to right sides; raises BagError naming what was `expected`."""
    parsed = {}
    for pair in pairs:
        left, separator, right = pair.partition(':=')
        if not separator or not left:
            raise BagError(f'{expected} expected, got {pair!r}')
        parsed[left] = right
    return parsed


def add_topic_argument(parser: argparse.ArgumentParser) -> None:
    """Add --topic STREAM:=TOPIC, which may be given several times."""
    parser.add_argument(
        '--topic',
        action='append',
        default=[],
        metavar='STREAM:=TOPIC',
        help='recorded topic of a camera key, of joints or of commands (empty for none), or a '
        'topic each of whose messages begins an episode, as cut',
    )


def add_image_fit_argument(parser: argparse.ArgumentParser) -> None:
    """Add --image-fit, the node's parameter of that name."""
    parser.add_argument(
        '--image-fit',
        choices=[fit.value for fit in ImageFit],
        default=ImageFit.EXACT.value,
        help='images of another size than the contract: refused, scaled, or cropped and scaled '
        '(default: %(default)s)',
    )
