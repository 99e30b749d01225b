"""Learned centroids in C++: the ctypes side of cpu.cpp, for float32 and vectors of 1, 2 or 4.

Of two centroids that are equally near but for float noise either may be taken.
"""

import ctypes
from ctypes import c_int32, c_int64, c_void_p
from pathlib import Path

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from quip.kernels.centroids.reference import code_dtype
from quip.kernels.native import library
from quip.kernels.operation import Form

SOURCE = Path(__file__).with_name("cpu.cpp")
DIMS = (1, 2, 4)


class _Problem(ctypes.Structure):
    """The struct Problem of lloyd.h."""

    _fields_ = (
        *[(name, c_int64) for name in ("g", "m", "groups", "k")],
        *[(name, c_void_p) for name in ("X", "h", "mass", "centroids", "codes")],
        *[(name, c_int32) for name in ("dim", "wide", "iterations")],
    )


class _Panel(ctypes.Structure):
    """The struct Panel of panel.h."""

    _fields_ = (
        *[(name, c_int64) for name in ("n", "m", "groups", "k", "block")],
        *[(name, c_void_p) for name in ("X", "K", "base", "scales", "h", "centroids")],
        *[(name, c_void_p) for name in ("kept", "metrics")],
        *[(name, c_int64) for name in ("K_row", "K_column")],
        *[(name, c_void_p) for name in ("eta", "codes")],
        *[(name, c_int32) for name in ("dim", "wide")],
    )


def assign(
    X: Float[Tensor, "g m"], centroids: Float[Tensor, "G k d"], h: Float[Tensor, " g"]
) -> Integer[Tensor, "g//d m"]:
    """`assign` of reference.py."""
    (_, k, d), (g, m) = centroids.shape, X.shape
    codes = torch.empty(g // d, m, dtype=code_dtype(k))
    _call("assign", X, centroids.contiguous(), h, codes=codes)
    return codes


def improve(
    X: Float[Tensor, "g m"],
    centroids: Float[Tensor, "G k d"],
    h: Float[Tensor, " g"],
    *,
    iterations: int,
    mass: Float[Tensor, "g//d m"] | None = None,
) -> Float[Tensor, "G k d"]:
    """`improve` of reference.py."""
    improved = centroids.clone(memory_format=torch.contiguous_format)
    _call("improve", X, improved, h, mass=mass, iterations=iterations)
    return improved


def round_columns(
    X: Float[Tensor, "n m"],
    K: Float[Tensor, "n n"],
    eta: Float[Tensor, "n m"],
    h: Float[Tensor, " n"],
    centroids: Float[Tensor, "G k d"],
    *,
    scales: Float[Tensor, "blocks m"] | None = None,
    block: int | None = None,
    base: Float[Tensor, "n m"] | None = None,
    kept: tuple[Integer[Tensor, "n//d m"], Float[Tensor, "n//d d d"]] | None = None,
) -> Integer[Tensor, "n//d m"]:
    """`round_columns` of reference.py."""
    assert eta.is_contiguous()
    (n, m), (groups, k, dim) = X.shape, centroids.shape
    codes = torch.empty(n // dim, m, dtype=code_dtype(k))
    old, metrics = (None, None) if kept is None else (kept[0].to(codes.dtype), kept[1])
    given = {"X": X, "base": base, "scales": scales, "h": h, "centroids": centroids}
    held = _contiguous({**given, "kept": old, "metrics": metrics})
    panel = _Panel(
        **_addresses({**held, "K": K, "eta": eta, "codes": codes}),
        n=n,
        m=m,
        groups=groups,
        k=k,
        block=block or n,
        K_row=K.stride(0),
        K_column=K.stride(1),
        dim=dim,
        wide=codes.dtype == torch.int32,
    )
    native = library(SOURCE)
    assert native is not None
    native.round_columns(ctypes.byref(panel))
    return codes


def _call(
    function: str,
    X: Tensor,
    centroids: Tensor,
    h: Tensor,
    *,
    mass: Tensor | None = None,
    codes: Tensor | None = None,
    iterations: int = 0,
) -> None:
    (g, m), (groups, k, dim) = X.shape, centroids.shape
    held = _contiguous({"X": X, "h": h, "mass": mass, "codes": codes})
    problem = _Problem(
        **_addresses({**held, "centroids": centroids}),
        g=g,
        m=m,
        groups=groups,
        k=k,
        dim=dim,
        wide=codes is not None and codes.dtype == torch.int32,
        iterations=iterations,
    )
    native = library(SOURCE)
    assert native is not None
    getattr(native, function)(ctypes.byref(problem))


def _contiguous(tensors: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """The tensors that are there; what C++ reads has to be held until it returns."""
    return {name: x.contiguous() for name, x in tensors.items() if x is not None}


def _addresses(tensors: dict[str, Tensor]) -> dict[str, int]:
    return {name: x.data_ptr() for name, x in tensors.items()}


def _serves(X: Tensor, centroids: Tensor, *_: object, **__: object) -> bool:
    return (X.dtype, X.device.type) == (torch.float32, "cpu") and centroids.shape[2] in DIMS


def _serves_panels(
    X: Tensor, K: Tensor, eta: Tensor, h: Tensor, centroids: Tensor, **_: object
) -> bool:
    return _serves(X, centroids)


def _available() -> bool:
    return library(SOURCE) is not None


ASSIGN = Form(assign, _serves, _available)
IMPROVE = Form(improve, _serves, _available)
ROUND = Form(round_columns, _serves_panels, _available)
