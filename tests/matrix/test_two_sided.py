"""Two-sided rounding: `Sided` against the three-term update, and the losses that are foretold."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from quip.codebooks import MinMaxGrid, RmsGrid
from quip.codebooks.base import Codebook
from quip.codebooks.lattice import Lattice
from quip.codebooks.trellis import Trellis
from quip.errors import UsageError
from quip.matrix.build import build_recipe
from quip.matrix.feedback import ldl
from quip.matrix.quantize import quantize_matrix
from quip.matrix.sweep import sweep
from quip.matrix.two_sided import Sided, two_sided_loss
from quip.transforms import Chain
from tests import reference_two_sided as reference


@dataclass(frozen=True)
class Whole(Codebook):
    """Whole numbers: an unbounded grid of step 1, in tiles of `rows` x `dim`."""

    dim: int = 1
    rows: int = 1
    index_bits: int = 8

    def fit(self, X: Tensor, h: Tensor) -> "Whole":
        return self

    def round(self, x: Tensor, h: Tensor) -> Tensor:
        codes = (x.round().long() + 128).clamp(0, 255)
        return sum(codes[:, i] << 8 * i for i in range(self.dim))

    def decode(self, codes: Tensor) -> Tensor:
        parts = [(codes >> 8 * i) % 256 - 128 for i in range(self.dim)]
        return torch.stack(parts, 1).double()


def spectrum(n: int, decay: float, rng: torch.Generator) -> Tensor:
    """A second moment with eigenvalues (1 + i)^-decay in a random basis, and mean diagonal 1."""
    Q = torch.linalg.qr(torch.randn(n, n, generator=rng, dtype=torch.float64))[0]
    values = (1 + torch.arange(n, dtype=torch.float64)) ** -decay
    H = (Q * values) @ Q.T
    return H / H.diagonal().mean()


def problem(
    m: int, n: int, out: float, into: float, seed: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    W = torch.randn(m, n, generator=rng, dtype=torch.float64)
    return W, spectrum(m, out, rng), spectrum(n, into, rng)


def rounded(W: Tensor, H_O: Tensor | None, H_I: Tensor, book: Codebook, *, rows: int = 1) -> Tensor:
    K, h = ldl(H_I, book.dim)
    sided = Sided.of(book, H_O, rows=rows) if H_O is not None else book
    codes, _ = sweep(W, K, h, sided.fit(W, h.to(W)))
    return torch.cat([book.fit(W, h.to(W)).decode(column) for column in codes.T], 1)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (4, 2), (8, 4)])
def test_sided_is_the_update_of_both_sides_at_once(rows, columns):
    W, H_O, H_I = problem(24, 32, 1.0, 1.0)
    expected = reference.two_sided(W, H_O, H_I, torch.round, rows, columns)
    assert torch.equal(rounded(W, H_O, H_I, Whole(columns, rows)), expected)


def test_rows_in_blocks_that_are_not_even_keep_the_identity_of_the_loss():
    W, H_O, H_I = problem(26, 16, 1.0, 1.0)
    W_hat = rounded(W, H_O, H_I, Whole(), rows=8)  # 9, 9 and 8 rows
    both = two_sided_loss(W - W_hat, H_O, H_I)
    assert both == pytest.approx(reference.loss(W - W_hat, H_O, H_I), rel=1e-12)
    assert both < two_sided_loss(W - rounded(W, None, H_I, Whole()), H_O, H_I)


@pytest.mark.parametrize(
    ("sizes", "decays", "foretold"),
    [
        ((64, 96), (1.0, 1.0), (272.4, 155.7)),
        pytest.param((128, 128), (0.5, 1.0), (690.9, 601.7), marks=pytest.mark.slow),
        pytest.param((128, 128), (1.0, 1.5), (254.2, 128.3), marks=pytest.mark.slow),
    ],
)
def test_losses_are_what_the_diagonals_foretell(sizes, decays, foretold):
    """E loss = tr(D_O) tr(D_I) / 12; that of columns alone has tr(H_O) in place of tr(D_O)."""
    totals = torch.zeros(2, 2, dtype=torch.float64)
    for seed in range(4):
        W, H_O, H_I = problem(*sizes, *decays, seed)
        D_O, D_I = (reference.block_ldl(H, 1)[1].trace() for H in (H_O, H_I))
        for i, (H, weight) in enumerate([(None, H_O.trace()), (H_O, D_O)]):
            E = W - rounded(W, H, H_I, Whole())
            totals[i] += torch.tensor([two_sided_loss(E, H_O, H_I), weight * D_I / 12])
    measured, expected = (totals / 4).T
    assert measured.tolist() == pytest.approx(expected.tolist(), rel=0.02)
    # The specification's problem has these eigenvalues too, in another basis.
    assert expected.tolist() == pytest.approx(foretold, rel=0.08)


@pytest.mark.parametrize(
    "book",
    [
        MinMaxGrid(bits=3),
        RmsGrid(bits=2, rhos=(1.5, 2.0)),
        Lattice(stages=("e8p",), rhos=(1.03,)),
        Trellis(code="learned", bits=2, states=8, rows=16, columns=8),
    ],
)
def test_without_correlations_of_outputs_codes_are_those_of_one_side(book):
    W, _, H_I = problem(32, 64, 1.0, 1.0)
    K, h = ldl(H_I, book.dim)
    W = W.float()
    plain, _ = sweep(W, K, h, book.fit(W, h.float()))
    sided = Sided.of(book, torch.eye(32, dtype=torch.float64))
    codes, _ = sweep(W, K, h, sided.fit(W, h.float()))
    assert torch.equal(codes.long(), plain.long())


@pytest.mark.parametrize(
    "book",
    [
        MinMaxGrid(bits=3),
        Lattice(stages=("e8p",), rhos=(1.03,)),
        Trellis(code="learned", bits=2, states=8, rows=16, columns=8),
    ],
)
def test_the_loss_of_both_sides_falls_for_every_kind_of_codebook(book):
    W, H_O, H_I = problem(64, 64, 1.0, 1.0)
    W = W.float()
    one, both = (two_sided_loss(W - rounded(W, H, H_I, book), H_O, H_I) for H in (None, H_O))
    assert both < 0.9 * one


def test_learned_codebooks_are_refused():
    W, H_O, H_I = problem(16, 16, 1.0, 1.0)
    book = build_recipe(wbits=2, codebook="vq", vq_dim=2).sized(16, 16).codebook
    with pytest.raises(UsageError, match="vq rounds all rows"):
        rounded(W.float(), H_O, H_I, book.seeded(torch.Generator()))


RECIPES = [
    {"wbits": 2, "incoh_processing": True},
    {"wbits": 3, "qfn": "a", "groupsize": 16, "quant": "gptq"},
    {"codebook": "E8P12", "pre_rescale": True},
    {"codebook": "trellis", "wbits": 2, "trellis_states": 8, "tile": "16x8", "scale": "auto"},
]


@pytest.mark.parametrize("flags", RECIPES)
def test_every_recipe_takes_the_second_moment_of_outputs(flags):
    W, H_O, H_I = problem(64, 64, 1.0, 1.0)
    W, recipe = W.float(), build_recipe(**flags)
    found = [
        quantize_matrix(W, H_I, recipe, rng=torch.Generator().manual_seed(1), H_O=H)
        for H in (None, H_O)
    ]
    one, both = (two_sided_loss(q.dequantize() - W, H_O, H_I) for q in found)
    assert both < 0.95 * one
    assert found[1].bits_per_weight == found[0].bits_per_weight


@pytest.mark.parametrize("flags", RECIPES)
def test_in_the_other_basis_the_loss_of_both_sides_is_the_same(flags):
    W, H_O, H_I = problem(64, 64, 1.0, 1.0)
    E = torch.randn(64, 64, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    T, _, H_t = Chain.draw(
        build_recipe(**flags).transforms, W, H_I.clone(), torch.Generator().manual_seed(3)
    )
    E_t = T.apply(E, H_I.clone())[0]
    here, there = two_sided_loss(E, H_O, H_I), two_sided_loss(E_t, T.outputs(H_O), H_t)
    assert there == pytest.approx(here, rel=1e-6)  # signs and rotations are kept in float32
