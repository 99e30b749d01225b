"""Trellis codes on CUDA: the source on the CPU, what it compiles to, and on a device."""

import pytest
import torch

from quip.kernels.bits import pack
from quip.kernels.trellis import Code, Tiling, cuda, reference
from quip.kernels.trellis_matvec import cuda as products
from quip.kernels.trellis_matvec import reference as products_reference
from tests.support import ptxas
from tests.support.emulation import NothingRead, emulated, needs_compiler  # noqa: F401

# L, bits, V, rows, columns, tiles: all steps, values in registers or not, codes of 32 bits and more
SEARCHES = [
    *((8, 1, 1, 50, 1, 2), (8, 2, 1, 67, 1, 2), (7, 3, 1, 50, 4, 3), (8, 4, 1, 32, 16, 2)),
    *((7, 2, 2, 40, 2, 1), (8, 3, 2, 64, 2, 2), (8, 4, 2, 9, 8, 2), (8, 5, 2, 40, 4, 3)),
    *((9, 6, 2, 12, 2, 1), (9, 7, 2, 9, 8, 2), (10, 8, 2, 9, 2, 2), (13, 1, 1, 14, 1, 1)),
    *((14, 4, 1, 5, 1, 1), (15, 2, 1, 9, 1, 1)),
]
H100 = 227 * 2**10  # bytes that a block may have there
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def code_of(L: int, bits: int, V: int) -> Code:
    return Code("table", bits, torch.randn(2**L, V, generator=torch.Generator().manual_seed(L)))


def targets(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def two_processors(emulated, monkeypatch):  # noqa: F811
    monkeypatch.setattr(cuda, "processors", lambda device: 2)
    monkeypatch.setattr(cuda, "block_bytes", lambda device: H100)


def assert_finds_the_same_walks(search, device="cpu"):
    L, bits, V, m, d, tiles = search
    code, x = code_of(L, bits, V), targets(m, d)
    expected = reference.encode(x, code, tiles=tiles)
    for view in (x.to(device), x.to(device).T.contiguous().T):
        codes = cuda.encode(view, code.to(torch.device(device)), tiles=tiles)
        assert codes.dtype == expected.dtype
        assert torch.equal(codes.cpu(), expected)


# The source, compiled for the CPU


@needs_compiler
@pytest.mark.parametrize("search", SEARCHES, ids=str)
def test_the_source_finds_the_walks_of_the_reference(search, two_processors):
    assert_finds_the_same_walks(search)


@needs_compiler
@pytest.mark.parametrize(("L", "bits"), [(8, 2), (9, 4)])
def test_of_walks_that_cost_the_same_the_source_takes_the_same(L, bits, two_processors):
    """Values and targets of few bits, so that there is a tie in nearly every step."""
    code = code_of(L, bits, 1)
    code = Code("table", bits, code.table.clamp(-1, 1).round())
    for x in (targets(40, 1).round(), torch.full((40, 1), 0.5)):
        expected = reference.encode(x, code, tiles=1)
        assert torch.equal(cuda.encode(x, code, tiles=1), expected)


@needs_compiler
def test_few_blocks_serve_many_tiles_one_after_the_other(two_processors, monkeypatch):
    code, x = code_of(8, 2, 1), targets(16 * 23, 1)
    expected = reference.encode(x, code, tiles=23)
    assert torch.equal(cuda.encode(x, code, tiles=23), expected)
    monkeypatch.setattr(cuda, "block_bytes", lambda device: 2**12)  # none is left for back pointers
    for memory in (2**20, 2**8):  # of the device: for those of all tiles, and of one
        monkeypatch.setattr(cuda, "MEMORY", memory)
        assert torch.equal(cuda.encode(x, code, tiles=23), expected)


@needs_compiler
def test_a_search_that_meets_no_number_ends(two_processors):
    x = targets(40, 1)
    x[7] = torch.nan
    codes = cuda.encode(x, code_of(8, 2, 1), tiles=1)
    assert bool(((codes >= 0) & (codes < 4)).all())


@needs_compiler
def test_nothing_is_asked_of_the_device(two_processors):
    code, x = code_of(8, 2, 1), targets(40, 1)
    with NothingRead():
        codes = cuda.encode(x, code, tiles=1)
        cuda.decode(codes[:, None], code, Tiling(1, 1))


def assert_decodes_bit_for_bit(device="cpu"):
    there, rng = torch.device(device), torch.Generator().manual_seed(0)
    order = tuple(torch.randperm(256, generator=rng).tolist())
    for bits, V in (*((bits, 1) for bits in range(1, 9)), (3, 2), (4, 2), (8, 2)):
        tilings = [Tiling(3, V), Tiling(2, 16), Tiling(2, 16, order)][: 3 if V == 1 else 2]
        code = code_of(bits + bits % 4 + 1, bits, V)
        for tiling in tilings:
            codes = torch.randint(2**bits, (32, 48), generator=rng, dtype=torch.uint8)
            expected = reference.decode(codes, code, tiling)
            for given in (codes, codes.long(), codes.T.contiguous().T):
                ours = cuda.decode(given.to(there), code.to(there), tiling)
                assert torch.equal(ours.cpu(), expected)
            words, n = pack(codes.int(), bits), 48 * V
            for group, dtype in ((None, torch.float32), (16, torch.bfloat16)):
                scales = torch.rand(1 if group is None else n // group, generator=rng)
                args, options = (code, scales, tiling), {"n": n, "group": group, "dtype": dtype}
                expected_words = products_reference.decode_words(words, *args, **options)
                args = (code.to(there), scales.to(there), tiling)
                ours = products.decode(words.to(there), *args, **options)
                assert torch.equal(ours.cpu(), expected_words)


@needs_compiler
def test_the_source_decodes_codes_and_words_bit_for_bit(two_processors):
    assert_decodes_bit_for_bit()


# What it compiles to


@pytest.mark.slow
@pytest.mark.parametrize("capability", ptxas.CAPABILITIES)
def test_nothing_is_spilled(capability, tmp_path):
    found = ptxas.kernels(cuda.SOURCE, capability, tmp_path)
    assert len(found) == 11 + 6 + 4  # kinds of steps, with values in registers, ways to decode
    for kernel in found:
        assert (kernel.spilled, kernel.stack) == (0, 0), kernel
        if "ILi2ELi1ELb1" in kernel.name:
            assert kernel.registers <= 64, kernel  # four blocks of 256 threads, at L = 12


# What is served


def test_what_a_block_has_no_room_for_is_left_to_torch():
    rooms = {
        (L, bits): cuda.Room.of(256, 1, code_of(L, bits, 1), 1, H100)
        for L, bits in ((12, 2), (16, 2), (16, 1))
    }
    assert (rooms[12, 2].threads, rooms[12, 2].back_bytes) == (256, 0)
    assert rooms[12, 2].bytes == 2**13 + 2**16 + 2**10 + 2**8
    assert (rooms[16, 2].threads, rooms[16, 2].back_bytes) == (1024, 2**20)
    assert rooms[16, 2].bytes <= H100 < rooms[16, 1].bytes
    assert cuda._known(code_of(8, 4, 1))
    for L, bits, V in ((4, 3, 1), (8, 5, 1), (8, 1, 2), (12, 4, 4)):
        assert not cuda._known(code_of(L, bits, V))
    on_cpu = targets(40, 1)
    assert not cuda.ENCODE.serves(on_cpu, code_of(8, 2, 1), tiles=1)
    assert not cuda.DECODE.serves(on_cpu.byte(), code_of(8, 2, 1), Tiling(1, 1))


# On a device


@pytest.mark.gpu
@gpu
def test_a_device_does_the_same():
    for search in (*SEARCHES, (12, 2, 1, 2048, 1, 8), (16, 2, 1, 512, 1, 2), (14, 2, 1, 700, 1, 3)):
        assert_finds_the_same_walks(search, "cuda")
    assert_decodes_bit_for_bit("cuda")


@pytest.mark.gpu
@gpu
def test_a_device_chooses_the_kernel_and_finds_the_same_again():
    code, x = code_of(12, 2, 1).to(torch.device("cuda")), targets(2**16, 1).cuda()
    assert cuda.ENCODE.serves(x, code, tiles=256)
    assert not cuda.ENCODE.serves(x.requires_grad_(), code, tiles=256)
    first = cuda.encode(x, code, tiles=256)
    assert all(torch.equal(cuda.encode(x, code, tiles=256), first) for _ in range(3))
