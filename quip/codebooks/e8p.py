"""E8P: 65,536 points of the shifted lattice E8 + 1/4, eight weights in 16 bits.

A point is v + 1/4 or v - 1/4, where v has entries +-1/2, +-3/2, +-5/2 and an even sum. Its code
is a byte for |v|, one of 256 magnitudes, and a byte for seven signs and the shift:

    bit   15 ... 8   7 6 5 4 3 2 1     0
          |v|        signs of the      sign of coordinate 0; the parity of the byte tells
                     coordinates       the shift: +1/4 if it is even, -1/4 if it is odd
                     7 5 3 1 6 4 2

The sign of coordinate 7 is counted from the one that makes the sum of |v| even (QuIP#, section
4.2; the numbering is that of the published files). The nearest point is found without a search, by
kernels/lattice_points, which needs no more of the lattice than these tables.
"""

from functools import cache

import torch
from jaxtyping import Float, Int8, Int32, Int64, Integer
from torch import Tensor

from quip.kernels.lattice_points import E8P, nearest_of, points_of

INDEX_BITS = 16
DIM = 8
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # bit b of the sign byte belongs to coordinate ORDER[b]
# Twice the magnitudes of rows 227 to 255.
# fmt: off
PATTERNS = (
    "31113333", "13113333", "11313333", "11133333", "33313311", "33313131", "33311331", "33313113",
    "33311313", "33311133", "33133311", "33133131", "33131331", "33133113", "33131313", "33131133",
    "31333311", "31333131", "31331331", "31333113", "31331313", "13331133", "13333311", "13333131",
    "13331331", "13333113", "13331313", "11331333", "33113331",
)
# fmt: on


@cache
def magnitudes() -> Int8[Tensor, "256 8"]:
    """Twice |v| of each row: squared norm up to 10 in ascending order, then the 29 patterns."""
    twice = 2 * _digits() + 1  # [6561, 8]
    small = twice[twice.square().sum(1) <= 40]
    return torch.cat([small, _numbers(PATTERNS)]).to(torch.int8)


@cache
def packed_table() -> Int32[Tensor, " 256"]:
    """The magnitudes in 1 KiB: nibble b of a row is 2 v + 8 of coordinate ORDER[b].

    v_7 is negative where the sum of the magnitudes is odd. To negate an entry, XOR it with 14.
    """
    nibbles = (_even(magnitudes()) + 8)[:, ORDER].long()
    words = (nibbles << torch.arange(0, 32, 4)).sum(1)
    return torch.where(words < 2**31, words, words - 2**32).int()


@cache
def signs() -> Int8[Tensor, "256 9"]:
    """What each sign byte says: the signs of the eight coordinates, and that of the shift."""
    bits = torch.arange(256)[:, None] >> torch.arange(8) & 1  # [256, 8]
    odd = bits.sum(1, keepdim=True) % 2
    bits[:, :1] ^= odd
    inverse = [ORDER.index(i) for i in range(DIM)]
    return 1 - 2 * torch.cat([bits[:, inverse], odd], dim=1).to(torch.int8)


@cache
def code_of() -> Int32[Tensor, " 6561"]:
    """The code of each v > 0, by the number whose base-3 digits are |v| - 1/2; 0 for none."""
    halves = magnitudes().int()
    index = (halves // 2 * _powers()).sum(1)
    odd = halves.sum(1) // 2 % 2
    codes = torch.zeros(3**DIM, dtype=torch.int32)
    codes[index] = torch.arange(256, dtype=torch.int32) << 8 | odd.int() << 7
    return codes


@cache
def tables(device: torch.device) -> E8P:
    """What kernels/lattice_points is to know of the lattice."""
    sign = signs().float()
    sign_bits = torch.tensor([1 << ORDER.index(i) for i in range(DIM)])
    return E8P(
        magnitudes=(_even(magnitudes()) / 2).to(device),
        signs=sign[:, :8].contiguous().to(device),
        shifts=(sign[:, 8] / 4).to(device),
        sign_bits=sign_bits.to(device),
        code_of=code_of().to(device),
        patterns=(_numbers(PATTERNS) // 2).to(device),
    )


def decode(
    codes: Integer[Tensor, "*k"], dtype: torch.dtype = torch.float32
) -> Float[Tensor, "*k 8"]:
    """The points, exactly: their entries are odd multiples of 1/4 up to 11/4."""
    return points_of(codes, tables(codes.device), dtype)


def nearest(x: Float[Tensor, "m 8"]) -> Int32[Tensor, " m"]:
    """The codes of the points nearest to x, in torch; half precision counts as float32."""
    return nearest_of(x, tables(x.device))


def _digits() -> Int64[Tensor, "6561 8"]:
    return torch.arange(3**DIM)[:, None] // _powers() % 3


def _powers() -> Int64[Tensor, " 8"]:
    return 3 ** torch.arange(7, -1, -1)


def _numbers(rows: tuple[str, ...]) -> Int64[Tensor, "k 8"]:
    return torch.tensor([[int(digit) for digit in row] for row in rows])


def _even(twice: Int8[Tensor, "256 8"]) -> Int8[Tensor, "256 8"]:
    """Twice v: the last coordinate is negative where the sum would be odd."""
    signed = twice.clone()
    signed[:, 7] *= (1 - twice.sum(1) % 4).to(torch.int8)  # twice an even sum is 0 modulo 4
    return signed
