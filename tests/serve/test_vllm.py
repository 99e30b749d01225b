"""The plugin in vLLM itself, without an engine: found, configs read, weights where they belong."""
# ruff: noqa: E402  (vLLM is imported where it is installed)

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import quip
from quip.errors import QuipError
from quip.packed.hub import METHOD
from tests.support.engines import CHECKPOINTS, save_wide

pytestmark = pytest.mark.vllm
pytest.importorskip("vllm")

from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, get_quantization_config

from quip.serve.vllm import register
from quip.serve.vllm.config import QuipQuantization
from tests.support.vllm_models import expected, join, packed_layers, read


@pytest.fixture(scope="module", autouse=True)
def process(tmp_path_factory):
    """The only one."""
    join(tmp_path_factory.mktemp("meeting") / "file")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """folder(kind): a checkpoint, made once."""
    root, made = tmp_path_factory.mktemp("checkpoints"), {}

    def make(kind: str):
        if kind not in made:
            made[kind] = save_wide(root / kind.replace(" ", "-"), kind)
        return made[kind]

    return make


def test_vllm_finds_the_plugin_and_may_call_it_again():
    for _ in range(2):
        register()
        assert QUANTIZATION_METHODS.count(METHOD) == 1
        assert get_quantization_config(METHOD) is QuipQuantization


@pytest.mark.parametrize("kind", [*CHECKPOINTS, "mixed"])
def test_every_layer_is_bitwise_that_of_quip(kind, folder):
    model, ours = read(folder(kind)), quip.load(folder(kind))
    merged, layers = model.packed_modules_mapping, packed_layers(model)
    assert len(layers) == 8
    for name, layer in layers.items():
        assert {key for key, _ in layer.named_parameters()} <= {"bias"}
        x = torch.randn(3, layer.input_size)
        with torch.inference_mode():
            assert torch.equal(layer(x)[0], torch.cat(expected(ours, name, merged, x), -1)), name


def test_a_stack_is_one_product_and_a_matrix_of_another_kind_one_more(folder):
    layers = packed_layers(read(folder("mixed")))
    counts = [len(layers[f"model.layers.{i}.self_attn.qkv_proj"].packed) for i in range(2)]
    assert counts == [2, 1]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_halves_are_computed_as_quip_does(dtype, folder):
    kind = "qwen2 of stacks"
    model = read(folder(kind), dtype)
    ours = quip.load(folder(kind), dtype=getattr(torch, dtype))
    for name, layer in packed_layers(model).items():
        x = torch.randn(3, layer.input_size, dtype=getattr(torch, dtype))
        with torch.inference_mode():
            y = layer(x)[0]
            assert y.dtype == x.dtype
            whole = torch.cat(expected(ours, name, model.packed_modules_mapping, x), -1)
            assert torch.equal(y, whole), name


GRID = {"kind": "grid", "bits": 2, "group": 1, "symmetric": True}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"format": 3}, "format 3.*upgrade quip"),
        ({"codebook": {"kind": "spheres"}}, "'spheres'.*upgrade quip"),
        ({"modules": []}, "names no quantized matrix"),
        ({"modules": ["lm_head"]}, "lm_head is packed.*quip export --dense"),
        ({"modules": ["a.experts.3.up_proj"]}, "a.experts.3.up_proj.*no mixtures.*quip serve"),
    ],
)
def test_what_cannot_be_run_is_refused_by_name_as_the_config_is_read(words, message):
    config = {"format": 1, "codebook": GRID, "transforms": [], "modules": ["a.b"], **words}
    with pytest.raises(QuipError, match=message):
        QuipQuantization.from_config(config)


def lose(tensors, name):
    del tensors[name]


def shorten(tensors, name):
    tensors[name] = tensors[name][:-1].clone()


def add_dense(tensors, name):
    tensors[f"{name.removesuffix('.stack.codes')}.weight"] = torch.zeros(2, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lose, "qkv_proj: its files hold no codes"),
        (shorten, r"qkv_proj.codes: config.json asks for torch.int32 \[256, 8\]"),
        (add_dense, "qkv_proj: packed by its config.json, and dense in its files"),
    ],
)
def test_files_that_do_not_fit_are_refused_by_name(change, message, folder, tmp_path):
    broken = shutil.copytree(folder("llama of stacks"), tmp_path / "broken")
    file = broken / "model.safetensors"
    tensors = {name: x.clone() for name, x in load_file(file).items()}
    change(tensors, "model.layers.1.self_attn.q_proj.stack.codes")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(QuipError, match=message):
        read(broken)


def test_a_matrix_that_vllm_does_not_have_is_refused(folder, tmp_path):
    other = shutil.copytree(folder("opt"), tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config["quantization_config"]["modules"].append("model.decoder.layers.7.fc1")
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(QuipError, match=r"layers\.7\.fc1"):
        read(other)
