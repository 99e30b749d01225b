"""Folders that are no checkpoints, or damaged ones, are refused in one line that says why."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file

from quip.errors import Unavailable, UnsupportedModel
from quip.model.load import load_model
from quip.packed.checkpoint import check_folder, load, skeleton
from quip.packed.checks import check_counts
from quip.packed.gaps import refuse_gaps
from tests.support.checkpoints import (
    SHARP,
    VECTORS,
    damage,
    edit,
    quantized,
    refusal,
    refusals,
    save,
)
from tests.support.tiny import tiny

Q = "model.layers.0.self_attn.q_proj"


def test_folders_that_are_no_checkpoints_are_refused(tmp_path, copy):
    for folder in (tmp_path / "nowhere", copy / "config.json", "facebook/opt-125m"):
        line = refusal(folder)
        assert line.startswith(f"Unavailable: {folder}: not a checkpoint, it has no config.json")
        assert line.endswith("name a folder written by --save")
    for text in ("{", "[]", "\0"):
        (copy / "config.json").write_text(text)
        assert "Unavailable" in (line := refusal(copy))
        assert "its config.json is damaged (" in line
    (copy / "config.json").unlink()
    assert "not a checkpoint, it has no config.json that can be read" in refusal(copy)


def test_an_index_that_leaves_the_folder_is_not_followed(copy):
    (copy / "model.safetensors").rename(copy.parent / "other.safetensors")
    for name in ("../other.safetensors", str(copy.parent / "other.safetensors")):
        words = {"metadata": {}, "weight_map": {f"{Q}.codes": name}}
        (copy / "model.safetensors.index.json").write_text(json.dumps(words))
        assert (line := refusal(copy)).startswith(f"Unavailable: {copy}: model.safetensors.index")
        assert f"names a file '{name}', which is no plain name of one in {copy}; get" in line


@pytest.mark.parametrize(
    "text", ["5", '{"quantization_config": []}', '{"a": 1, "a": 2}', "9" * 5000]
)
def test_a_config_of_another_shape_is_damage(copy, text):
    (copy / "config.json").write_text(text)
    assert f"{copy}: its config.json is damaged (" in (line := refusal(copy))
    assert line.endswith("; download or save it again")


def test_models_that_quip_did_not_quantize_are_refused(tmp_path, copy):
    tiny("llama").save_pretrained(tmp_path / "plain")
    assert refusal(tmp_path / "plain").endswith(
        "plain: the model is not quantized; name a folder written by --save"
    )
    edit(copy, quant_method="gptq")
    assert "UnsupportedModel" in (line := refusal(copy))
    assert line.endswith("the model was quantized by 'gptq'; name a folder written by --save")
    with pytest.raises(UnsupportedModel):
        check_folder(copy)


GRID = {"kind": "grid", "bits": 2, "group": 1, "symmetric": True}
RESCALE = {"kind": "rescale"}
PLAIN = {"codebook": GRID, "transforms": []}
FORMAT_1 = dict.fromkeys(("codebook", "transforms", "modules"))  # taken out


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (
            {"format": 4},
            "a checkpoint of format 4, and this version of quip reads formats 1, 2, 3: upgrad",
        ),
        ({"format": None}, "a checkpoint of format None, and this version of quip reads formats 1"),
        ({"format": "x"}, "reads formats 1, 2, 3: its config.json is damaged; download or save it"),
        ({"format": 2}, "its config.json is damaged (specs is missing); download or save it again"),
        ({"format": 2, "specs": {}}, "its config.json is damaged (specs is {}, not a list)"),
        ({"format": 2, "specs": []}, "is damaged (codebook is a word of another format)"),
        ({"format": 2, "specs": ["grid"], **FORMAT_1}, "(specs[0] is 'grid', not a mapping)"),
        (
            {"format": 2, "specs": [{"codebook": GRID}], **FORMAT_1},
            "its config.json is damaged (specs[0].transforms is missing)",
        ),
        (
            {"format": 2, "specs": 1001 * [{**PLAIN, "modules": []}], **FORMAT_1},
            ", not from 0 to 1000); download or save it again",
        ),
        ({"specs": []}, "is damaged (specs is a word of another format)"),
        (
            {**FORMAT_1, "format": 2, "specs": 2 * [{**PLAIN, "modules": [Q]}]},
            f"its config.json names the matrix '{Q}' twice; download or save it again",
        ),
        (
            {**FORMAT_1, "format": 2, "specs": [{**PLAIN, "modules": []}]},
            "its config.json has a specification that names no matrix; download or save it",
        ),
        (
            {"transforms": [{}], "modules": [Q]},
            "its matrices have a transform of kind None",
        ),
        ({"format": True}, "a checkpoint of format True, and this version of quip reads formats 1"),
        ({"transforms": 2 * [RESCALE]}, "have the transform rescale twice, whose tensors have roo"),
        ({"transforms": 10**4 * [RESCALE]}, "have the transform rescale twice"),
        ({"transforms": [{"kind": "hadamard", "block": True}]}, "(block is True, not a whole num"),
        ({"transforms": [{"kind": "hadamard", "block": 0}]}, "(block is 0, not a whole number fr"),
        (
            {"transforms": [{"kind": "kronecker", "blocked": 0, "permute": True}]},
            "which this version of quip does not understand (blocked is 0, not true or false)",
        ),
        ({"transforms": [{**RESCALE, "block": 8}]}, "(its options are ['block'], not [])"),
        ({"codebook": {**GRID, "bits": True}}, "(bits is True, not a whole number)"),
        ({"codebook": {**GRID, "bits": 9}}, "(bits is 9, not from 1 to 8)"),
        ({"codebook": {**GRID, "symmetric": 1}}, "(symmetric is 1, not true or false or one of"),
        ({"codebook": {**GRID, "group": 1.0}}, "(group is 1.0, not a whole number"),
        (
            {"codebook": {"kind": "lattice", "name": "E8P12RVQ3B", "ratio": 10**20, "group": 8}},
            ", not a number from 1e-06 to 1e+06 or null)",
        ),
        ({"stacks": False}, "its config.json is damaged (stacks is False, not a list)"),
        ({"stacks": [[Q]]}, f"is damaged (stacks[0] is ['{Q}'], not from 2 to inf)"),
        (
            {"transforms": []},
            "'model.layers.0.mlp.down_proj.factors': the files hold it, and config.json names no "
            "quantized matrix with such a tensor; download or save it again",
        ),
        ({"modules": [Q]}, "'model.layers.0.mlp.down_proj.codes': the files hold it, and config."),
        ({"codebook": {**GRID, "kind": "e8p"}}, "have a codebook of kind 'e8p'"),
        ({"codebook": {"kind": "grid"}}, "have a codebook {'kind': 'grid'}, which this version"),
        ({"transforms": [{"kind": "fft"}]}, "have a transform of kind 'fft'"),
        ({"codebook": None}, "its config.json is damaged (codebook is missing); download or save"),
        ({"codebook": ["grid"]}, "(codebook is ['grid'], not a mapping); download"),
        ({"transforms": {}}, "(transforms is {}, not a list); download"),
        ({"modules": None}, "its config.json is damaged (modules is missing); download or save"),
        ({"modules": Q}, f"(modules is '{Q}', not a list)"),
        ({"modules": [3]}, "its config.json is damaged (modules[0] is 3, not text)"),
        (
            {"modules": ["model.layers.9.self_attn.q_proj"]},
            "config.json says that model.layers.9.self_attn.q_proj is a quantized matrix, but in a "
            "LlamaForCausalLM there is no such module; download or save it again",
        ),
        ({"modules": ["model.norm"]}, "but in a LlamaForCausalLM it is a LlamaRMSNorm"),
        (
            {"codebook": {**GRID, "bits": 3}},
            f"{Q}.codes: config.json asks for I32 [32, 3], and the files hold I32 [32, 2]",
        ),
        (
            {"codebook": {**GRID, "symmetric": False}, "modules": [Q]},
            f"{Q}.step: config.json asks for BF16 [32, 32], and the files hold BF16 [1, 32]",
        ),
    ],
)
def test_a_config_that_does_not_describe_the_files_is_refused(words, reason, copy):
    edit(copy, **words)
    assert reason in refusals(copy)


@pytest.mark.parametrize("left", [0, 4, 500, -10_000, -1])
def test_a_truncated_file_is_refused(left, copy):
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:left])
    line = refusals(copy)
    assert "model.safetensors is damaged or truncated (" in line
    assert line.endswith("); download or save it again")


def test_a_file_that_is_missing_or_something_else_is_refused(copy):
    path = copy / "model.safetensors"
    path.write_bytes(b"<!DOCTYPE html>" + bytes(1000))
    assert "model.safetensors is damaged or truncated" in refusals(copy)
    path.unlink()
    assert "no file named model.safetensors" in refusal(copy)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda x: x.pop(f"{Q}.codes"),
            f"{Q}.codes: config.json asks for I32 [32, 2], and the files hold nothing; download",
        ),
        (lambda x: x.pop(f"{Q}.rescale"), f"{Q}.rescale: config.json asks for BF16 [32], and"),
        (
            lambda x: x.update({f"{Q}.step": x[f"{Q}.step"].half()}),
            f"{Q}.step: config.json asks for BF16 [1, 32], and the files hold F16 [1, 32]",
        ),
        (
            lambda x: x.update({"model.norm.weight": torch.ones(5)}),
            "model.norm.weight: config.json asks for the shape [32], and the files hold [5]",
        ),
        (
            lambda x: x[f"{Q}.step"][0, 3].fill_(torch.nan),
            f"{Q}: a step of its grid is not a positive number: the file is damaged",
        ),
        (
            lambda x: x[f"{Q}.rescale"][3].fill_(-1),
            f"{Q}: a factor of its rescaling is not positive: the file is damaged",
        ),
        (
            lambda x: x[f"{Q}.permutations"].fill_(-1),
            f"{Q}: what should be a permutation of 32 numbers is none: the file is damaged",
        ),
        (
            lambda x: x[f"{Q}.factors"].fill_(torch.inf),
            f"{Q}: a factor of its rotation is no orthogonal matrix: the file is damaged",
        ),
        (
            lambda x: x["model.norm.weight"][7].fill_(torch.nan),
            "model.norm.weight: it holds NaN or infinity, as torch.float32; download or save it",
        ),
        (lambda x: x["lm_head.weight"][3, 5].fill_(torch.nan), "lm_head.weight: it holds NaN or"),
        (
            lambda x: x["model.embed_tokens.weight"][-1, -1].fill_(-torch.inf),
            "model.embed_tokens.weight: it holds NaN or infinity",
        ),
        (
            lambda x: x.update({"model.norm.codes": torch.ones(5, dtype=torch.int32)}),
            "'model.norm.codes': the files hold it, and config.json names no quantized matrix",
        ),
    ],
)
def test_damaged_tensors_are_refused_by_name(change, reason, copy):
    damage(copy, change)
    assert reason in refusals(copy)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda x: x.pop("model.norm.weight"), "1 missing keys such as model.norm.weight"),
        (
            lambda x: x.update({"model.norm.bias": torch.ones(32)}),
            "1 unexpected keys such as model.norm.bias",
        ),
    ],
)
def test_tensors_missing_or_left_over_are_refused(change, reason, copy):
    damage(copy, change)
    assert f"the checkpoint does not fit its config.json: {reason}; download" in refusal(copy)
    assert reason in refusal(copy, lambda folder: load_model(str(folder)))


def test_signs_and_biases_that_are_no_numbers_are_refused_by_name(tmp_path):
    folder = save(quantized("opt", SHARP, blocks=1), tmp_path / "model")
    held = load_file(folder / "model.safetensors")
    signs = next(name for name in held if name.endswith("signs_out"))
    bias = next(name for name in held if name.endswith("k_proj.bias"))
    damage(folder, lambda x: x[bias][2].fill_(torch.inf))
    assert f"{bias}: it holds NaN or infinity" in refusals(folder)
    damage(folder, lambda x: (x[bias].zero_(), x[signs].fill_(torch.nan)))
    assert (
        f"{signs.removesuffix('.signs_out')}: a sign of its Hadamard transform is not finite"
        in refusals(folder)
    )
    damage(folder, lambda x: (x[signs].fill_(1), x[signs][3].fill_(torch.inf)))
    assert "is not finite: the file is damaged" in refusals(folder)


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """The checkpoint of a block with learned codebooks, and the options of these."""
    folder = tmp_path_factory.mktemp("learned") / "model"
    save(quantized("llama", {**VECTORS["2D"], "no_fuse": True}, blocks=1), folder)
    config = json.loads((folder / "config.json").read_text())
    return folder, config["quantization_config"]["codebook"]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ({"dim": 3}, "(dim is 3, not one of 1, 2, 4)"),
        ({"dim": True}, "(dim is True, not one of 1, 2, 4)"),
        ({"bits": 20}, "(bits is 20, not from 1 to 16)"),
        ({"bits": 0}, "(bits is 0, not from 1 to 16)"),
        ({"bits": 9}, "(codes of 9 x 2 bits name more than 2^16 centroids)"),
        ({"weights": 0}, "(weights is 0, not a whole number from 1 to 1e+12 or null)"),
        ({"weights": 256.0}, "(weights is 256.0, not a whole number from 1"),
        ({"columns": 0}, "(columns is 0, not a whole number from 1"),
        ({"entry_bits": 5}, "(entry_bits is 5, not one of 16, 8, 4)"),
        ({"shared": 1}, "(shared is 1, not true or false)"),
        ({"run": 0}, "(run is 0, not a whole number from 1 to 1e+09 or null)"),
        ({"run": 3}, "(runs of 3 weights cut vectors of 2)"),
        ({"rank": 2}, "(codebooks of low rank have one dimension and entries of 16 bits)"),
        (
            {"dim": 1, "entry_bits": 16, "run": None, "rank": 5},
            "(a rank of 5 is above that of 4 centroids)",
        ),
        ({"entry_bits": 4, "run": None}, "(entries of 4 bits need the units of runs of weights)"),
        ({"rank": 10**9}, "(rank is 1000000000, not a whole number from 1 to 65536 or null)"),
        ({"more": 1}, "(its options are ["),
        ({"bits": 8}, f"{Q}.codes: config.json asks for I32 [32, 8], and the files hold I32 [32, "),
        ({"weights": 10**12}, f"{Q}.centroid_scale: config.json asks for BF16 [2, 1], and the f"),
        ({"columns": 1}, f"{Q}.centroid_scale: config.json asks for BF16 [4, 1], and the files h"),
        ({"entry_bits": 4}, f"{Q}.centroids: config.json asks for I32 [2, 2, 4], and the files ho"),
        ({"run": None}, ".scale_codes': the files hold it, and config.json names no quantized"),
    ],
    ids=str,
)
def test_options_of_learned_codebooks_are_checked(words, reason, learned, tmp_path):
    folder = Path(shutil.copytree(learned[0], tmp_path / "copy"))
    edit(folder, codebook={**learned[1], **words})
    assert reason in refusals(folder)


def test_codebooks_of_more_entries_than_any_model_has_are_refused(learned, tmp_path):
    folder = Path(shutil.copytree(learned[0], tmp_path / "copy"))
    path = folder / "config.json"
    config = json.loads(path.read_text()) | {"intermediate_size": 2**24, "hidden_size": 2**24}
    path.write_text(json.dumps(config))
    least = {"dim": 1, "bits": 16, "weights": 1, "columns": 1, "run": None}
    edit(folder, codebook={**learned[1], **least})
    assert "groups of 1 weights have 65536 centroids each, which no model has" in refusals(folder)


NOT_FINITE = f"{Q}: a number of its codebooks is not finite: the file is damaged"


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("centroid_scale", torch.nan, NOT_FINITE),
        ("centroid_scale", 3e38, NOT_FINITE),  # times 127
        ("centroid_scale", 0.0, f"{Q}: a scale of its codebooks is not positive: the file is dam"),
        ("scale_range", torch.inf, f"{Q}: a range of its scales is not finite: the file is damag"),
        ("scale_range", 500.0, f"{Q}: a range of its scales is not finite"),
    ],
)
def test_damaged_codebooks_are_refused_by_name(name, value, reason, learned, tmp_path):
    folder = Path(shutil.copytree(learned[0], tmp_path / "copy"))
    damage(folder, lambda x: x[f"{Q}.{name}"].view(-1)[0].fill_(value))
    assert reason in refusals(folder)


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("codes", lambda x: x[:, :1], "I32 [32, 2], and the files hold I32 [32, 1]"),
        ("centroids", lambda x: x[:, :, 1:], "I8 [2, 2, 16, 2], and the files hold I8 [2, 2, 15,"),
        ("centroids", lambda x: x.float(), "I8 [2, 2, 16, 2], and the files hold F32 [2, 2, 16, "),
        ("scale_range", lambda x: x[:3], "F32 [4, 2], and the files hold F32 [3, 2]"),
    ],
)
def test_codebooks_of_another_shape_are_refused_by_name(name, change, reason, learned, tmp_path):
    folder = Path(shutil.copytree(learned[0], tmp_path / "copy"))
    damage(folder, lambda x: x.update({f"{Q}.{name}": change(x[f"{Q}.{name}"]).contiguous()}))
    assert f"{Q}.{name}: config.json asks for {reason}" in refusals(folder)


@pytest.mark.parametrize(
    ("flags", "name", "reason"),
    [
        (VECTORS["1D"], "centroids", "a number of its codebooks is not finite"),
        ({**VECTORS["1D"], "svd_rank": 0.5}, "left", "a number of its codebooks is not finite"),
        (
            {**VECTORS["4D"], "quant": "gptq", "columns_per_group": 128, "codebook_bits": 4},
            "units",
            "a unit of its weights is not a positive number: the file is damaged",
        ),
    ],
)
def test_entries_that_are_no_numbers_are_refused_by_name(flags, name, reason, tmp_path):
    folder = save(quantized("llama", {**flags, "no_fuse": True}, blocks=1), tmp_path / "model")
    damage(folder, lambda x: x[f"{Q}.{name}"].view(-1)[0].fill_(torch.nan))
    assert f"{Q}: {reason}" in refusals(folder)


@pytest.mark.parametrize("count", [1025, 10**6])
def test_a_config_of_more_layers_than_any_model_has_is_refused_before_one_is_made(count, copy):
    path = copy / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_hidden_layers": count}))
    reason = f"its config.json says num_hidden_layers: {count}, and models of up to 1024 are read"
    assert reason in refusals(copy)
    with pytest.raises(Unavailable, match=reason):
        skeleton(copy)


def test_counts_inside_a_config_are_seen():
    text = hf.Qwen2Config(num_hidden_layers=3000)
    with pytest.raises(Unavailable, match="num_hidden_layers: 3000, and models of up to 1024"):
        check_counts(hf.LlavaConfig(text_config=text))
    with pytest.raises(Unavailable, match="num_local_experts: 100000"):
        check_counts(hf.MixtralConfig(num_local_experts=10**5))
    with pytest.raises(Unavailable, match="moe_num_experts: 100000"):
        check_counts(hf.Ernie4_5_MoeConfig(moe_num_experts=10**5))
    with pytest.raises(Unavailable, match="num_experts_per_tok: 9, and there are 8 experts"):
        check_counts(hf.MixtralConfig(num_experts_per_tok=9))
    check_counts(hf.Qwen2Config(max_window_layers=10**5, vocab_size=10**6))


def test_gaps_of_any_kind_are_refused():
    refuse_gaps("model", {"missing_keys": set(), "error_msgs": []}, ())
    with pytest.raises(Unavailable, match=r"model: .* 2 mismatched keys such as a; download"):
        refuse_gaps("model", {"mismatched_keys": {"b", "a"}}, ())


@pytest.mark.parametrize(
    ("left", "fits"),
    [
        ("h.0.attn.bias", True),  # a mask, where attn holds nothing itself
        ("vision.patch.weight", True),
        ("h.0.attn.q.bias", False),  # q would compute without it
        ("h.1.attn.q.weight", False),  # config.json says one block
        ("h.12.attn.q.weight", False),
    ],
)
def test_what_is_left_over_is_logged_unless_it_is_a_sign_of_another_model(left, fits, caplog):
    info, needed = {"unexpected_keys": {left}}, {"h.0.attn.q.weight", "h.0.norm.weight"}
    if fits:
        refuse_gaps("it", info, needed)
        assert "it: left out 1 entries of its files" in caplog.text
        assert left in caplog.text
    else:
        with pytest.raises(Unavailable, match=f"1 unexpected keys such as {left}; download"):
            refuse_gaps("it", info, needed)


def test_a_checkpoint_without_its_tokenizer_loads_as_a_model_only(copy):
    for path in copy.glob("tokenizer*"):
        path.unlink()
    load(copy)
    line = refusal(copy, lambda folder: load_model(str(folder)))
    assert "no usable tokenizer" in line
    assert "add the tokenizer's files" in line
