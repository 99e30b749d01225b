"""Theorem 1, Lemmas 2 and 3 and Theorem 4: what feedback gains on all whole numbers.

Losses are those of one row of W (the papers' over m). kappa is 12 for nearest and 6 for stochastic
rounding: the inverse mean square of one rounding error. D is LDLQ's diagonal, and
P = (F + I)^-1 = I - K.
"""

from collections.abc import Iterator
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from quip.matrix import feedback
from quip.matrix.linalg import block_ldl, unit_upper_inverse
from quip.research.theory.claims import Claim, Mean, Settings, mean
from quip.research.theory.integers import Integers, round_weights, row_losses
from quip.research.theory.problems import spectral, uniform_weights, with_spectrum

HAIR = 1e-9  # below 1/2, so that float64 noise cannot turn a rounding down


def theorem_1(settings: Settings) -> Iterator[Claim]:
    """L_avg(LDLQ) = (1/kappa) tr D and L_worst(LDLQ) = (1/4) tr D.

    Nearest rounding attains the worst case; for stochastic rounding it is an upper bound, in
    general not reached (docs/divergences.md).
    """
    H = settings.hessian()
    K, D = feedback.ldl(H)
    trace = float(D.sum())
    yield from _averages(settings, H, K, "tr D", trace, name="average")

    bound = partial(Claim, relation="<=", formula="tr D / 4", predicted=trace / 4)
    loss = float(row_losses(*_worst_weights(K), H))
    yield bound(name="worst case, nearest, by construction", quantity="loss", measured=loss)
    W = uniform_weights(settings.rows, settings.n, settings.rng("worst rows"))
    largest = float(row_losses(W, round_weights(W, K, Integers()), H).max())
    quantity = f"largest of {settings.rows} rows"
    yield bound(name="worst case, nearest, rows drawn", quantity=quantity, measured=largest)
    worst = max(_stochastic_means(settings, H, K), key=lambda found: found["measured"])
    quantity = f"largest mean of {settings.samples} rows"
    yield bound(name="worst case, stochastic, rows drawn", quantity=quantity, **worst)


def lemma_3(settings: Settings) -> Iterator[Claim]:
    """Without feedback: L_avg = (1/kappa) tr H, and L_worst(Stoch) = (1/4) tr H at W = 1/2.

    Near has no such bound: W = 1/2 everywhere loses (1/4) 1^T H 1, which can be n / 2 times that.
    """
    H = settings.hessian()
    K, h = feedback.none(H)
    trace = float(h.sum())
    yield from _averages(settings, H, K, "tr H", trace, name="average")

    halves = torch.full((settings.rows, settings.n), 0.5, dtype=torch.float64)
    book = Integers(settings.rng("halves"))
    yield Claim(
        name="worst case, stochastic, W = 1/2",
        quantity="mean loss",
        relation="<=",
        formula="tr H / 4",
        predicted=trace / 4,
        **mean(row_losses(halves, round_weights(halves, K, book), H)),
    )
    half = halves[:1]
    ones = torch.ones_like(H) + torch.eye(len(H), dtype=H.dtype)
    for name, H_near in {"nearest, W = 1/2": H, "the same, H = 11^T + I": ones}.items():
        loss = float(row_losses(half, round_weights(half, K, Integers()), H_near))
        at_half = partial(Claim, name=name, quantity="loss", measured=loss)
        yield at_half(relation="=", formula="1^T H 1 / 4", predicted=float(H_near.sum()) / 4)
    yield at_half(relation=">=", formula="tr H / 4, no bound", predicted=float(ones.trace()) / 4)


def any_feedback(settings: Settings) -> Iterator[Claim]:
    """L_avg = (1/kappa) tr(P H P^T) for any F that depends on H alone; LDLQ's is the least."""
    H = settings.hessian()
    for name, K in _feedbacks(H, settings.rng("feedback noise")).items():
        P = torch.eye(len(H), dtype=H.dtype) - K
        trace = float(((P @ H) * P).sum())
        yield from _averages(settings, H, K, "tr(P H P^T)", trace, name=name)
        yield Claim(
            name=f"{name}, against LDLQ",
            quantity="tr(P H P^T)",
            relation=">=",
            formula="tr D",
            measured=trace,
            predicted=_trace_D(H),
        )


def strictness(settings: Settings) -> Iterator[Claim]:
    """tr D < tr H exactly where H is not diagonal."""
    pair = torch.tensor([[1.0, 0.6], [0.6, 1.0]], dtype=torch.float64)
    yield Claim(
        name="H = [1 0.6; 0.6 1]",
        quantity="tr D",
        relation="=",
        formula="2 - 0.6^2",
        measured=_trace_D(pair),
        predicted=2 - 0.6**2,
    )
    H = settings.hessian()
    claim = partial(Claim, quantity="tr D", formula="tr H", predicted=float(H.trace()))
    yield claim(name="correlated H", relation="<=", measured=_trace_D(H))
    yield claim(name="its diagonal", relation="=", measured=_trace_D(H.diagonal().diag()))


def lemma_2(settings: Settings) -> Iterator[Claim]:
    """tr D <= (mu^2/n) tr(H^1/2)^2. Its corollary for rank k: tr D <= (mu^2 k/n) tr H."""
    n = settings.n
    claim = partial(Claim, quantity="tr D", relation="<=")
    names = {0.0: "equal eigenvalues", 1.0: "eigenvalues 1/i", 3.0: "eigenvalues 1/i^3"}
    for decay, name in names.items():
        H = with_spectrum(_falling(n, decay), settings.rng(f"spectrum {decay}"))
        mu, root = spectral(H)
        yield claim(
            name=name,
            formula="mu^2/n tr(H^1/2)^2",
            measured=_trace_D(H),
            predicted=mu**2 / n * root,
        )
    k = max(1, n // 16)
    values = (k - torch.arange(n, dtype=torch.float64)).clamp(min=0)
    H = with_spectrum(values, settings.rng("low rank"))
    mu, _ = spectral(H)
    H = H + 1e-8 * torch.eye(n, dtype=H.dtype)  # what a Cholesky factor needs
    yield claim(
        name=f"rank {k}",
        formula="mu^2 k/n tr H",
        measured=_trace_D(H),
        predicted=mu**2 * k / n * float(H.trace()),
        tolerance=1e-6,  # for the eigenvalues of 1e-8, which have no part in the bound
    )


def theorem_4(settings: Settings) -> Iterator[Claim]:
    """Among all H with one spectrum, diagonal ones have the largest tr D, which is tr H."""
    for decay in (0.5, 2.0):
        values, rng = _falling(settings.n, decay), settings.rng(f"one spectrum {decay}")
        drawn = max(_trace_D(with_spectrum(values, rng)) for _ in range(settings.samples))
        total = float(values.sum())
        claim = partial(Claim, quantity="tr D", relation="<=", formula="tr H", predicted=total)
        name = f"eigenvalues i^-{decay:g}"
        yield claim(name=f"{name}, largest of {settings.samples} H", measured=drawn)
        yield claim(name=f"{name}, H diagonal", measured=_trace_D(values.diag()))


def _averages(
    settings: Settings,
    H: Float[Tensor, "n n"],
    K: Float[Tensor, "n n"],
    words: str,
    trace: float,
    *,
    name: str,
) -> Iterator[Claim]:
    """Mean losses of uniform weights: trace / 12 for nearest, trace / 6 for stochastic rounding."""
    W = uniform_weights(settings.rows, settings.n, settings.rng("W"))
    for kind, kappa, rng in (("nearest", 12, None), ("stochastic", 6, settings.rng("u"))):
        yield Claim(
            name=f"{name}, {kind}",
            quantity="mean loss",
            relation="=",
            formula=f"{words} / {kappa}",
            predicted=trace / kappa,
            **mean(row_losses(W, round_weights(W, K, Integers(rng)), H)),
        )


def _worst_weights(
    K: Float[Tensor, "n n"],
) -> tuple[Float[Tensor, "1 n"], Float[Tensor, "1 n"]]:
    """(W, W_hat): every target is a hair above 1/2, so that W_hat = 1 and W = 1 - eta P."""
    eye = torch.eye(len(K), dtype=K.dtype)
    W = 1 - torch.full((1, len(K)), 0.5 - HAIR, dtype=K.dtype) @ (eye - K)
    return W, round_weights(W, K, Integers())


def _stochastic_means(
    settings: Settings, H: Float[Tensor, "n n"], K: Float[Tensor, "n n"]
) -> Iterator[Mean]:
    """Mean losses of rows from 1/2 everywhere to uniform on [0, 1], each rounded many times."""
    rng, draws = settings.rng("worst stochastic"), max(2, settings.rows // settings.samples)
    for spread in torch.linspace(0, 1, settings.samples).tolist():
        row = 0.5 + spread * (uniform_weights(1, settings.n, rng) - 0.5)
        W = row.repeat(draws, 1)
        yield mean(row_losses(W, round_weights(W, K, Integers(rng)), H))


def _feedbacks(H: Float[Tensor, "n n"], rng: torch.Generator) -> dict[str, Tensor]:
    """K of rules of feedback that depend on H alone, or on nothing."""
    F = block_ldl(H)[0]
    noise = torch.randn(H.shape, generator=rng, dtype=H.dtype).triu(1)
    eye = torch.eye(len(H), dtype=H.dtype)
    return {
        "none": feedback.none(H)[0],
        "greedy": feedback.coordinate(H)[0],
        "bounded (c = 0.3)": feedback.admm(H, bound=0.3)[0],
        "half of LDLQ's": eye - unit_upper_inverse(F / 2),
        "LDLQ's and noise": eye - unit_upper_inverse(F + 0.02 * noise),
    }


def _falling(n: int, decay: float) -> Float[Tensor, " n"]:
    """i^-decay for i = 1 ... n."""
    return torch.arange(1, n + 1, dtype=torch.float64) ** -decay


def _trace_D(H: Float[Tensor, "n n"]) -> float:
    return float(feedback.ldl(H)[1].sum())
