"""Where EM starts: k vectors of each group, chosen by one of three rules (GPTVQ)."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int64
from torch import Tensor

FEW = 4096  # vectors of a group
DAMP = 0.01  # of the mean variance: a group may lie on a line
Rule = Callable[[Tensor, Tensor, int, torch.Generator | None], Tensor]


def mahalanobis(
    V: Float[Tensor, "groups n d"],
    weight: Float[Tensor, "groups n d"],
    k: int,
    rng: torch.Generator | None,
) -> Float[Tensor, "groups k d"]:
    """The vectors at k evenly spaced ranks of the Mahalanobis distance to the mean of the group."""
    centred = V - V.mean(1, keepdim=True)
    cov = centred.mT @ centred / V.shape[1]
    variance = cov.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    eye = torch.eye(V.shape[2], dtype=V.dtype, device=V.device)
    cov = cov + (DAMP * variance).clamp_min(torch.finfo(V.dtype).tiny ** 0.5) * eye
    distances = (centred @ torch.linalg.inv(cov) * centred).sum(2)
    return _take(V, distances.argsort(dim=1, stable=True)[:, _middles(V.shape[1], k, V.device)])


def kpp(
    V: Float[Tensor, "groups n d"],
    weight: Float[Tensor, "groups n d"],
    k: int,
    rng: torch.Generator | None,
) -> Float[Tensor, "groups k d"]:
    """k-means++ (Arthur and Vassilvitskii): the next vector is drawn in proportion to its error.

    Of many vectors a sample is looked at: EM forgets the difference. Without rng, seed 0 draws.
    """
    rng = rng or torch.Generator().manual_seed(0)
    if V.shape[1] > (few := max(FEW, 16 * k)):
        some = torch.randperm(V.shape[1], generator=rng)[:few].to(V.device)
        V, weight = V[:, some], weight[:, some]
    groups, n, _ = V.shape
    chosen = torch.empty(groups, k, dtype=torch.long, device=V.device)
    draws = torch.rand(k, groups, generator=rng).to(V)
    errors = torch.full_like(V[..., 0], torch.inf)
    shares = weight.sum(2)
    for i in range(k):
        total = shares.cumsum(1)
        at = torch.searchsorted(total, draws[i, :, None] * total[:, -1:], right=True)
        chosen[:, i] = at.squeeze(1).clamp_max(n - 1)
        new = _take(V, chosen[:, i : i + 1])
        errors = torch.minimum(errors, (weight * (V - new).square()).sum(2))
        shares = errors
    return _take(V, chosen)


def cdf(
    V: Float[Tensor, "groups n 1"],
    weight: Float[Tensor, "groups n 1"],
    k: int,
    rng: torch.Generator | None,
) -> Float[Tensor, "groups k 1"]:
    """The quantiles (i + 1/2) / k."""
    return V.sort(1).values[:, _middles(V.shape[1], k, V.device)]


SEEDS: dict[str, Rule] = {"mahalanobis": mahalanobis, "kpp": kpp, "cdf": cdf}


def _middles(n: int, k: int, device: torch.device) -> Int64[Tensor, " k"]:
    """The ranks in the middle of k equal parts of n."""
    return ((torch.arange(k, device=device) + 0.5) * n / k).long().clamp_max(n - 1)


def _take(V: Tensor, at: Tensor) -> Tensor:
    return V.gather(1, at[..., None].expand(-1, -1, V.shape[2]))
