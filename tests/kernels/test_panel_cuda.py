"""The panel of grids on CUDA: its source on the CPU, what it compiles to, and on a device."""

import pytest
import torch

from quip.codebooks import MinMaxGrid, RmsGrid, candidate_rhos
from quip.kernels import native, panel
from quip.kernels.cuda import Nvcc
from quip.kernels.panel import cuda, reference
from quip.matrix.polish import greedy
from quip.matrix.sweep import sweep
from tests.support import ptxas
from tests.support.emulation import (  # noqa: F401
    NothingRead,
    emulated,
    needs_compiler,
    prefer_cuda,
)

SHAPES = [(1, 5), (9, 33), (17, 70), (128, 40)]  # columns, rows
STEPS = ["one", "columns", "rows", "both"]
DTYPES = [torch.bfloat16, torch.float32]
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def panel_of(n, m, device="cpu", *, seed=0):
    """X, K and room for the errors. What may not be read of K, and room, hold NaN."""
    rng = torch.Generator().manual_seed(seed)
    X = torch.randn(n, m, generator=rng) * torch.rand(n, 1, generator=rng).add(0.2)
    K = 0.1 * torch.randn(n, n, generator=rng) + torch.full((n, n), torch.nan).tril()
    return X.to(device), K.to(device), torch.full_like(X, torch.nan, device=device)


def grids(n, m, steps, device="cpu"):
    """Steps and zeros of one for all, or of columns, rows, or both."""
    rng = torch.Generator().manual_seed(1)
    shape = (n if steps in ("columns", "both") else 1, m if steps in ("rows", "both") else 1)
    step = 0.2 + torch.rand(shape, generator=rng) / 2
    return step.to(device), torch.randint(0, 15, shape, generator=rng).to(device) / 2


def assert_same(expected, eta, got, its_eta):
    """Equal but for rows in which a tie was decided by float noise: at most two in a thousand."""
    assert (got.dtype, got.shape) == (torch.uint8, expected.shape)
    differs = (got != expected).any(0)
    assert differs.float().mean() < 2e-3
    # Sums of up to 128 products, and their feedback, in another order.
    torch.testing.assert_close(its_eta[:, ~differs], eta[:, ~differs], rtol=1e-4, atol=1e-4)


def assert_rounds_as_torch_does(n, m, steps, base, device="cpu"):
    step, zero = grids(n, m, steps, device)
    (X, K, eta), (_, _, its_eta) = panel_of(n, m, device), panel_of(n, m, device)
    target = X + 0.1 if base else None
    expected = reference.round_columns(X, K, eta, step, zero, top=7, base=target)
    got = cuda.round_columns(X, K, its_eta, step, zero, top=7, base=target)
    assert_same(expected, eta, got, its_eta)


def assert_fits_as_torch_does(n, m, rhos, bits, dtype, device="cpu"):
    options = {"top": 2**bits - 1, "step_dtype": dtype}
    (X, K, eta), (_, _, its_eta) = panel_of(n, m, device), panel_of(n, m, device)
    rhos = torch.tensor(rhos, device=device)
    expected, steps = reference.fit_and_round_columns(X, K, eta, rhos, **options)
    got, its_steps = cuda.fit_and_round_columns(X, K, its_eta, rhos, **options)
    # A step beside a tie of bfloat16, or two candidates as good as each other, change all columns
    # that come after: the seeds are such that it happens nowhere here.
    torch.testing.assert_close(its_steps, steps, rtol=2e-6, atol=0)
    assert_same(expected, eta, got, its_eta)


# The source, compiled for the CPU


@pytest.fixture
def three_processors(emulated, monkeypatch):  # noqa: F811
    monkeypatch.setattr(cuda, "processors", lambda device: 3)


@needs_compiler
@pytest.mark.parametrize(("n", "m"), SHAPES)
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("base", [False, True])
def test_the_source_rounds_as_torch_does(n, m, steps, base, three_processors):
    assert_rounds_as_torch_does(n, m, steps, base)


@needs_compiler
@pytest.mark.parametrize(("n", "m"), [*SHAPES[:3], (20, 300)])  # of 300 rows, three blocks
@pytest.mark.parametrize("rhos", [(2.0,), (1.0, 1.5, 2.0), candidate_rhos(2)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_source_fits_the_steps_that_torch_fits(n, m, rhos, dtype, three_processors):
    assert_fits_as_torch_does(n, m, rhos, 2, dtype)


@needs_compiler
def test_a_thread_block_may_have_more_rows(three_processors):
    assert [cuda._threads(m, 3) for m in (384, 385, 1536, 1537)] == [128, 256, 512, None]
    assert_fits_as_torch_does(3, 500, candidate_rhos(4), 4, torch.bfloat16)


@needs_compiler
def test_errors_may_take_the_place_of_weights(three_processors):
    step, zero = grids(33, 40, "one")
    X, K, eta = panel_of(33, 40)
    expected = cuda.round_columns(X, K, eta, step, zero, top=7)
    assert torch.equal(cuda.round_columns(X, K, X, step, zero, top=7), expected)
    assert torch.equal(X, eta)
    rhos, options = torch.tensor(candidate_rhos(3)), {"top": 7, "step_dtype": torch.bfloat16}
    X, K, eta = panel_of(33, 40)
    expected, steps = cuda.fit_and_round_columns(X, K, eta, rhos, **options)
    got, its_steps = cuda.fit_and_round_columns(X, K, X, rhos, **options)
    assert torch.equal(got, expected)
    assert torch.equal(its_steps, steps)
    assert torch.equal(X, eta)


@needs_compiler
def test_a_column_of_zeros_gets_the_smallest_step_here_too(three_processors):
    X, rhos = torch.zeros(3, 20), torch.tensor(candidate_rhos(2))
    options = {"top": 3, "step_dtype": torch.bfloat16}
    _, steps = cuda.fit_and_round_columns(X, torch.zeros(3, 3), X.clone(), rhos, **options)
    assert torch.equal(steps, torch.full((3,), torch.finfo(torch.bfloat16).tiny))


@needs_compiler
def test_weights_that_are_not_numbers_do_not_hang(three_processors):
    X, rhos = torch.full((3, 200), torch.nan), torch.tensor(candidate_rhos(2))
    options = {"top": 3, "step_dtype": torch.bfloat16}
    codes, _ = cuda.fit_and_round_columns(X, torch.zeros(3, 3), X.clone(), rhos, **options)
    assert codes.max() <= 3


@needs_compiler
@pytest.mark.parametrize("group", [None, 1, 32])
@pytest.mark.parametrize("kind", [MinMaxGrid, RmsGrid])
def test_no_sweep_asks_for_a_number(group, kind, three_processors, monkeypatch):
    prefer_cuda(monkeypatch, panel.round_columns, panel.fit_and_round_columns)
    W, K, h = torch.randn(5, 40), torch.zeros(40, 40).double(), torch.ones(40)
    rhos = {"rhos": candidate_rhos(3)} if kind is RmsGrid else {}
    with NothingRead():
        book = kind(bits=3, **rhos).fit(W, h)
        codes, books = sweep(W, K, h, book, group=group)
        greedy(W, torch.eye(40).double(), codes, books, group=group, passes=1)


# What it compiles to


@pytest.mark.slow
@pytest.mark.parametrize("capability", ptxas.CAPABILITIES, ids=str)
def test_nothing_is_spilled(capability, tmp_path):
    found = ptxas.kernels(cuda.SOURCE, capability, tmp_path)
    assert len(found) == 4  # known steps, of one grid or many; fitted, from one candidate or ten
    for kernel in found:
        assert (kernel.spilled, kernel.stack) == (0, 0), kernel
        assert kernel.registers <= 128, kernel  # of 65,536, for 512 threads


def test_what_nvcc_makes_can_be_opened():
    ptxas.require_nvcc((9, 0))
    assert native.library(cuda.SOURCE, Nvcc((9, 0))) is not None


# On a device


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize(("n", "m"), [*SHAPES, (128, 4099)])
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("base", [False, True])
def test_a_device_rounds_as_torch_does(n, m, steps, base):
    assert_rounds_as_torch_does(n, m, steps, base, "cuda")


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize(("n", "m"), [*SHAPES, (20, 4099), (4, 40_000)])
@pytest.mark.parametrize("rhos", [(2.0,), (1.0, 1.5, 2.0), candidate_rhos(2)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_device_fits_the_steps_that_torch_fits(n, m, rhos, dtype):
    assert_fits_as_torch_does(n, m, rhos, 2, dtype, "cuda")


@pytest.mark.gpu
@gpu
def test_a_device_computes_the_same_again():
    rhos, options = torch.tensor(candidate_rhos(2), device="cuda"), {"top": 3}
    found = []
    for _ in range(3):
        X, K, eta = panel_of(128, 4100, "cuda")
        options = {"top": 3, "step_dtype": torch.bfloat16}
        found.append((*panel.fit_and_round_columns(X, K, eta, rhos, **options), eta))
    assert all(
        torch.equal(a, b) for again in found[1:] for a, b in zip(found[0], again, strict=True)
    )


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("group", [None, 1, 32])
@pytest.mark.parametrize("kind", [MinMaxGrid, RmsGrid])
def test_no_sweep_waits_for_the_device(group, kind):
    W, K = torch.randn(70, 300, device="cuda"), torch.zeros(300, 300, device="cuda").double()
    h, rhos = torch.ones(300, device="cuda"), {"rhos": candidate_rhos(3)}
    book = kind(bits=3, **(rhos if kind is RmsGrid else {})).fit(W, h)
    sweep(W, K, h, book, group=group)  # compiled, and constants copied
    torch.cuda.set_sync_debug_mode("error")
    try:
        sweep(W, K, h, book, group=group)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@gpu
def test_what_a_device_cannot_do_is_left_to_torch():
    X, K, eta = panel_of(3, 20, "cuda")
    one, rhos = torch.ones(1, 1, device="cuda"), torch.ones(1, device="cuda")
    assert panel.round_columns.chosen(X, K, eta, one, one, top=3) is cuda.round_columns
    double = (t.double() for t in (X, K, eta, one, one))
    assert panel.round_columns.chosen(*double, top=3) is reference.round_columns
    for dtype, fast in ((torch.bfloat16, True), (torch.float16, False)):
        chosen = panel.fit_and_round_columns.chosen(X, K, eta, rhos, top=3, step_dtype=dtype)
        assert (chosen is cuda.fit_and_round_columns) == fast
