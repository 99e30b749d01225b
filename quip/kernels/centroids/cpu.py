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
    """The struct Problem of cpu.cpp."""

    _fields_ = (
        *[(name, c_int64) for name in ("g", "m", "groups", "k")],
        *[(name, c_void_p) for name in ("X", "h", "mass", "centroids", "codes")],
        *[(name, c_int32) for name in ("dim", "wide", "iterations")],
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
    X, h, mass = X.contiguous(), h.contiguous(), None if mass is None else mass.contiguous()
    problem = _Problem(
        g=g,
        m=m,
        groups=groups,
        k=k,
        X=X.data_ptr(),
        h=h.data_ptr(),
        mass=None if mass is None else mass.data_ptr(),
        centroids=centroids.data_ptr(),
        codes=None if codes is None else codes.data_ptr(),
        dim=dim,
        wide=codes is not None and codes.dtype == torch.int32,
        iterations=iterations,
    )
    native = library(SOURCE)
    assert native is not None
    getattr(native, function)(ctypes.byref(problem))


def _serves(X: Tensor, centroids: Tensor, *_: object, **__: object) -> bool:
    return (X.dtype, X.device.type) == (torch.float32, "cpu") and centroids.shape[2] in DIMS


def _available() -> bool:
    return library(SOURCE) is not None


ASSIGN = Form(assign, _serves, _available)
IMPROVE = Form(improve, _serves, _available)
