"""Section `decode`: a step of decoding with packed blocks of Llama-2-7B's shape, beside dense ones.

A row is a code and a number of texts: `ms` is a step of a model of 4 blocks with its head, after
128 tokens, in one CUDA graph with a static cache; `block_us` what each block adds, by a model of
one; `tokens_per_s` a model of 32 such blocks, and `over_bf16` how many times as fast that is as the
dense one of the same run. On a CPU, steps without a graph.
"""

import statistics
import sys
import time
from collections.abc import Callable

import torch
from _measure import device, emit, synchronize
from _models import LAYERS, RECIPES, llama, packed
from torch import Tensor
from transformers import PreTrainedModel, StaticCache

ON = device()
BLOCKS = 4 if ON.type == "cuda" else 2
PROMPT, ROOM = (128, 1024) if ON.type == "cuda" else (8, 64)
REPLAYS, REPEATS = (20, 5) if ON.type == "cuda" else (1, 2)
CODES = ("int 4", "int 2", "E8P12", "int 3")
BATCHES = (1, 4) if ON.type == "cuda" else (1,)
TARGETS = {"int 4": 2.2, "int 2": 3.0, "E8P12": 2.7}


@torch.inference_mode()
def main() -> None:
    dense: dict[int, float] = {}
    for code in (None, *CODES):
        model = llama(BLOCKS, ON)
        if code:
            model = packed(model, RECIPES[code], ON)
        for texts in BATCHES:
            whole, in_graph = step_ms(model, texts)
            layers, model.model.layers = model.model.layers, model.model.layers[:1]
            model.config.num_hidden_layers, (one, _) = 1, step_ms(model, texts)
            model.model.layers, model.config.num_hidden_layers = layers, BLOCKS
            block = (whole - one) / (BLOCKS - 1)
            projected = whole + (LAYERS - BLOCKS) * block
            dense.setdefault(texts, projected)
            emit(
                code=code or "bfloat16, dense",
                texts=texts,
                graph=in_graph,
                ms=round(whole, 4),
                block_us=round(1e3 * block, 1),
                tokens_per_s=round(1e3 * texts / projected, 1),
                over_bf16=round(dense[texts] / projected, 2),
                target_over_bf16=TARGETS.get(code or "") if texts == 1 else None,
            )
        del model, layers


def step_ms(model: PreTrainedModel, texts: int) -> tuple[float, bool]:
    """The median time of one step, after the prompt, and whether it was a CUDA graph."""
    cache = StaticCache(config=model.config, max_cache_len=ROOM)
    vocab = model.config.vocab_size
    ids = torch.randint(vocab, (texts, PROMPT), generator=torch.Generator().manual_seed(0)).to(ON)
    token = ids[:, -1:].clone()
    model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)

    def step() -> Tensor:
        out = model(input_ids=token, past_key_values=cache, use_cache=True)
        token.copy_(out.logits[:, -1:].argmax(-1))
        return token

    run = captured(step)
    times = []
    for _ in range(REPEATS):
        synchronize()
        start = time.perf_counter()
        for _ in range(REPLAYS):
            run()
        synchronize()
        times.append(1e3 * (time.perf_counter() - start) / REPLAYS)
    return statistics.median(times), run is not step


def captured(step: Callable[[], Tensor]) -> Callable[[], object]:
    """The step as a CUDA graph, which writes the next token where it read the last one.

    The step itself on a CPU, and where it does what a graph cannot.
    """
    if ON.type == "cpu":
        return step
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            step()
    except RuntimeError as error:
        print(f"decode: no CUDA graph: {error}", file=sys.stderr)
        return step
    return graph.replay


if __name__ == "__main__":
    main()
