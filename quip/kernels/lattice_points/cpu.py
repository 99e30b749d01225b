"""Points of the lattices E8P and E81B in C++: the ctypes side of cpu.cpp, for float32.

The decoded weights are those of reference.py bit for bit, the codes up to ties: of two points
whose distances differ by less than 1 part in 2^20, either is taken.
"""

import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch
from jaxtyping import Float, Float64, Integer
from torch import Tensor

from quip.kernels.lattice_points.tables import DIM, E8P, E81B, Stage, code_bits, code_dtype
from quip.kernels.native import library
from quip.kernels.operation import Form

SOURCE = Path(__file__).with_name("cpu.cpp")
NUMBERS = {E8P: 1, E81B: 2}  # the enum Stage
PATTERNS = 32  # columns of the table in cpu.cpp, which repeats the last one


class Tables(ctypes.Structure):
    """The struct Tables of cpu.cpp."""

    NAMES = ("magnitudes", "signs", "shifts", "code_of", "patterns", "points", "pairs")
    _fields_ = tuple((name, c_void_p) for name in NAMES)
    kept: dict[str, Tensor]  # what it points to


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


def nearest(
    x: Float[Tensor, "m 8"],
    stages: Sequence[Stage],
    *,
    scale: Float[Tensor, ""],
    ratio: float | None,
) -> Integer[Tensor, " m"]:
    """`nearest` of reference.py."""
    return _nearest(x, stages, float(scale), ratio, None)[0]


def errors(
    X: Float[Tensor, "m n"],
    h: Float[Tensor, " n"],
    stages: Sequence[Stage],
    *,
    scales: Float[Tensor, " scales"],
    ratio: float | None,
) -> Float64[Tensor, " scales"]:
    """`errors` of operations.py."""
    spans = list(zip(X.split(DIM, dim=1), h.split(DIM), strict=True))
    found = [
        sum(unit**2 * _nearest(x, stages, unit, ratio, part)[1] for x, part in spans)
        for unit in scales.tolist()
    ]
    return torch.tensor(found, dtype=torch.float64)


def _nearest(
    x: Tensor, stages: Sequence[Stage], scale: float, ratio: float | None, h: Tensor | None
) -> tuple[Tensor, float]:
    """(codes, the squared error in units of the scale, weighted by h)."""
    first, second = numbers(stages)
    squares = ctypes.c_double(0)
    h = None if h is None else h.contiguous()
    codes = torch.empty(len(x), dtype=code_dtype(code_bits(stages)))
    call = _Nearest(
        m=len(x),
        row=x.stride(0),
        column=x.stride(1),
        x=x.data_ptr(),
        h=None if h is None else h.data_ptr(),
        codes=codes.data_ptr(),
        error=ctypes.addressof(squares),
        scale=scale,
        ratio=ratio or 1.0,
        first=first,
        second=second,
        wide=codes.dtype == torch.int64,
    )
    _native().nearest(ctypes.byref(pointers(*stages)), ctypes.byref(call))
    return codes, squares.value


def decode(
    codes: Integer[Tensor, "m k"],
    stages: Sequence[Stage],
    scales: Float[Tensor, " groups"],
    *,
    group: int | None,
    ratio: float | None,
    out: Float[Tensor, "m n"] | None = None,
) -> Float[Tensor, "m n"]:
    """`decode` of reference.py. `out`, of any strides, takes the place of a new tensor."""
    first, second = numbers(stages)
    (m, k), codes = codes.shape, codes.to(code_dtype(code_bits(stages))).contiguous()
    scales = scales.contiguous()
    assert k <= len(scales) * (group or k), f"{len(scales)} scales are too few for {k} codes a row"
    out = torch.empty(m, DIM * k) if out is None else out
    call = _Decode(
        m=m,
        blocks=k,
        group=group or max(k, 1),
        row=out.stride(0),
        block=DIM * out.stride(1),
        column=out.stride(1),
        codes=codes.data_ptr(),
        scales=scales.data_ptr(),
        w=out.data_ptr(),
        ratio=ratio or 1.0,
        first=first,
        second=second,
        wide=codes.dtype == torch.int64,
    )
    _native().decode(ctypes.byref(pointers(*stages)), ctypes.byref(call))
    return out


def _plain(x: Tensor) -> bool:
    return (x.dtype, x.device.type) == (torch.float32, "cpu") and not x.requires_grad


def _serves(x: Tensor, *_: object, **__: object) -> bool:
    return _plain(x)


def _serves_codes(codes: Tensor, stages: object, scales: Tensor, **_: object) -> bool:
    return _plain(scales) and codes.device.type == "cpu"


def _serves_columns(X: Tensor, *_: object, **__: object) -> bool:
    return _plain(X) and X.stride(0) == 1  # rows would be read eight numbers at a time


def available() -> bool:
    """Whether there is a compiler."""
    return library(SOURCE) is not None


NEAREST = Form(nearest, _serves, available)
DECODE = Form(decode, _serves_codes, available)
ERRORS = Form(errors, _serves_columns, available)


def _native() -> ctypes.CDLL:
    native = library(SOURCE)
    assert native is not None
    return native


def numbers(stages: Sequence[Stage]) -> tuple[int, int]:
    """One or two stages as cpu.cpp numbers them."""
    first, second = (*(NUMBERS[type(stage)] for stage in stages), 0)[:2]
    return first, second


@cache
def pointers(*stages: Stage) -> Tables:
    """All that these stages have; two of one kind share it."""
    named = {name: x for stage in stages for name, x in vars(stage).items()}
    if "patterns" in named:
        magnitudes = named["patterns"].T + 0.5
        last = magnitudes[:, -1:].expand(-1, PATTERNS - magnitudes.shape[1])
        named["patterns"] = torch.cat([magnitudes, last], dim=1).float()
    kept = {name: named[name].contiguous() for name in Tables.NAMES if name in named}
    tables = Tables(**{name: tensor.data_ptr() for name, tensor in kept.items()})
    tables.kept = kept
    return tables
