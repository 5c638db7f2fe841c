# SPDX-License-Identifier: Apache-2.0
"""What a captured CUDA graph does, on a CPU: operations are recorded once and run again.

Every operation of a function is recorded with the very tensors that it took. A replay runs them
again and writes each result where it was when it was recorded, so whatever Python decided, counted
or allocated meanwhile is frozen, as in a graph. Reading a value back to the host is refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tts_policy.policy.engines.cuda import Run


def _tensors(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, (list, tuple)):
        return [tensor for value in values for tensor in _tensors(value)]
    return []


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        assert func is not torch.ops.aten._local_scalar_dense.default, 'the host waits for a value'
        result = func(*args, **kwargs)
        given = {t.untyped_storage().data_ptr() for t in _tensors([*args, *kwargs.values()])}
        made = _tensors(result)
        # Views and operations in place write where they wrote before.
        if any(tensor.untyped_storage().data_ptr() in given for tensor in made):
            made = []
        self.calls.append((func, args, kwargs, made))
        return result


def record(function: Run) -> Run:
    """Call a function once and return what replays its operations."""
    recorder = _Recorder()
    with recorder:
        function()

    def replay() -> None:
        for func, args, kwargs, made in recorder.calls:
            result = _tensors(func(*args, **kwargs))
            for target, value in zip(made, result, strict=bool(made)):
                target.copy_(value)

    return replay
