"""docs/format.md suffices: a reader that knows nothing else makes the W_hat of every checkpoint."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf

from quip.codebooks import LATTICES, e8p, e81b
from quip.errors import UsageError
from quip.kernels.hadamard import rotate
from quip.packed import shards
from quip.packed.checkpoint import load
from quip.packed.gptq.read import import_gptq
from quip.packed.layout import Layout
from quip.packed.linear import quantized_layers
from tests.laws import GRIDS
from tests.support import format_reader, tiny
from tests.support.checkpoints import SHARP, mixed, quantized, save
from tests.support.integers import write_gptq

# W_hat is decoded in float32, with up to three roundings of 2^-24 a weight; rotations keep the norm
# of what they leave, and rescaling keeps it nearly.
NOISE = 2.0**-22
WIDTHS = {
    "odd": {"hidden_size": 36, "intermediate_size": 37},  # 36 = 6 x 6, 37 is a prime
    "products": {"hidden_size": 52, "intermediate_size": 100},  # Williamson's, and of a field of 49
}
PERMUTED, UNPERMUTED = ({"incoh_processing": True, "pre_proj_extra": i} for i in (0, 2))
PLAIN = {"pre_proj": True, "qfn": "a"}
VQ = {"codebook": "vq", "quant": "gptq", "wbits": 2, "groupsize": 128, "em_iters": 3}
LEARNED = (
    {"vq_dim": 1},
    {"vq_dim": 2, "columns_per_group": 16},
    {"vq_dim": 4, "wbits": 1, "groupsize": 256, "codebook_bits": 16, "rotation": "none"},
    {"vq_dim": 2, "vq_scaling": 8, "columns_per_group": 24, "codebook_scale": "columns"},
    {"vq_dim": 2, "codebook_bits": 4, "faithful": True},
    {"vq_dim": 1, "wbits": 3, "svd_rank": 0.5},
)
TRELLIS = {"codebook": "trellis", "wbits": 2, "trellis_states": 6, "npasses": 0}
TRELLISES = (
    {"trellis_code": "learned", "trellis_states": 8, "tile": "8x2", "wbits": 2.5},
    {"trellis_code": "hyb", "tile": "7x4"},
    {"trellis_code": "mul1", "wbits": 1.5, "own_table": True},
    *(
        {"trellis_code": code, "tile": tile, "wbits": bits, "range_": "tensor"}
        for code, tile, bits in (("1mad", "16x16", 3), ("mcg", "9x2", 2.5), ("3inst", "20x1", 4))
    ),
    {"trellis_code": "int8", "trellis_states": 9},
)
KINDS = [
    *(("llama", {"wbits": 2 + i % 7, **flags}) for i, flags in enumerate(GRIDS.values())),
    ("odd", {"wbits": 3, "incoh_processing": True}),
    ("odd", {"wbits": 5, **PERMUTED}),
    ("odd", {"wbits": 2, **UNPERMUTED, "range_": "16"}),
    ("odd", {"wbits": 7, "groupsize": 10, **PLAIN}),
    ("products", {"wbits": 4, "pre_rescale": True, "rotation": "hadamard", **PLAIN}),
    ("products", {"wbits": 6, "rotation": "hadamard", "hadamard_block": 4, **PLAIN}),
    ("odd", {"wbits": 3, "incoh_processing": True, "pre_rescale_out": True}),
    ("llama", {**SHARP, "pre_rescale_out": True}),
    *(("llama", {"codebook": name}) for name in LATTICES),
    ("llama", {"codebook": "E8P12RVQ3B", "range_": "tensor", "no_fuse": True}),
    ("llama", {"codebook": "E8P12RVQ4B", "range_": "16", "pre_rescale": True}),
    ("llama", {**SHARP, "rotation": "kronecker"}),
    *(("llama", VQ | more) for more in LEARNED),
    ("opt", {**VQ, "vq_dim": 2, "faithful": True}),
    ("odd", {**VQ, "vq_dim": 1, "columns_per_group": 16, "rotation": "none"}),
    ("products", {**VQ, "vq_dim": 2, "vq_scaling": 6, "columns_per_group": 24, "rotation": "none"}),
    ("qwen2", {**VQ, "vq_dim": 4, "wbits": 1, "groupsize": 10**6}),
    ("opt", {**SHARP, "hadamard_block": 8}),
    *(("llama", TRELLIS | more) for more in TRELLISES),
]


def check(folder: Path) -> None:
    """What the reader makes of every matrix is what quip makes of it."""
    model = load(folder)
    names = Layout.of(model).names
    layers = {name: model.get_submodule(name) for name in names}
    sizes = {name: (x.out_features, x.in_features) for name, x in layers.items()}
    read = format_reader.read(folder, sizes)
    assert {*read} == {*names}
    for name, layer in layers.items():
        ours = layer.dequantize().double().numpy()
        assert np.linalg.norm(read[name] - ours) <= NOISE * np.linalg.norm(ours), name


@pytest.mark.parametrize(("name", "flags"), KINDS, ids=str)
def test_every_kind_of_matrix_is_decoded_from_the_text(name, flags, tmp_path, monkeypatch):
    for odd, sizes in WIDTHS.items():
        config = {**tiny.LLAMA, "num_attention_heads": 2, **sizes}
        monkeypatch.setitem(tiny.CONFIGS, odd, lambda config=config: hf.LlamaConfig(**config))
    check(save(quantized(name, flags, blocks=1), tmp_path / "model"))


def test_a_plan_in_several_files_and_tuned_signs_are_decoded_from_the_text(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD", "20KB")
    model = mixed()
    rng = torch.Generator().manual_seed(0)
    for layer in quantized_layers(model).values():
        if any(part["kind"] == "hadamard" for part in layer.spec.transforms):
            layer.signs_in.mul_(1 + 0.1 * torch.randn(layer.in_features, generator=rng))
    folder = save(model, tmp_path / "model")
    words = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert words["format"] == 2
    assert len([*folder.glob("*.safetensors")]) > 1
    check(folder)


def test_what_came_from_elsewhere_is_decoded_from_the_text(tmp_path):
    write_gptq(tmp_path / "theirs", bits=3, scattered=True)
    import_gptq(tmp_path / "theirs", tmp_path / "ours")
    check(tmp_path / "ours")


def test_the_tables_of_lattices_are_those_of_the_text():
    assert np.array_equal(format_reader.e8p(), e8p.decode(torch.arange(2**16)).numpy())
    assert np.array_equal(format_reader.e81b(), e81b.decode(torch.arange(2**8)).numpy())


# Every rule for K: none, Williamson, Paley over primes and powers (q + 1 and 2 (q + 1)), products;
# and two of them together.
ORDERS = (1, 2, 8, 12, 20, 28, 36, 44, 52, 56, 60, 76, 88, 100, 112, 116, 124, 148, 156, 172, 244)
COMPOSED = (180, 196, 344, 360, 688, 1040, 1904)


@pytest.mark.parametrize("n", [*ORDERS, *COMPOSED])
def test_the_rotation_of_every_width_is_that_of_the_text(n):
    ours = rotate(torch.eye(n, dtype=torch.float64)).T.numpy()
    assert np.abs(ours - format_reader.omega(n)).max() < 1e-12


def test_widths_that_the_text_has_no_rotation_for_have_none():
    for n in (3, 6, 18, 92, 94):
        with pytest.raises(UsageError):
            rotate(torch.eye(n))
        with pytest.raises(ValueError, match="empty"):
            format_reader.omega(n)


def test_the_reader_does_not_import_quip():
    lines = Path(format_reader.__file__).read_text().splitlines()
    assert [x for x in lines if x.startswith(("import", "from")) and "quip" in x] == []
