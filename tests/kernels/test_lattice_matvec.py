"""Products with packed lattice codes: the kernel, the parts and the decoded matrix agree."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quip.codebooks import LATTICES, Groups, Lattices
from quip.kernels import lattice_matvec
from quip.kernels.bits import pack, unpack
from quip.kernels.lattice_matvec import cpu, reference
from quip.kernels.lattice_matvec.cpu import FEW
from quip.packed.linear import QuantizedLinear
from quip.packed.matrix import QuantizedMatrix
from quip.transforms import Chain

needs_compiler = pytest.mark.skipif(not cpu.FORM.available(), reason="no C++ compiler here")
NAMES = pytest.mark.parametrize("name", LATTICES)


def problem(m: int, blocks: int, name: str, group: int | None = None, seed: int = 0):
    """Packed codes of all kinds and what decodes them."""
    rng, book = torch.Generator().manual_seed(seed), LATTICES[name]
    groups = Groups(blocks, group)
    codes = torch.randint(2**book.index_bits, (m, blocks), generator=rng)
    scale = torch.rand(groups.count, generator=rng) + 0.1
    decoder = Lattices(name=name, ratio=book.ratio, scale=scale, groups=groups)
    return pack(codes, book.index_bits), decoder


def multiply(x, words, decoder, dtype, form=reference.multiply, **options):
    """The product by one form; by torch, all at once, if none is given."""
    known = {"group": decoder.groups.size, "ratio": decoder.ratio, "dtype": dtype}
    stages = decoder._stages(x.device)
    return form(x, words, stages, decoder.scale, **known, **options)


def multiply_native(x, words, decoder, dtype):
    return multiply(x, words, decoder, dtype, cpu.multiply)


def multiply_by_parts(x, words, decoder, dtype, **options):
    return multiply(x, words, decoder, dtype, reference.multiply_by_parts, **options)


def chosen(x, words, decoder):
    return multiply(x, words, decoder, torch.float32, lattice_matvec.multiply.chosen)


def check(x, words, decoder, form=multiply_native):
    """`form` gives the product with the decoded matrix."""
    expected = multiply(x.double(), words, decoder, torch.float64)
    ours = form(x, words, decoder, torch.float32)
    assert ours.shape == expected.shape
    assert ours.dtype == torch.float32
    # Noise of float32 in sums of w x, |w| <= 11/4 for a stage and twice that for two.
    size = 5.5 * float(decoder.scale.max()) * x.abs().sum(-1, keepdim=True).double()
    assert bool(((ours - expected).abs() <= 3e-7 * size).all())


@needs_compiler
@given(
    m=st.integers(1, 20),
    blocks=st.sampled_from([1, 2, 3, 5, 8, 31, 64, 65, 72, 130]),
    name=st.sampled_from(sorted(LATTICES)),
    group=st.sampled_from([None, 1, 3]),
    batch=st.sampled_from([(), *((t,) for t in range(1, 9)), (1, 1), (2, 5), (19,)]),
)
def test_the_kernel_is_the_product_with_the_decoded_matrix(m, blocks, name, group, batch):
    words, decoder = problem(m, blocks, name, group, seed=blocks)
    x = torch.randn(*batch, 8 * blocks, generator=torch.Generator().manual_seed(m))
    check(x, words, decoder)


@needs_compiler
@NAMES
def test_every_point_of_every_stage_is_read_as_it_is_decoded(name):
    """A column at a time, where no other hides a wrong sign or magnitude."""
    _, decoder = problem(1, 1, name)
    codes = torch.arange(2**16)
    if decoder.index_bits > 16:
        codes = codes | codes.flip(0) % 2 ** (decoder.index_bits - 16) << 16
    words = pack(codes[:, None], decoder.index_bits)
    ours = multiply_native(torch.eye(8), words, decoder, torch.float32)
    torch.testing.assert_close(ours, decoder.decode(codes[:, None]).T, rtol=3e-7, atol=3e-7)


@needs_compiler
@NAMES
def test_strides_of_the_inputs_do_not_matter(name):
    words, decoder = problem(6, 5, name)
    x = torch.randn(40, 3).T
    expected = multiply_native(x.contiguous(), words, decoder, torch.float32)
    assert torch.equal(multiply_native(x, words, decoder, torch.float32), expected)
    turned = words.T.contiguous().T
    assert torch.equal(multiply_native(x, turned, decoder, torch.float32), expected)


@needs_compiler
@NAMES
def test_the_inputs_stay_as_they_are(name):
    words, decoder = problem(6, 5, name, group=2)
    x = torch.randn(2, 40)
    before = x.clone(), words.clone(), decoder.scale.clone()
    multiply_native(x, words, decoder, torch.float32)
    for now, then in zip((x, words, decoder.scale), before, strict=True):
        assert torch.equal(now, then)


@NAMES
@pytest.mark.parametrize("part", [1, 100, 2**20])
def test_parts_make_the_whole_product(name, part):
    words, decoder = problem(7, 5, name, group=2)
    for batch in ((), (4,), (2, 20), (0,), (2, 0)):
        check(torch.randn(*batch, 40), words, decoder, partial(multiply_by_parts, part=part))


def test_parts_are_computed_in_the_dtype_asked_for():
    words, decoder = problem(7, 5, "E8P12")
    x = torch.randn(20, 40)
    for given_dtype in (torch.float32, torch.bfloat16):
        args = x.to(given_dtype), words, decoder, torch.bfloat16
        ours, expected = multiply_by_parts(*args), multiply(*args)
        assert ours.dtype == given_dtype
        torch.testing.assert_close(ours, expected, rtol=2**-7, atol=0.1)  # sums in another order


@needs_compiler
def test_a_few_single_precision_vectors_on_a_cpu_take_the_kernel():
    words, decoder = problem(4, 2, "E8P12")
    assert chosen(torch.zeros(FEW, 16), words, decoder) is cpu.multiply
    assert chosen(torch.zeros(16), words, decoder) is cpu.multiply
    for x in (
        torch.zeros(FEW + 1, 16),
        torch.zeros(0, 16),
        torch.zeros(1, 16).double(),
        torch.zeros(1, 16, requires_grad=True),
    ):
        assert chosen(x, words, decoder) is reference.multiply_by_parts
    with torch.no_grad():
        assert chosen(torch.zeros(1, 16, requires_grad=True), words, decoder) is cpu.multiply
    assert chosen(torch.zeros(1, 16, device="meta"), words, decoder) is reference.multiply


@NAMES
@pytest.mark.parametrize("tokens", [1, FEW + 1])
def test_lattices_multiply_by_the_form_that_is_chosen(name, tokens):
    words, decoder = problem(4, 5, name, group=2)
    x = torch.randn(tokens, 40)
    expected = multiply(x, words, decoder, torch.float32, lattice_matvec.multiply)
    assert torch.equal(decoder.multiply(words, x, torch.float32), expected)


def test_without_a_compiler_torch_does_the_work(monkeypatch):
    monkeypatch.setattr(cpu, "library", lambda source: None)
    words, decoder = problem(4, 2, "E8P12RVQ3B")
    x = torch.randn(1, 16)
    assert chosen(x, words, decoder) is reference.multiply_by_parts
    check(x, words, decoder, multiply_by_parts)


@NAMES
def test_a_layer_has_the_gradient_of_its_dense_matrix(name):
    words, decoder = problem(6, 5, name)
    codes = unpack(words, decoder.index_bits, 5)
    matrix = QuantizedMatrix(codes=codes, decoder=decoder, transform=Chain(), damp=0.0)
    layer = QuantizedLinear.from_matrix(matrix, None)
    x = torch.randn(3, 40, requires_grad=True)
    layer(x).sum().backward()
    expected = layer.dequantize().sum(0).expand(3, 40)
    torch.testing.assert_close(x.grad, expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():  # few vectors: by the kernel, where there is a compiler
        torch.testing.assert_close(layer(x), x @ layer.dequantize().T, rtol=1e-5, atol=1e-4)
