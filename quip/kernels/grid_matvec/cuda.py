"""Multiply a few vectors by a packed matrix of integer grids on a CUDA device, by cuda.cu."""

import ctypes
from pathlib import Path

import torch
from jaxtyping import Float, Int32, Integer
from torch import Tensor

from quip.kernels import cuda, few_tokens
from quip.kernels.few_tokens import KINDS, Matrix, Product, readable
from quip.kernels.operation import Form

SOURCE = Path(__file__).with_name("cuda.cu")
UNIT_COLUMNS = {2: 64, 3: 128, 4: 32, 8: 16}  # by bits: that 16 bytes of each plane hold
RUN = 64  # columns side by side that a warp multiplies at once: they must share their step


def multiply(
    x: Float[Tensor, "*batch n"],
    words: Int32[Tensor, "m words"],
    step: Float[Tensor, "m_or_1 groups"],
    zero: Integer[Tensor, "m groups"] | None,
    *,
    bits: int,
    group: int | None,
    dtype: torch.dtype,
) -> Float[Tensor, "*batch m"]:
    """x W~^T without a gradient; x is rounded as few_tokens.py tells, and W~ to no dtype."""
    n, words = x.shape[-1], words.contiguous()
    group = None if group is None or group >= n else group
    step = (step if step.dtype in KINDS else step.float()).contiguous()
    if zero is None:  # one row of steps: as well applied to x
        matrix = Matrix(
            words=words,
            unit_columns=UNIT_COLUMNS[bits],
            factors=step[0],
            factor_columns=group or n,
            middle=(2**bits - 1) / 2,
        )
    else:
        zero = zero.to(torch.uint8).contiguous()
        columns = UNIT_COLUMNS[bits]
        matrix = Matrix(words=words, unit_columns=columns, step=step, zero=zero, group=group)

    def start(call: Product) -> None:
        cuda.launch(SOURCE, "multiply_grid", x.device, ctypes.byref(call), bits)

    return few_tokens.multiply(x, matrix, dtype, start)


def _serves(
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
    if bits not in UNIT_COLUMNS or not readable(x, n):
        return False
    if zero is None or group is None or group >= n:
        return True
    return group % RUN == 0 and 16 * n // UNIT_COLUMNS[bits] % RUN == 0


FORM = Form(multiply, _serves, lambda: cuda.available(SOURCE))
