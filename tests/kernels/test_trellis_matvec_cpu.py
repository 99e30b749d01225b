"""Products with packed trellis codes in C++, and whole matrices, against the torch form."""

import pytest
import torch

from quip.codebooks import trellis_codes
from quip.kernels import trellis_matvec
from quip.kernels.bits import pack
from quip.kernels.trellis import Code, Tiling
from quip.kernels.trellis_matvec import cpu, reference

pytestmark = pytest.mark.skipif(not cpu.FORM.available(), reason="no C++ compiler here")
CPU = torch.device("cpu")
ALL_TOKENS = ((), (1,), (3,), (2, 4), (16,))


def table(bits: int, L: int, V: int = 1, seed: int = 0) -> Code:
    """A code whose numbers are halves."""
    rng = torch.Generator().manual_seed(seed)
    return Code("table", bits, torch.randn(2**L, V, generator=rng).half().float())


def uneven(code: Code) -> Code:
    """The same, but for the last bits of its numbers."""
    return Code(code.name, code.bits, code.table * 1.0001)


class Problem:
    """Random codes, and what they are multiplied with."""

    def __init__(self, code: Code, m: int, n: int, tiling: Tiling, group: int | None = None):
        self.rng = torch.Generator().manual_seed(m + n)
        self.code, self.tiling, self.n, self.group = code, tiling, n, group
        codes = torch.randint(2**code.bits, (m, n // code.V), generator=self.rng)
        self.words = pack(codes, code.bits)
        self.scales = 0.5 + torch.rand(-(-n // (group or n)), generator=self.rng)

    @property
    def args(self):
        return self.words, self.code, self.scales, self.tiling

    def x(self, *batch: int) -> torch.Tensor:
        return torch.randn(*batch, self.n, generator=self.rng)

    def decoded(self, dtype: torch.dtype, form=reference.decode_words) -> torch.Tensor:
        return form(*self.args, n=self.n, group=self.group, dtype=dtype)

    def check(self, *batches: tuple[int, ...]) -> None:
        """The products are those with the decoded matrix, in float64."""
        W = self.decoded(torch.float64)
        for batch in batches:
            x = self.x(*batch)
            ours = cpu.multiply(x, *self.args, group=self.group, dtype=torch.float32)
            expected = x.double() @ W.T
            assert (ours.shape, ours.dtype) == (expected.shape, torch.float32)
            # Noise of float32 in sums of some hundred products, relative to their sizes.
            sizes = x.double().abs() @ W.abs().T
            assert bool(((ours - expected).abs() <= 3e-7 * sizes).all())


@pytest.mark.parametrize(
    ("bits", "L", "V"),
    [
        *((1, 10, 1), (2, 10, 1), (2, 12, 1), (3, 12, 1), (4, 8, 1), (4, 12, 1)),
        *((5, 8, 1), (6, 14, 1)),
        *((3, 12, 2), (5, 12, 2), (7, 10, 2), (4, 16, 2), (8, 16, 2)),
    ],
)
@pytest.mark.parametrize("exact", [True, False], ids=["halves", "floats"])
def test_columns_that_go_down_the_rows_of_tiles_are_multiplied(bits, L, V, exact):
    code = table(bits, L, V) if exact else uneven(table(bits, L, V))
    Problem(code, 75, 130 * V, Tiling(2, V)).check(*ALL_TOKENS)  # 38 and 37 rows
    Problem(code, 33, 576 * V, Tiling(1, V), group=24).check((1,))


@pytest.mark.parametrize(("rows", "columns"), [(32, 8), (16, 16), (128, 2), (7, 4)])
@pytest.mark.parametrize("V", [1, 2])
def test_tiles_of_several_columns_are_multiplied(rows, columns, V):
    m, n = 2 * rows + 3, 192
    for bits in (1, 3, 4):
        Problem(table(bits, 10, V), m, n, Tiling(2, columns), group=16).check((1,), (5,))


@pytest.mark.parametrize("name", trellis_codes.COMPUTED)
def test_computed_codes_are_those_of_the_table(name):
    """Each state stands alone in a row, where no other hides a wrong bit of it."""
    code = trellis_codes.code(name, 2, 16, CPU)
    walks = torch.randint(4, (64, 1024), generator=torch.Generator().manual_seed(1))
    x = torch.eye(1024)[:16]
    tiling, one = Tiling(1, 1), torch.ones(1)
    ours = cpu.multiply(x, pack(walks, 2), code, one, tiling, group=None, dtype=torch.float32)
    expected = reference.decode_words(
        pack(walks, 2), code, one, tiling, n=1024, group=None, dtype=torch.float32
    )
    # 1mad is divided by 147.8, which here is a multiplication.
    near = 2**-23 if name == "1mad" else 0
    torch.testing.assert_close(ours, expected[:, :16].T, rtol=near, atol=0)
    for L, columns in ((16, 1), (12, 1), (16, 16)):
        Problem(trellis_codes.code(name, 3, L, CPU), 50, 192, Tiling(2, columns)).check((1,), (4,))


@pytest.mark.parametrize(("bits", "V", "columns"), [(2, 1, 1), (3, 1, 8), (5, 2, 2), (1, 1, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_whole_matrices_are_decoded_bit_for_bit(bits, V, columns, dtype):
    problem = Problem(uneven(table(bits, 10, V)), 75, 80 * V, Tiling(3, columns), group=48)
    assert torch.equal(problem.decoded(dtype, cpu.decode), problem.decoded(dtype))


def test_learned_tables_are_of_halves():
    for L in (10, 12):
        code = trellis_codes.code("learned", 2, L, CPU)
        assert cpu.halves(code) is not None
        Problem(code, 100, 96, Tiling(1, 1)).check((1,))


def test_threads_share_the_rows_of_a_tile():
    before = torch.get_num_threads()
    try:
        for code, columns in ((table(2, 12), 1), (table(3, 12, 2), 2), (table(2, 10), 16)):
            problem = Problem(code, 300, 1024, Tiling(1, columns))
            torch.set_num_threads(2)
            problem.check((1,), (9,))
            W = problem.decoded(torch.bfloat16, cpu.decode)
            torch.set_num_threads(1)
            assert torch.equal(W, problem.decoded(torch.bfloat16, cpu.decode))
    finally:
        torch.set_num_threads(before)


def test_the_smallest_tiles_close_upon_themselves():
    """Tiles of as few rows as a state remembers, or fewer."""
    for m, tiles, L in ((6, 1, 12), (5, 1, 12), (4, 2, 10), (1, 1, 4)):
        Problem(table(2, L), m, 96, Tiling(tiles, 1)).check((1,))


def test_prompts_are_multiplied_with_the_decoded_matrix():
    problem = Problem(table(2, 12), 40, 96, Tiling(1, 1))
    x, known = problem.x(cpu.FEW + 1), {"group": None, "dtype": torch.bfloat16}
    form = trellis_matvec.multiply.chosen(x, *problem.args, **known)
    assert form is cpu.multiply_decoded
    expected = reference.multiply(x, *problem.args, **known)
    assert torch.equal(form(x, *problem.args, **known), expected)


def test_what_the_kernel_cannot_read_goes_elsewhere():
    def chosen(problem: Problem, x: torch.Tensor):
        known = {"group": problem.group, "dtype": torch.float32}
        return trellis_matvec.multiply.chosen(x, *problem.args, **known)

    plain = Problem(table(2, 12), 32, 96, Tiling(2, 16))
    assert chosen(plain, plain.x(1)) is cpu.multiply
    ordered = Problem(table(2, 12), 32, 96, Tiling(2, 16, tuple(range(256))))
    assert chosen(ordered, ordered.x(1)) is not cpu.multiply  # squares.py has it
    wide = Problem(table(4, 8, 4), 32, 96, Tiling(2, 4))
    assert chosen(wide, wide.x(1)) is reference.multiply
    plain.scales.requires_grad_()  # of which C++ would pass no gradient on
    assert chosen(plain, plain.x(1)) is reference.multiply
