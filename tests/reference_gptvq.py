"""The oracle of GPTVQ: learned vector codebooks in a sweep, in float64, slow and plain.

Written from the paper (arXiv 2402.15319v2) and from what is known of its published code; nothing of
the package is imported. W is [m, n], one column per input; H is E[x x^T], [n, n], damped by the
caller; H^-1 = U^T U with U upper triangular and u its diagonal. A vector is d adjacent weights of a
row, or d of a column (`down`); a codebook of k = 2^(bits d) centroids serves `rows` x `columns`
weights. Choices that the published code makes wrongly are arguments, whose defaults are right.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

# The metric of errors of d adjacent columns, for each run of them: from U and d to [n / d, d, d].
Metric = Callable[[Tensor, int], Tensor]


# The synthetic problem


def synthetic_problem(
    seed: int, m: int = 256, n: int = 512
) -> tuple[Float64[Tensor, "m n"], Float64[Tensor, "n n"]]:
    """Weights with heavy tails in uneven rows, and H, undamped, of 8n inputs in uneven channels.

    The inputs' covariance has eigenvalues 1 / (1 + i) in a random basis; channels are scaled by
    exp(0.7 N(0, 1)). Weights: Student's t of 6 degrees of freedom, 0.02 exp(0.25 N(0, 1)) a row.
    """
    rng = torch.Generator().manual_seed(seed)
    basis = rotation(n, rng)
    spread = 1 / (1 + torch.arange(n, dtype=torch.float64))
    x = normal(rng, 8 * n, n) * spread.sqrt() @ basis.T * (0.7 * normal(rng, n)).exp()
    t = normal(rng, m, n) / normal(rng, 6, m, n).square().mean(0).sqrt()
    return 0.02 * (0.25 * normal(rng, m, 1)).exp() * t, x.T @ x / len(x)


def normal(rng: torch.Generator, *shape: int) -> Float64[Tensor, "..."]:
    """Independent standard normal numbers."""
    return torch.randn(shape, generator=rng, dtype=torch.float64)


def rotation(n: int, rng: torch.Generator) -> Float64[Tensor, "n n"]:
    """A random orthogonal matrix, dense."""
    return torch.linalg.qr(normal(rng, n, n)).Q


def damp(H: Float64[Tensor, "n n"], alpha: float = 0.01) -> Float64[Tensor, "n n"]:
    """H + alpha mean(diag H) I."""
    return H + alpha * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype)


def trace_loss(
    W: Float64[Tensor, "m n"], W_hat: Float64[Tensor, "m n"], H: Float64[Tensor, "n n"]
) -> float:
    """tr(E H E^T) of E = W - W_hat."""
    E = W - W_hat
    return float(((E @ H) * E).sum())


def decibels(
    W: Float64[Tensor, "m n"], W_hat: Float64[Tensor, "m n"], H: Float64[Tensor, "n n"]
) -> float:
    """10 log10 (tr(W H W^T) / tr(E H E^T)): the signal-to-noise ratio of the outputs."""
    return 10 * math.log10(trace_loss(W, torch.zeros_like(W), H) / trace_loss(W, W_hat, H))


# Metrics


def inverse_factor(H: Float64[Tensor, "n n"]) -> Float64[Tensor, "n n"]:
    """U, upper triangular, with U^T U = H^-1."""
    return torch.linalg.cholesky(torch.linalg.inv(H), upper=True)


def diagonal_metric(weights: Float64[Tensor, " n"], d: int) -> Float64[Tensor, "p d d"]:
    """Weights of single columns as metrics of d columns."""
    return torch.diag_embed(weights.reshape(-1, d))


def unweighted(U: Float64[Tensor, "n n"], d: int) -> Float64[Tensor, "p d d"]:
    """Every column counts 1."""
    return diagonal_metric(torch.ones(len(U), dtype=U.dtype), d)


def inverse_diagonal(U: Float64[Tensor, "n n"], d: int) -> Float64[Tensor, "p d d"]:
    """1 / [H^-1]_ii: the paper's, for EM."""
    return diagonal_metric(1 / U.square().sum(0), d)


def curvature(U: Float64[Tensor, "n n"], d: int) -> Float64[Tensor, "p d d"]:
    """1 / u_i^2: what an error of column i costs once the columns before it are fixed."""
    return diagonal_metric(U.diagonal() ** -2, d)


def published_for_em(U: Float64[Tensor, "n n"], d: int) -> Float64[Tensor, "p d d"]:
    """u_i, large where errors are cheap: the published code's, for EM."""
    return diagonal_metric(U.diagonal(), d)


def published_for_lookup(U: Float64[Tensor, "n n"], d: int) -> Float64[Tensor, "p d d"]:
    """1 / u_i: the published code's, for the nearest centroid."""
    return diagonal_metric(1 / U.diagonal(), d)


def full_curvature(U: Float64[Tensor, "n n"], d: int) -> Float64[Tensor, "p d d"]:
    """U_PP^-1 U_PP^-T: the metric whose diagonal form is `curvature`."""
    blocks = [torch.linalg.inv(U[i : i + d, i : i + d]) for i in range(0, len(U), d)]
    return torch.stack([block @ block.T for block in blocks])


# Codebooks of one group: X are N vectors, D their metrics


def nearest(
    X: Float64[Tensor, "N d"], D: Float64[Tensor, "N d d"], C: Float64[Tensor, "k d"]
) -> tuple[Int64[Tensor, " N"], Float64[Tensor, " N"]]:
    """argmin_c (x - c)^T D (x - c), and the distance there."""
    known = torch.einsum("nd,nde,ne->n", X, D, X)
    squares = torch.einsum("kd,ke->kde", C, C).flatten(1)
    mixed = torch.einsum("nde,ne->nd", D, X)
    distance, codes = (D.flatten(1) @ squares.T - 2 * mixed @ C.T).min(1)
    return codes, (known + distance).clamp(min=0)


def mahalanobis_seeds(
    X: Float64[Tensor, "N d"], D: Float64[Tensor, "N d d"], k: int, rng: torch.Generator
) -> Float64[Tensor, "k d"]:
    """k equally spaced ranks of the Mahalanobis distance to the mean; the covariance is damped."""
    centred = X - X.mean(0)
    covariance = damp(centred.T @ centred / len(X))
    distance = torch.einsum("nd,de,ne->n", centred, torch.linalg.pinv(covariance), centred)
    return X[distance.argsort()[equally_spaced(len(X), k)]]


def cdf_seeds(
    X: Float64[Tensor, "N d"], D: Float64[Tensor, "N d d"], k: int, rng: torch.Generator
) -> Float64[Tensor, "k d"]:
    """k equally spaced ranks of the values themselves, d = 1."""
    assert X.shape[1] == 1
    return X[X[:, 0].argsort()[equally_spaced(len(X), k)]]


def equally_spaced(N: int, k: int) -> Int64[Tensor, " k"]:
    """The middles of k equal parts of 0 ... N - 1."""
    return ((torch.arange(k) + 0.5) * N / k).long()


def spread_seeds(
    X: Float64[Tensor, "N d"],
    D: Float64[Tensor, "N d d"],
    k: int,
    rng: torch.Generator,
    power: float = 1,
) -> Float64[Tensor, "k d"]:
    """k-means++: each seed is drawn in proportion to its squared distance to those before it.

    With power 1/2 in proportion to the distance, as in the published code.
    """
    chosen, distance = (
        [torch.randint(len(X), (1,), generator=rng)],
        torch.full_like(X[:, 0], torch.inf),
    )
    for _ in range(k - 1):
        distance = distance.minimum(nearest(X, D, X[chosen[-1]])[1])
        chosen.append(torch.multinomial(distance**power, 1, generator=rng))
    return X[torch.cat(chosen)]


def fit(
    X: Float64[Tensor, "N d"],
    D: Float64[Tensor, "N d d"],
    C: Float64[Tensor, "k d"],
    iterations: int,
    *,
    reseed: bool = True,
) -> Float64[Tensor, "k d"]:
    """EM from the seeds C: x to its nearest centroid, then c = (sum D_x)^+ sum D_x x.

    Empty clusters are moved to the vectors that are served worst, or left to collapse to 0.
    """
    k, d = C.shape
    for _ in range(iterations):
        codes, distance = nearest(X, D, C)
        A = torch.zeros(k, d, d, dtype=X.dtype).index_add_(0, codes, D)
        b = torch.zeros(k, d, dtype=X.dtype).index_add_(0, codes, torch.einsum("nde,ne->nd", D, X))
        C = torch.einsum("kde,ke->kd", torch.linalg.pinv(A, hermitian=True), b)
        empty = torch.bincount(codes, minlength=k) == 0
        if reseed and empty.any():
            C[empty] = X[distance.topk(int(empty.sum())).indices]
    return C


def rounded(C: Float64[Tensor, "*books k d"], bits: int | None) -> Float64[Tensor, "*books k d"]:
    """Symmetric whole numbers of `bits` bits times one scale a codebook."""
    if bits is None:
        return C
    top = 2 ** (bits - 1) - 1
    scale = C.abs().amax((-2, -1), keepdim=True) / top
    return torch.where(scale > 0, scale * (C / scale).round(), 0.0)


# Block scales


def log_scales(X: Float64[Tensor, "m g"], size: int) -> Float64[Tensor, "m g"]:
    """max|x| of each `size` weights of a row, as exp(z + a q), q = 0 ... 15, z and a for all rows.

    The smallest logarithm is z, and the range of the logarithms 15 a.
    """
    s = X.abs().reshape(len(X), -1, size).amax(2).clamp(min=1e-30).log()
    z = s.min()
    a = ((s.max() - z) / 15).clamp(min=1e-30)
    return (z + a * ((s - z) / a).round()).exp().repeat_interleave(size, 1)


# The sweep


@dataclass
class Quantized:
    """What a sweep decides: W_hat = scales times the centroids `books[index]`, laid as vectors."""

    index: Int64[Tensor, "a b"]  # of each vector, among the centroids of all codebooks
    books: Float64[Tensor, "count k d"]  # a column group's row groups, then the next column group's
    scales: Float64[Tensor, "m n"]
    down: bool

    def decode(self, books: Float64[Tensor, "count k d"] | None = None) -> Float64[Tensor, "m n"]:
        """W_hat, or what other centroids would make of the same codes: linear in them."""
        C = (self.books if books is None else books).flatten(0, 1)
        return matrix(C[self.index], self.down) * self.scales


def vectors(X: Float64[Tensor, "m n"], d: int, down: bool) -> Float64[Tensor, "a b d"]:
    """The vectors of a matrix: d adjacent weights of a row, or of a column."""
    return X.T.reshape(X.shape[1], -1, d).mT.permute(2, 0, 1) if down else X.reshape(len(X), -1, d)


def matrix(V: Float64[Tensor, "a b d"], down: bool) -> Float64[Tensor, "m n"]:
    """The matrix of these vectors."""
    return V.permute(0, 2, 1).flatten(0, 1) if down else V.flatten(1)


def row_groups(rows: int, size: int) -> Int64[Tensor, " rows"]:
    """The group of each row: near to `size` rows each, the first ones longer by one if need be."""
    count = max(1, round(rows / size))
    sizes = [rows // count + (i < rows % count) for i in range(count)]
    return torch.arange(count).repeat_interleave(torch.tensor(sizes))


def sweep(
    W: Float64[Tensor, "m n"],
    H: Float64[Tensor, "n n"],
    *,
    d: int,
    rows: int,
    columns: int = 256,
    bits: int = 2,
    em: Metric = curvature,
    lookup: Metric = curvature,
    iterations: int = 40,
    seeds: Callable[..., Tensor] = mahalanobis_seeds,
    reseed: bool = True,
    codebook_bits: int | None = 8,
    scaling: int | None = None,
    scaled_errors: bool = False,
    stale: bool = False,
    exact: bool = False,
    feedback: bool = True,
    down: bool = False,
    rng: torch.Generator | None = None,
) -> Quantized:
    """GPTVQ without the update of its codebooks.

    At the start of a group of columns its block scales (of `scaling` weights each) and then its
    codebooks are fitted to the running weights X. For the columns P of the next vectors,
    Q_P = nearest centroid, and X_rest <- X_rest - (X_P - Q_P) T^-1 U_P,rest, where T = U_PP
    (`exact`) or its diagonal. `scaled_errors` weighs errors of scaled weights in EM by the square
    of their scale, which the paper does not. `stale` looks up the scaled weights as they were at
    the start of their 128 columns, which the published code does.
    """
    (m, n), k, width = W.shape, 2 ** (bits * d), 1 if down else d
    rng = rng or torch.Generator().manual_seed(0)
    U = inverse_factor(H)
    D_em, D_lookup = (vector_metrics(metric, U, d, down) for metric in (em, lookup))
    group = row_groups(m // d if down else m, rows // d if down else rows)
    count = int(group.max()) + 1
    X, S, index, books = W.clone(), torch.ones_like(W), [], torch.empty(0, k, d, dtype=W.dtype)
    seen = X.clone()
    for lo in range(0, n, width):
        if lo % columns == 0:
            here, first = slice(lo, min(lo + columns, n)), len(books)
            if scaling is not None:
                S[:, here] = log_scales(X[:, here], scaling)
            V = vectors(X[:, here] / S[:, here], d, down)
            D = D_em[here.start // width : here.stop // width].expand(len(V), -1, -1, -1)
            if scaled_errors:
                D = D * vectors(S[:, here], d, down)[..., None] ** 2
            for g in range(count):
                V_g, D_g = V[group == g].flatten(0, 1), D[group == g].flatten(0, 1)
                C = fit(V_g, D_g, seeds(V_g, D_g, k, rng), iterations, reseed=reseed)
                books = torch.cat([books, rounded(C, codebook_bits)[None]])
        P, rest = slice(lo, lo + width), slice(lo + width, n)
        if lo % 128 == 0 or not stale:
            seen = X.clone()
        x = vectors(seen[:, P] / S[:, P], d, down)[:, 0]
        candidates = books[first:][group]
        E = x[:, None] - candidates
        cost = torch.einsum("akd,de,ake->ak", E, D_lookup[lo // width], E)
        index.append(k * (first + group) + cost.argmin(1))
        Q = matrix(books.flatten(0, 1)[index[-1]][:, None], down) * S[:, P]
        if feedback:
            T = U[P, P] if exact else U[P, P].diagonal().diag()
            X[:, rest] -= (X[:, P] - Q) @ torch.linalg.inv(T) @ U[P, rest]
    return Quantized(torch.stack(index, 1), books, S, down)


def vector_metrics(
    metric: Metric, U: Float64[Tensor, "n n"], d: int, down: bool
) -> Float64[Tensor, "p d d"]:
    """The metric of each vector in a row, or of one in each column, whose weights count alike."""
    return metric(U, 1) * torch.eye(d, dtype=U.dtype) if down else metric(U, d)


# After the sweep


def gather(result: Quantized, G: Float64[Tensor, "m n"]) -> Float64[Tensor, "count k d"]:
    """The transpose of `decode`: what a gradient in W_hat is in the centroids."""
    d = result.books.shape[-1]
    parts = vectors(G * result.scales, d, result.down).flatten(0, 1)
    flat = torch.zeros_like(result.books).flatten(0, 1)
    return flat.index_add_(0, result.index.flatten(), parts).view_as(result.books)


def update_codebooks(
    W: Float64[Tensor, "m n"], H: Float64[Tensor, "n n"], result: Quantized, steps: int = 30
) -> tuple[Quantized, list[float]]:
    """Least squares in the centroids, indices fixed: conjugate gradients on tr(E H E^T).

    Returns centroids that are not rounded, and the loss before the first and after each step.
    """
    C = result.books.clone()
    r = gather(result, (W - result.decode()) @ H)
    p, losses = r.clone(), [trace_loss(W, result.decode(), H)]
    for _ in range(steps):
        if not bool((r != 0).any()):
            break
        Ap = gather(result, result.decode(p) @ H)
        alpha = (r * r).sum() / (p * Ap).sum()
        C, r_next = C + alpha * p, r - alpha * Ap
        p, r = r_next + (r_next * r_next).sum() / (r * r).sum() * p, r_next
        losses.append(trace_loss(W, result.decode(C), H))
    return replace(result, books=C), losses


def guarded_update(
    W: Float64[Tensor, "m n"],
    H: Float64[Tensor, "n n"],
    result: Quantized,
    steps: int = 30,
    codebook_bits: int | None = 8,
) -> Quantized:
    """`update_codebooks` and their rounding, unless the loss has then risen."""
    updated, _ = update_codebooks(W, H, result, steps)
    updated = replace(updated, books=rounded(updated.books, codebook_bits))
    before, after = (trace_loss(W, each.decode(), H) for each in (result, updated))
    return updated if after < before else result


def greedy_pass(
    W: Float64[Tensor, "m n"], H: Float64[Tensor, "n n"], result: Quantized
) -> Quantized:
    """Coordinate descent in the indices, vectors of a row only: column after column of vectors,

    x = w_P + sum_{j not in P} (w_j - w_hat_j) H_jP H_PP^-1 moves to its nearest centroid by H_PP.
    """
    assert not result.down
    (_, k, d), index, Q = result.books.shape, result.index.clone(), result.decode()
    for b in range(index.shape[1]):
        P = slice(b * d, (b + 1) * d)
        E = W - Q
        E[:, P] = 0
        x = W[:, P] + E @ H[:, P] @ torch.linalg.inv(H[P, P])
        book, S = index[:, b] // k, result.scales[:, P]
        error = x[:, None] / S[:, None] - result.books[book]
        code = torch.einsum("akd,de,ake->ak", error, H[P, P], error).argmin(1)
        index[:, b] = k * book + code
        Q[:, P] = result.books[book, code] * S
    return replace(result, index=index)
