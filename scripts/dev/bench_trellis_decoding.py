"""What one token's product with trellis codes takes, beside those with lattice codes.

Claim: with learned tables of 2^10 and 2^12 states, 2 bits take at most 1.2 times as long as E8P. A
row that falls short of this is printed as MISSED.

    python scripts/dev/bench_trellis_decoding.py --out results/bench_trellis_decoding.json

Shapes are outputs x inputs: a large one, and those of SmolLM2-135M. Times are CPU seconds of one
thread, the least of interleaved repeats; codes are random, in tiles of 256 rows, with a scale for
8 columns.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from bench_rounding import commit, cpu_name

from quip.codebooks import LATTICES, Groups, Lattices, Trellises
from quip.kernels.bits import pack
from quip.kernels.lattice_matvec import cpu as lattices
from quip.kernels.trellis_matvec import cpu

SHAPES = ((4096, 4096), (576, 576), (192, 576), (1536, 576), (576, 1536))
CODES = ((2, 10), (2, 12), (3, 12), (4, 12))  # bits and states of learned tables
GROUP = 8  # columns that share a scale
MOST = 1.2  # times E8P's time, at 2 bits
FEWEST = 2**20  # weights of a measurement, at least


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=40, help="interleaved repeats of each")
    parser.add_argument("--out", type=Path, help="JSON file to write; otherwise to stdout")
    args = parser.parse_args()

    torch.set_num_threads(1)
    if not (cpu.FORM.available() and lattices.FORM.available()):
        sys.exit("no C++ compiler: there is nothing to measure")
    rows = [measure(m, n, repeats=args.repeats) for m, n in SHAPES]
    record = {
        "kind": "trellis_decoding",
        "claim": f"at 2 bits at most {MOST} times E8P's time",
        "most": MOST,
        "threads": torch.get_num_threads(),
        "repeats": args.repeats,
        "cpu": cpu_name(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "commit": commit(),
        "rows": rows,
    }
    text = json.dumps(record, indent=2) + "\n"
    if args.out:
        args.out.write_text(text)
    else:
        print(text, end="")
    slow = [(row, name) for row in rows for name in row["ns"] if missed(row["ns"], name)]
    for row, name in slow:
        print(f"MISSED {row['outputs']} x {row['inputs']}, {name}", file=sys.stderr)
    return int(bool(slow))


def missed(ns: Mapping[str, float], name: str) -> bool:
    return name.startswith("2 bits") and ns[name] > MOST * ns["E8P12"]


def measure(m: int, n: int, *, repeats: int) -> dict[str, object]:
    """Nanoseconds a weight of all codes."""
    rng = torch.Generator().manual_seed(m + n)
    x = torch.randn(1, n, generator=rng)
    calls = {name: lattice(name, m, n, x, rng) for name in ("E8P12", "E8P12RVQ4B")}
    calls |= {f"{k} bits, 2^{L}": trellis(k, L, m, n, x, rng) for k, L in CODES}
    times = max(1, FEWEST // (m * n))
    least = dict.fromkeys(calls, float("inf"))
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.thread_time()
            for _ in range(times):
                call()
            least[name] = min(least[name], time.thread_time() - start)
    ns = {name: 1e9 * seconds / (times * m * n) for name, seconds in least.items()}
    return {"outputs": m, "inputs": n, "ns": ns}


def lattice(
    name: str, m: int, n: int, x: torch.Tensor, rng: torch.Generator
) -> Callable[[], object]:
    book, groups = LATTICES[name], Groups(n // 8, GROUP // 8)
    codes = torch.randint(2**book.index_bits, (m, n // 8), generator=rng)
    scale = torch.ones(groups.count)
    matrix = Lattices(name=name, ratio=book.ratio, scale=scale, groups=groups)
    return partial(matrix.multiply, pack(codes, book.index_bits), x, torch.float32)


def trellis(
    bits: int, states: int, m: int, n: int, x: torch.Tensor, rng: torch.Generator
) -> Callable[[], object]:
    codes = torch.randint(2**bits, (m, n), generator=rng)
    matrix = Trellises(
        code="learned",
        bits=bits,
        states=states,
        rows=256,
        columns=1,
        group=GROUP,
        scale=torch.ones(-(-n // GROUP)),
    )
    return partial(matrix.multiply, pack(codes, bits), x, torch.float32)


if __name__ == "__main__":
    sys.exit(main())
