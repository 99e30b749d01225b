import hashlib
import math

import pytest
import torch

from quip.errors import UsageError
from quip.kernels.hadamard import check, cpu, invert, matrices, reference, rotate
from quip.kernels.hadamard.matrices import factors, matrix
from tests import reference as ref
from tests.laws import assert_near

EXACT = 1e-13  # sums of a few hundred products of float64 numbers below 1

# Orders up to 400 that exist, but not by the constructions that this package has.
UNKNOWN = {92, 184, 188, 236, 260, 268, 292, 324, 356, 372, 376}

WIDTHS = {  # of known models: first those that QuIP# serves, then those that it refuses
    1: (4096, 8192, 16384),
    12: (6144, 12288),
    20: (5120, 10240),
    28: (14336, 28672, 57344),
    36: (18432,),
    52: (6656, 53248, 106496),
    60: (15360,),
    108: (13824, 27648),
    116: (14848, 59392),
    124: (15872,),
    140: (17920, 35840),
    156: (19968,),
    172: (11008, 22016),
    44: (5632,),
    68: (17408,),
    76: (4864, 9728),
    84: (5376,),
    100: (25600,),
    148: (18944,),
    284: (4544,),
    924: (29568,),
}


def paley_1(q: int) -> list[list[int]]:
    """Row 0 is +, -, ..., -; column 0 is +; the core is + on its diagonal, else chi(i - j)."""
    rows = [[1] + [-1] * q]
    for i in range(q):
        rows.append([1] + [1 if i == j else chi(i - j, q) for j in range(q)])
    return rows


def paley_2(q: int) -> list[list[int]]:
    """[[C + I, C - I], [C - I, -C - I]], entry by entry."""

    def C(i: int, j: int) -> int:
        return 0 if i == j else 1 if 0 in (i, j) else chi(i - j, q)

    def entry(i: int, j: int) -> int:
        (top, i), (left, j) = divmod(i, q + 1), divmod(j, q + 1)
        return (-1 if top and left else 1) * C(i, j) + (1 if top == left == 0 else -1) * (i == j)

    return [[entry(i, j) for j in range(2 * q + 2)] for i in range(2 * q + 2)]


def chi(a: int, q: int) -> int:
    """Euler's criterion."""
    return (0, 1, -1)[0 if a % q == 0 else 1 if pow(a, (q - 1) // 2, q) == 1 else 2]


def williamson(order: int, A: int, B: int, C: int, D: int) -> list[list[int]]:
    """[[A, B, C, D], [-B, A, -D, C], [-C, D, A, -B], [-D, -C, B, A]]."""
    k = order // 4
    first = {}
    for name, bits in zip("ABCD", (A, B, C, D), strict=True):
        row = [1 if bit == "1" else -1 for bit in f"{bits:0{(k + 1) // 2}b}"]
        first[name] = row + row[:0:-1]
        assert len(first[name]) == k
    pattern = ["+A+B+C+D", "-B+A-D+C", "-C+D+A-B", "-D-C+B+A"]
    rows = []
    for line in pattern:
        for i in range(k):
            blocks = [(int(line[b] + "1"), first[line[b + 1]]) for b in (0, 2, 4, 6)]
            rows.append([sign * row[(j - i) % k] for sign, row in blocks for j in range(k)])
    return rows


PUBLISHED = {
    **{q + 1: (paley_1, q) for q in (11, 19, 59, 107, 139)},
    **{2 * q + 2: (paley_2, q) for q in (13, 17)},
    52: (williamson, 52, 0x53, 0x47, 0x69, 0x42),
    116: (williamson, 116, 0x64BB, 0x7B47, 0x5197, 0x7194),
    124: (williamson, 124, 0x9D21, 0x9D21, 0x83A9, 0xFC56),
    156: (williamson, 156, 0xE504C, 0xF130A, 0xE68A4, 0x8D41D),
    172: (williamson, 172, 0x233D76, 0x37E14D, 0x3ACAF4, 0x31E930),
}


@pytest.fixture(params=["compiled", "torch"])
def form(request, monkeypatch):
    """The rotation with a compiler, if there is one here, and without."""
    if request.param == "torch":
        monkeypatch.setattr(cpu, "library", lambda source: None)


def dense(n: int) -> torch.Tensor:
    """Omega_n = (K x S) / sqrt(n), with S by its formula: the signs of popcount(i & j)."""
    *outer, last = factors(n)
    signs = [[float((-1) ** (i & j).bit_count()) for j in range(last)] for i in range(last)]
    product = torch.tensor(signs, dtype=torch.float64)
    for order in reversed(outer):
        product = ref.kronecker(matrix(order).double(), product)
    return product / math.sqrt(n)


@pytest.mark.parametrize("order", sorted(PUBLISHED))
def test_the_matrix_of_a_published_order_is_the_published_one_bit_for_bit(order):
    construct, *arguments = PUBLISHED[order]
    assert matrix(order).tolist() == construct(*arguments)


@pytest.mark.parametrize(
    "order",
    [
        *(n for n in range(1, 201) if n in (1, 2) or (n % 4 == 0 and n not in UNKNOWN)),
        *(244, 284, 344, 368, 400, 512, 924),  # over 3^5 and 7^3, and 2 x 200, among them
    ],
)
def test_rows_of_a_hadamard_matrix_are_orthogonal(order):
    K = matrix(order)
    assert (K.dtype, K.shape) == (torch.int8, (order, order))
    assert bool((K.abs() == 1).all())
    assert torch.equal(K.double() @ K.double().T, order * torch.eye(order, dtype=torch.float64))


@pytest.mark.parametrize("order", [*sorted(UNKNOWN), 0, -4, 3, 6, 10])
def test_an_order_out_of_reach_is_named(order):
    with pytest.raises(UsageError, match=f"order {order} is known"):
        matrix(order)


def test_products_are_the_last_resort():
    assert torch.equal(matrix(40), torch.kron(matrix(2), matrix(20)))
    assert torch.equal(matrix(8), torch.kron(matrix(2), matrix(4)))
    assert not torch.equal(matrix(24), torch.kron(matrix(2), matrix(12)))  # Paley, 23


@pytest.mark.parametrize(
    ("order", "digest"),
    [(100, "cdf4af83ba948b5b"), (244, "ef147bc98e575d89"), (368, "a884af583874a272")],
)
def test_matrices_that_no_table_fixes_never_change(order, digest):
    """A file holds signs for one matrix: with another, its weights would be noise."""
    assert hashlib.sha256(matrix(order).numpy().tobytes()).hexdigest()[:16] == digest


@pytest.mark.parametrize(("order", "n"), [(K, n) for K, ns in WIDTHS.items() for n in ns])
def test_widths_of_known_models_take_the_order_that_the_tables_name(order, n):
    assert factors(n) == ((n,) if order == 1 else (order, n // order))


def test_the_choice_is_the_reference_s_wherever_it_makes_one():
    for n in {order << p for order in PUBLISHED for p in range(12)}:
        first = max(order for order in PUBLISHED if n % order == 0)
        if (n // first).bit_count() == 1:
            assert factors(n) == (first, n // first)


@pytest.mark.parametrize(
    ("n", "expected"),
    [
        (1, (1,)),
        (2, (2,)),
        (12, (12, 1)),
        (368 * 4, (368, 4)),  # neither 92 nor 184 is known
        (16 * 3 * 5 * 7 * 13, (140, 156, 1)),  # 1365 = 35 39, whose sum is the smallest
        (64 * 3 * 5 * 7 * 13, (28, 52, 60, 1)),  # 7 13 15: three are cheaper, now that they fit
        (128 * 25 * 169, (52, 52, 100, 2)),
        (1024 * 1155, (28, 44, 60, 16)),
    ],
)
def test_factors_are_one_smallest_order_or_else_the_smallest_sum(n, expected):
    assert factors(n) == expected
    assert math.prod(expected) == n


def test_a_width_takes_the_smallest_order_that_leaves_a_power_of_two():
    known = {*range(4, 401, 4)} - UNKNOWN
    for n in range(1, 401):
        fits = [k for k in known if n % k == 0 and (n // k).bit_count() == 1]
        if n.bit_count() == 1:
            assert factors(n) == (n,)
        elif fits:
            assert factors(n) == (min(fits), n // min(fits))
        else:
            with pytest.raises(UsageError, match=f"width {n} is known; give --"):
                factors(n)


@pytest.mark.parametrize(
    ("n", "block", "words"),
    [
        # 5460, by Paley over 2729, would be too large a dense product.
        (10920, None, "no Hadamard rotation of width 10920 is known; give --hadamard_block 8"),
        (92 * 64, None, None),  # 368 x 16
        (59 * 256, None, "width 15104 is known; give --hadamard_block 128"),
        (4 * 47, None, "width 188 is known; give --rotation kronecker"),
        (7, None, "width 7 is known; give --rotation kronecker"),
        (0, None, "width 0 is known"),
        (4096, 96, "block of 96 does not divide the width 4096; give --hadamard_block 128"),
        (100, 8, "block of 8 does not divide the width 100; give --rotation kronecker"),
        (4096, 0, "block of 0 does not divide the width 4096"),
        (4096, -8, "block of -8 does not divide the width 4096"),
        (92 * 128, 92, "rotation of width 92 is known; give --hadamard_block 128"),
        (10920, 8, None),
        (10920, 2 * 2 * 3 * 5, None),
    ],
)
def test_a_width_or_block_without_a_rotation_is_refused_with_a_remedy(n, block, words):
    x = torch.zeros(2, n)
    if words is None:
        check(n, block)
        assert rotate(x, block=block).shape == x.shape
        return
    for call in (
        lambda: check(n, block),
        lambda: rotate(x, block=block),
        lambda: invert(x, block=block),
    ):
        with pytest.raises(UsageError, match=words):
            call()


@pytest.mark.parametrize("n", [1, 2, 12, 24, 64, 128, 192, 240, 576, 960, 1024, 1536])
def test_a_rotation_is_the_dense_product(form, rng, n):
    x = torch.randn(3, n, generator=rng, dtype=torch.float64)
    given = x.clone()
    assert_near(rotate(x), x @ dense(n).T, EXACT)
    assert_near(invert(x), x @ dense(n), EXACT)
    assert_near(invert(rotate(x)), x, EXACT)
    assert torch.equal(x, given)
    assert rotate(x).data_ptr() != x.data_ptr()


@pytest.fixture
def orders_up_to_100(monkeypatch):
    """The choice of orders is cached under the other limit, before and after."""
    cached = (matrices._factors, reference._passes, cpu._plan)
    for cache in cached:
        cache.cache_clear()
    monkeypatch.setattr(matrices, "LARGEST", 100)
    yield
    for cache in cached:
        cache.cache_clear()


@pytest.mark.parametrize(
    ("orders", "rest"),
    [((12, 44), 1), ((12, 44), 16), ((12, 28, 44), 1), ((12, 12, 12), 16), ((12, 12, 20), 4)],
)
def test_several_outer_factors_are_applied_in_order(form, orders_up_to_100, rng, orders, rest):
    n = math.prod(orders) * rest
    assert factors(n) == (*orders, rest)
    x = torch.randn(2, *orders, rest, generator=rng, dtype=torch.float64)
    expected, back = x, x
    for axis, order in enumerate((*orders, rest), start=1):
        K = matrix(order).double() / math.sqrt(order)
        expected = torch.tensordot(K, expected, ([1], [axis])).movedim(0, axis)
        back = torch.tensordot(K.T, back, ([1], [axis])).movedim(0, axis)
    assert_near(rotate(x.view(2, n)), expected.reshape(2, n), EXACT)
    assert_near(invert(x.view(2, n)), back.reshape(2, n), EXACT)


def test_the_transpose_matters(form):
    K = matrix(12).double()
    assert not torch.equal(K, K.T)
    assert_near(rotate(torch.eye(12).double()[0]), K[:, 0] / math.sqrt(12), EXACT)
    assert_near(invert(torch.eye(12).double()[0]), K[0] / math.sqrt(12), EXACT)


@pytest.mark.parametrize(
    ("n", "block"), [(96, 8), (96, 12), (96, 96), (60, 20), (7, 1), (256, 128)]
)
def test_a_block_rotates_each_part_alike(form, rng, n, block):
    x = torch.randn(2, 3, n, generator=rng, dtype=torch.float64)
    Omega = torch.block_diag(*[dense(block)] * (n // block))
    assert_near(rotate(x, block=block), x @ Omega.T, EXACT)
    assert_near(invert(x, block=block), x @ Omega, EXACT)


@pytest.mark.parametrize("batch", [(), (0,), (1,), (2, 0, 3), (2, 1, 3)])
def test_any_batch_is_rotated_vector_by_vector(form, rng, batch):
    x = torch.randn(*batch, 48, generator=rng)
    assert rotate(x).shape == rotate(x, block=16).shape == x.shape
    expected = [rotate(v) for v in x.reshape(-1, 48)]
    assert_near(rotate(x).reshape(-1, 48), torch.stack([x.new_empty(48), *expected])[1:], 1e-6)


def test_columns_and_slices_are_rotated_as_their_copies_are(form, rng):
    x = torch.randn(96, 10, generator=rng, dtype=torch.float64)
    assert_near(rotate(x.T), rotate(x.T.contiguous()), EXACT)
    assert_near(rotate(x.T[:, ::2]), rotate(x.T[:, ::2].contiguous()), EXACT)


@pytest.mark.parametrize(
    ("dtype", "noise"), [(torch.float32, 1e-6), (torch.float16, 3e-3), (torch.bfloat16, 2e-2)]
)
@pytest.mark.parametrize("n", [96, 512])
def test_every_dtype_is_kept_up_to_its_noise(form, rng, dtype, noise, n):
    x = torch.randn(20, n, generator=rng).to(dtype)
    y = rotate(x)
    assert y.dtype == invert(x).dtype == dtype
    assert float((y.double() - rotate(x.double())).norm() / x.double().norm()) < noise
    assert float((invert(y).double() - x.double()).norm() / x.double().norm()) < 2 * noise


def test_half_precision_overflows_nowhere_between_the_passes():
    ones = torch.full((4096,), 1000.0, dtype=torch.float16)
    for y in (rotate(ones), reference.turn(ones, None, None, rows=False, transpose=False)):
        assert y[0] == 64_000  # 1000 sqrt(n), below the largest float16, 65504
        assert not y[1:].any()


@pytest.mark.parametrize("block", [None, 12])
def test_gradients_are_rotated_back(form, rng, block):
    x = torch.randn(2, 24, generator=rng, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: rotate(x, block=block), x)
    assert torch.autograd.gradcheck(lambda x: invert(x, block=block), x)
    g = torch.randn(2, 24, generator=rng, dtype=torch.float64)
    rotate(x, block=block).backward(g)
    assert_near(x.grad, invert(g, block=block), EXACT)


def test_what_inference_has_cached_still_lets_gradients_pass(form, rng):
    for cached in (matrix, reference._scaled, cpu._codes, cpu._plan):
        cached.cache_clear()
    with torch.inference_mode():
        rotate(torch.randn(2, 48, generator=rng))
    x = torch.randn(2, 48, generator=rng, requires_grad=True)
    rotate(x).sum().backward()
    assert_near(x.grad, invert(torch.ones(2, 48)), 1e-5)
