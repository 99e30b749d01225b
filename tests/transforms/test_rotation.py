import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quip.transforms.haar import Haar
from quip.transforms.rotation import Rotation, balanced_factors
from tests import reference as ref
from tests.laws import assert_near

EXACT = 1e-12  # sums of up to a few hundred products of float64 numbers below 1


def eye(n: int) -> torch.Tensor:
    return torch.eye(n, dtype=torch.float64)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def dense(R: Rotation, n: int) -> torch.Tensor:
    return R.rotate(eye(n)).T


def as_matrix(indices: torch.Tensor) -> torch.Tensor:
    """P with (P x)_i = x[indices_i]."""
    return eye(len(indices))[indices]


@pytest.mark.parametrize("p", [1, 2, 3, 24, 97, 128])
def test_haar_matrices_are_orthogonal_although_their_vectors_are_rounded(rng, p):
    R = Haar.draw(p, rng, count=3).matrices
    assert R.shape == (3, p, p)
    torch.testing.assert_close(R @ R.mT, eye(p).expand(3, p, p), rtol=0, atol=EXACT)
    assert p == 1 or not torch.equal(R[0], R[1])


def test_haar_matrices_follow_their_formula(rng):
    haar = Haar.draw(5, rng)
    expected = eye(5)
    for i in range(4):
        v = haar.vectors[0, :, i].double()
        v[i] = 1
        expected = expected @ (eye(5) - 2 * torch.outer(v, v) / v.square().sum())
    assert_near(haar.matrices[0], expected * haar.signs[0])


@pytest.mark.parametrize("p", [2, 3, 8])
def test_haar_entries_have_the_moments_of_the_uniform_sphere(p):
    count = 20_000
    R = Haar.draw(p, seeded(3), count=count).matrices
    error = 5 / count**0.5  # five standard errors, for a spread of 1
    assert float(R.mean(0).abs().max()) < error * p**-0.5
    fourth = 3 / (p * (p + 2))  # E x^4 of a coordinate of a uniform unit vector
    spread = (fourth - 1 / p**2) ** 0.5
    assert float((R.square().mean(0) - 1 / p).abs().max()) < error * spread
    assert float((R**4).mean(0).sub(fourth).abs().max()) < error * fourth * 3
    assert float((R[:, 0, 0] * R[:, 1, 1]).mean().abs()) < error / p
    mixed = (R[:, 0, 0] ** 2 * R[:, 1, 0] ** 2).mean()
    assert float(mixed) == pytest.approx(1 / (p * (p + 2)), abs=error * fourth)


@pytest.mark.parametrize("p", [1, 2, 5])
def test_haar_determinants_take_both_signs_alike(p):
    signs = torch.linalg.det(Haar.draw(p, seeded(4), count=4000).matrices)
    assert_near(signs.abs(), torch.ones_like(signs))
    assert abs(float(signs.mean())) < 5 / 4000**0.5  # five standard errors


def test_a_haar_matrix_of_one_seed_is_always_the_same():
    assert torch.equal(Haar.draw(7, seeded(1)).matrices, Haar.draw(7, seeded(1)).matrices)
    assert not torch.equal(Haar.draw(7, seeded(1)).matrices, Haar.draw(7, seeded(2)).matrices)


@pytest.mark.parametrize(("mix", "shuffle"), [*itertools.product([False, True], repeat=2)])
@pytest.mark.parametrize("n", [12, 35, 13, 1])
def test_a_kronecker_rotation_is_the_dense_product_between_permutations(rng, n, mix, shuffle):
    R = Rotation.draw(n, rng, blocked=False, mix=mix, shuffle=shuffle)
    expected = ref.kronecker(R.left.matrices[0], R.right.matrices[0])
    if mix:
        expected = expected @ as_matrix(R.mix)
    if shuffle:
        expected = as_matrix(R.shuffle) @ expected
    assert (R.mix is not None, R.shuffle is not None) == (mix, shuffle)
    assert_near(dense(R, n), expected, EXACT)


@pytest.mark.parametrize("n", [12, 35, 13, 1])
def test_a_blocked_rotation_has_a_factor_for_each_column_and_then_each_row(rng, n):
    R = Rotation.draw(n, rng, blocked=True, mix=True, shuffle=True)
    p, q = balanced_factors(n)
    x = torch.randn(n, generator=rng, dtype=torch.float64)
    y = x[R.mix].reshape(p, q).clone()
    for j in range(q):
        y[:, j] = R.left.matrices[j] @ y[:, j]
    for i in range(p):
        y[i] = R.right.matrices[i] @ y[i]
    assert_near(R.rotate(x), y.flatten()[R.shuffle], EXACT)


@given(
    n=st.integers(1, 60),
    blocked=st.booleans(),
    mix=st.booleans(),
    shuffle=st.booleans(),
    batch=st.lists(st.integers(1, 3), max_size=2),
)
@settings(max_examples=30)
def test_a_rotation_of_any_size_is_orthogonal_and_inverted(n, blocked, mix, shuffle, batch):
    R = Rotation.draw(n, seeded(n), blocked=blocked, mix=mix, shuffle=shuffle)
    assert_near(dense(R, n) @ dense(R, n).T, eye(n), EXACT)
    x = torch.randn(*batch, n, generator=seeded(0), dtype=torch.float64)
    assert_near(R.rotate(x), x @ dense(R, n).T, EXACT)
    assert_near(R.invert(R.rotate(x)), x, EXACT)
    assert R.rotate(x.float()).dtype == torch.float32


def test_permutations_are_part_of_the_draw(rng):
    first, second = (
        Rotation.draw(60, rng, blocked=False, mix=True, shuffle=True) for _ in range(2)
    )
    assert sorted(first.mix.tolist()) == sorted(first.shuffle.tolist()) == list(range(60))
    assert not torch.equal(first.mix, first.shuffle)
    assert not torch.equal(first.mix, second.mix)


def test_a_rotation_costs_its_small_factors_only():
    R = Rotation.draw(768, seeded(0), blocked=False, mix=False, shuffle=False)
    assert R.left.matrices.shape == (1, 24, 24)
    assert R.right.matrices.shape == (1, 32, 32)
    factors, permutations = R.stored()
    assert (factors.dtype, len(factors)) == (torch.bfloat16, 24 * 25 // 2 + 32 * 33 // 2)
    assert len(permutations) == 0


@pytest.mark.parametrize(
    ("n", "factors"),
    [
        (768, (24, 32)),
        (2048, (32, 64)),
        (2560, (40, 64)),
        (3072, (48, 64)),
        (4096, (64, 64)),
        (5120, (64, 80)),
        (7168, (64, 112)),
        (11008, (86, 128)),
        (14336, (112, 128)),
        (97, (1, 97)),
        (1, (1, 1)),
    ],
)
def test_factors_are_the_divisors_nearest_the_root(n, factors):
    assert balanced_factors(n) == factors


@given(n=st.integers(1, 5000))
@settings(max_examples=50)
def test_no_divisors_are_nearer_the_root(n):
    p, q = balanced_factors(n)
    assert p * q == n
    assert not any(n % k == 0 for k in range(p + 1, q))
