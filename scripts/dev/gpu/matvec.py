"""Section `matvec`: products of a few vectors with packed codes, beside dense bfloat16.

A row is a code, a shape and a number of vectors. `error` is against float64, over the first and
last rows of the matrix; `repeats` says that equal inputs gave equal bits. `us` is one product in a
CUDA graph over more matrices than the caches hold, `share` the bytes of its codes in that time, of
3.0 TB/s, and `over_bf16` the time of F.linear in bfloat16 divided by it. Rows with `layer` are the
four products of a layer of Llama-2-7B, with q, k, v and gate, up stacked. More than FEW vectors are
multiplied by a decoded matrix; rows with `decode` are how long that takes to be written, and their
`share` counts the codes that are read and the bytes that are written.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import torch
from _measure import device, emit, milliseconds, synchronize
from torch import Tensor
from torch.nn.functional import linear

from quip.codebooks import LATTICES, Grids, Groups, Lattices
from quip.codebooks.trellis import Trellises
from quip.kernels.bits import unpack
from quip.kernels.bits import words as count_words

ON = device()
BANDWIDTH = 3.0e12  # bytes a second of an H100
CACHED = 160 * 2**20 if ON.type == "cuda" else 0  # bytes: three times its L2
CODES = {"int 2": 2, "int 3": 3, "int 4": 4, "int 8": 8, "E8P12": 2, "E8P12RVQ3B": 3} | {
    "E8P12RVQ4B": 4,
    "int 2 g128": 2,
    "int 4 g128": 4,
}
# Codes that the kernel computes, and one that it looks up as it does learned ones; bits of a state
TRELLISES = {"MUL1 2": ("mul1", 16), "MUL1 4": ("mul1", 16), "INT8 2": ("int8", 16)} | {
    f"trellis {bits}": ("mcg", 12) for bits in (2, 3, 4)
}
CODES |= {name: int(name.split()[1]) for name in TRELLISES}
TILE = 256  # rows
SHAPES = [(4096, 4096), (11008, 4096), (4096, 11008), (8192, 28672)]
LAYER = [(12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008)]
TINY = [(64, 512), (40, 1024)]
SHARES = {"int 4": 0.80, "int 3": 0.75, "int 2": 0.65, "E8P12": 0.60, "E8P12RVQ4B": 0.65}
MICROSECONDS = {"int 2": 4.5, "E8P12": 5.5}
CHECKED = 32  # rows at either end
FEW = ("int 2", "int 4", "E8P12", "MUL1 2", "trellis 2")
MANY = (32, 256, 2048)  # vectors


def main() -> None:
    shapes = SHAPES if ON.type == "cuda" else TINY
    emit(compile_s=compile_seconds())
    for shape in reversed(shapes):
        for code in CODES:
            measure(code, shape, 1)
    layers(LAYER if ON.type == "cuda" else TINY)
    for shape in (shapes[0], shapes[-1]):
        for code in FEW:
            for tokens in (4, 16):
                measure(code, shape, tokens)
            measure(code, shape, 1, torch.float32)
    for shape in (shapes[0], shapes[-1]):
        for code in FEW:
            decode(code, shape)
            for tokens in MANY:
                measure(code, shape, tokens)


@dataclass(frozen=True)
class Problem:
    """Several matrices of random codes of one kind."""

    decoder: Grids | Lattices | Trellises
    words: Tensor  # [count, m, words]

    @classmethod
    def of(cls, code: str, shape: tuple[int, int], *, cached: bool = False) -> "Problem":
        """One matrix, or more of them than the caches hold."""
        (m, n), bits = shape, CODES[code]
        length = count_words(n, bits)
        count = 1 if cached else 1 + CACHED // (4 * m * length)
        words = torch.randint(-(2**31), 2**31, (count, m, length), dtype=torch.int32, device=ON)
        return cls(decoder_of(code, m, n), words)

    def multiply(self, i: int, x: Tensor, dtype: torch.dtype) -> Tensor:
        return self.decoder.multiply(self.words[i], x, dtype)

    def rows(self, rows: slice, n: int) -> Tensor:
        """Decoded rows of the first matrix, in float64."""
        decoder = self.decoder
        if isinstance(decoder, Trellises):  # all of the first tile, or of the last one
            m = self.words.shape[1]
            first = max(0, m - TILE) if rows.start else 0
            codes = unpack(self.words[0, first : first + TILE], decoder.index_bits, n)
            return decoder.decode(codes)[rows.start - first : rows.stop - first].double()
        if isinstance(decoder, Grids) and decoder.zero is not None:
            decoder = replace(decoder, step=decoder.step[rows], zero=decoder.zero[rows])
        count = n // decoder.dim
        return decoder.decode(unpack(self.words[0, rows], decoder.index_bits, count)).double()


def decoder_of(code: str, m: int, n: int) -> Grids | Lattices | Trellises:
    """Steps of each column, as incoherent weights have them, or those of each row's groups."""
    if code in TRELLISES:
        name, states = TRELLISES[code]
        scale, options = torch.tensor([0.9], device=ON), {"rows": TILE, "columns": 1, "group": None}
        return Trellises(code=name, bits=CODES[code], states=states, scale=scale, **options)
    if code in LATTICES:
        scale = torch.tensor([0.9], device=ON)
        groups = Groups(n // 8, None)
        return Lattices(name=code, ratio=LATTICES[code].ratio, scale=scale, groups=groups)
    bits, groups = CODES[code], Groups(n, 128 if "g128" in code else 1)
    rows = 1 if groups.size == 1 else m
    step = torch.rand(rows, groups.count, device=ON).add(0.5).bfloat16()
    zero = torch.randint(2**bits, step.shape, dtype=torch.uint8, device=ON)
    return Grids(bits=bits, step=step, zero=None if rows == 1 else zero, groups=groups)


def compile_seconds() -> float:
    """How long it takes until both operations have run."""
    start = time.perf_counter()
    for code in ("int 2", "E8P12"):
        problem = Problem.of(code, TINY[0], cached=True)
        problem.multiply(0, torch.ones(1, TINY[0][1], device=ON), torch.bfloat16)
    synchronize()
    return round(time.perf_counter() - start, 2)


def measure(
    code: str, shape: tuple[int, int], tokens: int, dtype: torch.dtype = torch.bfloat16
) -> None:
    """One row."""
    (m, n), problem = shape, Problem.of(code, shape)
    x = torch.randn(tokens, n, device=ON)
    y, again = (problem.multiply(0, x, dtype) for _ in range(2))
    ends = (slice(0, CHECKED), slice(m - CHECKED, m))
    expected = torch.cat([x.double() @ problem.rows(part, n).T for part in ends], dim=1)
    off = torch.cat([y[:, part] for part in ends], dim=1).double() - expected
    us = microseconds(
        [lambda i=i: problem.multiply(i, x, dtype) for i in range(len(problem.words))]
    )
    row = {"code": code, "shape": shape, "tokens": tokens, "dtype": str(dtype)[6:]}
    row["error"] = float(f"{float(off.norm() / expected.norm()):.2g}")
    row["finite"], row["repeats"] = bool(y.isfinite().all()), torch.equal(y, again)
    row["us"], row["bf16_us"] = us, dense(shape, tokens)
    row["share"] = round(problem.words[0].nbytes / (us * 1e-6) / BANDWIDTH, 3)
    row["over_bf16"] = round(row["bf16_us"] / us, 2)
    if (tokens, dtype) == (1, torch.bfloat16):
        row |= targets(code, shape)
    emit(**row)


def decode(code: str, shape: tuple[int, int]) -> None:
    """How long it takes to write all of W~ in bfloat16, and whether it is what torch decodes."""
    (m, n), problem = shape, Problem.of(code, shape)
    calls = [lambda w=w: problem.decoder.dense(w, n, torch.bfloat16) for w in problem.words]
    ends = (slice(0, CHECKED), slice(m - CHECKED, m))
    W, expected = calls[0](), torch.cat([problem.rows(part, n) for part in ends])
    off = torch.cat([W[part] for part in ends]).double() - expected
    error, bytes_ = float(off.norm() / expected.norm()), problem.words[0].nbytes + W.nbytes
    us = microseconds(calls)
    share = round(bytes_ / (us * 1e-6) / BANDWIDTH, 3)
    emit(decode=code, shape=shape, error=float(f"{error:.2g}"), us=us, share=share)


def targets(code: str, shape: tuple[int, int]) -> dict[str, float]:
    """What the kernels are to reach."""
    if shape == SHAPES[0] and code in MICROSECONDS:
        return {"target_us": MICROSECONDS[code]}
    return {"target_share": SHARES[code]} if shape == SHAPES[3] and code in SHARES else {}


def layers(shapes: list[tuple[int, int]]) -> None:
    """The products of a layer after each other, and those of 32 layers as tokens a second."""
    inputs = [torch.randn(1, n, device=ON) for _, n in shapes]
    rows = {"bf16": sum(dense(shape, 1) for shape in shapes)}
    for code in (*CODES,):
        problems = [Problem.of(code, shape) for shape in shapes]
        count = min(8, *(len(p.words) for p in problems))

        def layer(i: int, problems: list[Problem] = problems) -> None:
            for problem, x in zip(problems, inputs, strict=True):
                problem.multiply(i, x, torch.bfloat16)

        rows[code] = microseconds([lambda i=i, layer=layer: layer(i) for i in range(count)])
    for code, us in rows.items():
        emit(
            layer=code,
            us=round(us, 2),
            tokens_per_s=round(1e6 / (32 * us)),
            over_bf16=round(rows["bf16"] / us, 2),
        )


@cache
def dense(shape: tuple[int, int], tokens: int) -> float:
    """Microseconds of F.linear in bfloat16."""
    m, n = shape
    W = torch.randn(1 + CACHED // (2 * m * n), m, n, device=ON, dtype=torch.bfloat16)
    x = torch.randn(tokens, n, device=ON, dtype=torch.bfloat16)
    return microseconds([lambda w=w: linear(x, w) for w in W])


def microseconds(calls: list[Callable[[], object]]) -> float:
    """The median time of one of these calls, replayed as a CUDA graph."""
    calls = calls * (1 + 8 // len(calls))
    if ON.type == "cpu":
        return 1e3 * milliseconds(calls[0], repeats=1)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        calls[0]()
    synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(7):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        synchronize()
        times.append(start.elapsed_time(end))
    return round(1e3 * statistics.median(times) / len(calls), 2)


if __name__ == "__main__":
    main()
