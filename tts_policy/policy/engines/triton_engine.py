# SPDX-License-Identifier: Apache-2.0
"""Engine around the persistent Triton kernel; on a GPU, or anywhere under TRITON_INTERPRET=1.

The plan goes to the device as one array of sources, the loop is one launch (two with step 0
forced: that step runs while the pruner does), and nothing comes back but the actions. Buffers are
static and the launches are captured, so a tick allocates nothing.
It has been run in the interpreter only, so no device chooses it by itself.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tts_policy.policy.denoisers.denoiser import Denoiser
from tts_policy.policy.denoisers.memory_table import MemoryTable
from tts_policy.policy.denoisers.transformer import (
    ConditionalEncoder,
    CrossAttention,
    FeedForward,
    SelfAttention,
    TransformerDenoiser,
    TransformerSpec,
)
from tts_policy.policy.engines import triton_kernel
from tts_policy.policy.engines.capture import Capture, Unit
from tts_policy.policy.engines.eager import Engine
from tts_policy.policy.feature_cache import FeatureCache
from tts_policy.policy.inpainting import Inpainting
from tts_policy.policy.plan import Plan, Reuse, resolve_sources
from tts_policy.policy.scheduler import NoiseScheduler
from tts_policy.policy.stopwatch import Stopwatch
from tts_policy.policy.transfer import Upload

COMPUTED = -1
_TILE = 16
_WARPS = 8
_PROGRAMS = 64


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
    """Persistent kernel of one sampler; results live in its buffers until the next tick.

    dtype: of the weights, and so of what the matrix products multiply; sums are float32.
    programs: grid size. All of them must be resident at once, so by default it is at most the
    number of multiprocessors; in the interpreter, which runs one after another, it is 1.
    """

    @staticmethod
    def refusal(denoiser: Denoiser) -> str:
        """Why the kernel cannot run a denoiser; empty if it can."""
        if type(denoiser) is not TransformerDenoiser:
            return f'the kernel needs a transformer denoiser, got {type(denoiser).__name__}'
        spec = denoiser.spec
        head = spec.width // spec.heads
        if spec.width & (spec.width - 1) or head < 16 or head & (head - 1):
            return (
                'the kernel needs a width that is a power of two and heads of at least 16, '
                f'got width {spec.width} and heads of {head}'
            )
        if type(denoiser.encoder) is not ConditionalEncoder:
            return (
                'the kernel needs a conditional encoder without attention, '
                f'got {type(denoiser.encoder).__name__}'
            )
        layer = (SelfAttention, CrossAttention, FeedForward)
        if [type(block) for block in denoiser.blocks] != [*layer] * spec.layers:
            return 'the kernel needs layers of self-attention, cross-attention and feed-forward'
        return ''

    def __init__(
        self,
        denoiser: Denoiser,
        scheduler: NoiseScheduler,
        cache: FeatureCache,
        force_first_step: bool,
        dtype: torch.dtype = torch.float32,
        programs: int | None = None,
    ) -> None:
        """Fold and pad everything.

        Raises
        ------
        ValueError
            if a size or the conditional encoder is not one that the kernel takes.

        """
        if refusal := self.refusal(denoiser):
            raise ValueError(refusal)
        assert isinstance(denoiser, TransformerDenoiser)
        spec, device = denoiser.spec, cache.store.device
        self._cache, self._force_first_step = cache, force_first_step
        self._kinds = spec.stack.kinds
        self._memory = MemoryTable(denoiser, scheduler.spec.timesteps())
        self.time_tokens = self._memory.time_tokens
        self.observation_tokens = self._memory.observation_tokens
        self._weights = KernelWeights(denoiser, dtype)
        self._sizes = self._kernel_sizes(spec, scheduler, programs or self._residents(device))
        self._scalars = (
            denoiser.norm.eps,
            (spec.width // spec.heads) ** -0.5,
            float(scheduler.clip),
        )
        rows = self._sizes['ROWS']
        self._coefficients = torch.tensor(scheduler.coefficients, device=device)
        self._constant = F.pad(
            denoiser.position + denoiser.action.bias, (0, 0, 0, rows - spec.horizon)
        )
        self._self_mask = self._additive(denoiser.self_mask, rows, rows)
        self._memory_mask = self._additive(denoiser.memory_mask, rows, self._sizes['MEMORY'])
        self._allocate(spec, device)
        self._capture_units(Capture(device))

    @staticmethod
    def _residents(device: torch.device) -> int:
        if device.type != 'cuda':
            return 1
        processors: int = torch.cuda.get_device_properties(device).multi_processor_count
        return min(_PROGRAMS, processors)

    @staticmethod
    def _kernel_sizes(
        spec: TransformerSpec, scheduler: NoiseScheduler, programs: int
    ) -> dict[str, int]:
        return {
            'T': spec.horizon,
            'S': 1 + spec.obs_steps,
            'LAYERS': spec.layers,
            'HEADS': spec.heads,
            'ROWS': padded(spec.horizon),
            'D': spec.width,
            'ACTIONS': padded(spec.action_dim),
            'MEMORY': padded(1 + spec.obs_steps),
            'NOISY': scheduler.needs_noise,
            'TILE': _TILE,
            'PROGRAMS': programs,
        }

    def _allocate(self, spec: TransformerSpec, device: torch.device) -> None:
        rows, actions = self._sizes['ROWS'], self._sizes['ACTIONS']
        self._features = torch.zeros(1, spec.obs_steps, spec.obs_features, device=device)
        self._x = torch.zeros(rows, actions, device=device)
        self._chunk = self._x[: spec.horizon, : spec.action_dim]
        self._noise = torch.zeros(
            len(self._cache.step_noise), spec.horizon, actions, device=device
        )
        self._tokens, self._mixed = torch.zeros(2, rows, spec.width, device=device).unbind(0)
        self._wide = torch.zeros(rows, 4 * spec.width, device=device)
        self._arrived = torch.zeros(1, dtype=torch.int32, device=device)
        self._sources = Upload((self._cache.steps, spec.blocks), torch.int64, device)
        # A forced step 0 is launched before the plan is there: its row never changes.
        self._sources.host.fill_(COMPUTED)
        self._sources.device.fill_(COMPUTED)

    def _capture_units(self, capture: Capture) -> None:
        first, steps = int(self._force_first_step), self._cache.steps
        self._observe = capture(lambda: self._memory.encode(self._features))
        self._begin = capture(self._begin_tick)
        self._first_step = capture(lambda: self._launch(0, 1)) if first else None
        self._masked_steps = capture(lambda: self._launch(first, steps))

    @staticmethod
    def _additive(mask: Tensor, rows: int, columns: int) -> Tensor:
        """Mask as a term of the scores; padding columns are hidden, padding rows see column 0."""
        full = torch.full((rows, columns), float('-inf'), device=mask.device)
        full[: mask.shape[0], : mask.shape[1]].masked_fill_(mask, 0.0)
        full[mask.shape[0] :, 0] = 0.0
        return full

    def observe(self, features: Tensor) -> None:
        """Encode the observation features [1, To, Do] of a tick."""
        self._features.copy_(features, non_blocking=True)
        self._observe()

    def denoise(
        self, plan: Callable[[], Plan], watch: Stopwatch, inpainting: Inpainting | None = None
    ) -> tuple[Tensor, Plan]:
        """Run the loop by a plan; see `Engine.denoise`."""
        self._begin()
        if inpainting is not None:
            inpainting.impose(0, self._chunk)
        if self._first_step is not None:
            self._run(self._first_step, 0, 1, inpainting)
        watch.lap('first_step')
        executed = plan()
        watch.lap('plan')
        sources = resolve_sources(executed, self._kinds)
        sources[executed == Reuse.COMPUTE] = COMPUTED
        self._sources.send(sources)
        self._run(self._masked_steps, int(self._force_first_step), len(executed), inpainting)
        watch.lap('masked_steps')
        return self._chunk[None], executed

    def _run(self, unit: Unit, first: int, last: int, inpainting: Inpainting | None) -> None:
        if inpainting is None:
            unit()
            return
        # The kernel knows nothing of it: one launch a step, with the actions set in between.
        for step in range(first, last):
            self._launch(step, step + 1)
            inpainting.impose(step + 1, self._chunk)

    def _begin_tick(self) -> None:
        actions = self._chunk.shape[1]
        # The kernel leaves its own values in the padding.
        self._x.zero_()
        self._chunk.copy_(self._cache.initial_noise[0])
        if len(self._noise):
            self._noise[..., :actions].copy_(self._cache.step_noise[:, 0])

    def _launch(self, first: int, last: int) -> None:
        """Launch the steps first to last - 1."""
        options: dict[str, int | bool] = {}
        if self._x.is_cuda:
            # A grid that cannot be resident as a whole is refused then, and does not hang.
            options = {'num_warps': _WARPS, 'launch_cooperative_grid': True}
        self._arrived.zero_()
        triton_kernel.denoise[(self._sizes['PROGRAMS'],)](
            self._x,
            self._tokens,
            self._wide,
            self._mixed,
            self._arrived,
            self._cache.store,
            self._sources.device,
            self._noise,
            self._coefficients,
            self._memory.keys_values,
            self._self_mask,
            self._memory_mask,
            self._constant,
            self._weights.norms,
            *self._weights.linear,
            first,
            last,
            *self._scalars,
            **self._sizes,
            **options,
        )
