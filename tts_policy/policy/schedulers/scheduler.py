# SPDX-License-Identifier: Apache-2.0
"""What a scheduler is to everything else: one table of coefficients; and all kinds by name.

Every denoising step, of whatever kind, is
    x0 = clip(x0_x * x + x0_output * output)
    x' = next_x0 * x0 + next_x * x + next_output * output + next_noise * z
         + next_previous_x0 * (x0 of the step before)
where `output` is the model's prediction and z is normal noise. Engines read the coefficients and
know nothing else of a scheduler.

To add one, put a file beside this one that registers a subclass of `Scheduler`:

    @register_scheduler('mine')
    class Mine(Scheduler):
        def rows(self) -> Iterator[Row]:
            for t in self.spec.timesteps():
                yield ...  # as many as `Coefficients` has without a default, or more

Then a sampler of a bundle can name it (`scheduler: {kind: mine, ...}` in model.yaml). `ddim.py` is
a short example; `dpm_solver.py` is one with history.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from typing import Annotated, Any, ClassVar, NamedTuple

from pydantic import AfterValidator, Field, model_validator
from torch import Tensor
from typing_extensions import Self

from tts_policy.policy.schedulers.noise_schedule import (
    BETA_SCHEDULES,
    SQUARED_COSINE,
    alphas_cumprod,
)
from tts_policy.policy.validation import (
    Flag,
    Integer,
    Mismatch,
    Number,
    Spec,
    Text,
    checked,
    one_of,
)

FLOW = 'flow'
Row = Sequence[Tensor | float]


class Coefficients(NamedTuple):
    """Coefficients of one step; see the module docstring."""

    x0_x: float
    x0_output: float
    next_x0: float
    next_x: float
    next_output: float = 0.0
    next_noise: float = 0.0
    next_previous_x0: float = 0.0


class Scheduler(ABC):
    """The denoising steps of one sampler.

    table: coefficients of every step, computed once; clip: bound of |x0|.
    objective: what a network must have been trained for. predictions: what it may predict.
    needs_noise: whether a step adds noise of its own.
    """

    objective: ClassVar[str] = 'diffusion'
    predictions: ClassVar[tuple[str, ...]] = ('epsilon', 'sample')
    needs_noise: ClassVar[bool] = False

    def __init__(self, spec: SchedulerSpec) -> None:
        self.spec = spec
        self.clip = spec.clip or math.inf
        self.table = [Coefficients(*map(float, row)) for row in self.rows()]

    @classmethod
    def timesteps(cls, spec: SchedulerSpec) -> list[int] | list[float]:
        """Timestep of every step, noisiest first; by default with leading spacing."""
        stride = spec.train_steps // spec.steps
        return [i * stride + spec.steps_offset for i in range(spec.steps)][::-1]

    @abstractmethod
    def rows(self) -> Iterator[Row]:
        """Yield the coefficients of every step, in the order of `Coefficients`."""

    def x0_coefficients(self, alpha: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """Coefficients of x0 where the cumulative product of alphas is alpha."""
        if self.spec.prediction == 'sample':
            return 0.0, 1.0
        return alpha**-0.5, -((1 - alpha) ** 0.5) / alpha**0.5

    def noise_levels(self) -> list[tuple[float, float]]:
        """Factors of signal and noise in x before every step, (1, 0) after the last: [K + 1]."""
        alphas = self.spec.alphas_cumprod().tolist()
        shares = [alphas[int(t)] for t in self.spec.timesteps()]
        return [*((share**0.5, (1 - share) ** 0.5) for share in shares), (1.0, 0.0)]

    def step(
        self,
        i: int,
        x: Tensor,
        output: Tensor,
        noise: Tensor | None = None,
        previous_x0: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Take step i from x [..., T, A] with the model's output.

        noise: z, needed where `needs_noise`; previous_x0: the x0 that the step before returned.
        Returns the less noisy x and the clean sample x0 that the step predicts.
        """
        row = self.table[i]
        x0 = (row.x0_x * x + row.x0_output * output).clamp(-self.clip, self.clip)
        following = row.next_x0 * x0 + row.next_x * x
        if row.next_output:
            following = following + row.next_output * output
        if row.next_noise:
            assert noise is not None, 'this step needs its noise'
            following = following + row.next_noise * noise
        if row.next_previous_x0:
            assert previous_x0 is not None, 'this step needs the clean sample of the step before'
            following = following + row.next_previous_x0 * previous_x0
        return following, x0


SCHEDULERS: dict[str, type[Scheduler]] = {}


def register_scheduler(kind: str) -> Callable[[type[Scheduler]], type[Scheduler]]:
    """Make a scheduler known by its kind."""

    def register(scheduler: type[Scheduler]) -> type[Scheduler]:
        SCHEDULERS[kind] = scheduler
        return scheduler

    return register


def _known(kind: str) -> str:
    if kind not in SCHEDULERS:
        raise ValueError(' or '.join(map(repr, SCHEDULERS)))
    return kind


@checked('scheduler')
class SchedulerSpec(Spec):
    """Settings of a scheduler: `steps` denoising steps are taken of `train_steps`.

    kind: of `SCHEDULERS`. beta_schedule: 'squaredcos_cap_v2', or 'linear', 'scaled_linear',
    'sigmoid' between beta_start and beta_end. prediction: the model's output, 'epsilon' or
    'sample'; 'velocity' for a flow, for which the fields of the noise schedule have no meaning.
    variance: of DDPM's noise, 'fixed_small', 'fixed_small_log' (the same, as a clamped logarithm)
    or 'fixed_large'. clip: the clean sample is clipped to [-clip, clip]; 0 does not clip it.
    steps_offset is added to the timesteps of DDPM and DDIM. With set_alpha_to_one DDIM's last step
    ends at the clean sample.
    """

    kind: Annotated[Text, AfterValidator(_known)]
    steps: Annotated[Integer, Field(ge=1, le=10_000)]
    train_steps: Annotated[Integer, Field(ge=1, le=10_000)] = 100
    beta_schedule: Annotated[Text, one_of(*BETA_SCHEDULES)] = SQUARED_COSINE
    beta_start: Annotated[Number, Field(gt=0.0, lt=1.0)] = 0.0001
    beta_end: Annotated[Number, Field(gt=0.0, lt=1.0)] = 0.02
    prediction: Annotated[Text, one_of('epsilon', 'sample', 'velocity')] = 'epsilon'
    variance: Annotated[Text, one_of('fixed_small', 'fixed_small_log', 'fixed_large')] = (
        'fixed_small'
    )
    clip: Annotated[Number, Field(ge=0.0, le=1e6)] = 1.0
    steps_offset: Annotated[Integer, Field(ge=0)] = 0
    set_alpha_to_one: Flag = True

    @model_validator(mode='after')
    def _check(self) -> Self:
        allowed = SCHEDULERS[self.kind].predictions
        if self.prediction not in allowed:
            raise Mismatch('prediction', ' or '.join(map(repr, allowed)), repr(self.prediction))
        if self.beta_start > self.beta_end:
            raise Mismatch(
                'beta_start', f'at most beta_end = {self.beta_end}', str(self.beta_start)
            )
        if self.is_flow:
            return self
        if self.steps > self.train_steps:
            raise Mismatch('steps', f'at most train_steps = {self.train_steps}', str(self.steps))
        timesteps = self.timesteps()
        if timesteps[0] >= self.train_steps:
            within = f'timesteps below train_steps = {self.train_steps}'
            raise Mismatch('steps_offset', within, str(self.steps_offset))
        if len(set(timesteps)) < self.steps:
            fewer = f'fewer than train_steps = {self.train_steps}, as timesteps must not repeat'
            raise Mismatch('steps', fewer, str(self.steps))
        return self

    @property
    def is_flow(self) -> bool:
        """Whether this samples a network that was trained for flow matching."""
        return SCHEDULERS[self.kind].objective == FLOW

    def make(self) -> Scheduler:
        """Make the scheduler."""
        return SCHEDULERS[self.kind](self)

    def to_dict(self) -> dict[str, Any]:
        """Plain containers, as they stand in model.yaml: what differs from the defaults."""
        required = ('kind', 'steps', 'train_steps')
        return {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if field.name in required or getattr(self, field.name) != field.default
        }

    def timesteps(self) -> list[int] | list[float]:
        """Timestep of every step, noisiest first."""
        return SCHEDULERS[self.kind].timesteps(self)

    def alphas_cumprod(self) -> Tensor:
        """Cumulative product of alphas of the training schedule, [train_steps]."""
        return alphas_cumprod(self.beta_schedule, self.train_steps, self.beta_start, self.beta_end)
