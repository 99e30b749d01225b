"""What it takes to round to trellis codes: microseconds a weight, by bits and states; one thread.

Claims, at 2 bits and tiles of 256 weights: at most 0.4, 1.6 and 25 microseconds a weight at 2^10,
2^12 and 2^16 states. A row that falls short of this is printed as MISSED.

    python scripts/dev/bench_trellis.py --out results/bench_trellis.json

`encode` searches tiles of Gaussian weights, two of them in a call. `panel` is a call that rounds
columns of a matrix with feedback, as a sweep makes it for each 8 columns, and `greedy` one of a
greedy pass. Times are CPU seconds, the least of interleaved repeats: what other programs do to the
caches only adds. The table is one of random numbers, which takes no longer than any other.
"""

import argparse
import json
import platform
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from bench_rounding import commit, cpu_name, timed

from quip.kernels.trellis import Code, Tiling, cpu

WEIGHTS = 256  # of a tile
COLUMNS = 8  # of a panel: those that share a scale
STATES = (8, 10, 12, 14, 16)
MOST = {(2, 10): 0.4, (2, 12): 1.6, (2, 16): 25.0}  # by bits and states
FEWEST = 2**24  # states that are met in a measurement, at least


@dataclass(frozen=True, kw_only=True)
class Row:
    """Microseconds a weight."""

    bits: int
    states: int  # 2^states of them
    encode_us: float
    panel_us: float
    greedy_us: float
    most_us: float | None  # that encoding may take

    @property
    def met(self) -> bool:
        return self.most_us is None or self.encode_us <= self.most_us


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5, help="interleaved repeats of each")
    parser.add_argument("--states", nargs="+", type=int, default=STATES, help="bits of a state")
    parser.add_argument("--seed", type=int, default=0, help="of the weights")
    parser.add_argument("--out", type=Path, help="JSON file to write; otherwise to stdout")
    args = parser.parse_args()

    torch.set_num_threads(1)
    if not cpu.ENCODE.available():
        sys.exit("no C++ compiler: there is nothing to measure")
    rows = [
        measure(bits, states, repeats=args.repeats, seed=args.seed)
        for states in args.states
        for bits in (1, 2, 3, 4)
    ]
    record = {
        "kind": "trellis_speed",
        "claim": "at 2 bits at most 0.4, 1.6, 25 us a weight at 2^10, 2^12, 2^16 states",
        "threads": torch.get_num_threads(),
        "weights": WEIGHTS,
        "repeats": args.repeats,
        "seed": args.seed,
        "cpu": cpu_name(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "commit": commit(),
        "rows": [{**asdict(row), "met": row.met} for row in rows],
    }
    text = json.dumps(record, indent=2) + "\n"
    if args.out:
        args.out.write_text(text)
        print(table(rows))
    else:
        print(text, end="")
    return int(not all(row.met for row in rows))


def measure(bits: int, states: int, *, repeats: int, seed: int) -> Row:
    """One code, by all three."""
    rng = torch.Generator().manual_seed(seed)
    m, n = 2 * WEIGHTS, COLUMNS
    code = Code("table", bits, torch.randn(2**states, 1, generator=rng))
    X, K = torch.randn(n, m, generator=rng), 0.1 * torch.randn(n, n, generator=rng)
    eta, scale, tiling = torch.empty_like(X), torch.ones(1), Tiling(2, 1)
    x, metrics = X[:1].T.contiguous(), torch.ones(n, 1, 1)
    old = cpu.round_columns(X, K, eta, scale, code, tiling)

    def panel(**options: object) -> Callable[[], object]:
        return lambda: cpu.round_columns(X, K, eta, scale, code, tiling, **options)

    calls: dict[str, tuple[Callable[[], object], int]] = {
        "encode_us": (lambda: cpu.encode(x, code, tiles=2), m),
        "panel_us": (panel(), m * n),
        "greedy_us": (panel(base=X, kept=(old, metrics)), m * n),
    }
    least = dict.fromkeys(calls, float("inf"))
    for _ in range(repeats):
        for name, (call, weights) in calls.items():
            times = max(1, FEWEST // (weights << states))
            seconds = timed(repeat, call, times)[1]
            least[name] = min(least[name], 1e6 * seconds / (times * weights))
    return Row(bits=bits, states=states, most_us=MOST.get((bits, states)), **least)


def repeat(call: Callable[[], object], times: int) -> None:
    for _ in range(times):
        call()


def table(rows: list[Row]) -> str:
    """The rows for people; a claim that was not met says so."""
    lines = [f"{'bits':>4} {'states':>6} {'encode us':>9} {'panel us':>8} {'greedy us':>9}"]
    lines += [
        f"{r.bits:4} {f'2^{r.states}':>6} {r.encode_us:9.3f} {r.panel_us:8.3f} {r.greedy_us:9.3f}"
        f"{'' if r.met else '  MISSED'}"
        for r in rows
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
