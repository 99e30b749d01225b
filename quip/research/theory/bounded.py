"""Lemmas 11 to 13: feedback of bounded size, which keeps weights inside a finite grid.

L is the unit upper matrix of QuIP's Algorithm 5: tr(H L^T L) is least while |L e_i|^2 <= 1 + c for
every column; F = L^-1 - I, which makes P = (F + I)^-1 = L.
"""

import math
from collections.abc import Iterator
from functools import partial

import torch

from quip.matrix import feedback
from quip.research.theory.claims import Claim, Settings
from quip.research.theory.integers import Integers, round_weights, row_losses
from quip.research.theory.problems import spectral, uniform_weights

BITS, DELTA, ROWS = 4, 0.1, 16  # of Lemma 13's runs


def lemma_11(settings: Settings) -> Iterator[Claim]:
    """tr(H L^T L) <= mu^2 / (n min(1, c)) tr(H^1/2)^2; the paper prints an equality."""
    claim = partial(Claim, relation="<=")
    H = settings.hessian()
    mu, root = spectral(H)
    for c in (0.05, 0.3, 1.0, 5.0):
        L = torch.eye(len(H), dtype=H.dtype) - feedback.admm(H, bound=c)[0]
        yield claim(
            name=f"c = {c:g}, columns of L",
            quantity="largest |L e_i|^2",
            formula="1 + c",
            measured=float(L.square().sum(0).max()),
            predicted=1 + c,
        )
        yield claim(
            name=f"c = {c:g}",
            quantity="tr(L H L^T)",
            formula="mu^2/(n min(1,c)) tr(H^1/2)^2",
            measured=float(((L @ H) * L).sum()),
            predicted=mu**2 / (len(H) * min(1, c)) * root,
        )


def lemma_12(settings: Settings) -> Iterator[Claim]:
    """P(|(w_hat - w) u| >= |L u| sqrt(log(2/delta) / 2)) <= delta under stochastic rounding.

    One row w is rounded many times; u runs through the eigenvectors of H, and the worst counts.
    """
    H = settings.hessian()
    row = uniform_weights(1, settings.n, settings.rng("one row"))
    W = row.repeat(settings.rows, 1)
    directions = torch.linalg.eigh(H)[1]
    rules = {"LDLQ": feedback.ldl(H)[0], "bounded, c = 0.5": feedback.admm(H, bound=0.5)[0]}
    for name, K in rules.items():
        L = torch.eye(len(H), dtype=H.dtype) - K
        book = Integers(settings.rng(f"lemma 12, {name}"))
        misses = ((round_weights(W, K, book) - W) @ directions).abs()
        lengths = (L @ directions).norm(dim=0)
        for delta in (0.5, 0.1, 0.01):
            far = misses >= lengths * math.sqrt(math.log(2 / delta) / 2)
            share = float(far.double().mean(0).max())
            yield Claim(
                name=f"{name}, delta = {delta:g}",
                quantity="largest share beyond",
                relation="<=",
                formula="delta",
                measured=share,
                predicted=delta,
                std_error=math.sqrt(share * (1 - share) / settings.rows),
            )


def lemma_13(settings: Settings) -> Iterator[Claim]:
    """With c = 2 / log(4mn/delta) and 1 <= w <= 2^b - 2, with probability at least 1 - delta

    no code overflows and the loss is at most (mu^2 m/4n) tr(H^1/2)^2 log^2(4mn/delta).
    """
    claim = partial(Claim, relation="<=")
    runs, n, top = settings.samples, settings.n, 2**BITS - 1
    H = settings.hessian()
    W = 1 + (top - 2) * uniform_weights(runs * ROWS, n, settings.rng("inside the grid"))
    log = math.log(4 * ROWS * n / DELTA)
    codes = round_weights(W, feedback.admm(H, bound=2 / log)[0], Integers(settings.rng("lemma 13")))
    over = ((codes < 0) | (codes > top)).reshape(runs, -1).any(1)
    losses = row_losses(W, codes, H).reshape(runs, -1).sum(1)
    mu, root = spectral(H)
    size = f"{BITS} bits, m = {ROWS}"
    yield claim(
        name=f"{size}, overflow",
        quantity=f"of {runs} runs",
        formula=f"{DELTA:g} x {runs}",
        measured=float(over.sum()),
        predicted=DELTA * runs,
    )
    yield claim(
        name=f"{size}, loss",
        quantity=f"largest of {runs} runs",
        formula="mu^2 m/4n tr(H^1/2)^2 log^2(4mn/delta)",
        measured=float(losses.max()),
        predicted=mu**2 * ROWS / (4 * n) * root * log**2,
    )
