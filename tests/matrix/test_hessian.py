import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quip.matrix.hessian import CHUNK, Hessian, sharing
from tests.laws import assert_near

# Sums of a few thousand float32 products: about the square root of that, times 6e-8.
SINGLE = 1e-5
ROUNDED = 2**-24  # what rounding to float32 changes at most, relative


def mean_of_outer_products(x: torch.Tensor) -> torch.Tensor:
    x = x.double().reshape(-1, x.shape[-1])
    return x.T @ x / len(x)


def collected(*batches: torch.Tensor) -> torch.Tensor:
    hessian = Hessian(batches[0].shape[-1])
    for x in batches:
        hessian.update(x)
    return hessian.value()


@pytest.mark.parametrize("n", [1, 5, 63, 64, 65, 130, 300])  # about and across the row panels
def test_value_is_the_mean_of_x_x_t_per_token(rng, n):
    x = torch.randn(70, n, generator=rng)
    H = collected(x)
    assert H.dtype == torch.float64
    assert torch.equal(H, H.T)
    assert_near(H, mean_of_outer_products(x), SINGLE)


def test_leading_axes_do_not_matter(rng):
    x = torch.randn(3, 5, 7, 6, generator=rng)
    flat = collected(x.reshape(-1, 6))
    assert torch.equal(collected(x), flat)
    assert torch.equal(collected(x.permute(0, 2, 1, 3)), collected(x.permute(0, 2, 1, 3).clone()))
    hessian = Hessian(6)
    hessian.update(x)
    hessian.update(x[0, 0, 0])
    assert hessian.count == 3 * 5 * 7 + 1


@given(cuts=st.lists(st.integers(0, 40), max_size=4))
@settings(max_examples=15)
def test_tokens_may_come_in_any_portions_even_empty_ones(cuts):
    x = torch.randn(40, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    bounds = [0, *sorted(cuts), 40]
    H = collected(*(x[lo:hi] for lo, hi in itertools.pairwise(bounds)))
    assert_near(H, mean_of_outer_products(x), ROUNDED)


def test_more_tokens_than_one_chunk_are_all_counted(rng):
    x = torch.randn(2 * CHUNK + 17, 4, generator=rng)
    hessian = Hessian(4)
    hessian.update(x)
    assert hessian.count == len(x)
    assert_near(hessian.value(), mean_of_outer_products(x), SINGLE)


def test_many_chunks_do_not_lose_what_one_float32_sum_would():
    hessian = Hessian(1)
    hessian.update(torch.full((1, 1), 3e3))  # float32 cannot add 0.25 to 9e6
    for _ in range(2000):
        hessian.update(torch.full((1, 1), 0.5))
    # The value is 9e6 / 2001, rounded to 6e-8, which is 1e-3 of what was added.
    assert float(hessian.value()) * 2001 - 9e6 == pytest.approx(2000 * 0.25, rel=2e-3)
    assert float(hessian.mean()) == (3e3 + 2000 * 0.5) / 2001


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_are_squared_in_single_precision(rng, dtype):
    x = (1000 * torch.randn(50, 6, generator=rng)).to(dtype)  # a float16 square would overflow
    assert torch.equal(collected(x), collected(x.float()))


def test_double_inputs_stay_double_until_each_entry_is_rounded_to_a_float32(rng):
    x = torch.randn(50, 6, generator=rng, dtype=torch.float64)
    H = collected(x)
    assert H.dtype == torch.float64
    assert torch.equal(H, mean_of_outer_products(x).float().double())


def test_update_keeps_its_argument_and_no_graph(rng):
    x = torch.randn(8, 3, generator=rng, requires_grad=True)
    before = x.detach().clone()
    assert not collected(x).requires_grad
    assert torch.equal(x, before)


def test_an_input_that_is_always_zero_leaves_exact_zeros(rng):
    x = torch.randn(40, 70, generator=rng)
    x[:, [0, 66]] = 0
    H = collected(x)
    assert bool((H[[0, 66]] == 0).all())
    assert bool((H[:, [0, 66]] == 0).all())


def test_value_may_be_read_between_updates(rng):
    x = torch.randn(40, 5, generator=rng, dtype=torch.float64)
    hessian = Hessian(5)
    hessian.update(x[:10])
    first = hessian.value()
    hessian.update(x[10:])
    assert_near(first, mean_of_outer_products(x[:10]), ROUNDED)
    assert_near(hessian.value(), mean_of_outer_products(x), ROUNDED)


def test_the_mean_of_x_is_summed_in_double_precision(rng):
    x = torch.randn(3, 50, 6, generator=rng)
    hessian = Hessian(6)
    for chunk in x:
        hessian.update(chunk)
    assert hessian.mean().dtype == torch.float64
    # Three sums of 50 numbers, each rounded to a multiple of 2^-33 d_i, d_i at most 16.
    lost = 3 * 2**-34 * 16 / 150
    assert float((hessian.mean() - x.double().mean((0, 1))).abs().max()) <= lost


def test_matrices_with_one_hessian_are_named_together():
    shared, alone = Hessian(2), Hessian(2)
    found = sharing({"q": shared, "out": alone, "k": shared})
    assert found == [["q", "k"], ["out"]]


@pytest.mark.parametrize(("value", "finite"), [(1e30, False), (torch.nan, False), (1e18, True)])
def test_it_is_finite_where_the_diagonal_of_its_value_is(rng, value, finite):
    x = torch.randn(6, 3, generator=rng)
    x[2, 1] = value  # the square of 1e30 is finite in float64, and not in float32
    hessian = Hessian(3)
    hessian.update(x.double())
    assert hessian.is_finite == bool(hessian.value().diagonal().isfinite().all()) == finite
