"""Lattice points on CUDA: the source on the CPU, what it compiles to, and on a device."""

import pytest
import torch

from quip.codebooks import e8p, e81b
from quip.kernels.lattice_points import cpu, cuda, operations, reference
from quip.kernels.lattice_points.tables import code_bits, code_dtype
from tests.support import ptxas
from tests.support.emulation import emulated, needs_compiler  # noqa: F401

CPU = torch.device("cpu")
CODES = {"E8P": (e8p,), "E81B": (e81b,), "RVQ3": (e8p, e81b), "RVQ4": (e8p, e8p)}
TIES = {"rtol": 2e-5, "atol": 1e-5}  # of squared distances: of lost gains near 3, in 2^-18
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def stages_of(modules, device=CPU):
    return tuple(module.tables(device) for module in modules)


def ratio_of(stages):
    return 3.5 if len(stages) > 1 else None


def distances(x, codes, stages, scale):
    options = {"group": None, "ratio": ratio_of(stages)}
    w_hat = reference.decode(codes[:, None], stages, scale[None], **options)
    return (x - w_hat).square().sum(1)


def assert_finds_the_nearest(modules, count, device="cpu"):
    """Codes of reference.py but for ties: points that are no nearer, of few of the vectors."""
    stages, rng = stages_of(modules, torch.device(device)), torch.Generator().manual_seed(0)
    ratio, scale = ratio_of(stages), torch.tensor(0.9, device=device)
    for spread in (0.3, 1.0, 1.7):
        x = (spread * torch.randn(count, 8, generator=rng)).to(device)
        expected = reference.nearest(x, stages, scale=scale, ratio=ratio)
        for view in (x, x.T.contiguous().T):
            codes = cuda.nearest(view, stages, scale=scale, ratio=ratio)
            assert codes.dtype == expected.dtype
            assert (codes != expected).float().mean() < 2e-3
            if ratio is None:  # of two stages the first alone is nearest
                ours, theirs = (distances(x, c, stages, scale) for c in (codes, expected))
                torch.testing.assert_close(ours, theirs, **TIES)


def assert_decodes_bit_for_bit(modules, device="cpu"):
    stages, rng = stages_of(modules), torch.Generator().manual_seed(0)
    bits, ratio = code_bits(stages), ratio_of(stages_of(modules))
    codes = torch.randint(2**bits, (7, 5), generator=rng).to(code_dtype(bits))
    there = stages_of(modules, torch.device(device))
    for group, groups in ((None, 1), (2, 3), (1, 5)):
        scales = torch.rand(groups, generator=rng) + 0.5
        expected = reference.decode(codes, stages, scales, group=group, ratio=ratio)
        for given in (codes.to(device), codes.to(device).T.contiguous().T):
            ours = cuda.decode(given, there, scales.to(device), group=group, ratio=ratio)
            assert torch.equal(ours.cpu(), expected)


def assert_sums_errors(modules, m, n, device="cpu"):
    stages, rng = stages_of(modules, torch.device(device)), torch.Generator().manual_seed(0)
    X, h = torch.randn(m, n, generator=rng), torch.rand(n, generator=rng)
    scales, ratio = torch.tensor([0.7, 0.9, 1.2], device=device), ratio_of(stages)
    X, h = X.to(device), h.to(device)
    options = {"scales": scales, "ratio": ratio}
    expected = operations.errors_by_rounding(X, h, stages, **options)
    for view in (X, X.T.contiguous().T):
        ours = cuda.errors(view, h, stages, **options)
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=0)


# The source, compiled for the CPU


@needs_compiler
@pytest.mark.parametrize("modules", CODES.values(), ids=CODES)
def test_the_source_finds_the_nearest_points(modules, emulated):  # noqa: F811
    assert_finds_the_nearest(modules, 700)


@needs_compiler
def test_the_source_finds_every_point_again(emulated):  # noqa: F811
    stages, codes = stages_of((e8p,)), torch.arange(0, 2**16, 7, dtype=torch.int32)
    x = cpu.decode(codes[:, None], stages, torch.ones(1), group=None, ratio=None)
    assert torch.equal(cuda.nearest(x, stages, scale=torch.tensor(1.0), ratio=None), codes)


@needs_compiler
@pytest.mark.parametrize("modules", CODES.values(), ids=CODES)
def test_the_source_decodes_bit_for_bit(modules, emulated):  # noqa: F811
    assert_decodes_bit_for_bit(modules)


@needs_compiler
@pytest.mark.parametrize("modules", CODES.values(), ids=CODES)
def test_the_source_sums_the_errors_of_each_scale(modules, emulated):  # noqa: F811
    assert_sums_errors(modules, 50, 24)


@needs_compiler
def test_what_is_no_number_has_a_code_too(emulated):  # noqa: F811
    for modules in CODES.values():
        stages = stages_of(modules)
        x = torch.tensor([torch.nan, torch.inf, -torch.inf])[:, None].expand(3, 8)
        codes = cuda.nearest(x, stages, scale=torch.tensor(1.0), ratio=ratio_of(stages))
        assert bool(((codes >= 0) & (codes < 2 ** code_bits(stages))).all())


# What it compiles to


@pytest.mark.slow
def test_nothing_is_spilled(tmp_path):
    found = ptxas.kernels(cuda.SOURCE, (9, 0), tmp_path)
    assert len(found) == 3  # nearest points, those of codes, errors
    for kernel in found:
        assert (kernel.spilled, kernel.stack) == (0, 0), kernel
        assert kernel.registers <= 64, kernel


# On a device


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("modules", CODES.values(), ids=CODES)
def test_a_device_does_the_same(modules):
    assert_finds_the_nearest(modules, 100_000, "cuda")
    assert_decodes_bit_for_bit(modules, "cuda")
    assert_sums_errors(modules, 5000, 40, "cuda")
