"""Section `model`: whole models on a CUDA device against the CPU, and a run that is taken up.

A row is a model and a recipe: its perplexity when it was quantized on the device and when it was on
the CPU, and how far these are apart, relatively. The last rows say whether a run on the device that
broke off after its first block came out bit for bit as one that did not.
"""

import itertools
import tempfile
import time
from pathlib import Path

import torch
from _measure import device, emit
from _models import RECIPES
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

import quip
from quip.data import calibration_tokens, evaluation_tokens
from quip.evaluate.perplexity import perplexity
from quip.matrix.recipe import Recipe
from quip.model.ledger import Ledger
from quip.model.quantize import quantize_matrix_by_matrix
from quip.model.run import Run

ON = device()
CODES = ("int 2", "E8P12", "int 4")
WINDOWS, SEQLEN, MEASURED = (16, 512, 24) if ON.type == "cuda" else (2, 64, 2)
BATCH = 4


def main() -> int:
    same = True
    for name in ("demo", "llama"):
        tokens, measured = texts(name)
        for code in CODES if ON.type == "cuda" else CODES[:1]:
            both = {}
            for place in dict.fromkeys(("cpu", ON.type)):
                model, start = make(name), time.perf_counter()
                quantize(model, tokens, RECIPES[code], torch.device(place))
                seconds = round(time.perf_counter() - start, 2)
                both[place] = perplexity(model, measured, device=place, batch_size=BATCH)
                emit(model=name, recipe=code, on=place, quantize_s=seconds, perplexity=both[place])
            apart = round(abs(both[ON.type] / both["cpu"] - 1), 5)
            same = same and apart < 0.02
            emit(model=name, recipe=code, **both, apart=apart, alike=apart < 0.02)
    for code in CODES[:2] if ON.type == "cuda" else CODES[:1]:
        equal = resumed(texts("llama")[0], RECIPES[code])
        same = same and equal
        emit(model="llama", recipe=code, taken_up_is_bitwise_equal=equal)
    return int(not same)


def texts(name: str) -> tuple[Tensor, Tensor]:
    """Tokens to calibrate with, and others to measure on."""
    if name == "demo":
        tokenizer = quip.load_model("demo").tokenizer
        found = calibration_tokens("pydoc", tokenizer, nsamples=WINDOWS, seqlen=SEQLEN, seed=0)
        return found.ids, evaluation_tokens(
            "pydoc", tokenizer, seqlen=SEQLEN, nsamples=MEASURED
        ).ids
    ids = torch.randint(100, (2 * WINDOWS, 64), generator=torch.Generator().manual_seed(0))
    return ids[:WINDOWS], ids[WINDOWS:]


def make(name: str) -> nn.Module:
    """The demo model, or a Llama whose random weights are large enough to matter."""
    if name == "demo":
        return quip.load_model("demo", dtype="float32").model
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=3,
        num_attention_heads=4,
        vocab_size=100,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data.mul_(3 if parameter.ndim > 1 else 1)
    return model


def quantize(
    model: nn.Module,
    tokens: Tensor,
    recipe: Recipe,
    on: torch.device,
    ledger: Ledger | None = None,
    matrices: int | None = None,
) -> None:
    """All matrices, or the first so many, as if the run was broken off then."""
    run = Run(recipe=recipe, seed=0, device=on, batch_size=BATCH, ledger=ledger)
    for _ in itertools.islice(quantize_matrix_by_matrix(model, tokens, run), matrices):
        pass


def resumed(tokens: Tensor, recipe: Recipe) -> bool:
    """Whether a run that broke off in its second block comes out as one that did not."""
    whole, parts = make("llama"), make("llama")
    quantize(whole, tokens, recipe, ON)
    with tempfile.TemporaryDirectory() as folder:
        for matrices, model in ((10, make("llama")), (None, parts)):
            ledger = Ledger(Path(folder, "blocks"), {})
            ledger.open()
            quantize(model, tokens, recipe, ON, ledger, matrices)
    states = [model.state_dict() for model in (whole, parts)]
    return states[0].keys() == states[1].keys() and all(
        torch.equal(states[1][name].cpu(), x.cpu()) for name, x in states[0].items()
    )


if __name__ == "__main__":
    raise SystemExit(main())
