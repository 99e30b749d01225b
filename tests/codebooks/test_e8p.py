"""E8P and E81B: the published numbers, and nearest points against all points there are."""

import math

import pytest
import torch

from quip.codebooks import e8p, e81b
from quip.kernels.lattice_points import cpu

needs_compiler = pytest.mark.skipif(not cpu.available(), reason="no C++ compiler")
STAGES = pytest.mark.parametrize("stage", [e8p, e81b], ids=["e8p", "e81b"])
CPU = torch.device("cpu")
SCALES = pytest.mark.parametrize("scale", [0.3, 0.9, 1.03, 3.0])
VECTORS = {  # specification, section 12
    0x0000: [0.75] * 8,
    0x0001: [0.25] * 8,
    0x0003: [-0.25, 0.75, -0.25, 0.75, 0.75, 0.75, 0.75, 0.75],
    0x0100: [0.75] * 7 + [-1.25],
    0x01FF: [-0.25] * 7 + [1.75],
    0x1234: [-0.75, -0.75, 0.25, -0.75, -1.75, 0.25, 0.25, 1.25],
    0xE3A7: [1.25, 0.25, -0.75, -0.75, -1.75, 1.25, 1.25, 1.25],
    0xFF80: [-1.75, 1.25, 0.25, 0.25, 1.25, 1.25, 1.25, 0.25],
}


def every_point(stage, dtype=torch.float64):
    return stage.decode(torch.arange(2**stage.INDEX_BITS), dtype)


def gaussian(m, scale=1.0, *, seed=0, dtype=torch.float64):
    rng = torch.Generator().manual_seed(seed)
    return scale * torch.randn(m, 8, generator=rng, dtype=dtype)


def least_distances(x, points):
    """The squared distance of each x to the nearest of all points, by looking at them all."""
    norms = points.square().sum(1)
    found = torch.cat([(norms - 2 * part @ points.T).argmin(1) for part in x.split(128)])
    return (x - points[found]).square().sum(1)


def awkward():
    """Ties, zeros, and numbers far outside and far below the points: [k, 8] in float64."""
    rng = torch.Generator().manual_seed(3)
    halves = torch.randint(-8, 9, (300, 8), generator=rng) / 2  # many ties
    quarters = torch.randint(-12, 13, (300, 8), generator=rng) / 4
    few = torch.zeros(16, 8)
    few[range(16), [*range(8)] * 2] = torch.tensor([1.0, -1.0]).repeat_interleave(8)
    same = torch.linspace(-3, 3, 25)[:, None].expand(25, 8)
    x = torch.cat([torch.zeros(1, 8), -torch.zeros(1, 8), halves, quarters, few, 2 * few, same])
    sizes = [1e-30, 1e-8, 1e4, 1e15]
    return torch.cat([x.double(), *[size * gaussian(50, seed=4) for size in sizes]])


def searches(stage):
    """nearest in torch and, where there is a compiler, its fast form."""
    yield stage.nearest
    if cpu.available():
        yield lambda x: compiled(x, stage)


def compiled(x, *stages, scale=1.0, ratio=None):
    """The codes of the kernel."""
    return cpu.nearest(x, tables(stages), scale=torch.tensor(scale), ratio=ratio)


def compiled_points(codes, *stages, scale=1.0, ratio=None, out=None):
    """What the kernel decodes them to."""
    scales = torch.tensor([scale])
    return cpu.decode(codes, tables(stages), scales, group=None, ratio=ratio, out=out)


def tables(stages):
    return [stage.tables(CPU) for stage in stages]


def test_the_magnitudes_are_the_published_ones():
    table = e8p.magnitudes().double() / 2
    norms = table.square().sum(1)
    assert table.shape == (256, 8)
    assert len(table.unique(dim=0)) == 256
    assert int((norms <= 10).sum()) == 227
    assert bool((norms[227:] == 12).all())
    assert table[:227].tolist() == sorted(table[:227].tolist())
    packed = [int(e8p.packed_table()[i]) & 0xFFFFFFFF for i in (0, 1, 2, 255)]
    assert packed == [0x99999999, 0x59999999, 0xD9999999, 0x7B9BBB9B]


def test_the_packed_table_decodes_as_the_specification_says():
    codes = torch.randint(0, 2**16, (500,), generator=torch.Generator().manual_seed(0))
    for code, point in zip(codes.tolist(), e8p.decode(codes).tolist(), strict=True):
        word, byte = int(e8p.packed_table()[code >> 8]) & 0xFFFFFFFF, code & 255
        odd = byte.bit_count() % 2
        for b, i in enumerate(e8p.ORDER):
            nibble = word >> 4 * b & 15
            nibble ^= 14 if (byte ^ odd) >> b & 1 else 0
            assert (nibble - 8) / 2 + (-0.25 if odd else 0.25) == point[i]


def test_codes_decode_to_the_published_vectors():
    assert e8p.decode(torch.tensor(list(VECTORS))).tolist() == list(VECTORS.values())


def test_the_points_are_those_of_the_shifted_lattice():
    points = every_point(e8p)
    assert len(points.unique(dim=0)) == 65536
    assert float(points.square().mean().sqrt()) == 1.09375
    assert float(points.sum()) == 0
    assert [float(x) for x in points.square().sum(1).aminmax()] == [0.5, 16.5]
    shifted = points - 0.25
    whole = (shifted == shifted.round()).all(1)
    half = (shifted - 0.5 == (shifted - 0.5).round()).all(1)
    assert (int(whole.sum()), int(half.sum())) == (32768, 32768)
    assert bool((shifted.sum(1) % 2 == 0).all())


def test_a_search_of_reduced_vectors_would_have_1366_of_them():
    v = every_point(e8p) - 0.25
    v = v[(v - v.round()).abs().amin(1) == 0.5]  # one shift
    seven = v[:, :7]
    assert int(((seven >= -0.5).all(1) & ((seven < 0).sum(1) <= 1)).sum()) == 1366


def test_e81b_has_whole_half_and_long_points_in_order():
    points = every_point(e81b)
    whole, half, long = points[:113], points[113:241], points[241:]
    assert len(points.unique(dim=0)) == 256
    for part in (whole, half):
        assert part.tolist() == sorted(part.tolist())
        assert bool((part.sum(1) % 2 == 0).all())
    assert bool((whole == whole.round()).all())
    assert whole.square().sum(1).unique().tolist() == [0, 2]
    assert bool((half.abs() == 0.5).all())
    assert long.tolist() == torch.cat([2 * torch.eye(8), -2 * torch.eye(8)[:7]]).tolist()


@STAGES
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_points_are_exact_in_every_dtype_and_round_to_themselves(stage, dtype):
    points = every_point(stage, dtype)
    assert points.dtype == dtype
    assert torch.equal(points.double(), every_point(stage))
    codes = stage.nearest(points)
    assert codes.dtype == torch.int32
    assert torch.equal(codes, torch.arange(2**stage.INDEX_BITS, dtype=torch.int32))


@STAGES
@SCALES
def test_the_nearest_point_is_the_nearest_of_all(stage, scale):
    x, points = gaussian(1000, scale, seed=1), every_point(stage)
    distances = (x - points[stage.nearest(x).long()]).square().sum(1)
    torch.testing.assert_close(distances, least_distances(x, points), rtol=1e-13, atol=1e-13)


@STAGES
def test_awkward_vectors_find_a_nearest_point_too(stage):
    x, points = awkward(), every_point(stage)
    distances = (x - points[stage.nearest(x).long()]).square().sum(1)
    torch.testing.assert_close(distances, least_distances(x, points), rtol=1e-13, atol=1e-13)


@STAGES
def test_codes_of_any_shape_decode_and_no_vectors_have_no_codes(stage):
    codes = torch.arange(24, dtype=torch.int32).view(2, 3, 4)
    assert stage.decode(codes).shape == (2, 3, 4, 8)
    assert stage.nearest(torch.empty(0, 8)).shape == (0,)


def test_the_point_that_e81b_lacks_goes_to_its_neighbours():
    last = torch.eye(8)[7:]
    for size in (1.9, 2.0, 2.1, 5.0):
        for search in searches(e81b):
            assert e81b.decode(search(size * last)).tolist() == (2 * last).tolist()
            found = e81b.decode(search(-size * last))
            distance = float((found + size * last).square().sum())
            assert math.isclose(distance, (size - 1) ** 2 + 1, rel_tol=1e-6)  # -e_7 +- e_i


@needs_compiler
@STAGES
@SCALES
def test_the_compiled_search_finds_what_torch_finds(stage, scale):
    x, points = gaussian(20000, scale, seed=2, dtype=torch.float32), every_point(stage)
    ours, expected = compiled(x, stage), stage.nearest(x)
    assert ours.dtype == torch.int32
    assert int((ours != expected).sum()) <= 5  # ties within float noise
    distances = [(x - points[c.long()]).square().sum(1) for c in (ours, expected)]
    # Keys lose three bits of 24, in up to eight terms of a score.
    torch.testing.assert_close(*distances, rtol=0, atol=2**-17 * max(1, scale) ** 2)


@needs_compiler
@STAGES
def test_the_compiled_search_finds_awkward_vectors_nearest_points(stage):
    x, points = awkward().float().double(), every_point(stage)
    codes = compiled(x.float(), stage)
    distances = (x - points[codes.long()]).square().sum(1)
    least = least_distances(x, points)
    size = 1 + x.norm(dim=1) * 4.1  # <x, v> is what float noise is relative to
    assert bool((distances - least <= 2**-17 * size).all())


@needs_compiler
@pytest.mark.parametrize("m", [0, 1, 7, 16, 17, 333])
@STAGES
def test_the_compiled_search_takes_any_strides_and_any_number_of_vectors(stage, m):
    x = gaussian(m, dtype=torch.float32)
    expected = stage.nearest(x)
    columns = x.T.contiguous().T
    wide = torch.full((2 * m, 24), torch.nan)
    wide[::2, 1:24:3] = x
    for view in (x, columns, wide[::2, 1:24:3]):
        assert torch.equal(compiled(view, stage), expected)


@needs_compiler
def test_compiled_decoding_is_torchs_bit_for_bit_whatever_the_strides():
    for stage in (e8p, e81b):
        codes = torch.arange(2**stage.INDEX_BITS, dtype=torch.int32)
        points = every_point(stage, torch.float32)
        assert torch.equal(compiled(points, stage), codes)
        assert torch.equal(compiled_points(codes[:, None], stage), points)
        out = torch.empty(8, len(codes)).T
        assert compiled_points(codes[:, None], stage, out=out) is out
        assert torch.equal(out, points)


@needs_compiler
@pytest.mark.parametrize("m", [1, 16, 333])
def test_the_compiled_error_is_that_of_its_codes(m):
    x, h = 0.7 * gaussian(m, dtype=torch.float32), torch.linspace(0.1, 2, 8)
    for stages in ((e8p,), (e81b,), (e8p, e81b), (e8p, e8p)):
        given = {"scale": 0.7, "ratio": 2.5 if len(stages) > 1 else None}
        W_hat = compiled_points(compiled(x, *stages, **given)[:, None], *stages, **given)
        expected = float((x - W_hat).double().square().sum(0) @ h.double())
        given["scales"] = torch.tensor([given.pop("scale")])
        ours = cpu.errors(x, h, tables(stages), **given)
        assert math.isclose(float(ours), expected, rel_tol=1e-5)


@needs_compiler
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e38])
def test_what_is_no_number_still_gets_a_code(value):
    x = gaussian(64, dtype=torch.float32)
    x[::3, ::2] = value
    x[1] = value
    for stages, bits in (((e8p,), 16), ((e8p, e81b), 24), ((e8p, e8p), 32)):
        codes = compiled(x, *stages, ratio=3.0 if len(stages) > 1 else None)
        assert int(codes.min()) >= 0
        assert int(codes.max()) < 2**bits
