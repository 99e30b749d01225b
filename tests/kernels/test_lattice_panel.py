"""The panel of lattices: its source on the CPU, what it compiles to, and on a device."""

import pytest
import torch

from quip.codebooks import LATTICES
from quip.codebooks.lattice import tables
from quip.kernels.lattice_panel import cuda, reference
from tests.support import ptxas
from tests.support.emulation import emulated, launch, needs_compiler  # noqa: F401

SHAPES = [(8, 5), (24, 33), (128, 70)]  # columns, rows
RHOS = (0.8, 1.0, 1.2)
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def panel_of(n, m, device="cpu"):
    """X, K and room for the errors. What may not be read of K, and room, hold NaN."""
    rng = torch.Generator().manual_seed(0)
    X = torch.randn(n, m, generator=rng) * torch.rand(n, 1, generator=rng).add(0.2)
    blocks = torch.arange(n) // 8
    unread = torch.where(blocks[:, None] < blocks, 0.0, torch.nan)
    K = 0.1 * torch.randn(n, n, generator=rng) + unread
    return X.to(device), K.to(device), torch.full_like(X, torch.nan, device=device)


def stages_of(name, device):
    book = LATTICES[name]
    return tables(book.stages, torch.device(device)), book.ratio


def kept_of(name, n, m, device):
    rng = torch.Generator().manual_seed(2)
    codes = torch.randint(2 ** LATTICES[name].index_bits, (n // 8, m), generator=rng)
    A = torch.randn(n // 8, 8, 8, generator=rng)
    return codes.to(device), (A @ A.mT).to(device)


def assert_same(expected, eta, got, its_eta):
    """Equal but for rows in which a tie was decided by float noise: at most two in a hundred."""
    assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
    differs = (got != expected).any(0)
    assert differs.float().mean() < 0.02 + 1 / len(differs)
    torch.testing.assert_close(its_eta[:, ~differs], eta[:, ~differs], rtol=1e-4, atol=1e-4)


def assert_rounds_as_torch_does(name, n, m, many, kept, device="cpu"):
    stages, ratio = stages_of(name, device)
    scales = torch.linspace(0.4, 0.9, n // 8 if many else 1, device=device)
    (X, K, eta), (_, _, its_eta) = panel_of(n, m, device), panel_of(n, m, device)
    options = {"ratio": ratio}
    if kept:
        options |= {"base": X + 0.1, "kept": kept_of(name, n, m, device)}
    expected = reference.round_blocks(X, K, eta, scales, stages, **options)
    for given in (K, K.T.contiguous().T):
        got = cuda.round_blocks(X, given, its_eta, scales, stages, **options)
        assert_same(expected, eta, got, its_eta)


def assert_fits_as_torch_does(name, n, m, rhos, device="cpu"):
    stages, ratio = stages_of(name, device)
    (X, K, eta), (_, _, its_eta) = panel_of(n, m, device), panel_of(n, m, device)
    h = torch.linspace(0.5, 2, n, device=device)
    args = h, torch.tensor(rhos, device=device), stages
    expected, scales = reference.fit_and_round_blocks(X, K, eta, *args, ratio=ratio)
    got, its_scales = cuda.fit_and_round_blocks(X, K, its_eta, *args, ratio=ratio)
    # A scale beside a tie of bfloat16 would change all that comes after: it happens nowhere here.
    assert torch.equal(its_scales, scales)
    assert_same(expected, eta, got, its_eta)


# The source, compiled for the CPU


@pytest.fixture
def three_processors(emulated, monkeypatch):  # noqa: F811
    monkeypatch.setattr(cuda, "processors", lambda device: 3)


@needs_compiler
@pytest.mark.parametrize("name", LATTICES)
@pytest.mark.parametrize(("n", "m"), SHAPES)
@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("kept", [False, True])
def test_the_source_rounds_as_torch_does(name, n, m, many, kept, three_processors):
    assert_rounds_as_torch_does(name, n, m, many, kept)


@needs_compiler
@pytest.mark.parametrize("name", LATTICES)
@pytest.mark.parametrize("rhos", [(1.0,), RHOS])
def test_the_source_fits_the_scales_that_torch_fits(name, rhos, three_processors):
    assert_fits_as_torch_does(name, 24, 70, rhos)


@needs_compiler
@pytest.mark.parametrize("m", [130, 500, 900])  # 2, 6 and 10 tiles: 4, 2 or 1 warps for each
def test_a_thread_block_may_have_more_tiles(m, three_processors):
    assert cuda._tiles(m, 3) == {130: 2, 500: 6, 900: 10}[m]
    assert_fits_as_torch_does("E8P12", 16, m, RHOS)


@needs_compiler
def test_errors_may_take_the_place_of_weights(three_processors):
    stages, ratio = stages_of("E8P12", "cpu")
    scales, h, rhos = torch.tensor([0.7]), torch.ones(24), torch.tensor(RHOS)
    for call, args in (
        (cuda.round_blocks, (scales, stages)),
        (cuda.fit_and_round_blocks, (h, rhos, stages)),
    ):
        X, K, eta = panel_of(24, 40)
        expected = call(X, K, eta, *args, ratio=ratio)
        got = call(X, K, X, *args, ratio=ratio)
        for one, other in zip(_tensors(got), _tensors(expected), strict=True):
            assert torch.equal(one, other)
        assert torch.equal(X, eta)


def _tensors(found):
    return found if isinstance(found, tuple) else (found,)


@needs_compiler
def test_weights_that_are_zero_or_no_numbers_do_not_hang(three_processors):
    stages, ratio = stages_of("E8P12", "cpu")
    args = torch.zeros(8, 8), torch.ones(8), torch.tensor(RHOS), stages
    for value in (0.0, torch.nan):
        X = torch.full((8, 100), value)
        codes, scales = cuda.fit_and_round_blocks(X, args[0], X.clone(), *args[1:], ratio=ratio)
        assert bool(((codes >= 0) & (codes < 2**16)).all())
    X = torch.zeros(8, 100)
    _, scales = cuda.fit_and_round_blocks(X, args[0], X.clone(), *args[1:], ratio=ratio)
    assert torch.equal(scales, torch.tensor([reference.LEAST]))


# What it compiles to


@pytest.mark.parametrize("capability", ptxas.CAPABILITIES, ids=str)
def test_nothing_is_spilled(capability, tmp_path):
    found = ptxas.kernels(cuda.SOURCE, capability, tmp_path)
    assert len(found) == 2  # known scales, fitted ones
    for kernel in found:
        assert (kernel.spilled, kernel.stack) == (0, 0), kernel
        assert kernel.registers <= 128, kernel  # of 65,536, for 512 threads
