"""E8P: 65,536 points of the shifted lattice E8 + 1/4, eight weights in 16 bits.

A point is v + 1/4 or v - 1/4, where v has entries +-1/2, +-3/2, +-5/2 and an even sum. Its code
is a byte for |v|, one of 256 magnitudes, and a byte for seven signs and the shift:

    bit   15 ... 8   7 6 5 4 3 2 1     0
          |v|        signs of the      sign of coordinate 0; the parity of the byte tells
                     coordinates       the shift: +1/4 if it is even, -1/4 if it is odd
                     7 5 3 1 6 4 2

The sign of coordinate 7 is counted from the one that makes the sum of |v| even (QuIP#, section
4.2; the numbering is that of the published files). For one shift, z = x -+ 1/4 and the sum of v
even, the nearest v is found without a search: its magnitudes have one of seven shapes, or are one
of 29 patterns of squared norm 12. `nearest` is that; compiled.py has its fast form.
"""

from functools import cache

import torch
from jaxtyping import Float, Int8, Int32, Int64, Integer
from torch import Tensor

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
# How many halves become 3/2 (1) or 5/2 (2), largest |z| first. A shape of odd sum has to change
# one sign more, or less, than z does.
SHAPES = ("00000000", "10000000", "11000000", "11100000", "11110000", "20000000", "21000000")


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
    index = (halves // 2 * _powers(halves.device)).sum(1)
    odd = halves.sum(1) // 2 % 2
    codes = torch.zeros(3**DIM, dtype=torch.int32)
    codes[index] = torch.arange(256, dtype=torch.int32) << 8 | odd.int() << 7
    return codes


def decode(
    codes: Integer[Tensor, "*k"], dtype: torch.dtype = torch.float32
) -> Float[Tensor, "*k 8"]:
    """The points, exactly: their entries are odd multiples of 1/4 up to 11/4."""
    codes = codes.long()
    sign = _on(signs, codes.device)[codes & 255]
    v = _on(even_magnitudes, codes.device)[codes >> 8] * sign[..., :8]
    return (2 * v + sign[..., 8:]).to(dtype) / 4


def nearest(x: Float[Tensor, "m 8"]) -> Int32[Tensor, " m"]:
    """The codes of the points nearest to x, in closed form; half precision counts as float32."""
    x = x.float() if x.dtype.itemsize < 4 else x
    x, shift = x.unsqueeze(0), x.new_tensor([0.25, -0.25]).view(2, 1, 1)
    digits, negative, gain = _nearest_of_shift(x - shift)
    total = gain + (shift * x).sum(-1)
    minus = total[1] > total[0]
    digits, negative = (
        torch.where(minus[:, None], pair[1], pair[0]) for pair in (digits, negative)
    )
    index = (digits * _powers(x.device)).sum(-1)
    bits = (negative * _bits(x.device)).sum(-1)
    return (_on(code_of, x.device)[index] ^ bits ^ minus).int()


def _nearest_of_shift(
    z: Float[Tensor, "s m 8"],
) -> tuple[Int64[Tensor, "s m 8"], Tensor, Float[Tensor, "s m"]]:
    """|v| - 1/2 and the signs of the v nearest to z, and <v, z> - |v|^2 / 2 + 1.

    With a = |z| sorted, v = 1/2 everywhere gains <a, 1/2>, each 3/2 a_j - 1 more, a 5/2 2 a_1 - 3.
    An odd sum costs a_8: the smallest changes its sign.
    """
    negative = z < 0
    a, order = z.abs().sort(dim=-1, descending=True)
    odd = negative.sum(-1) % 2  # [s, m]: of |v| = 1/2 with the signs of z
    sums = (a - 1).cumsum(-1)
    first, second, last = a[..., 0], a[..., 1], a[..., 7]
    gains = [torch.zeros_like(first), *sums[..., :4].unbind(-1)]
    gains += [2 * first - 3, 2 * first + second - 4]
    shapes = _on(_shapes, z.device)
    parity = shapes.sum(-1) % 2
    costs = (parity != odd.unsqueeze(-1)) * last.unsqueeze(-1)
    gain, shape = (torch.stack(gains, dim=-1) - costs).max(-1)
    digits = torch.empty_like(order).scatter_(-1, order, shapes[shape])
    flips = (parity[shape] != odd).unsqueeze(-1)
    negative = negative.scatter(-1, order[..., 7:], negative.gather(-1, order[..., 7:]) ^ flips)
    promising = sums[..., 4] - (odd == 0) * last > gain  # about 6 % of Gaussian vectors
    if promising.any():
        found = _nearest_pattern(z[promising])
        better = found[2] > gain[promising]
        for old, new in zip((digits, negative, gain), found, strict=True):
            shape_of = better.view(-1, *[1] * (new.ndim - 1))
            old[promising] = torch.where(shape_of, new, old[promising])
    return digits, negative, gain + a.sum(-1) / 2


def _nearest_pattern(
    z: Float[Tensor, "k 8"],
) -> tuple[Int64[Tensor, "k 8"], Tensor, Float[Tensor, " k"]]:
    """What `_nearest_of_shift` finds, among the 29 patterns alone, whose |v| sum to 9.

    The gain is over |v| = 1/2 everywhere.
    """
    a, negative = z.abs(), z < 0
    patterns = _on(_patterns, z.device)
    even = negative.sum(-1) % 2 == 0  # then one sign has to change: that of the least a_i |v_i|
    costs = (a.unsqueeze(1) * (patterns + 0.5).to(a)).amin(-1)  # [k, 29]
    gain, which = (a @ patterns.T.to(a) - 5 - 2 * even.unsqueeze(1) * costs).max(-1)
    digits = patterns[which]
    flipped = (a * (digits + 0.5).to(a)).argmin(-1, keepdim=True)
    negative = negative.scatter(-1, flipped, negative.gather(-1, flipped) ^ even.unsqueeze(1))
    return digits, negative, gain


def _digits() -> Int64[Tensor, "6561 8"]:
    return torch.arange(3**DIM)[:, None] // _powers(torch.device("cpu")) % 3


def _numbers(rows: tuple[str, ...]) -> Int64[Tensor, "k 8"]:
    return torch.tensor([[int(digit) for digit in row] for row in rows])


def _even(twice: Int8[Tensor, "256 8"]) -> Int8[Tensor, "256 8"]:
    """Twice v: the last coordinate is negative where the sum would be odd."""
    signed = twice.clone()
    signed[:, 7] *= (1 - twice.sum(1) % 4).to(torch.int8)  # twice an even sum is 0 modulo 4
    return signed


def even_magnitudes() -> Int8[Tensor, "256 8"]:
    return _even(magnitudes())


def _shapes() -> Int64[Tensor, "7 8"]:
    return _numbers(SHAPES)


def _patterns() -> Int64[Tensor, "29 8"]:
    return _numbers(PATTERNS) // 2


@cache
def _powers(device: torch.device) -> Int64[Tensor, " 8"]:
    return 3 ** torch.arange(7, -1, -1, device=device)


@cache
def _bits(device: torch.device) -> Int64[Tensor, " 8"]:
    """The bit of each coordinate's sign."""
    return torch.tensor([1 << ORDER.index(i) for i in range(DIM)], device=device)


@cache
def _on(table, device: torch.device) -> Tensor:  # type: ignore[no-untyped-def]
    return table().to(device)
