"""Products with packed codes on CUDA: the kernels' C++ run on the host, what they compile to, and,
where there is a device, the kernels themselves."""

import ctypes
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quip.codebooks import LATTICES, Decoder, Grids, Groups, Lattices
from quip.kernels import few_tokens, grid_matvec, lattice_matvec, native
from quip.kernels.bits import pack
from quip.kernels.few_tokens import FEW
from quip.kernels.grid_matvec import cuda as grid_form
from quip.kernels.lattice_matvec import cuda as lattice_form
from quip.kernels.numbers import KINDS
from tests.support import ptxas
from tests.support.emulation import emulated, launch, needs_compiler  # noqa: F401

BITS = sorted(grid_form.UNIT_COLUMNS)
SOURCES = [grid_form.SOURCE, lattice_form.SOURCE]
# Of the largest of the numbers that a warp multiplies, by the dtype of the product: half a step of
# x, and as much again for float32's sums of codes that are not yet freed of their zeros.
CPU = torch.device("cpu")
STEPS = {torch.bfloat16: 1 / (127 * 256), torch.float32: 1e-6}


def grids(
    m: int, n: int, bits: int, group: int | None, symmetric: bool | str
) -> tuple[Grids, torch.Tensor]:
    """Grids, and codes for them."""
    rng, groups = torch.Generator().manual_seed(n), Groups(n, group)
    step = torch.rand(1 if symmetric is True else m, groups.count, generator=rng) + 0.1
    zero = torch.randint(2**bits, (m, groups.count), generator=rng, dtype=torch.uint8)
    kind = {"zero": None if symmetric else zero, "signed": symmetric == "signed"}
    book = Grids(bits=bits, step=step.bfloat16(), groups=groups, **kind)
    return book, torch.randint(2**bits, (m, n), generator=rng)


def lattices(m: int, n: int, name: str, group: int | None) -> tuple[Lattices, torch.Tensor]:
    """Lattices, and codes for them."""
    rng, groups, book = torch.Generator().manual_seed(n), Groups(n // 8, group), LATTICES[name]
    scale = torch.rand(groups.count, generator=rng) + 0.1
    codes = torch.randint(2**book.index_bits, (m, n // 8), generator=rng)
    return Lattices(name=name, ratio=book.ratio, scale=scale, groups=groups), codes


def multiply(x, words, decoder: Decoder, dtype, *, form=None):
    """The product by the kernel for CUDA, or by another form."""
    if isinstance(decoder, Grids):
        options = {"bits": decoder.bits, "group": decoder.groups.size, "dtype": dtype}
        compute = form or grid_form.multiply
        return compute(x, words, decoder.step, decoder.zeros, **options)
    options = {"group": decoder.groups.size, "ratio": decoder.ratio, "dtype": dtype}
    stages = decoder._stages(x.device)
    return (form or lattice_form.multiply)(x, words, stages, decoder.scale, **options)


def check(decoder: Decoder, codes, x, dtype, *, device: str = "cpu"):
    """The kernel gives the product with the decoded matrix; it comes back on the CPU."""
    words = pack(codes, decoder.index_bits)
    W = decoder.decode(codes).double()
    ours = multiply(x.to(device), words.to(device), moved(decoder, device), dtype).cpu()
    assert (ours.dtype, ours.shape) == (x.dtype, (*x.shape[:-1], len(words)))
    # x is off by half a step at most, and so is each product with an entry of W, as far as a step
    # of x is what decides; codes of 8 bits have zeros of 255 to be freed of in float32.
    size = x.double().abs().amax(-1, keepdim=True) * largest(decoder) * x.shape[-1]
    bound = STEPS[dtype] * size * torch.ones(len(words)).double()
    off = (ours.double() - x.double() @ W.T).abs()
    assert bool((off <= bound).all())
    return ours


def check_on_the_host(decoder: Decoder, codes, batch: tuple[int, ...], dtype):
    """The same by the CPU; hypothesis wants no fixture of a function."""
    n, rng = codes.shape[1] * decoder.dim, torch.Generator().manual_seed(len(codes))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("quip.kernels.cuda.launch", launch)
        check(decoder, codes, torch.randn(*batch, n, generator=rng), dtype)


def moved(decoder: Decoder, device: str) -> Decoder:
    names = ("step", "zero", "scale")
    held = {k: v for k in names if isinstance(v := getattr(decoder, k, None), torch.Tensor)}
    return replace(decoder, **{k: v.to(device) for k, v in held.items()})


def largest(decoder: Decoder) -> float:
    """What a code, or its zero, may be multiplied to."""
    if isinstance(decoder, Grids):
        return float(decoder.step.max()) * 2**decoder.bits
    return 8 * float(decoder.scale.max())


RAGGED = st.sampled_from([32, 64, 96, 160, 512, 544, 608, 1056])
BATCHES = st.sampled_from([(), (1,), (2,), (3,), (5,), (2, 4), (16,)])


@needs_compiler
@settings(max_examples=20)
@given(
    m=st.integers(1, 40),
    n=RAGGED,
    bits=st.sampled_from(BITS),
    group=st.sampled_from([None, 1, 7, 64]),
    batch=BATCHES,
    dtype=st.sampled_from(sorted(STEPS, key=str)),
)
def test_grids_of_shared_steps_on_the_host(m, n, bits, group, batch, dtype):
    check_on_the_host(*grids(m, n, bits, group, symmetric=True), batch, dtype)


@needs_compiler
@settings(max_examples=20)
@given(
    m=st.integers(1, 40),
    n=RAGGED,
    bits=st.sampled_from(BITS),
    batch=BATCHES,
    dtype=st.sampled_from(sorted(STEPS, key=str)),
    symmetric=st.sampled_from([False, "signed"]),
)
def test_grids_of_a_step_a_row_on_the_host(m, n, bits, batch, dtype, symmetric):
    check_on_the_host(*grids(m, n, bits, None, symmetric), batch, dtype)


@pytest.mark.usefixtures("emulated")
@needs_compiler
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", [64, 128, 192])
@pytest.mark.parametrize(("tokens", "symmetric"), [(1, False), (6, False), (3, "signed")])
def test_grids_of_groups_of_each_row_on_the_host(bits, group, tokens, symmetric):
    n = 5 * 512  # a whole number of runs of 64 in each plane, for any number of bits
    decoder, codes = grids(19, n, bits, group, symmetric)
    for dtype in STEPS:
        check(decoder, codes, torch.randn(tokens, n), dtype)


@needs_compiler
@settings(max_examples=20)
@given(
    m=st.integers(1, 40),
    n=RAGGED,
    name=st.sampled_from(sorted(LATTICES)),
    group=st.sampled_from([None, 1, 3]),
    batch=BATCHES,
    dtype=st.sampled_from(sorted(STEPS, key=str)),
)
def test_lattices_on_the_host(m, n, name, group, batch, dtype):
    check_on_the_host(*lattices(m, n, name, group), batch, dtype)


@pytest.mark.usefixtures("emulated")
@needs_compiler
@pytest.mark.parametrize("name", LATTICES)
def test_every_point_of_every_stage_is_read_as_it_is_decoded(name):
    """A column at a time, where no other hides a wrong sign or magnitude."""
    decoder, _ = lattices(1, 32, name, None)
    codes = (257 * torch.arange(2**8))[:, None]  # all signs, and all magnitudes
    if decoder.index_bits > 16:
        codes = codes | codes.flip(0) % 2 ** (decoder.index_bits - 16) << 16
    codes = codes.expand(-1, 4).contiguous()
    words = pack(codes, decoder.index_bits)
    ours = multiply(torch.eye(32)[8:16], words, decoder, torch.float32)
    torch.testing.assert_close(ours, decoder.decode(codes)[:, 8:16].T, rtol=0, atol=1e-5)


@pytest.mark.usefixtures("emulated")
@needs_compiler
@pytest.mark.parametrize("tokens", [1, FEW])
@pytest.mark.parametrize("kind", ["grid", "grouped", "lattice"])
def test_columns_that_fit_no_block_are_shared_out_to_layers(monkeypatch, kind, tokens):
    layers = []

    def look(*args):
        layers.append(args[3]._obj.layers)
        launch(*args)

    monkeypatch.setattr("quip.kernels.cuda.launch", look)
    monkeypatch.setattr(few_tokens, "_chunks", lambda *_: 2)
    decoder, codes = {
        "grid": lambda: grids(9, 2048, 3, None, symmetric=False),
        "grouped": lambda: grids(9, 2048, 2, 128, symmetric=False),
        "lattice": lambda: lattices(9, 2048, "E8P12", None),
    }[kind]()
    x = torch.randn(tokens, 2048)
    check(decoder, codes, x, torch.bfloat16)
    assert min(layers) > 1
    words = pack(codes, decoder.index_bits)
    halves = multiply(x.half(), words, decoder, torch.bfloat16)
    assert torch.equal(halves, multiply(x.half().float(), words, decoder, torch.bfloat16).half())


@pytest.mark.usefixtures("emulated")
@needs_compiler
def test_where_a_block_has_no_room_the_matrix_is_decoded(monkeypatch):
    monkeypatch.setattr(few_tokens, "_block_bytes", lambda device: 96 * 2**10)
    for name, alone in (("E8P12", True), ("E8P12RVQ3B", False)):  # two tables, and three
        decoder, codes = lattices(3, 64, name, None)
        matrix = lattice_form._matrix(
            pack(codes, decoder.index_bits), decoder._stages(CPU), decoder.scale, 64, None, None
        )
        x = torch.randn(1, 64)
        assert few_tokens.are_few(x, matrix) == alone
        check(decoder, codes, x, torch.float32)


@pytest.mark.usefixtures("emulated")
@needs_compiler
@pytest.mark.parametrize(("kind", "kibibytes"), [("lattice", 96), ("grouped", 36)])
def test_a_block_with_little_room_multiplies_fewer_vectors_at_once(monkeypatch, kind, kibibytes):
    """As on cards with 100 KiB a processor, where 16 vectors leave no room beside the tables."""
    monkeypatch.setattr(few_tokens, "_block_bytes", lambda device: kibibytes * 2**10)
    decoder, codes = {
        "lattice": lambda: lattices(3, 512, "E8P12", None),
        "grouped": lambda: grids(3, 5120, 2, 64, symmetric=False),
    }[kind]()
    check(decoder, codes, torch.randn(FEW, codes.shape[1] * decoder.dim), torch.bfloat16)


@pytest.mark.usefixtures("emulated")
@needs_compiler
@pytest.mark.parametrize("name", ["E8P12", "E8P12RVQ4B"])
def test_long_rows_of_lattices_are_split_among_sixteen_warps(name):
    n = few_tokens.LONG
    decoder, codes = lattices(3, n, name, None)
    matrix = lattice_form._matrix(
        pack(codes, decoder.index_bits), decoder._stages(CPU), decoder.scale, n, None, decoder.ratio
    )
    assert few_tokens._shared_out(n, 2, matrix) == (16, 1)
    check(decoder, codes, torch.randn(1, n), torch.bfloat16)


@pytest.mark.usefixtures("emulated")
@needs_compiler
def test_equal_inputs_give_equal_bits_wherever_they_stand():
    decoder, codes = grids(40, 608, 3, None, symmetric=False)
    x, words = torch.randn(FEW, 608), pack(codes, 3)
    together = multiply(x, words, decoder, torch.bfloat16)
    assert torch.equal(multiply(x, words, decoder, torch.bfloat16), together)
    for row, alone in zip(x, together, strict=True):
        assert torch.equal(multiply(row, words, decoder, torch.bfloat16), alone)
    # Part of another tensor, at an address that no load of 16 bytes may have.
    shifted = torch.cat([x.new_zeros(1), x[0]])[1:]
    assert torch.equal(multiply(shifted, words, decoder, torch.bfloat16), together[0])


@pytest.mark.usefixtures("emulated")
@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 3])
def test_vectors_of_half_precision_are_read_as_they_are_and_answered_alike(dtype, tokens):
    for decoder, codes in (grids(19, 608, 3, 1, True), lattices(19, 608, "E8P12", 3)):
        x, words = torch.randn(tokens, 608).to(dtype), pack(codes, decoder.index_bits)
        ours = multiply(x, words, decoder, torch.bfloat16)
        assert ours.dtype == dtype
        wide = multiply(x.float(), words, decoder, torch.bfloat16)
        assert torch.equal(ours, wide.to(dtype))


@pytest.mark.usefixtures("emulated")
@needs_compiler
@pytest.mark.parametrize("dtype", STEPS)
def test_x_is_split_to_bytes_as_split_cuh_tells(monkeypatch, dtype):
    """What another kernel may write in its place: rows of bytes, scales, and sums."""
    monkeypatch.setattr(few_tokens, "PIECE", 256)
    decoder, codes = lattices(3, 608, "E8P12", 5)
    x, seen = torch.randn(2, 608), []

    def look(*args):
        launch(*args)
        seen.append(read_split(args[3]._obj.inputs))

    monkeypatch.setattr("quip.kernels.cuda.launch", look)
    multiply(x, pack(codes, 16), decoder, dtype)
    ((columns, scales, sums),) = seen
    weighed = x * decoder.scale.repeat_interleave(40)[:608]
    bases = 256 ** torch.arange(columns.shape[1])
    split = scales[:, None] * (columns.double() * bases[:, None]).sum(1)
    levels = 127 * 256 ** (len(bases) - 1)
    torch.testing.assert_close(scales, weighed.abs().amax(1) / levels)
    # Half a step of a scale of 16 bits; of 24 bits, what float32 rounds is as much, twice.
    off = 0.51 if len(bases) == 2 else 2
    assert float((split - weighed).abs().max()) <= off * float(scales.max())
    assert torch.equal(sums.sum(-1), columns.sum(-1))


def read_split(split) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Bytes [tokens, parts, n], scales [tokens] and sums [tokens, parts, pieces]."""
    rows = split.tokens, split.parts

    def read(start: int, kind: type, *shape: int) -> torch.Tensor:
        size = ctypes.sizeof(kind) * torch.Size(shape).numel()
        raw = bytearray(ctypes.string_at(start, size))
        dtype = {ctypes.c_int8: torch.int8, ctypes.c_float: torch.float32}.get(kind, torch.int32)
        return torch.frombuffer(raw, dtype=dtype).view(shape)

    columns = read(split.bytes, ctypes.c_int8, *rows, split.n)
    scales = read(split.scales, ctypes.c_float, split.tokens)
    return columns, scales, read(split.sums, ctypes.c_int32, *rows, split.pieces)


@pytest.mark.usefixtures("emulated")
@needs_compiler
@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("bits", BITS)
def test_grids_are_decoded_to_the_bits_of_the_reference(bits, dtype):
    kinds = ((None, False), (64, False), (7, False), (1, True), (None, True), (64, "signed"))
    for group, symmetric in kinds:
        decoder, codes = grids(19, 608, bits, group, symmetric)
        args = pack(codes, bits), decoder.step, decoder.zeros
        options = {"n": 608, "bits": bits, "group": group, "dtype": dtype}
        expected = grid_matvec.reference.decode_words(*args, **options)
        assert torch.equal(grid_form.decode(*args, **options), expected)
        assert torch.equal(decoder.dense(args[0], 608, dtype), expected)


@pytest.mark.usefixtures("emulated")
@needs_compiler
@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("name", LATTICES)
def test_lattices_are_decoded_as_the_reference_does(name, dtype):
    for group in (None, 3):
        decoder, codes = lattices(19, 608, name, group)
        args = pack(codes, decoder.index_bits), decoder._stages(CPU), decoder.scale
        options = {"n": 608, "group": group, "ratio": decoder.ratio, "dtype": dtype}
        expected = lattice_matvec.reference.decode_words(*args, **options)
        ours = lattice_form.decode(*args, **options)
        if decoder.ratio is None:
            assert torch.equal(ours, expected)
        else:  # 1 / ratio is a factor here: a last bit may differ, and where that decides a tie
            torch.testing.assert_close(ours, expected)
        assert torch.equal(decoder.dense(args[0], 608, dtype), expected)


@pytest.mark.usefixtures("emulated")
@needs_compiler
def test_many_vectors_and_what_has_a_gradient_take_the_decoded_matrix():
    decoder, codes = grids(9, 64, 2, 7, symmetric=False)
    few, many = torch.randn(2, 64, requires_grad=True), torch.randn(FEW + 1, 64)
    for x in (few, many, many.double()):
        ours = multiply(x, pack(codes, 2), decoder, torch.float32)
        assert torch.equal(ours, decoder.multiply(pack(codes, 2), x, torch.float32))
    multiply(few, pack(codes, 2), decoder, torch.float32).sum().backward()
    torch.testing.assert_close(few.grad, decoder.decode(codes).sum(0).expand(2, -1))


@pytest.mark.usefixtures("emulated")
@needs_compiler
def test_what_is_no_number_stays_none_and_zeros_stay_zeros():
    decoder, codes = grids(5, 64, 2, None, symmetric=False)
    x = torch.zeros(4, 64)
    x[1, 3], x[2, 5], x[3] = torch.nan, torch.inf, 1e-38
    y = multiply(x, pack(codes, 2), decoder, torch.bfloat16)
    assert torch.equal(y[0], torch.zeros(5))
    assert bool(y[1:3].isnan().all())
    assert float(y[3].abs().max()) < 1e-30


@pytest.mark.usefixtures("emulated")
@needs_compiler
def test_one_large_input_costs_no_more_than_its_own_rounding():
    decoder, codes = grids(16, 4096, 4, None, symmetric=True)
    x = torch.randn(1, 4096)
    x[0, 17] = 1000
    ours, exact = (multiply(x, pack(codes, 4), decoder, d) for d in (torch.bfloat16, torch.float32))
    assert float((ours - exact).norm() / exact.norm()) < 2**-9  # bfloat16's, of each number


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.parent.name)
@pytest.mark.parametrize("capability", ptxas.CAPABILITIES)
def test_the_kernels_spill_nothing_and_leave_room_for_the_next_one(source, capability, tmp_path):
    kernels = ptxas.kernels(source, capability, tmp_path)
    assert len(kernels) == (25 if source == grid_form.SOURCE else 13)
    for kernel in kernels:
        assert kernel.spilled == 0, kernel
        if re.search("(DecodedILi[248]|LatticeILi2)EEELi1ELb0E", kernel.name):
            # Two blocks of 256 threads work, and one more is there already.
            assert kernel.registers <= 80, kernel
        elif "split_inputs" in kernel.name:
            assert kernel.registers <= 64, kernel  # of 384 threads, beside two such blocks
        elif "ELi1ELb0E" in kernel.name:
            assert kernel.registers <= 128, kernel  # one block of 512 threads, or two of 256
    library = ctypes.CDLL(str(tmp_path / ptxas.LIBRARY))
    for name in native.EXPORTED.findall(source.read_text()):
        # Functions of types in an anonymous namespace are not seen outside: nvcc differs from g++.
        assert hasattr(library, name)


def test_only_matrices_on_a_device_are_sent_to_the_kernels():
    decoder, codes = grids(4, 1024, 2, None, symmetric=True)
    x, words = torch.zeros(1, 1024), pack(codes, 2)
    options = {"bits": 2, "group": None, "dtype": torch.float32}
    assert not grid_form.MULTIPLY.serves(x, words, decoder.step, decoder.zeros, **options)
    assert not grid_form.DECODE.serves(words, decoder.step, decoder.zeros, n=1024, **options)
    decoder, codes = lattices(4, 64, "E8P12", None)
    args = pack(codes, 16), decoder._stages(CPU), decoder.scale
    options = {"group": None, "ratio": None, "dtype": torch.float32}
    assert not lattice_form.MULTIPLY.serves(x[:, :64], *args, **options)
    assert not lattice_form.DECODE.serves(*args, n=64, **options)


gpu = pytest.mark.gpu
without_device = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@gpu
@without_device
@pytest.mark.parametrize("tokens", [1, 4, FEW])
@pytest.mark.parametrize("shape", [(40, 608), (4096, 4096), (1000, 11008)])
@pytest.mark.parametrize("dtype", STEPS)
def test_the_kernels_on_a_device(shape, tokens, dtype):
    m, n = shape
    x = torch.randn(tokens, n)
    made = [lattices(m, n, name, None) for name in LATTICES]
    made += [grids(m, n, bits, 1, symmetric=True) for bits in BITS]
    made += [grids(m, n, bits, None, symmetric=False) for bits in BITS]
    if n % 4096 == 0:
        made += [grids(m, n, bits, 128, symmetric=False) for bits in BITS]
    for decoder, codes in made:
        ours = check(decoder, codes, x, dtype, device="cuda")
        assert torch.equal(check(decoder, codes, x, dtype, device="cuda"), ours)


@gpu
@without_device
def test_products_on_a_device_take_the_kernels_and_answer_as_the_reference():
    decoder, codes = grids(64, 1024, 2, 128, symmetric=False)
    there, words = moved(decoder, "cuda"), pack(codes, 2).cuda()

    def chosen(x):
        return multiply(x, words, there, x.dtype, form=grid_matvec.multiply.chosen)

    for dtype in KINDS:
        x = torch.randn(FEW + 1, 1024, dtype=dtype, device="cuda")
        assert chosen(x[:FEW]) is chosen(x) is grid_form.multiply
        assert multiply(x[:FEW], words, there, dtype).dtype == dtype
        expected = multiply(x, words, there, dtype, form=grid_matvec.reference.multiply)
        assert torch.equal(multiply(x, words, there, dtype), expected)
    assert chosen(torch.zeros(0, 1024, device="cuda")) is grid_matvec.reference.multiply
    assert chosen(torch.zeros(1, 1024, device="cuda", requires_grad=True)) is grid_form.multiply
    decoder, codes = lattices(8, 64, "E8P12", None)
    x, words = torch.zeros(1, 64, device="cuda"), pack(codes, 16).cuda()
    form = multiply(x, words, moved(decoder, "cuda"), x.dtype, form=lattice_matvec.multiply.chosen)
    assert form is lattice_form.multiply


@gpu
@without_device
@pytest.mark.parametrize("dtype", KINDS)
def test_matrices_are_decoded_on_a_device(dtype):
    for m, n in ((40, 608), (1000, 4096)):
        made = [grids(m, n, bits, 1, symmetric=True) for bits in BITS]
        made += [grids(m, n, bits, 128, symmetric=False) for bits in BITS]
        made += [lattices(m, n, name, None) for name in LATTICES]
        for decoder, codes in made:
            words = pack(codes, decoder.index_bits)
            ours = moved(decoder, "cuda").dense(words.cuda(), n, dtype)
            torch.testing.assert_close(ours.cpu(), decoder.dense(words, n, dtype))
