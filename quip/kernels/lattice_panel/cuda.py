"""Round the columns of a panel to a lattice on a GPU: the ctypes side of cuda.cu, for float32.

Nothing waits for the device. Codes and scales are those of reference.py up to ties.
"""

import ctypes
from collections.abc import Sequence
from ctypes import c_int32, c_int64, c_void_p
from pathlib import Path

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from quip.kernels import cuda
from quip.kernels.cuda import block_bytes, pointer, processors
from quip.kernels.lattice_panel.reference import Kept
from quip.kernels.lattice_points.cuda import Lattice, lattice
from quip.kernels.lattice_points.tables import DIM, Stage, code_bits, code_dtype
from quip.kernels.operation import Form

SOURCE = Path(__file__).with_name("cuda.cu")
WIDTH = 128  # columns, at most
LANES = 32  # rows of a tile: as in cuda.cu
CANDIDATES = LANES  # of scales, at most
BYTES, TILE_BYTES = 40 * 2**10, 17 * 2**10  # of a thread block, at most, and of each of its tiles


class _Panel(ctypes.Structure):
    """The struct Panel of cuda.cu."""

    _fields_ = (
        ("lattice", Lattice),
        *[(name, c_int64) for name in ("width", "m", "K_row")],
        *[(name, c_void_p) for name in ("X", "K", "base", "eta", "codes", "scales")],
        ("scale_block", c_int64),
        *[(name, c_void_p) for name in ("old", "metrics", "h", "rhos")],
        ("candidates", c_int64),
        ("slots", c_void_p),
        ("tiles", c_int32),
    )


def round_blocks(
    X: Float[Tensor, "n m"],
    K: Float[Tensor, "n n"],
    eta: Float[Tensor, "n m"],
    scales: Float[Tensor, " #b"],
    stages: Sequence[Stage],
    *,
    ratio: float | None,
    base: Float[Tensor, "n m"] | None = None,
    kept: Kept | None = None,
) -> Integer[Tensor, "b m"]:
    """`round_blocks` of reference.py, for panels of at most WIDTH columns."""
    m, scales = X.shape[1], scales.contiguous()
    base = None if base is None else base.contiguous()
    panel, codes, _alive = _panel(X, K, eta, stages, ratio)
    panel.scales, panel.scale_block = pointer(scales), int(len(scales) > 1)
    panel.base, panel.tiles = pointer(base), 1
    if kept is not None:
        old, metrics = kept[0].to(codes.dtype).contiguous(), kept[1].contiguous()
        panel.old, panel.metrics = pointer(old), pointer(metrics)
    _launch("round_lattice_panel", panel, X, -(-m // LANES))
    return codes


def fit_and_round_blocks(
    X: Float[Tensor, "n m"],
    K: Float[Tensor, "n n"],
    eta: Float[Tensor, "n m"],
    h: Float[Tensor, " n"],
    rhos: Float[Tensor, " candidates"],
    stages: Sequence[Stage],
    *,
    ratio: float | None,
) -> tuple[Integer[Tensor, "b m"], Float[Tensor, " b"]]:
    """`fit_and_round_blocks` of reference.py, for panels of at most WIDTH columns.

    Of at most CANDIDATES rhos, and as many rows as all thread blocks together hold.
    """
    m, scales = X.shape[1], X.new_empty(len(X) // DIM)
    h, rhos = h.contiguous(), rhos.contiguous()
    panel, codes, _alive = _panel(X, K, eta, stages, ratio)
    panel.tiles = _tiles(m, processors(X.device))
    blocks = -(-m // (LANES * panel.tiles))
    slots = torch.full((2 * len(scales), blocks, LANES), -1, dtype=torch.int32, device=X.device)
    panel.scales, panel.slots = pointer(scales), pointer(slots)
    panel.h, panel.rhos, panel.candidates = pointer(h), pointer(rhos), len(rhos)
    _launch("fit_and_round_lattice_panel", panel, X, blocks)
    return codes, scales


def _panel(
    X: Tensor, K: Tensor, eta: Tensor, stages: Sequence[Stage], ratio: float | None
) -> tuple[_Panel, Tensor, tuple[Tensor, ...]]:
    """The panel, the codes that it writes, and what must live until it is launched."""
    assert eta.is_contiguous()
    n, m = X.shape
    X, K = X.contiguous(), K if _aligned(K) else K.contiguous()
    dtype = code_dtype(code_bits(stages))
    codes = torch.empty(n // DIM, m, dtype=dtype, device=X.device)
    panel = _Panel(
        lattice=lattice(stages, ratio),
        width=n,
        m=m,
        K_row=K.stride(0),
        X=pointer(X),
        K=pointer(K),
        eta=pointer(eta),
        codes=pointer(codes),
    )
    return panel, codes, (X, K)


def _aligned(K: Tensor) -> bool:
    """Whether four columns of a row, from every eighth on, can be read at once."""
    return K.stride(1) == 1 and K.stride(0) % 4 == 0 and K.data_ptr() % 16 == 0


def _launch(name: str, panel: _Panel, X: Tensor, blocks: int) -> None:
    cuda.launch(SOURCE, name, X.device, ctypes.byref(panel), blocks)


def _tiles(m: int, most: int) -> int:
    """The tiles of LANES rows of each of `most` thread blocks, for m rows."""
    return -(-m // (LANES * most))


def _serves(X: Tensor, *_: object, **__: object) -> bool:
    fits = X.dtype == torch.float32 and len(X) <= WIDTH and len(X) % DIM == 0 and X.numel() > 0
    return fits and X.device.type == "cuda"


def _serves_scales(
    X: Tensor, K: Tensor, eta: Tensor, h: Tensor, rhos: Tensor, *_: object, **__: object
) -> bool:
    if not _serves(X) or len(rhos) > CANDIDATES:
        return False
    tiles = _tiles(X.shape[1], processors(X.device))
    return BYTES + tiles * TILE_BYTES <= block_bytes(X.device)


def _available() -> bool:
    return cuda.available(SOURCE)


ROUND = Form(round_blocks, _serves, _available)
FIT_AND_ROUND = Form(fit_and_round_blocks, _serves_scales, _available)
