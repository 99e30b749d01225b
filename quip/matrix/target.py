"""What a matrix is rounded towards where its inputs are wrong already (GPTAQ; Qronos).

x are the inputs that the quantized matrices before a matrix pass on, and x~ those of the original
model. h and h~ is what the output is added to, where that is the residual stream, and 0 elsewhere.

    e = W x~ + h~ - (W x + h)                     what the output lacks
    C = E[e x^T]  =  W (G - H) + R                G = E[x~ x^T], H = E[x x^T], R = E[(h~ - h) x^T]
    W* = W + C (H + lambda I)^-1  =  (W (G + lambda I) + R) (H + lambda I)^-1

    E|W_hat x - W x~ - (h~ - h)|^2  =  tr((W_hat - W*) H (W_hat - W*)^T) + const    for lambda = 0

So W* in place of W is all that a sweep needs, and lambda leaves W alone where H says nothing. Few
tokens are fitted too well by W*: the target is W + alpha (W* - W), alpha in [0, 1]. On tokens that
were held out, where its outputs lack e - alpha (W* - W) x, the best alpha is that of a parabola:

    alpha = tr((W* - W) C'^T) / tr((W* - W) H' (W* - W)^T)
"""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from quip.errors import NotPositiveDefinite
from quip.matrix.linalg import cholesky
from quip.matrix.prepare import damped, dampings


@dataclass(frozen=True, kw_only=True)
class Lack:
    """What the outputs of the matrices of one input x lack, on so many tokens."""

    H: Float[Tensor, "n n"]  # E[x x^T]
    C: Mapping[str, Float[Tensor, "_m n"]]  # E[e x^T] by the name of a matrix
    count: int

    def without(self, part: "Lack") -> "Lack":
        """What is lacking on all tokens but a part of them, of which some must be left."""
        count = self.count - part.count

        def rest(whole: Tensor, of_part: Tensor) -> Tensor:
            return (whole.double() * self.count - of_part.double() * part.count) / count

        C = {name: rest(own, part.C[name]) for name, own in self.C.items()}
        return Lack(H=rest(self.H, part.H), C=C, count=count)


def targets(
    weights: Mapping[str, Float[Tensor, "_m n"]],
    lack: Lack,
    damp: float,
    alpha: float | Lack,
) -> dict[str, tuple[Float[Tensor, "_m n"], Float[Tensor, ""]]]:
    """W + alpha (W* - W) of each matrix, in its own type, and alpha; lambda = damp mean(diag H).

    Where alpha is what the outputs lack on tokens held out, which `lack` has too, it is chosen for
    each matrix by these, once W* was fitted to all others; then W* is fitted to all. Raises
    NotPositiveDefinite as quantizing does.
    """
    found = shifts(lack, damp, weights)
    if isinstance(alpha, Lack):
        fitted = shifts(lack.without(alpha), damp, weights)
        shares = {name: best_share(fitted[name], alpha.C[name], alpha.H) for name in weights}
    else:
        shares = {name: lack.H.new_tensor(alpha, dtype=torch.float64) for name in weights}
    return {
        name: ((W.double() + shares[name] * found[name]).to(W.dtype), shares[name])
        for name, W in weights.items()
    }


def shifts(lack: Lack, damp: float, names: Iterable[str]) -> dict[str, Float64[Tensor, "_m n"]]:
    """W* - W = C (H + lambda I)^-1 of these matrices."""
    factor = _factor(lack.H, damp)
    return {name: torch.cholesky_solve(lack.C[name].double().T, factor).T for name in names}


def best_share(
    shift: Float[Tensor, "m n"], C: Float[Tensor, "m n"], H: Float[Tensor, "n n"]
) -> Float[Tensor, ""]:
    """The alpha in [0, 1] with the least E|alpha shift x - e|^2; 0 for a shift without effect."""
    gained = (shift * C).sum()
    scale = ((shift @ H.double()) * shift).sum()
    return torch.where(scale > 0, gained / scale, 0).clamp(0, 1)


def _factor(H: Tensor, damp: float) -> Tensor:
    """The lower Cholesky factor of the damped H; after a failure of one damped ten times more."""
    *first, last = dampings(damp)
    for tried in first:
        with suppress(NotPositiveDefinite):
            return cholesky(damped(H, tried))
    return cholesky(damped(H, last))
