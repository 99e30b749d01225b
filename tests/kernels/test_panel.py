"""The panel of grids against the loop over any codebook, and where it cannot be compiled."""

import logging
from dataclasses import replace

import pytest
import torch

from quip.codebooks import Lattice, MinMaxGrid, RmsGrid, SymmetricGrid, candidate_rhos
from quip.kernels import native
from quip.kernels.panel import cpu, fit_and_round_columns, reference, round_columns
from quip.matrix import feedback, panel, polish, sweep
from quip.matrix.linalg import proxy_loss

SHAPES = [(1, 5), (3, 4), (17, 33), (64, 7), (65, 130), (200, 32), (4100, 6)]  # m, n
GROUPS = [None, 1, 7, 50, 1000]

needs_compiler = pytest.mark.skipif(not cpu.ROUND.available(), reason="no C++ compiler")


def problem(m, n, *, seed=0):
    """W, H in float32: correlated inputs."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(2 * n, n, generator=rng) @ torch.randn(n, n, generator=rng) / n**0.5
    W = torch.randn(m, n, generator=rng) * torch.rand(m, 1, generator=rng).add(0.1)
    return W, x.T @ x / len(x) + 0.01 * torch.eye(n)


def grid(kind, bits, dtype=torch.bfloat16):
    if kind == "rows":
        return MinMaxGrid(bits=bits, step_dtype=dtype)
    if kind == "symmetric":
        return SymmetricGrid(bits=bits, shares=(0.9, 1.0), step_dtype=dtype)
    rhos = candidate_rhos(bits) if kind == "rhos" else (0.5 * bits + 1,)
    return RmsGrid(bits=bits, rhos=rhos, step_dtype=dtype)


def both(m, n, books, *, refit=False, base=False, K_T=False):
    """(X, codes, errors, books) of one panel by torch and by the kernel."""
    W, _ = problem(m, n, seed=1)
    K = 0.1 * torch.randn(n, n, generator=torch.Generator().manual_seed(2))  # lower half: unread
    K = K.T.contiguous().T if K_T else K
    X, h = W.T.contiguous(), torch.ones(n)
    target = {"base": X + 0.1} if base else {}
    for form in (panel.round_panel, books[0].panel(W, refit=refit)):
        eta = torch.full_like(X, torch.nan)
        codes, used = form(X.clone(), K, eta, h, books, refit=refit, **target)
        yield X, codes, eta, used


def assert_same(expected, got, tolerance=1e-4):
    """Equal codes and errors, but for what follows a tie that float noise decided."""
    _, codes, eta, _ = expected
    _, native_codes, native_eta, _ = got
    assert native_codes.dtype == torch.uint8
    assert native_codes.shape == codes.shape
    # Rows know nothing of each other: only rows in which a tie flipped may differ.
    differs = (codes != native_codes).any(0)
    assert differs.float().mean() < 2e-3 or differs.sum() <= 1
    torch.testing.assert_close(
        native_eta[:, ~differs], eta[:, ~differs], rtol=tolerance, atol=tolerance
    )


@needs_compiler
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("kind", ["rms", "rows", "symmetric"])
def test_the_kernel_rounds_as_torch_does_for_every_bit_width(kind, bits):
    W, _ = problem(65, 40, seed=1)
    book = grid(kind, bits).fit(W, torch.ones(40))
    assert_same(*both(65, 40, [book]))


@needs_compiler
@pytest.mark.parametrize(("m", "n"), SHAPES)
@pytest.mark.parametrize("kind", ["rms", "rows"])
@pytest.mark.parametrize("base", [False, True])
def test_the_kernel_rounds_as_torch_does_for_every_shape(m, n, kind, base):
    W, _ = problem(m, n, seed=1)
    book = grid(kind, 3).fit(W, torch.ones(n))
    assert_same(*both(m, n, [book], base=base, K_T=base))


@needs_compiler
@pytest.mark.parametrize("kind", ["rms", "rows"])
def test_every_column_may_have_a_book_of_its_own(kind):
    W, _ = problem(70, 9, seed=1)
    books = [grid(kind, 2).fit(W[:, k : k + 1], torch.ones(1)) for k in range(9)]
    assert_same(*both(70, 9, books, base=True))


@needs_compiler
@pytest.mark.parametrize(("m", "n"), SHAPES)
@pytest.mark.parametrize("kind", ["rms", "rhos"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_kernel_fits_the_steps_that_torch_fits(m, n, kind, dtype):
    bits = 2 + n % 7
    expected, got = both(m, n, [grid(kind, bits, dtype)], refit=True)
    steps, native_steps = (torch.stack([b.step for b in used]) for *_, used in (expected, got))
    # The root of a float sum: one unit of bfloat16 apart if it lies next to a tie.
    torch.testing.assert_close(
        native_steps, steps, rtol=1e-5 if dtype.itemsize == 4 else 8e-3, atol=0
    )
    assert (native_steps / steps - 1).abs().gt(1e-5).float().mean() < 0.1
    if torch.allclose(native_steps, steps, rtol=1e-5):
        assert_same(expected, got)
    for book, expected_book in zip(got[-1], expected[-1], strict=True):
        assert type(book) is RmsGrid
        assert book.zero.shape == book.step.shape == expected_book.step.shape == ()
        assert replace(book, step=expected_book.step, zero=expected_book.zero) == expected_book


@needs_compiler
def test_a_column_of_zeros_gets_the_smallest_step():
    book, X = grid("rhos", 2), torch.zeros(3, 20)
    round_panel = book.panel(X.T, refit=True)
    codes, books = round_panel(
        X, torch.zeros(3, 3), torch.empty_like(X), torch.ones(3), [book], refit=True
    )
    expected = book.fit(X.T, torch.ones(3))
    assert all(torch.equal(b.step, expected.step) for b in books)
    assert torch.equal(codes[0], expected.round(X[:1].T, torch.ones(1)))


def test_only_what_the_kernel_can_do_is_sent_to_it():
    X, K, one = torch.ones(3, 2), torch.zeros(3, 3), torch.ones(1, 1)
    round_form, fit_form = reference.round_columns, reference.fit_and_round_columns
    if cpu.ROUND.available():
        round_form, fit_form = cpu.round_columns, cpu.fit_and_round_columns
    assert round_columns.chosen(X, K, X, one, one, top=3) is round_form
    double = (t.double() for t in (X, K, X, one, one))
    assert round_columns.chosen(*double, top=3) is reference.round_columns
    for dtype in (torch.bfloat16, torch.float32, torch.float16, torch.float64):
        chosen = fit_and_round_columns.chosen(X, K, X, one[0], top=3, step_dtype=dtype)
        small = dtype in (torch.bfloat16, torch.float32)
        assert chosen is (fit_form if small else reference.fit_and_round_columns)


def test_only_books_that_round_as_the_kernel_does_offer_it():
    class Other(MinMaxGrid):
        pass

    W, every = torch.ones(2, 3), panel.round_panel
    for kind in ("rows", "symmetric", "rms", "rhos"):
        assert panel.panel_for(grid(kind, 2), W) is not every
        assert panel.panel_for(replace(grid(kind, 2), unbiased=True), W) is every
    assert panel.panel_for(grid("rhos", 2), W, refit=True) is not every
    for kind in ("rows", "symmetric"):
        assert panel.panel_for(grid(kind, 2), W, refit=True) is every
    assert panel.panel_for(Other(bits=2), W) is every
    assert panel.panel_for(Lattice.published("E8P12"), W) is every


@pytest.mark.parametrize("kind", ["rms", "rhos", "rows"])
@pytest.mark.parametrize("own", [False, True])
def test_in_double_precision_the_tensors_round_as_the_books_do_bit_for_bit(kind, own):
    if kind == "rows" and own:
        return  # fitted to a column it would hold every weight
    W, _ = problem(70, 20, seed=1)
    book = grid(kind, 2).fit(W.double(), torch.ones(20).double())
    X, K = W.T.double().contiguous(), 0.1 * torch.randn(20, 20).double()
    found = []
    for form in (panel.round_panel, book.panel(W, refit=own)):
        eta = X.clone()  # as in the sweep: errors take the place of weights
        codes, books = form(eta, K, eta, torch.ones(20).double(), [book], refit=own)
        found.append((codes, eta, torch.stack([b.step for b in books])))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def rounded(W, H, book, group, passes):
    K, h = feedback.ldl(H)
    codes, books = sweep.sweep(W, K, h, book.fit(W, h.float()), group=group)
    if passes:
        codes = polish.greedy(W, H, codes, books, group=group, passes=passes)
    width = group or W.shape[1]
    columns = [books[k // width].decode(c) for k, c in enumerate(codes.T)]
    return codes, torch.cat(columns, dim=1), books


@needs_compiler
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("kind", ["rms", "rhos", "rows"])
@pytest.mark.parametrize("passes", [0, 2])
def test_sweep_and_greedy_lose_as_much_with_the_kernel_as_without(kind, group, passes, monkeypatch):
    W, H = problem(90, 150)
    codes, W_hat, books = rounded(W, H, grid(kind, 2), group, passes)
    for module in (sweep, polish):
        monkeypatch.setattr(module, "panel_for", lambda *_, **__: panel.round_panel)
    torch_codes, torch_W_hat, torch_books = rounded(W, H, grid(kind, 2), group, passes)
    assert codes.shape == torch_codes.shape
    assert len(books) == len(torch_books)
    # One flipped tie changes the rest of its row, and the step of a column changes all rows.
    loss, torch_loss = proxy_loss(W, W_hat, H), proxy_loss(W, torch_W_hat, H)
    assert loss == pytest.approx(torch_loss, rel=1e-5 if torch.equal(codes, torch_codes) else 0.02)
    if kind != "rhos" and group != 1:
        assert (codes != torch_codes).any(1).float().mean() < 0.05


@pytest.fixture
def fresh_cache(tmp_path, monkeypatch):
    """No library compiled or loaded yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native.library.cache_clear()
    yield tmp_path / "quip"
    native.library.cache_clear()


def test_without_a_compiler_torch_does_the_work_and_the_log_says_so(
    fresh_cache, monkeypatch, caplog
):
    W, H = problem(20, 40)
    expected = rounded(W, H, grid("rms", 3), None, 1)
    native.library.cache_clear()
    monkeypatch.setattr("shutil.which", lambda name: None)
    with caplog.at_level(logging.INFO, logger="quip"):
        codes, W_hat, _ = rounded(W, H, grid("rms", 3), None, 1)
    (line,) = caplog.messages
    assert "install one of g++" in line
    assert (codes != expected[0]).any(1).sum() <= 1  # rows with a flipped tie
    assert proxy_loss(W, W_hat, H) == pytest.approx(proxy_loss(W, expected[1], H), rel=1e-2)
