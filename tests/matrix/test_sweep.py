import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quip.codebooks import MinMaxGrid, RmsGrid
from quip.matrix import feedback
from quip.matrix.polish import greedy
from quip.matrix.sweep import cascade, sweep
from tests import reference as ref
from tests.laws import Points, assert_near, decoded

ORDERS = pytest.mark.parametrize("order", [ref.natural, ref.backwards, ref.largest_first])
BLOCKS = pytest.mark.parametrize("block", [1, 7, 64, 128, 1000])
GROUPS = pytest.mark.parametrize("group", [1, 16, 48, 100, 7])
SIZES = st.integers(1, 20) | st.integers(60, 68) | st.integers(125, 132)  # about panels of columns
DOUBLE = {"step_dtype": torch.float64}
# What grouped OPTQ is matched to: float64 noise of a hundred compensated columns of size 1 to 10.
NOISE = 4e-13


def ones(n: int) -> Tensor:
    return torch.ones(n, dtype=torch.float64)


def whole_codes(bits: int, **options) -> MinMaxGrid:
    """The grid 0 ... 2^bits - 1, for weights in code units."""
    one = torch.ones((), dtype=torch.float64)
    return MinMaxGrid(bits=bits, step=one, zero=0 * one, **options)


def round_all(W: Tensor, K: Tensor, bits: int, **options) -> Tensor:
    return sweep(W, K, ones(len(K)), whole_codes(bits), **options)[0].double()


def clamped(bits: int):
    return lambda t: ref.nearest(t, bits)


# The sweep against the papers' loops


def test_sweep_without_feedback_is_nearest_rounding():
    W, H = ref.correlated_problem(9, 150)
    K, _ = feedback.none(H)
    assert torch.equal(round_all(4 * W - 0.5, K, 2), ref.nearest(4 * W - 0.5, 2))


@ORDERS
@pytest.mark.parametrize("bits", [2, 4])
def test_sweep_with_ldl_is_ldlq(order, bits):
    W, H = ref.correlated_problem(9, 150)
    p = order(H)
    W = 2**bits * W - 0.5  # some of it out of range
    K, _ = feedback.ldl(H[p][:, p])
    ours = round_all(W[:, p], K, bits)[:, p.argsort()]
    assert torch.equal(ours, ref.ldlq(W, H, clamped(bits), p))


def test_sweep_with_ldl_in_natural_order_is_optq_by_inverse_cholesky():
    W, H = ref.correlated_problem(9, 300)
    K, _ = feedback.ldl(H)
    assert torch.equal(round_all(3 * W, K, 2), ref.optq(3 * W, H, lambda _: clamped(2)))


@ORDERS
def test_sweep_with_admm_feedback_is_algorithm_5(order):
    W, H = ref.correlated_problem(9, 60)
    p = order(H)
    K, _ = feedback.admm(H[p][:, p], bound=0.5, tolerance=0.0)
    expected = ref.round_bounded(3 * W[:, p], H[p][:, p], 0.5, clamped(2))
    assert torch.equal(round_all(3 * W[:, p], K, 2), expected)


@given(
    n=SIZES,
    m=st.integers(1, 4),
    block=st.integers(1, 150),
    strength=st.sampled_from([0.0, 0.1, 0.5]),
)
@settings(max_examples=25)
def test_sweep_of_any_shape_with_any_feedback_follows_its_formula(n, m, block, strength):
    rng = torch.Generator().manual_seed(n)
    W = 3 * torch.rand(m, n, generator=rng, dtype=torch.float64)
    K = strength * torch.randn(n, n, generator=rng, dtype=torch.float64).triu(1)
    assert torch.equal(round_all(W, K, 2, block=block), ref.round_running(W, K, clamped(2)))


@BLOCKS
@GROUPS
@pytest.mark.parametrize("kind", ["row", "rms"])
def test_scales_are_refitted_on_running_weights_as_in_grouped_optq(kind, group, block):
    W, H = ref.correlated_problem(6, 100)
    W = 3 * (W - 0.4)
    book = MinMaxGrid(bits=3, **DOUBLE) if kind == "row" else RmsGrid(bits=3, rhos=(1.7,), **DOUBLE)
    fit = (
        (lambda X: ref.minmax_rounding(X, 3))
        if kind == "row"
        else (lambda X: ref.rms_rounding(X, 3, 1.7))
    )
    codes, books = sweep(W, *feedback.ldl(H), book, group=group, block=block)
    assert len(books) == -(-100 // group)
    expected = ref.optq(W, H, fit, group=group)
    torch.testing.assert_close(decoded(codes, books, group), expected, rtol=0, atol=NOISE)


@given(n=SIZES, group=st.integers(1, 150), block=st.integers(1, 150))
@settings(max_examples=40)
def test_groups_and_panels_of_any_width_are_grouped_optq(n, group, block):
    W, H = ref.correlated_problem(3, n, seed=n)
    book = MinMaxGrid(bits=2, **DOUBLE)
    codes, books = sweep(W - 0.4, *feedback.ldl(H), book, group=group, block=block)
    expected = ref.optq(W - 0.4, H, lambda X: ref.minmax_rounding(X, 2), group=group)
    torch.testing.assert_close(decoded(codes, books, group), expected, rtol=0, atol=NOISE)


@BLOCKS
@pytest.mark.parametrize("unbiased", [False, True])
def test_any_block_gives_the_same_codes(block, unbiased):
    W, H = ref.correlated_problem(6, 150)
    K, h = feedback.ldl(H)

    def codes(block: int) -> Tensor:
        book = whole_codes(2, unbiased=unbiased).seeded(torch.Generator().manual_seed(1))
        return sweep(3 * W, K, h, book, block=block)[0]

    assert torch.equal(codes(block), codes(33))


def test_a_group_of_all_columns_fits_once_before_the_sweep():
    W, H = ref.correlated_problem(6, 40)
    book, (K, h) = MinMaxGrid(bits=2), feedback.ldl(H)
    whole, books = sweep(W, K, h, book.fit(W, h))
    assert len(books) == 1
    for group in (40, 41, 1000):
        codes, books = sweep(W, K, h, book, group=group)
        assert torch.equal(codes, whole)
        assert len(books) == 1


@ORDERS
@pytest.mark.parametrize("unbiased", [False, True])
def test_the_loss_is_the_sum_of_scalar_errors_weighed_by_h(order, unbiased):
    W, H = ref.correlated_problem(6, 60)
    p = order(H)
    H, W = H[p][:, p], 4 * W[:, p] - 0.5
    K, h = feedback.ldl(H)
    book = whole_codes(2, unbiased=unbiased).seeded(torch.Generator().manual_seed(0))
    W_hat = sweep(W, K, h, book)[0].double()
    # E = eta (I - K), by the definition of the running weights.
    eta = torch.linalg.solve(torch.eye(60, dtype=torch.float64) - K, W - W_hat, left=False)
    expected = float((eta.square() @ h).sum())
    assert ref.trace_loss(W, W_hat, H) == pytest.approx(expected, rel=1e-11)  # float64 noise


def test_unbiased_rounding_under_feedback_has_the_right_mean():
    w, H = ref.correlated_problem(1, 5)
    W = (1 + w).expand(20_000, 5).contiguous()  # in the middle of the codes: never clamped
    K, h = feedback.ldl(H)
    book = whole_codes(4, unbiased=True, rng=torch.Generator().manual_seed(2))
    W_hat = sweep(4 + W, K, h, book)[0].double() - 4
    # Errors of columns spread by (I - K)^T diag(<= 1/4) (I - K); five standard errors.
    P = torch.eye(5, dtype=torch.float64) - K
    spread = (P.square().sum(0) / 4 / 20_000).sqrt()
    assert bool(((W_hat.mean(0) - W[0]).abs() < 5 * spread).all())


def test_the_codebook_sees_the_weights_of_the_errors():
    seen = []

    class Spy(MinMaxGrid):
        def fit(self, X: Tensor, h: Tensor) -> MinMaxGrid:
            seen.append(("fit", h))
            return super().fit(X, h)

        def round(self, x: Tensor, h: Tensor) -> Tensor:
            seen.append(("round", h))
            return super().round(x, h)

    W, H = ref.correlated_problem(2, 5)
    K, h = feedback.ldl(H)
    sweep(W, K, h, Spy(bits=2), group=2)
    assert [kind for kind, _ in seen] == ["fit", "round", "round"] * 2 + ["fit", "round"]
    assert torch.equal(torch.cat([w for k, w in seen if k == "fit"]), h)
    assert torch.equal(torch.cat([w for k, w in seen if k == "round"]), h)


def test_single_precision_weights_are_rounded_in_single_precision():
    W, H = ref.correlated_problem(40, 150)
    K, h = feedback.ldl(H)
    losses = []
    for X in (W, W.float()):
        codes, books = sweep(X, K, h, RmsGrid(bits=3, rhos=(2.0,)), group=16)
        assert books[0].step.dtype == X.dtype
        losses.append(ref.trace_loss(W, decoded(codes, books, 16).double(), H))
    # A few codes fall on the other side of a tie; the loss hardly knows.
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)


def test_sweep_and_greedy_keep_their_arguments():
    W, H = ref.correlated_problem(6, 40)
    K, h = feedback.ldl(H)
    given_ = [t.clone() for t in (W, H, K, h)]
    codes, books = sweep(3 * W, K, h, whole_codes(2))
    before = codes.clone()
    greedy(3 * W, H, codes, books, passes=3)
    assert torch.equal(codes, before)
    assert all(torch.equal(t, kept) for t, kept in zip((W, H, K, h), given_, strict=True))


# Greedy passes


@ORDERS
@BLOCKS
@pytest.mark.parametrize("passes", [1, 3])
def test_greedy_passes_are_the_papers(order, block, passes):
    W, H = ref.correlated_problem(9, 150)
    p = order(H)
    W, H = 3 * W[:, p], H[p][:, p]
    codes, books = sweep(W, *feedback.ldl(H), whole_codes(2))
    expected = ref.greedy(W, codes.double(), H, 2, passes, ref.natural(H))
    ours = greedy(W, H, codes, books, passes=passes, block=block)
    assert torch.equal(ours.double(), expected)


@ORDERS
@pytest.mark.parametrize("passes", [1, 2, 5])
def test_stand_alone_greedy_is_a_coordinate_sweep_and_then_passes(order, passes):
    W, H = ref.correlated_problem(9, 60)
    p = order(H)
    X, G = 3 * W[:, p], H[p][:, p]
    codes, books = sweep(X, *feedback.coordinate(G), whole_codes(2))
    ours = greedy(X, G, codes, books, passes=passes - 1)[:, p.argsort()]
    assert torch.equal(ours.double(), ref.greedy(3 * W, 3 * W, H, 2, passes, p))


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group", [None, 1, 16, 45])
def test_greedy_never_raises_the_loss_and_settles(bits, group):
    W, H = ref.correlated_problem(8, 50)
    K, h = feedback.ldl(H)
    book = MinMaxGrid(bits=bits).fit(W - 0.4, h)
    codes, books = sweep(W - 0.4, K, h, book, group=group)
    losses = [ref.trace_loss(W - 0.4, decoded(codes, books, group), H)]
    for _ in range(25):
        codes = greedy(W - 0.4, H, codes, books, group=group, passes=1)
        losses.append(ref.trace_loss(W - 0.4, decoded(codes, books, group), H))
    # A pass that moves nothing may differ by the noise of summing the loss.
    assert all(after <= before * (1 + 1e-12) for before, after in itertools.pairwise(losses))
    assert losses[-1] < losses[0]
    assert torch.equal(greedy(W - 0.4, H, codes, books, group=group, passes=3), codes)


def test_several_passes_are_one_pass_several_times():
    W, H = ref.correlated_problem(12, 150)
    codes, books = sweep(3 * W, *feedback.ldl(H), whole_codes(2))
    once = codes
    for _ in range(3):
        once = greedy(3 * W, H, once, books, passes=1)
    assert torch.equal(greedy(3 * W, H, codes, books, passes=3), once)
    assert torch.equal(greedy(3 * W, H, codes, books, passes=0), codes)


def test_greedy_leaves_an_input_that_is_always_zero_to_nearest_rounding(problem):
    W, H = problem(6, 20, dead=(4,))
    W = W.clamp(0, 3)
    codes = torch.full((6, 20), 2, dtype=torch.uint8)
    ours = greedy(W, H, codes, [whole_codes(2)], passes=2)
    assert torch.equal(ours[:, 4].double(), ref.nearest(W[:, 4], 2))


# Vector codebooks


@pytest.mark.parametrize("block", [1, 7, 128])
@pytest.mark.parametrize(("dim", "index_bits"), [(2, 4), (8, 8)])
def test_sweep_with_a_vector_codebook_is_block_ldlq(dim, index_bits, block):
    W, H = ref.correlated_problem(9, 144)
    K, h = feedback.ldl(H, dim)
    book = Points.random(dim, index_bits)
    codes, books = sweep(3 * W - 1.5, K, h, book, block=block)
    assert codes.shape == (9, 144 // dim)

    def nearest_point(T: Tensor, metric: Tensor) -> Tensor:
        return book.decode(book.round(T, metric.diagonal()))

    expected = ref.block_ldlq(3 * W - 1.5, H, dim, nearest_point)
    assert torch.equal(decoded(codes, books, None), expected)


@pytest.mark.parametrize("block", [1, 7, 100, 128])
@pytest.mark.parametrize("group", [8, 24, 64, 104, 200])
def test_vector_codebooks_are_refitted_per_group_too(group, block):
    W, H = ref.correlated_problem(9, 144)
    W = 3 * W - 1.5
    K, h = feedback.ldl(H, 8)
    eta, W_hat = torch.zeros_like(W), torch.zeros_like(W)
    for lo in range(0, 144, 8):
        if lo % group == 0:
            hi = min(lo + group, 144)
            book = Points.random(8, 6).fit(W[:, lo:hi] + eta @ K[:, lo:hi], h[lo:hi])
        one = slice(lo, lo + 8)
        x = W[:, one] + eta @ K[:, one]  # later columns have no error yet
        W_hat[:, one] = book.decode(book.round(x, h[one]))
        eta[:, one] = x - W_hat[:, one]
    codes, books = sweep(W, K, h, Points.random(8, 6), group=group, block=block)
    assert_near(decoded(codes, books, group), W_hat)


@pytest.mark.parametrize("block", [1, 7, 128])
def test_greedy_moves_blocks_to_the_nearest_point_of_their_optimum_if_that_is_better(block):
    W, H = ref.correlated_problem(9, 72)
    book = Points.random(8, 6)
    codes, books = sweep(W, *feedback.ldl(H, 8), book)
    W_hat = decoded(codes, books, None)
    for lo in (*range(0, 72, 8), *range(0, 72, 8)):  # two passes
        one = slice(lo, lo + 8)
        rest = W - W_hat
        rest[:, one] = 0
        X = W[:, one] + rest @ H[:, one] @ torch.linalg.inv(H[one, one])
        new = book.decode(book.round(X, H.diagonal()[one]))
        old_loss, new_loss = ((e @ H[one, one] * e).sum(1) for e in (X - W_hat[:, one], X - new))
        W_hat[:, one] = torch.where((new_loss < old_loss)[:, None], new, W_hat[:, one])
    ours = greedy(W, H, codes, books, passes=2, block=block)
    assert torch.equal(decoded(ours, books, None), W_hat)


# The cascade


@given(
    n=st.integers(1, 60),
    widths=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    block=st.integers(1, 70),
)
@settings(max_examples=60)
def test_spans_nested_in_any_way_receive_exactly_what_lies_before_them(n, widths, block):
    widths = sorted(set(itertools.accumulate(widths, lambda a, b: a * b)))
    rng = torch.Generator().manual_seed(n)
    X0, K = (torch.randn(n, k, generator=rng, dtype=torch.float64) / n for k in (3, n))
    X, eta = X0.clone(), torch.full_like(X0, float("nan"))
    spans: dict[int, list[tuple[int, int]]] = {}
    for width, lo, hi in cascade(X, K, eta, {*widths}, block=block):
        assert_near(X[lo:hi], X0[lo:hi] + K[:lo, lo:hi].T @ eta[:lo])
        spans.setdefault(width, []).append((lo, hi))
        if width == widths[0]:
            eta[lo:hi] = X[lo:hi].sin()
    for width in widths:
        assert spans[width] == [(lo, min(lo + width, n)) for lo in range(0, n, width)]
