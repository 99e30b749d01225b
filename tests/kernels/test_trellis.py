"""Trellis codes in torch against the oracle: walks, states, costs."""

import pytest
import torch

from quip.kernels.trellis import Code, Tiling, decode, encode
from quip.kernels.trellis.reference import search, states_of
from tests import reference_trellis as oracle


def code(L: int, bits: int, V: int = 1, seed: int = 0) -> Code:
    rng = torch.Generator().manual_seed(seed)
    return Code("table", bits, torch.randn(2**L, V, generator=rng))


def targets(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def cost(x: torch.Tensor, walk: torch.Tensor, code: Code) -> float:
    """The squared error of a walk, by the states of the oracle."""
    states = oracle.states(walk.tolist(), code.bits, code.L)
    return float((code.table[states].double() - x.double()).square().sum())


def test_states_are_those_of_the_papers_example():
    paper = Code("table", 1, torch.tensor([[0.5], [0.1], [0.8], [0.3]]))
    walk = torch.tensor([0, 0, 1, 0, 1, 1])  # QTIP, figure 2, from the state 1 on
    found = states_of(walk[None], paper)[0].roll(-1)
    assert found.tolist() == [0, 1, 2, 1, 3, 2]
    assert paper.table[found.long(), 0].tolist() == pytest.approx([0.5, 0.1, 0.8, 0.1, 0.3, 0.8])


@pytest.mark.parametrize(
    ("L", "bits", "V"),
    [(6, 1, 1), (6, 2, 1), (7, 3, 1), (8, 4, 1), (6, 3, 2), (6, 5, 2), (4, 3, 1)],
)
def test_closed_walks_cost_next_to_nothing_more_than_the_best(L, bits, V):
    book, x = code(L, bits, V), targets(3, 32, V)
    walks = search(x, book)
    found = [cost(one, walk, book) for one, walk in zip(x, walks, strict=True)]
    best = [oracle.closed_cost(one, book.table, bits) for one in x]
    free = [oracle.free_cost(one, book.table, bits) for one in x]
    assert all(f >= b - 1e-9 >= g - 2e-9 for f, b, g in zip(found, best, free, strict=True))
    assert sum(found) <= 1.02 * sum(best)  # of 32 steps; of 256 nearly always equal


def test_a_walk_is_found_again():
    book = code(8, 2)
    walks = torch.randint(4, (4, 64), generator=torch.Generator().manual_seed(2))
    x = book.table[states_of(walks, book).long()]
    assert torch.equal(search(x, book), walks)


@pytest.mark.parametrize(("d", "bits", "V"), [(1, 2, 1), (4, 3, 1), (2, 3, 2), (16, 4, 1)])
def test_codes_of_rows_decode_to_the_walks_of_tiles(d, bits, V):
    book, x = code(8, bits, V), targets(21, d)  # of two tiles, 11 and 10 rows
    codes = encode(x, book, tiles=2)
    assert codes.dtype == (torch.int64 if d // V * bits > 31 else torch.int32)
    steps = torch.arange(0, d // V * bits, bits)
    walks = (codes[:, None].long() >> steps) & (2**bits - 1)
    found = decode(walks.to(torch.uint8), book, Tiling(2, d))
    for rows in (slice(0, 11), slice(11, 21)):
        states = oracle.states(walks[rows].flatten().tolist(), bits, 8)
        assert torch.equal(found[rows], book.table[states].view(-1, d))
    again = encode(found, book, tiles=2)
    assert torch.equal(again, codes)


def test_columns_of_tiles_are_walks_of_their_own_in_any_order():
    book = code(8, 2)
    walks = torch.randint(4, (32, 48), generator=torch.Generator().manual_seed(3))
    order = tuple(torch.randperm(256, generator=torch.Generator().manual_seed(4)).tolist())
    found = decode(walks.to(torch.uint8), book, Tiling(2, 16, order))
    tile = walks[16:, 32:].flatten()[list(order)]
    expected = book.table[oracle.states(tile.tolist(), 2, 8)].flatten()
    assert torch.equal(found[16:, 32:].flatten()[list(order)], expected)
