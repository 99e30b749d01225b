"""Learned centroids: assignment against the published form, and what EM takes; one thread.

Claim: compiled, the nearest centroids are found at least 20 times as fast as by the published form
in torch, at equal assignments. A row that falls short of this is printed as MISSED.

    python scripts/dev/bench_em.py --out results/bench_em.json

The published form (GPTVQ, arXiv 2402.15319) is written here from its description: the distances of
all vectors of all groups to all k centroids in one tensor, their argmin over k, and for the means a
one-hot matrix of the assignments. Its assignment alone is timed against ours alone, and one
iteration of it, means included, against the average of ten of ours. It takes as many groups at a
time as are good for it, out of a matrix of `--rows` rows of 256 columns.

Groups are those that the paper gives for 2.125, 3.125 and 4.125 bits. Times are CPU seconds, the
median of interleaved repeats. Memory is how far the peak of a process of its own grows while EM
improves the centroids of a block of 28,672 rows at 2D 4 bits, which holds 28 MiB of weights.
"""

import argparse
import json
import multiprocessing
import platform
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from bench_rounding import commit, cpu_name, timed
from torch import Tensor

from quip.evaluate.memory import measured
from quip.kernels.centroids import cpu, reference

COLUMNS = 256  # of a group
REQUIRED_RATIO = 20.0
ITERATIONS = 10
LEAST = 0.02  # seconds: a single call would find cold caches
TALL = 28_672  # rows of the matrix whose memory is measured
AT_ONCE = 2**24  # distances of the published form: as fast as any of 2^16 ... 2^26
GROUPS = {  # (d, bits): weights that share a codebook
    (1, 2): 256,
    (1, 3): 512,
    (1, 4): 1024,
    (2, 2): 2048,
    (2, 3): 8192,
    (2, 4): 32768,
    (4, 2): 65536,
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """Ours against the published form; times in nanoseconds a vector."""

    dim: int
    bits: int
    centroids: int
    group: int
    ns: float
    published_ns: float
    ratio: float
    iteration_ns: float
    published_iteration_ns: float
    iteration_ratio: float
    equal_codes: float  # share
    excess: float  # of the weighted squares over those of the published codes
    met: bool


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1024, help="of the matrix")
    parser.add_argument("--repeats", type=int, default=3, help="interleaved repeats of each")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights")
    parser.add_argument("--out", type=Path, help="JSON file to write; otherwise to stdout")
    args = parser.parse_args()

    torch.set_num_threads(1)
    rows = [bench(d, bits, args.rows, args.repeats, args.seed) for d, bits in GROUPS]
    record = {
        "kind": "em",
        "claim": "at least 20 times as fast as the published form, at equal assignments",
        "dtype": "float32",
        "threads": torch.get_num_threads(),
        "matrix": [args.rows, COLUMNS],
        "repeats": args.repeats,
        "seed": args.seed,
        "peak_mib": {name: peak_mib(name) for name in ("cpu", "torch")},
        "cpu": cpu_name(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "commit": commit(),
        "rows": [asdict(row) for row in rows],
    }
    text = json.dumps(record, indent=2) + "\n"
    if args.out:
        args.out.write_text(text)
        print(table(rows, record["peak_mib"]))
    else:
        print(text, end="")


def bench(d: int, bits: int, m: int, repeats: int, seed: int) -> Row:
    """One shape of vectors and one number of bits."""
    X, centroids, h = problem(d, bits, m, seed=seed)
    V, metric = vectors(X, len(centroids), d), h.view(-1, 1, d)
    V = V.flatten(1, 2)  # [G, N, d]
    metric = metric.expand(-1, V.shape[1] // metric.shape[0], -1).flatten(0, 1)

    def published_assign() -> Tensor:
        return in_portions(lambda v, c: published_codes(v, c, metric), V, centroids)

    def published_iteration() -> Tensor:
        return in_portions(lambda v, c: published_means(v, c, metric), V, centroids)

    calls: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: cpu.assign(X, centroids, h),
        "published": published_assign,
        "our iteration": lambda: cpu.improve(X, centroids, h, iterations=ITERATIONS),
        "published iteration": published_iteration,
    }
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            seconds[name].append(seconds_of(call))
    ns = {name: 1e9 * statistics.median(s) / (X.numel() / d) for name, s in seconds.items()}
    ns["our iteration"] /= ITERATIONS

    codes = vectors(cpu.assign(X, centroids, h).long(), len(centroids), 1).flatten(1)
    expected = published_assign()
    left = [error(V, c, centroids, metric) for c in (codes, expected)]
    equal = float((codes == expected).float().mean())
    ratio, excess = ns["published"] / ns["ours"], left[0] / left[1] - 1
    return Row(
        dim=d,
        bits=bits,
        centroids=centroids.shape[1],
        group=GROUPS[d, bits],
        ns=ns["ours"],
        published_ns=ns["published"],
        ratio=ratio,
        iteration_ns=ns["our iteration"],
        published_iteration_ns=ns["published iteration"],
        iteration_ratio=ns["published iteration"] / ns["our iteration"],
        equal_codes=equal,
        excess=excess,
        # What float noise decides costs nothing.
        met=ratio >= REQUIRED_RATIO and equal > 0.9999 and abs(excess) < 1e-6,
    )


def seconds_of(call: Callable[[], Tensor]) -> float:
    """CPU seconds of a call, the mean of as many as take LEAST together."""
    spent = [timed(call)[1]]
    while sum(spent) < LEAST:
        spent.append(timed(call)[1])
    return statistics.mean(spent)


def problem(d: int, bits: int, m: int, *, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gaussian weights, centroids that are k vectors of each group, and weights of columns."""
    rng = torch.Generator().manual_seed(seed)
    X, k = torch.randn(COLUMNS, m, generator=rng), 2 ** (bits * d)
    groups = m * COLUMNS // GROUPS[d, bits]
    h = torch.rand(COLUMNS, generator=rng) + 0.1
    V = vectors(X, groups, d).flatten(1, 2)
    picked = torch.randint(V.shape[1], (groups, k, 1), generator=rng).expand(-1, -1, d)
    return X, V.gather(1, picked), h


def vectors(X: Tensor, groups: int, d: int) -> Tensor:
    """[groups, columns / d, rows of a group, d]"""
    return X.view(len(X) // d, d, groups, -1).permute(2, 0, 3, 1).contiguous()


# The published form


def in_portions(form: Callable[[Tensor, Tensor], Tensor], V: Tensor, centroids: Tensor) -> Tensor:
    """A form on some groups after the other."""
    groups = max(1, AT_ONCE // (V[0].numel() * centroids.shape[1]))
    parts = zip(V.split(groups), centroids.split(groups), strict=True)
    return torch.cat([form(v, c) for v, c in parts])


def published_codes(V: Tensor, centroids: Tensor, metric: Tensor) -> Tensor:
    """argmin over [G, N, k] of distances that are formed in [G, N, k, d]."""
    e = V[:, :, None] - centroids[:, None]
    return (metric[:, None] * e.square()).sum(3).argmin(2)


def published_means(V: Tensor, centroids: Tensor, metric: Tensor) -> Tensor:
    """The weighted means of what is assigned, by products with a one-hot matrix."""
    codes = published_codes(V, centroids, metric)
    members = torch.nn.functional.one_hot(codes, centroids.shape[1]).to(V).mT  # [G, k, N]
    weight = members @ metric
    return torch.where(weight > 0, (members @ (metric * V)) / weight, centroids)


def error(V: Tensor, codes: Tensor, centroids: Tensor, metric: Tensor) -> float:
    """The weighted squares of all vectors."""
    near = centroids.gather(1, codes[..., None].expand(-1, -1, V.shape[2]))
    return float((metric * (V - near).square()).double().sum())


# Memory


def peak_mib(form: str) -> float:
    """How far a fresh process grows while it improves the centroids of a tall block."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(grown_mib, (form,))


def grown_mib(form: str) -> float:
    """The peak of this process, in MiB beside weights, centroids and what was there before."""
    torch.set_num_threads(1)
    X, centroids, h = problem(2, 4, TALL, seed=0)
    improve = (cpu if form == "cpu" else reference).improve
    improve(X[:, :128].contiguous(), centroids[:1], h, iterations=1)  # what is loaded once
    with measured("cpu") as memory:
        improve(X, centroids, h, iterations=2)
    return (memory.peak_bytes - memory.start_bytes) / 2**20


def table(rows: list[Row], peaks: dict[str, float]) -> str:
    """The rows for people; a claim that was not met says so."""
    head = (
        f"{'d':>2} {'bits':>4} {'k':>4} {'group':>6} {'ns':>6} {'published':>9} {'ratio':>6} "
        f"{'EM ns':>6} {'published':>9} {'ratio':>6}  equal codes"
    )
    lines = [
        f"{r.dim:2} {r.bits:4} {r.centroids:4} {r.group:6} {r.ns:6.2f} {r.published_ns:9.1f} "
        f"{r.ratio:6.1f} {r.iteration_ns:6.2f} {r.published_iteration_ns:9.1f} "
        f"{r.iteration_ratio:6.1f}  {r.equal_codes:.5%}{'' if r.met else '  MISSED'}"
        for r in rows
    ]
    peak = ", ".join(f"{mib:.0f} MiB ({form})" for form, mib in peaks.items())
    return "\n".join([head, *lines, f"EM beside {TALL:,} rows at 2D 4 bits: {peak}"])


if __name__ == "__main__":
    main()
