"""Multiply a few vectors by a packed matrix: y = x W~^T, where W~ are the decoded weights.

`multiply` is the operation, for any codebook; `multiply_native` is its fast form for uniform
grids in float32 on a CPU, which never has W~ in memory and rounds nothing further. Both agree up
to the noise of the dtype that `multiply` computes in. lattice_matvec.py has the fast forms for
lattices.
"""

import ctypes
from collections.abc import Callable
from ctypes import c_int32, c_int64, c_void_p
from pathlib import Path

import torch
from jaxtyping import Float, Int32
from torch import Tensor
from torch.nn.functional import linear

from quip.codebooks import Decoder, Grids, Lattices
from quip.kernels.bits import unpack
from quip.kernels.lattice_matvec import cpu
from quip.kernels.native import library

Multiply = Callable[[Tensor, Tensor, Decoder, torch.dtype], Tensor]
SOURCE = Path(__file__).with_name("cpu.cpp")
FEW = 8  # vectors: for more, the matrix product of a decoded matrix is faster


def multiply(
    x: Float[Tensor, "*batch n"],
    words: Int32[Tensor, "m words"],
    decoder: Decoder,
    dtype: torch.dtype,
) -> Float[Tensor, "*batch m"]:
    """x W~^T, in the dtype of x; both are rounded to `dtype`, in which the product is computed."""
    codes = unpack(words, decoder.index_bits, x.shape[-1] // decoder.dim)
    return linear(x.to(dtype), decoder.decode(codes).to(dtype)).to(x.dtype)


def multiply_for(decoder: Decoder, x: Float[Tensor, "*batch n"]) -> Multiply:
    """The fastest form for these vectors."""
    tokens = x.numel() // x.shape[-1]
    plain = (x.dtype, x.device.type) == (torch.float32, "cpu")
    plain = plain and tokens > 0 and not (torch.is_grad_enabled() and x.requires_grad)
    if isinstance(decoder, Grids) and plain and tokens <= FEW and library(SOURCE) is not None:
        return multiply_native
    if isinstance(decoder, Lattices) and x.device.type == "cpu":
        few = plain and tokens <= cpu.FEW and library(cpu.SOURCE) is not None
        return cpu.multiply_native if few else cpu.multiply_by_parts
    return multiply


class _Matvec(ctypes.Structure):
    """The struct Matvec of cpu.cpp."""

    _fields_ = (
        *[(name, c_int64) for name in ("m", "n", "tokens", "row_bytes", "group")],
        *[(name, c_void_p) for name in ("words", "x", "sums", "step", "zero")],
        *[(name, c_int64) for name in ("step_row", "zero_row")],
        ("y", c_void_p),
        ("bits", c_int32),
    )


def multiply_native(
    x: Float[Tensor, "*batch n"],
    words: Int32[Tensor, "m words"],
    decoder: Decoder,
    dtype: torch.dtype,
) -> Float[Tensor, "*batch m"]:
    """`multiply` for `Grids`, float32 on a CPU and no gradient; nothing is rounded further."""
    assert isinstance(decoder, Grids)
    (m, _), n, groups = words.shape, x.shape[-1], decoder.groups
    X, words = x.detach().reshape(-1, n).contiguous(), words.contiguous()
    step, group = decoder.step.float(), groups.size or n
    if decoder.zero is None:  # one row of steps: as well applied to x, whatever the groups
        X = X * groups.spread(step)
        step, zero, group = step.new_ones(1, 1), step.new_full((1, 1), (2**decoder.bits - 1) / 2), n
    else:
        zero = decoder.zero.float()
    sums = torch.stack([part.sum(1) for part in X.split(group, dim=1)], dim=1)
    y = X.new_empty(len(X), m)
    call = _Matvec(
        m=m,
        n=n,
        tokens=len(X),
        row_bytes=4 * words.shape[1],
        group=group,
        words=words.data_ptr(),
        x=X.data_ptr(),
        sums=sums.data_ptr(),
        step=step.data_ptr(),
        zero=zero.data_ptr(),
        step_row=step.shape[1] if len(step) > 1 else 0,
        zero_row=zero.shape[1] if len(zero) > 1 else 0,
        y=y.data_ptr(),
        bits=decoder.bits,
    )
    native = library(SOURCE)
    assert native is not None
    native.multiply(ctypes.byref(call))
    return y.view(*x.shape[:-1], m)
