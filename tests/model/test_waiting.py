"""Where the work waits for a device: nowhere once a column, and each place is known.

A device works on while Python runs ahead. What asks for a number of it (.item(), bool() of a
tensor) waits until all is done, and leaves it idle for as long as it takes to ask for more.
"""

import ast
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import quip
from quip.matrix.build import build_recipe
from quip.matrix.quantize import quantize_matrix
from quip.model.quantize import quantize_model
from tests.support.tiny import tiny, tokens

HOUSE = Path(quip.__file__).parent
METHODS = {"item", "tolist", "cpu", "numpy", "nonzero", "is_nonzero"}
NUMBERS = {"float", "int", "bool"}
LOOPS = ast.For | ast.While | ast.ListComp | ast.GeneratorExp | ast.SetComp | ast.DictComp

# Who may ask for a number, wherever it stands: once a matrix or less often, or not of a device.
WORDS = {
    "codebooks/e8p.py": {"_numbers"},
    "kernels/lattice_panel/cuda.py": {"round_blocks"},
    "kernels/lattice_points/reference.py": {"_shapes"},
    "matrix/books.py": {"_grid_b"},
    "matrix/methods.py": {""},
    "matrix/prepare.py": {"asks_for_h"},
    "matrix/said.py": {"number", "number_or_auto", "tile_of"},
    "matrix/takes.py": {"columns_of"},
    "matrix/vectors.py": {"_weights"},
    "model/device.py": {"free_host_bytes"},
    "model/matrices.py": {"places"},
    "model/passed.py": {"see", "standing_in"},
    "model/stream.py": {"state"},
    "model/unread.py": {"names_by_block"},
}
TABLES_MADE_ONCE = {
    "codebooks/e81b.py": {"pair_rows"},
    "codebooks/trellis_codes.py": {"target_rms"},
    "kernels/hadamard/cpu.py": {"_codes"},
    "kernels/hadamard/cuda.py": {"_kernels"},
    "kernels/lattice_matvec/cuda.py": {"_nibbles", "packed_tables"},
    "kernels/trellis_matvec/values.py": {"_hashed", "values_of", "_tabled"},
}
ONCE_A_MATRIX = {
    "codebooks/centroids.py": {"restore"},
    "codebooks/grids.py": {"restore"},
    "codebooks/lattice.py": {"restore"},
    "codebooks/scaling.py": {"restore"},
    "codebooks/trellises.py": {"restore"},
    "kernels/bits.py": {"pack"},
    "matrix/hessian.py": {"is_finite", "reduce"},
    "matrix/linalg.py": {"_failure", "_is_factor", "energy", "proxy_loss"},
    "matrix/order.py": {"largest_first"},
    "matrix/paired.py": {"reduce"},
    "matrix/prepare.py": {"without_dead"},
    "matrix/two_sided.py": {"two_sided_loss"},
    "matrix/quantize.py": {"sweep_and_polish"},
    "model/ledger.py": {"keep"},
    "transforms/hadamard.py": {"restore"},
    "transforms/rotation.py": {"restored", "stored"},
}
# Iterations over a whole matrix, of which each may be the last; and searches on the CPU.
ONCE_A_PASS = {
    "kernels/centroid_matvec/reference.py": {"multiply_by_parts"},
    "kernels/centroids/reference.py": {"_means"},
    "kernels/lattice_points/operations.py": {"error_by_rounding"},
    "matrix/centroids.py": {"__call__", "solve"},
    "model/tune/descent.py": {"_stream"},
}
KNOWN = (WORDS, TABLES_MADE_ONCE, ONCE_A_MATRIX, ONCE_A_PASS)
INNERMOST = ("matrix", "codebooks", "kernels")  # of which any function may be called in a loop
OTHERS = ("transforms", "model")  # of which what a loop says itself is looked at


def asked(code: str, *, in_loops_only: bool) -> Iterator[tuple[str, str]]:
    """The function, and the words, of all that may ask a device for a number."""

    def visit(node: ast.AST, function: str, looping: bool) -> Iterator[tuple[str, str]]:
        if isinstance(node, ast.FunctionDef):
            function, looping = node.name, False
        if isinstance(node, ast.Call) and (looping or not in_loops_only):
            called = node.func
            if isinstance(called, ast.Attribute) and called.attr in METHODS:
                yield function, ast.unparse(node)
            if isinstance(called, ast.Name) and called.id in NUMBERS:
                yield function, ast.unparse(node)
        for name, value in ast.iter_fields(node):
            once = isinstance(node, ast.For) and name == "iter"
            inner = looping or (isinstance(node, LOOPS) and not once)
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from visit(child, function, inner)

    yield from visit(ast.parse(code), "", False)


def test_nothing_waits_for_a_device_that_is_not_known_to():
    found = set()
    for room in (*INNERMOST, *OTHERS):
        for path in sorted((HOUSE / room).rglob("*.py")):
            name = str(path.relative_to(HOUSE))
            known = {function for where in KNOWN for function in where.get(name, ())}
            if path.name == "cpu.py" and name not in TABLES_MADE_ONCE:  # of tensors on the CPU
                continue
            for function, words in asked(path.read_text(), in_loops_only=room in OTHERS):
                if function not in known:
                    found.add(f"{name}: {function}: {words}")
    assert found == set()


def test_what_asks_in_a_loop_is_seen():
    code = (
        "def f(xs):\n"
        "    for x in xs.tolist():\n"
        "        while bool(x):\n"
        "            x = x.cpu()\n"
        "    return [float(x) for x in xs], int(xs[0])\n"
    )
    loops = [words for _, words in asked(code, in_loops_only=True)]
    assert loops == ["bool(x)", "x.cpu()", "float(x)"]
    everywhere = {words for _, words in asked(code, in_loops_only=False)}
    assert everywhere == {*loops, "xs.tolist()", "int(xs[0])"}


RECIPES = {
    "int": {"quant": "ldlq", "wbits": 2, "incoh_processing": True},
    "int, no rotation": {"quant": "ldlq", "wbits": 4},
    "gptq": {"quant": "gptq", "wbits": 4, "groupsize": 32},
    "E8P12": {"quant": "ldlq", "codebook": "E8P12"},
    "E8P12RVQ4B": {"quant": "ldlq", "codebook": "E8P12RVQ4B"},
}


def waits(call) -> int:
    """How often a call waits for the device."""
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(one.message) for one in seen)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("flags", RECIPES.values(), ids=RECIPES)
def test_a_matrix_of_four_times_the_columns_waits_no_more_often(problem, flags):
    counted = []
    for n in (256, 1024):
        W, H = (x.cuda() for x in problem(64, n))
        W, recipe = W.float(), build_recipe(**flags)

        def quantize(W=W, H=H, recipe=recipe):
            rng = torch.Generator().manual_seed(0)
            quantize_matrix(W, H, recipe, rng=rng)

        quantize()  # kernels are compiled, and tables made, by the first one
        counted.append(waits(quantize))
    assert counted[1] <= counted[0] <= 60


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_more_windows_wait_no_more_often():
    recipe, counted = build_recipe(quant="ldlq", wbits=4), []
    for count in (4, 32):

        def quantize(count=count):
            model = tiny("llama", "sdpa")
            quantize_model(model, tokens(count), recipe, device="cuda", seed=0, batch_size=2)

        quantize()
        counted.append(waits(quantize))
    # Each batch that enters is copied from the host, from memory that is not pinned.
    assert counted[1] <= counted[0] + 32
