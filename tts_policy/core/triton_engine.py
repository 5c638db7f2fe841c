# SPDX-License-Identifier: Apache-2.0
"""Engine around the persistent Triton kernel; on a GPU, or anywhere under TRITON_INTERPRET=1.

The plan goes to the device as one array of sources, the loop is one launch (two with step 0
forced: that step runs while the pruner does), and nothing comes back but the actions.
It has been run in the interpreter only, so no device chooses it by itself.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tts_policy.core import triton_kernel
from tts_policy.core.engine import Engine
from tts_policy.core.inpainting import Inpainting
from tts_policy.core.lattice import Lattice
from tts_policy.core.plan import Plan, Reuse, resolve_sources
from tts_policy.core.scheduler import NoiseScheduler
from tts_policy.core.stopwatch import Stopwatch
from tts_policy.core.transformer import (
    ConditionalEncoder,
    FeedForward,
    SelfAttention,
    TransformerDenoiser,
)

COMPUTED = -1
_TILE = 16


def padded(size: int) -> int:
    """Smallest power of two, 16 at least, that holds `size`."""
    return max(16, 1 << (size - 1).bit_length())


class KernelWeights:
    """Weights of a denoiser as the kernel reads them; see `triton_kernel.denoise`."""

    def __init__(self, denoiser: TransformerDenoiser, dtype: torch.dtype) -> None:
        spec = denoiser.spec
        selfs = [b for b in denoiser.blocks if isinstance(b, SelfAttention)]
        feeds = [b for b in denoiser.blocks if isinstance(b, FeedForward)]
        crosses = denoiser.cross_attentions
        actions = padded(spec.action_dim) - spec.action_dim
        by_layer = zip(selfs, crosses, feeds, strict=True)
        norms = [block.norm for layer in by_layer for block in layer]
        self.norms = torch.stack(
            [torch.stack([norm.weight, norm.bias]) for norm in (*norms, denoiser.norm)]
        )
        self.linear: list[Tensor] = [
            F.pad(denoiser.action.weight.t(), (0, 0, 0, actions)).to(dtype).contiguous()
        ]
        for layers in (
            [block.qkv for block in selfs],
            [block.out for block in selfs],
            [block.q for block in crosses],
            [block.out for block in crosses],
            [block.up for block in feeds],
            [block.down for block in feeds],
        ):
            self.linear += self._stack(layers, dtype)
        self.linear += [
            F.pad(denoiser.head.weight.t(), (0, actions)).to(dtype).contiguous(),
            F.pad(denoiser.head.bias, (0, actions)).to(dtype),
        ]

    @staticmethod
    def _stack(layers: list[nn.Linear], dtype: torch.dtype) -> list[Tensor]:
        weight = torch.stack([layer.weight.t() for layer in layers])
        bias = torch.stack([layer.bias for layer in layers])
        return [weight.to(dtype).contiguous(), bias.to(dtype)]


class TritonEngine(Engine):
    """Persistent kernel of one sampler.

    programs: grid size, at most the number of multiprocessors; 1 in the interpreter.
    dtype: of the weights, and so of what the matrix products multiply; sums are float32.
    """

    def __init__(
        self,
        denoiser: TransformerDenoiser,
        scheduler: NoiseScheduler,
        lattice: Lattice,
        force_first_step: bool,
        programs: int = 1,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Fold and pad everything.

        Raises
        ------
        ValueError
            if a size or the conditional encoder is not one that the kernel takes.

        """
        spec = denoiser.spec
        head = spec.width // spec.heads
        if spec.width & (spec.width - 1) or head < 16:
            raise ValueError(
                'the kernel needs a width that is a power of two and heads of at least 16, '
                f'got width {spec.width} and heads of {head}'
            )
        if type(denoiser.encoder) is not ConditionalEncoder:
            raise ValueError(
                'the kernel needs a conditional encoder without attention, '
                f'got {type(denoiser.encoder).__name__}'
            )
        self._lattice, self._force_first_step = lattice, force_first_step
        self._memory = denoiser.conditioner(scheduler.spec.timesteps())
        self._kinds = spec.stack.kinds
        self.time_tokens = self._memory.time_tokens
        self.observation_tokens = self._memory.observation_tokens
        self._cross = denoiser.cross_attentions
        self._weights = KernelWeights(denoiser, dtype)
        device = lattice.store.device
        rows, actions = padded(spec.horizon), padded(spec.action_dim)
        memory = padded(1 + spec.obs_steps)
        self._pad = (0, actions - spec.action_dim)
        self._row_pad = (0, 0, 0, rows - spec.horizon)
        self._coefficients = torch.tensor(scheduler.coefficients, device=device)
        self._constant = F.pad(denoiser.position + denoiser.action.bias, self._row_pad)
        self._self_mask = self._additive(denoiser.self_mask, rows, rows)
        self._memory_mask = self._additive(denoiser.memory_mask, rows, memory)
        self._x = torch.zeros(rows, actions, device=device)
        self._tokens, self._mixed = torch.zeros(2, rows, spec.width, device=device).unbind(0)
        self._wide = torch.zeros(rows, 4 * spec.width, device=device)
        self._arrived = torch.zeros(1, dtype=torch.int32, device=device)
        cells = (lattice.steps, spec.blocks)
        self._sources = torch.full(cells, COMPUTED, dtype=torch.int64, device=device)
        self._keys, self._values = torch.empty(0), torch.empty(0)
        self._sizes = {
            'T': spec.horizon,
            'S': 1 + spec.obs_steps,
            'LAYERS': spec.layers,
            'HEADS': spec.heads,
            'ROWS': rows,
            'D': spec.width,
            'ACTIONS': actions,
            'MEMORY': memory,
            'NOISY': scheduler.needs_noise,
            'TILE': _TILE,
            'PROGRAMS': programs,
        }
        self._scalars = (denoiser.norm.eps, head**-0.5, scheduler.clip)

    @staticmethod
    def _additive(mask: Tensor, rows: int, columns: int) -> Tensor:
        """Mask as a term of the scores; padding columns are hidden, padding rows see column 0."""
        full = torch.full((rows, columns), float('-inf'), device=mask.device)
        full[: mask.shape[0], : mask.shape[1]].masked_fill_(mask, 0.0)
        full[mask.shape[0] :, 0] = 0.0
        return full

    def observe(self, features: Tensor) -> None:
        """Encode the observation features [1, To, Do] of a tick."""
        self._memory.encode(features)
        self.observation_tokens = self._memory.observation_tokens
        rows = self._memory.rows()[0]
        parts = [block.kv(rows).chunk(2, dim=-1) for block in self._cross]
        self._keys = torch.stack([keys for keys, _ in parts], dim=1).contiguous()
        self._values = torch.stack([values for _, values in parts], dim=1).contiguous()

    def denoise(
        self, plan: Callable[[], Plan], watch: Stopwatch, inpainting: Inpainting | None = None
    ) -> tuple[Tensor, Plan]:
        """Run the loop by a plan; see `Engine.denoise`."""
        noise = F.pad(self._lattice.initial_noise[0], self._pad)
        self._x.copy_(F.pad(noise, self._row_pad))
        step_noise = F.pad(self._lattice.step_noise, self._pad).contiguous()
        horizon, actions = self._lattice.initial_noise.shape[1:]
        x = self._x[:horizon, :actions]

        def run(first: int, last: int) -> None:
            if inpainting is None:
                self._launch(first, last, step_noise)
                return
            # The kernel knows nothing of it: one launch a step, with the actions set in between.
            for step in range(first, last):
                self._launch(step, step + 1, step_noise)
                inpainting.impose(step + 1, x)

        if inpainting is not None:
            inpainting.impose(0, x)
        first = 0
        if self._force_first_step:
            self._sources[0].fill_(COMPUTED)
            run(0, 1)
            first = 1
        watch.lap('first_step')
        executed = plan()
        watch.lap('plan')
        sources = resolve_sources(executed, self._kinds)
        sources[executed == Reuse.COMPUTE] = COMPUTED
        self._sources.copy_(torch.from_numpy(sources), non_blocking=True)
        run(first, len(executed))
        watch.lap('masked_steps')
        return x.clone()[None], executed

    def _launch(self, first: int, last: int, step_noise: Tensor) -> None:
        self._arrived.zero_()
        triton_kernel.denoise[(self._sizes['PROGRAMS'],)](
            self._x,
            self._tokens,
            self._wide,
            self._mixed,
            self._arrived,
            self._lattice.store,
            self._sources,
            step_noise,
            self._coefficients,
            self._keys,
            self._values,
            self._self_mask,
            self._memory_mask,
            self._constant,
            self._weights.norms,
            *self._weights.linear,
            first,
            last,
            *self._scalars,
            **self._sizes,
        )
