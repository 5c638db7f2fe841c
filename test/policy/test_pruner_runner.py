# SPDX-License-Identifier: Apache-2.0
"""A captured pruner gives the logits of the pruner, for every sparsity and observation."""

from __future__ import annotations

import pytest
import torch
from recording import RecordedCapture

from tts_policy.policy.engines.capture import Capture, Capturer
from tts_policy.policy.pruner import PlanPruner, Pruner, PrunerSpec
from tts_policy.policy.pruner_runner import CapturedPruner, InlinePruner
from tts_policy.policy.query_pruner import QueryPruner, QueryPrunerSpec


def pruners() -> dict[str, PlanPruner]:
    torch.manual_seed(0)
    made = {
        'tables': Pruner(PrunerSpec(4, 6, 16, 2, (0.5, 0.8), hidden=8)),
        'query': QueryPruner(QueryPrunerSpec(4, 6, 16, 2, width=16, heads=2, feed_forward=32)),
    }
    for pruner in made.values():
        for parameter in pruner.eval().requires_grad_(False).parameters():
            parameter.normal_()
    return made


@pytest.mark.parametrize('capture', [Capture(torch.device('cpu')), RecordedCapture()])
@pytest.mark.parametrize('name', ['tables', 'query'])
@torch.inference_mode()
def test_logits_are_those_of_the_pruner(name: str, capture: Capturer) -> None:
    pruner, time_tokens = pruners()[name], torch.randn(4, 16)
    inline = InlinePruner(pruner, time_tokens)
    captured = CapturedPruner(pruner, time_tokens, torch.zeros(1, 2, 16), capture=capture)
    for sparsity in (0.5, 0.8, 0.75, 0.0):
        tokens = torch.randn(1, 2, 16)
        for runner in (inline, captured):
            runner.start(tokens, sparsity)
        assert (captured.logits() == inline.logits()).all()
        assert (
            inline.logits() == pruner(pruner.gates(time_tokens), tokens, sparsity)[0].numpy()
        ).all()
    assert len({captured.logits().ctypes.data for _ in range(3)}) == 1
