"""Codes of b bits <-> int32 words, without waste for any b.

b is cut into widths of 8, 4, 2 and 1 bits (3 = 2 + 1), lowest bits first, and each width is a
plane of its own: byte j of a plane of B bytes holds the bits of the codes j, B + j, 2 B + j ...

    2 bits, 12 codes, B = 3:   byte 0      byte 1       byte 2
                              9 6 3 0     10 7 4 1     11 8 5 2     (highest bits first)

so that one shift and one mask unpack a whole plane, and neighbours in memory are neighbours
among the columns. A row is its planes' bytes, filled up to whole little-endian words: 32 codes
of any b take exactly b words.
"""

import math

import torch
from jaxtyping import Int32, Integer
from torch import Tensor

from quip.errors import UsageError

WIDTHS = (8, 4, 2, 1)
LARGEST = 63  # a code is an int64 at most, and never negative


def words(count: int, bits: int) -> int:
    """How many int32 words `count` codes of `bits` bits take."""
    return math.ceil(sum(_plane_bytes(count, width) for width, _ in _planes(bits)) / 4)


def pack(codes: Integer[Tensor, "*rows count"], bits: int) -> Int32[Tensor, "*rows words"]:
    """Each row of codes as words. Raises UsageError for a code outside 0 ... 2^bits - 1."""
    low, high = (int(codes.min()), int(codes.max())) if codes.numel() else (0, 0)
    if low < 0 or high >= 2**bits:
        raise UsageError(
            f"codes from {low} to {high} do not fit {bits} bits, which hold 0 to {2**bits - 1}"
        )
    rows, count = codes.shape[:-1], codes.shape[-1]
    row = codes.new_zeros((*rows, 4 * words(count, bits)), dtype=torch.uint8)
    start = 0
    for width, shift in _planes(bits):
        size, held = _plane_bytes(count, width), 8 // width
        plane = codes.new_zeros((*rows, held * size), dtype=torch.uint8)
        plane[..., :count] = (codes >> shift) & (2**width - 1)
        plane = plane.view(*rows, held, size) << _shifts(width, codes.device)
        row[..., start : start + size] = plane.sum(-2, dtype=torch.uint8)
        start += size
    return row.view(torch.int32)


def unpack(
    packed: Int32[Tensor, "*rows words"], bits: int, count: int
) -> Integer[Tensor, "*rows count"]:
    """The codes: uint8 up to 8 bits, int32 up to 31, int64 beyond."""
    row, codes, start = packed.contiguous().view(torch.uint8), None, 0
    for width, low in _planes(bits):
        size = _plane_bytes(count, width)
        plane = row[..., start : start + size]
        if width < 8:
            plane = (plane.unsqueeze(-2) >> _shifts(width, row.device)) & (2**width - 1)
            plane = plane.flatten(-2)[..., :count]
        plane = plane if bits <= 8 else plane.int() if bits < 32 else plane.long()
        codes = plane if codes is None else codes | (plane << low)
        start += size
    assert codes is not None
    return codes


def _planes(bits: int) -> list[tuple[int, int]]:
    """(width, lowest bit) of each plane."""
    if not 1 <= bits <= LARGEST:
        raise UsageError(f"codes of {bits} bits cannot be packed; 1 to {LARGEST} can")
    planes, low = [], 0
    for width in WIDTHS:
        while bits - low >= width:
            planes.append((width, low))
            low += width
    return planes


def _plane_bytes(count: int, width: int) -> int:
    return math.ceil(count * width / 8)


def _shifts(width: int, device: torch.device) -> Tensor:
    """[8 / width, 1]: where in its byte each code of a plane starts."""
    return torch.arange(0, 8, width, dtype=torch.uint8, device=device).unsqueeze(1)
