"""Blocks of GGUF hold grids as they are, by gguf's decoder and by another, or not at all."""

import struct

import gguf
import numpy as np
import pytest
import torch

from quip.codebooks.base import Groups
from quip.codebooks.grids import Grids
from quip.errors import UsageError
from quip.packed.gguf.blocks import blocks_of
from quip.packed.linear import QuantizedLinear
from quip.packed.matrix import QuantizedMatrix
from quip.transforms import Chain
from tests.support.grids import random_grids

M, N = 6, 160


def layer_of(codes, decoder) -> QuantizedLinear:
    matrix = QuantizedMatrix(codes=codes, decoder=decoder, transform=Chain(()), damp=0.0)
    return QuantizedLinear.from_matrix(matrix, None)


def slowly(kind: str, row: bytes) -> list[float]:
    """A row of blocks as numbers, byte by byte, from the description of GGUF."""
    size = {"Q4_0": 18, "Q4_1": 20, "Q5_0": 22, "Q8_0": 34}[kind]
    found = []
    for start in range(0, len(row), size):
        block = row[start : start + size]
        (d,), rest = struct.unpack("<e", block[:2]), block[2:]
        low = 0.0
        if kind == "Q4_1":
            (low,), rest = struct.unpack("<e", rest[:2]), rest[2:]
        high, rest = (int.from_bytes(rest[:4], "little"), rest[4:]) if kind == "Q5_0" else (0, rest)
        for j in range(32):
            if kind == "Q8_0":
                q = rest[j] - 256 * (rest[j] > 127)
            else:
                q = (rest[j % 16] >> 4 * (j // 16) & 15) + 16 * (high >> j & 1)
                q -= {"Q4_0": 8, "Q4_1": 0, "Q5_0": 16}[kind]
            found.append(d * q + low)
    return found


def check(layer: QuantizedLinear, kind: str) -> None:
    """The blocks are of this kind, and the two readers make W_hat of them, bit for bit."""
    blocks = blocks_of(layer)
    found, W = blocks.bytes(), layer.dequantize()
    assert blocks.kind == kind
    assert found.shape == (len(W), blocks.row_bytes)
    theirs = gguf.dequantize(found.numpy(), gguf.GGMLQuantizationType[kind])
    assert np.array_equal(theirs, W.numpy())
    ours = [slowly(kind, row.numpy().tobytes()) for row in found]
    assert torch.equal(torch.tensor(ours, dtype=torch.float64), W.double())


@pytest.mark.parametrize("group", [32, 64, 128, 160, None])  # the last one of 64, 128 is short
@pytest.mark.parametrize(
    ("bits", "kinds", "kind"),
    [
        (4, {"middle": True}, "Q4_0"),
        (4, {"signed": True}, "Q4_0"),
        (3, {"middle": True}, "Q4_0"),
        (2, {}, "Q4_0"),
        (3, {}, "Q4_0"),  # codes less their zero are from -7 to 7
        (4, {}, "Q5_0"),
        (5, {}, "Q8_0"),
        (8, {"signed": True}, "Q8_0"),
        (2, {"symmetric": True}, "Q4_0"),  # odd numbers of half steps
        (3, {"symmetric": True}, "Q4_0"),
        (4, {"symmetric": True}, "Q5_0"),
        (7, {"symmetric": True}, "Q8_0"),
    ],
)
def test_grids_are_held_bit_for_bit(bits, kinds, kind, group, rng):
    codes, decoder = random_grids(M, N, bits, group, rng, **kinds)
    if kind == "Q5_0" and decoder.zero is not None:
        decoder.step[0, 0], decoder.zero[0, 0] = 255 / 16384, 13  # their product has 12 bits
    check(layer_of(codes, decoder), kind)


def test_a_lowest_weight_is_held_where_float16_has_it(rng):
    codes, decoder = random_grids(M, N, 4, 32, rng)
    step = torch.full_like(decoder.step, 0.015625)  # times any zero it has few digits
    layer = layer_of(codes, Grids(bits=4, step=step, zero=decoder.zero, groups=Groups(N, 32)))
    check(layer, "Q4_1")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_steps_are_never_rounded(dtype, rng):
    codes, decoder = random_grids(M, N, 4, 32, rng, middle=True)
    decoder.step[2, 1] = 2.0**-20 * 1.5
    check(layer_of(codes, decoder), "Q4_0")
    decoder.step[2, 1] = 2.0**-24 * 1.5  # between two of float16
    decoder.step[0, 0] = 2.0**-40
    with pytest.raises(UsageError, match="does not hold those of 2 of its 30 blocks exactly"):
        blocks_of(layer_of(codes, decoder))


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_groups_of_zeros_have_any_step(bits, rng):
    """Grids give them the smallest step of bfloat16, which float16 does not have."""
    codes, decoder = random_grids(M, N, bits, 32, rng)
    decoder.zero[:] //= 2
    codes[:, :64] = decoder.zero[:, :2].repeat_interleave(32, dim=1)
    decoder.step[:, :2] = torch.finfo(torch.bfloat16).tiny
    codes[:, 64:] //= 2
    blocks = blocks_of(layer_of(codes, decoder))
    found = [slowly(blocks.kind, row.numpy().tobytes()) for row in blocks.bytes()]
    W = layer_of(codes, decoder).dequantize()
    assert torch.equal(torch.tensor(found, dtype=torch.float64), W.double())
    assert not W[:, :64].any()


def test_weights_beyond_a_byte_are_counted(rng):
    codes, decoder = random_grids(M, N, 8, 32, rng)
    decoder.zero[:] = 100
    count = int((codes.int() - 100 > 127).sum())
    with pytest.raises(UsageError, match=f"^{count} of its {M * N} weights are more than 127"):
        blocks_of(layer_of(codes, decoder))


@pytest.mark.parametrize(
    ("n", "group", "reason"),
    [
        (160, 16, "each 16 of its inputs have a step of their own"),
        (160, 48, "each 48 of its inputs"),
        (160, 1, "each 1 of its inputs"),
        (48, 32, "its 48 inputs are no multiple of 32"),
    ],
)
def test_runs_that_blocks_cannot_follow_are_refused(n, group, reason, rng):
    with pytest.raises(UsageError, match=reason):
        blocks_of(layer_of(*random_grids(M, n, 4, group, rng)))
