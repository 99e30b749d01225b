"""Round the columns of a panel to uniform grids on a GPU: the ctypes side of cuda.cu."""

import ctypes
from ctypes import c_int32, c_int64, c_void_p
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from quip.kernels import cuda
from quip.kernels.cuda import pointer, processors
from quip.kernels.operation import Form

SOURCE = Path(__file__).with_name("cuda.cu")
WIDTH, LANES, BLOCK = 128, 32, 16  # as in cuda.cu and exchange.cuh
CANDIDATES = 10  # at most, of steps
THREADS = (128, 256, 512)  # rows of a thread block


class _Panel(ctypes.Structure):
    """The struct Panel of cuda.cu."""

    _fields_ = (
        *[(name, c_int64) for name in ("width", "m", "K_row")],
        *[(name, c_void_p) for name in ("X", "K", "base", "eta", "codes", "step", "zero")],
        *[(name, c_int64) for name in ("step_column", "step_row", "zero_column", "zero_row")],
        ("rhos", c_void_p),
        ("candidates", c_int64),
        ("slots", c_void_p),
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
    """`round_columns` of reference.py, for float32 and panels of at most WIDTH columns."""
    assert eta.is_contiguous()
    n, m = X.shape
    X, K, base = X.contiguous(), _by_rows(K), None if base is None else base.contiguous()
    codes = torch.empty(n, m, dtype=torch.uint8, device=X.device)
    step_column, step_row = step.expand(n, m).stride()
    zero_column, zero_row = zero.expand(n, m).stride()
    panel = _Panel(
        width=n,
        m=m,
        K_row=K.stride(0),
        X=pointer(X),
        K=pointer(K),
        base=pointer(base),
        eta=pointer(eta),
        codes=pointer(codes),
        step=pointer(step),
        zero=pointer(zero),
        step_column=step_column,
        step_row=step_row,
        zero_column=zero_column,
        zero_row=zero_row,
        top=top,
    )
    cuda.launch(SOURCE, "round_panel", X.device, ctypes.byref(panel))
    return codes


def fit_and_round_columns(
    X: Float[Tensor, "n m"],
    K: Float[Tensor, "n n"],
    eta: Float[Tensor, "n m"],
    rhos: Float[Tensor, " candidates"],
    *,
    top: int,
    step_dtype: torch.dtype,
    base: None = None,
) -> tuple[UInt8[Tensor, "n m"], Float[Tensor, " n"]]:
    """`fit_and_round_columns` of reference.py, for float32, steps of float32 or bfloat16, no base.

    Of at most CANDIDATES rhos, and as many rows as the device holds threads at once.
    """
    assert eta.is_contiguous()
    n, m = X.shape
    X, K, rhos = X.contiguous(), _by_rows(K), rhos.contiguous()
    threads = _threads(m, processors(X.device))
    assert threads is not None
    blocks = -(-m // threads)
    codes, steps = torch.empty(n, m, dtype=torch.uint8, device=X.device), X.new_empty(n)
    exchanges = n + -(-n // BLOCK)
    slots = torch.full((exchanges, blocks, LANES), -1, dtype=torch.int32, device=X.device)
    panel = _Panel(
        width=n,
        m=m,
        K_row=K.stride(0),
        X=pointer(X),
        K=pointer(K),
        eta=pointer(eta),
        codes=pointer(codes),
        step=pointer(steps),
        rhos=pointer(rhos),
        candidates=len(rhos),
        slots=pointer(slots),
        top=top,
        bfloat16=step_dtype == torch.bfloat16,
    )
    cuda.launch(SOURCE, "fit_and_round_panel", X.device, ctypes.byref(panel), blocks, threads)
    return codes, steps


def _by_rows(K: Tensor) -> Tensor:
    """K with the columns of a row side by side."""
    return K if K.stride(1) == 1 else K.contiguous()


def _threads(m: int, most: int) -> int | None:
    """The threads of a block, so that `most` blocks have one for each of m rows; None for none."""
    return next((threads for threads in THREADS if m <= threads * most), None)


def _serves(X: Tensor, *_: object, **__: object) -> bool:
    fits = X.dtype == torch.float32 and len(X) <= WIDTH and X.numel() > 0
    return fits and X.device.type == "cuda"


def _serves_steps(
    X: Tensor,
    K: Tensor,
    eta: Tensor,
    rhos: Tensor,
    *,
    step_dtype: torch.dtype,
    base: Tensor | None = None,
    **_: object,
) -> bool:
    if not _serves(X) or base is not None or len(rhos) > CANDIDATES:
        return False
    small = step_dtype in (torch.float32, torch.bfloat16)
    return small and _threads(X.shape[1], processors(X.device)) is not None


def _available() -> bool:
    return cuda.available(SOURCE)


ROUND = Form(round_columns, _serves, _available)
FIT_AND_ROUND = Form(fit_and_round_columns, _serves_steps, _available)
