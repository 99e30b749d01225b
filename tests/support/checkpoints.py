"""Tiny quantized models, in memory and in folders, and processes that know nothing of them yet."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from quip.errors import QuipError
from quip.matrix.build import build_recipe
from quip.matrix.recipe import Recipe
from quip.model.load import load_model
from quip.model.quantize import quantize_model
from quip.model.records import MatrixRecord
from quip.model.sensitivity.gather import measure_sensitivity
from quip.model.sensitivity.measure import Passing
from quip.packed.checkpoint import load, save_checkpoint
from tests.support.runs import save_model
from tests.support.tiny import EAGER_ONLY, tiny, tokens
from tests.support.tokenizer import save_tokenizer

INCOHERENT = {"quant": "ldlq", "wbits": 2, "incoh_processing": True}
SHARP = {"codebook": "E8P12"}
FEW = {"codebook": "vq", "groupsize": 256, "columns_per_group": 16, "em_iters": 3}
VECTORS = {  # learned codebooks that tiny matrices have weights for
    "1D": {**FEW, "wbits": 2, "vq_dim": 1, "codebook_bits": 16},
    "2D": {**FEW, "wbits": 2, "vq_dim": 2, "quant": "gptq", "vq_scaling": 8},
    "4D": {**FEW, "wbits": 1, "vq_dim": 4},
}
QUIP = build_recipe(**INCOHERENT)
RUN = {
    "model": "demo",
    "method": "ldlq, 2 bits",
    "recipe": {"order": "backwards"},
    "evaluation": {"pydoc": {"dataset": "pydoc", "windows": 3, "seqlen": 16, "sha256": "ab"}},
    "original_perplexity": {"pydoc": 20.0},
    "perplexity": {"pydoc": 25.0, "c4": "inf"},
}
ROOT = Path(__file__).parents[2]


def quantized(
    name: str = "llama",
    flags: dict[str, object] = INCOHERENT,
    *,
    blocks: int = 4,
    dtype: torch.dtype = torch.float32,
) -> PreTrainedModel:
    """A tiny model, of its first blocks only, with the attention that from_pretrained takes."""
    attention = "eager" if name in EAGER_ONLY else "sdpa"
    weights = tiny(name, attention)
    # Made in its dtype, as from_pretrained does it: a cast would round the rotary frequencies too.
    model = AutoModelForCausalLM.from_config(
        weights.config, dtype=dtype, attn_implementation=attention
    )
    model.eval().load_state_dict(weights.state_dict())
    decoder = model.get_decoder()
    decoder.layers = decoder.layers[:blocks]
    model.config.num_hidden_layers = blocks
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[:blocks]
    felt = None
    if flags.get("pre_rescale_out"):
        how = Passing(kind="fisher", seed=0, device=torch.device("cpu"))
        felt = measure_sensitivity(model, tokens(), how)
    quantize_model(model, tokens(), build_recipe(**flags), device="cpu", seed=0, felt=felt)
    return model.requires_grad_(False)


def mixed() -> PreTrainedModel:
    """A Llama of three blocks: of a grid, of stacked and single lattices, and of another grid."""
    flags = (INCOHERENT, SHARP, {"wbits": 4, "groupsize": 16})
    model, *others = (quantized("llama", of, blocks=3) for of in flags)
    for index, other in enumerate(others, 1):
        model.model.layers[index] = other.model.layers[index]
    return model


def tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """One token a letter; its files go to the folder."""
    save_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


def save(model: PreTrainedModel, folder: Path, **options: object) -> Path:
    save_checkpoint(model, tokenizer(folder.parent / "tokenizer"), folder, **options)
    return folder


def save_quantized(
    folder: Path, name: str = "opt", recipe: Recipe = QUIP, *, run: dict | None = RUN
) -> list[MatrixRecord]:
    """A tiny checkpoint with its tokenizer, and run.json with the records unless run is None."""
    loaded = load_model(save_model(folder.with_name(f"{folder.name}-original"), name))
    records = quantize_model(loaded.model, tokens(), recipe, device="cpu", seed=0)
    texts = {}
    if run is not None:
        texts["run.json"] = json.dumps({**run, "matrices": [vars(record) for record in records]})
    save_checkpoint(loaded.model, loaded.tokenizer, folder, texts=texts)
    return records


def edit(folder: Path, **words: object) -> None:
    """Change the quantization_config of config.json; None removes a word."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    changed = {**config["quantization_config"], **words}
    config["quantization_config"] = {k: x for k, x in changed.items() if x is not None}
    path.write_text(json.dumps(config))


def damage(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of model.safetensors."""
    path = folder / "model.safetensors"
    tensors = {name: x.clone() for name, x in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def fresh(code: str, *arguments: object) -> Any:
    """What a new Python process, with these arguments, prints at last: a line of JSON."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def forked(work: Callable[[], Any]) -> Any:
    """What a copy of this process makes, as JSON has it; nothing else of the copy comes back."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writer, json.dumps(work()).encode())
        finally:
            os._exit(0)  # without what pytest would do at the end
    os.close(writer)
    with open(reader) as answer:
        said = answer.read()
    os.waitpid(child, 0)
    return json.loads(said)


def refusal(folder: Path, load=load) -> str:
    """The one line with which a folder is refused."""
    with pytest.raises(QuipError) as caught:
        load(folder)
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith(f"{folder}: ")
    return f"{type(caught.value).__name__}: {line}"


def refusals(folder: Path) -> str:
    """That line, once load, load_model and from_pretrained have all refused the folder with it."""
    line = refusal(folder)
    assert refusal(folder, lambda folder: load_model(str(folder))) == line
    with pytest.raises(QuipError) as caught:
        AutoModelForCausalLM.from_pretrained(folder)
    assert line == f"{type(caught.value).__name__}: {folder}: {caught.value}"
    return line
