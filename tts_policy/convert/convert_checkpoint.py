# SPDX-License-Identifier: Apache-2.0
"""Turn a checkpoint of Diffusion Policy or LeRobot into a model bundle and draft parameters.

Nothing in the checkpoint is executed. Until `train_pruner` has made a pruner for the policy, or
the paper's code has and --pruner names its file, the samplers follow the static schedule.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

import torch

from tts_policy.convert.checkpoint import Checkpoint
from tts_policy.convert.converted_policy import ConvertedPolicy, Naming, parameter_file
from tts_policy.convert.diffusion_policy import read_diffusion_policy
from tts_policy.convert.lerobot import read_lerobot
from tts_policy.convert.restricted_pickle import CheckpointError
from tts_policy.convert.transformer_weights import read_pruner
from tts_policy.policy.bundle import MODEL_FILE, AnyPruner, save_bundle
from tts_policy.policy.denoisers.transformer import TransformerDenoiser
from tts_policy.policy.pruner import Pruner, PrunerSpec
from tts_policy.policy.sampler import SamplerSpec


def static_pruner(converted: ConvertedPolicy, sampler: SamplerSpec) -> Pruner:
    """Pruner that prefers the static schedule whatever it observes; it needs no training."""
    denoiser, steps = converted.network.denoiser.spec, sampler.scheduler.steps
    pruner = Pruner(PrunerSpec.of(denoiser, steps, (sampler.recommended_sparsity,)))
    pruner.start_from_static()
    return pruner


def make_pruners(converted: ConvertedPolicy, file: Path | None) -> dict[str, AnyPruner]:
    """A pruner for every sampler; that of the file for the checkpoint's own, the first one."""
    pruners: dict[str, AnyPruner] = {
        name: static_pruner(converted, spec) for name, spec in converted.samplers.items()
    }
    if file is not None:
        own = next(iter(converted.samplers))
        steps = converted.samplers[own].scheduler.steps
        denoiser = converted.network.denoiser
        if not isinstance(denoiser, TransformerDenoiser):
            raise CheckpointError(
                f'{file}: expected no pruner of the paper, which is for transformers, got one'
            )
        with Checkpoint(file) as checkpoint:
            try:
                pruners[own] = read_pruner(checkpoint, denoiser.spec, steps)
            except ValueError as error:
                raise CheckpointError(f'{file}: {error}') from error
    return pruners


def summary(converted: ConvertedPolicy, pruners: Mapping[str, AnyPruner]) -> str:
    """What was converted, as lines of text."""
    contract, spec = converted.network.contract, converted.network.spec
    obs, act = contract.observation, contract.action
    cameras = ', '.join(f'{c.key} {c.height} x {c.width}' for c in obs.cameras) or 'none'
    options = ', '.join(f'{key} {value}' for key, value in spec.denoiser.to_dict().items())
    parameters = sum(p.numel() for p in converted.network.parameters())
    lines = [
        f'{converted.name}: {parameters / 1e6:.1f} M parameters',
        f'  denoiser   {spec.layers} layers, width {spec.width}, {spec.heads} heads, {options}',
        f'  observes   {obs.steps} samples, {obs.period_s:g} s apart; cameras: {cameras}',
        f'             joints: {", ".join(obs.joints)}',
        f'  commands   {act.horizon} actions, {act.execute} executed: {", ".join(act.joints)}',
    ]
    for name, sampler in converted.samplers.items():
        kind = 'static schedule' if isinstance(pruners[name], Pruner) else 'pruner of the paper'
        lines.append(f'  sampler    {name}: {kind}, sparsity up to {sampler.max_sparsity:.4g}')
    lines += [f'  note       {remark}' for remark in converted.remarks]
    return '\n'.join(lines)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Command line of `convert_checkpoint`."""
    parser = argparse.ArgumentParser(
        prog='convert_checkpoint', description=__doc__.split('\n')[0] if __doc__ else None
    )
    parser.add_argument(
        'checkpoint',
        type=Path,
        help='.ckpt file of Diffusion Policy, or folder of a LeRobot policy',
    )
    parser.add_argument('out', type=Path, help='folder of the bundle')
    parser.add_argument(
        '--weights', choices=('ema', 'model'), default='ema', help='averaged or last weights'
    )
    parser.add_argument('--pruner', type=Path, help="pruner checkpoint of the paper's code")
    parser.add_argument(
        '--rate', type=float, default=10.0, help='control rate in Hz, which no checkpoint holds'
    )
    parser.add_argument(
        '--instruction-tokens',
        nargs='+',
        type=int,
        default=(),
        metavar='TOKEN',
        help="what a LeRobot policy is told to do, as CLIP's tokenizer gives it",
    )
    parser.add_argument('--observation-joints', nargs='+', default=(), metavar='NAME')
    parser.add_argument('--action-joints', nargs='+', default=(), metavar='NAME')
    return parser.parse_args(arguments)


def read_policy(args: argparse.Namespace) -> ConvertedPolicy:
    """Policy of the command line's checkpoint; raises CheckpointError naming the file."""
    naming = Naming(1.0 / args.rate, tuple(args.observation_joints), tuple(args.action_joints))
    try:
        if args.checkpoint.is_dir():
            return read_lerobot(args.checkpoint, naming, args.instruction_tokens)
        with Checkpoint(args.checkpoint) as checkpoint:
            return read_diffusion_policy(checkpoint, args.weights, naming)
    except ValueError as error:
        named = str(error).startswith(str(args.checkpoint))
        raise CheckpointError(str(error) if named else f'{args.checkpoint}: {error}') from error


def main(arguments: list[str] | None = None) -> int:
    """Convert; returns the exit status, 2 for a checkpoint that cannot be converted."""
    args = parse_arguments(arguments)
    torch.set_num_threads(1)
    try:
        if not 0.1 <= args.rate <= 1000.0:
            raise CheckpointError(f'--rate: expected 0.1 to 1000 Hz, got {args.rate}')
        if (args.out / MODEL_FILE).exists():
            raise CheckpointError(f'{args.out}: expected a folder without a bundle, got one')
        converted = read_policy(args)
        pruners = make_pruners(converted, args.pruner)
    except CheckpointError as error:
        print(f'convert_checkpoint: {error}', file=sys.stderr)
        return 2
    save_bundle(
        args.out, args.out.name, converted.network, converted.samplers, pruners, half=False
    )
    parameters = args.out / 'parameters.yaml'
    parameters.write_text(parameter_file(converted, args.out), encoding='utf-8')
    print(summary(converted, pruners))
    print(f'written: {args.out} and, as a draft to be completed, {parameters}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
