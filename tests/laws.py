"""The laws of design: what every Transform, Codebook, Polish and Recipe owes.

A new one is one more line in TRANSFORMS, CODEBOOKS, TILED, POLISHES, UPDATES or
GRIDS below.
"""

import json
import pickle
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from quip.codebooks import (
    DECODERS,
    Codebook,
    Decoder,
    Groups,
    Learned,
    MinMaxGrid,
    RmsGrid,
    SymmetricGrid,
    Trellis,
    candidate_rhos,
)
from quip.codebooks.base import tiles
from quip.codebooks.centroids import Scheme
from quip.kernels.bits import words
from quip.matrix.build import build_recipe
from quip.matrix.centroids import UpdateCentroids
from quip.matrix.feedback import ldl
from quip.matrix.linalg import energy, proxy_loss
from quip.matrix.polish import Greedy, Polish
from quip.matrix.quantize import quantize_matrix
from quip.matrix.seeds import rng_for
from quip.matrix.sweep import sweep
from quip.packed.matrix import QuantizedMatrix
from quip.stored import Stored
from quip.transforms import (
    Chain,
    Draw,
    HadamardDraw,
    KroneckerDraw,
    Order,
    OutputRescaleDraw,
    RescaleDraw,
    rescales_outputs,
)

# Rounding noise of float64 sums of at most a few hundred terms, relative to their size.
NOISE = 1e-11


@dataclass(frozen=True)
class Points(Codebook):
    """Any finite set of points times the RMS of the weights: the plainest codebook with dim > 1."""

    points: Tensor  # [2^index_bits, dim]
    scale: float = 1.0

    rows = 1

    @property
    def dim(self) -> int:
        return self.points.shape[1]

    @property
    def index_bits(self) -> int:
        return len(self.points).bit_length() - 1

    @classmethod
    def random(cls, dim: int, index_bits: int) -> "Points":
        rng = torch.Generator().manual_seed(dim)
        return cls(torch.randn(2**index_bits, dim, generator=rng, dtype=torch.float64))

    def fit(self, X: Tensor, h: Tensor) -> "Points":
        return replace(self, scale=float(X.square().mean().sqrt()))

    def seeded(self, rng: torch.Generator) -> "Points":
        return self

    def clamp(self, X: Tensor) -> Tensor:
        return X

    def round(self, x: Tensor, h: Tensor) -> Tensor:
        points = self.scale * self.points.to(x)
        return ((x[:, None] - points) ** 2 @ h).argmin(1)

    def decode(self, codes: Tensor) -> Tensor:
        return self.scale * self.points[codes]

    def joined(self, books: Sequence["Points"], groups: Groups) -> "JoinedPoints":
        return JoinedPoints(tuple(books), groups)


@dataclass(frozen=True)
class JoinedPoints(Decoder):
    """The books of each group of a matrix; one number for each is counted as stored."""

    books: tuple[Any, ...]
    groups: Groups

    @property
    def dim(self) -> int:
        return self.books[0].dim

    @property
    def index_bits(self) -> int:
        return self.books[0].index_bits

    def decode(self, codes: Tensor) -> Tensor:
        size = self.groups.size or self.groups.columns
        columns = [self.books[k // size].decode(c) for k, c in enumerate(codes.T)]
        return torch.cat(columns, dim=1)

    def options(self) -> dict[str, object]:
        return {"dim": self.dim, "bits": self.index_bits, "count": len(self.books)}

    def tensors(self) -> dict[str, Tensor]:
        return {"scale": torch.tensor([getattr(b, "scale", 1.0) for b in self.books])}

    @classmethod
    def empty(cls, m: int, n: int, *, dim: int, bits: int, count: int) -> dict[str, Tensor]:
        codes = torch.empty(m, words(n // dim, bits), dtype=torch.int32, device="meta")
        return {"codes": codes, "scale": torch.empty(count, device="meta")}

    @classmethod
    def restore(cls, tensors: object, m: int, n: int, **options: object) -> "JoinedPoints":
        raise NotImplementedError


@dataclass(frozen=True)
class Steps(Codebook):
    """A code over rows, one bit a weight: up or down from the row above.

    w_r = w_{r-1} + step (2 c_r - 1) inside a tile, which starts at 0. `round` is the best of all
    paths through a tile (dynamic programming over the heights that can be reached).
    """

    tile: int
    step: float = 1.0

    dim = index_bits = 1

    @property
    def rows(self) -> int:
        return self.tile

    def fit(self, X: Tensor, h: Tensor) -> "Steps":
        return replace(self, step=float(X.square().mean().sqrt()) or 1.0)

    def seeded(self, rng: torch.Generator) -> "Steps":
        return self

    def clamp(self, X: Tensor) -> Tensor:
        return X

    def round(self, x: Tensor, h: Tensor) -> Tensor:
        parts = x[:, 0].split(tiles(len(x), self.rows))
        return torch.cat([self._best_path(part.tolist()) for part in parts]).to(torch.uint8)

    def _best_path(self, wanted: list[float]) -> Tensor:
        costs: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
        for x in wanted:
            found: dict[int, tuple[float, tuple[int, ...]]] = {}
            for height, (cost, path) in costs.items():
                for bit in (0, 1):
                    at = height + 2 * bit - 1
                    new = cost + (x - self.step * at) ** 2, (*path, bit)
                    found[at] = min(found.get(at, new), new)
            costs = found
        return torch.tensor(min(costs.values())[1])

    def decode(self, codes: Tensor) -> Tensor:
        parts = (2.0 * codes.double() - 1).split(tiles(len(codes), self.rows))
        return self.step * torch.cat([part.cumsum(0) for part in parts])[:, None]

    def joined(self, books: Sequence["Steps"], groups: Groups) -> "JoinedPoints":
        return JoinedPoints(tuple(books), groups)


def learned(dim: int, bits: int, tile_count: int = 1, **options: Any) -> Learned:
    """Learned codebooks of all columns that they are fitted to, after few iterations."""
    scheme = Scheme(dim=dim, bits=bits, weights=None, columns=None, **options)
    return Learned(scheme=scheme, iterations=2, tile_count=tile_count)


class Shuffle:
    """A draw of what comes with models alone: an order of the inputs."""

    def check(self, m: int, n: int) -> None:
        """Every size will do."""

    def __call__(self, W: Tensor, H: Tensor, rng: torch.Generator) -> Order:
        return Order(torch.randperm(W.shape[1], generator=rng))


TRANSFORMS: dict[str, Sequence[Draw]] = {
    "nothing": [],
    "rescale": [RescaleDraw()],
    "kronecker": [KroneckerDraw()],
    "blocked": [KroneckerDraw(blocked=True)],
    "blocked, unpermuted": [KroneckerDraw(blocked=True, permute=False)],
    "rescale, kronecker": [RescaleDraw(), KroneckerDraw()],
    "hadamard": [HadamardDraw(block=None)],
    "hadamard, in blocks": [HadamardDraw(block=4)],
    "rescale, hadamard": [RescaleDraw(), HadamardDraw(block=None)],
    "rescale outputs": [OutputRescaleDraw()],
    "rescale both, kronecker": [RescaleDraw(), OutputRescaleDraw(), KroneckerDraw()],
    "hadamard, outputs rescaled": [HadamardDraw(block=None, rescales_outputs=True)],
    "order": [Shuffle()],
    "order, rescale": [Shuffle(), RescaleDraw()],
}

LEARNED: dict[str, Codebook] = {
    "learned, 1D, in 4 tiles": learned(1, 2, 4, entry_bits=16),
    "learned, 1D, of low rank": learned(1, 3, 3, entry_bits=16, rank=2),
    "learned, 2D, one scale": learned(2, 2, 2, shared=True),
    "learned, 2D, scaled": learned(2, 1, 2, run=4),
    "learned, 2D, entries of 4 bits": learned(2, 2, entry_bits=4, run=8),
    "learned, 4D": learned(4, 1),
}

CODEBOOKS: dict[str, Codebook] = {
    "min-max, 2 bits": MinMaxGrid(bits=2),
    "min-max, 8 bits": MinMaxGrid(bits=8),
    "symmetric, 2 bits": SymmetricGrid(bits=2, shares=(1.0,)),
    "symmetric, 4 bits, best of three": SymmetricGrid(bits=4, shares=(0.6, 0.8, 1.0)),
    "rms, 2 bits": RmsGrid(bits=2, rhos=(2.4,)),
    "rms, 3 bits, best of ten": RmsGrid(bits=3, rhos=candidate_rhos(3)),
    "rms, 8 bits": RmsGrid(bits=8, rhos=(4.5,)),
    "pairs": Points.random(2, 4),
    "eights": Points.random(8, 6),
    **LEARNED,
}

# Codes over rows, which are no codebooks of vectors: `check_tiles` and `check_polish` are theirs.
TILED: dict[str, Codebook] = {
    "steps, 4 rows": Steps(4),
    "steps, 7 rows": Steps(7),
    "trellis, columns": Trellis(code="mul1", bits=2, states=6, rows=8),
    "trellis, squares": Trellis(code="mcg", bits=2, states=7, rows=4, columns=4),
    "trellis, pairs": Trellis(code="mul1", bits=1.5, states=6, rows=8, columns=2),
}

POLISHES: dict[str, Polish] = {"one pass": Greedy(1), "three passes": Greedy(3)}

# Of books that are learned, which alone can move.
UPDATES: dict[str, Polish] = {"30 steps": UpdateCentroids(30)}

# The flags of every kind of grid; a row of `METHODS` takes any of them.
GRIDS: dict[str, dict[str, object]] = {
    "row": {},
    "row, groups": {"groupsize": 16},
    "row, symmetric": {"sym": True, "groupsize": 16},
    "row, faithful": {"faithful": True},
    "row, rotated": {"pre_proj": True, "qfn": "a"},
    "column": {"incoh_processing": True},
    "tensor, blocked": {"incoh_processing": True, "range_": "tensor", "pre_proj_extra": 0},
    "columns": {"incoh_processing": True, "range_": "16", "pre_proj_extra": 2},
    "faithful": {"incoh_processing": True, "faithful": True},
}


def check_transform(draws: Sequence[Draw], W: Tensor, H: Tensor) -> None:
    """undo(apply(W)) = W; tr(W H W^T) is kept; output(W~ input(x)) = W x; nothing is changed."""
    given = W.clone(), H.clone()
    f = torch.rand(len(W), generator=torch.Generator().manual_seed(3)).double() ** 4
    T, W_t, H_t = Chain.draw(draws, W, H, torch.Generator().manual_seed(1), f=f)
    again, *same = Chain.draw(draws, W, H, torch.Generator().manual_seed(1), f=f)
    assert torch.equal(W, given[0])
    assert torch.equal(H, given[1])
    assert torch.equal(W_t, same[0])
    assert torch.equal(H_t, same[1])
    assert torch.equal(again.apply(W, H)[1], H_t)
    assert_near(T.undo(W_t), W)
    if not rescales_outputs(draws):
        assert_near(((W_t @ H_t) * W_t).sum(), ((W @ H) * W).sum())
    assert_near(H_t, H_t.T)
    x = torch.randn(2, 3, W.shape[1], generator=torch.Generator().manual_seed(2)).double()
    assert_near(T.output(T.input(x) @ W_t.T), x @ W.T)
    assert_near(T.output(W_t @ T.input(x[0, 0])), W @ x[0, 0])
    assert T.input(x.float()).dtype == T.output((x @ W.T).float()).dtype == torch.float32
    for link in T.links:
        again = check_stored(link, *W.shape)
        assert torch.equal(again.undo(W), link.undo(W))
        assert torch.equal(again.input(x), link.input(x))
        assert torch.equal(again.output(x @ W.T), link.output(x @ W.T))


def check_stored(part: Stored, m: int, n: int) -> Any:
    """Options fit for JSON; tensors as laid out, which come to something; and the way back."""
    tensors, options = part.tensors(), json.loads(json.dumps(part.options()))
    layout = type(part).empty(m, n, **options)
    codes = layout.pop("codes", None)
    assert (codes is not None) == (type(part) in DECODERS.values())
    assert options == part.options()
    assert {k: (x.shape, x.dtype) for k, x in tensors.items()} == {
        k: (x.shape, x.dtype) for k, x in layout.items()
    }
    assert sum(x.nbytes for x in tensors.values()) > 0
    assert all(x.is_meta for x in layout.values())
    again = type(part).restore(tensors, m, n, **options)
    assert again.options() == options
    assert all(torch.equal(x, tensors[name]) for name, x in again.tensors().items())
    return again


def check_codebook(book: Codebook, X: Tensor, h: Tensor) -> None:
    """round is nearest under h, decode(round(decode(c))) = decode(c), and fit forgets."""
    book = book.fit(X, h)
    m, d = len(X), book.dim
    points = every_point(book, m)  # [2^index_bits, m, d]
    assert_near(every_point(book.fit(2 * X, h).fit(X, h), m), points)
    assert book.seeded(torch.Generator()) is book
    for c, point in enumerate(points):
        codes = book.round(point, h[:d])
        assert codes.shape == (m,)
        assert torch.equal(book.decode(codes), point), f"code {c} decodes to another point"
    for x in (3 * X).split(d, dim=1):  # beyond the fitted range too
        codes = book.round(x, h[:d])
        assert int(codes.min()) >= 0
        assert int(codes.max()) < 2**book.index_bits
        distances = ((points - x) ** 2) @ h[:d]
        assert_near(((book.decode(codes) - x) ** 2) @ h[:d], distances.amin(0))
    clamped = book.clamp(3 * X)
    assert_near(book.clamp(clamped), clamped)
    for point in points:
        assert_near(book.clamp(point), point)


def check_tiles(book: Codebook, X: Tensor, h: Tensor) -> None:
    """Tiles are as many and as even as `tiles` says, and no tile feels another."""
    book, (m, d) = book.fit(X, h), (len(X), book.dim)
    sizes = tiles(m, book.rows)
    assert sum(sizes) == m
    assert max(sizes) - min(sizes) <= 1
    x = X[:, :d]
    codes = book.round(x, h[:d])
    lo = 0
    for size in sizes:
        here = slice(lo, lo + size)
        others = -2 * x
        others[here] = x[here]
        assert torch.equal(book.round(others, h[:d])[here], codes[here])
        flipped = (2**book.index_bits - 1) - codes.long()
        flipped[here] = codes[here].long()
        assert torch.equal(book.decode(flipped)[here], book.decode(codes)[here])
        lo += size


def check_polish(polish: Polish, book: Codebook, W: Tensor, H: Tensor, group: int | None) -> None:
    """tr(E H E^T) never rises, codes stay codes, and nothing that was handed in is changed."""
    d = book.dim
    book = book if group else book.fit(W, H.diagonal())
    K, h = ldl(H, d)
    codes, books = sweep(W, K, h, book, group=group)
    given = codes.clone()
    better, new = polish(W, H, codes, books, group=group)
    assert torch.equal(codes, given)
    assert better.shape == codes.shape
    assert len(new) == len(books)
    before, after = (decoded(c, b, group) - W for c, b in ((codes, books), (better, new)))
    assert energy(after, H) <= energy(before, H) * (1 + NOISE)


def decoded(codes: Tensor, books: Sequence[Codebook], group: int | None) -> Tensor:
    """W_hat of the codes of a sweep, in its order."""
    d = books[0].dim
    places = (divmod(k * d, group or d * codes.shape[1]) for k in range(codes.shape[1]))
    of = (books[which].at(column) for which, column in places)
    return torch.cat([b.decode(c) for b, c in zip(of, codes.T, strict=True)], dim=1)


def every_point(book: Codebook, rows: int) -> Tensor:
    return torch.stack([book.decode(torch.full((rows,), c)) for c in range(2**book.index_bits)])


def check_recipe(flags: dict[str, object], W: Tensor, H: Tensor) -> QuantizedMatrix:
    """Codes in range, honest bits, and an answer that is finite and that saved codes keep."""
    given = W.clone(), H.clone()
    q = quantize_matrix(W, H, build_recipe(**flags), rng=rng_for(0, "w"))
    W_hat = q.dequantize()
    assert torch.equal(W, given[0])
    assert torch.equal(H, given[1])
    assert q.codes.shape == W_hat.shape == W.shape
    assert q.codes.dtype == torch.uint8
    assert int(q.codes.max()) < 2 ** flags["wbits"]
    assert bool(torch.isfinite(W_hat).all())
    assert round(q.bits_per_weight * W.numel(), 6) == owed_bits(flags, *W.shape)
    decoder = check_stored(q.decoder, *W.shape)
    assert type(decoder) in DECODERS.values()
    assert torch.equal(decoder.decode(q.codes), q.decoder.decode(q.codes))
    for saved in (q, pickle.loads(pickle.dumps(q)), replace(q, codes=q.codes.int())):
        assert torch.equal(saved.dequantize(), W_hat)
    return q


def check_blind_to_dtype(flags: dict[str, object], W: Tensor, H: Tensor) -> None:
    """The same weights give the same result, whatever type they come in."""
    recipe = build_recipe(**flags)
    half, single = (
        quantize_matrix(X, H, recipe, rng=rng_for(0, "w"))
        for X in (W.bfloat16(), W.bfloat16().float())
    )
    assert torch.equal(half.codes, single.codes)
    assert torch.equal(half.dequantize(), single.dequantize())


def check_loss_falls(flags: dict[str, object], W: Tensor, H: Tensor) -> None:
    """More bits, less loss; and every width obeys `check_recipe`."""
    two, three, four = (
        proxy_loss(W, check_recipe({**flags, "wbits": bits}, W, H).dequantize(), H)
        for bits in (2, 3, 4)
    )
    assert two > three > four


def owed_bits(flags: dict[str, object], m: int, n: int) -> int:
    """All bits that a file needs, counted from the flags; numbers take 16 bits."""
    bits, incoherent = flags["wbits"], flags.get("incoh_processing", False)
    total = 32 * m * words(n, bits)
    if incoherent:
        named = {"tensor": n, "column": 1}
        range_ = "tensor" if flags.get("faithful") else flags.get("range_", "column")
        width = named.get(range_) or int(range_)
        total += -(-n // width) * 16  # a step for each group of columns
        total += 16 * n  # the rescaling
    else:
        groups = -(-n // flags.get("groupsize", n))
        total += m * groups * 16  # steps of each row
        total += 0 if flags.get("sym") else 32 * words(m * groups, bits)  # and zeros
    if incoherent or flags.get("pre_proj"):
        extra = flags.get("pre_proj_extra", 1)
        total += rotation_bits(m, blocked=extra != 1) + rotation_bits(n, blocked=extra != 1)
        total += 0 if extra == 2 else permutation_bits(m) + 2 * permutation_bits(n)
    return total


def rotation_bits(n: int, *, blocked: bool) -> int:
    """p(p+1)/2 numbers for each p x p factor."""
    p = max(p for p in range(1, n + 1) if n % p == 0 and p * p <= n)
    q = n // p
    of_p, of_q = (k * (k + 1) // 2 * 16 for k in (p, q))
    return q * of_p + p * of_q if blocked else of_p + of_q


def permutation_bits(n: int) -> int:
    """As many bits for each number as the largest needs."""
    return 32 * words(n, max(1, (n - 1).bit_length()))


def assert_near(ours: Tensor, expected: Tensor, noise: float = NOISE) -> None:
    """Equal but for rounding noise, relative to the largest entry."""
    size = float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(ours, expected, rtol=0, atol=noise * (size or 1.0))
