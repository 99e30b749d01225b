"""Independent oracles: the papers' mathematics in float64, slow and plain.

Written from the equations alone (QuIP, arXiv 2307.13304; OPTQ, arXiv 2210.17323; BlockLDLQ,
arXiv 2402.04396); nothing of the package is imported. W is [m, n], one column per input; H is
E[x x^T], [n, n]; F is the papers' strictly upper feedback matrix. Codes are whole numbers
0 ... 2^bits - 1 kept in float64. Wherever an algorithm takes a rounding Q, Q maps one column [m]
to its rounded values; an order is a permutation p, and column p[0] is rounded first.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

Rounding = Callable[[Tensor], Tensor]


def nearest(t: Float64[Tensor, "*m"], bits: int | None = None) -> Float64[Tensor, "*m"]:
    """Q(t) = floor(t + 1/2), so ties go up; clamped to the codes if there are bits."""
    q = torch.floor(t + 0.5)
    return q if bits is None else q.clamp(0, 2**bits - 1)


def stochastic(t: Float64[Tensor, " m"], rng: torch.Generator) -> Float64[Tensor, " m"]:
    """Q(t) = floor(t + u) with u uniform on [0, 1), so E Q(t) = t."""
    return torch.floor(t + torch.rand(t.shape, generator=rng, dtype=t.dtype))


# Orders


def natural(H: Float64[Tensor, "n n"]) -> Int64[Tensor, " n"]:
    """First to last: OPTQ's order."""
    return torch.arange(len(H))


def backwards(H: Float64[Tensor, "n n"]) -> Int64[Tensor, " n"]:
    """Last to first."""
    return torch.arange(len(H)).flip(0)


def largest_first(H: Float64[Tensor, "n n"]) -> Int64[Tensor, " n"]:
    """By falling diagonal of H; equals keep their order."""
    return torch.tensor(sorted(range(len(H)), key=lambda j: -float(H[j, j])))


# Losses


def trace_loss(
    W: Float64[Tensor, "m n"], W_hat: Float64[Tensor, "m n"], H: Float64[Tensor, "n n"]
) -> float:
    """l = tr((W_hat - W) H (W_hat - W)^T)."""
    E = W_hat - W
    return float(((E @ H) * E).sum())


def proxy_loss(
    W: Float64[Tensor, "m n"], W_hat: Float64[Tensor, "m n"], H: Float64[Tensor, "n n"]
) -> float:
    """tr((W_hat - W) H (W_hat - W)^T) / tr(W H W^T)."""
    return trace_loss(W, W_hat, H) / float(((W @ H) * W).sum())


# Linear feedback: LDLQ and OPTQ


def ldl(H: Float64[Tensor, "n n"]) -> tuple[Float64[Tensor, "n n"], Float64[Tensor, " n"]]:
    """F and the diagonal of D in H = (F + I) D (F + I)^T, F strictly upper.

    Flip H, factor, flip back: H = C C^T with C upper, F = C diag(C)^-1 - I, D = diag(C)^2.
    """
    C = torch.linalg.cholesky(H.flip(0, 1)).flip(0, 1)
    return C / C.diagonal() - torch.eye(len(H), dtype=H.dtype), C.diagonal() ** 2


def round_with_feedback(
    W: Float64[Tensor, "m n"], F: Float64[Tensor, "n n"], Q: Rounding
) -> Float64[Tensor, "m n"]:
    """W_hat_k = Q(W_k + (W - W_hat) F_k) for k = 1 ... n."""
    W_hat = W.clone()
    for k in range(W.shape[1]):
        W_hat[:, k] = Q(W[:, k] + (W - W_hat)[:, :k] @ F[:k, k])
    return W_hat


def ldlq(
    W: Float64[Tensor, "m n"], H: Float64[Tensor, "n n"], Q: Rounding, p: Int64[Tensor, " n"]
) -> Float64[Tensor, "m n"]:
    """Rounding with LDLQ's F in the order p; W in code units."""
    F, _ = ldl(H[p][:, p])
    return round_with_feedback(W[:, p], F, Q)[:, p.argsort()]


def running_feedback(F: Float64[Tensor, "n n"]) -> Float64[Tensor, "n n"]:
    """K = I - (F + I)^-1, which feeds back errors of running weights instead of W - W_hat."""
    eye = torch.eye(len(F), dtype=F.dtype)
    return eye - torch.linalg.inv(F + eye)


def round_running(
    W: Float64[Tensor, "m n"], K: Float64[Tensor, "n n"], Q: Rounding
) -> Float64[Tensor, "m n"]:
    """x_k = W_k + sum_{j<k} (x_j - W_hat_j) K_jk and W_hat_k = Q(x_k)."""
    X, W_hat = W.clone(), torch.zeros_like(W)
    for k in range(W.shape[1]):
        for j in range(k):
            X[:, k] += (X[:, j] - W_hat[:, j]) * K[j, k]
        W_hat[:, k] = Q(X[:, k])
    return W_hat


def optq(
    W: Float64[Tensor, "m n"],
    H: Float64[Tensor, "n n"],
    fit: Callable[[Tensor], Rounding],
    *,
    group: int | None = None,
) -> Float64[Tensor, "m n"]:
    """OPTQ's Algorithm 1, one column at a time: with H^-1 = T^T T and T upper,

    e = (x_k - Q(x_k)) / T_kk, then x_j <- x_j - e T_kj for every j > k.

    Q = fit(X) is fitted on all of W, or at each group's start on the group's running weights.
    """
    X, W_hat = W.clone(), torch.zeros_like(W)
    T = torch.linalg.cholesky(torch.linalg.inv(H), upper=True)
    Q = fit(W)
    for k in range(W.shape[1]):
        if group is not None and k % group == 0:
            Q = fit(X[:, k : k + group].clone())
        W_hat[:, k] = Q(X[:, k])
        e = (X[:, k] - W_hat[:, k]) / T[k, k]
        X[:, k + 1 :] -= torch.outer(e, T[k, k + 1 :])
    return W_hat


# Grids without and with incoherence


def minmax_grid(
    W: Float64[Tensor, "m g"], bits: int
) -> tuple[Float64[Tensor, " m"], Float64[Tensor, " m"]]:
    """Per row (qfn a): step = (hi - lo) / (2^b - 1), zero = round(-lo / step).

    hi = max(0, max W) and lo = min(0, min W).
    """
    hi, lo = W.amax(1).clamp(min=0), W.amin(1).clamp(max=0)
    step = (hi - lo) / (2**bits - 1)
    return step, torch.floor(-lo / step + 0.5)


def minmax_rounding(W: Float64[Tensor, "m g"], bits: int) -> Rounding:
    """W_hat = step (q - zero) with q = clamp(round(w / step) + zero), the grid fitted on W."""
    step, zero = minmax_grid(W, bits)
    return lambda w: step * (nearest(w / step + zero, bits) - zero)


def symmetric_rounding(W: Float64[Tensor, "m g"], bits: int, share: float) -> Rounding:
    """W_hat = step (q - 2^(b-1)), q = clamp(round(w / step) + 2^(b-1)), the grid fitted on W.

    Per row: step = share 2 max |w| / (2^b - 1), as GPTQ has it with `sym` for a share of 1.
    """
    step = share * 2 * W.abs().amax(1) / (2**bits - 1)
    zero = 2 ** (bits - 1)
    return lambda w: step * (nearest(w / step + zero, bits) - zero)


def rms_rounding(W: Float64[Tensor, "m g"], bits: int, rho: float) -> Rounding:
    """The nearest level s (2q / (2^b - 1) - 1), with s = rho ||W||_F / sqrt(m g)."""
    top = 2**bits - 1
    s = rho * W.norm() / math.sqrt(W.numel())
    return lambda w: s * (2 * nearest(top * (w / s + 1) / 2, bits) / top - 1)


def damp(H: Float64[Tensor, "n n"], alpha: float) -> Float64[Tensor, "n n"]:
    """H + alpha mean(diag H) I."""
    return H + alpha * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype)


def ldlq_baseline(
    W: Float64[Tensor, "m n"],
    H: Float64[Tensor, "n n"],
    bits: int,
    alpha: float,
    p: Int64[Tensor, " n"],
) -> Float64[Tensor, "m n"]:
    """LDLQ without incoherence: on the codes W / step + zero, clamped before feedback."""
    step, zero = (column[:, None] for column in minmax_grid(W, bits))
    targets = (W / step + zero).clamp(0, 2**bits - 1)
    codes = ldlq(targets, damp(H, alpha), lambda t: nearest(t, bits), p)
    return step * (codes - zero)


def preprocess(
    W: Float64[Tensor, "m n"],
    H: Float64[Tensor, "n n"],
    alpha: float,
    R_out: Float64[Tensor, "m m"],
    R_in: Float64[Tensor, "n n"],
) -> tuple[Float64[Tensor, "m n"], Float64[Tensor, "n n"], Float64[Tensor, " n"]]:
    """Algorithm 1, steps 2 to 5: processed W, processed H, and the rescaling

    r_j = (H_jj / (W^T W)_jj)^(1/4).
    """
    H = damp(H, alpha)
    r = (H.diagonal() / (W.T @ W).diagonal()) ** 0.25
    return R_out @ (W * r) @ R_in.T, R_in @ (H / torch.outer(r, r)) @ R_in.T, r


def postprocess(
    W_hat: Float64[Tensor, "m n"],
    r: Float64[Tensor, " n"],
    R_out: Float64[Tensor, "m m"],
    R_in: Float64[Tensor, "n n"],
) -> Float64[Tensor, "m n"]:
    """Algorithm 2, steps 2 and 3: R_out^T W_hat R_in diag(r)^-1."""
    return (R_out.T @ W_hat @ R_in) / r


def quip_faithful(
    W: Float64[Tensor, "m n"],
    H: Float64[Tensor, "n n"],
    bits: int,
    rho: float,
    alpha: float,
    R_out: Float64[Tensor, "m m"],
    R_in: Float64[Tensor, "n n"],
    order: Callable[[Tensor], Tensor] = natural,
) -> Float64[Tensor, "m n"]:
    """Algorithm 3: LDLQ on the processed weights as codes, clamped before feedback."""
    X, H, r = preprocess(W, H, alpha, R_out, R_in)
    top = 2**bits - 1
    s = rho * X.norm() / math.sqrt(X.numel())
    targets = (top * (X / s + 1) / 2).clamp(0, top)
    codes = ldlq(targets, H, lambda t: nearest(t, bits), order(H))
    return postprocess(s * (2 * codes / top - 1), r, R_out, R_in)


def quip_running(
    W: Float64[Tensor, "m n"],
    H: Float64[Tensor, "n n"],
    bits: int,
    rho: float,
    alpha: float,
    R_out: Float64[Tensor, "m m"],
    R_in: Float64[Tensor, "n n"],
    order: Callable[[Tensor], Tensor] = natural,
    group: int | None = None,
) -> Float64[Tensor, "m n"]:
    """As Algorithm 3, but the target is not clamped, so that clip errors are fed back, and

    s = rho times the RMS of the running weights of each group of columns (in sweep order).

    Theorem 6 makes LDLQ an OPTQ loop, whose running weights are the ones to fit on.
    """
    X, H, r = preprocess(W, H, alpha, R_out, R_in)
    p = order(H)
    X_hat = optq(X[:, p], H[p][:, p], lambda Y: rms_rounding(Y, bits, rho), group=group)
    return postprocess(X_hat[:, p.argsort()], r, R_out, R_in)


# Greedy


def greedy(
    W: Float64[Tensor, "m n"],
    W_hat: Float64[Tensor, "m n"],
    H: Float64[Tensor, "n n"],
    bits: int,
    passes: int,
    p: Int64[Tensor, " n"],
) -> Float64[Tensor, "m n"]:
    """Passes of W_hat_k <- clamp(round(W_hat_k + (W - W_hat) H_k / H_kk)), in the order p.

    Code units. W_hat = W is the stand-alone use.
    """
    W_hat = W_hat.clone()
    for _ in range(passes):
        for k in p.tolist():
            t = W_hat[:, k] + (W - W_hat) @ H[:, k] / H[k, k]
            W_hat[:, k] = nearest(t, bits)
    return W_hat


def greedy_by_masks(
    W: Float64[Tensor, "m n"],
    guess: Float64[Tensor, "m n"],
    H: Float64[Tensor, "n n"],
    bits: int,
) -> Float64[Tensor, "m n"]:
    """Algorithm 4, one pass: F = (H . M) diag(H)^-1, M the strictly upper mask, and

    V = W - (guess - W)(H . M^T) diag(H)^-1;  W_hat_k = clamp(round(V_k + (W - W_hat) F_k)).
    """
    F = H.triu(1) / H.diagonal()
    V = W - (guess - W) @ (H.tril(-1) / H.diagonal())
    W_hat = W.clone()
    for k in range(W.shape[1]):
        W_hat[:, k] = nearest(V[:, k] + (W - W_hat) @ F[:, k], bits)
    return W_hat


# Algorithm 5: bounded feedback


def admm(
    H: Float64[Tensor, "n n"], c: float, *, iterations: int = 100, tau: float = 0.1
) -> Float64[Tensor, "n n"]:
    """Unit upper L that minimises tr(H L^T L) while each column has ||L e_i||^2 <= 1 + c.

    L = I + Z by ADMM. The X-step solves row i of (I + X) 2H + tau (X - Z + Y) = 0 on the columns
    after i, which 2H + tau I = C C^T with C upper turns into two triangular products.
    """
    n = len(H)
    H = H / H.diagonal().max()
    A = 2 * H + tau * torch.eye(n, dtype=H.dtype)
    C = torch.linalg.cholesky(A.flip(0, 1)).flip(0, 1)
    C_inv = torch.linalg.inv(C)
    Z, Y = torch.zeros_like(H), torch.zeros_like(H)
    for _ in range(iterations):
        G = tau * (Z - Y) - 2 * H
        X = (G.triu(1) @ C_inv.T).triu(1) @ C_inv
        Z = X + Y
        Z = Z * torch.clamp(math.sqrt(c) / Z.norm(dim=0), max=1)
        Y = Y + X - Z
    return torch.eye(n, dtype=H.dtype) + Z


def round_bounded(
    W: Float64[Tensor, "m n"], H: Float64[Tensor, "n n"], c: float, Q: Rounding
) -> Float64[Tensor, "m n"]:
    """Algorithm 5's rounding: feedback F = L^-1 - I; W in code units."""
    L = admm(H, c)
    F = torch.linalg.inv(L) - torch.eye(len(H), dtype=H.dtype)
    return round_with_feedback(W, F, Q)


# Vector codebooks


def block_ldl(
    H: Float64[Tensor, "n n"], d: int
) -> tuple[Float64[Tensor, "n n"], Float64[Tensor, "k d d"]]:
    """F and the d x d blocks of D in H = (F + I) D (F + I)^T, F strictly block upper.

    With H = C C^T, C upper: block column k of F + I is C_:k C_kk^-1, and D_k = C_kk C_kk^T.
    """
    C = torch.linalg.cholesky(H.flip(0, 1)).flip(0, 1)
    F, D = -torch.eye(len(H), dtype=H.dtype), []
    for k in range(0, len(H), d):
        block = C[k : k + d, k : k + d]
        F[:, k : k + d] += C[:, k : k + d] @ torch.linalg.inv(block)
        D.append(block @ block.T)
    return F, torch.stack(D)


def block_ldlq(
    W: Float64[Tensor, "m n"],
    H: Float64[Tensor, "n n"],
    d: int,
    nearest_point: Callable[[Tensor, Tensor], Tensor],
) -> Float64[Tensor, "m n"]:
    """W_hat_k = nearest_point(W_k + (W - W_hat) F_k, D_k) over blocks of d columns, in order.

    nearest_point maps targets [m, d] and their metric [d, d] to code vectors [m, d].
    """
    F, D = block_ldl(H, d)
    W_hat = W.clone()
    for k, metric in enumerate(D):
        block = slice(k * d, (k + 1) * d)
        W_hat[:, block] = nearest_point(W[:, block] + (W - W_hat) @ F[:, block], metric)
    return W_hat


# Rotations and problems


def kronecker(A: Float64[Tensor, "p p"], B: Float64[Tensor, "q q"]) -> Float64[Tensor, "n n"]:
    """R[iq + k, jq + l] = A_ij B_kl: acts on x reshaped row-major to [p, q] as A x B^T."""
    p, q = len(A), len(B)
    R = torch.zeros(p * q, p * q, dtype=A.dtype)
    for i in range(p):
        for j in range(p):
            R[i * q : (i + 1) * q, j * q : (j + 1) * q] = A[i, j] * B
    return R


def counterexample(
    n: int, *, c: float = 0.01, m: int = 16
) -> tuple[Float64[Tensor, "m n"], Float64[Tensor, "n n"]]:
    """W (code units) and H on which clamped first-to-last LDLQ is far worse than Near (C.3)."""
    H = torch.ones(n, n, dtype=torch.float64) + torch.eye(n, dtype=torch.float64)
    H[n - 1, n - 1] = 1
    H[0, 1 : n - 1] += 2 * c
    H[1 : n - 1, 0] += 2 * c
    H[0, n - 1] += c
    H[n - 1, 0] += c
    H[0, 0] += 4 * c + n * c**2
    W = 0.499 + 0.002 * (torch.arange(n, dtype=torch.float64) % 2)
    return W.repeat(m, 1), H


def correlated_problem(
    m: int, n: int, *, seed: int = 0
) -> tuple[Float64[Tensor, "m n"], Float64[Tensor, "n n"]]:
    """W uniform on [0, 1], and the damped second moment of 2n correlated, ill-scaled inputs."""
    rng = torch.Generator().manual_seed(seed)
    W = torch.rand(m, n, generator=rng, dtype=torch.float64)
    mix = torch.randn(n, n, generator=rng, dtype=torch.float64) / n**0.5
    x = torch.randn(2 * n, n, generator=rng, dtype=torch.float64) @ mix
    x = x * torch.rand(n, generator=rng, dtype=torch.float64).add(0.2)
    return W, damp(x.T @ x / len(x), 0.01)
