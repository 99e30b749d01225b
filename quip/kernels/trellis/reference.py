"""Trellis codes in torch: the nearest walks, and the values of walks (QTIP, arXiv 2406.11235).

A walk is a circular string of codes c_t of `bits` bits, one a step. The state of step t holds the
last L bits of it,

    s_t = sum_i c_{t-i} 2^(bits i)  mod 2^L,   t - i mod steps,

and its V weights are C[s_t]. States of neighbours share their overlap, e_t = s_t mod 2^(L - bits)
= floor(s_{t+1} / 2^bits).

The Viterbi algorithm keeps a cost for each overlap:

    D_t[e] = min_u D_{t-1}[floor(s / 2^bits)] + |C[s] - x_t|^2,   s = u 2^(L - bits) + e

Of equal costs the lowest u is taken. Costs are sums in float32, each operation rounded, so that
every form of it takes the same walk.
"""

import torch
from jaxtyping import Float, Float32, Int32, Int64, Integer
from torch import Tensor

from quip.kernels.groups import even
from quip.kernels.trellis.tables import Code, Tiling, places

WIDE = 31  # bits: a wider code takes an int64
MEMORY = 2**27  # bytes of back pointers or costs, of as many tiles as are searched together


def code_dtype(d: int, code: Code) -> torch.dtype:
    """What holds the codes of d weights of a row."""
    return torch.int64 if d // code.V * code.bits > WIDE else torch.int32


def encode(x: Float32[Tensor, "m d"], code: Code, *, tiles: int) -> Integer[Tensor, " m"]:
    """The walks near to x in `tiles` tiles of rows; of each row the codes of its d / V steps.

    The first step of a row is the lowest bits. Codes of more than 31 bits are int64, of 64 bits
    with any sign.
    """
    m, d = x.shape
    steps, dtype = d // code.V, code_dtype(d, code)
    shifts = torch.arange(0, steps * code.bits, code.bits, device=x.device)
    found, first = [], 0
    for size, count in _alike(m, tiles):
        rows = x[first : first + size * count]
        first += size * count
        walks = search(rows.reshape(count, size * steps, code.V), code)
        found.append((walks.long().view(-1, steps) << shifts).sum(1))
    return torch.cat(found).to(dtype)


def search(x: Float32[Tensor, "tiles steps V"], code: Code) -> Int64[Tensor, "tiles steps"]:
    """The codes of walks that end where they begin, near to x (QTIP, Algorithm 4).

    A first search, of x turned by half, says which overlap lies at its beginning; the second one
    is held to it at both ends.
    """
    per_tile = max(x.shape[1] * len(code.table) >> code.bits, 4 * len(code.table))
    batches = x.split(max(1, MEMORY // per_tile))
    return torch.cat([_search(batch, code) for batch in batches])


def _search(x: Tensor, code: Code) -> Tensor:
    half = x.shape[1] // 2
    costs, back = _forward(x.roll(-half, 1), code, None)
    states = _walk_back(back, costs.argmin(1), code)
    seam = states[:, x.shape[1] - half] >> code.bits
    _, back = _forward(x, code, seam)
    return _walk_back(back, seam, code) & ((1 << code.bits) - 1)


def _forward(x: Tensor, code: Code, start: Tensor | None) -> tuple[Tensor, Tensor]:
    """(D of the last step [tiles, overlaps], u of every step [steps, tiles, overlaps])."""
    overlaps = len(code.table) >> code.bits
    D = x.new_zeros(len(x), overlaps)
    if start is not None:
        D.fill_(torch.inf).scatter_(1, start[:, None], 0.0)
    back = torch.empty(x.shape[1], len(x), overlaps, dtype=torch.uint8, device=x.device)
    for t in range(x.shape[1]):
        cost = (code.table[:, 0] - x[:, t, :1]).square()  # [tiles, states]
        for v in range(1, code.V):
            cost += (code.table[:, v] - x[:, t, v : v + 1]).square()
        cost += D.repeat_interleave(1 << code.bits, 1)
        D, u = cost.view(len(x), -1, overlaps).min(1)
        back[t] = u
    return D, back


def _walk_back(back: Tensor, last: Tensor, code: Code) -> Int64[Tensor, "tiles steps"]:
    """The states of the walks that end in these overlaps."""
    states, e = [], last
    for u in back.flip(0):
        s = (u.gather(1, e[:, None]).squeeze(1).long() << (code.L - code.bits)) | e
        states.append(s)
        e = s >> code.bits
    return torch.stack(states[::-1], 1)


def states_of(walks: Integer[Tensor, "*tiles steps"], code: Code) -> Int32[Tensor, "*tiles steps"]:
    """The states of circular strings of codes."""
    walks = walks.int()
    states = walks.clone()
    for i in range(1, code.window):
        states |= walks.roll(i, -1) << (code.bits * i)
    return states & (len(code.table) - 1)


def decode(codes: Integer[Tensor, "m steps"], code: Code, tiling: Tiling) -> Float32[Tensor, "m n"]:
    """The values of the codes of all steps, n = steps V."""
    m, k = codes.shape
    across = tiling.columns // code.V  # steps of a row of a tile
    found, first = [], 0
    for size, count in _alike(m, tiling.count):
        rows = codes[first : first + size * count]
        first += size * count
        tiles = rows.view(count, size, k // across, across).transpose(1, 2).flatten(2)
        values = code.table[_along(tiles, code, tiling.order).long()]  # [.., size across, V]
        values = values.view(count, k // across, size, tiling.columns)
        found.append(values.transpose(1, 2).reshape(size * count, -1))
    return torch.cat(found)


def split(codes: Integer[Tensor, "m k"], bits: int, index_bits: int) -> Integer[Tensor, "m steps"]:
    """The codes of single steps, `bits` each, that codes of `index_bits` bits hold."""
    if bits == index_bits:
        return codes
    shifts = torch.arange(0, index_bits, bits, device=codes.device)
    return ((codes.unsqueeze(-1).long() >> shifts) & (2**bits - 1)).to(torch.uint8).flatten(1)


def round_columns(
    X: Float[Tensor, "n m"],
    K: Float[Tensor, "n n"],
    eta: Float[Tensor, "n m"],
    scales: Float[Tensor, " scales"],
    code: Code,
    tiling: Tiling,
    *,
    base: Float[Tensor, "n m"] | None = None,
    kept: tuple[Integer[Tensor, "blocks m"], Float[Tensor, "blocks d d"]] | None = None,
) -> Integer[Tensor, "blocks m"]:
    """The codes of the columns X, d = tiling.columns at a time, with the errors of those before.

        x = X[span] + sum_{j<lo} K[j, span] eta[j]     span = lo ... lo + d - 1
        eta[span] = x - s w, or base[span] - s w       w are the values of the walks near to x / s

    s is the scale, one for all or one for each span. `kept` are codes and a metric for each span:
    those of a tile stay where the new ones are no nearer to x in the sum of e^T metric e.
    """
    d, codes = tiling.columns, []
    units = scales.expand(len(X) // d)
    sizes = even(X.shape[1], tiling.count)
    repeats = torch.tensor(sizes, device=X.device)
    for j, lo in enumerate(range(0, len(X), d)):
        span = slice(lo, lo + d)
        x = torch.addmm(X[span], K[:lo, span].T, eta[:lo]).T if lo else X[span].T
        new = encode((x / units[j]).float(), code, tiles=tiling.count)
        w = _values(new, code, tiling).to(x) * units[j]
        if kept is not None:
            old = kept[0][j].to(new.dtype)
            w_old = _values(old, code, tiling).to(x) * units[j]
            gain = _squares(x - w_old, kept[1][j]) - _squares(x - w, kept[1][j])
            sums = torch.stack([part.sum() for part in gain.split(sizes)])
            better = sums.repeat_interleave(repeats) > 0
            new, w = torch.where(better, new, old), torch.where(better[:, None], w, w_old)
        codes.append(new)
        eta[span] = ((x if base is None else base[span].T) - w).T
    return torch.stack(codes)


def _values(codes: Tensor, code: Code, tiling: Tiling) -> Float32[Tensor, "m d"]:
    bits = tiling.columns // code.V * code.bits
    return decode(split(codes[:, None], code.bits, bits), code, tiling)


def _squares(e: Tensor, metric: Tensor) -> Float[Tensor, " m"]:
    return ((e @ metric) * e).sum(1)


def _along(tiles: Tensor, code: Code, order: tuple[int, ...] | None) -> Tensor:
    """The states of tiles, in the places of their codes."""
    if order is None:
        return states_of(tiles, code)
    at = places(order, torch.int64, tiles.device)
    return states_of(tiles[..., at], code)[..., at.argsort()]


def _alike(m: int, tiles: int) -> list[tuple[int, int]]:
    """(rows, how many) of the tiles of each size, in order."""
    sizes = even(m, tiles)
    return [(size, sizes.count(size)) for size in dict.fromkeys(sizes)]
