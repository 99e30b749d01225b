"""A quantized matrix as a value: what it takes."""

import pytest
import torch

from quip.matrix.build import build_recipe
from quip.matrix.quantize import quantize_matrix
from tests.support.checkpoints import VECTORS

KINDS = {
    "grid a": {"wbits": 3, "groupsize": 7},
    "grid b": {"wbits": 2, "incoh_processing": True},
    "lattice": {"codebook": "E8P12RVQ3B"},
    **VECTORS,
    "low rank": {**VECTORS["1D"], "wbits": 3, "svd_rank": 0.3},
    "entries of 4 bits": {**VECTORS["4D"], "quant": "gptq", "columns_per_group": 128}
    | {"codebook_bits": 4},
}


@pytest.mark.parametrize("flags", KINDS.values(), ids=KINDS)
def test_its_bits_are_those_of_all_its_tensors_and_are_known_without_packing(flags, monkeypatch):
    W = torch.randn(24, 40, generator=torch.Generator().manual_seed(0))
    rng = torch.Generator().manual_seed(0)
    quantized = quantize_matrix(W, torch.eye(40).double(), build_recipe(**flags), rng=rng)
    stored = sum(x.nbytes for x in quantized.tensors().values())
    monkeypatch.setattr("quip.packed.matrix.pack", None)
    assert quantized.bits_per_weight == 8 * stored / W.numel()
