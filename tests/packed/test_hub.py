"""from_pretrained loads what quip saved, after `import quip` and nothing else."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, pipeline
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

import quip
from quip.errors import QuipError
from quip.packed import hub
from quip.packed.checkpoint import to_dense
from quip.packed.digests import DIGESTS
from quip.packed.hub import QuipConfig, QuipQuantizer
from quip.packed.linear import QuantizedLinear, quantized_layers
from tests.laws import assert_near
from tests.support.checkpoints import INCOHERENT, VECTORS, fresh, mixed, quantized, save
from tests.support.damage import body_of, header_of
from tests.support.tiny import logits, tokens

Q = "model.layers.0.self_attn.q_proj"
NAMES = ["opt", "opt-350m", "llama", "gemma2"]


@pytest.fixture(scope="module")
def models():
    made = {name: quantized(name, blocks=3) for name in NAMES}
    return {**made, "several specifications": mixed()}


@pytest.fixture(scope="module")
def saved(models, tmp_path_factory) -> Path:
    """A folder with a checkpoint of each model, and the tokens and logits of each."""
    folder = tmp_path_factory.mktemp("pretrained")
    for name, model in models.items():
        save(model, folder / name)
    answers = {name: logits(model) for name, model in models.items()}
    save_file({"tokens": tokens(2), **answers}, folder / "expected.safetensors")
    return folder


def assert_answers(model: nn.Module, expected: torch.Tensor) -> None:
    assert torch.equal(logits(model), expected)


START = """
import json, sys
from pathlib import Path
{imports}
import torch
from safetensors.torch import load_file, save_file

folder, seen = Path(sys.argv[1]), {{}}
torch.set_num_threads(1)
expected = load_file(folder / "expected.safetensors")


@torch.no_grad()
def same(model, name):
    model.eval()
    return torch.equal(model(input_ids=expected["tokens"]).logits, expected[name])

"""

LOADED = """
from transformers import AutoModelForCausalLM
for name in expected.keys() - {"tokens"}:
    model = AutoModelForCausalLM.from_pretrained(folder / name)
    seen[name] = same(model, name) and same(quip.load(folder / name), name)
print(json.dumps(seen))
"""


@pytest.mark.parametrize(
    "imports",
    [
        "import transformers, quip",
        pytest.param("import quip, transformers", marks=pytest.mark.slow),
        pytest.param("import quip.packed.hub, quip", marks=pytest.mark.slow),
    ],
)
def test_a_new_process_gets_the_same_logits(imports, saved, models):
    # Where quip comes first it is told when transformers comes; otherwise it looks.
    code = START.format(imports=imports) + LOADED
    assert fresh(code, saved) == dict.fromkeys(models, True)


REFUSED = """
from transformers import AutoModel, AutoModelForCausalLM, pipeline
for path in (folder / "opt", folder / "stacks"):
    for load in (
        AutoModelForCausalLM.from_pretrained,
        AutoModel.from_pretrained,
        lambda path: pipeline("text-generation", model=str(path)),
    ):
        try:
            load(path)
        except (RuntimeError, ValueError) as error:
            seen.setdefault(path.name, []).append("ignore_mismatched_sizes" in str(error))
seen["quip"] = "quip" in sys.modules
print(json.dumps(seen))
"""


def test_without_quip_transformers_refuses_what_it_would_fill_at_random(saved, tmp_path):
    save(quantized("llama", {"codebook": "E8P12"}, blocks=2), tmp_path / "stacks")
    (tmp_path / "opt").symlink_to(saved / "opt")
    shutil.copy(saved / "expected.safetensors", tmp_path)
    seen = fresh(START.format(imports="") + REFUSED, tmp_path)
    assert seen == {"opt": [True] * 3, "stacks": [True] * 3, "quip": False}


def test_checkpoints_without_a_guard_are_read_as_before(saved, tmp_path, models):
    folder = Path(shutil.copytree(saved / "llama", tmp_path / "copy"))
    tensors = load_file(folder / "model.safetensors")
    assert tensors.pop("model.layers.0.mlp.down_proj.weight").shape == (0,)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert_answers(quip.load(folder), logits(models["llama"]))


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        *((name, INCOHERENT) for name in ("opt", "opt-350m", "llama", "gpt-neox")),
        ("llama", {"codebook": "E8P12"}),
        ("opt", VECTORS["1D"]),
        ("llama", VECTORS["2D"]),
        ("qwen2", VECTORS["4D"]),
    ],
)
def test_a_model_without_its_head_has_the_hidden_states_of_the_whole(name, flags, tmp_path):
    whole = quantized(name, flags, blocks=2)
    folder = save(whole, tmp_path / "whole")

    @torch.no_grad()
    def hidden(model: nn.Module) -> torch.Tensor:
        base = model.requires_grad_(False).base_model
        return base(input_ids=tokens(2)).last_hidden_state

    expected = hidden(whole)
    base, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert len(quantized_layers(base)) == len(quantized_layers(whole))
    assert torch.equal(hidden(base), expected)
    base.save_pretrained(tmp_path / "base")
    again = AutoModel.from_pretrained(tmp_path / "base")
    headed, info = AutoModelForCausalLM.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert not info["unexpected_keys"]
    assert torch.equal(hidden(again), expected)
    assert torch.equal(hidden(headed), expected)


NEEDS_QUIP_ONLY_TO_PACK = """
from transformers import AutoModelForCausalLM
for path in sorted(folder.glob("dense-*")):
    seen[path.name] = same(AutoModelForCausalLM.from_pretrained(path), path.name)
seen["quip"] = "quip" in sys.modules
print(json.dumps(seen))
"""


@pytest.mark.slow
def test_the_dense_model_is_plain_and_loads_without_quip(saved, tmp_path):
    expected = {"tokens": tokens(2)}
    for name in NAMES:
        model = AutoModelForCausalLM.from_pretrained(saved / name)
        packed = logits(model)
        for kind in ("dequantized", "converted"):
            if kind == "dequantized":
                model.dequantize()
            else:
                model = to_dense(quip.load(saved / name))
            assert not quantized_layers(model)
            # In float32, other products and one rounding of W_hat more.
            torch.testing.assert_close(logits(model), packed, rtol=0, atol=5e-5)
            model.save_pretrained(tmp_path / f"dense-{kind}-{name}")
            expected[f"dense-{kind}-{name}"] = logits(model)
            config = (tmp_path / f"dense-{kind}-{name}" / "config.json").read_text()
            assert "quantization_config" not in config
    save_file(expected, tmp_path / "expected.safetensors")
    seen = fresh(START.format(imports="") + NEEDS_QUIP_ONLY_TO_PACK, tmp_path)
    assert seen.pop("quip") is False
    assert seen == dict.fromkeys(expected.keys() - {"tokens"}, True)


def test_quip_alone_imports_neither_torch_nor_transformers():
    heavy = ["torch", "transformers", "numpy", "quip.packed.hub"]
    print_loaded = f"print(json.dumps([name for name in {heavy} if name in sys.modules]))"
    assert fresh(f"import json, sys, quip; dir(quip); {print_loaded}") == []
    loaded = fresh(f"import json, sys, quip; quip.build_recipe; {print_loaded}")
    assert "transformers" not in loaded


@pytest.mark.parametrize("name", NAMES)
def test_a_loaded_model_is_saved_and_loaded_again_bitwise(name, saved, models, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(saved / name)
    model.save_pretrained(tmp_path / "again")
    expected = logits(models[name])
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert_answers(again, expected)
    words = [
        json.loads((folder / "config.json").read_text())["quantization_config"]
        for folder in (saved / name, tmp_path / "again")
    ]
    assert words[0] == words[1]
    save(again, tmp_path / "packed")
    first, last = (
        load_file(folder / "model.safetensors") for folder in (saved / name, tmp_path / "packed")
    )
    assert first.keys() == last.keys()
    assert all(torch.equal(x, last[k]) and x.dtype == last[k].dtype for k, x in first.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_dtype_asked_for_is_computed_in_and_casts_no_packed_tensor(dtype, saved, models):
    for load in (AutoModelForCausalLM.from_pretrained, quip.load):
        model = load(saved / "opt", dtype=dtype)
        assert model.dtype == dtype
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
        for name, layer in quantized_layers(model).items():
            ours = quantized_layers(models["opt"])[name].stored()
            assert all(torch.equal(x, ours[k]) for k, x in layer.stored().items())
            assert all(x.dtype == ours[k].dtype for k, x in layer.stored().items())
        assert logits(model).dtype == dtype
        # Three blocks lose a few units in the last place of the less precise of both runs.
        noise = 16 * max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
        assert_near(logits(model).double(), logits(models["opt"]).double(), noise)


@pytest.mark.parametrize("device_map", [{"": "cpu"}, "auto", "cpu"], ids=str)
def test_device_maps_are_taken(device_map, saved, models):
    for load in (AutoModelForCausalLM.from_pretrained, quip.load):
        model = load(saved / "llama", device_map=device_map)
        assert_answers(model, logits(models["llama"]))


@pytest.mark.parametrize(
    "flags",
    [INCOHERENT, {"codebook": "E8P12"}, VECTORS["2D"]],
    ids=["int", "lattice", "vectors"],
)
def test_blocks_may_stay_on_the_disk(flags, tmp_path):
    packed = quantized("llama", flags, blocks=3)
    folder = save(packed, tmp_path / "model")
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    places |= {f"model.layers.{i}": "disk" if i == 1 else "cpu" for i in range(3)}
    places |= {"lm_head": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(
        folder, device_map=places, offload_folder=tmp_path / "rest", offload_buffers=True
    )
    assert_answers(model, logits(packed))
    assert_answers(model, logits(packed))


@pytest.mark.parametrize("name", NAMES)
def test_generation_goes_on_as_with_the_dense_model(name, saved):
    model = quip.load(saved / name)
    prompt = tokens(2)
    made = model.generate(prompt, max_new_tokens=6, do_sample=False)
    assert made.shape == (2, prompt.shape[1] + 6)
    assert torch.equal(made, to_dense(model).generate(prompt, max_new_tokens=6, do_sample=False))


def test_transformers_is_told_that_packed_models_are_saved_and_take_adapters(saved):
    model = AutoModelForCausalLM.from_pretrained(saved / "opt")
    assert model.hf_quantizer.is_serializable()
    assert model.hf_quantizer.is_trainable
    assert not model.hf_quantizer.is_qat_trainable


def test_a_pipeline_takes_a_checkpoint(saved):
    answer = pipeline("text-generation", model=str(saved / "llama"))
    made = answer("ab", max_new_tokens=4, do_sample=False, return_full_text=False)
    model, tokenizer = quip.load(saved / "llama"), answer.tokenizer
    ids = model.generate(**tokenizer("ab", return_tensors="pt"), max_new_tokens=4, do_sample=False)
    assert made[0]["generated_text"] == tokenizer.decode(ids[0, 2:])


def test_a_model_that_was_loaded_is_saved_as_small_as_it_was(saved, tmp_path):
    for name in NAMES:
        model = AutoModelForCausalLM.from_pretrained(saved / name, dtype=torch.float32)
        model.save_pretrained(tmp_path / name)
        files = [folder / name / "model.safetensors" for folder in (saved, tmp_path)]
        ours, theirs = map(header_of, files)
        assert ours["__metadata__"].pop(DIGESTS)
        assert ours == theirs
        assert body_of(files[0]) == body_of(files[1])
        assert not quantized_layers(model.dequantize())


def test_a_plain_model_is_not_quantized_on_the_way(saved, models, tmp_path):
    to_dense(quip.load(saved / "llama")).save_pretrained(tmp_path)
    config = QuipConfig.of(models["llama"])
    with pytest.raises((ValueError, QuipError)):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)


def test_the_config_says_what_is_packed_and_how(models):
    config = QuipConfig.of(models["llama"])
    words = json.loads(json.dumps(config.to_dict()))
    assert words["format"] == 1
    assert words["quant_method"] == "quip"
    assert words["codebook"] == {"kind": "grid", "bits": 2, "group": 1, "symmetric": True}
    assert words["transforms"] == [
        {"kind": "rescale"},
        {"kind": "kronecker", "blocked": False, "permute": True},
    ]
    assert words["modules"] == sorted(quantized_layers(models["llama"]))
    assert QuipConfig(**words).to_dict() == config.to_dict()
    assert QuipConfig.from_dict(words).to_dict() == config.to_dict()
    assert "bits" in repr(config)


@pytest.mark.parametrize(
    ("form", "remedy"),
    [(4, "upgrade quip"), (0, "damaged"), (None, "damaged"), ("1", "damaged")],
)
def test_other_formats_are_refused(form, remedy, models):
    words = {**QuipConfig.of(models["llama"]).to_dict(), "format": form}
    with pytest.raises(QuipError, match=f"a checkpoint of format {form!r}, .* formats 1, 2, 3: "):
        QuipConfig(**words)
    with pytest.raises(QuipError, match=remedy):
        QuipConfig(**words)


def test_the_module_may_be_executed_again():
    source = Path(hub.__file__).read_text()
    exec(compile(source, "again", "exec"), {"__name__": "again"})
    assert AUTO_QUANTIZATION_CONFIG_MAPPING["quip"] is QuipConfig
    assert AUTO_QUANTIZER_MAPPING["quip"] is QuipQuantizer


def test_a_config_of_another_size_is_refused(saved, tmp_path):
    folder = Path(shutil.copytree(saved / "llama", tmp_path / "copy"))
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "num_hidden_layers": 2}))
    with pytest.raises(QuipError, match=r"layers\.2\.mlp.* but in a LlamaForCausalLM there is no"):
        AutoModelForCausalLM.from_pretrained(folder)
    path.write_text(json.dumps({**config, "num_hidden_layers": 4}))
    with pytest.raises(QuipError, match=r"missing keys such as model\.layers\.3"):
        quip.load(folder)
    path.write_text(json.dumps({**config, "hidden_size": 64}))
    with pytest.raises(QuipError, match=r"config.json asks for I32 \[32, 4\], and the files hold"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_packed_modules_are_where_the_config_says(saved):
    model = AutoModelForCausalLM.from_pretrained(saved / "llama")
    config = model.hf_quantizer.quantization_config
    assert set(config.layout.modules) == set(quantized_layers(model))
    assert isinstance(model.get_submodule(Q), QuantizedLinear)
    assert type(model.lm_head) is nn.Linear
