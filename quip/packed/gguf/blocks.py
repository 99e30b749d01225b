"""The blocks of 32 weights that GGUF has, and which kind of them holds a matrix of grids exactly.

The weights of a grid are whole numbers k times a unit: code - zero times the step, or odd numbers
times half of it where the grid is symmetric about 0. A block has a unit d of its own, in float16:

    Q4_0  18 bytes  d (q - 8)     d; byte j: code j | code j + 16 << 4
    Q4_1  20 bytes  d q + low     d, low; the same
    Q5_0  22 bytes  d (q - 16)    d; the highest bits of all codes in 4 bytes; the others as before
    Q8_0  34 bytes  d q           d; bytes with a sign
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float16, Integer, UInt8
from torch import Tensor

from quip.errors import UsageError
from quip.kernels.bits import unpack
from quip.packed.linear import QuantizedLinear
from quip.packed.published import exactly

SIZE = 32  # weights of a block
BYTES = {"Q4_0": 18, "Q4_1": 20, "Q5_0": 22, "Q8_0": 34}
KINDS = {  # smallest first, with the k that they have
    "Q4_0": range(-8, 8),
    "Q4_1": range(0),  # by its codes and `low`
    "Q5_0": range(-16, 16),
    "Q8_0": range(-128, 128),
}
REMEDY = "export it with --dense, or quantize with --quant gptq --groupsize 32 --sym"


@dataclass(frozen=True)
class Blocks:
    """A matrix as blocks of one kind."""

    kind: str
    codes: Integer[Tensor, "m n"]
    units: Float16[Tensor, "m blocks"]
    lows: Float16[Tensor, "m blocks"] | None  # of Q4_1 alone

    @property
    def row_bytes(self) -> int:
        """The bytes of a row."""
        return self.units.shape[1] * BYTES[self.kind]

    def bytes(self) -> UInt8[Tensor, "m bytes"]:
        """The rows as a file has them."""
        m, count = self.units.shape
        codes = self.codes.view(m, count, SIZE)
        parts = [_bytes_of(x) for x in (self.units, self.lows) if x is not None]
        if self.kind == "Q8_0":
            parts += [codes.to(torch.int8).view(torch.uint8)]
        else:
            if self.kind == "Q5_0":
                places = torch.arange(SIZE, device=codes.device)
                parts += [_bytes_of(((codes.long() >> 4) << places).sum(2).to(torch.uint32))]
            first, second = (codes.to(torch.uint8) & 15).split(SIZE // 2, dim=2)
            parts += [first | second << 4]
        return torch.cat(parts, dim=2).flatten(1)


def blocks_of(layer: QuantizedLinear) -> Blocks:
    """The smallest blocks that hold a packed matrix exactly.

    Raises UsageError where none does, which says what of the matrix they cannot hold.
    """
    _check(layer)
    n = layer.in_features
    decoder: Any = layer.spec.restore(layer.stored(), layer.out_features, n)[0]
    codes, width = unpack(layer.codes, decoder.bits, n), decoder.groups.size or n

    def spread(x: Tensor) -> Tensor:
        x = x.repeat_interleave(max(width, SIZE) // SIZE, dim=1)[:, : n // SIZE]
        return x.expand(layer.out_features, n // SIZE)

    zeros, step, lows = decoder.zeros, spread(decoder.step.float()), None
    if zeros is None:
        k, step = 2 * codes.short() - (2**decoder.bits - 1), step / 2
    else:
        k = codes.short() - zeros.short().repeat_interleave(width, dim=1)[:, :n]
    # Blocks of zeros have the smallest step there is: any will do.
    units = _halves(torch.where(k.view(len(k), -1, SIZE).any(2), step, 1.0))
    if zeros is not None:
        lows = exactly(-units.float() * spread(zeros), torch.float16)
    for kind, held in KINDS.items():
        if kind == "Q4_1" and lows is not None and decoder.bits <= 4:
            return Blocks(kind, codes, units, lows)
        if int(k.min()) in held and int(k.max()) in held:
            offset = 0 if kind == "Q8_0" else -held.start
            return Blocks(kind, k + offset, units, None)
    outside = int((k.abs() > 127).sum())
    raise UsageError(
        f"{outside} of its {k.numel()} weights are more than 127 steps from 0, the most that GGUF "
        "has; export it with --dense"
    )


def _check(layer: QuantizedLinear) -> None:
    """Raise UsageError unless a matrix is one of grids, in runs that blocks can follow."""
    kind, n = layer.spec.codebook["kind"], layer.in_features
    if layer.spec.transforms:
        kinds = ", ".join(part["kind"] for part in layer.spec.transforms)
        raise UsageError(f"it is in another basis ({kinds}), and GGUF has none; {REMEDY}")
    if kind != "grid":
        raise UsageError(f"its codebook is of kind {kind}, and GGUF has grids; {REMEDY}")
    if len(layer.sizes) > 1:
        raise UsageError(f"it is a stack of {len(layer.sizes)} matrices; {REMEDY}")
    width = layer.spec.codebook["group"] or n
    if n % SIZE:
        raise UsageError(
            f"its {n} inputs are no multiple of {SIZE}, the weights of a block; export it with "
            "--dense"
        )
    if width < n and width % SIZE:
        raise UsageError(
            f"each {width} of its inputs have a step of their own, and in GGUF {SIZE} share one; "
            f"{REMEDY}"
        )


def _halves(step: Tensor) -> Tensor:
    halves = exactly(step, torch.float16)
    if halves is None:
        changed = int((step.half().float() != step).sum())
        raise UsageError(
            f"float16, in which GGUF has steps, does not hold those of {changed} of its "
            f"{step.numel()} blocks exactly (from {float(step.min()):.3g} to "
            f"{float(step.max()):.3g}); export it with --dense"
        )
    return halves


def _bytes_of(x: Tensor) -> UInt8[Tensor, "m blocks bytes"]:
    return x.contiguous().unsqueeze(2).view(torch.uint8)
