"""What is in no format of GPTQ or compressed-tensors, or no model of ours, is one line of it."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch

from quip.errors import QuipError, Unavailable, UnsupportedModel, UsageError
from quip.packed.checkpoint import load
from quip.packed.compressed_tensors.read import import_compressed_tensors
from quip.packed.gptq.read import import_gptq
from tests.support.damage import change
from tests.support.integers import reword, write_ct, write_gptq

pytestmark = pytest.mark.usefixtures("command")

NAME = "model.layers.0.self_attn.q_proj"
READERS = {"gptq": import_gptq, "ct": import_compressed_tensors}


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """A folder of each format."""
    folder = tmp_path_factory.mktemp("theirs")
    write_gptq(folder / "gptq")
    write_ct(folder / "ct")
    return folder


@pytest.fixture
def copies(written, tmp_path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "copies"))


def refusal(folder: Path, kind: type[QuipError]) -> str:
    """The one line with which a folder is refused, and nothing is left behind."""
    out = folder.parent / "out"
    with pytest.raises(QuipError) as caught:
        READERS[folder.name](folder, out)
    line = str(caught.value)
    assert type(caught.value) is kind, line
    assert line.startswith(f"{folder}: ")
    assert "\n" not in line
    assert not out.exists()
    return line


def put(name: str, tensor: torch.Tensor):
    return lambda x: x.update({name: tensor})


def ints(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int32)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ({"quant_method": "awq"}, "was quantized by 'awq', and gptq can be read"),
        ({"bits": 5}, "bits is 5, not one of 2, 3, 4, 8"),
        ({"bits": True}, "bits is True"),
        ({"bits": None}, "bits is missing"),
        ({"group_size": "128"}, "group_size is '128', not a whole number"),
        ({"group_size": -7}, "group_size is -7, not from -1"),
        ({"checkpoint_format": "marlin"}, "are in the format 'marlin' in words of 'int32'"),
        ({"pack_dtype": "int16"}, "in the format 'gptq' in words of 'int16'"),
        ({"dynamic": {"-:x": {"bits": 1}}}, "dynamic is {'-:x': {'bits': 1}}, not a mapping"),
        ({"dynamic": {str(i): {} for i in range(1001)}}, "dynamic is {"),
    ],
)
def test_words_of_gptq_that_are_not_read_are_named(copies, words, reason):
    reword(copies / "gptq", **words)
    assert reason in refusal(copies / "gptq", UnsupportedModel)


def scheme(**words):
    known = {"num_bits": 4, "type": "int", "symmetric": False, "group_size": 32, **words}
    return {"config_groups": {"group_0": {"weights": known}}}


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ({"quant_method": "gptq"}, "was quantized by 'gptq', and compressed-tensors can be read"),
        ({"format": "int-quantized"}, "format is 'int-quantized', not one of"),
        ({"config_groups": {}}, "config_groups is {}, not from 1"),
        (
            {"config_groups": {"group_0": {"weights": None}}},
            "config_groups.group_0.weights is None",
        ),
        (scheme(num_bits=9), "num_bits is 9, not from 2 to 8"),
        (scheme(type="float"), "type is 'float', not one of int"),
        (scheme(strategy="block"), "strategy is 'block', not"),
        (
            {
                "config_groups": {
                    "g": {**scheme()["config_groups"]["group_0"], "input_activations": {}}
                }
            },
            "config_groups.g.input_activations is {}, not null",
        ),
        ({"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme is {'num_bits': 8}, not null"),
        (
            {"transform_config": {"config_groups": {"R1": {}}}},
            "transform_config is {'config_groups'",
        ),
        ({"sparsity_config": {"format": "2:4"}}, "sparsity_config.format is '2:4'"),
    ],
)
def test_words_of_compressed_tensors_that_are_not_read_are_named(copies, words, reason):
    reword(copies / "ct", **words)
    assert reason in refusal(copies / "ct", UnsupportedModel)


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("words", [{"quantization_config": "x"}, {"model_type": "none such"}, None])
def test_a_config_that_is_none_is_damage(copies, name, words):
    path = copies / name / "config.json"
    config = json.loads(path.read_text())
    path.write_text("[]" if words is None else json.dumps({**config, **words}))
    assert "config.json" in refusal(copies / name, Unavailable)


def test_a_folder_without_words_is_not_quantized(copies):
    for name in READERS:
        path = copies / name / "config.json"
        config = json.loads(path.read_text())
        del config["quantization_config"]
        path.write_text(json.dumps(config))
        assert "was quantized by nothing" in refusal(copies / name, UnsupportedModel)


@pytest.mark.parametrize(
    ("kind", "edit", "reason"),
    [
        (
            Unavailable,
            lambda x: x.pop(f"{NAME}.qzeros"),
            f"{NAME}.qzeros: config.json asks for I32",
        ),
        (Unavailable, put(f"{NAME}.qweight", ints(8, 63)), "asks for I32 [8, 64], and the files"),
        (Unavailable, put(f"{NAME}.qweight", ints(8, 64).long()), "and the files have I64 [8, 64]"),
        (Unavailable, put(f"{NAME}.qweight", ints(64)), "and the files have I32 [64]"),
        (Unavailable, put(f"{NAME}.scales", torch.ones(3, 64).half()), "and the files have F16 [3"),
        (Unavailable, put(f"{NAME}.scales", torch.ones(2, 64).double()), "files have F64 [2, 64]"),
        (
            Unavailable,
            put(f"{NAME}.scales", torch.full((2, 64), torch.nan).half()),
            f"{NAME}: a scale of it is not finite",
        ),
        (
            Unavailable,
            put(f"{NAME}.g_idx", ints(63)),
            f"{NAME}.g_idx: config.json asks for I32 [64]",
        ),
        (
            Unavailable,
            put(f"{NAME}.g_idx", ints(64) + 2),
            f"{NAME}.g_idx names groups from 2 to 2, of 2",
        ),
        (Unavailable, put(f"{NAME}.g_idx", ints(64) - 1), "names groups from -1 to -1, of 2"),
        (
            UnsupportedModel,
            put(f"{NAME}.g_idx", ints(64)),
            "its groups of inputs are not of 32 each",
        ),
        (
            UnsupportedModel,
            put(f"{NAME}.bias", torch.ones(64).half()),
            f"{NAME}.bias is in the files, and the model of this config.json has none",
        ),
        (UnsupportedModel, put(f"{NAME}.other", torch.ones(1)), f"{NAME}.other is in the files"),
        (Unavailable, lambda x: x.pop("model.norm.weight"), "model.norm.weight: config.json asks"),
        (
            UnsupportedModel,
            lambda x: x.update({"model.embed_tokens.qweight": ints(1)}),
            "in a LlamaForCausalLM of transformers it is a Embedding",
        ),
        (
            UnsupportedModel,
            lambda x: x.update({"model.layers.0.mlp.experts.0.up_proj.qweight": ints(1)}),
            "of transformers there is no such module; name the folder of a model whose",
        ),
        (UnsupportedModel, put("two\nlines.qweight", ints(1)), "'two\\nlines' is a matrix"),
        (
            Unavailable,
            lambda x: [x.pop(key) for key in list(x) if key.endswith(".qweight")],
            "its files hold no packed matrix (qweight)",
        ),
    ],
)
def test_tensors_of_gptq_that_do_not_fit_are_named(copies, kind, edit, reason):
    change(copies / "gptq", edit)
    assert reason in refusal(copies / "gptq", kind)


@pytest.mark.parametrize(
    ("kind", "edit", "reason"),
    [
        (
            Unavailable,
            put(f"{NAME}.weight_packed", ints(64, 9)),
            f"{NAME}.weight_packed: config.json asks for I32 [64, 8], and the files have I32 [64,",
        ),
        (Unavailable, put(f"{NAME}.weight_scale", torch.ones(64)), "files have F32 [64]"),
        (
            Unavailable,
            lambda x: x.pop(f"{NAME}.weight_zero_point"),
            f"{NAME}.weight_zero_point: config.json asks for I32 [8, 2], and the files have none",
        ),
        (
            Unavailable,
            put(f"{NAME}.weight_shape", torch.tensor([64, 65])),
            f"{NAME}.weight_shape says [64, 65], of a matrix of [64, 64]",
        ),
        (
            Unavailable,
            put(f"{NAME}.weight_scale", torch.full((64, 2), torch.inf)),
            f"{NAME}: a scale of it is not finite",
        ),
        (
            UnsupportedModel,
            put(f"{NAME}.weight_g_idx", ints(64) + 7),
            "its groups of inputs are not of 32 each",
        ),
        (
            UnsupportedModel,
            put(f"{NAME}.input_scale", torch.ones(1)),
            "input_scale is in the files",
        ),
    ],
)
def test_tensors_of_compressed_tensors_that_do_not_fit_are_named(copies, kind, edit, reason):
    change(copies / "ct", edit)
    assert reason in refusal(copies / "ct", kind)


def test_groups_that_do_not_fill_a_row_are_named(copies):
    reword(copies / "ct", **scheme(group_size=48))
    line = refusal(copies / "ct", UnsupportedModel)
    assert "its 64 inputs are in no whole groups of 48" in line


def test_shapes_of_two_schemes_are_no_answer(copies):
    """Groups of 33 as well as of 32 cut 64 inputs in two."""
    reword(copies / "gptq", dynamic={"+:.*": {"group_size": 33}})
    line = refusal(copies / "gptq", UnsupportedModel)
    assert "its tensors may be in groups of 32 or of 33 inputs" in line


@pytest.mark.parametrize("name", READERS)
def test_files_that_are_missing_or_damaged_are_named(copies, name):
    path = copies / name / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "model.safetensors is damaged" in refusal(copies / name, Unavailable)
    path.rename(path.with_name("pytorch_model.bin"))
    assert "pytorch_model.bin is a pickle" in refusal(copies / name, Unavailable)
    for tokens in (copies / name).glob("tokenizer*"):
        tokens.unlink()
    shutil.rmtree(copies / name)
    assert "no config.json that can be read" in refusal(copies / name, Unavailable)


@pytest.mark.parametrize("name", READERS)
def test_the_model_itself_is_never_overwritten(copies, name):
    for out in (copies / name, copies):
        with pytest.raises(UsageError, match="the model is in it, and would be lost"):
            READERS[name](copies / name, out, overwrite=True)


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("seed", range(5))
def test_whatever_bytes_are_there_the_answer_is_one_line_or_a_checkpoint(copies, name, seed):
    """Bytes of the headers, of the words and of the weights, changed at random."""
    rng = random.Random(f"{name} {seed}")
    path = copies / name / rng.choice(["config.json", "model.safetensors", "model.safetensors"])
    data = bytearray(path.read_bytes())
    end = min(len(data), 4000) if rng.random() < 0.7 else len(data)
    for _ in range(rng.choice([1, 3, 30])):
        data[rng.randrange(8, end)] = rng.choice([0, 34, 45, 48, 57, 123, 255, rng.randrange(256)])
    path.write_bytes(data)
    line = None
    try:
        READERS[name](copies / name, copies / "out")
    except QuipError as error:
        line = str(error)
    if line is None:
        load(copies / "out")
    else:
        assert "\n" not in line
        assert not (copies / "out").exists()
