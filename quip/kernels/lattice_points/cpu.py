"""Lattice codes in C++: the ctypes side of cpu.cpp, for float32 on a CPU.

`nearest` and `decode` do what e8p.py, e81b.py and the two stages of lattice.py do in torch. The
decoded weights are the same bit for bit, the codes up to ties: of two points whose distances
differ by less than 1 part in 2^20, either is taken.
"""

import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from quip.codebooks import e8p, e81b
from quip.kernels.native import library

SOURCE = Path(__file__).with_name("cpu.cpp")
STAGES = {"e8p": 1, "e81b": 2}  # the enum Stage
WIDE = 31  # bits: a wider code takes an int64


def serves(x: Tensor) -> bool:
    """Whether x is float32 on a CPU, needs no gradient, and there is a compiler."""
    fast = (x.dtype, x.device.type) == (torch.float32, "cpu") and not x.requires_grad
    return fast and library(SOURCE) is not None


class _Tables(ctypes.Structure):
    """The struct Tables of cpu.cpp."""

    NAMES = ("magnitudes", "signs", "shifts", "code_of", "patterns", "points", "pairs")
    _fields_ = tuple((name, c_void_p) for name in NAMES)


class _Nearest(ctypes.Structure):
    """The struct Nearest of cpu.cpp."""

    _fields_ = (
        *[(name, c_int64) for name in ("m", "row", "column")],
        *[(name, c_void_p) for name in ("x", "h", "codes", "error")],
        *[(name, c_float) for name in ("scale", "ratio")],
        *[(name, c_int32) for name in ("first", "second", "wide")],
    )


class _Decode(ctypes.Structure):
    """The struct Decode of cpu.cpp."""

    _fields_ = (
        *[(name, c_int64) for name in ("m", "blocks", "group", "row", "block", "column")],
        *[(name, c_void_p) for name in ("codes", "scales", "w")],
        ("ratio", c_float),
        *[(name, c_int32) for name in ("first", "second", "wide")],
    )


def code_dtype(index_bits: int) -> torch.dtype:
    return torch.int64 if index_bits > WIDE else torch.int32


def nearest(
    x: Float[Tensor, "m 8"], stages: Sequence[str], *, scale: float = 1.0, ratio: float = 1.0
) -> Integer[Tensor, " m"]:
    """c_0 | c_1 << 16: the code of x / scale, and that of what is left of it times ratio."""
    return _nearest(x, stages, scale, ratio, None)[0]


def error(
    x: Float[Tensor, "m 8"],
    h: Float[Tensor, " 8"],
    stages: Sequence[str],
    *,
    scale: float = 1.0,
    ratio: float = 1.0,
) -> float:
    """The sum of h_i (x_i - w_hat_i)^2 over all vectors, each rounded to the nearest w_hat."""
    return scale**2 * _nearest(x, stages, scale, ratio, h.contiguous())[1]


def _nearest(
    x: Tensor, stages: Sequence[str], scale: float, ratio: float, h: Tensor | None
) -> tuple[Tensor, float]:
    first, second, bits = _stages(stages)
    squares = ctypes.c_double(0)
    codes = torch.empty(len(x), dtype=code_dtype(bits))
    call = _Nearest(
        m=len(x),
        row=x.stride(0),
        column=x.stride(1),
        x=x.data_ptr(),
        h=None if h is None else h.data_ptr(),
        codes=codes.data_ptr(),
        error=ctypes.addressof(squares),
        scale=scale,
        ratio=ratio,
        first=first,
        second=second,
        wide=codes.dtype == torch.int64,
    )
    _library().nearest(ctypes.byref(_pointers()), ctypes.byref(call))
    return codes, squares.value


def decode(
    codes: Integer[Tensor, "m k"],
    stages: Sequence[str],
    *,
    scales: Float[Tensor, " groups"] | None = None,
    group: int | None = None,
    ratio: float = 1.0,
    out: Float[Tensor, "m n"] | None = None,
) -> Float[Tensor, "m n"]:
    """scale (q_0 + q_1 / ratio), 8 columns a code; each scale serves `group` codes of a row.

    `out`, of any strides, takes the place of a new tensor.
    """
    first, second, bits = _stages(stages)
    (m, k), codes = codes.shape, codes.to(code_dtype(bits)).contiguous()
    scales = torch.ones(1) if scales is None else scales.contiguous()
    assert k <= len(scales) * (group or k), f"{len(scales)} scales are too few for {k} codes a row"
    out = torch.empty(m, 8 * k) if out is None else out
    call = _Decode(
        m=m,
        blocks=k,
        group=group or max(k, 1),
        row=out.stride(0),
        block=8 * out.stride(1),
        column=out.stride(1),
        codes=codes.data_ptr(),
        scales=scales.data_ptr(),
        w=out.data_ptr(),
        ratio=ratio,
        first=first,
        second=second,
        wide=codes.dtype == torch.int64,
    )
    _library().decode(ctypes.byref(_pointers()), ctypes.byref(call))
    return out


def _stages(stages: Sequence[str]) -> tuple[int, int, int]:
    """One or two stages as cpu.cpp numbers them, and the bits of a code."""
    first, second = (*(STAGES[stage] for stage in stages), 0)[:2]
    bits = 16 * (len(stages) - 1) + (8 if stages[-1] == "e81b" else 16)
    return first, second, bits


def _library() -> ctypes.CDLL:
    native = library(SOURCE)
    assert native is not None
    return native


@cache
def tables() -> dict[str, Tensor]:
    """What the struct Tables points to."""
    signs = e8p.signs().float()
    patterns = e8p.magnitudes()[[*range(227, 256), 255, 255, 255]].T / 2  # [8, 32]
    return {
        "magnitudes": e8p.even_magnitudes() / 2,
        "signs": signs[:, :8].contiguous(),
        "shifts": signs[:, 8] / 4,
        "code_of": e8p.code_of(),
        "patterns": patterns.contiguous(),
        "points": e81b.doubled() / 2,
        "pairs": e81b.pair_rows(),
    }


@cache
def _pointers() -> _Tables:
    """The tensors live as long: `tables` is cached too."""
    return _Tables(**{name: tensor.data_ptr() for name, tensor in tables().items()})
