"""Which matrices of a checkpoint are packed, and as what: of one specification, and of several."""

import json
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from quip.errors import UsageError
from quip.packed import hub
from quip.packed.checkpoint import load
from quip.packed.layout import Layout
from quip.packed.linear import quantized_layers
from quip.packed.quip_sharp.write import published_tensors
from tests.support.checkpoints import SHARP, mixed, quantized, refusals, save
from tests.support.damage import body_of
from tests.support.tiny import VOCAB, tokens

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return mixed()


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory) -> Path:
    return save(model, tmp_path_factory.mktemp("mixed") / "model")


def words(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=tokens(3), use_cache=False).logits


def test_a_checkpoint_of_several_specifications_is_loaded_as_it_was_saved(model, saved):
    loaded, layout = load(saved), Layout.of(model)
    assert Layout.of(loaded) == layout
    assert len(layout.specs) == 3
    assert len(layout.names) == 21
    assert torch.equal(logits(loaded), logits(model))
    for name, layer in quantized_layers(model).items():
        ours = loaded.get_submodule(name)
        assert ours.spec == layer.spec
        assert all(torch.equal(x, layer.stored()[key]) for key, x in ours.stored().items())


def test_it_is_written_as_format_2(model, saved):
    found = words(saved)
    assert (found["format"], {*found}) == (2, {"quant_method", "format", "specs"})
    assert [part["codebook"]["kind"] for part in found["specs"]] == ["grid", "lattice", "grid"]
    assert Layout.from_json(found) == Layout.of(model)


def test_a_reader_of_format_1_alone_asks_for_an_upgrade(saved, monkeypatch):
    monkeypatch.setattr(hub, "FORMATS", (1,))
    assert refusals(saved).endswith(
        "a checkpoint of format 2, and this version of quip reads formats 1: upgrade quip"
    )


def test_one_specification_is_written_as_format_1(tmp_path):
    model = quantized("llama", SHARP, blocks=1)
    found = words(save(model, tmp_path / "model"))
    assert {*found} == {"quant_method", "format", "codebook", "transforms", "modules", "stacks"}
    assert found["format"] == 1
    assert found["modules"] == sorted(found["modules"])
    layout = Layout.of(model)
    assert found["stacks"] == [list(names) for names in sorted(layout.stacks)]
    (spec,) = layout.specs
    assert found["codebook"] == spec.codebook


def test_a_checkpoint_of_format_1_that_was_written_before_loads_and_computes_the_same(tmp_path):
    """Its config.json is written out here, word for word as the first version wrote it."""
    model = quantized("llama", {"wbits": 2, "incoh_processing": True}, blocks=1)
    folder = save(model, tmp_path / "model")
    parts = ("mlp.down_proj", "mlp.gate_proj", "mlp.up_proj", "self_attn.k_proj")
    parts = (*parts, "self_attn.o_proj", "self_attn.q_proj", "self_attn.v_proj")
    before = {
        "quant_method": "quip",
        "format": 1,
        "codebook": {"kind": "grid", "bits": 2, "group": 1, "symmetric": True},
        "transforms": [
            {"kind": "rescale"},
            {"kind": "kronecker", "blocked": False, "permute": True},
        ],
        "modules": [f"model.layers.0.{part}" for part in parts],
    }
    assert words(folder) == before  # so that a reader of before reads it
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = before
    (folder / "config.json").write_text(json.dumps(config))
    assert torch.equal(logits(load(folder)), logits(model))


def test_a_loaded_model_of_several_specifications_is_saved_again_alike(saved, tmp_path):
    load(saved).save_pretrained(tmp_path / "again")
    assert words(tmp_path / "again") == words(saved)
    ours, theirs = (x / "model.safetensors" for x in (tmp_path / "again", saved))
    assert body_of(ours) == body_of(theirs)


def test_the_published_layout_of_quip_sharp_has_no_place_for_two_specifications(model):
    with pytest.raises(UsageError, match=r"are of 3 specifications .*--plan, or .* --dense"):
        published_tensors(model)


def test_the_example_of_the_documentation_is_read():
    text = (Path(__file__).parents[2] / "docs" / "format.md").read_text()
    blocks = [block.partition("```")[0] for block in text.split("```json\n")[1:]]
    one, several = (json.loads(block) for block in blocks)
    assert (one["format"], several["format"]) == (1, 2)
    for example in (one, several):
        layout = Layout.from_json(example)
        assert layout.format == example["format"]
        assert {"quant_method": "quip", "format": layout.format, **layout.to_json()} == example


def test_a_layout_of_nothing_names_nothing():
    layout = Layout.of(torch.nn.Linear(VOCAB, 2))
    assert (layout.names, layout.specs) == ((), ())
    assert Layout.from_json(json.loads(json.dumps(layout.to_json()))) == layout
