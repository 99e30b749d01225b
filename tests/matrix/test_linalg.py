import pytest
import torch

from quip.errors import NotPositiveDefinite
from quip.matrix import linalg
from tests import reference as ref
from tests.laws import assert_near

DIMS = pytest.mark.parametrize("dim", [1, 2, 4, 8])


def test_cholesky_is_a_lower_factor_in_double_precision(problem):
    _, H = problem(1, 23)
    L = linalg.cholesky(H.float())
    assert L.dtype == torch.float64
    assert bool((L.triu(1) == 0).all())
    assert_near(L @ L.T, H.float().double())


def test_cholesky_of_an_indefinite_matrix_names_its_smallest_eigenvalue():
    H = torch.tensor([[1.0, 2.0], [2.0, 1.0]])
    with pytest.raises(NotPositiveDefinite, match=r"the smallest eigenvalue is -1\.00e\+00"):
        linalg.cholesky(H)


def test_cholesky_of_zero_fails():
    with pytest.raises(NotPositiveDefinite, match=r"the smallest eigenvalue is 0\.00e\+00"):
        linalg.cholesky(torch.zeros(3, 3))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [(0, 0), (2, 2), (1, 2)])
def test_cholesky_says_so_where_the_matrix_is_not_finite(value, place):
    H = torch.eye(3)
    H[place] = H[place[::-1]] = value
    with pytest.raises(NotPositiveDefinite, match="the matrix holds NaN or infinity"):
        linalg.cholesky(H)


@DIMS
def test_block_ldl_equals_the_oracle(problem, dim):
    _, H = problem(1, 24)
    U, D = linalg.block_ldl(H, dim)
    F, blocks = ref.block_ldl(H, dim)
    assert_near(U, F)
    assert_near(D, blocks)


@DIMS
def test_block_ldl_rebuilds_h_from_a_strictly_block_upper_factor(problem, dim):
    _, H = problem(1, 40)
    U, D = linalg.block_ldl(H, dim)
    eye = torch.eye(40, dtype=torch.float64)
    block = torch.arange(40) // dim
    assert bool((U[block[:, None] >= block] == 0).all())
    assert_near((eye + U) @ torch.block_diag(*D) @ (eye + U).T, H)
    assert_near(linalg.unit_upper_inverse(U) @ (eye + U), eye)


def test_block_ldl_of_single_columns_is_the_papers_ldl(problem):
    _, H = problem(1, 31)
    U, D = linalg.block_ldl(H)
    F, diagonal = ref.ldl(H)
    assert_near(U, F)
    assert_near(D.flatten(), diagonal)


@DIMS
def test_block_jacobi_divides_by_the_diagonal_blocks(problem, dim):
    _, H = problem(1, 24)
    keep = torch.arange(24)[:, None] // dim == torch.arange(24) // dim
    assert_near(linalg.block_jacobi(H, dim), H @ torch.linalg.inv(H * keep), noise=1e-9)  # cond(H)


@DIMS
def test_block_jacobi_leaves_an_input_that_is_always_zero_alone(problem, dim):
    _, H = problem(1, 24, dead=(5, 8))
    J = linalg.block_jacobi(H, dim)
    assert bool(torch.isfinite(J).all())
    assert bool((J[[5, 8]] == 0).all())
    assert float(J[:, [5, 8]].abs().max()) < 1e-12  # a pseudo-inverse of blocks, in float64


def test_proxy_loss_is_relative_to_the_output_energy(problem):
    W, H = problem(6, 20)
    W_hat = W.round()
    ours = linalg.proxy_loss(W, W_hat, H)
    assert ours == pytest.approx(ref.proxy_loss(W, W_hat, H), rel=1e-12)  # float64 sums
    assert linalg.proxy_loss(3 * W, 3 * W_hat, 7 * H) == pytest.approx(ours, rel=1e-12)
    assert linalg.proxy_loss(W, W, H) == 0
    assert linalg.proxy_loss(W, 0 * W, H) == 1


def test_proxy_loss_is_summed_in_double_precision(problem):
    W, H = problem(6, 20)
    W_hat = W.bfloat16()
    expected = ref.proxy_loss(W.float().double(), W_hat.double(), H.float().double())
    assert linalg.proxy_loss(W.float(), W_hat, H.float()) == pytest.approx(expected, rel=1e-12)


def test_proxy_loss_of_weights_without_output_is_the_error_itself(problem):
    W, H = problem(6, 20)
    assert linalg.proxy_loss(0 * W, W, H) == pytest.approx(ref.trace_loss(0 * W, W, H), rel=1e-12)
    assert linalg.proxy_loss(0 * W, 0 * W, H) == 0
