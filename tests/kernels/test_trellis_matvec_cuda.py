"""Products with packed trellis codes on CUDA: the source on the CPU, what it compiles to, and on a
device."""

import ctypes

import pytest
import torch

from quip.kernels import native
from quip.kernels.bits import pack
from quip.kernels.few_tokens import FEW
from quip.kernels.numbers import KINDS
from quip.kernels.trellis import Code, Tiling
from quip.kernels.trellis import cuda as walks
from quip.kernels.trellis_matvec import cuda, reference
from quip.kernels.trellis_matvec.values import Kind, values_of
from tests.support import ptxas
from tests.support.emulation import emulated, launch, needs_compiler  # noqa: F401

CPU, H100 = torch.device("cpu"), 227 * 2**10  # bytes that a block may have there
# name, L, bits, and how the kernel makes its values
CODES = [
    *(("mul1", 16, 2, Kind.BYTES), ("mul1", 16, 4, Kind.BYTES), ("1mad", 16, 2, Kind.BYTES)),
    *(("int8", 16, 2, Kind.SIX_BITS), ("int8", 16, 4, Kind.SIX_BITS)),
    *(("table", 12, 2, Kind.PAIRS), ("table", 10, 4, Kind.PAIRS), ("table", 4, 2, Kind.PAIRS)),
    *(("table", 12, 4, Kind.TABLE), ("table", 15, 2, Kind.TABLE), ("table", 8, 3, Kind.TABLE)),
    *(("table", 12, 3, Kind.TABLE), ("table", 11, 3, Kind.TABLE), ("table", 4, 3, Kind.TABLE)),
]
# Of the norm of y: x and a table are rounded to 16 bits of the largest number; MUL1's values of up
# to 3.5, with a size of 1, are not rounded to float16.
ERROR = {"mul1": 4e-4}
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def values(name: str, L: int) -> torch.Tensor:
    """The formulas of the papers; a table is drawn."""
    if name == "table":
        return torch.randn(2**L, generator=torch.Generator().manual_seed(L))
    factor, increment, counted = {
        "mul1": (0x83DCD12D, 0, 0xFF),
        "1mad": (34038481, 76625530, 0xFF),
        "int8": (0xCBAC1FED, 0, 0x3F),
    }[name]
    x = torch.arange(2**L) * factor + increment
    total = sum((x >> shift) & counted for shift in (0, 8, 16, 24))
    if name == "mul1":
        a, b = (
            torch.tensor([0x1EEE, 0xC931 - 2**16], dtype=torch.int16).view(torch.float16).double()
        )
        return ((1024 + total) * a + b).half().float()
    return (total - 126).float() if name == "int8" else (total - 510) / 147.800537


def code_of(name: str, L: int, bits: int) -> Code:
    return Code(name, bits, values(name, L)[:, None])


def matrix(m: int, n: int, bits: int, group: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Words and scales."""
    rng = torch.Generator().manual_seed(m)
    scales = torch.rand(1 if group is None else -(-n // group), generator=rng) + 0.5
    return pack(torch.randint(2**bits, (m, n), generator=rng), bits), scales


def check(
    code, m, n, tiles, batch, *, group=None, dtype=torch.bfloat16, device="cpu", x_dtype=None
):
    """The kernel gives the product with the decoded matrix; x and y come back on the CPU."""
    words, scales = matrix(m, n, code.bits, group)
    x = torch.randn(*batch, n, generator=torch.Generator().manual_seed(n)).to(x_dtype)
    tiling, there = Tiling(tiles, 1), torch.device(device)
    args = x.to(there), words.to(there), code.to(there), scales.to(there), tiling
    exact = dtype == torch.float32
    assert cuda._stages_for(args[0], m, args[2], tiling, 3 if exact else 2)
    ours = cuda.multiply(*args, group=group, dtype=dtype).cpu()
    assert (ours.dtype, ours.shape) == (x.dtype, (*batch, m))
    options = {"n": n, "group": group, "dtype": torch.float32}
    W = reference.decode_words(words, code, scales, tiling, **options).double()
    expected = x.double() @ W.T
    error = float((ours.double() - expected).norm() / expected.norm())
    bound = 2e-6 if exact else ERROR.get(code.name, 1e-4)
    assert error < bound + (0 if x.dtype == torch.float32 else torch.finfo(x.dtype).eps)
    return ours


@pytest.fixture
def two_processors(emulated, monkeypatch):  # noqa: F811
    for module in (cuda, walks):
        monkeypatch.setattr(module, "processors", lambda device: 2)
        monkeypatch.setattr(module, "block_bytes", lambda device: H100)


# The source, compiled for the CPU


@needs_compiler
@pytest.mark.parametrize(("name", "L", "bits", "kind"), CODES)
def test_the_source_multiplies_as_the_reference_does(name, L, bits, kind, two_processors):
    """Tiles of one size and of two, whole strips or not, chunks that end within a plane."""
    code = code_of(name, L, bits)
    assert values_of(code)[0].kind is kind
    check(code, 256, 96, 1, (1,))
    check(code, 77, 160, 2, (2, 2), group=32)
    check(code, 265, 32, 1, (), group=1, x_dtype=torch.float16, dtype=torch.float16)
    check(code, 64, 96, 2, (2,), dtype=torch.float32)


@needs_compiler
def test_many_columns_are_shared_out_to_layers_of_blocks(two_processors, monkeypatch):
    layers = []

    def look(*args):
        layers.append(args[3]._obj.layers)
        launch(*args)

    monkeypatch.setattr("quip.kernels.cuda.launch", look)
    for code in (code_of("mul1", 16, 2), code_of("table", 8, 4), code_of("table", 8, 3)):
        check(code, 40, 2112, 1, (), x_dtype=torch.bfloat16)
    assert min(layers) > 1


@needs_compiler
@pytest.mark.parametrize("name", ["mul1", "table"])
def test_equal_inputs_give_equal_bits_wherever_they_stand(name, two_processors):
    code = code_of(name, 16 if name == "mul1" else 12, 2)
    words, scales = matrix(80, 96, 2, None)
    args, options = (code, scales, Tiling(2, 1)), {"group": None, "dtype": torch.bfloat16}
    x = torch.randn(5, 96)
    together = cuda.multiply(x, words, *args, **options)
    for row, alone in zip(x, together, strict=True):
        assert torch.equal(cuda.multiply(row, words, *args, **options), alone)
    # Parts of other tensors, at addresses that no wide load may have, and columns of a table
    shifted = torch.cat([x.new_zeros(1), x[0]])[1:]
    beside = torch.cat([words, words], 1)[:, words.shape[1] :]
    assert torch.equal(cuda.multiply(shifted, beside, *args, **options), together[0])


@needs_compiler
def test_a_column_at_a_time_gives_the_matrix(two_processors):
    """Where no other hides a wrong value."""
    for name, L, bits in (("mul1", 16, 2), ("table", 12, 2), ("table", 12, 3), ("table", 12, 4)):
        code, n = code_of(name, L, bits), 32
        words, scales = matrix(80, n, bits, None)
        tiling, options = Tiling(2, 1), {"group": None, "dtype": torch.bfloat16}
        columns = torch.eye(n)[[0, 9, 18, 31]]
        ours = cuda.multiply(columns, words, code, scales, tiling, **options)
        W = reference.decode_words(
            words, code, scales, tiling, n=n, group=None, dtype=torch.float32
        )
        # Half a unit of float16 at 3.5, or of 16 bits; and the last bits of x
        off = (2**-10 if name == "mul1" else 2**-13) * float(scales)
        torch.testing.assert_close(ours, W[:, [0, 9, 18, 31]].T, rtol=0, atol=off)


@needs_compiler
def test_all_else_is_multiplied_by_the_decoded_matrix(two_processors):
    rng = torch.Generator().manual_seed(0)
    pair = Code("table", 4, torch.randn(2**8, 2, generator=rng))
    few, many = torch.randn(1, 96), torch.randn(FEW + 1, 96)
    for x, m, code, tiling in (
        (many, 64, code_of("table", 8, 2), Tiling(1, 1)),
        (many[:9], 64, code_of("table", 8, 2), Tiling(1, 1)),  # two at a time
        (few, 64, code_of("table", 13, 3), Tiling(1, 1)),
        (few, 64, code_of("mul1", 16, 3), Tiling(1, 1)),
        (few, 64, code_of("table", 8, 1), Tiling(1, 1)),
        (few, 64, code_of("table", 8, 2), Tiling(4, 16)),
        (few, 62, code_of("table", 8, 2), Tiling(2, 1)),  # tiles of less than two strips
        (few, 64, pair, Tiling(1, 2)),
        (few[:, :80], 64, code_of("table", 8, 2), Tiling(1, 1)),
        (few.double(), 64, code_of("table", 8, 2), Tiling(1, 1)),
    ):
        n = x.shape[1]
        assert not cuda._stages_for(x, m, code, tiling, 2)
        words = pack(torch.randint(2**code.bits, (m, n // code.V), generator=rng), code.bits)
        args, options = (x, words, code, torch.ones(1), tiling), {"group": None, "dtype": x.dtype}
        options["dtype"] = torch.float32
        expected = reference.multiply(*args, **options)
        torch.testing.assert_close(cuda.multiply(*args, **options), expected)


@needs_compiler
def test_a_gradient_that_is_asked_for_reaches_x(two_processors):
    code = code_of("mul1", 16, 2)
    words, scales = matrix(64, 96, 2, None)
    args, x = (words, code, scales, Tiling(1, 1)), torch.randn(2, 96, requires_grad=True)
    cuda.multiply(x, *args, group=None, dtype=torch.float32).sum().backward()
    W = reference.decode_words(words, *args[1:], n=96, group=None, dtype=torch.float32)
    torch.testing.assert_close(x.grad, W.sum(0).expand(2, -1))


def test_a_code_whose_table_is_another_than_its_name_says_is_read_from_the_table():
    drawn = values("table", 16)[:, None]
    for name, table in (("mul1", drawn), ("mul1", values("mul1", 8)[:, None]), ("mcg", drawn)):
        assert values_of(Code(name, 2, table))[0].kind in (Kind.TABLE, Kind.PAIRS)
    made = values_of(code := code_of("mul1", 16, 2))
    assert values_of(code) is made
    assert made[0].unit == pytest.approx(0.0067673, rel=1e-4)
    assert made[0].middle == pytest.approx(10.3828 / 0.0067673 - 1024, rel=1e-4)
    # What these sums leave is looked up; INT8's leave nothing.
    assert [len(values_of(code_of(name, 16, 2))) for name in ("mul1", "1mad", "int8")] == [2, 1, 1]


# What it compiles to


@pytest.mark.slow
@pytest.mark.parametrize("capability", ptxas.CAPABILITIES)
def test_the_kernels_spill_nothing_and_two_blocks_have_their_registers(capability, tmp_path):
    kernels = ptxas.kernels(cuda.SOURCE, capability, tmp_path)
    assert len(kernels) == 10  # four kinds of values of 2 and 4 bits, one of 3, and what splits x
    for kernel in kernels:
        assert (kernel.spilled, kernel.stack) == (0, 0), kernel
        assert kernel.registers <= (128 if "Hashes" in kernel.name else 168), kernel
    library = ctypes.CDLL(str(tmp_path / ptxas.LIBRARY))
    for name in native.EXPORTED.findall(cuda.SOURCE.read_text()):
        assert hasattr(library, name)


@needs_compiler
def test_a_block_with_less_room_multiplies_fewer_vectors_at_once(two_processors, monkeypatch):
    code = code_of("table", 12, 2)
    (values, _), vectors = values_of(code), torch.zeros(3, 96)
    assert values.bytes(2, 2, 2) == 2**16 + 8 * (8 + 2) + 12 * 8 * 132 * 4
    counts = []
    for room in (H100, 99 * 2**10, 64 * 2**10):  # as cards have it, and too little for a table
        monkeypatch.setattr(cuda, "block_bytes", lambda device, room=room: room)
        counts.append(cuda._together((values,), code, 2, CPU))
        assert bool(cuda._stages_for(vectors, 64, code, Tiling(1, 1), 2)) == (room > 2**16)
        if room == 99 * 2**10:
            check(code, 64, 96, 1, (3,))
    assert counts == [2, 1, 0]


def test_only_matrices_on_a_device_are_sent_to_the_kernels():
    code, (words, scales) = code_of("table", 8, 2), matrix(64, 96, 2, None)
    args, options = (words, code, scales, Tiling(1, 1)), {"group": None, "dtype": torch.float32}
    assert not cuda.MULTIPLY.serves(torch.zeros(1, 96), *args, **options)
    assert not cuda.DECODE.serves(*args, n=96, **options)


# On a device


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("shape", [(4096, 4096, 16), (1000, 11008, 4), (530, 608, 2)])
@pytest.mark.parametrize("tokens", [1, 4, 8])
def test_the_kernels_on_a_device(shape, tokens):
    m, n, tiles = shape
    for name, L, bits, _ in CODES:
        code = code_of(name, L, bits)
        for dtype in (torch.bfloat16, torch.float32) if tokens < 8 else (torch.bfloat16,):
            first, again = (
                check(code, m, n, tiles, (tokens,), dtype=dtype, device="cuda") for _ in range(2)
            )
            assert torch.equal(first, again)


@pytest.mark.gpu
@gpu
def test_products_on_a_device_take_the_kernels():
    code = code_of("table", 12, 2).to(torch.device("cuda"))
    words, scales = (part.cuda() for part in matrix(512, 1024, 2, None))
    for dtype in KINDS:
        for tokens in (1, FEW + 1):
            x = torch.randn(tokens, 1024, dtype=dtype, device="cuda")
            args, options = (x, words, code, scales, Tiling(2, 1)), {"group": None, "dtype": dtype}
            assert cuda.MULTIPLY.serves(*args, **options)
            ours, expected = cuda.multiply(*args, **options), reference.multiply(*args, **options)
            torch.testing.assert_close(ours, expected, rtol=0.02, atol=0.02 * float(expected.std()))
