"""The published layout of QuIP#: words against its description, and folders there and back."""

import json

import pytest
import torch
import transformers as hf
from huggingface_hub import save_torch_state_dict
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from quip.errors import UsageError
from quip.jobs.export import export_quip_sharp
from quip.jobs.inspect import inspect_checkpoint
from quip.model.load import load_model
from quip.packed.checkpoint import load
from quip.packed.quip_sharp.codes import pack_codes, unpack_codes
from quip.packed.quip_sharp.format import params, slots, spec_of
from quip.packed.quip_sharp.read import import_quip_sharp
from tests.support.published import BOOKS, change, place, save_packed, slow_words, write_published
from tests.support.tiny import tokens

pytestmark = pytest.mark.usefixtures("command")

NAMES = ("llama", "mistral")
LAYER = "model.layers.1."


def logits(folder) -> torch.Tensor:
    with torch.no_grad():
        return load(folder, dtype="float32")(tokens()).logits


def assert_same_tensors(folder, other) -> None:
    found, wanted = (load_file(path / "model.safetensors") for path in (folder, other))
    assert found.keys() == wanted.keys()
    for name, x in wanted.items():
        assert found[name].dtype == x.dtype, name
        assert torch.equal(found[name], x), name


# Words


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(("m", "n"), [(16, 64), (48, 64), (16, 192), (32, 128)])
def test_codes_lie_where_the_description_puts_them(m, n, bits, rng):
    codes = torch.randint(2 ** (8 * bits), (m, n // 8), generator=rng)
    words = slow_words(codes, n, bits)
    assert words.shape == (m, n * bits // 64)
    assert torch.equal(pack_codes(codes, m, n, bits), words)
    assert torch.equal(unpack_codes(words, m, n, bits), codes)


@given(st.sampled_from([2, 3, 4]), st.integers(0, 2**32))
def test_any_words_come_back_from_their_codes(bits, seed):
    rng = torch.Generator().manual_seed(seed)
    words = torch.randint(-(2**63), 2**63 - 1, (32, 128 * bits // 64), generator=rng)
    codes = unpack_codes(words, 32, 128, bits)
    assert 0 <= int(codes.min()) <= int(codes.max()) < 2 ** (8 * bits)
    assert torch.equal(pack_codes(codes, 32, 128, bits), words)


@pytest.mark.parametrize(
    ("code", "row", "group", "word", "value"),
    [
        (0xAB00, 0, 0, 0, 0xAB),  # a magnitude alone: byte i = 0
        (0x00FF, 0, 0, 0, 0x11111111 << 32),  # all signs alone: bit 0 of every nibble
        (0x0080, 0, 0, 0, 1 << 60),
        (0xAB01, 1, 0, 0, 0xAB << 8 | 1 << 33),  # the odd row: i = 1
        (0xAB01, 0, 1, 0, 0xAB << 16 | 1 << 34),  # the right half of 16 columns: i = 2
        (0xAB01, 0, 2, 1, 0xAB | 1 << 32),  # the next 16 columns: t = 1
        (0xAB01, 2, 0, 4, 0xAB | 1 << 32),  # the next pair of rows: 4 words on
        (0xAB01, 0, 8, 32, 0xAB | 1 << 32),  # the next 64 columns: 32 words on
        (0xAB01, 16, 0, 64, 0xAB | 1 << 32),  # the next 16 rows of 128 columns
        (0xAB81, 31, 15, 127, 0xAB << 24 | 1 << 35 | (1 << 63) - 2**64),
    ],
)
def test_a_single_code_goes_to_one_word(code, row, group, word, value):
    codes = torch.zeros(32, 16, dtype=torch.int64)
    codes[row, group] = code
    wanted = torch.zeros(128, dtype=torch.int64)
    wanted[word] = value
    assert torch.equal(pack_codes(codes, 32, 128, 2).flatten(), wanted)
    assert place(row, group, 4)[0] == word


def test_second_stages_stand_right_of_the_first():
    codes = torch.zeros(16, 8, dtype=torch.int64)
    codes[3, 5] = 0xCD << 16
    words = pack_codes(codes, 16, 64, 3)
    assert words.shape == (16, 3)
    assert words[3].tolist() == [0, 0, 0xCD << 40]
    codes[3, 5] = 0xCD00 << 16
    words = pack_codes(codes, 16, 64, 4)
    assert not words[:, :2].any()
    assert torch.equal(words[:, 2:], pack_codes(codes >> 16, 16, 64, 2))


def test_sizes_and_codes_that_do_not_fit_are_named():
    for m, n, reason in [(24, 64, "24 outputs are no multiple of 16"), (16, 96, "96 inputs are")]:
        with pytest.raises(UsageError, match=reason):
            unpack_codes(torch.zeros(m, n // 32, dtype=torch.int64), m, n, 2)
        with pytest.raises(UsageError, match=reason):
            pack_codes(torch.zeros(m, n // 8, dtype=torch.int64), m, n, 2)
    with pytest.raises(UsageError, match=r"\[16, 3\] words .* takes \[16, 2\]"):
        unpack_codes(torch.zeros(16, 3, dtype=torch.int64), 16, 64, 2)
    with pytest.raises(UsageError, match=r"\[16, 4\] codes for a matrix of 16 x 64"):
        pack_codes(torch.zeros(16, 4, dtype=torch.int64), 16, 64, 2)
    with pytest.raises(UsageError, match="beyond the 24 bits"):
        pack_codes(torch.full((16, 8), 2**24), 16, 64, 3)
    with pytest.raises(UsageError, match="5 bits"):
        pack_codes(torch.zeros(16, 8, dtype=torch.int64), 16, 64, 5)


def test_shapes_are_those_of_the_published_llama_2_7b():
    spec = spec_of({"codebook": "E8P12", "codebook_version": 1})
    sizes = {(12288, 4096): 3, (4096, 4096): 1, (22016, 4096): 2, (4096, 11008): 1}
    found = [slots(m, n, spec, members=k, bias=False) for (m, n), k in sizes.items()]
    shapes = [slot["Qidxs"].shape for slot in found]
    assert shapes == [(12288, 128), (4096, 128), (22016, 128), (4096, 344)]
    count = {
        kind: 32 * sum(slot[key].shape[0] * (slot[key].shape[1:] or (1,))[0] for slot in found)
        for kind, key in (("words", "Qidxs"), ("in", "SU"), ("out", "SV"))
    }
    dense = 2 * 32000 * 4096 + 65 * 4096
    assert round(count["words"] / 1e6, 1) == 202.4
    halves = dense + count["in"] + count["out"]
    assert round((count["words"] + halves) / 1e6) == 467
    assert round((8 * count["words"] + 2 * halves) / 1e9, 2) == 2.15


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_quip_params_say_what_a_specification_says(bits):
    book, _, version, packsz, ratio = BOOKS[bits]
    for asked in (-1, 2.5):
        words = {"codebook": book, "codebook_version": version, "resid_scale_override": asked}
        for rescale in (False, True):
            spec = spec_of({**words, "rescale_WH": rescale})
            assert spec.codebook["ratio"] == (2.5 if ratio and asked > 0 else ratio)
            assert [t["kind"] for t in spec.transforms] == ["rescale"] * rescale + ["hadamard"]
            found = params(spec)
            assert spec_of(found) == spec
            assert found["packsz"] == packsz
            assert found["resid_scale_override"] == (asked if bits > 2 else -1)


# From the layout


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("bits", "options"),
    [(2, {}), (3, {"rescale": True}), (4, {"resid": 2.5}), (4, {})],
    ids=["2", "3-rescaled", "4-ratio", "4"],
)
def test_an_imported_model_computes_what_the_description_says(tmp_path, name, bits, options):
    dense = write_published(tmp_path / "theirs", name, bits, **options)
    made = import_quip_sharp(tmp_path / "theirs", tmp_path / "ours")
    assert (made.codebook, made.bits, made.matrices) == (BOOKS[bits][0], bits, 14)
    with torch.no_grad():
        wanted = dense(tokens()).logits
    # float32 on both sides, W_hat and activations rotated in another order.
    scale = float(wanted.abs().max())
    torch.testing.assert_close(logits(tmp_path / "ours"), wanted, rtol=0, atol=1e-4 * scale)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_import_and_export_give_the_same_files(tmp_path, bits):
    write_published(tmp_path / "theirs", "mistral", bits, rescale=bits == 2)
    import_quip_sharp(tmp_path / "theirs", tmp_path / "ours")
    size = export_quip_sharp(tmp_path / "ours", tmp_path / "again")
    assert size == (tmp_path / "again" / "model.safetensors").stat().st_size
    assert_same_tensors(tmp_path / "again", tmp_path / "theirs")
    found, wanted = (
        json.loads((tmp_path / which / "config.json").read_text()) for which in ("again", "theirs")
    )
    assert found["quip_params"] == wanted["quip_params"]
    assert (found["dtype"], found["torch_dtype"]) == ("float16", "float16")
    assert found["rope_theta"] == wanted["rope_parameters"]["rope_theta"]
    assert "quantization_config" not in found


def test_biases_of_a_stack_go_to_its_members_and_back(tmp_path):
    dense = write_published(tmp_path / "theirs", attention_bias=True, mlp_bias=True)
    import_quip_sharp(tmp_path / "theirs", tmp_path / "ours")
    found = load_file(tmp_path / "ours" / "model.safetensors")
    for member in ("self_attn.k_proj", "mlp.up_proj", "mlp.down_proj"):
        wanted = dense.get_submodule(LAYER + member).bias
        assert torch.equal(found[f"{LAYER}{member}.bias"].float(), wanted)
    export_quip_sharp(tmp_path / "ours", tmp_path / "again")
    assert_same_tensors(tmp_path / "again", tmp_path / "theirs")


def test_a_tied_embedding_is_held_once_and_a_head_of_its_own_is_kept(tmp_path):
    write_published(tmp_path / "tied", tie_word_embeddings=True)
    import_quip_sharp(tmp_path / "tied", tmp_path / "ours")
    assert "lm_head.weight" not in load_file(tmp_path / "ours" / "model.safetensors")
    export_quip_sharp(tmp_path / "ours", tmp_path / "again")
    assert_same_tensors(tmp_path / "again", tmp_path / "tied")
    head = torch.ones(64, 64, dtype=torch.float16)
    change(tmp_path / "tied", lambda found: found.update({"lm_head.weight": head}))
    import_quip_sharp(tmp_path / "tied", tmp_path / "own")
    assert torch.equal(load(tmp_path / "own").get_parameter("lm_head.weight"), head)


def test_an_imported_checkpoint_is_one_like_all_others(tmp_path):
    write_published(tmp_path / "theirs", bits=3)
    (tmp_path / "theirs" / "generation_config.json").write_text('{"temperature": 0.5}')
    import_quip_sharp(tmp_path / "theirs", tmp_path / "ours")
    found = inspect_checkpoint(tmp_path / "ours")
    assert found["quantized_matrices"] == 14
    assert (found["dtype"], found["codebook"]["name"]) == ("float16", "E8P12RVQ3B")
    assert load_model(str(tmp_path / "ours")).dtype_name == "float16"
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert "quip_params" not in config
    assert (tmp_path / "ours" / "generation_config.json").read_text() == '{"temperature": 0.5}'


def test_files_in_shards_are_read_like_one(tmp_path):
    write_published(tmp_path / "theirs")
    import_quip_sharp(tmp_path / "theirs", tmp_path / "one")
    path = tmp_path / "theirs" / "model.safetensors"
    derived = {f"{LAYER}self_attn.rotary_emb.inv_freq": torch.ones(8)}
    found = load_file(path) | derived
    path.unlink()
    save_torch_state_dict(found, tmp_path / "theirs", max_shard_size="20KB")
    assert len(list((tmp_path / "theirs").glob("model-*.safetensors"))) > 1
    import_quip_sharp(tmp_path / "theirs", tmp_path / "many")
    assert_same_tensors(tmp_path / "many", tmp_path / "one")


# To the layout


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_checkpoint_comes_back_from_the_layout_bit_for_bit(tmp_path, name, bits):
    save_packed(tmp_path / "ours", name, {"codebook": BOOKS[bits][0], "pre_rescale": bits == 3})
    export_quip_sharp(tmp_path / "ours", tmp_path / "theirs")
    import_quip_sharp(tmp_path / "theirs", tmp_path / "again")
    assert_same_tensors(tmp_path / "again", tmp_path / "ours")
    words = [
        json.loads((tmp_path / which / "config.json").read_text())["quantization_config"]
        for which in ("ours", "again")
    ]
    assert words[0] == words[1]
    assert torch.equal(logits(tmp_path / "again"), logits(tmp_path / "ours"))


def test_older_tools_find_the_rope_of_the_model(tmp_path):
    rope = {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    write_published(tmp_path / "theirs", rope_parameters=rope)
    import_quip_sharp(tmp_path / "theirs", tmp_path / "ours")
    export_quip_sharp(tmp_path / "ours", tmp_path / "again")
    words = json.loads((tmp_path / "again" / "config.json").read_text())
    assert words["rope_theta"] == 5e5
    assert words["rope_scaling"] == {k: x for k, x in rope.items() if k != "rope_theta"}
    old = {**words, "rope_parameters": None}
    (tmp_path / "again" / "config.json").write_text(json.dumps(old))
    assert hf.AutoConfig.from_pretrained(tmp_path / "again").rope_parameters == rope
