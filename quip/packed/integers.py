"""Codes, zeros and scales of another program as a grid of ours, every weight as it was.

    w = scale (code - zero), in groups of inputs

Those programs round the product to the type of the scale. Ours is the product in float32, which
holds it exactly where scales have 16 bits (11 digits at most, times 9), and which is theirs where
they are of float32. Rounded to the type of the scale, every weight is theirs bit for bit.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from quip.errors import Unavailable, UnsupportedModel
from quip.kernels.bits import pack
from quip.packed.files import DAMAGED
from quip.packed.published import exactly
from quip.packed.spec import Spec
from quip.transforms import Order


@dataclass(frozen=True, kw_only=True)
class Integers:
    """A matrix as it was read; columns are in the order of the inputs."""

    bits: int
    group: int | None  # columns that share a scale; None: all of a row
    codes: Integer[Tensor, "m n"]
    zero: Integer[Tensor, "m groups"]
    scale: Float[Tensor, "m groups"]
    place: Integer[Tensor, " n"] | None = None  # the group of each column, where they lie scattered

    def to_grid(self, name: str) -> tuple[Spec, dict[str, Tensor]]:
        """What the matrix is here, and its tensors.

        A scale below 0 turns its codes around, and one of 0 makes them zeros of some step. Raises
        Unavailable for a scale that is no number, and UnsupportedModel for groups of inputs that
        no order puts side by side.
        """
        if not bool(self.scale.isfinite().all()):
            raise Unavailable(f"{name}: a scale of it is not finite; {DAMAGED}")
        order = self._order(name)
        codes = self.codes if order is None else self.codes[:, order]
        width = codes.shape[1] if self.group is None else self.group
        codes, zero, step = self._positive(codes, width)
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            if (stored := exactly(step, dtype)) is not None:
                break
        else:
            raise UnsupportedModel(
                f"{name}: float32 does not hold its scales exactly; name another folder"
            )
        signed = bool((zero == 2 ** (self.bits - 1)).all())
        words = {
            "kind": "grid",
            "bits": self.bits,
            "group": self.group,
            "symmetric": "signed" if signed else False,
        }
        if dtype != torch.bfloat16:
            words["steps"] = str(dtype).removeprefix("torch.")
        tensors = {"codes": pack(codes, self.bits), "step": stored}
        if not signed:
            tensors["zero"] = pack(zero.flatten(), self.bits)
        if order is None:
            return Spec.from_json(words, []), tensors
        return Spec.from_json(words, [{"kind": "order"}]), tensors | Order(order).tensors()

    def _positive(self, codes: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """Codes, zeros and scales of the same weights, all scales above 0."""
        top, n = 2**self.bits - 1, codes.shape[1]
        turned, nothing = self.scale < 0, self.scale == 0
        zero = torch.where(turned, top - self.zero, self.zero).to(torch.uint8)
        step = torch.where(nothing, 1.0, self.scale.abs())

        def spread(x: Tensor) -> Tensor:
            return x.repeat_interleave(width, dim=1)[:, :n]

        if bool(turned.any()):
            codes = torch.where(spread(turned), top - codes, codes)
        if bool(nothing.any()):
            codes = torch.where(spread(nothing), spread(zero), codes)
        return codes.to(torch.uint8), zero, step

    def _order(self, name: str) -> Integer[Tensor, " n"] | None:
        """The columns, those of a group side by side; None where they lie so."""
        if self.place is None:
            return None
        n = len(self.place)
        straight = torch.arange(n) // (n if self.group is None else self.group)
        if torch.equal(self.place.long(), straight):
            return None
        order = torch.argsort(self.place, stable=True)
        if not torch.equal(self.place[order].long(), straight):
            raise UnsupportedModel(
                f"{name}: its groups of inputs are not of {self.group} each, one after the other; "
                "name another folder"
            )
        return order
