"""How the entries of learned codebooks are stored: rounded to 16, 8 or 4 bits, or of low rank."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from quip.kernels.bits import pack, unpack, words

SWEEPS = 20  # of alternating least squares; the loss settles in fewer
SHAPES = {16: (torch.float16, 1.0), 8: (torch.int8, 127.0)}  # bits: type, largest entry


@dataclass(frozen=True)
class Entries:
    """Codebooks of k centroids of `dim` weights, as a file holds them.

    With 16 and 8 bits an entry is a float16 or an int8 times a scale in bfloat16: of each codebook,
    or with `shared` of all in a group of columns. With 4 bits it is a whole number from -8 to 7,
    in units that weights are divided by before (GPTVQ, section 5.3). With a `rank`, the codebooks
    of a group of columns, sorted, are a product of two factors in float16.
    """

    bits: int
    dim: int
    k: int
    shared: bool = False
    rank: int | None = None

    def store(
        self, centroids: Float[Tensor, "*bands tiles k d"], mass: Float[Tensor, "*bands tiles k"]
    ) -> dict[str, Tensor]:
        """The tensors of these centroids; `mass` is what the errors of each weigh."""
        if self.bits == 4:
            whole = centroids.round().clamp(-8, 7).to(torch.int8) + 8
            return {"centroids": pack(whole.flatten(-2).to(torch.uint8), 4)}
        scale = self._scale(centroids)
        units = centroids / scale.to(centroids)[..., None, None]
        if self.rank is not None:
            return {"centroid_scale": scale, **_factors(units.squeeze(-1), mass, self.rank)}
        kind, top = SHAPES[self.bits]
        whole = units.round() if kind is torch.int8 else units
        return {"centroid_scale": scale, "centroids": whole.clamp(-top, top).to(kind)}

    def load(self, stored: Mapping[str, Tensor], dtype: torch.dtype) -> Float[Tensor, "..."]:
        """The centroids [*bands, tiles, k, d] of these tensors."""
        if self.bits == 4:
            whole = unpack(stored["centroids"], 4, self.k * self.dim)
            return (whole.to(dtype) - 8).unflatten(-1, (self.k, self.dim))
        if self.rank is None:
            units = stored["centroids"].to(dtype)
        else:
            units = (stored["left"].to(dtype) @ stored["right"].to(dtype))[..., None]
        return units * stored["centroid_scale"].to(dtype)[..., None, None]

    def empty(self, bands: int, tiles: int) -> dict[str, Tensor]:
        """The tensors of all codebooks of a matrix, on the meta device."""
        half = torch.float16
        if self.bits == 4:
            return {"centroids": _meta(bands, tiles, words(self.k * self.dim, 4), torch.int32)}
        scale = {"centroid_scale": _meta(bands, 1 if self.one_scale else tiles, torch.bfloat16)}
        if self.rank is not None:
            left, right = (tiles, self.rank), (self.rank, self.k)
            return {**scale, "left": _meta(bands, *left, half), "right": _meta(bands, *right, half)}
        return {**scale, "centroids": _meta(bands, tiles, self.k, self.dim, SHAPES[self.bits][0])}

    @property
    def apart(self) -> bool:
        """Whether a codebook is stored by itself: nothing of it depends on the others."""
        return self.bits == 4 or not (self.one_scale or self.rank)

    @property
    def one_scale(self) -> bool:
        """Whether the codebooks of a group of columns have one scale: without loss at 16 bits."""
        return self.shared or self.bits == 16

    def _scale(self, centroids: Tensor) -> Tensor:
        largest = centroids.abs().amax((-1, -2))
        if self.one_scale:
            largest = largest.amax(-1, keepdim=True)
        top = 1.0 if self.rank is not None else SHAPES[self.bits][1]
        return (largest / top).clamp_min(torch.finfo(torch.bfloat16).tiny).bfloat16()


def _factors(
    C: Float[Tensor, "*bands tiles k"], mass: Float[Tensor, "*bands tiles k"], rank: int
) -> dict[str, Tensor]:
    """Factors of C, of the least squared error weighed by mass: alternating least squares."""
    half, eye = torch.float16, torch.eye(rank, dtype=torch.float64, device=C.device)
    C, mass = C.double(), mass.double()
    mass = mass / mass.mean().clamp_min(torch.finfo(torch.float64).tiny) + 1e-6
    right = torch.linalg.svd(C, full_matrices=False).Vh[..., :rank, :]
    right = torch.nn.functional.pad(right, (0, 0, 0, rank - right.shape[-2]))
    for _ in range(SWEEPS):
        left = _solve(right.mT, C, mass, eye)
        right = torch.linalg.qr(_solve(left, C.mT, mass.mT, eye)).Q.mT
    right = right.to(half)
    return {"left": _solve(right.double().mT, C, mass, eye).to(half), "right": right}


def _solve(basis: Tensor, rows: Tensor, mass: Tensor, eye: Tensor) -> Tensor:
    """For each row the x of the least sum of mass (row - basis x)^2."""
    weighed = basis.unsqueeze(-3) * mass.unsqueeze(-1)  # [..., rows, k, rank]
    gram = weighed.mT @ basis.unsqueeze(-3)
    ridge = 1e-9 * gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None].clamp_min(1e-12)
    return torch.linalg.solve(gram + ridge * eye, (weighed.mT @ rows.unsqueeze(-1))).squeeze(-1)


def _meta(*shape_and_type: int | torch.dtype) -> Tensor:
    *shape, dtype = shape_and_type
    return torch.empty(shape, dtype=dtype, device="meta")  # type: ignore[arg-type]
