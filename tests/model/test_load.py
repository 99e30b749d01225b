"""Models by folder, .gguf file, hub id and `demo`; whatever is wrong with one is said in a line."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from quip.errors import QuipError, UsageError
from quip.model.load import check_seqlen, load_model
from tests.support.gguf_files import write_gguf
from tests.support.tiny import logits, tiny
from tests.support.tokenizer import save_tokenizer


@pytest.fixture(scope="session")
def saved(tmp_path_factory) -> Path:
    """A folder with a complete tiny OPT in bfloat16."""
    folder = tmp_path_factory.mktemp("models") / "opt"
    tiny("opt", dtype=torch.bfloat16).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def edit(folder: Path, **changes: object) -> str:
    """The folder, with these changes to its config.json; None removes a key."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: x for key, x in config.items() if x is not None}))
    return str(folder)


def refusal(name: str | Path, **options) -> str:
    """The one line with which a model is refused."""
    with pytest.raises(QuipError) as caught:
        load_model(str(name), **options)
    assert "\n" not in str(caught.value)
    return f"{type(caught.value).__name__}: {caught.value}"


def test_a_folder_gives_the_saved_model_ready_for_evaluation(saved):
    loaded = load_model(str(saved), dtype="bfloat16")
    # A tied head was not saved on its own, and is not missing.
    assert loaded.model.lm_head.weight is loaded.model.model.decoder.embed_tokens.weight
    assert torch.equal(logits(loaded.model), logits(tiny("opt", "sdpa", dtype=torch.bfloat16)))
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert loaded.name == str(saved)
    assert loaded.max_length == 32
    assert loaded.tokenizer("ba").input_ids == [3, 2]


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("auto", torch.float32),
        ("float32", torch.float32),
        ("bfloat16", torch.bfloat16),
        ("float16", torch.float16),
    ],
)
def test_the_dtype_is_the_one_asked_for_and_float32_by_default(saved, dtype, expected):
    model = load_model(str(saved), dtype=dtype).model
    assert {parameter.dtype for parameter in model.parameters()} == {expected}


def test_demo_is_inside_the_package():
    loaded = load_model("demo")
    assert loaded.name == "demo"
    assert loaded.tokenizer("import os").input_ids
    assert loaded.max_length >= 128


def test_unknown_dtypes_are_refused(saved):
    assert "unknown dtype 'int8'; choose from auto, float32" in refusal(saved, dtype="int8")


def test_seqlen_is_checked_against_the_positions_of_the_model(saved):
    loaded = load_model(str(saved), seqlen=32)
    check_seqlen(loaded.name, loaded.max_length, 2)
    for seqlen in (33, 1):
        with pytest.raises(UsageError, match=f"seqlen {seqlen}"):
            check_seqlen(loaded.name, loaded.max_length, seqlen)
    assert "seqlen 33 is above the 32 positions" in refusal(saved, seqlen=33)


def test_a_model_without_positions_takes_any_seqlen(tmp_path):
    tiny("bloom").save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    assert load_model(str(tmp_path)).max_length == sys.maxsize


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("nobody/nothing", "Unavailable: nobody/nothing is no local folder, and as a hub id:"),
        ("./not/there", "Unavailable: ./not/there: no such file or folder"),
        ("not-there.gguf", "Unavailable: not-there.gguf: no such file or folder"),
        (__file__, "is a file other than .gguf; give the folder"),
    ],
)
def test_a_model_that_is_not_there_is_unavailable(name, reason):
    assert reason in refusal(name)


def test_damaged_folders_are_unavailable_with_the_reason(copy):
    weights = copy / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: len(data) // 2])
    assert "Unavailable" in (line := refusal(copy))
    assert "weights cannot be read" in line
    weights.unlink()
    assert "no file named model.safetensors" in refusal(copy)
    (copy / "tokenizer.json").unlink()
    (copy / "tokenizer_config.json").unlink()
    assert "no usable tokenizer" in refusal(copy)
    (copy / "config.json").write_text("{")
    assert "not a valid JSON file; repair the files there" in refusal(copy)
    (copy / "config.json").unlink()
    assert "no config.json" in refusal(copy)


def test_weights_that_would_be_made_up_are_never_accepted(copy):
    name = edit(copy, num_hidden_layers=5)
    assert "missing keys such as model.decoder.layers.4" in refusal(name)
    name = edit(copy, num_hidden_layers=3)
    assert "unexpected keys such as model.decoder.layers.3" in refusal(name)
    name = edit(copy, num_hidden_layers=4, ffn_dim=40)
    assert "Unavailable" in refusal(name)


def test_a_vocabulary_that_is_one_off_is_named_with_both_shapes(copy):
    line = refusal(edit(copy, vocab_size=63))
    assert "mismatched keys such as" in line
    assert "embed_tokens.weight" in line
    assert "64" in line
    assert "63" in line


def add_token(folder: Path, **how) -> str:
    """The folder, with one more token than the embedding has rows."""
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens("zork", **how)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_tokens_without_a_row_are_refused_after_loading(copy):
    file = copy / "tokenizer.json"
    words = json.loads(file.read_text())
    words["model"]["vocab"] |= {"zork": 64}
    file.write_text(json.dumps(words))
    line = refusal(copy)
    assert "gives 1 tokens, such as 'zork', beyond the 64 rows of its embedding" in line


def test_an_added_token_without_a_row_is_refused_where_a_text_spells_it(copy):
    loaded = load_model(add_token(copy))
    assert logits(loaded.model).isfinite().all()
    ids = torch.tensor([loaded.tokenizer("a zork b").input_ids])
    with pytest.raises(UsageError, match="a token, 64, that is beyond the 64 rows"):
        loaded.model(input_ids=ids)


def test_a_first_token_without_a_row_is_refused_after_loading(copy):
    name = add_token(copy, special_tokens=True)
    file = copy / "tokenizer.json"
    words = json.loads(file.read_text())
    words["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "zork", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"zork": {"id": "zork", "ids": [64], "tokens": ["zork"]}},
    }
    file.write_text(json.dumps(words))
    assert "such as 'zork', beyond the 64 rows" in refusal(name)


@pytest.mark.parametrize("name", ["x" * 300, "y" * 33_000, "a/" * 3000, "z" * 300 + ".gguf"])
def test_names_that_lead_nowhere_are_refused_in_a_line(name):
    assert "no such file or folder" in (line := refusal(name))
    assert len(line) < 500


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "model.gguf")
    assert "neither a file nor a folder" in refusal(tmp_path / "model.gguf")


def test_foreign_text_in_a_refusal_is_bounded(copy):
    for changes in (
        {"model_type": "zork" * 9000},
        {"quantization_config": {"quant_method": "x" * 33_000}},
        {"architectures": ["Zork" * 9000]},
    ):
        assert len(refusal(edit(copy, **changes)).replace(str(copy), "")) < 600


def test_the_masks_that_older_files_hold_are_left_out(tmp_path, caplog):
    model = tiny("gptj")
    model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    path, masks = tmp_path / "model.safetensors", {}
    for block in range(4):
        masks[f"transformer.h.{block}.attn.bias"] = torch.ones(1, 1, 32, 32).tril().bool()
        masks[f"transformer.h.{block}.attn.masked_bias"] = torch.tensor(-1e9)
    save_file(load_file(path) | masks, path, metadata={"format": "pt"})
    assert torch.equal(logits(load_model(str(tmp_path)).model), logits(tiny("gptj")))
    assert "left out 8 entries of its files" in caplog.text
    bias = {"transformer.h.1.attn.q_proj.bias": torch.ones(32)}
    save_file(load_file(path) | bias, path, metadata={"format": "pt"})
    assert "1 unexpected keys such as transformer.h.1.attn.q_proj.bias" in refusal(tmp_path)


def test_models_that_do_not_predict_the_next_token_are_unsupported(tmp_path, copy):
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
    hf.BertForMaskedLM(hf.BertConfig(**small)).save_pretrained(tmp_path / "bert")
    assert "BertForMaskedLM, not a causal language model" in refusal(tmp_path / "bert")
    hf.T5Config(architectures=["T5Model"]).save_pretrained(tmp_path / "t5")
    assert "encoder-decoder" in refusal(tmp_path / "t5")
    hf.ViTConfig().save_pretrained(tmp_path / "vit")
    assert "vit, not a causal language model" in refusal(tmp_path / "vit")
    assert "does not recognize" in refusal(edit(copy, model_type="zork"))
    custom = {"AutoConfig": "config.Zork", "AutoModelForCausalLM": "model.Zork"}
    assert "needs Python code from its own repository" in refusal(edit(copy, auto_map=custom))


def test_a_quantized_checkpoint_is_unsupported(copy):
    name = edit(copy, quantization_config={"quant_method": "gptq", "bits": 4})
    assert "quantized already (gptq)" in refusal(name)


def test_a_gguf_file_gives_the_model_and_tokenizer_that_were_put_in(tmp_path):
    model = tiny("llama", "sdpa")
    write_gguf(tmp_path / "llama.gguf", model)
    loaded = load_model(str(tmp_path / "llama.gguf"), seqlen=32)
    assert loaded.max_length == 32
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.float32}
    # The file holds float32, so only its rounding of the norm's epsilon is lost.
    torch.testing.assert_close(logits(loaded.model), logits(model))
    assert loaded.tokenizer("ba").input_ids[-2:] == [3, 2]
    assert "seqlen 33" in refusal(tmp_path / "llama.gguf", seqlen=33)


def test_gguf_files_that_cannot_be_read_are_refused_with_the_reason(tmp_path, monkeypatch):
    path = tmp_path / "model.gguf"
    write_gguf(path, tiny("llama"), architecture="opt")
    assert "UnsupportedModel" in (line := refusal(path))
    assert "architecture 'opt'" in line
    data = path.read_bytes()
    for size in (3, len(data) // 100, len(data) // 2, len(data) - 5):
        path.write_bytes(data[:size])
        assert "Unavailable" in (line := refusal(path))
        assert "not a GGUF file, or a truncated one" in line
    path.write_text("hello")
    assert "not a GGUF file" in refusal(path)
    monkeypatch.setattr("quip.model.located.find_spec", lambda package: None)
    assert "pip install -e '.[gguf]' (in a checkout of quip)" in refusal(path)
