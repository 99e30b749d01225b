"""Parts of packed matrices: those of the whole, and what cannot be cut is refused."""

from itertools import accumulate

import pytest
import torch

from quip.errors import UnsupportedModel
from quip.packed.cut import Cut
from quip.packed.linear import QuantizedLinear, quantized_layers
from quip.packed.spec import Spec
from tests.laws import assert_near
from tests.support.checkpoints import INCOHERENT, SHARP, quantized

CPU = torch.device("cpu")
ROUNDING = 1e-6  # of float32: a rotation of fewer rows may add in another order
FLAGS = {
    "grids of groups": {"wbits": 3, "groupsize": 8, "quant": "gptq"},
    "grids, rotated in blocks": {**INCOHERENT, "rotation": "hadamard", "hadamard_block": 8},
    "lattices in blocks, stacked": {**SHARP, "hadamard_block": 8, "range_": "8"},
    "lattices, not rotated": {"codebook": "E8P12RVQ3B", "rotation": "none"},
}


@pytest.fixture(scope="module", params=FLAGS)
def layers(request) -> dict[str, QuantizedLinear]:
    """The packed matrices of a block."""
    return quantized_layers(quantized("llama", FLAGS[request.param], blocks=1))


def test_rows_of_a_part_are_those_of_the_whole(layers):
    for whole in layers.values():
        W, ends = whole.dequantize(), [*accumulate(whole.sizes)]
        for i in range(2):
            edges = [
                (end - m + i * m // 2, m // 2) for end, m in zip(ends, whole.sizes, strict=True)
            ]
            rows = [slice(start, start + count) for start, count in edges]
            cut = Cut(rows=tuple(rows))
            cut.check(whole.spec)
            part = cut.of(whole, CPU)
            part.check()
            assert part.sizes == tuple(size // 2 for size in whole.sizes)
            assert_near(part.dequantize(), torch.cat([W[x] for x in rows]), ROUNDING)


def test_answers_of_parts_of_the_columns_add_up(layers):
    for whole in layers.values():
        x, W = torch.randn(3, whole.in_features), whole.dequantize()
        total = torch.zeros(3, whole.out_features)
        half = whole.in_features // 2
        for columns in (slice(0, half), slice(half, 2 * half)):
            cut = Cut(columns=columns)
            cut.check(whole.spec)
            part = cut.of(whole, CPU)
            part.check()
            assert_near(part.dequantize(), W[:, columns], ROUNDING)
            total += part.product(x[:, columns])
        assert_near(total, whole.product(x), 1e-5)  # two sums in place of one


GRID = {"kind": "grid", "bits": 2, "group": None, "symmetric": True}
HADAMARD = {"kind": "hadamard", "block": None}
TURNED = {"kind": "kronecker", "blocked": False, "permute": True}


@pytest.mark.parametrize(
    ("codebook", "transforms", "message"),
    [
        ({"kind": "trellis"}, (), "the kind trellis are not cut apart.*--hadamard_block 16"),
        ({**GRID, "group": 32}, (), "groups of 32 columns would be cut.*--groupsize 16"),
        (GRID, (HADAMARD,), "hadamard.* mixes .*--rotation hadamard --hadamard_block 16"),
        (GRID, ({**HADAMARD, "block": 32},), "--hadamard_block 16"),
        (GRID, ({"kind": "rescale"}, TURNED), "kronecker.*--rotation hadamard"),
    ],
)
def test_what_is_not_cut_exactly_is_refused_with_the_flags_for_another(
    codebook, transforms, message
):
    with pytest.raises(UnsupportedModel, match=message):
        Cut(columns=slice(48, 96)).check(Spec(codebook, transforms))


def test_rows_may_be_cut_across_what_only_columns_have():
    Cut(rows=(slice(16, 32),)).check(Spec({**GRID, "group": 5}, ({"kind": "rescale"},)))
