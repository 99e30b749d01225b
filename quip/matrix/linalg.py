"""Factorisations in double precision that fail by name, and the loss that all methods minimise."""

import torch
from jaxtyping import Float
from torch import Tensor

from quip.errors import NotPositiveDefinite


def cholesky(H: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """The lower triangular L with H = L L^T, in float64.

    Raises:
        NotPositiveDefinite: with the smallest eigenvalue, or saying that H is not finite.
    """
    L, info = torch.linalg.cholesky_ex(H.double())
    if bool((info == 0) & torch.isfinite(L.diagonal()).all()):  # waits for the device once
        return L
    if not bool(torch.isfinite(H).all()):
        raise NotPositiveDefinite("the matrix holds NaN or infinity")
    low = float(torch.linalg.eigvalsh(H.double())[0])
    raise NotPositiveDefinite(f"the smallest eigenvalue is {low:.2e}")


def block_ldl(
    H: Float[Tensor, "n n"], dim: int = 1
) -> tuple[Float[Tensor, "n n"], Float[Tensor, "blocks dim dim"]]:
    """(U, D) with H = (I + U) D (I + U)^T, U strictly block upper and D block diagonal.

    Blocks are `dim` wide; n must be a multiple of it. The factor is upper, not lower, because
    the sweep goes left to right (QuIP, section 3; QuIP#, section 4.2 for dim > 1).
    """
    C = cholesky(H.flip(0, 1)).flip(0, 1)  # H = C C^T, C upper
    corners = diagonal_blocks(C, dim)
    U = _scale_block_columns(C, torch.linalg.inv(corners))
    return strictly_block_upper(U, dim), corners @ corners.mT


def unit_upper_inverse(U: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """(I + U)^-1 for strictly (block) upper U."""
    eye = torch.eye(len(U), dtype=U.dtype, device=U.device)
    return torch.linalg.solve_triangular(U + eye, eye, upper=True, unitriangular=True)


def block_jacobi(H: Float[Tensor, "n n"], dim: int = 1) -> Float[Tensor, "n n"]:
    """H times the inverse of its block diagonal: entry (i, j) is H_ij / H_jj for dim = 1.

    Where H_jj is 0, for an input that always is, so is the entry: a pseudo-inverse.
    """
    if dim == 1:
        D = H.diagonal()
        return H * torch.where(D == 0, 0, 1 / D)
    return _scale_block_columns(H, torch.linalg.pinv(diagonal_blocks(H, dim), hermitian=True))


def strictly_block_upper(A: Float[Tensor, "n n"], dim: int = 1) -> Float[Tensor, "n n"]:
    """A above its diagonal blocks of `dim`, and 0 elsewhere."""
    block = torch.arange(len(A), device=A.device) // dim
    return A * (block[:, None] < block[None, :])


def diagonal_blocks(A: Float[Tensor, "n n"], dim: int) -> Float[Tensor, "blocks dim dim"]:
    """The blocks of `dim` along the diagonal; n must be a multiple of it."""
    blocks = A.reshape(len(A) // dim, dim, len(A) // dim, dim)
    return torch.diagonal(blocks, dim1=0, dim2=2).permute(2, 0, 1)


def proxy_loss(
    W: Float[Tensor, "m n"], W_hat: Float[Tensor, "m n"], H: Float[Tensor, "n n"]
) -> float:
    """tr(E H E^T) / tr(W H W^T), where E = W_hat - W (QuIP, equation 1, made relative)."""
    both = torch.stack([_energy(W_hat.double() - W.double(), H), _energy(W, H)])
    error, scale = both.tolist()  # waits for the device once
    return error / scale if scale else error


def energy(X: Float[Tensor, "m n"], H: Float[Tensor, "n n"]) -> float:
    """tr(X H X^T), what X makes of inputs with second moments H."""
    return float(_energy(X, H))


def _energy(X: Tensor, H: Tensor) -> Tensor:
    X, H = X.double(), H.double()
    return ((X @ H) * X).sum()


def _scale_block_columns(A: Tensor, blocks: Tensor) -> Tensor:
    if blocks.shape[-1] == 1:  # the same product, without a batch of n^2 tiny ones
        return A * blocks.flatten()
    columns = A.reshape(len(A), len(blocks), 1, -1)  # [n, n/dim, 1, dim]
    return (columns @ blocks).reshape(A.shape)
