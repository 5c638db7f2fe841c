# SPDX-License-Identifier: Apache-2.0
"""The last step of docs/import.md: a converted bundle and its completed draft run in the node."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml
from layouts import Sizes, save_lowdim

pytest.importorskip('rclpy', reason='rclpy is not installed')

from processes import wait_until

from tts_policy.convert.convert_checkpoint import main

if TYPE_CHECKING:
    from processes import RosProcess


def test_a_converted_policy_is_activated_with_its_completed_draft_and_not_before(
    tmp_path: Path, start_process: Callable[..., RosProcess]
) -> None:
    save_lowdim(tmp_path / 'a.ckpt', Sizes())
    bundle = tmp_path / 'bundle'
    assert main([str(tmp_path / 'a.ckpt'), str(bundle)]) == 0
    draft = bundle / 'parameters.yaml'
    arguments = ['--ros-args', '--params-file', str(draft), '-p', f'bundle:={bundle}']
    arguments += ['-p', 'autostart:=true']

    node = start_process('tts_policy.node.policy_node', *arguments)
    reason = 'limits.velocity: expected positive numbers'
    wait_until(lambda: reason in node.output, 20, 'the reason')
    assert node.stop() == 0 and 'active' not in node.output

    parameters = yaml.safe_load(draft.read_text())
    limits = parameters['/**/tts_policy']['ros__parameters']['limits']
    limits |= {name: [0.5] * len(limits['joints']) for name in ('velocity', 'first_point')}
    draft.write_text(yaml.safe_dump(parameters))
    node = start_process('tts_policy.node.policy_node', *arguments)
    wait_until(lambda: 'active, output disabled' in node.output, 20, 'an active node')
    assert node.stop() == 0, node.output
