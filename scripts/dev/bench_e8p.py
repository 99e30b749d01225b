"""The nearest E8P point: in closed form against a search, float32, one thread.

Claim: compiled, the closed form of `quip.codebooks` is at least 50 times as fast as a dense search
of the 1366 reduced vectors in torch, and finds points at the same distances. A row that falls
short of this is printed as MISSED.

    python scripts/dev/bench_e8p.py --out results/bench_e8p.json

The search is written here from its published description (QuIP#, arXiv 2402.04396, section 4.2):
for each shift of the lattice, fold x into the reduced vectors' signs, one product with all of
them, and the largest of 2 <x, v> - |v|^2. E81B, which has 256 points, is searched whole.

Times are CPU seconds, the median of interleaved repeats, over vectors whose coordinates lie
in separate rows, as a panel of weights hands them over.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from bench_rounding import commit, cpu_name
from torch import Tensor

from quip.codebooks import LATTICES, Groups, Lattice, e8p, e81b
from quip.codebooks.lattice import tables
from quip.kernels.lattice_points import code_dtype, cpu

CPU = torch.device("cpu")
REQUIRED_RATIO = 50.0
LEAST = 0.02  # seconds: a single call would find cold caches
TOLERANCE = 2**-17  # of a squared distance: keys of the compiled form hold 20 bits
CHUNK = 1024  # vectors that the search takes at once: the fastest of 32 ... 4096
FIRST_USE = """
import time, torch
from quip.codebooks.lattice import tables
torch.set_num_threads(1)
start = time.perf_counter()
tables(("e8p", "e81b"), torch.device("cpu"))
print(1e3 * (time.perf_counter() - start))
"""


@dataclass(frozen=True)
class Form:
    """One way to round: `round(x)` gives codes, whose points are decode(codes)."""

    name: str
    round: Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way to round against the search; times in nanoseconds a vector of eight."""

    codebook: str
    form: str
    ns: float
    search_ns: float
    ratio: float
    equal_codes: float  # share
    mse: float  # per weight, relative to that of x
    search_mse: float
    same: bool  # distances, but for float noise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vectors", type=int, default=32768, help="of eight Gaussian weights")
    parser.add_argument("--repeats", type=int, default=5, help="interleaved repeats of each")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()

    torch.set_num_threads(1)
    if not cpu.available():
        sys.exit("no C++ compiler: there is nothing to compare")
    rng = torch.Generator().manual_seed(args.seed)
    x = torch.randn(8, args.vectors, generator=rng).T  # each coordinate is contiguous
    rows = [row for name in ("E8P", "E81B", *LATTICES) for row in bench(name, x, args.repeats)]
    decoding = {name: decode_ns(name, args.vectors, args.repeats) for name in LATTICES}
    tables, tables_ms = table_bytes(), first_call_ms()
    print(table(rows))
    print("decoding, ns a vector:", ", ".join(f"{k} {v:.1f}" for k, v in decoding.items()))
    print(f"tables: {tables} bytes, {tables_ms:.1f} ms at first use")
    if args.out:
        record = {
            "kind": "search",
            "claim": "E8P compiled: at least 50 times as fast as the search, at equal distances",
            "met": next(
                met(row) for row in rows if (row.codebook, row.form) == ("E8P", "compiled")
            ),
            "dtype": "float32",
            "threads": torch.get_num_threads(),
            "vectors": args.vectors,
            "repeats": args.repeats,
            "seed": args.seed,
            "cpu": cpu_name(),
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "commit": commit(),
            "rows": [asdict(row) for row in rows],
            "decode_ns": decoding,
            "table_bytes": tables,
            "tables_ms": tables_ms,
        }
        args.out.write_text(json.dumps(record, indent=2) + "\n")


def bench(name: str, x: Tensor, repeats: int) -> list[Row]:
    """All forms of one codebook, their repeats interleaved; the search comes first."""
    x, forms, decode = contestants(name, x)
    codes = {form: form.round(x) for form in forms}  # also the warm-up
    seconds: dict[Form, list[float]] = {form: [] for form in forms}
    for _ in range(repeats):
        for form in forms:
            seconds[form].append(seconds_of(form.round, x))
    ns = {form: 1e9 * statistics.median(times) / len(x) for form, times in seconds.items()}
    squares = {form: (x - decode(codes[form])).double().square().sum(1) for form in forms}
    search = forms[0]
    size = x.double().square().sum()
    one_stage = name in ("E8P", "E81B", "E8P12")  # a tie in the first stage moves the second's
    rows = []
    for form in forms:
        excess = (squares[form] - squares[search]).abs()
        equal = codes[form] == codes[search]
        rows.append(
            Row(
                codebook=name,
                form=form.name,
                ns=ns[form],
                search_ns=ns[search],
                ratio=ns[search] / ns[form],
                equal_codes=float(equal.double().mean()),
                mse=float(squares[form].sum() / size),
                search_mse=float(squares[search].sum() / size),
                same=bool((excess[slice(None) if one_stage else equal] <= TOLERANCE).all()),
            )
        )
    return rows


# The contestants


def contestants(name: str, x: Tensor) -> tuple[Tensor, list[Form], Callable[[Tensor], Tensor]]:
    """Vectors of the spread that a codebook is made for, the forms, and what decodes all codes."""
    if name == "E8P":
        x = LATTICES["E8P12"].rho * x
        forms = [Form("search", E8PSearch()), Form("torch", e8p.nearest)]
        return x, [*forms, Form("compiled", compiled("e8p"))], e8p.decode
    if name == "E81B":
        x = 0.6 * x  # about what a first stage leaves, times the ratio
        forms = [Form("search", e81b.nearest)]
        return x, [*forms, Form("compiled", compiled("e81b"))], e81b.decode
    h = x.new_ones(8)
    lattice = Lattice.published(name).fit(x, h)
    scale, ratio = lattice.scale, lattice.ratio or 1.0

    def two_stages(first: Callable[[Tensor], Tensor], *second: Callable[[Tensor], Tensor]) -> Form:
        def round_(x: Tensor) -> Tensor:
            x = x / scale
            codes = first(x).long()
            for search in second:
                codes = codes | search((x - e8p.decode(codes)) * ratio).long() << 16
            return codes

        return Form("search" if isinstance(first, E8PSearch) else "torch", round_)

    search = E8PSearch()
    slow = {"e8p": search, "e81b": e81b.nearest}
    closed = {"e8p": e8p.nearest, "e81b": e81b.nearest}
    forms = [two_stages(*[by[stage] for stage in lattice.stages]) for by in (slow, closed)]
    return x, [*forms, Form("compiled", lambda x: lattice.round(x, h))], lattice.decode


def compiled(name: str) -> Callable[[Tensor], Tensor]:
    stages, scale = tables((name,), CPU), torch.tensor(1.0)
    return lambda x: cpu.nearest(x, stages, scale=scale, ratio=None)


class E8PSearch:
    """The dense search: one product with all 1366 reduced vectors for each shift."""

    def __init__(self) -> None:
        v = e8p.decode(torch.arange(65536)) - 0.25
        v = v[(v - v.round()).abs().amin(1) == 0.5]  # those of the shift +1/4
        self.reduced = v[(v[:, :7] >= -0.5).all(1) & ((v[:, :7] < 0).sum(1) <= 1)]  # [1366, 8]
        self.norms = self.reduced.square().sum(1)
        self.powers = 3 ** torch.arange(7, -1, -1)
        self.bits = torch.tensor([1 << e8p.ORDER.index(i) for i in range(8)])

    def __call__(self, x: Tensor) -> Tensor:
        return torch.cat([self.nearest(part.contiguous()) for part in x.split(CHUNK)])

    def nearest(self, x: Tensor) -> Tensor:
        (v, error), (other, other_error) = (self.of_shift(x - s) for s in (0.25, -0.25))
        minus = other_error < error
        v = torch.where(minus[:, None], other, v)
        index = ((v.abs() - 0.5).long() * self.powers).sum(1)
        return (e8p.code_of()[index] ^ ((v < 0) * self.bits).sum(1) ^ minus).int()

    def of_shift(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """(the nearest v, its squared distance)."""
        sign = torch.where(z < 0, -1.0, 1.0)
        sign[:, 7] *= sign.prod(1)
        A = z * sign
        v = self.reduced[torch.addmm(-self.norms, A, self.reduced.T, alpha=2).argmax(1)] * sign
        return v, (z - v).square().sum(1)


# Measuring and reporting


def decode_ns(name: str, vectors: int, repeats: int) -> float:
    """A matrix of random codes into float32."""
    row = LATTICES[name]
    codes = torch.randint(0, 2**row.index_bits, (vectors // 256, 256))
    codes = codes.to(code_dtype(row.index_bits))
    lattice = Lattice.published(name).fit(torch.randn(8, 8), torch.ones(8))
    matrix = lattice.joined([lattice], Groups(256, None))
    matrix.decode(codes)
    times = [seconds_of(matrix.decode, codes) for _ in range(repeats)]
    return 1e9 * statistics.median(times) / codes.numel()


def table_bytes() -> int:
    """All tables of the compiled form, and the packed one."""
    kept = cpu.pointers(*tables(("e8p", "e81b"), CPU)).kept
    return sum(x.nbytes for x in kept.values()) + e8p.packed_table().nbytes


def first_call_ms() -> float:
    """How long the tables take, in a process of its own."""
    command = [sys.executable, "-c", FIRST_USE]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout)


def seconds_of(call: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """CPU seconds of a call, of as many as take LEAST seconds together.

    On one thread, what other programs take is not counted.
    """
    calls, start = 0, time.process_time()
    while (passed := time.process_time() - start) < LEAST:
        call(x)
        calls += 1
    return passed / calls


def met(row: Row) -> bool:
    owed = REQUIRED_RATIO if (row.codebook, row.form) == ("E8P", "compiled") else 0.0
    return row.same and row.ratio >= owed


def table(rows: list[Row]) -> str:
    """The rows for people; a claim that was not met says so."""
    head = f"{'codebook':>10} {'form':>8} {'ns':>8} {'ratio':>6} {'equal':>9}  mean squared error"
    lines = [
        f"{r.codebook:>10} {r.form:>8} {r.ns:8.1f} {r.ratio:6.1f} {r.equal_codes:9.5%}  "
        f"{r.mse:.6f} {r.search_mse:.6f}{'' if met(r) else '  MISSED'}"
        for r in rows
    ]
    return "\n".join([head, *lines])


if __name__ == "__main__":
    main()
