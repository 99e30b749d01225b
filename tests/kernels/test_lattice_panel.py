"""The panel of lattices: its source on the CPU, what it compiles to, and on a device."""

import pytest
import torch

from quip.codebooks import LATTICES, Groups, Lattice, lattice
from quip.codebooks.lattice import tables
from quip.kernels import lattice_panel, lattice_points
from quip.kernels.lattice_panel import cuda, reference
from quip.matrix import feedback
from quip.matrix.linalg import proxy_loss
from quip.matrix.polish import greedy
from quip.matrix.sweep import sweep
from tests.support import ptxas
from tests.support.emulation import (  # noqa: F401
    NothingRead,
    emulated,
    needs_compiler,
    prefer_cuda,
)

SHAPES = [(8, 5), (24, 33), (128, 70)]  # columns, rows
RHOS = (0.8, 1.0, 1.2)
OPERATIONS = (
    *(lattice_panel.round_blocks, lattice_panel.fit_and_round_blocks),
    *(lattice_points.nearest, lattice_points.decode, lattice_points.errors),
)
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
    """Equal but for rows in which a tie was decided by float noise: at most one in a hundred."""
    assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
    differs = (got != expected).any(0)
    assert differs.float().mean() < 0.01
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


@needs_compiler
@pytest.mark.parametrize(
    ("name", "group"),
    [("E8P12", 8), ("E8P12RVQ3B", None), ("E8P12RVQ3B", 8), ("E8P12RVQ4B", 40)],
)
def test_sweep_and_greedy_lose_as_much_with_the_kernel(name, group, three_processors, monkeypatch):
    given = problem(50, 136)
    expected, loss = rounded(given, name, group)
    monkeypatch.setattr(Lattice, "panel", lambda *_, **__: lattice._round_panel)
    prefer_cuda(monkeypatch, *OPERATIONS)
    with NothingRead():
        codes, books = swept(given, name, group)
    its_loss = loss_of(given, codes, books, group)
    # A tie changes the rest of its row, and a scale beside one of bfloat16 that of all rows.
    assert (codes != expected).any(1).float().mean() < 0.05
    assert its_loss == pytest.approx(loss, rel=0.01)


def problem(m, n, device="cpu"):
    """W, H, K, h: correlated inputs, and their feedback."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(2 * n, n, generator=rng) @ torch.randn(n, n, generator=rng) / n**0.5
    W, H = torch.randn(m, n, generator=rng), x.T @ x / len(x) + 0.01 * torch.eye(n)
    H = H.double().to(device)
    return W.to(device), H, *feedback.ldl(H, 8)


def swept(given, name, group):
    """(codes, books) of a sweep and two greedy passes."""
    W, H, K, h = given
    row = LATTICES[name]
    rhos = tuple(row.rho * share for share in RHOS)
    book = Lattice(stages=row.stages, rhos=rhos, ratio=row.ratio)
    codes, books = sweep(W, K, h, book.fit(W, h.to(W)), group=group)
    return greedy(W, H, codes, books, group=group, passes=2), books


def loss_of(given, codes, books, group):
    """The proxy loss of codes."""
    decoder = books[0].joined(books, Groups(codes.shape[1], group and group // 8))
    return proxy_loss(given[0], decoder.decode(codes), given[1])


def rounded(given, name, group):
    """Codes of a sweep and two greedy passes, and their proxy loss."""
    codes, books = swept(given, name, group)
    return codes, loss_of(given, codes, books, group)


# What it compiles to


@pytest.mark.slow
@pytest.mark.parametrize("capability", ptxas.CAPABILITIES, ids=str)
def test_nothing_is_spilled(capability, tmp_path):
    found = ptxas.kernels(cuda.SOURCE, capability, tmp_path)
    assert len(found) == 2  # known scales, fitted ones
    for kernel in found:
        assert (kernel.spilled, kernel.stack) == (0, 0), kernel
        assert kernel.registers <= 128, kernel  # of 65,536, for 512 threads


# On a device


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("name", LATTICES)
@pytest.mark.parametrize(("n", "m"), [*SHAPES, (128, 4099)])
@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("kept", [False, True])
def test_a_device_rounds_as_torch_does(name, n, m, many, kept):
    assert_rounds_as_torch_does(name, n, m, many, kept, "cuda")


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("name", LATTICES)
@pytest.mark.parametrize("rhos", [(1.0,), RHOS])
@pytest.mark.parametrize("m", [70, 4099, 20_000])
def test_a_device_fits_the_scales_that_torch_fits(name, rhos, m):
    assert_fits_as_torch_does(name, 24, m, rhos, "cuda")


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("name", LATTICES)
@pytest.mark.parametrize("group", [None, 8, 40])
def test_a_device_loses_as_much_as_a_cpu_and_the_same_again(name, group):
    given = problem(300, 400)
    _, loss = rounded(given, name, group)
    found = [rounded([x.cuda() for x in given], name, group) for _ in range(2)]
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == pytest.approx(loss, rel=0.01)


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("group", [None, 8, 40])
def test_neither_sweep_nor_passes_wait_for_the_device(group):
    W, _, K, h = problem(70, 160, "cuda")
    book = Lattice(stages=("e8p",), rhos=RHOS).fit(W, h.to(W))
    J, metrics = torch.zeros(160, 160, device="cuda"), torch.zeros(20, 8, 8, device="cuda")

    def call():
        codes, books = sweep(W, K, h, book, group=group)
        kept = codes.T[:16].contiguous(), metrics[:16]
        X, used = W.T[:128].contiguous(), books[: 16 if group == 8 else 1]
        lattice._round_panel(X, J[:128, :128], X.clone(), h[:128], used, base=X, kept=kept)

    call()  # compiled, and constants copied
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
