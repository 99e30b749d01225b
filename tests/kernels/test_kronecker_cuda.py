"""kernels/kronecker/cuda.cu on the host, what it compiles to, and on a device where one is."""

import pytest
import torch
from torch import Tensor

from quip.kernels.kronecker import cuda, reference
from tests.laws import assert_near
from tests.support import ptxas
from tests.support.emulation import emulated, needs_compiler  # noqa: F401

NOISE = 2e-6  # of the largest entry: two sums of up to 224 numbers
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def check(p: int, q: int, batch: tuple[int, ...], permuted: str, device: str = "cpu") -> None:
    """The kernel gives what the reference does in float64; what it was given stays as it was."""
    n, rng = p * q, torch.Generator().manual_seed(p)
    x, left, right = randn(*batch, n), randn(p, p, seed=1) / p**0.5, randn(q, q, seed=2) / q**0.5
    first = torch.randperm(n, generator=rng) if "first" in permuted else None
    last = torch.randperm(n, generator=rng).int() if "last" in permuted else None
    args = [None if t is None else t.to(device) for t in (x, left, right.T, first, last)]
    y = cuda.rotate(*args)
    assert (y.dtype, y.shape) == (x.dtype, x.shape)
    assert torch.equal(args[0].cpu(), x)
    expected = reference.rotate(x.double(), left.double(), right.T.double(), first, last)
    assert_near(y.double().cpu(), expected, NOISE)
    assert torch.equal(cuda.rotate(*args), y)


@needs_compiler
@pytest.mark.parametrize(("p", "q"), [(1, 1), (1, 13), (3, 4), (17, 12)])
@pytest.mark.parametrize("permuted", ["", "first", "last", "first last"])
def test_the_source_rotates_as_the_reference_does(p, q, permuted, emulated):  # noqa: F811
    check(p, q, (2,), permuted)


@needs_compiler
@pytest.mark.slow
def test_sums_go_through_all_rounds_of_a_warp_and_of_a_block(emulated):  # noqa: F811
    check(66, 70, (2,), "first last")


@needs_compiler
@pytest.mark.parametrize("batch", [(), (1,), (2, 3)])
def test_any_batch_is_rotated_vector_by_vector(batch, emulated):  # noqa: F811
    check(8, 12, batch, "first last")


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_factors_and_casts_are_part_of_it(dtype, emulated):  # noqa: F811
    x, left, right, order = randn(2, 96).to(dtype), randn(8, 8), randn(12, 12), torch.randperm(96)
    before, after = randn(96, seed=1), randn(96, seed=2)
    args = (left, right, order, order.flip(0))
    wide = cuda.rotate_scaled(x, *args, before, after, dtype=torch.float32)
    doubled = [t.double() if t.is_floating_point() else t for t in (x * before, *args)]
    assert_near(wide.double(), after.double() * reference.rotate(*doubled), NOISE)
    narrow = cuda.rotate_scaled(x, *args, before, after, dtype=dtype)
    assert torch.equal(narrow, wide.to(dtype))


@needs_compiler
def test_inverse_permutations_go_with_what_they_invert(emulated):  # noqa: F811
    held = len(cuda._INVERSES)
    order = torch.randperm(12)
    given = randn(12), torch.eye(3), torch.eye(4), None
    for _ in range(2):
        assert torch.equal(cuda.rotate(*given, order), given[0][order])
    assert len(cuda._INVERSES) == held + 1
    del order
    assert len(cuda._INVERSES) == held


@pytest.mark.parametrize("capability", ptxas.CAPABILITIES)
def test_the_kernel_does_not_spill(tmp_path, capability):
    (compiled,) = ptxas.kernels(cuda.SOURCE, capability, tmp_path)
    assert compiled.spilled == compiled.stack == 0
    assert compiled.registers <= 128  # a block of 512 threads must fit


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize(("p", "q"), [(24, 24), (64, 64), (86, 128), (96, 128), (128, 172)])
@pytest.mark.parametrize("count", [1, 16])
def test_a_device_rotates_as_the_reference_does(p, q, count):
    check(p, q, (count,), "first last", device="cuda")
