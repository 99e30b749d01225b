"""Rotate a few vectors by a Kronecker product on a CUDA device: the ctypes side of cuda.cu.

For more vectors, the products of matrices of reference.py are as fast as they can be.
"""

import ctypes
from ctypes import c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from quip.kernels import cuda
from quip.kernels.cuda import block_bytes, pointer
from quip.kernels.numbers import KINDS, laid_out
from quip.kernels.operation import Form, learns

SOURCE = Path(__file__).with_name("cuda.cu")
FEW = 16  # vectors
WIDEST = 512  # of the larger matrix: n without such factors is no Kronecker product to speak of


class _Rotation(ctypes.Structure):
    """The struct Rotation of cuda.cu."""

    _fields_ = (
        *[(name, c_void_p) for name in ("x", "y", "left", "right")],
        *[(name, c_void_p) for name in ("first", "place", "before", "after")],
        ("vectors", c_int64),
        *[(name, c_int32) for name in ("p", "q", "x_kind", "y_kind")],
    )


def rotate(
    x: Float[Tensor, "*batch n"],
    left: Float[Tensor, "p p"],
    right: Float[Tensor, "q q"],
    first: Int[Tensor, " n"] | None,
    last: Int[Tensor, " n"] | None,
) -> Float[Tensor, "*batch n"]:
    """P' (left (x) right^T) P x as in reference.py, without a gradient."""
    return rotate_scaled(x, left, right, first, last, None, None, dtype=x.dtype)


def rotate_scaled(
    x: Float[Tensor, "*batch n"],
    left: Float[Tensor, "p p"],
    right: Float[Tensor, "q q"],
    first: Int[Tensor, " n"] | None,
    last: Int[Tensor, " n"] | None,
    before: Float[Tensor, " n"] | None,
    after: Float[Tensor, " n"] | None,
    *,
    dtype: torch.dtype,
) -> Float[Tensor, "*batch n"]:
    """diag(after) P' (left (x) right^T) P diag(before) x in dtype, without a gradient."""
    x, left, right = laid_out(x), laid_out(left), laid_out(right)
    (p, q), y = (len(left), len(right)), torch.empty_like(x, dtype=dtype)
    first = None if first is None else first.to(torch.int32).contiguous()
    place = None if last is None else _inverse(last)
    before, after = (None if f is None else laid_out(f.float()) for f in (before, after))
    call = _Rotation(
        x=x.data_ptr(),
        y=y.data_ptr(),
        left=left.data_ptr(),
        right=right.data_ptr(),
        first=pointer(first),
        place=pointer(place),
        before=pointer(before),
        after=pointer(after),
        vectors=x.numel() // x.shape[-1],
        p=p,
        q=q,
        x_kind=KINDS[x.dtype],
        y_kind=KINDS[y.dtype],
    )
    cuda.launch(SOURCE, "rotate_kronecker", x.device, ctypes.byref(call), _bytes(p, q))
    return y


# By permutation: a transform has the same ones for as long as it lives.
_INVERSES: Any = WeakTensorKeyDictionary()


def _inverse(order: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    known = _INVERSES.get(order)
    if known is None:
        with torch.inference_mode(False):
            known = _INVERSES[order] = torch.argsort(order).int()
    return known


def _bytes(p: int, q: int) -> int:
    """Shared memory of a block: four columns of right and of X right, left, and x."""
    return 16 * (p + q) + 4 * (p * p + p * q)


def _serves(x: Tensor, left: Tensor, right: Tensor, *_: object) -> bool:
    return x.dtype == torch.float32 and _serves_scaled(x, left, right, dtype=x.dtype)


def _serves_scaled(x: Tensor, left: Tensor, right: Tensor, *_: object, dtype: torch.dtype) -> bool:
    if x.device.type != "cuda" or not {x.dtype, dtype} <= KINDS.keys():
        return False
    (p, q), kind = (len(left), len(right)), left.dtype
    if kind != torch.float32 or q > WIDEST or not 0 < x.numel() <= FEW * p * q:
        return False
    return _bytes(p, q) <= block_bytes(x.device) and not learns(x)


FORM = Form(rotate, _serves, lambda: cuda.available(SOURCE))
SCALED = Form(rotate_scaled, _serves_scaled, lambda: cuda.available(SOURCE))
