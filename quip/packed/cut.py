"""A part of a packed matrix, some of its rows or of its columns, as a packed matrix.

Each of several devices holds a part (tensor parallelism): of a layer whose outputs they share out
some rows, of one whose inputs they share out some columns, and then the sum of their answers is the
answer. Codes stay what they are. That is exact where no rotation mixes what is cut apart: where it
is in blocks, and none of them is cut. A rotation of the other side goes with every part, since it
is linear.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quip.codebooks.grid import Grids
from quip.codebooks.lattice import Lattices
from quip.errors import UnsupportedModel
from quip.kernels.bits import pack, unpack
from quip.packed.linear import QuantizedLinear
from quip.packed.spec import Spec
from quip.packed.stack import Stack

# The codebooks whose codes mean what they do wherever they stand, by the flag of their groups of
# columns; and how many columns a code has.
RUNS = {"grid": "--groupsize", "lattice": "--range"}
LEAST = {"grid": 1, "lattice": 8}


@dataclass(frozen=True)
class Cut:
    """Which rows a part has, of each member of a stack in turn, and which columns; None: all."""

    rows: tuple[slice, ...] | None = None
    columns: slice | None = None

    def check(self, spec: Spec) -> None:
        """Raise UnsupportedModel, with the flag that makes another, for what is not cut exactly."""
        parts = (self.columns,) if self.columns else self.rows or ()
        edges = [x for part in parts for x in (part.start, part.stop)]
        even = min(128, math.gcd(*edges) & -math.gcd(*edges))  # the largest power of 2 for all
        codebook, kind = spec.codebook, spec.codebook["kind"]
        if kind not in RUNS:
            raise UnsupportedModel(
                f"codes of the kind {kind} are not cut apart; quantize it with --codebook E8P12 "
                f"--hadamard_block {even}"
            )
        run = codebook["group"] or LEAST[kind]
        if self.columns and any(edge % run for edge in edges):
            raise UnsupportedModel(
                f"groups of {run} columns would be cut; quantize it with {RUNS[kind]} {even}"
            )
        for transform in spec.transforms:
            block = {"rescale": 1, "kronecker": None}.get(transform["kind"], transform.get("block"))
            if block is None or any(edge % block for edge in edges):
                raise UnsupportedModel(
                    f"its rotation ({transform['kind']}) mixes what would be cut apart; quantize "
                    f"it with --rotation hadamard --hadamard_block {even}"
                )

    def of(self, matrix: QuantizedLinear, device: torch.device) -> QuantizedLinear:
        """The part, on this device, of a matrix or stack whose specification passed the check."""
        m, n = matrix.out_features, matrix.in_features
        stored = matrix.stored()
        decoder, _ = matrix.spec.restore(stored, m, n)
        assert isinstance(decoder, Grids | Lattices)
        sizes: Sequence[int] = matrix.sizes
        if self.rows is not None:
            stored = _rows(stored, decoder, torch.cat([torch.arange(m)[x] for x in self.rows]))
            sizes = [x.stop - x.start for x in self.rows]
        if self.columns is not None:
            stored = _columns(stored, decoder, self.columns, n)
            n = self.columns.stop - self.columns.start
        if isinstance(matrix, Stack):
            made: QuantizedLinear = Stack(n, sizes, spec=matrix.spec, device="meta")
        else:
            made = QuantizedLinear(n, sum(sizes), False, spec=matrix.spec, device="meta")
        made.fill(stored, device)
        return made


def _rows(
    stored: Mapping[str, Tensor], decoder: Grids | Lattices, rows: Tensor
) -> dict[str, Tensor]:
    """The stored tensors of these rows."""
    own = {"codes", "signs_out"}  # those that have one entry a row
    if isinstance(decoder, Grids) and decoder.zero is not None:
        zero = pack(decoder.zero[rows].flatten(), decoder.bits)
        stored, own = {**stored, "zero": zero}, own | {"step"}
    return {name: x[rows] if name in own else x for name, x in stored.items()}


def _columns(
    stored: Mapping[str, Tensor], decoder: Grids | Lattices, columns: slice, n: int
) -> dict[str, Tensor]:
    """The stored tensors of these columns."""
    bits, dim, size = decoder.index_bits, decoder.dim, decoder.groups.size
    codes = unpack(stored["codes"], bits, n // dim)[:, _over(columns, dim)]
    new = {**stored, "codes": pack(codes, bits)}
    groups = slice(None) if size is None else _over(columns, dim * size)
    if isinstance(decoder, Lattices):
        new["scale"] = stored["scale"][groups]
    else:
        new["step"] = stored["step"][:, groups]
        if decoder.zero is not None:
            new["zero"] = pack(decoder.zero[:, groups].flatten(), bits)
    return new | {name: stored[name][columns] for name in ("signs_in", "rescale") if name in stored}


def _over(part: slice, size: int) -> slice:
    """The runs of this size that a part of the columns is; the last one may be short."""
    return slice(part.start // size, -(-part.stop // size))
