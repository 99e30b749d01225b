"""Section `block`: a random block of Llama-2-7B's shape, on 128 windows of 2048 tokens.

The first rows are what comes once a model (`enter`: embeddings, and what blocks are called with)
and once a block whatever the recipe (`observe`). A row of a recipe has the seconds that quantizing
all matrices took, those of replaying the windows through what came of it, and the model's: 32 of
all.
"""

import copy
import time
from collections.abc import Callable

import torch
from _measure import device, emit, synchronize
from _models import FED, LAYERS, RECIPES, llama, pack_block

from quip.model.block import Block
from quip.model.block_module import BlockModule
from quip.model.states import batch_size_for
from quip.model.walk import walk

ON = device()
WINDOWS, TOKENS = (128, 2048) if ON.type == "cuda" else (4, 32)
RUNS = 2 if ON.type == "cuda" else 1  # the first compiles, and chooses algorithms
ORDER = ("int 4", "gptq 4 g128", "int 2", "E8P12", "E8P12RVQ4B")
TARGETS = {"int 4": 1.5, "int 2": 1.5, "gptq 4 g128": 1.5, "E8P12": 2.0, "E8P12RVQ4B": 2.0}


def main() -> None:
    model = llama(1, ON).cpu()
    original = copy.deepcopy(model.model.layers[0])
    vocab = model.config.vocab_size
    ids = torch.randint(vocab, (WINDOWS, TOKENS), generator=torch.Generator().manual_seed(0))
    size = batch_size_for(TOKENS, model, ON)
    blocks = walk(model, ids, device=ON, batch_size=size)
    block, seconds = timed(lambda: next(blocks))
    emit(stage="enter", seconds=seconds, windows_at_once=size, hidden_on=str(block.hidden.device))
    timed(block.observe)  # chooses algorithms, and compiles what is compiled
    hessians, observe = timed(block.observe)
    emit(stage="observe", seconds=observe)
    H = {name.rpartition(".")[2]: hessian.value() for name, hessian in hessians.items()}
    for code in ORDER:
        measure(code, block, original, {group[0]: H[group[0]] for group in FED}, observe)
    blocks.close()


def measure(
    code: str, block: Block, original: torch.nn.Module, H: dict[str, torch.Tensor], observe: float
) -> None:
    """One row. Each is of the original weights; the hidden states are those of the row before."""
    seconds: list[float] = []
    for _ in range(RUNS):
        module = BlockModule(0, block.name, copy.deepcopy(original).to(ON), device=ON)
        seconds.append(timed(lambda module=module: pack_block(module, H, RECIPES[code]))[1])
    block.module = module.module
    _, replay = timed(block.replay)
    total = observe + seconds[-1] + replay
    emit(
        recipe=code,
        observe=observe,
        quantize=seconds[-1],
        first_quantize=seconds[0],
        replay=replay,
        block=round(total, 3),
        model_s=round(LAYERS * total, 1),
        target_block=TARGETS[code],
        peak_gb=round(torch.cuda.max_memory_allocated() / 1e9, 1) if ON.type == "cuda" else None,
    )


def timed(call: Callable[[], object]) -> tuple:
    """What a call gives, and its seconds until the device is done."""
    synchronize()
    start = time.perf_counter()
    found = call()
    synchronize()
    return found, round(time.perf_counter() - start, 3)


if __name__ == "__main__":
    main()
