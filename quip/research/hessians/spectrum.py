"""What a matrix H = Q diag(lambda) Q^T and weights W are like, in the numbers of QuIP's theory.

The paper's error bounds hold for LDLQ because real H have few large eigenvalues, and because a
rotation makes their eigenvectors and the weights incoherent: no entry stands out (Definition 1).
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from quip.matrix.linalg import cholesky
from quip.transforms import Transform

SHARE = 0.01  # of the largest eigenvalue: the paper's approximate rank


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues, largest first, and in the same order the eigenvectors as columns of Q."""

    values: Float[Tensor, " n"]
    vectors: Float[Tensor, "n n"]

    @classmethod
    def of(cls, H: Float[Tensor, "n n"]) -> "Spectrum":
        """The spectrum of a positive semidefinite H; what rounding made negative is 0."""
        values, vectors = torch.linalg.eigh(H.double())
        return cls(values.flip(0).clamp_min(0), vectors.flip(1))

    def turned(self, T: Transform) -> "Spectrum":
        """The spectrum of B H B^T for the orthogonal B of T: values as here, vectors B q."""
        return replace(self, vectors=T.input(self.vectors.T).T)

    @property
    def rank(self) -> int:
        """The number of eigenvalues above n eps of the largest, eps that of float32.

        A store holds H in float32, which leaves as much where H has no eigenvalue at all.
        """
        return self.above(zero(len(self.values)))

    def above(self, share: float) -> int:
        """The number of eigenvalues above a share of the largest."""
        return int((self.values > share * self.values[0]).sum())

    @cached_property
    def incoherence(self) -> Float[Tensor, " n"]:
        """max_i |Q_ij| sqrt(n) of each eigenvector."""
        return self.vectors.abs().amax(0) * math.sqrt(len(self.values))


def zero(n: int) -> float:
    """The share of the largest eigenvalue up to which one counts as 0."""
    return n * torch.finfo(torch.float32).eps


@dataclass(frozen=True, kw_only=True)
class HessianNumbers:
    """One H. D is LDLQ's (QuIP, section 3), of the damped H; all others are of H undamped.

    So are the bounds, which hold for tr(D) / tr(H) of H undamped (Lemma 2). Damping adds to D:
    where H has little rank, D_backwards may be above them.
    """

    rank: float  # as a fraction of n
    above_1_percent: float  # eigenvalues above 1 % of the largest, as a fraction of n
    D_backwards: float  # tr(D) / tr(H), last column to first: `ldlq`
    D_forwards: float  # first to last: `gptq`
    mu: float  # max |Q_ij| sqrt(n) (Definition 1)
    log10_condition: float  # of the largest eigenvalue over the smallest that is not 0
    root: float  # tr(H^1/2)^2 / (n tr(H))
    bound: float  # mu^2 root (Lemma 2)
    tight_bound: float  # the same with n max_i (H^1/2)_ii / tr(H^1/2) in place of mu^2
    mean_share: float  # |E x|^2 / tr(H): what of H the mean of the inputs explains


def hessian_numbers(
    spectrum: Spectrum, H_damped: Float[Tensor, "n n"], mean: Float[Tensor, " n"]
) -> HessianNumbers:
    """The numbers of an H = E[x x^T] that is not 0, of the H that a run factorises, and of E[x].

    Eigenvectors of eigenvalue 0 are any basis of a null space, which no bound sees: mu leaves
    them out. The proof of Lemma 2 is tr(D) <= max_i (H^1/2)_ii tr(H^1/2) with the diagonal
    bounded by mu^2 tr(H^1/2) / n: hence the tight bound.

    Raises NotPositiveDefinite if the damped H has no Cholesky factor.
    """
    values, n, kept = spectrum.values, len(spectrum.values), spectrum.rank
    roots, trace = values.sqrt(), float(H_damped.diagonal().sum())
    mu, root = float(spectrum.incoherence[:kept].max()), float(roots.sum() ** 2 / values.sum() / n)
    diagonal = spectrum.vectors.square() @ roots  # of H^1/2
    return HessianNumbers(
        rank=kept / n,
        above_1_percent=spectrum.above(SHARE) / n,
        D_backwards=float(cholesky(H_damped).diagonal().square().sum()) / trace,
        D_forwards=float(cholesky(H_damped.flip(0, 1)).diagonal().square().sum()) / trace,
        mu=mu,
        log10_condition=math.log10(values[0] / values[kept - 1]),
        root=root,
        bound=mu**2 * root,
        tight_bound=float(n * diagonal.max() / roots.sum()) * root,
        mean_share=float(mean.square().sum() / values.sum()),
    )


@dataclass(frozen=True, kw_only=True)
class WeightNumbers:
    """One W."""

    mu_W: float  # max |W_ij| sqrt(m n) / |W|_F (Definition 1)
    kurtosis: float  # E (w - E w)^4 / (E (w - E w)^2)^2: 3 for a Gaussian


def weight_numbers(W: Float[Tensor, "m n"]) -> WeightNumbers:
    """The numbers of weights, in float64; 0 where all weights are."""
    W, tiny = W.double(), torch.finfo(torch.float64).tiny
    squares = (W - W.mean()).square()
    return WeightNumbers(
        mu_W=float(W.abs().max() * math.sqrt(W.numel()) / W.norm().clamp_min(tiny)),
        kurtosis=float(squares.square().mean() / squares.mean().square().clamp_min(tiny)),
    )
