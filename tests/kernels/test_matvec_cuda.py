"""Products with packed codes on CUDA: the kernels' C++ run on the host, what they compile to, and,
where there is a device, the kernels themselves."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quip.codebooks import LATTICES, Decoder, Grids, Groups, Lattices
from quip.kernels import few_tokens, grid_matvec, lattice_matvec, native
from quip.kernels.bits import pack
from quip.kernels.cuda import Nvcc
from quip.kernels.few_tokens import FEW
from quip.kernels.grid_matvec import cuda as grid_form
from quip.kernels.lattice_matvec import cuda as lattice_form
from tests.support import ptxas
from tests.support.emulation import emulated, launch, needs_compiler  # noqa: F401

BITS = sorted(grid_form.UNIT_COLUMNS)
SOURCES = [grid_form.SOURCE, lattice_form.SOURCE]
# Of the largest of the numbers that a warp multiplies, by the dtype of the product: half a step of
# x, and as much again for float32's sums of codes that are not yet freed of their zeros.
STEPS = {torch.bfloat16: 1 / (127 * 256), torch.float32: 1e-6}
# Bytes that a kernel stores and loads, by compute capability. This one, of 3 bits, is held to the
# 128 registers at which two blocks of 256 threads are on a processor, and needs a few more.
SPILLED = {"DecodedILi3EEELi2ELb0E": {(8, 0): 48, (9, 0): 12}}


def grids(
    m: int, n: int, bits: int, group: int | None, symmetric: bool
) -> tuple[Grids, torch.Tensor]:
    """Grids, and codes for them."""
    rng, groups = torch.Generator().manual_seed(n), Groups(n, group)
    step = torch.rand(1 if symmetric else m, groups.count, generator=rng) + 0.1
    zero = torch.randint(2**bits, (m, groups.count), generator=rng, dtype=torch.uint8)
    book = Grids(bits=bits, step=step.bfloat16(), zero=None if symmetric else zero, groups=groups)
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
        return compute(x, words, decoder.step, decoder.zero, **options)
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
)
def test_grids_of_a_step_a_row_on_the_host(m, n, bits, batch, dtype):
    check_on_the_host(*grids(m, n, bits, None, symmetric=False), batch, dtype)


@pytest.mark.usefixtures("emulated")
@needs_compiler
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", [64, 128, 192])
@pytest.mark.parametrize("tokens", [1, 6])
def test_grids_of_groups_of_each_row_on_the_host(bits, group, tokens):
    n = 5 * 512  # a whole number of runs of 64 in each plane, for any number of bits
    decoder, codes = grids(19, n, bits, group, symmetric=False)
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
@pytest.mark.parametrize("bits", [2, 3])
def test_columns_that_fit_no_block_are_shared_out_to_layers(monkeypatch, bits):
    monkeypatch.setattr(few_tokens, "ROOM", 2**13)
    assert few_tokens._shared_out(8192, 2, 16 * 8 // bits)[1] > 1
    decoder, codes = grids(17, 8192, bits, None, symmetric=False)
    check(decoder, codes, torch.randn(1, 8192), torch.bfloat16)


@pytest.mark.usefixtures("emulated")
@needs_compiler
def test_long_rows_are_split_among_sixteen_warps():
    n = few_tokens.LONG
    assert few_tokens._shared_out(n, 2, 64) == (16, 1)
    decoder, codes = grids(3, n, 2, None, symmetric=False)
    check(decoder, codes, torch.randn(1, n), torch.bfloat16)


@pytest.mark.usefixtures("emulated")
@needs_compiler
def test_equal_inputs_give_equal_bits_wherever_they_stand():
    decoder, codes = grids(40, 608, 3, None, symmetric=False)
    x, words = torch.randn(3, 608), pack(codes, 3)
    together = multiply(x, words, decoder, torch.bfloat16)
    assert torch.equal(multiply(x, words, decoder, torch.bfloat16), together)
    for row, alone in zip(x, together, strict=True):
        assert torch.equal(multiply(row, words, decoder, torch.bfloat16), alone)
    # Part of another tensor, at an address that no load of 16 bytes may have.
    shifted = torch.cat([x.new_zeros(1), x[0]])[1:]
    assert torch.equal(multiply(shifted, words, decoder, torch.bfloat16), together[0])


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


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.parent.name)
@pytest.mark.parametrize("capability", ptxas.CAPABILITIES)
def test_the_kernels_spill_no_more_than_is_known(source, capability, tmp_path):
    kernels = ptxas.kernels(source, capability, tmp_path)
    assert len(kernels) == (16 if source == grid_form.SOURCE else 6)
    for kernel in kernels:
        known = [most[capability] for name, most in SPILLED.items() if name in kernel.name]
        assert kernel.spilled <= sum(known), kernel
        # One block of 16 warps, or 8 of twice the vectors, whose accumulators are as many again.
        assert kernel.registers <= (160 if "ELi2ELb" in kernel.name else 128), kernel


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.parent.name)
def test_the_libraries_of_nvcc_have_what_is_called(source):
    """Functions of types in an anonymous namespace are not seen outside: nvcc differs from g++."""
    ptxas.require_nvcc((9, 0))
    assert native.library(source, Nvcc((9, 0))) is not None


def test_only_vectors_on_a_device_are_sent_to_the_kernels():
    decoder, codes = grids(4, 1024, 2, None, symmetric=True)
    options = {"bits": 2, "group": None, "dtype": torch.float32}
    args = torch.zeros(1, 1024), pack(codes, 2), decoder.step, decoder.zero
    assert not grid_form.FORM.serves(*args, **options)
    assert not few_tokens.readable(torch.zeros(1, 1024, device="meta"), 1024)


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
def test_a_few_vectors_on_a_device_take_the_kernel_and_more_the_reference():
    decoder, codes = grids(64, 1024, 2, 128, symmetric=False)
    there, words = moved(decoder, "cuda"), pack(codes, 2).cuda()

    def chosen(x):
        return multiply(x, words, there, x.dtype, form=grid_matvec.multiply.chosen)

    for dtype in few_tokens.KINDS:
        x = torch.zeros(FEW, 1024, dtype=dtype, device="cuda")
        assert chosen(x) is grid_form.multiply
        assert multiply(x, words, there, dtype).dtype == dtype
    assert chosen(torch.zeros(FEW + 1, 1024, device="cuda")) is grid_matvec.reference.multiply
    assert chosen(torch.zeros(0, 1024, device="cuda")) is grid_matvec.reference.multiply
    learning = torch.zeros(1, 1024, device="cuda", requires_grad=True)
    assert chosen(learning) is grid_matvec.reference.multiply
    decoder, codes = lattices(8, 64, "E8P12", None)
    x, words = torch.zeros(1, 64, device="cuda"), pack(codes, 16).cuda()
    form = multiply(x, words, moved(decoder, "cuda"), x.dtype, form=lattice_matvec.multiply.chosen)
    assert form is lattice_form.multiply
