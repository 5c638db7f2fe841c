# SPDX-License-Identifier: Apache-2.0
"""The engine of the CPU: packed blocks, run by a compiled plan.

At batch size one a chunk is many small operations, so their number decides. A fully reused step is
six: the embedding with the sum of all residuals, normalisation, head, and three for the scheduler.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tts_policy.policy.denoisers.denoiser import Denoiser
from tts_policy.policy.denoisers.transformer import (
    ConditionalEncoder,
    CrossAttention,
    FeedForward,
    SelfAttention,
    TransformerDenoiser,
)
from tts_policy.policy.engines.engine import Engine
from tts_policy.policy.engines.packed_blocks import (
    FoldedMemory,
    PackedCrossAttention,
    PackedEncoder,
    PackedFeedForward,
    PackedSelfAttention,
    fold_norm,
)
from tts_policy.policy.engines.program import CONSTANT, Op, compile_plan
from tts_policy.policy.feature_cache import FeatureCache
from tts_policy.policy.inpainting import Inpainting
from tts_policy.policy.plan import Plan, dense_plan
from tts_policy.policy.schedulers.scheduler import Scheduler
from tts_policy.policy.stopwatch import Stopwatch

Block = Callable[[Tensor, Tensor], None]


class FoldedScheduler:
    """Head and scheduler of every step.

    With p = x0_x x + x0_output output a step is x0 = clip(p) and x' = a x0 + b p + c x + d x0'' +
    noise, where x0'' is the x0 of the step before. The head's bias is taken out of p, into the
    clipping bounds and the noise. So p is one product, and p and every x0 are off by a constant.
    """

    def __init__(
        self, denoiser: TransformerDenoiser, scheduler: Scheduler, cache: FeatureCache
    ) -> None:
        weight, bias = fold_norm(denoiser.norm, denoiser.head)
        self._norm, self._eps = (denoiser.spec.width,), denoiser.norm.eps
        self._head = weight.t().contiguous()
        table = torch.tensor(scheduler.table, dtype=torch.float64)
        to_x, to_output, next_x0, next_x, next_output, next_noise, next_previous = table.unbind(1)
        next_p = next_output / to_output
        next_x = next_x - next_p * to_x
        columns = [to_x, to_output, next_x0, next_p, next_x, next_previous]
        self._scalars = torch.stack(columns, dim=1).tolist()
        shift = to_output[:, None] * bias.double()
        self._low, self._high = (
            list((side - shift).float()) for side in (-scheduler.clip, scheduler.clip)
        )
        constant = (next_x0 + next_p)[:, None] * shift
        constant[1:] += next_previous[1:, None] * shift[:-1]
        shape = cache.initial_noise.shape[1:]
        self._constant = constant.float()[:, None].expand(-1, *shape).contiguous()
        self._noise_scale = next_noise.float()[:, None, None]
        self._step_noise = cache.step_noise
        self._added = self._constant.clone()
        self._rows = list(self._added)
        self._p, self._x0, self._previous_x0 = (torch.empty(shape) for _ in range(3))

    def begin(self) -> None:
        """Take the noise that the cache holds for this tick."""
        if len(self._step_noise):
            torch.addcmul(
                self._constant, self._step_noise[:, 0], self._noise_scale, out=self._added
            )

    def step(self, i: int, tokens: Tensor, x: Tensor) -> None:
        """Finish step i: tokens [T, D] after the last block, x [T, A] becomes less noisy."""
        to_x, to_output, next_x0, next_p, next_x, next_previous = self._scalars[i]
        self._x0, self._previous_x0 = self._previous_x0, self._x0
        normed = torch.layer_norm(tokens, self._norm, eps=self._eps)
        torch.addmm(x, normed, self._head, beta=to_x, alpha=to_output, out=self._p)
        torch.clamp(self._p, self._low[i], self._high[i], out=self._x0)
        torch.add(self._rows[i], x, alpha=next_x, out=x)
        x.add_(self._x0, alpha=next_x0)
        if next_p:
            x.add_(self._p, alpha=next_p)
        if next_previous:
            x.add_(self._previous_x0, alpha=next_previous)


@dataclass(frozen=True)
class _BoundProgram:
    """A plan's program, with the engine's methods in the place of its operations."""

    plan: Plan
    calls: list[tuple[Callable[[int], None], int]]
    starts: list[int]
    batches: list[tuple[Tensor, Tensor]]


class PackedEngine(Engine):
    """Packed blocks, folded memory and scheduler tables of one sampler, in float32."""

    @staticmethod
    def unsupported(denoiser: Denoiser, device: torch.device) -> str:
        """Say why the engine cannot run a denoiser on a device; empty if it can."""
        if device.type != 'cpu':
            return f'expected a CPU, got {device}'
        if (
            type(denoiser) is TransformerDenoiser
            and type(denoiser.encoder) is ConditionalEncoder
            and {type(b) for b in denoiser.blocks} <= {SelfAttention, CrossAttention, FeedForward}
            and denoiser.position.dtype == torch.float32
        ):
            return ''
        return (
            'expected a float32 transformer denoiser without attention between condition tokens, '
            f'got {type(denoiser).__name__}'
        )

    def __init__(
        self,
        denoiser: Denoiser,
        scheduler: Scheduler,
        cache: FeatureCache,
        force_first_step: bool,
    ) -> None:
        assert isinstance(denoiser, TransformerDenoiser)
        spec, encoder = denoiser.spec, denoiser.encoder
        self._cache, self._first = cache, int(force_first_step)
        self._kinds = spec.stack.kinds
        self.time_tokens = encoder.time_tokens(torch.tensor(scheduler.spec.timesteps()))
        self.observation_tokens = torch.empty(0)
        self._encoder = PackedEncoder(encoder, spec.obs_steps)
        self._memory = FoldedMemory(denoiser, self.time_tokens)
        # Layer of every block that reads the memory.
        self._layers = [b.layer if b.conditioned else None for b in spec.stack.blocks]
        self._blocks = self._pack(denoiser)
        self._scheduler = FoldedScheduler(denoiser, scheduler, cache)
        self._action = denoiser.action.weight.t().contiguous()
        cells = cache.store[:, 0]
        cells[-1].copy_(denoiser.position + denoiser.action.bias)
        self._rows, self._cells = cells.flatten(1), list(cells)
        self._tokens = torch.empty(spec.horizon, spec.width)
        self._x = torch.empty(spec.horizon, spec.action_dim)
        self._sums: list[Tensor] = []
        self._inpainting: Inpainting | None = None
        self._methods: dict[int, Callable[[int], None]] = {
            Op.EMBED: self._embed,
            Op.COMPUTE: self._compute,
            Op.ADD: self._add,
            Op.GATHER: self._gather,
            Op.FINISH: self._finish,
        }
        self._dense = self._program = self._bind(dense_plan(cache.steps, cache.blocks))

    def _pack(self, denoiser: TransformerDenoiser) -> list[Block]:
        rows = denoiser.spec.horizon
        blocks: list[Block] = []
        for spec, block in zip(denoiser.spec.stack.blocks, denoiser.blocks, strict=True):
            match block:
                case SelfAttention():
                    blocks.append(PackedSelfAttention(block, denoiser.self_mask))
                case CrossAttention():
                    blocks.append(PackedCrossAttention(block, self._memory, spec.layer, rows))
                case FeedForward():
                    blocks.append(PackedFeedForward(block, rows))
        return blocks

    def observe(self, features: Tensor) -> None:
        """Encode the observation features [1, To, Do] of a tick."""
        tokens = self._encoder(features[0])
        self.observation_tokens = tokens[None]
        self._memory.observe(tokens)

    def denoise(
        self, plan: Callable[[], Plan], watch: Stopwatch, inpainting: Inpainting | None = None
    ) -> tuple[Tensor, Plan]:
        """Denoise by a plan; see `Engine.denoise`."""
        self._x.copy_(self._cache.initial_noise[0])
        self._inpainting = inpainting
        if inpainting is not None:
            inpainting.impose(0, self._x)
        self._scheduler.begin()
        self._sums.clear()
        self._run(self._dense, 0, self._first)
        watch.lap('first_step')
        executed = plan()
        watch.lap('plan')
        program = self._compiled(executed)
        watch.lap('compile')
        self._run(program, self._first, len(executed))
        watch.lap('masked_steps')
        return self._x.clone()[None], executed

    def _compiled(self, plan: Plan) -> _BoundProgram:
        """Return the plan's program, the last one if the plan has not changed."""
        for program in (self._dense, self._program):
            if np.array_equal(plan, program.plan):
                return program
        self._program = self._bind(plan)
        return self._program

    def _bind(self, plan: Plan) -> _BoundProgram:
        program = compile_plan(plan, self._kinds)
        return _BoundProgram(
            plan.copy(),
            [(self._methods[op], argument) for op, argument in program.ops],
            program.starts,
            [(torch.from_numpy(rows), torch.from_numpy(o)) for rows, o in program.batch_rows()],
        )

    def _run(self, program: _BoundProgram, first: int, last: int) -> None:
        self._batches = program.batches
        for call, argument in program.calls[program.starts[first] : program.starts[last]]:
            call(argument)

    def _embed(self, number: int) -> None:
        constant = self._cells[-1] if number == CONSTANT else self._sums[number]
        torch.addmm(constant, self._x, self._action, out=self._tokens)

    def _compute(self, cell: int) -> None:
        step, block = divmod(cell, len(self._blocks))
        layer = self._layers[block]
        if layer is not None:
            self._memory.enter(step, layer)
        residual = self._cells[cell]
        self._blocks[block](self._tokens, residual)
        self._tokens.add_(residual)

    def _add(self, number: int) -> None:
        self._tokens.add_(self._sums[number])

    def _gather(self, batch: int) -> None:
        rows, offsets = self._batches[batch]
        sums = torch.embedding_bag(self._rows, rows, offsets)[0]
        self._sums.extend(sums.view(-1, *self._tokens.shape))

    def _finish(self, step: int) -> None:
        self._scheduler.step(step, self._tokens, self._x)
        if self._inpainting is not None:
            self._inpainting.impose(step + 1, self._x)
