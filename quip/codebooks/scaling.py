"""Scales of short runs of a row, by which weights are divided before they meet their codebook."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from quip.errors import QuipError
from quip.kernels.bits import pack, unpack, words

LEVELS = 15  # steps between the smallest and the largest logarithm: 4 bits
RANGE = 2.0**16  # of the scales of a run: rows of zeros must not stretch it
SHARES = tuple(0.4 + 0.05 * i for i in range(14))  # of the largest weight, tried as 7 units


@runtime_checkable
class Scaling(Protocol):
    """A scale for each row and run of `size` columns.

    Its parts are tensors whose last axis but one, or last, counts runs (`axis`), so that those of
    the groups of a matrix join side by side.
    """

    size: int
    axis: ClassVar[dict[str, int]]
    moves: ClassVar[str]  # the part that tuning may move, a float

    def fit(self, X: Float[Tensor, "m g"], h: Float[Tensor, " g"]) -> dict[str, Tensor]:
        """The parts for the columns X, whose errors weigh h."""
        ...

    def values(self, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Float[Tensor, "m runs"]:
        """The scales that parts mean."""
        ...

    def store(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The parts of all groups of a matrix as tensors of a file."""
        ...

    def restore(self, stored: Mapping[str, Tensor], n: int) -> dict[str, Tensor]:
        """What `store` was given, for n columns. Raises QuipError for scales that are none."""
        ...

    def empty(self, m: int, n: int) -> dict[str, Tensor]:
        """The tensors of an m x n matrix, on the meta device."""
        ...


@dataclass(frozen=True)
class LogScales(Scaling):
    """s = 2^(z + a q), q = 0 ... 15, near to the largest |w| of the run (GPTVQ).

    Offset z and step a belong to the runs of all rows in the same columns.
    """

    size: int

    axis: ClassVar = {"scale_codes": 1, "scale_range": 0}
    moves: ClassVar = "scale_range"

    def fit(self, X: Float[Tensor, "m g"], h: Float[Tensor, " g"]) -> dict[str, Tensor]:
        largest = torch.stack([x.abs().amax(1) for x in X.split(self.size, 1)], 1)
        top = largest.amax(0).clamp_min(torch.finfo(torch.float32).tiny * RANGE)
        logs = torch.maximum(largest, top / RANGE).log2()
        low = logs.amin(0).float()
        step = ((logs.amax(0) - low) / LEVELS).float()
        codes = ((logs - low) / step.clamp_min(torch.finfo(torch.float32).tiny)).round()
        codes = codes.clamp(0, LEVELS).to(torch.uint8)
        return {"scale_codes": codes, "scale_range": torch.stack([low, step], 1)}

    def values(self, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Float[Tensor, "m runs"]:
        # Levels in double: exp2 of float32 differs in the last bit with the place in a tensor.
        low, step = parts["scale_range"].double().unbind(1)
        steps = torch.arange(LEVELS + 1, dtype=torch.float64, device=low.device)
        levels = torch.exp2(low + step * steps[:, None]).to(dtype)  # [16, runs]
        return levels.gather(0, parts["scale_codes"].long())

    def store(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            "scale_codes": pack(parts["scale_codes"], 4),
            "scale_range": parts["scale_range"],
        }

    def restore(self, stored: Mapping[str, Tensor], n: int) -> dict[str, Tensor]:
        range_ = stored["scale_range"]
        low, step = range_.double().unbind(1)
        ends = torch.stack([low, low + LEVELS * step]).float().exp2()
        if not bool((ends.isfinite() & (ends > 0)).all()):
            raise QuipError("a range of its scales is not finite: the file is damaged")
        codes = unpack(stored["scale_codes"], 4, -(-n // self.size))
        return {"scale_codes": codes, "scale_range": range_}

    def empty(self, m: int, n: int) -> dict[str, Tensor]:
        runs = -(-n // self.size)
        return {
            "scale_codes": torch.empty(m, words(runs, 4), dtype=torch.int32, device="meta"),
            "scale_range": torch.empty(runs, 2, dtype=torch.float32, device="meta"),
        }


@dataclass(frozen=True)
class UnitScales(Scaling):
    """The unit of whole numbers from -8 to 7, of the least weighted error (GPTVQ, section 5.3)."""

    size: int

    axis: ClassVar = {"units": 1}
    moves: ClassVar = "units"

    def fit(self, X: Float[Tensor, "m g"], h: Float[Tensor, " g"]) -> dict[str, Tensor]:
        runs = zip(X.split(self.size, 1), h.split(self.size), strict=True)
        return {"units": torch.stack([_best_unit(x, w) for x, w in runs], 1)}

    def values(self, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Float[Tensor, "m runs"]:
        return parts["units"].to(dtype)

    def store(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(parts)

    def restore(self, stored: Mapping[str, Tensor], n: int) -> dict[str, Tensor]:
        units = stored["units"]
        if not bool(((units > 0) & units.isfinite()).all()):
            raise QuipError("a unit of its weights is not a positive number: the file is damaged")
        return {"units": units}

    def empty(self, m: int, n: int) -> dict[str, Tensor]:
        runs = -(-n // self.size)
        return {"units": torch.empty(m, runs, dtype=torch.bfloat16, device="meta")}


def joined(scaling: Scaling, parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The parts of all groups of a matrix, side by side."""
    return {
        name: torch.cat([part[name] for part in parts], axis) for name, axis in scaling.axis.items()
    }


def _best_unit(x: Float[Tensor, "m g"], h: Float[Tensor, " g"]) -> Float[Tensor, " m"]:
    largest = x.abs().amax(1).clamp_min(torch.finfo(torch.bfloat16).tiny * 16)
    units = torch.stack([(largest * share / 7).bfloat16() for share in SHARES])  # [shares, m]
    errors = [((x - _whole(x, unit.to(x)) * unit.to(x)[:, None]).square() @ h) for unit in units]
    return units.gather(0, torch.stack(errors).argmin(0)[None]).squeeze(0)


def _whole(x: Tensor, unit: Tensor) -> Tensor:
    return (x / unit[:, None]).round().clamp(-8, 7)
