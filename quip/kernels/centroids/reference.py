"""Learned centroids in torch: the nearest ones of vectors, and the means of those vectors.

    x = (X[j d, row], ..., X[j d + d - 1, row])      a vector: d adjacent weights of a row of W
    code = argmin_c sum_i h[j d + i] (x_i - c_i)^2   c one of k centroids of the row's group

X [g, m] holds W transposed: a column of W is a contiguous row. Its m rows fall into G groups, the
first m % G of m // G + 1 rows, the others of m // G; `centroids` [G, k, d] has those of each group:

    rows of W -->
    [ 0 0 0 | 1 1 1 | 2 2 ]     row groups, G = 3, m = 8
    [ 0 0 0 | 1 1 1 | 2 2 ]     d columns are a row of codes

Distances are formed for a portion of the vectors at a time, so that memory stays bounded.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from quip.kernels.groups import row_groups

DISTANCES = 2**22  # that exist at a time


def code_dtype(k: int) -> torch.dtype:
    """What holds codes of k centroids."""
    return torch.uint8 if k <= 256 else torch.int32


def assign(
    X: Float[Tensor, "g m"], centroids: Float[Tensor, "G k d"], h: Float[Tensor, " g"]
) -> Integer[Tensor, "g//d m"]:
    """The codes of all vectors, [g / d, m], uint8 if k <= 256; of equally near ones the lowest."""
    (G, k, d), (g, m) = centroids.shape, X.shape
    codes = torch.empty(g // d, m, dtype=code_dtype(k), device=X.device)
    for groups, rows in batches(m, G):
        V, weights = vectors(X[:, rows], groups, d), metric(h, height(groups, rows), d)
        found = _nearest(V, centroids[groups], weights)
        codes[:, rows] = (
            found.view(len(V), g // d, -1).transpose(0, 1).reshape(g // d, -1).to(codes)
        )
    return codes


def improve(
    X: Float[Tensor, "g m"],
    centroids: Float[Tensor, "G k d"],
    h: Float[Tensor, " g"],
    *,
    iterations: int,
    mass: Float[Tensor, "g//d m"] | None = None,
) -> Float[Tensor, "G k d"]:
    """The centroids after so many iterations of Lloyd: assign, then c_i = sum w x_i / sum w.

    w = mass h_i, where `mass` [g / d, m] says how often a vector counts, once without. Where a sum
    of weights is 0 the coordinate stays. Centroids without vectors become those vectors of their
    group that are farthest from theirs (mass times weighted squares), the farthest first, the first
    of [g / d, rows] of equal ones. A group is done once no code of it changes.
    """
    (G, _, d), m = centroids.shape, X.shape[1]
    improved = centroids.clone()
    for groups, rows in batches(m, G):
        V, weights = vectors(X[:, rows], groups, d), metric(h, height(groups, rows), d)
        counts = V.new_ones(len(V), V.shape[1], 1)
        if mass is not None:
            counts = vectors(mass[:, rows], groups, 1)
        improved[groups] = _lloyd(V, improved[groups], weights, counts[..., 0], iterations)
    return improved


def round_columns(
    X: Float[Tensor, "n m"],
    K: Float[Tensor, "n n"],
    eta: Float[Tensor, "n m"],
    h: Float[Tensor, " n"],
    centroids: Float[Tensor, "G k d"],
    *,
    scales: Float[Tensor, "blocks m"] | None = None,
    block: int | None = None,
    base: Float[Tensor, "n m"] | None = None,
    kept: tuple[Integer[Tensor, "n//d m"], Float[Tensor, "n//d d d"]] | None = None,
) -> Integer[Tensor, "n//d m"]:
    """The codes of the columns X, d at a time, each with the errors of those before it.

        x = X[span] + sum_{j<lo} K[j, span] eta[j]     span = lo ... lo + d - 1
        eta[span] = x - s c, or base[span] - s c       c is nearest to x / s in h[span]

    s is that of the row in `scales` for each `block` columns, 1 without. `kept` are codes and a
    metric for each span: a code stays where the new one is no nearer to x in e^T metric e.
    """
    (G, k, d), (n, m) = centroids.shape, X.shape
    group = row_groups(m, G, X.device)
    codes = torch.empty(n // d, m, dtype=code_dtype(k), device=X.device)
    for j, lo in enumerate(range(0, n, d)):
        span = slice(lo, lo + d)
        x = torch.addmm(X[span], K[:lo, span].T, eta[:lo]) if lo else X[span]
        s = x.new_ones(m) if scales is None else scales[lo // (block or n)]
        code = assign(x / s, centroids, h[span])[0].long()
        w_hat = s * centroids[group, code].T
        if kept is not None:
            old = kept[0][j].long()
            w_old = s * centroids[group, old].T
            better = _squares(x - w_old, kept[1][j]) - _squares(x - w_hat, kept[1][j]) > 0
            code, w_hat = torch.where(better, code, old), torch.where(better, w_hat, w_old)
        codes[j] = code
        eta[span] = (x if base is None else base[span]) - w_hat
    return codes


def _squares(e: Tensor, metric: Tensor) -> Float[Tensor, " m"]:
    return ((metric.T @ e) * e).sum(0)


def batches(m: int, G: int) -> Iterator[tuple[slice, slice]]:
    """(groups, their rows): those of one size are served together."""
    size, more = divmod(m, G)
    wide = more * (size + 1)
    for groups, rows in ((slice(0, more), slice(0, wide)), (slice(more, G), slice(wide, m))):
        if rows.start < rows.stop:
            yield groups, rows


def height(groups: slice, rows: slice) -> int:
    """The rows of each group."""
    return (rows.stop - rows.start) // (groups.stop - groups.start)


def vectors(X: Tensor, groups: slice, d: int) -> Float[Tensor, "G vectors d"]:
    """The vectors of each group, those of its first d columns first."""
    G = groups.stop - groups.start
    return X.reshape(len(X) // d, d, G, -1).permute(2, 0, 3, 1).reshape(G, -1, d)


def metric(h: Tensor, height: int, d: int) -> Float[Tensor, "vectors d"]:
    """What the errors of each vector of a group of `height` rows weigh."""
    return h.view(-1, d).repeat_interleave(height, dim=0)


def _nearest(
    V: Float[Tensor, "G N d"], centroids: Float[Tensor, "G k d"], metric: Float[Tensor, "N d"]
) -> Integer[Tensor, "G N"]:
    (G, N, d), k = V.shape, centroids.shape[1]
    codes = torch.empty(G, N, dtype=torch.int64, device=V.device)
    vectors = max(1, min(N, DISTANCES // k))
    groups = max(1, DISTANCES // (k * vectors))
    for first in range(0, G, groups):
        for start in range(0, N, vectors):
            at = slice(first, first + groups), slice(start, start + vectors)
            x, c, weights = V[at], centroids[at[0], None], metric[at[1], None]
            distances = x.new_zeros(1)
            for i in range(d):
                e = x[..., i, None] - c[..., i]
                distances = distances + weights[..., i] * e.square()
            codes[at] = distances.argmin(2)
    return codes


def _lloyd(V: Tensor, centroids: Tensor, metric: Tensor, mass: Tensor, iterations: int) -> Tensor:
    old = None
    for _ in range(iterations):
        codes = _nearest(V, centroids, metric)
        changed = torch.ones_like(codes[:, 0]).bool() if old is None else (codes != old).any(1)
        if not changed.any():
            break
        moved = _means(V, codes, centroids, metric, mass)
        centroids, old = torch.where(changed[:, None, None], moved, centroids), codes
    return centroids


def _means(V: Tensor, codes: Tensor, centroids: Tensor, metric: Tensor, mass: Tensor) -> Tensor:
    G, k, d = centroids.shape
    at = (codes + k * torch.arange(G, device=V.device)[:, None]).view(-1)
    means = torch.empty_like(centroids)
    for i in range(d):  # in double: sums of 10^6 numbers
        weight = (mass.double() * metric[:, i]).reshape(-1)
        zeros = weight.new_zeros(G * k)
        total = zeros.index_add(0, at, weight).view(G, k)
        moment = zeros.index_add(0, at, weight * V[..., i].reshape(-1)).view(G, k)
        means[..., i] = torch.where(total > 0, (moment / total).to(V), centroids[..., i])
    empty = torch.bincount(at, minlength=G * k).view(G, k) == 0
    for group in empty.any(1).nonzero().view(-1):
        e = V[group] - centroids[group, codes[group]]
        error = mass[group] * (metric * e.square()).sum(1)
        worst = error.sort(descending=True, stable=True).indices[: int(empty[group].sum())]
        rank = (empty[group].cumsum(0) - 1)[empty[group]].clamp_max(len(worst) - 1)
        means[group, empty[group]] = V[group, worst[rank]]
    return means
