"""Codes as one stream of bits: the layout of compressed-tensors and of GPTQ.

Bit i of a row is bit i % 32 of its word i // 32, and code k of b bits begins at bit k b. A code may
lie in two words, and 32 codes of any b take exactly b of them. compressed-tensors packs each row of
a matrix so; GPTQ has the same words, transposed.
"""

import math

import torch
from jaxtyping import Int32, Integer
from torch import Tensor
from torch.nn.functional import pad

from quip.errors import UsageError

RUN = 32  # codes, that begin and end with a word whatever their bits are
MASK = 2**32 - 1
MOST = 16  # bits of a code


def stream_words(count: int, bits: int) -> int:
    """How many int32 words `count` codes of `bits` bits take."""
    return math.ceil(count * bits / 32)


def pack_stream(codes: Integer[Tensor, "*rows count"], bits: int) -> Int32[Tensor, "*rows words"]:
    """Each row of codes as words. Raises UsageError for a code outside 0 ... 2^bits - 1."""
    _check_bits(bits)
    low, high = (int(codes.min()), int(codes.max())) if codes.numel() else (0, 0)
    if low < 0 or high >= 2**bits:
        raise UsageError(
            f"codes from {low} to {high} do not fit {bits} bits, which hold 0 to {2**bits - 1}"
        )
    *rows, count = codes.shape
    runs = pad(codes, (0, -count % RUN)).unflatten(-1, (-1, RUN))
    words = codes.new_zeros(*runs.shape[:-1], bits, dtype=torch.int64)
    for k in range(RUN):
        word, shift = divmod(k * bits, 32)
        code = runs[..., k].long() << shift
        words[..., word] |= code & MASK
        if shift + bits > 32:
            words[..., word + 1] |= code >> 32
    low_halves = words.view(torch.int32)[..., ::2]
    return low_halves.reshape(*rows, -1)[..., : stream_words(count, bits)].contiguous()


def unpack_stream(
    packed: Int32[Tensor, "*rows words"], bits: int, count: int
) -> Integer[Tensor, "*rows count"]:
    """The codes, uint8 up to 8 bits and int32 beyond; `packed` has the words of that many."""
    _check_bits(bits)
    runs = -(-count // RUN)
    words = pad(packed, (0, runs * bits - packed.shape[-1])).unflatten(-1, (runs, bits))
    kind = torch.uint8 if bits <= 8 else torch.int32
    codes = packed.new_empty(*words.shape[:-1], RUN, dtype=kind)
    for k in range(RUN):
        word, shift = divmod(k * bits, 32)
        pair = words[..., word].long() & MASK
        if shift + bits > 32:
            pair = pair | (words[..., word + 1].long() << 32)
        codes[..., k] = (pair >> shift) & (2**bits - 1)
    return codes.flatten(-2)[..., :count]


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= MOST:
        raise UsageError(f"codes of {bits} bits have no stream here; 1 to {MOST} have")
