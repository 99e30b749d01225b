"""Trellis codes in C++ are those of torch, bit for bit: walks, values, panels."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from quip.kernels import native, trellis
from quip.kernels.trellis import Code, Tiling, cpu, reference

pytestmark = pytest.mark.skipif(not cpu.ENCODE.available(), reason="there is no C++ compiler")

# L, bits and V: from as few overlaps as there can be to more than a register holds
CODES = [
    *((2, 1, 1), (4, 3, 1), (6, 1, 1), (8, 2, 1), (9, 3, 1), (8, 4, 1), (11, 4, 1), (9, 6, 1)),
    *((6, 3, 2), (7, 2, 2), (9, 5, 2), (10, 7, 2), (12, 7, 2), (9, 8, 2), (13, 8, 2), (8, 1, 2)),
]
SHAPES = [(64, 1, 1), (67, 1, 2), (41, 2, 2), (50, 4, 3)]  # m, steps of a row, tiles
NARROWER = ["-mno-avx512f", "-mno-avx"]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def halves(x: Tensor) -> Tensor:
    """x in so few values that many costs are equal."""
    return (2 * x).round() / 2


def code(L: int, bits: int, V: int = 1, *, few: bool = False) -> Code:
    table = randn(2**L, V, seed=L)
    return Code("table", bits, halves(table) if few else table)


def tiles_of(bits: int, L: int) -> Iterator[tuple[int, int, int]]:
    """The shapes whose tiles are as long as a state."""
    return ((m, a, tiles) for m, a, tiles in SHAPES if m // tiles * a * bits >= L)


def check_codes(L: int, bits: int, V: int) -> None:
    for few in (False, True):
        book = code(L, bits, V, few=few)
        for m, across, tiles in tiles_of(bits, L):
            x = randn(m, across * V, seed=m)
            x = halves(x) if few else x
            ours, expected = (form.encode(x, book, tiles=tiles) for form in (cpu, reference))
            assert ours.dtype == expected.dtype
            assert torch.equal(ours, expected), (few, m, across, tiles)


@pytest.fixture
def two_threads():
    """Of torch itself they would take long where others compute as well."""
    before = torch.get_num_threads()
    yield lambda: torch.set_num_threads(2)
    torch.set_num_threads(before)


@pytest.mark.parametrize(("L", "bits", "V"), CODES)
def test_codes_are_those_of_torch_where_costs_are_equal_too(L, bits, V):
    check_codes(L, bits, V)


@pytest.mark.parametrize(("m", "tiles"), [(60, 1), (131, 2), (250, 7)])
def test_threads_share_the_tiles(m, tiles, two_threads):
    book, x, tiling = code(8, 2), randn(m, 1), Tiling(tiles, 1)
    expected = reference.encode(x, book, tiles=tiles)
    codes = torch.stack([expected, expected.flip(0)], 1)
    values = reference.decode(codes, book, tiling)
    two_threads()
    assert torch.equal(cpu.encode(x, book, tiles=tiles), expected)
    assert torch.equal(cpu.decode(codes, book, tiling), values)
    given = x.T, torch.zeros(1, 1), torch.empty(1, m), torch.ones(1), book, tiling
    assert torch.equal(cpu.round_columns(*given)[0], expected)


def test_of_equal_costs_the_lowest_branch_and_overlap_are_taken():
    flat = Code("table", 2, torch.ones(2**8, 1))
    for x in (torch.zeros(64, 1), torch.ones(64, 1)):
        assert not cpu.encode(x, flat, tiles=1).any()


@pytest.mark.parametrize(("L", "bits", "V"), [(8, 2, 1), (12, 2, 1), (10, 5, 2)])
def test_weights_that_are_values_of_a_walk_are_hit(L, bits, V):
    book = code(L, bits, V)
    walk = torch.randint(2**bits, (96, 1), generator=torch.Generator().manual_seed(2))
    x = cpu.decode(walk, book, Tiling(1, V))
    assert torch.equal(cpu.encode(x, book, tiles=1), walk[:, 0].int())


@pytest.mark.parametrize(("L", "bits", "steps"), [(8, 2, 4), (6, 1, 6), (12, 3, 4), (10, 4, 3)])
def test_a_tile_may_have_no_more_bits_than_a_state(L, bits, steps):
    book, x = code(L, bits), randn(steps, 1)
    assert torch.equal(cpu.encode(x, book, tiles=1), reference.encode(x, book, tiles=1))


def test_what_is_no_number_leaves_codes_in_their_range():
    book, x = code(8, 2), randn(64, 2)
    x[7], x[20, 1], x[40] = math.nan, math.inf, -math.inf
    assert int(cpu.encode(x, book, tiles=1).min()) >= 0
    assert int(cpu.encode(x, book, tiles=1).max()) < 2**4


@pytest.mark.parametrize(("L", "bits", "V"), [*CODES, (16, 2, 1), (16, 8, 2)])
def test_values_are_those_of_torch_whatever_the_tiles(L, bits, V):
    book, rng = code(L, bits, V), torch.Generator().manual_seed(1)
    for m, across, tiles in tiles_of(bits, L):
        codes = torch.randint(2**bits, (m, 5 * across), generator=rng)
        for dtype in (torch.uint8, torch.int32):
            given = codes.to(dtype), book, Tiling(tiles, across * V)
            assert torch.equal(cpu.decode(*given), reference.decode(*given))


def test_values_in_an_order_of_their_own_are_those_of_torch():
    book, rng = code(8, 3), torch.Generator().manual_seed(1)
    codes = torch.randint(8, (64, 48), generator=rng, dtype=torch.uint8)
    for order in (trellis.ORDERS["mma"], tuple(torch.randperm(256, generator=rng).tolist())):
        given = codes, book, Tiling(4, 16, order)
        assert torch.equal(cpu.decode(*given), reference.decode(*given))


@pytest.mark.parametrize(("across", "V", "scales"), [(1, 1, 1), (1, 2, 6), (4, 1, 6), (2, 2, 1)])
def test_errors_of_a_panel_are_those_of_its_codes(across, V, scales):
    book, d = code(8, 3, V), across * V
    n, m, tiling = 6 * d, 130, Tiling(2, d)
    X, K, s = randn(n, m), 0.1 * randn(n, n, seed=1), 0.8 + 0.1 * torch.arange(float(scales))
    K, eta = K.triu(1), torch.full((n, m), math.nan)
    codes = cpu.round_columns(X, K.T.contiguous().T, eta, s, book, tiling)
    walks = trellis.split(codes.T, 3, 3 * across)
    W = cpu.decode(walks, book, tiling).T * s.repeat_interleave(n // scales)[:, None]
    K = K * (torch.arange(n)[:, None] // d < torch.arange(n) // d)  # between two spans
    x = X + K.T @ eta
    torch.testing.assert_close(eta, x - W, rtol=0, atol=1e-5)  # noise of sums of some 20 numbers
    for j in range(6):  # the weights that were met may differ in their last bits
        nearest = (x[j * d : j * d + d].T / s[j % scales]).contiguous()
        assert (codes[j] == cpu.encode(nearest, book, tiles=2)).double().mean() > 0.9


def test_a_tile_of_a_panel_keeps_its_codes_where_they_are_as_near():
    book, tiling, s = code(8, 2), Tiling(2, 1), torch.ones(1)
    x = randn(1, 128)
    best = cpu.encode(x.T.contiguous(), book, tiles=2)
    worse = best.clone()
    worse[100] ^= 1  # in the second tile
    old = cpu.decode(worse[:, None], book, tiling).T
    eta, metrics = torch.empty(1, 128), torch.ones(1, 1, 1)
    for target, expected in ((x, best), (old, worse)):
        given = target, torch.zeros(1, 1), eta, s, book, tiling
        found = cpu.round_columns(*given, base=target + 1, kept=(worse[None], metrics))
        assert torch.equal(found[0], expected)
        W = cpu.decode(found.T, book, tiling).T
        assert torch.equal(eta, target + 1 - W)


@pytest.mark.slow
@pytest.mark.skipif(native.ARM, reason="there are no narrower registers")
@pytest.mark.parametrize("flag", NARROWER)
def test_narrower_registers_take_the_same_walks(flag, monkeypatch):
    """As processors without AVX-512, and without AVX, would have it."""
    monkeypatch.setenv("QUIP_CXXFLAGS", flag)
    native.library.cache_clear()
    try:
        assert cpu.ENCODE.available()
        for one in CODES:
            check_codes(*one)
    finally:
        native.library.cache_clear()
