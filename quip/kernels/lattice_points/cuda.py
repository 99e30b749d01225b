"""Points of the lattices E8P and E81B on a CUDA device: the ctypes side of cuda.cu, for float32.

Nothing waits for the device. Codes are those of reference.py up to ties: of two points whose
distances differ by less than 1 part in 2^18, either is taken.
"""

import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int32, c_int64, c_void_p
from pathlib import Path

import torch
from jaxtyping import Float, Float64, Integer
from torch import Tensor

from quip.kernels import cuda
from quip.kernels.cuda import pointer
from quip.kernels.lattice_points.cpu import Tables, numbers, pointers
from quip.kernels.lattice_points.tables import DIM, Stage, code_bits, code_dtype
from quip.kernels.operation import Form

SOURCE = Path(__file__).with_name("cuda.cu")
BLOCKS = 1024  # thread blocks among which errors are summed, at most


class Lattice(ctypes.Structure):
    """The struct Lattice of nearest.cuh."""

    _fields_ = (
        ("tables", Tables),
        *[(name, c_int32) for name in ("first", "second")],
        ("ratio", c_float),
        ("wide", c_int32),
    )


class _Nearest(ctypes.Structure):
    """The struct Nearest of cuda.cu."""

    _fields_ = (
        ("lattice", Lattice),
        *[(name, c_int64) for name in ("m", "row", "column")],
        *[(name, c_void_p) for name in ("x", "scale", "codes")],
    )


class _Decode(ctypes.Structure):
    """The struct Decode of cuda.cu."""

    _fields_ = (
        ("lattice", Lattice),
        *[(name, c_int64) for name in ("m", "blocks", "group")],
        *[(name, c_void_p) for name in ("codes", "scales", "w")],
    )


class _Errors(ctypes.Structure):
    """The struct Errors of cuda.cu."""

    _fields_ = (
        ("lattice", Lattice),
        *[(name, c_int64) for name in ("m", "blocks", "row", "column")],
        *[(name, c_void_p) for name in ("x", "h", "scales")],
        ("candidates", c_int64),
        ("sums", c_void_p),
    )


def lattice(stages: Sequence[Stage], ratio: float | None) -> Lattice:
    """What nearest.cuh is to know of these stages; they keep the tensors alive."""
    first, second = numbers(stages)
    wide = code_dtype(code_bits(stages)) == torch.int64
    return Lattice(
        tables=pointers(*stages), first=first, second=second, ratio=ratio or 1.0, wide=wide
    )


def nearest(
    x: Float[Tensor, "m 8"],
    stages: Sequence[Stage],
    *,
    scale: Float[Tensor, ""],
    ratio: float | None,
) -> Integer[Tensor, " m"]:
    """`nearest` of reference.py."""
    codes = torch.empty(len(x), dtype=code_dtype(code_bits(stages)), device=x.device)
    call = _Nearest(
        lattice=lattice(stages, ratio),
        m=len(x),
        row=x.stride(0),
        column=x.stride(1),
        x=pointer(x),
        scale=pointer(scale),
        codes=pointer(codes),
    )
    cuda.launch(SOURCE, "nearest_points", x.device, ctypes.byref(call))
    return codes


def decode(
    codes: Integer[Tensor, "m k"],
    stages: Sequence[Stage],
    scales: Float[Tensor, " groups"],
    *,
    group: int | None,
    ratio: float | None,
) -> Float[Tensor, "m n"]:
    """`decode` of reference.py."""
    (m, k), codes = codes.shape, codes.to(code_dtype(code_bits(stages))).contiguous()
    assert k <= len(scales) * (group or k), f"{len(scales)} scales are too few for {k} codes a row"
    scales, W = scales.contiguous(), scales.new_empty(m, DIM * k)
    call = _Decode(
        lattice=lattice(stages, ratio),
        m=m,
        blocks=k,
        group=group or k,
        codes=pointer(codes),
        scales=pointer(scales),
        w=pointer(W),
    )
    cuda.launch(SOURCE, "decode_points", W.device, ctypes.byref(call))
    return W


def errors(
    X: Float[Tensor, "m n"],
    h: Float[Tensor, " n"],
    stages: Sequence[Stage],
    *,
    scales: Float[Tensor, " scales"],
    ratio: float | None,
) -> Float64[Tensor, " scales"]:
    """`errors` of operations.py."""
    h, scales = h.contiguous(), scales.contiguous()
    sums = torch.zeros(BLOCKS, len(scales), dtype=torch.float64, device=X.device)
    call = _Errors(
        lattice=lattice(stages, ratio),
        m=len(X),
        blocks=X.shape[1] // DIM,
        row=X.stride(0),
        column=X.stride(1),
        x=pointer(X),
        h=pointer(h),
        scales=pointer(scales),
        candidates=len(scales),
        sums=pointer(sums),
    )
    cuda.launch(SOURCE, "sum_errors", X.device, ctypes.byref(call), c_int64(BLOCKS))
    return sums.sum(0)


def _plain(x: Tensor) -> bool:
    float32 = x.dtype == torch.float32 and not x.requires_grad
    return float32 and x.numel() > 0 and x.device.type == "cuda"


def _serves(x: Tensor, stages: object, *, scale: Tensor, **_: object) -> bool:
    return _plain(x) and _plain(scale)


def _serves_codes(codes: Tensor, stages: object, scales: Tensor, **_: object) -> bool:
    return _plain(scales) and codes.numel() > 0 and codes.device.type == "cuda"


def _serves_columns(X: Tensor, h: Tensor, *_: object, scales: Tensor, **__: object) -> bool:
    return _plain(X) and _plain(h) and _plain(scales)


def available() -> bool:
    """Whether torch has a CUDA device at hand, and the source compiles for it."""
    return cuda.available(SOURCE)


NEAREST = Form(nearest, _serves, available)
DECODE = Form(decode, _serves_codes, available)
ERRORS = Form(errors, _serves_columns, available)
