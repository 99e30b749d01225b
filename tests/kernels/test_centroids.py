"""Learned centroids: torch against loops in float64, C++ against torch, and what EM promises."""

from itertools import pairwise, product

import pytest
import torch
from torch import Tensor

from quip.kernels.centroids import assign, cpu, improve, reference, round_columns

needs_compiler = pytest.mark.skipif(not cpu.ASSIGN.available(), reason="no C++ compiler")
FORMS = [
    pytest.param(reference, id="torch"),
    pytest.param(cpu, id="cpu", marks=needs_compiler),
]
# d, k, columns, rows, row groups: one row a group, fewer rows than lanes, uneven groups, whole
# registers and one row more, few and many centroids
SHAPES = [
    *((1, 2, 7, 1, 1), (1, 4, 256, 33, 33), (1, 16, 37, 50, 12), (1, 300, 40, 40, 2)),
    *((2, 4, 2, 3, 2), (2, 16, 256, 83, 10), (2, 64, 50, 97, 3), (2, 256, 64, 130, 2)),
    *((2, 300, 30, 70, 2), (4, 16, 64, 5, 5), (4, 256, 32, 65, 1), (4, 3, 20, 200, 11)),
]


def problem(d: int, k: int, g: int, m: int, groups: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """X, centroids, h and mass in float32."""
    rng = torch.Generator().manual_seed(d * k + g)
    X = torch.randn(g, m, generator=rng)
    centroids = 0.8 * torch.randn(groups, k, d, generator=rng)
    h, mass = torch.rand(g, generator=rng) + 0.1, torch.rand(g // d, m, generator=rng)
    return X, centroids, h, mass


def group_of(row: int, m: int, groups: int) -> int:
    """The row groups by counting: the first m % groups have one row more."""
    sizes = [m // groups + (i < m % groups) for i in range(groups)]
    return next(i for i in range(groups) if row < sum(sizes[: i + 1]))


def distances(X: Tensor, centroids: Tensor, h: Tensor) -> Tensor:
    """Those of all vectors from all centroids of their group, [g / d, m, k], row by row."""
    (groups, _, d), m = centroids.shape, X.shape[1]
    rows = []
    for row in range(m):
        e = X[:, row].view(-1, 1, d) - centroids[group_of(row, m, groups)]
        rows.append((h.view(-1, 1, d) * e.square()).sum(2))
    return torch.stack(rows, dim=1)


def error(X: Tensor, centroids: Tensor, h: Tensor, mass: Tensor | None = None) -> float:
    """The weighted squares of what is left of X, in float64."""
    X, centroids, h = X.double(), centroids.double(), h.double()
    least = distances(X, centroids, h).amin(2)
    return float((least if mass is None else mass.double() * least).sum())


def one_iteration(X: Tensor, centroids: Tensor, h: Tensor, mass: Tensor) -> Tensor:
    """Lloyd by loops over groups, clusters and coordinates."""
    (groups, k, d), (g, m) = centroids.shape, X.shape
    costs, improved = distances(X, centroids, h), centroids.clone()
    codes = costs.argmin(2)
    for group in range(groups):
        rows = [row for row in range(m) if group_of(row, m, groups) == group]
        vectors = list(product(range(g // d), rows))
        worst = sorted(vectors, key=lambda v: -float(mass[v] * costs[v].min()))
        for c in range(k):
            mine = [(j, row) for j, row in vectors if codes[j, row] == c]
            if not mine:
                j, row = worst.pop(0) if len(worst) > 1 else worst[0]
                improved[group, c] = X[j * d : j * d + d, row]
                continue
            for i in range(d):
                weights = torch.stack([mass[j, row] * h[j * d + i] for j, row in mine])
                values = torch.stack([X[j * d + i, row] for j, row in mine])
                if weights.sum() > 0:
                    improved[group, c, i] = (weights * values).sum() / weights.sum()
    return improved


@pytest.mark.parametrize("shape", SHAPES[:1] + SHAPES[4:5] + [(2, 8, 10, 9, 2), (4, 3, 8, 11, 3)])
def test_torch_does_in_float64_what_loops_do(shape):
    X, centroids, h, mass = (x.double() for x in problem(*shape))
    costs = distances(X, centroids, h)
    assert torch.equal(reference.assign(X, centroids, h).long(), costs.argmin(2))
    expected = one_iteration(X, centroids, h, mass)
    ours = reference.improve(X, centroids, h, iterations=1, mass=mass)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    twice = one_iteration(X, expected, h, mass)
    ours = reference.improve(X, centroids, h, iterations=2, mass=mass)
    torch.testing.assert_close(ours, twice, rtol=1e-12, atol=1e-12)


@needs_compiler
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_finds_the_nearest_centroids(shape):
    X, centroids, h, _ = problem(*shape)
    ours, expected = cpu.assign(X, centroids, h), reference.assign(X, centroids, h)
    assert ours.dtype == expected.dtype == (torch.uint8 if shape[1] <= 256 else torch.int32)
    costs = distances(X, centroids, h).gather(2, torch.stack([ours, expected], 2).long())
    # Float noise decides where both are as far: 1 part in 2^20 of the size of x.
    torch.testing.assert_close(costs[..., 0], costs[..., 1], rtol=1e-5, atol=1e-6)
    assert (ours != expected).float().mean() < 1e-3


@needs_compiler
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weighted", [False, True])
def test_the_kernel_improves_centroids_as_torch_does(shape, weighted):
    X, centroids, h, mass = problem(*shape)
    options = {"mass": mass} if weighted else {}
    for iterations in (1, 12):
        ours = cpu.improve(X, centroids, h, iterations=iterations, **options)
        expected = reference.improve(X, centroids, h, iterations=iterations, **options)
        if iterations == 1:  # until a tie has had time to lead them apart
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
        left = [error(X, c, h, options.get("mass")) for c in (ours, expected)]
        assert left[0] == pytest.approx(left[1], rel=1e-3, abs=1e-9)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES[1:3] + SHAPES[5:7])
def test_the_error_never_rises_and_falls_at_first(form, shape):
    X, centroids, h, mass = problem(*shape)
    steps = [form.improve(X, centroids, h, iterations=i, mass=mass) for i in (0, 1, 2, 3, 5, 9, 20)]
    errors = [error(X, c, h, mass) for c in steps]
    assert errors[2] < errors[1] < errors[0]
    assert all(b <= a * (1 + 1e-6) for a, b in pairwise(errors))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("d", [1, 2, 4])
def test_centroids_that_hold_every_vector_stay(form, d):
    rng = torch.Generator().manual_seed(0)
    centroids = torch.randn(3, 8, d, generator=rng)
    codes = torch.randint(8, (16, 30), generator=rng)
    X = torch.cat([centroids[i // 10, codes[:, i]].reshape(-1, 1) for i in range(30)], dim=1)
    h = torch.rand(len(X), generator=rng) + 0.1
    assert torch.equal(form.assign(X, centroids, h).long(), codes)
    # The mean of equal floats, in double precision, is that float.
    assert torch.equal(form.improve(X, centroids, h, iterations=5), centroids)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("d", [1, 2, 4])
def test_empty_clusters_take_the_vectors_that_are_farthest(form, d):
    X = torch.zeros(8 * d, 40)
    X[0, 3], X[d, 25], X[-d, 39] = 5.0, -7.0, 6.0
    h, centroids = torch.ones(8 * d), torch.full((1, 4, d), 100.0)
    centroids[0, 1] = 0
    first = form.improve(X, centroids, h, iterations=1)
    assert first[0, :, 0].tolist() == pytest.approx([-7, 4 / 320, 6, 5])
    assert not first[..., 1:].any()
    settled = form.improve(X, centroids, h, iterations=9)
    assert settled[0, :, 0].tolist() == [-7, 0, 6, 5]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("d", [1, 2, 4])
@pytest.mark.parametrize("groups", [1, 33])
def test_equal_weights_are_held_by_the_first_centroid(form, d, groups):
    X, h = torch.full((4 * d, 33), 0.3), torch.ones(4 * d)
    centroids = torch.zeros(groups, 16, d)
    assert not form.assign(X, centroids, h).any()
    assert torch.equal(form.improve(X, centroids, h, iterations=7), torch.full_like(centroids, 0.3))


@pytest.mark.parametrize("form", FORMS)
def test_halfway_between_two_numbers_the_lower_code_is_taken(form):
    X, h = torch.tensor([[0.0, 1.0, -1.0, 2.0]]), torch.ones(1)
    for centroids, expected in (
        ([-1.0, 1.0], [0, 1, 0, 1]),
        ([1.0, -1.0], [0, 0, 1, 0]),
        ([3.0, 1.0, 1.0, -1.0], [1, 1, 3, 0]),
    ):
        codes = form.assign(X, torch.tensor(centroids).view(1, -1, 1), h)
        assert codes.tolist() == [expected]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("d", "k"), [(1, 4), (2, 16)])
def test_a_coordinate_without_weight_stays(form, d, k):
    X, centroids, h, _ = problem(d, k, 16, 20, 2)
    weightless = form.improve(X, centroids, h, iterations=1, mass=torch.zeros(16 // d, 20))
    codes = form.assign(X, centroids, h).long()
    h_first = h.clone()
    h_first[1::2] = 0
    moved = form.improve(X, centroids, h_first, iterations=1)
    codes_first = form.assign(X, centroids, h_first).long()
    for group, rows in enumerate((slice(10), slice(10, 20))):
        full, full_first = codes[:, rows].unique(), codes_first[:, rows].unique()
        assert torch.equal(weightless[group, full], centroids[group, full])
        if d > 1:
            assert torch.equal(moved[group, full_first, 1], centroids[group, full_first, 1])
            assert not (moved[group, full_first, 0] == centroids[group, full_first, 0]).any()


@needs_compiler
def test_masses_count_a_vector_so_often():
    X, centroids, h, _ = problem(2, 8, 16, 10, 1)
    often = torch.randint(1, 4, (10,), generator=torch.Generator().manual_seed(0))
    repeated = cpu.improve(X.repeat_interleave(often, 1), centroids, h, iterations=3)
    mass = often.float().expand(8, 10)
    torch.testing.assert_close(cpu.improve(X, centroids, h, iterations=3, mass=mass), repeated)


@needs_compiler
@pytest.mark.parametrize("shape", [(1, 4, 64, 40, 40), (2, 16, 64, 640, 10)])
def test_rows_and_groups_know_nothing_of_each_other(shape):
    X, centroids, h, _ = problem(*shape)
    whole = cpu.improve(X, centroids, h, iterations=20)
    assert torch.equal(whole, cpu.improve(X, centroids, h, iterations=20))
    rows = shape[3] // shape[4]
    for group in (0, shape[4] - 1):
        alone = X[:, group * rows : (group + 1) * rows]
        part = cpu.improve(alone, centroids[group : group + 1], h, iterations=20)
        # One row of numbers is served as any other; of d > 1, registers may be shared or not.
        torch.testing.assert_close(part[0], whole[group], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("d", "k", "g", "m"), [(2, 16, 20, 40), (1, 8, 6, 9)])
def test_distances_in_portions_are_those_at_once(d, k, g, m, monkeypatch):
    X, centroids, h, mass = problem(d, k, g, m, 7)
    expected = reference.improve(X, centroids, h, iterations=3, mass=mass)
    for portion in (1, 3 * k, 25 * k):
        monkeypatch.setattr(reference, "DISTANCES", portion)
        assert torch.equal(reference.improve(X, centroids, h, iterations=3, mass=mass), expected)


def test_only_what_the_kernel_can_do_is_sent_to_it():
    X, centroids, h, _ = problem(2, 4, 8, 6, 1)
    K, native = torch.zeros(8, 8), cpu.ASSIGN.available()
    for operation in (assign, improve):
        form = getattr(cpu if native else reference, operation.reference.__name__)
        assert operation.chosen(X, centroids, h) is form
        assert operation.chosen(X.double(), centroids.double(), h) is operation.reference
        assert operation.chosen(X, centroids.view(1, 1, 8), h) is operation.reference
    form = cpu.round_columns if native else reference.round_columns
    assert round_columns.chosen(X, K, X, h, centroids) is form
    assert round_columns.chosen(X.double(), K, X, h, centroids) is reference.round_columns


def panel(d: int, k: int, g: int, m: int, groups: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """X, K, h, centroids, scales of 2 d columns each, old codes and metrics."""
    rng = torch.Generator().manual_seed(1)
    X, centroids, h, _ = (x.to(dtype) for x in problem(d, k, g, m, groups))
    K = 0.1 * torch.randn(g, g, generator=rng).to(dtype)
    scales = torch.rand(-(-g // (2 * d)), m, generator=rng).to(dtype) + 0.5
    old = torch.randint(k, (g // d, m), generator=rng)
    A = torch.randn(g // d, d, d, generator=rng).to(dtype)
    return X, K, h, centroids, scales, old, A @ A.mT


@pytest.mark.parametrize("shape", [(1, 4, 6, 9, 4), (2, 8, 10, 9, 2), (4, 3, 8, 11, 3)])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("greedy", [False, True])
def test_a_panel_is_rounded_as_its_equations_say(shape, scaled, greedy):
    X, K, h, centroids, scales, old, metrics = panel(*shape, torch.float64)
    (d, _, g, m, groups), base = shape, X + 0.1
    options = {"scales": scales, "block": 2 * d} if scaled else {}
    if greedy:
        options |= {"base": base, "kept": (old, metrics)}
    eta, expected = torch.empty_like(X), torch.empty_like(X)
    codes = reference.round_columns(X, K, eta, h, centroids, **options)
    for row in range(m):
        book = centroids[group_of(row, m, groups)]
        for j, lo in enumerate(range(0, g, d)):
            span = slice(lo, lo + d)
            x = X[span, row] + K[:lo, span].T @ expected[:lo, row]
            s = scales[lo // (2 * d), row] if scaled else 1
            code = int((h[span] * (x / s - book).square()).sum(1).argmin())
            if greedy:
                new, kept = (x - s * book[c] for c in (code, int(old[j, row])))
                if kept @ metrics[j] @ kept <= new @ metrics[j] @ new:
                    code = int(old[j, row])
            assert code == codes[j, row]
            expected[span, row] = (base[span, row] if greedy else x) - s * book[code]
    torch.testing.assert_close(eta, expected, rtol=1e-12, atol=1e-12)


@needs_compiler
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("greedy", [False, True])
def test_the_kernel_rounds_panels_as_torch_does(shape, greedy):
    X, K, h, centroids, scales, old, metrics = panel(*shape, torch.float32)
    options = {"base": X + 0.1, "kept": (old, metrics)} if greedy else {}
    options |= {"scales": scales, "block": 2 * shape[0]}
    found = []
    for form in (cpu, reference):
        eta = X.clone()  # as in the sweep: errors take the place of weights
        codes = form.round_columns(eta if form is cpu else X, K.T, eta, h, centroids, **options)
        found.append((codes, eta))
    (ours, eta), (expected, expected_eta) = found
    assert ours.dtype == expected.dtype
    # Rows know nothing of each other: only rows in which a tie flipped may differ.
    same = (ours == expected).all(0)
    assert (~same).sum() <= 1 + len(same) // 50
    torch.testing.assert_close(eta[:, same], expected_eta[:, same], rtol=1e-4, atol=1e-4)
