"""Multiply vectors by a packed matrix of integer grids, or decode it, on CUDA: by cuda.cu."""

import ctypes
from pathlib import Path

import torch
from jaxtyping import Float, Int32, Integer
from torch import Tensor
from torch.nn.functional import linear

from quip.kernels import cuda, dense, few_tokens
from quip.kernels.dense import Dense, decodable
from quip.kernels.few_tokens import Matrix, Product, are_few
from quip.kernels.numbers import KINDS, laid_out
from quip.kernels.operation import Form

SOURCE = Path(__file__).with_name("cuda.cu")
UNIT_COLUMNS = {2: 64, 3: 128, 4: 32, 8: 16}  # by bits: that 16 bytes of each plane hold
RUN = 64  # columns side by side that a warp multiplies at once: they must share their step


def multiply(
    x: Float[Tensor, "*batch n"],
    words: Int32[Tensor, "m words"],
    step: Float[Tensor, "m_or_1 groups"],
    zero: Integer[Tensor, "r groups"] | None,
    *,
    bits: int,
    group: int | None,
    dtype: torch.dtype,
) -> Float[Tensor, "*batch m"]:
    """x W~^T for a few vectors, as few_tokens.py tells; for more, with W~ decoded to `dtype`."""
    n = x.shape[-1]
    matrix = _matrix(words, step, zero, n, bits, group)
    # Groups of rows are taken in whole runs only.
    whole = (matrix.group or 0) % RUN == 0 and 16 * n // UNIT_COLUMNS[bits] % RUN == 0
    if not are_few(x, matrix) or (matrix.group and not whole):
        W = decode(words, step, zero, n=n, bits=bits, group=group, dtype=dtype)
        return linear(x.to(dtype), W).to(x.dtype)

    def start(call: Product) -> None:
        cuda.launch(SOURCE, "multiply_grid", x.device, ctypes.byref(call), bits)

    return few_tokens.multiply(x, matrix, dtype, start)


def decode(
    words: Int32[Tensor, "m words"],
    step: Float[Tensor, "m_or_1 groups"],
    zero: Integer[Tensor, "r groups"] | None,
    *,
    n: int,
    bits: int,
    group: int | None,
    dtype: torch.dtype,
) -> Float[Tensor, "m n"]:
    """W~ rounded to `dtype`, in one pass."""

    def start(call: Dense) -> None:
        cuda.launch(SOURCE, "decode_grid", words.device, ctypes.byref(call), bits)

    return dense.decode(_matrix(words, step, zero, n, bits, group), n, dtype, start)


def _matrix(
    words: Tensor, step: Tensor, zero: Tensor | None, n: int, bits: int, group: int | None
) -> Matrix:
    columns, words = UNIT_COLUMNS[bits], words.contiguous()
    group = None if group is None or group >= n else group
    step = laid_out((step if step.dtype in KINDS else step.float()).detach())
    if zero is not None:
        zero = zero.to(torch.uint8).contiguous()
        return Matrix(words=words, unit_columns=columns, step=step, zero=zero, group=group)
    return Matrix(  # one row of steps: as well applied to x
        words=words,
        unit_columns=columns,
        factors=step[0],
        factor_columns=group or n,
        middle=(2**bits - 1) / 2,
    )


def _multiplies(
    x: Tensor,
    words: Tensor,
    step: Tensor,
    zero: Tensor | None,
    *,
    bits: int,
    group: int | None,
    dtype: torch.dtype,
) -> bool:
    n = x.shape[-1]
    return x.numel() > 0 and _decodes(words, step, zero, n=n, bits=bits, group=group, dtype=dtype)


def _decodes(
    words: Tensor,
    step: Tensor,
    zero: Tensor | None,
    *,
    n: int,
    bits: int,
    group: int | None,
    dtype: torch.dtype,
) -> bool:
    return bits in UNIT_COLUMNS and decodable(words, n, dtype, step)


MULTIPLY = Form(multiply, _multiplies, lambda: cuda.available(SOURCE))
DECODE = Form(decode, _decodes, lambda: cuda.available(SOURCE))
