"""Statistics of Hessians against their definitions, in numpy, and what a rotation leaves."""

import math

import numpy as np
import pytest
import torch

from quip.errors import NonFinite, NotPositiveDefinite
from quip.matrix.build import build_recipe
from quip.matrix.prepare import Factorisations, damped
from quip.matrix.seeds import rng_for
from quip.research.hessians.rows import EDGES, histogram, table_6
from quip.research.hessians.spectrum import Spectrum, hessian_numbers, weight_numbers
from quip.research.hessians.stages import Stage, processed
from quip.transforms import Hadamard

QUIP = build_recipe(wbits=2, incoh_processing=True)


def haar(n: int, seed: int = 0) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(n, n, generator=rng, dtype=torch.float64))[0]


def numbers(H: torch.Tensor, damp: float = 0.0, mean: torch.Tensor | None = None):
    mean = torch.zeros(len(H), dtype=torch.float64) if mean is None else mean
    return hessian_numbers(Spectrum.of(H), damped(H, damp), mean)


def oracle(H: np.ndarray, damp: float) -> dict[str, float]:
    """Every number from its definition: QuIP, sections 2, 3 and 4, entry by entry."""
    n = len(H)
    values, Q = np.linalg.eigh(H)
    zero = values.max() * n * 2.0**-23
    root = (Q * np.sqrt(values.clip(0))) @ Q.T
    H_d = H + damp * np.trace(H) / n * np.eye(n)
    share = {}
    for name, order in (("D_forwards", range(n)), ("D_backwards", range(n)[::-1])):
        # D_k is what of column k the columns that follow cannot say: a Schur complement.
        D = []
        for k in order:
            later = [j for j in order if (j > k if name == "D_forwards" else j < k)]
            A = H_d[np.ix_(later, later)]
            D.append(H_d[k, k] - H_d[k, later] @ np.linalg.solve(A, H_d[later, k]))
        share[name] = sum(D) / np.trace(H_d)
    mu = max(abs(Q[i, j]) for i in range(n) for j in range(n) if values[j] > zero) * math.sqrt(n)
    return {
        **share,
        "rank": sum(values > zero) / n,
        "above_1_percent": sum(values > values.max() / 100) / n,
        "mu": mu,
        "log10_condition": math.log10(values.max() / min(values[values > zero])),
        "root": np.trace(root) ** 2 / (n * np.trace(H)),
        "bound": mu**2 / n * np.trace(root) ** 2 / np.trace(H),
        "tight_bound": max(np.diag(root)) * np.trace(root) / np.trace(H),
    }


@pytest.mark.parametrize(("n", "rank"), [(24, None), (30, 11)])
@pytest.mark.parametrize("damp", [0.01, 0.1])
def test_the_numbers_are_those_of_the_definitions(problem, n, rank, damp):
    _, H = problem(5, n, rank=rank)
    H = H.float().double()  # as a store holds it
    found = vars(numbers(H, damp))
    for name, expected in oracle(H.numpy(), damp).items():
        assert found[name] == pytest.approx(expected, rel=1e-7), name


def test_a_diagonal_is_as_coherent_as_can_be_and_feedback_gains_nothing():
    H = torch.arange(1.0, 17.0, dtype=torch.float64).diag()
    found = numbers(H)
    assert found.mu == pytest.approx(math.sqrt(16))
    assert (found.D_backwards, found.D_forwards) == pytest.approx((1, 1))
    assert (found.rank, found.above_1_percent) == (1, 1)
    assert found.log10_condition == pytest.approx(math.log10(16))


def test_hadamard_eigenvectors_are_as_incoherent_as_can_be_and_lemma_2_says_most():
    n = 16
    T = Hadamard(torch.ones(n), torch.ones(n))
    Q = T.input(torch.eye(n, dtype=torch.float64))
    values = torch.logspace(0, 3, n, dtype=torch.float64)
    found = numbers((Q * values) @ Q.T)
    assert found.mu == pytest.approx(1)
    assert found.bound == pytest.approx(found.root)
    assert found.tight_bound == pytest.approx(found.root)
    assert found.D_backwards <= found.root


def test_the_identity_has_one_eigenvalue():
    found = numbers(torch.eye(8, dtype=torch.float64))
    assert (found.rank, found.above_1_percent, found.log10_condition) == (1, 1, 0)
    assert found.root == pytest.approx(1)
    assert found.D_forwards == pytest.approx(1)


@pytest.mark.parametrize("rank", [1, 7, 20])
def test_the_rank_is_exact_and_the_null_space_does_not_count(rank):
    Q = haar(20)[:, :rank]
    H = (Q @ Q.T).float().double()
    found = numbers(H, 0.01)
    assert found.rank == found.above_1_percent == rank / 20
    assert found.log10_condition == pytest.approx(0, abs=1e-5)
    assert found.root == pytest.approx(rank / 20, rel=1e-3)


def test_one_percent_is_of_the_largest_eigenvalue():
    H = torch.tensor([100.0, 1.001, 0.999, 1e-3]).double().diag()
    assert (numbers(H).rank, numbers(H).above_1_percent) == (1, 0.5)


@pytest.mark.parametrize("seed", range(5))
def test_lemma_2_and_what_its_proof_has_hold(problem, seed):
    _, H = problem(2, 20, seed=seed)
    found = numbers(H)
    for share in (found.D_backwards, found.D_forwards):
        assert share <= found.tight_bound <= found.bound
    assert found.tight_bound >= found.root  # with equality where the diagonal of H^1/2 is even


@pytest.mark.parametrize("damp", [1e-6, 0.01, 0.1])
def test_the_bounds_are_on_what_the_undamped_has_and_damping_adds_to_that(damp):
    n = 256
    x = torch.ones(n, dtype=torch.float64)  # as incoherent as can be, of rank 1
    found = numbers(torch.outer(x, x), damp)
    assert found.bound == pytest.approx(1 / n, rel=1e-5)
    assert found.tight_bound == pytest.approx(1 / n, rel=1e-5)
    # D of H is (1, 0 ... 0), and that of H + d I has no entry below d.
    assert found.D_backwards >= damp / (1 + damp)
    assert found.D_backwards == pytest.approx((1 + damp * n) / (n * (1 + damp)), rel=0.05)
    assert (found.D_backwards > 2 * found.bound) == (damp >= 0.01)


def test_the_mean_explains_all_of_inputs_that_never_change():
    x = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    assert numbers(torch.outer(x, x), 0.01, x).mean_share == pytest.approx(1)
    assert numbers(torch.outer(x, x) + torch.eye(3), 0.0, x).mean_share == pytest.approx(14 / 17)


def stages(W, H, *, rotation="kronecker", rescale=True, damp=0.01):
    draws = build_recipe(wbits=2, pre_proj=True, pre_rescale=rescale, rotation=rotation).transforms
    mean = torch.zeros(len(H), dtype=torch.float64)
    original = Stage.original("a", H, mean, damp=damp)
    return list(processed(original, W, draws, rng_for(0, "a"), "a"))


@pytest.mark.parametrize("rotation", ["kronecker", "blocked", "hadamard"])
def test_a_rotation_turns_eigenvectors_and_leaves_the_eigenvalues(problem, rotation):
    W, H = problem(8, 24)
    (before, _), (after, _) = stages(W, H, rotation=rotation, rescale=False)
    assert (before.processing, after.processing) == ("original", "rotated")
    assert torch.linalg.eigvalsh(after.H).flip(0) == pytest.approx(
        before.spectrum.values, rel=1e-9, abs=1e-9 * float(before.spectrum.values[0])
    )
    values, Q = after.spectrum.values, after.spectrum.vectors
    torch.testing.assert_close((Q * values) @ Q.T, after.H, rtol=1e-9, atol=1e-9)
    for name in ("rank", "above_1_percent", "log10_condition", "root"):
        assert getattr(after.numbers, name) == getattr(before.numbers, name)
    assert after.numbers.mu != pytest.approx(before.numbers.mu)


def test_a_rotation_makes_coherent_matrices_incoherent():
    n = 256
    W = torch.eye(n, dtype=torch.float64)
    H = torch.arange(1.0, n + 1, dtype=torch.float64).diag()
    (before, W_0), (after, W_1) = stages(W, H, rescale=False)
    assert before.numbers.mu == pytest.approx(16)
    assert after.numbers.mu < 12  # 7.5 on average (section 4 has the bound)
    assert weight_numbers(W_0).mu_W == pytest.approx(16)
    assert weight_numbers(W_1).mu_W < 12
    assert after.numbers.tight_bound < before.numbers.tight_bound


def test_stages_end_in_what_a_run_quantizes(problem):
    W, H = problem(8, 24, dead=(3,))
    T, W_run, _ = Factorisations(H).of(W, QUIP, rng_for(0, "a"), "a")
    *_, (rescaled, _), (last, W_last) = stages(W, H)
    assert (rescaled.processing, last.processing) == ("rescaled", "rescaled and rotated")
    torch.testing.assert_close(W_last, W_run, rtol=0, atol=0)
    torch.testing.assert_close(last.H, T.apply(W, H)[1])
    torch.testing.assert_close(last.H_damped, T.apply(W, damped(H, 0.01))[1])


def test_the_mean_is_processed_with_the_inputs():
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(500, 12, generator=rng, dtype=torch.float64) + torch.arange(12)
    W = torch.randn(4, 12, generator=rng, dtype=torch.float64)
    original = Stage.original("a", x.T @ x / 500, x.mean(0), damp=0.01)
    *_, (last, _) = processed(original, W, QUIP.transforms, rng_for(0, "a"), "a")
    T = Factorisations(original.H).of(W, QUIP, rng_for(0, "a"), "a")[0]
    y = T.input(x)
    torch.testing.assert_close(last.mean, y.mean(0))
    expected = float(y.mean(0).square().sum() / y.square().sum(1).mean())
    assert last.numbers.mean_share == pytest.approx(expected)


def test_weights_are_measured_by_definition_1_and_their_fourth_moment(rng):
    W = torch.randn(300, 400, generator=rng)
    found = weight_numbers(W)
    w = W.double().numpy().ravel()
    assert found.mu_W == pytest.approx(abs(w).max() / math.sqrt((w**2).mean()))
    assert found.kurtosis == pytest.approx(((w - w.mean()) ** 4).mean() / w.var() ** 2)
    assert found.kurtosis == pytest.approx(3, abs=0.1)
    assert weight_numbers(torch.ones(3, 4)).mu_W == pytest.approx(1)
    assert vars(weight_numbers(torch.zeros(3, 4))) == {"mu_W": 0, "kurtosis": 0}


def test_histograms_lose_no_weight():
    W = torch.zeros(100, 100, dtype=torch.float64)
    W[0, 0] = 1.0  # 100 RMS, beyond the edges
    counts = histogram(W)
    assert counts.sum() == W.numel()
    assert counts[-1] == 1
    assert len(counts) == len(EDGES) - 1


def test_the_papers_table_is_found_by_the_name_of_the_model():
    found = table_6("facebook/opt-1.3b")
    assert found["baseline"] == {"rank": 0.541, "above_1_percent": 0.020, "D_backwards": 0.399}
    assert found["IncP"] == {"rank": 0.543, "above_1_percent": 0.028, "D_backwards": 0.393}
    assert table_6("demo") == table_6("another/opt-1.3b") == {}


def test_what_has_no_statistics_is_named():
    zero = torch.zeros(4, dtype=torch.float64)
    with pytest.raises(NotPositiveDefinite, match=r"layer\.a: its inputs were always 0"):
        Stage.original("layer.a", zero.diag(), zero, damp=0.01)
    with pytest.raises(NonFinite, match=r"layer\.a"):
        Stage.original("layer.a", (zero + math.nan).diag(), zero, damp=0.01)
    singular = Stage.original("layer.a", torch.ones(4, 4, dtype=torch.float64), zero, damp=0.0)
    with pytest.raises(NotPositiveDefinite, match=r"layer\.a, original: .*--percdamp"):
        _ = singular.numbers
