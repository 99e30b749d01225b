"""Mutate what quip wrote and what a person types, and see that nothing wrong passes in silence.

    python scripts/fuzz.py --out results/fuzz.json

Claims, for 500 mutations of checkpoints, Hessian stores, ledgers and run folders, and 300 command
lines of a fixed seed: each ends within 10 s of processor time and 1 GB of memory, either well or
in one line that says what is wrong; none in a traceback or a signal; and whatever ends well ends
with the very numbers of what was not mutated.

Every case runs in a process of its own, forked from one that has imported everything.
"""

import argparse
import json
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "dev"))
from attack.cases import mutated
from attack.children import FAULTS, Child, run_all
from attack.lines import mistyped
from bench_rounding import commit, cpu_name

from quip.files import replacing


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--work", type=Path, default=Path("runs/fuzz"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mutations", type=int, default=500)
    parser.add_argument("--lines", type=int, default=300)
    parser.add_argument("--case", type=int, help="this one only; what it writes is kept and shown")
    args = parser.parse_args()
    work = args.work.resolve()
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    children = [*mutated(work, args.mutations, args.seed)]
    children += mistyped(work, args.lines, args.seed)
    if args.case is not None:
        children = [children[args.case]]
        children[0].keep = True
    found = list(run_all(children))
    for number, (child, ended) in enumerate(found):
        if ended["verdict"] in FAULTS or args.case is not None:
            print(number, ended["verdict"], child.what, *ended["said"][-3:], sep="\n  ")
    if args.out:
        with replacing(args.out) as partial:
            partial.write_text(json.dumps(record(found, args), indent=1) + "\n")
    counts = Counter(ended["verdict"] for _, ended in found)
    print(", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items())))
    return int(any(counts[fault] for fault in FAULTS))


def record(found: list[tuple[Child, dict[str, Any]]], args: argparse.Namespace) -> dict[str, Any]:
    """Counts of verdicts by what was attacked, and the extremes."""
    counts: dict[str, Counter[str]] = {}
    for child, ended in found:
        counts.setdefault(child.kind, Counter())[ended["verdict"]] += 1
    return {
        "kind": "fuzz",
        "commit": commit(),
        "cpu": cpu_name(),
        "seed": args.seed,
        "counts": {kind: dict(sorted(own.items())) for kind, own in counts.items()},
        "most_seconds": max(ended["seconds"] for _, ended in found),
        "most_bytes": max(ended["bytes"] for _, ended in found),
    }


if __name__ == "__main__":
    sys.exit(main())
