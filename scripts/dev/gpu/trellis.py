"""Section `trellis`: searching trellises, a column of a matrix at a time, and many of them at once.

A row is a code of 2^L states at `bits` bits of each weight, and a number of tiles of 256 weights:
rounding searches those of one column together. `us_a_weight` counts what the host needs to ask for
the search, `same` says that the first tiles have the codes that torch finds, bit for bit, and
`repeats` that a second search found the same. `torch_us_a_weight` is what torch takes for a column.
"""

import torch
from _measure import device, emit, milliseconds

from quip.codebooks.trellis_codes import code
from quip.kernels import trellis

TILE = 256  # weights
KINDS = [(12, 2), (10, 2), (16, 2), (14, 2), (12, 3), (12, 4), (10, 1)]  # L, bits
TIMED = (12, 2)  # which torch is waited for, too


def main() -> None:
    on = device()
    kinds, counts = (KINDS, (16, 43, 4096)) if on.type == "cuda" else (KINDS[1:2], (1,))
    for L, bits in kinds:
        for tiles in counts:
            measure(L, bits, tiles, on)


def measure(L: int, bits: int, tiles: int, on: torch.device) -> None:
    """One row."""
    known = code("mul1", bits, L, on)
    x = torch.randn(tiles * TILE, 1, generator=torch.Generator().manual_seed(tiles)).to(on)
    found, again = (trellis.encode(x, known, tiles=tiles) for _ in range(2))
    some = min(tiles, 2)
    expected = trellis.encode.reference(x[: some * TILE], known, tiles=some)
    row = {"same": torch.equal(found[: some * TILE], expected)}
    row["repeats"] = torch.equal(found, again)
    ms = milliseconds(lambda: trellis.encode(x, known, tiles=tiles), repeats=3)
    row["us_a_weight"] = float(f"{1e3 * ms / len(x):.3g}")
    if (L, bits) == TIMED and tiles == 16:
        ms = milliseconds(lambda: trellis.encode.reference(x, known, tiles=tiles), repeats=1)
        row["torch_us_a_weight"] = float(f"{1e3 * ms / len(x):.3g}")
    emit(L=L, bits=bits, tiles=tiles, **row)


if __name__ == "__main__":
    main()
