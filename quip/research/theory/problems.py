"""Weights and Hessians to measure on, drawn from a generator."""

import torch
from jaxtyping import Float
from torch import Tensor

from quip.matrix.hessian import Hessian
from quip.matrix.prepare import damped
from quip.research.hessians.spectrum import Spectrum


def uniform_weights(m: int, n: int, rng: torch.Generator) -> Float[Tensor, "m n"]:
    """Independent entries, uniform on [0, 1]: what the theorems average over."""
    return torch.rand(m, n, generator=rng, dtype=torch.float64)


def correlated_hessian(n: int, rng: torch.Generator, *, damp: float = 0.01) -> Float[Tensor, "n n"]:
    """The damped second moment of 2n random inputs that are correlated and of unequal sizes."""
    mix = torch.randn(n, n, generator=rng, dtype=torch.float64) / n**0.5
    x = torch.randn(2 * n, n, generator=rng, dtype=torch.float64) @ mix
    observed = Hessian(n)
    observed.update(x * torch.rand(n, generator=rng, dtype=torch.float64).add(0.2))
    return damped(observed.value(), damp)


def with_spectrum(values: Float[Tensor, " n"], rng: torch.Generator) -> Float[Tensor, "n n"]:
    """Q diag(values) Q^T with random orthogonal Q."""
    n = len(values)
    Q = torch.linalg.qr(torch.randn(n, n, generator=rng, dtype=torch.float64)).Q
    return (Q * values) @ Q.T


def spectral(H: Float[Tensor, "n n"]) -> tuple[float, float]:
    """(mu, tr(H^1/2)^2), mu = max |Q_ij| sqrt(n) over the eigenvectors that carry H = Q Lambda Q^T.

    QuIP, Definition 1.
    """
    spectrum = Spectrum.of(H)
    mu = float(spectrum.incoherence[: spectrum.rank].max())
    return mu, float(spectrum.values.sqrt().sum()) ** 2
