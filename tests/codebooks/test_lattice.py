"""The lattice codebooks of QuIP#: what they owe as codebooks, and their error on Gaussians."""

from dataclasses import replace

import pytest
import torch

from quip.codebooks import Codebook, Decoder, Groups, e8p
from quip.codebooks.lattice import LATTICES, STAGES, Lattice, Lattices
from quip.errors import QuipError
from quip.kernels.bits import pack, unpack, words
from quip.kernels.lattice_points import code_dtype, cpu
from tests.laws import assert_near, check_stored

NAMES = pytest.mark.parametrize("name", LATTICES)
H8 = torch.ones(8)


def gaussian(m, n, *, seed=0, dtype=torch.float32):
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def book(name, *, rho=None, ratio=None, scale=None):
    published = Lattice.published(name)
    scale = published.scale if scale is None else torch.tensor(scale)
    return replace(
        published,
        rhos=(rho,) if rho else published.rhos,
        ratio=ratio or published.ratio,
        scale=scale,
    )


def random_codes(name, *shape):
    bits = LATTICES[name].index_bits
    codes = torch.randint(0, 2**bits, shape, generator=torch.Generator().manual_seed(5))
    return codes.to(code_dtype(bits))


def joined(name, scales, groups):
    books = [book(name, scale=scale) for scale in scales]
    return books[0].joined(books, groups)


@NAMES
def test_lattices_say_what_they_are(name):
    lattice, row = Lattice.published(name), LATTICES[name]
    assert isinstance(lattice, Codebook)
    assert lattice.name == name
    assert (lattice.dim, lattice.index_bits) == (8, row.index_bits)
    assert lattice.index_bits == sum(STAGES[stage].INDEX_BITS for stage in row.stages)
    assert lattice.seeded(torch.Generator()) is lattice
    X = gaussian(3, 16)
    assert lattice.fit(X, torch.ones(16)).clamp(100 * X).tolist() == (100 * X).tolist()


@pytest.mark.parametrize(
    ("name", "rho", "ratio", "error", "digit"),
    [  # specification, section 12; digit: half a unit of the last one, and 2-bit sampling noise
        ("E8P12", None, None, 0.0913, 4e-4),
        ("E8P12", 0.9, None, 0.099, 5e-4),
        ("E8P12RVQ3B", None, None, 0.0295, 5e-5),
        ("E8P12RVQ4B", None, None, 0.0097, 5e-5),
        ("E8P12RVQ4B", 0.9, 3.8, 0.0084, 5e-5),
    ],
)
def test_the_error_on_gaussian_weights_is_the_published_one(name, rho, ratio, error, digit):
    m = 200_000 if cpu.available() else 20_000
    x = gaussian(m, 8)
    lattice = book(name, rho=rho, ratio=ratio)
    lattice = replace(lattice, scale=torch.tensor(1 / lattice.rhos[0]))
    squares = (x - lattice.decode(lattice.round(x, H8))).square().mean(1)
    noise = 4 * float(squares.std()) / m**0.5
    assert abs(float(squares.mean()) - error) <= digit + noise


@NAMES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_scale_follows_the_weights(name, dtype):
    X, h = gaussian(5, 24, dtype=dtype), torch.ones(24, dtype=dtype)
    lattice = Lattice.published(name).fit(X, h)
    assert lattice.scale.dtype == dtype
    assert lattice.scale.shape == ()
    assert_near(lattice.scale, X.square().mean().sqrt() / LATTICES[name].rho, 2**-8)
    for file in (torch.float16, torch.float32):  # what a file will hold
        assert torch.equal(lattice.scale, lattice.scale.to(file).to(dtype))
    assert torch.equal(lattice.fit(2 * X, h).fit(X, h).scale, lattice.scale)
    codes = lattice.round(X[:, :8], h[:8])
    assert torch.equal(lattice.fit(4 * X, h).round(4 * X[:, :8], h[:8]), codes)


@NAMES
def test_weights_of_zero_have_a_scale_too(name):
    lattice = Lattice.published(name).fit(torch.zeros(4, 8), H8)
    assert 0 < float(lattice.scale.half()) < 1e-7  # which files of float16 hold
    W_hat = lattice.decode(lattice.round(torch.zeros(4, 8), H8))
    assert bool((W_hat.abs() < 1e-7).all())


@NAMES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_best_of_several_scales_has_the_least_weighted_error(name, dtype):
    X, h = gaussian(50, 24, dtype=dtype), torch.linspace(0.1, 3, 24, dtype=dtype)
    rhos = (0.5, 0.9, 1.0, 1.6)

    def error(rho: float) -> float:
        one = book(name, rho=rho).fit(X, h)
        W_hat = torch.cat([one.decode(one.round(x, h[:8])) for x in X.split(8, dim=1)], dim=1)
        return float(((X - W_hat).square() @ h).sum())

    expected = book(name, rho=min(rhos, key=error)).fit(X, h)
    for given in (X, X.T.contiguous().T):
        best = replace(book(name), rhos=rhos).fit(given, h)
        assert_near(best.scale, expected.scale, 1e-6)  # sums in another order


def test_the_best_scale_depends_on_the_weights_of_the_errors():
    X = torch.cat([gaussian(50, 8), 8 * gaussian(50, 8, seed=1)], dim=1)
    fits = [
        replace(book("E8P12"), rhos=(0.2, 0.4, 0.8, 1.6, 3.2, 6.4)).fit(X, h.repeat_interleave(8))
        for h in (torch.tensor([1.0, 1e-6]), torch.tensor([1e-6, 1.0]))
    ]
    assert float(fits[0].scale) < float(fits[1].scale)


@NAMES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_is_stage_by_stage(name, dtype):
    x = gaussian(500, 8, dtype=dtype)
    lattice = Lattice.published(name).fit(x, H8.to(dtype))
    codes, W_hat = lattice.round(x, H8.to(dtype)), None
    assert codes.dtype == code_dtype(lattice.index_bits)
    assert int(codes.min()) >= 0
    assert int(codes.max()) < 2**lattice.index_bits
    y = x / lattice.scale
    first = e8p.nearest(y)
    assert (codes & 0xFFFF).tolist() == first.tolist()
    W_hat = e8p.decode(first, dtype)
    if lattice.ratio is not None:
        stage = STAGES[lattice.stages[1]]
        second = stage.nearest((y - W_hat) * lattice.ratio)
        assert (codes >> 16).tolist() == second.tolist()
        W_hat += stage.decode(second, dtype) / lattice.ratio
    decoded = lattice.decode(codes)
    assert decoded.dtype == dtype
    assert torch.equal(decoded, lattice.scale * W_hat)


def test_all_points_of_one_stage_round_to_themselves():
    codes = torch.arange(65536, dtype=torch.int32)
    for scale in (0.013, 1.0, 47.0):
        lattice = book("E8P12", scale=scale)
        assert torch.equal(lattice.round(lattice.decode(codes), H8), codes)


def test_more_stages_lose_less():
    x = gaussian(2000, 8)
    errors = []
    for name in LATTICES:
        lattice = Lattice.published(name).fit(x, H8)
        errors.append(float((x - lattice.decode(lattice.round(x, H8))).square().mean()))
    assert errors[0] > 2 * errors[1] > 4 * errors[2]


@NAMES
def test_a_row_of_weights_is_rounded_the_same_from_any_strides(name):
    X = gaussian(40, 24)
    lattice = Lattice.published(name).fit(X, torch.ones(24))
    T = X.T.contiguous()
    for lo in (0, 8, 16):
        codes = lattice.round(X[:, lo : lo + 8].contiguous(), H8)
        assert torch.equal(lattice.round(X[:, lo : lo + 8], H8), codes)
        assert torch.equal(lattice.round(T[lo : lo + 8].T, H8), codes)


@NAMES
@pytest.mark.parametrize("size", [None, 1, 2, 3, 100])
def test_a_matrix_is_decoded_group_by_group(name, size, monkeypatch):
    groups, codes = Groups(5, size), random_codes(name, 7, 5)
    scales = [0.5 + k / 7 for k in range(groups.count)]
    matrix = joined(name, scales, groups)
    assert isinstance(matrix, Decoder)
    W_hat = matrix.decode(codes)
    assert W_hat.dtype == torch.float32
    run = size or 5
    expected = [book(name, scale=scales[k // run]).decode(c) for k, c in enumerate(codes.T)]
    assert torch.equal(W_hat, torch.cat(expected, dim=1))
    assert torch.equal(matrix.decode(codes.long()), W_hat)
    assert torch.equal(matrix.decode(codes.T.contiguous().T), W_hat)
    monkeypatch.setattr(cpu, "library", lambda source: None)
    assert torch.equal(matrix.decode(codes), W_hat)


@NAMES
def test_codes_survive_packing(name):
    matrix, codes = joined(name, [1.0], Groups(6, None)), random_codes(name, 4, 6)
    packed = pack(codes, matrix.index_bits)
    assert packed.shape == (4, words(6, matrix.index_bits))
    again = unpack(packed, matrix.index_bits, 6)
    assert torch.equal(matrix.decode(again), matrix.decode(codes))


@NAMES
@pytest.mark.parametrize("size", [None, 1, 3])
def test_stored_lattices_come_back(name, size):
    groups = Groups(5, size)
    matrix = joined(name, [0.5 + k for k in range(groups.count)], groups)
    again = check_stored(matrix, 7, 40)
    codes = random_codes(name, 7, 5)
    assert torch.equal(again.decode(codes), matrix.decode(codes))
    assert again.index_bits == matrix.index_bits


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_a_damaged_scale_is_noticed(bad):
    scale = torch.tensor([1.0, bad])
    with pytest.raises(QuipError, match="the file is damaged"):
        Lattices.restore({"scale": scale}, 4, 16, name="E8P12", ratio=None, group=8)


@pytest.mark.parametrize(
    ("n", "options", "message"),
    [
        (20, {}, "a multiple of 8 inputs, not 20"),
        (16, {"group": 12}, "multiples of 8 columns, not 12"),
        (16, {"group": 0}, "multiples of 8 columns, not 0"),
        (16, {"group": -8}, "multiples of 8 columns, not -8"),
        (16, {"name": "D4"}, "no lattice is called 'D4'"),
        (16, {"ratio": 2.0}, "E8P12 takes no ratio"),
        (16, {"name": "E8P12RVQ3B"}, "needs a ratio"),
        (16, {"name": "E8P12RVQ3B", "ratio": -1.0}, "-1.0"),
        (16, {"name": "E8P12RVQ3B", "ratio": float("nan")}, "nan"),
    ],
)
def test_options_that_make_no_lattice_are_refused(n, options, message):
    options = {"name": "E8P12", "ratio": None, "group": None} | options
    for make in (Lattices.empty, lambda *a, **k: Lattices.restore({"scale": H8[:1]}, *a, **k)):
        with pytest.raises(QuipError, match=message):
            make(4, n, **options)
