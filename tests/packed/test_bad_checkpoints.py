"""Folders that are no checkpoints, or damaged ones, are refused in one line that says why."""

import pytest
import torch

from quip.errors import Unavailable, UnsupportedModel
from quip.model.load import load_model
from quip.packed.checkpoint import check_folder, load
from quip.packed.gaps import refuse_gaps
from tests.support.checkpoints import damage, edit, refusal, refusals
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
        assert "its config.json is no JSON object" in line
    (copy / "config.json").unlink()
    assert "not a checkpoint, it has no config.json that can be read" in refusal(copy)


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


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (
            {"format": 3},
            "a checkpoint of format 3, and this version of quip reads formats 1 and 2: upgrad",
        ),
        ({"format": None}, "a checkpoint of format None, and this version of quip reads formats 1"),
        ({"format": "x"}, "reads formats 1 and 2: its config.json is damaged; download or save it"),
        ({"format": 2}, "its config.json lacks 'specs' (a list of specifications); download or"),
        ({"format": 2, "specs": {}}, "its config.json lacks 'specs' (a list of specifications)"),
        ({"format": 2, "specs": ["grid"]}, "its config.json lacks 'specs' (a list of specific"),
        ({"format": 2, "specs": [{"codebook": GRID}]}, "its config.json lacks 'transforms' (a"),
        (
            {"format": 2, "specs": 2 * [{"codebook": GRID, "transforms": [], "modules": [Q]}]},
            f"its config.json names the matrix {Q} twice; download or save it again",
        ),
        (
            {"format": 2, "specs": [{"codebook": GRID, "transforms": [], "modules": []}]},
            "its config.json has a specification that names no matrix; download or save it",
        ),
        (
            {"format": 2, "specs": [{"codebook": GRID, "transforms": [{}], "modules": [Q]}]},
            "its matrices have a transform of kind None",
        ),
        ({"codebook": {**GRID, "kind": "e8p"}}, "have a codebook of kind 'e8p'"),
        ({"codebook": {"kind": "grid"}}, "have a codebook {'kind': 'grid'}, which this version"),
        ({"transforms": [{"kind": "fft"}]}, "have a transform of kind 'fft'"),
        ({"codebook": None}, "its config.json lacks 'codebook' (a dict); download or save it"),
        ({"codebook": ["grid"]}, "its config.json lacks 'codebook' (a dict)"),
        ({"transforms": {}}, "its config.json lacks 'transforms' (a list)"),
        ({"modules": None}, "its config.json lacks 'modules' (a list)"),
        ({"modules": Q}, "its config.json lacks 'modules' (a list)"),
        ({"modules": [3]}, "config.json says that 3 is a quantized matrix, but in a Llama"),
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
            lambda x: x.update({f"{Q}.weight": torch.ones(32, 32)}),
            f"1 unexpected keys such as {Q}.weight",
        ),
    ],
)
def test_tensors_missing_or_left_over_are_refused(change, reason, copy):
    damage(copy, change)
    assert f"the checkpoint does not fit its config.json: {reason}; download" in refusal(copy)
    assert reason in refusal(copy, lambda folder: load_model(str(folder)))


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
