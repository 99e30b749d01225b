"""Section `decode`: decoding with packed blocks of Llama-2-7B's shape, beside dense ones.

A row is a code and a number of texts, by what `quip evaluate --speed` measures: `ms` is a token of
each text after 128 tokens, of a model of 4 blocks with its head, as one CUDA graph if `graph` says
so; `block_us` what each block adds, by a model of one; `tokens_per_s` a model of 32 such blocks,
and `over_bf16` how many times as fast that is as the dense one of the same run.
"""

import torch
from _measure import device, emit
from _models import LAYERS, RECIPES, llama, packed
from transformers import PreTrainedModel

from quip.evaluate.speed import Speed, speed

ON = device()
BLOCKS = 4 if ON.type == "cuda" else 2
SIZES = {"prompt_tokens": 128, "new_tokens": 64, "repeats": 3}
TINY = {"prompt_tokens": 8, "new_tokens": 6, "repeats": 1}
CODES = ("int 4", "int 2", "E8P12", "int 3") if ON.type == "cuda" else ("int 4", "E8P12")
BATCHES = (1, 4) if ON.type == "cuda" else (1,)
TARGETS = {"int 4": 2.2, "int 2": 3.0, "E8P12": 2.7}


@torch.no_grad()
def main() -> None:
    dense: dict[int, float] = {}
    for code in (None, *CODES):
        model = llama(BLOCKS, ON)
        if code:
            model = packed(model, RECIPES[code], ON)
        whole = {texts: measured(model, texts) for texts in BATCHES}
        model.model.layers = model.model.layers[:1]
        model.config.num_hidden_layers = 1
        for texts in BATCHES:
            ms = token_ms(whole[texts])
            block = (ms - token_ms(measured(model, texts))) / (BLOCKS - 1)
            projected = ms + (LAYERS - BLOCKS) * block
            dense.setdefault(texts, projected)
            emit(
                code=code or "bfloat16, dense",
                texts=texts,
                graph=whole[texts].graph,
                ms=round(ms, 4),
                block_us=round(1e3 * block, 1),
                prefill_tokens_per_s=round(whole[texts].prefill_tokens_per_second),
                share=round(whole[texts].bandwidth_share, 3),
                tokens_per_s=round(1e3 * texts / projected, 1),
                over_bf16=round(dense[texts] / projected, 2),
                target_over_bf16=TARGETS.get(code or "") if texts == 1 else None,
            )


def measured(model: PreTrainedModel, texts: int) -> Speed:
    """Prefill and decoding of so many texts."""
    sizes = SIZES if ON.type == "cuda" else TINY
    return speed(model, device=ON, batch=texts, **sizes)


def token_ms(found: Speed) -> float:
    """Milliseconds of a token of each text."""
    return 1e3 * found.batch / found.decode_tokens_per_second


if __name__ == "__main__":
    main()
