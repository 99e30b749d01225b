"""Checkpoints of mixtures: saved by the names of their matrices, loaded anywhere, and refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM

from quip.errors import QuipError
from quip.jobs.export import export_dense
from quip.jobs.inspect import inspect_checkpoint
from quip.packed.checkpoint import check_saved, load, to_dense
from quip.packed.experts import Experts
from quip.packed.layout import Layout
from quip.packed.linear import quantized_layers
from quip.serve.generate import generate
from tests.laws import assert_near
from tests.support import format_reader
from tests.support.checkpoints import INCOHERENT, edit, fresh, refusals, save
from tests.support.mixtures import MIXTURES, ROUTERS, mixture, packed
from tests.support.speaking import numbers
from tests.support.tiny import logits, tokens

E = "model.layers.0.mlp.experts"


def experts_of(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, Experts)]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Path:
    """A folder with a packed checkpoint of each family, and the logits of each."""
    folder = tmp_path_factory.mktemp("mixtures")
    for name in MIXTURES:
        model = packed(mixture(name), INCOHERENT)
        save(model, folder / name)
        save_file({"logits": logits(model)}, folder / f"{name}.safetensors")
    save_file({"ids": tokens(2)}, folder / "tokens.safetensors")
    return folder


LOADED = """
import json, sys
from pathlib import Path
import quip
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

folder, seen = Path(sys.argv[1]), {}
torch.set_num_threads(1)
ids = load_file(folder / "tokens.safetensors")["ids"]
for path in sorted(p for p in folder.iterdir() if (p / "config.json").is_file()):
    expected = load_file(f"{path}.safetensors")["logits"]
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    with torch.no_grad():
        same = torch.equal(model(input_ids=ids).logits, expected)
        model.save_pretrained(path / "again")
        loaded = quip.load(path / "again")
        seen[path.name] = same and torch.equal(loaded(input_ids=ids).logits, expected)
print(json.dumps(seen))
"""


def test_a_new_process_gets_the_same_logits_and_saves_them_again(checkpoints):
    assert fresh(LOADED, checkpoints) == dict.fromkeys(MIXTURES, True)


@pytest.mark.parametrize("name", MIXTURES)
def test_dense_matrices_are_fused_again_as_transformers_loads_them(name, checkpoints, tmp_path):
    expected = logits(load(checkpoints / name))
    export_dense(checkpoints / name, tmp_path / "plain")
    found, info = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", output_loading_info=True)
    assert not any(info.values())
    assert {type(x) for x in found.modules()} == {type(x) for x in mixture(name).modules()}
    assert_near(logits(found), expected, 1e-5)  # the same products in another order


REFUSED = """
import json, sys
from pathlib import Path
from transformers import AutoModelForCausalLM

seen = {}
for path in map(Path, sys.argv[1:]):
    try:
        AutoModelForCausalLM.from_pretrained(path)
    except (RuntimeError, ValueError) as error:
        seen[path.name] = "ignore_mismatched_sizes" in str(error)
assert "quip" not in sys.modules
print(json.dumps(seen))
"""


@pytest.mark.slow
def test_without_quip_transformers_refuses_mixtures(checkpoints, tmp_path):
    only = [tmp_path / f"only-{name}" for name in MIXTURES]
    for path, name in zip(only, MIXTURES, strict=True):
        save(packed(mixture(name), INCOHERENT, lambda name: ".experts." in name), path)
    folders = [*(checkpoints / name for name in MIXTURES), *only]
    assert fresh(REFUSED, *folders) == {path.name: True for path in folders}


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss", "llama-4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_experts_that_were_left_dense_are_saved_as_they_are(name, dtype, tmp_path):
    def chosen(name: str) -> bool:
        return "layers.0" in name and ".experts.2" not in name and not name.endswith(ROUTERS)

    model = packed(mixture(name, dtype=dtype), INCOHERENT, chosen)
    expected = logits(model)
    loaded = load(save(model, tmp_path / "saved"))
    assert torch.equal(logits(loaded), expected)
    assert {*loaded.state_dict()} == {*model.state_dict()}
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again")), expected)
    assert not experts_of(to_dense(loaded))


@pytest.mark.parametrize("name", MIXTURES)
def test_headers_say_what_a_mixture_holds(name, checkpoints):
    check_saved(checkpoints / name)
    found, model = inspect_checkpoint(checkpoints / name, verify_tensors=True), mixture(name)
    assert found["weights"] == sum(x.numel() for x in model.parameters())
    assert found["quantized_matrices"] == len(quantized_layers(load(checkpoints / name)))
    assert (found["verification"]["damaged"], found["verification"]["unsigned"]) == (0, [])


def test_the_reader_of_the_format_makes_the_matrices_of_experts(checkpoints):
    model = load(checkpoints / "gpt-oss")
    layers = {name: model.get_submodule(name) for name in Layout.of(model).names}
    sizes = {name: (x.out_features, x.in_features) for name, x in layers.items()}
    read = format_reader.read(checkpoints / "gpt-oss", sizes)
    for name in (f"{E}.1.gate_up_proj", f"{E}.3.down_proj"):
        W = layers[name].dequantize()
        assert_near(torch.from_numpy(read[name]).float(), W, 2.0**-22)


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss", "llama-4"])
def test_a_mixture_writes_what_transformers_writes_with_it(name, checkpoints):
    model = load(checkpoints / name)
    model.generation_config.eos_token_id = None
    words = "5 9 33 2 61 7 40"
    ids = torch.tensor([[int(word) for word in words.split()]])
    theirs = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    ours = "".join(generate(model, numbers(), words, max_new_tokens=8)).split()
    assert [*map(int, ours)] == theirs[0, ids.shape[1] :].tolist()


def renamed(old: str, new: str):
    return lambda names: [new if name == old else name for name in names]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            renamed(f"{E}.3.down_proj", f"{E}.99999.gate_up_proj"),
            f"config.json says that {E}.99999.gate_up_proj is a quantized matrix, but in a "
            "MixtralForCausalLM there is no such module; download or save it again",
        ),
        (renamed(f"{E}.3.down_proj", f"{E}.03.down_proj"), f"{E}.03.down_proj is a quantized"),
        (renamed(f"{E}.3.down_proj", f"{E}.3.up_proj"), f"{E}.3.up_proj is a quantized matrix, bu"),
        (renamed(f"{E}.3.down_proj", f"{E}.3"), "but in a MixtralForCausalLM it is a Expert; do"),
        (
            renamed(f"{E}.3.down_proj", f"{E}.down_proj"),
            f"{E}.down_proj is a quantized matrix, but",
        ),
        (
            renamed(f"{E}.3.down_proj", f"{E}.2.down_proj"),
            f"its config.json names the matrix '{E}.2.down_proj' twice; download or save it again",
        ),
        (
            lambda names: [name for name in names if name != f"{E}.3.down_proj"],
            f"'{E}.3.down_proj.codes': the files hold it, and config.json names no quantized matri",
        ),
    ],
)
def test_a_config_that_names_other_experts_is_refused(change, reason, checkpoints, tmp_path):
    folder = Path(shutil.copytree(checkpoints / "mixtral", tmp_path / "copy"))
    words = json.loads((folder / "config.json").read_text())["quantization_config"]
    edit(folder, modules=change(words["modules"]))
    assert reason in refusals(folder)
    with pytest.raises(QuipError):
        inspect_checkpoint(folder)


@pytest.mark.parametrize(("count", "reason"), [(3, "the files hold"), (1025, "of up to 1024 are")])
def test_another_number_of_experts_is_refused(count, reason, checkpoints, tmp_path):
    folder = Path(shutil.copytree(checkpoints / "mixtral", tmp_path / "copy"))
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_local_experts": count}))
    assert reason in refusals(folder) or "no such module" in refusals(folder)
