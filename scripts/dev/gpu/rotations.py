"""Section `rotations`: those of activations and of weights, beside torch's.

A row is a rotation, a width and a number of vectors. `us` is one rotation in a CUDA graph, from
bfloat16 to float32 as inputs are rotated, with signs; `torch_us` that by the reference; `error` is
against float64, relative to the norm, and `finite` says that it is. The rows with `layer` sum what
a layer of Llama-2-7B rotates for one token: inputs and outputs of its four products, q, k, v and
gate, up stacked. Rows with `share` are of many vectors, or of the rows of a weight: bytes read and
written once in that time, of 3.0 TB/s.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from _measure import device, emit
from matvec import BANDWIDTH, microseconds
from torch import Tensor

from quip.kernels import hadamard, kronecker
from quip.kernels.hadamard import reference
from quip.transforms.rotation import Rotation

ON = device()
WIDTHS = (4096, 11008, 12288, 22016, 28672) if ON.type == "cuda" else (96, 256)
LAYER = (4096, 4096, 4096, 11008), (12288, 4096, 22016, 4096)  # inputs, outputs
TINY_LAYER = (96, 256), (256, 96)
KINDS = ("hadamard", "block 128", "kronecker")
COPIES = 8  # of the signs, so that those of a layer before are not at hand
TARGET = 20.0  # microseconds a layer
MANY = 2048 if ON.type == "cuda" else 80


def main() -> None:
    for kind in KINDS:
        for width in WIDTHS:
            for vectors in (1, 16):
                measure(Rotated(kind, width), vectors)
        layer(kind)
    for kind in KINDS:
        for width in WIDTHS[:2]:
            measure(Rotated(kind, width), MANY)
    for block in (None, 128):
        rows_of_weights(WIDTHS[0] if ON.type == "cuda" else 128, block)


@dataclass(frozen=True)
class Rotated:
    """A rotation of vectors of one width."""

    kind: str
    width: int

    @property
    def block(self) -> int | None:
        return min(128, self.width & -self.width) if self.kind == "block 128" else None

    @cached_property
    def signs(self) -> Tensor:
        drawn = torch.randint(2, (COPIES, self.width), device=ON)
        return 2.0 * drawn - 1

    @cached_property
    def rotation(self) -> Rotation:
        rng = torch.Generator().manual_seed(0)
        return Rotation.draw(self.width, rng, blocked=False, mix=True, shuffle=True)

    def enter(self, x: Tensor, i: int = 0) -> Tensor:
        """As inputs of a product are rotated, to float32."""
        if self.kind == "kronecker":
            return self.rotation.rotate_vectors(x)
        return hadamard.invert(x, block=self.block, signs=self.signs[i], dtype=torch.float32)

    def leave(self, y: Tensor, i: int = 0) -> Tensor:
        """As outputs of a product are, to bfloat16."""
        if self.kind == "kronecker":
            return self.rotation.invert_vectors(y, dtype=torch.bfloat16)
        return hadamard.rotate(y, block=self.block, signs=self.signs[i], dtype=torch.bfloat16)

    def enter_by_torch(self, x: Tensor) -> Tensor:
        """`enter` by the reference, in the dtype of x."""
        if self.kind == "kronecker":
            left, right, _, _ = self.rotation._factors(x.dtype, x.device)
            mix, _, shuffle, _ = self.rotation._indices(x.device)
            return kronecker.reference.rotate(x, left, right, mix, shuffle)
        signs = self.signs[0].to(x.dtype)
        return reference.turn(x, signs, self.block, rows=False, transpose=True)


def measure(rotated: Rotated, vectors: int) -> None:
    """One row."""
    x = torch.randn(vectors, rotated.width, device=ON).bfloat16()
    y, expected = rotated.enter(x), rotated.enter_by_torch(x.double())
    us = microseconds([lambda i=i: rotated.enter(x, i) for i in range(COPIES)])
    row = {"rotation": rotated.kind, "width": rotated.width, "vectors": vectors}
    row["error"] = relative(y, expected)
    row["finite"] = bool(y.isfinite().all())
    row["us"] = us
    row["torch_us"] = microseconds([lambda: rotated.enter_by_torch(x.float())])
    if vectors == MANY:
        row["share"] = share(x.nbytes + y.nbytes, us)
    emit(shape=[vectors, rotated.width], **row)


def layer(kind: str) -> None:
    """The rotations of a layer for one token, one after another."""
    entering, leaving = LAYER if ON.type == "cuda" else TINY_LAYER
    ins, outs = ([Rotated(kind, n) for n in widths] for widths in (entering, leaving))
    xs = [torch.randn(1, r.width, device=ON).bfloat16() for r in ins]
    ys = [torch.randn(1, r.width, device=ON) for r in outs]

    def turn(i: int) -> None:
        for entered, x, left, y in zip(ins, xs, outs, ys, strict=True):
            entered.enter(x, i)
            left.leave(y, i)

    us = microseconds([lambda i=i: turn(i) for i in range(COPIES)])
    emit(shape=None, layer=kind, us=us, target_us=TARGET)


def rows_of_weights(n: int, block: int | None) -> None:
    """The columns and the rows of a square matrix of weights in float32."""
    W, signs = torch.randn(n, n, device=ON), Rotated("hadamard", n).signs[0]
    calls: dict[str, Callable[[Tensor], Tensor]] = {
        "columns": lambda W: hadamard.invert(W, block=block, signs=signs.to(W)),
        "rows": lambda W: hadamard.invert_rows(W, block=block, signs=signs.to(W)),
    }
    for axis, call in calls.items():
        rows = axis == "rows"
        expected = reference.turn(W.double(), signs.double(), block, rows=rows, transpose=True)
        us = microseconds([lambda call=call: call(W)])
        by_torch = microseconds(
            [lambda rows=rows: reference.turn(W, signs, block, rows=rows, transpose=True)]
        )
        name = f"{axis} of a weight, {f'block {block}' if block else 'hadamard'}"
        row = {"rotation": name, "width": n, "vectors": n, "error": relative(call(W), expected)}
        emit(shape=[n, n], **row, us=us, torch_us=by_torch, share=share(2 * W.nbytes, us))


def relative(y: Tensor, expected: Tensor) -> float:
    return float(f"{float((y.double() - expected).norm() / expected.norm()):.2g}")


def share(nbytes: int, us: float) -> float:
    return round(nbytes / (us * 1e-6) / BANDWIDTH, 3)


if __name__ == "__main__":
    main()
