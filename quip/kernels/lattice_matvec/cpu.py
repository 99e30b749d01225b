"""Multiply by a matrix of packed lattice codes on a CPU: the fast forms of `multiply`.

`multiply_native` multiplies a few vectors by the packed codes as they are. `multiply_by_parts` is
for more, and for gradients: it decodes some rows of W~ at a time, because memory for all of a
large one comes from the system anew, which takes longer than to decode it.
"""

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p
from pathlib import Path

import torch
from jaxtyping import Float, Int32
from torch import Tensor
from torch.nn.functional import linear

from quip.codebooks import LATTICES, Decoder, Lattices
from quip.kernels.bits import unpack
from quip.kernels.lattice_points import cpu
from quip.kernels.native import library

SOURCE = Path(__file__).with_name("cpu.cpp")
FEW = 16  # vectors: for more, products with decoded rows are as fast, and use all cores
PART = 2**20  # weights that are decoded together
DIM = 8


class _LatticeMatvec(ctypes.Structure):
    """The struct LatticeMatvec of cpu.cpp."""

    _fields_ = (
        *[(name, c_int64) for name in ("m", "blocks", "tokens", "row_bytes", "group")],
        *[(name, c_void_p) for name in ("words", "x", "scales", "magnitudes", "points", "y")],
        ("ratio", c_float),
        ("second", c_int32),
    )


def multiply_native(
    x: Float[Tensor, "*batch n"],
    words: Int32[Tensor, "m words"],
    decoder: Decoder,
    dtype: torch.dtype,
) -> Float[Tensor, "*batch m"]:
    """`multiply` for `Lattices`, float32 on a CPU and no gradient; nothing is rounded further."""
    assert isinstance(decoder, Lattices)
    n, X, words = x.shape[-1], x.detach().contiguous(), words.contiguous()
    y = X.new_empty(*x.shape[:-1], len(words))
    scales = decoder.scale.float().contiguous()
    tables, stages = cpu.tables(), LATTICES[decoder.name].stages
    call = _LatticeMatvec(
        m=len(words),
        blocks=n // DIM,
        tokens=X.numel() // n,
        row_bytes=4 * words.shape[1],
        group=decoder.groups.size or n // DIM,
        words=words.data_ptr(),
        x=X.data_ptr(),
        scales=scales.data_ptr(),
        magnitudes=tables["magnitudes"].data_ptr(),
        points=tables["points"].data_ptr(),
        y=y.data_ptr(),
        ratio=decoder.ratio or 1.0,
        second=cpu.STAGES[stages[1]] if len(stages) > 1 else 0,
    )
    native = library(SOURCE)
    assert native is not None
    native.multiply_lattice(ctypes.byref(call))
    return y


def multiply_by_parts(
    x: Float[Tensor, "*batch n"],
    words: Int32[Tensor, "m words"],
    decoder: Decoder,
    dtype: torch.dtype,
) -> Float[Tensor, "*batch m"]:
    """`multiply` for `Lattices` on a CPU: the products with some rows of W~ after the other."""
    n, bits, rounded = x.shape[-1], decoder.index_bits, x.to(dtype)
    codes = (unpack(part, bits, n // DIM) for part in words.split(max(1, PART // n)))
    products = [linear(rounded, decoder.decode(part).to(dtype)) for part in codes]
    return torch.cat(products, dim=-1).to(x.dtype)
