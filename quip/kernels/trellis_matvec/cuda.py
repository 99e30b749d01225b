"""Multiply vectors by a matrix of packed trellis codes, or decode it, on CUDA: by cuda.cu.

A few vectors are multiplied by codes of 2 to 4 bits on tiles of one column. What MUL1, 1MAD and
INT8 make of a state is a sum of bytes, and values of a table are rounded to 16 bits of their range.
MUL1's sums are not rounded to float16 as its values are, which is 2^-12 of the largest. Where the
product is asked for in float32, a second one adds what these leave. For all else W~ is decoded.
"""

import ctypes
from ctypes import c_float, c_int32, c_int64, c_uint32, c_void_p
from pathlib import Path

import torch
from jaxtyping import Float, Int32
from torch import Tensor
from torch.nn.functional import linear

from quip.kernels import cuda
from quip.kernels.cuda import block_bytes, pointer, processors
from quip.kernels.few_tokens import FEW, LONGEST, Split, split
from quip.kernels.numbers import KINDS, laid_out
from quip.kernels.operation import Form, learns
from quip.kernels.trellis import Code, Tiling
from quip.kernels.trellis import cuda as walks
from quip.kernels.trellis_matvec.values import Kind, Values, values_of

SOURCE = Path(__file__).with_name("cuda.cu")
BITS = {2: 2, 3: 1, 4: 4}  # of a step, and those of them in the plane that is the last
OWN, STRIPS, CHUNK, COLUMNS = 16, 8, 16, 8  # as in cuda.cu
LAUNCHES = 4  # for more, the matrix product of a decoded matrix is faster


class _Product(ctypes.Structure):
    """The struct Product of cuda.cu."""

    _fields_ = (
        ("inputs", Split),
        *[(name, c_int64) for name in ("m", "tiles", "row_bytes")],
        *[(name, c_void_p) for name in ("words", "table", "y")],
        *[(name, c_float) for name in ("unit", "middle")],
        *[(name, c_uint32) for name in ("factor", "increment")],
        *[(name, c_int32) for name in ("L", "y_kind", "layers")],
    )


def multiply(
    x: Float[Tensor, "*batch n"],
    words: Int32[Tensor, "m words"],
    code: Code,
    scales: Float[Tensor, " groups"],
    tiling: Tiling,
    *,
    group: int | None,
    dtype: torch.dtype,
) -> Float[Tensor, "*batch m"]:
    """x W~^T for a few vectors, as few_tokens.py tells; for more, with W~ decoded to `dtype`."""
    n, m, exact = x.shape[-1], len(words), dtype == torch.float32
    parts = 3 if exact else 2  # bytes of x
    stages = _stages_for(x, m, code, tiling, parts)
    if not stages:
        W = decode(words, code, scales, tiling, n=n, group=group, dtype=dtype)
        return linear(x.to(dtype), W).to(x.dtype)
    X, words = laid_out(x.reshape(-1, n)), words.contiguous()
    factors = laid_out((scales if scales.dtype in KINDS else scales.float()).detach())
    done = []
    for part in X.split(_together(stages, code, parts, x.device)):
        inputs, room = split(part, parts, factors, group or n)
        y = _multiply(part, inputs, words, code, stages[0], tiling)
        for rest in stages[1:] if exact else ():
            inputs.x = None  # it is split already
            y = y + _multiply(part, inputs, words, code, rest, tiling)
        del room  # whoever gets it next writes after the product has read it: one stream
        done.append(y)
    return (done[0] if len(done) == 1 else torch.cat(done)).view(*x.shape[:-1], m)


def _multiply(
    X: Float[Tensor, "tokens n"],
    inputs: Split,
    words: Int32[Tensor, "m words"],
    code: Code,
    values: Values,
    tiling: Tiling,
) -> Float[Tensor, "tokens m"]:
    """The products with as many vectors as tensor cores take at once."""
    (tokens, n), m = X.shape, len(words)
    layers = _layers(m, n, code, tiling, values.kind, X.device)
    y = X.new_empty(layers, tokens, m, dtype=X.dtype if layers == 1 else torch.float32)
    call = _Product(
        inputs=inputs,
        m=m,
        tiles=tiling.count,
        row_bytes=4 * words.shape[1],
        words=pointer(words),
        table=pointer(values.table),
        y=pointer(y),
        unit=values.unit,
        middle=values.middle,
        factor=values.factor,
        increment=values.increment,
        L=0 if values.table is None else len(values.table).bit_length() - 1,
        y_kind=KINDS[y.dtype],
        layers=layers,
    )
    cuda.launch(SOURCE, "multiply_trellis", X.device, ctypes.byref(call), code.bits, values.kind)
    return y[0] if layers == 1 else y.sum(0).to(X.dtype)


def _layers(m: int, n: int, code: Code, tiling: Tiling, kind: Kind, device: torch.device) -> int:
    """Parts of the columns, so that blocks of few rows are as many as can run at once."""
    longest, chunks = -(-m // tiling.count), -(-n * BITS[code.bits] // (8 * CHUNK))
    blocks = -(-tiling.count * -(-longest // OWN) // STRIPS)
    at_once = processors(device) * (2 if kind < Kind.TABLE else 1)
    return max(1, min(at_once // blocks, -(-chunks // kind.warps)))


def _stages_for(x: Tensor, m: int, code: Code, tiling: Tiling, parts: int) -> tuple[Values, ...]:
    """What the kernel multiplies these vectors with; nothing where W~ is to be decoded for them."""
    n = x.shape[-1]
    down = tiling.columns == code.V == 1 and tiling.order is None and m // tiling.count >= 2 * OWN
    fits = code.bits in BITS and n % 32 == 0 and 0 < n <= LONGEST
    few = x.dtype in KINDS and 0 < x.numel() <= FEW * n and not learns(x)
    stages = values_of(code) if down and fits and few else ()
    if not stages:
        return ()
    together = _together(stages, code, parts, x.device)
    return stages if x.numel() <= LAUNCHES * together * n else ()


def _together(stages: tuple[Values, ...], code: Code, parts: int, device: torch.device) -> int:
    """Vectors of one launch, as many as a block has room for; 0 where there is none for one."""
    counts = range(COLUMNS // (parts * max(values.kind.digits for values in stages)), 0, -1)
    left = block_bytes(device)
    fitting = (c for c in counts if all(v.bytes(code.bits, c, parts) <= left for v in stages))
    return next(fitting, 0)


def decode(
    words: Int32[Tensor, "m words"],
    code: Code,
    scales: Float[Tensor, " groups"],
    tiling: Tiling,
    *,
    n: int,
    group: int | None,
    dtype: torch.dtype,
) -> Float[Tensor, "m n"]:
    """W~ rounded to `dtype`, in one pass."""
    W = words.new_empty(len(words), n, dtype=dtype)
    scales = scales.detach().float().contiguous()
    rows = words.contiguous()
    walks.decode_planes(rows, code, tiling, W, stored=code.bits, scales=scales, group=group)
    return W


def _multiplies(
    x: Tensor,
    words: Tensor,
    code: Code,
    scales: Tensor,
    tiling: Tiling,
    *,
    group: int | None,
    dtype: torch.dtype,
) -> bool:
    n = x.shape[-1]
    return x.numel() > 0 and _decodes(words, code, scales, tiling, n=n, group=group, dtype=dtype)


def _decodes(
    words: Tensor,
    code: Code,
    scales: Tensor,
    tiling: Tiling,
    *,
    n: int,
    group: int | None,
    dtype: torch.dtype,
) -> bool:
    whole = group is None or group % tiling.columns == 0  # tiles of a group
    return whole and dtype in KINDS and walks.decodable(words, n, code, scales)


def available() -> bool:
    """Whether torch has a CUDA device at hand, and both sources compile for it."""
    return cuda.available(SOURCE) and walks.available()


MULTIPLY = Form(multiply, _multiplies, available)
DECODE = Form(decode, _decodes, walks.available)
