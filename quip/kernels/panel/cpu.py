"""Round the columns of a panel to uniform grids in C++: the ctypes side of cpu.cpp."""

import ctypes
from ctypes import c_int32, c_int64, c_void_p
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from quip.kernels.native import library
from quip.kernels.operation import Form

SOURCE = Path(__file__).with_name("cpu.cpp")


class _Panel(ctypes.Structure):
    """The struct Panel of cpu.cpp."""

    _fields_ = (
        *[(name, c_int64) for name in ("width", "m")],
        *[(name, c_void_p) for name in ("X", "K", "base")],
        *[(name, c_int64) for name in ("K_row", "K_column")],
        *[(name, c_void_p) for name in ("eta", "codes", "step", "zero")],
        *[(name, c_int64) for name in ("step_column", "step_row", "zero_column", "zero_row")],
        ("rhos", c_void_p),
        ("candidates", c_int64),
        *[(name, c_int32) for name in ("top", "bfloat16")],
    )


def round_columns(
    X: Float[Tensor, "n m"],
    K: Float[Tensor, "n n"],
    eta: Float[Tensor, "n m"],
    step: Float[Tensor, "#n #m"],
    zero: Float[Tensor, "#n #m"],
    *,
    top: int,
    base: Float[Tensor, "n m"] | None = None,
) -> UInt8[Tensor, "n m"]:
    """`round_columns` of reference.py, for float32."""
    return _round(X, K, eta, step, zero, top=top, base=base)


def fit_and_round_columns(
    X: Float[Tensor, "n m"],
    K: Float[Tensor, "n n"],
    eta: Float[Tensor, "n m"],
    rhos: Float[Tensor, " candidates"],
    *,
    top: int,
    step_dtype: torch.dtype,
    base: Float[Tensor, "n m"] | None = None,
) -> tuple[UInt8[Tensor, "n m"], Float[Tensor, " n"]]:
    """`fit_and_round_columns` of reference.py, for float32 and steps of float32 or bfloat16."""
    step, zero = X.new_empty(len(X), 1), X.new_full((1, 1), top / 2)
    bfloat16 = step_dtype == torch.bfloat16
    codes = _round(X, K, eta, step, zero, top=top, base=base, rhos=rhos, bfloat16=bfloat16)
    return codes, step.view(-1)


def _round(
    X: Tensor,
    K: Tensor,
    eta: Tensor,
    step: Tensor,
    zero: Tensor,
    *,
    top: int,
    base: Tensor | None,
    rhos: Tensor | None = None,
    bfloat16: bool = False,
) -> Tensor:
    """The codes. Given rhos, it writes the steps."""
    assert eta.is_contiguous()
    n, m = X.shape
    X, base = X.contiguous(), None if base is None else base.contiguous()
    codes = torch.empty(n, m, dtype=torch.uint8)
    step_column, step_row = step.expand(n, m).stride()
    zero_column, zero_row = zero.expand(n, m).stride()
    panel = _Panel(
        width=n,
        m=m,
        X=X.data_ptr(),
        K=K.data_ptr(),
        base=None if base is None else base.data_ptr(),
        K_row=K.stride(0),
        K_column=K.stride(1),
        eta=eta.data_ptr(),
        codes=codes.data_ptr(),
        step=step.data_ptr(),
        zero=zero.data_ptr(),
        step_column=step_column,
        step_row=step_row,
        zero_column=zero_column,
        zero_row=zero_row,
        rhos=None if rhos is None else rhos.data_ptr(),
        candidates=0 if rhos is None else len(rhos),
        top=top,
        bfloat16=bfloat16,
    )
    native = library(SOURCE)
    assert native is not None
    native.round_panel(ctypes.byref(panel))
    return codes


def _serves(X: Tensor, *_: object, **__: object) -> bool:
    return (X.dtype, X.device.type) == (torch.float32, "cpu")


def _serves_steps(X: Tensor, *_: object, step_dtype: torch.dtype, **__: object) -> bool:
    return _serves(X) and step_dtype in (torch.float32, torch.bfloat16)


def _available() -> bool:
    return library(SOURCE) is not None


ROUND = Form(round_columns, _serves, _available)
FIT_AND_ROUND = Form(fit_and_round_columns, _serves_steps, _available)
