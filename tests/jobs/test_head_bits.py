"""`--head_bits`: embedding and head are packed too, tied or untied as the model has it."""

import copy
import json
import shutil

import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

import quip as package
from quip.cli import main
from quip.errors import QuipError, UnsupportedModel
from quip.jobs.evaluate import Evaluation, run_evaluation
from quip.jobs.inspect import inspect_checkpoint
from quip.jobs.report.text import table, tables_words
from quip.model.tables import pack_tables
from quip.packed.checkpoint import load, to_dense
from quip.packed.embedding import QuantizedEmbedding, TiedHead
from quip.packed.linear import QuantizedLinear
from tests.support.runs import save_model, write_text
from tests.support.tiny import tiny, tokens

TIED = {"opt": True, "llama": False}


@pytest.fixture(scope="module", params=TIED)
def saved(request, tmp_path_factory):
    """A kind of model, and a checkpoint with its embedding and head at 5 bits."""
    folder = tmp_path_factory.mktemp(request.param)
    model = save_model(folder / "model", request.param, positions=64)
    text = write_text(folder / "train.txt", 2000)
    line = f"run {model} {text} --wbits 3 --incoh_processing --nsamples 4 --seqlen 16 --head_bits 5"
    where = f"--eval_datasets {text} --eval_nsamples 3 --device cpu --save {folder / 'saved'}"
    assert main([*line.split(), *where.split(), "--out", str(folder / "run")]) == 0
    return request.param, folder, text


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(input_ids=tokens(2) % 26).logits


def parts(model) -> tuple[nn.Module, nn.Module]:
    return model.get_input_embeddings(), model.get_output_embeddings()


def test_rows_are_those_of_the_matrix_in_the_dtype_of_the_model():
    model = tiny("opt")
    pack_tables(model, 6, device="cpu")
    rows, head = parts(model)
    ids = torch.tensor([[3, 0, 63], [7, 7, 1]])
    assert torch.equal(rows(ids), rows.dequantize()[ids])
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(head(x), x @ rows.dequantize().T, atol=1e-5)
    model.to(torch.bfloat16)
    assert rows(ids).dtype == model.dtype == torch.bfloat16
    assert rows.step.dtype == torch.bfloat16
    assert torch.equal(rows(ids), rows.dequantize()[ids].bfloat16())
    twin = copy.deepcopy(model)
    assert parts(twin)[1].embedding is parts(twin)[0]


@pytest.mark.parametrize("bits", [4, 8])
def test_more_bits_are_closer(bits):
    for name, is_tied in TIED.items():
        model = tiny(name)
        W = [module.weight.detach() for module in parts(model)]
        records = pack_tables(model, bits, device="cpu")
        heads = [record.tied for record in records]
        assert heads == (["lm_head"] if is_tied else [None, None])
        for record, of in zip(records, W, strict=False):
            assert 0 < record.error < 3 * 4.0**-bits
            found = model.get_submodule(record.name).dequantize()
            assert record.error == pytest.approx(float((found - of).norm() / of.norm()) ** 2)


def test_a_checkpoint_loads_as_it_was_saved(saved):
    name, folder, _ = saved
    model = load(folder / "saved")
    rows, head = parts(model)
    assert type(rows) is QuantizedEmbedding
    assert type(head) is (TiedHead if TIED[name] else QuantizedLinear)
    config = json.loads((folder / "saved" / "config.json").read_text())
    assert config["quantization_config"]["format"] == 3
    again = package.load(folder / "saved")
    assert torch.equal(logits(model), logits(again))
    bare = AutoModel.from_pretrained(folder / "saved")
    ids = tokens(2) % 26
    with torch.no_grad():
        states = bare(input_ids=ids).last_hidden_state
        expected = model.base_model(input_ids=ids).last_hidden_state
    assert torch.equal(states, expected)
    model.save_pretrained(folder / "copy")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder / "copy")), logits(model))


def test_dense_it_is_the_plain_model_again(saved, tmp_path):
    name, folder, _ = saved
    model = load(folder / "saved")
    expected = logits(model)
    dense = to_dense(model)
    rows, head = parts(dense)
    assert (head.weight is rows.weight) == TIED[name]
    assert torch.allclose(logits(dense), expected, atol=2e-4 * float(expected.abs().max()))
    dense.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert plain.config.tie_word_embeddings == TIED[name]
    assert torch.equal(logits(plain), logits(dense))


def test_the_report_counts_them_apart_and_together(saved):
    name, folder, _ = saved
    report = json.loads((folder / "saved" / "run.json").read_text())
    tables, blocks = report["tables"], report["totals"]
    assert len(tables["tables"]) == (1 if TIED[name] else 2)
    assert tables["weights"] == len(tables["tables"]) * 64 * 32
    words = tables_words(tables)
    assert words in table(report)
    assert words in (folder / "saved" / "README.md").read_text()
    found = inspect_checkpoint(folder / "saved")
    assert found["bits_per_weight_of_tables"] == pytest.approx(tables["bits_per_weight"])
    assert found["bits_per_weight_of_blocks"] == pytest.approx(blocks["bits_per_weight"])
    assert found["bits_per_weight"] == pytest.approx(tables["bits_per_weight_with_matrices"])
    for stream in ("off", "on"):
        asked = Evaluation(model=str(folder / "saved"), device="cpu", stream=stream)
        assert run_evaluation(asked)["perplexity"] == report["perplexity"]


def test_a_streamed_run_saves_the_same(saved, quip):
    _, folder, text = saved
    line = ("run", folder / "model", text, "--wbits", 3, "--incoh_processing", "--head_bits", 5)
    where = ("--nsamples", 4, "--seqlen", 16, "--eval_datasets", "none", "--device", "cpu")
    status, *_ = quip(*line, *where, "--stream", "on", "--save", folder / "streamed")
    assert status == 0
    assert torch.equal(logits(load(folder / "streamed")), logits(load(folder / "saved")))


def test_a_run_is_taken_up_with_the_same_bits_only(saved, quip):
    _, folder, text = saved
    line = ("run", folder / "model", text, "--wbits", 3, "--incoh_processing", "--nsamples", 4)
    where = ("--seqlen", 16, "--eval_datasets", "none", "--device", "cpu", "--out", folder / "run")
    status, _, err = quip(*line, *where, "--head_bits", 6, "--resume")
    assert status != 0
    assert "head_bits" in err[-1]
    assert quip(*line, *where, "--head_bits", 5, "--resume")[0] == 0


def test_what_is_more_than_a_lookup_is_refused():
    with pytest.raises(UnsupportedModel, match="--head_bits: the embedding of a Gemma2ForCausalLM"):
        pack_tables(tiny("gemma2"), 4, device="cpu")


def test_flags_that_mean_nothing_are_refused(quip):
    status, _, err = quip("run", "demo", "pydoc", "--head_bits", 6)
    assert status == 2
    assert "--head_bits needs weights to quantize" in err[-1]
    status, _, err = quip("run", "demo", "pydoc", "--wbits", 3, "--head_bits", 3)
    assert status == 2


def test_a_config_that_names_another_embedding_is_damaged(saved, tmp_path):
    _, folder, _ = saved
    bad = shutil.copytree(folder / "saved", tmp_path / "bad")
    words = json.loads((bad / "config.json").read_text())
    config = words["quantization_config"]
    rotated = next(part["modules"][0] for part in config["specs"] if part["transforms"])
    for embeddings, reason in (
        (["lm_head.x"], "'lm_head.x' is an embedding, and not what its tensors mean"),
        ([rotated], f"the embedding '{rotated}' is of the codebook grid or rotated"),
        ([3], r"embeddings\[0\] is 3"),
        ("a", "embeddings is 'a', not a list"),
        (5, "embeddings is 5, not a list"),
    ):
        config["embeddings"] = embeddings
        config["tied"] = {}
        (bad / "config.json").write_text(json.dumps(words))
        with pytest.raises(QuipError, match=reason):
            load(bad)
    config |= {"embeddings": 5, "format": 1}
    (bad / "config.json").write_text(json.dumps(words))
    with pytest.raises(QuipError, match="damaged"):
        load(bad)
