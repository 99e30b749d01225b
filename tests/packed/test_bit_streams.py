"""Codes as one stream of bits, against a reader that knows nothing but the number of each bit."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quip.errors import UsageError
from quip.packed.streams import pack_stream, stream_words, unpack_stream


def read_bits(words: list[int], bits: int, count: int) -> list[int]:
    """The codes of a row as one large number, from which they are divided off."""
    number = sum((word % 2**32) << (32 * i) for i, word in enumerate(words))
    return [(number >> (k * bits)) % 2**bits for k in range(count)]


@given(bits=st.integers(1, 16), count=st.integers(0, 100), seed=st.integers(0, 99))
def test_a_row_is_one_stream_of_bits(bits, count, seed):
    rng = torch.Generator().manual_seed(seed)
    codes = torch.randint(2**bits, (3, count), generator=rng)
    packed = pack_stream(codes, bits)
    assert packed.shape == (3, stream_words(count, bits))
    assert packed.dtype == torch.int32
    assert [read_bits(row, bits, count) for row in packed.tolist()] == codes.tolist()
    again = unpack_stream(packed, bits, count)
    assert again.dtype == (torch.uint8 if bits <= 8 else torch.int32)
    assert torch.equal(again.long(), codes)


def test_columns_are_rows_of_the_transposed_matrix():
    codes = torch.randint(8, (64, 5), generator=torch.Generator().manual_seed(0))
    packed = pack_stream(codes.T, 3).T
    assert packed.shape == (6, 5)
    assert read_bits(packed[:, 2].tolist(), 3, 64) == codes[:, 2].tolist()
    assert torch.equal(unpack_stream(packed.T, 3, 64).T.long(), codes)


@pytest.mark.parametrize("codes", [[0, 8], [-1, 3]])
def test_a_code_that_does_not_fit_is_refused(codes):
    with pytest.raises(UsageError, match=r"codes from .* do not fit 3 bits"):
        pack_stream(torch.tensor([codes]), 3)


@pytest.mark.parametrize("bits", [0, 17])
def test_bits_that_no_format_has_are_refused(bits):
    with pytest.raises(UsageError, match=f"codes of {bits} bits have no stream"):
        pack_stream(torch.zeros(1, 4, dtype=torch.int64), bits)
    with pytest.raises(UsageError, match=f"codes of {bits} bits have no stream"):
        unpack_stream(torch.zeros(1, 4, dtype=torch.int32), bits, 4)
