"""Tokens per second of a model that writes texts: their prompts at once, then token by token."""

import inspect
from dataclasses import dataclass
from statistics import median

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from quip.errors import UnsupportedModel, UsageError
from quip.evaluate.bandwidth import bytes_read, cache_bytes, copy_rate, now
from quip.evaluate.memory import measured, module_bytes
from quip.model.device import placed
from quip.model.finite import predicts, refuse
from quip.packed.step import fixed_step

BEGUN = 2  # steps that are not timed where a graph is made: the first loads, the second captures


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Medians over the repeats, of all texts of a batch together."""

    prefill_tokens_per_second: float  # tokens of prompts / time to the first new token
    decode_tokens_per_second: float  # texts / time of a token after the first, the same for all
    batch: int  # texts side by side
    prompt_tokens: int
    new_tokens: int
    repeats: int
    model_bytes: int  # parameters and buffers
    peak_bytes: int  # while it ran: of tensors on CUDA, of the whole process on the CPU
    peak_since_process_start: bool  # the system allows no reset: the peak may be older
    graph: bool  # whether a token of each text was one CUDA graph
    read_bytes: int  # that a token of each text needs: weights, and the cache after the prompts
    copy_bytes_per_second: float  # of the device's memory, read and written
    bandwidth_share: float  # read_bytes / time of a token, over copy_bytes_per_second


@dataclass(frozen=True, kw_only=True)
class Run:
    """One decoding of a batch of texts."""

    tokens: Int[Tensor, "batch new"]
    prefill_seconds: float
    token_seconds: float  # mean of those after the first
    cache_bytes: int
    graph: bool


@torch.no_grad()
def speed(
    model: PreTrainedModel,
    *,
    device: torch.device | str,
    batch: int = 1,
    prompt_tokens: int = 256,
    new_tokens: int = 32,
    repeats: int = 3,
    seed: int = 0,
) -> Speed:
    """Greedy decoding of random tokens with a key-value cache, timed after one warm-up.

    What generate() adds around the model is left out; its tokens are the same, except that
    nothing ends the text early. The model is on the device meanwhile, then back where it was.
    Raises NonFinite for a model that predicts nothing, whose tokens would be timed in vain.
    """
    counts = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "repeats": repeats}
    _check(model, batch=batch, **counts)
    rng = torch.Generator().manual_seed(seed)
    vocab = model.config.get_text_config().vocab_size
    prompts = torch.randint(vocab, (batch, prompt_tokens), generator=rng).to(device)
    with placed(model, device), measured(device) as memory:
        _decode(model, prompts, new_tokens=new_tokens)
        runs = [_decode(model, prompts, new_tokens=new_tokens) for _ in range(repeats)]
    seconds = median(run.token_seconds for run in runs)
    read, copied = bytes_read(model) + runs[0].cache_bytes, copy_rate(prompts.device)
    return Speed(
        prefill_tokens_per_second=prompts.numel() / median(run.prefill_seconds for run in runs),
        decode_tokens_per_second=batch / seconds,
        batch=batch,
        model_bytes=module_bytes(model),
        peak_bytes=memory.peak_bytes,
        peak_since_process_start=memory.since_process_start,
        graph=runs[0].graph,
        read_bytes=read,
        copy_bytes_per_second=copied,
        bandwidth_share=read / seconds / copied,
        **counts,
    )


def _check(
    model: PreTrainedModel, *, batch: int, prompt_tokens: int, new_tokens: int, repeats: int
) -> None:
    counts = {"batch": batch, "prompt_tokens": prompt_tokens, "repeats": repeats}
    # The first new token comes with the prompt: a time per token needs a second one.
    for name, value in (counts | {"new_tokens": new_tokens}).items():
        if value < (low := 2 if name == "new_tokens" else 1):
            raise UsageError(f"{name} is {value}; it must be at least {low}")
    if model.training:
        raise UsageError("the model is in training mode, where dropout is random; call eval()")
    # None where positions are not limited, as with ALiBi.
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and prompt_tokens + new_tokens > limit:
        raise UsageError(
            f"{prompt_tokens} prompt tokens and {new_tokens} new ones exceed the model's "
            f"{limit} positions; ask for fewer"
        )


def _decode(model: PreTrainedModel, prompts: Int[Tensor, "batch s"], *, new_tokens: int) -> Run:
    """The likeliest tokens, one by one."""
    # Of the prompt only the last position's logits, where the model can leave out the others.
    selective = "logits_to_keep" in inspect.signature(model.forward).parameters
    device, start = prompts.device, now(prompts.device)
    out = model(input_ids=prompts, use_cache=True, **({"logits_to_keep": 1} if selective else {}))
    cache = getattr(out, "past_key_values", None)
    if cache is None:
        raise UnsupportedModel(f"{type(model).__name__}: it returns no key-value cache")
    logits = out.logits[:, -1]
    tokens = [logits.argmax(-1, keepdim=True)]
    first, held = now(device), cache_bytes(cache)
    step = fixed_step(model, cache, new_tokens - 1)
    begun = 1 if step is None else 1 + BEGUN
    for count in range(1, new_tokens):
        if count == begun:
            second = now(device)
        if step is None:
            out = model(input_ids=tokens[-1], past_key_values=cache, use_cache=True)
            cache, logits = out.past_key_values, out.logits[:, -1]
        else:
            logits = step(tokens[-1])
        tokens.append(logits.argmax(-1, keepdim=True))
    end = now(device)
    if not predicts(logits):  # what is NaN in the cache stays, so the last token tells
        refuse(model, "what is decoded for its speed", input_ids=prompts, use_cache=False)
    return Run(
        tokens=torch.cat(tokens, dim=1),
        prefill_seconds=first - start,
        token_seconds=(end - second) / (new_tokens - begun),
        cache_bytes=held,
        graph=step is not None and step.captured,
    )
