"""The int16 words of EXL3 files -> the codes of single steps, in their places; and its vectors.

`trellis` is [n / 16, m / 16, 16 k]: a run of words for each tile of 16 inputs x 16 outputs. A tile
is a string of 256 codes of k bits, the highest bit of each first. Words hold it 32 bits at a time,
in each of these the later 16 bits first:

    word 0          word 1          word 2          word 3
    bits 16 ... 31  bits 0 ... 15   bits 48 ... 63  bits 32 ... 47

so that a pair is one little-endian number whose highest bit is the first one. The state of step t
is made of the 16 bits of the circular string that end with code t, as in kernels/trellis: codes are
taken as they are. The order "mma" says where in the tile step t stands.
"""

import math

import torch
from jaxtyping import Float16, Int16, UInt8
from torch import Tensor

from quip.kernels.trellis import ORDERS
from quip.packed.published import exactly

TILE, STEPS = 16, 256
ORDER = "mma"
BITS = range(1, 9)


def unpack_codes(words: Int16[Tensor, "n_16 m_16 words"]) -> UInt8[Tensor, "m n"]:
    """The code of each weight, rows being outputs."""
    bits = words.shape[2] // TILE
    first = bits * torch.arange(STEPS)  # the first bit of each step
    places = torch.tensor(ORDERS[ORDER])
    found = torch.empty(TILE * words.shape[1], TILE * words.shape[0], dtype=torch.uint8)
    # One row of tiles at a time, whose numbers of 64 bits are small beside the whole.
    for row, columns in zip(words, found.split(TILE, 1), strict=True):
        numbers = row.contiguous().view(torch.int32).long() & 0xFFFFFFFF
        pairs = (numbers << 32) | numbers.roll(-1, 1)  # no code is longer than both
        codes = (pairs[:, first // 32] >> (64 - bits - first % 32)) & (2**bits - 1)
        tiles = torch.empty_like(codes, dtype=torch.uint8)
        tiles[:, places] = codes.to(torch.uint8)
        columns.copy_(tiles.view(-1, TILE))
    return found


def unpack_signs(words: Int16[Tensor, " n_16"]) -> Float16[Tensor, " n"]:
    """Vectors of the first files: bit i of word j says that sign 16 j + i is -1."""
    bits = (words.int().unsqueeze(1) >> torch.arange(16)) & 1
    return (1 - 2 * bits).flatten().to(torch.float16)


def balanced(x: Float16[Tensor, " n"]) -> tuple[float, Float16[Tensor, " n"]]:
    """(s, x / s), of sizes near 1 as signs have them, to which the rates of tuning are made.

    s is a power of two, and 1 where float16 would not hold x / s exactly.
    """
    size = float(x.double().square().mean().sqrt())
    if not 0 < size < math.inf:
        return 1.0, x
    scale = 2.0 ** round(math.log2(size))
    near = exactly(x.double() / scale, torch.float16)
    return (1.0, x) if near is None else (scale, near)
