"""kernels/hadamard/cuda.cu on the host, what it compiles to, and on a device where there is one."""

import math

import pytest
import torch
from torch import Tensor

from quip.kernels.hadamard import cuda, invert, invert_rows, reference, rotate, rotate_rows
from quip.kernels.hadamard.shares import Shares
from tests.laws import assert_near
from tests.support import ptxas
from tests.support.emulation import emulated, needs_compiler  # noqa: F401

NOISE = 3e-6  # of the largest entry: sums of up to 28672 numbers, made in some 10 to 60 steps
WIDTHS = [
    *[(n, None) for n in (4, 16, 128, 256, 512, 1024)],  # in registers
    *[(256, 4), (384, 128), (1536, 512)],
    *[(2048, None), (8192, None), (48, None), (576, None), (1536, None)],  # in shared memory
    *[(4 * 192, 192), (28 * 128, None), (68 * 16, None)],
]
SLOW_WIDTHS = [(172 * 64, None), (4096, None), (28 * 1024, None), (20 * 256, None)]
HALVES = [torch.bfloat16, torch.float16]
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def check_vectors(x: Tensor, block: int | None, *, device: str = "cpu") -> None:
    """Both directions, with signs and without."""
    there = x.to(device)
    for signs in (None, randn(x.shape[-1], seed=1)):
        for transpose in (False, True):
            D = None if signs is None else signs.to(device)
            wide = None if signs is None else signs.double()
            kept = there.clone()
            y = cuda.turn(there, D, block, rows=False, transpose=transpose).cpu()
            assert torch.equal(there, kept)
            assert (y.dtype, y.shape) == (x.dtype, x.shape)
            expected = reference.turn(x.double(), wide, block, rows=False, transpose=transpose)
            assert_near(y.double(), expected, NOISE)


def check_rows(W: Tensor, block: int | None, *, device: str = "cpu") -> None:
    for signs in (None, randn(len(W), seed=1)):
        for transpose in (False, True):
            D = None if signs is None else signs.to(device)
            wide = None if signs is None else signs.double()
            y = cuda.turn(W.to(device), D, block, rows=True, transpose=transpose).cpu()
            expected = reference.turn(W.double(), wide, block, rows=True, transpose=transpose)
            assert_near(y.double(), expected, NOISE)


# The source, compiled for the CPU


@needs_compiler
@pytest.mark.parametrize(("n", "block"), WIDTHS)
def test_every_width_is_the_reference(n, block, emulated):  # noqa: F811
    check_vectors(randn(3, n), block)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(("n", "block"), SLOW_WIDTHS)
def test_the_widths_of_large_models_are_the_reference(n, block, emulated):  # noqa: F811
    check_vectors(randn(2, n), block)


@needs_compiler
@pytest.mark.parametrize("count", [1, 5, 40, 70])
@pytest.mark.parametrize("n", [64, 48, 68 * 4])
def test_few_and_many_vectors_are_turned_alike(count, n, emulated):  # noqa: F811
    check_vectors(randn(count, n), None)


@needs_compiler
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize(("n", "count"), [(256, 3), (2048, 1), (48, 3), (68 * 4, 70)])
@pytest.mark.parametrize("dtype", HALVES)
def test_casts_and_a_bias_are_part_of_it(n, count, dtype, transpose, emulated):  # noqa: F811
    x, signs, bias = randn(count, n).to(dtype), randn(n, seed=1), randn(n, seed=2).to(dtype)
    given = x, signs, bias, None
    wide = cuda.turn_vectors(*given, transpose=transpose, dtype=torch.float32)
    expected = reference.turn(x.double(), signs.double(), None, rows=False, transpose=transpose)
    assert_near(wide.double(), expected + bias.double(), NOISE)
    halves = cuda.turn_vectors(*given, transpose=transpose, dtype=dtype)
    assert torch.equal(halves, wide.to(dtype))


@needs_compiler
def test_views_are_turned_as_their_copies_are(emulated):  # noqa: F811
    x, signs = randn(97, 48), randn(97, seed=1)
    for view in (x[1:].T, x.flatten()[1:97].view(2, 48), x[:, :1].expand(97, 48)):
        D = signs[1 : 1 + view.shape[-1]]
        options = {"rows": False, "transpose": True}
        copy = cuda.turn(view.contiguous(), D.clone(), None, **options)
        assert torch.equal(cuda.turn(view, D, None, **options), copy)


@needs_compiler
@pytest.mark.parametrize(
    ("n", "block"), [(8, None), (128, None), (1024, None), (96, 32), (48, None), (96, 48)]
)
@pytest.mark.parametrize("m", [1, 37])
def test_rows_are_turned_as_the_reference_turns_them(n, block, m, emulated):  # noqa: F811
    check_rows(randn(n, m), block)


@needs_compiler
def test_what_is_not_finite_stays_in_its_vector(emulated):  # noqa: F811
    for n in (64, 48):
        x = randn(9, n)
        x[4, 3] = math.nan
        y = cuda.turn(x, None, None, rows=False, transpose=False)
        z = cuda.turn(x.T, None, None, rows=True, transpose=False).T
        for found in (y, z):
            assert bool(found[4].isnan().all())
            assert bool(found[[*range(4), *range(5, 9)]].isfinite().all())


def test_few_vectors_have_many_blocks_and_many_have_one_each():
    def shares(*sizes: int) -> tuple[int, int, int]:
        of = Shares.of(*sizes)
        return of.fold, of.shares, of.rows

    assert shares(1, 1, 4096) == (16, 1, 4)
    assert shares(1, 172, 64) == (8, 8, 24)
    assert shares(1, 28, 1024) == (16, 4, 8)
    assert shares(16, 172, 64) == (8, 1, 172)
    assert shares(2048, 28, 1024) == (1, 1, 28)
    for order, runs in ((172, 64), (28, 1024), (1, 32768), (368, 16), (12, 4)):
        for vectors in (1, 2, 7, 32, 33, 64):
            of = Shares.of(vectors, order, runs)
            assert of.rows % 4 == 0
            assert (of.shares - 1) * of.rows < order <= of.shares * of.rows
            assert runs % (4 * of.fold) == 0


def test_the_operation_is_one_call_with_casts_and_bias(rng):
    x, signs, bias = randn(3, 96).bfloat16(), randn(96, seed=1), randn(96, seed=2)
    expected = rotate(x.float(), signs=signs)
    assert torch.equal(rotate(x, signs=signs, dtype=torch.float32), expected)
    assert torch.equal(rotate(x, signs=signs, bias=bias), (expected + bias).bfloat16())
    assert torch.equal(invert(x, dtype=torch.float32), invert(x.float()))
    learned = bias.clone().requires_grad_()
    rotate(x, signs=signs, bias=learned).sum().backward()
    assert torch.equal(learned.grad, torch.full((96,), 3.0))


# What it compiles to


@pytest.mark.slow
@pytest.mark.parametrize("capability", ptxas.CAPABILITIES)
def test_no_kernel_spills(tmp_path, capability):
    compiled = ptxas.kernels(cuda.SOURCE, capability, tmp_path)
    assert len(compiled) == 4 + 3 + 6
    for kernel in compiled:
        assert kernel.spilled == kernel.stack == 0, kernel
        # All of a block of 512 threads must fit, and two of those that take a vector each.
        most = 64 if "wholeILi1E" in kernel.name or "runs" in kernel.name else 128
        assert kernel.registers <= most, kernel


# On a device


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize(("n", "block"), [*WIDTHS, *SLOW_WIDTHS, (172 * 128, None), (12288, 128)])
@pytest.mark.parametrize("count", [1, 16, 200])
def test_a_device_turns_vectors_as_the_reference_does(n, block, count):
    check_vectors(randn(count, n), block, device="cuda")


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize(("n", "block"), [(4096, None), (172 * 64, None), (1024, 128), (576, 192)])
def test_a_device_turns_rows_as_the_reference_does(n, block):
    check_rows(randn(n, 300), block, device="cuda")


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_a_device_turns_what_a_kernel_before_has_just_made(dtype):
    signs = randn(4096, seed=1).sign().cuda()
    for seed in range(20):
        x = randn(4096, seed=seed).to("cuda", dtype)
        y = x
        for _ in range(8):  # kernels that overlap
            y = invert(rotate(y, signs=signs, dtype=torch.float32), signs=signs, dtype=dtype)
        assert_near(y.float().cpu(), x.float().cpu(), {torch.float32: 1e-5}.get(dtype, 0.05))
    W = randn(4096, 64).cuda()
    assert_near(invert_rows(rotate_rows(W, signs=signs), signs=signs).cpu(), W.cpu(), 1e-5)
