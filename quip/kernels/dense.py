"""W~ of packed codes as a matrix, in one pass on a CUDA device: the ctypes side of dense.cuh."""

import ctypes
from collections.abc import Callable
from ctypes import c_float, c_int32, c_int64, c_void_p

import torch
from jaxtyping import Float
from torch import Tensor

from quip.kernels.cuda import pointer
from quip.kernels.few_tokens import LONGEST, Matrix, row_stride
from quip.kernels.numbers import KINDS
from quip.kernels.operation import learns


class Dense(ctypes.Structure):
    """The struct Dense of dense.cuh."""

    _fields_ = (
        *[(name, c_int64) for name in ("m", "n", "row_bytes", "plane_bytes")],
        *[(name, c_void_p) for name in ("words", "step", "zero")],
        *[(name, c_int64) for name in ("step_row", "zero_row", "group")],
        *[(name, c_void_p) for name in ("tables", "W")],
        *[(name, c_float) for name in ("middle", "second")],
        *[(name, c_int32) for name in ("step_kind", "kind")],
    )


def decode(
    matrix: Matrix, n: int, dtype: torch.dtype, start: Callable[[Dense], None]
) -> Float[Tensor, "m n"]:
    """W~, computed in float32 and rounded to `dtype`, by one call of `start`."""
    m, length = matrix.words.shape
    shared = matrix.factors  # by all rows
    step = matrix.step if shared is None else shared[None]
    group = matrix.group if shared is None else matrix.factor_columns
    assert step is not None
    W = matrix.words.new_empty(m, n, dtype=dtype)
    start(
        Dense(
            m=m,
            n=n,
            row_bytes=4 * length,
            plane_bytes=16 * n // matrix.unit_columns,
            words=matrix.words.data_ptr(),
            step=step.data_ptr(),
            zero=pointer(matrix.zero),
            step_row=row_stride(step),
            zero_row=row_stride(matrix.zero),
            group=0 if group is None or group >= n else group,
            tables=pointer(matrix.tables),
            W=W.data_ptr(),
            middle=matrix.middle,
            second=matrix.second,
            step_kind=KINDS[step.dtype],
            kind=KINDS[dtype],
        )
    )
    return W


def decodable(words: Tensor, n: int, dtype: torch.dtype, numbers: Tensor) -> bool:
    """Whether a kernel makes a matrix of these words: on CUDA, and `numbers` need no gradient."""
    fits = n % 32 == 0 and 0 < n <= LONGEST and len(words) > 0
    return words.device.type == "cuda" and dtype in KINDS and fits and not learns(numbers)
