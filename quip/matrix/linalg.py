"""Factorisations in double precision that fail by name, and the loss that all methods minimise."""

import torch
from jaxtyping import Float
from torch import Tensor

from quip.errors import NotPositiveDefinite

STRIP = 256  # rows or columns that are worked on at once, in the memory of their matrix
BATCH = 2**19  # numbers in the blocks that a strip is multiplied by
TILE = 512, 512  # rows of X, columns of H in float64 at once, while X H is computed


def cholesky(H: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """The lower triangular L with H = L L^T, in float64.

    Raises:
        NotPositiveDefinite: with the smallest eigenvalue, or saying that H is not finite.
    """
    L, info = torch.linalg.cholesky_ex(H.double())
    if _is_factor(L, info):
        return L
    raise _failure(H)


def block_ldl(
    H: Float[Tensor, "n n"], dim: int = 1, *, in_place: bool = False
) -> tuple[Float[Tensor, "n n"], Float[Tensor, "blocks dim dim"]]:
    """(U, D) with H = (I + U) D (I + U)^T, U strictly block upper and D block diagonal.

    Blocks are `dim` wide; n must be a multiple of it. The factor is upper, not lower, because
    the sweep goes left to right (QuIP, section 3; QuIP#, section 4.2 for dim > 1). With `in_place`
    U takes the memory of H, in float64 and contiguous, which is lost even where this fails.
    Raises NotPositiveDefinite, with the smallest eigenvalue unless H is lost.
    """
    A = H if in_place else H.to(torch.float64, copy=True, memory_format=torch.contiguous_format)
    reverse(A)
    mirror(A)
    L = A.T
    info = torch.empty(0, dtype=torch.int32, device=A.device)
    torch.linalg.cholesky_ex(L, out=(L, info))
    if not _is_factor(L, info):
        raise NotPositiveDefinite("it has no Cholesky factor") if in_place else _failure(H)
    reverse(A)
    C = A.T  # H = C C^T, C upper
    corners = diagonal_blocks(C, dim)
    inverses, D = torch.linalg.inv(corners), corners @ corners.mT
    _scale_block_columns(C, inverses, C)
    _keep_strictly_block_upper(C, dim)
    return C, D


def unit_upper_inverse(U: Float[Tensor, "n n"], *, in_place: bool = False) -> Float[Tensor, "n n"]:
    """(I + U)^-1 for strictly (block) upper U, with `in_place` in the memory of U."""
    X, n = U if in_place else U.clone(), len(U)
    for lo in reversed(range(0, n, STRIP)):  # columns after these meet zeros alone
        hi = min(lo + STRIP, n)
        columns = X.new_zeros(hi - lo, n).T
        columns[lo:hi].fill_diagonal_(1)
        torch.linalg.solve_triangular(X, columns, upper=True, unitriangular=True, out=columns)
        X[:, lo:hi] = columns
    return X


def block_jacobi(
    H: Float[Tensor, "n n"], dim: int = 1, dtype: torch.dtype | None = None
) -> Float[Tensor, "n n"]:
    """H times the inverse of its block diagonal: entry (i, j) is H_ij / H_jj for dim = 1.

    Where H_jj is 0, for an input that always is, so is the entry: a pseudo-inverse. Computed in
    the dtype of H, and rounded to `dtype`.
    """
    J = torch.empty_like(H, dtype=dtype or H.dtype)
    if dim == 1:
        D = H.diagonal()
        _scale_block_columns(H, torch.where(D == 0, 0, 1 / D)[:, None, None], J)
        return J
    _scale_block_columns(H, torch.linalg.pinv(diagonal_blocks(H, dim), hermitian=True), J)
    return J


def strictly_block_upper(A: Float[Tensor, "n n"], dim: int = 1) -> Float[Tensor, "n n"]:
    """A above its diagonal blocks of `dim`, and 0 elsewhere."""
    A = A.clone()
    _keep_strictly_block_upper(A, dim)
    return A


def diagonal_blocks(A: Float[Tensor, "n n"], dim: int) -> Float[Tensor, "blocks dim dim"]:
    """The blocks of `dim` along the diagonal; n must be a multiple of it."""
    blocks = A.reshape(len(A) // dim, dim, len(A) // dim, dim)
    return torch.diagonal(blocks, dim1=0, dim2=2).permute(2, 0, 1)


def proxy_loss(
    W: Float[Tensor, "m n"], W_hat: Float[Tensor, "m n"], H: Float[Tensor, "n n"]
) -> float:
    """tr(E H E^T) / tr(W H W^T), where E = W_hat - W (QuIP, equation 1, made relative)."""
    both = torch.stack([_energy(W_hat, H, minus=W), _energy(W, H)])
    error, scale = both.tolist()  # waits for the device once
    return error / scale if scale else error


def energy(X: Float[Tensor, "m n"], H: Float[Tensor, "n n"]) -> float:
    """tr(X H X^T), what X makes of inputs with second moments H."""
    return float(_energy(X, H))


def _energy(X: Tensor, H: Tensor, minus: Tensor | None = None) -> Tensor:
    """tr(E H E^T), E = X or X - minus. Of E H alone, not of E or H, is there a copy in float64."""
    found, (tall, wide) = X.new_empty(X.shape, dtype=torch.float64), TILE
    for lo in range(0, len(X), tall):
        rows = slice(lo, lo + tall)
        E = X[rows].double()
        if minus is not None:
            E = E.sub_(minus[rows]) if X.dtype != torch.float64 else E - minus[rows]
        for left in range(0, len(H), wide):
            columns = slice(left, left + wide)
            found[rows, columns] = E @ H[:, columns].double()
        found[rows].mul_(E)
    return found.sum()


def reverse(A: Float[Tensor, "n n"]) -> None:
    """Reverse the rows and the columns of a contiguous A in place."""
    numbers, step = A.view(-1), STRIP * max(1, len(A))
    half, total = len(numbers) // 2, len(numbers)
    for lo in range(0, half, step):
        hi = min(lo + step, half)
        front, back = numbers[lo:hi], numbers[total - hi : total - lo]
        kept = front.flip(0)
        front.copy_(back.flip(0))
        back.copy_(kept)


def mirror(A: Float[Tensor, "n n"]) -> None:
    """Put the lower triangle, transposed, in place of the upper one.

    Afterwards what is below the diagonal means nothing.
    """
    for lo in range(0, len(A), STRIP):
        rows, hi = slice(lo, lo + STRIP), lo + STRIP
        A[rows, hi:] = A[hi:, rows].T
        A[rows, rows] = A[rows, rows].T.clone()


def _is_factor(L: Tensor, info: Tensor) -> bool:
    return bool((info == 0) & torch.isfinite(L.diagonal()).all())  # waits for the device once


def _failure(H: Tensor) -> NotPositiveDefinite:
    if not bool(torch.isfinite(H).all()):
        return NotPositiveDefinite("the matrix holds NaN or infinity")
    low = float(torch.linalg.eigvalsh(H.double())[0])
    return NotPositiveDefinite(f"the smallest eigenvalue is {low:.2e}")


def _keep_strictly_block_upper(A: Tensor, dim: int) -> None:
    block = torch.arange(len(A), device=A.device) // dim
    for rows, own in zip(A.split(STRIP), block.split(STRIP), strict=True):
        rows.mul_(own[:, None] < block)


def _scale_block_columns(A: Tensor, blocks: Tensor, out: Tensor) -> None:
    """Write A times a block diagonal matrix to `out`, which may be A."""
    count, dim, _ = blocks.shape
    if dim == 1:  # the same product, without a batch of n^2 tiny ones
        for rows, found in zip(A.split(STRIP), out.split(STRIP), strict=True):
            found.copy_(rows * blocks.flatten())
        return
    strip = max(1, BATCH // (count * dim * dim))
    for rows, found in zip(A.split(strip), out.split(strip), strict=True):
        columns = rows.reshape(len(rows), count, 1, dim)
        found.copy_((columns @ blocks).reshape(rows.shape))
