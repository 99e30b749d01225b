"""Round the columns of a panel to a lattice, eight at a time, each with the errors of those before.

    x_b = X_b + sum_{a<b} eta_a K[a, b]     c_b = the point nearest to x_b / scale_b
    eta_b = x_b - scale_b c_b, or base_b - scale_b c_b given a base

A column of W is a contiguous row of X, eta and base, drawn in quip/matrix/panel.py, which does the
same for any codebook; a row of codes and a scale belong to a block of eight of them. Of `kept` =
(codes, metrics), the codes stay wherever the new one is no nearer to x_b in the metric.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from quip.kernels.lattice_points import Stage, decode, errors, nearest
from quip.kernels.lattice_points.tables import DIM

Kept = tuple[Tensor, Tensor]  # codes [b, m], metrics [b, 8, 8]
LEAST = 2.0**-24  # that float16 holds: the scale where all weights are 0, since no point is


def round_blocks(
    X: Float[Tensor, "n m"],
    K: Float[Tensor, "n n"],
    eta: Float[Tensor, "n m"],
    scales: Float[Tensor, " #b"],
    stages: Sequence[Stage],
    *,
    ratio: float | None,
    base: Float[Tensor, "n m"] | None = None,
    kept: Kept | None = None,
) -> Integer[Tensor, "b m"]:
    """The codes of the columns X, whose blocks share a scale or have one each; eta gets errors."""
    scale = scales.expand(len(X) // DIM)
    return _each(X, K, eta, lambda b, x: scale[b], stages, ratio, base, kept)


def fit_and_round_blocks(
    X: Float[Tensor, "n m"],
    K: Float[Tensor, "n n"],
    eta: Float[Tensor, "n m"],
    h: Float[Tensor, " n"],
    rhos: Float[Tensor, " candidates"],
    stages: Sequence[Stage],
    *,
    ratio: float | None,
) -> tuple[Integer[Tensor, "b m"], Float[Tensor, " b"]]:
    """(codes, scales): each block gets a scale of its own just before it is rounded.

    It is that of `candidate_scales` whose points are nearest to x_b in squares weighted by h.
    """
    scales = X.new_empty(len(X) // DIM)

    def fitted(b: int, x: Tensor) -> Tensor:
        scales[b] = fitted_scale(x, h[DIM * b : DIM * (b + 1)], rhos, stages, ratio)
        return scales[b]

    return _each(X, K, eta, fitted, stages, ratio, None, None), scales


def candidate_scales(
    X: Float[Tensor, "m g"], rhos: Float[Tensor, " candidates"]
) -> Float[Tensor, " candidates"]:
    """RMS(X) / rho, rounded to the eight bits of mantissa of bfloat16; LEAST where all X are 0."""
    scales = X.square().mean().sqrt() / rhos
    none = ~(scales > 0)
    scales = scales.clamp_min(torch.finfo(torch.float32).tiny).masked_fill(none, LEAST)
    return scales.bfloat16().to(scales.dtype)


def fitted_scale(
    X: Float[Tensor, "m g"],
    h: Float[Tensor, " g"],
    rhos: Float[Tensor, " candidates"],
    stages: Sequence[Stage],
    ratio: float | None,
) -> Float[Tensor, ""]:
    """The scale, of `candidate_scales`, with the least sum of h_k |x_k - w_hat_k|^2.

    Nothing waits for a device.
    """
    scales = candidate_scales(X, rhos)
    if len(scales) == 1:
        return scales[0]
    return scales.take(errors(X, h, stages, scales=scales, ratio=ratio).argmin())


def _each(
    X: Tensor,
    K: Tensor,
    eta: Tensor,
    scale_of: Callable[[int, Tensor], Tensor],
    stages: Sequence[Stage],
    ratio: float | None,
    base: Tensor | None,
    kept: Kept | None,
) -> Tensor:
    """The blocks in order."""
    codes = []
    for b, lo in enumerate(range(0, len(X), DIM)):
        span = slice(lo, lo + DIM)
        x = torch.addmm(X[span], K[:lo, span].T, eta[:lo]).T if lo else X[span].T  # [m, 8]
        scale = scale_of(b, x)
        code = nearest(x, stages, scale=scale, ratio=ratio)
        w_hat = _decoded(code, stages, scale, ratio)
        if kept is not None:
            old = kept[0][b].to(code.dtype)
            old_w_hat = _decoded(old, stages, scale, ratio)
            nearer = _norms(x - old_w_hat, kept[1][b]) > _norms(x - w_hat, kept[1][b])
            code = torch.where(nearer, code, old)
            w_hat = torch.where(nearer[:, None], w_hat, old_w_hat)
        codes.append(code)
        eta[span] = ((x if base is None else base[span].T) - w_hat).T
    return torch.stack(codes)


def _decoded(codes: Tensor, stages: Sequence[Stage], scale: Tensor, ratio: float | None) -> Tensor:
    return decode(codes[:, None], stages, scale[None], group=None, ratio=ratio)


def _norms(e: Float[Tensor, "m 8"], metric: Float[Tensor, "8 8"]) -> Float[Tensor, " m"]:
    return ((e @ metric) * e).sum(1)
