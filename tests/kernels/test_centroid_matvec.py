"""Products with packed codes of centroids: the kernel, the parts and the decoded matrix agree."""

from dataclasses import dataclass
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from quip.kernels import centroid_matvec
from quip.kernels.bits import pack
from quip.kernels.centroid_matvec import cpu, reference
from quip.kernels.centroid_matvec.cpu import FEW
from quip.kernels.groups import even, row_groups

needs_compiler = pytest.mark.skipif(not cpu.FORM.available(), reason="no C++ compiler here")


@dataclass
class Problem:
    """Codes of all kinds, and what decodes them."""

    codes: Tensor
    centroids: Tensor
    scales: Tensor | None
    columns: int
    block: int | None
    bits: int

    @property
    def n(self) -> int:
        return self.codes.shape[1] * self.centroids.shape[-1]

    @property
    def words(self) -> Tensor:
        return pack(self.codes, self.bits)

    def decode(self) -> Tensor:
        return centroid_matvec.decode(
            *(self.codes, self.centroids, self.scales), columns=self.columns, block=self.block
        )

    def multiply(self, x, form=reference.multiply, words=None, **changed):
        """The product by one form; by torch, all at once, if none is packed."""
        words = self.words if words is None else words
        known = {"columns": self.columns, "block": self.block, "bits": self.bits}
        options = {**known, "dtype": x.dtype, **changed}
        return form(x, words, self.centroids, self.scales, **options)

    def chosen(self, x):
        return self.multiply(x, centroid_matvec.multiply.chosen)


def problem(m=7, vectors=30, *, bits=4, d=2, columns=10, G=3, block=None) -> Problem:
    """`columns` and `block` count vectors; a block of None has no scales, of 0 one for each row."""
    rng = torch.Generator().manual_seed(m + vectors)
    blocks = -(-vectors // (block or vectors))
    return Problem(
        codes=torch.randint(2**bits, (m, vectors), generator=rng),
        centroids=torch.randn(-(-vectors // columns), G, 2**bits, d, generator=rng),
        scales=None if block is None else torch.rand(m, blocks, generator=rng) + 0.1,
        columns=d * columns,
        block=d * block if block else None,
        bits=bits,
    )


def check(x, packed: Problem, form=cpu.multiply):
    """`form` gives the product with the decoded matrix, up to noise of float32 in sums of w x."""
    W = packed.decode().double()
    ours = packed.multiply(x, form)
    assert (ours.shape, ours.dtype) == ((*x.shape[:-1], len(W)), torch.float32)
    noise = 3e-7 * x.abs().double() @ W.abs().T
    assert bool(((ours - x.double() @ W.T).abs() <= 4 * noise + 1e-30).all())


@pytest.mark.parametrize(("d", "bits"), [(1, 3), (2, 4), (4, 9)])
@pytest.mark.parametrize("block", [None, 0, 7])
def test_a_weight_is_the_centroid_of_its_tile_times_its_scale(d, bits, block):
    packed = problem(11, 23, bits=bits, d=d, G=4, block=block)
    W, rows = packed.decode(), [3, 3, 3, 2]  # 11 % 4 groups have a row more
    groups = [group for group, count in enumerate(rows) for _ in range(count)]
    size = packed.block or packed.n
    for i, group in enumerate(groups):
        for j in range(packed.n):
            expected = packed.centroids[j // packed.columns, group, packed.codes[i, j // d], j % d]
            if packed.scales is not None:
                expected = expected * packed.scales[i, j // size]
            assert W[i, j] == expected


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_weights_have_the_dtype_of_the_centroids(dtype):
    packed = problem(block=5)
    exact = packed.decode()
    packed.centroids = packed.centroids.to(dtype)
    assert packed.decode().dtype == dtype
    torch.testing.assert_close(packed.decode().float(), exact, rtol=2**-6, atol=0)


@pytest.mark.parametrize("form", [centroid_matvec.multiply, reference.multiply_by_parts])
def test_gradients_reach_centroids_and_scales(form):
    packed = problem(block=6)
    packed.centroids, packed.scales = packed.centroids.double(), packed.scales.double()
    x = torch.randn(3, packed.n, dtype=torch.float64, requires_grad=True)
    words = packed.words

    def product(x, centroids, scales):
        packed.centroids, packed.scales = centroids, scales
        return packed.multiply(x, form, words)

    factors = x, packed.centroids.requires_grad_(), packed.scales.requires_grad_()
    assert torch.autograd.gradcheck(product, factors)


@needs_compiler
@given(
    m=st.integers(1, 20),
    vectors=st.sampled_from([1, 2, 3, 15, 31, 64, 65, 130, 200]),
    d=st.sampled_from([1, 2, 4]),
    bits=st.integers(1, 16),
    columns=st.sampled_from([1, 5, 32, 64, 500]),
    G=st.integers(1, 5),
    block=st.sampled_from([None, 0, 3, 16, 64]),
    batch=st.sampled_from([(), *((t,) for t in range(1, 9)), (1, 1), (2, 5), (16,)]),
)
def test_the_kernel_is_the_product_with_the_decoded_matrix(
    m, vectors, d, bits, columns, G, block, batch
):
    if 2**bits * -(-vectors // columns) * G > 2**18:  # numbers that would only take time
        columns, G = 500, 2
    packed = problem(m, vectors, bits=bits, d=d, columns=columns, G=min(G, m), block=block)
    check(torch.randn(*batch, packed.n, generator=torch.Generator().manual_seed(m)), packed)


@needs_compiler
@pytest.mark.parametrize("d", [1, 2, 4])
@pytest.mark.parametrize("bits", range(1, 17))
def test_every_code_of_every_width_is_read_as_it_is_decoded(d, bits):
    """A column at a time, where no other hides a wrong centroid."""
    packed = problem(bits=bits, d=d, columns=2, G=1, vectors=2)
    packed.codes = torch.stack([torch.arange(2**bits), torch.arange(2**bits).flip(0)], dim=1)
    assert torch.equal(packed.multiply(torch.eye(2 * d), cpu.multiply), packed.decode().T)


@needs_compiler
def test_strides_of_the_inputs_do_not_matter_and_none_is_changed():
    packed = problem(block=5)
    x, words = torch.randn(packed.n, 3).T, packed.words
    before = [t.clone() for t in (x, words, packed.centroids, packed.scales)]
    expected = packed.multiply(x.contiguous(), cpu.multiply)
    assert torch.equal(packed.multiply(x, cpu.multiply), expected)
    assert torch.equal(packed.multiply(x, cpu.multiply, words.T.contiguous().T), expected)
    packed.centroids = packed.centroids.transpose(0, 3).contiguous().transpose(0, 3)
    packed.scales = packed.scales.T.contiguous().T
    assert torch.equal(packed.multiply(x, cpu.multiply), expected)
    for now, then in zip((x, words, packed.centroids, packed.scales), before, strict=True):
        assert torch.equal(now, then)


@pytest.mark.parametrize("part", [1, 150, 2**20])
@pytest.mark.parametrize("block", [None, 0, 7])
def test_parts_make_the_whole_product(part, block):
    packed = problem(block=block)
    for batch in ((), (4,), (2, 20), (0,), (2, 0)):
        form = partial(reference.multiply_by_parts, part=part)
        check(torch.randn(*batch, packed.n), packed, form)


@pytest.mark.parametrize("form", [reference.multiply, reference.multiply_by_parts])
def test_products_are_computed_in_the_dtype_asked_for_and_keep_their_own(form):
    packed, x = problem(), torch.randn(20, 60)
    ours = packed.multiply(x, form, dtype=torch.bfloat16)
    rounded = x.bfloat16() @ packed.decode().bfloat16().T
    assert ours.dtype == torch.float32
    assert not torch.equal(ours, packed.multiply(x, form))
    torch.testing.assert_close(ours, rounded.float(), rtol=2**-7, atol=0.1)  # sums in another order


@needs_compiler
def test_a_few_single_precision_vectors_on_a_cpu_take_the_kernel():
    packed = problem(block=5)
    x = torch.zeros(1, packed.n)
    for few in (x, x[0], x.expand(FEW, -1)):
        assert packed.chosen(few) is cpu.multiply
    for other in (x.expand(FEW + 1, -1), x[:0], x.double(), x.clone().requires_grad_()):
        assert packed.chosen(other) is reference.multiply_by_parts
    assert packed.chosen(x.to("meta")) is reference.multiply
    for name in ("centroids", "scales"):
        other = problem(block=5)
        getattr(other, name).requires_grad_()
        assert other.chosen(x) is reference.multiply_by_parts
        with torch.no_grad():
            assert other.chosen(x) is cpu.multiply


@needs_compiler
def test_what_the_kernel_does_not_read_is_left_to_torch():
    x = torch.zeros(1, 60)
    inside = problem(block=5)
    inside.block = 9  # the fifth vector has two scales
    fewer = problem()
    fewer.centroids = fewer.centroids[:, :, :-1]  # a code may be past the end
    triples = problem(vectors=20, d=3)
    for packed in (inside, fewer, triples):
        assert packed.chosen(x) is reference.multiply_by_parts


def test_without_a_compiler_torch_does_the_work(monkeypatch):
    monkeypatch.setattr(cpu, "library", lambda source: None)
    packed = problem()
    assert packed.chosen(torch.zeros(1, packed.n)) is reference.multiply_by_parts
    check(torch.randn(1, packed.n), packed, centroid_matvec.multiply)


@pytest.mark.parametrize(("m", "count"), [(22, 1), (22, 3), (22, 11), (7, 7), (3, 5)])
def test_rows_are_in_the_groups_that_they_are_cut_into(m, count):
    groups = row_groups(m, count, torch.device("cpu"))
    assert groups.bincount(minlength=count).tolist() == even(m, count)
    assert torch.equal(groups, groups.sort().values)
