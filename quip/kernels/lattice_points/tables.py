"""What is known of each stage of a lattice code, as tensors on the device of the weights."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int32, Int64, UInt8
from torch import Tensor

DIM = 8
WIDE = 31  # bits: a wider code takes an int64


@dataclass(frozen=True, eq=False)
class E8P:
    """Points v + 1/4 or v - 1/4 with the code |v| << 8 | signs: quip/codebooks/e8p.py."""

    magnitudes: Float[Tensor, "256 8"]  # |v| of each row; v_7 < 0 where the sum would be odd
    signs: Float[Tensor, "256 8"]  # what the low byte of a code makes of v
    shifts: Float[Tensor, " 256"]  # and what it adds
    sign_bits: Int64[Tensor, " 8"]  # in the low byte, that of each coordinate
    code_of: Int32[Tensor, " 6561"]  # of each v > 0, by the number with base-3 digits |v| - 1/2
    patterns: Int64[Tensor, "29 8"]  # |v| - 1/2 of those of squared norm 12

    bits: ClassVar[int] = 16


@dataclass(frozen=True, eq=False)
class E81B:
    """256 points, by their codes: quip/codebooks/e81b.py."""

    points: Float[Tensor, "256 8"]
    pairs: UInt8[Tensor, "8 8 2 2"]  # code of the whole point with entries at i and j, 1: negative

    bits: ClassVar[int] = 8


Stage = E8P | E81B


def code_bits(stages: Sequence[Stage]) -> int:
    """The bits of a code of one stage, or of two, the first one of 16 bits."""
    return 16 * (len(stages) - 1) + stages[-1].bits


def code_dtype(bits: int) -> torch.dtype:
    """What holds codes of so many bits."""
    return torch.int64 if bits > WIDE else torch.int32
