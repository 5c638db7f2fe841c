# SPDX-License-Identifier: Apache-2.0
"""`evaluate_bag`: what would the policy have done on these recordings, and which sparsity is safe?

Runs a bundle over rosbag2 recordings, dense and at every sparsity asked for, and writes
report.html, report.json and ticks.csv. The same command goes on where it was interrupted. Ends
with 0, with 1 if a recording was damaged or did not fit (what could be read is in the report), or
with 2 if there is nothing to report.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from pathlib import Path

from tqdm import tqdm

from tts_policy.data.bag_evaluation import (
    ENGINES,
    EvaluationSpec,
    Part,
    PartOutcome,
    SparsityVariants,
    run_parts,
)
from tts_policy.data.bag_samples import (
    Topics,
    add_image_fit_argument,
    add_topic_argument,
    parse_pairs,
)
from tts_policy.data.reader import BagError, BagReader, find_bags
from tts_policy.data.report import write_report
from tts_policy.data.summary import read_ticks, summarise, write_csv, write_json
from tts_policy.policy.bundle import load_bundle
from tts_policy.policy.policy import TestTimeSparsePolicy
from tts_policy.policy.pruner import Pruner

SPARSITIES = (0.0, 0.5, 0.7, 0.8, 0.9, 0.95)
TOLERANCE_RAD = 0.012


def bag_folder(out: Path, bag: Path) -> Path:
    """Where the results of a bag are kept: its name, and a hash of place, sizes and times.

    So a bag that was recorded anew, or mended, is evaluated anew.
    """
    name = re.sub(r'[^A-Za-z0-9._-]', '_', bag.name)[:60]
    files = [bag] if bag.is_file() else sorted(path for path in bag.iterdir() if path.is_file())
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    identity = repr((str(bag.resolve()), stats))
    return out / 'parts' / f'{name}_{hashlib.sha256(identity.encode()).hexdigest()[:8]}'


def make_parts(bags: list[Path], out: Path, processes: int) -> list[Part]:
    """One part per bag, or, with fewer bags than processes, each bag dealt out by episodes."""
    of = 1 if len(bags) >= processes else processes
    folders = [(bag, bag_folder(out, bag)) for bag in bags]
    return [Part(bag, index, of, folder) for bag, folder in folders for index in range(of)]


def _claim(out: Path, spec: EvaluationSpec) -> None:
    """Refuse a folder that holds the results of other settings."""
    out.mkdir(parents=True, exist_ok=True)
    path, settings = out / 'evaluation.json', spec.to_dict()
    if path.is_file():
        earlier = json.loads(path.read_text())
        differing = sorted(key for key in settings if earlier.get(key) != settings[key])
        if differing:
            raise BagError(
                f'{out}: expected an evaluation with the same {", ".join(differing)}, '
                'got another: choose another --out'
            )
    path.write_text(json.dumps(settings, indent=2) + '\n')


def _seconds(parts: list[Part]) -> float:
    """Recorded seconds that all parts will go through; unreadable bags count nothing."""
    durations: dict[Path, float] = {}
    for part in parts:
        if part.bag not in durations:
            try:
                durations[part.bag] = (BagReader(part.bag).duration_ns or 0) * 1e-9
            except BagError:
                durations[part.bag] = 0.0
    return sum(durations[part.bag] for part in parts)


def _evaluate(spec: EvaluationSpec, parts: list[Part], args: argparse.Namespace) -> list[str]:
    """Run the parts; returns every problem once."""
    outcomes: list[PartOutcome] = []
    with tqdm(
        total=round(_seconds(parts)),
        unit='s',
        desc='recorded',
        bar_format='{l_bar}{bar}| {n:.0f}/{total_fmt} s [{elapsed}<{remaining}]',
        mininterval=1,
    ) as bar:
        for outcome in run_parts(spec, parts, args.engine, args.processes, bar.update):
            outcomes.append(outcome)
            for problem in outcome.problems:
                bar.write(f'evaluate_bag: {problem}', file=sys.stderr)
    return list(dict.fromkeys(problem for outcome in outcomes for problem in outcome.problems))


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Command line of `evaluate_bag`."""
    parser = argparse.ArgumentParser(prog='evaluate_bag', description=__doc__.split('\n')[0])
    parser.add_argument(
        'bags', nargs='+', type=Path, help='recordings (folder, .mcap, .db3), or folders of them'
    )
    parser.add_argument('--bundle', type=Path, required=True)
    parser.add_argument('--sampler', help='of the bundle (default: its first)')
    parser.add_argument('--sparsity', nargs='+', type=float, default=list(SPARSITIES), metavar='S')
    parser.add_argument('--out', type=Path, required=True, help='report and partial results')
    parser.add_argument(
        '--tolerance',
        type=float,
        default=TOLERANCE_RAD,
        metavar='RAD',
        help='the recommended sparsity keeps its 95th-percentile L1 error under it '
        '(default %(default)s)',
    )
    add_topic_argument(parser)
    add_image_fit_argument(parser)
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--seed', type=int, default=0, help='as the seed of the node')
    parser.add_argument('--threads', type=int, default=1, help='torch threads of a process')
    parser.add_argument('--n-execute', type=int, default=0, help='periods a tick; 0: the bundle')
    parser.add_argument('--processes', type=int, default=1)
    parser.add_argument('--engine', choices=ENGINES, default='local')
    return parser.parse_args(arguments)


def _trained_for(spec: EvaluationSpec) -> list[float | None]:
    """Sparsity whose table serves each of those asked for; None where the pruner has no tables."""
    pruner = load_bundle(spec.bundle).sampler(spec.sampler)[1]
    return [
        pruner.trained_for(sparsity) if sparsity and isinstance(pruner, Pruner) else None
        for sparsity in spec.sparsities
    ]


def _prepare(args: argparse.Namespace) -> tuple[EvaluationSpec, SparsityVariants, list[Part]]:
    """Check everything that needs no message; raises ValueError with the reason."""
    if not (args.bundle / 'model.yaml').is_file():
        raise BagError(f'{args.bundle}: expected a bundle with model.yaml, got none')
    policy = TestTimeSparsePolicy.from_bundle(args.bundle, args.sampler, args.device)
    sparsities = sorted({value for value in args.sparsity if value <= policy.max_sparsity})
    for value in (sparsities or args.sparsity)[:1]:
        policy.check_sparsity(value)
    if sparsities != sorted(set(args.sparsity)):
        print(
            f'evaluate_bag: {policy.sampler} takes at most {policy.max_sparsity:.4g}: '
            f'{sorted(set(args.sparsity) - set(sparsities))} left out',
            file=sys.stderr,
        )
    spec = EvaluationSpec(
        args.bundle.resolve(),
        policy.sampler,
        tuple(sparsities),
        parse_pairs(args.topic, '--topic', 'STREAM:=TOPIC'),
        args.device,
        args.seed,
        args.threads,
        args.n_execute,
        args.image_fit,
    )
    variants = SparsityVariants(spec)
    Topics.of(variants.contract, spec.topics)
    if args.processes < 1 or not 0 <= args.n_execute <= variants.contract.usable_actions:
        raise BagError(
            'arguments: expected processes from 1 on and n_execute up to '
            f'{variants.contract.usable_actions}, got {args.processes} and {args.n_execute}'
        )
    bags = list(dict.fromkeys(find_bags(args.bags)))
    _claim(args.out, spec)
    return spec, variants, make_parts(bags, args.out, args.processes)


def main(arguments: list[str] | None = None) -> int:
    """Evaluate what is missing and write the report; returns the exit status."""
    args = parse_arguments(arguments)
    try:
        spec, variants, parts = _prepare(args)
        problems = _evaluate(spec, parts, args)
    except (ValueError, OSError) as error:
        print(f'evaluate_bag: {error}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print('interrupted; run the same command again to go on', file=sys.stderr)
        return 130
    bags = list(dict.fromkeys(part.bag for part in parts))
    folders = list(dict.fromkeys(part.folder for part in parts))
    try:
        ticks = read_ticks(folders)
    except ValueError as error:
        print(f'evaluate_bag: nothing to report: {error}', file=sys.stderr)
        return 2
    joints = variants.contract.action.joints
    report = summarise(ticks, spec.sparsities, joints, args.tolerance)
    for row, trained_for in zip(report['sparsity'].values(), _trained_for(spec), strict=True):
        row['trained_for'] = trained_for
    report |= {
        'bags': [str(bag) for bag in bags],
        'problems': problems,
        'left_out': sorted(set(args.sparsity) - set(spec.sparsities)),
        **spec.to_dict(),
    }
    write_json(args.out / 'report.json', report)
    write_csv(args.out / 'ticks.csv', ticks, spec.sparsities, report['bags'], joints)
    write_report(args.out, report, ticks, folders, variants.contract)
    knee = report['knee']
    print(
        f'{report["ticks"]} ticks; recommended sparsity '
        f'{"none" if knee is None else format(knee, "g")} '
        f'(95th percentile under {args.tolerance:g} rad); {args.out / "report.html"}'
    )
    return 1 if problems else 0


if __name__ == '__main__':
    sys.exit(main())
