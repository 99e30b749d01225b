"""What decodes a matrix of integer grids: the steps and zeros of all its groups, and their file."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, Literal, TypeAlias

import torch
from jaxtyping import Float, Int, Int32, Integer, UInt8
from torch import Tensor

from quip.codebooks.base import Columns, Decoder, Groups
from quip.errors import QuipError
from quip.kernels import grid_matvec
from quip.kernels.bits import pack, unpack, words
from quip.shapes import Within
from quip.stored import Options

Bits: TypeAlias = Annotated[int, Within(1, 8)]
Symmetric: TypeAlias = bool | Literal["signed"]
SIGNED = "signed"
Steps: TypeAlias = Literal["bfloat16", "float16", "float32"]  # those that came with a model


def middle(bits: int) -> int:
    """The code of weight 0 in a signed grid: levels are -middle ... middle - 1 times the step."""
    return 2 ** (bits - 1)


@dataclass(frozen=True, kw_only=True)
class Grids(Decoder):
    """The grids of all groups of a matrix: of each row its own, or symmetric ones for all rows.

    Signed ones are symmetric as well, and of each row its own: weight 0 is the code 2^(bits - 1).
    """

    bits: int
    step: Float[Tensor, "m_or_1 groups"]
    zero: UInt8[Tensor, "m groups"] | None  # None: (2^bits - 1) / 2, or the code of signed ones
    groups: Groups
    signed: bool = False

    dim = 1
    _kind = property(lambda self: {"bits": self.bits, "group": self.groups.size})

    @property
    def index_bits(self) -> int:
        return self.bits

    @cached_property
    def zeros(self) -> UInt8[Tensor, "m_or_1 groups"] | None:
        """The code of weight 0, which may serve all rows; None: (2^bits - 1) / 2, which is none."""
        if not self.signed:
            return self.zero
        shape = (1, self.groups.count)
        return torch.full(shape, middle(self.bits), dtype=torch.uint8, device=self.step.device)

    def decode(self, codes: Integer[Tensor, "m n"]) -> Float[Tensor, "m n"]:
        """step (code - zero) in float32."""
        return grid_matvec.reference.decode(codes, self.step, self.zeros, *self._kind.values())

    def dense(self, words: Tensor, n: int, dtype: torch.dtype) -> Float[Tensor, "m n"]:
        return grid_matvec.decode(words, self.step, self.zeros, n=n, dtype=dtype, **self._kind)

    def multiply(
        self, words: Int32[Tensor, "m words"], x: Float[Tensor, "*batch n"], dtype: torch.dtype
    ) -> Float[Tensor, "*batch m"]:
        return grid_matvec.multiply(x, words, self.step, self.zeros, dtype=dtype, **self._kind)

    def of_rows(self, rows: Int[Tensor, " rows"]) -> "Grids":
        """The grids of these rows of the matrix alone."""
        step = self.step if len(self.step) == 1 else self.step[rows]
        return replace(self, step=step, zero=None if self.zero is None else self.zero[rows])

    def options(self) -> Options:
        steps = str(self.step.dtype).removeprefix("torch.")
        given = {} if steps == "bfloat16" else {"steps": steps}
        return {**self._kind, "symmetric": SIGNED if self.signed else self.zero is None, **given}

    def tensors(self) -> dict[str, Tensor]:
        zero = {} if self.zero is None else {"zero": pack(self.zero.flatten(), self.bits)}
        return {"step": self.step} | zero

    @classmethod
    def empty(
        cls,
        m: int,
        n: int,
        *,
        bits: Bits,
        group: Columns | None,
        symmetric: Symmetric,
        steps: Steps = "bfloat16",
    ) -> dict[str, Tensor]:
        count, rows = Groups(n, group).count, 1 if symmetric is True else m
        step = torch.empty(rows, count, dtype=getattr(torch, steps), device="meta")
        layout = {"codes": _packed(m, words(n, bits)), "step": step}
        return layout if symmetric else layout | {"zero": _packed(words(m * count, bits))}

    @classmethod
    def restore(
        cls,
        tensors: Mapping[str, Tensor],
        m: int,
        n: int,
        *,
        bits: int,
        group: int | None,
        symmetric: Symmetric,
        steps: Steps = "bfloat16",
    ) -> "Grids":
        step, groups = tensors["step"], Groups(n, group)
        if not bool(((step > 0) & step.isfinite()).all()):
            raise QuipError("a step of its grid is not a positive number: the file is damaged")
        zero = None if symmetric else unpack(tensors["zero"], bits, m * groups.count).view(m, -1)
        signed = symmetric == SIGNED
        return cls(bits=bits, step=step, zero=zero, groups=groups, signed=signed)


def _packed(*shape: int) -> Int32[Tensor, "..."]:
    return torch.empty(shape, dtype=torch.int32, device="meta")
