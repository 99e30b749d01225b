"""Trellis codes in C++: the ctypes side of cpu.cpp, for float32 and steps of 1 or 2 weights.

Codes and values are those of reference.py bit for bit.
"""

import ctypes
from ctypes import c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float32, Integer
from torch import Tensor

from quip.kernels import threads
from quip.kernels.native import ROUNDED, library
from quip.kernels.operation import Form, learns
from quip.kernels.trellis.reference import code_dtype
from quip.kernels.trellis.tables import Code, Tiling, places

SOURCE = Path(__file__).with_name("cpu.cpp")
TRELLIS: Any = (  # Trellis of viterbi.h
    ("table", c_void_p),
    *[(name, c_int32) for name in ("bits", "L", "V", "wide")],
)


class _Encode(ctypes.Structure):
    """The struct Encode of cpu.cpp."""

    _fields_ = (
        *[(name, c_int64) for name in ("m", "d", "tiles")],
        *[(name, c_void_p) for name in ("x", "codes")],
        *TRELLIS,
        *threads.FIELDS,
    )


class _Panel(ctypes.Structure):
    """The struct Panel of panel.h."""

    _fields_ = (
        *[(name, c_int64) for name in ("n", "m", "d", "tiles", "scale_count")],
        *[(name, c_int64) for name in ("K_row", "K_column")],
        *[(name, c_void_p) for name in ("X", "K", "base", "scales", "metrics", "kept")],
        *[(name, c_void_p) for name in ("eta", "codes")],
        *TRELLIS,
        *threads.FIELDS,
    )


class _Decode(ctypes.Structure):
    """The struct Decode of decode.h."""

    _fields_ = (
        *[(name, c_int64) for name in ("m", "steps", "tiles", "across")],
        *[(name, c_void_p) for name in ("codes", "order", "w")],
        *TRELLIS,
        *threads.FIELDS,
    )


def encode(x: Float32[Tensor, "m d"], code: Code, *, tiles: int) -> Integer[Tensor, " m"]:
    """`encode` of reference.py."""
    (m, d), x = x.shape, x.contiguous()
    codes = torch.empty(m, dtype=code_dtype(d, code))
    given = {"x": x, "codes": codes}
    _call("encode", _Encode, code, given, codes.dtype, m=m, d=d, tiles=tiles)
    return codes


def round_columns(
    X: Float32[Tensor, "n m"],
    K: Float32[Tensor, "n n"],
    eta: Float32[Tensor, "n m"],
    scales: Float32[Tensor, " scales"],
    code: Code,
    tiling: Tiling,
    *,
    base: Float32[Tensor, "n m"] | None = None,
    kept: tuple[Integer[Tensor, "blocks m"], Float32[Tensor, "blocks d d"]] | None = None,
) -> Integer[Tensor, "blocks m"]:
    """`round_columns` of reference.py."""
    assert eta.is_contiguous()
    (n, m), d, dtype = X.shape, tiling.columns, code_dtype(tiling.columns, code)
    codes = torch.empty(n // d, m, dtype=dtype)
    old, metrics = (None, None) if kept is None else (kept[0].to(dtype), kept[1])
    read = {"X": X, "base": base, "scales": scales, "kept": old, "metrics": metrics}
    _call(
        "round_columns",
        _Panel,
        code,
        {**_contiguous(read), "K": K, "eta": eta, "codes": codes},
        dtype,
        n=n,
        m=m,
        d=d,
        tiles=tiling.count,
        scale_count=len(scales),
        K_row=K.stride(0),
        K_column=K.stride(1),
    )
    return codes


def decode(codes: Integer[Tensor, "m steps"], code: Code, tiling: Tiling) -> Float32[Tensor, "m n"]:
    """`decode` of reference.py."""
    (m, steps), codes = codes.shape, codes.to(torch.uint8).contiguous()
    W = torch.empty(m, steps * code.V)
    order = None if tiling.order is None else places(tiling.order, torch.int64, codes.device)
    sizes = {"m": m, "steps": steps, "tiles": tiling.count, "across": tiling.columns // code.V}
    given = _contiguous({"codes": codes, "order": order, "w": W})
    _call("decode", _Decode, code, given, codes.dtype, **sizes)
    return W


def _call(
    function: str,
    struct: type[ctypes.Structure],
    code: Code,
    tensors: dict[str, Tensor],
    dtype: torch.dtype,
    **sizes: int,
) -> None:
    parallel, count = threads.threads()
    table = code.table.contiguous()
    call = struct(
        **{name: x.data_ptr() for name, x in tensors.items()},
        **sizes,
        table=table.data_ptr(),
        bits=code.bits,
        L=code.L,
        V=code.V,
        wide=dtype == torch.int64,
        parallel=parallel,
        thread_count=count,
    )
    native = library(SOURCE, ROUNDED)
    assert native is not None
    getattr(native, function)(ctypes.byref(call))


def _contiguous(tensors: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """The tensors that are there; what C++ reads has to be held until it returns."""
    return {name: x.contiguous() for name, x in tensors.items() if x is not None}


def _serves(x: Tensor, code: Code, *, tiles: int) -> bool:
    return (x.dtype, x.device.type) == (torch.float32, "cpu") and _known(code, x)


def _serves_panels(
    X: Tensor, K: Tensor, eta: Tensor, scales: Tensor, code: Code, *_: object, **__: object
) -> bool:
    kinds = {(x.dtype, x.device.type) for x in (X, K, eta, scales)}
    return kinds == {(torch.float32, "cpu")} and _known(code, X)


def _serves_codes(codes: Tensor, code: Code, tiling: Tiling) -> bool:
    return codes.device.type == "cpu" and _known(code)


def _known(code: Code, *parts: Tensor) -> bool:
    return code.V <= 2 and code.bits <= 8 and not learns(code.table, *parts)


def _available() -> bool:
    return library(SOURCE, ROUNDED) is not None


ENCODE = Form(encode, _serves, _available)
ROUND = Form(round_columns, _serves_panels, _available)
DECODE = Form(decode, _serves_codes, _available)
