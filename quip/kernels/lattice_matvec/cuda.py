"""Multiply vectors by a matrix of packed lattice codes, or decode it, on CUDA: by cuda.cu."""

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from jaxtyping import Float, Int32, Int64
from torch import Tensor
from torch.nn.functional import linear

from quip.kernels import cuda, dense, few_tokens
from quip.kernels.dense import Dense, decodable
from quip.kernels.few_tokens import Matrix, Product, are_few
from quip.kernels.lattice_points.tables import DIM, E8P, E81B, Stage, code_bits
from quip.kernels.numbers import KINDS, laid_out
from quip.kernels.operation import Form

SOURCE = Path(__file__).with_name("cuda.cu")
UNIT_COLUMNS = 16 * DIM  # that 16 bytes of each plane hold
NIBBLES = (0, 2, 4, 6, 1, 3, 5, 7)  # of a word, that of each coordinate
MIDDLES = {E8P: 7.5, E81B: 8.0}  # the nibble of 0


def multiply(
    x: Float[Tensor, "*batch n"],
    words: Int32[Tensor, "m words"],
    stages: Sequence[Stage],
    scales: Float[Tensor, " groups"],
    *,
    group: int | None,
    ratio: float | None,
    dtype: torch.dtype,
) -> Float[Tensor, "*batch m"]:
    """x W~^T for a few vectors, as few_tokens.py tells; for more, with W~ decoded to `dtype`."""
    n = x.shape[-1]
    matrix = _matrix(words, stages, scales, n, group, ratio)
    if not are_few(x, matrix):
        W = decode(words, stages, scales, n=n, group=group, ratio=ratio, dtype=dtype)
        return linear(x.to(dtype), W).to(x.dtype)

    def start(call: Product) -> None:
        planes = code_bits(stages) // 8
        cuda.launch(SOURCE, "multiply_lattice", x.device, ctypes.byref(call), planes)

    return few_tokens.multiply(x, matrix, dtype, start)


def decode(
    words: Int32[Tensor, "m words"],
    stages: Sequence[Stage],
    scales: Float[Tensor, " groups"],
    *,
    n: int,
    group: int | None,
    ratio: float | None,
    dtype: torch.dtype,
) -> Float[Tensor, "m n"]:
    """W~ rounded to `dtype`, in one pass."""

    def start(call: Dense) -> None:
        planes = code_bits(stages) // 8
        cuda.launch(SOURCE, "decode_lattice", words.device, ctypes.byref(call), planes)

    return dense.decode(_matrix(words, stages, scales, n, group, ratio), n, dtype, start)


def _matrix(
    words: Tensor,
    stages: Sequence[Stage],
    scales: Tensor,
    n: int,
    group: int | None,
    ratio: float | None,
) -> Matrix:
    second = 0.0 if ratio is None else 1 / ratio
    return Matrix(
        words=words.contiguous(),
        unit_columns=UNIT_COLUMNS,
        factors=laid_out((scales if scales.dtype in KINDS else scales.float()).detach()),
        factor_columns=DIM * group if group else n,
        tables=packed_tables(tuple(stages)),
        middle=sum(w * MIDDLES[type(s)] for s, w in zip(stages, (1.0, second), strict=False)),
        unit=0.5,
        second=second,
    )


@cache
def packed_tables(stages: tuple[Stage, ...]) -> Int32[Tensor, "tables 256"]:
    """The enum Table of cuda.cu: a word for each byte of signs, of magnitudes, and of E81B."""
    first = stages[0]
    assert isinstance(first, E8P)
    device = first.magnitudes.device
    signs, shifts = first.signs.cpu() < 0, first.shifts.cpu() < 0
    nibbles = [14 * signs.long() ^ shifts.long().unsqueeze(1), _nibbles(first.magnitudes)]
    nibbles += [_nibbles(stage.points) for stage in stages if isinstance(stage, E81B)]
    return torch.stack([_words(x) for x in nibbles]).to(device)


def _nibbles(points: Float[Tensor, "256 8"]) -> Int64[Tensor, "256 8"]:
    return (2 * points.cpu() + 8).long()


def _words(nibbles: Int64[Tensor, "256 8"]) -> Int32[Tensor, " 256"]:
    words = (nibbles << 4 * torch.tensor(NIBBLES)).sum(1)
    return torch.where(words < 2**31, words, words - 2**32).int()


def _multiplies(
    x: Tensor,
    words: Tensor,
    stages: Sequence[Stage],
    scales: Tensor,
    *,
    group: int | None,
    ratio: float | None,
    dtype: torch.dtype,
) -> bool:
    return x.numel() > 0 and decodable(words, x.shape[-1], dtype, scales)


def _decodes(
    words: Tensor,
    stages: Sequence[Stage],
    scales: Tensor,
    *,
    n: int,
    group: int | None,
    ratio: float | None,
    dtype: torch.dtype,
) -> bool:
    return decodable(words, n, dtype, scales)


MULTIPLY = Form(multiply, _multiplies, lambda: cuda.available(SOURCE))
DECODE = Form(decode, _decodes, lambda: cuda.available(SOURCE))
