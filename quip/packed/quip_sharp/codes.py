"""Codes of E8P and E81B <-> the int64 words of published QuIP# files.

A word of E8P holds four codes of a 2 x 16 tile. Words lie as (m/16, n/64, 8, 4), so that the
eight rows of a column of tiles are next to each other:

    word (T, J, r, t): code i is row 16 T + 2 r + (i & 1), columns 64 J + 16 t + 8 (i >> 1) ... + 7

    bit   63 ... 60   ...   35 ... 32   31 ... 24   23 ... 16   15 ... 8   7 ... 0
          sign bit 7        sign bit 0  magnitude   magnitude   magnitude  magnitude
          of codes          of codes    of code 3   of code 2   of code 1  of code 0
          3 2 1 0           3 2 1 0

At 3 and 4 bits the words of the second stage stand right of those of the first. E81B is plain:
byte i of word j is the code of columns 8 (8 j + i) ... + 7.
"""

import torch
from jaxtyping import Int64, Integer
from torch import Tensor

from quip.errors import UsageError

ROWS, COLUMNS = 16, 64  # of which m and n are multiples
BITS = (2, 3, 4)  # per weight
SHIFTS = (12, 6, 3)  # by which the bits of a byte move apart, one to a nibble ...
MASKS = (0x000F000F, 0x03030303, 0x11111111)  # ... and what belongs to them after each


def unpack_codes(
    words: Int64[Tensor, "m words"], m: int, n: int, bits: int
) -> Int64[Tensor, "m groups"]:
    """c_0 | c_1 << 16 for every eight columns, as `Lattice` numbers them; E8P's are the file's own.

    Raises UsageError for sizes that the layout has no words for.
    """
    first, second = _widths(m, n, bits)
    if tuple(words.shape) != (m, first + second):
        raise UsageError(
            f"{list(words.shape)} words for a matrix of {m} x {n} at {bits} bits, which takes "
            f"[{m}, {first + second}]"
        )
    codes = _unpack_e8p(words[:, :first])
    if bits == 2:
        return codes
    tail = words[:, first:]
    return codes | (_unpack_bytes(tail) if bits == 3 else _unpack_e8p(tail)) << 16


def pack_codes(
    codes: Integer[Tensor, "m groups"], m: int, n: int, bits: int
) -> Int64[Tensor, "m words"]:
    """The inverse of `unpack_codes`. Raises UsageError for other sizes, and codes too large."""
    _widths(m, n, bits)
    if tuple(codes.shape) != (m, n // 8):
        raise UsageError(f"{list(codes.shape)} codes for a matrix of {m} x {n}")
    if int(codes.min()) < 0 or int(codes.max()) >= 2 ** (8 * bits):
        raise UsageError(f"codes of a matrix of {m} x {n} beyond the {8 * bits} bits of a code")
    codes = codes.long()
    words = _pack_e8p(codes & 0xFFFF)
    if bits == 2:
        return words
    second = codes >> 16
    return torch.cat([words, _pack_bytes(second) if bits == 3 else _pack_e8p(second)], dim=1)


def words_per_row(n: int, bits: int) -> int:
    """int64 words that a row of n weights takes."""
    return n * bits // 64


def check_size(m: int, n: int) -> None:
    """Raises UsageError, with the size, unless m x n weights fill whole tiles of words."""
    for size, unit, what in ((m, ROWS, "outputs"), (n, COLUMNS, "inputs")):
        if size < 1 or size % unit:
            raise UsageError(
                f"{size} {what} are no multiple of {unit}, in which the published layout of QuIP# "
                "packs codes"
            )


def _widths(m: int, n: int, bits: int) -> tuple[int, int]:
    """Words in a row of the first stage, and of the second."""
    if bits not in BITS:
        raise UsageError(f"{bits} bits: the published layout of QuIP# has 2, 3 and 4")
    check_size(m, n)
    return words_per_row(n, 2), words_per_row(n, bits - 2)


def _unpack_e8p(words: Int64[Tensor, "m words"]) -> Int64[Tensor, "m groups"]:
    m, width = words.shape
    i = torch.arange(4, device=words.device)
    tiles = words.reshape(m // 16, -1, 8, 4, 1)  # [T, J, r, t, i]
    signs = tiles >> (32 + i) & MASKS[2]
    for shift, mask in zip(reversed(SHIFTS), (*reversed(MASKS[:2]), 0xFF), strict=True):
        signs = (signs | signs >> shift) & mask
    codes = (tiles >> 8 * i & 0xFF) << 8 | signs
    codes = codes.unflatten(-1, (2, 2))  # [T, J, r, t, right, below]
    return codes.permute(0, 2, 5, 1, 3, 4).reshape(m, 4 * width)


def _pack_e8p(codes: Int64[Tensor, "m groups"]) -> Int64[Tensor, "m words"]:
    m, groups = codes.shape
    i = torch.arange(4, device=codes.device)
    tiles = codes.reshape(m // 16, 8, 2, groups // 8, 4, 2)  # [T, r, below, J, t, right]
    tiles = tiles.permute(0, 3, 1, 4, 5, 2).flatten(-2)  # [T, J, r, t, i]
    signs = tiles & 0xFF
    for shift, mask in zip(SHIFTS, MASKS, strict=True):
        signs = (signs | signs << shift) & mask
    # Bits of a sum that do not overlap: as good as an OR, also of the highest one.
    return ((tiles >> 8 << 8 * i) | (signs << (32 + i))).sum(-1).reshape(m, groups // 4)


def _unpack_bytes(words: Int64[Tensor, "m words"]) -> Int64[Tensor, "m groups"]:
    shifts = 8 * torch.arange(8, device=words.device)
    return (words.unsqueeze(-1) >> shifts & 0xFF).flatten(1)


def _pack_bytes(codes: Int64[Tensor, "m groups"]) -> Int64[Tensor, "m words"]:
    shifts = 8 * torch.arange(8, device=codes.device)
    return (codes.unflatten(1, (-1, 8)) << shifts).sum(-1)
