"""Trellis codes on a CUDA device: the ctypes side of cuda.cu, for steps of one or two weights.

Codes and values are those of reference.py bit for bit, and nothing waits for the device.
"""

import ctypes
from ctypes import c_int32, c_int64, c_void_p
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float32, Integer
from torch import Tensor

from quip.kernels import cuda
from quip.kernels.cuda import block_bytes, pointer, processors
from quip.kernels.numbers import KINDS, laid_out
from quip.kernels.operation import Form, learns
from quip.kernels.trellis.reference import code_dtype
from quip.kernels.trellis.tables import Code, Tiling, places

SOURCE = Path(__file__).with_name("cuda.cu")
QUAD, WARPS = 4, 32  # as in cuda.cu
THREADS = 32 * WARPS  # of a block, at most
RESIDENT = 2048  # threads of a multiprocessor
RESERVED = 1024  # bytes that CUDA keeps of each block's memory
MEMORY = 2**30  # bytes of back pointers, at most
STEPS = {1: (1, 2, 3, 4), 2: (2, 3, 4, 5, 6, 7, 8)}  # by V, the bits of a step


class _Encode(ctypes.Structure):
    """The struct Encode of cuda.cu."""

    _fields_ = (
        *[(name, c_int64) for name in ("m", "d", "tiles", "back_bytes")],
        *[(name, c_void_p) for name in ("x", "table", "back", "codes")],
        *[(name, c_int32) for name in ("L", "longest", "wide", "blocks", "threads", "bytes")],
    )


class _Decode(ctypes.Structure):
    """The struct Decode of cuda.cu."""

    _fields_ = (
        *[(name, c_int64) for name in ("m", "n", "tiles", "row_bytes")],
        *[(name, c_void_p) for name in ("words", "table", "scales", "order", "W")],
        *[(name, c_int32) for name in ("bits", "stored", "L", "V", "across", "kind", "group")],
    )


@dataclass(frozen=True)
class Room:
    """What a thread block needs to search a tile, where it may have `most` bytes of shared memory.

    Back pointers are there if three such blocks are no more than a multiprocessor holds.
    """

    longest: int  # steps of the longest tile
    threads: int
    bytes: int  # of shared memory
    back_bytes: int  # of the device's memory

    @classmethod
    def of(cls, m: int, d: int, code: Code, tiles: int, most: int) -> "Room":
        longest, overlaps = -(-m // tiles) * d // code.V, len(code.table) >> code.bits
        quads, word = overlaps // QUAD, 1 if code.bits <= 2 else 2 if code.bits <= 4 else 4
        threads, back = min(max(quads, 32), THREADS), longest * quads * word
        needed = 4 * (2 * overlaps + longest * code.V + 2 * WARPS)
        inside = 3 * (needed + back + RESERVED) <= most + RESERVED
        return cls(longest, threads, needed + back * inside, 0 if inside else back)

    def blocks(self, tiles: int, device: torch.device) -> int:
        """How many thread blocks share the tiles: no more than can run at once."""
        held = min(RESIDENT // self.threads, block_bytes(device) // self.bytes)
        fitting = MEMORY // self.back_bytes if self.back_bytes else tiles
        return min(tiles, fitting, max(1, held) * processors(device))


def encode(x: Float32[Tensor, "m d"], code: Code, *, tiles: int) -> Integer[Tensor, " m"]:
    """`encode` of reference.py."""
    (m, d), x, table = x.shape, laid_out(x), laid_out(code.table)
    room = Room.of(m, d, code, tiles, block_bytes(x.device))
    blocks = room.blocks(tiles, x.device)
    back = x.new_empty(blocks * room.back_bytes, dtype=torch.uint8) if room.back_bytes else None
    codes = x.new_empty(m, dtype=code_dtype(d, code))
    call = _Encode(
        m=m,
        d=d,
        tiles=tiles,
        back_bytes=room.back_bytes,
        x=pointer(x),
        table=pointer(table),
        back=pointer(back),
        codes=pointer(codes),
        L=code.L,
        longest=room.longest,
        wide=codes.dtype == torch.int64,
        blocks=blocks,
        threads=room.threads,
        bytes=room.bytes,
    )
    cuda.launch(SOURCE, "encode_walks", x.device, ctypes.byref(call), code.bits, code.V)
    return codes


def decode(codes: Integer[Tensor, "m steps"], code: Code, tiling: Tiling) -> Float32[Tensor, "m n"]:
    """`decode` of reference.py."""
    (m, k), codes = codes.shape, codes.to(torch.uint8).contiguous()
    W = code.table.new_empty(m, k * code.V)
    decode_planes(codes, code, tiling, W, stored=8, scales=None, group=None)
    return W


def decode_planes(
    rows: Tensor,
    code: Code,
    tiling: Tiling,
    W: Tensor,
    *,
    stored: int,
    scales: Tensor | None,
    group: int | None,
) -> None:
    """Write to W [m, n] the values of codes that lie in planes of `stored` bits, as in bits.py.

    They are multiplied by the scale of their group of columns, and rounded to the dtype of W.
    """
    (m, n), table = W.shape, laid_out(code.table)
    order = None if tiling.order is None else places(tiling.order, torch.int32, W.device)
    call = _Decode(
        m=m,
        n=n,
        tiles=tiling.count,
        row_bytes=rows.element_size() * rows.shape[1],
        group=0 if group is None or group >= n else group,
        words=pointer(rows),
        table=pointer(table),
        scales=pointer(scales),
        order=pointer(order),
        W=pointer(W),
        bits=code.bits,
        stored=stored,
        L=code.L,
        V=code.V,
        across=tiling.columns // code.V,
        kind=KINDS[W.dtype],
    )
    cuda.launch(SOURCE, "decode_walks", W.device, ctypes.byref(call))


def _encodes(x: Tensor, code: Code, *, tiles: int) -> bool:
    plain = x.dtype == torch.float32 and x.numel() > 0 and not learns(x, code.table)
    if not plain or x.device.type != "cuda" or not _known(code):
        return False
    (m, d), most = x.shape, block_bytes(x.device)
    room = Room.of(m, d, code, tiles, most)
    return room.bytes <= most and room.back_bytes <= MEMORY


def _known(code: Code) -> bool:
    """Whether there is a kernel for steps of so many bits."""
    return code.bits in STEPS.get(code.V, ()) and code.bits + 2 <= code.L


def decodable(rows: Tensor, n: int, code: Code, scales: Tensor | None) -> bool:
    """Whether the kernel decodes these rows: on CUDA, where nothing needs a gradient."""
    some = rows.numel() > 0 and 0 < n < 2**31
    known = code.bits <= 8 and code.V in STEPS and code.L < 31
    return rows.device.type == "cuda" and some and known and not learns(code.table, scales)


def _decodes(codes: Tensor, code: Code, tiling: Tiling) -> bool:
    return decodable(codes, codes.shape[-1] * code.V, code, None)


def available() -> bool:
    """Whether torch has a CUDA device at hand, and the source compiles for it."""
    return cuda.available(SOURCE)


ENCODE = Form(encode, _encodes, available)
DECODE = Form(decode, _decodes, available)
