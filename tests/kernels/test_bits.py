"""Packing of codes: what is packed is unpacked, and takes the room that it should."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quip.errors import UsageError
from quip.kernels.bits import LARGEST, pack, unpack, words


def random_codes(bits, *shape, rng):
    """Of all 2^bits, though 2^63 itself is beyond what `randint` takes."""
    high = torch.randint(2 ** (bits - 1), shape, generator=rng)
    return 2 * high + torch.randint(2, shape, generator=rng)


@given(
    st.integers(1, LARGEST),
    st.lists(st.integers(1, 5), max_size=2),
    st.integers(1, 70),
    st.integers(0, 2**32),
)
def test_unpacked_codes_are_those_packed(bits, rows, count, seed):
    rng = torch.Generator().manual_seed(seed)
    codes = random_codes(bits, *rows, count, rng=rng)
    packed = pack(codes, bits)
    assert packed.shape == (*rows, words(count, bits))
    found = unpack(packed, bits, count)
    wide = torch.int32 if bits < 32 else torch.int64
    assert found.dtype == (torch.uint8 if bits <= 8 else wide)
    assert torch.equal(found.long(), codes)


@pytest.mark.parametrize("bits", range(1, LARGEST + 1))
def test_the_largest_code_of_any_width_survives_in_any_count(bits):
    for count in range(1, 35):
        codes = torch.full((2, count), 2**bits - 1)
        codes[0, ::2] = 2 ** (bits - 1)
        codes[1, ::3] = 0
        assert torch.equal(unpack(pack(codes, bits), bits, count).long(), codes)


@pytest.mark.parametrize("bits", range(33, LARGEST + 1))
def test_a_wide_code_is_laid_out_as_its_bytes_and_what_is_left(bits):
    """The planes of the low bytes are those of narrower codes, in the same order."""
    rng = torch.Generator().manual_seed(bits)
    codes = random_codes(bits, 40, rng=rng)
    row, low, start = pack(codes, bits).view(torch.uint8), bits // 8 * 8, 0
    for shift in range(0, low, 8):
        assert torch.equal(row[start : start + 40], (codes >> shift & 255).to(torch.uint8))
        start += 40
    if bits > low:
        rest = pack(codes >> low, bits - low).view(torch.uint8)
        assert torch.equal(row[start : start + len(rest)], rest)


@given(st.integers(1, LARGEST), st.integers(1, 40))
def test_32_codes_of_b_bits_take_b_words(bits, blocks):
    assert words(32 * blocks, bits) == bits * blocks


@given(st.integers(1, LARGEST), st.integers(1, 500))
def test_odd_counts_waste_less_than_a_byte_a_plane_and_a_word(bits, count):
    planes = bits // 8 + (bits % 8).bit_count()
    assert 0 <= 32 * words(count, bits) - bits * count < 8 * planes + 32


@pytest.mark.parametrize("bits", range(1, 9))
def test_a_code_lies_where_the_layout_says(bits):
    count = 21
    for column in (0, 7, 20):
        codes = torch.zeros(count, dtype=torch.int64)
        codes[column] = 2**bits - 1
        row = pack(codes, bits).view(torch.uint8)
        expected, start = torch.zeros_like(row), 0
        for width in (8, 4, 2, 1):
            if bits & width:
                size = -(-count * width // 8)
                place, byte = divmod(column, size)
                expected[start + byte] = (2**width - 1) << (width * place)
                start += size
        assert torch.equal(row, expected)


def test_codes_of_any_integer_type_and_stride_are_packed():
    codes = torch.arange(24).remainder(8).view(4, 6)
    expected = pack(codes, 3)
    for dtype in (torch.uint8, torch.int16, torch.int32):
        assert torch.equal(pack(codes.to(dtype), 3), expected)
        for bits in (24, 40, 63):
            assert torch.equal(pack(codes.to(dtype), bits), pack(codes, bits))
    assert torch.equal(pack(codes.T.contiguous().T, 3), expected)
    assert torch.equal(unpack(pack(codes.to(torch.uint8), 8), 8, 6), codes)
    assert torch.equal(unpack(expected.T.contiguous().T, 3, 6), codes)


@pytest.mark.parametrize("codes", [[0, 4], [-1, 0]])
def test_codes_that_do_not_fit_are_refused(codes):
    with pytest.raises(UsageError, match=r"do not fit 2 bits, which hold 0 to 3"):
        pack(torch.tensor(codes), 2)


@pytest.mark.parametrize("bits", [0, 64])
def test_widths_that_cannot_be_packed_are_refused(bits):
    with pytest.raises(UsageError, match=f"codes of {bits} bits cannot be packed; 1 to 63 can"):
        words(8, bits)
