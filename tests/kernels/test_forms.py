"""Every form of every operation against its reference: one test for all, by cases.

A new form is tested by being named in its `Operation`; a new operation gives its cases here.
"""

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import quip.kernels
from quip.codebooks import e8p, e81b
from quip.codebooks.trellis_codes import code as named
from quip.kernels import (
    centroid_matvec,
    centroids,
    grid_matvec,
    hessian,
    kronecker,
    lattice_matvec,
    lattice_panel,
    lattice_points,
    panel,
    trellis,
    trellis_matvec,
)
from quip.kernels.bits import pack
from quip.kernels.hadamard import rotations
from quip.kernels.lattice_points import operations
from quip.kernels.lattice_points.tables import Stage, code_bits
from quip.kernels.operation import Form, Operation
from quip.kernels.trellis import ORDERS, Code, Tiling

CPU = torch.device("cpu")
STAGES = [(e8p.tables(CPU),), tuple(s.tables(CPU) for s in (e8p, e81b)), 2 * (e8p.tables(CPU),)]


@dataclass
class Case:
    """The arguments of one call, fresh for each, since some are written to."""

    args: tuple[Any, ...]
    options: dict[str, Any] = field(default_factory=dict)
    written: tuple[int, ...] = ()  # which args count as results

    def move(self, device: torch.device) -> None:
        """The tensors to a device."""

        def there(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(map(there, value))
            if isinstance(value, Code):
                return value.to(device)
            if isinstance(value, Stage):
                return type(value)(**{name: there(x) for name, x in vars(value).items()})
            return value.to(device) if isinstance(value, Tensor) else value

        self.args = tuple(map(there, self.args))
        self.options = {key: there(value) for key, value in self.options.items()}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def integers(bits: int, *shape: int) -> Tensor:
    return torch.randint(2**bits, shape, generator=torch.Generator().manual_seed(1))


def rotated() -> Iterator[Case]:
    for n, block in ((96, None), (96, 12), (44 * 12, None), (1, None)):
        for rows in (False, True):
            for transpose in (False, True):
                x = randn(n, 5) if rows else randn(2, 3, n)
                for signs in (None, randn(n, seed=1)):
                    options = {"rows": rows, "transpose": transpose}
                    yield Case((x, signs, block), options)
                    double = None if signs is None else signs.double()
                    yield Case((x.double(), double, block), options)


def rotated_vectors() -> Iterator[Case]:
    for n, block in ((96, None), (128, 32), (44 * 12, None)):
        for dtype in (torch.float32, torch.bfloat16):
            for signs, bias in ((None, None), (randn(n, seed=1), randn(n, seed=2))):
                for transpose in (False, True):
                    x = randn(2, 3, n).to(dtype)
                    options = {"transpose": transpose, "dtype": torch.float32}
                    yield Case((x, signs, bias, block), options)


def kronecker_rotations() -> Iterator[Case]:
    rng = torch.Generator().manual_seed(2)
    for p, q in ((1, 1), (1, 13), (3, 4), (8, 32), (17, 33), (24, 24), (32, 48)):
        n, left, right = p * q, randn(p, p, seed=3), randn(q, q, seed=4)
        for first in (None, torch.randperm(n, generator=rng)):
            for last in (None, torch.randperm(n, generator=rng).int()):
                for x in (randn(n), randn(2, 3, n), randn(n, 40).T):
                    yield Case((x, left / p**0.5, (right / q**0.5).T, first, last))


def scaled_rotations() -> Iterator[Case]:
    for case in kronecker_rotations():
        x, *others = case.args
        factors = randn(x.shape[-1], seed=5), randn(x.shape[-1], seed=6)
        for before, after in (factors, (None, None)):
            yield Case((x.bfloat16(), *others, before, after), {"dtype": torch.float32})
        yield Case((x, *others, None, factors[1]), {"dtype": torch.float32})


def panels() -> Iterator[Case]:
    for (n, m), (steps, rows) in zip(
        ((1, 5), (9, 33), (40, 70)), ((1, 1), (9, 1), (1, 70)), strict=True
    ):
        X, K = randn(n, m), 0.1 * randn(n, n, seed=1)
        step = 0.5 + integers(2, steps, rows) / 4
        zero = integers(3, steps, rows) / 2
        for base in (None, X + 0.1):
            eta = torch.full_like(X, torch.nan)
            yield Case((X, K, eta, step, zero), {"top": 7, "base": base}, (2,))


def fitted_panels() -> Iterator[Case]:
    for rhos in ([2.0], [1.0, 1.5, 2.0, 2.5]):
        for dtype in (torch.bfloat16, torch.float32):
            X, K = randn(20, 33), 0.1 * randn(20, 20, seed=1)
            eta = torch.full_like(X, torch.nan)
            yield Case((X, K, eta, torch.tensor(rhos)), {"top": 3, "step_dtype": dtype}, (2,))


def grid_products() -> Iterator[Case]:
    for bits, group, n in ((2, None, 50), (3, 16, 50), (8, 7, 50), (3, None, 96), (4, 7, 64)):
        words = pack(integers(bits, 6, n), bits)
        groups = -(-n // (group or n))
        for x in (randn(n), randn(1, n), randn(2, 4, n)):
            options = {"bits": bits, "group": group, "dtype": torch.float32}
            zero = integers(bits, 6, groups).to(torch.uint8)
            yield Case((x, words, randn(6, groups).abs(), zero), options)
            yield Case((x, words, randn(1, groups).abs(), None), options)


def lattice_products() -> Iterator[Case]:
    for stages in STAGES:
        bits = code_bits(stages)
        for group, groups in ((None, 1), (2, 3)):
            words = pack(integers(bits, 7, 5), bits)
            options = {"group": group, "ratio": 2.5 if len(stages) > 1 else None}
            for x in (randn(40), randn(3, 40), randn(2, 20, 40)):
                args = (x, words, stages, randn(groups).abs())
                yield Case(args, {**options, "dtype": torch.float32})
            words, scales = pack(integers(bits, 7, 8), bits), randn(4 if group else 1).abs()
            yield Case((randn(2, 64), words, stages, scales), {**options, "dtype": torch.float32})


def dense_grids() -> Iterator[Case]:
    for bits, group in ((2, None), (3, 16), (4, 1), (8, 7)):
        n = 96
        words, groups = pack(integers(bits, 6, n), bits), -(-n // (group or n))
        for dtype in (torch.float32, torch.bfloat16):
            options = {"n": n, "bits": bits, "group": group, "dtype": dtype}
            zero = integers(bits, 6, groups).to(torch.uint8)
            yield Case((words, randn(6, groups).abs(), zero), options)
            yield Case((words, randn(1, groups).abs().bfloat16(), None), options)


def dense_lattices() -> Iterator[Case]:
    for stages in STAGES:
        words = pack(integers(code_bits(stages), 7, 8), code_bits(stages))
        ratio = 2.5 if len(stages) > 1 else None
        for group, groups in ((None, 1), (3, 3)):
            options = {"n": 64, "group": group, "ratio": ratio, "dtype": torch.float32}
            yield Case((words, stages, randn(groups).abs()), options)


def centroid_products() -> Iterator[Case]:
    for d, bits in ((1, 2), (2, 4), (2, 6), (4, 8), (4, 9)):
        words, n = pack(integers(bits, 7, 33), bits), 33 * d
        known = {"columns": 20 * d, "bits": bits, "dtype": torch.float32}
        for x in (randn(n), randn(1, n), randn(2, 4, n)):
            args = x, words, randn(2, 3, 2**bits, d)
            yield Case((*args, None), {**known, "block": None})
            yield Case((*args, randn(7, 3).abs()), {**known, "block": 12 * d})


def roundings() -> Iterator[Case]:
    for stages in STAGES:
        ratio = 2.5 if len(stages) > 1 else None
        for x in (randn(333, 8), randn(8, 21).T, randn(0, 8)):
            yield Case((x, stages), {"scale": torch.tensor(0.8), "ratio": ratio})


def decodings() -> Iterator[Case]:
    for stages in STAGES:
        codes = integers(code_bits(stages), 7, 5).to(lattice_points.code_dtype(code_bits(stages)))
        ratio = 2.5 if len(stages) > 1 else None
        for group, groups in ((None, 1), (2, 3), (1, 5)):
            yield Case((codes, stages, randn(groups).abs()), {"group": group, "ratio": ratio})


def errors() -> Iterator[Case]:
    for stages in STAGES:
        ratio = 2.5 if len(stages) > 1 else None
        X, h = randn(24, 50).T, randn(24, seed=1).abs()
        yield Case((X, h, stages), {"scales": torch.tensor([0.8, 1.1]), "ratio": ratio})


def lattice_panels() -> Iterator[Case]:
    for stages in STAGES:
        ratio = 2.5 if len(stages) > 1 else None
        for n, m, scales in ((8, 5, 1), (40, 33, 5)):
            X, K, A = randn(n, m), 0.1 * randn(n, n, seed=1), randn(n // 8, 8, 8, seed=2)
            args = X, K, torch.full_like(X, torch.nan), 0.8 + randn(scales).abs(), stages
            yield Case(args, {"ratio": ratio}, (2,))
            old = integers(16, n // 8, m)
            options = {"base": X + 0.1, "kept": (old, A @ A.mT), "ratio": ratio}
            yield Case((*args[:2], args[2].clone(), *args[3:]), options, (2,))


def fitted_lattice_panels() -> Iterator[Case]:
    for stages in STAGES:
        for rhos in ([1.0], [0.8, 1.0, 1.2]):
            X, K, h = randn(24, 40), 0.1 * randn(24, 24, seed=1), randn(24, seed=2).abs()
            args = X, K, torch.full_like(X, torch.nan), h, torch.tensor(rhos), stages
            yield Case(args, {"ratio": 2.5 if len(stages) > 1 else None}, (2,))


# d, centroids, columns, rows, row groups: small and large ones, of sizes that differ by 1
LEARNED = [
    *((1, 4, 33, 40, 40), (1, 16, 20, 41, 10), (2, 16, 36, 83, 10), (2, 64, 30, 97, 3)),
    *((4, 256, 64, 70, 1), (4, 16, 64, 5, 2), (2, 300, 20, 33, 2), (8, 4, 16, 20, 2)),
]


def learned() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """X, centroids and h."""
    for d, k, g, m, groups in LEARNED:
        yield randn(g, m), 0.8 * randn(groups, k, d, seed=1), 0.1 + randn(g, seed=2).abs()


def assignments() -> Iterator[Case]:
    for X, centroids_, h in learned():
        yield Case((X, centroids_, h))


def improvements() -> Iterator[Case]:
    for X, centroids_, h in learned():
        mass = randn(len(X) // centroids_.shape[2], X.shape[1], seed=3).square()
        for options in ({"iterations": 1, "mass": mass}, {"iterations": 3}):
            yield Case((X, centroids_, h), options)


def learned_panels() -> Iterator[Case]:
    for X, centroids_, h in learned():
        (_, k, d), (n, m) = centroids_.shape, X.shape
        K, A = 0.1 * randn(n, n, seed=4), randn(n // d, d, d, seed=5)
        old = torch.arange(n // d * m).remainder(k).view(n // d, m)
        scaled = {"scales": 0.3 + randn(-(-n // (2 * d)), m, seed=6).abs(), "block": 2 * d}
        for options in ({}, scaled, {**scaled, "base": X + 0.1, "kept": (old, A @ A.mT)}):
            eta = torch.full_like(X, torch.nan)
            yield Case((X, K.T, eta, h, centroids_), options, (2,))


# L, bits and V of trellises, and the columns of their tiles
TRELLISES = [(8, 1, 1, 1), (8, 2, 1, 1), (7, 3, 1, 4), (9, 4, 1, 16), (8, 3, 2, 2), (8, 4, 2, 4)]


def trellis_codes() -> Iterator[tuple[Code, int]]:
    for L, bits, V, columns in TRELLISES:
        yield Code("table", bits, randn(2**L, V, seed=L)), columns


def searches() -> Iterator[Case]:
    for code, columns in trellis_codes():
        for tiles in (1, 2):
            yield Case((randn(37, columns), code), {"tiles": tiles})


def walks() -> Iterator[Case]:
    order = tuple(torch.randperm(256, generator=torch.Generator().manual_seed(3)).tolist())
    for code, columns in trellis_codes():
        codes = integers(code.bits, 32, 48)
        for tiling in (Tiling(1, columns), Tiling(3, columns)):
            yield Case((codes.to(torch.uint8), code, tiling))
        if columns == 16:
            yield Case((codes, code, Tiling(2, columns, order)))


def trellis_panels() -> Iterator[Case]:
    for code, columns in trellis_codes():
        if columns * code.bits // code.V > 63:
            continue  # a code with a sign
        n, m, tiling = 3 * columns, 37, Tiling(2, columns)
        K = torch.diag(torch.full((n - columns,), 0.5), columns)  # exact: walks are sensitive
        X, A = randn(n, m), randn(3, columns, columns, seed=1)
        old = integers(code.bits, 3, m)
        kept = {"base": X + 0.1, "kept": (old, A @ A.mT)}
        for options, scales in (({}, [0.9]), (kept, [0.9, 1.0, 1.1])):
            args = X, K, torch.full_like(X, torch.nan), torch.tensor(scales), code, tiling
            yield Case(args, options, (2,))


def packed_trellises() -> Iterator[tuple[Tensor, Code, Tensor, Tiling, int, int | None]]:
    """Words, code, scales, tiling, n and group."""
    mul1 = named("mul1", 2, 16, CPU)
    for code, columns in (*trellis_codes(), (mul1, 1)):
        n = 96 * code.V
        words = pack(integers(code.bits, 80, 96), code.bits)
        for group, groups in ((None, 1), (32, n // 32)):
            yield words, code, randn(groups).abs() + 0.5, Tiling(2, columns), n, group
        if columns == 16:
            yield words, code, randn(1).abs() + 0.5, Tiling(5, columns, ORDERS["mma"]), n, None


def trellis_products() -> Iterator[Case]:
    for words, code, scales, tiling, n, group in packed_trellises():
        for dtype in (torch.float32, torch.bfloat16):
            for x in (randn(n), randn(3, n), randn(2, 20, n)):
                args = (x, words, code, scales, tiling)
                yield Case(args, {"group": group, "dtype": dtype})


def dense_trellises() -> Iterator[Case]:
    for words, code, scales, tiling, n, group in packed_trellises():
        for dtype in (torch.float32, torch.bfloat16):
            options = {"n": n, "group": group, "dtype": dtype}
            yield Case((words, code, scales, tiling), options)


def second_moments() -> Iterator[Case]:
    for n in (5, 70, 1030):
        anchors = 2.0 ** torch.arange(n).remainder(5).double()
        for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
            for given in ((), (anchors,)):
                args = (randn(n, n, seed=1).double(), randn(40, n).to(dtype), *given)
                yield Case(args, {}, (0,))


def near(ours: Tensor, expected: Tensor) -> None:
    """The noise of float32 in sums of some 50 numbers, or of 528 in a rotation."""
    size = float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(ours, expected, rtol=0, atol=2e-5 * size)


def near_as_rounded(ours: Tensor, expected: Tensor) -> None:
    """The noise of bfloat16, to which both factors of a sum of some 100 products are rounded."""
    torch.testing.assert_close(ours, expected, rtol=0, atol=float(expected.abs().max()) / 100)


def near_below(ours: Tensor, expected: Tensor) -> None:
    """On and below the diagonal of a matrix, above which nothing is meant."""
    square = ours.ndim == 2
    near(ours.tril() if square else ours, expected.tril() if square else expected)


def equal_but_for_ties(ours: Tensor, expected: Tensor) -> None:
    """Codes of vectors that lie between two points may be either."""
    assert (ours.dtype, ours.shape) == (expected.dtype, expected.shape)
    assert int((ours != expected).sum()) <= expected.numel() // 100


@dataclass
class Check:
    cases: Callable[[], Iterator[Case]]
    compare: Callable[[Tensor, Tensor], None] = near


OPERATIONS: dict[Operation[Any, Any], Check] = {
    rotations.turn: Check(rotated),
    rotations.turn_vectors: Check(rotated_vectors),
    kronecker.rotate: Check(kronecker_rotations),
    kronecker.rotate_scaled: Check(scaled_rotations),
    panel.round_columns: Check(panels),
    panel.fit_and_round_columns: Check(fitted_panels),
    grid_matvec.multiply: Check(grid_products),
    lattice_matvec.multiply: Check(lattice_products),
    grid_matvec.decode: Check(dense_grids, torch.testing.assert_close),
    lattice_matvec.decode: Check(dense_lattices, torch.testing.assert_close),
    centroid_matvec.multiply: Check(centroid_products),
    lattice_points.nearest: Check(roundings, equal_but_for_ties),
    lattice_points.decode: Check(decodings, torch.testing.assert_close),
    lattice_points.errors: Check(errors),
    lattice_panel.round_blocks: Check(lattice_panels),
    lattice_panel.fit_and_round_blocks: Check(fitted_lattice_panels),
    centroids.assign: Check(assignments, equal_but_for_ties),
    centroids.improve: Check(improvements),
    centroids.round_columns: Check(learned_panels),
    trellis.encode: Check(searches, torch.testing.assert_close),
    trellis.decode: Check(walks, torch.testing.assert_close),
    trellis.round_columns: Check(trellis_panels, torch.testing.assert_close),
    trellis_matvec.multiply: Check(trellis_products, near_as_rounded),
    trellis_matvec.decode: Check(dense_trellises, torch.testing.assert_close),
    hessian.add_products: Check(second_moments, near_below),
}


def name(operation: Operation[Any, Any]) -> str:
    home = operation.reference.__module__.removeprefix("quip.kernels.")
    return f"{home}.{operation.reference.__name__}"


FORMS = [
    pytest.param(
        *(operation, form, label),
        id=f"{name(operation)} {label}",
        marks=[pytest.mark.gpu] if label == "cuda" else [],
    )
    for operation in OPERATIONS
    for label, form in operation.forms.items()
]


@pytest.mark.parametrize(("operation", "form", "label"), FORMS)
def test_every_form_computes_what_the_reference_does(operation, form, label, request):
    if not form.available():
        pytest.skip(f"{request.node.callspec.id} is not available on this machine")
    tested, served = OPERATIONS[operation], 0
    device = torch.device("cuda" if label == "cuda" else "cpu")
    for ours, expected in zip(tested.cases(), tested.cases(), strict=True):
        ours.move(device)
        expected.move(device)
        if not form.serves(*ours.args, **ours.options):
            continue
        served += 1
        for one, other in zip(
            results(form.compute, ours), results(operation.reference, expected), strict=True
        ):
            tested.compare(one, other)
    assert served, "no case is one that this form serves"


def results(compute: Callable[..., Any], case: Case) -> list[Tensor]:
    """What comes back, and what was written."""
    given = [x.clone() if isinstance(x, Tensor) else x for x in case.args]
    found = compute(*case.args, **case.options)
    for i, (before, now) in enumerate(zip(given, case.args, strict=True)):
        if isinstance(now, Tensor) and i not in case.written:
            assert torch.equal(now, before), f"argument {i} was changed"
    found = found if isinstance(found, tuple) else (found,)
    return [torch.as_tensor(x) for x in (*found, *(case.args[i] for i in case.written))]


def test_every_operation_of_the_package_has_cases_here():
    modules = pkgutil.walk_packages(quip.kernels.__path__, "quip.kernels.")
    found = {
        value
        for module in modules
        for value in vars(importlib.import_module(module.name)).values()
        if isinstance(value, Operation)
    }
    assert found == set(OPERATIONS)


def test_the_first_form_that_serves_and_is_available_is_taken():
    def form(least: int, available: bool = True) -> Form[int]:
        return Form(lambda x: x + least, lambda x: x >= least, lambda: available)

    operation = Operation(lambda x: -x, best=form(30, False), large=form(20), small=form(10))
    assert [operation(x) for x in (0, 10, 20, 30)] == [0, 20, 40, 50]
    assert operation.chosen(5) is operation.reference


@pytest.mark.parametrize("chunk", [1, 100, 2**20])
def test_an_error_is_summed_in_portions(chunk):
    for case in errors():
        X, *others = case.args
        expected = operations.errors_by_rounding(*case.args, **case.options)
        for view in (X, X.contiguous()):
            ours = operations.errors_by_rounding(view, *others, **case.options, chunk=chunk)
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=0)
