"""What needs no feedback: the best range for Gaussian weights, and how flat rotations make H."""

import math
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from jaxtyping import Float
from scipy.optimize import minimize_scalar
from scipy.special import ndtr
from scipy.stats import beta
from torch import Tensor

from quip.codebooks import RmsGrid
from quip.matrix.books import PAPERS_RHO
from quip.research.theory.claims import Claim, Settings, mean
from quip.transforms import rotation

BATCHES = 16  # of Gaussian weights, each fitted by itself
SIZES = {256: 16, 1024: 16, 2304: 4}  # n: rotations drawn; at 2304 a Haar matrix takes a second


def ranges(settings: Settings) -> Iterator[Claim]:
    """The best rho for N(0, 1) on 2^b levels rho (2q / (2^b - 1) - 1), and mean squared errors."""
    claim = partial(Claim, relation="=")
    size = max(2, settings.rows * settings.n // BATCHES)
    for bits in (2, 3, 4):
        rng = settings.rng(f"Gaussian {bits}")
        batches = [torch.randn(size, 1, generator=rng, dtype=torch.float64) for _ in range(BATCHES)]
        best = best_rho(bits)
        near = tuple((best * torch.linspace(0.9, 1.1, 41, dtype=torch.float64)).tolist())
        yield claim(
            name=f"{bits} bits, the best of 41 fitted to weights",
            quantity="rho",
            formula="least of the integral",
            predicted=best,
            tolerance=0.01,  # around its minimum the error is flat
            **mean(torch.stack([_fitted_rho(X, bits, near) for X in batches])),
        )
        for rho in (best, PAPERS_RHO):
            yield claim(
                name=f"{bits} bits, rho {rho:.3f}",
                quantity="MSE / sigma^2",
                formula="the integral",
                predicted=gaussian_error(bits, rho),
                **mean(torch.stack([_error(X, bits, rho) for X in batches])),
            )


def rotations(settings: Settings) -> Iterator[Claim]:
    """mu = sqrt(n) max |R_ij|, the incoherence that a rotation gives to a diagonal H.

    The formula is the expected maximum if all entries of a factor were independent; for a
    Kronecker product that of one factor times that of the other.
    """
    claim = partial(Claim, quantity="mu", relation="=", tolerance=0.05)
    for n, draws in SIZES.items():
        rng, eye = settings.rng(f"rotation {n}"), torch.eye(n, dtype=torch.float64)
        p, q = rotation.balanced_factors(n)
        draw = partial(rotation.Rotation.draw, n, rng, blocked=False, mix=True, shuffle=True)
        yield claim(
            name=f"Kronecker, n = {n}",
            formula=f"mu({p}) mu({q})" if p != q else f"mu({p})^2",
            predicted=expected_mu(p) * expected_mu(q),
            **mean(torch.stack([_mu(draw().rotate(eye)) for _ in range(draws)])),
        )
        yield claim(
            name=f"Haar, n = {n}",
            formula=f"mu({n})",
            predicted=expected_mu(n),
            **mean(
                torch.stack([_mu(rotation.Haar.draw(n, rng).matrices[0]) for _ in range(draws)])
            ),
        )


def gaussian_error(bits: int, rho: float) -> float:
    """E (x - w_hat(x))^2 for x of N(0, 1) and the levels c_q = rho (2q / (2^b - 1) - 1).

    With cells (a, b): (1 + c^2) (Phi(b) - Phi(a)) - [x phi(x) - 2c phi(x)] from a to b, summed.
    """
    levels = rho * (2 * np.arange(2**bits) / (2**bits - 1) - 1)
    inner = (levels[1:] + levels[:-1]) / 2
    edges = np.concatenate([[-40.0], inner, [40.0]])  # beyond, the density is 0 in float64
    density = np.exp(-(edges**2) / 2) / math.sqrt(2 * math.pi)
    first = -np.diff(density)  # integral of x phi
    second = np.diff(ndtr(edges) - edges * density)  # integral of x^2 phi
    return float((second - 2 * levels * first + levels**2 * np.diff(ndtr(edges))).sum())


def best_rho(bits: int) -> float:
    """The rho with the least `gaussian_error`."""
    found = minimize_scalar(
        partial(gaussian_error, bits), bounds=(1, 5), method="bounded", options={"xatol": 1e-6}
    )
    return float(found.x)


def expected_mu(n: int) -> float:
    """sqrt(n) E max |Q_ij| over n^2 independent entries, each with Q_ij^2 of Beta(1/2, (n - 1)/2).

    Entries of a Haar matrix have this law, and are nearly independent.
    """
    z = np.linspace(0, math.sqrt(n), 40_001)
    below = beta.cdf(z**2 / n, 0.5, (n - 1) / 2) ** (n * n)
    return float(np.trapezoid(1 - below, z))


def _fitted_rho(X: Float[Tensor, "m 1"], bits: int, rhos: tuple[float, ...]) -> Float[Tensor, ""]:
    book = _fit(X, bits, rhos)
    return book.step * book.top / 2 / X.square().mean().sqrt()


def _error(X: Float[Tensor, "m 1"], bits: int, rho: float) -> Float[Tensor, ""]:
    return (_fit(X, bits, (rho,)).snap(X) - X).square().mean() / X.square().mean()


def _fit(X: Float[Tensor, "m 1"], bits: int, rhos: tuple[float, ...]) -> RmsGrid:
    ones = torch.ones(1, dtype=X.dtype)
    return RmsGrid(bits=bits, rhos=rhos, step_dtype=torch.float64).fit(X, ones)


def _mu(R: Float[Tensor, "n n"]) -> Float[Tensor, ""]:
    return len(R) ** 0.5 * R.abs().max()
