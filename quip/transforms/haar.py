"""Random orthogonal matrices, as Householder vectors that 16 bits a number hold exactly."""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from quip.errors import QuipError

FILE_DTYPE = torch.bfloat16  # what a file keeps; drawn values are rounded to it


@dataclass(frozen=True)
class Haar:
    """Haar-distributed orthogonal matrices as Householder vectors, count of p x p.

    The vectors are rounded to 16 bits before the matrices are formed, and any vector makes an
    exact reflection: what a file holds (a triangle of p (p + 1) / 2 numbers) rebuilds matrices
    that are orthogonal to machine precision (Stewart, 1980).
    """

    vectors: Float[Tensor, "count p p"]  # as stored, below the diagonal; on it is 1 by convention
    signs: Float[Tensor, "count p"]

    @classmethod
    def draw(cls, p: int, rng: torch.Generator, *, count: int = 1) -> "Haar":
        gaussian = torch.randn(count, p, p, generator=rng, dtype=torch.float64)
        factored, _ = torch.geqrf(gaussian)
        signs = torch.where(factored.diagonal(dim1=1, dim2=2) < 0, -1.0, 1.0).double()
        return cls(factored.tril(-1).to(FILE_DTYPE), signs)

    @property
    def stored(self) -> Float[Tensor, " numbers"]:
        """The lower triangle of each matrix of vectors, with the signs on its diagonal."""
        p = self.vectors.shape[-1]
        rows, columns = torch.tril_indices(p, p)
        triangles = self.vectors + torch.diag_embed(self.signs).to(FILE_DTYPE)
        return triangles[:, rows, columns].flatten()

    @classmethod
    def restored(cls, stored: Float[Tensor, " numbers"], p: int) -> "Haar":
        """The matrices whose `stored` this is. Raises QuipError for what no factor can hold."""
        rows, columns = torch.tril_indices(p, p)
        values = stored.view(-1, len(rows))
        triangles = values.new_zeros(len(values), p, p)
        triangles[:, rows, columns] = values
        signs = triangles.diagonal(dim1=1, dim2=2)
        if not bool(values.isfinite().all() and (signs.abs() == 1).all()):
            raise QuipError("a factor of its rotation is no orthogonal matrix: the file is damaged")
        return cls(triangles.tril(-1), signs.double())

    def like(self, x: Tensor) -> Float[Tensor, "count p p"]:
        """`matrices` in the dtype and on the device of x."""
        key = x.dtype, x.device
        if key not in self._cast:
            with torch.inference_mode(False):  # or no gradient could pass later
                self._cast[key] = self.matrices.to(x)
        return self._cast[key]

    @cached_property
    def _cast(self) -> dict[tuple[torch.dtype, torch.device], Tensor]:
        return {}

    @property
    def matrices(self) -> Float[Tensor, "count p p"]:
        """H_1 ... H_p diag(signs), H_i = I - 2 v v^T / |v|^2, in float64."""
        vectors = self.vectors.double()
        scales = 2 / (1 + vectors.square().sum(1))
        scales[:, -1] = 0  # the last vector is (1): a sign, which `signs` holds already
        return torch.linalg.householder_product(vectors, scales) * self.signs[:, None, :]
