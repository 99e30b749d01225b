"""Section `hessian`: second moments and factorisations.

A row is one of them at one size: `ms`; of second moments of 8192 tokens also `tflops`, counted as
2 tokens n^2, and `error`, the largest difference from float64 relative to the largest entry.
"""

import torch
from _measure import device, emit, milliseconds

from quip.kernels.hessian import add_products
from quip.matrix import feedback
from quip.matrix.hessian import CHUNK, Hessian
from quip.matrix.linalg import cholesky, proxy_loss, unit_upper_inverse

ON = device()
SIZES = (4096, 11008) if ON.type == "cuda" else (96,)
TOKENS = CHUNK if ON.type == "cuda" else 200
TARGETS = {11008: 700}  # TFLOP/s of bfloat16


def main() -> None:
    for n in SIZES:
        x = torch.randn(TOKENS, n, device=ON, generator=torch.Generator(ON).manual_seed(n))
        x += 0.5 * x.roll(1, dims=1)
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            moments(x.to(dtype))
        factorisations((x.T @ x / len(x)).double())


def moments(x: torch.Tensor) -> None:
    """One row: the sums of the tokens of x."""
    n = x.shape[1]
    hessian = Hessian(n, device=ON)
    ms = milliseconds(lambda: hessian.update(x))
    checked = slice(0, min(n, 1024))
    once = torch.zeros(n, n, dtype=torch.float64, device=ON)
    add_products(once, x)
    once = once.tril()
    expected = (x[:, checked].double().T @ x.double()).T.tril()
    error = (once[:, checked] - expected).abs().max() / expected.max()
    kind = str(x.dtype)[6:]
    emit(
        what=f"second moments, {kind}",
        n=n,
        ms=ms,
        tflops=round(2 * len(x) * n * n / ms / 1e9, 1),
        error=float(f"{float(error):.2g}"),
        target_tflops=TARGETS.get(n) if kind == "bfloat16" else None,
    )


def factorisations(H: torch.Tensor) -> None:
    """A row each: what a matrix needs of H before it is rounded, and after."""
    n = len(H)
    H.diagonal().add_(0.01 * H.diagonal().mean())
    U = H.triu(1) / H.diagonal()
    W = torch.randn(min(n, 4096), n, device=ON)
    for what, call in {
        "Cholesky in float64": lambda: cholesky(H),
        "triangular inverse in float64": lambda: unit_upper_inverse(U),
        "feedback of LDLQ": lambda: feedback.ldl(H),
        f"proxy loss of {len(W)} rows": lambda: proxy_loss(W, W, H),
    }.items():
        emit(what=what, n=n, ms=milliseconds(call, repeats=3))


if __name__ == "__main__":
    main()
