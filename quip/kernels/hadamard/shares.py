"""How the work of cuda.cu on some vectors is shared out to thread blocks."""

import math
from dataclasses import dataclass

from quip.kernels.hadamard.matrices import factors

SHORT = 1024  # numbers of S that lanes hold: longer ones, and those with K, need shared memory
FEW = 32  # vectors that are each shared out to several blocks
BLOCKS = 64  # among how many all of them are: each block reads its vector whole
SMALL = 64  # order of K: with larger ones, many vectors are multiplied by a product of matrices
MANY = 64  # vectors, from which on they are
THREADS = (128, 512)  # of a block, at least and at most
PARTS = 8  # of a sum over K's columns, at most


@dataclass(frozen=True)
class Shares:
    """What one block has of S and of K, and what it takes."""

    fold: int  # one in so many columns of S
    shares: int  # of the rows of K
    rows: int  # of K that a share has, a multiple of 4; the last one may have fewer
    threads: int
    bytes: int  # of shared memory: the columns, the rows, and sums of parts

    @classmethod
    def of(cls, vectors: int, order: int, runs: int) -> "Shares":
        """For vectors of order x runs numbers."""
        fold, fours, wanted = 1, math.ceil(order / 4), 1
        if vectors <= FEW or order > SMALL:
            fold = 16 if runs >= 128 else 8 if runs == 64 else 1
            wanted = min(fours, max(1, BLOCKS // (vectors * fold)))
        rows = 4 * math.ceil(fours / wanted)
        numbers, (least, most) = order * runs // fold, THREADS
        sums = 0 if order == 1 else rows // 4 * runs // fold  # of four rows
        busy = max(numbers // 4, PARTS * sums)
        return cls(
            fold=fold,
            shares=math.ceil(order / rows),
            rows=rows,
            threads=max(least, min(most, 32 * math.ceil(busy / 32))),
            bytes=4 * (numbers + (order * rows + 4 * most if order > 1 else 0)),
        )


def orders(width: int) -> tuple[int, int]:
    """The order of K, 1 where there is none, and that of S."""
    *outer, runs = factors(width)
    return math.prod(outer), runs


def is_short(order: int, runs: int) -> bool:
    """Whether lanes hold whole vectors."""
    return order == 1 and runs <= SHORT


def is_multiplied(vectors: int, order: int) -> bool:
    """Whether K is a product of matrices of its own."""
    return order > SMALL and vectors > MANY
